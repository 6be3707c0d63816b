"""Serve pman with the embedded backend over a temporary store and run examples/*.json through it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

from pman.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
MARKS = {"notstarted": ".", "started": ">"}
NEXT = """
These jobs ran as commands of this machine: the `local` backend uses no image. What to do next:

    scripts/dev                                       # serve pman on http://127.0.0.1:5010, over this machine
    . .venv/bin/activate                              # in another terminal: make `pman` a command of its shell
    pman run docker.io/library/busybox -- echo hello  # run a job; http://127.0.0.1:5010/ shows all of them

`scripts/dev --on slurm` does the same over a real scheduler; docs/usage.md says more."""
http = requests.Session()
http.trust_env = False  # a proxy does not know what is on 127.0.0.1


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pman-quickstart-") as directory:
        home = Path(directory)
        settings = {
            "SECRET_KEY": "only for the quick start", "PORT": "0", "STOREBASE": str(home / "store"),
            "LOCAL_STATE_DIR": str(home / "state"), "TIMELIMIT_MINUTES": "5",
        }  # fmt: skip
        (home / "store").mkdir()
        server = serve(settings, home / "pman.log")
        try:
            url = address(server, home / "pman.log")
            code = max(run(path, url, settings, home / "store") for path in sorted((ROOT / "examples").glob("*.json")))
            print(NEXT)
            return code
        except KeyboardInterrupt:
            print("\nstopped")
            return 130
        finally:
            server.terminate()
            server.wait(10)


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with these settings of pman and no others."""
    return {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields} | settings


def serve(settings: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A pman process, out of reach of the terminal's Ctrl-C."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "pman", "serve"], cwd=ROOT, stderr=stream, env=environment(settings),
            start_new_session=True,
        )  # fmt: skip


def address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it does."""
    while not (found := re.search(r"listening on (http://[\w.:]+)", log.read_text())):
        if server.poll() is not None:
            sys.exit(f"pman did not start:\n{log.read_text()}")
        time.sleep(0.02)
    print(f"pman listens on {found[1]}")
    return found[1]


def run(path: Path, url: str, settings: dict[str, str], store: Path) -> int:
    """One example from request to output files; 0 when its job finished successfully."""
    request: dict[str, Any] = json.loads(path.read_text())
    name = str(path.relative_to(ROOT))
    print(f"\n\033[1m{name}\033[0m" if sys.stdout.isatty() else f"\n{name}")
    incoming = store / f"key-{request['jid']}" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / "brain.txt").write_text("a very small brain\n")
    show("rendered for the local backend", rendered(path, "local", settings))
    show("rendered for Cromwell", rendered(path, "wdl", settings))
    try:
        answer = http.post(f"{url}/api/v1/", json=request, timeout=30)
        if answer.status_code != 201:
            print(f"refused: {answer.status_code} {answer.text}")
            return 1
        job = follow(f"{url}/api/v1/{request['jid']}/")
    finally:
        http.delete(f"{url}/api/v1/{request['jid']}/", timeout=60)  # on Ctrl-C it still runs
    print(f"  status   {job['status']} {job['message']}")
    show("logs", job["logs"])
    print("  output files")
    for file in sorted(p for p in (incoming.parent / "outgoing").rglob("*") if p.is_file()):
        print(f"    {file.relative_to(store)}  {file.stat().st_size} bytes")
    return int(job["status"] != "finishedSuccessfully")


def rendered(path: Path, target: str, settings: dict[str, str]) -> str:
    """What the service submits, from the offline script."""
    command = [sys.executable, str(ROOT / "scripts/render_job.py"), str(path), "--to", target]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment(settings)).stdout


def show(title: str, text: str, lines: int = 14) -> None:
    print(f"  {title}")
    for line in text.splitlines()[:lines]:
        print(f"    {line[:150]}")
    if len(text.splitlines()) > lines:
        print(f"    ... {len(text.splitlines()) - lines} more lines")


def follow(url: str) -> dict[str, str]:
    """Poll until the job has ended, with a mark for every look."""
    print("  progress ", end="", flush=True)
    while True:
        job: dict[str, str] = http.get(url, timeout=30).json()
        if job["status"].startswith("finished"):
            print(" done")
            return job
        print(MARKS.get(job["status"], "?"), end="", flush=True)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
