"""The listing, and jobs of pman 6."""

from __future__ import annotations

from typing import Any

import pytest

from pman.backends import kubernetes, logs, retry
from pman.errors import Conflict, NotFound
from pman.job import Job
from pman.status import JobState
from tests.backends.kubernetes.script import (
    STARTED_AT,
    Answer,
    Script,
    await_removals,
    created,
    finished,
    job_and_spec,
    pods_of,
    recorded,
)
from tests.rig import with_memory


def test_a_list_that_took_too_long_is_begun_again(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    page = {"items": [finished(job, spec)], "metadata": {"continue": "token"}}
    expired = {"reason": "Expired", "message": "The provided continue parameter is too old"}
    last: dict[str, Any] = {"items": [], "metadata": {}}
    script.answers = [(200, {}, page), (410, {}, expired), (200, {}, page), (200, {}, last), (200, {}, last)]
    assert [status.jid for status in retry.call(backend.jobs, 5)] == ["ok2"]


def test_the_listing_is_read_in_pages(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Of all jobs the newest are kept, and pods are asked for only where a Job does not say enough."""
    job, spec = job_and_spec()

    def listed(name: str, minute: int, status: dict[str, Any]) -> dict[str, Any]:
        annotations = created(job, spec)["metadata"]["annotations"] | {kubernetes.JID: name}
        made = f"2026-11-24T00:{minute:02}:00Z"
        return created(job, spec, annotations=annotations, uid=name, creationTimestamp=made) | {"status": status}

    condition = {"type": "Failed", "status": "True", "lastTransitionTime": STARTED_AT}
    done, failed = finished(job, spec)["status"], {"conditions": [condition]}
    pages = [[listed("a", 5, done), listed("b", 1, failed)], [listed("c", 9, failed), listed("d", 7, done)]]
    pods = pods_of(job, (0, "n"), (1, "n"))
    for pod, owner in zip(pods, ("a", "c"), strict=True):
        pod["metadata"]["labels"] = {"batch.kubernetes.io/controller-uid": owner}
    pods[1]["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."}

    def page(items: list[dict[str, Any]], more: str = "") -> Answer:
        return 200, {}, {"metadata": {"continue": more}, "items": items}

    script.answers = [page(pages[0], "t/1=="), page(pages[1]), page(pods[:1], "u"), page(pods[1:])]
    found = backend.jobs(3)
    assert [(status.jid, status.state) for status in found] == [
        ("c", JobState.FAILED), ("d", JobState.SUCCEEDED), ("a", JobState.SUCCEEDED),
    ]  # fmt: skip
    assert "Evicted" in found[0].message
    assert all(f"limit={kubernetes.PAGE}" in path for _, path, _ in script.asked)
    assert ["continue=t%2F1%3D%3D" in path for _, path, _ in script.asked] == [False, True, False, False]
    running = listed("e", 3, {"active": 1, "ready": 1, "startTime": STARTED_AT})
    script.answers = [page([running])]
    assert [status.jid for status in backend.jobs(3)] == ["e"]


def test_jobs_that_wait_for_a_queue_share_what_is_asked_for(
    script: Script, backend: kubernetes.KubernetesBackend
) -> None:
    """Kueue's words about all of them are one list, and a suspended job without a counter has no pods."""
    job, spec = job_and_spec()
    suspended = {"conditions": [{"type": "Suspended", "status": "True"}], "uncountedTerminatedPods": {}, "ready": 0}
    held = created(job, spec, labels={"kueue.x-k8s.io/queue-name": "imaging"}) | {"status": suspended}
    script.answers = [(200, {}, held), (200, {}, {"items": []}), (200, {}, held), (200, {}, held)]
    for _ in range(3):
        status = backend.status("ok2")
        assert (status.state, "queue imaging" in status.message) == (JobState.NOT_STARTED, True)
    assert [path.rpartition("/")[2][:6] for _, path, _ in script.asked] == ["ok2", "events", "ok2", "ok2"]


def test_a_listing_keeps_little_of_each_job(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Volumes, variables and managedFields of thousands of jobs took hundreds of MiB."""
    job, spec = job_and_spec(env=[f"NAME{number}={'x' * 900}" for number in range(20)])
    running = created(job, spec, managedFields=["x" * 900] * 20) | {"status": {"ready": 1, "startTime": STARTED_AT}}
    script.answers = [(200, {}, {"metadata": {}, "items": [running] * 200})]
    listed, kept_kib, _ = with_memory(lambda: backend.jobs(1000))
    assert len(listed) == 200
    assert kept_kib < 200 * 10


def test_jobs_of_pman_6_are_listed(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """They carry no label; whether one ran out of memory, its pod tells. Jobs of others are not listed."""
    job, spec = job_and_spec(number_of_workers=1)
    done = finished(job, spec)["status"]
    (pod,) = pods_of(job, (0, "n"))
    pod["metadata"]["labels"] = {kubernetes.OWNER: "u"}
    ended = {"name": job.jid, "state": {"terminated": {"exitCode": 0, "reason": "OOMKilled"}}}
    pod["status"] = {"phase": "Succeeded", "containerStatuses": [ended]}
    others = [of_pman_6(job, done, name="other")[2], of_pman_6(job, done)[2], created(job, spec, annotations={})]
    script.always = {"/jobs?": (200, {}, {"metadata": {}, "items": others})}
    script.always["/pods?labelSelector=batch.kubernetes.io%2Fcontroller-uid&"] = (
        200,
        {},
        {"metadata": {}, "items": [pod]},
    )
    (listed,) = backend.jobs(5)
    assert (listed.jid, listed.state) == ("ok2", JobState.FAILED)
    assert "out of memory" in listed.message


def of_pman_6(job: Job, status: dict[str, Any], **container: Any) -> Answer:
    """A Job as the public source of 6.3.1 makes it (pman/kubernetesmgr.py), and as the API server then shows it."""
    paths = (("/share/incoming", job.input_dir), ("/share/outgoing", job.output_dir))
    mounts: list[dict[str, Any]] = [{"name": "storebase", "mountPath": path, "subPath": below} for path, below in paths]
    mounts[0]["readOnly"] = True
    made = {"name": job.jid, "image": job.image, "command": list(job.argv), "volumeMounts": mounts, **container}
    spec = {"backoffLimit": 0, "parallelism": job.workers, "completions": job.workers, "completionMode": "NonIndexed"}
    metadata = {"name": job.jid, "uid": "u", "resourceVersion": "7", "creationTimestamp": STARTED_AT}
    template = {"template": {"spec": {"restartPolicy": "Never", "containers": [made]}}}
    return 200, {}, {"metadata": metadata, "spec": spec | template, "status": status}


def test_workers_of_a_job_of_pman_6(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Their pods have no number."""
    job, _ = job_and_spec(number_of_workers=3)
    pods = pods_of(job, (0, "a"), (1, "b"), (2, "c"))
    for pod in pods:
        del pod["metadata"]["annotations"]
    script.answers = [of_pman_6(job, {"active": 3, "ready": 3, "startTime": STARTED_AT}), (200, {}, {"items": pods})]
    workers = backend.details(backend.status("ok2")).workers
    assert [(worker.node, worker.state) for worker in workers] == [(node, JobState.STARTED) for node in "abc"]


@pytest.mark.parametrize("jid", ["chris-jid-7", "chris-jid-0123456789"])
def test_jobs_of_pman_6_go_on(script: Script, backend: kubernetes.KubernetesBackend, jid: str) -> None:
    """Also under a name that pman gives to no job any more."""
    job, spec = job_and_spec(jid=jid, number_of_workers=1, args=["$$(x)"])
    (pod,) = pods_of(job, (0, "n"))
    pod["status"] = {"phase": "Running", "containerStatuses": [{"name": jid, "state": {"running": {}}}]}
    old = of_pman_6(job, {"active": 1, "ready": 1, "startTime": STARTED_AT})
    missing = recorded("read_unknown_404")
    script.always = {"/pods?": (200, {}, {"items": [pod]}), "/log": (200, {}, b"hello\n"), f"/jobs/{jid}": old}
    script.always |= {f"/jobs/{job.name}": missing} if job.name != jid else {}
    script.always["/jobs?"] = 409, {}, {}
    status = backend.status(jid)
    assert (status.jid, status.state, status.cmd, status.image) == (jid, JobState.STARTED, job.cmd, job.image)
    old[2]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].append({"name": "d", "mountPath": "/dev/shm"})
    assert logs.of_job(backend, status, 10, 1 << 20)[0] == "hello\n"
    assert f"container={jid}&" in script.asked[-1][1]
    assert backend.submit(job, spec).state is JobState.STARTED
    for other in ({"args": ["other"]}, {"output_dir": "elsewhere"}, {"number_of_workers": 2}):
        with pytest.raises(Conflict, match="another job"):
            backend.submit(*job_and_spec(**{"jid": jid, "number_of_workers": 1, "args": ["$$(x)"], **other}))
    backend.delete(jid)
    await_removals()
    assert script.asked[-1][:2] == ("DELETE", f"/apis/batch/v1/namespaces/rec/jobs/{jid}")


def test_what_looks_almost_like_a_job_of_pman_6(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """`kubectl create job` names the container after the Job, too."""
    job, _ = job_and_spec()
    mounts = of_pman_6(job, {})[2]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    others: tuple[dict[str, Any], ...] = (
        {"volumeMounts": []},
        {"name": "other"},
        {"command": [*job.argv, "more"]},
        {"volumeMounts": [mounts[0] | {"readOnly": False}, mounts[1]]},
        {"volumeMounts": [*mounts, {"name": "x", "mountPath": "/x"}]},
    )
    for container in others:
        script.answers = [of_pman_6(job, {}, **container)] * 2
        for call in (backend.status, backend.delete):
            with pytest.raises(NotFound):
                call("ok2")
