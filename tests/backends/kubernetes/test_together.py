"""Many GETs at the same time, over an API server that knows many jobs."""

from __future__ import annotations

from urllib3 import PoolManager

from pman.backends import kubernetes
from pman.backends.kubernetes.api import Api, Endpoint
from tests.backends.kubernetes.script import CONFIG, job_and_spec
from tests.fakes import crowd, crowd_rig


def test_gets_at_the_same_time_are_few_calls() -> None:
    """Also beside one of a job that is not there, which the list does not have."""
    with crowd_rig.serving("kubernetes", 100) as address, PoolManager(maxsize=20) as pool:
        backend = kubernetes.KubernetesBackend(Api(lambda: Endpoint(f"http://{address}", pool, dict)), CONFIG)
        backend.submit(*job_and_spec(jid=crowd.FIRST, number_of_workers=1))
        before = crowd_rig.counts(address)[0]
        crowd_rig.ask_at_once(backend, "kubernetes", 100)
        assert (crowd_rig.counts(address)[0] - before).total() < 120  # of 199
        pool.clear()
