"""One pure function per language: any value in, exactly one literal of that language out.

Text is refused (Unwritable) where the language cannot carry it, never changed. What only one scheduler quotes is in
its target's file (pman/targets/).
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_YAML_SPECIAL = re.compile(r'["\\]|[^ -~]')
_YAML_SHORT = {'"': '"', "\\": "\\", "\n": "n", "\t": "t", "\r": "r"}


class Unwritable(ValueError):
    """The language cannot carry this text. value: what was to be printed, once that is known."""

    value: Any = None


class Filter(NamedTuple):
    """A filter that quotes: the function, and what it writes."""

    write: Callable[[Any], str]
    meaning: str


def sh(value: Any) -> str:
    r"""A word of bash, and of POSIX sh if without a carriage return. Numbers stay bare, booleans become true or false.

    sbatch refuses a script with CR LF in it, so CR is written as $'\r'; shlex.quote has put it into single quotes.
    """
    return bare(value) or shlex.quote(text_of(value)).replace("\r", "'$'\\r''")


def yaml(value: Any) -> str:
    """A YAML 1.1 and 1.2 flow value on one line: double-quoted strings in ASCII, flow lists and mappings."""
    if value is None:
        return "null"
    if number := bare(value):
        return number
    if isinstance(value, str):
        return f'"{_YAML_SPECIAL.sub(_yaml_escape, text_of(value))}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml(str(k))}: {yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml(item) for item in value) + "]"
    return text_of(value)  # raises


def _yaml_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _YAML_SHORT:
        return "\\" + _YAML_SHORT[match[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_(value: Any) -> str:
    """A JSON value in ASCII."""
    return json.dumps(text_of(value) if isinstance(value, str) else value, allow_nan=False)


def bare(value: Any) -> str:
    """A number or a boolean, which stand without quotes in every language; "" for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    return repr(value) if isinstance(value, int) else ""


def _float(value: float) -> str:
    """A float with a point, without which 1e+16 is text in YAML 1.1."""
    if not math.isfinite(value):
        raise Unwritable(f"{value} is no number that can be written")
    text = repr(value)
    return text if "." in text else text.replace("e", ".0e")


def text_of(value: Any) -> str:
    """A text that can be quoted. Raises TypeError for what is none, Unwritable for what no language can carry."""
    if not isinstance(value, str):
        instead = "quotes in site.yaml, or |string, make it text"
        if value is None:
            instead = "say what should be written where it is absent"
        if isinstance(value, list | tuple | Mapping):
            instead = "a `for` or |join writes its parts"
        raise TypeError(f"{type(value).__name__} is not text; {instead}")
    if "\0" in value:
        raise Unwritable("a NUL character cannot stand here")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unwritable("half of a surrogate pair cannot stand here") from None
    return value
