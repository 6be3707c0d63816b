"""An engine that cannot be reached, hangs, changes its version, or gives answers that are none."""

from __future__ import annotations

import gc
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pman.backends import retry
from pman.backends.engine import start, swarm
from pman.errors import BackendError, Misconfigured, PmanError, Unreachable
from pman.job import make_job, validate
from pman.service import metrics
from pman.status import JobState
from tests.backends.engine.jobs import IMAGE, REQUEST, TIME, container, load, once, posted, service, task
from tests.fakes.engine import Answer, Call, FakeEngine


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("fd://", "DOCKER_HOST=fd:// cannot be used"),
        ("ssh://somebody@example.org", "paramiko"),
        ("nonsense:\\\\x", "DOCKER_HOST="),
    ],
)
def test_an_address_that_cannot_be_used(engine: FakeEngine, host: str, words: str) -> None:
    with pytest.raises(Misconfigured, match=re.escape(words)):
        load("docker", engine, DOCKER_HOST=host)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_why_an_engine_does_not_answer(tmp_path: Path) -> None:
    """The docker SDK leaves the socket of a connection that fails to the collector, which warns of it."""
    fake = FakeEngine(tmp_path / "engine.sock")
    backend = load("docker", fake)[0]
    with pytest.raises(Unreachable, match="there is no socket of that name"):
        backend.ping()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(fake.socket))
    with pytest.raises(Unreachable, match="nobody listens there"):
        backend.ping()
    gc.collect()


def test_an_engine_of_another_version_is_connected_anew(engine: FakeEngine) -> None:
    backend, _ = load("swarm", engine)
    service(engine, task("complete"))
    words = "client version 1.41 is too old. Minimum supported API version is 1.44, please upgrade your client"
    found = engine.routes["GET /services/chris-jid-1"]
    engine.routes["GET /services/chris-jid-1"] = once(lambda _: (400, {"message": words}), lambda _: (200, found))
    assert metrics.ask("status", lambda: backend.status("chris-jid-1")).state is JobState.SUCCEEDED
    assert [call.path for call in engine.calls].count("/version") == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("locked", "Swarm is encrypted and needs to be unlocked before it can be used."),
        ("pending", "This node is not a swarm manager. Manager is being prepared or has trouble connecting to the c."),
    ],
)
def test_a_manager_that_is_not_ready(engine: FakeEngine, state: str, words: str) -> None:
    """As after a restart: pman starts, and neither says that there is no Swarm nor gives up at once."""
    info = {"Swarm": {"LocalNodeState": state, "ControlAvailable": False, "NodeID": "node-1"}}
    engine.routes["GET /info"] = info
    backend = load("swarm", engine)[0]
    with pytest.raises(Unreachable, match="does not take part in its Swarm now"):
        backend.ping()
    service(engine, task("complete"))
    found = engine.routes["GET /services/chris-jid-1"]
    engine.routes["GET /services/chris-jid-1"] = once(lambda _: (503, {"message": words}), lambda _: (200, found))
    assert metrics.ask("status", lambda: backend.status("chris-jid-1")).state is JobState.SUCCEEDED
    info["Swarm"]["LocalNodeState"] = "inactive"
    with pytest.raises(BackendError, match="run `docker swarm init` there"):
        backend.ping()


@pytest.mark.slow
def test_an_engine_that_hangs_holds_all_up_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "engine.sock"))
        silent.listen(64)
        backend = load("swarm", FakeEngine(tmp_path / "engine.sock"), DOCKER_TIMEOUT_SECONDS="1")[0]
        began = time.monotonic()

        def ask(_: int) -> None:
            with pytest.raises(Unreachable):
                backend.status("chris-jid-1")

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(16)))
        assert time.monotonic() - began < 8


PAGE = b"<html><body>Back in a moment</body></html>"
SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "status line": lambda sent: sent[:7],
    "status": lambda sent: sent[:10],
    "reason": lambda sent: sent[:14],
    "name of a header": lambda sent: sent[: sent.index(b"Content-Length") + 5],
    "value of a header": lambda sent: sent[: sent.index(b"Content-Length") + 17],
    "end of the header": lambda sent: sent[: sent.index(b"\r\n\r\n") + 2],
    "begin of the body": lambda sent: sent[: sent.index(b"\r\n\r\n") + 5],
    "end of the body": lambda sent: sent[:-1],
    "nothing": lambda _: b"",
    "garbage": lambda sent: bytes(255 - byte for byte in sent),
    "page": lambda _: b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 42\r\n\r\n" + PAGE,
    "page that is not found": lambda _: b"HTTP/1.1 404 Not Found\r\nContent-Length: 42\r\n\r\n" + PAGE,
    "page of a conflict": lambda _: b"HTTP/1.1 409 Conflict\r\nContent-Length: 42\r\n\r\n" + PAGE,
    "redirection": lambda _: b"HTTP/1.1 301 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
    "JSON of another shape": lambda _: b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"error": "x"}',
    "a list": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
    "null": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
    "error of another shape": lambda _: b'HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\n["nope"]',
}


def spoiling(victim: tuple[str, str], spoil: Callable[[bytes], bytes], times: int = 10**6) -> Callable[..., bytes]:
    """Spoils so many answers to the call `victim`, which is a method and a path."""
    left = [times]

    def spoiled(call: Call, sent: bytes) -> bytes:
        if (call.method, call.path) != victim or not left[0]:
            return sent
        left[0] -= 1
        return spoil(sent)

    return spoiled


def outcome(operation: Callable[[], object]) -> object:
    """What it returns, or the HTTP status of pman's error."""
    try:
        return operation()
    except PmanError as error:
        return error.http_status


@pytest.mark.parametrize("name", ["swarm", "docker"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_answer(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    """Of every call in turn, for ever and once: an error that may pass, never an unknown job; then the job."""
    monkeypatch.setattr(retry, "_BACKOFF", lambda _: 0)
    monkeypatch.setattr(start, "POLL_SECONDS", 0)
    monkeypatch.setattr(swarm, "DELETE_SECONDS", 0.1)
    backend, config = load(name, engine)
    digest = make_job(validate(REQUEST), config).digest
    service(engine, task("complete"), **{"org.chrisproject.pman.digest": digest})
    container(engine, Status="exited", StartedAt=TIME, FinishedAt=TIME)
    found = engine.routes["GET /containers/chris-jid-1/json"]
    found["Config"]["Labels"]["org.chrisproject.pman.digest"] = digest
    gone = {"message": "it is not there"}
    engine.routes |= {
        "GET /containers/json": lambda _: (200, [] if gone.get("now") else [
            {"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": found["Config"]["Labels"],
             "Status": "Exited (0)", "Created": 1, "Image": IMAGE, "Command": "echo"}]),
        "GET /services": [engine.routes["GET /services/chris-jid-1"]],
        "GET /containers/c1/json": found,
        "POST /services/create": {"ID": "s1"}, "POST /containers/create": {"Id": "c1"},
        "POST /containers/c1/start": {},
    }  # fmt: skip

    def delete(_: Call) -> Answer:
        gone["now"] = "yes"
        return (200, None)

    engine.routes["DELETE /services/s1"] = engine.routes["DELETE /containers/c1"] = delete
    there = engine.routes["GET /services/chris-jid-1"]
    engine.routes["GET /services/s1"] = lambda _: (404, gone) if gone.get("now") else (200, there)
    operations: dict[str, Callable[[], object]] = {
        "submit": lambda: posted(backend, config).state,
        "status": lambda: metrics.ask("status", lambda: backend.status("chris-jid-1")).state,
        "jobs": lambda: metrics.ask("jobs", lambda: [job.state for job in backend.jobs(9)]),
        "ping": lambda: metrics.ask("ping", backend.ping),
        "delete": lambda: metrics.ask("delete", lambda: backend.delete("chris-jid-1")),
    }
    for operation in operations.values():
        engine.calls.clear()
        expected = operation()
        gone.pop("now", None)
        asked = list(dict.fromkeys((call.method, call.path) for call in engine.calls))
        for victim in asked:
            engine.spoil = spoiling(victim, SPOILED[how])
            assert outcome(operation) in (expected, 503), victim
            engine.spoil = spoiling(victim, SPOILED[how], times=1)
            gone.pop("now", None)
            assert operation() == expected, victim
            gone.pop("now", None)
            engine.spoil = lambda _, sent: sent
