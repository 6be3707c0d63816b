"""What Cromwell does with WDL text: the workflow that was submitted, and the shell texts of a config backend."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import WDL

Values = dict[str, WDL.Value.Base]

# miniwdl's parser and type checker keep state; several threads use them here.
_lock = threading.Lock()


class InvalidWorkflow(Exception):
    """The workflow fails with "Workflow input processing failed" and this message."""


class WrongType(Exception):
    """A runtime attribute has the wrong type: Cromwell tries again and again before it gives up."""


class InvalidAttribute(Exception):
    """A runtime attribute has a value that is refused when the call starts."""


@dataclass(frozen=True)
class Plan:
    """One call of one task, which is all that is supported."""

    workflow_name: str
    call: str  # as in metadata: `ChRISJob.plugin_instance`
    task_name: str
    command: str
    runtime: Values
    language_version: str


def _at(source: str, line: int, column: int) -> str:
    text = source.split("\n")[line - 1] if 0 < line <= source.count("\n") + 1 else ""
    return f"Unrecognized token on line {line}, column {column}:\n\n{text}\n{' ' * (column - 1)}^"


def _unfinished(source: str) -> str:
    line = source.splitlines()[0] if source else ""
    return f"ERROR: Finished parsing without consuming all tokens.\n\n{line}\n^\n     "


def _syntax_message(error: Any, source: str) -> str:
    if not re.match(r"\s*(#.*\s*)*version\s+(1\.0|draft-[23])\b", source):
        return _unfinished(source)
    if "escape sequence" in str(error):
        return f"Failed to process task definition (reason 1 of 1): {error}"
    return _at(source, error.pos.line, error.pos.column + 1)


def _type_message(error: Exception, doc: WDL.Tree.Document) -> str:
    if isinstance(error, WDL.Error.MultipleValidationErrors):
        return _type_message(error.exceptions[0], doc)
    text = str(error)
    if isinstance(error, WDL.Error.NoSuchTask):
        name = text.rsplit(": ", 1)[-1]
        return (
            f"Failed to process workflow definition '{doc.workflow.name if doc.workflow else ''}' (reason 1 of 1): "
            f"Cannot generate outputs for 'call {name}'. No such callable exists in []"
        )
    if isinstance(error, WDL.Error.UnknownIdentifier):
        name = text.removeprefix("Unknown identifier ")
        text = f"Cannot lookup value '{name}', it is never declared. Available values are: []"
    task = doc.tasks[0].name if doc.tasks else ""
    return f"Failed to process task definition '{task}' (reason 1 of 1): {text}"


def _parse(source: str) -> WDL.Tree.Document:
    try:
        with _lock:
            doc = WDL.parse_document(source)
    except (WDL.Error.SyntaxError, WDL.Error.ImportError) as error:
        raise InvalidWorkflow(_syntax_message(error, source)) from error
    try:
        with _lock:
            doc.typecheck(check_quant=False)
    except (WDL.Error.ValidationError, WDL.Error.MultipleValidationErrors) as error:
        raise InvalidWorkflow(_type_message(error, doc)) from error
    return doc


def dedent(command: str) -> str:
    """Cromwell's rule: blank lines at the ends go, then the indentation that all non-blank lines share."""
    lines = re.sub(r"\A(?:[ \t]*\n)+", "", command).rstrip().split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    cut = min(indents, default=0)
    return "\n".join(line[cut:] for line in lines)


def _single_call(doc: WDL.Tree.Document) -> tuple[str, WDL.Tree.Task, Mapping[str, WDL.Expr.Base]]:
    if doc.workflow is None:
        if len(doc.tasks) != 1:
            raise InvalidWorkflow("Namespace contains no local workflows to run")
        return doc.tasks[0].name, doc.tasks[0], {}
    calls = [node for node in doc.workflow.body if isinstance(node, WDL.Tree.Call)]
    if len(calls) != 1 or not isinstance(calls[0].callee, WDL.Tree.Task):
        raise InvalidWorkflow("this stand-in runs workflows of exactly one task call")
    return f"{doc.workflow.name}.{calls[0].name}", calls[0].callee, calls[0].inputs


def _environment(doc: WDL.Tree.Document, inputs: dict[str, Any], stdlib: WDL.StdLib.Base) -> WDL.Env.Bindings[Any]:
    """Values of the task's declarations: submitted inputs, the call's inputs, defaults."""
    call, task, arguments = _single_call(doc)
    target = doc.workflow or task
    known = [f"{target.name}.{b.name}" for b in target.available_inputs]
    for name in inputs:
        if name not in known:
            expected = ", ".join(known)
            raise InvalidWorkflow(f"WARNING: Unexpected input provided: {name} (expected inputs: [{expected}])")
    outer: WDL.Env.Bindings[Any] = WDL.Env.Bindings()
    for declaration in doc.workflow.inputs or [] if doc.workflow else []:
        outer = _bind(outer, declaration, inputs.get(f"{target.name}.{declaration.name}"), stdlib)
    env: WDL.Env.Bindings[Any] = WDL.Env.Bindings()
    for declaration in [*(task.inputs or []), *task.postinputs]:
        given = inputs.get(f"{call}.{declaration.name}")
        if given is None and declaration.name in arguments:
            env = env.bind(declaration.name, arguments[declaration.name].eval(outer, stdlib).coerce(declaration.type))
        else:
            env = _bind(env, declaration, given, stdlib)
    return env


def _bind(
    env: WDL.Env.Bindings[Any], declaration: WDL.Tree.Decl, given: Any, stdlib: WDL.StdLib.Base
) -> WDL.Env.Bindings[Any]:
    if given is not None:
        return env.bind(declaration.name, WDL.Value.from_json(declaration.type, given))
    if declaration.expr is not None:
        return env.bind(declaration.name, declaration.expr.eval(env, stdlib).coerce(declaration.type))
    if not declaration.type.optional:
        raise InvalidWorkflow(f"Required workflow input '{declaration.name}' not specified")
    return env.bind(declaration.name, WDL.Value.Null())


def _joined(value: WDL.Value.Base) -> WDL.Value.Base:
    """The string, in which each character that was written as two \\uXXXX is one again."""
    if not isinstance(value, WDL.Value.String):
        return value
    return WDL.Value.String(value.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def plan(source: str, inputs: dict[str, Any]) -> Plan:
    """Parse, type-check and evaluate a submitted workflow, or raise InvalidWorkflow."""
    doc = _parse(source.replace("\r\n", "\n"))
    call, task, _ = _single_call(doc)
    try:
        with _lock:
            stdlib = WDL.StdLib.Base(doc.effective_wdl_version)
            env = _environment(doc, inputs, stdlib)
            command = task.command.eval(env, stdlib, dedent=False).value
            runtime = {name: _joined(expr.eval(env, stdlib)) for name, expr in task.runtime.items()}
    except (WDL.Error.EvalError, WDL.Error.InputError) as error:
        raise InvalidWorkflow(str(error)) from error
    return Plan(
        workflow_name=doc.workflow.name if doc.workflow else task.name,
        call=call,
        task_name=task.name,
        command=dedent(command),
        runtime=runtime,
        language_version=doc.effective_wdl_version,
    )


# -- runtime attributes --------------------------------------------------------------------------------------------

_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*")
# Every prefix is binary, whatever its spelling.
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
UNITS_BYTES = {p + s: n for p, n in _UNITS.items() for s in ("", "i", "B", "iB") if p != "B" or not s}


def memory_bytes(value: WDL.Value.Base) -> Decimal:
    """Bytes of a memory attribute such as `420M`, or raise InvalidAttribute in Cromwell's words."""
    say = "Expecting memory runtime attribute to be an Integer or String with format '8 GB'."
    if isinstance(value, WDL.Value.Int):
        return Decimal(value.value)
    text = str(value.value)
    found = _MEMORY.fullmatch(text)
    if found is None:
        raise InvalidAttribute(f"{say} Exception: {text} should be of the form 'X Unit' where X is a number, e.g. 8 GB")
    if found[2] not in UNITS_BYTES:
        raise InvalidAttribute(f"{say} Exception: {found[2]} is an invalid memory unit")
    return Decimal(found[1]) * UNITS_BYTES[found[2]]


def java_double(value: Decimal) -> str:
    """A number as Java prints a double, less a final `.0`."""
    number = float(value)
    if number and not 1e-3 <= abs(number) < 1e7:
        mantissa, exponent = f"{Decimal(repr(number)):E}".split("E")
        return f"{mantissa}E{int(exponent)}"
    return repr(number).removesuffix(".0")


def _coerce(name: str, value: WDL.Value.Base, type_: WDL.Type.Base) -> WDL.Value.Base:
    raw = value.value
    if isinstance(type_, WDL.Type.Int) and not isinstance(raw, bool) and re.fullmatch(r"[+-]?\d+", str(raw)):
        return WDL.Value.Int(int(raw))
    if isinstance(type_, WDL.Type.Float) and re.fullmatch(r"[+-]?\d+(\.\d+)?(E[+-]?\d+)?", str(raw), re.IGNORECASE):
        return WDL.Value.Float(float(raw))
    if isinstance(type_, WDL.Type.Boolean) and str(raw).lower() in ("true", "false"):
        return WDL.Value.Boolean(str(raw).lower() == "true")
    if isinstance(type_, WDL.Type.String) and isinstance(raw, (str, int, float)):
        return WDL.Value.String(raw if isinstance(raw, str) else str(value.json).lower())
    raise WrongType(f"Expecting {name} runtime attribute to be a {type_} but got {value}")


def _text(value: WDL.Value.Base) -> str:
    return value.value if isinstance(value, WDL.Value.String) else json.dumps(value.json, separators=(",", ":"))


@dataclass
class Attributes:
    """The runtime attributes that a backend declares."""

    text: str
    declarations: list[WDL.Tree.Decl] = field(init=False)

    def __post_init__(self) -> None:
        task = _task(self.text, "")
        self.declarations = list(task.inputs or task.postinputs)

    def resolve(self, runtime: Values, defaults: Mapping[str, Any]) -> Values:
        """Declared attribute -> value of its declared type; raises WrongType. Undeclared ones are ignored."""
        found: Values = {}
        env: WDL.Env.Bindings[Any] = WDL.Env.Bindings()
        for declaration in self.declarations:
            name = declaration.name
            given = runtime.get("memory" if name.startswith("memory") else name)
            if given is None and name in defaults:
                given = WDL.Value.String(str(defaults[name]))
            if given is None and declaration.expr is not None:
                found[name] = declaration.expr.eval(env, WDL.StdLib.Base("draft-2"))
            elif given is not None and name.startswith("memory"):
                found[name] = given
            elif given is not None:
                found[name] = _coerce(name, given, declaration.type)
            elif declaration.type.optional:
                found[name] = WDL.Value.Null()
            else:
                raise WrongType(f"Can't find an attribute value for key {name}")
        return found

    def convert(self, values: Values, runtime: Values) -> tuple[Values, dict[str, str]]:
        """What the submit text sees and what metadata shows; raises InvalidAttribute."""
        shown: dict[str, str] = {}
        seen = dict(values)
        for declaration in self.declarations:
            name, value = declaration.name, values[declaration.name]
            if name.startswith("memory_"):
                unit = UNITS_BYTES[name.removeprefix("memory_")[0].upper()]
                size = memory_bytes(value) if "memory" in runtime else Decimal(str(value.value)) * unit
                integer = isinstance(declaration.type, WDL.Type.Int)
                seen[name] = WDL.Value.Int(int(size / unit)) if integer else WDL.Value.Float(float(size / unit))
                shown["memory"] = java_double(size / (1 << 30)) + " GB"
            elif name == "cpu" and isinstance(value.value, int) and value.value < 1:
                raise InvalidAttribute("Expecting cpu runtime attribute value greater than 0")
            elif not isinstance(value, WDL.Value.Null):
                shown[name] = _text(value)
        return seen, shown


@dataclass(frozen=True)
class ReturnRules:
    """The attributes that every backend knows: what becomes of a job's return code."""

    fail_on_stderr: bool
    codes: frozenset[int] | None  # None: any code is good
    max_retries: int
    shown: dict[str, str]

    @classmethod
    def of(cls, runtime: Values, defaults: Mapping[str, Any]) -> ReturnRules:
        def value(name: str, default: Any) -> Any:
            return runtime[name].json if name in runtime else defaults.get(name, default)

        codes, stderr, retries = value("continueOnReturnCode", 0), value("failOnStderr", False), value("maxRetries", 0)
        codes = json.loads(codes) if isinstance(codes, str) else codes
        if isinstance(codes, bool):
            accepted = None if codes else frozenset({0})
        else:
            accepted = frozenset(codes if isinstance(codes, list) else [codes])
        shown = {"continueOnReturnCode": codes, "failOnStderr": stderr, "maxRetries": int(retries)}
        text = {name: json.dumps(v, separators=(",", ":")) for name, v in shown.items()}
        return cls(str(stderr).lower() == "true", accepted, int(retries), text)


# -- shell texts of a backend --------------------------------------------------------------------------------------

# Names that Cromwell itself gives to submit, kill and check-alive.
_STANDARD = "script cwd out err job_name job_shell job_id docker_cwd docker_script docker_out docker_err docker_cid"


def _task(declarations: str, command: str) -> WDL.Tree.Task:
    """A draft-2 task as Cromwell makes it of its configuration, margins stripped."""
    standard = "\n".join(f"String {name}" for name in _STANDARD.split()) if command else ""
    text = f"task shell {{\n{declarations}\n{standard}\ncommand {{{command}}}\n}}\n"
    with _lock:
        doc = WDL.parse_document(re.sub(r"(?m)^\s*\|", "", text), version="draft-2")
        doc.typecheck(check_quant=False)
    return doc.tasks[0]


class ShellText:
    """submit, kill or check-alive: a draft-2 command whose inputs are the runtime attributes."""

    def __init__(self, declarations: str, text: str) -> None:
        self._task = _task(declarations, text)

    def render(self, values: Values, standard: Mapping[str, str]) -> str:
        env: WDL.Env.Bindings[Any] = WDL.Env.Bindings()
        for name, value in values.items():
            env = env.bind(name, value)
        for name in _STANDARD.split():
            env = env.bind(name, WDL.Value.String(standard.get(name, "")))
        with _lock:
            command: str = self._task.command.eval(env, WDL.StdLib.Base("draft-2"), dedent=False).value
        return dedent(command) + "\n"
