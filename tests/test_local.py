"""The local backend under the contract, and what is particular to it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import Contract
from tests.rig import OUT, Rig, Server, running, wait_for


def local_rig(directory: Path, **env: str) -> Rig:
    """pman over the local backend, with its store and its state below `directory`."""
    (directory / "store").mkdir()
    settings = {"CONTAINER_ENV": "local", "LOCAL_STATE_DIR": str(directory / "state"), **env}
    return Rig(settings, directory / "store", "localhost/none:1", directory, read_only_input=False, job_seconds=20)


class TestLocal(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(local_rig(tmp_path_factory.mktemp("local"))) as rig:
            yield rig

    def test_secrets_stay_out_of_jobs(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "env"))
        assert "SECRET" not in server.wait_final(jid)["logs"]

    def test_what_a_command_leaves_behind_is_ended(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(
            rig.request(jid, OUT + 'sleep 600 & echo $! > "$out/pid"; bash -mc "sleep 601 & echo \\$! > $out/pid2"')
        )
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        for name in ("pid", "pid2"):
            pid = int((rig.outgoing(jid) / name).read_text())
            wait_for(functools.partial(_gone, pid), 5, "the leftover to end")

    def test_job_killed_from_outside(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + 'echo $$ > "$out/pid"; sleep 600'))
        wait_for((rig.outgoing(jid) / "pid").exists, 10, "the job to run")
        claim = Path(rig.env["LOCAL_STATE_DIR"], jid, "claim").read_text().split()
        os.kill(int(claim[1]), signal.SIGKILL)
        assert server.get(jid).json()["status"] == "started"  # the command itself still runs, and writes
        os.kill(int((rig.outgoing(jid) / "pid").read_text()), signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-s", claim[0]], check=False)
        job = server.wait_final(jid)
        assert job["status"] == "finishedWithError"
        assert "without a result" in job["message"]


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()
