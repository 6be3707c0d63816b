"""Many GETs at the same time, over an engine that knows many jobs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pman import backends, settings
from pman.backends import Backend, shared
from pman.errors import NotFound
from pman.status import JobState, JobStatus
from tests.backends.engine.jobs import PODMAN, at, container, load, posted, workers
from tests.fakes import crowd, crowd_rig
from tests.fakes.engine import Answer, Call, FakeEngine

NOW = (datetime.now(UTC) + timedelta(hours=1)).isoformat()  # tests run up to an hour after this; nothing is overdue
ROW: dict[str, Any] = {"Id": "c1", "Names": ["/chris-jid-1"], "State": "running"}
RUNNING: dict[str, Any] = {"Status": "running", "Running": True, "StartedAt": NOW}


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_gets_at_the_same_time_are_few_calls(tmp_path: Path, name: str) -> None:
    """The first GET of a job is alone: pman does not know the id of its service or container."""
    with crowd_rig.serving(name, 100) as address:
        config = settings.load({"CONTAINER_ENV": name, "STOREBASE": str(tmp_path), "DOCKER_HOST": f"tcp://{address}"})
        backend = backends.load(config)
        posted(backend, config, jid=crowd.FIRST)
        for number in range(99):
            backend.status(crowd.jid_of(number))
        before = crowd_rig.counts(address)[0]
        crowd_rig.ask_at_once(backend, name, 100)
        made = crowd_rig.counts(address)[0] - before
        if name == "docker":  # of 100; the nine that have ended, and one that is not there, are asked for alone
            assert made.total() < 60
        else:
            assert sum(made[call] for call in made if "/services" in call or "/tasks" in call) < 120  # of 199


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are so far apart that questions from two threads are one call."""
    monkeypatch.setattr(shared, "BURST", 0)
    monkeypatch.setattr(shared, "CALLS_A_SECOND", 4)


def beside_another(backend: Backend) -> JobStatus:
    """The status of the job of REQUEST, which is asked for together with one that is not there."""
    with ThreadPoolExecutor(2) as threads:
        found, missing = threads.submit(backend.status, "chris-jid-1"), threads.submit(backend.status, "missing")
        assert isinstance(missing.exception(), NotFound)
        return found.result()


def lists(engine: FakeEngine, rows: list[dict[str, Any]]) -> None:
    """The engine lists those of these containers that it is asked for."""

    def answer(call: Call) -> Answer:
        ids = json.loads(call.query["filters"])["id"]
        return 200, [row for row in rows if row["Id"] in ids]

    engine.routes["GET /containers/json"] = answer


def looks(engine: FakeEngine) -> list[str]:
    return [call.path for call in engine.calls if "chris-jid-1" in call.path and call.path.endswith("/json")]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize(
    "rows",
    [
        [ROW],
        [],  # it has ended, or was removed
        [ROW | {"State": "paused"}],
        [ROW | {"Names": ["/another"]}],
        [ROW | {"Id": "c2"}],  # a job that was posted since
    ],
    ids=["runs", "ended", "paused", "renamed", "posted anew"],
)
def test_a_list_says_that_a_job_runs_and_nothing_else(engine: FakeEngine, rows: list[dict[str, Any]]) -> None:
    container(engine, **RUNNING)
    backend, _ = load("docker", engine)
    before = backend.status("chris-jid-1")
    lists(engine, rows)
    container(engine, Status="exited", StartedAt=NOW, FinishedAt=NOW)
    engine.calls.clear()
    found = beside_another(backend)
    assert [call.path for call in engine.calls].count("/containers/json") == 1
    if rows == [ROW]:
        assert found == before
        assert backend.details(found).started_at == datetime.fromisoformat(NOW)
        assert backend.spec(found, environment=True) == backend.spec(before, environment=True)
        assert not looks(engine)
    else:
        assert found.state is JobState.SUCCEEDED
        assert looks(engine)


@pytest.mark.usefixtures("together")
def test_a_job_is_looked_at_before_its_time_limit_ends_it(engine: FakeEngine) -> None:
    """Somebody has started its container anew, which a list does not say."""
    now = datetime.now(UTC).replace(microsecond=0)
    engine.spoil = at(now)
    container(engine, **RUNNING | {"StartedAt": now.isoformat()})
    backend, _ = load("docker", engine)
    backend.status("chris-jid-1")
    lists(engine, [ROW])
    container(engine, **RUNNING | {"StartedAt": (now + timedelta(minutes=9)).isoformat()})
    engine.spoil = at(now + timedelta(minutes=10))
    engine.calls.clear()
    assert beside_another(backend).state is JobState.STARTED
    assert looks(engine)
    assert not [call for call in engine.calls if call.method == "POST"]


@pytest.mark.usefixtures("together")
def test_each_worker_has_to_run(engine: FakeEngine) -> None:
    workers(engine, 2, RUNNING, RUNNING)
    backend, _ = load("docker", engine)
    backend.status("chris-jid-1")
    rows = [ROW | {"Id": "c0"}, ROW | {"Names": ["/chris-jid-1.1"]}]
    lists(engine, rows)
    engine.calls.clear()
    assert beside_another(backend).state is JobState.STARTED
    assert not looks(engine)
    workers(engine, 2, RUNNING, {"Status": "exited", "ExitCode": 3, "FinishedAt": NOW})
    lists(engine, rows[:1])
    assert "worker 1: The job ended with exit code 3." in beside_another(backend).message
    assert beside_another(backend).message  # what is known now is not that both run


@pytest.mark.usefixtures("together")
def test_podman_is_not_asked_for_lists(engine: FakeEngine) -> None:
    """They take it longer than the looks at the containers in them."""
    engine.routes["GET /version"] = PODMAN
    container(engine, **RUNNING)
    backend, _ = load("podman", engine)
    for _ in range(2):
        assert beside_another(backend).state is JobState.STARTED
    assert not [call for call in engine.calls if '"id"' in call.query.get("filters", "")]
