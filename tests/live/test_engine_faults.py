"""dockerd stopped, started and killed under running jobs, on an engine of its own; and one that leaves its Swarm."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from tests.conftest import development
from tests.live.engine_cases import SITE
from tests.rig import COUNTED, FINAL, ROOT, Rig, running, wait_for

pytestmark = pytest.mark.live("swarm")
YIELDING = "trap 'exit 0' TERM; echo began; sleep 600 & wait"  # answers SIGTERM with success


@dataclass(frozen=True)
class Daemon:
    """A dockerd that no other test uses; its paths are short, since sockets' must be."""

    home: str

    def script(self, *words: str) -> str:
        command = [str(ROOT / "scripts" / "engines" / "swarm"), *words]
        env = {**os.environ, "PMAN_DEV_HOME": self.home}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def host(self) -> str:
        return f"unix://{self.home}/swarm/docker.sock"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    development("swarm")  # skips where no dockerd can be had
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as home:
        daemon = Daemon(f"{home}/d")
        try:
            daemon.script("up")
            yield daemon
        finally:
            daemon.script("down")


@pytest.fixture
def jid() -> str:
    return f"fault-{uuid.uuid4().hex[:8]}"


def rig_over(daemon: Daemon, name: str, directory: Path) -> Rig:
    for part in ("store", "overlay"):
        (directory / part).mkdir()
    (directory / "overlay" / "site.yaml").write_text(SITE)
    env = {"CONTAINER_ENV": name, "DOCKER_HOST": daemon.host, "TEMPLATES_DIR": f"{directory}/overlay"}
    return Rig(env, directory / "store", "localhost/pman-test:busybox", directory)


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_dockerd_ends_under_running_jobs(daemon: Daemon, tmp_path: Path, jid: str, name: str, how: str) -> None:
    """503 meanwhile, recovery by itself; what ran is final and has not run again, and neither has what had failed."""
    failed = f"{jid}-failed"
    with running(rig_over(daemon, name, tmp_path)) as rig:
        server = rig.start()
        assert server.post(rig.request(failed, COUNTED + "exit 3", number_of_workers=2)).status_code == 201
        assert server.wait_final(failed)["status"] == "finishedWithError"
        assert server.post(rig.request(jid, COUNTED + YIELDING)).status_code == 201
        wait_for(lambda: rig.executions(jid), 60, "the job to run")
        server.wait_state(jid, "started")
        daemon.script(how, "dockerd")
        try:
            assert server.get(jid).status_code == 503
            assert server.call("GET", "../../readyz").status_code == 503
        finally:
            daemon.script("start", "dockerd")
        wait_for(lambda: server.call("GET", "../../readyz").status_code == 200, 60, "pman to be ready again")
        wait_for(lambda: server.get(jid).json().get("status") in FINAL, 60, "the job to be over")
        job = server.get(jid).json()
        assert job["status"] == "finishedWithError"
        assert job["message"]
        assert server.post(rig.request(f"{jid}-next", COUNTED)).status_code == 201
        assert server.wait_final(f"{jid}-next")["status"] == "finishedSuccessfully"
        assert server.get(failed).json()["status"] == "finishedWithError"
        assert (rig.executions(jid), rig.executions(failed), rig.executions(f"{jid}-next")) == (1, 2, 1)
        assert [server.delete(one).status_code for one in (jid, failed, f"{jid}-next")] == [204] * 3


def test_a_drained_node(daemon: Daemon, tmp_path: Path, jid: str) -> None:
    """What ran there has failed, whatever it answered to SIGTERM, and runs nowhere again; what is posted waits."""
    with running(rig_over(daemon, "swarm", tmp_path)) as rig, ExitStack() as stack:
        api = stack.enter_context(docker.APIClient(base_url=daemon.host))
        server = rig.start()

        def make(availability: str) -> None:
            (node,) = api.nodes()
            api.update_node(node["ID"], node["Version"]["Index"], {"Role": "manager", "Availability": availability})

        assert server.post(rig.request(jid, COUNTED + YIELDING, number_of_workers=2)).status_code == 201
        wait_for(lambda: rig.executions(jid) == 2, 60, "the job to run")
        make("drain")
        try:
            job = server.wait_final(jid)
            assert (job["status"], bool(job["message"])) == ("finishedWithError", True), job
            assert server.post(rig.request(f"{jid}-next", COUNTED)).status_code == 201
            wait_for(lambda: "no suitable node" in server.get(f"{jid}-next").json()["message"], 30, "a reason")
        finally:
            make("active")
        assert server.wait_final(f"{jid}-next")["status"] == "finishedSuccessfully"
        for how in ("stop", "start"):
            daemon.script(how, "dockerd")
        wait_for(lambda: server.call("GET", "../../readyz").status_code == 200, 60, "pman to be ready again")
        assert server.post(rig.request(f"{jid}-last", COUNTED)).status_code == 201
        assert server.wait_final(f"{jid}-last")["status"] == "finishedSuccessfully"
        assert server.get(jid).json()["status"] == "finishedWithError"
        assert [rig.executions(one) for one in (jid, f"{jid}-next", f"{jid}-last")] == [2, 1, 1]


def test_engine_that_leaves_its_swarm(daemon: Daemon, tmp_path: Path, jid: str) -> None:
    """Last: the Swarm is gone afterwards."""
    with running(rig_over(daemon, "swarm", tmp_path)) as rig, ExitStack() as stack:
        server = rig.start()
        api = stack.enter_context(docker.APIClient(base_url=daemon.host))
        api.leave_swarm(force=True)
        for answer in (server.post(rig.request(jid, COUNTED)), server.get(jid), server.call("GET", "../../readyz")):
            assert answer.status_code in (500, 503)
            assert "docker swarm init" in answer.json()["message"]
        with pytest.raises(AssertionError, match=r"is no Swarm manager: run `docker swarm init` there"):
            rig.start()
