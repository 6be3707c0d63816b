"""States of Swarm, Docker and Podman, their time limits, and what listings say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pman.backends import logs
from pman.backends.engine import docker, swarm
from pman.errors import NotFound
from pman.service import metrics
from pman.status import JobState
from tests.backends.engine.jobs import IDENTITY, IMAGE, TIME, at, container, load, service, task, workers
from tests.fakes.engine import Answer, Call, FakeEngine
from tests.rig import with_memory

# https://docs.docker.com/engine/swarm/how-swarm-mode-works/swarm-task-states/, and `allocated` of the API's own list.
TASKS = {
    "notstarted": "new allocated pending assigned accepted preparing ready",
    "started": "starting running remove",
    "finishedSuccessfully": "complete",
    "finishedWithError": "failed shutdown rejected orphaned",
}
# ContainerInspect of the Engine API, and what Podman's libpod/define/containerstate.go has besides.
CONTAINERS = {
    "notstarted": "created configured initialized",
    "started": "running paused restarting removing stopping",
    "finishedSuccessfully": "exited stopped",
    "finishedWithError": "dead",
}


@pytest.mark.parametrize(("table", "documented"), [(swarm.STATES, TASKS), (docker.STATES, CONTAINERS)])
def test_table_of_states(table: dict[str, JobState], documented: dict[str, str]) -> None:
    assert table == {name: JobState(state) for state, names in documented.items() for name in names.split()}


def test_tasks_that_may_still_write_are_not_over() -> None:
    assert {name for name, state in swarm.STATES.items() if state.final} == swarm.OVER


def test_jobs_that_wait_for_room_are_listed_by_three_calls(engine: FakeEngine) -> None:
    """The nodes are looked at once for all of them."""
    backend, _ = load("swarm", engine)
    service(engine)
    first = engine.routes["GET /services/chris-jid-1"]
    engine.routes["GET /services"] = [first | {"ID": f"s{number}"} for number in range(20)]
    waiting = task("pending", error="no suitable node (insufficient resources on 1 node)")
    engine.routes["GET /tasks"] = [waiting | {"ServiceID": f"s{number}"} for number in range(20)]
    engine.routes["GET /nodes"] = [{"ID": "node-1", "Description": {"Resources": {"NanoCPUs": 4_000_000_000}}}]
    listed = backend.jobs(100)
    assert {status.message for status in listed} == {
        "no suitable node (insufficient resources on 1 node). The job starts when a node has room for it."
    }
    assert [call.path for call in engine.calls][-3:] == ["/services", "/tasks", "/nodes"]


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_a_listing_keeps_little_of_each_job(name: str, engine: FakeEngine) -> None:
    """Variables and mounts of thousands of jobs took hundreds of MiB."""
    backend, _ = load(name, engine)
    much, jids = [f"NAME{number}={'x' * 900}" for number in range(20)], [f"job-{number}" for number in range(200)]
    service(engine)
    one = engine.routes["GET /services/chris-jid-1"]
    one["Spec"]["TaskTemplate"]["ContainerSpec"] |= {"Env": much, "Mounts": much}
    engine.routes["GET /services"] = [one | {"ID": jid} for jid in jids]
    engine.routes["GET /tasks"] = [task("running") | {"ServiceID": jid, "Spec": one["Spec"]} for jid in jids]
    engine.routes["GET /containers/json"] = [
        {
            "Id": jid, "Names": [f"/{jid}"], "Image": IMAGE, "Created": 1, "Command": "echo", "State": "running",
            "Status": "Up", "Labels": IDENTITY | {"org.chrisproject.pman.name": jid}, "Mounts": much,
        }
        for jid in jids
    ]  # fmt: skip
    listed, kept_kib, _ = with_memory(lambda: backend.jobs(1000))
    assert len(listed) == 200
    assert kept_kib < 200 * 8


@pytest.mark.parametrize(
    ("tasks", "state", "message"),
    [
        ([task("complete")], "finishedSuccessfully", ""),
        ([task("shutdown")], "finishedWithError", "when its node is drained or somebody changes its service."),
        ([task("orphaned")], "finishedWithError", "Swarm says orphaned: words."),
        ([task("rejected", error="No such image: x")], "finishedWithError", "No such image: x."),
        ([task("failed", error="task: non-zero exit (3)", code=3)], "finishedWithError", "exit code 3."),
        ([task("failed", error='starting container failed: exec: "/nope": stat /nope: no such file', code=127)],
         "finishedWithError", 'exec: "/nope": stat /nope: no such file.'),
        ([task("failed", error="x: unhealthy container", code=3)], "finishedWithError", "its time limit of 5 minutes."),
        ([task("failed", error="No such container: x.1.y")], "finishedWithError", "by an engine that shut down."),
        ([task("remove")], "started", ""),
        ([task("running") | {"DesiredState": "shutdown"}], "started", "it may be away."),
        ([task("preparing") | {"DesiredState": "shutdown"}], "notstarted", "it may be away."),
        ([task("complete") | {"DesiredState": "shutdown"}], "finishedSuccessfully", ""),
        ([task("pending", error="no suitable node (x)")], "notstarted", "no suitable node (x)."),
        ([task("thinking")], "undefined", ""),
        ([task("complete"), task("failed", 2, code=1)], "finishedWithError", "worker 1: The job ended with exit code 1."),  # noqa: E501
        ([task("failed", code=1), task("running", 2)], "started", "worker 0: The job ended with exit code 1."),
        ([task("complete"), task("pending", 2)], "started", ""),
        ([task("failed", code=1), task("thinking", 2)], "undefined", "worker 0: The job ended with exit code 1."),
        ([task("failed", created="2026-01-01T00:00:00Z", code=1), task("complete", created="2026-01-02T00:00:00Z")],
         "started", ""),  # of two tasks of one slot the younger counts; the second of the two slots has none yet
        ([], "notstarted", ""),
    ],
)  # fmt: skip
def test_status_of_tasks(engine: FakeEngine, tasks: list[dict[str, Any]], state: str, message: str) -> None:
    service(engine, *tasks)
    status = load("swarm", engine)[0].status("chris-jid-1")
    assert status.state == state
    assert status.message.endswith(message)
    assert bool(status.message) == bool(message)
    assert (status.finished_at is not None) == status.state.final


@pytest.mark.parametrize(("ran_seconds", "state"), [(10, "started"), (310, "finishedWithError")])
def test_a_time_limit_goes_by_the_engines_clock(engine: FakeEngine, ran_seconds: float, state: str) -> None:
    """It is seven minutes behind pman's, which must not end a job that has just begun, and call it a success."""
    now = datetime.now(UTC) - timedelta(minutes=7)
    engine.spoil = at(now)
    began = (now - timedelta(seconds=ran_seconds)).isoformat()
    container(engine, Status="running", Running=True, StartedAt=began)

    def end(_: Call) -> Answer:
        container(engine, Status="exited", StartedAt=began, FinishedAt=now.isoformat())
        return 204, None

    engine.routes["POST /containers/c1/kill"] = engine.routes["POST /containers/c1/stop"] = end
    engine.routes["POST /containers/c1/wait"] = {}
    backend, _ = load("docker", engine)
    assert backend.status("chris-jid-1").state.value == state
    assert any(call.path.endswith("/kill") for call in engine.calls) == (state != "started")


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"StartedAt": TIME, "FinishedAt": TIME}, "finishedSuccessfully"),
        ({"StartedAt": TIME, "FinishedAt": "2026-01-01T00:05:01Z"}, "finishedWithError"),
        ({"StartedAt": TIME}, "finishedWithError"),
        ({"StartedAt": TIME, "FinishedAt": TIME, "OOMKilled": True}, "finishedWithError"),
    ],
    ids=["well", "overdue", "cut off", "memory"],
)
def test_a_listing_says_what_a_get_says(engine: FakeEngine, fields: dict[str, Any], state: str) -> None:
    """A job may answer its time limit with exit code 0; of one that a restart cut off, Podman 5 says the same."""
    container(engine, Status="exited", **fields)
    document = engine.routes["GET /containers/chris-jid-1/json"]
    engine.routes["GET /containers/c1/json"] = document
    engine.routes["GET /containers/json"] = [
        {
            "Id": "c1", "Names": ["/chris-jid-1"], "Image": IMAGE, "Created": 1, "Command": "echo", "State": "exited",
            "Status": "Exited (0) 2 hours ago", "Labels": document["Config"]["Labels"],
        }
    ]  # fmt: skip
    backend, _ = load("docker", engine)
    assert backend.status("chris-jid-1").state.value == state
    assert [job.state.value for _ in range(2) for job in backend.jobs(9)] == [state, state]
    assert [call.path for call in engine.calls].count("/containers/c1/json") == 1


@pytest.mark.parametrize(
    ("fields", "state", "message"),
    [
        ({"Status": "created"}, "notstarted", "post the job again."),
        ({"Status": "created", "Error": "no such file"}, "finishedWithError", "no such file."),
        ({"Status": "exited"}, "finishedSuccessfully", ""),
        ({"Status": "exited", "ExitCode": 3}, "finishedWithError", "exit code 3."),
        (
            {"Status": "exited", "ExitCode": 137},
            "finishedWithError",
            "perhaps because it exceeded its memory limit of 64",
        ),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": False}, "finishedWithError", "not by its memory limit."),
        (
            {"Status": "exited", "ExitCode": 137, "OOMKilled": True},
            "finishedWithError",
            "its memory limit of 64 MiB (out",
        ),
        ({"Status": "exited", "OOMKilled": True}, "finishedWithError", "its output may be incomplete."),
        ({"Status": "running", "OOMKilled": True}, "started", ""),
        ({"Status": "dead", "ExitCode": 0}, "finishedWithError", "exit code 0."),
        ({"Status": "removing"}, "started", ""),
        ({"Status": "thinking"}, "undefined", ""),
        ({"Status": "created", "StartedAt": TIME}, "finishedWithError", "the machine restarted"),
        ({"Status": "exited", "StartedAt": TIME}, "finishedWithError", "the machine restarted"),
        (
            {"Status": "exited", "StartedAt": "2026-01-01T00:00:00Z", "FinishedAt": "2026-01-01T00:05:01Z"},
            "finishedWithError",
            "its time limit of 5 minutes.",
        ),
    ],
)
def test_status_of_a_container(engine: FakeEngine, fields: dict[str, Any], state: str, message: str) -> None:
    container(engine, **fields)
    status = load("docker", engine)[0].status("chris-jid-1")
    assert status.state == state
    assert message in status.message
    assert bool(status.message) == bool(message)


@pytest.mark.parametrize("stop", [(200, None), (500, {"message": "container state improper"})])
def test_a_job_whose_time_is_up_is_asked_to_end_first(engine: FakeEngine, stop: Answer) -> None:
    """And if it can't be stopped, as where somebody paused it, it is looked at all the same."""
    container(engine, Status="running", Running=True, StartedAt=TIME)
    for call in ("kill", "wait"):
        engine.routes[f"POST /containers/c1/{call}"] = {}
    engine.routes["POST /containers/c1/stop"] = lambda _: stop
    assert load("docker", engine)[0].status("chris-jid-1").state is JobState.STARTED
    sent = [(call.path.rsplit("/", 1)[1], call.query) for call in engine.calls if call.method == "POST"]
    assert sent == [("kill", {"signal": "TERM"}), ("wait", {}), ("stop", {})]


def test_an_object_with_one_of_the_two_labels_is_nobodys_job(engine: FakeEngine) -> None:
    lonely = {"org.chrisproject.pman.name": "chris-jid-1"}
    container(engine, Status="exited")
    engine.routes["GET /containers/chris-jid-1/json"]["Config"]["Labels"] = lonely
    engine.routes["GET /containers/json"] = lambda call: (
        (200, []) if "pman.digest" in call.query["filters"] else
        (200, [{"Id": "c1", "Names": ["/chris-jid-1"], "Labels": lonely, "State": "exited"}])
    )  # fmt: skip
    backend = load("docker", engine)[0]
    assert backend.jobs(9) == []
    for act in (backend.status, backend.delete):
        with pytest.raises(NotFound):
            act("chris-jid-1")
    assert not [call for call in engine.calls if call.method == "DELETE"]


def test_jobs_are_told_when_the_nodes_cannot_be_had(engine: FakeEngine) -> None:
    """They only explain."""
    backend, _ = load("swarm", engine)
    service(engine, task("pending", error="no suitable node (insufficient resources on 1 node)"))
    engine.routes["GET /nodes"] = lambda _: (500, {"message": "rpc error: code = Unavailable"})
    status = metrics.ask("status", lambda: backend.status("chris-jid-1"))
    assert status.message == "no suitable node (insufficient resources on 1 node)."
    assert backend.details(status).backend_id == "s1"


def test_a_task_that_misses_that_its_service_has_no_replicas(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "MARK_AGAIN_SECONDS", 0.05)
    backend = load("swarm", engine)[0]
    service(engine, task("running"))

    def update(_: Call) -> Answer:
        if len([call for call in engine.calls if call.path.endswith("/update")]) == 2:
            engine.routes["GET /tasks"] = []
        return 200, {}

    engine.routes |= {"POST /services/s1/update": update, "DELETE /services/s1": {}}
    backend.delete("chris-jid-1")


def test_a_time_limit_is_looked_for_by_the_engines_clock(engine: FakeEngine) -> None:
    """It is seven minutes before pman's, which must not let a job run on that nobody polls."""
    now = datetime.now(UTC) + timedelta(minutes=7)
    engine.spoil = at(now)
    began = now - timedelta(seconds=310)
    container(engine, Status="running", Running=True, StartedAt=began.isoformat())
    labels = engine.routes["GET /containers/chris-jid-1/json"]["Config"]["Labels"]
    listed = {"Id": "c1", "Names": ["/chris-jid-1"], "Labels": labels, "Created": began.timestamp()}
    engine.routes["GET /containers/json"] = lambda call: (200, [] if '"name"' in call.query["filters"] else [listed])
    engine.routes |= {f"POST /containers/c1/{act}": {} for act in ("kill", "wait", "stop")}
    backend, _ = load("docker", engine)
    engine.calls.clear()
    backend.ping()
    assert [call.path for call in engine.calls if call.path.endswith("/kill")]


def test_a_worker_whose_container_is_gone(engine: FakeEngine) -> None:
    """It may not be made yet; the others keep their numbers."""
    workers(engine, 3, {"Status": "exited"}, None, {"Status": "exited", "ExitCode": 3})
    backend = load("docker", engine)[0]
    status = backend.status("chris-jid-1")
    assert status.state is JobState.STARTED
    assert status.message == (
        "worker 1: There is no container yet, or somebody removed it. worker 2: The job ended with exit code 3."
    )
    assert logs.of_job(backend, status, 10, 1 << 20)[0] == "=== worker 0 ===\n=== worker 1 ===\n=== worker 2 ===\n"
