"""What becomes of a job: SLURM's states as pman's, what shows that nothing of it runs, and the sentence for people."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from pman.backends import logs
from pman.backends.directories import Record, pulled_image, why
from pman.backends.slurm.commands import SlurmJob
from pman.backends.slurm.state import Files
from pman.status import OVER_MEMORY, JobState, Reason, Why

# Every state of https://slurm.schedmd.com/job_state_codes.html (base states and flags, as squeue and sacct write
# them) -> pman's state, and what its user reads.
STATES: dict[str, tuple[JobState, str]] = {
    "BOOT_FAIL": (JobState.FAILED, Why("The node of the job did not boot.", Reason.NODE)),
    "CANCELLED": (JobState.FAILED, Why("The job was cancelled in SLURM.", Reason.CANCELLED)),
    "COMPLETED": (JobState.SUCCEEDED, ""),
    "COMPLETING": (JobState.STARTED, "SLURM is cleaning up after the job."),  # processes may still be there
    "CONFIGURING": (JobState.NOT_STARTED, "The node of the job is booting."),
    "DEADLINE": (JobState.FAILED, Why("The job could not end before its deadline in SLURM.", Reason.TIME_LIMIT)),
    "EXPEDITING": (JobState.NOT_STARTED, "SLURM is about to run the job again."),
    "FAILED": (JobState.FAILED, ""),
    "LAUNCH_FAILED": (JobState.FAILED, Why("SLURM could not launch the job.", Reason.NODE)),
    "NODE_FAIL": (JobState.FAILED, Why("A node of the job failed.", Reason.NODE)),
    "OUT_OF_MEMORY": (JobState.FAILED, OVER_MEMORY),
    "PENDING": (JobState.NOT_STARTED, ""),
    "POWER_UP_NODE": (JobState.NOT_STARTED, "The node of the job is booting."),
    "PREEMPTED": (JobState.FAILED, Why("The job was preempted by another one in SLURM.", Reason.PREEMPTED)),
    "RECONFIG_FAIL": (JobState.FAILED, Why("The node of the job could not be configured.", Reason.NODE)),
    "REQUEUED": (JobState.NOT_STARTED, "The job was requeued in SLURM."),
    "REQUEUE_FED": (JobState.NOT_STARTED, "The job was requeued in SLURM's federation."),
    "REQUEUE_HOLD": (JobState.NOT_STARTED, "The job was requeued and is held in SLURM."),
    "RESIZING": (JobState.STARTED, ""),
    "RESV_DEL_HOLD": (JobState.NOT_STARTED, "The job is held: its reservation was deleted."),
    "REVOKED": (JobState.UNDEFINED, "Another cluster of SLURM's federation runs the job."),  # and may write output
    "RUNNING": (JobState.STARTED, ""),
    "SIGNALING": (JobState.STARTED, ""),
    "SPECIAL_EXIT": (JobState.NOT_STARTED, "The job was requeued and is held in SLURM."),
    "STAGE_OUT": (JobState.STARTED, "SLURM is staging files out."),  # output may still be on its way
    "STOPPED": (JobState.STARTED, "The job was stopped in SLURM and keeps its CPUs."),
    "SUSPENDED": (JobState.STARTED, "The job is suspended in SLURM."),
    "TIMEOUT": (JobState.FAILED, Why("The job was ended by its time limit.", Reason.TIME_LIMIT)),
    "UPDATE_DB": (JobState.STARTED, ""),
}
# A job of these states is held. One that has run cannot leave them again: its script would end with exit code 75.
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
LAUNCHING = "SLURM is starting the job."  # a node may still fail to, and SLURM then puts the job back into its queue
REQUEUED = "SLURM put the job back into its queue after it had begun."
# The script writes its result as its last act. So long it may take until SLURM no longer calls the job RUNNING, and
# until SLURM has ended what the script of a COMPLETING job left; the node's epilog comes later and may take minutes.
RESULT_SETTLES = timedelta(seconds=60)
COMPLETING_SETTLES = timedelta(seconds=5)
_CLOCKS_DIFFER = timedelta(seconds=5)
_UNCLAIMED = "Its script did not begin: does every node see SLURM_STATE_DIR under the same path?"
# What slurmstepd and srun say of memory: 22.05 with jobacct_gather (OverMemoryKill), and with task/cgroup, where
# "oom_kill" became "oom-kill" in 20.11 (src/slurmd/slurmstepd/mgr.c, src/srun/libsrun/launch.c).
_OVER_MEMORY = re.compile(
    r"^(slurmstepd|srun)\S* error: .*(exceeded (job |step )?memory limit|oom[-_]kill|out of memory)",
    re.MULTILINE | re.IGNORECASE,
)
_COMPLAINT = re.compile(r"^slurmstepd\S* error: (?!\*\*\*)(.+)", re.MULTILINE)


def state_of(job: SlurmJob) -> tuple[JobState, str]:
    return STATES.get(job.state, (JobState.UNDEFINED, f"SLURM says {job.state}."))


def ended(job: SlurmJob) -> bool:
    """SLURM says that nothing of the job runs, and does not begin it again."""
    return state_of(job)[0].final


def waits(job: SlurmJob) -> bool:
    """SLURM says that the job runs later, for the first time or again."""
    return state_of(job)[0] is JobState.NOT_STARTED


def over(files: Files, job: SlurmJob) -> bool:
    """Nothing of this SLURM job runs any more: SLURM says so, or the script's result is old enough."""
    if ended(job):
        return True
    if files.claim != job.id:  # it has not begun; when the claim is closed, it cannot any more
        return job.state == "COMPLETING" and files.claim is None and files.closed is not None
    if files.result is None or waits(job):
        return False
    written_at = files.result[2]
    if job.started_at and written_at + _CLOCKS_DIFFER < job.started_at:  # of an earlier start of the same job
        return False
    return not recent(written_at, COMPLETING_SETTLES if job.state == "COMPLETING" else RESULT_SETTLES)


def recent(when: datetime, span: timedelta = RESULT_SETTLES) -> bool:
    """Whether that was within the last `span`, by clocks that may differ."""
    return abs(datetime.now(UTC) - when) < span


def by_result(record: Record, files: Files, job: SlurmJob | None) -> tuple[JobState, str]:
    """What the script's exit code means, also a 0. Where SLURM ended the job, it knows why."""
    assert files.result
    code, reason, _ = files.result
    said = state_of(job)[1] if job and ended(job) else ""
    if said == OVER_MEMORY or _used_too_much(record):
        return JobState.FAILED, Why(OVER_MEMORY, Reason.OUT_OF_MEMORY, code)
    return (JobState.FAILED, said or reason) if code or said else (JobState.SUCCEEDED, "")


def by_slurm(record: Record, files: Files, job: SlurmJob, nodes: Sequence[str] = ()) -> tuple[JobState, str]:
    """What SLURM's end of a job means that has left no result of its own. nodes: where it was cancelled unbegun."""
    state, message = state_of(job)
    if nodes:  # what slurmctld does when a prolog fails and the job must not be requeued (22.05, 24.11)
        said = f"The job was cancelled on {', '.join(nodes)} before its command began"
        said += ": by somebody, or because a prolog failed. `sinfo -R` says why a node was drained."
        message = Why(said, Reason.CANCELLED)
    if files.claim is None and state is JobState.SUCCEEDED:
        state = JobState.FAILED
    if _used_too_much(record):
        return JobState.FAILED, OVER_MEMORY
    if state is JobState.FAILED and not message:
        complaint = _UNCLAIMED if files.claim is None else _complaint(record)
        word = Reason.NODE if files.claim is None else Reason.UNKNOWN
        message = Why(f"SLURM says {job.state} ({job.reason}). {complaint}".strip(), word)
    if state is JobState.FAILED and (image := pulled_image(record.directory)):
        word = message.reason if isinstance(message, Why) else Reason.UNKNOWN
        message = Why(f"{message} It was pulling the image {image}; `pman images pull` does so beforehand.", word)
    return state, message


def by_absence(record: Record, files: Files) -> Why:
    """Why a job failed that SLURM no longer has and that left no result."""
    if files.claim is None:
        said = "SLURM no longer knows the job, and it never began: it was cancelled while it was waiting."
        return Why(said, Reason.CANCELLED)
    if _used_too_much(record):
        return OVER_MEMORY
    try:
        said = (record.directory / "ending").read_text(errors="replace").strip().partition(" ")[2]
        return why(record.directory, said)
    except FileNotFoundError:
        said = "The job ended without a result, and SLURM no longer knows it: it was killed, or its node failed."
        return Why(said, Reason.LOST)


def slurm_logs(record: Record, max_lines: int, max_bytes: int) -> Iterator[str]:
    """The end of what SLURM itself and the script say, of each SLURM job of the attempt."""
    for path in sorted(record.directory.glob("slurm-*.log")):
        yield logs.tail_file(path, max_lines, max_bytes, within=record.directory.resolve())


def _complaint(record: Record) -> str:
    """What slurmstepd last complained of, where it killed the script with the rest."""
    return next(iter(_COMPLAINT.findall("".join(slurm_logs(record, 20, 4096)))[::-1]), "")


def _used_too_much(record: Record) -> bool:
    """Whether SLURM said that the job or one of its processes was killed for its memory."""
    return any(_OVER_MEMORY.search(text) for text in slurm_logs(record, 200, 65536))
