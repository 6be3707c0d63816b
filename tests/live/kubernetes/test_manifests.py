"""What the API server takes and refuses: examples, overlays, claims, and jobs of pman 6."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS, judge
from pman.templating.render import Renderer
from tests.live.kubernetes.cluster import EXAMPLES, Cluster, claim
from tests.rig import COUNTED, FINAL, Rig, Server, wait_for

pytestmark = pytest.mark.live("kubernetes")
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
