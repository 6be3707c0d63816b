"""The embedded backend: jobs are processes of this machine, and a directory each is all there is to know of them.

State directory of a job, `<LOCAL_STATE_DIR>/<name>/`, made by one atomic rename:
  job.json     jid, digest, image, cmd
  job.sh       the rendered script
  claim        "SESSION SUPERVISOR": process ids, linked by the one process that runs the job (or "deleted")
  stdout.N, stderr.N   of worker N
  rc           "EXIT_CODE REASON", renamed into place by the script after its last process ended
The script is its own lock: it may be started any number of times and by anybody, but only one start wins the claim.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pman import logs
from pman.errors import BackendError, Conflict, NotFound, Unreachable
from pman.job import Job, backend_name
from pman.render import Spec
from pman.settings import Settings
from pman.status import JobState, JobStatus, explain_exit

log = logging.getLogger(__name__)

# What the files of a job say -> the state. `alive`: a process of the job's session exists.
#        (claimed, alive, rc)
STATES: dict[tuple[bool, bool, bool], JobState] = {
    (False, False, False): JobState.NOT_STARTED,
    (True, True, False): JobState.STARTED,
    (True, True, True): JobState.STARTED,  # the result is written, the last process is just leaving
    (True, False, True): JobState.SUCCEEDED,  # or FAILED, by the exit code
    (True, False, False): JobState.FAILED,  # killed, or the machine was restarted
}
STOP_SECONDS = 12.0  # the script allows its processes 10 s between TERM and KILL
START_SECONDS = 10.0
# The jobs' own environment: pman's holds secrets.
_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": os.path.expanduser("~")}


@dataclass(frozen=True, slots=True)
class _Record:
    directory: Path
    jid: str
    digest: str
    image: str
    cmd: str
    workers: int


class LocalBackend:
    """Runs jobs on this machine. Several pman processes may share one state directory."""

    def __init__(self, state_dir: Path, max_log_bytes: int) -> None:
        self._root = state_dir
        self._max_log_bytes = max_log_bytes
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in (p for p in state_dir.glob(".*-*") if time.time() - p.stat().st_mtime > 3600):
            shutil.rmtree(leftover, ignore_errors=True)

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        directory = self._root / job.name
        if not directory.is_dir():
            self._create(directory, job, spec)
        record = self._find(job.jid)
        if record.digest != job.digest:
            raise Conflict(f"There is another job with jid {job.jid}; delete it first, or use another jid.")
        _start(record.directory)
        return self._status(record)

    def _create(self, directory: Path, job: Job, spec: Spec) -> None:
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
        fields = {"jid": job.jid, "digest": job.digest, "image": job.image, "cmd": job.cmd, "workers": job.workers}
        (fresh / "job.json").write_text(json.dumps(fields))
        (fresh / "job.sh").write_text(spec.text, encoding="utf-8")
        try:
            fresh.rename(directory)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise Unreachable(f"The state directory cannot be written: {error.strerror}.") from error

    def status(self, jid: str) -> JobStatus:
        record = self._find(jid)
        status = self._status(record)
        if status.state is JobState.NOT_STARTED:
            _start(record.directory)  # pman was killed between making the directory and starting the script
        return status

    def _find(self, jid: str) -> _Record:
        record = _read(self._root / backend_name(jid))
        if record is None or record.jid != jid:
            raise NotFound(f"There is no job with jid {jid}.")
        return record

    def _status(self, record: _Record) -> JobStatus:
        claim = _claim(record.directory)
        alive = claim is not None and _alive(record.directory, *claim)
        result = _result(record.directory)  # read after `alive`: the script writes it before it ends
        if claim and alive and result:
            alive = not _swept(record.directory, *claim)
        state = STATES[(claim is not None, alive, result is not None)]
        message, finished_at = "", None
        if state.final:
            code, reason, finished_at = result or (None, "", _mtime(record.directory / "claim"))
            state = JobState.SUCCEEDED if code == 0 else JobState.FAILED
            message = reason or _explain(code)
        return JobStatus(record.jid, record.image, record.cmd, state, message, finished_at, private=record)

    def logs(self, status: JobStatus, max_lines: int) -> str:
        record = status.private
        assert isinstance(record, _Record)
        return logs.tail_workers(record.directory, record.workers, max_lines, self._max_log_bytes)

    def delete(self, jid: str) -> None:
        record = self._find(jid)
        trash = Path(tempfile.mkdtemp(prefix=".trash-", dir=self._root))
        try:
            if not _claim_as_deleted(record.directory):
                _stop(record.directory)
            record.directory.rename(trash / "job")
        except FileNotFoundError:  # another DELETE was faster
            raise NotFound(f"There is no job with jid {jid}.") from None
        finally:
            shutil.rmtree(trash, ignore_errors=True)

    def jobs(self, limit: int) -> list[JobStatus]:
        records = sorted(self._root.glob("[!.]*/job.json"), key=_mtime, reverse=True)[:limit]
        return [self._status(record) for path in records if (record := _read(path.parent))]

    def ping(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unreachable(f"The state directory {self._root} cannot be written.")


def create(settings: Settings) -> LocalBackend:
    """The backend over LOCAL_STATE_DIR."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return LocalBackend(settings.local_state_dir or Path(home, "pman", "jobs"), settings.job_logs_max_kib * 1024)


def _read(directory: Path) -> _Record | None:
    try:
        return _Record(directory, **json.loads((directory / "job.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _start(directory: Path) -> None:
    if (directory / "claim").exists():
        return
    try:
        subprocess.run(
            ["bash", "job.sh"], cwd=directory, env=_ENVIRONMENT, start_new_session=True, timeout=START_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise NotFound("The job was deleted while it was being started.") from None
    except (subprocess.SubprocessError, OSError) as error:
        raise BackendError(f"The job's script could not be started: {error}.") from error


def _claim(directory: Path) -> tuple[int, int] | None:
    """Session and supervisor of the job, (0, 0) while it is being deleted, None before it was started."""
    try:
        words = (directory / "claim").read_text().split()
    except FileNotFoundError:
        return None
    return (0, 0) if words == ["deleted"] else (int(words[0]), int(words[1]))


def _claim_as_deleted(directory: Path) -> bool:
    """Take the claim so that nothing ever starts the job; False when it was taken before."""
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".claim.") as file:
        file.write("deleted\n")
        file.flush()
        try:
            os.link(file.name, directory / "claim")
        except FileExistsError:
            return False
    return True


def _alive(directory: Path, session: int, supervisor: int) -> bool:
    """True while a process of the job's session exists, and the session is not another one with the same number.

    Linux gives no new process the number of a session that has members, so the number is ours as long as its
    members are older than the claim, or have no process of that number at their head.
    """
    if not session:
        return False
    claimed_at = _mtime(directory / "claim")
    if psutil.boot_time() > claimed_at.timestamp():
        return False
    return _is_ours(supervisor, claimed_at) or any(_members(session, claimed_at))


def _is_ours(pid: int, claimed_at: datetime) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= claimed_at.timestamp() + 1
    except psutil.NoSuchProcess:
        return False


def _members(session: int, claimed_at: datetime) -> Iterator[int]:
    if psutil.pid_exists(session) and not _is_ours(session, claimed_at):
        return  # the number was given away since, which happens only after our session ended
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                yield pid


def _swept(directory: Path, session: int, supervisor: int) -> bool:
    """After the result: kill what the command left in process groups of its own; True when nothing is left."""
    claimed_at = _mtime(directory / "claim")
    if _is_ours(supervisor, claimed_at):
        return False  # just leaving
    for pid in _members(session, claimed_at):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not any(_members(session, claimed_at))


def _stop(directory: Path) -> None:
    """End every process of the job: the script's own orderly end first, KILL for what is left."""
    claim = _claim(directory)
    if claim is None or not _alive(directory, *claim):
        return
    session, supervisor = claim
    claimed_at = _mtime(directory / "claim")
    if _is_ours(supervisor, claimed_at):
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
        if not _wait_until(lambda: not _is_ours(supervisor, claimed_at), STOP_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor, signal.SIGKILL)
    if not _wait_until(lambda: _swept(directory, session, supervisor), STOP_SECONDS):
        raise Unreachable("The job's processes do not end.")


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _result(directory: Path) -> tuple[int, str, datetime] | None:
    try:
        code, _, reason = (directory / "rc").read_text(errors="replace").rstrip("\n").partition(" ")
    except FileNotFoundError:
        return None
    return int(code), reason, _mtime(directory / "rc")


def _mtime(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.now(UTC)


def _explain(code: int | None) -> str:
    if code is None:
        return "The job ended without a result: it was killed, or the machine was restarted."
    return explain_exit(code)
