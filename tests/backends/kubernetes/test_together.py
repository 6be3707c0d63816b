"""Many GETs at the same time, over an API server that knows many jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from urllib3 import PoolManager

from pman.backends import kubernetes
from pman.backends.kubernetes.api import Api, Endpoint
from pman.errors import NotFound
from pman.status import JobState
from tests.backends.kubernetes.script import CONFIG, job_and_spec
from tests.fakes import crowd
from tests.rig import ROOT


def test_gets_at_the_same_time_are_few_calls() -> None:
    """Each is answered as alone, also beside one of a job that is not there and of one that the list does not have."""
    command = [sys.executable, "-m", "tests.fakes.crowd", "kubernetes", "100"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
        PoolManager(maxsize=20) as pool,
    ):
        try:
            assert process.stdout
            url = f"http://{process.stdout.readline().strip()}"
            backend = kubernetes.KubernetesBackend(Api(lambda: Endpoint(url, pool, dict)), CONFIG)
            backend.submit(*job_and_spec(jid=crowd.FIRST, number_of_workers=1))
            before = json.loads(pool.request("GET", f"{url}/-/counts").data)["calls"]
            jids = [crowd.jid_of(number) for number in [*range(99), 100]]
            with ThreadPoolExecutor(20) as threads:
                asked = {jid: threads.submit(backend.status, jid) for jid in jids}
            with pytest.raises(NotFound):
                asked.pop(crowd.jid_of(100)).result()
            states = (JobState.NOT_STARTED, JobState.STARTED, JobState.SUCCEEDED)
            for jid, one in asked.items():
                found = one.result()
                assert (found.jid, found.state) == (jid, states[crowd.Kubernetes(100).stage(jid)])
            calls = json.loads(pool.request("GET", f"{url}/-/counts").data)["calls"]
            assert sum(calls.values()) - sum(before.values()) < 120  # of 199
        finally:
            pool.clear()
            process.terminate()
