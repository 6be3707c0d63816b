"""Swarm, Docker and Podman without an engine: their states, and answers that a real one gives too seldom."""

from __future__ import annotations

import gc
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from pman import backends, settings
from pman.backends import Backend, logs, retry
from pman.backends.engine import api, docker, start, swarm
from pman.errors import BackendError, BadRequest, Misconfigured, NotFound, PmanError, TemplateError, Unreachable
from pman.job import make_job, validate
from pman.service import metrics
from pman.service.app import create_app
from pman.status import JobState, JobStatus
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.fakes.engine import Answer, Call, FakeEngine
from tests.rig import with_memory_kept

IMAGE = "registry.example.org/pl-x:1"
REQUEST: dict[str, Any] = {
    "jid": "chris-jid-1", "args": [], "auid": "x", "number_of_workers": 1, "cpu_limit": 100, "memory_limit": 64,
    "gpu_limit": 0, "image": IMAGE, "entrypoint": ["echo"], "type": "fs",
}  # fmt: skip
TIME = "2026-01-01T00:00:00.123456789Z"
NO_TIME = "0001-01-01T00:00:00Z"
IDENTITY = {"org.chrisproject.pman.name": "chris-jid-1", "org.chrisproject.pman.digest": "the digest"}

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


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    monkeypatch.setattr(swarm, "CLEARED_SECONDS", 0.05)  # most tests' tasks stay for ever
    with FakeEngine(tmp_path / "engine.sock") as engine:
        yield engine


def load(name: str, engine: FakeEngine, **env: str) -> tuple[Backend, settings.Settings]:
    config = settings.load(
        {"CONTAINER_ENV": name, "STOREBASE": "/data/store", "DOCKER_HOST": engine.url, "DOCKER_TIMEOUT_SECONDS": "5"}
        | env
    )
    return backends.load(config), config


def posted(backend: Backend, config: settings.Settings, **fields: Any) -> JobStatus:
    job = make_job(validate(REQUEST | fields), config)
    spec = Renderer(config, TARGETS).render(job, "swarm" if config.container_env == "swarm" else "docker")
    return metrics.ask("submit", lambda: backend.submit(job, spec))


# ------------------------------------------------------------------------------------------------------------- states


def service(engine: FakeEngine, *tasks: dict[str, Any], **labels: str) -> None:
    """The job of REQUEST as a service with these tasks."""
    spec = {
        "Name": "chris-jid-1",
        "Labels": {"org.chrisproject.pman.time-limit-minutes": "5"} | IDENTITY | labels,
        "Mode": {"Replicated": {"Replicas": max(1, len(tasks))}},
        "TaskTemplate": {"ContainerSpec": {"Image": IMAGE, "Command": ["echo"]}},
    }
    found = {"ID": "s1", "Version": {"Index": 7}, "Spec": spec, "CreatedAt": TIME}
    engine.routes["GET /services/chris-jid-1"] = engine.routes["GET /services/s1"] = found
    engine.routes |= {"GET /tasks": list(tasks), "POST /services/s1/update": {"Warnings": None}}


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
    listed, kept_kib = with_memory_kept(lambda: backend.jobs(1000))
    assert len(listed) == 200
    assert kept_kib < 200 * 8


def task(state: str, slot: int = 1, created: str = TIME, error: str = "", code: int = 0) -> dict[str, Any]:
    container = {"ContainerID": f"c{slot}", "ExitCode": code}
    status = {"State": state, "Err": error, "Timestamp": created, "Message": "words", "ContainerStatus": container}
    return {
        "ID": f"t{slot}", "ServiceID": "s1", "NodeID": "node-1", "Slot": slot, "CreatedAt": created, "Status": status,
    }  # fmt: skip


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
        ([task("failed", error="No such container: x.1.y")], "finishedWithError", "by an engine that shuts down."),
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


def container(engine: FakeEngine, **state: Any) -> None:
    """The job of REQUEST as a container."""
    labels = {"org.chrisproject.pman.time-limit-minutes": "5"} | IDENTITY
    engine.routes["GET /containers/chris-jid-1/json"] = {
        "Id": "c1", "Name": "/chris-jid-1", "Created": TIME, "Config": {"Image": IMAGE, "Labels": labels},
        "HostConfig": {"Memory": 64 << 20},
        "State": {"StartedAt": NO_TIME, "FinishedAt": NO_TIME, "ExitCode": 0} | state,
    }  # fmt: skip


def at(now: datetime) -> Callable[[Call, bytes], bytes]:
    """What an engine of that clock sends; the fake closes the connection behind what a test has changed."""
    date = re.compile(rb"\r\nDate: [^\r]*")
    return lambda _, sent: date.sub(
        f"\r\nConnection: close\r\nDate: {format_datetime(now, usegmt=True)}".encode(), sent
    )


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


# ------------------------------------------------------------------------------------------------- part of a volume


LOCAL = {"Driver": "local", "Mountpoint": "/mnt/store", "Options": None}
OF_NFS = LOCAL | {"Options": {"type": "nfs", "device": ":/x"}}
BIND = {"Type": "bind", "Source": "/mnt/store/key-chris-jid-1/incoming"}
PART = {"Type": "volume", "Source": "store", "VolumeOptions": {"NoCopy": True, "Subpath": "key-chris-jid-1/incoming"}}


def podman(version: str) -> dict[str, Any]:
    return {"ApiVersion": version, "Components": [{"Name": "Podman Engine"}]}


@pytest.mark.parametrize(
    ("kind", "version", "nodes", "volume", "expected"),
    [
        ("docker", {"ApiVersion": "1.41"}, [], LOCAL, BIND),
        ("docker", {"ApiVersion": "1.45"}, [], LOCAL, PART),
        ("docker", {"ApiVersion": "1.45"}, [], OF_NFS, PART),
        ("docker", podman("1.45"), [], LOCAL, BIND),
        ("docker", {"ApiVersion": "1.44"}, [], OF_NFS, None),
        ("docker", {"ApiVersion": "1.44"}, [], LOCAL | {"Driver": "rexray"}, None),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.0", "27.3.1+dfsg1", "29.0"], LOCAL, PART),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.4", "26.0.2"], LOCAL, BIND),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.4", "26.0.2"], OF_NFS, None),
        ("swarm", {"ApiVersion": "1.45"}, ["dev"], OF_NFS, None),
        ("swarm", {"ApiVersion": "1.45"}, [""], OF_NFS, None),
    ],
)  # fmt: skip
def test_a_part_of_a_volume(
    engine: FakeEngine, kind: str, version: dict[str, Any], nodes: list[str], volume: dict[str, Any],
    expected: dict[str, Any] | None,
) -> None:  # fmt: skip
    """By Subpath where it works (a Swarm's nodes with Docker 26.0 ignore it), by its directory, or not at all."""
    engine.routes |= {
        "GET /version": version, "GET /volumes/store": volume,
        "GET /nodes": [{"Description": {"Engine": {"EngineVersion": version}}} for version in nodes],
        "POST /services/create": {"ID": "s1"}, "POST /containers/create": {"Id": "c1"},
        "POST /containers/c1/start": {},
    }  # fmt: skip
    of_volume = {"STORAGE_TYPE": "docker_local_volume", "VOLUME_NAME": "store"}
    if expected is None:
        with pytest.raises(Misconfigured, match="cannot mount a part of it"):
            load(kind, engine, **of_volume)
        return
    posted(*load(kind, engine, **of_volume))
    (body,) = [call.body for call in engine.calls if call.path.endswith("/create")]
    host = body["TaskTemplate"]["ContainerSpec"] if kind == "swarm" else body["HostConfig"]
    mount = host["Mounts"][0]
    assert {name: mount.get(name) for name in ("Type", "Source", "VolumeOptions")} == {"VolumeOptions": None} | expected


def test_an_engine_that_cannot_mount_a_part_of_a_volume_is_never_ready(engine: FakeEngine) -> None:
    """Also where it comes up after pman."""
    is_up: list[bool] = []
    engine.routes["GET /version"] = lambda _: (200, {"ApiVersion": "1.44"}) if is_up else None
    engine.routes["GET /volumes/store"] = OF_NFS
    backend, _ = load("docker", engine, STORAGE_TYPE="docker_local_volume", VOLUME_NAME="store")
    is_up.append(True)
    with pytest.raises(Misconfigured, match="cannot mount a part of it"):
        backend.ping()


@pytest.mark.parametrize("mount", [{"Name": "store", "Source": "/mnt/store"}, {"Source": "/mnt/store"}])
def test_the_volume_of_pfcon(engine: FakeEngine, mount: dict[str, str]) -> None:
    """Found at pfcon's container, as pman 4 to 6 did, where VOLUME_NAME is not set; pfcon may come up after pman."""
    engine.routes |= {
        "GET /volumes/store": LOCAL, "POST /containers/create": {"Id": "c1"}, "POST /containers/c1/start": {},
    }  # fmt: skip
    backend, config = load("docker", engine, STOREBASE="")
    assert config.storage_type == "docker_local_volume"
    with pytest.raises(Unreachable, match="start pfcon, or set VOLUME_NAME"):
        posted(backend, config)
    engine.routes["GET /containers/json"] = [{"Mounts": [{"Destination": "/var/local/storeBase"} | mount]}]
    posted(backend, config)
    (body,) = [call.body for call in engine.calls if call.path.endswith("/create")]
    assert body["HostConfig"]["Mounts"][0]["Source"] == BIND["Source"]


def test_nfs_on_podman_is_refused(engine: FakeEngine) -> None:
    engine.routes["GET /version"] = podman("1.41")
    for kind in ("docker", "podman"):
        with pytest.raises(Misconfigured, match="STORAGE_TYPE=nfs does not work with Podman"):
            load(kind, engine, STORAGE_TYPE="nfs", NFS_SERVER="nfs.example.org")


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


# ------------------------------------------------------------------------------------------------------------- faults


def once(cut: Callable[[Call], Answer], then: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
    """`cut` answers the first call, `then` all others."""
    left = [cut]

    def answer(call: Call) -> Answer:
        return left.pop()(call) if left else then(call)

    return answer


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

    def remove(_: Call) -> Answer:
        engine.routes["POST /services/create"] = {"ID": "s2"}
        return 200, {}

    engine.routes["POST /services/create"] = lambda _: (409, {"message": "name conflicts with an existing object"})
    engine.routes["DELETE /services/s1"] = remove
    assert posted(backend, config).state is JobState.NOT_STARTED


def test_a_delete_leaves_the_service_that_was_posted_after_another_delete(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one was done first, its 204 came through, and the jid was posted anew while this one still waited."""
    monkeypatch.setattr(swarm, "MARK_AGAIN_SECONDS", 0.05)
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

    def remove(_: Call) -> Answer:
        engine.routes["POST /services/create"] = {"ID": "s2"}
        return 200, {}

    engine.routes["POST /services/create"] = lambda _: (409, {"message": "name conflicts with an existing object"})
    engine.routes["DELETE /services/s1"] = remove
    assert posted(backend, config).state is JobState.NOT_STARTED


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


def test_a_post_while_the_leader_changes(engine: FakeEngine) -> None:
    """The old leader does not know what became of it: here, the service was made."""
    backend, config = load("swarm", engine)
    service(engine, task("running"), **{"org.chrisproject.pman.digest": make_job(validate(REQUEST), config).digest})
    lost = "rpc error: code = Unknown desc = raft: failed to process the request: node lost leader status"
    engine.routes["POST /services/create"] = once(
        lambda _: (500, {"message": lost}), lambda _: (409, {"message": "name conflicts with an existing object"})
    )
    assert posted(backend, config).state is JobState.STARTED


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


# A container's name is no part of its body: pman gives it beside.
UNFINDABLE = (
    ("org.chrisproject.pman.name: ", "name: "), ("pman.digest: \"", "pman.digest: \"x"), ("Labels:", "- Labels:"),
    ("", "a: ["),
)  # fmt: skip


@pytest.mark.parametrize(("name", "change"), [
    *(("docker", change) for change in UNFINDABLE), *(("swarm", change) for change in UNFINDABLE),
    ("swarm", ("Labels:", "Name: another\nLabels:")),
])  # fmt: skip
def test_a_template_whose_job_could_not_be_found_again(engine: FakeEngine, name: str, change: tuple[str, str]) -> None:
    """It would run, and be a 404."""
    backend, config = load(name, engine)
    job = make_job(validate(REQUEST), config)
    spec = Renderer(config, TARGETS).render(job, name)
    with pytest.raises(TemplateError, match=re.escape(f"{TARGETS[name].template}:1: ")):
        backend.submit(job, replace(spec, text=spec.text.replace(*change, 1)))
    assert not [call for call in engine.calls if call.method == "POST"]


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


@pytest.mark.slow
def test_a_container_that_is_still_being_made(engine: FakeEngine) -> None:
    """Its name is taken, and nothing is there yet: another request is making it, which takes a while."""
    backend, config = load("docker", engine)
    job = make_job(validate(REQUEST), config)
    container(engine, Status="exited")
    found = engine.routes["GET /containers/chris-jid-1/json"]
    found["Config"]["Labels"]["org.chrisproject.pman.digest"] = job.digest
    until = time.monotonic() + 1
    words = 'Conflict. The container name "/chris-jid-1" is already in use by container "x".'
    engine.routes["POST /containers/create"] = lambda _: (409, {"message": words})
    engine.routes["GET /containers/chris-jid-1/json"] = lambda _: (
        (200, found) if time.monotonic() > until else (404, {"message": "No such container"})
    )
    assert posted(backend, config).state is JobState.SUCCEEDED


# --------------------------------------------------------------------------------------------------------------- logs


def test_a_silent_job_of_this_node_is_asked_for_once(engine: FakeEngine) -> None:
    """The way through the task's log takes half a second, and is for logs that are not here."""
    service(engine, task("starting"), task("starting", 2))
    backend = load("swarm", engine)[0]
    engine.routes["GET /containers/c1/logs"] = engine.routes["GET /containers/c2/logs"] = lambda _: (200, None)
    status = backend.status("chris-jid-1")
    engine.calls.clear()
    backend.logs(status, 10)
    assert sorted(call.path for call in engine.calls) == ["/containers/c1/logs", "/containers/c2/logs"]
    del engine.routes["GET /containers/c2/logs"]
    engine.calls.clear()
    backend.logs(status, 10)
    assert [call.path for call in engine.calls if "/tasks/" in call.path] == ["/tasks/t2/logs"]


def workers(engine: FakeEngine, count: int, *states: dict[str, Any] | None) -> None:
    """The job of REQUEST as several containers, None for one that is not there."""
    for number, state in reversed(list(enumerate(states))):
        container(engine, **(state or {}))
        found = engine.routes.pop("GET /containers/chris-jid-1/json")
        found["Config"]["Labels"]["org.chrisproject.pman.workers"] = str(count)
        name = f"chris-jid-1.{number}" if number else "chris-jid-1"
        if state is not None:
            engine.routes[f"GET /containers/{name}/json"] = found | {"Id": f"c{number}", "Name": f"/{name}"}
        engine.routes[f"GET /containers/c{number}/logs"] = "x"


def test_a_worker_whose_container_is_gone(engine: FakeEngine) -> None:
    """It may not be made yet; the others keep their numbers."""
    workers(engine, 3, {"Status": "exited"}, None, {"Status": "exited", "ExitCode": 3})
    backend = load("docker", engine)[0]
    status = backend.status("chris-jid-1")
    assert status.state is JobState.STARTED
    assert status.message == (
        "worker 1: There is no container yet, or somebody removed it. worker 2: The job ended with exit code 3."
    )
    assert backend.logs(status, 10) == "=== worker 0 ===\n=== worker 1 ===\n=== worker 2 ===\n"


def test_a_followed_log_behind_a_proxy_that_closes_connections(tmp_path: Path) -> None:
    with FakeEngine(tmp_path / "engine.sock", closes=True) as engine:
        service(engine, task("starting") | {"NodeID": "another"})
        engine.routes["GET /tasks/t1/logs"] = "x"
        backend = load("swarm", engine)[0]
        assert backend.logs(backend.status("chris-jid-1"), 10) == ""
        assert engine.calls[-1].query["follow"] == "1"


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_logs_end_when_their_time_is_over(engine: FakeEngine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "READ_SECONDS", 0)
    service(engine, task("running"), task("running", 2))
    workers(engine, 2, {"Status": "running"}, {"Status": "running"})
    backend = load(name, engine)[0]
    assert backend.logs(backend.status("chris-jid-1"), 10).count("no time left for this log") == 2
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
        backend.logs(backend.status("chris-jid-1"), 10)
    tails = [call.query["tail"] for call in engine.calls if call.path.endswith("/logs")]
    assert tails == ["10", "all", "all"]


# ---------------------------------------------------------------------------------------------------- garbled answers

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


# -------------------------------------------------------------------------------------------------------- credentials


def test_credentials_are_those_of_the_templates_image(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"mirror.example.org": {"auth": "YTpi"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    overlay = tmp_path / "overlay" / "swarm"
    overlay.mkdir(parents=True)
    (overlay / "service.yaml.j2").write_text(
        '{% extends "shipped/swarm/service.yaml.j2" %}{% set image = "mirror.example.org/pl-x:1" %}'
    )
    backend, config = load("swarm", engine, TEMPLATES_DIR=str(overlay.parent))
    engine.routes["POST /services/create"] = {"ID": "s1"}
    posted(backend, config)
    sent = engine.calls[-1]
    assert sent.body["TaskTemplate"]["ContainerSpec"]["Image"] == "mirror.example.org/pl-x:1"
    assert "X-Registry-Auth" in sent.headers


@pytest.mark.filterwarnings("ignore:docker-credential-")
def test_a_credential_helper_that_is_missing(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"registry.example.org": "pman-nowhere"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    backend, config = load("swarm", engine)
    with pytest.raises(BackendError, match=r"credentials for registry.example.org .*pman-nowhere"):
        posted(backend, config)


def test_a_credential_helper_is_asked_once_for_many_jobs(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-pman-test"
    helper.write_text(
        f"#!/bin/sh\necho asked >> {tmp_path}/asked\n"
        """echo '{"Username": "a", "Secret": "b", "ServerURL": "x"}'\n"""
    )
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"registry.example.org": "pman-test"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    backend, config = load("swarm", engine)
    engine.routes["POST /services/create"] = {"ID": "s1"}
    for number in range(3):
        posted(backend, config, jid=f"chris-jid-{number}")
        assert "X-Registry-Auth" in engine.calls[-1].headers
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_an_image_that_is_no_name(engine: FakeEngine, name: str) -> None:
    backend, config = load(name, engine, PULL_POLICY="always")
    with pytest.raises(BadRequest, match="image"):
        posted(backend, config, image="-/x:1")


def test_too_many_workers_for_one_engine(engine: FakeEngine) -> None:
    backend, config = load("docker", engine)
    with pytest.raises(BadRequest, match="at most 200 workers"):
        posted(backend, config, number_of_workers=201)


PODMAN = {"ApiVersion": "1.41", "Components": [{"Name": "Podman Engine", "Version": "4.3.1"}]}


@pytest.mark.parametrize("text", [",source=/etc", ',"', "\n", "\r"])
@pytest.mark.parametrize("field", ["input_dir", "output_dir"])
@pytest.mark.parametrize("name", ["docker", "podman"])
def test_podman_is_sent_no_mount_option(engine: FakeEngine, name: str, field: str, text: str) -> None:
    """Also where CONTAINER_ENV says docker: the engine says what it is."""
    engine.routes["GET /version"] = PODMAN
    with pytest.raises(BadRequest) as caught:
        posted(*load(name, engine), **dict[str, Any]({field: f"key-a/x{text}"}))
    assert list(caught.value.message) == [field]
    assert not [call for call in engine.calls if call.method == "POST"]


@pytest.mark.parametrize("program", ['["sh", "-c"]', "[]", "null", "[" * 100_000])
def test_podman_is_sent_no_program_that_it_would_parse(engine: FakeEngine, tmp_path: Path, program: str) -> None:
    """Of a site that sets Entrypoint itself."""
    engine.routes["GET /version"] = PODMAN
    template = tmp_path / "overlay" / "docker" / "container.yaml.j2"
    template.parent.mkdir(parents=True)
    template.write_text(
        '{% extends "shipped/docker/container.yaml.j2" %}'
        "{% block container_extra %}\nEntrypoint: [{{ job.argv[0] }}]\n{% endblock %}"
    )
    with pytest.raises(BadRequest) as caught:
        posted(*load("podman", engine, TEMPLATES_DIR=str(tmp_path / "overlay")), entrypoint=[program])
    assert list(caught.value.message) == ["entrypoint"]


def test_a_sites_mount_is_judged_too(engine: FakeEngine, tmp_path: Path) -> None:
    engine.routes["GET /version"] = PODMAN
    overlay = tmp_path / "overlay" / "docker"
    overlay.mkdir(parents=True)
    (overlay / "container.yaml.j2").write_text(
        '{% extends "shipped/docker/container.yaml.j2" %}\n{% block mounts %}\n'
        "    - {Type: bind, Source: /scratch, Target: {{ '/scratch/' ~ job.auid }}}\n{% endblock %}\n"
    )
    with pytest.raises(BadRequest, match="mount option"):
        posted(*load("podman", engine, TEMPLATES_DIR=str(tmp_path / "overlay")), auid="a,rw,source=/etc")
