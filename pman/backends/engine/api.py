"""What the Swarm and the Docker backend share: one pooled client of the Docker Engine API, its errors, its log frames.

The docker SDK brings transports (unix, tcp, ssh), TLS, the choice of the API's version and registry credentials.
Bodies are sent as templates render them, so calls go by path, not by the SDK's argument lists.
Engine API: https://docs.docker.com/reference/api/engine/version/v1.45/
"""

import codecs
import contextlib
import email.utils
import errno
import functools
import json
import logging
import os
import re
import ssl
import sys
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar, cast

import docker.auth
import docker.constants
import docker.errors
import docker.tls
import requests
import urllib3

from pman.backends import logs
from pman.backends.logs import Wanted
from pman.errors import BackendError, BadRequest, Conflict, Misconfigured, NotFound, PmanError, TooLarge, Unreachable
from pman.settings import Settings
from pman.status import Reason, Why
from pman.targets import docker as docker_target

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Json = dict[str, Any]
JID, DIGEST = docker_target.JID, docker_target.DIGEST
IMAGE = "org.chrisproject.pman.image"
LIMIT = "org.chrisproject.pman.time-limit-minutes"
USER = "org.chrisproject.pman.auid"
KIND = "org.chrisproject.pman.kind"
SOCKETS = {"podman": "unix:///run/podman/podman.sock"}
PODMAN = "Podman Engine"  # the name among the Components of /version, of Podman 3 to 5
DOCKER_SOCKET = "unix:///var/run/docker.sock"
POOL_SIZE = 64  # connections kept; more are opened in need, and closed after use
QUIET_SECONDS = 0.5  # a followed log that was silent for so long is taken to be read to its end
FOLLOW_SECONDS = 1.0  # one that is never silent is read for so long
# How long an engine may take to begin with the last lines of a log: Podman takes the square of a line's length.
TAIL_SECONDS = 3.0
READS = 3  # how often a GET is sent whose answer is cut off or garbled
KEPT_ENDINGS = 10_000
CHUNK_BYTES = 1 << 18  # of a list
CREDENTIALS_SECONDS = 60.0  # those of a registry are kept for so long: a credential helper is a process
_NO_ANSWER = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
_TIMED_OUT = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
# What engines answer 500 to although the same call succeeds a moment later.
_PASSING = re.compile(
    r"update out of sequence|does not have a leader|deadline exceeded|code = Unavailable|shutting down|context canceled"
    r"|raft: (failed to process|no elected|node is not)"  # a Swarm's leader changes
    r"|is being prepared|needs to be unlocked"  # the second as soon as somebody does it
    r"|(does not exist|found) in database|/cgroup: no such process"  # Podman, of a container on its way out
)
CAUSES = 20  # errors within errors that are looked at
# How the system says that a connection cannot be opened, and what to do.
_CAUSES = {
    errno.EACCES: (
        ": permission denied. pman runs as user {uid}, who may not open its socket; run pman as root, or as a user in "
        "the socket's group"
    ),
    errno.EPERM: ": permission denied. pman runs as user {uid}, who may not open its socket",
    errno.ENOENT: ": there is no socket of that name. Start the engine, or mount its socket where pman runs",
    errno.ECONNREFUSED: ": nobody listens there. Start the engine",
    errno.EHOSTUNREACH: ": there is no way to its host",
    errno.ENETUNREACH: ": there is no way to its host",
}
# what is answered with a list
LISTS = frozenset({"/containers/json", "/libpod/containers/json", "/services", "/tasks", "/nodes"})
_NAME_TAKEN = re.compile(r"name .* is already in use")
_OTHER_VERSION = re.compile(r"client version \S+ is too (old|new)")
_OPENING, _COMMA = re.compile(r"\s*\[\s*(?=\{)"), re.compile(r"\s*,\s*(?=\{)")  # before the objects of a list
_NO_DATE = "0001-01-01"  # how Go writes a time that is not set


class CutOff(Unreachable):
    """The answer was cut off, or is none of the engine's API, as that of a proxy before it."""


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
        self._ends: dict[str, Any] = {}  # by the id of a container that has ended: what `judge` made of it
        self._slow_tails: set[str] = set()  # paths of logs whose last lines take the engine too long

    def call(  # noqa: PLR0913 - one method in place of the SDK's hundred
        self, method: str, path: str, /, *, body: object = None, headers: Mapping[str, str] | None = None,
        stream: bool = False, timeout_seconds: float | None = None, **params: Any,
    ) -> urllib3.BaseHTTPResponse:  # fmt: skip
        """One request; `params` that are mappings are sent as JSON. Raises pman's error unless it was done.

        HTML is never an engine's answer. 304 says that it was done before.
        """
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
            if _is_done(answer):
                return answer
            error = _error(answer, f"{method} {url[:200]}")
        except _NO_ANSWER as silence:
            raise self._silent(silence) from silence
        if not _OTHER_VERSION.search(str(error)):
            raise error
        self._link = None  # the engine was replaced by one of another version, which is asked for its own
        raise Unreachable(f"The container engine at {self.host} has another version now.", detail=error.detail)

    def get(self, path: str, **params: Any) -> Any:
        """The decoded JSON of a GET. What is cut off or garbled is asked for again at once, which costs little."""
        return self.get_dated(path, **params)[0]

    def each(self, path: str, use: Callable[[Iterator[Json]], T], without: Collection[str], **params: Any) -> T:
        """What `use` makes of a list, of which it gets one thing at a time: thousands of jobs take much memory.

        It begins anew if the answer is cut off. without: names of what is left out, wherever they stand.
        """

        def ask() -> T:
            with self.call("GET", path, stream=True, **params) as answer:
                try:
                    return use(_things(answer, without))
                except _NO_ANSWER as silence:
                    raise self._silent(silence) from silence

        return _again(ask)

    def find(self, path: str) -> Any:
        """As `get`; None where there is no such thing."""
        try:
            return self.get(path)
        except NotFound:
            return None

    def get_dated(self, path: str, **params: Any) -> tuple[Any, datetime]:
        """As `get`, with the time of the engine's clock."""
        return _again(lambda: self._get(path, **params))

    def _get(self, path: str, **params: Any) -> tuple[Any, datetime]:
        answer = self.call("GET", path, **params)
        document = decoded(answer)
        if isinstance(document, list) != (path in LISTS) or (not document and document != []):
            raise CutOff("The container engine's answer does not fit its API; a proxy may have given it.")
        return document, _date(answer)

    def end(self, container_id: str, judge: Callable[[Json], T]) -> T | None:
        """What `judge` makes of a container that has ended, which is asked for once; None if the engine has none."""
        if container_id not in self._ends:
            if (container := self.find(f"/containers/{container_id}/json")) is None:
                return None
            if len(self._ends) >= KEPT_ENDINGS:
                self._ends.clear()
            self._ends[container_id] = judge(container)
        judged: T = self._ends[container_id]
        return judged

    def is_podman(self) -> bool:
        """Whether Podman answers, by its own word: its socket also serves sites that set CONTAINER_ENV=docker."""
        return self._linked().is_podman

    def version(self) -> tuple[int, ...]:
        """Of the API that the engine speaks."""
        return tuple(int(part) for part in self._linked().version.split("."))

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

    def tail(self, path: str, wanted: Wanted, *, follow: bool = False, raw: bool = False) -> str | None:
        """The end of a log at `path`, both streams in the order in which the engine got them; None where there is none.

        Holds little more than `wanted.max_bytes` at a time however much comes. What has not come in time is left out.
        With `follow` until it is quiet or for a second: the only way to read one that the engine does not think has
        begun. raw: of a container with a terminal, whose log has no frames.
        """
        deadline = time.monotonic() + (FOLLOW_SECONDS if follow else wanted.seconds)
        query: dict[str, Any] = {"stdout": 1, "stderr": 1, "follow": int(follow)}
        # All of a log takes time in proportion to its size, and nothing of the engine's once pman has gone.
        for lines in ("all",) if path in self._slow_tails else (wanted.lines, "all"):
            left = max(0.1, deadline - time.monotonic())
            wait = left if lines == "all" else min(left, TAIL_SECONDS)
            kept = bytearray()
            try:
                with self.call("GET", path, stream=True, timeout_seconds=wait, tail=lines, **query) as answer:
                    if follow and (sock := cast(Any, answer).connection.sock):  # None behind a proxy that will close it
                        sock.settimeout(QUIET_SECONDS)
                    payloads = answer.stream(65536) if raw else _payloads(answer)
                    logs.keep_end(kept, payloads, wanted.max_bytes, deadline)
            except (NotFound, Conflict):
                return None
            except (Unreachable, *_NO_ANSWER) as error:
                if not follow and isinstance(error.__cause__ or error, _TIMED_OUT):
                    self._slow_tails.add(path)
                    continue
                if not follow or isinstance(error, Unreachable):
                    raise self._silent(error) from error
            return logs.tail(logs.clean(bytes(kept)), wanted.lines, wanted.max_bytes)
        late = Unreachable(f"The container engine at {self.host} did not give the log within {wanted.seconds:.0f} s.")
        late.transient = False  # a second wait would be as long
        raise late

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
        except docker.errors.TLSParameterError as error:
            raise Misconfigured(f"DOCKER_CERT_PATH: {error}") from error
        except docker.errors.DockerException as error:
            raise Misconfigured(f"DOCKER_HOST={self.host} cannot be used: {sentence(str(error))}") from error
        try:
            adapter = client.get_adapter(client.base_url)
            if client.base_url.startswith("http"):
                adapter.init_poolmanager(4, POOL_SIZE)
            request = requests.Request("GET", client.base_url).prepare()
            pool = adapter.get_connection_with_tls_context(request, client.verify, cert=client.cert)
            answer = pool.urlopen("GET", "/version", timeout=seconds, retries=False)
            said = decoded(answer)
            names = [part.get("Name") for part in said.get("Components") or []]
            version = str(said["ApiVersion"])
            if not _is_done(answer) or not re.fullmatch(r"\d+\.\d+", version):
                raise ValueError(f"no version of the API: {version[:100]}")
            return _Link(pool, version, PODMAN in names)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            words = f"What answers at {self.host} is no container engine, or its answer was cut off."
            raise CutOff(words, detail=str(error)) from error
        except (docker.errors.DockerException, *_NO_ANSWER) as error:
            raise self._silent(error) from error

    def _silent(self, error: BaseException) -> Unreachable:
        """Why there is no answer, as an error that says what to do."""
        if isinstance(error, Unreachable):
            return error
        kind, words = _cause(error)
        return kind(f"The container engine at {self.host} does not answer{words}.", detail=str(error))


def _cause(error: BaseException) -> tuple[type[Unreachable], str]:
    """The kind of an error of a transport, and the cause as the end of a sentence.

    Transports wrap what the system says in errors of their own, some of which name it only in their arguments.
    """
    seen: list[BaseException] = []
    left = [error]
    while left and len(seen) < CAUSES:
        one = left.pop(0)
        seen.append(one)
        inner = (*one.args, getattr(one, "reason", None), one.__cause__, one.__context__)
        left += [item for item in inner if isinstance(item, BaseException) and item not in seen]
    for one in seen:
        if isinstance(one, OSError) and one.errno in _CAUSES:
            return Unreachable, _CAUSES[one.errno].format(uid=os.geteuid())
    if any(isinstance(one, _TIMED_OUT) for one in seen):
        return Unreachable, " in time"
    if any(isinstance(one, ssl.SSLError | requests.exceptions.SSLError | urllib3.exceptions.SSLError) for one in seen):
        return Unreachable, f": TLS with it fails ({next(str(one) for one in seen if isinstance(one, ssl.SSLError))})"
    return CutOff, ": it cut the connection off"


def _again(ask: Callable[[], T]) -> T:
    """What `ask()` returns, which is called again at once where its answer is cut off or garbled."""
    for _ in range(READS - 1):
        with contextlib.suppress(CutOff):
            return ask()
    return ask()


def _is_done(answer: urllib3.BaseHTTPResponse) -> bool:
    is_page = answer.headers.get("Content-Type", "").startswith("text/html")
    return (200 <= answer.status < 300 or answer.status == 304) and not is_page


def _date(answer: urllib3.BaseHTTPResponse) -> datetime:
    """The engine's clock, in whole seconds; pman's where the answer does not have it."""
    try:
        return email.utils.parsedate_to_datetime(answer.headers["Date"])
    except (KeyError, ValueError):
        return datetime.now(UTC)


def decoded(answer: urllib3.BaseHTTPResponse) -> Any:
    """The JSON of an answer. Raises CutOff for what is none, as a proxy's page."""
    try:
        return json.loads(answer.data)
    except (ValueError, RecursionError) as error:
        raise _cut_off(answer.data[:200].decode(errors="replace")) from error


def _things(answer: urllib3.BaseHTTPResponse, without: Collection[str]) -> Iterator[Json]:
    """The objects of a list, each decoded when it is there. Raises CutOff for what is no list, or has no end."""

    def kept(found: Json) -> Json:
        return {sys.intern(name): value for name, value in found.items() if name not in without}

    decoder, utf8 = json.JSONDecoder(object_hook=kept), codecs.getincrementaldecoder("utf-8")()
    text, start, before = "", 0, _OPENING
    try:
        for chunk in answer.stream(CHUNK_BYTES, decode_content=True):
            text, start = text[start:] + utf8.decode(chunk), 0
            while found := before.match(text, start):
                try:
                    thing, start = decoder.raw_decode(text, found.end())
                except ValueError:  # its end has not come yet
                    break
                before = _COMMA
                yield thing
    except (ValueError, RecursionError) as error:
        raise _cut_off(text[:200]) from error
    if not re.fullmatch(r"\s*\[\s*\]\s*" if before is _OPENING else r"\s*\]\s*", text[start:]):
        raise _cut_off(text[start : start + 200])


def _cut_off(said: str) -> CutOff:
    return CutOff("The container engine's answer was cut off, or a proxy gave it.", detail=said)


def understood(method: Callable[P, R]) -> Callable[P, R]:
    """A method that reads an engine's documents: one that has not the API's shape becomes an error of pman's."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            log.exception("an answer of the container engine does not fit its API")
            raise CutOff("The container engine's answer does not fit its API; a proxy may have given it.") from error

    return guarded


def problems(settings: Settings) -> list[str]:
    lacking = settings.docker_tls_verify and settings.docker_cert_path is None
    return ["DOCKER_CERT_PATH is required with DOCKER_TLS_VERIFY."] if lacking else []


def check(ping: Callable[[], object]) -> None:
    """Raises Misconfigured where the engine answers and cannot serve; one that is silent may come up later."""
    try:
        ping()
    except Unreachable:
        pass
    except BackendError as error:
        raise Misconfigured(str(error)) from error


def time_of(text: str | None) -> datetime | None:
    """RFC 3339 with up to nine digits of fraction, as Go writes it; None for its zero."""
    return None if not text or text.startswith(_NO_DATE) else datetime.fromisoformat(text)


def sentence(text: str) -> str:
    """An engine's words as one sentence: without Go's error prefixes, ended by a full stop."""
    text = re.sub(r"^(rpc error: code = \w+ desc = |task: |starting container failed: )+", "", text.strip())
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def overtime(labels: Mapping[str, str]) -> Why:
    said = f"The job ran into its time limit of {labels.get(LIMIT, 'some')} minutes."
    return Why(said, Reason.TIME_LIMIT)


def of_labels(labels: Mapping[str, str]) -> dict[str, Any]:
    """What the labels of a job say, as fields of Details."""
    limit = labels.get(LIMIT, "")
    minutes = int(limit) if limit.isdecimal() else None
    return {"user": labels.get(USER), "kind": labels.get(KIND), "time_limit_minutes": minutes}


def _tls(settings: Settings) -> docker.tls.TLSConfig | bool:
    if settings.docker_cert_path is None:
        return False
    path, verify = settings.docker_cert_path, settings.docker_tls_verify
    try:
        return docker.tls.TLSConfig(
            client_cert=(str(path / "cert.pem"), str(path / "key.pem")), ca_cert=str(path / "ca.pem"), verify=verify
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
    """The error that an answer is. Only the engine's own JSON says that something is not there, or is wrong."""
    try:
        words = sentence(str(answer.json()["message"]))
    except (ValueError, RecursionError, KeyError, TypeError):
        return _foreign_error(answer, request)
    detail = f"{request}: {answer.status} {words}"
    if _NAME_TAKEN.search(words):  # Podman answers 500 to it
        return Conflict(words, detail=detail)
    if answer.status in _BY_STATUS:
        return _BY_STATUS[answer.status](words, detail=detail)
    if "ResourceExhausted" in detail or "larger than max" in words:
        return TooLarge(f"The job is too large for the container engine: {words}", detail=detail)
    if _PASSING.search(words) or answer.status in (429, 502, 503, 504):
        return Unreachable(f"The container engine cannot answer now: {words}", detail=detail)
    return BackendError(f"The container engine says: {words}", detail=detail)


def _foreign_error(answer: urllib3.BaseHTTPResponse, request: str) -> PmanError:
    """Of an answer that was cut off, or that a proxy gave in the engine's place."""
    words = answer.data[:500].decode(errors="replace") or str(answer.reason)
    detail = f"{request}: {answer.status} {words}"
    said = f"Something in front of the container engine answers {answer.status}"
    if answer.status == 413:
        return TooLarge(f"{said}: the job is too large for it.", detail=detail)
    if answer.status in (401, 403, 407):
        return BackendError(f"{said}: it denies pman the call.", detail=detail)
    return CutOff(f"{said}, or the engine's answer was cut off.", detail=detail)


def _payloads(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
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
