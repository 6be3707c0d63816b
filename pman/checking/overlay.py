"""Reads the templates of a site without rendering them: what they shadow, extend, include and name."""

import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateNotFound, meta, nodes

from pman.errors import Misconfigured, TemplateError
from pman.job import Job
from pman.policy import Policy
from pman.settings import Settings
from pman.storage import Storage
from pman.targets import TARGETS
from pman.templating import sandbox
from pman.templating.explain import attribute_of
from pman.templating.files import files, shipped_templates
from pman.templating.render import SECRETS, Renderer

_TYPES: Mapping[str, Any] = {"job": Job, "policy": Policy, "storage": Storage, "settings": Settings}
_OF_MAPPINGS = ["items", "keys", "values", "get"]


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

    def __init__(self, renderer: Renderer) -> None:
        self.directory = renderer.settings.templates_dir
        self.findings: list[Finding] = []
        self.renderer = renderer
        self._parsed: dict[str, Template | None] = {}
        self.site_names = _templates(self.directory) if self.directory else []
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
        """The targets that this overlay has a say in; all of them where it is only a site.yaml, or nothing.

        `policy.targets` of site.yaml names others.
        """
        changed = [
            name
            for name, target in TARGETS.items()
            if any(step in self.site_names for template in target.templates for step in self.reach(template))
        ]
        return [*self.renderer.rules.targets] or (changed if self.site_names else list(TARGETS))

    def all_templates(self) -> list[Template]:
        """Every template that can be parsed, the site's and the shipped ones."""
        return [template for name in (*self.site_names, *self.shipped_names) if (template := self.template(name))]

    def readers(self, name: str) -> list[Template]:
        """The templates that what `name` sets may reach: those it is rendered together with."""
        reaches = (self.reach(other.name) for other in self.all_templates())
        together = {step for reached in reaches if name in reached for step in reached}
        return [template for step in together if (template := self.template(step))]

    def _parse(self, name: str) -> Template | None:
        path = str(self.directory / name) if self.directory and name in self.site_names else name
        try:
            environment = self.renderer.environment(name)
            source, found, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
            return _read(environment, source, name, str(found))
        except TemplateNotFound:
            return None  # told where it is named
        except TemplateError as error:
            self.findings.append(finding_of(str(error)))
        except Misconfigured as error:
            self.findings.append(Finding("template", str(error), path, 1))
        except Exception as error:
            self.findings.append(finding_of(self.renderer.explain(error, name)))
        return None

    def members(self, node: nodes.Node) -> list[str] | None:
        """The names below an expression whose type is known, else None."""
        kind = self.type_of(node)
        if kind is Settings:
            return [name for name in Settings.model_fields if name not in SECRETS] + _OF_MAPPINGS
        if isinstance(kind, Mapping):
            return [str(key) for key in kind] + _OF_MAPPINGS
        if kind is str or isinstance(kind, str):
            return [name for name in dir(str) if not name.startswith("_")]
        return sandbox.members(kind) or None if isinstance(kind, type) else None

    def type_of(self, node: nodes.Node) -> Any:
        """The type of an expression below job, storage, settings; below site its value; None where it is unknown."""
        if isinstance(node, nodes.Name):
            return self.renderer.site if node.name == "site" else _TYPES.get(node.name)
        if (name := attribute_of(node)) is None:
            return None
        kind = self.type_of(node.node)  # type: ignore[attr-defined]
        if isinstance(kind, Mapping):
            return kind.get(name)
        if not isinstance(kind, type):
            return None
        found = getattr(kind, name, None)
        of_property = typing.get_type_hints(found.fget).get("return") if isinstance(found, property) else None
        return typing.get_type_hints(kind).get(name) or of_property


@functools.lru_cache(maxsize=100)
def _read(environment: Environment, source: str, name: str, path: str) -> Template:
    """A template parsed once for all saves of others. Raises Jinja's errors."""
    tree = environment.parse(source, name, path)
    environment.compile(source, name, path)  # finds unknown filters
    blocks = {block.name: block.lineno for block in tree.find_all(nodes.Block)}
    extends = (node.template for node in tree.find_all(nodes.Extends))
    parents = [parent.value for parent in extends if isinstance(parent, nodes.Const)]
    uses = tuple(name for name in meta.find_referenced_templates(tree) if name)
    return Template(name, path, source, tree, blocks, parents[0] if parents else None, uses)


def block_lines(source: str) -> dict[str, tuple[int, int]]:
    """Block -> the lines in which it begins and ends, in the order of the source."""
    tokens = [token for token in Environment(autoescape=True).lex(source) if token[1] != "whitespace"]
    stack, lines = [], {}
    for (line, kind, _), (_, _, word), (_, _, name) in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if (kind, word) == ("block_begin", "block"):
            stack.append((name, line))
        elif stack and (kind, word) == ("block_begin", "endblock"):
            begun, first = stack.pop()
            lines[begun] = (first, line)
    return dict(sorted(lines.items(), key=lambda item: item[1]))


def blocks_of(source: str) -> dict[str, str]:
    """Block -> its text in a template, whole lines, for comparing versions."""
    lines = source.splitlines()
    return {name: "\n".join(lines[first - 1 : last]) for name, (first, last) in block_lines(source).items()}


def outside_of_blocks(source: str) -> str:
    """What stands between the blocks of a template, without `extends`, comments and empty lines."""
    lines = re.sub(r"(?s)\{#.*?#\}", lambda found: "\n" * found[0].count("\n"), source).splitlines()
    inside = {number for first, last in block_lines(source).values() for number in range(first, last + 1)}
    outside = [line for number, line in enumerate(lines, 1) if number not in inside and line.strip()]
    return "\n".join(line for line in outside if not re.match(r"\s*\{%[-+]?\s*extends\b", line))


def finding_of(text: str, rule: str = "template") -> Finding:
    found = re.match(r"(?s)(.*?):(\d+): (.*)", text)
    return Finding(rule, found[3], found[1], int(found[2])) if found else Finding(rule, text, "")


def at(template: Template, rule: str, message: str, line: int, word: str = "") -> Finding:
    """A finding in a template; its column is where `word` stands in the line."""
    lines = template.source.splitlines()
    found = re.search(rf"\b{re.escape(word)}\b", lines[line - 1]) if word and 0 < line <= len(lines) else None
    return Finding(rule, message, template.path, line, found.start() + 1 if found else 0)


def _templates(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in files(directory) if path.suffix == ".j2")


def branches(node: nodes.If) -> list[list[nodes.Node]]:
    """What an `if` may come to: its body, each `elif`, `else`."""
    elifs: list[list[nodes.Node]] = [[other] for other in node.elif_]
    return [node.body, *elifs, node.else_]


def macros(template: Template) -> set[str]:
    """The names of the macros that a template defines or imports, and of the templates that it imports."""
    found = {node.name for node in template.tree.find_all(nodes.Macro)}
    found |= {node.target for node in template.tree.find_all(nodes.Import)}
    imported = (name for node in template.tree.find_all(nodes.FromImport) for name in node.names)
    return found | {name if isinstance(name, str) else name[1] for name in imported}


def written(node: nodes.Node) -> str:
    """An expression as its author wrote it, for messages; `...` for what is no chain of names."""
    if (name := attribute_of(node)) is not None:
        return f"{written(node.node)}.{name}"  # type: ignore[attr-defined]
    return node.name if isinstance(node, nodes.Name) else "..."
