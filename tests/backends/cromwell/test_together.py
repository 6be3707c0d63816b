"""How often Cromwell is asked: many GETs at the same time, and GETs of a job that does not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pman.backends import cromwell, retry
from pman.backends.cromwell.labels import workflow_id
from pman.status import JobState
from tests.backends.cromwell.test_states import JID, Timeline, backend, job, playing
from tests.fakes import crowd, crowd_rig
from tests.fakes.cromwell.config import TEST_PACE, load
from tests.fakes.cromwell.server import Cromwell
from tests.rig import ROOT


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cromwell, "PATIENCE_SECONDS", 0.0)


def test_gets_at_the_same_time_are_few_calls() -> None:
    """Metadata is asked for alone, once of each job that runs: of ten jobs two run, and one has ended."""
    with crowd_rig.serving("cromwell", 100) as address:
        own = backend(f"http://{address}")
        own.submit(*job(jid=crowd.FIRST))
        for metadata in (29, 9):
            before = crowd_rig.counts(address)[0]
            crowd_rig.ask_at_once(own, "cromwell", 100)
            made = crowd_rig.counts(address)[0] - before
            assert sum(made[call] for call in made if call.endswith("/query")) < 30  # of 100
            assert sum(made[call] for call in made if call.endswith("/metadata")) == metadata


def test_a_query_for_several_jobs_is_that_for_each(tmp_path: Path) -> None:
    """Names that a database may compare without regard to case, or that one row of labels could mix up."""
    jids = [JID, JID.upper(), "a:b,c", "x'y", "\u00e9"]
    config = load(ROOT / "deploy" / "cromwell" / "slurm.conf").at(tmp_path / "executions")
    with Cromwell(config, tmp_path, pace=replace(TEST_PACE, pickup_period=3600)) as server:
        own = backend(server.url)
        for jid in jids:
            own.submit(*job(jid=jid, args=[jid]))
        retry.wait_until(lambda: all(map(own._find, jids)), 10)
        found = own._find_several([*jids, "nobody", *map(str, range(94))])
        assert {jid: workflow.id for jid, workflow in found.items()} == {jid: workflow_id(jid, 1) for jid in jids}
        assert found == {jid: own._find(jid) for jid in jids}


def running(place: Path, *calls: dict[str, Any]) -> tuple[str, int, Any]:
    entries = [{"stdout": f"{place}/stdout", "stderr": f"{place}/stderr"} | call for call in calls]
    return "metadata", 200, {"status": "Running", "calls": {"ChRISJob.plugin_instance": entries}}


IN_SLURM = {"executionStatus": "Running", "jobId": "17"}


@pytest.mark.parametrize(
    ("calls", "again"),
    [
        ([IN_SLURM], False),
        ([IN_SLURM | {"executionStatus": "QueuedInCromwell"}], True),  # Cromwell was started anew
        ([{"executionStatus": "Running"}], True),
        ([IN_SLURM | {"executionStatus": "RetryableFailure"}, IN_SLURM], True),
        ([], True),
    ],
    ids=["in SLURM", "restarted", "not submitted yet", "run again", "no call yet"],
)
@pytest.mark.parametrize("seen", [True, False], ids=["files seen", "files unseen"])
def test_metadata_is_read_again_when_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]], again: bool, seen: bool
) -> None:
    ended: list[tuple[str, int, Any]] = [
        ("metadata", 200, running(tmp_path, *calls)[2] | {"status": "Succeeded"}),
        ("status", 200, {"status": "Succeeded"}),
    ]
    with playing(Timeline("x", replies=[running(tmp_path, *calls), *ended])) as (player, url):
        own = backend(url, **({"CROMWELL_EXECUTION_ROOT_MAP": f"{tmp_path}={tmp_path}"} if seen else {}))
        own.submit(*job())

        def reads() -> bool:
            player.seen_keys = []
            own.status(JID)
            return bool(player.seen_keys)

        player.position = 1
        assert reads()
        assert reads() == again
        (tmp_path / "rc").write_text("0\n")  # which is before Cromwell knows of the end
        assert reads() == (again or seen)
        (tmp_path / "rc").unlink()
        monkeypatch.setattr(cromwell, "KEPT_SECONDS", 0.0)
        assert reads()
        monkeypatch.setattr(cromwell, "KEPT_SECONDS", 60.0)
        player.position = 3
        assert own.status(JID).state is JobState.SUCCEEDED


def test_two_pmans_see_the_end_in_the_same_order(tmp_path: Path) -> None:
    """One keeps metadata of the running job. The other one reads it, and the end is there before the query has it."""
    begun, ended = running(tmp_path, IN_SLURM), running(tmp_path, IN_SLURM | {"executionStatus": "Done"})
    ended[2]["status"] = "Succeeded"
    shown = ("status", 200, {"status": "Running"})
    with playing(Timeline("x", replies=[begun, shown, ended])) as (player, url):
        own = backend(url)
        own.submit(*job())
        player.position = 2
        assert own.status(JID).state is JobState.STARTED
        player.position = 3
        assert [one.status(JID).state for one in (backend(url), own)] == [JobState.STARTED] * 2
