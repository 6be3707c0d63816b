"""deploy/compose.slurm.yml as it stands, over a real SLURM: its services as processes, without an engine or images.

Each service gets a root directory with Python, a shell and the few programs of a small image. Of everything else it
sees what the file mounts there. Its environment, user, working directory, address and port are the file's, too.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.fakes.cromwell_rig import Slurm, own_slurm
from tests.live.images import START_CROMWELL, libraries, make_root, out
from tests.rig import FINAL, OUT, ROOT, Rig, Server, wait_for

pytestmark = pytest.mark.live("slurm")
FILE = ROOT / "deploy/compose.slurm.yml"
Service = dict[str, Any]

# Its arguments: root directory, an empty directory, UID:GID, working directory, "ro" or "rw" for the root, then
# source, target and mode of each mount, "--" and a command.
ENTER = """
set -e
image=$1 place=$2 user=$3 directory=$4 root_mode=$5
shift 5
mount -t tmpfs tmpfs "$place"
mkdir "$place"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=$image,upperdir=$place/upper,workdir=$place/work" "$place/root"
cd "$place/root"
mount --rbind /dev dev
mount -t proc proc proc
while [ "$1" != -- ]; do
    if [ "$3" = tmpfs ] || [ -d "$1" ]; then mkdir -p ".$2"; else mkdir -p ".${2%/*}"; touch ".$2"; fi
    case $3 in
        tmpfs) mount -t tmpfs -o mode=1777 tmpfs ".$2" ;;
        *) mount --bind "$1" ".$2"; mount -o "remount,bind,$3" ".$2" ;;
    esac
    shift 3
done
shift
mkdir -p ".$directory"
mount -o "remount,$root_mode" "$place/root"
exec chroot --userspec="$user" --groups= . env -C "$directory" "$@"
"""


@dataclass(frozen=True)
class Image:
    """A small one: what it has besides make_root()'s programs (source and place), its environment and its command."""

    contents: dict[Path, str]
    environment: dict[str, str]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """A machine that can call sbatch: what of it the file's bind mounts name, and what an operator sets there."""

    slurm: Slurm
    root: Path  # of make_root()
    places: dict[str, str]  # a path on such a machine -> where it is here
    settings: dict[str, str]
    images: dict[str, Image]

    def filled_in(self, text: str) -> str:
        """As Compose does it, but for a variable that is neither set nor has a default, which it takes for empty."""

        def value(found: re.Match[str]) -> str:
            name, kind, default = found.groups()
            assert name in self.settings or kind == ":-", f"{name} is not set"
            return self.settings.get(name) or default

        return re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)

    def mounts(self, service: Service) -> Iterator[str]:
        """Source, target and mode of each, a directory before what is mounted in it, as Docker sorts them."""
        for volume in sorted(service["volumes"], key=lambda volume: str(volume["target"])):
            if volume["type"] == "tmpfs":
                yield from ("tmpfs", volume["target"], "tmpfs")
                continue
            path = self.filled_in(volume["source"])
            source = self.places.get(path, str(FILE.parent / path))
            assert Path(source).exists(), f"bind source path does not exist: {path}"
            yield from (source, self.filled_in(volume["target"]), "ro" if volume.get("read_only") else "rw")

    @contextmanager
    def run(self, name: str, services: dict[str, Service]) -> Iterator[subprocess.Popen[bytes]]:
        """This service of the file as a process."""
        service, image = services[name], self.images[name]
        environment = image.environment | {k: self.filled_in(str(v)) for k, v in service["environment"].items()}
        with tempfile.TemporaryDirectory() as scratch:
            hosts, log = Path(scratch, "hosts"), Path(scratch, "log")
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address(host)} {host}\n" for host in services))
            Path(scratch, "place").mkdir()
            words = [str(self.root), f"{scratch}/place", self.filled_in(service["user"])]
            words += [service.get("working_dir", "/"), "ro" if service.get("read_only") else "rw"]
            for source, target in {hosts: "/etc/hosts", **image.contents}.items():
                words += [str(source), target, "ro"]
            words += [*self.mounts(service), "--", "env", "-i", *(f"{k}={v}" for k, v in environment.items())]
            enter = [*self.slurm.prefix, "unshare", "--mount", "--propagation=private", "--", "bash", "-c", ENTER]
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [*enter, "enter", *words, *image.command, *service.get("command", [])],
                    stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                )  # fmt: skip
            try:
                yield process
            except Exception as error:
                error.add_note(f"{name}: {log.read_text()[-3000:]}")
                raise
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:  # it waits for an sbatch that looks for its configuration
                    process.kill()
                    process.wait()


def address(service: str) -> str:
    return {"cromwell": "192.0.2.1", "pman": "192.0.2.2"}[service]


def in_network_of(process: int) -> None:
    """Let this thread speak over the network of the process."""
    clone_newnet = 0x40000000
    descriptor = os.open(f"/proc/{process}/ns/net", os.O_RDONLY)
    failed = ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet)
    os.close(descriptor)
    assert not failed, os.strerror(ctypes.get_errno())


@pytest.fixture(scope="module")
def network() -> Iterator[int]:
    """A process with a network of its own, in which every address of 192.0.2.0/24 is this machine's."""
    if os.environ.get("CI") != "true" and os.geteuid():
        pytest.skip("needs root")
    up = "hostname localhost; ip link set lo up && ip addr add 192.0.2.254/24 dev lo && echo up && exec sleep infinity"
    with subprocess.Popen(["unshare", "--net", "--uts", "sh", "-c", up], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        yield process.pid
        process.kill()


def images(root: Path) -> dict[str, Image]:
    """pman as the Dockerfile makes it, and Cromwell's stand-in."""
    packages = {Path(sysconfig.get_path("purelib")): "/packages"}
    lines = re.findall(r"^ENV ((?:.|\\\n)*?[^\\])$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
    words = [word for line in lines for word in shlex.split(line.replace("\\\n", " "))]
    python = {"PYTHONPATH": "/app:/packages", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    dockerfile = dict(word.split("=", 1) for word in words) | python
    (root / "start").write_text(START_CROMWELL)
    (root / "start").chmod(0o755)
    fakes = {ROOT / "tests/__init__.py": "/app/tests/__init__.py", ROOT / "tests/fakes": "/app/tests/fakes"}
    mine = {ROOT / "pman": "/app/pman", ROOT / "templates": "/app/templates"}
    return {
        "pman": Image(packages | mine, dockerfile, ("python3", "-m", "pman", "serve")),
        "cromwell": Image(packages | fakes, python, ("/start",)),
    }


def add_slurm(slurm: Slurm, prefix: Path, root: Path) -> None:
    """SLURM's commands into the directory `prefix`. Debian's plugins and libraries are in none of SLURM's own: they are
    copied into the root directory."""
    (prefix / "bin").mkdir(parents=True)
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        shutil.copy2(found := str(shutil.which(name)), prefix / "bin")
    plugins = Path(re.findall(r"PluginDir *= (\S+)", slurm.run("scontrol", "show", "config"))[0])
    shutil.copytree(plugins, root / plugins.relative_to("/"))
    for path in libraries(found).union(*(libraries(str(plugin)) for plugin in plugins.glob("*.so"))):
        if "libmunge" not in path:
            (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, root / path.lstrip("/"))


@pytest.fixture(scope="module")
def node(network: int) -> Iterator[Node]:
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp", prefix="pman-node-") as place,
        own_slurm("nsenter", "--target", str(network), "--net", "--uts", "--") as slurm,
    ):
        directory, user = Path(place), slurm.env["PMAN_TEST_USER"]
        directory.chmod(0o755)
        ids = [out(["id", option, user]).strip() for option in ("-u", "-g")]
        settings = {"SECRET_KEY": "a secret key for tests", "PMAN_CONTAINER": "bubblewrap", "TIMELIMIT_MINUTES": "7"}
        settings |= {"PMAN_SLURM_USER": ":".join(ids), "PMAN_TEMPLATES": f"{place}/templates"}
        for variable in ("STOREBASE", "PMAN_CROMWELL_ROOT", "PMAN_CROMWELL_DATABASE"):
            settings[variable] = f"{place}/{variable}"
            (directory / variable).mkdir()
            shutil.chown(directory / variable, user, user)
        (directory / "templates/wdl").mkdir(parents=True)
        (directory / "templates/wdl/job.wdl.j2").write_text(
            '{% extends "shipped/wdl/job.wdl.j2" %}\n{% block prologue %}\necho from the site\n{% endblock %}\n'
        )
        make_root(directory / "root")
        (directory / "root/etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        settings["SLURM_PREFIX"] = f"{place}/slurm"
        add_slurm(slurm, directory / "slurm", directory / "root")
        text = Path(slurm.env["SLURM_CONF"]).read_text()
        ((line, socket),) = re.findall(r"^(AuthInfo=socket=(\S+))$", text, re.M)
        text = text.replace(line, f"AuthInfo=socket=/run/munge/{Path(socket).name}")
        (directory / "conf").mkdir()
        # a user that the image does not know, as on real clusters
        (directory / "conf/slurm.conf").write_text(re.sub(r"^SlurmUser=.*", "SlurmUser=slurm", text, flags=re.M))
        places = {path: path for path in ("/etc/passwd", "/etc/group")}
        places |= {"/etc/slurm": f"{place}/conf", "/run/munge": str(Path(socket).parent)}
        yield Node(slurm, directory / "root", places, settings, images(directory / "root"))


def services() -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(FILE.read_text())["services"]
    return found


def rehearse(node: Node, network: int, described: dict[str, Service]) -> None:
    """Start what the file describes, and run jobs over it whose every part needs what the file gives."""
    ((_, port),) = (published.rsplit(":", 1) for published in described["pman"]["ports"])
    assert described["pman"]["depends_on"] == ["cromwell"]
    with (
        node.run("cromwell", described) as cromwell,
        node.run("pman", described) as pman,
        ThreadPoolExecutor(1, initializer=in_network_of, initargs=(network,)) as inside,
    ):
        server = Server(f"http://{address('pman')}:{port}", pman, Path())

        def ready() -> bool:
            assert (cromwell.poll(), pman.poll()) == (None, None)
            try:
                return inside.submit(server.call, "GET", "../../readyz").result().status_code == 200
            except requests.ConnectionError:
                return False

        wait_for(ready, 60, "pman and Cromwell to be ready", every=0.2)
        inside.submit(run_jobs, node, server).result()


def run_jobs(node: Node, server: Server) -> None:
    store, user = Path(node.settings["STOREBASE"]), node.slurm.env["PMAN_TEST_USER"]
    rig = Rig({}, store, "localhost/none:1", store, user=user)
    jid = f"rehearsal-{os.urandom(4).hex()}"
    script = OUT + 'cat "$1/in.txt"; id -un; echo made > "$out/made"; [ ! -e "$1/wait" ] || sleep 300'
    request = rig.request(jid, script, type="ds", input_dir=f"feeds/\u00fc/{jid}", output_dir=f"new/\u00fc/{jid}")
    (store / request["input_dir"]).mkdir(parents=True)
    (store / request["input_dir"] / "in.txt").write_text("pixels\n")
    assert server.post(request).status_code == 201

    def ended() -> dict[str, str] | None:
        job: dict[str, str] = server.get(jid).json()
        assert "SLURM does not take the job now" not in job["message"], job
        return job if job["status"] in FINAL else None

    job = wait_for(ended, 30, "the end of the job", every=0.1)
    assert job["status"] == "finishedSuccessfully", job
    assert job["logs"] == f"from the site\npixels\n{user}\n"
    assert (store / request["output_dir"] / "made").owner() == user
    limits = node.slurm.run("squeue", "-h", "-t", "all", "-o", "%k %u %l").splitlines()
    assert f"{jid} {user} {node.settings['TIMELIMIT_MINUTES']}:00" in limits
    assert server.delete(jid).status_code == 204
    (store / request["input_dir"] / "wait").touch()
    assert server.post(request).status_code == 201
    wait_for(lambda: node.slurm.jobs(jid, "RUNNING"), 30, "the job to run")
    assert server.delete(jid).status_code == 204
    wait_for(lambda: not node.slurm.jobs(jid, "PENDING,RUNNING,COMPLETING"), 30, "SLURM to be done with the job")


def test_the_file_as_it_stands(node: Node, network: int) -> None:
    rehearse(node, network, services())


# Of each kind one, since each takes seconds. PMAN_TEST_FAULTS=all is each mount missing, and each variable misspelt.
FAULTS = [("cromwell", "volumes", "/etc/passwd"), ("pman", "environment", "CROMWELL_URL")]
UNSEEN = {
    "/etc/group",  # numbers do, where a user is in one group
    "/tmp",  # pman writes there under gunicorn only
    "SLURM_CONF",  # Debian's SLURM looks there by itself
}


def faults() -> list[tuple[str, str, str]]:
    """Service, kind and what is missing or misspelt."""
    if os.environ.get("PMAN_TEST_FAULTS") != "all":
        return FAULTS
    volumes = [(name, "volumes", str(v["target"])) for name, service in services().items() for v in service["volumes"]]
    variables = [(name, "environment", v) for name, service in services().items() for v in service["environment"]]
    return [fault for fault in volumes + variables if fault[2] not in UNSEEN]


@pytest.mark.parametrize(("name", "kind", "what"), faults())
def test_a_fault_in_the_file_is_seen(node: Node, network: int, name: str, kind: str, what: str) -> None:
    described = services()
    service = described[name]
    if kind == "volumes":
        service["volumes"] = [volume for volume in service["volumes"] if volume["target"] != what]
    else:
        service["environment"][f"{what}S"] = service["environment"].pop(what)
    with pytest.raises(AssertionError):
        rehearse(node, network, described)
