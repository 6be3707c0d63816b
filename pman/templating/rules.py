"""The rules of a site, the key `policy` of site.yaml, read strictly; decide.py applies them.

A rule has conditions (`when`, `unless`) and an outcome (`set` or `refuse`). `_When` and `_Set` say what may
stand there. Their descriptions stand in the schema, and complete "must be ..." in the sentence that rejects a value.
"""

import fnmatch
import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from pman.job import image_reference
from pman.settings import OWN_LABELS, SET_BY_KUBERNETES, must
from pman.templating import sandbox

_COMPARISON = r"^(>=|<=|>|<) *[0-9]+$|^[0-9]+ to [0-9]+$"
_NEVER = float("inf")
_NOT_GIVEN: Any = None
_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
plain = functools.partial(to_jsonable_python, exclude_none=True)  # a value as JSON has it
NUMBERS = ("workers", "cpu_millicores", "memory_mib", "gpus", "time_limit_minutes")
_NUMBER = 'a number, a comparison such as ">= 64000" or "1000 to 4000", or a list of these'
_PATTERNS = "a name or pattern such as pl-*, {group: NAME}, or a list of these"
_TEXT = "one line of text, or {table: NAME, by: user}"
_LIMIT = "a whole number {}, or {{at_least: N, at_most: N}}, or {{table: NAME, by: user}}"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)  # a site without rules never needs them


class _Group(_Model):
    group: str


class _Lookup(_Model):
    table: str
    by: Literal["user", "image", "kind", "partition"] = "user"
    default: str | int | None = None


class Limits(_Model):
    """Null is refused: it is what YAML makes of `at_most:` without a number, and such a cap would hold nothing back."""

    at_least: int = _NOT_GIVEN
    at_most: int = _NOT_GIVEN
    default: int = _NOT_GIVEN


class Registry(_Model):
    registry: str = Field(pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*$")


class Default(_Model):
    default: str


class Bind(_Model):
    source: Annotated[str, Field(pattern=r"^/[^\x00-\x1f]*$")]
    target: Annotated[str, Field(pattern=r"^/[^\x00-\x1f]*$")]
    read_only: bool = True


class _Toleration(_Model):
    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815 - as Kubernetes writes it


def _not_empty(comparison: str) -> str:
    low, to, high = comparison.partition(" to ")
    if to and int(low) > int(high):
        raise ValueError("no number is between these")
    return comparison


_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
_Value = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Pattern = _Line | _Group
_Patterns = _Pattern | Annotated[list[_Pattern], Field(min_length=1)]
_Number = int | Annotated[str, Field(pattern=_COMPARISON), AfterValidator(_not_empty)]
_Numbers = _Number | Annotated[list[_Number], Field(min_length=1)]
_Partition = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,@+-]{0,199}$")]
_Text = _Line | _Lookup | None
_Image = Annotated[str, AfterValidator(image_reference)]
_Map = dict[_Line, _Value]
_OWN = (OWN_LABELS, "app.kubernetes.io/")
_Names = Annotated[
    _Map, must(lambda labels: not any(name.startswith(_OWN) for name in labels), "pman finds its jobs by these")
]
_Labels = Annotated[
    _Names, must(lambda labels: not any(map(SET_BY_KUBERNETES.fullmatch, labels)), "Kubernetes sets these")
]
_Name = Annotated[str, must(re.compile("[A-Za-z_][A-Za-z0-9_]*").fullmatch, "no name of a variable")]
_Kind = Literal["ds", "fs", "ts"]
_Kinds = _Kind | Annotated[list[_Kind], Field(min_length=1)]


class _When(_Model):
    """All that are given must hold. A later rule sees what the rules above it have set."""

    user: _Patterns = Field("", description=_PATTERNS)
    image: _Patterns = Field("", description=_PATTERNS)
    jid: _Patterns = Field("", description=_PATTERNS)
    partition: _Patterns | None = Field(None, description=f"{_PATTERNS}, or null where none is asked for")
    kind: _Kinds = Field("ds", description="one of ds, fs, ts, or a list of these")
    workers: _Numbers = Field(0, description=_NUMBER)
    cpu_millicores: _Numbers = Field(0, description=_NUMBER)
    memory_mib: _Numbers = Field(0, description=_NUMBER)
    gpus: _Numbers = Field(0, description=_NUMBER)
    time_limit_minutes: _Numbers | None = Field(None, description=f"{_NUMBER}, or null where there is no limit")


class _Set(_Model):
    """What a rule changes. Mappings and lists are added to; null takes away what rules above have set."""

    image: _Image | Registry | _Lookup = Field(
        "", description="an image reference, {registry: HOST}, or {table: NAME, by: user}"
    )
    partition: _Partition | Default | _Lookup | None = Field(
        None, description="the name of a partition, {default: NAME}, or {table: NAME, by: user}"
    )
    time_limit_minutes: Annotated[int, Field(ge=1, le=525_600)] | Limits | _Lookup = Field(
        0, description=_LIMIT.format("from 1 to 525600")
    )
    cpu_millicores: Annotated[int, Field(ge=1, le=10_000_000)] | Limits | _Lookup = Field(
        0, description=_LIMIT.format("from 1 to 10000000")
    )
    memory_mib: Annotated[int, Field(ge=1, le=100_000_000)] | Limits | _Lookup = Field(
        0, description=_LIMIT.format("from 1 to 100000000")
    )
    gpus: Annotated[int, Field(ge=0, le=1024)] | Limits | _Lookup = Field(
        0, description=_LIMIT.format("from 0 to 1024")
    )
    account: _Text = Field(None, description=_TEXT)
    qos: _Text = Field(None, description=_TEXT)
    constraint: _Text = Field(None, description=_TEXT)
    reservation: _Text = Field(None, description=_TEXT)
    licenses: _Text = Field(None, description=_TEXT)
    gpu_type: _Text = Field(None, description=_TEXT)
    priority_class: _Text = Field(None, description=_TEXT)
    runtime_class: _Text = Field(None, description=_TEXT)
    service_account: _Text = Field(None, description=_TEXT)
    nice: Annotated[int, Field(ge=0, le=2_147_483_645)] | None = Field(None, description="a whole number, 0 or more")
    exclusive: bool | None = Field(None, description="true or false")
    requeue: bool | None = Field(None, description="true or false")
    modules: list[_Line] | None = Field(None, description="a list of names")
    placement: list[_Line] | None = Field(None, description='a list of constraints such as "node.role == worker"')
    networks: list[_Line] | None = Field(None, description="a list of names")
    binds: list[Bind] | None = Field(None, description="a list of {source: /PATH, target: /PATH, read_only: true}")
    tolerations: list[_Toleration] | None = Field(None, description="a list of Kubernetes' tolerations")
    environment: dict[_Name, _Value] | None = Field(None, description="a mapping of variables to text")
    node_selector: _Map | None = Field(None, description="a mapping of labels to text")
    annotations: _Names | None = Field(None, description="a mapping of names to text, none of them pman's own")
    labels: _Labels | None = Field(None, description="a mapping of names to text, none set by pman or Kubernetes")


class _Rule(_Model):
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["set"]}, {"required": ["refuse"]}]})

    name: _Line = Field(description="one line of text that says what the rule is for")
    when: _When = Field(default_factory=_When, description="a mapping of conditions, all of which must hold")
    unless: _When | None = Field(None, description="a mapping of conditions; where all of them hold, the rule does not")
    set: _Set | None = Field(None, description="a mapping of what changes")
    refuse: _Line | None = Field(None, description="the sentence that the user reads")
    last: bool = Field(False, description="true, where no rule below counts for a job that this one matches")


class _Site(_Model):
    """Rules about jobs, from top to bottom, and what they name."""

    groups: dict[str, list[_Line]] = Field({}, description="names of groups, each a list of users or images")
    tables: dict[str, dict[str, _Line | int]] = Field(
        {}, description="names of tables, each a mapping of names or patterns to values"
    )
    targets: list[str] = Field([], description="a list of the targets that the check renders")
    rules: list[_Rule] = Field(description="a list of rules")


class Wrong(ValueError):
    """What is wrong with the rules, and where: the keys and indices that lead there."""

    def __init__(self, place: Sequence[str | int], message: str) -> None:
        super().__init__(message)
        self.place = place


# -- reading -------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table that a value is looked up in. rows: whether a name fits, and the value; the first that fits counts."""

    by: str
    rows: Sequence[tuple[Callable[[Any], bool], Any]]
    default: Any


class Condition(NamedTuple):
    """A condition. wanted: as the site wrote it. examples: values that meet it, or just do not."""

    field: str
    wanted: Any
    holds: Callable[[Any], bool]
    examples: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, ready to be applied. changes: what is set, by name. line, lines: in site.yaml, from 1; of each change."""

    name: str
    line: int
    lines: Mapping[str, int]
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...]
    changes: Mapping[str, Any]
    refuse: str | None
    last: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """A site's rules. targets: those that the site speaks of, () where it does not say. file: its site.yaml."""

    rules: tuple[Rule, ...] = ()
    targets: tuple[str, ...] = ()
    file: str = ""


def read(data: Any, line_of: Callable[[Sequence[str | int]], int], file: str, targets: Iterable[str]) -> Rules:
    """The rules in the value of `policy`. line_of: the line of a place in it. targets: all there are. Raises Wrong."""
    try:
        site = _Site.model_validate(data)
    except ValidationError as error:
        raise _wrong(error, data) from None
    for name in site.targets:
        if name not in targets:
            raise Wrong(("targets",), f"policy.targets: there is no target {name!r}{sandbox.hint(name, targets)}")
    rules: list[Rule] = []
    for number, rule in enumerate(site.rules):
        place = ("rules", number)
        if rule.name in {earlier.name for earlier in rules}:
            raise Wrong((*place, "name"), f"two rules are called {rule.name!r}: each needs a name of its own")
        if (rule.set is None) == (rule.refuse is None):
            raise Wrong(place, f"the rule {rule.name!r} needs one of `set` and `refuse`")
        when = tuple(_tests(rule.when, site.groups, (*place, "when")))
        unless = tuple(_tests(rule.unless, site.groups, (*place, "unless"))) if rule.unless else ()
        changes = _changes(rule.set, site, place) if rule.set else {}
        lines = {name: line_of((*place, "set", name)) for name in changes}
        rules.append(Rule(rule.name, line_of(place), lines, when, unless, changes, rule.refuse, rule.last))
    return Rules(tuple(rules), tuple(site.targets), file)


def _wrong(error: ValidationError, data: Any) -> Wrong:
    """The first error in plain words. Of a union, pydantic's place goes on with names of its members."""
    item = error.errors(include_url=False)[0]
    place: list[str | int] = []
    for step in item["loc"]:
        if not (step in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(step, int)):
            break
        data = data[step]
        place.append(step)
    missing = [str(step) for step in item["loc"][len(place) :]]
    if item["type"] == "missing" and len(missing) == 1 and (said := _describe(_model_at(place), missing[0])):
        return Wrong(place, f"{_said(place)} needs `{missing[0]}`: {said}")
    model = _model_at(place[:-1]) if place else None
    if item["type"] == "extra_forbidden" and model and not _describe(model, place[-1]):
        hint = sandbox.hint(str(place[-1]), model.model_fields)
        return Wrong(place, f"{_said(place[:-1])} has no {place[-1]!r}{hint}")
    while place and not _describe(_model_at(place[:-1]), place[-1]):
        place = place[:-1]
    said = _describe(_model_at(place[:-1]), place[-1]) if place else "a mapping that holds a list of `rules`"
    return Wrong(place, f"{_said(place)} must be {said}")


def _model_at(place: Sequence[str | int]) -> Any:
    """The model whose fields stand at this place; None below the values of `when` and `set`."""
    names = tuple(step for step in place if isinstance(step, str))
    if names[:1] == ("rules",):
        return {(): _Rule, ("when",): _When, ("unless",): _When, ("set",): _Set}.get(names[1:])
    return None if names else _Site


def _describe(model: Any, name: str | int) -> str:
    return str(model.model_fields[name].description) if model and name in model.model_fields else ""


def _said(place: Sequence[str | int]) -> str:
    """`policy.rules[2].when.gpus`, rules counted from 1 as people do."""
    return "policy" + "".join(f"[{step + 1}]" if isinstance(step, int) else f".{step}" for step in place)


def _tests(conditions: _When, groups: Mapping[str, list[str]], place: tuple[str | int, ...]) -> Iterator[Condition]:
    for name in _When.model_fields:
        if name in conditions.model_fields_set:
            wanted = getattr(conditions, name)
            given = wanted if isinstance(wanted, list) else [wanted]
            examples: tuple[Any, ...]
            if name in NUMBERS:
                holds, examples = _any_number(given)
            else:
                texts = list(_expanded(given, groups, (*place, name)))
                holds = _any_text(texts)
                # A text that fits each pattern.
                fit = functools.partial(re.sub, r"\[!?(.)[^\]]*\]|[*?]", lambda found: found[1] or "x")
                examples = tuple(text and fit(text) for text in texts)
            yield Condition(name, plain(wanted), holds, examples)


def _expanded(given: list[Any], groups: Mapping[str, list[str]], place: tuple[str | int, ...]) -> Iterator[str | None]:
    for entry in given:
        if isinstance(entry, _Group):
            if entry.group not in groups:
                raise Wrong(place, f"there is no group {entry.group!r}{sandbox.hint(entry.group, groups)}")
            yield from groups[entry.group]
        else:
            yield entry


def _any_text(patterns: list[str | None]) -> Callable[[Any], bool]:
    """Whether a text, or any of the names in a tuple, fits one of the patterns."""
    exact = {pattern for pattern in patterns if pattern is None or not re.search(r"[*?\[]", pattern)}
    globs = [fnmatch.translate(pattern) for pattern in patterns if pattern is not None and pattern not in exact]
    match = re.compile("|".join(globs)).match if globs else None

    def holds(value: Any) -> bool:
        for name in value if isinstance(value, tuple) else (value,):
            if name in exact or (match is not None and name is not None and match(name)):
                return True
        return False

    return holds


def _any_number(given: list[Any]) -> tuple[Callable[[Any], bool], tuple[int | None, ...]]:
    """Whether a number meets one of the comparisons; the numbers in them, and those on both sides of these."""
    ranges = [_comparison(entry) for entry in given]
    numbers = [int(number) for entry in given for number in re.findall("[0-9]+", str(entry))]
    examples: list[int | None] = [n + step for n in numbers for step in (0, -1, 1)]
    examples += [None] if None in given else []
    return (ranges[0] if len(ranges) == 1 else lambda value: any(holds(value) for holds in ranges)), tuple(examples)


def _comparison(wanted: int | str | None) -> Callable[[Any], bool]:
    """Without a limit, a time is longer than any number."""
    if not isinstance(wanted, str):
        return lambda value: bool(value == wanted)
    if " to " in wanted:
        low, high = (int(number) for number in wanted.split(" to "))
        return lambda value: value is not None and low <= value <= high
    sign = wanted[:2] if wanted[1] == "=" else wanted[0]
    compare, number = _OPERATORS[sign], int(wanted.removeprefix(sign))
    return lambda value: bool(compare(_NEVER if value is None else value, number))


def _changes(given: _Set, site: _Site, place: tuple[str | int, ...]) -> dict[str, Any]:
    """Name -> what is set. Numbers of limits and values of tables are judged as if they stood in the rule."""
    made: dict[str, Any] = {}
    for name in (name for name in _Set.model_fields if name in given.model_fields_set):
        made[name] = value = getattr(given, name)
        here = (*place, "set", name)
        if isinstance(value, Limits):
            _judge(name, [(here, number) for number in plain(value).values()])
            if value.at_least is not None and value.at_most is not None and value.at_least > value.at_most:
                raise Wrong(here, f"{_said(here)} is at_least {value.at_least} and at_most {value.at_most}")
        elif isinstance(value, _Lookup):
            made[name] = _table(name, value, site.tables, here)
    return made


def _table(name: str, lookup: _Lookup, tables: Mapping[str, Mapping[str, Any]], place: tuple[str | int, ...]) -> Table:
    if lookup.table not in tables:
        raise Wrong(place, f"there is no table {lookup.table!r}{sandbox.hint(lookup.table, tables)}")
    rows = tables[lookup.table]
    default = [(place, lookup.default)] if lookup.default is not None else []
    _judge(name, [*((("tables", lookup.table, key), value) for key, value in rows.items()), *default])
    return Table(lookup.by, [(_any_text([key]), value) for key, value in rows.items()], lookup.default)


def _judge(name: str, values: Sequence[tuple[tuple[str | int, ...], Any]]) -> None:
    for place, value in values:
        try:
            _Set.model_validate({name: value})
        except ValidationError:
            raise Wrong(place, f"{_said(place)} cannot be {value!r}: {name} must be {_describe(_Set, name)}") from None


# -- the schema ----------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    own = _Site.model_json_schema(ref_template="#/$defs/{model}")
    definitions = own.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "site.yaml of pman",
        "description": "Rules about jobs under `policy`; every other key is a value of the site's own templates.",
        "type": "object",
        "properties": {"policy": {"$ref": "#/$defs/Policy"}},
        "$defs": {"Policy": own, **definitions},
    }
