"""What a cluster says of itself: the rules that fit, as a commented site.yaml, and what it has, for the page of it."""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from pman.errors import Misconfigured, PmanError

Answer = TypeVar("Answer")
_NAMES = {"memory_mib": "memory", "cpu_millicores": "CPUs", "gpus": "GPUs", "time_limit_minutes": "time limit"}


@dataclass
class Asked:
    """unasked: a line for each question that was not answered."""

    unasked: list[str] = field(default_factory=list, kw_only=True)
    answered: bool = field(default=False, kw_only=True)

    def ask(self, what: str, call: Callable[[], Answer]) -> Answer | None:
        """The cluster's answer; None, with a line about it, where there is none."""
        try:
            answer = call()
        except PmanError as error:
            self.unasked.append(f"{what}: {error}")
            return None
        self.answered = True
        return answer


@dataclass(frozen=True, slots=True)
class Place:
    """Where jobs run, of this kind: `partition`, `node`, or `backend` of Cromwell. None for what nobody says.

    cpus, memory_mib, gpus: what a job can have there at most, that is, on the largest node of a partition.
    """

    name: str
    kind: str
    state: str = ""
    cpus: float | None = None
    memory_mib: int | None = None
    gpus: int | None = None
    time_limit_minutes: int | None = None
    note: str = ""


@dataclass
class Overview(Asked):
    """version: of the backend, with its name, "" where it is not known."""

    version: str = ""
    places: list[Place] = field(default_factory=list)


@dataclass
class Found(Asked):
    """facts: a line each. rules: why, and the rule as site.yaml has it."""

    target: str
    facts: list[str] = field(default_factory=list)
    rules: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, why: str, name: str, **parts: Any) -> None:
        self.rules.append((why, {"name": name, **parts}))

    def limit(self, where: str, name: str, most: int, said: str, **when: str) -> None:
        """Refuse jobs that no node could take. name: of the number in `when`. said: the sentence for the user."""
        longer = name == "time_limit_minutes"  # without one, a job has the partition's own limit
        wanted = f"{most + 1} to 525600" if longer else f"> {most}"
        if not longer or most < 525_600:
            self.add("", f"{_NAMES[name]} of {where}", when={**when, name: wanted}, refuse=said)

    def text(self) -> str:
        """The site.yaml. Raises Misconfigured where nothing answered."""
        if not self.answered:
            raise Misconfigured(f"the cluster could not be asked: {'; '.join(dict.fromkeys(self.unasked))}")
        lines = [
            "# Rules that fit what the cluster said of itself. Read them, change what you want otherwise, and run",
            "# `pman check --live` on this directory. Take a rule away whose limit changes, as nodes come and go.",
            *_comments("The cluster has:", self.facts),
            *_comments("What could not be asked:", self.unasked),
        ]
        made = ["policy:", f"  targets: [{self.target}]", "  rules:" if self.rules else "  rules: []"]
        for why, rule in self.rules:
            made += [f"    # {_line(why)}"] if why else []
            entry = yaml.safe_dump([rule], default_flow_style=None, sort_keys=False, width=1000, allow_unicode=True)
            made.append(textwrap.indent(entry.rstrip(), "    "))
        return "\n".join([*lines, *made, ""])


def _comments(title: str, lines: Iterable[str]) -> list[str]:
    found = [f"#   {_line(line)}" for line in lines]
    return [f"# {title}", *found] if found else []


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
