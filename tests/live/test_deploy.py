"""deploy/: what the files' headers and the pages say is done as it stands there, and runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import development
from tests.live.images import BASE, CROMWELL, make_base, make_cromwell, out
from tests.rig import COUNTED, HEEDING_INTERRUPTS, ROOT, Rig, wait_for

pytestmark = pytest.mark.live("swarm")
COMPOSE_FILES = ["deploy/compose.yml", "deploy/compose.slurm.yml", "compose.dev.yml"]
BUILD = "docker build -f deploy/Dockerfile -t localhost/pman:7 ."
INSIDE = ("python3", "-", "http://127.0.0.1:5010")
# The service of https://github.com/FNNDSC/pman/blob/a463aff/swarm/prod/docker-compose.yml, but for its image and the
# publication of its port.
UPSTREAM = """
version: '3.7'
services:
  pman:
    image: IMAGE
    environment:
      - STOREBASE
      - CONTAINER_ENV=swarm
    env_file:
      - secrets/.pman.env
    volumes:
      - /var/run/docker.sock:/var/run/docker.sock
    command: ["gunicorn", "-w", "5", "-b", "0.0.0.0:30010", "-t",  "200", "pman.wsgi:application"]
    deploy:
      restart_policy:
        condition: on-failure
      placement:
        constraints:
          - "node.role==manager"
    networks:
      - remote
networks:
  remote:
"""
# The service pman of https://github.com/FNNDSC/miniChRIS-docker/blob/c80da96/docker-compose.yml, but for its image, and
# what it needs of pfcon's.
MINICHRIS = """
services:
  pfcon:
    image: JOBS
    command: sleep 600
    volumes:
      - chris_files:/var/local/storeBase
    labels:
      org.chrisproject.role: "pfcon"
  pman:
    image: IMAGE
    container_name: pman
    environment:
      CONTAINER_ENV: docker
      CONTAINER_USER: "1001:"
      ENABLE_HOME_WORKAROUND: "yes"
      JOB_LABELS: "org.chrisproject.miniChRIS=plugininstance"
      SECRET_KEY: secret
      REMOVE_JOBS: "yes"
    volumes:
      - /var/run/docker.sock:/var/run/docker.sock:rw
    depends_on:
      - pfcon
    ports:
      - "5010:5010"
    networks:
      remote:
    userns_mode: "host"
    labels:
      org.chrisproject.role: "pman"
networks:
  remote:
volumes:
  chris_files:
    name: minichris-files
"""
# Of the container pman in https://github.com/FNNDSC/miniChRIS-podman/blob/091f4b2/podman/pfcon-podman.yml
MINICHRIS_PODMAN = """
CONTAINER_ENV=docker STORAGE_TYPE=docker_local_volume VOLUME_NAME=minichris-cube-files STOREBASE= SECRET_KEY=secret
REMOVE_JOBS=no SHM_SIZE=1024
"""
# `docker compose` where Compose is installed as the program docker-compose only.
PLUGIN = """#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then
    exec echo '{"SchemaVersion": "0.1.0", "Vendor": "Docker", "Version": "1"}'
fi
shift
exec docker-compose "$@"
"""


def documented(path: str, command: str) -> str:
    """The command, which the file says like this."""
    assert f"`{command}`" in re.sub(r"\n# ", " ", (ROOT / path).read_text()), command
    return command


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of an operator's shell: the engine, and what the compose files ask for."""
    host = development("swarm")["DOCKER_HOST"]
    config, store = tmp_path_factory.mktemp("docker"), tmp_path_factory.mktemp("store")
    store.chmod(0o777)
    env = {**os.environ, "DOCKER_HOST": host, "DOCKER_CONFIG": str(config), "DOCKER_SOCKET": host[len("unix://") :]}
    env |= {"DOCKER_BUILDKIT": "0", "SECRET_KEY": "a secret key for tests", "STOREBASE": str(store)}
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        (config / "cli-plugins").mkdir()
        (config / "cli-plugins/docker-compose").write_text(PLUGIN)
        (config / "cli-plugins/docker-compose").chmod(0o755)
    return env


@pytest.fixture(scope="module")
def docker(environment: dict[str, str]) -> list[str]:
    return ["docker", "--host", environment["DOCKER_HOST"]]


def test_swarm_script_without_an_image(docker: list[str]) -> None:
    """Before anything here makes the base image: there is none to be had."""
    assert subprocess.run([*docker, "image", "inspect", BASE], capture_output=True, check=False).returncode
    shown = out([str(ROOT / "scripts/test_swarm.sh")])
    assert "pman runs beside the Swarm" in shown
    assert shown.count("ok ") == 15


@pytest.fixture(scope="module")
def image(docker: list[str], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    make_base(docker, tmp_path_factory.mktemp("image"))
    assert documented("deploy/Dockerfile", BUILD) == documented("docs/operators.md", BUILD)
    out(["bash", "-c", BUILD], cwd=ROOT, env=environment)
    yield "localhost/pman:7"
    for name in ("localhost/pman:7", BASE):
        subprocess.run([*docker, "image", "rm", "--force", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def cromwell_image(docker: list[str], image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    make_cromwell(docker, tmp_path_factory.mktemp("cromwell"))
    yield CROMWELL
    subprocess.run([*docker, "image", "rm", "--force", CROMWELL], capture_output=True, check=False)


def test_image_runs_locked_down(docker: list[str], image: str) -> None:
    settings = [
        "SECRET_KEY=a secret key for tests",
        "STOREBASE=/tmp",
        "LOCAL_STATE_DIR=/tmp/jobs",
    ]
    environment = [word for setting in settings for word in ("--env", setting)]
    locked = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none"]
    locked += ["--cap-add=SETUID", "--cap-add=SETGID"]  # as every image needs them that starts as root
    container = out([*docker, "run", "--detach", *locked, *environment, image]).strip()
    try:

        def state() -> Any:
            found = json.loads(out([*docker, "inspect", container]))[0]["State"]
            assert found["Status"] == "running", out([*docker, "logs", container])
            return found

        wait_for(lambda: state()["Health"]["Status"] == "healthy", 60, "the container to be healthy", every=0.5)
        rendered = out([*docker, "exec", container, "pman", "render", "--help"])
        assert "REQUEST" in rendered
        assert runs_as(docker, container) == ("10001", "")
        for code in (3, 4):  # what a job leaves becomes a child of process 1, pman
            words = ["pman", "run", "localhost/x:1", "--", "sh", "-c", f"exit {code}"]
            ended = subprocess.run([*docker, "exec", container, *words], capture_output=True, text=True, check=False)
            assert ended.returncode == code, ended.stderr
        assert state()["Health"]["Status"] == "healthy"
    finally:
        out([*docker, "rm", "--force", container])


def runs_as(docker: list[str], container: str) -> tuple[str, str]:
    """User and further groups of the container's first process."""
    status = out([*docker, "exec", container, "cat", "/proc/1/status"])
    user, groups = (re.findall(rf"^{field}:\t(.*?) ?$", status, re.M)[0] for field in ("Uid", "Groups"))
    return user.split()[0], groups


# --------------------------------------------------------------------------------------------------- Compose, Swarm


def running(docker: list[str], label: str, *filters: str) -> list[str]:
    """Containers with this label."""
    words = [word for condition in (f"label={label}", *filters) for word in ("--filter", condition)]
    return out([*docker, "ps", "--quiet", *words]).split()


def healthy(docker: list[str], label: str) -> str:
    return wait_for(lambda: running(docker, label, "health=healthy"), 90, "pman to be healthy", every=0.2)[0]


def logged(docker: list[str], container: str) -> str:
    done = subprocess.run([*docker, "logs", container], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def smoke(docker: list[str], container: str) -> None:
    command = [*docker, "exec", "--interactive", container, *INSIDE, development("swarm")["PMAN_TEST_IMAGE"]]
    assert out(command, input=(ROOT / "scripts/smoke").read_text()).count("ok ") == 15


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files(name: str, environment: dict[str, str]) -> None:
    env = {**environment, "PMAN_CROMWELL_ROOT": "/data/cromwell", "STOREBASE": "/data/store"}
    env |= {"PMAN_CROMWELL_DATABASE": "/data/database", "PMAN_SLURM_USER": "1000:1000"}
    services = yaml.safe_load(out(["docker", "compose", "-f", str(ROOT / name), "config"], env=env))["services"]
    assert services["pman"]["environment"]["STOREBASE"] in ("/data/store", "/store")


@contextlib.contextmanager
def up(docker: list[str], file: str, env: dict[str, str], log: Path, cwd: Path = ROOT) -> Iterator[str]:
    """`docker compose -f FILE up` as the file's header says it, until Ctrl-C; pman's container, once it is healthy."""
    command = [*HEEDING_INTERRUPTS, "bash", "-c", f"exec {documented(file, f'docker compose -f {file} up')}"]
    project = env["COMPOSE_PROJECT_NAME"]
    with log.open("wb") as shown:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown, start_new_session=True
        )
    try:
        wait_for(
            lambda: process.poll() is not None or running(docker, f"com.docker.compose.project={project}"),
            120, "containers",
        )  # fmt: skip
        assert process.poll() is None, log.read_text()
        yield healthy(docker, "com.docker.compose.service=pman")
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to docker and to its plugin
        process.wait(60)
        out(["docker", "compose", "-f", file, "down", "--volumes", "--rmi", "local"], cwd=cwd, env=env)
        assert not running(docker, f"com.docker.compose.project={project}")


@pytest.fixture
def project(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "COMPOSE_PROJECT_NAME": f"pmantest{os.getpid()}"}


def test_compose_up(docker: list[str], image: str, project: dict[str, str], tmp_path: Path) -> None:
    with up(docker, "deploy/compose.yml", project, tmp_path / "log") as container:
        assert runs_as(docker, container)[0] == "0"  # it sees the store
        smoke(docker, container)


def test_compose_up_with_cromwell(
    docker: list[str], cromwell_image: str, project: dict[str, str], tmp_path: Path
) -> None:
    """pman finds Cromwell by its name, Cromwell its configuration, each the other's files. SLURM is a stand-in."""
    root = tmp_path / "cromwell"
    (root / "store").mkdir(parents=True)  # jobs run in Cromwell's container here, which has no store
    (tmp_path / "database").mkdir()
    for path in (root, root / "store", tmp_path / "database"):
        path.chmod(0o777)
    env = project | {"PMAN_CROMWELL_ROOT": str(root), "STOREBASE": str(root / "store"), "PMAN_CONTAINER": "none"}
    env |= {"SLURM_PREFIX": str(tmp_path / "slurm"), "PMAN_SLURM_USER": "1000:1000"}
    env |= {"PMAN_CROMWELL_DATABASE": str(tmp_path / "database")}
    (tmp_path / "slurm/bin").mkdir(parents=True)
    with munge(), up(docker, "deploy/compose.slurm.yml", env, tmp_path / "log") as container:
        smoke(docker, container)


@contextlib.contextmanager
def munge() -> Iterator[None]:
    """/run/munge, which a node of a SLURM has."""
    directory = Path("/run/munge")
    made = not directory.exists()
    directory.mkdir(exist_ok=True)
    yield
    if made:
        directory.rmdir()


def test_compose_for_developers(docker: list[str], image: str, project: dict[str, str], tmp_path: Path) -> None:
    """Source and templates are those of the checkout, and a change of either is live."""
    checkout = tmp_path / "checkout"
    listed = out(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT).splitlines()
    assert "compose.dev.yml" in listed
    out(
        ["bash", "-c", f"mkdir {checkout} && tar -c --files-from=- | tar -xC {checkout}"],
        cwd=ROOT,
        input="\n".join(listed),
    )
    log = tmp_path / "log"
    with up(docker, "compose.dev.yml", project, log, checkout) as container:
        smoke(docker, container)

        def shown(path: str) -> str:
            script = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:5010{path}').read().decode())"
            command = [*docker, "exec", container, "python3", "-c", script]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout

        def change(name: str, old: str, new: str) -> None:
            text = (checkout / name).read_text()
            assert old in text
            (checkout / name).write_text(text.replace(old, new))

        change("pman/__init__.py", '__version__ = "', '__version__ = "changed-')
        wait_for(lambda: '"changed-' in shown("/api/v1/"), 10, "the change of a Python file")


def test_stack(docker: list[str], image: str, environment: dict[str, str]) -> None:
    """pman runs as a service of the Swarm that it gives jobs to."""
    command = documented("deploy/compose.yml", "docker stack deploy -c deploy/compose.yml pman")
    out(["bash", "-c", command], cwd=ROOT, env=environment)
    label = "com.docker.stack.namespace=pman"
    try:
        smoke(docker, healthy(docker, label))
    finally:
        out([*docker, "stack", "rm", "pman"])
        wait_for(lambda: not running(docker, label), 60, "its end")


def run_as_pfcon(docker: list[str], container: str, store: Path, port: int = 5010) -> None:
    """One job of a pman that does not see the store, whose directories pfcon has made."""
    rig = Rig({}, store, development("swarm")["PMAN_TEST_IMAGE"], store)
    call = "import sys, urllib.request as r; print(r.urlopen(r.Request(*sys.argv[1:2], sys.stdin.buffer.read() or None,"
    call += "{'Content-Type': 'application/json'})).read().decode())"

    def ask(jid: str, body: str = "") -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/{jid}"
        return json.loads(out([*docker, "exec", "-i", container, "python3", "-c", call, url], input=body))

    request = rig.request("of-pfcon", COUNTED)
    rig.outgoing("of-pfcon").chmod(0o777)
    assert ask("", json.dumps(request))["jid"] == "of-pfcon"
    wait_for(lambda: ask("of-pfcon/")["status"] == "finishedSuccessfully", 60, "the end of the job", every=0.5)
    assert rig.executions("of-pfcon") == 1


def test_stack_of_pman_6(docker: list[str], image: str, environment: dict[str, str], tmp_path: Path) -> None:
    """The image is swapped and nothing else: pman may open the socket, whose group is docker, and jobs run."""
    socket, label = Path(environment["DOCKER_SOCKET"]), "com.docker.stack.namespace=former"
    assert stat.filemode(socket.stat().st_mode) == "srw-rw----"
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/.pman.env").write_text("SECRET_KEY=secret\n")
    file = tmp_path / "compose.yml"
    file.write_text(UPSTREAM.replace("IMAGE", image).replace("/var/run/docker.sock:", f"{socket}:", 1))
    try:
        out([*docker, "stack", "deploy", "--resolve-image", "never", "-c", str(file), "former"], env=environment)
        container = healthy(docker, label)
        assert runs_as(docker, container) == ("10001", str(socket.stat().st_gid))
        run_as_pfcon(docker, container, Path(environment["STOREBASE"]), 30010)
        out([*docker, "service", "rm", "of-pfcon"])
    finally:
        out([*docker, "stack", "rm", "former"])
        wait_for(lambda: not running(docker, label), 60, "its end")


def test_compose_file_of_minichris(docker: list[str], image: str, project: dict[str, str], tmp_path: Path) -> None:
    """The image is swapped and nothing else."""
    socket, file = Path(project["DOCKER_SOCKET"]), tmp_path / "docker-compose.yml"
    text = MINICHRIS.replace("IMAGE", image).replace("JOBS", development("swarm")["PMAN_TEST_IMAGE"])
    file.write_text(text.replace("/var/run/docker.sock:", f"{socket}:", 1))
    compose = ["docker", "compose", "-f", str(file)]
    try:
        out([*compose, "up", "--detach"], env=project)
        container = healthy(docker, "com.docker.compose.service=pman")
        assert runs_as(docker, container) == ("10001", str(socket.stat().st_gid))
        volume = json.loads(out([*docker, "volume", "inspect", "minichris-files"]))[0]
        run_as_pfcon(docker, container, Path(volume["Mountpoint"]))
        out([*docker, "rm", "of-pfcon"])
    finally:
        out([*compose, "down", "--volumes"], env=project)


def test_environment_of_minichris_for_pods(
    docker: list[str], image: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is swapped and nothing else, over a Podman of its own, whose socket is as systemd makes it."""
    home = Path(tempfile.mkdtemp(prefix="pman-"))  # a short path, which a socket's must be
    try:
        with monkeypatch.context() as own:  # other engines stay where they are
            own.setenv("PMAN_DEV_HOME", str(home))
            socket = Path(development("podman")["PODMAN_DOCKER_HOST"].removeprefix("unix://"))
        socket.chmod(0o660)
        podman = ["docker", "--host", f"unix://{socket}"]
        out(["bash", "-c", f"{shlex.join([*docker, 'save', image])} | {shlex.join([*podman, 'load'])}"])
        volume = out([*podman, "volume", "create", "minichris-cube-files"]).strip()
        store = json.loads(out([*podman, "volume", "inspect", volume]))[0]["Mountpoint"]
        env = [word for setting in MINICHRIS_PODMAN.split() for word in ("--env", setting)]
        out([*podman, "run", "--detach", "--name=pman", f"--volume={socket}:/var/run/docker.sock", *env, image])
        wait_for(lambda: runs_as(podman, "pman") == ("10001", "0"), 30, "root to become pman's user")
        ask = [
            *podman,
            "exec",
            "pman",
            "python3",
            "-c",
            "import urllib.request as r; r.urlopen('http://127.0.0.1:5010/healthz')",
        ]
        wait_for(lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, 30, "pman to listen")
        run_as_pfcon(podman, "pman", Path(store))
    finally:
        out([str(ROOT / "scripts/engines/podman"), "down"], env={**os.environ, "PMAN_DEV_HOME": str(home)})
        assert not home.exists()  # it goes with what was the last in it


@pytest.mark.parametrize("option", ["", "--existing"])
def test_swarm_script_with_a_stack(
    option: str, docker: list[str], image: str, environment: dict[str, str], tmp_path: Path
) -> None:
    env = environment | ({"PMAN_DEV_HOME": str(tmp_path)} if option else {})
    shown = out(["bash", "-c", f"scripts/test_swarm.sh {option}"], cwd=ROOT, env=env)
    assert f"pman runs as a stack of {image}" in shown
    assert shown.count("ok ") == 15
    assert not out([*docker, "stack", "ls", "--format", "{{.Name}}"])
    assert not option or not (tmp_path / "swarm").exists()  # the engine itself stays, as it was


@pytest.mark.live("kubernetes")
def test_the_manifests_on_kubernetes(tmp_path: Path) -> None:
    """The commands of kustomization.yaml, in their order; kubernetes/test_deployments.py runs pman in its pod."""
    env = development("kubernetes")
    if env["PMAN_DEV_KUBERNETES_MADE_BY"] != "one-node":
        pytest.skip("a cluster that is not of these tests alone may have a namespace chris")
    (tmp_path / "kubectl").symlink_to(env["KUBECTL"])
    env = {**os.environ, **env, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    commands = re.findall(r"^#   (kubectl .*)$", (ROOT / "deploy/kubernetes/kustomization.yaml").read_text(), re.M)
    assert commands[-1] == "kubectl apply -k deploy/kubernetes"
    try:
        for command in commands:
            out(["bash", "-c", command], cwd=ROOT, env=env)
        found = out(["kubectl", "-n", "chris", "get", "deployment,role,secret", "--output=name"], env=env).split()
        names = {"deployment.apps/pman", "role.rbac.authorization.k8s.io/pman", "secret/pman"}
        assert names <= set(found)
    finally:
        out(["kubectl", "delete", "namespace", "chris", "--ignore-not-found"], env=env)
