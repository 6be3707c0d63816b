"""Connections, certificates, tokens and components of the cluster that fail."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.faultproxy import FaultProxy
from tests.live.kubernetes.cluster import Cluster, kubeconfig, ready, role, wait_message
from tests.rig import COUNTED, Rig, Server, wait_for

pytestmark = pytest.mark.live("kubernetes")


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
