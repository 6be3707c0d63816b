"""The shape of the code: who imports whom, and what rendering may load."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.rig import ROOT

# Downwards: a module imports from rooms below its own, or from its own room.
ROOMS = [
    {"__main__", "wsgi"},
    {"cli"},
    {"service"},
    {"checking", "backends"},
    {"targets"},
    {"templating"},
    {"storage"},
    {"job", "status"},
    {"settings"},
    {"errors"},
    {"__init__"},
]
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
    rows = [number for number, row in enumerate(ROOMS) if name in row]
    assert rows, f"pman/{name} has no place in ROOMS: say here what it stands on"
    return rows[0]


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards(path: str) -> None:
    own = room(path.removesuffix(".py").replace("/", "."))
    upwards = {m for m in imports(path) if m.startswith("pman.") and layer(room(m)) < layer(own)}
    assert upwards == set()


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


def test_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert sum(length <= 30 for length in lengths) >= 0.9 * len(lengths)
