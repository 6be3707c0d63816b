"""What the queue, the accounting and the files of a job say together."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest

from pman import settings
from pman.backends import directories, slurm
from pman.backends.slurm import sources, verdict, words
from pman.backends.slurm import state as slurm_state
from pman.errors import NotFound, Unreachable
from pman.status import JobState, JobStatus
from tests.backends.slurm.fake import Fake, claim, fake, run_shell
from tests.rig import wait_for


@pytest.mark.parametrize(
    ("script", "lasts"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", True),
        ("echo 'sacct: error: Operation not permitted' >&2; exit 1", True),
        ("echo 'sh: 1: sacct: not found: No such file or directory' >&2; exit 127", True),
        ("echo 'sacct: error: Unknown cluster' >&2; exit 1", False),
        ("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1", False),
        ("exec sleep 30", False),
    ],
)
def test_accounts_that_do_not_answer(engine: Fake, caplog: pytest.LogCaptureFixture, script: str, lasts: bool) -> None:
    """Nothing is judged by what the accounting could not say now; where there is none, that is said once."""
    first, second = engine.submit("first"), engine.submit("second")
    for record in (first, second):
        run_shell(claim(record, "10"))
    engine.say("sacct", script)
    engine.backend = engine.make(timeout_seconds=3)
    if not lasts:
        with pytest.raises(Unreachable):
            engine.backend.status("first")
        assert [status.state for status in engine.backend.jobs(10)] == [JobState.STARTED] * 2
        return
    assert engine.backend.status("first").state is JobState.FAILED
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.FAILED] * 2
    assert len([message for message in caplog.messages if "without SLURM's accounting" in message]) == 1


def test_lacking_accounts_are_said_at_start(engine: Fake, caplog: pytest.LogCaptureFixture) -> None:
    given = {"SLURM_STATE_DIR": str(engine.root), "SLURM_COMMAND_PREFIX": str(engine.here / "prefix")}
    slurm.create(settings.load(given))
    wait_for(lambda: "without SLURM's accounting, because sacct says: Slurm accounting" in caplog.text, 10, "the log")


def test_accounts_whose_command_is_not_there(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (engine.here / "sacct").unlink()
    assert engine.backend.status(record.jid).state is JobState.FAILED


@pytest.mark.parametrize(("age_seconds", "state"), [(60, JobState.STARTED), (7200, JobState.FAILED)])
def test_a_runaway_record_of_the_accounts(engine: Fake, age_seconds: float, state: JobState) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    make_older(record, age_seconds)
    engine.say("sacct", engine.row(10, "RUNNING", record))
    assert engine.backend.status(record.jid).state is state


def make_older(record: directories.Record, age_seconds: float) -> None:
    path = record.directory / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created_at": time.time() - age_seconds}))


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("age_seconds", [0, 7200])
@pytest.mark.parametrize("accounts", ["RUNNING", ""])
def test_an_empty_answer_proves_nothing(engine: Fake, begun: bool, age_seconds: float, accounts: str) -> None:
    """squeue says nothing with exit status 0, as SLURM 22.05 does for a user who does not see the partition."""
    record = engine.submit()
    if begun:
        run_shell(claim(record, "10"))
    make_older(record, age_seconds)
    if accounts:
        engine.say("sacct", engine.row(10, accounts, record))
    fake(engine.here, "squeue", "exit 0")
    with pytest.raises(Unreachable, match="SLURM does not say what has become of its job 10"):
        engine.backend.status(record.jid)
    listed = engine.backend.jobs(10)
    assert [status.state for status in listed] == [JobState.STARTED if begun else JobState.NOT_STARTED]
    assert "job 10" in listed[0].message
    with pytest.raises(Unreachable):
        engine.backend.delete(record.jid)
    engine.say("squeue", engine.row(10, "CANCELLED", record))
    engine.backend.delete(record.jid)
    with pytest.raises(NotFound):
        engine.backend.status(record.jid)


def test_a_listing_asks_about_no_job_alone(engine: Fake) -> None:
    """Thousands may have been cancelled at once. The next GET of one of them asks where that was."""
    records = [engine.submit(f"chris-jid-{number}") for number in range(3)]
    rows = "; ".join(engine.row(10, "CANCELLED", record) for record in records)
    fake(engine.here, "squeue", f'echo "$*" >> asked; {rows}')
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.FAILED] * 3
    assert (engine.here / "asked").read_text().count("--jobs=") == 0


def test_the_commands_that_look_for_jobs_see_hidden_partitions(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    fake(engine.here, "squeue", f'case "$*" in *--all*) {engine.row(10, "RUNNING", record)} ;; esac')
    assert engine.backend.status(record.jid).state is JobState.STARTED


def test_one_that_cannot_be_judged_does_not_spoil_the_listing(engine: Fake) -> None:
    good, bad = engine.submit("good"), engine.submit("bad")
    run_shell(claim(good, "10"))
    run_shell(claim(bad, "11"))
    shown = engine.row(10, "RUNNING", good)
    fake(engine.here, "squeue", f'case "$*" in *--jobs=*) echo oh no >&2; exit 1 ;; esac; {shown}')
    found = {status.jid: status for status in engine.backend.jobs(10)}
    assert [found[jid].state for jid in ("good", "bad")] == [JobState.STARTED, JobState.STARTED]
    assert "oh no" in found["bad"].message


def test_a_listing_asks_for_few_jobs_by_their_numbers(engine: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LOOKS_AT_ONCE", 2)
    for number in range(4):
        record = engine.submit(f"j{number}")
        run_shell(claim(record, str(100 + number)))
    engine.say("squeue", f"echo $* >> {engine.here}/asked")
    states = [status.state for status in engine.backend.jobs(100)]
    assert states.count(JobState.FAILED) == 2
    assert states.count(JobState.STARTED) == 2
    assert (engine.here / "asked").read_text().count("--jobs=") == 2
    assert {status.state for status in engine.backend.jobs(100)} == {JobState.FAILED}


@pytest.mark.parametrize(("age_seconds", "state"), [(0, JobState.STARTED), (6, JobState.SUCCEEDED)])
def test_an_epilog_that_takes_its_time(engine: Fake, age_seconds: float, state: JobState) -> None:
    """The script has ended, and SLURM has ended what the script left: the node's epilog writes no output."""
    record = engine.submit()
    run_shell(f"{claim(record, '10')}; echo 0 > {record.directory}/rc")
    os.utime(record.directory / "rc", (time.time() - age_seconds,) * 2)
    engine.say("squeue", engine.row(10, "COMPLETING", record))
    assert engine.backend.status(record.jid).state is state
    engine.backend.delete(record.jid)
    assert list(engine.root.iterdir()) == []


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "BadConstraints", "QOSMaxMemoryPerJob", "AssocMaxCpuPerJobLimit"]
)
def test_a_job_that_waits_in_vain(engine: Fake, reason: str) -> None:
    record = engine.submit()
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.NOT_STARTED, f"Waiting in SLURM's queue: {reason}.")
    engine.say("squeue", engine.row(10, "PENDING", record, "Priority"))
    wait_for(lambda: "Priority" in engine.backend.status(record.jid).message, 10, "the next list")
    assert not (record.directory / "stuck").exists()  # patience begins anew
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    wait_for(lambda: reason in engine.backend.status(record.jid).message, 10, "the next list")
    os.utime(record.directory / "stuck", (time.time() - 901,) * 2)
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (
        JobState.FAILED,
        f"SLURM cannot start the job: {reason}. pman gave it up after 15 min.",
    )
    assert (engine.here / "cancelled").read_text() == "10\n"
    assert engine.backend.status(record.jid) == status


@pytest.mark.parametrize(
    "reason",
    ["JobHeldAdmin", "launch_failed_requeued_held", "PartitionNodeLimit", "Resources", "QOSMaxCpuPerUserLimit"],
)
def test_a_reason_that_somebody_or_time_may_heal(engine: Fake, reason: str) -> None:
    engine.backend = engine.make(patience_seconds=0)
    record = engine.submit()
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    status = engine.backend.status(record.jid)
    assert (status.state, reason in status.message) == (JobState.NOT_STARTED, True)
    assert ("Somebody has to release it." in status.message) == (reason in words.BY_HAND)


REQUEUING = "#!/bin/bash\n#SBATCH --requeue\n"


def test_a_job_that_slurm_begins_again(engine: Fake) -> None:
    """Back in the queue it is not started, whatever its first start has left; then the second start counts."""
    record = engine.submit(script=REQUEUING)
    run_shell(f"{claim(record, '10')}; echo '143 ended by a signal' > {record.directory}/rc")
    os.utime(record.directory / "rc", (time.time() - 600,) * 2)
    fake(engine.here, "squeue", "exit 0")
    with pytest.raises(Unreachable):
        engine.backend.status(record.jid)
    engine.say("squeue", engine.row(10, "PENDING", record, "BeginTime"))
    status = wait_for(lambda: suppressed(engine, record), 10, "the next list")
    assert (status.state, status.message) == (JobState.NOT_STARTED, verdict.REQUEUED)
    engine.say("squeue", engine.row(10, "RUNNING", record, start=str(int(time.time()))))
    wait_for(lambda: engine.backend.status(record.jid).state is JobState.STARTED, 10, "the next list")
    run_shell(f"echo '0 ' > {record.directory}/rc")
    engine.say("squeue", engine.row(10, "COMPLETED", record))
    wait_for(lambda: engine.backend.status(record.jid).state is JobState.SUCCEEDED, 10, "the next list")


def suppressed(engine: Fake, record: directories.Record) -> JobStatus | None:
    with contextlib.suppress(Unreachable):
        return engine.backend.status(record.jid)
    return None


@pytest.mark.parametrize(
    ("state", "result", "log"),
    [
        ("OUT_OF_MEMORY", "0 ", ""),  # a child was killed, and the shell went on: SLURM's accounting knows
        ("OUT_OF_MEMORY", "137 ", ""),
        # cgroup v2, 22.05.8 and 24.11.5: the job of a step of which a process was killed is COMPLETED
        ("COMPLETED", "0 ", "slurmstepd-localhost: error: Detected 1 oom-kill event(s) in StepId=10.0. Some of your "
         "processes may have been killed by the cgroup out-of-memory handler."),
        ("COMPLETED", "0 ", "slurmstepd-localhost: error: Detected 1 oom_kill event in StepId=10.0. Some of the step "
         "tasks have been OOM Killed."),
        ("FAILED", "137 ", "slurmstepd-localhost: error: Exceeded job memory limit\nsrun: error: localhost: tasks 0-1: "
         "Killed"),  # SLURM 22.05.8, two workers
        ("FAILED", "137 ", "srun: error: n1: task 0: Out Of Memory"),
        ("FAILED", "", "slurmstepd-localhost: error: Exceeded job memory limit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forgotten", [False, True])
def test_one_sentence_for_too_much_memory(engine: Fake, state: str, result: str, log: str, forgotten: bool) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (record.directory / "slurm-10.log").write_text(f"a line of the script\n{log}\n")
    if result:
        (record.directory / "rc").write_text(f"{result}\n")
    engine.say("sacct" if forgotten else "squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.FAILED, "The job used more memory than its limit.")


@pytest.mark.parametrize("log", ["slurmstepd: error: *** JOB 10 CANCELLED ***", "I ran out of memory\n", ""])
def test_no_word_of_memory(engine: Fake, log: str) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (record.directory / "slurm-10.log").write_text(log)
    (record.directory / "rc").write_text("0 \n")
    engine.say("squeue", engine.row(10, "COMPLETED", record))
    assert engine.backend.status(record.jid).state is JobState.SUCCEEDED


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT"])
def test_a_job_has_started_when_its_script_has(engine: Fake, state: str) -> None:
    """SLURM may still fail to launch it, be COMPLETING, and queue it again; and another list may be older than this."""
    record = engine.submit()
    engine.say("squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.NOT_STARTED, verdict.STATES[state][1] or verdict.LAUNCHING)
    assert [listed.state for listed in engine.backend.jobs(10)] == [JobState.NOT_STARTED]
    run_shell(claim(record, "10"))
    assert engine.backend.status(record.jid).state is JobState.STARTED


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_result_before_slurm_has_cleaned_up(engine: Fake, state: str) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    slurm_state.write(record.directory / "rc", "0 \n")
    engine.say("squeue", engine.row(10, state, record))
    assert engine.backend.status(record.jid).state is JobState.STARTED


@pytest.mark.parametrize(
    ("state", "said", "message"),
    [
        ("FAILED", "3 \n", "The job ended with exit code 3."),
        ("CANCELLED", "143 ended by a signal\n", "The job was cancelled in SLURM."),
        ("SUSPENDED", "3 \n", "The job ended with exit code 3."),  # old enough that SLURM's state does not matter
        ("COMPLETED", "0 \n", ""),
        # The command took SLURM's signal for a wish to end well, before the script heard of it.
        ("CANCELLED", "0 \n", "The job was cancelled in SLURM."),
        ("TIMEOUT", "0 \n", "The job was ended by its time limit."),
        ("PREEMPTED", "0 \n", "The job was preempted by another one in SLURM."),
        ("NODE_FAIL", "0 \n", "A node of the job failed."),
    ],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_whose_explanation_counts(engine: Fake, state: str, said: str, message: str, forgotten: bool) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    slurm_state.write(record.directory / "rc", said)
    os.utime(record.directory / "rc", (0, 0))
    engine.say("sacct" if forgotten else "squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state is JobState.SUCCEEDED, status.message) == (not message, message)


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_ran_and_is_held(engine: Fake, state: str) -> None:
    record = engine.submit()
    engine.say("squeue", engine.row(10, state, record))
    assert engine.backend.status(record.jid).state is JobState.NOT_STARTED
    run_shell(claim(record, "10"))
    status = engine.backend.status(record.jid)
    assert (status.state, "held in SLURM" in status.message) == (JobState.FAILED, True)
