"""The five words of the contract, why a job failed, what else may be known of it, and one state of several workers."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self, TypeVar

T = TypeVar("T")


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


class Reason(StrEnum):
    """Why a job failed, in one word for programs."""

    EXIT = "exit"  # its program ended with an exit code other than 0
    SIGNAL = "signal"  # a signal ended it, and nobody says why
    OUT_OF_MEMORY = "out_of_memory"
    TIME_LIMIT = "time_limit"
    CANCELLED = "cancelled"  # by somebody who may do so at the backend
    PREEMPTED = "preempted"  # its place was given to another job, or was taken for maintenance
    IMAGE = "image"  # its image cannot be had
    REFUSED = "refused"  # it asks for what the backend, or the machine that should run it, does not give
    NODE = "node"  # a machine failed, or is not set up to run it
    LOST = "lost"  # it has gone without a result
    UNKNOWN = "unknown"  # the backend does not say


class Why(str):
    """A sentence about a failure, with the word that stands for it. Two of them are equal when their sentences are.

    exit_code: of the program, 128 + N where signal N ended it; None where there is none.
    """

    reason: Reason
    exit_code: int | None

    def __new__(cls, sentence: str, reason: Reason = Reason.UNKNOWN, exit_code: int | None = None) -> Self:
        why = super().__new__(cls, sentence)
        why.reason, why.exit_code = reason, exit_code
        return why


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as its backend sees it.

    cmd: the command line, shell-quoted into one string. message: one sentence for the user, of a failure a `Why`.
    finished_at: completion time, None before. private: what this backend's other methods need to avoid a second
    look-up; nobody else reads it (by `kept`). posted_at, user: None where the backend does not say.
    """

    jid: str
    image: str
    cmd: str
    state: JobState
    message: str = ""
    finished_at: datetime | None = None
    private: object = field(default=None, repr=False, compare=False)
    posted_at: datetime | None = None
    user: str | None = field(default=None, compare=False)

    @property
    def reason(self) -> Reason | None:
        """Why the job failed; None for one that has not."""
        if self.state is not JobState.FAILED:
            return None
        return self.message.reason if isinstance(self.message, Why) else Reason.UNKNOWN

    @property
    def exit_code(self) -> int | None:
        """Of the job's program, or of the first worker that failed; None while it runs and where it is not known."""
        if self.state is JobState.SUCCEEDED:
            return 0
        return self.message.exit_code if self.state is JobState.FAILED and isinstance(self.message, Why) else None

    def kept(self, kind: type[T]) -> T:
        """`private`, which is of the kind that its backend has put there."""
        assert isinstance(self.private, kind)
        return self.private

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


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the copies of a job's command. None: not known, or not yet."""

    state: JobState | None = None
    reason: Reason | None = None
    exit_code: int | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    node: str | None = None
    message: str = ""

    @classmethod
    def of(cls, state: JobState, why: str = "", **known: Any) -> Self:
        seen = JobStatus("", "", "", state, why)
        return cls(state, seen.reason, seen.exit_code, message=why, **known)


def workers_alike(job: JobStatus, count: int) -> tuple[Worker, ...]:
    """The workers of a job with one result for all: which one of several has failed, or has begun, is not known."""
    same = count == 1 or job.state in (JobState.NOT_STARTED, JobState.SUCCEEDED)
    return (Worker.of(job.state, job.message) if same else Worker(),) * count


@dataclass(frozen=True, slots=True)
class Details:
    """What a backend knows of a job beside its JobStatus. None: not known, or not yet.

    The limits are those of each worker, as they were submitted: a template may have changed what was asked for.
    """

    user: str | None = None  # the ChRIS user
    kind: str | None = None  # ds, fs or ts
    cpu_millicores: int | None = None  # 1000 is one core
    memory_mib: int | None = None
    gpu_count: int | None = None
    time_limit_minutes: int | None = None
    partition: str | None = None  # or queue
    backend_id: str | None = None  # what the backend itself calls the job
    started_at: datetime | None = None
    nodes: tuple[str, ...] | None = None  # machines that run it, or ran it
    workers: tuple[Worker, ...] = ()


def to_resource(job: JobStatus, details: Details) -> dict[str, Any]:
    """The job with all that is known of it, by the names that it has in JSON; None for what is not known."""
    try:
        argv = shlex.split(job.cmd) or None
    except ValueError:  # not quoted by pman, but a text of an older version of it
        argv = None
    known = asdict(details)
    resources = {name: known.pop(name) for name in ("cpu_millicores", "memory_mib", "gpu_count")}
    return {
        "jid": job.jid, "state": job.state, "reason": job.reason, "message": job.message, "exit_code": job.exit_code,
        "posted_at": job.posted_at, "started_at": known.pop("started_at"), "finished_at": job.finished_at,
        "image": job.image, "argv": argv, "resources": resources,
        **known, "workers": [{"index": index, **worker} for index, worker in enumerate(known["workers"])],
    }  # fmt: skip


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


# Where the backend does not say how much the limit was.
OVER_MEMORY = Why("The job used more memory than its limit.", Reason.OUT_OF_MEMORY)


def explain_memory(limit_mib: int, exit_code: int, known: bool | None) -> Why:
    """A sentence about a worker that ran out of memory (known), was killed without that (False), or perhaps (None).

    limit_mib: 0 where the worker had no hard limit.
    """
    limit = f"its memory limit of {limit_mib} MiB"
    if not known:
        perhaps = f"perhaps because it exceeded {limit}" if known is None and limit_mib else "not by its memory limit"
        return Why(f"The job was killed (exit code {exit_code}), {perhaps}.", Reason.SIGNAL, exit_code)
    went_on = "" if exit_code else " It went on without the process that was killed, so its output may be incomplete."
    what = f"The job exceeded {limit}" if limit_mib else "The machine ran out of memory while the job ran"
    return Why(f"{what} (out of memory, exit code {exit_code}).{went_on}", Reason.OUT_OF_MEMORY, exit_code)


def join_messages(messages: Sequence[str]) -> str:
    """The workers' sentences, in index order, as one text: a sentence that several share is given once.

    Where one of them is a `Why`, the text is, too: with the word of the first.
    """
    if len(messages) == 1:
        return messages[0]
    first = {text: index for index, text in reversed(list(enumerate(messages))) if text}
    text = " ".join(f"worker {index}: {text}" for text, index in sorted(first.items(), key=lambda item: item[1]))
    why = next((message for message in messages if isinstance(message, Why)), None)
    return Why(text, why.reason, why.exit_code) if why else text


def word_of(code: int) -> Reason:
    """What an exit status of a shell or a container says of a failure."""
    return Reason.SIGNAL if 128 < code <= 192 else Reason.EXIT if code else Reason.UNKNOWN


def explain_exit(code: int, who: str = "The job") -> str:
    """A sentence about an exit status of a shell, "" for 0; 129 to 192 are the signals 1 to 64."""
    if 128 < code <= 192:
        return Why(f"{who} was ended by signal {code - 128}.", Reason.SIGNAL, code)
    return Why(f"{who} ended with exit code {code}.", Reason.EXIT, code) if code else ""


def span(seconds: float, units: int = 2) -> str:
    """A time in its largest units, such as `1 h 2 min`."""
    left, said = max(0, int(seconds)), list[str]()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or (size == 1 and not said):
            said.append(f"{count} {unit}")
    return " ".join(said[:units])
