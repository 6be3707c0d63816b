"""The requests that a check renders: plain and hostile ones, and those of a site."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pman.errors import BadRequest, PmanError, Refused
from pman.job import validate
from pman.targets import TARGETS
from pman.targets.record import CANARY
from pman.templating.render import SAMPLE, Renderer
from pman.templating.site import scalars

_HOSTILE = (
    "it's", 'a "quote"', "$(touch x) `y`", "~{wdl} >>> ${x} $HOME", "$(PMAN_WORKER_COUNT) $$", "{{.Node.ID}} {{",
    "%s\\n", "", "*", "&amp;", "two\n  lines\n", "\r\n", "tab\t", "na\u00efve \U0001f9e0", "SCRIPT_EPILOGUE", "-n",
    "a=b", "null", "# x",
)  # fmt: skip
# Run, where an author's own quotes stand around them; {{ for Swarm, no $ for WDL, a line break for comments.
_RUN = f"$({CANARY}){{{{{CANARY}}}}}"
_RUN_QUOTED = f'";{CANARY};"'
_RUN_BELOW = f"x\n{CANARY} #"

_WHO = ("auid", "image")
_SIZES = ("number_of_workers", "cpu_limit", "memory_limit", "gpu_limit", "time_limit_minutes", "partition", "type")
_MAX_CANDIDATES = 1000  # a millisecond each


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
    """Fields that hold the value wherever a user may put it."""
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
    """A request that the site accepts: the sample, one of its own, or the sample with what its site.yaml names.

    The sample where it accepts none of them.
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
    named = dict.fromkeys(text for _, text in scalars(renderer.settings.templates_dir) if text)
    # A pattern or a prefix of images becomes one image that it holds.
    images = [*named, *(re.sub(r"[*?]|/$", lambda found: found[0].strip("*?") + "x", text) for text in named)]
    yield from ({**SAMPLE, "auid": name} for name in named)
    yield from ({**SAMPLE, "image": image} for image in images)
    yield from ({**SAMPLE, "auid": name, "image": image} for name in named for image in images)


def posings(case: Case, known: Mapping[str, Any]) -> Iterator[Case]:
    """The case, and what to pose instead where a site refuses it: the same by the user and with the image of a request
    that it accepts, then also with the sizes of that request.
    """
    yield case
    for fields in () if case.own else (_WHO, (*_WHO, *_SIZES)):
        rest = {name: value for name, value in case.request.items() if name not in fields}
        yield replace(case, request={**rest, **{name: known[name] for name in fields if name in known}})
