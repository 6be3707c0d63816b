"""A short run of scripts/chaos on each backend. PMAN_TEST_CHAOS_SEED asks for another plan than the usual one."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.conftest import NEEDS_SOMETHING
from tests.rig import ROOT

BACKENDS = {
    "local": "slurm", "slurm": "slurm", "cromwell": "slurm", "docker": "swarm", "swarm": "swarm", "podman": "podman",
    "kubernetes": "kubernetes",
}  # fmt: skip
SHARED = ("podman", "kubernetes")  # engines whose parts other tests stop, too, one after another


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.live(engine)) for name, engine in BACKENDS.items()]
)
def test_a_short_chaos(backend: str) -> None:
    seed = os.environ.get("PMAN_TEST_CHAOS_SEED", "1")
    command = [str(ROOT / "scripts" / "chaos"), backend, "--minutes", "0.2", "--jobs", "16", "--seed", seed]
    if backend in SHARED:
        command.append("--here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == NEEDS_SOMETHING and os.environ.get("CI") != "true":
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
