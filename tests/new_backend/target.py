"""A batch script for PBS: read by bash, its #PBS lines by qsub."""

from __future__ import annotations

import re
from typing import Any

from pman.targets import shell
from pman.targets.record import Directives, Target
from pman.templating.quote import Filter, Unwritable, bare, text_of

_SPECIAL = re.compile(r"[\s\"'\\]")


def qsub(value: Any) -> str:
    r"""A word of a `#PBS` line: qsub takes \ before any character for that character (make_argv() of OpenPBS'
    src/cmds/qsub.c).
    """
    if number := bare(value):
        return number
    text = text_of(value)
    if any(ord(character) < 32 for character in text):
        raise Unwritable("a control character cannot stand in a #PBS line")
    return _SPECIAL.sub(r"\\\g<0>", text)


TARGET = Target(
    name="pbs",
    template="pbs/job.sh.j2",
    filters={"qsub": Filter(qsub, "a word of a `#PBS` line, which qsub reads by rules of its own")},
    storage_types=("host",),
    starter=shell.STARTER,
    need_super=("directives", "claim"),
    directives=Directives("#PBS", reader="qsub", quoting="qsub"),
    judge=lambda text, how: shell.bash_problems(text, how.shellcheck),
    read=lambda job, text: shell.run_worker(
        job, text, env={"PBS_O_WORKDIR": "/", "PBS_JOBID": "1", "PMAN_ATTEMPT": "x"}
    ),
    causes=shell.CAUSES,
)
