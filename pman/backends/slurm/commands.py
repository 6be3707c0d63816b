"""SLURM's commands as argument vectors, and what their answers mean."""

import contextlib
import logging
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pman.backends.directories import TOKEN_DIGITS
from pman.backends.slurm import words
from pman.backends.slurm.words import Fault
from pman.errors import BackendError, BadRequest, TemplateError, Unreachable

log = logging.getLogger(__name__)

LIMIT_RETRY_SECONDS = 5.0  # SLURM's limits on jobs in the queue heal as jobs end
# Variables that the commands get. pman's own environment holds secrets, and SBATCH_* would outweigh the template. Those
# of COMMANDS_ONLY are not for the job: its script drops them before the command runs (templates/slurm/job.sh.j2).
COMMANDS_ONLY = ("SLURM_JWT", "SLURM_CONF_SERVER", "SLURM_SACK_SOCKET", "SSH_AUTH_SOCK")
_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LD_LIBRARY_PATH", "SLURM_CONF", *COMMANDS_ONLY)
# The name stands last: it may hold any character, and a plug-in of the site may have changed it.
_QUEUE_FIELDS = "%A|%T|%S|%e|%r|%j"
_PLACE_FIELDS = "Start,Partition,NodeList"
_ACCOUNT_FIELDS = "JobIDRaw,State,Start,End,JobName"
# The token of an attempt in the name of its SLURM job, before or behind which a plug-in may have put something.
TOKEN = re.compile(rf"\.([0-9a-f]{{{TOKEN_DIGITS}}})(?![0-9a-f])")
_ROW = re.compile(r"(\d+)\|([A-Z_]+)[^|]*\|([^|]*)\|([^|]*)\|(?:([^|]*)\|)?(.*)")
_OTHER_CLUSTERS = re.compile(r"^#SBATCH\s+(?:.*\s)?(--clusters?\b|-M)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """What SLURM says of one of its jobs. started_at and ended_at are estimates before they have come.

    token: of the attempt, from the job's name; "" where that has none.
    """

    id: str
    token: str
    state: str
    reason: str
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of SLURM's jobs runs or ran, and since when. Empty where SLURM no longer knows."""

    started_at: datetime | None = None
    partition: str = ""
    nodes: tuple[str, ...] = ()


class Failed(Unreachable):
    """A command failed with words of which none says that it will pass. transient, since a look may be repeated.

    detail: the words. code: the exit status.
    """

    def __init__(self, name: str, said: str, code: int) -> None:
        super().__init__(f"{name} failed: {_short(said)}", detail=said)
        self.code = code


class Commands:
    """SLURM's commands, on this machine or behind SLURM_COMMAND_PREFIX."""

    def __init__(self, prefix: Sequence[str], timeout_seconds: float) -> None:
        self._prefix = list(prefix)
        self._timeout_seconds = timeout_seconds
        self._without_accounts = False  # said in the log already
        self._ssh = bool(prefix) and Path(prefix[0]).name == "ssh"
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._environment = {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s", **passed}

    def run(self, *argv: str, text: str = "") -> str:
        """Standard output. Raises Unreachable when SLURM does not answer, Failed with other words."""
        # Not pipes: what a command leaves behind (an ssh with ControlPersist) may hold them open for minutes.
        with _file("stdin") as given, _file("stdout") as out, _file("stderr") as err:
            given.write(text.encode())
            given.seek(0)
            try:
                process = subprocess.Popen(self.line(argv), env=self._environment, stdin=given, stdout=out, stderr=err)
            except OSError as error:
                raise BackendError(f"{argv[0]} cannot be run: {error.strerror}.", detail=str(error.strerror)) from error
            code = _wait(process, self._timeout_seconds)
            said, complaint = (_whole(file) for file in (out, err))
        if code is None:
            raise Unreachable(f"SLURM does not answer: {argv[0]} took longer than {self._timeout_seconds:g} s.")
        if code:
            raise self._failure(argv[0], complaint.strip(), code)
        return said

    def _failure(self, name: str, said: str, code: int) -> BackendError | Unreachable:
        """code < 0: ended by a signal. 255: ssh's own, and also sbatch's for an option that it does not know."""
        fault = words.fault_of(said)
        if code < 0 or fault is Fault.PASSING or (code == 255 and self._ssh and words.says_ssh(said) and not fault):
            if "Submit" not in said:
                return Unreachable(f"SLURM does not answer: {_short(said)}", detail=said)
            full = Unreachable(f"SLURM takes no more jobs of pman's user for now: {_short(said)}", detail=said)
            full.retry_after_seconds = LIMIT_RETRY_SECONDS
            return full
        if code in (126, 127):  # of env, of a shell
            return BackendError(f"{name} cannot be run: {_short(said)}", detail=said)
        return Failed(name, said, code)

    def sbatch(self, script: str, *options: str) -> str:
        """The number of the new job. After Unreachable there may be one.

        Raises BadRequest where the request asks for what SLURM refuses, TemplateError where the script is at fault.
        """
        if found := _OTHER_CLUSTERS.search(script):
            raise TemplateError(
                f"slurm/job.sh.j2: take {found[1]} out: pman looks for its jobs on the cluster of slurm.conf alone. "
                "Run a pman for each cluster."
            )
        try:
            text = self.run("sbatch", "--parsable", *options, text=script)
        except Failed as error:
            fault = words.fault_of(error.detail) or (Fault.TEMPLATE if error.code == 255 else Fault.REQUEST)
            if fault is Fault.TEMPLATE:
                raise TemplateError(
                    f"slurm/job.sh.j2: sbatch refuses the script that this template makes: {_short(error.detail)}",
                    detail=error.detail,
                ) from None
            raise BadRequest(f"SLURM refused: {_short(error.detail)}", detail=error.detail) from None
        if found := re.search(r"^(\d+)(;.*)?$", text, re.MULTILINE):
            return found[1]
        raise Unreachable("sbatch did not say the number of the job.", detail=text)

    def squeue(self, *options: str) -> list[SlurmJob]:
        """Jobs in all partitions, also in those that are hidden from this user, and also those that have ended."""
        return list(parse_rows(self.squeue_rows(*options)))

    def squeue_rows(self, *options: str) -> str:
        """As `squeue`, one job a line."""
        return self.run("squeue", "--all", "--noheader", "--states=all", *options, f"--format={_QUEUE_FIELDS}")

    def squeue_number(self, number: str) -> SlurmJob | None:
        """The job of that number; None where slurmctld says that it knows none of that number.

        Raises Unreachable where the answer says neither.
        """
        try:
            found = self.squeue(f"--jobs={number}")
        except Failed as error:
            if words.UNKNOWN_NUMBER in error.detail:
                return None
            raise
        if job := next((job for job in found if job.id == number), None):
            return job
        raise Unreachable(f"SLURM does not say what has become of its job {number}.")

    def sacct(self, numbers: Sequence[str], name: str, since: float) -> list[SlurmJob]:
        """The jobs of those numbers by the accounting, or without numbers those of that name; [] without accounting.

        since: seconds since the epoch. Raises Unreachable when the accounting does not answer now.
        """
        days = int(time.time() - since) // 86400 + 2  # a margin for clocks that differ
        who = f"--jobs={','.join(numbers)}" if numbers else f"--name={name}"
        try:
            text = self.run(
                "sacct", "--allocations", "--noheader", "--parsable2", who, f"--starttime=now-{days}days",
                f"--format={_ACCOUNT_FIELDS}",
            )  # fmt: skip
        except (Failed, BackendError) as error:
            if not words.NO_ACCOUNTS.search(error.detail):
                raise Unreachable(f"SLURM's accounting does not answer: {error}", detail=error.detail) from None
            if not self._without_accounts:
                log.warning("pman judges jobs without SLURM's accounting, because sacct says: %s", _short(error.detail))
            self._without_accounts = True
            return []
        return list(parse_rows(text))

    def place(self, number: str) -> Place:
        """Of the job of that number, by squeue, or by sacct when slurmctld has forgotten it."""
        asked = (
            ("squeue", "--all", "--noheader", "--states=all", f"--jobs={number}", "--format=%S|%P|%N"),
            ("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={number}", f"--format={_PLACE_FIELDS}"),
        )
        for argv in asked:
            with contextlib.suppress(Unreachable, BackendError):
                for line in self.run(*argv).splitlines():
                    if found := re.fullmatch(r"([0-9]+|N/A|Unknown|None)\|([^|]+)\|([^|]*)", line):
                        return Place(_time(found[1]), found[2], tuple(hosts(found[3])))
        return Place()

    def note_accounts(self) -> None:
        """Say in the log where SLURM has no accounting for pman. Nobody waits for the answer."""

        def ask() -> None:
            with contextlib.suppress(Unreachable):  # then the first job that needs them asks again
                self.sacct(["1"], "", time.time())

        threading.Thread(target=ask, daemon=True).start()

    def line(self, argv: Sequence[str]) -> list[str]:
        """The argument vector that is run for `argv`, with the prefix."""
        if not self._prefix:
            return list(argv)
        line = ["env", "SLURM_TIME_FORMAT=%s", *argv]
        if self._ssh:  # sshd hands what it gets to a shell
            line = [shlex.join(line)]
        return [*self._prefix, *line]


def parse_rows(text: str) -> Iterator[SlurmJob]:
    """The jobs in lines of squeue and sacct; other lines, such as a site's banner, are left out."""
    for line in text.splitlines():
        if row := _ROW.fullmatch(line):
            number, state, start, end, reason, name = row.groups()
            tokens = TOKEN.findall(name)  # a plug-in adds nothing of its form behind it; a site's prefix may have it
            yield SlurmJob(number, tokens[-1] if tokens else "", state, reason or "", _time(start), _time(end))


def hosts(text: str) -> Iterator[str]:
    """The names in a list of SLURM's, such as `node[01-03,7],gpu1`; one with several brackets stays as it is."""
    for prefix, numbers, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,]*)", text):
        if prefix.startswith(("(", "None")):  # squeue: (null)
            continue
        for span in numbers.split(",") if numbers and "[" not in suffix else [numbers and f"[{numbers}]"]:
            low, dash, high = span.partition("-")
            if dash and (low + high).isdecimal():
                yield from (f"{prefix}{n:0{len(low)}}{suffix}" for n in range(int(low), int(high) + 1))
            else:
                yield f"{prefix}{span}{suffix}"


def _time(seconds: str) -> datetime | None:
    return datetime.fromtimestamp(int(seconds), UTC) if seconds.isdigit() else None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status; None where the process had to be killed after so many seconds.

    Popen.wait(timeout) sleeps between its looks, up to as long as it has waited already: too long for short commands.
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        code = process.wait()
    finally:
        timer.cancel()
    return None if late.is_set() else code


def _file(name: str) -> BinaryIO:
    """An empty file in memory."""
    return open(os.memfd_create(name), "w+b")


def _whole(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _short(said: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in said.splitlines()]
    return " ".join(lines)[:1000] or "no reason given."
