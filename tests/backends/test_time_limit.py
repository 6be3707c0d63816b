"""What `local` runs ends by its time limit whatever the command makes of the signal, and is never a success then.

The same table for WDL is in test_cromwell_job.py; `slurm` ends its jobs with the same lines. On every backend the
contract has a job that takes the signal for a wish to end well.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer

pytestmark = pytest.mark.slow
REQUEST = {
    "jid": "limited", "args": [], "auid": "chris", "number_of_workers": 1, "cpu_limit": 1000, "gpu_limit": 0,
    "memory_limit": 200, "image": "image", "type": "fs", "env": [], "time_limit_minutes": 1,
    "input_dir": "in", "output_dir": "out",
}  # fmt: skip


def script(directory: Path, command: str) -> str:
    """The job's script with a limit of one second, in place of its minute; KILL follows TERM after one more."""
    config = settings.load({"CONTAINER_ENV": "local", "STOREBASE": str(directory), "LOCAL_RUNTIME": "none"})
    request = REQUEST | {"entrypoint": ["sh", "-c", command]}
    text = Renderer(config, TARGETS).render(make_job(validate(request), config), "local").text
    quicker = {"time_limit_s=60\n": "time_limit_s=1\n", "read -r -t 5\n": "read -r -t 1\n", "{1..100}": "{1..10}"}
    for old, new in quicker.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("answer", ["exit 0", "exit 1", "exit 124", "exit 255", ":", ""])
def test_the_limit_decides_what_the_end_is(tmp_path: Path, answer: str) -> None:
    for name in ("in", "out", "work", "bin"):
        (tmp_path / name).mkdir()
    program = tmp_path / "bin/timeout"
    # no timeout(1) is needed: each hands on other exit codes
    program.write_text("#!/bin/sh\nexit 127\n")
    program.chmod(0o755)
    trap = f"trap '{answer}' TERM; " if answer else ""
    text = script(tmp_path, f"{trap}echo partial; while :; do sleep 0.1; done")
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    (tmp_path / "work/job.sh").write_text(text)
    subprocess.run(["bash", "job.sh", "claim", "0"], cwd=tmp_path / "work", env=env, check=False, timeout=60)
    assert (tmp_path / "work/rc").read_text() == "124 ended by its time limit of 0 min\n"
    assert (tmp_path / "work/stdout.0").read_text() == "partial\n"
