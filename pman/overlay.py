"""Reads the templates of a site without rendering them: what they shadow, extend and name, and what is wrong in them.

Everything that a site can write without effect (a block that overrides nothing, text outside all blocks, a file that
nothing reads) is a finding: silence would mean that it works.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import meta, nodes

from pman import sandbox
from pman.errors import Misconfigured
from pman.job import Job
from pman.render import SECRETS, TARGETS, Renderer, explain, shipped_templates
from pman.settings import Settings
from pman.storage import Storage

_TYPES: Mapping[str, Any] = {"job": Job, "storage": Storage, "settings": Settings}
# Blocks of .wdl.j2 templates that are shell text, where a WDL string would be wrong.
_SHELL_BLOCKS = ("prologue", "environment", "command")
# What a site's template may set before its blocks; the shipped templates read these instead of job.*.
POLICY = ("image", "partition", "time_limit_minutes")
_BESIDE = ("site.yaml", "settings.env", "README.md", "requests")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong in a site's overlay. line and column count from 1; 0 where there is none to name."""

    rule: str
    message: str
    file: str
    line: int = 0
    column: int = 0
    level: str = "error"

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return f"{place}: {self.level}: {self.message} [{self.rule}]"


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template. name: as `extends` and `include` write it. blocks: name -> line."""

    name: str
    path: str
    source: str
    tree: nodes.Template
    blocks: Mapping[str, int]
    parent: str | None
    uses: tuple[str, ...]


class Overlay:
    """The templates of a site over the shipped ones. Parsing errors are findings, kept in `findings`."""

    def __init__(self, renderer: Renderer, directory: Path | None) -> None:
        self.directory = directory
        self.findings: list[Finding] = []
        self._renderer = renderer
        self._parsed: dict[str, Template | None] = {}
        self.site_names = _templates(directory) if directory else []
        self.shipped_names = _templates(shipped_templates())

    def template(self, name: str) -> Template | None:
        """The template that this name finds: the site's own where it has one. None where it cannot be parsed."""
        if name not in self._parsed:
            self._parsed[name] = self._parse(name)
        return self._parsed[name]

    def chain(self, name: str) -> list[Template]:
        """The template, what it extends, and so on."""
        found: list[Template] = []
        step = self.template(name)
        while step and step not in found:
            found.append(step)
            step = self.template(step.parent) if step.parent else None
        return found

    def reach(self, name: str) -> set[str]:
        """Names of all templates that rendering `name` may read."""
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            if (step := waiting.pop()) not in seen:
                seen.add(step)
                template = self.template(step)
                waiting += [*template.uses] if template else []
        return seen

    def targets(self) -> list[str]:
        """The targets that this overlay has a say in; all of them where it is only a site.yaml, or nothing."""
        entries = {target: [entry.template, *entry.extras.values()] for target, entry in TARGETS.items()}
        changed = [
            target
            for target, names in entries.items()
            if any(step in self.site_names for name in names for step in self.reach(name))
        ]
        return changed if self.site_names else list(TARGETS)

    def lint(self) -> list[Finding]:
        """Everything that can be seen to be wrong without rendering, in the site's own files."""
        for name in self.site_names:
            template = self.template(name)
            if template:
                self.findings += [
                    *self._blocks(template),
                    *self._names(template),
                    *self._unread(template),
                    *_quoting(template),
                ]
        return self.findings + (list(self._unused()) if self.directory else [])

    def _parse(self, name: str) -> Template | None:
        try:
            environment = self._renderer.environment(name)
            source, path, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
            tree = environment.parse(source, name, path)
            environment.compile(source, name, path)  # finds unknown filters
        except Exception as error:
            self.findings.append(finding_of(str(error) if isinstance(error, Misconfigured) else explain(error, name)))
            return None
        blocks = {block.name: block.lineno for block in tree.find_all(nodes.Block)}
        parents = [
            node.template.value for node in tree.find_all(nodes.Extends) if isinstance(node.template, nodes.Const)
        ]
        uses = tuple(name for name in meta.find_referenced_templates(tree) if name)
        return Template(name, str(path), source, tree, blocks, parents[0] if parents else None, uses)

    def _unused(self) -> Iterator[Finding]:
        entries = {name for entry in TARGETS.values() for name in (entry.template, *entry.extras.values())}
        read = {step for name in entries for step in self.reach(name)}
        for name in self.site_names:
            if name not in read:
                near = sandbox.hint(name, self.shipped_names)
                yield Finding("unused-file", f"nothing reads this template{near}", str(self._path(name)), 1)
        for path in sorted(self.directory.rglob("*")) if self.directory else ():
            relative = path.relative_to(self._path(""))
            if path.is_file() and path.suffix != ".j2" and relative.parts[0] not in _BESIDE and path.name[0] != ".":
                yield Finding("unused-file", "nothing reads this file: templates end in .j2", str(path), 0)

    def _path(self, name: str) -> Path:
        return (self.directory or Path()) / name

    def _blocks(self, template: Template) -> Iterator[Finding]:
        if template.parent is None:
            return
        known = {name for parent in self.chain(template.parent) for name in parent.blocks}
        for block in template.tree.find_all(nodes.Block):
            own = any(
                inner is block for outer in template.tree.find_all(nodes.Block) for inner in outer.find_all(nodes.Block)
            )
            if known and not own and block.name not in known:
                message = (
                    f"the block {block.name} overrides nothing in {template.parent}{sandbox.hint(block.name, known)}"
                )
                yield _at(template, "unknown-block", message, block.lineno, block.name)
        for node in template.tree.body:
            yield from _outside_blocks(template, node)

    def _names(self, template: Template) -> Iterator[Finding]:
        unknown = meta.find_undeclared_variables(template.tree) - set(sandbox.VARIABLES) - self._set_anywhere()
        unknown -= set(self._renderer.environment(template.name).globals)
        for node in template.tree.find_all(nodes.Name):
            if node.ctx == "load" and node.name in unknown:
                message = f"{node.name!r} is undefined{sandbox.hint(node.name, sandbox.VARIABLES)}"
                yield _at(template, "undefined", message, node.lineno, node.name)
        excused = {id(node) for node in _asked_whether_defined(template.tree)}
        for step in template.tree.find_all(nodes.Getattr):
            known = self._members(step.node)
            if known is not None and step.attr not in known and id(step) not in excused:
                message = f"{_written(step.node)} has no {step.attr!r}{sandbox.hint(step.attr, known)}"
                yield _at(template, "undefined", message, step.lineno, step.attr)

    def _unread(self, template: Template) -> Iterator[Finding]:
        """Variables that the site sets before its blocks, for the shipped template to read."""
        used = [other for name in (*self.site_names, *self.shipped_names) if (other := self.template(name))]
        read = {node.name for other in used for node in other.tree.find_all(nodes.Name) if node.ctx == "load"}
        for node in template.tree.body if template.parent else ():
            if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and node.target.name not in read:
                message = f"nothing reads {node.target.name}{sandbox.hint(node.target.name, POLICY)}"
                yield _at(template, "unused-set", message, node.lineno, node.target.name)

    def _set_anywhere(self) -> set[str]:
        """Names that any template sets: an included template sees those of the one that includes it."""
        trees = [template.tree for name in (*self.site_names, *self.shipped_names) if (template := self.template(name))]
        return {node.name for tree in trees for node in tree.find_all(nodes.Name) if node.ctx != "load"}

    def _members(self, node: nodes.Expr) -> list[str] | None:
        """The names below an expression whose type is known, else None."""
        kind = self._type(node)
        if kind is Settings:
            return [name for name in Settings.model_fields if name not in SECRETS] + ["items", "keys", "values", "get"]
        if isinstance(kind, Mapping):
            return [str(key) for key in kind] + ["items", "keys", "values", "get"]
        return sandbox.members(kind) or None if isinstance(kind, type) else None

    def _type(self, node: nodes.Expr) -> Any:
        if isinstance(node, nodes.Name):
            return self._renderer.site if node.name == "site" else _TYPES.get(node.name)
        if not isinstance(node, nodes.Getattr):
            return None
        kind = self._type(node.node)
        if isinstance(kind, Mapping):
            return kind.get(node.attr)
        hints = typing.get_type_hints(kind) if isinstance(kind, type) else {}
        return hints.get(node.attr)


def parse_file(path: Path) -> Template:
    """A template outside the template directories, for reading its blocks."""
    source = path.read_text(encoding="utf-8")
    tree = nodes.Template([])
    names = re.finditer(r"\{%[-+]?\s*block\s+(\w+)", source)
    blocks = {found[1]: source.count("\n", 0, found.start()) + 1 for found in names}
    return Template(path.name, str(path), source, tree, blocks, None, ())


def blocks_of(template: Template) -> dict[str, str]:
    """Block -> its text in the template, whole lines, for comparing versions."""
    lines = template.source.splitlines()
    ends = _block_ends(template.source)
    return {name: "\n".join(lines[first - 1 : ends.get(name, first)]) for name, first in template.blocks.items()}


def finding_of(text: str, rule: str = "template") -> Finding:
    """`file:line: cause` as a finding."""
    found = re.match(r"(?s)(.*?):(\d+): (.*)", text)
    return Finding(rule, found[3], found[1], int(found[2])) if found else Finding(rule, text, "")


def _block_ends(source: str) -> dict[str, int]:
    stack, ends = [], {}
    for number, line in enumerate(source.splitlines(), 1):
        for found in re.finditer(r"\{%[-+]?\s*(?:block\s+(\w+)|(endblock))", line):
            if found[1]:
                stack.append(found[1])
            elif stack:
                ends[stack.pop()] = number
    return ends


def _quoting(template: Template) -> Iterator[Finding]:
    for mark in template.tree.find_all(nodes.Filter):
        if mark.name == "safe":
            message = "|safe puts a value in unquoted: whoever sends it can write commands here"
            yield _at(template, "marked-safe", message, mark.lineno, "safe")
    for scope in template.tree.find_all(nodes.ScopedEvalContextModifier):
        yield _at(template, "marked-safe", "quoting cannot be turned off", scope.lineno, "autoescape")
    for output in template.tree.find_all(nodes.Output):
        for before, node, after in zip([None, *output.nodes], output.nodes, [*output.nodes[1:], None], strict=False):
            sides = [side.data for side in (before, after) if isinstance(side, nodes.TemplateData)]
            quoted = len(sides) == 2 and sides[0][-1:] in ("'", '"') and sides[0][-1:] == sides[1][:1]
            if quoted and not isinstance(node, nodes.TemplateData):
                message = "quotes stand around {{ }}, which writes its own: leave them out"
                yield _at(template, "quoted-twice", message, node.lineno)
    if template.name.endswith(".wdl.j2"):
        yield from _wdl_strings_in_shell(template)


def _wdl_strings_in_shell(template: Template) -> Iterator[Finding]:
    for block in template.tree.find_all(nodes.Block):
        outputs = block.find_all(nodes.Output) if block.name in _SHELL_BLOCKS else ()
        for node in (node for output in outputs for node in output.nodes):
            if isinstance(node, nodes.Getattr | nodes.Getitem | nodes.Name | nodes.Concat) and not _is_number(node):
                message = f"{{{{ {_written(node)} }}}} is a WDL string here, in the shell's text: write |sh"
                yield _at(template, "wrong-quoting", message, node.lineno)


def _outside_blocks(template: Template, node: nodes.Node) -> Iterator[Finding]:
    """Text and values at the top of a template that extends another; Jinja skips them without a word."""
    if isinstance(node, nodes.If | nodes.For):
        for inner in node.iter_child_nodes():
            yield from _outside_blocks(template, inner)
    if not isinstance(node, nodes.Output):
        return
    text = [child.data for child in node.nodes if isinstance(child, nodes.TemplateData)]
    if any(piece.strip() for piece in text) or len(text) < len(node.nodes):
        first = next((piece for piece in text if piece.strip()), "")
        line = node.lineno + first[: len(first) - len(first.lstrip())].count("\n")
        yield _at(template, "outside-blocks", "this stands outside all blocks, so it is never rendered", line)


def _is_number(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr) and typing.get_type_hints(Job).get(node.attr) in (int, int | None)


def _asked_whether_defined(tree: nodes.Template) -> Iterator[nodes.Node]:
    tests = (node.node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined"))
    filters = (node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d") and node.node)
    for node in (*tests, *filters):
        yield node
        yield from node.find_all(nodes.Getattr)


def _written(node: nodes.Node) -> str:
    if isinstance(node, nodes.Getattr):
        return f"{_written(node.node)}.{node.attr}"
    return node.name if isinstance(node, nodes.Name) else "..."


def _at(template: Template, rule: str, message: str, line: int, word: str = "") -> Finding:
    lines = template.source.splitlines()
    found = re.search(rf"\b{re.escape(word)}\b", lines[line - 1]) if word and 0 < line <= len(lines) else None
    return Finding(rule, message, template.path, line, found.start() + 1 if found else 0)


def _templates(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.j2") if path.is_file())
