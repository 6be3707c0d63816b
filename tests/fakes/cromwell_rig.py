"""pman, Cromwell's stand-in and a real SLURM, as processes of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import development
from tests.rig import ROOT, Rig, running, wait_for

CONF = ROOT / "deploy" / "cromwell" / "slurm.conf"
IMAGE = "pman/busybox:1"


@dataclass(frozen=True)
class Slurm:
    """A SLURM of scripts/engines/slurm.

    env: what reaches it. prefix: runs the command that follows it where SLURM is, Cromwell too. user: who owns what
    Cromwell and pman write, where `prefix` makes that another user than this process's.
    """

    env: dict[str, str]
    prefix: tuple[str, ...] = ()
    user: str = ""

    def directory(self, path: Path) -> Path:
        """The same directory, made so that Cromwell or pman may write into it."""
        path.mkdir(parents=True, exist_ok=True)
        if self.user:
            shutil.chown(path, self.user, self.user)
        return path

    def run(self, *command: str) -> str:
        """What a SLURM command prints."""
        env = {**os.environ, **self.env}
        return subprocess.run([*self.prefix, *command], env=env, check=True, capture_output=True, text=True).stdout

    def jobs(self, jid: str, states: str = "all") -> list[str]:
        """Ids of the jobs of `jid` that SLURM remembers; the reference configuration makes the jid their comment."""
        lines = self.run("squeue", "-a", "-h", "-t", states, "-o", "%i %k").splitlines()
        return [line.split(" ", 1)[0] for line in lines if line.split(" ", 1)[1:] == [jid]]

    def daemon(self, action: str, name: str) -> None:
        """`stop` or `start` one of its daemons."""
        self.run(str(ROOT / "scripts" / "engines" / "slurm"), action, name)


def shared_slurm() -> Slurm:
    """The SLURM that every live suite uses. It is started unless it runs."""
    return Slurm(development("slurm"))


@contextmanager
def own_slurm(*prefix: str) -> Iterator[Slurm]:
    """A SLURM of the test's own, whose daemons may be stopped. prefix: see Slurm."""
    with tempfile.TemporaryDirectory(prefix="pman-slurm-") as home:  # short: SLURM's sockets have long names
        script, env = str(ROOT / "scripts" / "engines" / "slurm"), {"PMAN_DEV_HOME": home}
        slurm = Slurm({**development("slurm"), **env}, prefix)
        slurm.run(script, "up")
        lines = slurm.run(script, "env").splitlines()
        words = [word for line in lines for word in shlex.split(line)[1:]]
        try:
            yield Slurm(env | dict(word.split("=", 1) for word in words), prefix)
        finally:
            slurm.run(script, "down")


@dataclass
class Cromwell:
    """`python -m tests.fakes.cromwell` over SLURM. Its workflows and its port outlive a restart."""

    root: Path
    slurm: Slurm
    container: str  # PMAN_CONTAINER of the reference configuration
    options: tuple[str, ...] = ("--pace", "test")
    port: int = 0
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def executions(self) -> Path:
        return self.root / "executions"

    def start(self) -> None:
        self.slurm.directory(self.root)
        log = self.root / "cromwell.log"
        log.write_bytes(b"")
        env = {**os.environ, **self.slurm.env, **self.env, "PMAN_CONTAINER": self.container}
        command = [sys.executable, "-m", "tests.fakes.cromwell", "--conf", str(CONF), "--root", str(self.root)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.slurm.prefix, *command, "--port", str(self.port), *self.options],
                cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        self.process = process

        def port() -> int:
            assert process.poll() is None, log.read_text()
            found = re.search(r"serves http://127\.0\.0\.1:(\d+)", log.read_text())
            return int(found[1]) if found else 0

        self.port = wait_for(port, 30, "Cromwell to listen")

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)  # it waits for its commands, and scancel for half a minute where slurmctld is away

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def image_storage(directory: Path) -> Path:
    """A Charliecloud storage directory with the image IMAGE, made of the image directory of scripts/engines/slurm."""
    image = directory / "img" / IMAGE.replace("/", "%").replace(":", "+")
    shutil.copytree(development("slurm")["PMAN_TEST_IMAGE_DIR"], image, symlinks=True)
    return directory


@contextmanager
def cromwell(root: Path, slurm: Slurm, container: str, *options: str, **env: str) -> Iterator[Cromwell]:
    """A stand-in that runs. options, env: its own; without them it has its quick pace for tests."""
    server = Cromwell(root, slurm, container, options or ("--pace", "test"), env=env)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def rig_over(server: Cromwell, directory: Path, url: str | None = None) -> Iterator[Rig]:
    """Rig of pman over this Cromwell, or over what stands before it at `url`."""
    slurm, logs = server.slurm, directory / "logs"
    logs.mkdir()
    env = {
        "CONTAINER_ENV": "cromwell",
        "CROMWELL_URL": url or server.url,
        "CROMWELL_EXECUTION_ROOT_MAP": f"{server.executions}={server.executions}",
        "TIMELIMIT_MINUTES": "10",
        "PMAN_DEV_HOME": slurm.env["PMAN_DEV_HOME"],  # for `prefix`
    }
    store, read_only_input = slurm.directory(directory / "store"), server.container == "bubblewrap"
    with running(
        Rig(env, store, IMAGE, logs, read_only_input=read_only_input, user=slurm.user, prefix=slurm.prefix)
    ) as rig:
        yield rig
