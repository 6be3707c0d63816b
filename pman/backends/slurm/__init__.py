"""SLURM without anything in between: sbatch, squeue, sacct and scancel, and a directory for each job.

sbatch may run twice for one attempt at a job (pman killed at the wrong moment): the job's own claim lets one of the two
run. state.py says what a job's directory holds, commands.py how SLURM is asked, words.py what its words mean,
sources.py which answer may be believed for what, verdict.py what becomes of the job.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pman.backends import directories, logs, retry
from pman.backends.directories import Record, find, make_status, newest, pulled_image, take_away
from pman.backends.discovery import Overview
from pman.backends.logs import Wanted
from pman.backends.slurm import state as disk
from pman.backends.slurm import verdict
from pman.backends.slurm.commands import Commands, Failed, Place, SlurmJob
from pman.backends.slurm.discovery import discover as discover
from pman.backends.slurm.discovery import overview
from pman.backends.slurm.sources import Seen, Sources, owner
from pman.backends.slurm.words import BY_HAND, cannot_heal
from pman.errors import (
    BackendError,
    BadRequest,
    Misconfigured,
    NotFound,
    TemplateError,
    Unreachable,
    jid_taken,
    no_such_job,
)
from pman.job import Job
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, Reason, Why
from pman.targets import TARGETS
from pman.targets.record import Problem
from pman.templating.render import Renderer, Spec

log = logging.getLogger(__name__)

END_SECONDS = 30.0  # the script allows its processes 10 s between TERM and KILL, and as much to the site's epilogue
SUBMIT_TRIES = 100  # each but the last one met a DELETE


class SlurmBackend:
    """Runs jobs on SLURM. Any number of pman processes may share one state directory.

    renderer: makes the script anew of a job that SLURM has not taken yet.
    patience_seconds: how long a job may wait for what cannot come before it is ended.
    """

    def __init__(self, root: Path, commands: Commands, renderer: Renderer, patience_seconds: float = 900.0) -> None:
        self._root = root
        self._renderer = renderer
        self._commands = commands
        self._sources = Sources(commands)
        self._patience_seconds = patience_seconds
        try:
            directories.open_root(root)
            disk.require_locks(root)
        except OSError as error:
            raise Misconfigured(f"SLURM_STATE_DIR={root} cannot be made: {error.strerror}.") from None

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        for _ in range(SUBMIT_TRIES):
            fresh = disk.create_directory(self._root, job, spec)
            with contextlib.suppress(NotFound):  # deleted since
                return self._submit(find(self._root, job.jid), job.digest, None if fresh else spec)
        raise BackendError(f"{self._root / job.name} is in the way of a job; remove it.")

    def _submit(self, record: Record, digest: str, again: Spec | None) -> JobStatus:
        files = disk.read_files(record)
        if files.closed == disk.DELETED:  # by a pman that is at it, or was killed before it was done
            self._delete(record)
            raise NotFound("The job was deleted.")
        if record.digest != digest:
            raise jid_taken(record.jid)
        if files.slurm_id is None:
            with disk.locked(record, wait_seconds=2 * END_SECONDS) as trash:
                try:
                    if self._hand_over(record, lambda: again, first=again is None):
                        return make_status(record, JobState.NOT_STARTED)
                except (BadRequest, TemplateError):
                    trash.append(take_away(record))
                    raise
        return self.status(record.jid)

    def _hand_over(self, record: Record, again: Callable[[], Spec | None], *, first: bool) -> bool:
        """sbatch, unless that was done; False when there is a SLURM job of an earlier try, for which not `first` looks.

        again: makes the script of another try, from templates that may have been mended since; None: as it is. Only
        for whoever holds the lock. A look does not see an sbatch that is still on its way: the claim stops its job.
        """
        files = disk.read_files(record)
        if files.slurm_id or files.closed:
            return False
        known = files.claim or (None if first else self._sources.earlier(record, files))
        number, fresh = (known, False) if known else self._sbatch(record, again)
        disk.write(record.directory / "slurm_id", number)
        return fresh

    def _sbatch(self, record: Record, again: Callable[[], Spec | None]) -> tuple[str, bool]:
        """The number of the SLURM job, and whether it is a new one."""
        try:
            if spec := again():
                disk.write(record.directory / "job.sh", spec.text)
            script = (record.directory / "job.sh").read_text(encoding="utf-8")
            options = (f"--job-name={disk.slurm_name(record)}", f"--chdir={record.directory}", "--ignore-pbs")
            return self._commands.sbatch(script, *options), True
        except (BadRequest, TemplateError):  # an earlier sbatch may have got through all the same
            if earlier := disk.close(record, disk.LOST):
                return earlier, False
            raise

    def status(self, jid: str) -> JobStatus:
        record = find(self._root, jid)
        files = disk.read_files(record)
        if files.closed == disk.DELETED:
            raise no_such_job(jid)
        if files.final:
            return files.final
        if files.unknown_to_slurm:
            return self._catch_up(record)
        try:
            seen = self._sources.look([(record, files)])[record.token]
        except Unreachable as error:
            seen = Seen(error=str(error))
        return self._judge(record, files, seen)

    def jobs(self, limit: int) -> list[JobStatus]:
        found = []
        for record in newest(self._root, limit):
            with contextlib.suppress(NotFound):
                if (files := disk.read_files(record)).closed != disk.DELETED:
                    found.append((record, files))
        seen = self._sources.look([entry for entry in found if not (entry[1].final or entry[1].unknown_to_slurm)])
        statuses = []
        for record, files in found:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                statuses.append(files.final or self._listed(record, files, seen.get(record.token)))
        return directories.with_users(statuses)

    def _listed(self, record: Record, files: disk.Files, seen: Seen | None) -> JobStatus:
        """The job in a listing, which one that cannot be judged now does not spoil."""
        message = ""
        if seen:
            try:
                return self._judge(record, files, seen, listed=True)
            except Unreachable as error:
                message = str(error)
        return make_status(record, JobState.STARTED if files.claim else JobState.NOT_STARTED, message)

    def _catch_up(self, record: Record) -> JobStatus:
        """Submit a job whose pman was killed before it did. Where the template is at fault, the jid is free again."""
        try:
            with disk.locked(record, wait_seconds=0) as trash:
                try:
                    self._hand_over(record, lambda: self._render(record), first=False)
                except TemplateError:
                    trash.append(take_away(record))
                    raise
        except disk.Busy:
            pass  # another thread or process is at it
        except BadRequest as error:
            return disk.settle(make_status(record, JobState.FAILED, Why(str(error), Reason.REFUSED)))
        return make_status(record, JobState.NOT_STARTED)

    def _render(self, record: Record) -> Spec | None:
        job = directories.posted(record)
        return self._renderer.render(job, "slurm") if job else None

    def _judge(self, record: Record, asked: disk.Files, seen: Seen, *, listed: bool = False) -> JobStatus:
        """What becomes of the job whose directory said `asked`, whereupon SLURM said `seen`. Raises Unreachable.

        listed: nothing is asked about this job alone, of which a listing may have thousands.
        """
        files = disk.read_files(record)  # again: SLURM was asked before, so what it saw end has left its files
        if files.claim != asked.claim:  # perhaps by a SLURM job that is younger than SLURM's answer
            return self._judge(record, files, self._sources.look([(record, files)])[record.token])
        job = owner(files, seen.jobs)
        if files.result and (verdict.over(files, job) if job else _stands(record, files, seen)):
            return disk.settle(make_status(record, *verdict.by_result(record, files, job), files.result[2]))
        if job is None and not seen.gone:
            raise Unreachable(seen.error or "SLURM does not say what has become of the job.")
        if files.claim is None and (job is None or verdict.ended(job)) and disk.close(record, disk.LOST):
            return make_status(record, JobState.STARTED)  # by a second SLURM job, at this moment
        if job is None:
            return disk.settle(make_status(record, JobState.FAILED, verdict.by_absence(record, files)))
        if verdict.ended(job):
            unbegun = files.claim is None and job.state == "CANCELLED"
            nodes = self._commands.place(job.id).nodes if unbegun and not listed else ()
            status = make_status(record, *verdict.by_slurm(record, files, job, nodes), job.ended_at)
            return status if unbegun and listed else disk.settle(status)  # the next GET of it says more
        return self._active(record, files, job)

    def _active(self, record: Record, files: disk.Files, job: SlurmJob) -> JobStatus:
        state, message = verdict.state_of(job)
        if state is JobState.UNDEFINED:
            log.warning("job %s is %s in SLURM", record.jid, job.state)
        if state is JobState.STARTED and files.claim != job.id:
            return make_status(record, JobState.NOT_STARTED, message or verdict.LAUNCHING)
        if not verdict.waits(job):
            image = pulled_image(record.directory)
            return make_status(record, state, message or (f"Pulling the image {image}." if image else ""))
        if files.claim == job.id:
            if job.state in verdict.HELD and not disk.may_begin_again(record):
                return disk.settle(make_status(record, JobState.FAILED, message))
            message = f"{verdict.REQUEUED} {message}".strip()
        elif job.state == "PENDING" and job.reason not in ("", "None"):
            return self._pending(record, job)
        return make_status(record, state, message)

    def _pending(self, record: Record, job: SlurmJob) -> JobStatus:
        """A job that has not begun, with SLURM's reason. One that waits in vain is ended when patience is over."""
        vain = cannot_heal(job.reason)
        waited_seconds = time.time() - disk.stuck_since(record, job.reason if vain else "")
        if not vain or waited_seconds < self._patience_seconds:
            held = " Somebody has to release it." if job.reason in BY_HAND else ""
            return make_status(record, JobState.NOT_STARTED, f"Waiting in SLURM's queue: {job.reason}.{held}")
        try:
            with disk.locked(record, wait_seconds=0):
                if disk.close(record, disk.LOST):
                    return make_status(record, JobState.STARTED)
                self._commands.run("scancel", "--quiet", job.id)
        except disk.Busy:
            return make_status(record, JobState.NOT_STARTED)
        sentence = f"SLURM cannot start the job: {job.reason}. pman gave it up after {waited_seconds / 60:.0f} min."
        return disk.settle(make_status(record, JobState.FAILED, Why(sentence, Reason.REFUSED)))

    def workers(self, status: JobStatus) -> int:
        return status.kept(Record).workers

    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        """The first worker's have what SLURM says of a job that failed, which leaves most lines to the worker."""
        record = status.kept(Record)
        own = logs.tail_streams(record.directory, worker, wanted)
        is_told = worker == 0 and status.state is JobState.FAILED
        lines = wanted.lines if wanted.grows else max(1, wanted.lines // 4)
        return [*own, *(verdict.slurm_logs(record, lines, wanted.max_bytes) if is_told else ())]

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        return directories.spec(status, environment)

    def details(self, status: JobStatus) -> Details:
        record = status.kept(Record)
        files = disk.read_files(record)
        number = files.claim or files.slurm_id
        place = self._commands.place(number) if number and number.isdecimal() else Place()
        began = place.started_at if files.claim else None
        nodes, partition = place.nodes or None, place.partition or None
        return directories.details(status, backend_id=number, partition=partition, nodes=nodes, started_at=began)

    def delete(self, jid: str) -> None:
        self._delete(find(self._root, jid))

    def _delete(self, record: Record) -> None:
        with disk.locked(record, wait_seconds=2 * END_SECONDS) as trash:
            if (files := disk.read_files(record)).final:
                self._cancel_others(record, files)
            else:
                self._end(record)
            trash.append(take_away(record))

    def _cancel_others(self, record: Record, files: disk.Files) -> None:
        """Take jobs out of the queue that carry an attempt which another one has run: they could only end at once."""
        with contextlib.suppress(Unreachable):
            jobs = self._sources.listed(record, files, fresh=False)
            if others := sorted(job.id for job in jobs if not verdict.ended(job) and job.id != files.claim):
                self._commands.run("scancel", "--quiet", *others)

    def _end(self, record: Record) -> None:
        """Nothing of the job starts any more, and what runs of it ends: SLURM says so of each of its numbers."""
        disk.close(record, disk.DELETED)
        cancelled, past, left, looks = set[str](), set[str](), list[str](), 0

        def ended_all() -> bool:
            nonlocal looks
            files = disk.read_files(record)
            left[:] = [job.id for job in self._sources.active(record, files, past) if not verdict.over(files, job)]
            if new := sorted(set(left) - cancelled):
                self._commands.run("scancel", "--quiet", *new)
                cancelled.update(new)
            looks += 1
            return not left and (bool(files.numbers) or looks > 1)  # without a number two lists have to agree

        if not retry.wait_until(ended_all, END_SECONDS):
            numbers = " ".join(left)
            raise Unreachable(f"SLURM has not ended job {numbers} within {END_SECONDS:.0f} s; delete it again.")

    def ping(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unreachable(f"The state directory {self._root} cannot be written.")
        self._sources.ping()

    def overview(self) -> Overview:
        return overview(self._commands)


def problems(settings: Settings) -> Iterator[str]:
    base, own = settings.storebase, settings.slurm_state_dir
    if own is None or (base is not None and Path(own).is_relative_to(base)):
        yield (
            "SLURM_STATE_DIR is required with CONTAINER_ENV=slurm: "
            "set it to a directory outside STOREBASE that compute nodes see under the same path."
        )


def warnings(settings: Settings) -> list[str]:
    return directories.warnings(settings, settings.slurm_runtime)


# Words of sbatch -> the option that they are about. https://github.com/SchedMD/slurm, src/common/slurm_errno.c.
_ABOUT = {
    "account": "--account", "partition": "--partition", "qos": "--qos", "reservation": "--reservation",
    "time limit": "--time", "memory": "--mem", "gres": "--gres|--gpus", "feature": "--constraint",
    "license": "--licenses", "node": "--ntasks|--nodes|--cpus-per-task|--mem|--gres|--gpus|--constraint",
}  # fmt: skip


def live(settings: Settings, spec: Spec) -> Iterator[Problem]:
    """What SLURM has against a script, by `sbatch --test-only`, which makes no job."""
    commands = Commands(settings.slurm_command_prefix, settings.slurm_timeout_seconds)
    try:
        commands.run("sbatch", "--test-only", "--ignore-pbs", text=spec.text)
    except Failed as error:
        said = error.detail.lower()
        option = next((option for word, option in _ABOUT.items() if word in said), "#!")
        *_, found = [None, *re.finditer(rf"(?m)^#SBATCH ({option})", spec.text)]
        line = spec.text.count("\n", 0, found.start()) + 1 if found else 1
        yield Problem(str(error).replace("sbatch failed", "SLURM would not take this"), line, rule="live")
    if re.search(r"(?m)^AccountingStorageEnforce\s*=\s*none", commands.run("scontrol", "show", "config")):
        said = "SLURM was not asked about accounts and QOS: it enforces none (AccountingStorageEnforce)"
        yield Problem(said, rule="not-asked")
    yield Problem("SLURM was not asked whether its nodes see STOREBASE and SLURM_STATE_DIR", rule="not-asked")


def create(settings: Settings) -> SlurmBackend:
    assert settings.slurm_state_dir  # by check_for_service
    commands = Commands(settings.slurm_command_prefix, settings.slurm_timeout_seconds)
    commands.note_accounts()
    patience_seconds = settings.stuck_job_patience_minutes * 60
    return SlurmBackend(Path(settings.slurm_state_dir), commands, Renderer(settings, TARGETS), patience_seconds)


def _stands(record: Record, files: disk.Files, seen: Seen) -> bool:
    """Whether the script's result counts for a job that SLURM does not show.

    While SLURM does not answer at all, a failure that is recent waits for SLURM's explanation.
    """
    assert files.result
    if seen.gone:
        return True
    return not disk.may_begin_again(record) and not (seen.error and files.result[0] and verdict.recent(files.result[2]))
