"""POST, GET and DELETE over Swarm and Docker, each beside the same operation made with the docker SDK's own client.

    DOCKER_HOST=unix:///... PMAN_TEST_IMAGE=... python bench/swarm.py [JOBS] [swarm|docker ...]

`eval "$(scripts/engines/swarm env)"` sets both. Alternates within one run; prints medians in ms, the quartiles of the
differences of pairs, and GETs a second of 32 clients over one pman. A call of /healthz, which asks no engine, is what
HTTP between this script's client and pman costs: it is part of every difference.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import requests
import yaml
from engine import address

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, SECONDS = 32, 8.0  # at most; a run of few jobs is a short one
Timed = dict[str, list[float]]


def main(jobs: int, names: list[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            config = {
                "CONTAINER_ENV": name,
                "STOREBASE": f"{directory}/store",
                "SECRET_KEY": "x" * 20,
                "PORT": "0",
                "DOCKER_HOST": os.environ["DOCKER_HOST"],
                "LOG_LEVEL": "WARNING",
            }
            spent = latencies(name, config, jobs) | deletions(name, config, max(2, jobs // 5))
            for operation in ("POST", "GET", "DELETE", "DELETE of a running job"):
                both = spent[operation], spent[f"{operation} by the SDK"]
                ours, theirs = map(statistics.median, both)
                low, middle, high = statistics.quantiles([a - b for a, b in zip(*both, strict=True)], n=4)
                print(
                    f"{name}: {operation} {ours:7.2f} ms, by the SDK {theirs:7.2f} ms; pairs differ by "
                    f"{middle:+.2f} ms ({low:+.2f} to {high:+.2f})"
                )
            print(f"{name}: /healthz {statistics.median(spent['healthz']):.2f} ms")
            rate = throughput(config, min(SECONDS, jobs))
            print(f"{name}: {rate:.0f} GETs a second, {CLIENTS} clients")


@contextmanager
def served(config: dict[str, str]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pman", "serve"], cwd=ROOT,
            env={**os.environ, **config, "LOG_LEVEL": "INFO"}, stderr=log,
        )  # fmt: skip
        try:
            yield f"{address(Path(log.name))}/api/v1/"
        finally:
            process.terminate()
            process.wait(20)


def latencies(name: str, config: dict[str, str], jobs: int) -> Timed:
    """Milliseconds of each call, pman's and the SDK's in turns."""
    spent: Timed = {}
    made = settings.load(config)
    client = docker.APIClient(base_url=config["DOCKER_HOST"])
    theirs: Any = (Swarm if name == "swarm" else Container)(client)
    with served(config) as url, requests.Session() as http:
        for number in range(jobs):
            body, other = (request(f"bench-{side}-{number}", Path(config["STOREBASE"])) for side in ("http", "sdk"))
            job = make_job(validate(other), made)
            spec = yaml.safe_load(Renderer(made, TARGETS).render(job, name).text)
            jid = str(body["jid"])
            calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
                "POST": (
                    lambda body=body: http.post(url, json=body).raise_for_status(),  # type: ignore[misc]
                    lambda job=job, spec=spec: theirs.post(job.name, spec),  # type: ignore[misc]
                ),
                "GET": (
                    lambda jid=jid: http.get(f"{url}{jid}/").raise_for_status(),  # type: ignore[misc]
                    lambda job=job: theirs.get(job.name),  # type: ignore[misc]
                ),
                "DELETE": (
                    lambda jid=jid: http.delete(f"{url}{jid}/").raise_for_status(),  # type: ignore[misc]
                    lambda job=job: theirs.delete(job.name),  # type: ignore[misc]
                ),
            }
            timed(spent, "healthz", lambda: http.get(url.replace("api/v1/", "healthz")).raise_for_status())
            for operation, pair in calls.items():
                # each is first in half of the rounds: what an engine does after a call slows down the next one
                sides = [(operation, pair[0]), (f"{operation} by the SDK", pair[1])]
                for label, call in sides if number % 2 else reversed(sides):
                    timed(spent, label, call)
                while operation == "POST" and not (
                    "finished" in http.get(f"{url}{jid}/").text and theirs.over(job.name)
                ):
                    time.sleep(0.05)
    return spent


def deletions(name: str, config: dict[str, str], jobs: int) -> Timed:
    """Milliseconds until nothing of a running job that obeys no SIGTERM writes any more, in turns as above."""
    spent: Timed = {}
    client = docker.APIClient(base_url=config["DOCKER_HOST"])
    theirs: Any = (Swarm if name == "swarm" else Container)(client)
    with served(config) as url:
        for number in range(2 * jobs):
            jid = f"bench-run-{number}"
            body = request(jid, Path(config["STOREBASE"])) | {
                "entrypoint": ["sleep", "600"],
                "append_directories": False,
            }
            requests.post(url, json=body, timeout=60).raise_for_status()
            while requests.get(f"{url}{jid}/", timeout=60).json()["status"] != "started":
                time.sleep(0.05)
            time.sleep(0.5)
            if number % 2:
                timed(spent, "DELETE of a running job", lambda jid=jid: requests.delete(f"{url}{jid}/", timeout=60))  # type: ignore[misc]
            else:
                timed(spent, "DELETE of a running job by the SDK", lambda jid=jid: theirs.end(jid))  # type: ignore[misc]
    return spent


def timed(spent: Timed, name: str, call: Callable[[], object]) -> None:
    began = time.perf_counter()
    call()
    spent.setdefault(name, []).append((time.perf_counter() - began) * 1000)


def request(jid: str, store: Path) -> dict[str, Any]:
    for name in ("incoming", "outgoing"):
        (store / f"key-{jid}" / name).mkdir(parents=True, exist_ok=True)
    return {
        "jid": jid, "args": [], "auid": "bench", "number_of_workers": 1, "cpu_limit": 100, "memory_limit": 64,
        "gpu_limit": 0, "image": os.environ["PMAN_TEST_IMAGE"], "entrypoint": ["echo"], "type": "fs",
    }  # fmt: skip


class Swarm:
    """What the operations of pman come down to, made with the SDK's methods."""

    def __init__(self, client: docker.APIClient) -> None:
        self.client = client

    def post(self, name: str, spec: dict[str, Any]) -> None:
        self.client.create_service(spec["TaskTemplate"], name=name, labels=spec["Labels"], mode=spec["Mode"])

    def get(self, name: str) -> str:
        service = self.client.inspect_service(name)
        task = self.client.tasks(filters={"service": service["ID"]})[0]
        container = task["Status"]["ContainerStatus"]["ContainerID"]
        self.client.logs(container, tail=1000)
        return str(task["Status"]["State"])

    def over(self, name: str) -> bool:
        tasks = self.client.tasks(filters={"service": name})
        return bool(tasks) and tasks[0]["Status"]["State"] == "complete"

    def delete(self, name: str) -> None:
        """Without looking, as pman does, whether anything still runs: that is for finished jobs only."""
        service = self.client.inspect_service(name)
        self.client.remove_service(service["ID"])
        self.client.tasks(filters={"label": f"org.chrisproject.pman.name={name}"})

    def end(self, name: str) -> None:
        self.client.remove_service(name)
        label = {"label": f"org.chrisproject.pman.name={name}"}
        while any(task["Status"]["State"] in ("starting", "running") for task in self.client.tasks(filters=label)):
            time.sleep(0.005)


class Container(Swarm):
    def post(self, name: str, spec: dict[str, Any]) -> None:
        """The three calls of `containers.run(detach=True)`, by which pman 6 posts."""
        made = self.client.create_container_from_config(spec, name)
        self.client.inspect_container(made["Id"])
        self.client.start(made["Id"])

    def get(self, name: str) -> str:
        found = self.client.inspect_container(name)
        self.client.logs(found["Id"], tail=1000)
        return str(found["State"]["Status"])

    def over(self, name: str) -> bool:
        return str(self.client.inspect_container(name)["State"]["Status"]) == "exited"

    def delete(self, name: str) -> None:
        found = self.client.containers(all=True, filters={"label": f"org.chrisproject.pman.name={name}"})
        self.client.remove_container(found[0]["Id"], force=True, v=True)
        self.client.containers(all=True, filters={"label": f"org.chrisproject.pman.name={name}"})

    def end(self, name: str) -> None:
        self.client.remove_container(name, force=True, v=True)


def throughput(config: dict[str, str], seconds: float) -> float:
    """GETs of one finished job a second, by clients that keep their connections."""
    jid = "bench-many"
    with served(config) as url:
        requests.post(url, json=request(jid, Path(config["STOREBASE"])), timeout=60).raise_for_status()
        while "finished" not in requests.get(f"{url}{jid}/", timeout=60).text:
            time.sleep(0.05)
        until = time.monotonic() + seconds

        def client(_: int) -> int:
            count = 0
            with requests.Session() as http:
                while time.monotonic() < until:
                    http.get(f"{url}{jid}/", timeout=60).raise_for_status()
                    count += 1
            return count

        with ThreadPoolExecutor(CLIENTS) as pool:
            total = sum(pool.map(client, range(CLIENTS)))
        requests.delete(f"{url}{jid}/", timeout=60).raise_for_status()
    return total / seconds


if __name__ == "__main__":
    words = sys.argv[1:]
    main(int(words[0]) if words else 25, words[1:] or ["swarm", "docker"])
