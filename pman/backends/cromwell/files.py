"""What Cromwell leaves in a call's execution directory, and why a job failed."""

import itertools
import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pman.backends import logs
from pman.errors import Misconfigured
from pman.status import OVER_MEMORY, JobState, Reason, Why, word_of

Call = Mapping[str, Any]
NOTE_BYTES = 4096  # of the end of a file that may hold a sentence of pman's own, or sbatch's words
MAX_WORKERS = 1024  # as many as a request may ask for
_NOTE = "pman: "  # begins what the job template and the reference configuration write to stderr
_NO_RESULT = "the job script ended without a result"
_FIRST = ("stdout", "worker-0/stdout")  # what Cromwell's script makes first
_NO_NUMBER = "0"  # what the reference configuration tells Cromwell while SLURM does not take the job
_NOT_STARTED = "Unable to start job"  # Cromwell's words when the submit command failed
_BROKEN_DOCKER = "No coercion defined from"  # recorded of Cromwell 93: tests/recordings/cromwell/71
_LOST = 79  # what Cromwell writes as exit code when the job is gone and left none

# Exit codes that stand for an end from outside: Cromwell's own, and those of the reference configuration.
_ENDS = {
    _LOST: Why("SLURM lost the job: it was cancelled before it ran, or killed.", Reason.LOST),
    124: Why("The job was ended by its time limit (exit code 124).", Reason.TIME_LIMIT),
    125: Why("The job was ended by SLURM: cancelled, preempted, or its node taken (exit code 125).", Reason.UNKNOWN),
    126: Why("The job's command could not be run (exit code 126).", Reason.EXIT, 126),
    127: Why("The job's command was not found (exit code 127).", Reason.EXIT, 127),
    137: Why("The job was killed (exit code 137), for instance for more memory than it asked for.", Reason.SIGNAL, 137),
}
# Those that come with a note.
_BY_NOTE = {124: Reason.TIME_LIMIT, 126: Reason.NODE}


class Files:
    """Files of the cluster as far as pman sees them. Of a call, nothing outside its execution directory is ever read:
    jobs of all users run as one, and may put a link in place of whatever is theirs."""

    def __init__(self, root_map: str | None) -> None:
        """root_map: `/cluster/path=/path/seen/here`, or None where pman does not see the cluster's file system."""
        cluster, equals, here = (root_map or "").partition("=")
        if root_map is not None and not (equals and cluster.startswith("/") and here.startswith("/")):
            raise Misconfigured("CROMWELL_EXECUTION_ROOT_MAP must be /cluster/path=/path/seen/here.")
        self._cluster = posixpath.normpath(cluster) if root_map else None
        self._root = Path(here)

    def local(self, path: str | None) -> Path | None:
        """Where pman sees the cluster's `path`; None when it does not."""
        if path is None or self._cluster is None:
            return None
        below = posixpath.relpath(posixpath.normpath(path), self._cluster)
        if below.startswith("..") or not self._root.is_dir():
            return None
        return self._root.resolve() / below

    def execution(self, call: Call) -> Path | None:
        """The call's execution directory, None when pman does not see it, or a link stands in the way to it."""
        stdout = self.local(call.get("stdout"))
        directory = stdout.parent if stdout else None
        return directory if directory and os.path.isdir(directory) and directory.resolve() == directory else None

    def has_begun(self, call: Call) -> bool | None:
        """Whether SLURM has started the job: one of the first files of its script is there. None: pman cannot know.

        A directory that is missing below the mapped one is late (NFS): taken for a job that has not begun, since a
        state must not go back.
        """
        if self.local(call.get("stdout")) is None:
            return None
        directory = self.execution(call)
        begun = _link(directory).isdecimal() or any(self._is_there(directory, name) for name in _FIRST)
        return directory is not None and begun

    def _is_there(self, directory: Path | None, name: str) -> bool:
        return directory is not None and os.path.lexists(directory / name)

    def job_number(self, call: Call) -> str:
        """SLURM's number of the job; "" while the reference configuration could not submit it."""
        directory = self.execution(call)
        known = _link(directory), self.tail(directory, "slurm.id", 1, 32).strip(), str(call.get("jobId", ""))
        return next((number for number in known if number.isdecimal() and number != _NO_NUMBER), "")

    def reason(self, call: Call) -> str:
        """Why the job waits, as the reference configuration noted it: SLURM's reason, or why sbatch failed."""
        text = self.tail(self.execution(call), "slurm.reason", 1, NOTE_BYTES).strip()
        return "" if text in ("None", "(null)") else text.rstrip(".")

    def tail(self, directory: Path | None, name: str, max_lines: int, max_bytes: int) -> str:
        """The end of a file of an execution directory; "" when pman does not see it."""
        if directory is None:
            return ""
        try:
            return logs.tail_file(directory / name, max_lines, max_bytes, within=directory)
        except OSError as error:
            return f"pman cannot read {name}: {error.strerror}\n"

    def note(self, call: Call) -> str:
        """What the job template or the reference configuration wrote last to stderr, without its prefix.

        With the last words of the container runtime, where the job script never ran: no image, or no container.
        """
        directory = self.execution(call)
        text = self.tail(directory, "stderr", 1, NOTE_BYTES)
        note = text.removeprefix(_NOTE).strip() if text.startswith(_NOTE) else ""
        if note.startswith(_NO_RESULT):
            lines = self.tail(directory, "slurm.err", 20, NOTE_BYTES).splitlines()
            words = [
                " ".join(line.split()).rstrip(".") for line in lines if line.strip() and not line.startswith(_NOTE)
            ]
            return ": ".join([note, *words[-1:]])
        return note

    def exit_code(self, call: Call) -> int | None:
        """The exit code; where Cromwell hides it (130, 137, 143) that in the file `rc`."""
        text = str(call.get("returnCode", "")) or self.tail(self.execution(call), "rc", 1, 32).strip()
        return int(text) if text.isdecimal() else None

    def refusal(self, call: Call) -> str:
        """sbatch's words of a job that it did not take, or where they are."""
        directory = self.execution(call)
        if directory is None:
            return f"its words are on the cluster, in {posixpath.dirname(call.get('stderr', ''))}/stderr.submit"
        return " ".join(self.tail(directory, "stderr.submit", 20, NOTE_BYTES).split()) or "it did not say why"

    def workers(self, call: Call) -> int:
        """How many directories worker-0/, worker-1/ and so on the reference configuration has made; else 1."""
        directory = self.execution(call)
        places = (self._of_worker(directory, index) for index in range(MAX_WORKERS))
        return max(1, sum(1 for _ in itertools.takewhile(bool, places)))

    def _of_worker(self, directory: Path | None, worker: int) -> str:
        return f"worker-{worker}/" if self._is_there(directory, f"worker-{worker}/script") else ""

    def streams(self, call: Call, worker: int, wanted: logs.Wanted, *, over: bool) -> list[str]:
        """What one worker of an attempt writes, or what sbatch and the container runtime said where none began.

        A follower does not get these words while the job may still begin, because its output replaces them.
        """
        directory = self.execution(call)
        if directory is None:
            said = f"The output is on the cluster: {call.get('stdout')} and {call.get('stderr', '')}\n"
            return [said] if worker == 0 and "stdout" in call else []
        place = self._of_worker(directory, worker)
        names = [place + stream for stream in ("stdout", "stderr")] if place or worker == 0 else []
        begun = any(self._is_there(directory, name) for name in _FIRST)
        if worker == 0 and not begun and (over or not wanted.grows):
            names = ["stderr.submit", "slurm.err"]
        return [self.tail(directory, name, wanted.lines, wanted.max_bytes) for name in names]


def _link(directory: Path | None) -> str:
    """Where the link slurm.job of the reference configuration points: the number of the job that has begun."""
    try:
        return os.readlink(directory / "slurm.job") if directory else ""
    except OSError:
        return ""


def progress(call: Call, files: Files) -> tuple[JobState, str]:
    """What Cromwell calls Running or Aborting: being submitted, pending in SLURM, running, or just ended."""
    if "jobId" not in call:
        return JobState.NOT_STARTED, "Being submitted to SLURM."
    job, reason, begun = files.job_number(call), files.reason(call), files.has_begun(call)
    if begun and (image := files.tail(files.execution(call), "pulling", 1, NOTE_BYTES).strip()):
        return JobState.STARTED, f"Pulling the image {image} as SLURM job {job}."
    if begun:
        return JobState.STARTED, f"Running as SLURM job {job}."
    if not job:
        return JobState.NOT_STARTED, f"Waiting to be submitted: {reason or 'SLURM did not answer'}."
    if begun is None:
        return JobState.STARTED, f"Submitted to SLURM as job {job}; queued or running."
    return JobState.NOT_STARTED, f"Queued in SLURM as job {job}{': ' if reason else ''}{reason}."


def explain(status: str, meta: Mapping[str, Any], call: Call, files: Files) -> Why:
    """The user's sentence about a workflow that is Failed or Aborted."""
    if status == "Aborted":
        return Why("The job was aborted, by DELETE or by somebody at Cromwell.", Reason.CANCELLED)
    reasons = list(_reasons([*call.get("failures", []), *meta.get("failures", [])]))
    if any(_NOT_STARTED in reason for reason in reasons):
        return Why(f"SLURM refused the job: {files.refusal(call).rstrip('.')}.", Reason.REFUSED)
    if not call:
        return Why(f"Cromwell refused the workflow: {_short(reasons)}", Reason.REFUSED)
    if any(_BROKEN_DOCKER in reason for reason in reasons):
        return Why(
            "This Cromwell cannot run jobs with the attribute `docker`, which its configuration declares (its issue "
            "7846). Declare `String image` instead, as deploy/cromwell/slurm.conf does.",
            Reason.REFUSED,
        )
    return _ending(files.note(call), files.exit_code(call)) or Why(f"The job failed: {_short(reasons)}")


def _ending(note: str, code: int | None) -> Why | None:
    """By the sentence of pman's own, else by the exit code; None with neither.

    The reference configuration says by the exit code who ended the job: its own codes are no program's.
    """
    if f"The job {note}." == OVER_MEMORY:
        return Why(OVER_MEMORY, Reason.OUT_OF_MEMORY, code)
    if note:
        words = "was" if note.startswith("ended ") else "was not run:" if code == 126 else "failed:"
        return Why(f"The job {words} {note}.", _BY_NOTE.get(code or 0, Reason.UNKNOWN))
    if code is None:
        return None
    return _ENDS.get(code) or Why(f"The job ended with exit code {code}.", word_of(code), code)


def _reasons(failures: list[Mapping[str, Any]]) -> Iterator[str]:
    """The innermost messages of Cromwell's tree of failures."""
    for failure in failures:
        causes = failure.get("causedBy", [])
        yield from _reasons(causes) if causes else [str(failure.get("message", ""))]


def _short(reasons: list[str]) -> str:
    text = " ".join("; ".join(dict.fromkeys(reasons)).split())
    return f"{text[:1000].rstrip('.')}." if text else "Cromwell does not say why."
