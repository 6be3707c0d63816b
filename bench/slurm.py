"""pman on SLURM beside bare sbatch and squeue, with thousands of jobs in the queue, and beside Cromwell's way.

    python bench/slurm.py [ROUNDS] [JOBS_IN_QUEUE]

Brings up a SLURM of its own and takes it down again. The jobs of the queue are sent to a partition that is down, so
that the machine has nothing else to do. Cromwell is the project's stand-in with deploy/cromwell/slurm.conf.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fakes import cromwell_rig
from tests.live.test_slurm import Slurm, open_directory, ordinary, own_slurm, slurm_rig, wrapped
from tests.rig import Rig, Server, running

THREADS = 8
SUBMITTED = 1000  # at most; fewer if the queue is to hold fewer
COMPARED = 40


def main(rounds: int, queued: int) -> None:
    with own_slurm() as slurm:
        os.environ["SLURM_CONF"] = slurm.environment["SLURM_CONF"]
        place = open_directory(ordinary(slurm.environment))
        with running(slurm_rig(place, slurm.environment)) as rig:
            beside_cromwell(slurm, rig, place)
            counted = rig.start(PATH=wrapped(place / "bin", "squeue", 'echo x >> "$here/calls"; exec $real "$@"'))
            beside_sbatch(counted, rig, rounds)
            many(counted, rig, queued)
            polls(counted, place / "bin" / "calls", rounds)


def beside_sbatch(server: Server, rig: Rig, rounds: int) -> None:
    script = next(Path(rig.env["SLURM_STATE_DIR"]).glob("*/job.sh")).read_text()
    session, pman, bare = requests.Session(), [], []
    for number in range(rounds):
        request = rig.request(f"beside-{number}", "true", partition="down")
        bare.append(milliseconds(lambda: sbatch(script)))
        pman.append(milliseconds(lambda r=request: created(session.post(f"{server.url}/api/v1/", json=r))))  # type: ignore[misc]
    added = [p - b for p, b in zip(pman, bare, strict=True)]
    show("POST", pman)
    show("bare sbatch", bare)
    show("pman adds", added)


def sbatch(script: str) -> None:
    words = ["sbatch", "--parsable", "--partition=down", "--output=/dev/null", "--job-name=bare"]
    subprocess.run(words, input=script, text=True, check=True, capture_output=True)


def many(server: Server, rig: Rig, queued: int) -> None:
    """SUBMITTED jobs by THREADS clients, then as many more as make `queued`."""
    timed = min(SUBMITTED, queued)
    numbers = itertools.count()

    def post(_: int) -> None:
        created(server.post(rig.request(f"many-{next(numbers)}", "true", partition="down")))

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        list(pool.map(post, range(timed)))
        seconds = time.perf_counter() - began
        print(f"{timed} jobs by {THREADS} clients: {seconds:.1f} s, {timed / seconds:.0f} a second")
        list(pool.map(post, range(queued - timed)))
    waiting = subprocess.run(["squeue", "--all", "-h", "-o", "%A"], check=True, capture_output=True, text=True).stdout
    print(f"in the queue: {len(waiting.splitlines())}")


def polls(server: Server, calls: Path, rounds: int) -> None:
    squeue = ["squeue", "--all", "--noheader", "--states=all", "--format=%A|%T|%e|%j|%r"]
    bare = [milliseconds(lambda: subprocess.run(squeue, check=True, capture_output=True)) for _ in range(10)]
    show("bare squeue of all", bare)
    session = requests.Session()
    one = [milliseconds(lambda n=n: session.get(f"{server.url}/api/v1/many-{n}/")) for n in range(rounds)]  # type: ignore[misc]
    show("GET, one client", one)
    calls.write_text("")
    began = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        codes = set(pool.map(lambda n: server.get(f"many-{n}").status_code, range(200)))
    seconds, made = time.perf_counter() - began, len(calls.read_text().splitlines())
    print(f"200 GETs by 32 clients: {seconds:.1f} s, answers {codes}, {made} calls of squeue")
    show("listing of the newest jobs", [milliseconds(lambda: server.call("GET", "jobs/")) for _ in range(5)])


def beside_cromwell(slurm: Slurm, rig: Rig, place: Path) -> None:
    """COMPARED jobs that do nothing, from the first POST to the last end."""
    server = rig.start()
    print(f"{COMPARED} jobs, sbatch: {until_all_ended(server, rig):.1f} s from the first POST to the last end")
    (place / "rig").mkdir()
    same = cromwell_rig.Slurm(slurm.environment)
    with (
        cromwell_rig.cromwell(place / "cromwell", same, "bubblewrap", "--pace", "quick") as engine,
        cromwell_rig.rig_over(engine, place / "rig") as other,
    ):
        seconds = until_all_ended(other.start(), other)
    print(f"{COMPARED} jobs, Cromwell: {seconds:.1f} s")


def until_all_ended(server: Server, rig: Rig) -> float:
    began = time.perf_counter()
    for number in range(COMPARED):
        created(server.post(rig.request(f"compared-{number}", "true", time_limit_minutes=5)))
    for number in range(COMPARED):
        assert server.wait_final(f"compared-{number}", 300)["status"] == "finishedSuccessfully"
    return time.perf_counter() - began


def created(answer: requests.Response) -> None:
    assert answer.status_code == 201, answer.text


def milliseconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def show(name: str, values: list[float]) -> None:
    worst = sorted(values)[int(len(values) * 0.95)]
    print(f"{name:28} {statistics.median(values):7.1f} ms   (95 of 100 within {worst:.1f} ms)")


if __name__ == "__main__":
    arguments = [int(word) for word in sys.argv[1:]]
    main(*(arguments + [100, 5000][len(arguments) :]))
