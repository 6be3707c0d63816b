"""crowd.py as a process, and what backends are asked over it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pman.backends import Backend
from pman.errors import NotFound
from pman.status import JobState
from tests.fakes import crowd
from tests.rig import ROOT

STATES = (JobState.NOT_STARTED, JobState.STARTED, JobState.SUCCEEDED)


@contextmanager
def serving(kind: str, jobs: int) -> Iterator[str]:
    """The address of a crowd of that many jobs; the first one has to be posted."""
    command = [sys.executable, "-m", "tests.fakes.crowd", kind, str(jobs)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def counts(address: str) -> tuple[Counter[str], float]:
    """How many calls of each kind came, and the seconds that all of them took."""
    with urllib.request.urlopen(f"http://{address}/-/counts", timeout=10) as answer:
        found = json.load(answer)
    return Counter(found["calls"]), found["seconds"]


def ask_at_once(backend: Backend, kind: str, jobs: int) -> None:
    """GETs of all jobs but the last, and of one that is not there, from 20 threads: each is answered as alone."""
    jids = [crowd.jid_of(number) for number in [*range(jobs - 1), jobs]]
    with ThreadPoolExecutor(20) as threads:
        asked = {jid: threads.submit(backend.status, jid) for jid in jids}
    with pytest.raises(NotFound):
        asked.pop(jids[-1]).result()
    for jid, one in asked.items():
        found = one.result()
        assert (found.jid, found.state) == (jid, STATES[crowd.KINDS[kind](jobs).stage(jid)])
