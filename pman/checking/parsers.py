"""Judges rendered specs with the real parser or schema of their language.

The parsers are imported when a spec needs them: `pip install 'pman[check]'` brings them.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pman.errors import Misconfigured
from pman.templating.render import Spec, StrictLoader

KUBERNETES_VERSION = "1.35"  # what pman's live suite runs
_SHELLCHECK = (
    "shellcheck",
    "--format=json",
    "--severity=warning",
    "--shell=bash",
    "--exclude=SC2034,SC1111,SC1112,SC2140",  # the last: {{ }} writes a word of its own between two others
    "-",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a rendered text. `part`: "" for the spec itself, else the name of an extra. line: from 1."""

    message: str
    line: int | None = None
    part: str = ""

    def __str__(self) -> str:
        place = ":".join(str(p) for p in (self.part, f"line {self.line}" if self.line else "") if p)
        return f"{place}: {self.message}" if place else self.message


def judge(spec: Spec) -> list[str]:
    """What is wrong with a spec, one sentence each; [] when its language accepts it."""
    return [str(problem) for problem in problems(spec)]


def problems(spec: Spec, kubernetes: str = KUBERNETES_VERSION, shellcheck: bool = False) -> list[Problem]:
    """What is wrong with a spec. kubernetes: version of the API that judges it. shellcheck: ask that, too, if there."""
    judges: Mapping[str, Callable[[], Iterator[Problem]]] = {
        "wdl": lambda: _wdl(spec.text, shellcheck),
        "k8s": lambda: _kubernetes(spec.text, kubernetes),
        "swarm": lambda: _schema(spec.text, "ServiceCreate"),
        "docker": lambda: _schema(spec.text, "ContainerCreate"),
        "slurm": lambda: _sbatch(spec.text, shellcheck),
        "local": lambda: bash_problems(spec.text, shellcheck),
    }
    found = list(judges[spec.target]())
    for name, text in spec.extras.items():
        found += [Problem(p.message, p.line, name) for p in _json(text)]
    return found


def wdl_command(text: str) -> tuple[int, str]:
    """The line that a WDL task's command begins in, and the script that Cromwell makes of it.

    Raises ValueError when a placeholder in it would be evaluated. Cromwell drops blank lines at both ends and the
    indentation that all lines share.
    """
    tasks = _wdl_document(text).tasks
    if not tasks:
        raise ValueError("this is no workflow: it holds no task")
    command = tasks[0].command
    if any(not isinstance(part, str) for part in command.parts):
        raise ValueError("the command holds ~{, which Cromwell would evaluate")
    body = "".join(command.parts)
    script = re.sub(r"\A(?:[ \t]*\n)+", "", body)
    lines = script.rstrip().split("\n")
    cut = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    first = command.pos.line + body[: len(body) - len(script)].count("\n")
    return first, "\n".join(line[cut:] for line in lines)


def wdl_runtime(text: str) -> dict[str, Any]:
    """The runtime attributes of the task in a WDL text, evaluated."""
    wdl = _need("WDL")
    runtime = _wdl_document(text).tasks[0].runtime
    return {
        name: expression.eval(wdl.Env.Bindings(), wdl.StdLib.Base("1.0")).json for name, expression in runtime.items()
    }


@functools.lru_cache(maxsize=4)
def _wdl_document(text: str) -> Any:
    document = _need("WDL").parse_document(text)
    document.typecheck(check_quant=False)
    return document


def _wdl(text: str, shellcheck: bool) -> Iterator[Problem]:
    wdl = _need("WDL")
    try:
        first, script = wdl_command(text)
        wdl_runtime(text)
    except wdl.Error.MultipleValidationErrors as error:
        yield from (Problem(str(e), e.pos.line) for e in error.exceptions)
    except (wdl.Error.SyntaxError, wdl.Error.ValidationError, wdl.Error.EvalError) as error:
        yield Problem(_first_line(str(error))[:200], error.pos.line)
    except ValueError as error:
        yield Problem(str(error))
    else:
        yield from (Problem(p.message, p.line and p.line + first - 1) for p in bash_problems(script, shellcheck))


def _sbatch(text: str, shellcheck: bool) -> Iterator[Problem]:
    if not text.startswith("#!"):
        yield Problem("sbatch takes no script that does not begin with #!", 1)
    yield from bash_problems(text, shellcheck)


def _kubernetes(text: str, version: str) -> Iterator[Problem]:
    data = yield from _yaml(text)
    if data is None:
        return
    if not isinstance(data, dict) or not {"apiVersion", "kind"} <= set(data):
        yield Problem("this is no Kubernetes object: apiVersion or kind is missing", 1)
        return
    library = _need("kubernetes_validate")
    try:
        library.validate(data, version, strict=True)
        yield from _labels(data, text)
    except library.ValidationError as error:
        yield Problem(f"{_path(error)}{_deepest(error).message} (Kubernetes {error.version})", _line(text, error))
    except (library.utils.SchemaNotFoundError, library.utils.VersionNotSupportedError) as error:
        yield Problem(error.message)


def _labels(data: Mapping[str, Any], text: str) -> Iterator[Problem]:
    """Labels that the API refuses though its schema allows them: values are names of at most 63 characters."""
    template = ((data.get("spec") or {}).get("template") or {}).get("metadata") or {}
    for metadata in (data.get("metadata") or {}, template):
        for name, value in (metadata.get("labels") or {}).items():
            if len(value) > 63 or not re.fullmatch(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?)?", value):
                lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{name}:")]
                yield Problem(f"the label {name} cannot be {value!r}: an annotation can", lines[-1] if lines else None)


def _schema(text: str, operation: str) -> Iterator[Problem]:
    data = yield from _yaml(text)
    for error in _validator(operation).iter_errors(data) if data is not None else ():
        yield Problem(f"{_path(error)}{_deepest(error).message}", _line(text, error))


@functools.cache
def _validator(operation: str) -> Any:
    schema = json.loads((Path(__file__).parent / "docker.json").read_text(encoding="utf-8"))
    return _need("jsonschema").Draft202012Validator(schema | {"$ref": f"#/$defs/{operation}"})


def _yaml(text: str) -> Any:
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


def _deepest(error: Any) -> Any:
    return _deepest(error.context[0]) if error.context else error


def _path(error: Any) -> str:
    names = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return f"{names.removeprefix('.')}: " if names else ""


def _line(text: str, error: Any) -> int:
    """The line of the YAML node that a schema does not accept; for an unknown key, that of the key."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in error.absolute_path:
        node = _child(node, part)
    named = re.findall(r"'([^']*)'", error.message) if error.validator == "additionalProperties" else []
    keys = [key for key, _ in node.value if key.value in named] if isinstance(node, yaml.MappingNode) else []
    return int((keys[0] if keys else node).start_mark.line) + 1


def _child(node: Any, part: Any) -> Any:
    if isinstance(part, int):
        return node.value[part]
    return next((value for key, value in node.value if key.value == part), node)


def _json(text: str) -> Iterator[Problem]:
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


def bash_problems(script: str, shellcheck: bool = False) -> Iterator[Problem]:
    """What is wrong with a script of bash."""
    run = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    found = re.findall(r"(?m)^bash: line (\d+): (.*)$", run.stderr.decode(errors="replace"))
    for line, message in found:
        opened = re.search(r"here-document at line (\d+)", message)
        yield Problem(f"bash: {message}", int(opened[1] if opened else line))
    if run.returncode and not found:
        yield Problem(_first_line(run.stderr.decode(errors="replace")))
    if shellcheck and not found and shutil.which("shellcheck"):
        yield from _shellcheck(script)


def _shellcheck(script: str) -> Iterator[Problem]:
    run = subprocess.run(_SHELLCHECK, input=script.encode(), capture_output=True, check=False)
    for item in json.loads(run.stdout or b"[]"):
        yield Problem(f"shellcheck SC{item['code']}: {item['message']}", item["line"])


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Misconfigured(f"{module} is needed to check this: pip install 'pman[check]'") from None
