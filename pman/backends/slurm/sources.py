"""What each source of the slurm backend may be believed for. Absence from one answer is no fact.

Source, what it is believed for, and what it is not believed for:

squeue --me --all    the state of each job that it shows
                     not: that there is no other job. An answer may be empty, older than the job, or of a moment when
                     slurmctld did not find the user in the group of a partition
squeue --jobs=N      the state of job N; "Invalid job id specified" says that slurmctld has no job N, and so runs none
                     not: anything, when it is empty
sacct                how a job ended
                     not: that there is no job, since it may come later; nor that a job runs of which slurmctld knows
                     nothing (a runaway record)
rc                   the exit code of the script's start that wrote it, and that the processes of that start have ended
                     not: that SLURM will not begin the job anew, where its script allows that; nor that the command was
                     whole, where SLURM says that it ended the job
claim.N              that job N began to run this attempt
                     not: that it still runs
slurm_id             that SLURM took the attempt as job N
                     not: that no other job carries it, since sbatch may have been called twice
the token in a name  that the job belongs to the attempt
                     not: that one without it does not, since a plug-in of the site may rename jobs

So SLURM no longer has a job if squeue does not list it and slurmctld says that it does not know its number.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pman.backends.directories import Record
from pman.backends.shared import Shared
from pman.backends.slurm.commands import TOKEN, Commands, SlurmJob, parse_rows
from pman.backends.slurm.state import Files, may_begin_again, slurm_name
from pman.backends.slurm.verdict import ended, waits
from pman.errors import Unreachable

ACCOUNTS_LAG_SECONDS = 3600.0  # so long after a job was submitted, sacct knows the end of what slurmctld forgot
LOOKS_AT_ONCE = 20  # at single jobs by their number, in one listing


@dataclass(frozen=True, slots=True)
class Seen:
    """What SLURM says of one attempt.

    jobs: those that a source showed. gone: slurmctld has none of the numbers. error: why neither is known.
    """

    jobs: Sequence[SlurmJob] = ()
    gone: bool = False
    error: str = ""


def owner(files: Files, jobs: Sequence[SlurmJob]) -> SlurmJob | None:
    """Of the SLURM jobs of one attempt, the one that counts: it has the claim, or may still take it."""
    if files.claim:
        return next((job for job in jobs if job.id == files.claim), None)
    return next((job for job in jobs if not ended(job)), jobs[-1] if jobs else None)


class Sources:
    """Asks SLURM for the jobs of attempts, by their numbers wherever pman knows them."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._queue = Shared(lambda: _by_key(commands.squeue_rows("--me")))

    def listed(self, record: Record, files: Files, *, fresh: bool) -> list[SlurmJob]:
        """The attempt's jobs in squeue's list: one up to a second old, or if `fresh`, one that is asked for now."""
        seen, keys = self._queue.get(fresh=fresh), [*files.numbers, record.token]
        rows = dict.fromkeys("\n".join(seen.get(key, "") for key in keys).splitlines())
        return [job for job in parse_rows("\n".join(rows)) if {job.id, job.token} & set(keys)]

    def look(self, asked: Sequence[tuple[Record, Files]]) -> dict[str, Seen]:
        """What SLURM says of each attempt, by its token. Raises Unreachable where squeue does not answer at all."""
        found, left = dict[str, Seen](), LOOKS_AT_ONCE
        for record, files in asked:
            found[record.token] = self._in_the_list(record, files)
        unlisted = [(record, files) for record, files in asked if not owner(files, found[record.token].jobs)]
        for record, files in unlisted:
            if files.result is None or may_begin_again(record):
                left -= 1
                found[record.token] = self._by_number(files, found[record.token]) if left >= 0 else _LATER
        seen = [(record, files, found[record.token]) for record, files in unlisted]
        self._ask_accounts(
            [(r, files) for r, files, said in seen if not said.error and not owner(files, said.jobs)], found
        )
        return found

    def _in_the_list(self, record: Record, files: Files) -> Seen:
        """Look again if the list may be too old: it lacks the job, or calls it pending although it has the claim."""
        job = owner(files, jobs := self.listed(record, files, fresh=False))
        if job is None or (files.claim and waits(job)):
            jobs = self.listed(record, files, fresh=True)
        return Seen(jobs)

    def _by_number(self, files: Files, seen: Seen) -> Seen:
        numbers = [files.claim] if files.claim in files.numbers else files.numbers  # the others count for nothing
        try:
            jobs = [job for job in map(self._commands.squeue_number, numbers) if job]
        except Unreachable as error:
            return Seen(seen.jobs, error=str(error))
        return Seen([*seen.jobs, *jobs], gone=not jobs)

    def _ask_accounts(self, asked: Sequence[tuple[Record, Files]], found: dict[str, Seen]) -> None:
        """Ask how jobs ended that slurmctld has forgotten. The accounting may call a job running that has ended."""
        if not (numbers := [number for _, files in asked for number in files.numbers]):
            return
        try:
            told = self._commands.sacct(numbers, "", min(record.created_at for record, _ in asked))
        except Unreachable as error:
            for record, _ in asked:
                found[record.token] = Seen(found[record.token].jobs, error=str(error))
            return
        for record, files in asked:
            late = time.time() - record.created_at > ACCOUNTS_LAG_SECONDS
            jobs = [job for job in told if job.id in files.numbers and (ended(job) or not late)]
            seen = found[record.token]
            found[record.token] = Seen([*seen.jobs, *jobs], gone=seen.gone and not owner(files, jobs))

    def earlier(self, record: Record, files: Files) -> str | None:
        """The number of a SLURM job of this attempt, by its name, where pman was not told the number.

        None only if two lists and the accounting show no such job. Even if all of them miss one, that job cannot take
        the claim from another one.
        """
        for _ in range(2):
            if jobs := self.listed(record, files, fresh=True):
                return jobs[0].id
        told = self._commands.sacct([], slurm_name(record), record.created_at)
        return next((job.id for job in told if job.token == record.token), None)

    def active(self, record: Record, files: Files, over: set[str]) -> list[SlurmJob]:
        """The attempt's jobs that are not known to have ended; `over` gains the numbers of those that are.

        Raises Unreachable where a number is neither shown nor said to be unknown.
        """
        listed = {job.id: job for job in self.listed(record, files, fresh=True)}
        left = []
        for number in sorted({*files.numbers, *listed} - over):
            job = listed.get(number) or self._commands.squeue_number(number)
            if job is None or ended(job):
                over.add(number)
            else:
                left.append(job)
        return left

    def ping(self) -> None:
        """Raises Unreachable where squeue does not answer."""
        self._queue.get()


def _by_key(text: str) -> dict[str, str]:
    """The rows by number and by token, as lines. Only those that are asked for are parsed: there may be thousands.

    No row is in a list of its own, which would cost half as much time again, and more at each garbage collection.
    """
    rows: dict[str, str] = {}
    for row in text.splitlines():
        for key in (row.partition("|")[0], *TOKEN.findall(row)[-1:]):
            rows[key] = f"{rows[key]}\n{row}" if key in rows else row
    return rows


_LATER = Seen(error="pman did not ask SLURM about this job, because it had to ask about many others by number.")
