"""Logs and pods of workers, also of nodes that are silent."""

from __future__ import annotations

import json
import threading

import pytest
from urllib3 import PoolManager

from pman.backends import kubernetes, logs
from pman.backends.kubernetes import api as kubernetes_api
from pman.backends.kubernetes import podlogs
from pman.backends.kubernetes.api import Api, Endpoint
from pman.status import JobState
from tests.backends.kubernetes.script import (
    RECORDINGS,
    STARTED_AT,
    Answer,
    Script,
    created,
    finished,
    job_and_spec,
    pods_of,
    recorded,
)

HANG: Answer = (-1, {}, None)  # nothing, for a second


def test_what_a_finished_job_costs(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """One call more than its logs need: the Job itself."""
    job, spec = job_and_spec()
    pods = recorded("pods_list_running")
    script.answers = [(200, {}, finished(job, spec)), pods]
    for index, pod in enumerate(reversed(pods[2]["items"])):
        pod["metadata"]["labels"] |= {"batch.kubernetes.io/job-completion-index": str(index)}
        pod["status"]["phase"] = "Succeeded"
        script.always[f"/{pod['metadata']['name']}/log"] = 200, {}, (b"zero\n", b"one\n")[index]
    status = backend.status("ok2")
    assert status.state is JobState.SUCCEEDED
    assert logs.of_job(backend, status, 100, 1 << 20)[0] == "=== worker 0 ===\nzero\n=== worker 1 ===\none\n"
    assert [path.split("?")[0].rsplit("/", 1)[-1] for _, path, _ in script.asked] == ["ok2", "pods", "log", "log"]
    assert status.message == ""


def test_long_logs_take_little_memory(script: Script) -> None:
    pool = PoolManager()
    api, wanted = Api(lambda: Endpoint(script.url, pool, dict)), logs.Wanted(10, 10, 9)
    script.answers = [(200, {}, b"x" * 5_000_000 + b"end"), (204, {}, b""), recorded("log_while_ContainerCreating_400")]
    assert api.tail("/log", {}, wanted) == b"xxxxxxxend"
    assert [api.tail("/log", {}, wanted), api.tail("/log", {}, wanted)] == [b"", b""]
    pool.clear()


def test_workers_keep_their_numbers_when_pods_are_lost(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec(number_of_workers=4)
    failed = json.loads((RECORDINGS / "job_states.json").read_text())["job_failed_one_of_two"][-1]["status"]
    for left in ((1, 2), (2,)):
        pods = {"items": pods_of(job, *((index, "n") for index in left))}
        script.answers = [(200, {}, created(job, spec) | {"status": failed}), (200, {}, pods)]
        script.always = {f"/p{index}/log": (200, {}, f"I am {index}\n".encode()) for index in left}
        texts = {index: f"I am {index}\n" for index in left}
        expected = "".join(f"=== worker {index} ===\n{texts.get(index, '')}" for index in range(4))
        assert logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)[0] == expected


def test_workers_without_an_index_are_numbered_by_age(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """As those of pman 6. A pod more than there are workers belongs to the last one: no output is left out."""
    job, spec = job_and_spec(number_of_workers=2)
    running = created(job, spec) | {"status": {"active": 2, "ready": 2, "startTime": STARTED_AT}}
    running["spec"] = running["spec"] | {"completionMode": "NonIndexed"}
    pods = pods_of(job, (0, "n"), (1, "n"), (2, "n"))
    for age, pod in enumerate(pods):
        pod["metadata"] = {"name": f"p{age}", "creationTimestamp": f"2026-11-24T00:00:0{age}Z"}
    script.answers = [(200, {}, running), (200, {}, {"items": pods[::-1]})]
    script.always = {f"/p{age}/log": (200, {}, f"pod {age}\n".encode()) for age in range(3)}
    said = logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)
    assert said[0] == "=== worker 0 ===\npod 0\n=== worker 1 ===\npod 1\npod 2\n"


def test_logs_of_several_pods_on_a_silent_node(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """They are asked at once, and pods of other nodes are read."""
    job, spec = job_and_spec(number_of_workers=4)
    running = created(job, spec) | {"status": {"active": 4, "ready": 4, "startTime": STARTED_AT}}
    pods = pods_of(job, (0, "dead"), (1, "dead"), (2, "good"), (3, "dead"))
    script.answers = [(200, {}, running), (200, {}, {"items": pods})]
    script.always = {"/p2/log": (200, {}, b"two\n"), "/log": (504, {}, {"message": "no route"})}
    assert logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)[0] == (
        "=== worker 0 ===\n[pman: these logs cannot be read now: no route]\n"
        "=== worker 1 ===\n[pman: these logs cannot be read now: no route]\n"
        "=== worker 2 ===\ntwo\n"
        "=== worker 3 ===\n[pman: these logs cannot be read now: no route]\n"
    )


def test_logs_end_when_their_time_is_over(
    script: Script, backend: kubernetes.KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "READ_SECONDS", 0)
    job, spec = job_and_spec()
    script.answers = [(200, {}, finished(job, spec)), (200, {}, {"items": pods_of(job, (0, "a"), (1, "b"))})]
    assert logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)[0].count("no time left") == 2


def test_logs_of_a_node_that_is_silent(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec(number_of_workers=1)
    running = created(job, spec) | {"status": {"active": 1, "ready": 1, "startTime": "2026-11-24T00:00:00Z"}}
    refused = {"message": "Get https://192.0.2.1:10250/containerLogs/...: dial tcp: connect: connection refused"}
    pods = recorded("pods_list_running")
    pods[2]["items"] = pods[2]["items"][:1]
    script.answers = [(200, {}, running), pods, (500, {}, refused)]
    assert "cannot be read now: Get https" in logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)[0]


def test_a_node_that_keeps_silent_costs_one_get_its_time(
    script: Script, backend: kubernetes.KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others say at once why there are no logs, until it is time to ask again."""
    monkeypatch.setattr(kubernetes_api, "TIMEOUT", 0.2)
    job, spec = job_and_spec(number_of_workers=1)
    running = created(job, spec) | {"status": {"active": 1, "ready": 1, "startTime": STARTED_AT}}
    script.always = {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods_of(job, (0, "n"))})}
    script.always["/log"] = HANG
    for _ in range(4):
        assert "the node does not answer" in logs.of_job(backend, backend.status("ok2"), 10, 1 << 20)[0]
    assert sum("/log" in path for _, path, _ in script.asked) == 1
    pods = pods_of(job, (0, "n"))
    pods[0]["status"] = pods[0]["status"] | {"phase": "Succeeded"}
    script.always |= {"/jobs/ok2": (200, {}, finished(job, spec)), "/pods?": (200, {}, {"items": pods})}
    logs.of_job(backend, backend.status("ok2"), 10, 1 << 20)
    assert sum("/log" in path for _, path, _ in script.asked) == 2
    script.always |= {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods_of(job, (0, "n"))})}
    monkeypatch.setattr(podlogs, "ASK_AGAIN_SECONDS", 0.0)
    backend._reader.silent["n"] = ("the node does not answer", 0.0)
    script.always["/log"] = 200, {}, b"back\n"
    assert logs.of_job(backend, backend.status("ok2"), 10, 1 << 20)[0] == "back\n"


def test_logs_of_many_workers_take_as_long_as_the_slowest(
    script: Script, backend: kubernetes.KubernetesBackend
) -> None:
    """All thirty are asked before the first has answered."""
    together = threading.Barrier(30)
    job, spec = job_and_spec(number_of_workers=30)
    pods = pods_of(job, *((index, "n") for index in range(30)))
    running = created(job, spec) | {"status": {"active": 30, "ready": 30, "startTime": STARTED_AT}}
    script.always = {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods}), "/log": (200, {}, b"x\n")}
    script.before = lambda path: together.wait(60) if "/log" in path else None
    assert logs.of_job(backend, backend.status("ok2"), 100, 1 << 20)[0].count("x\n") == 30
