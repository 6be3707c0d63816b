"""Jobs that pman 4 to 6 made, and that were under way when this pman took their place.

Those versions gave their objects no mark of pman's. A job is what has the jid as its name, and all that
https://github.com/FNNDSC/pman/tree/v6.3.1/pman (kubernetesmgr.py, swarmmgr.py, dockermgr.py) gave to every job: two
mounts, one read-only at /share/incoming and one at /share/outgoing, and a command line that ends with /share/outgoing.
Whatever lacks any of these, or what a backend adds to them, is somebody else's.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pman.job import INCOMING, OUTGOING, Job

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")  # of a container; other objects' names have fewer characters


def may_name(jid: str) -> bool:
    """Whether an object could have this jid as its name."""
    return _NAME.fullmatch(jid) is not None


@dataclass(frozen=True, slots=True)
class Former:
    """What may be such a job, as it shows itself.

    marks: names of labels and annotations. mounts: source, target, and whether it is read-only.
    """

    name: str
    marks: Iterable[str]
    image: str
    argv: Sequence[str]
    mounts: Sequence[tuple[str, str, bool]]

    def is_job(self, jid: str) -> bool:
        """Whether pman 4 to 6 made this for the jid."""
        newer = any(mark.startswith("org.chrisproject.pman.") for mark in self.marks)
        targets = sorted((target, read_only) for _, target, read_only in self.mounts)
        ends_there = list(self.argv[-1:]) == [OUTGOING]
        return self.name == jid and not newer and ends_there and targets == [(INCOMING, True), (OUTGOING, False)]

    def is_same(self, job: Job) -> bool:
        """Whether a request means this job. It has no digest: its image, command line and directories are compared."""
        sources = {target: f"/{posixpath.normpath(source)}" for source, target, _ in self.mounts}
        wanted = {INCOMING: job.input_dir, OUTGOING: job.output_dir}
        there = all(sources[target].endswith(f"/{directory}") for target, directory in wanted.items())
        return there and job.image in (self.image, self.image.partition("@")[0]) and tuple(self.argv) == job.argv
