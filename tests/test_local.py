"""The local backend under the contract, and what is particular to it."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.contract import Contract
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for


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
            wait_for(functools.partial(gone, pid), 5, "the leftover to end")

    def test_a_process_that_left_its_session_is_ended_before_the_job_is(
        self, server: Server, rig: Rig, jid: str
    ) -> None:
        server.post(rig.request(jid, OUT + "setsid sh -c \"echo \\$\\$ > '$out/pid'; exec sleep 600\" & sleep 0.5"))
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert gone(int((rig.outgoing(jid) / "pid").read_text()))

    def test_job_killed_from_outside(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + 'echo $$ > "$out/pid"; sleep 600'))
        wait_for((rig.outgoing(jid) / "pid").exists, 10, "the job to run")
        claim = (state_of(rig, jid) / "claim").read_text().split()
        os.kill(int(claim[1]), signal.SIGKILL)
        assert server.get(jid).json()["status"] == "started"  # the command itself still runs, and writes
        os.kill(int((rig.outgoing(jid) / "pid").read_text()), signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-s", claim[0]], check=False)
        job = server.wait_final(jid)
        assert job["status"] == "finishedWithError"
        assert "without a result" in job["message"]

    def test_the_time_of_day_does_not_matter(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + 'echo $$ > "$out/pid"; exec sleep 600'))
        pid = int(wait_for(lambda: _text(rig.outgoing(jid) / "pid"), 10, "the job to run"))
        for moment in (0, 2**32):
            os.utime(state_of(rig, jid) / "claim", (moment, moment))
            assert server.get(jid).json()["status"] == "started"
        assert server.delete(jid).status_code == 204
        assert gone(pid)

    @pytest.mark.parametrize("boot", ["this boot", "another boot"])
    def test_numbers_that_were_given_away(self, server: Server, rig: Rig, jid: str, boot: str) -> None:
        server.post(rig.request(jid, "sleep 600"))
        server.wait_state(jid, "started")
        claim = state_of(rig, jid) / "claim"
        mine = claim.read_text()
        started, boot_id = mine.split()[2:]
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
            ticks = str(int(started) - 1) if boot == "this boot" else started
            claim.write_text(f"{stranger.pid} {stranger.pid} {ticks} {boot_id if boot == 'this boot' else 'x'}\n")
            if boot == "another boot":
                assert server.get(jid).json()["status"] == "finishedWithError"
            assert server.delete(jid).status_code == 204
            assert stranger.poll() is None
            stranger.kill()
        subprocess.run(["pkill", "-KILL", "-s", mine.split()[0]], check=False)

    def test_files_in_the_working_directory(self, server: Server, rig: Rig, jid: str) -> None:
        script = "echo mine | tee rc claim stdout.0 job.json; pwd"
        server.post(rig.request(jid, script, number_of_workers=2))
        job = server.wait_final(jid)
        assert job["status"] == "finishedSuccessfully", job
        assert job["logs"].count("mine\n") == 2
        assert {f"{state_of(rig, jid)}/work.{index}" for index in range(2)} <= set(job["logs"].splitlines())

    def test_a_result_that_was_written_over(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "true"))
        server.wait_final(jid)
        (state_of(rig, jid) / "rc").write_text("mine\n")
        assert server.get(jid).json()["status"] == "finishedWithError"

    def test_the_group_of_a_worker_that_ended_long_ago(self, server: Server, rig: Rig, jid: str) -> None:
        """Its number may be somebody else's: here a process that the worker left in its group, without the token."""
        script = OUT + 'if [ $PMAN_WORKER_INDEX = 1 ]; then env -i sleep 600 & echo $! > "$out/pid"; else sleep 600; fi'
        server.post(rig.request(jid, script, number_of_workers=2))
        pid = int(wait_for(lambda: _text(rig.outgoing(jid) / "pid"), 10, "the second worker"))
        time.sleep(0.5)
        supervisor = int((state_of(rig, jid) / "claim").read_text().split()[1])
        os.kill(supervisor, signal.SIGTERM)
        wait_for((state_of(rig, jid) / "rc").exists, 20, "the end of the script")
        assert not gone(pid)
        assert server.wait_final(jid)["status"] == "finishedWithError"
        assert gone(pid)  # pman itself looks at its session

    def test_a_delete_that_was_interrupted(self, server: Server, rig: Rig, jid: str) -> None:
        request = rig.request(jid, COUNTED)
        server.post(request)
        server.wait_final(jid)
        (state_of(rig, jid) / "claim").write_text("deleted\n")
        assert server.get(jid).status_code == 404
        assert jid not in [job["jid"] for job in server.call("GET", "jobs/").json()["jobs"]]
        assert server.post(request).status_code == 201
        server.wait_final(jid)
        assert rig.executions(jid) == 2

    def test_posts_and_deletes_at_once(self, server: Server, rig: Rig, jid: str) -> None:
        second = rig.start()
        request = rig.request(jid, "sleep 600")

        def submit(_: int) -> int:
            return server.post(request).status_code

        def remove(number: int) -> int:
            return (server, second)[number % 2].delete(jid).status_code

        with ThreadPoolExecutor(6) as pool:
            posted, deleted = pool.map(submit, range(40)), pool.map(remove, range(80))
        assert set(posted) == {201}
        assert set(deleted) <= {204, 404}
        server.delete(jid)
        second.stop()
        assert not [pid for pid in psutil.pids() if str(rig.outgoing(jid)).encode() in _command(pid)]

    def test_what_a_job_has_of_pmans_environment(self, rig: Rig, jid: str) -> None:
        server = rig.start(TMPDIR="/var/tmp", CROMWELL_AUTH_PASSWORD="hunter2", CROMWELL_AUTH_USER="x")
        server.post(rig.request(jid, "env"))
        lines = server.wait_final(jid)["logs"].splitlines()
        assert "TMPDIR=/var/tmp" in lines
        assert not [line for line in lines if line.startswith(("CROMWELL", "STOREBASE", "LOCAL_"))]
        server.stop()


def test_a_state_directory_that_isgone(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        shutil.rmtree(tmp_path / "state")
        answer = server.post(rig.request("gone", "true"))
        assert answer.status_code == 503
        assert "cannot be written: No such file or directory" in answer.json()["message"]
        assert server.call("GET", "../../readyz").status_code == 503
        assert server.get("gone").status_code == 404


def test_a_damaged_record_harms_no_other_job(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        for jid in ("broken", "sound"):
            server.post(rig.request(jid, "true"))
            server.wait_final(jid)
        (state_of(rig, "broken") / "job.json").write_text("")
        assert [job["jid"] for job in server.call("GET", "jobs/").json()["jobs"]] == ["sound"]
        for answer in (server.get("broken"), server.delete("broken"), server.post(rig.request("broken", "true"))):
            assert answer.status_code == 500
            assert "is damaged; remove the directory" in answer.json()["message"]


def state_of(rig: Rig, jid: str) -> Path:
    """The state directory of a job whose jid is its name, too."""
    return Path(rig.env["LOCAL_STATE_DIR"], jid)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def gone(pid: int) -> bool:
    """No such process, or nothing but its exit status."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
