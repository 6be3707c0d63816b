"""What a target says of itself, and the words in which its judge and its read-back answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pman.job import Job
from pman.settings import StorageType
from pman.templating.quote import Filter
from pman.templating.render import language

# Stands in front of the job's own command line while a spec is proven; no program is called like this.
MARK = "pman-check-7f3a9c"
# Stands in values of requests as a command and as a template: one that anything runs or expands was not quoted.
CANARY = "pman-check-injected"


@dataclass(frozen=True, slots=True)
class Judging:
    """How to judge. shellcheck: ask that, too, where it is installed. kubernetes: the API's version, "" for the
    target's own choice. cromwell_conf: the configuration of the Cromwell that is to run the job; cromwell_backend:
    which of its backends, "" for its default.
    """

    shellcheck: bool = False
    kubernetes: str = ""
    cromwell_conf: Path | None = None
    cromwell_backend: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a rendered text. `part`: "" for the spec itself, else the name of an extra. line: from 1.

    rule: `invalid` where the language refuses the text; another rule names a line that has no effect.
    """

    message: str
    line: int | None = None
    part: str = ""
    rule: str = "invalid"

    def __str__(self) -> str:
        place = ":".join(str(p) for p in (self.part, f"line {self.line}" if self.line else "") if p)
        return f"{place}: {self.message}" if place else self.message


@dataclass(frozen=True, slots=True)
class Flaw:
    """What does not arrive. what: argv, env, incoming, outgoing, volumes, image; injected, script: what runs instead;
    identity.

    line: in the rendered text, from 1, if known.
    """

    what: str
    message: str
    line: int | None = None
    level: str = "error"


@dataclass(frozen=True, slots=True)
class Delivered:
    words: list[str]  # the whole command line, wrappers included; holds MARK
    env: Mapping[str, str] = field(default_factory=dict)
    incoming: str | None = None
    outgoing: str | None = None
    wraps: bool = False  # whether the words in front of MARK mount the directories
    injected: Sequence[int | None] = ()  # lines in which CANARY ran
    image: str | None = None  # where an engine pulls it
    others: tuple[Flaw, ...] = ()
    status: int = 0  # exit status of a script


class Stuck(Exception):
    """The script of a spec does not come to its end."""


@dataclass(frozen=True, slots=True)
class Starter:
    """What a new overlay begins with: a block with its text, and lines of site.yaml."""

    block: str
    text: str
    site: str


@dataclass(frozen=True, slots=True)
class Directives:
    """Lines of a script that its scheduler reads."""

    prefix: str  # how such a line begins
    reader: str  # the command that reads it
    quoting: str  # the filter that writes one of its words


@dataclass(frozen=True, slots=True)
class Target:
    """A language that jobs are rendered into, with all that is particular to it."""

    name: str
    template: str
    storage_types: tuple[StorageType, ...]
    starter: Starter
    judge: Callable[[str, Judging], Iterator[Problem]]  # a rendered text -> what is wrong with it
    read: Callable[[Job, str], Delivered]  # raises KeyError, TypeError, ValueError, AttributeError, Stuck
    # What does not arrive (Flaw.what) -> the blocks that may be the cause, the likeliest first.
    causes: Mapping[str, tuple[str, ...]]
    extras: Mapping[str, str] = field(default_factory=dict)  # name -> template of what is submitted beside the spec
    filters: Mapping[str, Filter] = field(default_factory=dict)  # what its language quotes in ways of its own
    # Shipped blocks whose lines a site must keep: without them a job runs with other limits, twice, or unnumbered.
    need_super: tuple[str, ...] = ()
    shell_blocks: tuple[str, ...] = ()  # blocks that are text of the shell in a template of another language
    directives: Directives | None = None

    @property
    def language(self) -> str:
        return language(self.template)

    @property
    def suffix(self) -> str:
        """How the name of a file with such a spec ends."""
        return f".{self.language}"

    @property
    def templates(self) -> list[str]:
        return [self.template, *self.extras.values()]
