"""Each backend with 10 to 20,000 jobs, polled as ChRIS polls: times, processor time, memory, calls of the backend.

    python bench/scale.py [--backend NAME]... [--jobs N]... [--replicas N]... [--seconds S] [--quick] [--page FILE]
    python bench/scale.py --day SHARE [--seconds S] [--page FILE]
    python bench/scale.py --page FILE --chaos REPORT...

ChRIS asks for every job every 10 s; MOST GETs a second are made at most, so that beyond 1,000 jobs each is asked for
more seldom, and LEAST at least. Then, for half of the time, POSTS new jobs are posted a second besides. Jobs do not
change meanwhile. The local backend is the real one. `slurm` has commands that answer after the time that real ones
take; `slurm-lab` is a real SLURM, which the script brings up and takes down. The others are tests/fakes/crowd.py.
Prints a table in Markdown; `--page` puts it into a file between the lines `<!-- scale -->` and `<!-- end of scale -->`.

Then, or with `--day` alone, it runs a part of CLUSTERS Kubernetes clusters that get JOBS_A_DAY jobs between them, a
pman each, for some seconds in the midst of such a day: each job lives for JOB_SECONDS, is polled, and is deleted at its
end. Whoever posts chooses the cluster. `--page` puts this between `<!-- day -->` and `<!-- end of day -->`.

`--chaos` measures nothing: it puts reports of scripts/chaos between `<!-- chaos -->` and `<!-- end of chaos -->`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fakes import crowd_rig
from tests.fakes.crowd import FIRST, KINDS, jid_of
from tests.live.test_slurm import open_directory, ordinary, own_slurm, slurm_rig
from tests.rig import Rig, Server, running

SIZES = (10, 100, 1000, 5000, 20000)
LAB_MOST = 5000  # jobs; a SLURM takes 10,000 where nobody has set MaxJobCount
POLL_SECONDS = 10.0
LEAST, MOST, POSTS = 10.0, 100.0, 4.0  # calls a second
CLIENTS = 16
CLUSTERS, JOBS_A_DAY, JOB_SECONDS = 100, 1_000_000, 600.0
LISTINGS = 1
# What SLURM's commands took on a real SLURM (bench/README.md): squeue 6 ms and 5 us for each job, sbatch 4 ms.
COMMANDS = {
    "squeue": 'echo x >> "$here/calls"; sleep $(cat "$here/seconds"); case "$*" in '
    '*--jobs=*) for w; do case $w in --jobs=*) grep "^${w#--jobs=}|" "$here/rows";; esac; done;; '
    '*) cat "$here/rows";; esac',
    "sbatch": 'echo x >> "$here/calls"; n=$(date +%s%N); cat > /dev/null; for w; do case $w in --job-name=*) '
    'echo "$n|PENDING|N/A|N/A|Resources|${w#*=}" >> "$here/rows";; esac; done; echo $n',
    "sacct": 'echo x >> "$here/calls"',
    "scancel": 'echo x >> "$here/calls"',
}
HEAD = (
    "backend", "jobs", "pmans", "GETs a second", "GET, ms: median, p99", "of it the backend's", "POST, ms: median, p99",
    "calls a GET", "calls a second", "CPU of pman a GET, ms", "memory, MiB", "listing, s", "memory after it, MiB",
)  # fmt: skip


@dataclass
class World:
    """A backend with jobs. calls(): how many calls came so far, and the seconds that their answers took."""

    rig: Rig
    copy: Any = lambda _: None  # makes the other jobs when the first one was posted
    calls: Any = lambda: (0, 0.0)


@contextmanager
def world(backend: str, jobs: int, place: Path) -> Iterator[World]:
    with ExitStack() as stack:
        make = {"local": local, "slurm": slurm, "slurm-lab": lab}.get(backend, crowd)
        found = stack.enter_context(make(backend, jobs, place))
        stack.enter_context(running(found.rig))
        yield found


def rig_at(place: Path, **env: str) -> Rig:
    (place / "store").mkdir()
    return Rig({"STOREBASE": str(place / "store"), **env}, place / "store", "localhost/none:1", place)


@contextmanager
def crowd(backend: str, jobs: int, place: Path) -> Iterator[World]:
    with crowd_rig.serving(backend, jobs) as address:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "k", "cluster": {"server": f"http://{address}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        }  # fmt: skip
        (place / "kubeconfig").write_text(yaml.safe_dump(config))
        env = {"CONTAINER_ENV": backend, "DOCKER_HOST": f"tcp://{address}", "KUBECONFIG": str(place / "kubeconfig")}
        env |= {"CROMWELL_URL": f"http://{address}", "TIMELIMIT_MINUTES": "60"} if backend == "cromwell" else {}

        def calls() -> tuple[int, float]:
            made, seconds = crowd_rig.counts(address)
            return made.total(), seconds

        yield World(rig_at(place, **env), calls=calls)


@contextmanager
def slurm(_: str, jobs: int, place: Path) -> Iterator[World]:
    commands = place / "bin"
    commands.mkdir()
    for name, script in COMMANDS.items():
        (commands / name).write_text(f'#!/bin/sh\nhere="{commands}"\n{script}\n')
        (commands / name).chmod(0o755)
    rows, counted = commands / "rows", commands / "calls"
    seconds = 0.006 + 5e-6 * jobs
    (commands / "seconds").write_text(str(seconds))
    for file in (rows, counted):
        file.touch()
    state = place / "state"
    env = {"SLURM_STATE_DIR": str(state), "SLURM_RUNTIME": "bubblewrap", "PATH": f"{commands}:{os.environ['PATH']}"}

    def copy(numbers: range) -> None:
        lines = []
        for number, jid, token in copies(state, numbers):
            (state / jid / "slurm_id").write_text(str(number))
            name = "RUNNING" if number % 10 in (7, 8) else "PENDING"
            if name == "RUNNING":
                (state / jid / f"attempt.{token}").rename(state / jid / f"claim.{number}")
            elif number % 10 == 9:
                (state / jid / "rc").write_text("0 \n")
            lines.append(f"{number}|{name}|N/A|N/A|Resources|{jid}.{token}\n")
        rows.write_text(rows.read_text() + "".join(lines))

    def calls() -> tuple[int, float]:
        made = counted.read_text().count("\n")
        return made, made * seconds

    yield World(rig_at(place, CONTAINER_ENV="slurm", **env), copy, calls)


@contextmanager
def lab(_: str, __: int, ___: Path) -> Iterator[World]:
    """Jobs of a partition that is down, so that the machine has nothing else to do."""
    with own_slurm() as real:
        rig = slurm_rig(open_directory(ordinary(real.environment)), real.environment)

        def copy(numbers: range) -> None:
            requests = [rig.request(jid_of(number), "true", partition="down") for number in numbers]
            with ThreadPoolExecutor(8) as pool:
                assert {answer.status_code for answer in pool.map(rig.servers[0].post, requests)} <= {201}

        yield World(rig, copy)


@contextmanager
def local(_: str, __: int, place: Path) -> Iterator[World]:
    """One process runs, and every copy of its job calls it its own."""
    state = place / "state"

    def copy(numbers: range) -> None:
        for number, jid, token in copies(state, numbers, lambda token: token):
            if number % 10 == 9:
                (state / jid / "rc").write_text("0 \n")
                (state / jid / f"ended.{token}").touch()

    yield World(rig_at(place, CONTAINER_ENV="local", LOCAL_STATE_DIR=str(state)), copy)


def copies(state: Path, numbers: range, token_of: Any = lambda _: f"{random.getrandbits(64):016x}") -> Iterator[Any]:
    """Copy the directory of the first job under other names: number, jid and token of each."""
    record = json.loads((state / FIRST / "job.json").read_text())
    for number in numbers:
        jid, token = jid_of(number), token_of(record["token"])
        shutil.copytree(state / FIRST, state / jid, ignore=shutil.ignore_patterns(".*"), copy_function=os.link)
        (state / jid / "job.json").unlink()
        (state / jid / "job.json").write_text(json.dumps(record | {"jid": jid, "token": token}))
        if (attempt := state / jid / f"attempt.{record['token']}").exists():
            attempt.rename(attempt.with_name(f"attempt.{token}"))
        yield number, jid, token


def call(method: str, url: str, path: str, body: bytes = b"") -> tuple[float, int, bytes]:
    """Seconds, status and body of a call over a connection of its own, as pfcon makes them, with little work here."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    began = time.perf_counter()
    with socket.create_connection((host, int(port)), timeout=100) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while not _is_whole(received) and (data := connection.recv(1 << 20)):
            received += data
    return time.perf_counter() - began, int(received.split(b" ", 2)[1]), received.partition(b"\r\n\r\n")[2]


def _is_whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end and length and len(body) >= int(length[1]))


def paced(calls: Iterable[tuple[float, Callable[[], None]]]) -> None:
    """Make the calls, each when it is due: so many seconds after the begin. CLIENTS of them at most run at once."""
    left, lock, begin = iter(calls), threading.Lock(), time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                due, make = next(left, (0.0, None))
            if make is None:
                return
            time.sleep(max(0.0, begin + due - time.perf_counter()))
            make()

    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(work) for _ in range(CLIENTS)]:
            done.result()


@dataclass
class Load:
    """GETs of all jobs in turn and POSTs of new ones, at fixed rates. Times in seconds."""

    world: World
    servers: list[Server]
    jobs: int
    gets: list[float] = field(default_factory=list)
    posts: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float, posts: float = 0.0) -> None:
        order = random.Random(20).sample(range(self.jobs), self.jobs)
        rate = min(MOST, max(LEAST, self.jobs / POLL_SECONDS))
        request = self.world.rig.request("post", "true", partition=self._partition())
        bodies = (json.dumps(request | {"jid": f"post-{n}"}).encode() for n in itertools.count())
        calls = [(n / rate, "GET", f"/api/v1/{jid_of(order[n % self.jobs])}/") for n in range(int(rate * seconds))]
        calls += [(n / posts, "POST", "/api/v1/") for n in range(int(posts * seconds))]

        def ask(number: int, method: str, path: str) -> None:
            with self.lock:
                body = next(bodies) if method == "POST" else b""
            seconds, status, said = call(method, self.servers[number % len(self.servers)].url, path, body)
            assert status in (200, 201), (method, path, status, said)
            (self.gets if method == "GET" else self.posts).append(seconds)

        paced((due, partial(ask, number, *what)) for number, (due, *what) in enumerate(sorted(calls)))

    def _partition(self) -> str | None:
        return "down" if self.world.rig.prefix else None


def measured(backend: str, jobs: int, replicas: int, seconds: float) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="pman-scale-") as directory, world(backend, jobs, Path(directory)) as found:
        servers = [found.rig.start() for _ in range(replicas)]
        first = found.rig.request(FIRST, "sleep 600", **({"partition": "down"} if found.rig.prefix else {}))
        assert servers[0].post(first).status_code == 201
        if backend == "local":
            servers[0].wait_state(FIRST, "started")
        found.copy(range(1, jobs))
        try:
            processes = [pman_of(server) for server in servers]
            Load(found, servers, jobs).run(1.0)
            load, beside = Load(found, servers, jobs), Load(found, servers, jobs)
            before, cpu, began = found.calls(), cpu_seconds(processes), time.perf_counter()
            load.run(seconds)
            took, used, after = time.perf_counter() - began, cpu_seconds(processes) - cpu, found.calls()
            made, waited = after[0] - before[0], after[1] - before[1]
            beside.run(seconds / 2, POSTS)
            memory = peak_mib(processes)
            listings = [call("GET", servers[0].url, "/api/v1/jobs/?limit=100")[0] for _ in range(LISTINGS)]
            return [
                backend, f"{jobs:,}", str(replicas), f"{len(load.gets) / took:.1f}", spread(load.gets),
                f"{waited / len(load.gets) * 1000:.1f}" if made else "-", spread(beside.posts),
                f"{made / len(load.gets):.2f}" if made else "-", f"{made / took:.1f}" if made else "-",
                f"{used / len(load.gets) * 1000:.1f}", f"{memory:.0f}", f"{statistics.median(listings):.2f}",
                f"{peak_mib(processes):.0f}",
            ]  # fmt: skip
        finally:
            if backend == "local":
                servers[0].delete(FIRST)


@dataclass
class Cluster:
    """One of the clusters of a day. live: the jids of its jobs, in the order in which they are polled."""

    world: World
    server: Server
    live: deque[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: set[str] = field(default_factory=set)

    def ask(self, method: str, times: dict[str, list[float]]) -> None:
        """Post a new job, poll the next one, or end and delete the oldest."""
        with self.lock:
            jid, body = self.live[0], b""
            if method == "POST":
                jid = f"post-{next(self.numbers)}"
                body = json.dumps(self.world.rig.request("post", "true") | {"jid": jid}).encode()
            elif method == "DELETE":
                jid = min(self.live)
                self.live.remove(jid)
                self.ended.add(jid)
            self.live.rotate(-1)
        seconds, status, said = call(method, self.server.url, f"/api/v1/{jid}/" if not body else "/api/v1/", body)
        gone = method == "GET" and status == 404 and jid in self.ended
        assert gone or status == {"GET": 200, "POST": 201, "DELETE": 204}[method], (method, jid, status, said)
        times[method].append(seconds)
        if method == "POST":
            self.live.append(jid)


def day(share: float, seconds: float) -> list[str]:
    """Lines of a table about some of the clusters."""
    rate = JOBS_A_DAY / 86400 / CLUSTERS  # new jobs a second, of one cluster
    live, count = round(rate * JOB_SECONDS), max(1, round(CLUSTERS * share))
    with tempfile.TemporaryDirectory(prefix="pman-scale-") as directory, ExitStack() as stack:
        clusters = []
        for number in range(count):
            place = Path(directory, str(number))
            place.mkdir()
            found = stack.enter_context(world("kubernetes", live, place))
            server = found.rig.start()
            assert server.post(found.rig.request(FIRST, "sleep 600")).status_code == 201
            clusters.append(Cluster(found, server, deque(map(jid_of, range(live)))))
        times: dict[str, list[float]] = {"GET": [], "POST": [], "DELETE": []}
        rates = {"GET": live / POLL_SECONDS, "POST": rate, "DELETE": rate}
        due = [
            ((n + shift) / each, partial(cluster.ask, method, times))
            for shift, cluster in zip(itertools.count(0, 1 / count), clusters, strict=False)
            for method, each in rates.items()
            for n in range(max(1, round(each * seconds)))
        ]
        processes = [pman_of(cluster.server) for cluster in clusters]
        made, cpu, began = sum(c.world.calls()[0] for c in clusters), cpu_seconds(processes), time.perf_counter()
        paced(sorted(due, key=lambda one: one[0]))
        took, used = time.perf_counter() - began, cpu_seconds(processes) - cpu
        made, memory = sum(c.world.calls()[0] for c in clusters) - made, peak_mib(processes)
    of_a_job = used / (rate * took * count)
    rows = {
        "clusters that ran, each with a pman": f"{count} of {CLUSTERS}, for {took:.0f} s",
        "jobs under way in each": str(live),
        "a second, in all: GETs, POSTs, DELETEs": ", ".join(f"{len(values) / took:.1f}" for values in times.values()),
        **{f"{method}, ms: median, p99": spread(values) for method, values in times.items()},
        "calls of a cluster's API a second": f"{made / took / count:.1f}",
        "processor time of pman a job, s": f"{of_a_job:.2f}",
        f"cores for {JOBS_A_DAY:,} jobs a day": f"{of_a_job * JOBS_A_DAY / 86400:.1f}",
        "memory of a pman, MiB": f"{memory:.0f}",
        f"memory of {CLUSTERS} pmans, GiB": f"{memory * CLUSTERS / 1024:.1f}",
    }
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def pman_of(server: Server) -> psutil.Process:
    """The process that listens: `server.process` may be a command that runs it as another user."""
    root = psutil.Process(server.process.pid)
    return next(p for p in [root, *root.children(recursive=True)] if p.cmdline()[1:] == ["-m", "pman", "serve"])


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def peak_mib(processes: list[psutil.Process]) -> float:
    """The most that one of the processes has had in memory so far."""
    texts = (Path(f"/proc/{process.pid}/status").read_text() for process in processes)
    return max(int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) / 1024 for text in texts)


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1000:.1f}, {ordered[int(len(ordered) * 0.99)] * 1000:.1f}"


def machine() -> str:
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    memory = psutil.virtual_memory().total / 2**30
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{when}, {os.cpu_count()} virtual cores, {memory:.0f} GiB, Python {platform.python_version()}, load {load}"


def put_into(page: Path, name: str, text: str) -> None:
    """In place of what stands there between the two lines that name it."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.read_text().partition(begin)
    assert end in rest, f"{page} has no place for {name}"
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def chaos(reports: Iterable[Path]) -> list[str]:
    """Lines of a table about runs of scripts/chaos."""
    heads = "backend, seed, minutes, date (UTC), load, jobs, runs of workers, what was done to it, answers, findings"
    lines = ["| " + heads.replace(", ", " | ") + " |", "|---" * (heads.count(", ") + 1) + "|"]
    for told in (json.loads(report.read_text()) for report in reports):
        counted = (sorted(told[key].items()) for key in ("events", "answers"))
        events, answers = (", ".join(f"{name} {number}" for name, number in items) for items in counted)
        cells = [*(told[name] for name in ("backend", "seed", "minutes", "date", "load", "jobs", "executions"))]
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join([*cells, events, answers, str(len(told["findings"]))]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backends = ["local", "slurm", "slurm-lab", *KINDS]
    parser.add_argument("--backend", action="append", choices=backends, help="default: all but slurm-lab")
    parser.add_argument("--jobs", action="append", type=int, help=f"default: {', '.join(map(str, SIZES))}")
    parser.add_argument("--replicas", action="append", type=int, help="default: 1 and 4")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row, or of the day")
    parser.add_argument("--day", type=float, metavar="SHARE", help="run this part of many clusters, and no table")
    parser.add_argument("--quick", action="store_true", help="100 jobs, one replica, 2 s of each backend")
    parser.add_argument("--page", type=Path, help="a file with the two lines between which the table is put")
    parser.add_argument("--chaos", type=Path, nargs="+", metavar="REPORT", help="put these reports into the page")
    given = parser.parse_args()
    if given.chaos:
        assert given.page, "--chaos needs --page"
        put_into(given.page, "chaos", "\n".join([*chaos(given.chaos), ""]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    sizes, replicas, seconds = given.jobs or SIZES, given.replicas or [1, 4], given.seconds
    if given.quick:
        sizes, replicas, seconds = [100], [1], 2.0
    chosen = given.backend or [one for one in backends if one != "slurm-lab"]
    parts = {"scale": lambda: table(chosen, sizes, replicas, seconds), "day": lambda: day(given.day or 0.1, seconds)}
    for name in ["day"] if given.day else ["scale"] if given.quick or given.backend else parts:
        said = f"`{' '.join(['python', 'bench/scale.py', *sys.argv[1:]])}`, begun {machine()}:"
        print(said, flush=True)
        lines = parts[name]()
        if given.page:
            put_into(given.page, name, "\n".join([said, "", *lines, ""]))
        print(*(lines if name == "day" else ()), f"ended {machine()}", sep="\n", flush=True)


def table(backends: Iterable[str], sizes: Iterable[int], replicas: Iterable[int], seconds: float) -> list[str]:
    """Lines of the table, which are printed as they come."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    print(*lines, sep="\n", flush=True)
    for backend, jobs, count in itertools.product(backends, sizes, replicas):
        if backend != "slurm-lab" or jobs <= LAB_MOST:
            lines.append("| " + " | ".join(measured(backend, jobs, count, seconds)) + " |")
            print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
