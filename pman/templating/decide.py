"""Applies a site's rules (rules.py) to a job, with a record of every rule that was looked at."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pman.errors import Refused
from pman.job import Job
from pman.policy import Bind, Policy
from pman.templating import rules
from pman.templating.rules import Condition, Rule, Rules, plain

# What `when` compares and rules may change -> the field of the job; the rest of what rules set is in Policy.
LIVE: Mapping[str, str] = {
    "partition": "partition", "time_limit_minutes": "time_limit_minutes", "gpus": "gpu_count",
    "cpu_millicores": "cpu_millicores", "memory_mib": "memory_mib",
}  # fmt: skip


class Compared(NamedTuple):
    part: str
    field: str
    wanted: Any
    found: Any
    holds: bool


class Change(NamedTuple):
    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that was looked at. compared: all conditions of one that matched, else until the one that decided."""

    rule: Rule
    matched: bool
    compared: list[Compared]
    changes: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.rule.name,
            "line": self.rule.line,
            "matched": self.matched,
            "compared": [each._asdict() for each in self.compared],
            "changes": [each._asdict() for each in self.changes],
        }


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rules make of a job: the job to render, and how it came to that. unseen: rules below a `last` one."""

    asked: Job
    job: Job
    steps: tuple[Step, ...]
    unseen: tuple[Rule, ...]
    refused: str | None

    def accepted(self) -> Job:
        """The job. Raises Refused in the words of the rule."""
        if self.refused is not None:
            raise Refused(self.refused, detail=f"the rule {self.steps[-1].rule.name!r} of site.yaml refuses this job")
        return self.job

    def outcome(self) -> dict[str, tuple[Any, Any]]:
        """Name -> what was asked for and what it became, of all that rules changed."""
        changes = [change for step in self.steps for change in step.changes]
        first = {change.name: change.before for change in reversed(changes)}
        return {change.name: (first[change.name], change.after) for change in changes}

    def to_json(self) -> dict[str, Any]:
        """The rules with what each compared and changed, and the outcome beside what was asked."""
        return {
            "rules": [step.to_json() for step in self.steps],
            "not_looked_at": [rule.name for rule in self.unseen],
            "asked": {name: before for name, (before, _) in self.outcome().items()},
            "outcome": {name: after for name, (_, after) in self.outcome().items()},
            "refused": self.refused,
        }


def decide(job: Job, site: Rules, most_minutes: int | None) -> Decision:
    """Apply the rules to a job as it was asked for. most_minutes: TIMELIMIT_MAX_MINUTES."""
    state = _State(job, most_minutes)
    steps: list[Step] = []
    refused, seen = None, 0
    for rule in site.rules:
        seen += 1
        met: list[Compared] = []
        matched = _holds("when", rule.when, state.facts, met)
        matched = matched and not (rule.unless and _holds("unless", rule.unless, state.facts, met))
        steps.append(Step(rule, matched, met, tuple(state.apply(rule.changes)) if matched else ()))
        if matched and rule.refuse is not None:
            refused = rule.refuse
        if matched and (rule.last or refused is not None):
            break
    decided = state.job() if any(step.changes for step in steps) else job
    return Decision(job, decided, tuple(steps), site.rules[seen:], refused)


def _holds(part: str, conditions: tuple[Condition, ...], facts: Mapping[str, Any], met: list[Compared]) -> bool:
    """Whether all conditions hold; adds those until the first that does not to `met`."""
    for field, wanted, test, _ in conditions:
        found = facts[field]
        holds = test(found)
        met.append(Compared(part, field, wanted, found[0] if field == "image" else found, holds))
        if not holds:
            return False
    return True


class _State:
    """A job on its way through the rules. facts: what `when` compares; set: what rules have set of Policy."""

    def __init__(self, job: Job, most_minutes: int | None) -> None:
        self.asked = job
        self.facts: dict[str, Any] = {
            "user": job.auid, "image": image_names(job.image), "jid": job.jid, "kind": job.kind, "workers": job.workers,
            **{name: getattr(job, field) for name, field in LIVE.items()},
        }  # fmt: skip
        self.set: dict[str, Any] = {"image": job.image}
        self.most = {"time_limit_minutes": most_minutes} if most_minutes else {}
        self.least: dict[str, int] = {}

    def apply(self, changes: Mapping[str, Any]) -> Iterator[Change]:
        for name, wanted in changes.items():
            values = self.facts if name in LIVE else self.set
            before = values.get(name)
            after = self._value(name, before, wanted)
            if after != before:
                values[name] = after
                yield Change(name, plain(before), plain(after))

    def _value(self, name: str, before: Any, wanted: Any) -> Any:
        if isinstance(wanted, rules.Table):
            found = self.facts[wanted.by]
            wanted = next((value for fits, value in wanted.rows if fits(found)), wanted.default)
            if wanted is None:
                return before
        if name in rules.NUMBERS:
            return self._number(name, before, wanted)
        if isinstance(wanted, rules.Default):
            return before or wanted.default
        if isinstance(wanted, rules.Registry):
            return f"{wanted.registry}/{_full_name(before).partition('/')[2]}"
        return _added(before, wanted)

    def _number(self, name: str, before: int | None, wanted: Any) -> int | None:
        """Caps and floors hold to the end: later rules can only make them tighter."""
        if not isinstance(wanted, rules.Limits):
            return self._bounded(name, wanted)
        if wanted.at_most is not None:
            self.most[name] = min(wanted.at_most, self.most.get(name, wanted.at_most))
        if wanted.at_least is not None:
            self.least[name] = max(wanted.at_least, self.least.get(name, wanted.at_least))
        return self._bounded(name, wanted.default if before is None else before)

    def _bounded(self, name: str, value: int | None) -> int | None:
        """Within floor and cap; the cap outweighs the floor. Without a limit of its own, a time has the cap's."""
        if value is not None:
            value = max(value, self.least.get(name, value))
        most = self.most.get(name)
        return value if most is None else most if value is None else min(value, most)

    def job(self) -> Job:
        """The job as the rules leave it. What the request sets in its environment outweighs the rules'."""
        given = {name: value for name, value in self.set.items() if value is not None}
        policy = Policy(**given | {"image": given["image"] if given["image"] != self.asked.image else None})
        return replace(
            self.asked,
            policy=policy,
            env=tuple({**policy.environment, **dict(self.asked.env)}.items()),
            **{field: self.facts[name] for name, field in LIVE.items()},
        )


def _added(before: Any, wanted: Any) -> Any:
    """Mappings and lists are added to what rules above have set."""
    if isinstance(wanted, dict):
        return {**(before or {}), **wanted}
    if isinstance(wanted, list):
        entries = [Bind(**entry.model_dump()) if isinstance(entry, rules.Bind) else plain(entry) for entry in wanted]
        made = list(before or ())
        for entry in entries:
            made += [entry] if entry not in made else []
        return tuple(made)
    return wanted


def image_names(image: str) -> tuple[str, ...]:
    """What a pattern may name an image by: as asked for and in full, each with and without tag and digest."""
    full = _full_name(image)
    return (image, full, *(re.sub(r"(:[^:/@]*)?(@.*)?$", "", name) for name in (image, full)))


def _full_name(image: str) -> str:
    """An image's name with its registry, as docker.io/library/debian for debian."""
    first, slash, rest = image.partition("/")
    if not slash or not re.search(r"[.:]|^localhost$", first):
        return f"docker.io/{image}" if slash else f"docker.io/library/{image}"
    registry = first.lower().removeprefix("index.") if first.lower() == "index.docker.io" else first.lower()
    return f"{registry}/library/{rest}" if registry == "docker.io" and "/" not in rest else f"{registry}/{rest}"
