"""A namespace of a real cluster, pman over it, and how tests look at both.

pman runs as a user who has the Role of deploy/kubernetes/rbac.yaml and nothing else, in a namespace of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.conftest import development
from tests.rig import ROOT, Rig, Server, wait_for

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


def wait_message(server: Server, jid: str, words: str) -> dict[str, str]:
    """The job JSON as soon as its message holds `words`."""

    def explained() -> dict[str, str] | None:
        job: dict[str, str] = server.get(jid).json()
        return job if words in job["message"] else None

    return wait_for(explained, 120, f"{jid} to say {words}", every=0.2)


def evict(cluster: Cluster, jid: str) -> None:
    """As a drained node does it."""
    (pod,) = cluster.read("pods", f"--selector=job-name={jid}")["items"]
    name = pod["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    path = f"/api/v1/namespaces/{cluster.namespace}/pods/{name}/eviction"
    cluster.kubectl("create", f"--raw={path}", "--filename=-", given=json.dumps(eviction))


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


PAGE = ROOT / "docs" / "kubernetes.md"
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


def ready(server: Server) -> requests.Response:
    return server.call("GET", "../../readyz")


def kubeconfig(path: Path, url: str, user: dict[str, str], **cluster: str) -> str:
    """A kubeconfig file; its path."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}], "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(path)
