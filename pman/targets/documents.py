"""YAML and JSON, as the judges of several targets read them. A parser is imported when a spec needs it."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pman.errors import Misconfigured
from pman.job import Job
from pman.targets.record import CANARY, Flaw, Problem
from pman.templating.site import StrictLoader, node_at


def need(module: str) -> Any:
    """A parser of pman's extra `check`. Raises Misconfigured where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Misconfigured(f"{module} is needed to check this: pip install 'pman[check]'") from None


def yaml_document(text: str) -> Any:
    """The data of one YAML document; yields a Problem and returns None when it is none."""
    try:
        data = yaml.load(text, Loader=StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        inside = error.context or ""  # what is never closed is wrong where it was opened
        mark = error.context_mark if "flow" in inside or "quoted" in inside else error.problem_mark
        yield Problem(f"this is no YAML: {error.problem}", mark.line + 1 if mark else None)
        return None
    if data is None:
        yield Problem("this is empty", 1)
    return data


def said(error: Any) -> str:
    """What a schema's validator has against a document, with the place in it."""
    names = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    while error.context:
        error = error.context[0]
    return f"{names.removeprefix('.')}: {error.message}" if names else str(error.message)


def line(text: str, error: Any) -> int:
    """The line of the YAML node that a schema does not accept; for an unknown key, that of the key."""
    node, _ = node_at(yaml.compose(text, yaml.SafeLoader), error.absolute_path)
    named = re.findall(r"'([^']*)'", error.message) if error.validator == "additionalProperties" else []
    keys = [key for key, _ in node.value if key.value in named] if isinstance(node, yaml.MappingNode) else []
    return int((keys[0] if keys else node).start_mark.line) + 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Where a document carries the identity of its job: path -> `job.FIELD`, or a text that must stand there."""

    parts: Mapping[tuple[str, ...], str]

    def lacks(self, job: Job, document: Any) -> tuple[tuple[str, ...], str] | None:
        """The first path at which the document is not the job's, and a sentence about it."""
        for path, wanted in self.parts.items():
            found = document
            for step in path:
                found = found.get(step) if isinstance(found, Mapping) else None
            if found != (getattr(job, wanted[4:]) if wanted.startswith("job.") else wanted):
                shown = f"{{{{ {wanted} }}}}" if wanted.startswith("job.") else wanted
                return path, f"{' '.join(path)} must be {shown}, or pman does not find the job again"
        return None

    def flaws(self, job: Job, document: Any, text: str) -> Iterator[Flaw]:
        """What the document, read from `text`, lacks of the job's identity."""
        if found := self.lacks(job, document):
            node, _ = node_at(yaml.compose(text, yaml.SafeLoader), found[0])
            yield Flaw("identity", found[1], int(node.start_mark.line) + 1)


def json_problems(text: str) -> Iterator[Problem]:
    try:
        json.loads(text, object_pairs_hook=_each_name_once)
    except json.JSONDecodeError as error:
        yield Problem(f"this is no JSON: {error.msg}", error.lineno)
    except ValueError as error:
        yield Problem(str(error))


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the name {twice[0]!r} is given twice")
    return dict(pairs)


def expanded(texts: list[str], opened: str, who: str, quoting: str) -> Iterator[Flaw]:
    """Values of a request that the scheduler would expand: CANARY after `opened`, a regular expression."""
    if any(re.search(opened + CANARY, text) for text in texts):
        yield Flaw("injected", f"{who} would expand a value of the request here: write |{quoting}")
