"""Clients that the usual generators make from the live description: they compile, and run a job from POST to DELETE."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import pytest
import requests

from tests.backends.test_local import local_rig
from tests.rig import ROOT, Rig, Server, running

pytestmark = pytest.mark.live("clients")
TYPESCRIPT = ("openapi-typescript", "hey-api", "typescript-fetch")
# generator -> its options
GENERATED = {
    "go": "withGoMod: false, packageName: pman",
    "python": "packageName: pman_client",
    "typescript-fetch": "supportsES6: true",
}
GO_MOD = "module pman.test\n\ngo 1.19\n"


def ran(*command: str, cwd: Path, **env: str) -> str:
    environment = {**os.environ, **env, "HOME": os.environ.get("HOME", str(cwd))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("clients"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/clients with the generators and what they made."""
    if missing := [name for name in ("npm", "java", "go") if not shutil.which(name)]:
        assert os.environ.get("CI") != "true", f"{missing} are missing"
        pytest.skip(f"{', '.join(missing)}: missing, Debian's packages are npm, default-jre-headless and golang-go")
    place = tmp_path_factory.mktemp("made") / "clients"
    shutil.copytree(ROOT / "tests/clients", place)
    (place / "openapi.json").write_bytes(requests.get(f"{server.url}/api/v1/openapi.json", timeout=30).content)
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(by_npm, place), pool.submit(by_openapi_generator, place)]:
            each.result()
    return place


def by_npm(place: Path) -> None:
    ran("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", cwd=place)
    ran("npx", "openapi-typescript", "openapi.json", "-o", "schema.d.ts", cwd=place)
    ran("npx", "openapi-ts", "-i", "openapi.json", "-o", "made-hey-api", cwd=place)


def by_openapi_generator(place: Path) -> None:
    found = util.find_spec("openapi_generator_cli")
    assert found, "install pman[test]"
    jar = Path(str(found.origin)).with_name("openapi-generator.jar")
    for name, options in GENERATED.items():
        (place / f"{name}.yaml").write_text(
            f"generatorName: {name}\ninputSpec: openapi.json\noutputDir: made-{name}\n"
            f"additionalProperties: {{{options}}}\n"
            "globalProperties: {apiTests: 'false', modelTests: 'false', apiDocs: 'false', modelDocs: 'false'}\n"
        )
    files = [f"{name}.yaml" for name in GENERATED]
    ran("java", "-jar", str(jar), "batch", "--fail-fast", "--threads", "1", *files, cwd=place)


def test_typescript_clients(place: Path, server: Server) -> None:
    ran("npx", "tsc", cwd=place)
    for name in TYPESCRIPT:
        ran("npx", "esbuild", f"{name}.ts", "--bundle", "--platform=node", f"--outfile={name}.js", cwd=place)
        assert "ok gone" in ran("node", f"{name}.js", server.url, cwd=place)


def test_go_client(place: Path, server: Server) -> None:
    (place / "made-go").rename(place / "pman")
    (place / "go.mod").write_text(GO_MOD)
    ran("go", "mod", "tidy", cwd=place)
    ran("go", "run", "main.go", server.url, "request.json", cwd=place)


def test_python_client(place: Path, server: Server) -> None:
    command = (sys.executable, "client.py", server.url, "request.json")
    assert ran(*command, cwd=place, PYTHONPATH=str(place / "made-python")) == "True\ngone\n"
