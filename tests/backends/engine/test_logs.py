"""Logs that are late, cut off or of a silent job."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pman.backends import logs, retry
from pman.backends.engine import api
from pman.service.app import create_app
from tests.backends.engine.jobs import container, load, service, task, workers
from tests.fakes.engine import Answer, Call, FakeEngine


def test_a_silent_job_of_this_node_is_asked_for_once(engine: FakeEngine) -> None:
    """The way through the task's log takes half a second, and is for logs that are not here."""
    service(engine, task("starting"), task("starting", 2))
    backend = load("swarm", engine)[0]
    engine.routes["GET /containers/c1/logs"] = engine.routes["GET /containers/c2/logs"] = lambda _: (200, None)
    status = backend.status("chris-jid-1")
    engine.calls.clear()
    logs.of_job(backend, status, 10, 1 << 20)
    assert sorted(call.path for call in engine.calls) == ["/containers/c1/logs", "/containers/c2/logs"]
    del engine.routes["GET /containers/c2/logs"]
    engine.calls.clear()
    logs.of_job(backend, status, 10, 1 << 20)
    assert [call.path for call in engine.calls if "/tasks/" in call.path] == ["/tasks/t2/logs"]


def test_a_followed_log_behind_a_proxy_that_closes_connections(tmp_path: Path) -> None:
    with FakeEngine(tmp_path / "engine.sock", closes=True) as engine:
        service(engine, task("starting") | {"NodeID": "another"})
        engine.routes["GET /tasks/t1/logs"] = "x"
        backend = load("swarm", engine)[0]
        assert logs.of_job(backend, backend.status("chris-jid-1"), 10, 1 << 20)[0] == ""
        assert engine.calls[-1].query["follow"] == "1"


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_logs_end_when_their_time_is_over(engine: FakeEngine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "READ_SECONDS", 0)
    service(engine, task("running"), task("running", 2))
    workers(engine, 2, {"Status": "running"}, {"Status": "running"})
    backend = load(name, engine)[0]
    assert logs.of_job(backend, backend.status("chris-jid-1"), 10, 1 << 20)[0].count("no time left for this log") == 2
    assert not any(call.path.endswith("/logs") for call in engine.calls)


def test_a_log_that_cannot_be_had_never_costs_the_status(engine: FakeEngine) -> None:
    """And both have one retry policy: two after each other could last longer than pfcon waits."""
    service(engine, task("complete"))
    backend, config = load("swarm", engine, SECRET_KEY="a secret key for tests")
    engine.routes["GET /containers/c1/logs"] = lambda _: None
    answer = create_app(config, backend).test_client().get("/api/v1/chris-jid-1/")
    assert answer.json
    assert (answer.status_code, answer.json["status"]) == (200, "finishedSuccessfully")
    assert answer.json["logs"].startswith("[pman: the log cannot be had now: ")
    asked = [call.path for call in engine.calls]
    assert asked.count("/services/chris-jid-1") == asked.count("/containers/c1/logs") == retry.ATTEMPTS


def test_a_log_whose_last_lines_take_the_engine_too_long(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Podman, for a line of many megabytes. It is read from its beginning instead, also the next time."""
    monkeypatch.setattr(api, "TAIL_SECONDS", 0.2)
    container(engine, Status="exited")

    def slow(call: Call) -> Answer:
        if call.query["tail"] != "all":
            time.sleep(1)
        return 200, None

    engine.routes["GET /containers/c1/logs"] = slow
    backend = load("docker", engine)[0]
    for _ in range(2):
        logs.of_job(backend, backend.status("chris-jid-1"), 10, 1 << 20)
    tails = [call.query["tail"] for call in engine.calls if call.path.endswith("/logs")]
    assert tails == ["11", "all", "all"]
