"""The directory of a job on the file system that pman and the nodes of SLURM share.

State directory of a job, `<SLURM_STATE_DIR>/<name>/`, made by one atomic rename, seen by pman and by the nodes:
  job.json        jid, digest, image, cmd, workers, the token of this attempt to run the jid, when it was made
  job.sh          the rendered script, byte for byte what sbatch got
  lock            flock(2) of whoever submits or deletes the job
  attempt.TOKEN   renamed to claim.ID by the SLURM job that runs it, to claim.deleted by DELETE: what starts later ends
  slurm_id        number of the submitted SLURM job, whose name is `<name>.<token>`
  stdout.N, stderr.N   of worker N; slurm-ID.log is what SLURM itself and the script say
  ending, rc      "EXIT_CODE REASON", by the script, when it begins to end the job and when the last process has ended
  final.TOKEN     pman's verdict (JSON), so that it outlives SLURM's memory of the job
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pman.errors import NotFound, Unreachable
from pman.job import Job, backend_name
from pman.render import Spec
from pman.status import JobState, JobStatus

log = logging.getLogger(__name__)
CLOSED = "deleted"  # in place of the number of a SLURM job


@dataclass(frozen=True, slots=True)
class Record:
    """A job that has a directory. `token` tells this attempt to run the jid from one before a DELETE."""

    directory: Path
    jid: str
    digest: str
    image: str
    cmd: str
    workers: int
    token: str
    created_at: float  # seconds since the epoch

    @property
    def slurm_name(self) -> str:
        return f"{self.directory.name}.{self.token}"

    @property
    def verdict(self) -> Path:
        """With the token: a directory of the same name may already belong to the next attempt."""
        return self.directory / f"final.{self.token}"


@dataclass(frozen=True, slots=True)
class Files:
    """What the state directory says: which SLURM job runs it (`claim`), what was submitted, how it ended.

    closed: no SLURM job may take the claim any more. result: exit code, reason, time.
    """

    claim: str | None
    closed: bool
    slurm_id: str | None
    final: bool
    result: tuple[int, str, datetime] | None

    @property
    def unknown_to_slurm(self) -> bool:
        return self.claim is None and self.slurm_id is None


def create_directory(root: Path, job: Job, spec: Spec) -> bool:
    """The directory of a new attempt at `job`; False when there is a directory already."""
    directory = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    token = secrets.token_hex(4)
    fields = {"jid": job.jid, "digest": job.digest, "image": job.image, "cmd": job.cmd, "workers": job.workers}
    (directory / "job.json").write_text(json.dumps(fields | {"token": token, "created_at": time.time()}))
    (directory / "job.sh").write_text(spec.text, encoding="utf-8")
    for name in ("lock", f"attempt.{token}"):
        (directory / name).touch()
    try:
        directory.rename(root / job.name)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise Unreachable(f"The state directory cannot be written: {error.strerror}.") from error
        return False
    return True


def find(root: Path, jid: str) -> Record:
    """The job of exactly that jid. Raises NotFound."""
    record = _read(root / backend_name(jid))
    if record is None or record.jid != jid:
        raise NotFound(f"There is no job with jid {jid}.")
    return record


def newest(root: Path, limit: int) -> list[Record]:
    """The jobs that were submitted last, the last one first."""
    entries = [(entry.stat().st_mtime, entry.parent) for entry in root.glob("[!.]*/job.json") if entry.exists()]
    return [record for _, directory in sorted(entries, reverse=True)[:limit] if (record := _read(directory))]


def _read(directory: Path) -> Record | None:
    try:
        return Record(directory, **json.loads((directory / "job.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def discard(record: Record) -> None:
    """Takes the directory away. Only under the lock: without it nobody moves a directory."""
    trash = Path(tempfile.mkdtemp(prefix=".trash-", dir=record.directory.parent))
    record.directory.rename(trash / "job")
    shutil.rmtree(trash, ignore_errors=True)


def close(record: Record) -> bool:
    """Take the claim, so that nothing ever starts this attempt; False when a SLURM job took it before."""
    with contextlib.suppress(FileNotFoundError):
        (record.directory / f"attempt.{record.token}").rename(record.directory / f"claim.{CLOSED}")
    return read_files(record).claim is None


class Busy(Unreachable):
    """Another thread or process submits or deletes the job."""


@contextlib.contextmanager
def locked(record: Record, wait_seconds: float) -> Iterator[None]:
    """Alone with the job: the lock ends with its process. Raises NotFound when the job was deleted before."""
    deadline = time.monotonic() + wait_seconds
    try:
        with (record.directory / "lock").open("r+b") as file:
            while not _try_lock(file.fileno()):
                if time.monotonic() >= deadline:
                    raise Busy("Another request for this job is still at work.")
                time.sleep(0.01)
            if not os.path.samestat(os.fstat(file.fileno()), (record.directory / "lock").stat()):
                raise FileNotFoundError
            yield
    except FileNotFoundError:
        raise NotFound("There is no such job any more.") from None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("the file system of SLURM_STATE_DIR has no flock: sbatch may run twice, the job still once")
    return True


def read_files(record: Record) -> Files:
    """What the directory says now. Raises NotFound when it is gone."""
    directory = record.directory
    try:
        names = os.listdir(directory)  # opens it, so that an NFS client looks again
        slurm_id = (directory / "slurm_id").read_text().strip() if "slurm_id" in names else None
    except FileNotFoundError:
        raise NotFound("There is no such job any more.") from None
    claim = next((name.removeprefix("claim.") for name in names if name.startswith("claim.")), None)
    result = _result(directory / "rc") if "rc" in names else None
    closed = claim == CLOSED
    return Files(None if closed else claim, closed, slurm_id, record.verdict.name in names, result)


def _result(path: Path) -> tuple[int, str, datetime] | None:
    try:
        code, _, reason = path.read_text(errors="replace").rstrip("\n").partition(" ")
        return int(code), reason, datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return None


def make_status(record: Record, state: JobState, message: str = "", finished_at: datetime | None = None) -> JobStatus:
    """The contract's view of the job."""
    return JobStatus(record.jid, record.image, record.cmd, state, message, finished_at, private=record)


def settle(status: JobStatus) -> JobStatus:
    """Keep the verdict: SLURM forgets jobs, and what is final must stay what it is."""
    record = status.private
    assert isinstance(record, Record)
    finished_at = status.finished_at or datetime.now(UTC)
    fields = {"state": status.state, "message": status.message, "finished_at": finished_at.isoformat()}
    with contextlib.suppress(FileNotFoundError):  # deleted at this moment
        write(record.verdict, json.dumps(fields))
    return make_status(record, status.state, status.message, finished_at)


def stored(record: Record) -> JobStatus:
    """The verdict that settle() kept."""
    try:
        fields = json.loads(record.verdict.read_text())
    except FileNotFoundError:
        raise NotFound("There is no such job any more.") from None
    finished_at = datetime.fromisoformat(fields["finished_at"])
    return make_status(record, JobState(fields["state"]), fields["message"], finished_at)


def write(path: Path, text: str) -> None:
    """The whole file at once, for whoever reads it meanwhile."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.write_text(text)
    new.rename(path)
