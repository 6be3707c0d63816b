"""A batch script for sbatch: read by bash, its #SBATCH lines by rules of their own."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pman.job import Job
from pman.targets import sbatch as sbatch_lines
from pman.targets import shell
from pman.targets.record import Delivered, Directives, Judging, Problem, Target
from pman.templating.quote import Filter, Unwritable, bare, text_of

_SPECIAL = re.compile(r"[^A-Za-z0-9./:@,=+%_\x80-\U0010ffff-]")


def sbatch(value: Any) -> str:
    """A word of a `#SBATCH` line. sbatch reads these lines itself, and takes any character after a \\ literally.

    A blank is put into quotes, because SLURM 22.05.8 ends a word at a blank even after a \\; 24.11.5 does not.

    Control characters are refused: a line break would begin a line of its own (get_argument() of SLURM's
    src/sbatch/opt.c; tried with 22.05).
    """
    if number := bare(value):
        return number
    text = text_of(value)
    if any(ord(character) < 32 or character == "\x7f" for character in text):
        raise Unwritable("a control character cannot stand in a #SBATCH line")
    return _SPECIAL.sub(r"\\\g<0>", text).replace("\\ ", '" "')


def _judge(text: str, how: Judging) -> Iterator[Problem]:
    if not text.startswith("#!"):
        yield Problem("sbatch takes no script that does not begin with #!", 1)
    yield from sbatch_lines.problems(text)
    yield from shell.bash_problems(text, how.shellcheck)


def _read(job: Job, text: str) -> Delivered:
    found = shell.run_worker(job, text, "worker", env={"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})
    return replace(found, others=tuple(shell.identity('mv -T "$attempt" "claim.$SLURM_JOB_ID"', text)))


TARGET = Target(
    name="slurm",
    template="slurm/job.sh.j2",
    filters={"sbatch": Filter(sbatch, "a word of a `#SBATCH` line, which sbatch reads by rules of its own")},
    storage_types=("host",),
    starter=shell.STARTER,
    need_super=("directives", "claim"),
    directives=Directives("#SBATCH", reader="sbatch", quoting="sbatch"),
    judge=_judge,
    read=_read,
    causes=shell.CAUSES,
)
