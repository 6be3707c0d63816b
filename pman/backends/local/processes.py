"""Which processes of this machine belong to a job, however their numbers are given away and the clock is set."""

import contextlib
import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pman.backends.directories import content

TOKEN = "PMAN_JOB_TOKEN"  # noqa: S105 - environment variable of a job's processes, by which one that left is found


class Claim(NamedTuple):
    """Who runs a job: the session it began in and its supervisor, on the machine of that host name.

    started_ticks: the supervisor's start, in clock ticks since the boot of the machine that `boot` identifies. It does
    not move when the clock is set, as a time of day does.
    """

    session: int
    supervisor: int
    started_ticks: int
    boot: str
    host: str

    @property
    def is_elsewhere(self) -> bool:
        """True for the job of another machine: what runs there cannot be seen from here."""
        return self.boot != _boot() and self.host != os.uname().nodename


class _Process(NamedTuple):
    is_zombie: bool
    session: int
    started_ticks: int


def is_alive(claim: Claim, token: str) -> bool:
    return runs(claim) or any(_members(claim, token))


def runs(claim: Claim) -> bool:
    """True while the supervisor exists, and not another process that was given its number."""
    found = _process(claim.supervisor) if claim.boot == _boot() else None
    return found is not None and not found.is_zombie and found.started_ticks == claim.started_ticks


def kill_rest(claim: Claim, token: str) -> bool:
    """KILL what is left behind the supervisor; True when nothing is left."""
    if runs(claim):
        return False
    for pid in _members(claim, token):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return not any(_members(claim, token))


def _members(claim: Claim, token: str) -> Iterator[int]:
    """Processes that carry the job's token, and those of its session that carry none.

    Linux gives no new process the number of a session that has members. So the session is the job's unless a process
    younger than the supervisor has its number.
    """
    if claim.boot != _boot():
        return
    head = _process(claim.session)
    is_ours = head is None or head.started_ticks <= claim.started_ticks
    mine, anybodys = f"{TOKEN}={token}".encode(), f"{TOKEN}=".encode()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        found = _process(pid)
        if found is None or found.is_zombie or found.started_ticks < claim.started_ticks:
            continue
        environment = _environment(pid)
        if mine in environment or (is_ours and found.session == claim.session and anybodys not in environment):
            yield pid


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process(pid: int) -> _Process | None:
    """State, session and start of a process: fields 3, 6 and 22 of /proc/PID/stat, proc_pid_stat(5)."""
    try:
        text = content(Path("/proc"), f"{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return _Process(fields[0] in "ZX", int(fields[3]), int(fields[19]))


def _environment(pid: int) -> bytes:
    """What the process was started with; empty for one of another user."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
