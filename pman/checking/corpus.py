"""The requests that a check renders: plain and hostile ones, and those of a site."""

import heapq
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pman.errors import BadRequest, PmanError, Refused
from pman.job import validate
from pman.targets import TARGETS
from pman.targets.record import CANARY
from pman.templating.decide import Step, image_names
from pman.templating.render import SAMPLE, Renderer
from pman.templating.rules import Condition
from pman.templating.site import scalars

_HOSTILE = (
    "it's", 'a "quote"', "$(touch x) `y`", "~{wdl} >>> ${x} $HOME", "$(PMAN_WORKER_COUNT) $$", "{{.Node.ID}} {{",
    "%s\\n", "", "*", "&amp;", "two\n  lines\n", "\r\n", "tab\t", "na\u00efve \U0001f9e0", "SCRIPT_EPILOGUE", "-n",
    "a=b", "null", "# x",
)  # fmt: skip
# These run where an author's own quotes stand around them: {{ on Swarm, the one without $ in WDL, the last in comments.
_RUN = f"$({CANARY}){{{{{CANARY}}}}}"
_RUN_QUOTED = f'";{CANARY};"'
_RUN_BELOW = f"x\n{CANARY} #"

_WHO = ("auid", "image")
_SIZES = ("number_of_workers", "cpu_limit", "memory_limit", "gpu_limit", "time_limit_minutes", "partition", "type")
_MAX_CANDIDATES = 1000  # a millisecond each
# What rules compare -> the field of a request.
_FIELDS = {
    "user": "auid", "image": "image", "jid": "jid", "kind": "type", "workers": "number_of_workers",
    "cpu_millicores": "cpu_limit", "memory_mib": "memory_limit", "gpus": "gpu_limit",
    "time_limit_minutes": "time_limit_minutes", "partition": "partition",
}  # fmt: skip
# More values than those that the rules name.
_OTHERS: Mapping[str, Sequence[Any]] = {
    "user": ("other",), "image": ("docker.io/library/other",), "kind": ("ds", "fs", "ts"), "time_limit_minutes": (60,),
    "partition": ("other",),
}  # fmt: skip
_MANY = 20  # values of one condition that are tried


@dataclass(frozen=True, slots=True)
class Case:
    """A request and the settings to render it under."""

    name: str
    request: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)
    targets: Collection[str] = frozenset(TARGETS)
    may_be_unwritable: bool = False  # a language may have no way to write its values
    own: bool = False  # a site's, which is posed as it is


def cases() -> list[Case]:
    """Plain and hostile, small and large, with every optional field and without, over every kind of storage."""
    every_option = {"time_limit_minutes": 90, "partition": "gpu-long", "args_path_flags": ["--in"], "gpu_limit": 1}
    volume = {"VOLUME_NAME": "chris-files"}
    rows: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("plain", {}, {}),
        ("hostile", {"args": list(_HOSTILE), "env": [f"V{n}={v}" for n, v in enumerate(_HOSTILE)]}, {}),
        ("nothing optional", {"type": "fs", "args": [], "env": []}, {}),
        ("every option", every_option, {}),
        ("two GPUs, large", {"gpu_limit": 2, "cpu_limit": 64_000, "memory_limit": 500_000, "type": "ts"}, {}),
        ("many workers", {"number_of_workers": 64, "cpu_limit": 1, "memory_limit": 1}, {}),
        ("many arguments", {"args": [f"--a{n}=$(x)" for n in range(200)]}, {}),
        ("directories apart", {"input_dir": "key 1/it's", "output_dir": "feed_1/$(out)"}, {}),
        ("commands in values", _hostile(_RUN), {}),
        ("commands in quotes", _hostile(_RUN_QUOTED), {}),
        ("limits ignored", {"gpu_limit": 1}, {"IGNORE_LIMITS": "yes"}),
        ("user, labels", {}, {"CONTAINER_USER": "1000:2000", "SHM_SIZE": "64", "JOB_LABELS": "site=a"}),
        ("nfs", {}, {"STORAGE_TYPE": "nfs", "NFS_SERVER": "nfs.example.org"}),
        ("volume", {}, {"STORAGE_TYPE": "docker_local_volume", **volume}),
        ("claim", {}, {"STORAGE_TYPE": "kubernetes_pvc", **volume}),
    ]
    made = [Case(name, {**SAMPLE, **fields}, given, _with(given.get("STORAGE_TYPE"))) for name, fields, given in rows]
    return [*made, Case("line break in a name", {**SAMPLE, "auid": _RUN_BELOW}, may_be_unwritable=True)]


def _with(storage_type: str | None) -> list[str]:
    """The targets that have this type of storage; all of them for None."""
    return [name for name, target in TARGETS.items() if storage_type in (None, *target.storage_types)]


def _hostile(value: str) -> dict[str, Any]:
    directories = {"input_dir": f"{value}/in", "output_dir": f"{value}/out"}
    return {"jid": value, "auid": value, "args": [value], "env": [f"V={value}"], **directories}


def own_cases(directory: Path) -> list[Case]:
    """The requests of a directory's *.json files. Raises BadRequest for one that is no request."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            data = json.loads(path.read_bytes())
            validate(data)
        except (ValueError, OSError, PmanError) as error:
            raise BadRequest(f"{path}: {error}") from None
        found.append(Case(path.name, data, own=True))
    return found


def accepted(renderer: Renderer, target: str, own: Sequence[Case]) -> Mapping[str, Any]:
    """A request that the site accepts: the sample, one of its own, or the sample within its rules.

    If its templates refuse all of these, users and images that its site.yaml names are tried. If they refuse these,
    too, it is the sample.
    """
    for request in itertools.islice(_candidates(renderer, own), _MAX_CANDIDATES):
        try:
            renderer.render(renderer.job(validate(dict(request))), target)
        except (Refused, BadRequest):
            continue
        except PmanError:
            break
        return request
    return SAMPLE


def _candidates(renderer: Renderer, own: Sequence[Case]) -> Iterator[Mapping[str, Any]]:
    yield SAMPLE
    yield from (case.request for case in own)
    base = _within(renderer, SAMPLE)
    yield base
    named = dict.fromkeys(text for _, text in scalars(renderer.settings.templates_dir) if text)
    # A pattern or a prefix of images becomes one image that it holds.
    images = [*named, *(re.sub(r"[*?]|/$", lambda found: found[0].strip("*?") + "x", text) for text in named)]
    yield from ({**base, "auid": name} for name in named)
    yield from ({**base, "image": image} for image in images)
    yield from ({**base, "auid": name, "image": image} for name in named for image in images)


def _within(renderer: Renderer, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request like this one that the site's rules accept, with few changes; itself where none is found."""
    known = {name: dict.fromkeys([SAMPLE.get(_FIELDS[name]), *_OTHERS.get(name, ())]) for name in _FIELDS}
    for rule in renderer.rules.rules:
        for each in (*rule.when, *rule.unless):
            known[each.field] |= dict.fromkeys(each.examples[:_MANY])
    seen: set[tuple[Any, ...]] = set()
    waiting: list[tuple[int, int, Mapping[str, Any], Sequence[Step]]] = []

    def tried(changed: Mapping[str, Any]) -> bool:
        """Whether the rules accept it. One that more rules let pass is the better to go on from."""
        if (key := tuple(changed.get(name) for name in _FIELDS.values())) in seen:
            return False
        seen.add(key)
        try:
            decision = renderer.decide(validate(dict(changed)))
        except BadRequest:  # no number of workers, no name of an image
            return False
        heapq.heappush(waiting, (-len(decision.steps), len(seen), changed, decision.steps))
        return decision.refused is None

    changed = request
    accepts = tried(request)
    while waiting and not accepts and len(seen) < _MAX_CANDIDATES:
        _, _, base, steps = heapq.heappop(waiting)
        for changes in _ways_out(steps, known):
            changed = {**base, **changes}
            if accepts := tried(changed):
                break
    return changed if accepts else request


def _ways_out(steps: Sequence[Step], known: Mapping[str, Mapping[Any, None]]) -> Iterator[dict[str, Any]]:
    """Changes with which the last of these rules may no longer refuse, or one before it may end the list."""
    *before, refusing = (step.rule for step in steps)
    for conditions in (refusing.unless, *(rule.when for rule in before if rule.last)):
        yield {_FIELDS[each.field]: next(filter(partial(_holds, each), each.examples), None) for each in conditions}
    for each in (*refusing.when, *refusing.unless):
        yield from ({_FIELDS[each.field]: value} for value in known[each.field])


def _holds(condition: Condition, value: Any) -> bool:
    return condition.holds(image_names(value) if condition.field == "image" else value)


def posings(case: Case, known: Mapping[str, Any], renderer: Renderer) -> Iterator[Case]:
    """The case, and then what to pose in its place if the site refuses it.

    That is first the case within the site's rules, then the case with user and image of a request that the site
    accepts (`known`), then also with the sizes of that request.
    """
    yield case
    if case.own:
        return
    near = _within(renderer, case.request)
    if near != case.request:
        yield replace(case, request=near)
    for fields in (_WHO, (*_WHO, *_SIZES)):
        rest = {name: value for name, value in case.request.items() if name not in fields}
        yield replace(case, request={**rest, **{name: known[name] for name in fields if name in known}})
