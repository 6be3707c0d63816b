"""What can be seen to be wrong in a site's templates without rendering them.

Everything that a site can write without effect (a block that overrides nothing, text outside all blocks, a file that
nothing reads) is a finding: silence would mean that it works.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from jinja2 import meta, nodes

from pman.checking import quoting
from pman.checking.overlay import Finding, Overlay, Template, at, block_lines, branches, macros, written
from pman.errors import TemplateError
from pman.targets import TARGETS
from pman.templating import sandbox
from pman.templating.explain import attribute_of, constants, is_super, printed
from pman.templating.files import files
from pman.templating.render import language

_READ_BESIDE = ("site.yaml", "settings.env")
_BESIDE = re.compile(r"site\.yaml|settings\.env|requests/.*|(?:.*/)?(?:README|LICENSE|COPYING|CHANGELOG)[^/]*")

# What a scheduler must be told: the beginning of the names by which templates read it, and what messages call it.
_HANDED_ON = {
    "cpu_": "number of CPUs", "memory_": "memory limit", "gpu_": "number of GPUs", "workers": "number of workers",
    "time_limit": "time limit", "partition": "partition", "image": "image",
}  # fmt: skip


def findings(overlay: Overlay) -> list[Finding]:
    rules = (_references, _blocks, _lost, _names, _sets, _marked_safe, quoting.findings)
    templates = [template for name in overlay.site_names if (template := overlay.template(name))]
    found = [finding for template in templates for rule in rules for finding in rule(overlay, template)]
    return [*overlay.findings, *found, *(_unused(overlay, overlay.directory) if overlay.directory else ())]


def _unused(overlay: Overlay, directory: Path) -> Iterator[Finding]:
    entries = {name for target in TARGETS.values() for name in target.templates}
    read = {step for name in entries for step in overlay.reach(name)}
    shipped = {f"shipped/{name}" for name in overlay.shipped_names}
    for name in overlay.site_names:
        if name not in read or name in shipped:
            near = sandbox.hint(name, overlay.shipped_names)
            yield Finding("unused-file", f"nothing reads this template{near}", str(directory / name), 1)
    for path in sorted(files(directory)):
        if path.suffix != ".j2" and not _BESIDE.fullmatch(path.relative_to(directory).as_posix()):
            name = path.relative_to(directory).as_posix()
            near = f"; did you mean {name}.j2?" if f"{name}.j2" in overlay.shipped_names else ""
            near = near or sandbox.near(path.name, _READ_BESIDE)
            message = f"nothing reads this file: templates end in .j2{near}"
            yield Finding("unused-file", message, str(path), 1, level="error" if near else "warning")


def _references(overlay: Overlay, template: Template) -> Iterator[Finding]:
    known = {*overlay.site_names, *overlay.shipped_names, *(f"shipped/{name}" for name in overlay.shipped_names)}
    for node in template.tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
        names = constants(node.template)  # type: ignore[attr-defined]
        if names and not known.intersection(names) and not getattr(node, "ignore_missing", False):
            message = f"there is no template {names[0]}{sandbox.hint(names[0], known)}"
            yield at(template, "template", message, node.lineno)
        if isinstance(node, nodes.Extends) and template.name in names:
            yield at(template, "template", f"this extends itself: write shipped/{template.name}", node.lineno)
        for name in known.intersection(names):
            if language(name) not in overlay.renderer.filters[language(template.name)]:
                message = f"{name} is read into {template.name}, whose quoting it gets: give it the same ending"
                yield at(template, "wrong-language", message, node.lineno)


def _blocks(overlay: Overlay, template: Template) -> Iterator[Finding]:
    if template.parent is None and template.blocks and not any(_outside_blocks(template, template.tree.body)):
        yield at(template, "no-extends", f'this lacks its first line: {{% extends "shipped/{template.name}" %}}', 1)
    if template.parent is None or template.parent == template.name:
        return
    need_super = {f"shipped/{target.template}": target.need_super for target in TARGETS.values()}
    chain = overlay.chain(template.parent)
    parents, known = {parent.name for parent in chain}, {name for parent in chain for name in parent.blocks}
    lines = (block for parent in chain for block in block_lines(parent.source).items())
    of_lines = {name for name, (first, last) in lines if last > first}
    needed = {block for name in parents for block in need_super.get(name, ())}
    inner = {id(node) for block in template.tree.find_all(nodes.Block) for node in block.find_all(nodes.Block)}
    for block in template.tree.find_all(nodes.Block):
        if known and id(block) not in inner and block.name not in known:
            message = f"the block {block.name} overrides nothing in {template.parent}{sandbox.hint(block.name, known)}"
            yield at(template, "unknown-block", message, block.lineno, block.name)
        if block.name in of_lines and not _ends_line(block.body):
            message = f"the last line of the block {block.name} has no end: put endblock on a line of its own"
            yield at(template, "unended-line", message, block.lineno, block.name)
        if block.name in needed and not any(map(is_super, block.find_all(nodes.Call))):
            message = f"the shipped lines of the block {block.name} are gone: begin it with {{{{ super() }}}}"
            yield replace(at(template, "no-super", message, block.lineno, block.name), level="warning")
    yield from _outside_blocks(template, template.tree.body)


def _lost(overlay: Overlay, template: Template) -> Iterator[Finding]:
    """What the shipped template tells the scheduler of a request, and the site's own template does not."""
    chain, of_site = overlay.chain(f"shipped/{template.name}"), overlay.chain(template.name)
    is_whole = template.name in {target.template for target in TARGETS.values()}
    if not is_whole or not chain or of_site[-1].parent:
        return
    try:
        shipped, own = (printed(overlay.renderer, name) for name in (chain[0].name, template.name))
    except TemplateError:  # told where it is rendered
        return
    set_by_site = {
        f"job.{node.target.name}"
        for step in of_site if step not in chain
        for node in step.tree.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)
    }  # fmt: skip
    for name in sorted(_handed_on(*shipped.values()) - _handed_on(*own.values(), frozenset(set_by_site))):
        message = f"the {name} of a request has no effect: the shipped template hands it on, and nothing here does"
        places = {place for place, names in shipped.items() if name in _handed_on(names)}
        blocks = {
            block for step in chain for block, (first, last) in block_lines(step.source).items()
            if any((step.path, line) in places for line in range(first, last + 1))
        }  # fmt: skip
        replaced = [block for block in template.tree.find_all(nodes.Block) if block.name in blocks]
        line, word = (replaced[0].lineno, replaced[0].name) if replaced else (1, "")
        yield replace(at(template, "lost", message, line, word), level="warning")


def _handed_on(*found: frozenset[str]) -> set[str]:
    """Which of _HANDED_ON a text reads that depends on these names."""
    names = [name.removeprefix("job.") for each in found for name in each if name.startswith("job.")]
    return {said for name in names for prefix, said in _HANDED_ON.items() if name.startswith(prefix)}


def _ends_line(body: list[nodes.Node]) -> bool:
    """Whether the text that is printed last ends in a line break, as that of other blocks and macros does."""
    last = body[-1] if body else None
    if isinstance(last, nodes.If):
        return all(map(_ends_line, branches(last)))
    if isinstance(last, nodes.For):
        return _ends_line(last.body)
    end = last.nodes[-1] if isinstance(last, nodes.Output) else None
    return (
        end.data.endswith("\n") if isinstance(end, nodes.TemplateData) else end is None or isinstance(end, nodes.Call)
    )


def _outside_blocks(template: Template, body: Iterable[nodes.Node]) -> Iterator[Finding]:
    """What Jinja skips without a word at the top of a template that extends another: text, an `if` around blocks."""
    for node in body:
        if isinstance(node, nodes.If | nodes.For):
            for block in node.find_all(nodes.Block):
                message = f"the block {block.name} counts always: the condition or loop belongs inside it"
                yield at(template, "outside-blocks", message, block.lineno, block.name)
            yield from _outside_blocks(template, node.iter_child_nodes())
        if not isinstance(node, nodes.Output):
            continue
        text = [child.data for child in node.nodes if isinstance(child, nodes.TemplateData)]
        if any(piece.strip() for piece in text) or len(text) < len(node.nodes):
            first = next((piece for piece in text if piece.strip()), "")
            line = node.lineno + first[: len(first) - len(first.lstrip())].count("\n")
            yield at(template, "outside-blocks", "this stands outside all blocks, so it is never rendered", line)


# -- names ---------------------------------------------------------------------------------------------------------


def _names(overlay: Overlay, template: Template) -> Iterator[Finding]:
    unknown = meta.find_undeclared_variables(template.tree) - set(sandbox.VARIABLES) - _set_anywhere(overlay)
    unknown -= set(overlay.renderer.environment(template.name).globals)
    for node in template.tree.find_all(nodes.Name):
        if node.ctx == "load" and node.name in unknown:
            message = f"{node.name!r} is undefined{sandbox.hint(node.name, sandbox.VARIABLES)}"
            yield at(template, "undefined", message, node.lineno, node.name)
    excused = {id(node) for node in _asked_whether_defined(template.tree)}
    optional = _optional_names(template.tree)
    for step in template.tree.find_all((nodes.Getattr, nodes.Getitem)):
        name = attribute_of(step)
        known = overlay.members(step.node) if name is not None else None  # type: ignore[attr-defined]
        if name is not None and known is not None and name not in {*known, *optional} and id(step) not in excused:
            message = f"{written(step.node)} has no {name!r}{sandbox.hint(name, known)}"  # type: ignore[attr-defined]
            yield at(template, "undefined", message, step.lineno, name)
    for compare in template.tree.find_all(nodes.Compare):
        for operand in compare.ops:
            if operand.op in ("in", "notin") and isinstance(overlay.type_of(operand.expr), str):
                message = f"{written(operand.expr)} is text, any part of which is in it: make it a list in site.yaml"
                yield at(template, "text-for-list", message, compare.lineno)


def _set_anywhere(overlay: Overlay) -> set[str]:
    """Names that any template sets: blocks see those of their template, an included one those of its reader."""
    found: set[str] = set()
    for template in overlay.all_templates():
        loops = (loop.target for loop in template.tree.find_all(nodes.For) if any(loop.find_all(nodes.Include)))
        sets = (node.target for node in template.tree.find_all((nodes.Assign, nodes.AssignBlock)))  # type: ignore[attr-defined]
        for target in (*loops, *sets):
            found |= {name.name for name in (target, *target.find_all(nodes.Name)) if isinstance(name, nodes.Name)}
        found |= macros(template)
    return found


def _sets(overlay: Overlay, template: Template) -> Iterator[Finding]:
    """Variables that are set without effect: none that can see them reads them."""
    read = {name for other in overlay.readers(template.name) for name in _read(other.tree)}
    for name, line in _assigned(template.tree.body) if template.parent else ():
        if name not in read and name != "_":
            message = f"nothing reads {name} here{sandbox.hint(name, read.intersection(sandbox.POLICY))}"
            yield at(template, "unused-set", message, line, name)
    for scope in template.tree.find_all((nodes.For, nodes.Block)):
        for name, line in _assigned(scope.body) if not any(scope.find_all(nodes.Include)) else ():  # type: ignore[attr-defined]
            if name not in _read(scope):
                way = "a namespace() keeps it" if isinstance(scope, nodes.For) else "set it before the blocks"
                message = f"{name} is forgotten at the end of this {type(scope).__name__.lower()}: {way}"
                yield at(template, "unused-set", message, line, name)


def _assigned(body: list[nodes.Node]) -> Iterator[tuple[str, int]]:
    """Name and line of the assignments in a scope, also of those below an `if`."""
    for node in body:
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            yield node.target.name, node.lineno
        elif isinstance(node, nodes.If):
            yield from _assigned([*node.body, *node.elif_, *node.else_])


def _read(tree: nodes.Node) -> set[str]:
    return {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}


def _marked_safe(_overlay: Overlay, template: Template) -> Iterator[Finding]:
    for mark in template.tree.find_all(nodes.Filter):
        if mark.name == "safe" or (mark.name == "map" and mark.args and constants(mark.args[0]) == ["safe"]):
            message = "|safe puts a value in unquoted: whoever sends it can write commands here"
            yield at(template, "marked-safe", message, mark.lineno, "safe")
    for scope in template.tree.find_all(nodes.ScopedEvalContextModifier):
        yield at(template, "marked-safe", "quoting cannot be turned off", scope.lineno, "autoescape")


# -- nodes ---------------------------------------------------------------------------------------------------------


def _asked_whether_defined(tree: nodes.Template) -> Iterator[nodes.Node]:
    tests = (node.node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined"))
    filters = (node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d") and node.node)
    for node in (*tests, *filters):
        yield node
        yield from node.find_all((nodes.Getattr, nodes.Getitem))


def _optional_names(tree: nodes.Template) -> set[str]:
    """Names that the template asks for with `x.get("name")` or `"name" in x`."""
    calls = [call for call in tree.find_all(nodes.Call) if attribute_of(call.node) == "get" and call.args]
    compares = [compare.expr for compare in tree.find_all(nodes.Compare) if compare.ops[0].op in ("in", "notin")]
    return {name for node in (*(call.args[0] for call in calls), *compares) for name in constants(node)}
