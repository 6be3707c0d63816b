"""The Kubernetes backend on a real cluster: the contract, and what is particular to pods.

pman runs as a user who has the Role of deploy/kubernetes/rbac.yaml and nothing else, in a namespace of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from pman import backends, settings
from pman.job import make_job, validate
from pman.targets import TARGETS, judge
from pman.templating.render import Renderer
from tests.conftest import development
from tests.contract import Contract
from tests.fakes.faultproxy import FaultProxy
from tests.fakes.registry import slow_registry
from tests.generate import HOSTILE
from tests.rig import COUNTED, FINAL, OUT, ROOT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("kubernetes")
RBAC = ROOT / "deploy" / "kubernetes" / "rbac.yaml"
USER = {"kind": "User", "name": "job-runner", "apiGroup": "rbac.authorization.k8s.io"}
EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


@functools.cache
def helm() -> str:
    """The path of Helm, which is built where it is not."""
    command = [str(ROOT / "scripts/engines/kubernetes"), "helm"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Cluster:
    """A namespace of a real cluster."""

    env: dict[str, str]
    namespace: str

    def kubectl(self, *arguments: str, given: str = "") -> str:
        done = self.attempt(*arguments, given=given)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def attempt(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [self.env["KUBECTL"], "--namespace", self.namespace, *arguments]
        env = {**os.environ, **self.env}
        return subprocess.run(command, input=given, env=env, capture_output=True, text=True, timeout=120, check=False)

    def helm(self, *arguments: str) -> str:
        """Helm, as the cluster's administrator."""
        command = [helm(), "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def read(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *documents: dict[str, Any]) -> None:
        everything = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.kubectl("apply", "--filename=-", given=json.dumps(everything))

    def component(self, verb: str, name: str) -> None:
        """Stop a component of the cluster as a crash would, or start it again."""
        if self.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
            pytest.skip("only the one-node cluster lets its components be stopped")
        subprocess.run([str(ROOT / "scripts" / "engines" / "kubernetes"), verb, name], check=True, timeout=300)


def role(verb: str = "", resource: str = "") -> list[dict[str, Any]]:
    """The documents of rbac.yaml bound to the tests' user, without the right that verb and resource name."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(RBAC.read_text()))
    for document in documents:
        if document["kind"] == "RoleBinding":
            document["subjects"] = [USER]
        for rule in document.get("rules", []):
            if resource in rule["resources"]:
                rule["verbs"].remove(verb)
        if "rules" in document:
            document["rules"] = [rule for rule in document["rules"] if rule["verbs"]]
    return documents


@contextmanager
def namespace(labels: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A new namespace with the Role; it is deleted with all that is in it."""
    cluster = Cluster(development("kubernetes"), f"pman-{uuid.uuid4().hex[:8]}")
    metadata = {"name": cluster.namespace, "labels": labels or {}}
    try:
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        cluster.apply(*role())
        accounts = ("get", "serviceaccounts", "--output=name")
        wait_for(lambda: "serviceaccount/default\n" in cluster.kubectl(*accounts), 60, "the default service account")
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


def kubernetes_rig(cluster: Cluster, directory: Path, **env: str) -> Rig:
    """Some patience with what is not there at once; kubelet's events come half a minute late when pods are many."""
    (directory / "store").mkdir(exist_ok=True)
    given = {
        "CONTAINER_ENV": "kubernetes", "KUBECONFIG": cluster.env["KUBECONFIG_JOB_RUNNER"],
        "JOB_NAMESPACE": cluster.namespace, "STUCK_JOB_PATIENCE_MINUTES": "0.1", **env,
    }  # fmt: skip
    return Rig(given, directory / "store", cluster.env["PMAN_TEST_IMAGE"], directory, job_seconds=180)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with namespace() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def rig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(kubernetes_rig(cluster, tmp_path_factory.mktemp("kubernetes"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.fixture
def jid(server: Server) -> Iterator[str]:
    name = f"chris-jid-{uuid.uuid4().hex[:8]}"
    yield name
    server.delete(name)


CHANCE = random.Random(200)
LISTS = [["".join(CHANCE.choices(HOSTILE, k=CHANCE.randint(0, 4))) for _ in range(10)] for _ in range(200)]
HOSTILE_SCRIPT = (
    COUNTED
    + r"""printf '%s\0' "$@" > "$out/argv"; for i in 0 1 2 3 4 5 6 7 8 9; do
    eval "printf '%s\0' \"\$V$i\""; done > "$out/env" """
)


@dataclass(frozen=True)
class Crowd:
    """Jobs of a namespace of their own, and the state in which each ends."""

    rig: Rig
    server: Server
    jobs: list[Future[str]]


@pytest.fixture(scope="module")
def crowd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """200 jobs by 8 threads, each with a list as arguments and as environment, while the contract is tested."""
    needed = any("two_hundred" in item.name for item in request.session.items)
    directory = tmp_path_factory.mktemp("crowd")
    with namespace() as cluster, running(kubernetes_rig(cluster, directory)) as rig, ThreadPoolExecutor(8) as pool:
        server = rig.start(IGNORE_LIMITS="yes")

        def run(number: int) -> str:
            env = [f"V{i}={value}" for i, value in enumerate(LISTS[number])]
            answer = server.post(rig.request(f"hostile-{number}", HOSTILE_SCRIPT, *LISTS[number], env=env))
            assert answer.status_code == 201, answer.text
            return server.wait_final(f"hostile-{number}", 300)["status"]

        yield Crowd(rig, server, [pool.submit(run, number) for number in range(200 if needed else 0)])
        pool.shutdown(cancel_futures=True)


class TestKubernetes(Contract):
    """The whole contract, on a cluster that is busy with other jobs."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def busy(cls, crowd: Crowd) -> None:
        """Begin with them."""


def test_two_hundred_hostile_jobs_arrive_byte_for_byte(crowd: Crowd) -> None:
    """None of them lost, each run once."""
    assert {job.result(300) for job in crowd.jobs} == {"finishedSuccessfully"}
    listed = crowd.server.call("GET", "jobs/?limit=1000").json()["jobs"]
    assert {job["jid"] for job in listed} == {f"hostile-{number}" for number in range(200)}
    for number, values in enumerate(LISTS):
        out = crowd.rig.outgoing(f"hostile-{number}")
        expected = b"".join(value.encode() + b"\0" for value in values)
        assert (out / "argv").read_bytes() == expected + b"/share/outgoing\0"
        assert (out / "env").read_bytes() == expected
        assert crowd.rig.executions(f"hostile-{number}") == 1


# ------------------------------------------------------------------------------------------------------ manifests

STORAGES = {
    "host": {"STOREBASE": "/srv/store"},
    "nfs": {"STOREBASE": "/srv/store", "NFS_SERVER": "nfs.example.org"},
    "kubernetes_pvc": {"VOLUME_NAME": "store"},
}
EVERYTHING = {
    "CONTAINER_USER": "1000-1999:1000", "SHM_SIZE": "64", "JOB_LABELS": "a=b", "NODE_SELECTOR": "disk=ssd",
    "IMAGE_PULL_SECRETS": "one,two", "PFCON_SELECTOR": "app=pfcon", "ENABLE_HOME_WORKAROUND": "yes",
    "SECURITYCONTEXT_RUN_AS_GROUP": "7", "TIMELIMIT_MINUTES": "5",
}  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
def test_the_api_server_accepts_every_example(cluster: Cluster, storage: str) -> None:
    for extra in ({}, EVERYTHING, {"IGNORE_LIMITS": "yes"}):
        config = settings.load({"STORAGE_TYPE": storage, **STORAGES[storage], **extra})
        renderer = Renderer(config, TARGETS)
        for path in EXAMPLES:
            request = json.loads(path.read_text()) | {"gpu_limit": 1}
            spec = renderer.render(make_job(validate(request), config), "k8s")
            assert judge(spec) == []
            cluster.kubectl("create", "--dry-run=server", "--validate=strict", "--filename=-", given=spec.text)


OVERLAY = """{% extends "shipped/k8s/job.yaml.j2" %}
{% block service_account %}
{% if job.auid == "no account" %}
      serviceAccountName: nobody
{% endif %}
{% endblock %}
{% block priority_class %}
{% if job.auid == "no class" %}
      priorityClassName: nothing
{% endif %}
{% endblock %}
{% block tolerations %}
{% if job.auid == "typo" %}
      tolerationz: []
{% else %}
      tolerations:
        - key: site
          operator: Exists
{% endif %}
{% endblock %}
{% block pod_annotations %}
      annotations:
        site: "yes"
{% endblock %}
{% block volume_mounts %}
            - name: scratch
              mountPath: /scratch
{% if job.auid == "no secret" %}
            - name: secret
              mountPath: /secret
{% endif %}
{% endblock %}
{% block volumes %}
        - name: scratch
          emptyDir: {}
{% if job.auid == "no secret" %}
        - name: secret
          secret: {secretName: nosuch}
{% endif %}
{% endblock %}
"""


IMPATIENT = {"STUCK_JOB_PATIENCE_MINUTES": "0.05"}


@pytest.fixture(scope="module")
def overlaid(rig: Rig) -> Server:
    """pman with little patience and a site's overlay, which breaks jobs of some users."""
    (rig.logs / "overlay" / "k8s").mkdir(parents=True)
    (rig.logs / "overlay" / "k8s" / "job.yaml.j2").write_text(OVERLAY)
    return rig.start(TEMPLATES_DIR=str(rig.logs / "overlay"), **IMPATIENT)


def test_an_overlay(overlaid: Server, rig: Rig, jid: str) -> None:
    script = 'touch /scratch/x "$1/$(id -u)-$(id -g)"; grep CapEff /proc/self/status; ls /var/run/secrets; true'
    request = rig.request(jid, script)
    assert overlaid.post(request).status_code == 201
    job = overlaid.wait_final(jid)
    assert job["status"] == "finishedSuccessfully", job
    assert "CapEff:\t0000000000000000" in job["logs"]
    assert "serviceaccount" not in job["logs"]


def test_a_field_that_the_api_does_not_know_is_refused(overlaid: Server, rig: Rig, jid: str) -> None:
    answer = overlaid.post(rig.request(jid, "true", auid="typo"))
    assert answer.status_code == 500
    assert 'unknown field "spec.template.spec.tolerationz"' in answer.json()["message"]
    assert overlaid.get(jid).status_code == 404


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


# ------------------------------------------------------------------------------------------------------- messages


def wait_message(server: Server, jid: str, words: str) -> dict[str, str]:
    """The job JSON as soon as its message holds `words`."""

    def explained() -> dict[str, str] | None:
        job: dict[str, str] = server.get(jid).json()
        return job if words in job["message"] else None

    return wait_for(explained, 120, f"{jid} to say {words}", every=0.2)


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
    ("sleep 600", "finishedWithError", "Kubernetes ended a pod of the job to have its node or its place"),
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


def evict(cluster: Cluster, jid: str) -> None:
    """As a drained node does it."""
    (pod,) = cluster.read("pods", f"--selector=job-name={jid}")["items"]
    name = pod["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}/eviction"
    cluster.kubectl("create", f"--raw={path}", "--filename=-", given=json.dumps(eviction))


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


def older_job(cluster: Cluster, rig: Rig, jid: str, script: str, workers: int = 1) -> dict[str, Any]:
    """The Job that pman 6.3.1 makes of a request (read from its public source, pman/kubernetesmgr.py)."""
    request = rig.request(jid, script, number_of_workers=workers)
    mounts = (("/share/incoming", request["input_dir"]), ("/share/outgoing", request["output_dir"]))
    container = {
        "name": jid, "image": rig.image, "env": [], "command": [*request["entrypoint"], "/share/outgoing"],
        "resources": {"limits": {"memory": "64Mi", "cpu": "100m"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "storebase", "mountPath": target, "subPath": source, "readOnly": "incoming" in target}
            for target, source in mounts
        ],
    }  # fmt: skip
    volume = {"name": "storebase", "hostPath": {"path": str(rig.store)}}  # a claim, there
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [volume]}
    spec = {"parallelism": workers, "completions": workers, "backoffLimit": 0, "ttlSecondsAfterFinished": 86400}
    cluster.kubectl("create", "--filename=-", given=json.dumps({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": jid},
        "spec": spec | {"activeDeadlineSeconds": 604800, "template": {"spec": pod}},
    }))  # fmt: skip
    return request


def test_jobs_of_pman_6_go_on(cluster: Cluster, server: Server, rig: Rig) -> None:
    """They are read, logged, answered and deleted; a Job of somebody else never is."""
    running = older_job(cluster, rig, "old-1", COUNTED + "echo begun; sleep 600")
    older_job(cluster, rig, "old-2", "echo output; exit 4", workers=3)
    older_job(cluster, rig, "old-3", COUNTED + "echo done")
    cluster.kubectl("create", "job", "foreign", f"--image={rig.image}", "--", "sleep", "600")
    wait_for(lambda: server.get("old-1").json()["logs"] == "begun\n", 60, "the first line")
    job = server.get("old-1").json()
    assert (job["status"], job["cmd"]) == ("started", shlex.join([*running["entrypoint"], "/share/outgoing"]))
    assert server.post(running).status_code == 201
    assert server.post(running | {"args": ["other"]}).status_code == 409
    failed = server.wait_final("old-2")
    assert (failed["status"], "exit code 4" in failed["message"]) == ("finishedWithError", True)
    done = server.wait_final("old-3")
    assert (done["status"], done["logs"], bool(done["timestamp"])) == ("finishedSuccessfully", "done\n", True)
    assert rig.executions("old-1") == rig.executions("old-3") == 1
    listed = {job["jid"]: job["status"] for job in server.call("GET", "jobs/?limit=1000").json()["jobs"]}
    assert [listed.get(jid) for jid in ("old-1", "old-2", "old-3")] == ["started", *FINAL[::-1]]
    assert "foreign" not in listed
    assert [server.delete(jid).status_code for jid in ("old-1", "old-2", "old-3")] == [204] * 3
    assert server.get("old-1").status_code == 404
    assert (server.get("foreign").status_code, server.delete("foreign").status_code) == (404, 404)
    assert server.post(rig.request("foreign", "true")).status_code == 409
    assert cluster.read("job", "foreign")["status"].get("active") == 1
    assert server.post(running).status_code == 201  # the pods of the deleted one have ended
    server.wait_state("old-1", "started")
    assert server.delete("old-1").status_code == 204


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


@contextmanager
def claim(cluster: Cluster, path: Path, name: str) -> Iterator[None]:
    """A claim to a directory of this machine."""
    volume = f"{name}-{cluster.namespace}"
    storage = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    capacity = {"storage": "1Gi"}
    cluster.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
         "spec": storage | {"capacity": capacity, "hostPath": {"path": str(path)}}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
         "spec": storage | {"volumeName": volume, "resources": {"requests": capacity}}},
    )  # fmt: skip
    try:
        yield
    finally:
        cluster.kubectl("delete", "pv", volume, "--wait=false")


def test_a_volume_claim(cluster: Cluster, rig: Rig, jid: str) -> None:
    """STORAGE_TYPE=kubernetes_pvc, with the claim mounted at pman's STOREBASE."""
    server = rig.start(STORAGE_TYPE="kubernetes_pvc", VOLUME_NAME="store")
    with claim(cluster, rig.store, "store"):
        request = rig.request(jid, 'cat "$1/in" > "$2/out"; touch "$1/no" || echo read-only', type="ds")
        (rig.store / request["input_dir"] / "in").write_text("pixels\n")
        request["output_dir"] = f"feeds of/{jid}/new"
        assert server.post(request).status_code == 201
        job = server.wait_final(jid)
        assert job["status"] == "finishedSuccessfully", job
        assert "read-only\n" in job["logs"]
        assert (rig.store / request["output_dir"] / "out").read_text() == "pixels\n"
        missing = server.post(rig.request(jid + "-2", "true", type="ds", input_dir="no such"))
        assert missing.status_code == 400
        assert not (rig.store / "no such").exists()
    server.stop()


# -------------------------------------------------------------------------------------------------------- recipes

PAGE = ROOT / "docs" / "kubernetes.md"
RECIPES = dict(re.findall(r"^### ([^\n]*)\n(?:(?!^#).)*?^```jinja\n(.*?)^```$", PAGE.read_text(), re.S | re.M))


def recipe(directory: Path, name: str, **values: str) -> str:
    """TEMPLATES_DIR with the recipe of docs/kubernetes.md whose heading begins with `name`."""
    (text,) = [text for heading, text in RECIPES.items() if heading.startswith(name)]
    (directory / "recipe/k8s").mkdir(parents=True)
    (directory / "recipe/k8s/job.yaml.j2").write_text(text)
    (directory / "recipe/site.yaml").write_text(json.dumps(values))
    return str(directory / "recipe")


OPENSHIFT_USER = "1000650000"


@pytest.mark.parametrize(
    ("name", "user", "uid"), [("A `restricted` namespace", "1234:1234", "1234"), ("OpenShift", "", OPENSHIFT_USER)]
)
def test_a_restricted_namespace(tmp_path: Path, name: str, user: str, uid: str) -> None:
    """Of OpenShift's restricted-v2: pman names no user; the namespace's is put in here, as OpenShift puts it in."""
    given = {"STORAGE_TYPE": "kubernetes_pvc", "VOLUME_NAME": "store", "TEMPLATES_DIR": recipe(tmp_path, name)}
    template = tmp_path / "recipe/k8s/job.yaml.j2"
    if not user:
        config = settings.load({"CONTAINER_ENV": "kubernetes", **given})
        sample = make_job(validate(json.loads(EXAMPLES[0].read_text())), config)
        assert "runAsUser" not in Renderer(config, TARGETS).render(sample, "k8s").text
        named = f"runAsNonRoot: true\n        runAsUser: {uid}"
        template.write_text(template.read_text().replace("runAsNonRoot: true", named))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    with (
        namespace(labels) as cluster,
        running(kubernetes_rig(cluster, tmp_path, **given)) as rig,
        claim(cluster, rig.store, "store"),
    ):
        server = rig.start(CONTAINER_USER=user)
        request = rig.request(
            "one", 'id -u; echo x >"$1/x"; touch /tmp/x && echo temporary; touch /x || echo read-only'
        )
        rig.outgoing("one").chmod(0o777)
        assert server.post(request).status_code == 201
        job = server.wait_final("one")
        assert job["status"] == "finishedSuccessfully", job
        assert uid in job["logs"].splitlines()  # standard error may come first
        assert "temporary" in job["logs"]
        assert (rig.outgoing("one") / "x").stat().st_uid == int(uid)


def test_a_job_that_runs_again_after_an_eviction(tmp_path: Path) -> None:
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Jobs that run again"))
        server.post(rig.request("again", COUNTED + '[ "$(wc -l <"$out/runs")" = 2 ] || sleep 600'))
        wait_for(lambda: rig.executions("again") == 1, 60, "the first run")
        evict(cluster, "again")
        job = server.wait_final("again", 90)
        assert (job["status"], rig.executions("again")) == ("finishedSuccessfully", 2), job


def test_a_queue(tmp_path: Path) -> None:
    """Suspended as for Kueue, and resumed as Kueue does it."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Kueue", queue="imaging"))
        server.post(rig.request("queued", COUNTED))
        wait_message(server, "queued", "The job waits until Kueue admits it from the queue imaging.")
        workload = {"kind": "Workload", "name": "job-queued-0a1b2", "namespace": cluster.namespace}
        said = {"reason": "Pending", "message": "insufficient unused quota for cpu", "involvedObject": workload}
        cluster.apply({"apiVersion": "v1", "kind": "Event", "type": "Warning", "metadata": {"name": "e"}, **said})
        assert wait_message(server, "queued", "imaging: insufficient unused quota")["status"] == "notstarted"
        cluster.kubectl("patch", "job", "queued", '--patch={"spec": {"suspend": false}}')
        assert server.wait_final("queued")["status"] == "finishedSuccessfully"
        assert rig.executions("queued") == 1


def kueue_queue(cluster: Cluster) -> list[dict[str, Any]]:
    """A queue with room for one job of 100m, in Kueue's newest API."""
    group, name, here = {"apiVersion": "kueue.x-k8s.io/v1beta2"}, cluster.namespace, {"namespace": cluster.namespace}
    resources = [{"name": "cpu", "nominalQuota": "150m"}, {"name": "memory", "nominalQuota": "1Gi"}]
    flavors = [{"name": name, "resources": resources}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": flavors}]
    selected = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    return [
        group | {"kind": "ResourceFlavor", "metadata": {"name": name}},
        group | {"kind": "ClusterQueue", "metadata": {"name": name},
                 "spec": {"namespaceSelector": selected, "resourceGroups": groups}},
        group | {"kind": "LocalQueue", "metadata": {"name": "imaging"} | here, "spec": {"clusterQueue": name}},
    ]  # fmt: skip


def test_a_queue_of_kueue(tmp_path: Path) -> None:
    """Where the cluster has Kueue (0.14 or later): a job waits until the one before it has ended, and is explained."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        if cluster.attempt("get", "crd", "clusterqueues.kueue.x-k8s.io").returncode:
            pytest.skip("the cluster has no Kueue")
        queue = kueue_queue(cluster)
        try:
            cluster.apply(*queue)
            server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Kueue", queue="imaging"))
            server.post(rig.request("first", COUNTED + 'until [ -e "$out/go" ]; do sleep 0.2; done'))
            server.wait_state("first", "started")
            server.post(rig.request("second", COUNTED))
            job = wait_message(server, "second", "from the queue imaging: ")
            assert (job["status"], "insufficient unused quota for cpu" in job["message"]) == ("notstarted", True), job
            (rig.outgoing("first") / "go").touch()
            assert server.wait_final("second")["status"] == "finishedSuccessfully"
            assert (rig.executions("first"), rig.executions("second")) == (1, 1)
        finally:
            for document in queue:
                cluster.kubectl("delete", document["kind"], document["metadata"]["name"], "--wait=false")


def test_a_side_car(tmp_path: Path) -> None:
    """It neither hides how the job ended nor keeps it from ending."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Side-cars"))
        server.post(rig.request("three", "echo mine; exit 3"))
        job = server.wait_final("three", 90)
        assert (job["message"], job["logs"]) == ("The job ended with exit code 3.", "mine\n"), job


# --------------------------------------------------------------------------------------------------------- rights


def test_every_right_is_needed(tmp_path: Path) -> None:
    """Without any one of them /readyz and the call that needs it name it, as verb and resource."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(STUCK_JOB_PATIENCE_MINUTES="15")
        server.post(rig.request("runs", "sleep 600"))
        server.wait_state("runs", "started")
        uses: dict[tuple[str, str], Callable[[], requests.Response]] = {
            ("create", "jobs"): lambda: server.post(rig.request("new", "true")),
            ("get", "jobs"): lambda: server.get("runs"),
            ("list", "jobs"): lambda: server.call("GET", "jobs/"),
            ("list", "pods"): lambda: server.get("runs"),
            ("get", "pods/log"): lambda: server.get("runs"),
            ("delete", "jobs"): lambda: server.delete("runs"),  # which has marked the job all the same
        }
        rules = [rule for document in role() for rule in document.get("rules", [])]
        granted = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
        assert granted == {*uses, *HELPFUL}
        for (verb, resource), use in uses.items():
            cluster.apply(*role(verb, resource))
            wait_for(functools.partial(lacks, server, verb, resource), 30, f"the right to {verb} {resource} to go")
            answer = use()
            only_the_log = resource == "pods/log"  # which never costs the status
            assert answer.status_code == (200 if only_the_log else 503), (verb, resource, answer.text)
            assert f'cannot {verb} resource "{resource}"' in answer.json()["logs" if only_the_log else "message"]
        late = rig.start()
        wait_for(lambda: "right to delete jobs.batch" in late.log.read_text(), 30, "the log to name the right")
        cluster.apply(*role())
        wait_for(lambda: ready(server).status_code == 200, 30, "all rights")
        assert server.delete("runs").status_code == 204


HELPFUL = {("list", "events"), ("patch", "jobs")}
# The Role of the public chart pfcon 1.0.0 (FNNDSC/charts), by which existing sites run pman.
PUBLIC_CHART = [
    {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
    },
    {
        "apiGroups": [""],
        "resources": ["pods"],
        "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get", "list", "watch"]},
]


def test_the_rights_of_existing_sites_are_enough(tmp_path: Path) -> None:
    """The Role of the public chart, without events: everything is answered, with fewer words."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        given = next(document for document in role() if document["kind"] == "Role")
        cluster.apply(given | {"rules": PUBLIC_CHART})
        server = rig.start(**IMPATIENT)
        wait_for(lambda: "list events" in ready(server).json().get("message", ""), 30, "the right to list events to go")
        assert ready(server).status_code == 200
        assert server.post(rig.request("runs", COUNTED + "echo hello")).status_code == 201
        assert server.post(rig.request("gone", COUNTED, image="localhost/nosuch/image:1")).status_code == 201
        assert server.post(rig.request("lost", COUNTED, type="ds", input_dir="missing")).status_code == 201
        assert server.wait_final("runs")["logs"] == "hello\n"
        wait_message(server, "lost", "waits for a directory of the job")
        assert server.get("lost").json()["status"] == "notstarted"
        text = server.log.read_text()
        assert (text.count("lacks the right to list events"), text.count("cannot list resource")) == (1, 1)
        assert "ERROR" not in text
        assert {server.delete(jid).status_code for jid in ("runs", "gone", "lost")} == {204}


def test_without_the_right_to_change_jobs(tmp_path: Path) -> None:
    """A job that cannot start is explained, and waits."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        cluster.apply(*role("patch", "jobs"))
        server = rig.start(STUCK_JOB_PATIENCE_MINUTES="0")
        wait_for(lambda: "patch jobs.batch" in ready(server).json().get("message", ""), 30, "the right to go")
        server.post(rig.request("stuck", "true", type="ds", input_dir="missing"))
        wait_message(server, "stuck", "cannot be mounted")
        wait_for(lambda: "Jobs that cannot start wait for ever" in server.log.read_text(), 60, "the log to say so")
        assert server.get("stuck").json()["status"] == "notstarted"


def lacks(server: Server, verb: str, resource: str) -> bool:
    answer = ready(server)
    return answer.status_code == 503 and f"lacks the right to {verb} {resource}" in answer.json()["message"]


def ready(server: Server) -> requests.Response:
    return server.call("GET", "../../readyz")


def lacking(cluster: Cluster, port: int, name: str = "pman", *command: str) -> str:
    """A strategic merge patch that gives pman's pod what this cluster has not: a network, and an image with pman."""
    admin = yaml.safe_load(Path(cluster.env["KUBECONFIG"]).read_text())["clusters"][0]["cluster"]["server"]
    host, api_port = admin.removeprefix("https://").split(":")
    env = {
        "KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": api_port, "PORT": str(port),
        "LISTEN_ADDRESS": "0.0.0.0", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    seen = dict.fromkeys(["/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix, str(ROOT)])
    paths = [path for path in seen if not any(path.startswith(other + "/") for other in seen)]
    container = {
        "name": "pman", "command": list(command or [sys.executable, "-m", "pman", "serve"]), "workingDir": str(ROOT),
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "volumeMounts": [{"name": f"v{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(paths)],
    }  # fmt: skip
    volumes = [{"name": f"v{i}", "hostPath": {"path": os.path.realpath(path)}} for i, path in enumerate(paths)]
    spec = {"hostNetwork": True, "containers": [container], "volumes": volumes}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}}
    return json.dumps(deployment | {"spec": {"replicas": 1, "template": {"spec": spec}}})


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def site_of(cluster: Cluster, rig: Rig, port: int, directory: Path) -> Path:
    """A site's kustomization over deploy/kubernetes: its namespace and image, and what only this cluster needs."""
    image, tag = rig.image.rsplit(":", 1)
    on_port = [{"op": "replace", "path": "/spec/template/spec/containers/0/ports/0/containerPort", "value": port}]
    patches = [
        {"patch": lacking(cluster, port)},
        {"patch": json.dumps(on_port), "target": {"kind": "Deployment"}},
    ]
    images = [{"name": "localhost/pman", "newName": image, "newTag": tag}]
    site = {"namespace": cluster.namespace, "resources": ["../shipped"], "images": images, "patches": patches}
    shutil.copytree(ROOT / "deploy/kubernetes", directory / "shipped")
    (directory / "site").mkdir()
    (directory / "site/kustomization.yaml").write_text(json.dumps(site))
    return directory / "site"


def test_the_shipped_deployment(tmp_path: Path) -> None:
    """pman in a pod, with the account of rbac.yaml and no kubeconfig, its store a claim."""
    with namespace() as cluster:
        if cluster.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
            pytest.skip("the pod runs this machine's Python, and has its network")
        rig, port = kubernetes_rig(cluster, tmp_path), free_port()
        site = site_of(cluster, rig, port, tmp_path)
        rig.store.chmod(0o777)  # pman makes directories, and is not root there
        cluster.kubectl("create", "secret", "generic", "pman", "--from-literal=SECRET_KEY=a secret key for tests")
        with claim(cluster, rig.store, "storebase"):
            cluster.kubectl("apply", f"--kustomize={site}")
            cluster.kubectl("rollout", "status", "deployment/pman", "--timeout=90s")
            use_deployment(cluster, rig, f"http://127.0.0.1:{port}")


# A values file for the public chart pfcon, with its names and none of its texts.
OF_PFCON: dict[str, Any] = {
    "replicaCount": 1, "password": "x", "pfcon": {"image": {"repository": "r/pfcon", "tag": "5.2.3"}},
    "global": {"defaultStorageClass": "fast", "podSecurityContext": {"runAsUser": 2000, "runAsGroup": 3000}},
    "storage": {"size": "20Gi", "accessModes": ["ReadWriteMany"]}, "service": {"type": "ClusterIP", "port": 5005},
    "imagePullSecrets": [{"name": "hub"}], "nodeSelector": {"disk": "ssd"}, "podAnnotations": {"a": "b"},
    "serviceAccount": {"annotations": {"role": "x"}, "name": "runner"},
    "pman": {
        "image": {"repository": "r/pman", "pullPolicy": "Always", "tag": "7"}, "containerPort": 5010,
        "resources": {"limits": {"memory": "1Gi"}}, "secretKey": "a key of twenty letters",
        "extraEnv": {"JOB_LABELS": "chrisproject.org/job=plugininstance", "IGNORE_LIMITS": "no"},
    },
}  # fmt: skip
EVERY_VALUE = {
    "serviceMonitor": {"enabled": True}, "networkPolicy": {"closeJobs": True, "from": [{"podSelector": {}}]},
    "tolerations": [{"key": "x", "operator": "Exists"}], "pman": {"templates": {"k8s/job.yaml.j2": "{% set a = 1 %}"}},
}  # fmt: skip


@pytest.mark.parametrize("values", [{}, OF_PFCON, EVERY_VALUE], ids=["nothing", "pfcon", "everything"])
def test_what_the_chart_renders(cluster: Cluster, tmp_path: Path, values: dict[str, Any]) -> None:
    """It is lint-free, the API server takes it, and pman starts with its settings."""
    (tmp_path / "values.yaml").write_text(json.dumps(values))
    arguments = (str(ROOT / "deploy/helm"), f"--values={tmp_path}/values.yaml")
    assert "0 chart(s) failed" in cluster.helm("lint", "--strict", *arguments)
    documents = list(yaml.safe_load_all(cluster.helm("template", "chris", *arguments)))
    by_kind = {document["kind"]: document for document in documents if "templates" not in document["metadata"]["name"]}
    for document in documents:
        if document["kind"] != "ServiceMonitor":  # its kind comes with an operator
            cluster.kubectl(
                "create", "--dry-run=server", "--validate=strict", "--filename=-", given=json.dumps(document)
            )
    config = settings.load(by_kind["ConfigMap"]["data"] | {"SECRET_KEY": "x" * 20, "TEMPLATES_DIR": ""})
    assert backends.check_for_service(config) is not None
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert ("ServiceMonitor" in by_kind) is ("serviceMonitor" in values)
    assert ("PodDisruptionBudget" in by_kind) is (by_kind["Deployment"]["spec"]["replicas"] > 1)
    if not values:  # one port for the image, the pod and the Service
        port = re.findall(r" PORT=(\d+) ", (ROOT / "deploy/Dockerfile").read_text())
        (service,) = by_kind["Service"]["spec"]["ports"]
        assert [str(config.port), str(service["port"])] == port * 2
    if values is OF_PFCON:
        assert config.container_user == "2000:3000"
        assert (pod["securityContext"]["runAsUser"], pod["containers"][0]["image"]) == (2000, "r/pman:7")
        assert (pod["serviceAccountName"], config.port, pod["nodeSelector"]) == ("runner", 5010, {"disk": "ssd"})
        assert by_kind["PersistentVolumeClaim"]["spec"]["storageClassName"] == "fast"


def test_the_chart_on_openshift(cluster: Cluster) -> None:
    """It names no user there: restricted-v2 would refuse the pods."""
    api = "--api-versions=security.openshift.io/v1/SecurityContextConstraints"
    assert "runAsUser" in cluster.helm("template", "chris", str(ROOT / "deploy/helm"))
    rendered = cluster.helm("template", "chris", str(ROOT / "deploy/helm"), api)
    assert re.findall(r"runAsUser|runAsGroup|CONTAINER_USER", rendered) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("pman.extraEnv.SECRET_KEY=x", "set pman.secretKey"),
        ("pman.image.repository=ghcr.io/fnndsc/pman", "that is pman 6"),
    ],
)
def test_values_that_the_chart_refuses(cluster: Cluster, value: str, words: str) -> None:
    command = [helm(), "template", "chris", str(ROOT / "deploy/helm"), f"--set={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr


def test_the_helm_chart(tmp_path: Path) -> None:
    """Installed by Helm with what only this cluster needs, upgraded with another value, and removed."""
    with namespace() as cluster:
        if cluster.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
            pytest.skip("the pod runs this machine's Python, and has its network")
        rig, port = kubernetes_rig(cluster, tmp_path), free_port()
        rig.store.chmod(0o777)
        image, tag = rig.image.rsplit(":", 1)
        patch = {"patch": lacking(cluster, port), "target": {"kind": "Deployment"}}
        (tmp_path / "kustomization.yaml").write_text(json.dumps({"resources": ["all.yaml"], "patches": [patch]}))
        render = tmp_path / "render"
        render.write_text(
            f"#!/bin/sh -e\ncat >{tmp_path}/all.yaml\nexec {cluster.env['KUBECTL']} kustomize {tmp_path}\n"
        )
        render.chmod(0o755)
        values = {
            "replicaCount": 1, "storage": {"existingClaim": "storebase"}, "podSecurityContext": {"runAsUser": 10001},
            "pman": {
                "image": {"repository": image, "tag": tag, "pullPolicy": "Never"}, "containerPort": port,
                "extraEnv": {"JOB_LABELS": "site=tests"}, "templates": {"site.yaml": "queue: imaging\n"},
            },
        }  # fmt: skip
        (tmp_path / "values.yaml").write_text(json.dumps(values))
        arguments = (
            "chris",
            str(ROOT / "deploy/helm"),
            f"--values={tmp_path}/values.yaml",
            f"--post-renderer={render}",
        )
        with claim(cluster, rig.store, "storebase"):
            cluster.helm("install", *arguments, "--wait", "--timeout=3m")
            key = cluster.read("secret", "chris-pman")["data"]["SECRET_KEY"]
            use_deployment(cluster, rig, f"http://127.0.0.1:{port}", "chris-pman")
            assert cluster.read("job", "inside")["metadata"]["labels"]["site"] == "tests"
            cluster.helm("upgrade", *arguments, "--set=pman.extraEnv.JOB_LABELS=site=other")
            assert cluster.read("secret", "chris-pman")["data"]["SECRET_KEY"] == key
            cluster.helm("uninstall", "chris")


def public_chart(cluster: Cluster) -> list[dict[str, Any]]:
    """What the public chart pfcon 1.0.0 (FNNDSC/charts) renders for a release `chris`, as far as it concerns pman."""
    name, labels = "chris-pfcon", {"app.kubernetes.io/name": "pfcon", "app.kubernetes.io/instance": "chris"}
    probe = {"httpGet": {"path": "/api/v1/", "port": 5010}, "periodSeconds": 3}
    source = [{"configMapRef": {"name": "chris-pman"}}, {"secretRef": {"name": "chris-pman"}}]
    command = ["gunicorn", "-b", "0.0.0.0:5010", "pman.wsgi:application"]
    pman = {"name": "pman", "image": "ghcr.io/fnndsc/pman:6.1.0", "command": command, "envFrom": source}
    pfcon: dict[str, Any] = {"name": "pfcon", "image": cluster.env["PMAN_TEST_IMAGE"], "command": ["sleep", "600"]}
    pfcon["volumeMounts"] = [{"mountPath": "/var/local/storeBase", "name": "storebase"}]
    claims = [{"name": "storebase", "persistentVolumeClaim": {"claimName": "chris-storebase"}}]
    pod = {"serviceAccountName": name, "containers": [pfcon, pman | {"readinessProbe": probe}], "volumes": claims}
    template = {"metadata": {"labels": labels}, "spec": pod}
    settings = {
        "CONTAINER_ENV": "kubernetes", "STORAGE_TYPE": "kubernetes_pvc", "JOB_NAMESPACE": cluster.namespace,
        "VOLUME_NAME": "chris-storebase", "JOB_LABELS": "chrisproject.org/job=plugininstance",
        "ENABLE_HOME_WORKAROUND": "yes", "REMOVE_JOBS": "yes", "IGNORE_LIMITS": "no", "CONTAINER_USER": "1001:0",
        "GUNICORN_CMD_ARGS": "--workers=4 --timeout=30",
    }  # fmt: skip
    creator, named = f"{name}-job-creator", {"name": "chris-pman"}
    subject = {"kind": "ServiceAccount", "name": name, "namespace": cluster.namespace}
    rbac, group = "rbac.authorization.k8s.io/v1", "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}},
        {"apiVersion": rbac, "kind": "Role", "metadata": {"name": creator}, "rules": PUBLIC_CHART},
        {"apiVersion": rbac, "kind": "RoleBinding", "metadata": {"name": creator}, "subjects": [subject],
         "roleRef": {"apiGroup": group, "kind": "Role", "name": creator}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": settings},
        {"apiVersion": "v1", "kind": "Secret", "metadata": named, "stringData": {"SECRET_KEY": "x" * 32}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
         "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}},
    ]  # fmt: skip


def rolled_out(cluster: Cluster, directory: Path, site: dict[str, Any]) -> str:
    """A kustomization over what the public chart renders; pman's address, once its pod is ready.

    Its command is the chart's, by the Python of this machine and at a port of the test's: this cluster's pods have this
    machine's network, where port 5010 may be somebody's.
    """
    port = free_port()
    rendered = public_chart(cluster)
    (given,) = [document for document in rendered if document["kind"] == "Deployment"]
    command = [
        word.replace("5010", str(port)) for word in given["spec"]["template"]["spec"]["containers"][1]["command"]
    ]
    assert command[0] == "gunicorn"
    probe = {"name": "pman", "readinessProbe": {"httpGet": {"port": port}}}
    pod = {"securityContext": {"runAsUser": 1001}, "containers": [probe], "terminationGracePeriodSeconds": 1}
    here = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chris-pfcon"}}
    patches = [lacking(cluster, port, "chris-pfcon", sys.executable, "-m", *command)]
    patches += [json.dumps(here | {"spec": {"template": {"spec": pod}}})]
    site = site | {"patches": [*site.get("patches", []), *({"patch": patch} for patch in patches)]}
    (directory / "all.yaml").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": rendered}))
    (directory / "kustomization.yaml").write_text(json.dumps(site | {"namespace": cluster.namespace}))
    cluster.kubectl("apply", f"--kustomize={directory}")
    cluster.kubectl("rollout", "status", "deployment/chris-pfcon", "--timeout=180s")
    return f"http://127.0.0.1:{port}"


def test_from_the_public_chart(tmp_path: Path) -> None:
    """pman takes the place of pman 6 beside pfcon by its image alone; with the page's patches it does all it can."""
    with namespace() as cluster:
        if cluster.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
            pytest.skip("the pod runs this machine's Python, and has its network")
        rig = kubernetes_rig(cluster, tmp_path)
        rig.store.chmod(0o777)
        (page,) = re.findall(r"^```yaml\n(resources:.*?)^```$", PAGE.read_text(), re.S | re.M)
        image, tag = rig.image.rsplit(":", 1)
        site = yaml.safe_load(page.replace("registry.example.org/pman", image).replace('"7"', f'"{tag}"'))
        with claim(cluster, rig.store, "chris-storebase"):
            url = rolled_out(cluster, tmp_path, {name: site[name] for name in ("resources", "images")})
            answer = requests.get(f"{url}/readyz", timeout=60)
            assert (answer.status_code, "list events" in answer.json()["message"]) == (200, True)
            request = rig.request("swapped", COUNTED + "id -u")
            rig.outgoing("swapped").chmod(0o777)
            run_a_job(rig, url, request, "1001\n")
            assert requests.delete(f"{url}/api/v1/swapped/", timeout=60).status_code == 204
            cluster.kubectl("delete", "deployment", "chris-pfcon", "--cascade=foreground")
            url = rolled_out(cluster, tmp_path, site)
            use_deployment(cluster, rig, url, "chris-pfcon", "1001")
            assert "Using worker: gthread" in cluster.kubectl("logs", "deployment/chris-pfcon", "--container=pman")


def use_deployment(cluster: Cluster, rig: Rig, url: str, name: str = "pman", uid: str = "10001") -> None:
    assert requests.get(f"{url}/readyz", timeout=60).json() == {"status": "ready"}
    assert "ERROR" not in cluster.kubectl("logs", f"deployment/{name}", "--container=pman")
    request = rig.request("inside", COUNTED + 'cat "$1/in"; id -u', type="ds", output_dir="made/by pman/out")
    (rig.store / request["input_dir"] / "in").write_text("from inside\n")
    run_a_job(rig, url, request, f"from inside\n{uid}\n")
    missing = rig.request("missing", "true", type="ds", input_dir="no such")
    assert requests.post(f"{url}/api/v1/", json=missing, timeout=60).status_code == 400
    assert not (rig.store / "no such").exists()


def run_a_job(rig: Rig, url: str, request: dict[str, Any], logs: str) -> None:
    """Once, and well, with these logs."""
    answer = requests.post(f"{url}/api/v1/", json=request, timeout=60)
    assert answer.status_code == 201, answer.text

    def final() -> dict[str, str] | None:
        job: dict[str, str] = requests.get(f"{url}/api/v1/{request['jid']}/", timeout=60).json()
        return job if job["status"].startswith("finished") else None

    job = wait_for(final, rig.job_seconds, "the job to end", every=0.3)
    assert (job["status"], job["logs"]) == ("finishedSuccessfully", logs), job
    assert (rig.store / request["output_dir"] / "runs").read_text() == "run\n"


# --------------------------------------------------------------------------------------------------------- faults


def kubeconfig(path: Path, url: str, user: dict[str, str], **cluster: str) -> str:
    """A kubeconfig file; its path."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}], "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(path)


def test_a_connection_cut_around_create(cluster: Cluster, rig: Rig, tmp_path: Path) -> None:
    """The API server has the Job, or has not, and pman does not know which: it runs once all the same."""
    command = [cluster.env["KUBECTL"], "proxy", "--port=0", f"--kubeconfig={cluster.env['KUBECONFIG_JOB_RUNNER']}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            with FaultProxy(f"tcp://{address}") as proxy:
                url = proxy.url.replace("tcp://", "http://")
                server = rig.start(KUBECONFIG=kubeconfig(tmp_path / "config", url, {}))
                for number, arm in enumerate((proxy.cut_after, proxy.cut_before)):
                    jid = f"cut-{number}"
                    arm(f"POST /apis/batch/v1/namespaces/{cluster.namespace}/jobs?fieldValidation".encode())
                    assert server.post(rig.request(jid, COUNTED)).status_code == 201
                    assert proxy.cuts == number + 1
                    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
                    assert rig.executions(jid) == 1
                server.stop()
        finally:
            process.terminate()


def test_a_certificate_that_is_not_trusted(cluster: Cluster, rig: Rig, tmp_path: Path) -> None:
    admin = yaml.safe_load(Path(cluster.env["KUBECONFIG"]).read_text())["clusters"][0]["cluster"]["server"]
    server = rig.start(KUBECONFIG=kubeconfig(tmp_path / "config", admin, {}))
    answer = server.post(rig.request("untrusted", "true"))
    assert answer.status_code == 500
    assert "is not the one that pman trusts" in answer.json()["message"]
    server.stop()


def test_the_api_server_is_killed_while_jobs_are_posted(cluster: Cluster, rig: Rig, server: Server) -> None:
    """Jobs are posted until it is gone, so that it dies with some of them in its hands.

    Their pods are made afterwards: the Job controller makes one twice when the answer to its own call is lost.
    """
    wanted: dict[str, dict[str, Any]] = {}
    answered: list[tuple[int, float]] = []
    gone = threading.Event()

    def post(worker: int) -> None:
        number = itertools.count()
        while not gone.is_set():
            jid = f"through-{worker}-{next(number)}"
            wanted[jid] = rig.request(jid, COUNTED)
            answered.append((server.post(wanted[jid]).status_code, time.monotonic()))

    cluster.component("stop", "kube-controller-manager")
    with ThreadPoolExecutor(3) as pool:
        posting = [pool.submit(post, worker) for worker in range(3)]
        try:
            wait_for(lambda: len(answered) >= 6, 60, "the first jobs")
            cluster.component("stop", "kube-apiserver")
            stopped_at = time.monotonic()
            gone.set()
            down = server.get("through-0-0")
            assert (down.status_code, "cannot be reached" in down.json()["message"]) == (503, True), down.text
            assert ready(server).status_code == 503
        finally:
            gone.set()
            cluster.component("start", "kube-apiserver")
            cluster.component("start", "kube-controller-manager")
        for worker in posting:
            worker.result()
        assert {code for code, _ in answered} <= {201, 503}
        assert any(code == 503 or moment > stopped_at for code, moment in answered)
        wait_for(lambda: ready(server).status_code == 200, 60, "pman to be ready again")
        assert {answer.status_code for answer in pool.map(server.post, wanted.values())} == {201}
    for jid in wanted:
        assert server.wait_final(jid, 300)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1


def test_a_token_that_is_no_longer_valid(cluster: Cluster, rig: Rig, tmp_path: Path) -> None:
    """pman says so, and goes on with the new token as soon as it is in the file."""
    binding = next(d for d in role() if d["kind"] == "RoleBinding")
    account = {"kind": "ServiceAccount", "name": "short", "namespace": cluster.namespace}
    cluster.apply(binding | {"metadata": {"name": "short"}, "subjects": [account]})
    admin = yaml.safe_load(Path(cluster.env["KUBECONFIG"]).read_text())["clusters"][0]["cluster"]
    token = tmp_path / "token"

    def renew() -> None:
        cluster.kubectl("create", "serviceaccount", "short")
        token.write_text(cluster.kubectl("create", "token", "short"))

    renew()
    config = kubeconfig(tmp_path / "config", user={"tokenFile": str(token)}, **{"url": admin.pop("server")}, **admin)
    server = rig.start(KUBECONFIG=config)
    assert ready(server).status_code == 200
    cluster.kubectl("delete", "serviceaccount", "short")
    wait_for(lambda: "has expired" in ready(server).text, 60, "the token to be refused")
    answer = server.get("any")
    assert (answer.status_code, "401" in answer.json()["message"]) == (503, True)
    renew()
    wait_for(lambda: ready(server).status_code == 200, 30, "pman to use the new token")
    server.stop()


def test_a_namespace_that_does_not_exist(cluster: Cluster, rig: Rig) -> None:
    server = rig.start(KUBECONFIG=cluster.env["KUBECONFIG"], JOB_NAMESPACE="pman-nosuch")
    answer = server.post(rig.request("nowhere", "true"))
    assert answer.status_code == 500
    assert 'namespaces "pman-nosuch" not found' in answer.json()["message"]
    assert ready(server).status_code == 503
    wait_for(lambda: "The namespace of JOB_NAMESPACE does not exist" in server.log.read_text(), 30, "a line in the log")
    server.stop()


def test_a_kubelet_that_hangs(cluster: Cluster, rig: Rig, jid: str) -> None:
    """It takes connections and answers nothing: one GET waits for that, the next ones do not."""
    if cluster.env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
        pytest.skip("only the one-node cluster lets its components be stopped")
    server = rig.start()
    server.post(rig.request(jid, "echo begun; sleep 600"))
    wait_for(lambda: "begun" in server.get(jid).json()["logs"], 60, "the first line")
    pid = int((Path(cluster.env["PMAN_DEV_KUBERNETES_RUN"]) / "pid/kubelet").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            job = server.get(jid).json()
            seconds.append(time.monotonic() - began)
            assert (job["status"], "cannot be read now" in job["logs"]) == ("started", True), job
    finally:
        os.kill(pid, signal.SIGCONT)
    assert seconds[0] > 9
    assert max(seconds[1:]) < 9, seconds
    assert server.delete(jid).status_code == 204
    server.stop()


def test_kubelet_stops(cluster: Cluster, rig: Rig, server: Server, jid: str) -> None:
    """The job stays started, its user is told, and it ends well when the node is back."""
    server.post(rig.request(jid, COUNTED + 'echo begun; until [ -e "$out/go" ]; do sleep 0.2; done; echo done'))
    wait_for(lambda: "begun" in server.get(jid).json()["logs"], 60, "the first line")
    cluster.component("stop", "kubelet")
    try:
        cut_off = server.get(jid).json()
        assert cut_off["status"] == "started"
        assert "cannot be read now" in cut_off["logs"]
        assert wait_message(server, jid, "that runs the job does not answer")["status"] == "started"
        (rig.outgoing(jid) / "go").touch()
    finally:
        cluster.component("start", "kubelet")
    job = server.wait_final(jid, 120)
    assert (job["status"], job["message"]) == ("finishedSuccessfully", "")
    assert "done" in job["logs"]
    assert rig.executions(jid) == 1
