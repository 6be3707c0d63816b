"""kill -9 of pman at random moments while clients submit with retries: every job runs exactly once."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.backends.test_local import local_rig
from tests.rig import COUNTED, Rig, Server, running, wait_for

JOBS = 200
CLIENTS = 8


class Cluster:
    """A pman that is killed and started again until told to stop."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.server: Server = rig.start()
        self.kills = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._torment)
        self._thread.start()

    def _torment(self) -> None:
        moments = random.Random(7)
        while not self._stop.wait(moments.uniform(0.02, 0.7)):
            self.server.kill()
            self.kills += 1
            self.server = self.rig.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
def test_two_hundred_jobs_through_kills(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        cluster = Cluster(rig)
        jids = [f"killed-{number}" for number in range(JOBS)]

        def submit(jid: str) -> None:
            request = rig.request(jid, COUNTED)
            deadline = time.monotonic() + 300
            while True:
                assert time.monotonic() < deadline, f"{jid} was never accepted"
                try:
                    answer = cluster.server.post(request)
                except requests.RequestException:
                    continue  # what pfcon's user does: submit again
                assert answer.status_code == 201, answer.text
                return

        try:
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(submit, jids))
        finally:
            cluster.stop()
        for jid in jids:
            assert cluster.server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert [rig.executions(jid) for jid in jids] == [1] * JOBS
        assert cluster.kills > 3
        assert wait_for(lambda: not list((tmp_path / "state").glob("*/.claim.*")), 5, "claims to be settled")
