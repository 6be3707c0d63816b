"""What pman's POST, GET and DELETE take above the same calls of the bare, pooled Kubernetes client, in pairs.

    eval "$(scripts/engines/kubernetes env)"; python bench/kubernetes_calls.py [PAIRS [CHECKOUT]]

CHECKOUT: a directory with another commit of pman, which is then measured in place of the bare client.

Jobs of POST and DELETE select a node that does not exist, so that no container disturbs the measurement; the GET is of
one finished job with its log (Job, list of pods, log). DELETE is measured of a job that pman was asked about before, as
pfcon does, and of one that it was not. pman is asked over HTTP on one connection. Within a pair the order changes from
pair to pair, and before each call the cluster has QUIET_SECONDS to deal with the one before: its controllers act on
every Job. Prints medians and quartiles of the differences, what one HTTP call costs that asks Kubernetes nothing
(/healthz, in the same rounds), and what importing the client costs.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import requests
import yaml
from kubernetes import client, config

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer

ROOT = Path(__file__).resolve().parent.parent
QUIET_SECONDS = 0.1
Call = Callable[[], object]
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


class Pair:
    """pman and the bare client, over the same namespace."""

    def __init__(self, namespace: str, home: Path) -> None:
        self.namespace = namespace
        config.load_kube_config()
        self.batch, self.core = client.BatchV1Api(), client.CoreV1Api()
        self.core.create_namespace({"metadata": {"name": namespace}})
        self.request = json.loads((ROOT / "examples/copy-and-hash.json").read_text())
        self.request |= {"image": os.environ["PMAN_TEST_IMAGE"], "type": "fs", "cpu_limit": 100, "memory_limit": 64}
        self.given = {
            "CONTAINER_ENV": "kubernetes", "JOB_NAMESPACE": namespace, "STOREBASE": str(home / "store"),
            "NODE_SELECTOR": "pman-bench=nowhere", "SECRET_KEY": "a key for the benchmark", "PORT": "0",
        }  # fmt: skip
        (home / "store").mkdir()
        self.session = requests.Session()
        self.beside = ""  # address of another pman, in place of the bare client
        self.renderer = Renderer(settings.load(self.given), TARGETS)

    def serve(self, log: Path, root: Path = ROOT, **extra: str) -> tuple[subprocess.Popen[bytes], str, float]:
        """A pman process, its address, and the seconds from its start to its first answer."""
        began = time.monotonic()
        with log.open("wb") as stream:
            env = {**os.environ, **self.given, **extra, "PYTHONPATH": str(root)}
            process = subprocess.Popen([sys.executable, "-m", "pman", "serve"], env=env, cwd=root, stderr=stream)
        while not (found := re.search(r"listening on (http://[\w.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        return process, f"{found[1]}/api/v1/", time.monotonic() - began

    def body(self, jid: str) -> dict[str, object]:
        job = make_job(validate(self.request | {"jid": jid}), settings.load(self.given))
        document: dict[str, object] = yaml.safe_load(self.renderer.render(job, "k8s").text)
        return document

    def finished(self, home: Path) -> str:
        """The jid of a job that has run."""
        jid = "bench-finished"
        process, url, _ = self.serve(home / "log", NODE_SELECTOR="")
        wanted = self.request | {"jid": jid, "entrypoint": ["sh", "-c", "seq 1 100"], "args": []}
        requests.post(url, json=wanted, timeout=60).raise_for_status()
        while not requests.get(f"{url}{jid}/", timeout=60).json()["status"].startswith("finished"):
            time.sleep(0.2)
        process.terminate()
        process.wait()
        return jid

    def bare_get(self, jid: str) -> None:
        job = self.batch.read_namespaced_job(jid, self.namespace)
        selector = f"batch.kubernetes.io/controller-uid={job.metadata.uid}"
        for pod in self.core.list_namespaced_pod(self.namespace, label_selector=selector).items:
            self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace, container="job", tail_lines=1000)

    def bare_delete(self, jid: str) -> None:
        self.batch.delete_namespaced_job(jid, self.namespace, body={"propagationPolicy": "Foreground"})

    def bare_post(self, body: dict[str, object]) -> None:
        self.batch.create_namespaced_job(self.namespace, body, field_validation="Strict")  # as pman does

    def other(self, method: str, jid: str) -> Call:
        """The same call by the bare client, or of the other pman."""
        if self.beside:
            return partial(self.ask, self.beside, method, jid)
        if method == "POST":
            return partial(self.bare_post, self.body(jid))
        return partial(self.bare_get if method == "GET" else self.bare_delete, jid)

    def ask(self, url: str, method: str, jid: str) -> None:
        if method == "POST":
            self.pman(method, url, json=self.request | {"jid": jid})
        else:
            self.pman(method, f"{url}{jid}/")

    def pman(self, method: str, address: str, **kwargs: object) -> None:
        self.session.request(method, address, timeout=60, **kwargs).raise_for_status()  # type: ignore[arg-type]


def main(pairs: int, checkout: Path | None = None) -> None:
    for name in ("urllib3", "kubernetes.config", "kubernetes.client"):
        done = subprocess.run([sys.executable, "-c", IMPORT.format(name)], capture_output=True, text=True, check=True)
        print(f"import {name:24} {float(done.stdout):7.3f} s")
    namespace = f"pman-bench-{uuid.uuid4().hex[:6]}"
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        pair = Pair(namespace, home)
        try:
            if checkout:
                other, pair.beside, _ = pair.serve(home / "log-beside", checkout.resolve())
            measure(pair, home, pairs)
        finally:
            pair.core.delete_namespace(namespace)
            if pair.beside:
                other.terminate()


def measure(pair: Pair, home: Path, pairs: int) -> None:
    done = pair.finished(home)
    process, url, seconds = pair.serve(home / "log")
    try:
        print(f"start to first answer           {seconds:7.3f} s")
        figures: dict[str, list[tuple[float, float]]] = {}
        http: list[float] = []
        for number in range(pairs):
            for name, ours, other in one_round(pair, url, done, number):
                if name == "DELETE":
                    pair.ask(url, "GET", f"seen-{number}")
                    if pair.beside:
                        pair.other("GET", f"bare-seen-{number}")()
                figures.setdefault(name, []).append(timed(ours, other, swapped=number % 2 == 1))
            http.append(milliseconds(lambda: pair.pman("GET", url.replace("api/v1/", "healthz"))))
        print(f"resident memory                 {psutil.Process(process.pid).memory_info().rss / 2**20:7.1f} MiB")
        for name, pairs_of_ms in figures.items():
            report(name, pairs_of_ms, "other" if pair.beside else "bare")
        print(f"of which HTTP alone {statistics.median(http):5.1f} ms")
    finally:
        process.terminate()
        process.wait()


def one_round(pair: Pair, url: str, done: str, number: int) -> Iterator[tuple[str, Call, Call]]:
    """Names, pman's calls and the other ones."""
    yield "GET", partial(pair.ask, url, "GET", done), pair.other("GET", done)
    for name, jid in (("DELETE", f"seen-{number}"), ("DELETE, unseen", f"unseen-{number}")):
        yield "POST", partial(pair.ask, url, "POST", jid), pair.other("POST", f"bare-{jid}")
        yield name, partial(pair.ask, url, "DELETE", jid), pair.other("DELETE", f"bare-{jid}")


def timed(ours: Call, other: Call, swapped: bool) -> tuple[float, float]:
    """Milliseconds of pman's call and of the other one."""
    if swapped:
        later = milliseconds(other)
        return milliseconds(ours), later
    return milliseconds(ours), milliseconds(other)


def milliseconds(call: Call) -> float:
    time.sleep(QUIET_SECONDS)
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def report(name: str, pairs: list[tuple[float, float]], what: str) -> None:
    ours, other = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    low, middle, high = statistics.quantiles([a - b for a, b in pairs], n=4)
    print(f"{name:14} pman {ours:6.1f} ms, {what} {other:6.1f} ms; above it {middle:5.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, *map(Path, sys.argv[2:3]))
