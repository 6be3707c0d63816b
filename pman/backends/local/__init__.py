"""The embedded backend: jobs are processes of this machine, and a directory each is all there is to know of them.

State directory of a job, `<LOCAL_STATE_DIR>/<name>/`, besides what directories.py says:
  claim        "SESSION SUPERVISOR START BOOT HOST", linked by the one process that runs the job (or "deleted"): process
               ids, the supervisor's start in clock ticks since that boot of the machine of that name
  work.N       where worker N begins
  ended.TOKEN  made when no process of the job is left: its process ids mean nothing from then on
The script is its own lock: it may be started any number of times and by anybody, but only one start wins the claim.
Machines may share the directory (a home on NFS): each tells and deletes its own jobs only.
What makes or removes a directory holds a lock on the jid, so that nobody removes a job other than the one it looked at.
processes.py says which processes of the machine are a job's.
"""

import contextlib
import logging
import os
import platform
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TypeGuard

from pman.backends import directories, logs, retry
from pman.backends.directories import Record
from pman.backends.discovery import Overview, Place
from pman.backends.local.processes import TOKEN, Claim, is_alive, kill_rest, runs
from pman.backends.logs import Wanted
from pman.errors import BackendError, Conflict, Misconfigured, NotFound, Unreachable, jid_taken, no_such_job
from pman.job import Job
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, Reason, Why
from pman.templating.render import Spec

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
WITHOUT_RESULT = Why("The job ended without a result: it was killed, or the machine was restarted.", Reason.LOST)
STOP_SECONDS = 12.0  # the script allows its processes 10 s between TERM and KILL
START_SECONDS = 10.0
# The jobs' own environment, for pman's holds secrets: and where the container runtimes keep things.
_KEPT = ("TMPDIR", "XDG_RUNTIME_DIR", "CH_IMAGE_STORAGE", "APPTAINER_CACHEDIR", "DOCKER_HOST", "CONTAINER_HOST")
_ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "LANG": "C.UTF-8",
    "HOME": os.path.expanduser("~"),
    **{name: os.environ[name] for name in _KEPT if name in os.environ},
}


class LocalBackend:
    """Runs jobs on this machine. Several pman processes may share one state directory."""

    def __init__(self, state_dir: Path, runtime: str = "none") -> None:
        self._root, self._runtime = state_dir, runtime
        try:
            directories.open_root(state_dir)
        except OSError as error:
            raise Misconfigured(f"LOCAL_STATE_DIR={state_dir} cannot be made: {error.strerror}.") from None

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        with directories.alone(self._root, job.jid):
            record = self._look(job.jid)
            if record and _is_deleted(record.directory):  # by a pman that was killed before it was done
                directories.discard(record)
                record = None
            record = record or directories.create(self._root, job, spec)
            if record is None:
                raise BackendError(f"{self._root / job.name} is in the way of a job; remove it.")
            if record.digest != job.digest:
                raise jid_taken(job.jid)
            _start(record)
            return self._status(record)

    def status(self, jid: str) -> JobStatus:
        record = self._find(jid)
        status = self._status(record)
        if status.state is JobState.NOT_STARTED:  # pman was killed between making the directory and starting the script
            with directories.alone(self._root, jid):
                _start(self._find(jid))
        return status

    def _look(self, jid: str) -> Record | None:
        with contextlib.suppress(NotFound):
            return directories.find(self._root, jid)
        return None

    def _find(self, jid: str) -> Record:
        record = directories.find(self._root, jid)
        if _is_deleted(record.directory):
            raise no_such_job(jid)
        return record

    def _status(self, record: Record) -> JobStatus:
        """Raises NotFound where this attempt has been deleted, whatever has its place by now."""
        claim = _claim(record.directory)
        if _runs_elsewhere(claim, record):
            return directories.make_status(record, JobState.UNDEFINED, f"The job belongs to the machine {claim.host}.")
        has_ended = _end_mark(record).exists()
        alive = claim is not None and not has_ended and is_alive(claim, record.token)
        # read after `alive`: the script writes it before it ends; without a claim then, it was not begun then
        result = directories.result(record.directory) if claim else None
        if claim and alive and result:
            alive = not kill_rest(claim, record.token)
        state = STATES[(claim is not None, alive, result is not None)]
        message, finished_at = "", None
        if state.final:
            if not has_ended:
                with contextlib.suppress(OSError):
                    _end_mark(record).touch()
            code, message, finished_at = result or (None, WITHOUT_RESULT, directories.mtime(record.directory / "claim"))
            state = JobState.SUCCEEDED if code == 0 else JobState.FAILED
        elif image := directories.pulled_image(record.directory):
            message = f"Pulling the image {image}."
        if directories.read(record.directory) != record:  # what was read may be the next attempt's
            raise no_such_job(record.jid)
        return directories.make_status(record, state, message, finished_at)

    def delete(self, jid: str) -> None:
        with directories.alone(self._root, jid):
            record = directories.find(self._root, jid)
            if not _claim_as_deleted(record.directory):
                _stop(record)
            directories.discard(record)

    def jobs(self, limit: int) -> list[JobStatus]:
        records = directories.newest(self._root, limit)
        statuses = []
        for record in records:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                if not _is_deleted(record.directory):
                    statuses.append(self._status(record))
        return directories.with_users(statuses)

    def workers(self, status: JobStatus) -> int:
        return status.kept(Record).workers

    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        return logs.tail_streams(status.kept(Record).directory, worker, wanted)

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        return directories.spec(status, environment)

    def details(self, status: JobStatus) -> Details:
        record = status.kept(Record)
        claim = _claim(record.directory)
        if not claim or not claim.host:
            return directories.details(status)
        started_at = directories.mtime(record.directory / "claim")
        return directories.details(status, backend_id=str(claim.supervisor), started_at=started_at, nodes=(claim.host,))

    def ping(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unreachable(f"The state directory {self._root} cannot be written.")

    def overview(self) -> Overview:
        memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        bare = "jobs are processes of this machine, and their image is not used"
        note = bare if self._runtime == "none" else f"jobs run with {self._runtime}"
        here = Place(platform.node(), "node", "up", len(os.sched_getaffinity(0)), memory_mib, note=note)
        version = f"{platform.system()} {platform.release()}"
        return Overview(version, [here], unasked=["GPUs: pman does not look for them on this machine"])


def warnings(settings: Settings) -> list[str]:
    return directories.warnings(settings, settings.local_runtime)


def create(settings: Settings) -> LocalBackend:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    state_dir = settings.local_state_dir or Path(home, "pman", "jobs")
    return LocalBackend(state_dir, settings.local_runtime)


def _run_script(record: Record, *arguments: str) -> None:
    """Raises subprocess.SubprocessError and OSError."""
    subprocess.run(
        ["bash", "job.sh", *arguments], cwd=record.directory, env=_ENVIRONMENT | {TOKEN: record.token},
        start_new_session=True, timeout=START_SECONDS,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def _start(record: Record) -> None:
    """Only for whoever holds the job's lock: nobody takes the script away."""
    if (record.directory / "claim").exists():
        return
    try:
        _run_script(record)
    except (subprocess.SubprocessError, OSError) as error:
        raise BackendError(f"The job's script could not be started: {error}.") from error


def _claim(directory: Path) -> Claim | None:
    """Who runs the job; None before it was started, and when it never will be. A damaged claim names nobody."""
    try:
        words = directories.content(directory, "claim").split()
        return None if words == ["deleted"] else Claim(int(words[0]), int(words[1]), int(words[2]), words[3], words[4])
    except FileNotFoundError:
        return None
    except (ValueError, IndexError):  # emptied by a power cut, or the job wrote over it
        return Claim(0, 0, 0, "", os.uname().nodename)


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


def _is_deleted(directory: Path) -> bool:
    try:
        return directories.content(directory, "claim") == "deleted\n"
    except FileNotFoundError:
        return False


def _end_mark(record: Record) -> Path:
    """Of this attempt alone: the next one's directory has the same path."""
    return record.directory / f"ended.{record.token}"


def _runs_elsewhere(claim: Claim | None, record: Record) -> TypeGuard[Claim]:
    return claim is not None and claim.is_elsewhere and not _end_mark(record).exists()


def _stop(record: Record) -> None:
    """End every process of the job. Raises Conflict for the job of another machine."""
    claim = _claim(record.directory)
    if claim is None:
        return
    if _runs_elsewhere(claim, record):
        raise Conflict(
            f"The job belongs to the machine {claim.host}: delete it there, or remove {record.directory} "
            "once that machine is gone."
        )
    if not _end_mark(record).exists():
        _end_processes(claim, record.token)
    if not (record.directory / "rc").exists():  # the script was killed before its own clean-up
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            _run_script(record, "clean_up")


def _end_processes(claim: Claim, token: str) -> None:
    """The script's own orderly end first, KILL for what is left."""
    if runs(claim):
        with contextlib.suppress(ProcessLookupError):
            os.kill(claim.supervisor, signal.SIGTERM)
        if not retry.wait_until(lambda: not runs(claim), STOP_SECONDS, first_pause=0.005):
            with contextlib.suppress(ProcessLookupError):
                os.kill(claim.supervisor, signal.SIGKILL)
    if not retry.wait_until(lambda: kill_rest(claim, token), STOP_SECONDS, first_pause=0.005):
        raise Unreachable("The job's processes do not end.")
