"""Cromwell's stand-in with the reference configuration on SLURM as sites run it, as an ordinary user beside pman.

The whole contract on every profile, and the tests that tell most of it where the version differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.contract import Contract
from tests.fakes.cromwell_rig import Slurm, cromwell, rig_over
from tests.live.test_slurm import SCRIPT, open_directory, ordinary
from tests.live.test_slurm_sites import TELLING, instance
from tests.rig import Rig

pytestmark = pytest.mark.live("slurm")


def site(options: str) -> Iterator[Rig]:
    engine = instance(options)
    user = ordinary(engine)
    directory = open_directory(user)
    slurm = Slurm(engine, (SCRIPT, "run", *options.split(), "--"), user)
    with cromwell(directory / "cromwell", slurm, "bubblewrap") as server, rig_over(server, directory) as rig:
        yield rig


class TestProfiles(Contract):
    @pytest.fixture(scope="class", params=["guarded", "accounted", "preempting", "configless"])
    @classmethod
    def rig(cls, request: pytest.FixtureRequest) -> Iterator[Rig]:
        yield from site(f"--profile {request.param}")


class TestOtherSites:
    """Without a profile: test_cromwell.py has the whole contract there, as root."""

    locals().update({name: vars(Contract)[name] for name in TELLING})

    @pytest.fixture(scope="class", params=["", "--version 24.11"])
    @classmethod
    def rig(cls, request: pytest.FixtureRequest) -> Iterator[Rig]:
        yield from site(request.param)


def test_workers_get_the_memory_that_slurm_granted() -> None:
    """MaxMemPerCPU makes 2 CPUs of 750 MiB out of 1 CPU of 1500 MiB; a step that asks for 1 CPU has 750 MiB."""
    eat = "import time; a = b'x' * 1_000_000_000; time.sleep(3)"
    with contextmanager(site)("--profile guarded") as rig:
        server = rig.start()
        entrypoint = ["python3", "-c", eat]
        server.post(rig.request("granted", "", entrypoint=entrypoint, number_of_workers=2, memory_limit=1500))
        job = server.wait_final("granted", 120)
        assert job["status"] == "finishedSuccessfully", job
