"""site.yaml: the values of a site, read strictly."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pman.errors import TemplateError
from pman.templating import quote, rules


def read_site(overlay: Path | None) -> Mapping[str, Any]:
    """The values of the overlay's site.yaml, {} without one. Raises TemplateError with file and line."""
    path = overlay / "site.yaml" if overlay else None
    if path is None or not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_SiteLoader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}:1: this is no UTF-8: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TemplateError(f"{path}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TemplateError(f"{path}:1: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise TemplateError(f"{path}:1: site.yaml must be a mapping of names to values")
    return values or {}


def scalars(overlay: Path | None) -> Iterator[tuple[int, str]]:
    """Every text, number and name in the overlay's site.yaml, which `read_site` has read before, with its line."""
    path = overlay / "site.yaml" if overlay else None
    waiting = [yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)] if path and path.is_file() else []
    seen = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.ScalarNode):
            yield node.start_mark.line + 1, node.value
        elif node and id(node) not in seen:
            seen.add(id(node))
            waiting += [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]


def read_rules(overlay: Path | None, values: Mapping[str, Any], targets: Iterable[str]) -> rules.Rules:
    """The rules under `policy` in the values of the overlay's site.yaml. Raises TemplateError with file and line."""
    if overlay is None or "policy" not in values:
        return rules.Rules()
    path = overlay / "site.yaml"
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    try:
        return rules.read(values["policy"], lambda place: node_at(node, ("policy", *place))[1], str(path), targets)
    except rules.Wrong as error:
        raise TemplateError(f"{path}:{node_at(node, ('policy', *error.place))[1]}: {error}") from None


def node_at(node: Any, place: Iterable[str | int]) -> tuple[Any, int]:
    """The node at this place, or as far on the way as there are nodes, and the line, from 1, of its key or itself."""
    line = 1
    for step in place:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node, line = node.value[step], node.value[step].start_mark.line + 1
        elif found := next(((key, value) for key, value in pairs if key.value == step), None):
            node, line = found[1], found[0].start_mark.line + 1
        else:
            break
    return node, line


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem="a key must be one word or text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _SiteLoader(StrictLoader):
    """StrictLoader of text, numbers, booleans, null, lists and mappings; a date is text, other types are refused.

    So are numbers and booleans that would be printed in other words than they are written: YAML reads 12:30 as 750,
    1.10 as 1.1, 010 as 8 and `no` as false.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, bool | int | float):
            read = quote.yaml(value) if math.isfinite(value) else "no finite number"
            if read != node.value.lower():
                said = f"{node.value} would be {read}: write the value that you mean, in quotes if it is text"
                raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)
        return value

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        said = f"{node.tag.removeprefix('tag:yaml.org,2002:')} is no type that site.yaml may hold: quotes make it text"
        raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)


_TYPES = ("str", "int", "float", "bool", "null", "seq", "map")
_SiteLoader.yaml_constructors = {
    **{f"tag:yaml.org,2002:{name}": StrictLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"] for name in _TYPES},
    None: _SiteLoader.construct_undefined,
}
_SiteLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if not tag.endswith((":timestamp", ":value"))]
    for first, rows in StrictLoader.yaml_implicit_resolvers.items()
}
