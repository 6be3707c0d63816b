"""The local backend under the contract, and what is particular to it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import psutil
import pytest

from pman.backends import directories
from pman.backends.directories import Record
from pman.backends.local import LocalBackend
from pman.errors import NotFound, Unreachable
from pman.job import Job
from pman.settings import LocalRuntime, SlurmRuntime, load
from pman.status import Why
from pman.targets import TARGETS
from pman.templating.render import Renderer, sample_job
from tests.contract import Contract
from tests.live import runtimes
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for


def local_rig(directory: Path, **env: str) -> Rig:
    """pman over the local backend, with its store and its state below `directory`."""
    (directory / "store").mkdir()
    settings = {"CONTAINER_ENV": "local", "LOCAL_STATE_DIR": str(directory / "state"), **env}
    return Rig(settings, directory / "store", "localhost/none:1", directory, read_only_input=False, job_seconds=20)


# A script that goes on until the test makes the file `go`.
GATED = 'until [ -e "$out/go" ]; do sleep 0.1; done'


class TestLocal(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(local_rig(tmp_path_factory.mktemp("local"))) as rig:
            yield rig

    def test_secrets_stay_out_of_jobs(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "env"))
        assert "SECRET" not in server.wait_final(jid)["logs"]

    def test_a_program_below_a_directory_with_an_equals_sign(self, server: Server, rig: Rig, jid: str) -> None:
        """Without a container its path is that directory's, which env(1) would take for a variable."""
        incoming = rig.store / f"a={jid}" / "incoming"
        incoming.mkdir(parents=True)
        program = incoming / "program"
        program.write_text('#!/bin/sh\necho "$A $1"\n')
        program.chmod(0o755)
        words = {"entrypoint": ["/share/incoming/program"], "args": ["echo"], "env": ["A=b", "PATH=/nowhere"]}
        server.post(rig.request(jid, "", input_dir=f"a={jid}/incoming", **words))
        assert server.wait_final(jid)["logs"] == "b echo\n"

    def test_a_module_that_cannot_be_loaded(self, rig: Rig, jid: str, tmp_path: Path) -> None:
        """The command does not begin without what the site's rules promise it."""
        (tmp_path / "site.yaml").write_text("policy: {rules: [{name: tools, set: {modules: [no-such-module/1]}}]}\n")
        server = rig.start(TEMPLATES_DIR=str(tmp_path))
        server.post(rig.request(jid, COUNTED))
        job = server.wait_final(jid)
        assert job["status"] == "finishedWithError"
        assert job["message"].startswith("the modules that this site's rules name could not be loaded on "), job
        assert rig.executions(jid) == 0

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

    def test_a_job_is_not_started_while_it_is_being_deleted(self, server: Server, rig: Rig, jid: str) -> None:
        """GET starts what a killed pman left unstarted; not the script that a DELETE is just taking away."""
        server.post(rig.request(jid, COUNTED))
        server.wait_final(jid)
        forget_the_start(state_of(rig, jid))
        lock = state_of(rig, f".lock.{hashlib.sha256(jid.encode()).hexdigest()[:2]}")
        waiting = re.compile(rf"-> FLOCK .*:{lock.stat().st_ino} ")
        with ThreadPoolExecutor(1) as pool, lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            asked = pool.submit(server.get, jid)
            wait_for(lambda: waiting.search(Path("/proc/locks").read_text()), 10, "GET to wait for the lock")
            shutil.rmtree(state_of(rig, jid))
            fcntl.flock(held, fcntl.LOCK_UN)
            assert asked.result().status_code == 404
        assert rig.executions(jid) == 1

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
        started, boot_id = mine.split()[2:4]
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
            ticks = str(int(started) - 1) if boot == "this boot" else started
            boot_id = boot_id if boot == "this boot" else "x"
            claim.write_text(f"{stranger.pid} {stranger.pid} {ticks} {boot_id} {os.uname().nodename}\n")
            if boot == "another boot":
                assert server.get(jid).json()["status"] == "finishedWithError"
            assert server.delete(jid).status_code == 204
            assert stranger.poll() is None
            stranger.kill()
        subprocess.run(["pkill", "-KILL", "-s", mine.split()[0]], check=False)

    def test_the_job_of_another_machine(self, server: Server, rig: Rig, jid: str) -> None:
        """Two machines may have one home: what runs on the other one cannot be seen, so nothing is said of its end."""
        request = rig.request(jid, OUT + GATED)
        server.post(request)
        server.wait_state(jid, "started")
        claim = state_of(rig, jid) / "claim"
        mine = claim.read_text()
        claim.write_text(" ".join([*mine.split()[:3], "another-boot", "node7"]))
        assert server.post(request).status_code == 201
        job = server.get(jid).json()
        assert (job["status"], job["message"]) == ("undefined", "The job belongs to the machine node7.")
        answer = server.delete(jid)
        assert (answer.status_code, "delete it there" in answer.json()["message"]) == (409, True)
        claim.write_text(mine)
        (rig.outgoing(jid) / "go").touch()
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"

    @pytest.mark.slow
    def test_a_suspended_job_goes_on(self, server: Server, rig: Rig, jid: str) -> None:
        """As SLURM suspends: TSTP to every process, STOP a moment later."""
        server.post(rig.request(jid, OUT + 'echo up > "$out/up"; ' + GATED, time_limit_minutes=5))
        wait_for((rig.outgoing(jid) / "up").exists, 10, "the job to run")
        session = int((state_of(rig, jid) / "claim").read_text().split()[0])
        for number, wanted in ((signal.SIGTSTP, any), (signal.SIGSTOP, all)):  # TSTP stops no orphaned process group
            for pid in members(session):
                os.kill(pid, number)
            wait_for(lambda w=wanted: w(state(pid) == "T" for pid in members(session)), 10, "the job to stop")  # type: ignore[misc]
            time.sleep(0.5)  # for what would be wrong to happen
            assert server.get(jid).json()["status"] == "started"
        for pid in members(session):
            os.kill(pid, signal.SIGCONT)
        (rig.outgoing(jid) / "go").touch()
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"

    def test_a_limited_job_whose_script_was_killed(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + 'echo up > "$out/up"; ' + GATED, time_limit_minutes=5))
        wait_for((rig.outgoing(jid) / "up").exists, 10, "the job to run")
        os.kill(int((state_of(rig, jid) / "claim").read_text().split()[1]), signal.SIGKILL)
        assert server.get(jid).json()["status"] == "started"
        (rig.outgoing(jid) / "go").touch()
        assert "without a result" in server.wait_final(jid, 20)["message"]

    def test_files_in_the_working_directory(self, server: Server, rig: Rig, jid: str) -> None:
        script = "echo mine | tee rc claim stdout.0 job.json; pwd"
        server.post(rig.request(jid, script, number_of_workers=2))
        job = server.wait_final(jid)
        assert job["status"] == "finishedSuccessfully", job
        assert job["logs"].count("mine\n") == 2
        assert {f"{state_of(rig, jid)}/work.{index}" for index in range(2)} <= set(job["logs"].splitlines())

    def test_the_worker_that_fails_is_named(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, 'exit "$((PMAN_WORKER_INDEX * 3))"', number_of_workers=2))
        assert server.wait_final(jid)["message"] == "worker 1: The job ended with exit code 3."

    def test_a_result_that_was_written_over(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "true"))
        server.wait_final(jid)
        (state_of(rig, jid) / "rc").write_text("mine\n")
        assert server.get(jid).json()["status"] == "finishedWithError"

    @pytest.mark.slow
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

    @pytest.mark.slow
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
        assert not [pid for pid in psutil.pids() if str(rig.outgoing(jid)).encode() in command_line(pid)]

    @pytest.mark.parametrize("moved", ["before the shell starts", "after"])
    def test_a_start_that_comes_when_all_is_being_removed(self, server: Server, rig: Rig, jid: str, moved: str) -> None:
        """DELETE has taken the directory away, and removes what is in it: its own claim is gone already."""
        server.post(rig.request(jid, COUNTED))
        server.wait_final(jid)
        directory = state_of(rig, jid)
        forget_the_start(directory)
        trash = directory.with_name(f".trash-{jid}")
        if moved == "after":
            command = f"mv {directory} {trash}; . ./job.sh claim $$"
        else:
            directory, command = directory.rename(trash), "bash job.sh claim $$"
        subprocess.run(["bash", "-c", command], cwd=directory, stdin=subprocess.DEVNULL, check=True, timeout=30)
        assert (trash / "claim").exists()
        assert (rig.outgoing(jid) / "runs").read_text() == "run\n"

    def test_a_state_directory_that_is_gone_is_no_empty_listing(self, tmp_path: Path) -> None:
        backend = LocalBackend(tmp_path / "state")
        (tmp_path / "state" / "notes").mkdir()
        assert backend.jobs(10) == []
        (tmp_path / "state" / "notes").rmdir()
        (tmp_path / "state").rmdir()
        with pytest.raises(Unreachable, match="cannot be read: No such file or directory"):
            backend.jobs(10)

    @pytest.mark.slow
    def test_a_look_at_a_job_whose_place_another_has_taken(self, rig: Rig, jid: str) -> None:
        """It must not take the next attempt's files for its own, nor note its end there."""
        backend = LocalBackend(Path(rig.env["LOCAL_STATE_DIR"]))
        server = rig.start()
        server.post(rig.request(jid, "true"))
        server.wait_final(jid)
        former = next(status.private for status in backend.jobs(100) if status.jid == jid)
        assert isinstance(former, Record)
        server.delete(jid)
        server.post(rig.request(jid, "sleep 600"))
        server.wait_state(jid, "started")
        with pytest.raises(NotFound):
            backend._status(former)  # what a slow GET does
        assert server.delete(jid).status_code == 204
        server.stop()
        assert not [pid for pid in psutil.pids() if str(rig.outgoing(jid)).encode() in command_line(pid)]

    def test_what_a_job_has_of_pmans_environment(self, rig: Rig, jid: str) -> None:
        server = rig.start(TMPDIR="/var/tmp", CROMWELL_AUTH_PASSWORD="hunter2", CROMWELL_AUTH_USER="x")
        server.post(rig.request(jid, "env"))
        lines = server.wait_final(jid)["logs"].splitlines()
        assert "TMPDIR=/var/tmp" in lines
        assert not [line for line in lines if line.startswith(("CROMWELL", "STOREBASE", "LOCAL_"))]
        server.stop()

    def test_a_result_that_comes_between_two_looks(self, server: Server, rig: Rig, jid: str) -> None:
        """The listing finds no claim, then the result of a job that was begun and ended in between."""
        server.post(rig.request(jid, "true"))
        server.wait_final(jid)
        (state_of(rig, jid) / "claim").rename(state_of(rig, jid) / "claimed")
        jobs = server.call("GET", "jobs/").json()["jobs"]
        assert [job["status"] for job in jobs if job["jid"] == jid] == ["notstarted"]
        (state_of(rig, jid) / "claimed").rename(state_of(rig, jid) / "claim")


RUNTIMES = [runtime for runtime in get_args(LocalRuntime) if runtime != "none"]


def rendered(directory: Path, target: str, workers: int = 2, gpus: int = 0, **config: str) -> tuple[Job, str]:
    """A job whose directories exist, and its script."""
    for name in ("incoming", "outgoing"):
        (directory / f"key-chris-jid-1/{name}").mkdir(parents=True)
    loaded = load({"STOREBASE": str(directory), **config})
    made = dataclasses.replace(sample_job(loaded), workers=workers, gpu_count=gpus)
    return made, Renderer(loaded, TARGETS).render(made, target).text


def run_with_stub(directory: Path, text: str, name: str, *arguments: str, **env: str) -> list[str]:
    """The words that the script's first worker gives to the program of that name, which ends at once."""
    stub = directory / "bin" / name
    stub.parent.mkdir()
    record = f"printf '%s\\0' \"$@\" > {directory}/said.$PMAN_WORKER_INDEX"
    pull = f'printf "%s\\n" "$4" >> {directory}/pull.said; echo image > "$3"; exit'
    stub.write_text(f'#!/bin/bash\nif [ "${{2-}}" = pull ]; then {pull}; fi\n[ "${{1-}}" = start ] || {record}\n')
    stub.chmod(0o755)
    (directory / "job.sh").write_text(text)
    environment = {"PATH": f"{directory}/bin:{os.environ['PATH']}", **env}
    subprocess.run(["bash", "job.sh", *arguments], cwd=directory, env=environment, check=False, timeout=20)
    said = directory / "said.0"
    errors = "".join(path.read_text() for path in directory.glob("stderr.*"))
    assert said.exists(), errors
    return said.read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_gets_the_command(tmp_path: Path, runtime: str) -> None:
    job, text = rendered(tmp_path, "local", LOCAL_RUNTIME=runtime)
    words = run_with_stub(tmp_path, text, runtime_program(runtime), "claim", "1")
    assert words[-len(job.argv) :] == list(job.argv)
    assert (tmp_path / "rc").read_text() == "0 \n"
    assert (tmp_path / "said.1").exists()


# What a job of two GPUs asks of a runtime where SLURM has chosen GPU 1 and GPU 3, by the cell of docs/runtimes.md.
ASKED = {
    "`--nv`: all of the node, chosen by CUDA_VISIBLE_DEVICES": ["--nv", "CUDA_VISIBLE_DEVICES=1,3"],
    "all of the node, chosen by CUDA_VISIBLE_DEVICES": ["--device", "nvidia.com/gpu=all", "--env=CUDA_VISIBLE_DEVICES"],
    "as many as asked for": ["--gpus", "2"],
}


@pytest.mark.parametrize("runtime", ["apptainer", "podman", "docker"])
@pytest.mark.parametrize("gpus", [0, 2])
def test_every_runtime_is_asked_for_gpus(tmp_path: Path, runtime: str, gpus: int) -> None:
    asked = ASKED[runtimes.table()[runtime]["GPUs"]]
    _, text = rendered(tmp_path, "local", gpus=gpus, LOCAL_RUNTIME=runtime)
    chosen = {"CUDA_VISIBLE_DEVICES": "1,3"} if gpus else {}
    words = run_with_stub(tmp_path, text, runtime, "claim", "1", **chosen)
    assert [word for word in asked if word in words] == (asked if gpus else []), words


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        *(("local", runtime) for runtime in RUNTIMES),
        *(("slurm", runtime) for runtime in get_args(SlurmRuntime) if runtime != "none"),
    ],
)
def test_a_runtime_that_is_not_installed(tmp_path: Path, target: str, runtime: str) -> None:
    """Every other program of this machine is in PATH. The image's command, which is what 127 means, is not to blame."""
    _, text = rendered(tmp_path, target, 1, 0, **{f"{target.upper()}_RUNTIME": runtime})
    (tmp_path / "bin").mkdir()
    for program in {path.name: path for place in os.get_exec_path() for path in Path(place).glob("*")}.values():
        if program.name != runtime_program(runtime):
            (tmp_path / "bin" / program.name).symlink_to(program)
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "attempt.0123456789abcdef").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x.0123456789abcdef"} if target == "slurm" else {}
    # a job of SLURM begins with PATH of its own
    text = text.replace("export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "export PATH=$PATH")
    (tmp_path / "job.sh").write_text(text)
    words = ["bash", "job.sh", *(["claim", "1"] if target == "local" else [])]
    subprocess.run(words, cwd=tmp_path, env={"PATH": f"{tmp_path}/bin", **slurm}, check=False, timeout=20)
    code, said, _ = directories.result(tmp_path) or (None, "", None)
    name = os.uname().nodename
    assert (code, said) == (126, f"no container runtime ({runtime_program(runtime)}) in the PATH of jobs on {name}")
    assert isinstance(said, Why)
    assert said.reason == "node"


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/images/tool.sif", "/images/tool.sif"),
        ("oras://registry.example.org/tool:1", "/.images/oras+%%registry.example.org%tool+1.sif"),
    ],
)
def test_an_image_that_only_apptainer_knows(tmp_path: Path, image: str, file: str) -> None:
    overlay = tmp_path / "overlay" / "local"
    overlay.mkdir(parents=True)
    (overlay / "job.sh.j2").write_text(f'{{% extends "shipped/local/job.sh.j2" %}}{{% set image = "{image}" %}}')
    job, text = rendered(tmp_path, "local", LOCAL_RUNTIME="apptainer", TEMPLATES_DIR=str(overlay.parent))
    words = run_with_stub(tmp_path, text, "apptainer", "claim", "1")
    assert [word for word in words[: -len(job.argv)] if word.endswith(file)]
    pulled = tmp_path / "pull.said"
    assert (pulled.read_text() if pulled.exists() else "") == ("" if image == file else f"{image}\n")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 124", "within 30 min and the memory of the job; `pman images pull` pulls it beforehand"),
        ("kill -KILL $$", "within 30 min and the memory of the job; `pman images pull` pulls it beforehand"),
        ("echo FATAL: no space left on device >&2; exit 255", ": no space left on device"),
        ("echo Segmentation fault >&2; exit 139", ": exit code 139"),
    ],
)
def test_an_image_that_cannot_be_pulled(tmp_path: Path, script: str, said: str) -> None:
    """timeout(1) around the pull ends so. The command is not run, and the failure has a word of its own."""
    _, text = rendered(tmp_path, "local", 1, 0, LOCAL_RUNTIME="apptainer")
    (tmp_path / "bin").mkdir()
    for name, does in (("timeout", script), ("apptainer", "touch run")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (directory := tmp_path / "job").mkdir()  # its images lie beside it
    (directory / "job.sh").write_text(text)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "job.sh", "claim", "1"], cwd=directory, env=environment, check=False, timeout=20)
    code, why, _ = directories.result(directory) or (None, "", None)
    gap = "" if said.startswith(":") else " "
    assert (code, why) == (126, f"the image docker.io/fnndsc/pl-simpledsapp:2.1.0 could not be pulled{gap}{said}")
    assert isinstance(why, Why)
    assert (why.reason, (directory / "run").exists()) == ("image", False)


@pytest.mark.parametrize(("restarts", "runs"), [([0], 1), ([1], 1), ([0, 1], 1), ([0, 0], 2)])
def test_what_slurm_begins_anew(tmp_path: Path, restarts: list[int], runs: int) -> None:
    """A requeued job runs unless it ran before; a first start may find its own claim (NFS)."""
    _, text = rendered(tmp_path, "slurm", 1, SLURM_RUNTIME="none")
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "attempt.0123456789abcdef").touch()
    codes = []
    for restart in restarts:
        env = {
            **os.environ,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "x.0123456789abcdef",
            "SLURM_RESTART_COUNT": str(restart),
        }
        codes.append(subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, check=False, timeout=20).returncode)
    assert (tmp_path / "claim.7").exists()
    assert codes == [127] * runs + [75] * (len(restarts) - runs)  # the sample's command is not on this machine


def requeued(tmp_path: Path, program: str) -> Callable[[], subprocess.Popen[bytes]]:
    """What starts the script of a job that SLURM may begin anew, as SLURM does. `program` is the job's command."""
    site = tmp_path / "site"
    (site / "slurm").mkdir(parents=True)
    (site / "site.yaml").write_text("requeue: true\n")
    blocks = {"prologue": f"PATH={tmp_path}/bin:$PATH", "epilogue": "echo $exit_code >> codes"}
    overlay = (f"{{% block {name} %}}\n{lines}\n{{% endblock %}}\n" for name, lines in blocks.items())
    (site / "slurm/job.sh.j2").write_text('{% extends "shipped/slurm/job.sh.j2" %}\n' + "".join(overlay))
    made, text = rendered(tmp_path, "slurm", 1, SLURM_RUNTIME="none", TEMPLATES_DIR=str(site))
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "attempt.0123456789abcdef").touch()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / made.argv[0]
    command.write_text(f"#!/bin/sh\n{program}\n")
    command.chmod(0o755)

    def start() -> subprocess.Popen[bytes]:
        name = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x.0123456789abcdef", "SLURM_RESTART_COUNT": "0"}
        env = {**os.environ, **name}
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env, stderr=subprocess.PIPE)

    return start


@pytest.mark.parametrize(("near", "code"), [(True, 124), (False, 143)])
def test_a_start_that_slurm_ends_and_begins_anew(tmp_path: Path, near: bool, code: int) -> None:
    """It leaves no result, and the epilogue hears why it ends: SLURM sends USR2 before the end of the time limit."""
    start = requeued(tmp_path, "[ -e ../again ] || { touch ../begun_once; sleep 60; }")
    first = start()
    wait_for((tmp_path / "begun_once").exists, 10, "the command")
    first.send_signal(signal.SIGUSR2 if near else signal.SIGCONT)
    time.sleep(0.1)
    first.terminate()
    first.communicate(timeout=20)
    assert (first.returncode, (tmp_path / "rc").exists()) == (code, False)
    assert (tmp_path / "ending").read_text().startswith(f"{code} ")
    (tmp_path / "again").touch()
    second = start()
    assert (second.communicate(timeout=20)[1], second.returncode) == (b"", 0)
    assert (tmp_path / "codes").read_text() == f"{code}\n0\n"


def test_a_second_start_waits_for_what_the_first_one_has_left(tmp_path: Path) -> None:
    """A node that SLURM gave up may still be at work when SLURM begins the job on another one."""
    start = requeued(tmp_path, "echo $$ >> ../pids; [ $(wc -l < ../pids) = 2 ] || exec sleep 60")
    pids = tmp_path / "pids"
    first = start()
    wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"), 10, "the command")
    first.kill()
    second = start()
    time.sleep(1)
    assert (len(pids.read_text().splitlines()), second.poll()) == (1, None)
    os.kill(int(pids.read_text()), signal.SIGKILL)
    second.communicate(timeout=20)
    assert (second.returncode, len(pids.read_text().splitlines())) == (0, 2)
    first.communicate(timeout=20)


@pytest.mark.parametrize("runtime", ["podman", "docker"])
def test_what_a_killed_script_left_in_an_engine(tmp_path: Path, runtime: str) -> None:
    """DELETE ends the containers, too. The stand-in for the engine's program runs until it is killed."""
    program = tmp_path / "bin" / runtime
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/"$1"\n[ "$1" != start ] || exec sleep 600\n')
    program.chmod(0o755)
    with running(local_rig(tmp_path, LOCAL_RUNTIME=runtime)) as rig:
        server = rig.start(PATH=f"{program.parent}:{os.environ['PATH']}")
        server.post(rig.request("left", "true", number_of_workers=2))
        wait_for(lambda: len(_text(tmp_path / "start").splitlines()) == 2, 10, "the workers")
        for pid in members(int((state_of(rig, "left") / "claim").read_text().split()[0])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert server.wait_final("left")["status"] == "finishedWithError"
        assert not (tmp_path / "rm").exists()
        assert server.delete("left").status_code == 204
    assert (tmp_path / "kill").read_text() == "kill left-0 left-1\n"
    assert (tmp_path / "rm").read_text() == "rm --force left-0 left-1\n"


@pytest.mark.slow
def test_the_time_of_a_suspended_job_does_not_count(tmp_path: Path) -> None:
    _, text = rendered(tmp_path, "local", workers=1, TIMELIMIT_MINUTES="1")
    script = "echo up; for i in {1..40}; do sleep 0.1; done"
    text = re.sub(r"(?m)^time_limit_s=60$", "time_limit_s=10", text)
    text = re.sub(r'(?m)^  set -- "\$@" env .*$', f"  set -- bash -c '{script}'", text)
    (tmp_path / "job.sh").write_text(text)
    with subprocess.Popen(["bash", "job.sh", "claim", "1"], cwd=tmp_path, start_new_session=True) as process:
        wait_for(lambda: _text(tmp_path / "stdout.0"), 10, "the job to run")
        for number, seconds in ((signal.SIGSTOP, 8.0), (signal.SIGCONT, 0.0)):
            for pid in members(process.pid):
                os.kill(pid, number)
            time.sleep(seconds)
        assert process.wait(20) == 0
    assert (tmp_path / "rc").read_text() == "0 \n"


def runtime_program(runtime: str) -> str:
    return {"bubblewrap": "bwrap", "charliecloud": "ch-run"}.get(runtime, runtime)


@pytest.mark.slow
def test_a_state_directory_that_is_gone(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        shutil.rmtree(tmp_path / "state")
        answer = server.post(rig.request("gone", "true"))
        assert answer.status_code == 503
        assert "cannot be written: No such file or directory" in answer.json()["message"]
        assert server.call("GET", "../../readyz").status_code == 503
        assert server.get("gone").status_code == 404


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("left", [b"", b"1 2", b"\xff"])
def test_a_damaged_claim_harms_no_other_job(tmp_path: Path, left: bytes) -> None:
    """As a power cut may leave it."""
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        for jid in ("broken", "sound"):
            server.post(rig.request(jid, "true"))
            server.wait_final(jid)
        forget_the_start(state_of(rig, "broken"))
        (state_of(rig, "broken") / "claim").write_bytes(left)
        assert len(server.call("GET", "jobs/").json()["jobs"]) == 2
        assert server.get("broken").json()["message"].startswith("The job ended without a result: ")
        assert server.post(rig.request("broken", "true")).json()["status"] == "finishedWithError"
        assert server.delete("broken").status_code == 204


def forget_the_start(directory: Path) -> None:
    """The state directory of a job that ended is again that of one that was not begun."""
    for path in (directory / "claim", directory / "rc", *directory.glob("ended.*")):
        path.unlink(missing_ok=True)


def state_of(rig: Rig, jid: str) -> Path:
    """The state directory of a job whose jid is its name, too."""
    return Path(rig.env["LOCAL_STATE_DIR"], jid)


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    return [pid for pid in psutil.pids() if _fields(pid)[3:4] == [str(session)] and state(pid) != "Z"]


def state(pid: int) -> str:
    """The letter of proc_pid_stat(5); empty for a process that is gone."""
    return "".join(_fields(pid)[:1])


def _fields(pid: int) -> list[str]:
    """From the third field on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def command_line(pid: int) -> bytes:
    """Of a process that may be gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def gone(pid: int) -> bool:
    """No such process, or nothing but its exit status."""
    return state(pid) in ("", "Z")
