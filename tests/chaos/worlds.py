"""A class for each backend: how it is started, which of its parts can end, and what runs there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, PIPE
from types import MappingProxyType

import docker
import psutil

from pman.backends.engine.swarm import DELETED
from tests.backends.test_local import local_rig
from tests.conftest import development
from tests.fakes import cromwell_rig
from tests.fakes.faultproxy import FaultProxy
from tests.live.engine_cases import engine_rig
from tests.live.kubernetes.cluster import kubeconfig, kubernetes_rig, namespace
from tests.live.test_slurm import open_directory, own_slurm, slurm_rig, wrapped
from tests.rig import ROOT, Rig, running, wait_for

NEIGHBOUR = "chaos-neighbour"


class World:
    """What the driver asks of a backend.

    parts: "how name" of what can be stopped and started; how: stop, or kill, without a chance to say good-bye.
    harmful: those of them that may end jobs -> words in the messages of such jobs.
    nodes: those of them without which a DELETE is a 204 although the job runs until they are back.
    calls: what kinds of requests hold, for faults of one kind.
    settle: seconds in which every job ends when all is well again. ends_later: a 204 says that the backend will end the
    job, and a POST of its jid waits for that. restamps: the backend may tell another time of an end later, and may have
    forgotten whether memory was short.
    forgets: when it is killed in the moment in which it starts a job, it may not know of that, and the job starts anew.
    """

    parts: tuple[str, ...] = ()
    harmful: Mapping[str, str] = MappingProxyType({})
    nodes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    settle = 90.0
    ends_later = restamps = forgets = False
    rig: Rig

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        """Starts what it needs, until the stack is closed; `directory` has a short path."""

    def stop(self, part: str) -> None:
        """Stop a part; returns when it is gone."""

    def start(self, part: str) -> None:
        """Start it; returns when it works."""

    def fault(self, kind: str, call: str, times: int, seconds: float) -> None:
        """From now on the next `times` calls of this kind meet a fault of plan.FAULTS; a late answer, by `seconds`."""

    def line(self, kind: str, seed: int) -> None:
        """From now on all calls meet `hang`, `refuse` or `storm` (a sixth of them is cut)."""

    def calm(self, calls: bool = True) -> None:
        """No fault of the line is left, and with `calls` none of a call."""

    def plant(self) -> None:
        """Make objects that are none of pman's, by the backend's own tool."""

    def foreign(self) -> object:
        """What is to be seen of them: equal before and after."""

    def runs(self) -> set[str]:
        """What runs or waits there beside them, in the words of the backend."""
        raise NotImplementedError


class Local(World):
    settle = 60.0

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.rig = stack.enter_context(running(local_rig(directory)))
        self.neighbour = stack.enter_context(subprocess.Popen(["sleep", "86400"], start_new_session=True))
        stack.callback(self.neighbour.kill)

    def foreign(self) -> object:
        return self.neighbour.poll()

    def runs(self) -> set[str]:
        found = psutil.process_iter(["pid", "cmdline"])
        lines = {p.pid: " ".join(p.info["cmdline"] or ()) for p in found if p.pid != os.getpid()}
        return {f"{pid} {line[-200:]}" for pid, line in lines.items() if f"{self.rig.store}/" in line}


class Proxied(World):
    """Speaks HTTP with pman, through a proxy that cuts."""

    proxy: FaultProxy
    calls: tuple[str, ...] = (" HTTP/1.1", "GET /", "POST /", "DELETE /")

    def fault(self, kind: str, call: str, times: int, seconds: float) -> None:
        self.proxy.late_seconds = seconds
        getattr(self.proxy, kind)(call.encode(), times=times)

    def line(self, kind: str, seed: int) -> None:
        if kind == "storm":
            self.proxy.cut_at_random(1 / 6, seed)
        else:
            getattr(self.proxy, kind)()

    def calm(self, calls: bool = True) -> None:
        if calls:
            self.proxy.disarm()
        self.proxy.cut_at_random(0, 0)
        self.proxy.resume()
        self.proxy.refuse()
        self.proxy.accept()


class Engine(Proxied):
    """Docker, and Podman behind the same API."""

    name = "docker"
    script = "swarm"
    parts: tuple[str, ...] = ("stop dockerd", "kill dockerd")
    harmful: Mapping[str, str] = MappingProxyType(dict.fromkeys(parts, ""))
    forgets = True
    timeout_seconds = "5"
    calls = (*Proxied.calls, "/containers/create", "/start", "/json", "/logs")

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        found = development(self.script)
        host = found["PODMAN_DOCKER_HOST" if self.script == "podman" else "DOCKER_HOST"]
        self.proxy = stack.enter_context(FaultProxy(host, f"unix://{directory}/proxy.sock"))
        rig = engine_rig(self.name, directory, host=self.proxy.url, DOCKER_TIMEOUT_SECONDS=self.timeout_seconds)
        self.rig = stack.enter_context(running(rig))
        self.api = stack.enter_context(docker.APIClient(base_url=host, timeout=120))
        self.before = {one["Id"] for one in self.api.containers()}

    def fault(self, kind: str, call: str, times: int, seconds: float) -> None:
        """A start is not made twice: an engine starts again what has ended, and HTTP forbids that proxies repeat it."""
        if kind == "twice" and call in (" HTTP/1.1", "POST /", "/start"):
            call = "/containers/create"
        super().fault(kind, call, times, seconds)

    def stop(self, part: str) -> None:
        subprocess.run([ROOT / "scripts/engines" / self.script, *part.split()], check=True, capture_output=True)

    def start(self, part: str) -> None:
        name = part.split()[1]
        subprocess.run([ROOT / "scripts/engines" / self.script, "start", name], check=True, capture_output=True)

    def plant(self) -> None:
        for state in ("runs", "waits"):
            made = self.api.create_container(self.rig.image, ["sleep", "86400"], name=f"{NEIGHBOUR}-{state}")
            if state == "runs":
                self.api.start(made)

    def foreign(self) -> object:
        found = self.api.containers(all=True, filters={"name": NEIGHBOUR})
        return sorted((one["Id"], one["Labels"].get("org.chrisproject.pman.name")) for one in found)

    def runs(self) -> set[str]:
        found = [one for one in self.api.containers() if one["Id"] not in self.before]
        return {one["Names"][0] for one in found if NEIGHBOUR not in one["Names"][0]}


class Podman(Engine):
    name = script = "podman"
    parts = ("stop podman", "kill podman")
    harmful = World.harmful
    forgets = False
    timeout_seconds = "30"  # a start takes some seconds where the machine is busy
    settle = 240.0


class Swarm(Engine):
    name = "swarm"
    restamps = True  # its worker reports what has ended anew when dockerd has been started again
    calls = (*Proxied.calls, "/services/create", "/tasks", "/services", "/logs")

    def plant(self) -> None:
        spec = {"Image": self.rig.image, "Command": ["sleep", "86400"]}
        self.api.create_service({"ContainerSpec": spec}, name=NEIGHBOUR)

    def foreign(self) -> object:
        found = self.api.services(filters={"name": NEIGHBOUR})
        return [(one["ID"], one["Version"]["Index"], one["Spec"]["Name"]) for one in found]

    def runs(self) -> set[str]:
        """A service that a DELETE has marked runs nothing, and may be left where the engine was away then."""
        names = {one["Spec"]["Name"] for one in self.api.services() if DELETED not in one["Spec"].get("Labels", {})}
        return super().runs() | names - {NEIGHBOUR}


class Kubernetes(Proxied):
    """pman speaks with `kubectl proxy`, which has pman's rights, so that the calls can be told apart.

    The Job controller makes a pod twice when the answer to its own call is lost; hence it stops before the API server.
    """

    parts = ("stop kube-apiserver", "stop kubelet", "stop kube-scheduler", "stop containerd")
    # Only what is being started: containerd breaks off, and a kubelet that stops cancels its call of containerd.
    harmful = MappingProxyType(dict.fromkeys(("stop containerd", "stop kubelet"), "The program could not be started"))
    calls = (*Proxied.calls, "/jobs?", "/pods?", "/log?")
    settle = 180.0
    ends_later = True
    bound = "kube-controller-manager"

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.cluster = stack.enter_context(namespace())
        command = [self.cluster.env["KUBECTL"], "proxy", "--port=0"]
        command.append(f"--kubeconfig={self.cluster.env['KUBECONFIG_JOB_RUNNER']}")
        process = stack.enter_context(subprocess.Popen(command, stdout=PIPE, stderr=DEVNULL, text=True))
        stack.callback(process.terminate)
        assert process.stdout is not None
        self.proxy = stack.enter_context(FaultProxy(f"tcp://{process.stdout.readline().split()[-1]}"))
        config = kubeconfig(directory / "config", self.proxy.url.replace("tcp://", "http://"), {})
        rig = kubernetes_rig(self.cluster, directory, KUBECONFIG=config, STUCK_JOB_PATIENCE_MINUTES="15")
        self.rig = stack.enter_context(running(rig))

    def stop(self, part: str) -> None:
        if "apiserver" in part:
            self.cluster.component("stop", self.bound)
        self.cluster.component("stop", part.split()[1])

    def start(self, part: str) -> None:
        self.cluster.component("start", part.split()[1])
        if "apiserver" in part:
            self.cluster.component("start", self.bound)

    def plant(self) -> None:
        self.cluster.kubectl("create", "job", NEIGHBOUR, f"--image={self.rig.image}", "--", "sleep", "86400")

    def _list(self, kind: str) -> Iterable[tuple[str, str, str]]:
        for one in self.cluster.read(kind)["items"]:
            phase = one["status"].get("phase") or ("Running" if one["status"].get("active") else "")
            yield one["metadata"]["name"], one["metadata"]["uid"], phase

    def foreign(self) -> object:
        return [(name, uid) for kind in ("jobs", "pods") for name, uid, _ in self._list(kind) if NEIGHBOUR in name]

    def runs(self) -> set[str]:
        found = [(f"{kind} {name}", phase) for kind in ("jobs", "pods") for name, _, phase in self._list(kind)]
        return {name for name, phase in found if phase in ("Running", "Pending") and NEIGHBOUR not in name}


# A command of SLURM's that meets the fault which the file of its name says, once for each of its lines.
COMMAND = r"""
name=${0##*/}
exec 8>>"$here/lock"; flock 8
kind=; late=; { read -r kind late < "$here/$name.faults" && sed -i 1d "$here/$name.faults"; } 2>/dev/null
flock -u 8; exec 8>&-
failed="$name: error:"; [ "$name" != sbatch ] || failed+=" Batch job submission failed:"
lost="$failed Unable to contact slurm controller (connect failure)"
timed_out="$failed Socket timed out on send/recv operation"
input=$(cat; echo x); run() { printf %s "${input%x}" | "$real" "$@"; }
case $kind in
cut_before) echo "$lost" >&2; exit 1 ;;
cut_within) said=$(run "$@"); printf %s "${said:0:${#said}/2}"; echo "$timed_out" >&2; exit 1 ;;
cut_after) run "$@" >/dev/null 2>&1; echo "$timed_out" >&2; exit 1 ;;
late) said=$(run "$@"); code=$?; sleep "$late"; printf '%s\n' "$said"; exit $code ;;
empty) run "$@" >/dev/null; exit 0 ;;
twice) run "$@" >/dev/null; run "$@"; exit ;;
esac
run "$@"
"""


class Slurm(World):
    """Without accounts, and squeue forgets a job two seconds after its end."""

    parts: tuple[str, ...] = ("stop slurmctld", "stop slurmd", "kill slurmd")
    calls: tuple[str, ...] = ("sbatch", "squeue", "scancel", "scontrol")
    settle = 150.0  # a job that waits for its node's daemon may begin a minute later

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.slurm = stack.enter_context(own_slurm())
        self.bin = open_directory("") / "bin"
        for name in self.calls:
            path = wrapped(self.bin, name, COMMAND)
        rig = slurm_rig(directory, self.slurm.environment, PATH=path, SLURM_TIMEOUT_SECONDS="5")
        self.rig = stack.enter_context(running(rig))

    def stop(self, part: str) -> None:
        self.slurm.dev(*part.split())

    def start(self, part: str) -> None:
        self.slurm.dev("start", part.split()[1])

    def fault(self, kind: str, call: str, times: int, seconds: float) -> None:
        with (self.bin / f"{call}.faults").open("a") as file:
            file.write(f"{kind} {seconds:.1f}\n" * times)

    def line(self, kind: str, seed: int) -> None:
        what = {"hang": "late", "refuse": "cut_before", "storm": "cut_after"}[kind]
        for call in self.calls:
            self.fault(what, call, 6, 10)

    def calm(self, calls: bool = True) -> None:
        for call in self.calls:
            (self.bin / f"{call}.faults").write_text("")

    def plant(self) -> None:
        user = ["runuser", "-u", self.rig.user, "--"] if self.rig.user else []
        env = f"SLURM_CONF={self.slurm.environment['SLURM_CONF']}"
        script = [f"--job-name={NEIGHBOUR}", "--time=600", "--output=/dev/null", "--wrap=sleep 86400"]
        self.slurm.command(*user, "env", env, "sbatch", "--chdir=/tmp", "--mem=10", *script)
        wait_for(lambda: " RUNNING " in str(self.foreign()), 30, "the neighbour to run")

    def _queue(self) -> list[str]:
        return self.slurm.command("squeue", "--all", "-h", "-t", "R,PD,S,CG", "-o", "%A %T %j").splitlines()

    def foreign(self) -> object:
        return [line for line in self._queue() if line.endswith(f" {NEIGHBOUR}")]

    def runs(self) -> set[str]:
        return {line for line in self._queue() if not line.endswith(f" {NEIGHBOUR}")}


class Cromwell(Proxied, Slurm):
    """The project's stand-in with the reference configuration, over a SLURM of its own."""

    parts = ("stop cromwell", "kill cromwell", "stop slurmctld", "stop slurmd", "kill slurmd")
    nodes = ("stop slurmd", "kill slurmd")
    calls = (*Proxied.calls, "POST /api/workflows/v1 ", "/metadata", "/abort", "/query", "/labels")

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.slurm = stack.enter_context(own_slurm())
        reached = cromwell_rig.Slurm(self.slurm.environment)
        quick = {"PMAN_RC_WAIT": "2", "PMAN_ALIVE_CHECK": "1"}
        self.server = stack.enter_context(cromwell_rig.cromwell(directory / "engine", reached, "bubblewrap", **quick))
        self.proxy = stack.enter_context(FaultProxy(f"tcp://127.0.0.1:{self.server.port}"))
        url = self.proxy.url.replace("tcp:", "http:")
        self.rig = stack.enter_context(cromwell_rig.rig_over(self.server, directory, url))
        self.rig.env["CROMWELL_TIMEOUT_SECONDS"] = "5"

    def stop(self, part: str) -> None:
        how, name = part.split()
        getattr(self.server, how)() if name == "cromwell" else super().stop(part)

    def start(self, part: str) -> None:
        self.server.start() if part.endswith("cromwell") else super().start(part)


WORLDS: dict[str, type[World]] = {
    "local": Local, "slurm": Slurm, "cromwell": Cromwell, "docker": Engine, "podman": Podman, "swarm": Swarm,
    "kubernetes": Kubernetes,
}  # fmt: skip
