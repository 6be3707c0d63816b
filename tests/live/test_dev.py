"""scripts/dev over every real backend, and the smoke tests against it, as a developer would call them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
import requests

from tests.conftest import development
from tests.rig import ROOT, wait_for
from tests.service.test_http import free_port

ENGINES = {
    "": "",  # the embedded backend
    "slurm": "slurm",
    "cromwell": "slurm",
    "swarm": "swarm",
    "docker": "swarm",
    "podman": "podman",
    "kubernetes": "kubernetes",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.live(engine) if engine else ()) for name, engine in ENGINES.items()]
)
def test_dev_and_smoke(name: str, tmp_path: Path) -> None:
    engine = development(ENGINES[name]) if name else {}
    port = free_port()
    store = tmp_path / "store"
    store.mkdir()
    env = {**os.environ, "PORT": str(port), "STOREBASE": str(store), "SLURM_STATE_DIR": str(tmp_path / "jobs")}
    with (tmp_path / "log").open("wb") as log:
        command = [str(ROOT / "scripts/dev"), *(("--on", name) if name else ())]
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return requests.get(f"{url}/readyz", timeout=30).status_code == 200
            except requests.ConnectionError:
                return False

        wait_for(ready, 120, f"pman over {name}", every=0.2)
        image = engine.get("PMAN_TEST_IMAGE", "docker.io/library/busybox")
        command = [str(ROOT / "scripts/smoke"), url, image]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()[-3000:]
        assert f"export PMAN_URL={url} STOREBASE={store}" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
