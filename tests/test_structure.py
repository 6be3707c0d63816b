"""The shape of the code: who imports whom, and what rendering may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import scope_of
from tests.rig import ROOT

# The rows of the table of rooms: from the top to the bottom.
PAGE = (ROOT / "docs" / "developers.md").read_text()
TABLE = PAGE.partition("| room | what it is for |\n|---|---|\n")[2].partition("\n\n")[0]
ROOMS = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in TABLE.splitlines()]
HEAVY = ("flask", "docker", "kubernetes", "cromwell_tools", "WDL", "kubernetes_validate", "waitress", "jsonschema")
CLIENTS = {"docker": "engine", "kubernetes": "kubernetes", "cromwell_tools": "cromwell"}


def imports(path: str) -> set[str]:
    """Modules that a file imports anywhere in it, `from pman import x` as pman.x."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pman":
            found |= {f"pman.{alias.name}" for alias in node.names if not alias.name.startswith("_")}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def room(module: str) -> str:
    """`pman.backends.local` -> `backends`."""
    return module.split(".")[1] if "." in module else "__init__"


FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pman").rglob("*.py"))


def layer(name: str) -> int:
    return next(number for number, row in enumerate([*ROOMS, ["__init__"]]) if name in row)


def test_the_page_names_every_room() -> None:
    there = {path.split("/")[1].removesuffix(".py") for path in FILES}
    assert {room for row in ROOMS for room in row} | {"__init__", "wsgi"} == there | {"wsgi"}


def test_the_page_names_modules_that_are_there() -> None:
    for row, rooms in zip(TABLE.splitlines(), ROOMS, strict=True):
        there = {path.rsplit("/", 1)[1] for path in FILES if path.split("/")[1] in rooms}
        assert set(re.findall(r"`(\w+\.py)`", row)) <= there


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith("/__init__.py")][1:])
def test_every_package_says_what_it_is_for(path: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    assert len(said.split()) >= 25, f"{path} says too little of what it is for"


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path: str) -> None:
    own = room(path.removesuffix(".py").replace("/", "."))
    others = {room(module) for module in imports(path) if module.split(".")[0] == "pman"} - {own}
    assert {other for other in others if layer(other) <= layer(own)} == set()


@pytest.mark.parametrize("path", [p for p in FILES if not p.startswith(("pman/service/", "pman/cli/"))])
def test_only_the_service_imports_flask(path: str) -> None:
    assert not {m for m in imports(path) if m.split(".")[0] in ("flask", "werkzeug", "waitress")}


@pytest.mark.parametrize("path", FILES)
def test_a_client_library_is_imported_in_its_own_backend_only(path: str) -> None:
    for library, home in CLIENTS.items():
        if library in {m.split(".")[0] for m in imports(path)}:
            assert path.startswith(f"pman/backends/{home}/")


@pytest.mark.parametrize("script", ["scripts/render_job.py", "-m pman render"])
def test_rendering_loads_neither_the_web_nor_any_backend(script: str) -> None:
    watch = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print(*sorted(m for m in sys.modules), file=sys.stderr))\n"
        f"sys.argv = ['pman', *{['render'] if 'pman' in script else []}, 'examples/four-workers.json', '--to', 'wdl']\n"
        + (
            "runpy.run_module('pman', run_name='__main__')"
            if "pman" in script
            else f"runpy.run_path({script!r}, run_name='__main__')"
        )
    )
    run = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stderr.splitlines()[-1].split())
    assert "pman.templating.render" in loaded
    assert {m for m in loaded if m.split(".")[0] in HEAVY or m.startswith("pman.backends.")} == set()


def test_live_tests_of_a_shared_engine_follow_each_other() -> None:
    """They stop and start it, so that one worker of pytest-xdist has all of them."""
    engines = {
        "tests/live/kubernetes/test_deployments.py::test_x": "kubernetes", "tests/live/test_deploy.py::test_x": "swarm",
        "tests/live/test_chaos.py::test_x[podman]": "podman", "tests/live/test_docker.py::TestPodman::test_x": "podman",
        "tests/live/test_docker.py::TestDocker::test_x": "swarm", "tests/live/test_slurm.py::test_x": "test_slurm.py",
    }  # fmt: skip
    assert {test: scope_of(test).rsplit("/", 1)[-1] for test in engines} == engines


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert sum(length <= 30 for length in lengths) >= 0.9 * len(lengths)
