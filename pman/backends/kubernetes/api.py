"""The way to a Kubernetes API server: credentials, one pool of connections, JSON in and out, its errors as pman's.

Not the client's API classes: importing any part of `kubernetes` takes over a second and 48 MiB (measured, 36.0.3),
and its models stand between the rendered text and the server. Inside a cluster nothing of it is needed; outside, its
reader of kubeconfig files (certificates, exec plug-ins, OIDC, proxies) is used, and its connection pool.
"""

import contextlib
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
import yaml
from urllib3.util.ssl_match_hostname import CertificateError

from pman import __version__
from pman.backends import logs, retry
from pman.errors import BackendError, BadRequest, Misconfigured, PmanError, Refused, TooLarge, Unreachable

log = logging.getLogger(__name__)

TIMEOUT = urllib3.Timeout(connect=3.0, read=10.0)  # seconds
CONNECTIONS = 32
DENIED_SECONDS = 0.7
# https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_SECONDS = 60.0  # kubelet replaces the token's file well before the token expires
# The words of RBAC (https://github.com/kubernetes/apiserver, handlers/responsewriters/errors.go). Quota and policies
# answer 403 too, in words of their own, which may well hold "cannot".
_DENIED = re.compile(r' cannot \w+ resource "')

Object = dict[str, Any]


class LogsUnavailable(Unreachable):
    """The API server answers, but not the node that has the logs. waited: nobody said so before a time-out."""

    waited = False


class Denied(Unreachable):
    """pman lacks a right. Transient: for a second after its start an API server denies everything (measured, 1.35)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An API server, how to connect, and the headers of the moment that say who asks."""

    url: str
    pool: urllib3.PoolManager
    credentials: Callable[[], Mapping[str, str]]


class Api:
    """Calls of one API server, for all threads. Never repeats a call: `retry.call` owns that."""

    def __init__(self, endpoint: Callable[[], Endpoint]) -> None:
        self._connect = endpoint
        self._endpoint: Endpoint | None = None

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        allow: Collection[int] = (),
    ) -> tuple[int, Object]:
        """Status code and body of an answer below 300 or in `allow`; any other becomes one of pman's errors.

        A redirection is one: it leads to the login page of a proxy before the API server. So is an answer that is not
        Kubernetes' own document, which says nothing: not even that a job is missing.
        """
        response = self._send(method, path, query, body)
        document = _document(response.data)
        data = _in_place(response.data) if document is None else document
        if not _is_own(response.status, document, response.data):
            said = f": {_sentence(data)}" if response.data else ""
            raise Unreachable(f"Kubernetes' answer ({response.status}) was cut off, or a proxy gave it{said}.")
        if response.status >= 300 and response.status not in allow:
            raise self._error(response, data)
        return response.status, data

    def tail(self, path: str, query: Mapping[str, str], wanted: logs.Wanted) -> bytes:
        """The end of a text, at most `wanted.max_bytes` of it, while little more than twice that is held.

        b"" while there is no such text. Raises LogsUnavailable when it is not all there after `wanted.seconds` and one
        read time-out.
        """
        deadline = time.monotonic() + wanted.seconds
        try:
            response = self._send("GET", path, query, stream=True)
            if response.status in (204, 400, 404):
                return b""
            if response.status in (500, 502, 504):
                raise LogsUnavailable(_sentence(_json(response.read(4096))))
            if response.status >= 300:
                raise self._error(response, _json(response.read(65536)))
            kept = bytearray()
            if not logs.keep_end(kept, response.stream(65536), wanted.max_bytes, deadline):
                raise TimeoutError
            return bytes(kept[-wanted.max_bytes :])
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError) as error:
            silent = LogsUnavailable("the node does not answer")
            silent.waited = True
            raise silent from error
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"Kubernetes cut the logs off: {error}.") from error

    def _send(
        self, method: str, path: str, query: Mapping[str, str] | None, body: object = None, stream: bool = False
    ) -> urllib3.BaseHTTPResponse:
        endpoint = self._endpoint = self._endpoint or self._connect()
        content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": f"pman/{__version__}"}
        url = endpoint.url + path + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            return endpoint.pool.request(
                method, url, body=data, headers=headers | dict(endpoint.credentials()), timeout=TIMEOUT,
                retries=False, redirect=False, preload_content=not stream,
            )  # fmt: skip
        except urllib3.exceptions.ReadTimeoutError:
            if stream:
                raise
            raise Unreachable(f"The Kubernetes API server {endpoint.url} does not answer in time.") from None
        except urllib3.exceptions.HTTPError as error:
            if _is_distrust(error):
                raise BackendError(
                    f"The certificate of {endpoint.url} is not the one that pman trusts: {error}."
                ) from error
            raise Unreachable(
                f"The Kubernetes API server {endpoint.url} cannot be reached: {_cause(error)}."
            ) from error

    def _error(self, response: urllib3.BaseHTTPResponse, data: Object) -> PmanError:
        if response.status == 401:
            self._endpoint = None  # read the credentials again before the next attempt
            return Unreachable(
                "Kubernetes does not accept pman's credentials (401 Unauthorized): its token is wrong or has expired."
            )
        return to_error(response.status, data, response.headers.get("Retry-After", ""))


def to_error(status: int, data: Object, retry_after: str = "") -> PmanError:
    """The error for an answer of `status` whose body is the Kubernetes `Status` object `data`."""
    said = _sentence(data)
    denied = status == 403 and _DENIED.search(said) is not None
    lost_namespace = _details(data).get("kind") == "namespaces"
    rows: list[tuple[bool, type[PmanError], str]] = [
        (denied, Denied, f"pman lacks a right on Kubernetes: {said}."),
        (status == 403, Refused, f"Kubernetes refuses the job: {said}."),
        (status == 404 and lost_namespace, BackendError, f"The namespace of JOB_NAMESPACE does not exist: {said}."),
        (status == 413, TooLarge, f"The job is too large for Kubernetes: {said}."),
        (
            status == 400 and "cannot be handled as" in said,
            BackendError,
            f"The template renders what is no Job: {said}.",
        ),
        (status in (400, 422), BadRequest, f"Kubernetes refuses the job: {_causes(data) or said}."),
        # 410: of a list in pieces, which has to be begun again
        (status in (410, 429) or status >= 500, Unreachable, f"Kubernetes cannot answer now ({status}): {said}."),
        (True, BackendError, f"Kubernetes answers with an error ({status}): {said}."),
    ]
    error = next(kind(sentence) for holds, kind, sentence in rows if holds)
    if isinstance(error, Unreachable):
        error.retry_after_seconds = retry.asked_seconds(retry_after) or (DENIED_SECONDS if denied else 0.0)
    return error


def connect() -> Endpoint:
    """The cluster that this process runs in, else the one that KUBECONFIG (default ~/.kube/config) names.

    Raises Misconfigured when there is neither, or a file that is none.
    """
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if host and port and (ACCOUNT / "token").is_file():
        return _in_cluster(host, port)
    return _from_kubeconfig()


def _in_cluster(host: str, port: str) -> Endpoint:
    pool = urllib3.PoolManager(maxsize=CONNECTIONS, cert_reqs="CERT_REQUIRED", ca_certs=str(ACCOUNT / "ca.crt"))
    token = ("", -TOKEN_SECONDS)

    def credentials() -> Mapping[str, str]:
        nonlocal token
        if time.monotonic() - token[1] >= TOKEN_SECONDS:
            token = ((ACCOUNT / "token").read_text().strip(), time.monotonic())
        return {"Authorization": f"Bearer {token[0]}"}

    return Endpoint(f"https://{f'[{host}]' if ':' in host else host}:{port}", pool, credentials)


def _from_kubeconfig() -> Endpoint:
    from kubernetes import client, config  # noqa: PLC0415 - slow and large, see above

    configuration = client.Configuration()
    configuration.connection_pool_maxsize = CONNECTIONS
    try:
        config.load_kube_config(client_configuration=configuration)
    except (config.ConfigException, yaml.YAMLError, OSError, LookupError, TypeError, ValueError) as error:
        # The last three: it trusts the file to have the shape that it expects.
        said = " ".join(str(error).split()).rstrip(".")
        raise Misconfigured(
            f"There is no Kubernetes cluster to talk to: {said}. KUBECONFIG must name a kubeconfig file."
        ) from None

    def credentials() -> Mapping[str, str]:
        settings = configuration.auth_settings().values()  # asks an exec plug-in again when its token has expired
        return {setting["key"]: setting["value"] for setting in settings if setting["value"]}

    return Endpoint(
        configuration.host.rstrip("/"), client.rest.RESTClientObject(configuration).pool_manager, credentials
    )


def _json(data: bytes) -> Object:
    document = _document(data)
    return _in_place(data) if document is None else document


def _in_place(data: bytes) -> Object:
    """What stands before the API server says in its place."""
    return {"message": data[:500].decode(errors="replace")}


def _document(data: bytes) -> Object | None:
    """None where it is no JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        return found if isinstance(found, dict) else None
    return None


def _is_own(status: int, document: Object | None, data: bytes) -> bool:
    """Whether an answer that pman believes is Kubernetes' own. A refusal and a conflict may be in other words."""
    if status == 404:
        return document is not None and document.get("kind") == "Status"
    return document is not None or (bool(data) if status in (403, 409) else status >= 300)


def _sentence(data: Object) -> str:
    return " ".join(str(data.get("message") or data.get("reason") or "no reason given").split())[:1000].rstrip(".")


def _details(data: Object) -> Object:
    """Of a Status; what stands between may answer in JSON of its own, where `details` is a list or a text."""
    details = data.get("details")
    return details if isinstance(details, dict) else {}


def _causes(data: Object) -> str:
    causes = _details(data).get("causes") or []
    return "; ".join(dict.fromkeys(f"{cause.get('field')}: {cause.get('message')}" for cause in causes))[:1000]


def _is_distrust(error: urllib3.exceptions.HTTPError) -> bool:
    """Whether the server's certificate was refused; a handshake that broke off is an SSLError too."""
    cause = error.args[0] if isinstance(error, urllib3.exceptions.SSLError) and error.args else None
    return isinstance(cause, (ssl.SSLCertVerificationError, CertificateError))


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None) or (error.args[-1] if error.args else error)
    return str(reason).rsplit("> ", 1)[-1].rsplit(": ", 1)[-1].rstrip(".")
