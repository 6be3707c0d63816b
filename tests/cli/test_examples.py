"""`pman examples`: what it copies can be used at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.rig import ROOT


def pman(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pman", *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )


def test_examples_are_copied_and_can_be_rendered(tmp_path: Path) -> None:
    done = pman("examples", "tried", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tried/README.md says what there is.\n"), done.stderr
    there = {path.relative_to(tmp_path / "tried") for path in (tmp_path / "tried").rglob("*") if path.is_file()}
    assert there == {path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*") if path.is_file()}
    request = ["render", "tried/docs/usage.json", "--to", "slurm", "--set", "STOREBASE=/data"]
    assert "\n#SBATCH " in pman(*request, cwd=tmp_path).stdout


def test_nothing_is_copied_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "tried").mkdir()
    (tmp_path / "tried" / "mine").touch()
    done = pman("examples", "tried", cwd=tmp_path)
    assert done.returncode == 2
    assert "tried is not empty" in done.stderr


def test_every_file_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    there = (ROOT / "examples").rglob("*.*")
    files = [path for path in there if path.suffix in (".json", ".py") and "sites" not in path.parts]
    assert [path.name for path in files if f"| {path.relative_to(ROOT / 'examples')} |" not in listed] == []
