"""Values in a site's templates that stand where their own quotes mean nothing."""

import re
from collections.abc import Iterator
from typing import Literal, get_origin

from jinja2 import nodes

from pman.checking.overlay import Finding, Overlay, Template, at, branches, macros, written
from pman.targets import TARGETS
from pman.targets.record import Directives
from pman.templating.explain import constants
from pman.templating.render import language

_NUMBER_FILTERS = ("abs", "count", "float", "int", "length", "round", "sum")
_COUNTERS = ("index", "index0", "revindex", "revindex0", "length", "depth", "depth0")


def findings(overlay: Overlay, template: Template) -> Iterator[Finding]:
    """Values where their own quotes mean nothing: between the author's, in a comment, in another language's text."""
    in_shell = {id(node) for scope in _shell_text(template) for _, node in _printed(scope, [""])}
    directives = [target.directives for target in TARGETS.values() if target.directives]
    outer = next(filter(_shell_blocks, map(_language, overlay.readers(template.name))), "")
    scopes = template.tree.body if template.parent else [template.tree]
    for before, node in (pair for scope in scopes for pair in _printed(scope, [""])):
        if _is_bare(overlay, node):
            continue
        line = before.rpartition("\n")[2]
        directive = next((d for d in directives if line.lstrip().startswith(d.prefix)), None)
        opened = _inside(line.replace(directive.prefix, "") if directive else line)
        wrong = ""
        if opened in ("'", '"'):
            message = "quotes stand around {{ }}, which writes its own: leave them out"
            yield at(template, "quoted-twice", message, node.lineno)
        elif _is_text(template, node):
            continue
        elif _language(template) == "yaml" and opened != "#":
            wrong = _misplaced_in_yaml(before)
        elif id(node) in in_shell:
            wrong = _misplaced_in_shell(before, opened, node, directive, outer)
        if wrong:
            message = wrong.replace("VALUE", f"{{{{ {written(node)} }}}}")
            yield at(template, "wrong-quoting", message, node.lineno)
    if _shell_blocks(_language(template)):
        yield from _shell_words_elsewhere(template, in_shell)


def _language(template: Template) -> str:
    return language(template.name)


def _shell_blocks(name: str) -> list[str]:
    """Blocks that are text of the shell in templates of another language."""
    return [block for target in TARGETS.values() if target.language == name for block in target.shell_blocks]


def _shell_words_elsewhere(template: Template, in_shell: set[int]) -> Iterator[Finding]:
    for block in template.tree.find_all(nodes.Block):
        for _, node in _printed(block, [""]):
            if id(node) not in in_shell and _is_filtered(node, "sh"):
                message = (
                    f"a {_language(template).upper()} string is needed here, which |sh does not write: leave it out"
                )
                yield at(template, "wrong-quoting", message, node.lineno, "sh")


def _shell_text(template: Template) -> list[nodes.Node]:
    if _language(template) == "sh":
        return [template.tree]
    names = _shell_blocks(_language(template))
    blocks = [block for block in template.tree.find_all(nodes.Block) if block.name in names]
    called = {node.node.name for b in blocks for node in b.find_all(nodes.Call) if isinstance(node.node, nodes.Name)}
    return [*blocks, *(macro for macro in template.tree.find_all(nodes.Macro) if macro.name in called)]


def _printed(node: nodes.Node, text: list[str]) -> Iterator[tuple[str, nodes.Node]]:
    """Every expression that is printed below `node`, with all text that stands before it; text[0]: the text so far."""
    ways = branches(node) if isinstance(node, nodes.If) else [list(node.iter_child_nodes())]
    start = text[0]
    for branch in filter(None, ways):  # each of them begins where the others do
        text[0] = start
        for child in branch:
            if isinstance(child, nodes.TemplateData):
                text[0] += child.data
            elif isinstance(node, nodes.Output):
                yield text[0], child
                text[0] += "x"
            else:
                yield from _printed(child, text)


def _misplaced_in_shell(before: str, opened: str, node: nodes.Node, directive: Directives | None, outer: str) -> str:
    """Why VALUE is no word of its own after this text of the shell; "" where it is.

    outer: another language, of which the text is a part.
    """
    line = before.rpartition("\n")[2]
    if opened == "`" or line.endswith(("$", "\\")):
        return "VALUE loses its quotes to what stands before it: a backquote (write $( ) instead), $ or \\"
    if _in_heredoc(before):
        return "VALUE stands in a heredoc, where quotes are text: printf '%s\\n' VALUE writes it"
    if directive and not _is_filtered(node, directive.quoting):
        return f"VALUE is read by {directive.reader} here: write |{directive.quoting}"
    if opened == "#":
        return "VALUE stands in a comment: a line break in it begins a line of its own"
    if outer and not _is_filtered(node, "sh"):
        return f"VALUE is a {outer.upper()} string here, in the shell's text: write |sh"
    return ""


def _misplaced_in_yaml(before: str) -> str:
    """Why VALUE is no key or value of its own after this text of YAML; "" where it is."""
    if _in_block_scalar(before):
        return "VALUE stands in text below | or >, where quotes are text: pass it as a variable (env)"
    in_flow = sum(map(before.count, "[{")) > sum(map(before.count, "]}"))
    begins = r"(?:(?:^|\n)|[\[{]|: |(?:^|\s)[-?] |(?:^|\s)[!&]\S* ) *$"
    if re.search(begins, before) or (in_flow and before.rstrip().endswith(",")):
        return ""
    return 'VALUE goes on with what stands before it, so its quotes are text: join it all, {{ "..." ~ value }}'


def _in_block_scalar(text: str) -> bool:
    """Whether a line above, of which the last line of this text of YAML is a part, ends in | or >."""
    *above, last = text.split("\n")
    depth = len(last) - len(last.lstrip())
    for line in filter(str.strip, reversed(above)):
        indent = len(line) - len(line.lstrip())
        if indent < depth and re.search(r"[\s:-][|>][-+\d]*(?:\s+#.*)?\s*$", line):
            return True
        depth = min(depth, indent)
    return False


def _in_heredoc(text: str) -> bool:
    """Whether a heredoc of the shell is open at the end of the text."""
    end = ""
    for line in text.split("\n")[:-1]:
        if end:
            end = "" if line.strip() == end else end
        elif found := re.search(r"(?<!<)<<-?\s*['\"\\]?([A-Za-z_]\w*)", line):
            end = "" if "((" in line else found[1]
    return bool(end)


def _inside(text: str) -> str:
    """What is open at the end of a line of shell text: a quote, a backquote, a comment (#), or nothing."""
    opened = [""]
    pieces: list[str] = re.findall(r"\\.|\$\(|(?<!\S)#|.", text)
    for piece in pieces:
        now = opened[-1]
        if now == "'":
            opened = opened[:-1] if piece.endswith("'") else opened
        elif piece == now or (piece == ")" and now == "$("):
            opened = opened[:-1]
        elif piece in ('"', "$(", "`") or (piece in ("'", "#") and now != '"'):
            opened.append(piece)
            if piece == "#":
                return piece
    return opened[-1].strip("$(")


def _is_filtered(node: nodes.Node, name: str) -> bool:
    """Whether the filter `name` writes all of an expression."""
    if isinstance(node, nodes.CondExpr):
        return _is_filtered(node.expr1, name) and (node.expr2 is None or _is_filtered(node.expr2, name))
    if isinstance(node, nodes.Filter) and node.name == "join":
        inner = node.node
        return isinstance(inner, nodes.Filter) and inner.name == "map" and constants(inner.args[0]) == [name]
    return isinstance(node, nodes.Filter) and node.name in (name, "safe")


def _is_text(template: Template, node: nodes.Node) -> bool:
    """Whether a call brings text that is quoted where it is written: a macro's, a block's; or none, as refuse()."""
    callee = node.node if isinstance(node, nodes.Call) else None
    if isinstance(callee, nodes.Getattr):
        callee = callee.node
    return isinstance(callee, nodes.Name) and callee.name in {"super", "caller", "loop", "refuse", *macros(template)}


def _is_bare(overlay: Overlay, node: nodes.Node) -> bool:
    """Whether an expression is a number or one of a few plain words, which have no quotes in any language."""
    if isinstance(node, nodes.BinExpr):
        return _is_bare(overlay, node.left) and _is_bare(overlay, node.right)
    if isinstance(node, nodes.Const):
        return isinstance(node.value, int | float)
    if isinstance(node, nodes.Filter):
        return node.name in _NUMBER_FILTERS
    if isinstance(node, nodes.Getattr) and written(node.node) == "loop":
        return node.attr in _COUNTERS
    kind = overlay.type_of(node)
    plain = kind in (int, int | None) or isinstance(kind, int | float) or get_origin(kind) is Literal
    return plain or written(node) in ("time_limit_minutes", "container_runtime")
