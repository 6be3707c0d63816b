"""pman.wsgi:application under gunicorn, as the public Helm chart and compose files of pman 6 start it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.backends.test_local import local_rig
from tests.rig import ROOT, Rig, Server, running, wait_for
from tests.service.test_http import GOOD, post_as_http_client

pytestmark = pytest.mark.slow
COMMAND = ("-m", "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket")


@contextlib.contextmanager
def gunicorn(rig: Rig, *options: str, **env: str) -> Iterator[Server]:
    """A gunicorn, once it answers."""
    log = rig.logs / "gunicorn.log"
    environment = {"PATH": os.environ["PATH"], "HOME": str(rig.logs), "PYTHONPATH": str(ROOT)}
    environment |= GOOD | {"STOREBASE": str(rig.store)} | rig.env | env
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *COMMAND, *options, "pman.wsgi:application"],
            cwd=rig.logs, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip
    server = Server("", process, log)

    def address() -> str:
        assert process.poll() is None, log.read_text()
        found = re.search(r"Listening at: (http://[\w.:]+)", log.read_text())
        return found[1] if found else ""

    try:
        server.url = wait_for(address, 30, "gunicorn to listen")
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("options", [(), ("--workers", "2"), ("--preload", "--threads", "4")])
def test_a_job_under_gunicorn(tmp_path: Path, options: tuple[str, ...]) -> None:
    with running(local_rig(tmp_path)) as rig, gunicorn(rig, *options) as server:
        headers = {"Host": "pman:5010"}  # as pfcon calls it: gunicorn was told where to listen, pman was not
        posted = server.call("POST", json=rig.request("job", "echo hello"), headers=headers)
        assert posted.status_code == 201, posted.text
        job = server.wait_final("job")
        assert (job["status"], job["logs"]) == ("finishedSuccessfully", "hello\n")
        answer = requests.get(f"{server.url}/api/v1", allow_redirects=False, timeout=10)
        assert (answer.status_code, answer.headers["Location"]) == (308, "../api/v1/")
        assert post_as_http_client(server, b" " * 20_000_000)[0] == 413
        assert server.delete("job").status_code == 204
        lines = server.log.read_text().splitlines()
        assert any("request" in line and 'jid="job"' in line and "status=204" in line for line in lines)
        server.process.terminate()
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        ((), {"STOREBASE": "/tmp"}, "Error: SECRET_KEY is required in production"),
        (("--preload",), GOOD | {"CONTAINER_ENV": "slurmm"}, "Error: CONTAINER_ENV: "),
        ((), GOOD | {"LOCAL_STATE_DIR": "/dev/null/x"}, "Error: LOCAL_STATE_DIR=/dev/null/x cannot be made"),
    ],
)
def test_what_stops_the_start_is_said_as_pman_serve_says_it(
    tmp_path: Path, options: tuple[str, ...], env: dict[str, str], words: str
) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, *COMMAND, *options, "pman.wsgi:application"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 4, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_image_gives_gunicorn_threads(tmp_path: Path) -> None:
    """GUNICORN_CMD_ARGS of deploy/Dockerfile: without it gunicorn serves one request at a time."""
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    arguments = json.loads(re.findall(r'GUNICORN_CMD_ARGS=(".*?")', dockerfile)[0])
    with running(local_rig(tmp_path)) as rig, gunicorn(rig, GUNICORN_CMD_ARGS=arguments) as server:
        assert server.call("GET").status_code == 200
        assert "gthread" in server.log.read_text()
