"""The slurm backend on SLURM as sites run it: profiles and versions of scripts/engines/slurm.

The whole contract on two of them, the tests that tell most of it on the others: the matrix has to stay short.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.live.test_slurm import slurm_rig
from tests.rig import Rig, running

pytestmark = pytest.mark.live("slurm")


def site(directory: pytest.TempPathFactory, *options: str) -> Iterator[Rig]:
    """A rig on one that every test shares; the time limit is what a guarded site asks for."""
    engine = development("slurm", "--min-job-age", "2", *options)
    with running(slurm_rig(directory.mktemp("site"), engine, *options, TIMELIMIT_MINUTES="10")) as rig:
        yield rig


class TestGuarded(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        yield from site(tmp_path_factory, "--profile", "guarded")


class TestAccountedNewer(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        yield from site(tmp_path_factory, "--profile", "accounted", "--version", "24.11")


# The fixtures of the contract, and what a site is most likely to change: what a job finds, how it ends, what is left.
TELLING = (
    "server", "jid", "limited", "test_good_job", "test_exit_code", "test_same_request_again", "test_four_workers",
    "test_delete_then_post_again", "test_delete_ends_a_running_job", "test_hostile_arguments_and_environment",
)  # fmt: skip


class TestOtherSites:
    locals().update({name: vars(Contract)[name] for name in TELLING})

    @pytest.fixture(
        scope="class",
        params=["--profile preempting", "--profile configless", "--version 24.11", "--version 24.11 --profile guarded"],
    )
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rig]:
        yield from site(tmp_path_factory, *request.param.split())
