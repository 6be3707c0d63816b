"""A job as a directory: what `local` and `slurm` keep of their jobs, having nobody else to keep it.

A job's directory `<root>/<name>/` is made by one atomic rename, and taken away by another:
  job.json             the Record
  job.sh               the rendered script, byte for byte
  stdout.N, stderr.N   of worker N
  pulling              the image, while the script pulls it
  posted.json          the Job, for `details` and for another try with templates that were mended since
  rc                   "EXIT_CODE REASON", renamed into place by the script after its last process has ended
  why                  the word (pman.status.Reason) for the reason that rc gives; written before that
What a backend keeps there besides stands in its own module.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pman.backends import hiding
from pman.errors import BackendError, Unreachable, no_such_job
from pman.job import Job, backend_name
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, Reason, Why, explain_exit, join_messages, workers_alike
from pman.templating.render import Spec

log = logging.getLogger(__name__)

_JOB = TypeAdapter(Job)
_TIME_LIMIT = re.compile(r"^time_limit_s=(\d+)$", re.MULTILINE)  # templates/sh/job.sh.j2
TOKEN_DIGITS = 16  # hexadecimal
LEFTOVER_SECONDS = 3600.0  # a directory that is half made or half removed for so long was left by a killed process


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


def warnings(settings: Settings, runtime: str) -> list[str]:
    """What has no effect with this runtime of jobs."""
    if not settings.container_user or runtime in ("podman", "docker"):
        return []
    return [f"CONTAINER_USER has no effect with the runtime {runtime}: jobs run as pman's own user."]


def open_root(root: Path) -> None:
    """Make the directory of all jobs, and remove what killed processes have left there. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in [*root.glob(".new-*"), *root.glob(".trash-*")]:
        with contextlib.suppress(FileNotFoundError):  # another pman starts at the same time
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def alone(root: Path, jid: str) -> Iterator[None]:
    """Alone with the directory of `jid`, among all threads and processes; flock(2) ends with its holder."""
    try:
        with (root / f".lock.{hashlib.sha256(jid.encode()).hexdigest()[:2]}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise Unreachable(f"The state directory {root} cannot be written: {error.strerror}.") from error


def create(root: Path, job: Job, spec: Spec, files: Callable[[Record], Iterable[str]] = lambda _: ()) -> Record | None:
    """The directory of a new attempt at `job`, with the empty `files`; None when there is a directory already."""
    token = secrets.token_hex(TOKEN_DIGITS // 2)
    record = Record(root / job.name, job.jid, job.digest, job.image, job.cmd, job.workers, token, time.time())
    fields = {field: getattr(record, field) for field in Record.__slots__ if field != "directory"}
    try:
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        try:
            _write(fresh / "job.json", json.dumps(fields))
            _write(fresh / "job.sh", spec.text)
            (fresh / "posted.json").write_bytes(_JOB.dump_json(job))
            for name in files(record):
                (fresh / name).touch()
            fresh.rename(record.directory)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise Unreachable(f"The state directory {root} cannot be written: {error.strerror}.") from error
    return record


def posted(record: Record) -> Job | None:
    """The job as it was posted. None where an older pman has made the directory, or a power cut emptied the file."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return _JOB.validate_json((record.directory / "posted.json").read_bytes())
    return None


def with_users(statuses: Iterable[JobStatus]) -> list[JobStatus]:
    """The statuses with the users of the jobs, as listings have them."""
    jobs = ((status, posted(status.kept(Record))) for status in statuses)
    return [replace(status, user=job.auid if job else None) for status, job in jobs]


def details(status: JobStatus, **known: Any) -> Details:
    """What the directory says of a job, and what its backend has `known` besides."""
    record, limit = status.kept(Record), None
    if job := posted(record):
        known |= {"user": job.auid, "kind": job.kind, "cpu_millicores": job.cpu_millicores}
        known |= {"memory_mib": job.memory_mib, "gpu_count": job.gpu_count}
    with contextlib.suppress(FileNotFoundError):
        limit = _TIME_LIMIT.search((record.directory / "job.sh").read_text(errors="replace"))
    minutes = int(limit[1]) // 60 or None if limit else None
    return Details(time_limit_minutes=minutes, workers=workers_alike(status, record.workers), **known)


def spec(status: JobStatus, environment: bool) -> dict[str, str]:
    """The script; Backend.spec says more."""
    record = status.kept(Record)
    try:
        text = (record.directory / "job.sh").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise no_such_job(status.jid) from None
    names = [name for name, _ in job.env] if (job := posted(record)) else None
    return {"spec": text if environment else hiding.in_script(text, None if names is None else len(names), names or ())}


def content(directory: Path, name: str) -> str:
    """A small file, without what pathlib and text files take: a listing reads thousands. Raises FileNotFoundError."""
    with open(f"{directory}/{name}", "rb", buffering=0) as file:
        return file.read().decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """On the disk before the rename is: a power cut must not leave an empty file in a job's directory."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find(root: Path, jid: str) -> Record:
    """The job of exactly that jid. Raises NotFound."""
    record = read(root / backend_name(jid))
    if record is None or record.jid != jid:
        raise no_such_job(jid)
    return record


def read(directory: Path) -> Record | None:
    """The job in this directory; None where there is none. Raises BackendError where its record is damaged."""
    try:
        return Record(directory, **json.loads(content(directory, "job.json")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise BackendError(f"The record of a job in {directory} is damaged; remove the directory.") from error


def newest(root: Path, limit: int) -> list[Record]:
    """The jobs that were submitted last, the last one first; without those whose record is damaged.

    Raises Unreachable where there is no such directory.
    """
    entries, records = [], []
    try:
        names = [name for name in os.listdir(root) if not name.startswith(".")]
    except OSError as error:
        raise Unreachable(f"The state directory {root} cannot be read: {error.strerror}.") from error
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            entries.append((os.stat(f"{root}/{name}/job.json").st_mtime_ns, name))
    for _, name in sorted(entries, reverse=True)[:limit]:
        try:
            records.append(read(root / name))
        except BackendError as error:
            log.error("%s", error)
    return [record for record in records if record]


def discard(record: Record) -> None:
    """Take the directory away at once. Only for whoever holds the job's lock."""
    remove(take_away(record))


def take_away(record: Record) -> Path:
    """Rename the directory, which takes no time and works on a full disk. The caller removes what is returned.

    A job's script knows by this name that its directory was taken away (templates/local/job.sh.j2).
    """
    trash = record.directory.with_name(f".trash-{record.token}")
    record.directory.rename(trash)
    return trash


def remove(trash: Path) -> None:
    """What take_away() returned. Errors leave it to open_root()."""
    shutil.rmtree(trash, ignore_errors=True)


def result(directory: Path) -> tuple[int, str, datetime] | None:
    """Exit code, reason (of a failure a `Why`) and time of the job's end; None before."""
    path = directory / "rc"
    try:
        text, _, reason = content(directory, "rc").rstrip("\n").partition(" ")
        code = int(text)
        return code, why(directory, reason, code) if reason else _exits(directory, code), mtime(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return 1, Why("The job wrote over its own result.", Reason.UNKNOWN), mtime(path)


def _exits(directory: Path, code: int) -> str:
    """What the exit codes of the job's workers say, where its script has written each; else what `code` says."""
    try:
        codes = [int(each) for each in content(directory, "exit_codes").split()]
    except FileNotFoundError:
        codes = [code]
    return join_messages([explain_exit(each) for each in codes])


def why(directory: Path, reason: str, code: int | None = None) -> Why:
    """The reason, with the word that the script wrote for it; scripts of an older pman, and a site's, may write none.

    code: the script's exit code, which is the program's only where a signal ended that.
    """
    word = Reason.UNKNOWN
    with contextlib.suppress(FileNotFoundError, ValueError):
        word = Reason(content(directory, "why").strip())
    return Why(reason, word, code if word is Reason.SIGNAL else None)


def pulled_image(directory: Path) -> str:
    """The image that the job's script is pulling; "" when it is not."""
    try:
        return content(directory, "pulling").strip()[:1000]
    except FileNotFoundError:
        return ""


def mtime(path: Path) -> datetime:
    """When the file was written last; now where it is gone."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.now(UTC)


def make_status(record: Record, state: JobState, message: str = "", finished_at: datetime | None = None) -> JobStatus:
    posted_at = datetime.fromtimestamp(record.created_at, UTC)
    return JobStatus(record.jid, record.image, record.cmd, state, message, finished_at, record, posted_at)
