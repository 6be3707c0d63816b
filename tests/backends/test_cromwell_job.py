"""What the WDL template makes of a job, run by a shell as Cromwell's script runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.deliver import cromwell_script
from tests.rig import wait_for

# What BusyBox 1.30 and 1.31 say to -k, and what those before say to seconds without -t.
OLD_TIMEOUT = "#!/bin/sh\necho 'timeout: invalid option' >&2\nexit 1\n"


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
    return subprocess.run(["sh", str(path)], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)


def test_an_image_whose_timeout_knows_no_k(tmp_path: Path) -> None:
    """The job runs, without an end of its own: SLURM's limit is left."""
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "timeout"
    old.write_text(OLD_TIMEOUT)
    old.chmod(0o755)
    job = script(tmp_path / "script", "sh", "-c", 'echo "ran with $X"; exit 7', env=["X=y"])
    done = run(job, tmp_path, PATH=f"{old.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr) == (7, "ran with y\n", "")


def test_a_job_with_a_path_of_its_own(tmp_path: Path) -> None:
    job = script(tmp_path / "script", "/bin/sh", "-c", 'echo "$PATH"', env=["PATH=/opt/tool/bin"])
    assert run(job, tmp_path).stdout == "/opt/tool/bin\n"


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_what_a_command_leaves_behind_is_ended(tmp_path: Path, shell: str) -> None:
    """ChRIS fetches the output as soon as the command has ended. In each shell that an image may have as its sh."""
    (tmp_path / "bin").mkdir()
    found = shutil.which(shell)
    if not found:
        assert os.environ.get("CI") != "true"
        pytest.skip(f"no {shell} here")
    (tmp_path / "bin" / "sh").symlink_to(found)
    job = script(tmp_path / "script", "/bin/sh", "-c", "sleep 600 > sink 2>&1 & echo $!")
    done = subprocess.run(
        [tmp_path / "bin" / "sh", str(job)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    wait_for(lambda: not alive(int(done.stdout)), 10, "the process to be gone")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@contextmanager
def running(path: Path, cwd: Path) -> Iterator[None]:
    process = subprocess.Popen(["sh", str(path)], cwd=cwd)
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
