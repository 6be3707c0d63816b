"""The scripts that people and CI call, called as they would."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import requests
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.backends.test_local import gone, local_rig
from tests.rig import HEEDING_INTERRUPTS, ROOT, running, wait_for

BASH = (b"#!/usr/bin/env bash", b"# shellcheck")
FILES = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
SHELL_SCRIPTS = [path for path in FILES if path.read_bytes().startswith(BASH)]


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_pinned_version_takes_the_oldest_python() -> None:
    """The Python of Debian 12 is 3.11.2, and its pip gives up on all where one version asks for a newer one."""
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    told = {name: installed[key].metadata for name in pinned if (key := canonicalize_name(name)) in installed}
    asks = {name: meta["Requires-Python"] for name, meta in told.items() if "Requires-Python" in meta}
    assert len(asks) > 50
    assert {name: asked for name, asked in asks.items() if not SpecifierSet(asked).contains("3.11.0")} == {}


def test_an_environment_that_works_keeps_its_python(tmp_path: Path) -> None:
    """Another `python3` in the PATH of the next call, such as that of conda, would mix the two."""
    other, own = tmp_path / "python3", tmp_path / "venv/bin/python"
    own.parent.mkdir(parents=True)
    for path in (other, own, own.with_name("pip")):
        path.write_text(f'#!/bin/sh\necho "{path.parent.name}/{path.name} $1" >>{tmp_path}/called\n')
        path.chmod(0o755)
    env = os.environ | {"PYTHON": str(other), "VENV": str(tmp_path / "venv")}
    subprocess.run(["bash", "-ec", "source scripts/venv.sh; make_venv test"], cwd=ROOT, env=env, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[-1] == "bin/pip install"
    assert not [line for line in called if line.endswith(" -m")]


def test_a_build_of_helm_that_fails(tmp_path: Path) -> None:
    """No path is told of a program that is not there. `env GOVERSION` is all that Go is asked before the build."""
    (tmp_path / "go").write_text('#!/bin/sh\n[ "$1" = env ] && echo go99.0 || exit 1\n')
    (tmp_path / "go").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PMAN_DEV_HOME": str(tmp_path / "home")}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    command = [str(ROOT / "scripts/engines/kubernetes"), "helm"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode, done.stdout
    assert not done.stdout


@pytest.mark.parametrize("provider", ["kind", "k3d"])
def test_nodes_in_containers_see_the_store(tmp_path: Path, provider: str) -> None:
    """Else a job that mounts a directory of this machine would wait for it in vain. What makes the nodes fails here."""
    script = f"""#!/bin/sh
case "${{0##*/}} $*" in *create*) echo "$*" >>{tmp_path}/said ;; k3d*) exit 1 ;; *) exit 0 ;; esac
case "$*" in *"--config -"*) cat >>{tmp_path}/said ;; esac
exit 1
"""
    (tmp_path / "bin").mkdir()
    for name in ("kind", "k3d", "docker", "kubectl"):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PMAN_DEV_HOME": str(tmp_path / "home")}
    command = [str(ROOT / "scripts/engines/kubernetes"), "up", "--provider", provider]
    store = {"PMAN_DEV_STORE": "/srv/store:/data"}
    done = subprocess.run(command, env=env | store, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    said = (tmp_path / "said").read_text()
    for path in ("/srv/store", "/data"):
        mount = f'hostPath: "{path}", containerPath: "{path}"' if provider == "kind" else f"--volume {path}:{path}@all"
        assert mount in said


def test_the_test_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    """And names at its end what has failed. Programs of this test stand in for ruff, mypy and pytest."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test", tmp_path / "scripts")
    (tmp_path / "scripts/venv.sh").write_text("make_venv() { :; }\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, status in (("ruff", 1), ("mypy", 0), ("pytest", 2)):
        program = tmp_path / ".venv/bin" / name
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
    command = [str(tmp_path / "scripts/test"), "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    steps = ["ruff check .", "ruff format --check .", "mypy", "pytest -q -n 3 -m not live and not slow"]
    assert [line for line in done.stderr.splitlines() if line.startswith("==")] == [
        "== " + step + (" --hypothesis-profile=fast" if "pytest" in step else "") for step in steps
    ]
    assert re.findall(r"failed: (\S+)", done.stderr) == ["ruff", "ruff", "pytest"]


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        done = subprocess.run(
            [str(ROOT / "scripts/smoke"), server.url], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("ok ") == 15
        assert "FAIL" not in done.stdout


@pytest.mark.parametrize("url", ["http://chris:hunter2@127.0.0.1:9", "no-url"])
def test_smoke_says_when_no_pman_answers(url: str) -> None:
    done = subprocess.run([str(ROOT / "scripts/smoke"), url], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 1, ""), done.stdout + done.stderr
    assert done.stdout.startswith("FAIL a pman answers at ")
    assert "hunter2" not in done.stdout


@pytest.mark.slow
def test_run_examples() -> None:
    """What scripts/quickstart runs once pman is installed."""
    done = subprocess.run(
        [sys.executable, "scripts/run_examples.py"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finishedSuccessfully") == 3
    ends = ("`local` backend uses no image", "scripts/dev ", "pman run docker.io", "5010/ shows all")
    for words in ("version 1.0", "#!/bin/bash", "SHA256SUMS", "worker 3 of 4", "arguments.txt", *ends):
        assert words in done.stdout


@pytest.mark.slow
def test_ctrl_c_ends_what_run_examples_started(tmp_path: Path) -> None:
    """Whatever settings are in the environment. The job is held up by a program that takes sha256sum's place."""
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "sha256sum"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    slow.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "LOG_LEVEL": "ERROR"}
    env |= {"CONTAINER_ENV": "cromwell", "AUTH_USERS_FILE": "/nowhere", "http_proxy": "http://127.0.0.1:9"}
    command = [*HEEDING_INTERRUPTS, sys.executable, "scripts/run_examples.py"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: (tmp_path / "pid").exists() or process.poll() is not None, 60, "the job to run")
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output + errors
    assert b"stopped" in output
    assert gone(int((tmp_path / "pid").read_text()))
    assert not list(tmp_path.glob("pman-quickstart-*"))


@pytest.mark.slow
def test_code_and_templates_are_live_at_once_in_dev_mode(tmp_path: Path) -> None:
    """Also after code was saved that cannot be imported."""
    source = tmp_path / "source"
    for name in ("pman", "templates"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "store").mkdir()
    env = {**os.environ, "PYTHONPATH": str(source), "APPLICATION_MODE": "dev", "PORT": "0", "CONTAINER_ENV": "local"}
    env |= {"STOREBASE": str(tmp_path / "store"), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "pman", "serve"], cwd=source, env=env, stderr=log, stdout=log)
    try:

        def said(pattern: str) -> str:
            assert process.poll() is None, (tmp_path / "log").read_text()
            found = re.search(pattern, (tmp_path / "log").read_text())
            return found[1] if found else ""

        url = wait_for(lambda: said(r"listening on (http://[\w.:]+)"), 30, "the development server")

        def version() -> str:
            try:
                return str(requests.get(f"{url}/api/v1/", timeout=10).json()["server_version"])
            except (requests.RequestException, ValueError):
                return ""  # just being restarted

        def rendered() -> str:
            request = (ROOT / "examples/copy-and-hash.json").read_text()
            answer = requests.post(f"{url}/render", json={"target": "swarm", "request": request}, timeout=10)
            return answer.text

        wait_for(version, 30, "an answer")
        template = source / "templates" / "swarm" / "service.yaml.j2"
        template.write_text(template.read_text() + "# changed\n")
        wait_for(lambda: "# changed" in rendered(), 10, "the changed template")
        code = source / "pman" / "__init__.py"
        good = code.read_text()
        code.write_text("def broken(:\n")
        wait_for(lambda: said("(SyntaxError)"), 10, "the complaint about the code")
        code.write_text(good.replace('__version__ = "', '__version__ = "changed-'))
        wait_for(lambda: version().startswith("changed-"), 10, "the changed code")
        assert " HTTP/" not in (tmp_path / "log").read_text()  # one line for each request, pman's own
    finally:
        process.terminate()
        assert process.wait(15) == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["swarm", "docker", "podman", "kubernetes"])
def test_an_upgrade_is_rehearsed_by_the_live_tests(engine: str) -> None:
    """They run with the live suites; here it is seen that the script finds them."""
    env = os.environ | {"PYTEST_ADDOPTS": "--collect-only"}
    command = ["scripts/rehearse-upgrade", engine]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_jobs_of_pman_6" in done.stdout
