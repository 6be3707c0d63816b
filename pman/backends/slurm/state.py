"""The directory of a job on the file system that pman and the nodes of SLURM share.

State directory of a job, `<SLURM_STATE_DIR>/<name>/`, seen by pman and by the nodes, besides what directories.py says:
  lock            flock(2) of whoever submits or deletes the job
  attempt.TOKEN   renamed to claim.ID by the SLURM job that runs it; by pman to claim.deleted when a DELETE begins, to
                  claim.lost where no SLURM job is left to run it: what starts later ends
  slurm_id        number of the submitted SLURM job, whose name is `<name>.<token>`
  slurm-ID.log    what SLURM itself and the script say
  ending          as rc, by the script, when it begins to end the job
  stuck           the reason that keeps the job waiting in vain; as old as pman's knowledge of it
  final.TOKEN     pman's verdict (JSON), so that it outlives SLURM's memory of the job
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pman.backends import directories
from pman.backends.directories import Record
from pman.errors import Misconfigured, NotFound, Unreachable
from pman.job import Job
from pman.status import JobState, JobStatus, Reason, Why
from pman.templating.render import Spec

log = logging.getLogger(__name__)

_NAME = re.compile(r"^#SBATCH --job-name=(.+)", re.MULTILINE)
_REQUEUE = re.compile(r"^#SBATCH --requeue\b", re.MULTILINE)
DELETED, LOST = "deleted", "lost"  # in place of the number of a SLURM job


@dataclass(frozen=True, slots=True)
class Files:
    """What the state directory says: which SLURM job runs it (`claim`), what was submitted, how it ended.

    closed: DELETED or LOST where no SLURM job may take the claim any more. final: the verdict that settle() kept.
    result: exit code, reason, time.
    """

    claim: str | None
    closed: str | None
    slurm_id: str | None
    final: JobStatus | None
    result: tuple[int, str, datetime] | None

    @property
    def numbers(self) -> list[str]:
        """SLURM's numbers of the attempt that pman knows. The job may have written over its files."""
        return sorted({number for number in (self.claim, self.slurm_id) if number and number.isdecimal()})

    @property
    def unknown_to_slurm(self) -> bool:
        """Not handed over yet."""
        return self.claim is None and self.closed is None and self.slurm_id is None


def create_directory(root: Path, job: Job, spec: Spec) -> bool:
    """The directory of a new attempt at `job`; False when there is a directory already.

    SLURM 24.11.5 makes the directory of a deleted job anew, for the log of one that carries the same attempt and starts
    late. The logs are listed before the look for a job, so that none of a job that comes meanwhile is removed.
    """
    logs = list((root / job.name).glob("slurm-*.log"))
    if (root / job.name / "job.json").exists():
        return False
    for path in logs:
        with contextlib.suppress(OSError):  # what stays is in the way of the job, which submit() says
            path.unlink()
    return directories.create(root, job, spec, lambda record: ("lock", f"attempt.{record.token}")) is not None


def slurm_name(record: Record) -> str:
    """What the script calls its job, quoted as the filter `sbatch` does, and the token."""
    named = _NAME.search((record.directory / "job.sh").read_text(encoding="utf-8"))
    name = re.sub(r'\\(.)|"( )"', r"\1\2", named[1]) if named else record.directory.name
    return f"{name}.{record.token}"


def _verdict(record: Record) -> Path:
    """With the token: a directory of the same name may already belong to the next attempt."""
    return record.directory / f"final.{record.token}"


def close(record: Record, why: str) -> str | None:
    """Take the claim, so that nothing ever starts this attempt. Returns the SLURM job that took it before, if any."""
    with contextlib.suppress(FileNotFoundError):
        (record.directory / f"attempt.{record.token}").rename(record.directory / f"claim.{why}")
    return read_files(record).claim


def require_locks(root: Path) -> None:
    """Raises Misconfigured where files have no flock(2): two sbatch of one attempt could not be told apart."""
    with tempfile.TemporaryFile(dir=root) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise Misconfigured(
                f"SLURM_STATE_DIR={root} must be on a file system with flock: {error.strerror}."
            ) from None


class Busy(Unreachable):
    """Another thread or process submits or deletes the job."""


@contextlib.contextmanager
def locked(record: Record, wait_seconds: float) -> Iterator[list[Path]]:
    """Alone with the job: the lock ends with its process. Raises NotFound when the job was deleted before.

    Put into the list what take_away() returns: it is removed after the lock is closed, since NFS keeps open files.
    """
    deadline, trash = time.monotonic() + wait_seconds, list[Path]()
    try:
        with (record.directory / "lock").open("r+b") as file:
            while not _try_lock(file.fileno()):
                if time.monotonic() >= deadline:
                    raise Busy("Another request for this job is still at work.")
                time.sleep(0.01)
            if not os.path.samestat(os.fstat(file.fileno()), (record.directory / "lock").stat()):
                raise FileNotFoundError
            yield trash
    except FileNotFoundError:
        raise NotFound("There is no such job any more.") from None
    finally:
        for path in trash:
            directories.remove(path)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Unreachable(f"The state directory of the job cannot be locked: {error.strerror}.") from error
    return True


def read_files(record: Record) -> Files:
    """What the directory says now. Raises NotFound when it is gone."""
    directory = record.directory
    try:
        names = os.listdir(directory)  # opens it, so that an NFS client looks again
        slurm_id = directories.content(directory, "slurm_id").strip() if "slurm_id" in names else None
    except FileNotFoundError:
        raise NotFound("There is no such job any more.") from None
    claim = next((name.removeprefix("claim.") for name in names if name.startswith("claim.")), None)
    result = directories.result(directory) if "rc" in names else None
    closed = claim if claim in (DELETED, LOST) else None
    final = _stored(record) if _verdict(record).name in names else None
    return Files(None if closed else claim, closed, slurm_id, final, result)


def may_begin_again(record: Record) -> bool:
    """Whether the job's script allows SLURM to requeue it, so that a result may be that of an earlier start."""
    with contextlib.suppress(OSError):
        return bool(_REQUEUE.search(directories.content(record.directory, "job.sh")))
    return False


def stuck_since(record: Record, reason: str) -> float:
    """When pman first saw that the job waits for this reason, in seconds since the epoch; "" forgets it."""
    path = record.directory / "stuck"
    try:
        if reason and path.read_text(errors="replace") == reason:
            return path.stat().st_mtime
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    if reason:
        with contextlib.suppress(FileNotFoundError, Unreachable):  # deleted; a full disk makes it count from later on
            write(path, reason)
    return time.time()


def settle(status: JobStatus) -> JobStatus:
    """Keep the verdict: SLURM forgets jobs, and what is final must stay what it is.

    Raises Unreachable where it cannot be kept, unless the script's own result says the same at any time.
    """
    record = status.kept(Record)
    finished_at = status.finished_at or datetime.now(UTC)
    fields = {"state": status.state, "message": status.message, "finished_at": finished_at.isoformat()}
    why = {"reason": status.reason, "exit_code": status.exit_code}
    try:
        write(_verdict(record), json.dumps(fields | why))
    except FileNotFoundError:
        pass  # deleted at this moment
    except Unreachable as error:
        if not (record.directory / "rc").exists():
            raise
        log.warning("the verdict of job %s is not kept: %s", record.jid, error)
    return directories.make_status(record, status.state, status.message, finished_at)


def _stored(record: Record) -> JobStatus | None:
    """The verdict that settle() kept; None where a power cut has emptied its file, so that it is found anew."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        fields = json.loads(_verdict(record).read_text())
        finished_at = datetime.fromisoformat(fields["finished_at"])
        word = Reason(fields.get("reason") or Reason.UNKNOWN)
        why = Why(fields["message"], word, fields.get("exit_code"))
        return directories.make_status(record, JobState(fields["state"]), why, finished_at)
    return None


def write(path: Path, text: str) -> None:
    """The whole file at once, for whoever reads it meanwhile. Raises Unreachable where the disk is full."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(text)
        new.rename(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        new.unlink(missing_ok=True)
        raise Unreachable(f"{path.parent} cannot be written: {error.strerror}.") from error
