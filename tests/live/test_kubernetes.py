"""The Kubernetes backend on a real cluster: the contract, and what is particular to pods.

pman runs as a user who has the Role of deploy/kubernetes/rbac.yaml and nothing else, in a namespace of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import development
from tests.contract import Contract
from tests.rig import ROOT, Rig, running

pytestmark = pytest.mark.live("kubernetes")
RBAC = ROOT / "deploy" / "kubernetes" / "rbac.yaml"
USER = {"kind": "User", "name": "job-runner", "apiGroup": "rbac.authorization.k8s.io"}


@dataclass(frozen=True)
class Cluster:
    """A namespace of a real cluster."""

    env: dict[str, str]
    namespace: str

    def kubectl(self, *arguments: str, given: str = "", check: bool = True) -> str:
        command = [self.env["KUBECTL"], "--namespace", self.namespace, *arguments]
        done = subprocess.run(
            command,
            input=given,
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def read(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, *documents: dict[str, Any]) -> None:
        self.kubectl(
            "apply", "--filename=-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
        )


def role(*without: str) -> list[dict[str, Any]]:
    """The documents of rbac.yaml bound to the tests' user; `without`: verb and resource of a right left out."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(RBAC.read_text()))
    for document in documents:
        if document["kind"] == "RoleBinding":
            document["subjects"] = [USER]
        if document["kind"] == "Role" and without:
            verb, resource = without
            rule = next(rule for rule in document["rules"] if resource in rule["resources"])
            rule["verbs"].remove(verb)
            document["rules"] = [rule for rule in document["rules"] if rule["verbs"]]
    return documents


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A new namespace with the Role."""
    cluster = Cluster(development("kubernetes"), f"pman-{uuid.uuid4().hex[:8]}")
    cluster.kubectl("create", "namespace", cluster.namespace)
    try:
        cluster.apply(*role())
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", cluster.namespace, "--wait=false")


def kubernetes_rig(cluster: Cluster, directory: Path, **env: str) -> Rig:
    (directory / "store").mkdir(exist_ok=True)
    settings = {
        "CONTAINER_ENV": "kubernetes", "KUBECONFIG": cluster.env["KUBECONFIG_JOB_RUNNER"],
        "JOB_NAMESPACE": cluster.namespace, "STUCK_JOB_PATIENCE_MINUTES": "0.05", **env,
    }  # fmt: skip
    return Rig(settings, directory / "store", cluster.env["PMAN_TEST_IMAGE"], directory, job_seconds=90)


@pytest.fixture(scope="module")
def rig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(kubernetes_rig(cluster, tmp_path_factory.mktemp("kubernetes"))) as rig:
        yield rig


class TestKubernetes(Contract):
    """The whole contract."""
