"""Which WSGI server: waitress or granian, over the same application, in turns. `pip install granian` first.

    python bench/server.py [ROUNDS]

Each round starts each server once over the embedded backend with one finished job, and measures start to first 200,
resident memory of the process tree, GETs a second from 16 connections, and the slowest of 20 GETs while 40 half-open
connections and 20 bodies of 10 MB dribbled at 1 kB/s are there. Prints medians of the rounds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parent.parent
FACTORY = """
from pman.service import app
from pman import settings
application = app.create_app(settings.load())
"""
GETS, CONNECTIONS = 2000, 16


def command(server: str, port: int) -> list[str]:
    if server == "waitress":
        return [sys.executable, "-m", "pman", "serve"]
    return [
        sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1", "--port", str(port),
        "--blocking-threads", "16", "--no-ws", "factory:application",
    ]  # fmt: skip


def main(rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {"waitress": [], "granian": []}
    for _ in range(rounds):
        for server, measured in results.items():
            with tempfile.TemporaryDirectory() as home:
                measured.append(measure(server, Path(home)))
    for server, measured in results.items():
        medians = {name: statistics.median(m[name] for m in measured) for name in measured[0]}
        print(server, json.dumps({name: round(value, 3) for name, value in medians.items()}))


def measure(server: str, home: Path) -> dict[str, float]:
    (home / "factory.py").write_text(FACTORY)
    (home / "store").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{home}:{os.environ.get('PYTHONPATH', '')}",
        "SECRET_KEY": "a key for the benchmark",
        "PORT": str(port),
    }
    env |= {"STOREBASE": str(home / "store"), "LOCAL_STATE_DIR": str(home / "state"), "LOG_LEVEL": "WARNING"}
    began = time.monotonic()
    process = subprocess.Popen(
        command(server, port), env=env, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        first = until_answered(url, process)
        submit(url)
        figures = {"start_s": first - began, "gets_per_s": throughput(url), "rss_mib": memory_mib(process.pid)}
        return figures | {"worst_get_beside_slow_clients_ms": beside_slow_clients(port, url)}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def until_answered(url: str, process: subprocess.Popen[bytes]) -> float:
    while True:
        assert process.poll() is None, "the server ended"
        try:
            if requests.get(f"{url}/healthz", timeout=5).status_code == 200:
                return time.monotonic()
        except requests.ConnectionError:
            time.sleep(0.005)


def submit(url: str) -> None:
    request = json.loads((ROOT / "examples/four-workers.json").read_text())
    requests.post(f"{url}/api/v1/", json=request, timeout=30).raise_for_status()
    while not re.match("finished", requests.get(f"{url}/api/v1/{request['jid']}/", timeout=30).json()["status"]):
        time.sleep(0.05)


def throughput(url: str) -> float:
    def some(_: int) -> None:
        with requests.Session() as session:
            for _ in range(GETS // CONNECTIONS):
                session.get(f"{url}/api/v1/chris-jid-3/", timeout=60).raise_for_status()

    began = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(some, range(CONNECTIONS)))
    return GETS / (time.monotonic() - began)


def memory_mib(pid: int) -> float:
    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20


def beside_slow_clients(port: int, url: str) -> float:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for connection in idle:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.1):
            for connection in slow:
                try:
                    connection.sendall(b"x" * 100)
                except OSError:
                    return

    thread = threading.Thread(target=dribble)
    thread.start()
    worst = 0.0
    try:
        for _ in range(20):
            began = time.monotonic()
            try:
                requests.get(f"{url}/api/v1/chris-jid-3/", timeout=10)
            except requests.Timeout:
                return float("inf")
            worst = max(worst, time.monotonic() - began)
        return worst * 1000
    finally:
        stop.set()
        thread.join()
        for connection in idle + slow:
            connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
