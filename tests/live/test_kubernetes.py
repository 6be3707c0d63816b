"""The Kubernetes backend on a real cluster: the contract, and what is particular to pods.

pman runs as a user who has the Role of deploy/kubernetes/rbac.yaml and nothing else, in a namespace of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
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

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS, judge
from pman.templating.render import Renderer
from tests.conftest import development
from tests.contract import Contract
from tests.fakes.faultproxy import FaultProxy
from tests.generate import HOSTILE
from tests.rig import COUNTED, OUT, ROOT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("kubernetes")
RBAC = ROOT / "deploy" / "kubernetes" / "rbac.yaml"
USER = {"kind": "User", "name": "job-runner", "apiGroup": "rbac.authorization.k8s.io"}
EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


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
    assert job["message"] == "The job ran out of memory: its limit is 16Mi.", job


def test_which_worker_failed(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, '[ "$PMAN_WORKER_INDEX" = 1 ] && exit 7; true', number_of_workers=2))
    assert server.wait_final(jid)["message"] == "Worker 1 ended with exit code 7."


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


# --------------------------------------------------------------------------------------------------------- rights


def test_every_right_is_needed(tmp_path: Path) -> None:
    """Without any one of them /readyz and the call that needs it name it, as verb and resource."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server, eager = rig.start(STUCK_JOB_PATIENCE_MINUTES="15"), rig.start(STUCK_JOB_PATIENCE_MINUTES="0")
        server.post(rig.request("runs", "sleep 600"))
        server.post(rig.request("stuck", "true", type="ds", input_dir="missing"))
        server.wait_state("runs", "started")
        wait_message(server, "stuck", "missing")
        uses: dict[tuple[str, str], Callable[[], requests.Response]] = {
            ("create", "jobs"): lambda: server.post(rig.request("new", "true")),
            ("get", "jobs"): lambda: server.get("runs"),
            ("list", "jobs"): lambda: server.call("GET", "jobs/"),
            ("delete", "jobs"): lambda: server.delete("runs"),
            ("patch", "jobs"): lambda: eager.get("stuck"),
            ("list", "pods"): lambda: server.get("runs"),
            ("get", "pods/log"): lambda: server.get("runs"),
            ("list", "events"): lambda: server.get("stuck"),
        }
        rules = [rule for document in role() for rule in document.get("rules", [])]
        granted = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
        assert granted == set(uses)
        for (verb, resource), use in uses.items():
            cluster.apply(*role(verb, resource))
            wait_for(functools.partial(lacks, server, verb, resource), 30, f"the right to {verb} {resource} to go")
            answer = use()
            assert answer.status_code == 503, (verb, resource, answer.text)
            assert f'cannot {verb} resource "{resource}"' in answer.json()["message"]
        late = rig.start()
        wait_for(lambda: "lacks the right to list events" in late.log.read_text(), 30, "the log to name the right")
        cluster.apply(*role())
        wait_for(lambda: ready(server).status_code == 200, 30, "all rights")
        assert server.delete("runs").status_code == 204


def lacks(server: Server, verb: str, resource: str) -> bool:
    answer = ready(server)
    return answer.status_code == 503 and f"lacks the right to {verb} {resource}" in answer.json()["message"]


def ready(server: Server) -> requests.Response:
    return server.call("GET", "../../readyz")


def lacking(cluster: Cluster, port: int) -> str:
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
        "name": "pman", "command": [sys.executable, "-m", "pman", "serve"], "workingDir": str(ROOT),
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "volumeMounts": [{"name": f"v{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(paths)],
    }  # fmt: skip
    volumes = [{"name": f"v{i}", "hostPath": {"path": os.path.realpath(path)}} for i, path in enumerate(paths)]
    spec = {"hostNetwork": True, "containers": [container], "volumes": volumes}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "pman"}}
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


def use_deployment(cluster: Cluster, rig: Rig, url: str) -> None:
    assert requests.get(f"{url}/readyz", timeout=60).text == '{"status":"ready"}\n'
    assert "ERROR" not in cluster.kubectl("logs", "deployment/pman")
    request = rig.request("inside", COUNTED + 'cat "$1/in"; id -u', type="ds", output_dir="made/by pman/out")
    (rig.store / request["input_dir"] / "in").write_text("from inside\n")
    answer = requests.post(f"{url}/api/v1/", json=request, timeout=60)
    assert answer.status_code == 201, answer.text

    def final() -> dict[str, str] | None:
        job: dict[str, str] = requests.get(f"{url}/api/v1/inside/", timeout=60).json()
        return job if job["status"].startswith("finished") else None

    job = wait_for(final, rig.job_seconds, "the job to end", every=0.3)
    assert (job["status"], job["logs"]) == ("finishedSuccessfully", "from inside\n10001\n"), job
    assert (rig.store / request["output_dir"] / "runs").read_text() == "run\n"
    missing = rig.request("missing", "true", type="ds", input_dir="no such")
    assert requests.post(f"{url}/api/v1/", json=missing, timeout=60).status_code == 400
    assert not (rig.store / "no such").exists()


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
