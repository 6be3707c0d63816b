"""SLURM without anything in between: sbatch, squeue, sacct and scancel, and a directory for each job.

sbatch may run twice for one attempt at a job (pman killed at the wrong moment): the job's own claim lets one of the two
run. slurm_state.py says what a job's directory holds, slurm_commands.py how SLURM is asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pman.backends import directories, logs, retry
from pman.backends.directories import Record, find, make_status, newest, take_away
from pman.backends.slurm.commands import QUEUE_AGE_SECONDS, Commands, Queue, SlurmJob
from pman.backends.slurm.state import (
    DELETED,
    LOST,
    Busy,
    Files,
    close,
    create_directory,
    locked,
    read_files,
    require_locks,
    settle,
    slurm_name,
    write,
)
from pman.errors import BackendError, BadRequest, Misconfigured, NotFound, Unreachable, jid_taken, no_such_job
from pman.job import Job
from pman.settings import Settings
from pman.status import JobState, JobStatus, explain_exit
from pman.templating.render import Spec

log = logging.getLogger(__name__)

# Every state of https://slurm.schedmd.com/job_state_codes.html (base states and flags, as squeue and sacct write
# them) -> pman's state, and what its user reads.
STATES: dict[str, tuple[JobState, str]] = {
    "BOOT_FAIL": (JobState.FAILED, "The node of the job did not boot."),
    "CANCELLED": (JobState.FAILED, "The job was cancelled in SLURM."),
    "COMPLETED": (JobState.SUCCEEDED, ""),
    "COMPLETING": (JobState.STARTED, "SLURM is cleaning up after the job."),  # processes may still be there
    "CONFIGURING": (JobState.NOT_STARTED, "The node of the job is booting."),
    "DEADLINE": (JobState.FAILED, "The job could not end before its deadline in SLURM."),
    "EXPEDITING": (JobState.NOT_STARTED, "SLURM is about to run the job again."),
    "FAILED": (JobState.FAILED, ""),
    "LAUNCH_FAILED": (JobState.FAILED, "SLURM could not launch the job."),
    "NODE_FAIL": (JobState.FAILED, "A node of the job failed."),
    "OUT_OF_MEMORY": (JobState.FAILED, "The job used more memory than its limit."),
    "PENDING": (JobState.NOT_STARTED, ""),
    "POWER_UP_NODE": (JobState.NOT_STARTED, "The node of the job is booting."),
    "PREEMPTED": (JobState.FAILED, "The job was preempted by another one in SLURM."),
    "RECONFIG_FAIL": (JobState.FAILED, "The node of the job could not be configured."),
    "REQUEUED": (JobState.NOT_STARTED, "The job was requeued in SLURM."),
    "REQUEUE_FED": (JobState.NOT_STARTED, "The job was requeued in SLURM's federation."),
    "REQUEUE_HOLD": (JobState.NOT_STARTED, "The job was requeued and is held in SLURM."),
    "RESIZING": (JobState.STARTED, ""),
    "RESV_DEL_HOLD": (JobState.NOT_STARTED, "The job is held: its reservation was deleted."),
    "REVOKED": (JobState.UNDEFINED, "Another cluster of SLURM's federation runs the job."),  # and may write output
    "RUNNING": (JobState.STARTED, ""),
    "SIGNALING": (JobState.STARTED, ""),
    "SPECIAL_EXIT": (JobState.NOT_STARTED, "The job was requeued and is held in SLURM."),
    "STAGE_OUT": (JobState.STARTED, "SLURM is staging files out."),  # output may still be on its way
    "STOPPED": (JobState.STARTED, "The job was stopped in SLURM and keeps its CPUs."),
    "SUSPENDED": (JobState.STARTED, "The job is suspended in SLURM."),
    "TIMEOUT": (JobState.FAILED, "The job was ended by its time limit."),
    "UPDATE_DB": (JobState.STARTED, ""),
}
# States that a job which has run cannot leave again: its script would end with exit code 75.
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
END_SECONDS = 20.0  # the script allows its processes 10 s between TERM and KILL
RESULT_SETTLES_SECONDS = 60.0  # SLURM knows within this time that the script has ended
ACCOUNTS_LAG_SECONDS = 3600.0  # the accounts know within this time of a job's submission what squeue has forgotten
SUBMIT_TRIES = 100  # each but the last one met a DELETE
_UNCLAIMED = "Its script did not begin: does every node see SLURM_STATE_DIR under the same path?"


class SlurmBackend:
    """Runs jobs on SLURM. Any number of pman processes may share one state directory."""

    def __init__(self, root: Path, commands: Commands, max_log_bytes: int) -> None:
        self._root = root
        self._commands = commands
        self._queue = Queue(commands)
        self._max_log_bytes = max_log_bytes
        try:
            directories.open_root(root)
            require_locks(root)
        except OSError as error:
            raise Misconfigured(f"SLURM_STATE_DIR={root} cannot be made: {error.strerror}.") from None

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        for _ in range(SUBMIT_TRIES):
            fresh = not (self._root / job.name).is_dir() and create_directory(self._root, job, spec)
            with contextlib.suppress(NotFound):  # deleted since
                return self._submit(find(self._root, job.jid), job.digest, fresh)
        raise BackendError(f"{self._root / job.name} is in the way of a job; remove it.")

    def _submit(self, record: Record, digest: str, fresh: bool) -> JobStatus:
        if (files := read_files(record)).closed == DELETED:  # by a pman that is at it, or was killed before it was done
            self._delete(record)
            raise NotFound("The job was deleted.")
        if record.digest != digest:
            raise jid_taken(record.jid)
        if files.slurm_id is None:
            with locked(record, wait_seconds=2 * END_SECONDS) as trash:
                try:
                    if self._hand_over(record, look=not fresh):
                        return make_status(record, JobState.NOT_STARTED)
                except BadRequest:
                    trash.append(take_away(record))
                    raise
        return self.status(record.jid)

    def _hand_over(self, record: Record, look: bool) -> bool:
        """sbatch, unless that was done; `look` for a SLURM job of an earlier try. False when there was one.

        Holds the lock. What a look cannot see, an sbatch that is still on its way, the claim keeps from running.
        """
        files = read_files(record)
        if files.slurm_id or files.closed:
            return False
        fresh = False
        known = files.claim
        if look and not known:
            known = next((job.id for job in self._ask([(record, files)])[slurm_name(record)]), None)
        if not known:
            known, fresh = self._sbatch(record)
        write(record.directory / "slurm_id", known)
        return fresh

    def _sbatch(self, record: Record) -> tuple[str, bool]:
        """The number of the SLURM job, and whether it is a new one."""
        script = (record.directory / "job.sh").read_text(encoding="utf-8")
        options = (f"--job-name={slurm_name(record)}", f"--chdir={record.directory}", "--ignore-pbs")
        try:
            return self._commands.sbatch(script, *options), True
        except BadRequest:  # also for the limit of jobs, which an earlier sbatch that got through may have used up
            if earlier := close(record, LOST):
                return earlier, False
            raise

    def _ask(self, asked: Sequence[tuple[Record, Files]]) -> dict[str, list[SlurmJob]]:
        """The SLURM jobs of each attempt by its name: from squeue, also from sacct where it has forgotten the owner."""
        now, jobs = time.monotonic(), {}
        for record, files in asked:
            name = slurm_name(record)
            seen = self._queue.jobs(name, now - QUEUE_AGE_SECONDS)
            jobs[name] = seen if _owner(files, seen) else self._queue.jobs(name, now)
        forgotten = {slurm_name(r): r for r, files in asked if not _owner(files, jobs[slurm_name(r)])}
        if forgotten:
            for job in self._commands.sacct(list(forgotten), min(record.created_at for record in forgotten.values())):
                if _ended(job) or time.time() - forgotten[job.name].created_at < ACCOUNTS_LAG_SECONDS:
                    jobs[job.name] = [*jobs[job.name], job]
        return jobs

    def status(self, jid: str) -> JobStatus:
        record = find(self._root, jid)
        files = read_files(record)
        if files.closed == DELETED:
            raise no_such_job(jid)
        if files.final:
            return files.final
        if files.result and not files.result[0]:
            return self._ended_well(record, files)
        if files.unknown_to_slurm:
            return self._catch_up(record)
        try:
            jobs = self._ask([(record, files)])[slurm_name(record)]
        except Unreachable:
            if files.result is None or _recent(files.result[2]):
                raise
            jobs = []
        return self._judge(record, files, jobs)

    def jobs(self, limit: int) -> list[JobStatus]:
        found = []
        for record in newest(self._root, limit):
            with contextlib.suppress(NotFound):
                if (files := read_files(record)).closed != DELETED:
                    found.append((record, files))
        jobs = self._ask([entry for entry in found if not (entry[1].final or entry[1].unknown_to_slurm)])
        statuses = []
        for record, files in found:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                if files.final:
                    statuses.append(files.final)
                elif files.unknown_to_slurm:
                    statuses.append(make_status(record, JobState.NOT_STARTED))
                else:
                    statuses.append(self._judge(record, files, jobs[slurm_name(record)]))
        return statuses

    def _catch_up(self, record: Record) -> JobStatus:
        """Submit a job whose pman was killed before it did."""
        try:
            with locked(record, wait_seconds=0):
                self._hand_over(record, look=True)
        except Busy:
            pass  # another thread or process is at it
        except BadRequest as error:
            return settle(make_status(record, JobState.FAILED, str(error)))
        return make_status(record, JobState.NOT_STARTED)

    def _ended_well(self, record: Record, files: Files) -> JobStatus:
        assert files.result
        with contextlib.suppress(Unreachable):  # the result is there all the same
            jobs = self._queue.jobs(slurm_name(record), time.monotonic() - QUEUE_AGE_SECONDS)
            if any(job.id == files.claim and not _ended(job) for job in jobs) and _recent(files.result[2]):
                return make_status(record, JobState.STARTED)  # the script is just leaving
        return settle(make_status(record, JobState.SUCCEEDED, "", files.result[2]))

    def _judge(self, record: Record, asked: Files, jobs: list[SlurmJob]) -> JobStatus:
        """What becomes of the job whose directory said `asked`, whereupon SLURM said `jobs`."""
        files = read_files(record)  # again: SLURM was asked before, so what it saw end has left its files
        if files.claim != asked.claim:  # perhaps by a SLURM job that is younger than SLURM's answer
            return self._judge(record, files, self._ask([(record, files)])[slurm_name(record)])
        job = _owner(files, jobs)
        if files.result and (job is None or _ended(job) or not _recent(files.result[2])):
            code, reason, ended_at = files.result
            state = JobState.FAILED if code else JobState.SUCCEEDED
            return settle(make_status(record, state, _explain(code, reason, job), ended_at))
        if files.claim is None and (job is None or _ended(job)) and close(record, LOST):
            return make_status(record, JobState.STARTED)  # by a second SLURM job, at this moment
        if job is None:
            return settle(make_status(record, JobState.FAILED, _lost(record, files)))
        return _by_slurm(record, files, job)

    def logs(self, status: JobStatus, max_lines: int) -> str:
        record = status.private
        assert isinstance(record, Record)
        text = logs.tail_workers(record.directory, record.workers, max_lines, self._max_log_bytes)
        if status.state is not JobState.FAILED:
            return text
        said = _slurm_logs(record, max_lines, self._max_log_bytes)
        return logs.tail(logs.join_streams((text, *said)), max_lines, self._max_log_bytes)

    def delete(self, jid: str) -> None:
        self._delete(find(self._root, jid))

    def _delete(self, record: Record) -> None:
        with locked(record, wait_seconds=2 * END_SECONDS) as trash:
            if not read_files(record).final:
                self._end(record)
            trash.append(take_away(record))

    def _end(self, record: Record) -> None:
        """Nothing of the job starts any more, and what runs of it ends."""
        close(record, DELETED)
        cancelled = set[str]()

        def ended() -> bool:
            jobs = self._queue.jobs(slurm_name(record), time.monotonic())
            active = {job.id for job in jobs if not _ended(job)}
            if new := sorted(active - cancelled):
                self._commands.run("scancel", "--quiet", *new)
                cancelled.update(new)
            return not active

        if not retry.wait_until(ended, END_SECONDS):
            raise Unreachable(f"SLURM has not ended job {' '.join(sorted(cancelled))} yet.")

    def ping(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unreachable(f"The state directory {self._root} cannot be written.")
        self._queue.jobs("", time.monotonic() - QUEUE_AGE_SECONDS)


def problems(settings: Settings) -> Iterator[str]:
    """Why the settings are not enough."""
    base, own = settings.storebase, settings.slurm_state_dir
    if own is None or (base is not None and Path(own).is_relative_to(base)):
        yield (
            "SLURM_STATE_DIR is required with CONTAINER_ENV=slurm: "
            "set it to a directory outside STOREBASE that compute nodes see under the same path."
        )


def warnings(settings: Settings) -> list[str]:
    """What the settings ask for in vain."""
    return directories.warnings(settings, settings.slurm_runtime)


def create(settings: Settings) -> SlurmBackend:
    """The backend over SLURM_STATE_DIR."""
    assert settings.slurm_state_dir  # settings.check_for_service
    commands = Commands(settings.slurm_command_prefix, settings.slurm_timeout_seconds)
    return SlurmBackend(Path(settings.slurm_state_dir), commands, settings.job_logs_max_kib * 1024)


def _recent(when: datetime) -> bool:
    return abs((datetime.now(UTC) - when).total_seconds()) < RESULT_SETTLES_SECONDS


def _ended(job: SlurmJob) -> bool:
    return STATES.get(job.state, (JobState.UNDEFINED, ""))[0].final


def _owner(files: Files, jobs: list[SlurmJob]) -> SlurmJob | None:
    """Of the SLURM jobs of one attempt, the one that counts: it has the claim, or may still take it."""
    if files.claim:
        return next((job for job in jobs if job.id == files.claim), None)
    return next((job for job in jobs if not _ended(job)), jobs[-1] if jobs else None)


def _by_slurm(record: Record, files: Files, job: SlurmJob) -> JobStatus:
    """What SLURM says, for a job that has left no result of its own."""
    state, message = STATES.get(job.state, (JobState.UNDEFINED, f"SLURM says {job.state}."))
    if state is JobState.UNDEFINED:
        log.warning("job %s is %s in SLURM", record.jid, job.state)
    if files.claim == job.id and job.state in HELD:
        return settle(make_status(record, JobState.FAILED, message))
    if not _ended(job):
        if state is JobState.NOT_STARTED and files.claim == job.id:
            state, message = JobState.STARTED, ""  # squeue is a moment behind
        elif job.state == "PENDING" and job.reason not in ("", "None"):
            message = f"Waiting in SLURM's queue: {job.reason}."
        return make_status(record, state, message)
    if files.claim is None and state is JobState.SUCCEEDED:
        state = JobState.FAILED
    if state is JobState.FAILED and not message:
        message = (
            f"SLURM says {job.state} ({job.reason}). {_UNCLAIMED if files.claim is None else _said(record)}".strip()
        )
    return settle(make_status(record, state, message, job.ended_at))


def _said(record: Record) -> str:
    """What slurmstepd last complained of, such as the memory limit, where it killed the script with the rest."""
    text = "".join(_slurm_logs(record, 20, 4096))
    return next(iter(re.findall(r"^slurmstepd\S* error: (?!\*\*\*)(.+)", text, re.MULTILINE)[::-1]), "")


def _slurm_logs(record: Record, max_lines: int, max_bytes: int) -> Iterator[str]:
    for path in sorted(record.directory.glob("slurm-*.log")):
        yield logs.tail_file(path, max_lines, max_bytes, within=record.directory.resolve())


def _explain(code: int, reason: str, job: SlurmJob | None) -> str:
    """SLURM knows better than the script why a signal came; the script knows its own exit code."""
    said = STATES[job.state][1] if code and job and _ended(job) else ""
    return said or reason or explain_exit(code)


def _lost(record: Record, files: Files) -> str:
    if files.claim is None:
        return "SLURM no longer knows the job, and it never began: it was cancelled while it was waiting."
    try:
        return (record.directory / "ending").read_text(errors="replace").strip().partition(" ")[2]
    except FileNotFoundError:
        return "The job ended without a result, and SLURM no longer knows it: it was killed, or its node failed."
