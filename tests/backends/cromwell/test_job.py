"""What the WDL template makes of a job, run by a shell as Cromwell's script runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.deliver import cromwell_script
from tests.fakes.cromwell.config import load
from tests.fakes.cromwell.job import Job
from tests.rig import ROOT, wait_for

# timeout(1) as images have it. The template must need none of them; BusyBox hands on the command's own exit code.
TIMEOUTS = {
    "busybox-1.29": '[ "$1" = -t ] || { echo "timeout: invalid option" >&2; exit 1; }; shift 2; exec "$@"',
    "busybox-1.31": '[ "$1" != -k ] || { echo "timeout: invalid option" >&2; exit 1; }; shift; exec "$@"',
    "none": "exit 127",
}
SHELLS = ("dash", "bash", "busybox")


def script(path: Path, *entrypoint: str, **fields: Any) -> Path:
    """The job's script, rendered with the time limit that this backend demands."""
    config = settings.load({"CONTAINER_ENV": "cromwell", "TIMELIMIT_MINUTES": "5"})
    request = {
        "jid": "chris-jid-1", "args": [], "auid": "chris", "number_of_workers": 1, "cpu_limit": 1000, "gpu_limit": 0,
        "memory_limit": 200, "image": "image", "entrypoint": list(entrypoint), "type": "fs", "env": [],
    }  # fmt: skip
    spec = Renderer(config, TARGETS).render(make_job(validate(request | fields), config), "wdl")
    path.write_text(cromwell_script(spec.text))
    return path


def run(path: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command, env = ["sh", str(path)], os.environ | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=60)


def shell_of_an_image(directory: Path, shell: str) -> dict[str, str]:
    """The environment of an image whose sh is that shell."""
    found = shutil.which(shell)
    if not found:
        assert os.environ.get("CI") != "true"
        pytest.skip(f"no {shell} here")
    directory.mkdir(exist_ok=True)
    (directory / "sh").symlink_to(found)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def with_limit(path: Path, seconds: int) -> Path:
    """The script with a limit of some seconds, in place of its minutes."""
    text = path.read_text()
    assert text.count("limit_seconds=300\n") == 1
    path.write_text(text.replace("limit_seconds=300\n", f"limit_seconds={seconds}\n"))
    return path


# Each shell with each answer; and one shell with each timeout(1), "" being the one of this machine.
LIMITED = [(shell, "none", answer) for shell in SHELLS for answer in ("exit 0", "exit 1", ":", "")]
LIMITED += [("dash", timeout, "exit 0") for timeout in ("", *TIMEOUTS) if timeout != "none"]


@pytest.mark.parametrize(("shell", "timeout", "answer"), LIMITED)
def test_the_limit_decides_what_the_end_is(tmp_path: Path, shell: str, timeout: str, answer: str) -> None:
    """Whatever the command makes of the signal, and whatever timeout(1) there is, it was cut off."""
    env = shell_of_an_image(tmp_path / "bin", shell)
    if timeout:
        program = tmp_path / "bin" / "timeout"
        program.write_text(f"#!/bin/sh\n{TIMEOUTS[timeout]}\n")
        program.chmod(0o755)
    trap = f"trap '{answer}' TERM; " if answer else ""
    loop = "while [ ! -e enough ]; do sleep 0.1; done"  # `:` goes on after the signal, until the KILL
    work = with_limit(script(tmp_path / "script", "sh", "-c", f"{trap}echo partial > out; {loop}"), 1)
    if answer == ":":
        work.write_text(work.read_text().replace("sleep 10 &", "sleep 1 &"))
    done = run(work, tmp_path, **env)
    said = done.stderr.splitlines()[-1:]  # before it, some shells tell of the signal that ended their own child
    assert (done.returncode, said) == (124, ["pman: ended by the time limit of 5 min"])
    assert (tmp_path / "out").read_text() == "partial\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("code", [0, 7, 124, 143])
def test_an_exit_before_the_limit_is_the_commands_own(tmp_path: Path, shell: str, code: int) -> None:
    """Nothing of the watch is left behind, which would hold the container or the SLURM job up."""
    env = shell_of_an_image(tmp_path / "bin", shell)
    job = script(tmp_path / "script", "sh", "-c", f'echo "ran with $X"; exit {code}', env=["X=y"])
    done = run(job, tmp_path, **env, PMAN_TEST_MARK=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (code, "ran with y\n", "")
    wait_for(lambda: not processes_with(f"PMAN_TEST_MARK={tmp_path}"), 10, "the watch to be gone")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_that_ends_at_once_leaves_no_watch(tmp_path: Path, shell: str) -> None:
    """The end can come while the watch starts its sleep: of 400 commands, 14 left it behind in dash, 21 in BusyBox."""
    env = shell_of_an_image(tmp_path / "bin", shell) | {"PMAN_TEST_MARK": str(tmp_path)}
    job = script(tmp_path / "script", "sh", "-c", "exit 0")
    with ThreadPoolExecutor(8) as pool:
        assert [done.returncode for done in pool.map(lambda _: run(job, tmp_path, **env), range(160))] == [0] * 160
    wait_for(lambda: not processes_with(f"PMAN_TEST_MARK={tmp_path}"), 10, "the watches to be gone")


def test_a_sleep_that_somebody_ends_is_not_the_limit(tmp_path: Path) -> None:
    """Such as a job that ends all programs of that name: it goes on, and SLURM's own limit is left."""
    job = script(tmp_path / "script", "sh", "-c", "until [ -e end ]; do sleep 0.05; done")
    mark = f"PMAN_TEST_MARK={tmp_path}"

    def naps() -> list[str]:
        lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in processes_with(mark)}
        return [pid for pid, line in lines.items() if line.exists() and line.read_bytes() == b"sleep\x00300\x00"]

    with running(job, tmp_path, PMAN_TEST_MARK=str(tmp_path)):
        (nap,) = wait_for(naps, 20, "the watch to sleep")
        os.kill(int(nap), signal.SIGTERM)
        wait_for(lambda: not naps(), 20, "it to end")


def processes_with(variable: str) -> list[str]:
    """Processes that have this variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def test_a_job_with_a_path_of_its_own(tmp_path: Path) -> None:
    job = script(tmp_path / "script", "/bin/sh", "-c", 'echo "$PATH"', env=["PATH=/opt/tool/bin"])
    assert run(job, tmp_path).stdout == "/opt/tool/bin\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_what_a_command_leaves_behind_is_ended(tmp_path: Path, shell: str) -> None:
    """ChRIS fetches the output as soon as the command has ended. In each shell that an image may have as its sh."""
    env = shell_of_an_image(tmp_path / "bin", shell)
    job = script(tmp_path / "script", "/bin/sh", "-c", "sleep 600 > sink 2>&1 & echo $!")
    done = run(job, tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    wait_for(lambda: not alive(int(done.stdout)), 10, "the process to be gone")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_last_words_are_in_the_log_when_the_script_has_ended(tmp_path: Path, shell: str) -> None:
    """Cromwell's script does not wait for the two tee(1) that copy the output, and a container ends them with it."""
    env = shell_of_an_image(tmp_path / "bin", shell)
    (tmp_path / "bin/tee").write_text(f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("tee")} "$@"\n')
    (tmp_path / "bin/tee").chmod(0o755)
    (backend,) = load(ROOT / "deploy/cromwell/slurm.conf").at(tmp_path).backends.values()
    job = Job(backend, "workflow", "ChRISJob", "task", attempt=1, docker=False)
    job.execution.mkdir(parents=True)
    command = script(tmp_path / "command", "sh", "-c", "echo said; echo complained >&2; exit 3").read_text()
    job.file("script").write_text(job.script(command))
    null = subprocess.DEVNULL  # a pipe would wait for tee(1), too
    subprocess.run(["sh", job.file("script")], env=os.environ | env, stdout=null, stderr=null, check=False, timeout=60)
    assert [job.file(name).read_text() for name in ("rc", "stdout", "stderr")] == ["3\n", "said\n", "complained\n"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@contextmanager
def running(path: Path, cwd: Path, **env: str) -> Iterator[None]:
    process = subprocess.Popen(["sh", str(path)], cwd=cwd, env=os.environ | env)
    try:
        yield
    finally:
        (cwd / "end").touch()
        assert process.wait(20) == 0


def command_lines() -> str:
    """Of all processes of this machine, as anybody on a node may read them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return "\n".join(found)


def test_nobody_reads_the_environment_of_a_job_from_its_arguments(tmp_path: Path) -> None:
    wait = 'echo "$TOKEN" > begun; until [ -e end ]; do sleep 0.05; done'
    job = script(tmp_path / "script", "sh", "-c", wait, "visible-argument", env=["TOKEN=secret-of-this-job"])
    with running(job, tmp_path):
        wait_for((tmp_path / "begun").exists, 20, "the job to begin")
        lines = command_lines()
    assert "visible-argument" in lines
    assert "secret-of-this-job" not in lines
    assert (tmp_path / "begun").read_text() == "secret-of-this-job\n"


@pytest.mark.parametrize(
    ("below", "index"),
    [("worker-0", "0"), ("worker-12", "12"), ("execution", "5"), ("worker-pool", "5"), ("worker-3/execution", "5")],
)
def test_the_number_of_a_worker(tmp_path: Path, below: str, index: str) -> None:
    """From the directory that the reference configuration gives a worker, else from SLURM."""
    job = script(tmp_path / "script", "sh", "-c", 'echo "$PMAN_WORKER_INDEX"')
    (tmp_path / below).mkdir(parents=True)
    assert run(job, tmp_path / below, SLURM_PROCID="5").stdout == f"{index}\n"
