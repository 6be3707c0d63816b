"""A script for processes of this machine, without a scheduler."""

from dataclasses import replace

from pman.job import Job
from pman.targets import shell
from pman.targets.record import Delivered, Target


def _read(job: Job, text: str) -> Delivered:
    return replace(
        shell.run_worker(job, text, "claim", "1"), others=tuple(shell.identity('ln ".claim.$$" claim', text))
    )


TARGET = Target(
    name="local",
    template="local/job.sh.j2",
    storage_types=("host",),
    starter=shell.STARTER,
    judge=lambda text, how: shell.bash_problems(text, how.shellcheck),
    read=_read,
    causes=shell.CAUSES,
)
