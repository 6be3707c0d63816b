"""Many GETs at the same time, over a Swarm that knows many jobs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from pman import backends, settings
from pman.errors import NotFound
from pman.status import JobState
from tests.backends.engine.jobs import posted
from tests.fakes import crowd
from tests.rig import ROOT


def test_gets_at_the_same_time_are_few_calls(tmp_path: Path) -> None:
    """Each is answered as alone, also beside one of a job that is not there. The first GET of a job is alone."""
    command = [sys.executable, "-m", "tests.fakes.crowd", "swarm", "100"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().strip()
            env = {"CONTAINER_ENV": "swarm", "STOREBASE": str(tmp_path), "DOCKER_HOST": f"tcp://{address}"}
            config = settings.load(env)
            backend = backends.load(config)
            posted(backend, config, jid=crowd.FIRST)
            jids = [crowd.jid_of(number) for number in range(99)]
            for jid in jids:
                backend.status(jid)

            def calls() -> int:
                counts = requests.get(f"http://{address}/-/counts", timeout=10).json()["calls"]
                return sum(number for call, number in counts.items() if "/services" in call or "/tasks" in call)

            before = calls()
            with ThreadPoolExecutor(20) as threads:
                asked = {jid: threads.submit(backend.status, jid) for jid in [*jids, crowd.jid_of(100)]}
            with pytest.raises(NotFound):
                asked.pop(crowd.jid_of(100)).result()
            states = (JobState.NOT_STARTED, JobState.STARTED, JobState.SUCCEEDED)
            for jid, one in asked.items():
                found = one.result()
                assert (found.jid, found.state) == (jid, states[crowd.Swarm(100).stage(jid)])
            assert calls() - before < 120  # of 199
        finally:
            process.terminate()
