"""What a DELETE ends, what it leaves for another call, and when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from pman.backends import retry
from pman.backends.engine import api, swarm
from pman.errors import NotFound, Unreachable
from pman.job import make_job, validate
from pman.service import metrics
from pman.status import JobState
from tests.backends.engine.jobs import IDENTITY, REQUEST, load, once, posted, service, task
from tests.fakes.engine import Answer, Call, FakeEngine


def name_is_free_when_removed(engine: FakeEngine) -> None:
    """As Swarm does: the name of a service is taken until the service is removed."""

    def remove(_: Call) -> Answer:
        engine.routes["POST /services/create"] = {"ID": "s2"}
        return 200, {}

    engine.routes["POST /services/create"] = lambda _: (409, {"message": "name conflicts with an existing object"})
    engine.routes["DELETE /services/s1"] = remove


def test_a_delete_whose_answer_is_lost_is_done_on_swarm(engine: FakeEngine) -> None:
    service(engine)
    backend = load("swarm", engine)[0]

    def gone(call: Call) -> Answer:
        return 404, {"message": "service s1 not found"}

    def cut(call: Call) -> Answer:
        engine.routes["GET /services/chris-jid-1"] = gone
        return None

    engine.routes["DELETE /services/s1"] = once(cut, gone)
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    with pytest.raises(NotFound):
        metrics.ask("delete", lambda: backend.delete("chris-jid-1"))


def test_a_deleted_service_that_is_left(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swarm was silent when it was to be removed. There is no such job, and the next POST of the jid removes it."""
    monkeypatch.setattr(retry, "_BACKOFF", lambda _: 0)
    backend, config = load("swarm", engine)
    service(engine)
    engine.routes["DELETE /services/s1"] = lambda _: None
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    service(engine, **{"pman.deleted": "yes"})
    engine.routes["GET /services"] = [engine.routes["GET /services/chris-jid-1"]]
    assert backend.jobs(9) == []
    with pytest.raises(NotFound):
        backend.status("chris-jid-1")
    name_is_free_when_removed(engine)
    assert posted(backend, config).state is JobState.NOT_STARTED


def test_a_delete_leaves_the_service_that_was_posted_after_another_delete(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one was done first, its 204 came through, and the jid was posted anew while this one still waited."""
    monkeypatch.setattr(swarm, "MARK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(swarm, "DELETE_SECONDS", 0.5)
    backend = load("swarm", engine)[0]
    service(engine, task("running"))

    def update(_: Call) -> Answer:
        found = engine.routes["GET /services/chris-jid-1"]
        engine.routes["GET /services/chris-jid-1"] = engine.routes["GET /services/s2"] = found | {"ID": "s2"}
        del engine.routes["GET /services/s1"]
        return 200, {}

    engine.routes["POST /services/s1/update"] = update
    backend.delete("chris-jid-1")
    assert not [call for call in engine.calls if call.method != "GET" and "/s2" in call.path]


def test_a_delete_does_not_look_late_for_its_job(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile another DELETE may be done, and the jid posted anew: that job is not meant."""
    monkeypatch.setattr(retry, "SOON_SECONDS", 0.1)
    backend = load("swarm", engine)[0]
    service(engine, task("running"))
    found = engine.routes["GET /services/chris-jid-1"]

    def late(_: Call) -> Answer:
        time.sleep(0.1)
        if len([call for call in engine.calls if "chris-jid-1" in call.path]) == api.READS:  # at once, all in vain
            engine.routes["GET /services/chris-jid-1"] = found
        return None

    engine.routes["GET /services/chris-jid-1"] = late
    with pytest.raises(Unreachable):
        metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    assert {call.method for call in engine.calls} == {"GET"}


def test_a_service_is_removed_when_its_tasks_are_cleared_away(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager of 20.10 that removes a service while it clears its tasks away can end by a panic.

    Where a node is away they are never cleared, and the service goes all the same.
    """
    monkeypatch.setattr(swarm, "CLEARED_SECONDS", 0.5)
    backend = load("swarm", engine)[0]
    service(engine)
    left = [[task("complete")], [task("complete")], []]

    def tasks(call: Call) -> Answer:
        asked_of_service = call.query["filters"] == '{"service": ["s1"]}'
        return 200, left.pop(0) if asked_of_service and len(left) > 1 else left[0]

    engine.routes |= {"GET /tasks": tasks, "DELETE /services/s1": {}}
    backend.delete("chris-jid-1")
    assert left == [[]]
    service(engine, task("complete"))
    engine.calls.clear()
    backend.delete("chris-jid-1")
    assert engine.calls[-1].method == "DELETE"


def test_a_post_removes_only_the_service_that_it_found_deleted(engine: FakeEngine) -> None:
    """Another POST of the same jid has removed that meanwhile, and its own service runs."""
    backend, config = load("swarm", engine)
    service(engine, **{"org.chrisproject.pman.digest": make_job(validate(REQUEST), config).digest})
    new = {"GET /services/chris-jid-1": engine.routes["GET /services/chris-jid-1"] | {"ID": "s2"}}
    service(engine, **{"pman.deleted": "yes"})
    left = engine.routes["GET /services/chris-jid-1"]
    engine.routes["POST /services/create"] = lambda _: (409, {"message": "name conflicts with an existing object"})

    def find(_: Call) -> Answer:
        looks.append(1)
        if len(looks) == 2:  # of the first attempt
            engine.routes.update(new)
            del engine.routes["GET /services/s1"]
        return 200, left

    looks: list[int] = []
    engine.routes["GET /services/chris-jid-1"] = find
    assert posted(backend, config).state is JobState.NOT_STARTED
    assert not [call for call in engine.calls if call.method != "GET" and "/s2" in call.path]


def test_a_deleted_service_that_is_left_of_a_node_that_is_away(engine: FakeEngine) -> None:
    """Its task is called running for a day, in which the jid can be posted all the same."""
    backend, config = load("swarm", engine)
    service(engine, task("running"), **{"pman.deleted": "yes"})
    engine.routes["GET /nodes/node-1"] = {"Status": {"State": "down"}}
    name_is_free_when_removed(engine)
    assert posted(backend, config).state is JobState.NOT_STARTED


def test_a_deleted_container_that_is_left(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine was silent when it was to be removed. There is no such job, and a look at pman's health removes it."""
    monkeypatch.setattr(retry, "_BACKOFF", lambda _: 0)
    backend = load("docker", engine)[0]
    found = {"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": IDENTITY, "Created": 1}
    other = {"Id": "c2", "Names": ["/pman.deleted.c1"], "State": "exited", "Labels": {}}

    def rename(call: Call) -> Answer:
        found["Names"] = [f"/{call.query['name']}"]
        return 204, None

    engine.routes |= {
        "GET /containers/json": lambda call: (200, [found, *([other] if '"name"' in call.query["filters"] else [])]),
        "POST /containers/c1/rename": rename,
        "DELETE /containers/c1": lambda _: None,
    }
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    assert found["Names"] == ["/pman.deleted.c1"]
    assert backend.jobs(9) == []
    engine.calls.clear()
    engine.routes["DELETE /containers/c1"] = {}
    backend.ping()
    assert [call.path for call in engine.calls if call.method == "DELETE"] == ["/containers/c1"]


def renaming(found: list[dict[str, Any]]) -> Callable[[Call], Answer]:
    """What the engine does when one of the listed containers is to have another name."""

    def rename(call: Call) -> Answer:
        (container,) = [one for one in found if f"/containers/{one['Id']}/" in call.path]
        container["Names"] = [f"/{call.query['name']}"]
        return 204, None

    return rename


def test_a_delete_leaves_what_was_posted_after_another_delete(engine: FakeEngine) -> None:
    """That one was done first, its 204 came through, and the jid was posted anew while this one still waited."""
    backend = load("docker", engine)[0]
    found = [{"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": IDENTITY}]

    def remove(_: Call) -> Answer:
        found[:] = [{"Id": "c2", "Names": ["/chris-jid-1"], "State": "running", "Labels": IDENTITY}]
        return 404, {"message": "No such container: c1"}

    engine.routes |= {
        "GET /containers/json": lambda _: (200, found),
        "POST /containers/c1/rename": renaming(found),
        "DELETE /containers/c1": remove,
        "DELETE /containers/c2": lambda _: (204, found.pop()),
    }
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    assert [one["Id"] for one in found] == ["c2"]
    assert not [call for call in engine.calls if "/c2" in call.path]


def test_a_container_that_the_engine_cannot_remove(engine: FakeEngine) -> None:
    """Its job has ended and is deleted. It holds up neither pman's health, nor a later job of the jid."""
    backend = load("docker", engine)[0]
    one = {"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": IDENTITY, "Created": 1}
    found = [dict(one)]
    busy = "container c1: driver overlay2 failed to remove root filesystem: device or resource busy"
    engine.routes |= {
        "GET /containers/json": lambda _: (200, found),
        "POST /containers/c1/rename": renaming(found),
        "POST /containers/c2/rename": renaming(found),
        "DELETE /containers/c1": lambda _: (500, {"message": busy}),
        "DELETE /containers/c2": lambda _: (204, found.pop()),
    }
    backend.delete("chris-jid-1")
    assert "device or resource busy" in (backend.ping() or "")
    found.append(one | {"Id": "c2"})
    backend.delete("chris-jid-1")
    assert [one["Id"] for one in found] == ["c1"]


@pytest.mark.parametrize("state", ["created", "paused", "stopping", "removing"])
def test_a_container_that_may_still_run_is_not_deleted(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """It has lost its name, and the engine was silent when it was to be removed: a start of it may be on its way."""
    monkeypatch.setattr(retry, "_BACKOFF", lambda _: 0)
    backend = load("docker", engine)[0]
    found = [{"Id": "c1", "Names": ["/chris-jid-1"], "State": state, "Labels": IDENTITY}]
    engine.routes |= {
        "GET /containers/json": lambda _: (200, found),
        "POST /containers/c1/rename": renaming(found),
        "DELETE /containers/c1": lambda _: None,
    }
    with pytest.raises(Unreachable):
        metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    engine.routes["DELETE /containers/c1"] = lambda _: (204, found.pop())
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))


def test_a_container_that_another_delete_has_just_renamed(engine: FakeEngine) -> None:
    backend = load("docker", engine)[0]
    found = [{"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": IDENTITY}]
    words = "Renaming a container with the same name as its current name."  # of Docker 20.10
    engine.routes |= {
        "GET /containers/json": lambda _: (200, found),
        "POST /containers/c1/rename": lambda _: (400, {"message": words}),
        "DELETE /containers/c1": lambda _: (204, found.pop()),
    }
    backend.delete("chris-jid-1")
    assert found == []


def test_a_delete_whose_answer_is_lost_is_done_on_docker(engine: FakeEngine) -> None:
    backend = load("docker", engine)[0]
    engine.routes["GET /containers/json"] = [
        {"Id": "c1", "Names": ["/chris-jid-1"], "State": "exited", "Labels": IDENTITY}
    ]

    def cut(call: Call) -> Answer:
        engine.routes["GET /containers/json"] = []
        return None

    engine.routes["DELETE /containers/c1"] = cut
    metrics.ask("delete", lambda: backend.delete("chris-jid-1"))
    with pytest.raises(NotFound):
        metrics.ask("delete", lambda: backend.delete("chris-jid-1"))


@pytest.mark.slow
@pytest.mark.parametrize("node", ["ready", "down"])
def test_a_delete_is_done_when_nothing_writes_any_more(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """Unless the node is away: then it ends the job when it is back."""
    monkeypatch.setattr(swarm, "DELETE_SECONDS", 0.1)
    monkeypatch.setattr(swarm, "MARK_AGAIN_SECONDS", 0.05)
    service(engine, task("running"))
    backend = load("swarm", engine)[0]
    engine.routes["DELETE /services/s1"] = {}
    engine.routes["GET /nodes/node-1"] = {"Status": {"State": node}}
    if node == "down":
        backend.delete("chris-jid-1")
    else:
        with pytest.raises(Unreachable, match="has not ended"):
            backend.delete("chris-jid-1")


def test_a_delete_kills_what_its_engine_runs(engine: FakeEngine) -> None:
    """Swarm itself took 1.1 s on Docker 20.10 until it sent the signal."""
    service(engine, running := task("running"))
    backend = load("swarm", engine)[0]
    kill = f"POST /containers/{running['Status']['ContainerStatus']['ContainerID']}/kill"

    def killed(call: Call) -> Answer:
        engine.routes["GET /tasks"] = [task("failed")]
        return 204, None

    engine.routes |= {kill: killed, "DELETE /services/s1": {}}
    backend.delete("chris-jid-1")
    told = [call for call in engine.calls if call.method != "GET"]
    asked = [f"{call.method} {call.path}" for call in told]
    assert asked == ["POST /services/s1/update", kill, "DELETE /services/s1"]
    assert told[1].query["signal"] == "KILL"


@pytest.mark.parametrize("words", [
    "container c1 does not exist in database: no such container",  # Podman 4.3.1
    "no container with ID 1ba85bebc361 found in database: no such container",  # Podman 5.4.2
    "lstat /sys/fs/cgroup/libpod_parent/libpod-c1/cgroup: no such process",  # Podman 4.3.1
])  # fmt: skip
def test_a_container_that_podman_is_just_removing(engine: FakeEngine, words: str) -> None:
    """It answers 500, which is neither an error of the service nor a word about the job."""
    backend = load("podman", engine)[0]
    engine.routes["GET /containers/chris-jid-1/json"] = lambda _: (500, {"message": words})
    with pytest.raises(Unreachable, match="cannot answer now"):
        backend.status("chris-jid-1")


@pytest.mark.parametrize("node", ["ready", "down"])
def test_a_post_waits_for_what_a_delete_left(engine: FakeEngine, node: str) -> None:
    """The service is gone, and its container still writes. That of a node which is away ends when the node is back."""
    backend, config = load("swarm", engine)
    engine.routes |= {
        "GET /tasks": [task("running"), task("complete", 2)],
        "GET /nodes/node-1": {"Status": {"State": node}},
        "POST /services/create": {"ID": "s2"},
    }
    if node == "down":
        assert posted(backend, config).state is JobState.NOT_STARTED
        return
    with pytest.raises(Unreachable, match="just being deleted"):
        posted(backend, config)
    engine.routes["GET /tasks"] = [task("shutdown")]
    assert posted(backend, config).state is JobState.NOT_STARTED


def test_a_post_beside_a_delete_may_be_repeated(engine: FakeEngine) -> None:
    """The service is found, and gone when its tasks are asked for."""
    backend, config = load("swarm", engine)
    job = make_job(validate(REQUEST), config)
    service(engine, **{"org.chrisproject.pman.digest": job.digest})
    engine.routes["POST /services/create"] = lambda _: (409, {"message": "name conflicts with an existing object"})
    engine.routes["GET /tasks"] = lambda call: (
        (200, []) if '"label"' in call.query["filters"] else (404, {"message": "service s1 not found"})
    )
    with pytest.raises(Unreachable, match="just being deleted"):
        posted(backend, config)
