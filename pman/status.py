"""The five words of the contract, and the rule that makes one of them out of several workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum


class JobState(StrEnum):
    """What ChRIS knows of a job. It fetches the output files as soon as it sees one of the two `finished*`."""

    NOT_STARTED = "notstarted"
    STARTED = "started"
    SUCCEEDED = "finishedSuccessfully"
    FAILED = "finishedWithError"
    UNDEFINED = "undefined"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as its backend sees it.

    cmd: the command line, shell-quoted into one string. message: one sentence for the user.
    finished_at: completion time, None before. private: what this backend's `logs()` needs to avoid a second
    look-up; nobody else reads it. posted_at: None where the backend does not say.
    """

    jid: str
    image: str
    cmd: str
    state: JobState
    message: str = ""
    finished_at: datetime | None = None
    private: object = field(default=None, repr=False, compare=False)
    posted_at: datetime | None = None

    def to_json(self, logs: str = "") -> dict[str, str]:
        """The job JSON of the contract: seven strings."""
        return {
            "jid": self.jid,
            "image": self.image,
            "cmd": self.cmd,
            "status": self.state.value,
            "message": self.message,
            "timestamp": self.finished_at.astimezone(UTC).isoformat() if self.finished_at else "",
            "logs": logs,
        }


def merge(workers: Iterable[JobState]) -> JobState:
    """One state for a job of several workers: final only when every worker is final, and then the worst wins.

    A worker in an unknown state makes the job `undefined`, never final: output may still be written.
    No workers at all reads as not started.
    """
    states = set(workers)
    if JobState.UNDEFINED in states:
        return JobState.UNDEFINED
    if not states or states == {JobState.NOT_STARTED}:
        return JobState.NOT_STARTED
    if states & {JobState.STARTED, JobState.NOT_STARTED}:
        return JobState.STARTED
    return JobState.FAILED if JobState.FAILED in states else JobState.SUCCEEDED


def with_memory(state: JobState, out_of_memory: bool | None) -> JobState:
    """The state of a worker, where its backend says whether it ran out of memory; None where the backend does not know.

    A worker that is known to have run out of memory has failed, whatever its exit code is: the kernel may have killed
    only one of its processes, and what it wrote without that one may be incomplete.
    """
    return JobState.FAILED if out_of_memory and state is JobState.SUCCEEDED else state


def explain_memory(limit_mib: int, exit_code: int, known: bool | None) -> str:
    """A sentence about a worker that ran out of memory (known), was killed without that (False), or perhaps (None).

    limit_mib: 0 where the worker had no hard limit.
    """
    limit = f"its memory limit of {limit_mib} MiB"
    if not known:
        perhaps = f"perhaps because it exceeded {limit}" if known is None and limit_mib else "not by its memory limit"
        return f"The job was killed (exit code {exit_code}), {perhaps}."
    went_on = "" if exit_code else " It went on without the process that was killed, so its output may be incomplete."
    what = f"The job exceeded {limit}" if limit_mib else "The machine ran out of memory while the job ran"
    return f"{what} (out of memory, exit code {exit_code}).{went_on}"


def join_messages(messages: Sequence[str]) -> str:
    """The workers' sentences, in index order, as one text: a sentence that several share is given once."""
    if len(messages) == 1:
        return messages[0]
    first = {text: index for index, text in reversed(list(enumerate(messages))) if text}
    return " ".join(f"worker {index}: {text}" for text, index in sorted(first.items(), key=lambda item: item[1]))


def explain_exit(code: int, who: str = "The job") -> str:
    """A sentence about an exit status of a shell, "" for 0; 129 to 192 are the signals 1 to 64."""
    if 128 < code <= 192:
        return f"{who} was ended by signal {code - 128}."
    return f"{who} ended with exit code {code}." if code else ""
