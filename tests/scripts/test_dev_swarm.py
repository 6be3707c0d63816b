"""scripts/engines/swarm over engines that exist: what it made there is taken back, and nothing else."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NEEDS_SOMETHING
from tests.rig import ROOT

# The docker command; the engine's Swarm is a file of the directory that DOCKER_HOST names.
DOCKER = r"""#!/bin/sh
echo "$*" >> "$DOCKER_HOST/calls"
case "$1 $2" in
  "info --format") [ -e "$DOCKER_HOST/swarm" ] && echo active || echo inactive ;;
  "swarm init") touch "$DOCKER_HOST/swarm" ;;
  "swarm leave") rm "$DOCKER_HOST/swarm" ;;
  "node ls") echo "true Ready" ;;
esac
"""


@pytest.fixture
def home() -> Iterator[str]:
    """Sockets have short paths."""
    with tempfile.TemporaryDirectory(prefix="pman-") as directory:
        yield directory


def test_down_takes_back_what_up_made(tmp_path: Path, home: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    mine, others = tmp_path / "mine", tmp_path / "others"
    for engine in (mine, others):
        engine.mkdir()
    (others / "swarm").touch()

    def script(engine: Path, *words: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "DOCKER_HOST": str(engine)}
        env |= {"PMAN_DEV_HOME": home}
        command = [str(ROOT / "scripts" / "engines" / "swarm"), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == NEEDS_SOMETHING and os.environ.get("CI") != "true":
            pytest.skip(done.stderr)
        return done

    assert script(mine, "up", "--existing").returncode == 0
    assert (mine / "swarm").exists()
    refused = script(others, "up", "--existing")
    assert refused.returncode == 1
    assert f"{mine} is in use" in refused.stderr
    assert script(mine, "up", "--existing").returncode == 0
    assert script(others, "down").returncode == 0
    assert not (mine / "swarm").exists()
    assert (others / "swarm").exists()
    assert script(others, "up", "--existing").returncode == 0
    assert script(others, "down").returncode == 0
    assert (others / "swarm").exists()
    assert "swarm leave" not in (others / "calls").read_text()
