"""A job that its time limit ends is never a success, whatever its command makes of the signal, on every backend.

Scripts of `local` and `slurm` run here; the table for WDL is in cromwell/test_job.py. For the others it is what an
engine says of such a job, with each exit code that it can have. On every backend the contract has a job that takes the
signal for a wish to end well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pman import settings
from pman.backends import kubernetes
from pman.job import make_job, validate
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.backends.engine import jobs
from tests.backends.kubernetes.test_states import end
from tests.fakes.engine import FakeEngine
from tests.rig import wait_for

REQUEST = {
    "jid": "limited", "args": [], "auid": "chris", "number_of_workers": 1, "cpu_limit": 1000, "gpu_limit": 0,
    "memory_limit": 200, "image": "image", "type": "fs", "env": [], "time_limit_minutes": 1, "entrypoint": ["true"],
    "input_dir": "in", "output_dir": "out",
}  # fmt: skip
ANSWERS = ["trap 'exit 0' TERM; ", "trap 'exit 1' TERM; ", "trap 'exit 124' TERM; ", "trap 'exit 255' TERM; ",
           "trap : TERM; ", "trap '' TERM; ", ""]  # fmt: skip
CODES = [0, 1, 124, 137, 143, 255]  # of the answers, and of the two signals
TOKEN = "0123456789abcdef"


def rendered(target: str, **fields: object) -> str:
    config = settings.load({"CONTAINER_ENV": "local", "SLURM_RUNTIME": "none", "STOREBASE": "/store"})
    return Renderer(config, TARGETS).render(make_job(validate(REQUEST | fields), config), target).text


def script(directory: Path, target: str, answer: str, seconds: int) -> list[str]:
    """Makes the job's directories and its script, whose limit is some seconds in place of a minute. KILL follows TERM
    after one more. How the script is started.
    """
    for name in ("in", "out", "work", "bin"):
        (directory / name).mkdir()
    text = rendered(target, entrypoint=["sh", "-c", f"{answer}echo partial; while :; do sleep 0.1; done"])
    quicker = {
        "time_limit_s=60\n": f"time_limit_s={seconds}\n",
        "read -r -t 5\n": "read -r -t 1\n",
        "sleep 2;": "sleep 0.5;",
        "tenths_from_term_to_kill=100 ": "tenths_from_term_to_kill=10 ",
        "/store": str(directory),
        "\nset -u\n": "\nset -u\ntimeout() { return 127; }\n",  # none is needed: each hands on other exit codes
    }
    for old, new in quicker.items():
        assert old in text, old
        text = text.replace(old, new)
    (directory / "work/job.sh").write_text(text)
    (directory / f"work/attempt.{TOKEN}").touch()
    return ["bash", "job.sh", *(["claim", "0"] if target == "local" else [])]


def environment() -> dict[str, str]:
    return os.environ | {"SLURM_JOB_NAME": f"limited.{TOKEN}", "SLURM_JOB_ID": "7"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["local", "slurm"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_limit_of_pman(tmp_path: Path, target: str, answer: str) -> None:
    command = script(tmp_path, target, answer, 1)
    subprocess.run(command, cwd=tmp_path / "work", env=environment(), check=False, timeout=60)
    assert (tmp_path / "work/rc").read_text() == "124 ended by its time limit of 0 min\n"
    assert (tmp_path / "work/stdout.0").read_text() == "partial\n"


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "warned"), [*((answer, True) for answer in ANSWERS), (ANSWERS[0], False)])
def test_the_limit_of_slurm(tmp_path: Path, answer: str, warned: bool) -> None:
    """SLURM warns the script by USR2, and sends TERM to all processes of the job when the time is up (sbatch(1)).

    The script is the last that hears of it (https://github.com/SchedMD/slurm, src/plugins/proctrack/linuxproc). Of a
    job that is cancelled or preempted, nothing warns it.
    """
    command = script(tmp_path, "slurm", answer, 600)
    process = psutil.Popen(command, cwd=tmp_path / "work", env=environment())
    said = tmp_path / "work/stdout.0"
    wait_for(lambda: said.exists() and said.read_text() == "partial\n", 20, "the command to run")
    if warned:
        process.send_signal(signal.SIGUSR2)
    for one in (ended := [*process.children(recursive=True), process]):
        with contextlib.suppress(psutil.NoSuchProcess):  # one of the many sleeps
            one.send_signal(signal.SIGTERM)
        if not warned and one is not process:
            time.sleep(0.1 / len(ended))
    expected = "124 ended by its time limit\n" if warned else "143 ended by a signal\n"
    assert process.wait(20) == int(expected[:3])
    assert (tmp_path / "work/rc").read_text() == expected


@pytest.mark.parametrize("code", CODES)
def test_the_limit_of_one_engine(tmp_path: Path, code: int) -> None:
    """pman sends TERM to a container whose time is up. How long it ran tells it from one that ended by itself."""
    ran = {"StartedAt": "2026-01-01T00:00:00Z", "FinishedAt": "2026-01-01T00:05:01Z"}
    with FakeEngine(tmp_path / "engine.sock") as engine:
        jobs.container(engine, Status="exited", ExitCode=code, **ran)
        for name in ("docker", "podman"):
            status = jobs.load(name, engine)[0].status("chris-jid-1")
            assert (status.state, status.message) == (JobState.FAILED, "The job ran into its time limit of 5 minutes.")


@pytest.mark.parametrize("code", [code for code in CODES if code])
def test_the_limit_of_swarm(tmp_path: Path, code: int) -> None:
    """A task whose health check fails, in Swarm's words; 137, or the code of a command that ended in that moment.

    https://github.com/moby/moby, daemon/cluster/executor/container: with exit code 0 the task would be complete. Swarm
    ends a task by its StopSignal, and no command answers SIGKILL.
    """
    assert "\n    StopSignal: SIGKILL\n" in rendered("swarm")
    words = f"task: non-zero exit ({code}): dockerexec: unhealthy container"
    with FakeEngine(tmp_path / "engine.sock") as engine:
        jobs.service(engine, jobs.task("failed", error=words, code=code))
        status = jobs.load("swarm", engine)[0].status("chris-jid-1")
    assert (status.state, status.message) == (JobState.FAILED, "The job ran into its time limit of 5 minutes.")


@pytest.mark.parametrize("code", CODES)
def test_the_limit_of_kubernetes(code: int) -> None:
    """kubelet gives a pod at its deadline the phase Failed and the reason, whatever its containers then end with.

    A recorded pod; https://github.com/kubernetes/kubernetes/blob/v1.31.0/pkg/kubelet/active_deadline.go.
    """
    job, pods = end("dl")
    status = pods[0]["status"]
    assert (status["phase"], status["reason"]) == ("Failed", "DeadlineExceeded")
    ended = status["containerStatuses"][0]["state"]["terminated"]
    ended |= {"exitCode": code, "reason": "Error" if code else "Completed"}
    assert kubernetes.job_state(job["status"]) is JobState.FAILED
    found = kubernetes._ended(job, JobState.FAILED, pods)
    assert (found.state, found.message) == (JobState.FAILED, "The job reached its time limit of 0.166667 min.")
