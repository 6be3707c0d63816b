"""Where the lines of what was submitted come from: the blocks and rules that make the same lines today."""

import difflib
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from pman.errors import PmanError
from pman.job import Job, validate
from pman.status import Details, JobStatus, to_resource
from pman.templating.explain import Line, explain
from pman.templating.render import Renderer

MAX_LINES = 1000  # of what was submitted; comparing 3,000 lines that repeat one another took over a minute
ALIKE = 0.5  # the least part of the lines that must be the same, or else the templates have changed too much


def request_of(status: JobStatus, details: Details) -> dict[str, Any] | None:
    """A request that is rendered as the job was, but for its environment; None where too little is known of it."""
    known = to_resource(status, details)
    limits = known["resources"]
    if not known["argv"]:
        return None
    program, *args = known["argv"]
    request = {
        "jid": known["jid"], "type": known["kind"] or "fs", "auid": known["user"] or "unknown", "image": known["image"],
        "entrypoint": [program], "args": args, "append_directories": False,
        "number_of_workers": max(1, len(known["workers"])), "cpu_limit": limits["cpu_millicores"] or 1000,
        "memory_limit": limits["memory_mib"] or 1024, "gpu_limit": limits["gpu_count"] or 0,
        "time_limit_minutes": known["time_limit_minutes"], "partition": known["partition"],
    }  # fmt: skip
    return {name: value for name, value in request.items() if value is not None}


def origins(renderer: Renderer, target: str, request: dict[str, Any], text: str) -> list[tuple[str, str]]:
    """(block and rules, text) for each part of `text`; [] where the templates no longer make anything like it."""
    lines = text.splitlines(keepends=True)
    if len(lines) > MAX_LINES:
        return []
    try:
        made = explain(renderer, validate(_as_asked(renderer, request)), target).lines
    except PmanError:
        return []
    matcher = difflib.SequenceMatcher(
        None, [line.text for line in made], [line.rstrip("\n") for line in lines], autojunk=False
    )
    if not made or matcher.ratio() < ALIKE:
        return []
    parts = zip(_names(matcher, made), lines, strict=True)
    return [(name, "".join(line for _, line in group)) for name, group in groupby(parts, key=lambda part: part[0])]


def _as_asked(renderer: Renderer, request: dict[str, Any]) -> dict[str, Any]:
    """The request without the values that the rules give to the job anyway: a rule that changes nothing is not named.

    A value is left out, or asked for with one more (under a cap) or one less (above a floor), if the job is the same.
    """
    wanted = _decided(renderer, request)
    for name in ("partition", "time_limit_minutes", "cpu_limit", "memory_limit", "gpu_limit"):
        value = request.get(name)
        for other in (None, value + 1, value - 1) if isinstance(value, int) else (None,):
            asked = {field: each for field, each in {**request, name: other}.items() if each is not None}
            if _decided(renderer, asked) == wanted:
                request = asked
                break
    return request


def _decided(renderer: Renderer, request: dict[str, Any]) -> Job | None:
    """The job that the rules make of a request, None where they refuse it."""
    try:
        return replace(renderer.decide(validate(request)).accepted(), digest="")
    except PmanError:
        return None


def _names(matcher: difflib.SequenceMatcher[str], made: tuple[Line, ...]) -> Iterator[str]:
    """The name of each line of the second text. Lines that differ, such as one with a hidden value, have the name of
    the lines that they replace, if these have one name.
    """
    for tag, low, high, begin, end in matcher.get_opcodes():
        if tag == "equal":
            yield from map(_name, made[low:high])
        else:
            around = {_name(line) for line in made[max(0, low - (low == high)) : high + (low == high)]}
            yield from [around.pop() if len(around) == 1 else ""] * (end - begin)


def _name(line: Line) -> str:
    return " ".join([line.block, *(f"[{rule}]" for rule in line.rules)]).strip()
