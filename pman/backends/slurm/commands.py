"""SLURM's commands as argument vectors, and one squeue for all who ask at the same time."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from pman.backends.directories import TOKEN_DIGITS
from pman.errors import BackendError, BadRequest, Unreachable

# What SLURM's commands say when the same call may succeed later; anything else is a refusal. All of it is of several
# words: SLURM repeats what it refuses, and a partition may be called "standby".
_TRANSIENT = re.compile(
    r"unable to contact|contacting slurm|in standby mode|temporarily un(able|available)|zero bytes were"
    r"|(timed out|connection refused|connection reset) |(timed out|connection refused|connection reset)$"
    r"|(connection|connect|shutdown|send|receive) failure|protocol authentication error|authentication credential"
    r"|munge (encode|decode) failed|persistent connection|problem talking to the database|configuration source",
    re.IGNORECASE | re.MULTILINE,
)
QUEUE_AGE_SECONDS = 1.0
# pman's own environment holds secrets, and SBATCH_* would outweigh the template. The script drops the last two.
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", "SLURM_CONF", "SLURM_JWT", "SSH_AUTH_SOCK")
_QUEUE_FIELDS = "%A|%T|%e|%j|%r"
_ACCOUNT_FIELDS = "JobIDRaw,State,End,JobName"
_NAME = rf"[a-z0-9-]+\.[0-9a-f]{{{TOKEN_DIGITS}}}"  # slurm_state.slurm_name()
_ROW = re.compile(rf"(\d+)\|([A-Z_]+)[^|]*\|([^|]*)\|({_NAME})(?:\|(.*))?")


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What SLURM says of one of its jobs. ended_at is an estimate while the job runs."""

    id: str
    name: str
    state: str
    reason: str
    ended_at: datetime | None


class Commands:
    """SLURM's commands, on this machine or behind SLURM_COMMAND_PREFIX."""

    def __init__(self, prefix: Sequence[str], timeout_seconds: float) -> None:
        self._prefix = list(prefix)
        self._timeout_seconds = timeout_seconds
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._environment = {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s", **passed}

    def run(self, *argv: str, text: str = "") -> str:
        """Standard output. Raises Unreachable when SLURM does not answer, BadRequest with its words when it refuses."""
        # Not pipes: what a command leaves behind (an ssh with ControlPersist) may hold them open for minutes.
        with open(os.memfd_create("stdout"), "w+b") as out, open(os.memfd_create("stderr"), "w+b") as err:
            try:
                code = subprocess.run(
                    self.line(argv), env=self._environment, input=text.encode(), stdout=out, stderr=err,
                    timeout=self._timeout_seconds, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise Unreachable(
                    f"SLURM does not answer: {argv[0]} took longer than {self._timeout_seconds:g} s."
                ) from None
            except OSError as error:
                raise BackendError(f"{argv[0]} cannot be run: {error.strerror}.") from error
            said, words = (_whole(file) for file in (out, err))
        if code == 0:
            return said
        words = words.strip()
        if _TRANSIENT.search(words) or code == 255 or code < 0:  # 255: ssh could not connect; < 0: killed by a signal
            raise Unreachable(f"SLURM does not answer: {_short(words)}", detail=words)
        raise BadRequest(f"SLURM refused: {_short(words)}", detail=words)

    def sbatch(self, script: str, *options: str) -> str:
        """The number of the new job. After Unreachable there may be one."""
        text = self.run("sbatch", "--parsable", *options, text=script)
        if found := re.search(r"^(\d+)(;.*)?$", text, re.MULTILINE):
            return found[1]
        raise Unreachable("sbatch did not say the number of the job.", detail=text)

    def sacct(self, names: Sequence[str], since: float) -> list[SlurmJob]:
        """The jobs of those names in the accounts, [] also where SLURM keeps none. since: seconds since the epoch.

        Raises Unreachable whenever the accounts do not answer, since what is not in them counts as lost.
        """
        days = int(time.time() - since) // 86400 + 2  # a margin for clocks that differ
        try:
            text = self.run(
                "sacct", "--allocations", "--noheader", "--parsable2", f"--name={','.join(names)}",
                f"--starttime=now-{days}days", f"--format={_ACCOUNT_FIELDS}",
            )  # fmt: skip
        except BadRequest as error:
            if "accounting storage is disabled" in error.detail:
                return []
            raise Unreachable(f"SLURM's accounts do not answer: {error}", detail=error.detail) from None
        return [job for job in parse_rows(text) if job.name in names]

    def line(self, argv: Sequence[str]) -> list[str]:
        """The argument vector that is run for `argv`, with the prefix."""
        if not self._prefix:
            return list(argv)
        line = ["env", "SLURM_TIME_FORMAT=%s", *argv]
        if Path(self._prefix[0]).name == "ssh":  # sshd hands what it gets to a shell
            line = [shlex.join(line)]
        return [*self._prefix, *line]


class _Seen(NamedTuple):
    """What one call of squeue said, or why it did not. begun_at: of time.monotonic()."""

    begun_at: float
    jobs: Mapping[str, list[SlurmJob]] = MappingProxyType({})
    error: str = ""


class Queue:
    """What squeue says of this user's jobs: one call for all threads that ask within QUEUE_AGE_SECONDS."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._lock = threading.Lock()  # held while squeue runs; who waits for the next call does so without it
        self._seen = _Seen(-QUEUE_AGE_SECONDS)

    def jobs(self, name: str, begun_after: float) -> list[SlurmJob]:
        """The SLURM jobs of that name, as squeue saw them in a call begun after that time of time.monotonic()."""
        while (seen := self._seen).begun_at < begun_after:
            if (pause := seen.begun_at + QUEUE_AGE_SECONDS - time.monotonic()) > 0:
                time.sleep(pause)
                continue
            with self._lock:
                if self._seen is seen:
                    self._seen = self._look()
        if seen.error:
            raise Unreachable(seen.error)
        return seen.jobs.get(name, [])

    def _look(self) -> _Seen:
        begun_at = time.monotonic()
        try:
            text = self._commands.run("squeue", "--me", "--noheader", "--states=all", f"--format={_QUEUE_FIELDS}")
        except (Unreachable, BadRequest, BackendError) as error:
            return _Seen(begun_at, error=str(error))
        jobs: dict[str, list[SlurmJob]] = {}
        for job in parse_rows(text):
            jobs.setdefault(job.name, []).append(job)
        return _Seen(begun_at, jobs)


def parse_rows(text: str) -> Iterator[SlurmJob]:
    """The jobs in lines of squeue and sacct; those of other names than pman gives are left out."""
    for line in text.splitlines():
        if row := _ROW.fullmatch(line):
            number, state, end, name, reason = row.groups()
            yield SlurmJob(
                number, name, state, reason or "", datetime.fromtimestamp(int(end), UTC) if end.isdigit() else None
            )


def _whole(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _short(words: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in words.splitlines()]
    return " ".join(lines)[:1000] or "no reason given."
