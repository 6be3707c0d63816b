"""A backend needs the places that docs/developers.md lists, and no other: a copy of the project gets one for PBS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import ROOT

KIT = ROOT / "tests" / "new_backend"
PAGE = (ROOT / "docs" / "developers.md").read_text()
SECTION = PAGE.partition("\n## A new backend\n")[2].partition("\n## ")[0]
PLACES = [place.replace("<name>", "pbs") for place in re.findall(r"(?m)^\d+\. `([^`]+)`", SECTION)]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.pyc", "build", "dist")
WRITTEN = {  # place -> file of the kit
    "templates/pbs/": ("job.sh.j2", "job.sh.j2"),
    "pman/targets/pbs.py": ("target.py", ""),
    "pman/backends/pbs/": ("backend.py", "__init__.py"),
    "tests/live/test_pbs.py": ("contract.py", ""),
    "docs/pbs.md": ("page.md", ""),
}
ROWS = {  # place -> (a text in it, what that becomes)
    "pman/targets/__init__.py": [
        ("local, slurm, swarm, wdl", "local, pbs, slurm, swarm, wdl"),
        ("slurm.TARGET, ", "slurm.TARGET, pbs.TARGET, "),
    ],
    "pman/backends/__init__.py": [
        ('    "docker": Entry(', '    "pbs": Entry("pman.backends.pbs", "pbs"),\n    "docker": Entry('),
    ],
    "pman/settings.py": [
        (
            "    cromwell_url:",
            '    pbs_state_dir: AbsolutePath | None = Field(None, description="Where `pbs` keeps its jobs.")\n'
            '    pbs_runtime: LocalRuntime = Field("none", description="What wraps the command of a `pbs` job.")\n\n'
            "    cromwell_url:",
        ),
    ],
}
RECORDED = {
    "docs/reference/": ["-m", "tests.scripts.test_docs"],
    "tests/golden/pbs/": ["-m", "pytest", "-q", "-k", "pbs", "tests/test_golden.py"],
}


def run(project: Path, *words: str, status: int = 0, **env: str) -> str:
    """What Python says in the project's directory; it must end with that status."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PMAN"))}
    env = {**clean, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", **env}
    done = subprocess.run([sys.executable, *words], cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{words}: {done.stdout[-8000:]}{done.stderr[-8000:]}"
    return done.stdout


def pytest_in(project: Path, *words: str) -> None:
    run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a backend for PBS, made as the page says."""
    copy = tmp_path_factory.mktemp("new") / "pman"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    for place in PLACES:
        path = copy / place
        if place in WRITTEN:
            source, name = WRITTEN[place]
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(KIT / source, path / name)
        for old, new in ROWS.get(place, ()):
            text = path.read_text()
            assert text.count(old) == 1, f"{place}: {old}"
            path.write_text(text.replace(old, new))
    for place in PLACES:
        if place in RECORDED:
            run(copy, *RECORDED[place], PMAN_RECORD_GOLDEN="1")
    return copy


def files(directory: Path) -> dict[str, bytes]:
    found = {}
    for place, directories, names in os.walk(directory):
        hidden = NOT_COPIED(place, [*directories, *names])
        directories[:] = [name for name in directories if name not in hidden]
        for path in (Path(place, name) for name in names if name not in hidden):
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


def test_at_most_ten_places_are_touched_and_the_page_names_each(project: Path) -> None:
    assert len(PLACES) <= 10
    assert set(PLACES) == {*WRITTEN, *ROWS, *RECORDED}
    before, after = files(ROOT), files(project)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    touched = {place for place in PLACES if any(name == place or name.startswith(place) for name in changed)}
    assert touched == set(PLACES)
    assert {name for name in changed if not name.startswith(tuple(PLACES))} == set()


@pytest.mark.slow
def test_it_is_rendered_and_judged(project: Path) -> None:
    command = ["-m", "pman", "render", "examples/hostile-arguments.json", "--to", "pbs", "--set", "STOREBASE=/data"]
    assert "\n#PBS -l select=1:ncpus=" in run(project, *command, "--check")


@pytest.mark.slow
def test_overlays_are_begun_and_checked(project: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(project, "-m", "pman", "templates", "new", str(site), "--for", "pbs")
    run(project, "-m", "pman", "check", str(site))
    assert "qsub" in run(project, "-m", "pman", "templates", "vars", "pbs")
    overlay = site / "pbs" / "job.sh.j2"
    shipped = '{% extends "shipped/pbs/job.sh.j2" %}\n'
    overlay.write_text(f"{shipped}{{% block directives %}}\n#PBS -A {{{{ job.auid }}}}\n{{% endblock %}}\n")
    found = json.loads(run(project, "-m", "pman", "check", str(site), "--format", "json", status=1))
    said = {(finding["rule"], finding["line"]): finding["message"] for finding in found}
    assert said["wrong-quoting", 3] == "{{ job.auid }} is read by qsub here: write |qsub"
    assert "shipped lines of the block directives are gone" in said["no-super", 2]


@pytest.mark.slow
def test_its_golden_files_and_its_page_are_compared(project: Path) -> None:
    pytest_in(project, "tests/test_golden.py", "-k", "pbs or nothing_else")
    pytest_in(project, "tests/scripts/test_docs_templates.py", "tests/scripts/test_docs.py", "-k", "table or links")


@pytest.mark.slow
def test_its_imports_and_functions_are_as_those_of_the_others(project: Path) -> None:
    pytest_in(project, "tests/test_structure.py", "tests/test_settings.py")


@pytest.mark.slow
def test_it_keeps_the_promises(project: Path) -> None:
    pytest_in(project, "tests/live/test_pbs.py")
