"""What tests of any backend need: real `pman serve` processes, requests as pfcon makes them, waiting for conditions."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import requests

T = TypeVar("T")
FINAL = ("finishedSuccessfully", "finishedWithError")
# Begin a command that is to get SIGINT with these words. A shell without job control lets programs in the background
# ignore it.
HEEDING_INTERRUPTS = ("env", "--default-signal=INT")
ROOT = Path(__file__).resolve().parent.parent
_serial = itertools.count(1)


def wait_for(condition: Callable[[], T | None], seconds: float, what: str, every: float = 0.05) -> T:
    """The first true value of `condition()`. Fails the test with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"gave up after {seconds} s waiting for {what}"
        time.sleep(every)
    return value


def with_memory(make: Callable[[], T]) -> tuple[T, float, float]:
    """What `make()` returns, and how many KiB of Python's memory are held by then, and were held at most."""
    tracemalloc.start()
    try:
        made = make()
        kept, most = tracemalloc.get_traced_memory()
        return made, kept / 1024, most / 1024
    finally:
        tracemalloc.stop()


@dataclass
class Server:
    """A `pman serve` process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def call(self, method: str, path: str = "", **kwargs: Any) -> requests.Response:
        """One request over a connection of its own, below /api/v1/, as pfcon makes them."""
        return requests.request(method, f"{self.url}/api/v1/{path}", timeout=100, **kwargs)

    def post(self, request: dict[str, Any]) -> requests.Response:
        return self.call("POST", json=request)

    def get(self, jid: str, **params: Any) -> requests.Response:
        return self.call("GET", f"{jid}/", params=params)

    def delete(self, jid: str) -> requests.Response:
        return self.call("DELETE", f"{jid}/")

    def wait_final(self, jid: str, seconds: float = 60) -> dict[str, str]:
        """The job JSON in its final state. Every answer on the way must be a 200 with a known, non-final state."""

        def final() -> dict[str, str] | None:
            answer = self.get(jid)
            assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
            job: dict[str, str] = answer.json()
            assert job["status"] in (*FINAL, "notstarted", "started"), job
            return job if job["status"] in FINAL else None

        return wait_for(final, seconds, f"the end of {jid}", every=0.1)

    def wait_state(self, jid: str, state: str, seconds: float = 60) -> dict[str, str]:
        def reached() -> dict[str, str] | None:
            job: dict[str, str] = self.get(jid).json()
            return job if job.get("status") == state else None

        return wait_for(reached, seconds, f"{jid} to be {state}")

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Rig:
    """How to start pman over one backend, and what that backend's jobs see.

    env: pman's environment variables for this backend. store: STOREBASE, as this process sees it. image: an image
    with a POSIX sh. read_only_input: the backend keeps jobs from writing into their input. workers: it runs several
    workers a job. job_seconds: the longest that a job which does next to nothing may take from POST to its end.
    user: who runs the jobs and owns what is in the store, where that is not this process's user; prefix: a command that
    runs the command that follows it as that user.
    unknown: what the backend cannot know of a job, where docs/usage.md has no column for it.
    """

    env: dict[str, str]
    store: Path
    image: str
    logs: Path
    read_only_input: bool = True
    workers: bool = True
    job_seconds: float = 60
    user: str = ""
    prefix: tuple[str, ...] = ()
    unknown: frozenset[str] | None = None
    servers: list[Server] = field(default_factory=list)

    def start(self, *prefix: str, **env: str) -> Server:
        """A new pman process, once it answers; `prefix` is a command that runs the command that follows it."""
        log = self.logs / f"pman-{next(_serial)}.log"
        inherited = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "SLURM_CONF", "KUBECONFIG")}
        defaults = {"SECRET_KEY": "a secret key for tests", "PORT": "0", "STOREBASE": str(self.store)}
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [*prefix, *self.prefix, sys.executable, "-m", "pman", "serve"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                env={**inherited, "PYTHONPATH": str(ROOT), **defaults, **self.env, **env},
            )  # fmt: skip

        def address() -> str:
            assert process.poll() is None, log.read_text()
            found = re.search(r"listening on (http://[\w.:\[\]]+)", log.read_text())
            return found[1] if found else ""

        server = Server("", process, log)
        self.servers.append(server)
        server.url = wait_for(address, 30, "pman to listen")
        return server

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def request(self, jid: str, script: str, *args: str, **fields: Any) -> dict[str, Any]:
        """A request of type fs that runs `sh -c script sh ARGS... OUTGOING`, with its directories in the store."""
        directories = {name: f"{jid_dir(jid)}/{name}" for name in ("incoming", "outgoing")}
        for path in directories.values():
            (self.store / path).mkdir(parents=True, exist_ok=True)
            for made in (self.store / path, (self.store / path).parent) if self.user else ():
                shutil.chown(made, self.user, self.user)
        return {
            "jid": jid, "args": list(args), "args_path_flags": [], "auid": "tester", "number_of_workers": 1,
            "cpu_limit": 100, "memory_limit": 64, "gpu_limit": 0,
            "image": self.image, "entrypoint": ["sh", "-c", script, "sh"], "type": "fs", "env": [],
            "input_dir": directories["incoming"], "output_dir": directories["outgoing"],
        } | fields  # fmt: skip

    def outgoing(self, jid: str) -> Path:
        return self.store / jid_dir(jid) / "outgoing"

    def executions(self, jid: str) -> int:
        """How often a job with COUNTED in its script has begun."""
        runs = self.outgoing(jid) / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0


# The last argument of a job of type fs is its output directory.
OUT = "for out; do :; done; "
COUNTED = OUT + 'echo run >> "$out/runs"; '


def jid_dir(jid: str) -> str:
    return "key-" + re.sub(r"[^A-Za-z0-9._-]", "_", jid)[:100]


@contextmanager
def running(rig: Rig) -> Iterator[Rig]:
    """The rig; every pman that was started over it is stopped at the end."""
    try:
        yield rig
    finally:
        rig.stop()
