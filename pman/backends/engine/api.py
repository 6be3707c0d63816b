"""What the Swarm and the Docker backend share: one pooled client of the Docker Engine API, its errors, its log frames.

The docker SDK brings transports (unix, tcp, ssh), TLS, the choice of the API's version and registry credentials.
Bodies are sent as templates render them, so calls go by path, not by the SDK's argument lists.
Engine API: https://docs.docker.com/reference/api/engine/version/v1.45/
"""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import docker.auth
import docker.constants
import docker.errors
import docker.tls
import requests
import urllib3

from pman.backends import documents, logs
from pman.errors import (
    BackendError,
    BadRequest,
    Conflict,
    Misconfigured,
    NotFound,
    PmanError,
    TooLarge,
    Unreachable,
)
from pman.job import Job
from pman.settings import Settings
from pman.templating.render import Spec

log = logging.getLogger(__name__)

JID = "org.chrisproject.pman.name"
DIGEST = "org.chrisproject.pman.digest"
IMAGE = "org.chrisproject.pman.image"
LIMIT = "org.chrisproject.pman.time-limit-minutes"
MEMORY = "org.chrisproject.pman.memory-mib"
SOCKETS = {"podman": "unix:///run/podman/podman.sock"}
PODMAN = "Podman Engine"  # the name among the Components of /version, of Podman 3 to 5
DOCKER_SOCKET = "unix:///var/run/docker.sock"
POOL_SIZE = 64  # connections kept; more are opened in need, and closed after use
SUBPATH_API = (1, 45)  # the first version of the API whose volume mounts have a Subpath; older ones ignore it
QUIET_SECONDS = 0.5  # a followed log that was silent for so long is taken to be read to its end
FOLLOW_SECONDS = 1.0  # one that is never silent is read for so long
LOGS_AT_ONCE = 8
CREDENTIALS_SECONDS = 60.0  # those of a registry are kept for so long: a credential helper is a process
_NO_ANSWER = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
# What engines answer 500 to although the same call succeeds a moment later.
_PASSING = re.compile(
    r"update out of sequence|does not have a leader|deadline exceeded|code = Unavailable|shutting down"
    r"|raft: (failed to process|no elected|node is not)"  # a Swarm's leader changes
    r"|is being prepared|needs to be unlocked"  # the second as soon as somebody does it
    r"|does not exist in database|/cgroup: no such process"  # Podman, of a container on its way out
)
_NAME_TAKEN = re.compile(r"name .* is already in use")
_OTHER_VERSION = re.compile(r"client version \S+ is too (old|new)")
_NO_DATE = "0001-01-01"  # how Go writes a time that is not set


@dataclass(frozen=True, slots=True)
class _Link:
    """A pool of connections to an engine, and what the engine says of itself."""

    pool: urllib3.HTTPConnectionPool
    version: str  # of the API
    is_podman: bool


class Engine:
    """One engine's API. Shared by all threads; connects when it is first asked, so that pman starts without it."""

    def __init__(self, settings: Settings) -> None:
        self.host = settings.docker_host or SOCKETS.get(settings.container_env, DOCKER_SOCKET)
        self._tls = _tls(settings)
        self._timeout_seconds = settings.docker_timeout_seconds
        self._link: _Link | None = None
        self._credentials: dict[str, tuple[float, dict[str, str]]] = {}

    def call(  # noqa: PLR0913 - one method in place of the SDK's hundred
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None,
        stream: bool = False, timeout_seconds: float | None = None, **params: Any,
    ) -> urllib3.BaseHTTPResponse:  # fmt: skip
        """One request; `params` that are mappings are sent as JSON. Raises pman's error for every status above 399."""
        link = self._linked()
        query = urllib.parse.urlencode({k: json.dumps(v) if isinstance(v, Mapping) else v for k, v in params.items()})
        url = f"/v{link.version}{path}?{query}"
        sent = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **(headers or {})} if sent else headers
        seconds = timeout_seconds or self._timeout_seconds
        try:
            answer = link.pool.urlopen(
                method, url, sent, headers, timeout=seconds, retries=False, preload_content=not stream
            )
            if answer.status < 400:
                return answer
            error = _error(answer, f"{method} {url[:200]}")
        except _NO_ANSWER as silence:
            raise self._silent(silence) from silence
        if not _OTHER_VERSION.search(str(error)):
            raise error
        self._link = None  # the engine was replaced by one of another version, which is asked for its own
        raise Unreachable(f"The container engine at {self.host} has another version now.", detail=error.detail)

    def get(self, path: str, **params: Any) -> Any:
        """The decoded JSON of a GET."""
        return self.call("GET", path, **params).json()

    def is_podman(self) -> bool:
        """Whether Podman answers, by its own word: its socket also serves sites that set CONTAINER_ENV=docker."""
        return self._linked().is_podman

    def registry_auth(self, image: str) -> dict[str, str]:
        """The header that passes the credentials of ~/.docker/config.json for this image's registry on, if any."""
        try:
            registry, _ = docker.auth.resolve_repository_name(image)
        except docker.errors.InvalidRepository as error:
            raise BadRequest(f"The image's name is wrong: {error}") from error
        until, header = self._credentials.get(registry, (0.0, {}))
        if until < time.monotonic():
            header = _registry_auth(registry)
            self._credentials[registry] = (time.monotonic() + CREDENTIALS_SECONDS, header)
        return header

    def tail(self, path: str, max_lines: int, max_bytes: int, seconds: float, *, follow: bool = False) -> str | None:
        """The end of a log at `path`, both streams in the order in which the engine got them; None where there is none.

        Holds little more than `max_bytes` at a time however much comes. What has not come after `seconds` is left out.
        With `follow` until it is quiet or for a second: the only way to read one that the engine does not think has
        begun.
        """
        kept = bytearray()
        try:
            answer = self.call("GET", path, stream=True, stdout=1, stderr=1, tail=max_lines, follow=int(follow))
            deadline = time.monotonic() + (FOLLOW_SECONDS if follow else seconds)
            with answer:
                if follow and (sock := cast(Any, answer).connection.sock):  # None behind a proxy that will close it
                    sock.settimeout(QUIET_SECONDS)
                for payload in _payloads(answer):
                    kept += payload
                    if len(kept) > 2 * max_bytes:
                        del kept[:-max_bytes]
                    if time.monotonic() > deadline:
                        break
        except (NotFound, Conflict):
            return None
        except PmanError as error:
            if error.transient:
                raise
            return f"pman: the log cannot be read: {error}\n"
        except _NO_ANSWER as error:
            if not follow:
                raise self._silent(error) from error
        return logs.tail(logs.clean(bytes(kept)), max_lines, max_bytes)

    def require_subpath(self, settings: Settings) -> None:
        """Raises Misconfigured where this engine would mount all of a volume in place of a job's directory."""
        if settings.storage_type != "docker_local_volume":
            return
        version = self._linked().version
        if tuple(int(part) for part in version.split(".")) < SUBPATH_API:
            mountpoint = self.get(f"/volumes/{settings.volume_name}").get("Mountpoint", "its Mountpoint")
            raise Misconfigured(
                f"STORAGE_TYPE=docker_local_volume needs Docker 26 (API 1.45), and this engine has API {version}: "
                f"take a newer engine, or set STORAGE_TYPE=host and STOREBASE={mountpoint}."
            )

    def _linked(self) -> _Link:
        """Without a lock, so that an engine that hangs holds every thread up for one time-out and not for all."""
        link = self._link
        if link is None:
            link = self._link = self._connect()
        return link

    def _connect(self) -> _Link:
        """By the SDK's transport; requests go to its pool past the rest of the SDK, which costs more than they do."""
        seconds = self._timeout_seconds
        try:
            client = docker.APIClient(
                base_url=self.host, tls=self._tls, timeout=seconds, max_pool_size=POOL_SIZE,
                version=docker.constants.DEFAULT_DOCKER_API_VERSION,
            )  # fmt: skip
            adapter = client.get_adapter(client.base_url)
            if client.base_url.startswith("http"):
                adapter.init_poolmanager(4, POOL_SIZE)
            request = requests.Request("GET", client.base_url).prepare()
            pool = adapter.get_connection_with_tls_context(request, client.verify, cert=client.cert)
            answer = pool.urlopen("GET", "/version", timeout=seconds, retries=False)
            said = answer.json()
            names = [part.get("Name") for part in said.get("Components") or []]
            return _Link(pool, str(said["ApiVersion"]), PODMAN in names)
        except docker.errors.TLSParameterError as error:
            raise Misconfigured(f"DOCKER_CERT_PATH: {error}") from error
        except (docker.errors.DockerException, KeyError, ValueError, TypeError, *_NO_ANSWER) as error:
            raise self._silent(error) from error

    def _silent(self, error: BaseException) -> Unreachable:
        return Unreachable(f"The container engine at {self.host} does not answer.", detail=str(error))


def problems(settings: Settings) -> list[str]:
    """Why the settings are not enough."""
    lacking = settings.docker_tls_verify and settings.docker_cert_path is None
    return ["DOCKER_CERT_PATH is required with DOCKER_TLS_VERIFY."] if lacking else []


def check(ping: Callable[[], None]) -> None:
    """Raises Misconfigured where the engine answers and cannot serve; one that is silent may come up later."""
    try:
        ping()
    except Unreachable:
        pass
    except BackendError as error:
        raise Misconfigured(str(error)) from error


def body_of(job: Job, spec: Spec) -> dict[str, Any]:
    """The spec as a body. Raises TemplateError."""

    def identity(body: Any) -> tuple[str, str, str]:
        return body.get("Name", job.name), body["Labels"][JID], body["Labels"][DIGEST]

    return documents.load(job, spec, identity, f"Name and the labels {JID} and {DIGEST}")


def time_of(text: str | None) -> datetime | None:
    """RFC 3339 with up to nine digits of fraction, as Go writes it; None for its zero."""
    return None if not text or text.startswith(_NO_DATE) else datetime.fromisoformat(text)


def sentence(text: str) -> str:
    """An engine's words as one sentence: without Go's error prefixes, ended by a full stop."""
    text = re.sub(r"^(rpc error: code = \w+ desc = |task: |starting container failed: )+", "", text.strip())
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def overtime(labels: Mapping[str, str]) -> str:
    """The sentence about a job that its time limit has ended."""
    return f"The job ran into its time limit of {labels.get(LIMIT, 'some')} minutes."


def killed(labels: Mapping[str, str], out_of_memory: bool, exit_code: int = 137) -> str:
    """The sentence about a job that was killed; `out_of_memory` where the engine says so."""
    memory = f"its memory limit of {labels.get(MEMORY, 'some')} MiB"
    if out_of_memory:
        return f"The job exceeded {memory} (out of memory, exit code {exit_code})."
    return f"The job was killed (exit code {exit_code}), perhaps because it exceeded {memory}."


def _tls(settings: Settings) -> docker.tls.TLSConfig | bool:
    if not settings.docker_tls_verify or settings.docker_cert_path is None:
        return False
    path = settings.docker_cert_path
    try:
        return docker.tls.TLSConfig(
            client_cert=(str(path / "cert.pem"), str(path / "key.pem")), ca_cert=str(path / "ca.pem"), verify=True
        )
    except docker.errors.TLSParameterError as error:
        raise Misconfigured(f"DOCKER_CERT_PATH={path} must hold ca.pem, cert.pem and key.pem: {error}") from error


def _registry_auth(registry: str) -> dict[str, str]:
    try:
        found = docker.auth.load_config().resolve_authconfig(registry)
    except docker.errors.DockerException as error:
        raise BackendError(f"The credentials for {registry} cannot be read: {error}") from error
    return {"X-Registry-Auth": docker.auth.encode_header(found).decode()} if found else {}


_BY_STATUS: Mapping[int, type[PmanError]] = {400: BadRequest, 404: NotFound, 409: Conflict, 413: TooLarge}


def _error(answer: urllib3.BaseHTTPResponse, request: str) -> PmanError:
    try:
        words = answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        words = answer.data[:500].decode(errors="replace") or answer.reason
    words = sentence(str(words))
    detail = f"{request}: {answer.status} {words}"
    if _NAME_TAKEN.search(words):  # Podman answers 500 to it
        return Conflict(words, detail=detail)
    if answer.status in _BY_STATUS:
        return _BY_STATUS[answer.status](words, detail=detail)
    if "ResourceExhausted" in detail or "larger than max" in words:
        return TooLarge(f"The job is too large for the container engine: {words}", detail=detail)
    if _PASSING.search(words) or answer.status in (502, 504):
        return Unreachable(f"The container engine cannot answer now: {words}", detail=detail)
    return BackendError(f"The container engine says: {words}", detail=detail)


def _payloads(answer: urllib3.BaseHTTPResponse) -> Any:
    """The payloads of a multiplexed stream: frames of a type, three zeros, a length of four bytes, and the payload.

    https://docs.docker.com/reference/api/engine/version/v1.45/#tag/Container/operation/ContainerAttach
    """
    header, left = b"", 0
    for block in answer.stream(65536, decode_content=True):
        position = 0
        while position < len(block):
            if left:
                payload = block[position : position + left]
                left -= len(payload)
                position += len(payload)
                yield payload
                continue
            taken = block[position : position + 8 - len(header)]
            header += taken
            position += len(taken)
            if len(header) == 8:
                left, header = int.from_bytes(header[4:], "big"), b""
