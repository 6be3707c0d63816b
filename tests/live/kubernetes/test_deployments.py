"""pman in a pod: by kubectl, by the Helm chart, and in place of pman 6 in the public chart."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from pman import backends, settings
from tests.live.kubernetes.cluster import PAGE, PUBLIC_CHART, Cluster, claim, helm, kubernetes_rig, namespace
from tests.rig import COUNTED, ROOT, Rig, wait_for

pytestmark = pytest.mark.live("kubernetes")


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
