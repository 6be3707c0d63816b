"""The benchmarks of bench/README.md run to their end, with the least work: no speed is judged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import development
from tests.rig import ROOT

# script -> (the engine that it needs, arguments, a figure of its end)
SCRIPTS = {
    "engine.py": ("", ["1"], r"DELETE, backend alone, ms +\d"),
    "server.py": ("", ["1"], r"granian .*\d"),
    "cromwell.py": ("slurm", ["1"], r"sbatch.*\d"),
    "slurm.py": ("slurm", ["1", "20"], r"listing.*\d"),
    "swarm.py": ("swarm", ["2"], r"docker: \d+ GETs a second, \d+ clients"),
    "listing.py": ("", ["1"], r"local +/api/v1/jobs/ .*adds \d"),
    "scale.py": ("", ["--quick"], r"cromwell \| 100 \|.*\d"),
    "kubernetes_calls.py": ("kubernetes", ["2"], r"of which HTTP alone +\d"),
}


def test_every_documented_benchmark_is_here() -> None:
    documented = re.findall(r"`python bench/(\S+\.py)[^`]*`", (ROOT / "bench/README.md").read_text())
    assert sorted(set(documented)) == sorted(SCRIPTS) == sorted(path.name for path in (ROOT / "bench").glob("*.py"))


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.live(engine or "none")) for name, (engine, *_) in SCRIPTS.items()]
)
def test_benchmark(script: str, tmp_path: Path) -> None:
    engine, arguments, figure = SCRIPTS[script]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"} | (development(engine) if engine else {})
    if script == "server.py":
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), "granian"]
        subprocess.run(install, check=True)
    done = subprocess.run(
        [sys.executable, f"bench/{script}", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(figure, done.stdout), done.stdout
