"""What SLURM's commands say, as tables: refusals of sbatch, reasons that keep a job waiting, what is no answer at all.

Sources: `errno` is slurm_errno.c of SLURM 22.05 to 25.05 (https://github.com/SchedMD/slurm, src/common), `reasons` is
https://slurm.schedmd.com/job_reason_codes.html, `opt` is the parser of options that sbatch and srun share
(src/common/slurm_opt.c and getopt_long(3)); `22.05` was seen on SLURM 22.05.8, `sites` at sites that run SLURM.
"""

import re
from enum import Enum


class Fault(Enum):
    """Whose fault a refusal is, which decides what pman answers."""

    PASSING = "SLURM's, and it passes: 503, and the same call may succeed later"
    TEMPLATE = "the template's: 500, and the admin reads in the log what to mend"
    REQUEST = "the request's: 400 in SLURM's words"


# (words, fault, source). The first row that is found in the words counts; a refusal that is in no row is the request's.
# SLURM repeats what it refuses, and a partition may be "standby" or "QOSMaxSubmit". So every row holds several words,
# or says where SLURM's word stands.
# deploy/cromwell/slurm.conf has the rows of PASSING, too.
REFUSALS: tuple[tuple[str, Fault, str], ...] = (
    (r"unable to contact|contacting slurm", Fault.PASSING, "errno"),
    (r"in standby mode", Fault.PASSING, "errno"),
    (r"temporarily un(able|available)", Fault.PASSING, "22.05: sbatch at MaxJobCount"),
    (r"MaxJobCount limit reached", Fault.PASSING, "errno"),
    (r"rate limit exceeded, please retry", Fault.PASSING, "errno, since 23.02"),
    (r"zero bytes were", Fault.PASSING, "errno"),
    (r"(timed out|connection refused|connection reset)( |$)", Fault.PASSING, "errno, errno(3)"),
    (r"(connection|connect|shutdown|send|receive) failure", Fault.PASSING, "errno"),
    (r"protocol authentication error|authentication credential", Fault.PASSING, "errno"),
    (r"munge (encode|decode) failed", Fault.PASSING, "22.05: munged is down"),
    (r"persistent connection|problem talking to the database|unable to connect to database", Fault.PASSING, "errno"),
    (r"configuration source|DNS SRV lookup failed", Fault.PASSING, "22.05: no slurm.conf can be had"),
    (r"transport endpoint is not connected|no route to host|network is unreachable", Fault.PASSING, "sites, errno(3)"),
    (r"I/O error writing script/environment to file", Fault.PASSING, "errno: StateSaveLocation is full"),
    (r"no space left on device", Fault.PASSING, "errno(3)"),
    (r"error generating job credential|slurm internal error", Fault.PASSING, "errno"),
    # A limit on how many jobs are in the queue heals as jobs end; the other limits of an association or a QOS, such as
    # AssocMaxCpuPerJobLimit, do not.
    (r"^(sbatch: )?error: (Assoc|QOS)[A-Za-z]*Submit", Fault.PASSING, "reasons; 22.05"),
    (r"required partition not available", Fault.PASSING, "errno: the partition is INACTIVE or DRAIN"),
    (r"requested reservation not usable now", Fault.PASSING, "errno"),
    (r"unrecognized option|invalid option --|requires an argument|doesn't allow an argument|is ambiguous",
     Fault.TEMPLATE, "opt; 22.05"),
    (r"invalid --\S+ specification|invalid numeric value|is not a valid node count|mutually exclusive",
     Fault.TEMPLATE, "opt; 22.05"),
    (r"invalid directive found in batch script|does not look like a batch script|contains DOS line breaks",
     Fault.TEMPLATE, "sbatch.c and opt.c of 22.05"),
    (r"invalid feature specification|invalid license specification|invalid wckey|burst buffer",
     Fault.TEMPLATE, "errno; 22.05"),
    (r"requested reservation is invalid|access denied to requested reservation|job dependency problem"
     r"|invalid job array specification", Fault.TEMPLATE, "errno; 22.05"),
)  # fmt: skip
_REFUSALS = [(re.compile(words, re.IGNORECASE | re.MULTILINE), fault) for words, fault, _ in REFUSALS]

# OpenSSH's client begins its complaints with these (ssh.c, sshconnect.c, clientloop.c, mux.c of OpenSSH 9).
_SSH = re.compile(
    r"^\s*(ssh|kex_\w+|client_loop|mux_client\w*|packet_write_\w+|ssh_\w+|banner exchange)\b.*:"
    r"|^\s*(Connection (to|closed|reset|timed out|refused)|Shared connection|Host key|Timeout, server"
    r"|Received disconnect|\S+: Permission denied \(|Permission denied[, ]|Unable to negotiate|No \S+ host key"
    r"|Control socket|@@@@)",
    re.MULTILINE,
)
# What sacct says where it never has an answer: the cluster has no accounting, or this user may not read it.
NO_ACCOUNTS = re.compile(
    r"accounting storage is disabled"  # 22.05 with accounting_storage/none
    r"|operation not permitted|permission denied|not authorized"  # sites: the command or slurmdbd denies it
    r"|command not found|no such file or directory|not running a supported accounting_storage",
    re.IGNORECASE,
)
UNKNOWN_NUMBER = "Invalid job id specified"  # errno: slurmctld knows no job of that number (any more)


def fault_of(words: str) -> Fault | None:
    """Whose fault it is that a command failed with these words; None where the table does not say."""
    return next((fault for pattern, fault in _REFUSALS if pattern.search(words)), None)


def says_ssh(words: str) -> bool:
    """Whether OpenSSH's client says this, or nobody says anything (as ssh -q)."""
    return not words.strip() or bool(_SSH.search(words))


# Reasons of a pending job that do not heal by waiting: the job asks for more than one job may have, or for what it may
# not use. Names: `reasons` and enum job_state_reason in slurm.h of SLURM 22.05.
_CANNOT_HEAL = re.compile(
    r"(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+|PartitionTimeLimit|BadConstraints|DependencyNeverSatisfied"
    r"|(Account|QOS)NotAllowed|Invalid(Account|QOS)"
)
# These last until somebody acts. pman waits and says so, because whoever holds a job wants to keep it.
# PartitionNodeLimit is in neither list: it "can also indicate that required nodes are DOWN or DRAINED" (`reasons`).
BY_HAND = (
    "JobHeldAdmin", "JobHeldUser", "JobHoldMaxRequeue", "ReservationDeleted", "launch failed requeued held",
    "launch_failed_requeued_held",
)  # fmt: skip


def cannot_heal(reason: str) -> bool:
    """Whether a job that waits for this reason, as squeue says it, waits in vain."""
    return bool(_CANNOT_HEAL.fullmatch(reason))
