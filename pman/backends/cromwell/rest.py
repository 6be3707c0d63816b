"""Cromwell's REST interface, as much of it as pman uses: https://cromwell.readthedocs.io/en/latest/api/RESTAPI/"""

import functools
import importlib
import io
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from pman.backends import retry
from pman.errors import BackendError, Misconfigured, PmanError, Unreachable
from pman.settings import Settings

# Words by database, of a taken id and of a column that is too short; some Cromwell versions word them as 500.
IN_USE = re.compile(r"already in use|constraint|duplicate", re.IGNORECASE)
_REFUSED_ROW = re.compile(rf"{IN_USE.pattern}|truncat|too long", re.IGNORECASE)


class Client:
    """Cromwell's REST interface over pooled connections. Safe to share between threads.

    cromwell-tools makes the credentials and the multipart manifest; its own calls know no time-outs and no pool.
    Its label check is not used: it holds the rules of Cromwell 31 and refuses dots, upper case and 64 characters.
    """

    def __init__(self, url: str, authenticate: Callable[[], Any], timeout_seconds: float) -> None:
        root = re.sub(r"(/api(/workflows)?(/v1)?)?/*$", "", url.strip())
        self._root, self._base = root, f"{root}/api/workflows/v1"
        self._named = re.sub(r"//[^/]*@", "//", root)  # without a password, for people
        self._timeout = (timeout_seconds, timeout_seconds)
        self._authenticate = authenticate
        self._lock = threading.Lock()
        self._session = requests.Session()
        # What requests would otherwise look up in the environment and in ~/.netrc for every single call.
        self._session.proxies = requests.utils.get_environ_proxies(root)
        self._session.verify = self._session.merge_environment_settings(root, {}, None, None, None)["verify"]
        self._session.trust_env = False
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=64))

    def _call(self, method: str, url: str, accept: Iterable[int] = (200,), **kwargs: Any) -> requests.Response:
        """The answer, when its status is one of `accept`. Raises Unreachable where a repetition may help."""
        try:
            with self._lock:  # credentials of a service account are renewed here
                auth = self._authenticate()
                kwargs.update(auth=auth.auth, headers=auth.header)
            answer = self._session.request(method, url, timeout=self._timeout, allow_redirects=False, **kwargs)
        except Exception as error:
            if isinstance(error, requests.RequestException) or type(error).__module__.startswith("google.auth"):
                raise Unreachable(f"Cromwell at {self._named} does not answer.", detail=str(error)) from error
            raise
        if answer.status_code not in accept:
            raise _error(answer)
        return answer

    def _json(self, method: str, url: str, **kwargs: Any) -> dict[str, Any]:
        answer = self._call(method, url, **kwargs)
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Unreachable(f"What answers at {self._named} is not Cromwell, or not yet.", detail=answer.text)
        return body

    def submit(
        self, name: str, wdl: str, options: str, labels: Mapping[str, str], on_hold: bool = False
    ) -> requests.Response:
        """201, or 400 with Cromwell's words, without which nobody knows whether the id is taken.

        500 is how some databases word a refused row.
        """
        manifest = _tools("utilities").prepare_workflow_manifest(
            io.BytesIO(wdl.encode()), options_file=io.BytesIO(options.encode()),
            label_file=io.BytesIO(json.dumps(labels).encode()), on_hold=on_hold,
        )  # fmt: skip
        identity = {"requestedWorkflowId": name}
        answer = self._call("POST", self._base, (201, 400, 500), files=manifest, data=identity)
        if answer.status_code == 500 and not _REFUSED_ROW.search(answer.text):
            raise _error(answer)
        if answer.status_code == 400 and not answer.text:
            raise Unreachable(f"Cromwell at {self._named} refuses a workflow and does not say why.")
        return answer

    def query(self, label: str, more: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Workflows with this `key:value` label, their labels included; in pages the newest come first."""
        params = {"label": label, "additionalQueryResultFields": "labels", **(more or {})}
        found = self._json("GET", f"{self._base}/query", params=params)
        return list(found.get("results", []))

    def query_several(self, labels: Iterable[str]) -> list[dict[str, Any]]:
        """Workflows with one of these labels, their labels included. By POST: an address takes 2 KiB."""
        body = [*({"labelor": label} for label in labels), {"additionalQueryResultFields": "labels"}]
        return list(self._json("POST", f"{self._base}/query", json=body).get("results", []))

    def status(self, name: str) -> str:
        """The workflow's status, "" while Cromwell does not know it."""
        found = self._json("GET", f"{self._base}/{name}/status", accept=(200, 404))
        return "" if found["status"] == "fail" else str(found["status"])

    def metadata(self, name: str, keys: Iterable[str]) -> dict[str, Any]:
        """Metadata whose keys begin with one of `keys`, {} when there is none."""
        found = self._json("GET", f"{self._base}/{name}/metadata", accept=(200, 404), params={"includeKey": [*keys]})
        return {} if found.get("status") == "fail" else found

    def patch_labels(self, name: str, labels: Mapping[str, str]) -> None:
        self._call("PATCH", f"{self._base}/{name}/labels", json=dict(labels))

    def abort(self, name: str) -> None:
        """404 where nothing is in progress, or no longer: both are fine."""
        self._call("POST", f"{self._base}/{name}/abort", (200, 404))

    def describe(self, wdl: str) -> list[str] | None:
        """What Cromwell has against a workflow; None where it is too old to say.

        https://cromwell.readthedocs.io/en/stable/api/RESTAPI/ (POST /api/womtool/{version}/describe).
        """
        url = f"{self._root}/api/womtool/v1/describe"
        answer = self._json("POST", url, accept=(200, 404), files={"workflowSource": wdl})
        if "valid" not in answer:
            return None
        return [] if answer["valid"] else [str(error) for error in answer.get("errors") or ["it does not say why"]]

    def backends(self) -> list[str]:
        """The names of all, its default one first."""
        found = self._json("GET", f"{self._base}/backends")
        return sorted(found["supportedBackends"], key=lambda name: bool(name != found.get("defaultBackend")))

    def version(self) -> str:
        return str(self._json("GET", f"{self._root}/engine/v1/version").get("cromwell", ""))


def connect(settings: Settings) -> Client:
    """The client that CROMWELL_URL and the credentials make. Nothing is sent yet."""
    assert settings.cromwell_url is not None
    return Client(settings.cromwell_url, _authentication(settings), settings.cromwell_timeout_seconds)


def _authentication(s: Settings) -> Callable[[], Any]:
    """Makes the cromwell-tools CromwellAuth when it is first needed: a service account's asks Google for a token."""
    auth = _tools("cromwell_auth").CromwellAuth
    url = str(s.cromwell_url)
    if s.cromwell_service_account is not None:
        if not s.cromwell_service_account.is_file():
            raise Misconfigured(f"CROMWELL_SERVICE_ACCOUNT: there is no file {s.cromwell_service_account}.")
        return functools.cache(lambda: auth.from_service_account_key_file(str(s.cromwell_service_account), url))
    if s.cromwell_auth_user is not None and s.cromwell_auth_password is not None:
        password = s.cromwell_auth_password.get_secret_value()
        return functools.cache(lambda: auth.from_user_password(s.cromwell_auth_user, password, url))
    return functools.cache(lambda: auth.from_no_authentication(url))


def _tools(module: str) -> Any:
    """A module of cromwell-tools, imported when the first client is made (0.1 s); its pkg_resources warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"cromwell_tools.{module}")


def _error(answer: requests.Response) -> PmanError:
    code, said = answer.status_code, f"Cromwell answers {answer.status_code}: {words(answer)}"
    if code in (401, 403):
        hint = "Look at CROMWELL_AUTH_USER, CROMWELL_AUTH_PASSWORD or CROMWELL_SERVICE_ACCOUNT."
        return BackendError(f"{said} {hint}", detail=answer.text)
    if not (code in (404, 408, 429) or code >= 500):
        return BackendError(said, detail=answer.text)
    error = Unreachable(said, detail=answer.text)
    error.retry_after_seconds = retry.asked_seconds(answer.headers.get("Retry-After"))
    return error


def words(answer: requests.Response) -> str:
    """What an error's body says, in at most 500 characters."""
    try:
        text = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.reason if "<" in answer.text else answer.text
    return f"{' '.join(text.split())[:500].rstrip('.')}."
