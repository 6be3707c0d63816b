"""PBS: jobs are directories on a file system that the nodes share, and batch jobs that carry their scripts.

What is said here of PBS is in the manual pages and the sources of OpenPBS (https://github.com/openpbs/openpbs).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pman.backends import directories, logs, retry
from pman.backends.directories import Record, find, make_status
from pman.backends.discovery import Overview
from pman.errors import BackendError, Misconfigured, NotFound, Unreachable, jid_taken
from pman.job import Job
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, explain_exit
from pman.templating.render import Spec

# job_state of qstat(1B), all of them: https://github.com/openpbs/openpbs/blob/master/doc/man1/qstat.1B
STATES: dict[str, JobState] = {
    "B": JobState.STARTED,  # an array that has begun
    "E": JobState.STARTED,  # is ending
    "F": JobState.FAILED,  # has ended; one that was successful has left its result
    "H": JobState.NOT_STARTED,  # held
    "M": JobState.UNDEFINED,  # moved to another server
    "Q": JobState.NOT_STARTED,
    "R": JobState.STARTED,
    "S": JobState.STARTED,  # suspended
    "T": JobState.NOT_STARTED,  # on its way to another server
    "U": JobState.STARTED,  # suspended, since somebody works at the machine
    "W": JobState.NOT_STARTED,  # waits for its time
    "X": JobState.FAILED,  # a part of an array that has ended
}
UNKNOWN, ENDED = 153, 35  # PBSE_UNKJOBID (15001) and PBSE_HISTJOBID (15139) of pbs_error.h, as exit statuses
COMMAND_SECONDS = 20.0
STOP_SECONDS = 30.0


class PbsBackend:
    """Runs jobs with qsub. Several pman processes may share one state directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            directories.open_root(root)
        except OSError as error:
            raise Misconfigured(f"PBS_STATE_DIR={root} cannot be made: {error.strerror}.") from None

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        with directories.alone(self._root, job.jid):
            try:
                record = find(self._root, job.jid)
            except NotFound:
                made = directories.create(self._root, job, spec, lambda record: (f"attempt.{record.token}",))
                assert made, "nobody else is here"
                record = made
            if record.digest != job.digest:
                raise jid_taken(job.jid)
            _start(record)
        return self._statuses([record])[0]

    def status(self, jid: str) -> JobStatus:
        record = find(self._root, jid)
        if not _ids(record):  # pman was killed between making the directory and calling qsub
            with directories.alone(self._root, jid):
                _start(record := find(self._root, jid))
        return self._statuses([record])[0]

    def workers(self, status: JobStatus) -> int:
        assert isinstance(status.private, Record)
        return status.private.workers

    def streams(self, status: JobStatus, worker: int, wanted: logs.Wanted) -> list[str]:
        assert isinstance(status.private, Record)
        return logs.tail_streams(status.private.directory, worker, wanted)

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        return directories.spec(status, environment)

    def details(self, status: JobStatus) -> Details:
        assert isinstance(status.private, Record)
        return directories.details(status, backend_id=next(iter(_ids(status.private)[::-1]), None))

    def delete(self, jid: str) -> None:
        with directories.alone(self._root, jid):
            record = find(self._root, jid)
            (record.directory / f"attempt.{record.token}").unlink(missing_ok=True)  # nothing starts from now on
            for pbs_id in _ids(record):
                _pbs("qdel", pbs_id, right=(0, UNKNOWN, ENDED))
            if not retry.wait_until(lambda: {"F", "X"}.issuperset(_letters(_ids(record)).values()), STOP_SECONDS):
                raise Unreachable("The job does not end.")
            directories.discard(record)

    def jobs(self, limit: int) -> list[JobStatus]:
        return directories.with_users(self._statuses(directories.newest(self._root, limit)))

    def ping(self) -> None:
        _pbs("qstat", "-B")

    def overview(self) -> Overview:
        return Overview(unasked=["queues and nodes: this example does not ask PBS for them"])

    def _statuses(self, records: list[Record]) -> list[JobStatus]:
        letters = _letters([pbs_id for record in records for pbs_id in _ids(record)])
        return [_status(record, letters.get(_ids(record)[-1] if _ids(record) else "", "")) for record in records]


def _status(record: Record, letter: str) -> JobStatus:
    """letter: the state of the job in PBS, "" where it knows none. A result is read after it, so none is missed."""
    if result := directories.result(record.directory):
        code, reason, finished_at = result
        state = JobState.FAILED if code else JobState.SUCCEEDED
        return make_status(record, state, reason or explain_exit(code), finished_at)
    if not letter:
        return make_status(record, JobState.UNDEFINED, "PBS does not know the job.")
    state = STATES.get(letter, JobState.UNDEFINED)
    return make_status(record, state, "PBS has ended the job before it had a result." if state.final else "")


def _ids(record: Record) -> list[str]:
    """Numbers of the PBS jobs that carry this attempt; the one that runs it last."""
    with contextlib.suppress(FileNotFoundError):
        claims = [path.name.removeprefix("claim.") for path in record.directory.glob("claim.*")]
        return [*(record.directory / "pbs-ids").read_text().split(), *claims]
    return []


def _start(record: Record) -> None:
    """Only for whoever is alone with the job. Carried twice, it runs once: the script claims the attempt."""
    if not _ids(record):
        found = _pbs("qsub", "-v", f"PMAN_ATTEMPT={record.token}", "job.sh", cwd=record.directory)
        (record.directory / "pbs-ids").write_text(found)


def _letters(pbs_ids: list[str]) -> dict[str, str]:
    if not pbs_ids:
        return {}
    answer = _pbs("qstat", "-x", "-f", "-F", "json", *pbs_ids, right=(0, UNKNOWN))
    return {name: job["job_state"] for name, job in json.loads(answer or "{}").get("Jobs", {}).items()}


def _pbs(*command: str, right: tuple[int, ...] = (0,), cwd: Path | None = None) -> str:
    """What a command of PBS prints. Raises Unreachable and BackendError."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"{command[0]} does not answer: {error}.") from error
    if done.returncode not in right:
        raise BackendError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def problems(settings: Settings) -> Iterator[str]:
    """Why the settings are not enough."""
    if settings.pbs_state_dir is None:
        yield "PBS_STATE_DIR is required with CONTAINER_ENV=pbs."


def create(settings: Settings) -> PbsBackend:
    """The backend over PBS_STATE_DIR."""
    assert settings.pbs_state_dir
    return PbsBackend(Path(settings.pbs_state_dir))
