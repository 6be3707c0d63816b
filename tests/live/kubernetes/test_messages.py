"""What is said of jobs that fail, wait or never start."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.registry import slow_registry
from tests.live.kubernetes.cluster import IMPATIENT, Cluster, evict, kubernetes_rig, namespace, wait_message
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("kubernetes")


@pytest.mark.parametrize(
    ("auid", "words"),
    [
        ("no account", 'serviceaccount "nobody" not found'),
        ("no class", "no PriorityClass with name nothing was found"),
        ("no secret", 'secret "nosuch" not found'),
    ],
)
def test_a_job_that_cannot_start_is_ended_after_some_patience(
    overlaid: Server, rig: Rig, jid: str, auid: str, words: str
) -> None:
    assert overlaid.post(rig.request(jid, COUNTED, auid=auid)).status_code == 201

    job = wait_message(overlaid, jid, words)
    assert (job["status"], job["logs"]) == ("notstarted", "")
    job = overlaid.wait_final(jid)
    assert job["status"] == "finishedWithError"
    assert words in job["message"]
    assert job["timestamp"]
    assert rig.executions(jid) == 0


def test_out_of_memory(server: Server, rig: Rig, jid: str) -> None:
    """Time and again: the runtime notes it beside the end of the container, and kubelet takes what is noted by then."""
    script = "for i in 1 2 3 4 5; do head -c 200000000 /dev/zero | tail -c 200000000; done; exit 1"
    server.post(rig.request(jid, script, memory_limit=16))
    job = server.wait_final(jid)
    assert job["message"].startswith("The job exceeded its memory limit of 16 MiB (out of memory, exit code "), job


def test_a_child_that_ran_out_of_memory(server: Server, rig: Rig, jid: str) -> None:
    """Its shell goes on, and ends with 0: a plugin that runs a program for each file delivers a part of its output."""
    script = "head -c 200000000 /dev/zero | tail -c 200000000; sleep 2; exit 0"  # the runtime notes it meanwhile
    server.post(rig.request(jid, script, memory_limit=16))
    job = server.wait_final(jid)
    assert (job["status"], "its output may be incomplete" in job["message"]) == ("finishedWithError", True), job
    listed = {job["jid"]: job["status"] for job in server.call("GET", "jobs/?limit=1000").json()["jobs"]}
    assert listed[jid] == "finishedWithError"


def test_a_program_that_cannot_be_started_was_never_started(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, "", entrypoint=["/no/such/program"]))
    seen = set()

    def ended() -> bool:
        seen.add(server.get(jid).json()["status"])
        return "finishedWithError" in seen

    wait_for(ended, 60, "the job to fail", every=0.02)
    assert "started" not in seen


@pytest.mark.parametrize(("script", "status", "words"), [
    ("sleep 600", "finishedWithError", "Kubernetes took a pod of the job away (a drain,"),
    ("trap 'exit 0' TERM; while :; do sleep 0.1; done", "finishedSuccessfully", "see whether its output is complete"),
])  # fmt: skip
def test_an_eviction(
    cluster: Cluster, server: Server, rig: Rig, jid: str, script: str, status: str, words: str
) -> None:
    """As a drained node does it: Kubernetes says what it was; an end with 0 is marked."""
    server.post(rig.request(jid, f"echo begun; {script}"))
    wait_for(lambda: "begun" in server.get(jid).json()["logs"], 60, "the first line")
    evict(cluster, jid)
    job = server.wait_final(jid)
    assert (job["status"], words in job["message"]) == (status, True), job


LIMIT = """{% extends "shipped/k8s/job.yaml.j2" %}
{% block pod_spec_extra %}
      activeDeadlineSeconds: 15  # of two the last one counts; the request's are minutes
{% endblock %}
"""


def know_registry(cluster: Cluster, address: str) -> None:
    """The one-node cluster asks no registry but those that it was told of."""
    if cluster.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
        pytest.skip("the registry is this machine's")
    where = Path(cluster.env["PMAN_DEV_KUBERNETES_RUN"]) / "containerd/registries" / f"{address.replace(':', '_')}_"
    where.mkdir(parents=True)
    (where / "hosts.toml").write_text(f'server = "http://{address}"\n')


def test_the_time_limit_counts_the_image(cluster: Cluster, rig: Rig, jid: str, tmp_path: Path) -> None:
    """The final sentence says why an image did not come, or how long one took that came, beside the limit."""
    (tmp_path / "k8s").mkdir()
    (tmp_path / "k8s/job.yaml.j2").write_text(LIMIT)
    server = rig.start(TEMPLATES_DIR=str(tmp_path))
    server.post(rig.request(f"{jid}-refused", "true", image="127.0.0.1:9/none:1"))
    wait_message(server, f"{jid}-refused", "cannot be pulled")
    with slow_registry(7) as image:
        know_registry(cluster, image.partition("/")[0])
        server.post(rig.request(jid, "echo begun; sleep 600", image=image))
        job = server.wait_final(jid, 60)
    limit = "The job reached its time limit of 0.25 min"
    counted = re.fullmatch(rf"{limit}, which includes (\d+) s before .*; the program ran for (\d+) s\.", job["message"])
    assert counted, job["message"]
    waited, ran = int(counted[1]), int(counted[2])  # of its grace period too
    assert (waited >= 7, 14 <= waited + ran < 40, job["logs"]) == (True, True, "begun\n"), job
    refused = server.wait_final(f"{jid}-refused", 60)["message"]
    assert refused.startswith(f"{limit} before its program had begun: Failed to pull"), refused
    server.stop()


def test_thirty_workers_are_read_at_once(server: Server, rig: Rig, jid: str) -> None:
    """Every log within the time of the slowest, which here is next to nothing."""
    server.post(rig.request(jid, "echo I am $PMAN_WORKER_INDEX", number_of_workers=30, cpu_limit=30))
    logs = server.wait_final(jid, 240)["logs"]
    assert logs == "".join(f"=== worker {n} ===\nI am {n}\n" for n in range(30))


def test_which_worker_failed(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, '[ "$PMAN_WORKER_INDEX" = 1 ] && exit 7; true', number_of_workers=2))
    assert server.wait_final(jid)["message"] == "worker 1: The job ended with exit code 7."


def test_an_image_that_cannot_be_pulled_may_yet_come(overlaid: Server, rig: Rig, jid: str) -> None:
    overlaid.post(rig.request(jid, "true", image="127.0.0.1:9/none:1"))
    wait_message(overlaid, jid, "The image 127.0.0.1:9/none:1 cannot be pulled: ")
    seen: list[str] = []

    def patient() -> bool:  # for longer than STUCK_JOB_PATIENCE_MINUTES
        seen.append(overlaid.get(jid).json()["status"])
        return len(seen) > 12

    wait_for(patient, 60, "twelve polls", every=0.4)
    assert set(seen) == {"notstarted"}


def test_a_job_that_fits_no_node(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, "true", cpu_limit=1_000_000))
    message = wait_message(server, jid, "Insufficient cpu")["message"]
    assert message.startswith("No node can take the job yet: ")


def test_one_line_of_twenty_megabytes(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, "head -c 20000000 /dev/zero | tr '\\0' x; echo THE END", memory_limit=256))
    logs = server.wait_final(jid)["logs"]
    assert logs.endswith("THE END\n")
    assert len(logs) <= 1024 * 1024


def test_quota(tmp_path: Path) -> None:
    """What can never fit ends after some patience; what merely waits for others runs; a full quota of Jobs is a 403."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        hard = {"limits.cpu": "150m", "count/jobs.batch": "3"}
        cluster.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}})
        wait_for(lambda: cluster.read("resourcequota", "q").get("status"), 30, "the quota to be counted")
        patient, server = rig.start(STUCK_JOB_PATIENCE_MINUTES="15"), rig.start(**IMPATIENT)
        until_told = OUT + 'until [ -e "$out/go" ]; do sleep 0.2; done'
        assert patient.post(rig.request("first", until_told)).status_code == 201
        patient.wait_state("first", "started")
        assert patient.post(rig.request("second", "true")).status_code == 201
        assert patient.post(rig.request("never", COUNTED, cpu_limit=200)).status_code == 201
        full = patient.post(rig.request("fourth", "true"))
        assert full.status_code == 403
        assert "exceeded quota" in full.json()["message"]
        for name in ("second", "never"):
            assert wait_message(patient, name, "exceeded quota")["status"] == "notstarted"
        assert "requested: limits.cpu=200m" in server.wait_final("never")["message"]
        assert rig.executions("never") == 0
        (rig.outgoing("first") / "go").touch()
        assert server.wait_final("second", 120)["status"] == "finishedSuccessfully"


def deny_second_worker(cluster: Cluster) -> list[dict[str, Any]]:
    """A policy of the cluster that refuses pods with completion index 1 in this namespace."""
    kind, name = "ValidatingAdmissionPolicy", f"second-{cluster.namespace}"
    group = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    index = "object.metadata.?annotations['batch.kubernetes.io/job-completion-index'].orValue('')"
    rule = {"expression": f"{index} != '1'", "message": "you cannot have a second one"}
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.namespace}}}
    return [
        group | {"kind": kind, "spec": {"matchConstraints": {"resourceRules": [pods], **here}, "validations": [rule]}},
        group | {"kind": f"{kind}Binding", "spec": {"policyName": name, "validationActions": ["Deny"]}},
    ]


def test_one_worker_that_cannot_start(tmp_path: Path) -> None:
    """Its user is told while the other one works, and the job, which can never be whole, ends after some patience."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        patient, server = rig.start(STUCK_JOB_PATIENCE_MINUTES="15"), rig.start(**IMPATIENT)
        policy = deny_second_worker(cluster)
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "c", "image": "none"}]}}
        pod["metadata"] = {"name": "p", "annotations": {"batch.kubernetes.io/job-completion-index": "1"}}
        try:
            cluster.apply(*policy)
            dry_run = functools.partial(cluster.attempt, "create", "--dry-run=server", "--filename=-")
            wait_for(lambda: "second one" in dry_run(given=json.dumps(pod)).stderr, 60, "the policy to be in force")
            patient.post(rig.request("two", COUNTED + "sleep 600", number_of_workers=2))
            patient.wait_state("two", "started", 90)
            words = f"Kubernetes refuses the job's pod: ValidatingAdmissionPolicy '{policy[0]['metadata']['name']}'"
            job = wait_message(patient, "two", words)
            assert (job["status"], "you cannot have a second one" in job["message"]) == ("started", True), job
            job = server.wait_final("two", 90)
            assert (job["status"], words in job["message"]) == ("finishedWithError", True), job
            assert rig.executions("two") == 1
        finally:
            for document in policy:
                cluster.kubectl("delete", document["kind"], document["metadata"]["name"], "--wait=false")


def test_pod_security(tmp_path: Path) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "baseline"}
    with namespace(labels) as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(**IMPATIENT)
        server.post(rig.request("forbidden", COUNTED))
        job = server.wait_final("forbidden")
        assert job["status"] == "finishedWithError"
        assert 'violates PodSecurity "baseline:latest": hostPath volumes' in job["message"]
