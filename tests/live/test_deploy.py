"""deploy/: the image is built and runs locked down, the compose files and manifests are valid."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import development
from tests.rig import ROOT, wait_for

pytestmark = pytest.mark.live("swarm")
SETTINGS = {"SECRET_KEY": "x" * 20, "STOREBASE": "/data/store", "PMAN_CROMWELL_ROOT": "/data/cromwell"}
# What the Dockerfile and jobs of the embedded backend call, beside Python.
PROGRAMS = ("sh", "mkdir", "env", "bash", "ln", "rm", "mv", "sleep", "uname", "cat")


@pytest.fixture(scope="module")
def docker() -> list[str]:
    host = development("swarm")["DOCKER_HOST"]
    return ["docker", "--host", host]


def out(command: list[str], **kwargs: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return str(done.stdout)


@pytest.mark.parametrize("name", ["deploy/compose.yml", "deploy/compose.slurm.yml", "compose.dev.yml"])
def test_compose_files(name: str) -> None:
    command = ["docker-compose", "--file", str(ROOT / name), "config"]
    services = yaml.safe_load(out(command, env={**os.environ, **SETTINGS}))["services"]
    assert services["pman"]["environment"]["STOREBASE"] in ("/data/store", "/store")


def libraries(program: str) -> set[str]:
    lines = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout.splitlines()
    return {word for line in lines for word in line.split() if word.startswith("/")}


def make_base(root: Path) -> None:
    """A root directory with this machine's Python and a shell: the base image that no registry is asked for."""
    prefix = Path(sys.base_prefix)
    stdlib = Path(sysconfig.get_path("stdlib"))
    keep = shutil.ignore_patterns("__pycache__", "test", "tests", "site-packages", "dist-packages", "config-*", "*.a")
    shutil.copytree(stdlib, root / stdlib.relative_to("/"), symlinks=True, ignore=keep)
    python = Path(sys.executable).resolve()
    programs = {str(python)} | {path for name in PROGRAMS if (path := shutil.which(name))}
    shared = {str(path) for path in stdlib.rglob("*.so")} | {
        str(path) for path in (prefix / "lib").glob("libpython*.so*")
    }
    needed = set().union(*map(libraries, programs | shared))
    wheels = Path("/usr/share/python-wheels")  # where Debian's ensurepip has pip
    if wheels.is_dir():
        shutil.copytree(wheels, root / wheels.relative_to("/"))
    for source in sorted(programs | needed | {path for path in shared if "/libpython" in path}):
        target = root / source.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/python3").symlink_to(python)
    for name in ("tmp", "proc", "sys", "dev", "etc", "bin"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to(shutil.which("bash") or "/bin/bash")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")


@pytest.fixture(scope="module")
def image(docker: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("image")
    make_base(directory / "base")
    archive = directory / "base.tar"
    out(["tar", "-C", str(directory / "base"), "-cf", str(archive), "."])
    path = f"PATH=/opt/pman/bin:/usr/local/bin:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    out([*docker, "import", "--change", f"ENV {path}", str(archive), "pman-base:test"])
    context = directory / "context"
    for name in ("pman", "templates"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, context / name)
    # Wheels lie inside a directory that the Dockerfile copies: there is no package index during this build.
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    out(
        [*pip, "--constraint", "constraints.txt", "--wheel-dir", str(context / "templates/wheels"), ".", "hatchling"],
        cwd=ROOT,
    )
    options = "--no-index --find-links templates/wheels"
    build = [*docker, "build", "--file", str(ROOT / "deploy/Dockerfile"), "--tag", "pman:test", "--network", "none"]
    arguments = ["--build-arg", "BASE=pman-base:test", "--build-arg", f"PIP_OPTIONS={options}"]
    out([*build, *arguments, str(context)], env={**os.environ, "DOCKER_BUILDKIT": "0"})
    yield "pman:test"
    for name in ("pman:test", "pman-base:test"):
        subprocess.run([*docker, "image", "rm", "--force", name], capture_output=True, check=False)


def test_image_runs_locked_down(docker: list[str], image: str) -> None:
    settings = [
        "SECRET_KEY=a secret key for tests",
        "STOREBASE=/tmp",
        "LOCAL_STATE_DIR=/tmp/jobs",
        "SERVER_PROCESSES=2",
    ]
    environment = [word for setting in settings for word in ("--env", setting)]
    locked = [
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--network",
        "none",
    ]
    container = out([*docker, "run", "--detach", *locked, *environment, image]).strip()
    try:

        def state() -> Any:
            found = json.loads(out([*docker, "inspect", container]))[0]["State"]
            assert found["Status"] == "running", out([*docker, "logs", container])
            return found

        wait_for(lambda: state()["Health"]["Status"] == "healthy", 60, "the container to be healthy", every=0.5)
        rendered = out([*docker, "exec", container, "pman", "render", "--help"])
        assert "REQUEST" in rendered
        user = out([*docker, "exec", container, "python3", "-c", "import os; print(os.getuid())"]).strip()
        assert user == "10001"
        job = ["--env", "PMAN_URL=http://127.0.0.1:5005", "--env", "STOREBASE=/tmp", container]
        for code in (3, 4):  # what a job leaves becomes a child of process 1, pman's supervisor
            words = ["pman", "run", "localhost/x:1", "--", "sh", "-c", f"exit {code}"]
            ended = subprocess.run([*docker, "exec", *job, *words], capture_output=True, text=True, check=False)
            assert ended.returncode == code, ended.stderr
        assert state()["Health"]["Status"] == "healthy"
    finally:
        out([*docker, "rm", "--force", container])


def test_stack_on_swarm(docker: list[str], image: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """deploy/compose.yml as a stack: pman runs as a service of the Swarm that it gives jobs to."""
    store = tmp_path_factory.mktemp("store")
    socket = development("swarm")["DOCKER_HOST"].removeprefix("unix://")
    env = {**os.environ, "SECRET_KEY": "a secret key for tests", "STOREBASE": str(store), "PMAN_IMAGE": image}
    env |= {"DOCKER_SOCKET": socket, "PMAN_TEMPLATES": str(ROOT / "deploy/templates")}
    stack = f"pman-test-{os.getpid()}"
    out([*docker, "stack", "deploy", "--compose-file", str(ROOT / "deploy/compose.yml"), stack], env=env)
    try:
        listing = [
            *docker,
            "ps",
            "--quiet",
            "--filter",
            f"label=com.docker.stack.namespace={stack}",
            "--filter",
            "health=healthy",
        ]
        container = wait_for(lambda: out(listing).strip(), 90, "pman to be healthy in the stack", every=0.5)
        smoke = (ROOT / "scripts/smoke").read_text()
        inside = [*docker, "exec", "--interactive", container, "python3", "-", "http://127.0.0.1:5005"]
        shown = out([*inside, development("swarm")["PMAN_TEST_IMAGE"]], input=smoke)
        assert shown.count("ok ") == 15
    finally:
        out([*docker, "stack", "rm", stack])
        wait_for(
            lambda: not out([*docker, "ps", "--quiet", "--filter", f"label=com.docker.stack.namespace={stack}"]),
            60,
            "its end",
        )
