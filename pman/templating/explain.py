"""Why a job is rendered as it is: what the site's rules decided, and where each rendered line comes from.

Which decision stands in which line is read from the templates themselves: `printed` follows policy.* and job.* through
sets, loops, conditions, blocks and includes to the text that they end in.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

from pman.errors import PmanError, TemplateError
from pman.job import JobRequest
from pman.templating.decide import LIVE, Change, Decision, Step
from pman.templating.files import shipped_templates
from pman.templating.render import Piece, Renderer
from pman.templating.rules import Rule

# Field of job that templates print -> the name by which rules set it.
_OF_JOB = {**{field: name for name, field in LIVE.items()}, "cpu_cores": "cpu_millicores", "env": "environment"}
_Names = frozenset[str]
_NONE: _Names = frozenset()


@dataclass(frozen=True, slots=True)
class Line:
    """A rendered line. file, line: of its template, `shipped/...` for pman's own; block: "" outside of all.

    rules: those that decided what the line says.
    """

    text: str
    file: str
    line: int
    block: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision about a request and, for a target, the rendered lines and what the target cannot express.

    file: the site's site.yaml. problem: why nothing could be rendered.
    """

    decision: Decision
    file: str
    target: str | None
    lines: tuple[Line, ...] = ()
    unexpressed: tuple[str, ...] = ()
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        lines = [{name: getattr(line, name) for name in Line.__slots__} for line in self.lines]
        more = {"target": self.target, "cannot_express": self.unexpressed, "lines": lines, "problem": self.problem}
        return {"jid": self.decision.job.jid, **self.decision.to_json(), **(more if self.target else {})}

    def to_text(self) -> Iterator[str]:
        """Line by line, for people."""
        decision, asked = self.decision, self.decision.asked
        yield f"{asked.jid} of {asked.auid}, {asked.image}"
        yield "" if decision.steps else "\nNo rule: site.yaml has none under `policy`."
        for step in decision.steps:
            yield from _step(step, self.file)
        for rule in decision.unseen:
            yield f"{self.file}:{rule.line}: {rule.name}: not looked at, since the one above ends the rules"
        yield from _outcome(decision)
        for name in self.unexpressed:
            yield f"{name} has no effect: the templates of {self.target} do not print it"
        if self.problem:
            yield f"\n{self.problem}"
        if self.lines:
            yield "\nEach line with the template, block and rules that it comes from:"
            places = [_place(line) for line in self.lines]
            width = min(max(map(len, places)), 60)
            yield from (f"{place:<{width}} | {line.text}" for place, line in zip(places, self.lines, strict=True))


def explain(renderer: Renderer, request: JobRequest, target: str | None) -> Explanation:
    decision, file = renderer.decide(request), renderer.rules.file
    if target is None or decision.refused is not None:
        return Explanation(decision, file, target)
    lost: tuple[str, ...] = ()
    try:
        missing = {name for _, name in unexpressed(renderer, target)}
        lost = tuple(sorted(missing.intersection(decision.outcome())))
        lines = tuple(_lines(renderer, decision, renderer.targets[target].template))
    except PmanError as error:
        return Explanation(decision, file, target, (), lost, str(error))
    return Explanation(decision, file, target, lines, lost)


def unexpressed(renderer: Renderer, target: str) -> list[tuple[Rule, str]]:
    """What rules set and the templates of a target print nowhere: the rule, and the name of what it sets."""
    if not renderer.rules.rules:
        return []
    names = by_rules(*printed(renderer, renderer.targets[target].template).values())
    return [(rule, name) for rule in renderer.rules.rules for name in rule.changes if name not in names]


def by_rules(*found: _Names) -> set[str]:
    """The names by which rules set what `printed` has found."""
    halves = [name.split(".") for names in found for name in names]
    names = (name if owner == "policy" else _OF_JOB.get(name, "") for owner, name in halves)
    return {name for name in names if name}


def _lines(renderer: Renderer, decision: Decision, template: str) -> Iterator[Line]:
    walk = _Walk(renderer)
    sources = walk.run(template)

    def placed(part: Piece) -> tuple[str, int]:
        below = part.file, part.line + part.offset
        return below if below in sources else (part.file, part.line)

    changes = [(step.rule.name, change) for step in decision.steps for change in step.changes]
    for parts in renderer.lines(decision.accepted(), template):
        text, causes = "".join(part.text for part in parts).rstrip("\n"), dict[str, None]()
        for place in map(placed, parts):
            names = by_rules(sources.get(place, _NONE))
            causes |= dict.fromkeys(_causes(text, names, changes, place not in walk.supers))
        own = renderer.origin(parts)
        file, line = placed(own)
        yield Line(text, file.replace(f"{shipped_templates()}/", "shipped/", 1), line, own.block, tuple(causes))


def _causes(text: str, names: set[str], changes: list[tuple[str, Change]], exact: bool) -> list[str]:
    """The rules behind a line: those that set a value which it shows, else all that set what it depends on.

    exact: whether the names are this line's own, not those of all that super() brings in.
    """
    own = [(rule, change) for rule, change in changes if change.name in names]
    words = {id(change): "|".join(map(re.escape, _new_words(change))) for _, change in own}
    shown = [id(change) for _, change in own if re.search(rf"(?<!\w)({words[id(change)] or '$^'})(?![0-9])", text)]
    # The environment holds the request's variables, too; other names are rules' alone.
    settled = {"environment", *(change.name for _, change in own if id(change) in shown)}
    return [rule for rule, change in own if id(change) in shown or (exact and change.name not in settled)]


def _new_words(change: Change) -> list[str]:
    """The texts by which a line shows what a rule added or set."""
    before, after = change.before, change.after
    if isinstance(after, Mapping):
        return [str(name) for name, value in after.items() if (before or {}).get(name) != value]
    if isinstance(after, list):
        added = [item for item in after if item not in (before or [])]
        return [
            str(item.get("source") or item.get("key")) if isinstance(item, Mapping) else str(item) for item in added
        ]
    return [] if after is None or isinstance(after, bool) else [str(after)]


# -- for people ----------------------------------------------------------------------------------------------------


def _step(step: Step, file: str) -> Iterator[str]:
    yield f"{file}:{step.rule.line}: {step.rule.name}: {'yes' if step.matched else 'no'}"
    for each in step.compared:  # such as `gpus 0 is not >= 1`
        part, verb = "unless: " if each.part == "unless" else "", "is" if each.holds else "is not"
        yield f"    {part}{each.field} {_value(each.found)} {verb} {_value(each.wanted)}"
    for change in step.changes:
        yield f"    {change.name}: {_value(change.before)} -> {_value(change.after)}"


def _outcome(decision: Decision) -> Iterator[str]:
    if decision.refused is not None:
        yield f"\nRefused: {decision.refused}"
        return
    yield "\nOutcome:" if decision.outcome() else "\nNothing is changed."
    for name, (before, after) in decision.outcome().items():
        yield f"    {name}: {_value(after)} ({_value(before)} without rules)"


def _value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _place(line: Line) -> str:
    rules = f" [{', '.join(line.rules)}]" if line.rules else ""
    return f"{line.file}:{line.line}{line.block and f' {line.block}'}{rules}"


# -- what templates print ------------------------------------------------------------------------------------------


def printed(renderer: Renderer, template: str) -> dict[tuple[str, int], _Names]:
    """File and line of a template -> `job.NAME` and `policy.NAME` of all that the text of this line depends on.

    Raises TemplateError for a template that cannot be read.
    """
    try:
        return _Walk(renderer).run(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateError(renderer.explain(error, template)) from error


def attribute_of(node: nodes.Node) -> str | None:
    """The name that `a.name` or `a["name"]` asks for."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    constant = node.arg if isinstance(node, nodes.Getitem) else None
    return constant.value if isinstance(constant, nodes.Const) and isinstance(constant.value, str) else None


def is_super(call: nodes.Call) -> bool:
    return call.node == nodes.Name("super", "load")


def constants(node: nodes.Node | None) -> list[str]:
    """The text of a constant, or of a list of them."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return [text for item in node.items for text in constants(item)]
    values = node.value if isinstance(node, nodes.Const) else ()
    return [values] if isinstance(values, str) else [*values] if isinstance(values, tuple | list) else []


_Scope = dict[str, _Names]


class _Walk:
    """Goes through the templates of one target as rendering does, without values."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.lines: dict[tuple[str, int], _Names] = {}
        self.supers: set[tuple[str, int]] = set()  # where super() brings in what a parent prints
        self.blocks: dict[str, list[tuple[nodes.Block, str]]] = {}  # from the child to its last parent
        self.kept: _Scope = {}  # by namespaces, which outlive loops and blocks

    def run(self, name: str) -> dict[tuple[str, int], _Names]:
        scope: _Scope = {}
        tree, path = self._parsed(name)
        seen = {name}
        while True:
            for block in tree.find_all(nodes.Block):
                self.blocks.setdefault(block.name, []).append((block, path))
            parents = [node for node in tree.body if isinstance(node, nodes.Extends)]
            if not parents or not isinstance(parents[0].template, nodes.Const) or parents[0].template.value in seen:
                break
            seen.add(parents[0].template.value)
            self._walk([node for node in tree.body if isinstance(node, nodes.Assign | nodes.If)], scope, _NONE, "")
            tree, path = self._parsed(parents[0].template.value)
        self._walk(tree.body, scope, _NONE, path)
        return self.lines

    def _parsed(self, name: str) -> tuple[nodes.Template, str]:
        environment = self.renderer.environment(name)
        source, path, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
        return environment.parse(source, name, path), str(path)

    def _walk(self, body: Iterable[nodes.Node], scope: _Scope, because: _Names, path: str) -> None:
        for node in body:
            if isinstance(node, nodes.Output):
                for child in node.nodes:
                    self._print(child, scope, because, path)
            elif isinstance(node, nodes.If):
                because_if = because | self._names(node.test, scope)
                for branch in self._branches(node):
                    self._walk(branch, scope, because_if, path)
            elif isinstance(node, nodes.For):
                names = self._names(node.iter, scope)
                inner = {**scope, **dict.fromkeys(_targets(node.target), names)}
                self._walk([*node.body, *node.else_], inner, because | names, path)
            elif isinstance(node, nodes.Assign):
                self._assign(node.target, self._names(node.node, scope) | because, scope, bool(because))
            elif isinstance(node, nodes.Block):
                self._block(node.name, 0, scope, because)
            elif isinstance(node, nodes.Include):
                for name in constants(node.template):
                    with suppress(jinja2.TemplateNotFound):  # told where it is rendered
                        tree, file = self._parsed(name)
                        self._walk(tree.body, dict(scope), because, file)
            elif not isinstance(node, nodes.Expr | nodes.Extends):
                self._walk(node.iter_child_nodes(), scope, because, path)

    def _assign(self, target: nodes.Node, names: _Names, scope: _Scope, perhaps: bool) -> None:
        if isinstance(target, nodes.NSRef):
            self.kept[target.name] = names | self.kept.get(target.name, _NONE)
        for name in _targets(target):
            scope[name] = names | scope.get(name, _NONE) if perhaps else names

    def _branches(self, node: nodes.If) -> tuple[Iterable[nodes.Node], ...]:
        """The branches that may be rendered: where a setting alone decides, such as IGNORE_LIMITS, only those."""
        negated = isinstance(node.test, nodes.Not)
        asked: Any = node.test.node if negated else node.test  # type: ignore[attr-defined]
        name = attribute_of(asked)
        if name is None or asked.node != nodes.Name("settings", "load") or not hasattr(self.renderer.settings, name):
            return node.body, node.elif_, node.else_
        holds = bool(getattr(self.renderer.settings, name)) != negated
        return (node.body,) if holds else (node.elif_, node.else_)

    def _block(self, name: str, depth: int, scope: _Scope, because: _Names) -> _Names:
        """A block as it is overridden; what the lines of it print."""
        if depth >= len(self.blocks.get(name, [])):
            return _NONE
        block, path = self.blocks[name][depth]
        before, self.lines = self.lines, {}
        for step in filter(is_super, block.find_all(nodes.Call)):
            self.supers.add((path, step.lineno))
            self._add((path, step.lineno), self._block(name, depth + 1, dict(scope), because))
        self._walk(block.body, dict(scope), because, path)
        found = frozenset(name for names in self.lines.values() for name in names)
        own, self.lines = self.lines, before
        for place, names in own.items():
            self._add(place, names)
        return found

    def _print(self, node: nodes.Node, scope: _Scope, because: _Names, path: str) -> None:
        below = node.data.count("\n") if isinstance(node, nodes.TemplateData) else 0
        for line in range(node.lineno, node.lineno + below + 1):
            self._add((path, line), because | self._names(node, scope))

    def _add(self, place: tuple[str, int], names: _Names) -> None:
        self.lines[place] = self.lines.get(place, _NONE) | names

    def _names(self, node: nodes.Node, scope: _Scope) -> _Names:
        if (name := attribute_of(node)) is not None and isinstance(node.node, nodes.Name):  # type: ignore[attr-defined]
            owner = node.node.name  # type: ignore[attr-defined]
            if owner in ("job", "policy"):
                return frozenset({f"{owner}.{name}"})
        if isinstance(node, nodes.Name):
            return scope.get(node.name, _NONE) | self.kept.get(node.name, _NONE)
        if isinstance(node, nodes.CondExpr) and isinstance(node.test, nodes.Test) and node.test.name == "defined":
            asked = node.test.node
            if isinstance(asked, nodes.Name):
                chosen = node.expr1 if asked.name in scope else node.expr2
                return self._names(chosen, scope) if chosen else _NONE
        return frozenset().union(*(self._names(child, scope) for child in node.iter_child_nodes()))


def _targets(node: nodes.Node) -> list[str]:
    return [name.name for name in (node, *node.find_all(nodes.Name)) if isinstance(name, nodes.Name)]
