"""What is to happen, and when: the same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Kind of job -> its share. A `limit` needs more than a minute to run into it.
SHARES = {"good": 50, "bad": 12, "workers": 10, "deleted": 14, "again": 8, "limit": 6}
LIMIT_SECONDS = 150  # a run as long as this has time for a limit of a minute
FAULTS = ("cut_before", "cut_within", "cut_after", "late", "empty", "twice")
SKEWS = (0, 0, 420, -420)  # seconds by which a pman's clock is wrong


@dataclass(frozen=True)
class Errand:
    """A job to be posted `at` seconds after the start.

    beats: for how many fifths of a second each worker runs. delete_after: seconds from its acceptance to a DELETE.
    again: then the same request once more. tidy: a DELETE as soon as its end is known. pause: between two polls.
    """

    name: str
    at: float
    kind: str
    workers: int
    beats: int
    delete_after: float
    again: bool
    tidy: bool
    pause: float


@dataclass(frozen=True)
class Event:
    """A fault `at` seconds after the start: a pman that dies, a part of the backend that ends, a call that goes wrong.

    lasting: seconds until what was stopped is started again; for a call that is late, how late. times: how many calls.
    skew: seconds by which the clock of the pman that is started then is wrong.
    """

    at: float
    lane: str  # events of one lane follow each other, those of two may meet
    kind: str
    what: str
    lasting: float
    times: int
    skew: int


@dataclass(frozen=True)
class Plan:
    seed: int
    seconds: float
    errands: tuple[Errand, ...]
    events: tuple[Event, ...]


def make(seed: int, seconds: float, jobs: int, parts: Sequence[str], calls: Sequence[str]) -> Plan:
    """A plan in which `jobs` are posted within `seconds`, over a backend with these parts and kinds of calls."""
    chance = random.Random(seed)
    kinds = {kind: share for kind, share in SHARES.items() if kind != "limit" or seconds >= LIMIT_SECONDS}
    names = list(kinds) + chance.choices(list(kinds), list(kinds.values()), k=max(0, jobs - len(kinds)))
    errands = [
        _errand(chance, f"c{seed}-{number}", chance.uniform(0, seconds * 0.8), kind)
        for number, kind in enumerate(names[:jobs])
    ]
    spells = min(1.0, seconds / 120)  # in a short run what is down is down for a shorter time
    events = list(_lane(chance, seconds, "pman", ("0", "1", "both"), ("kill",), (0, 6 * spells), 15 * spells))
    events += _lane(chance, seconds, "part", parts, ("stop",), (1, 20 * spells), 45 * spells)
    events += _lane(chance, seconds, "call", calls, FAULTS, (0.5, 8), 2)
    events += _lane(chance, seconds, "line", calls[:1], ("hang", "refuse", "storm"), (1, 15 * spells), 40 * spells)
    return Plan(seed, seconds, tuple(sorted(errands, key=lambda e: e.at)), tuple(sorted(events, key=lambda e: e.at)))


def _errand(chance: random.Random, name: str, at: float, kind: str) -> Errand:
    endless = kind in ("deleted", "again", "limit")
    return Errand(
        name, at, kind,
        workers=chance.choice((2, 3)) if kind == "workers" else 1,
        beats=6000 if endless else chance.choice((0, 1, 5, 15, 40)),
        delete_after=chance.choice((0, 0.3, 2, 8)) if kind in ("deleted", "again") else 0,
        again=kind == "again",
        tidy=chance.random() < 0.6,
        pause=chance.uniform(0.3, 1.5),
    )  # fmt: skip


def _lane(
    chance: random.Random, seconds: float, lane: str, whats: Sequence[str], kinds: Sequence[str],
    lasting: tuple[float, float], pause: float,
) -> list[Event]:  # fmt: skip
    """Events in a row, one after the end of the one before and a pause of this length on average, within `seconds`."""
    events = list[Event]()
    at = chance.uniform(0.3, 1) * pause
    while at < seconds and whats:
        length = chance.uniform(*lasting)
        kind, what = chance.choice(kinds), chance.choice(whats)
        events.append(Event(at, lane, kind, what, length, chance.choice((1, 1, 1, 2, 5)), chance.choice(SKEWS)))
        at += chance.uniform(0.3, 1.7) * pause + (length if lane != "call" else 0)
    return events
