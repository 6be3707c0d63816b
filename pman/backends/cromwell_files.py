"""What Cromwell leaves in a call's execution directory, and why a job failed."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pman import logs
from pman.errors import Misconfigured
from pman.status import JobState

Call = Mapping[str, Any]
NOTE_BYTES = 4096  # of the end of a file that may hold a sentence of pman's own, or sbatch's words
_NOTE = "pman: "  # begins what the job template and the reference configuration write to stderr
_NOT_STARTED = "Unable to start job"  # Cromwell's words when the submit command failed
_LOST = 79  # what Cromwell writes as exit code when the job is gone and left none

# Exit codes that stand for an end from outside: Cromwell's own, and those of the reference configuration.
_ENDS = {
    _LOST: "SLURM lost the job: it was cancelled before it ran, or killed.",
    124: "The job was ended by its time limit (exit code 124).",
    125: "The job was ended by SLURM: cancelled, preempted, or its node taken (exit code 125).",
    126: "The job's command could not be run (exit code 126).",
    127: "The job's command was not found (exit code 127).",
    137: "The job was killed (exit code 137), for instance for more memory than it asked for.",
}


class Files:
    """Files of the cluster as far as pman sees them. Nothing outside the mapped directory is ever read."""

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
        return self._root / below

    def execution(self, call: Call) -> Path | None:
        """The call's execution directory, None when pman does not see it."""
        stdout = self.local(call.get("stdout"))
        return stdout.parent if stdout and stdout.parent.is_dir() else None

    def has_begun(self, call: Call) -> bool | None:
        """Whether SLURM has started the job: one of the first files of its script is there. None: pman cannot know.

        A directory that is missing below the mapped one is late (NFS): taken for a job that has not begun, since a
        state must not go back.
        """
        stdout = self.local(call.get("stdout"))
        if stdout is None:
            return None
        return any(os.path.lexists(stdout.parent / name) for name in ("stdout", "slurm.out", "worker-0/stdout"))

    def tail(self, path: Path, max_lines: int, max_bytes: int) -> str:
        try:
            return logs.tail_file(path, max_lines, max_bytes, within=self._root)
        except OSError as error:
            return f"pman cannot read {path.name}: {error.strerror}\n"

    def note(self, call: Call) -> str:
        """What the job template or the reference configuration wrote last to stderr, without its prefix."""
        directory = self.execution(call)
        text = self.tail(directory / "stderr", 1, NOTE_BYTES) if directory else ""
        return text.removeprefix(_NOTE).strip() if text.startswith(_NOTE) else ""

    def exit_code(self, call: Call) -> int | None:
        """The exit code; where Cromwell hides it (130, 137, 143) that in the file `rc`."""
        directory = self.execution(call)
        text = str(call.get("returnCode", "")) or (self.tail(directory / "rc", 1, 32).strip() if directory else "")
        return int(text) if text.isdecimal() else None

    def refusal(self, call: Call) -> str:
        """sbatch's words of a job that it did not take, or where they are."""
        directory = self.execution(call)
        if directory is None:
            return f"its words are on the cluster, in {posixpath.dirname(call.get('stderr', ''))}/stderr.submit"
        return " ".join(self.tail(directory / "stderr.submit", 20, NOTE_BYTES).split()) or "it did not say why"

    def output(self, call: Call, max_lines: int, max_bytes: int) -> str:
        """stdout and stderr of one attempt, each worker's for itself; what sbatch said of a job that never began."""
        if "stdout" not in call:
            return ""
        directory = self.execution(call)
        if directory is None:
            return f"The output is on the cluster: {call['stdout']} and {call.get('stderr', '')}\n"
        workers = sorted(directory.glob("worker-*"), key=lambda path: (len(path.name), path.name))
        names = ("stdout", "stderr") if "jobId" in call else ("stderr.submit",)
        texts = [self._streams(path, names, max_lines, max_bytes) for path in workers or [directory]]
        return logs.join_workers(texts, max_lines, max_bytes)

    def _streams(self, directory: Path, names: tuple[str, ...], max_lines: int, max_bytes: int) -> str:
        return logs.join_streams(self.tail(directory / name, max_lines, max_bytes) for name in names)


def progress(call: Call, files: Files) -> tuple[JobState, str]:
    """What Cromwell calls Running: being submitted, pending in SLURM, or running."""
    job = call.get("jobId")
    if call.get("executionStatus") != "Running":
        return JobState.STARTED, ""
    if job is None:
        return JobState.NOT_STARTED, "Being submitted to SLURM."
    begun = files.has_begun(call)
    if begun is None:
        return JobState.STARTED, f"Submitted to SLURM as job {job}; queued or running."
    if begun:
        return JobState.STARTED, f"Running as SLURM job {job}."
    return JobState.NOT_STARTED, f"Queued in SLURM as job {job}."


def explain(status: str, meta: Mapping[str, Any], call: Call, files: Files) -> str:
    """The user's sentence about a workflow that is Failed or Aborted."""
    if status == "Aborted":
        return "The job was aborted, by DELETE or by somebody at Cromwell."
    reasons = list(_reasons([*call.get("failures", []), *meta.get("failures", [])]))
    if any(_NOT_STARTED in reason for reason in reasons):
        return f"SLURM refused the job: {files.refusal(call).rstrip('.')}."
    if not call:
        return f"Cromwell refused the workflow: {_short(reasons)}"
    return _ending(files.note(call), files.exit_code(call)) or f"The job failed: {_short(reasons)}"


def _ending(note: str, code: int | None) -> str:
    """By the sentence of pman's own, else by the exit code; "" with neither."""
    if note:
        words = "was" if note.startswith("ended ") else "was not run:" if code == 126 else "failed:"
        return f"The job {words} {note}."
    return "" if code is None else _ENDS.get(code, f"The job ended with exit code {code}.")


def _reasons(failures: list[Mapping[str, Any]]) -> Iterator[str]:
    """The innermost messages of Cromwell's tree of failures."""
    for failure in failures:
        causes = failure.get("causedBy", [])
        yield from _reasons(causes) if causes else [str(failure.get("message", ""))]


def _short(reasons: list[str]) -> str:
    text = " ".join("; ".join(dict.fromkeys(reasons)).split())
    return f"{text[:1000].rstrip('.')}." if text else "Cromwell does not say why."
