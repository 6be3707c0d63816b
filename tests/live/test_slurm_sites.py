"""The slurm backend on SLURM as sites run it: profiles and versions of scripts/engines/slurm.

The whole contract on two of them, the tests that tell most of it on the others: the matrix has to stay short.
"""

from __future__ import annotations

import getpass
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.live.test_slurm import slurm_rig, wrapped
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


# What pman's own process or another machine may have had, and what a job must not get.
DIRTY = """
umask 077; ulimit -n 600
export PATH=$here HOME=/dirty LD_LIBRARY_PATH=/dirty LC_ALL=C LANG=dirty USER=dirty LOGNAME=dirty SSH_AUTH_SOCK=/dirty
exec "$@"
"""
KNOWN = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "0022")

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

    def test_a_known_environment(self, rig: Rig, jid: str) -> None:
        """Whatever sbatch was started with: behind sudo or ssh, or of a pman that a service manager started."""
        bin_directory = Path(rig.env["SLURM_STATE_DIR"]).parent / "bin"
        wrapped(bin_directory, "dirty", DIRTY)
        for name in ("env", "cat", "bwrap", "sbatch", "squeue", "sacct", "scancel"):
            (bin_directory / name).symlink_to(shutil.which(name, path=rig.env.get("PATH")) or "")
        server = rig.start(SLURM_COMMAND_PREFIX=str(bin_directory / "dirty"))
        try:
            script = "env; umask; ulimit -n"
            assert server.post(rig.request(jid, script, number_of_workers=2)).status_code == 201
            job = server.wait_final(jid)
        finally:
            server.stop()
        lines = job["logs"].splitlines()
        user = pwd.getpwnam(rig.user or getpass.getuser())
        own = (f"HOME={user.pw_dir}", f"USER={user.pw_name}", f"LOGNAME={user.pw_name}")
        assert [lines.count(line) for line in (*KNOWN, *own)] == [2] * 6, job
        assert not [line for line in lines if "dirty" in line or line == "600"], job
