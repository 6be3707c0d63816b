"""The Jinja environment that templates run in: what they print is quoted, what they can reach and use up is bounded.

Jinja's autoescape carries the mark "this is quoted already" (Markup) through macros, blocks and super(), but it would
HTML-escape whatever is joined to such text. Here every such joining is an error instead.
"""

import dataclasses
import difflib
import functools
import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import jinja2
import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
import jinja2.tests
from markupsafe import Markup

from pman.templating import quote

# CPU time of the rendering thread, which a busy machine does not shorten; the largest request takes about a second.
MAX_RENDER_SECONDS = 10.0
MAX_REPEATED = 1_000_000  # items or characters that `*` may make
MAX_REMEMBERED = 1000  # pairs of a type and an attribute
MAX_TEXT = 4 * 1024 * 1024  # characters that one expression may join; a spec holds no more either
VARIABLES = ("job", "policy", "storage", "settings", "site", "refuse")
# Language -> the quoting filters that its templates may use: another's would not keep a value in one piece there. The
# one of the language's own name quotes what is printed without a filter. A target may add to these, or bring its own.
_LANGUAGES: Mapping[str, Mapping[str, quote.Filter]] = {
    "yaml": {"yaml": quote.Filter(quote.yaml, "a YAML value on one line")},
    "json": {"json": quote.Filter(quote.json_, "a JSON value")},
    "sh": {"sh": quote.Filter(quote.sh, "a word of POSIX sh")},
}
# Those filters of Jinja's that shape data. The ones that make HTML are left out: they would mark text as quoted.
_OF_TEXT = ("capitalize", "lower", "replace", "string", "title", "trim", "upper")
_OF_LISTS = tuple(
    "batch first groupby join last list map max min reject rejectattr reverse select selectattr sort sum unique".split()  # noqa: SIM905
)
_OF_ANYTHING = tuple("abs attr count d default dictsort float indent int items length round safe".split())  # noqa: SIM905
_FILTERS = (*_OF_TEXT, *_OF_LISTS, *_OF_ANYTHING)
_KEEP_QUOTED = ("count", "d", "default", "join", "length", "safe")
_QUOTED = "a quoted value cannot be joined or changed: join first and quote the whole, as in {{ (a ~ b)|sh }}"
# What a site's template may set before its blocks, and of which type; shipped templates read these instead of job.*.
POLICY: Mapping[str, tuple[type, str]] = {
    "image": (str, "an image reference"),
    "partition": (str, "text or none"),
    "time_limit_minutes": (int, "a whole number of minutes above 0 or none"),
}

_METHODS = types.MethodType | types.BuiltinMethodType
_clock = threading.local()


class TimedOut(Exception):
    """The template was still running at its deadline."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Templates that this thread renders inside end with TimedOut after MAX_RENDER_SECONDS, at their next step."""
    _clock.deadline = time.thread_time() + MAX_RENDER_SECONDS
    try:
        yield
    finally:
        del _clock.deadline


def languages(own: Iterable[tuple[str, Mapping[str, quote.Filter]]]) -> dict[str, dict[str, quote.Filter]]:
    """Language -> its quoting filters, with those of the targets: pairs of a language and filters."""
    found = {name: dict(filters) for name, filters in _LANGUAGES.items()}
    for name, filters in own:
        found.setdefault(name, {}).update(filters)
    return found


def environment(
    loader: jinja2.BaseLoader, filters: Mapping[str, quote.Filter], write: Callable[[Any], str], auto_reload: bool
) -> jinja2.Environment:
    """The environment of templates that have these quoting filters. write: what quotes where none is named."""
    made = _Environment(
        loader=loader,
        autoescape=True,
        finalize=functools.partial(_literal, write),
        undefined=_Undefined,
        auto_reload=auto_reload,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters = {name: _careful(name, jinja2.filters.FILTERS[name]) for name in _FILTERS}
    made.filters |= {name: functools.partial(_quoting_filter, each.write) for name, each in filters.items()}
    del made.globals["lipsum"]
    return made


def _require_defined(value: Any) -> None:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises, with the name
        raise jinja2.UndefinedError("an inline `if` without `else` has no value here")


def _literal(function: Callable[[Any], str], value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    _require_defined(value)
    if _holds_quoted(value):
        raise TypeError(
            "a list or mapping holds a value that is quoted already: the whole is quoted when it is printed"
        )
    try:
        return Markup(function(value))  # noqa: S704 - what makes it safe
    except quote.Unwritable as error:
        error.value = value
        raise


def _holds_quoted(value: Any) -> bool:
    if isinstance(value, str):
        return isinstance(value, Markup)
    if isinstance(value, Mapping):
        return any(_holds_quoted(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and any(map(_holds_quoted, value))


def _quoting_filter(function: Callable[[Any], str], value: Any) -> Markup:
    if isinstance(value, Markup):
        raise TypeError("a value that is quoted already cannot be quoted again, nor can a macro's or a block's text")
    return _literal(function, value)


def _careful(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that changes no quoted text, and takes neither letters for a list nor None for a word."""
    function = _join if name == "join" else function
    first = int(hasattr(function, "jinja_pass_arg"))  # else the context or environment comes before the value

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = [*args[first:], *kwargs.values()]
        if name not in _KEEP_QUOTED and any(isinstance(arg, Markup) for arg in given):
            raise TypeError(_QUOTED)
        if name in _OF_LISTS:
            items_of(given[0])
        if name in _OF_TEXT:
            any(map(_as_text, given))
        return function(*args, **kwargs)

    return checked


def _as_text(value: Any) -> Any:
    """What may become part of a text: None and the booleans would be words of Python there."""
    if value is None or isinstance(value, bool):
        instead = (
            "say what should be written where it is absent" if value is None else "quotes in site.yaml make it text"
        )
        raise TypeError(f"{value} is not text; {instead}")
    return value


def _join(values: Iterable[Any], separator: str = "") -> str:
    """Jinja's `join`; quoted values may be joined by blanks and commas, which mean themselves in every language."""
    items = [_as_text(value) for value in values]
    if not any(isinstance(item, Markup) for item in [*items, separator]):
        return _bounded(separator.join(map(str, items)))
    if not all(isinstance(item, Markup) for item in items) or separator.strip(" \t\n,"):
        raise TypeError(_QUOTED)
    return Markup(str(separator).join(items))  # noqa: S704 - all of it is quoted


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise OverflowError(f"a text of more than {MAX_TEXT} characters is too much")
    return text


def items_of(value: Any) -> Any:
    """What a `for` or a filter of lists goes through: never a text, which would come letter by letter."""
    if isinstance(value, str):
        raise TypeError(f"a list is needed here, not the text {value[:40]!r}, which would be taken letter by letter")
    return value


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Jinja's compiler with some changes, each of which is an overridden method."""

    def visit_Template(self, node: Any, frame: Any = None) -> None:  # noqa: N802
        """Text before `extends` is not rendered, as text after it is not; Jinja would print a line break there."""
        extends = jinja2.nodes.Extends
        node.body.sort(key=lambda n: not (isinstance(n, extends) and isinstance(n.template, jinja2.nodes.Const)))
        super().visit_Template(node, frame)

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        """Constants are quoted at run time: Jinja would HTML-escape `{{ "a'b" }}` before finalize sees it."""
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_Output(self, node: Any, frame: Any) -> None:  # noqa: N802
        """One `yield` per piece of text, each with its line: what errors and `Renderer.origins` name."""
        for child in node.nodes:
            self.newline(child)
            super().visit_Output(jinja2.nodes.Output([child], lineno=child.lineno), frame)

    def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802
        self.visit(_through("tilde", *node.nodes), frame)

    def visit_Getitem(self, node: Any, frame: Any) -> None:  # noqa: N802
        """Slices go through the environment too, as any other subscript does."""
        if isinstance(node.arg, jinja2.nodes.Slice):
            node.node = _through("unquoted", node.node)
        super().visit_Getitem(node, frame)

    def visit_For(self, node: Any, frame: Any) -> None:  # noqa: N802
        node.iter = _through("items_of", node.iter)
        super().visit_For(node, frame)

    def visit_Assign(self, node: Any, frame: Any) -> None:  # noqa: N802
        if isinstance(node.target, jinja2.nodes.Name) and node.target.name in POLICY:
            node.node = _through("policy", jinja2.nodes.Const(node.target.name), node.node)
        super().visit_Assign(node, frame)

    def visit_AssignBlock(self, node: Any, frame: Any) -> None:  # noqa: N802
        if isinstance(node.target, jinja2.nodes.Name) and node.target.name in POLICY:
            name = node.target.name
            self.fail(f"the text of a set block is quoted already: write {{% set {name} = ... %}}", node.lineno)
        super().visit_AssignBlock(node, frame)

    def blockvisit(self, nodes: Any, frame: Any) -> None:
        if frame.loop_frame:
            self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)


def _through(function: str, *values: Any) -> jinja2.nodes.Call:
    """The expression environment.function(*values)."""
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(function), list(values), [], None, None)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Loops, calls and loads pass `tick`, so that no template runs for ever, in whatever thread."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "%", "**"})
    _safe: ClassVar[dict[tuple[type, str], bool]] = {}

    @staticmethod
    def tick() -> None:
        if time.thread_time() > getattr(_clock, "deadline", float("inf")):
            raise TimedOut(f"stopped after {MAX_RENDER_SECONDS:g} s of work: it may loop for ever")

    @staticmethod
    def tilde(*values: Any) -> str:
        """`a ~ b`: plain text, or quoted text as a whole."""
        quoted = [isinstance(value, Markup) for value in values]
        if any(quoted) and not all(quoted):
            raise TypeError(_QUOTED)
        text = _bounded("".join(str(_as_text(value)) for value in values))
        return Markup(text) if any(quoted) else text  # noqa: S704 - all of it is quoted

    items_of = staticmethod(items_of)

    @staticmethod
    def unquoted(value: Any) -> Any:
        """The value, unless it is quoted text: a part of that would not be quoted as a whole."""
        if isinstance(value, Markup):
            raise TypeError(_QUOTED)
        return value

    @staticmethod
    def policy(name: str, value: Any) -> Any:
        """What a template sets `name` to, one of POLICY."""
        kind, said = POLICY[name]
        _require_defined(value)
        if value is None and name != "image":
            return value
        empty = name != "partition" and isinstance(value, kind) and value <= kind()  # "", or 0 and less
        if empty or not isinstance(value, kind) or isinstance(value, bool | Markup):
            raise TypeError(f"{name} must be {said}, not {value!r}")
        return value

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(self.unquoted(obj), attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's answer, which follows from the object's type. Asked each time, it was a quarter of all rendering."""
        key = type(obj), attr
        if (safe := self._safe.get(key)) is None:
            if len(self._safe) >= MAX_REMEMBERED:
                self._safe.clear()
            safe = self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return safe

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(self.unquoted(obj), argument)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """How `map` calls a filter."""
        self.tick()
        if name == "safe":
            raise TypeError("map cannot mark values as safe")
        return super().call_filter(name, *args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        """How `select` and `reject` call a test."""
        self.tick()
        return super().call_test(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, Markup) or isinstance(right, Markup):
            raise TypeError(_QUOTED)
        if operator == "%" and isinstance(left, str):
            any(map(_as_text, right if isinstance(right, tuple) else (right,)))
            if re.search(r"\d{7}", left):
                raise OverflowError("a width of millions is too much")
        if (operator == "*" and _repeats(left, right) > MAX_REPEATED) or (operator == "**" and abs(right) > 64):
            raise OverflowError(f"{operator} would make a value that is too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, Markup):
            raise TypeError(_QUOTED)
        if isinstance(owner, str) and any(isinstance(arg, int) and arg > MAX_REPEATED for arg in args):
            raise OverflowError(f"{__obj.__name__}() would make a value that is too large")
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, _METHODS):
            return None
        self.unquoted(value.__self__)
        return super().wrap_str_format(value)

    def _load_template(self, name: str, globals: Any) -> jinja2.Template:  # noqa: A002
        self.tick()
        return super()._load_template(name, globals)


def _repeats(left: Any, right: Any) -> int:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    return 0


class _Undefined(jinja2.StrictUndefined):
    """StrictUndefined whose message names what would have been valid."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        known = VARIABLES if self._undefined_obj is jinja2.utils.missing else members(self._undefined_obj)
        owner = self._undefined_obj
        what = "this mapping" if isinstance(owner, Mapping) else type(owner).__name__.lower()
        said = re.sub(r"^'[\w.]+ object'", what, super()._undefined_message)  # not 'pman.job.Job object'
        return said + hint(str(self._undefined_name), known)


def near(name: str, known: Iterable[str]) -> str:
    """What `name` may have been meant to be, as the end of a sentence; "" for nothing."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def hint(name: str, known: Iterable[str]) -> str:
    """What `name` may have been meant to be, else what is known, as the end of a sentence; "" where nothing is."""
    known = sorted(known)
    return near(name, known) or (f"; known here: {', '.join(known[:30])}" if known else "")


def members(value: Any) -> list[str]:
    """The names below a variable of templates: the keys of a mapping, the fields and properties of a dataclass."""
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    kind = value if isinstance(value, type) else type(value)
    return [name for name in dir(kind) if not name.startswith("_")] if dataclasses.is_dataclass(kind) else []


def known(kind: str, quoting: Iterable[str]) -> list[str]:
    """The names of all filters, those that quote included, or of all tests."""
    return [*_FILTERS, *quoting] if kind == "filter" else list(jinja2.tests.TESTS)
