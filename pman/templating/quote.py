"""One pure function per language: any value in, exactly one literal of that language out.

Text is refused (Unwritable) where the language cannot carry it, never changed.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

# Words that Cromwell goes on replacing in the finished script, also inside the user's text (measured on Cromwell 93).
_CROMWELL_WORD = re.compile(rb"(SCRIPT|DOCKER|INSTANTIATED|ENVIRONMENT)_")
# Printable ASCII but ' (shell), \ (shell and WDL), ~ > < $ (which open or close something in WDL) and `.
_PLAIN = re.compile(rb"[ !\"#%&()*+,./0-9:;=?@A-Z\[\]^_a-z{|}-]*")
_YAML_SPECIAL = re.compile(r'["\\]|[^ -~]')
_YAML_SHORT = {'"': '"', "\\": "\\", "\n": "n", "\t": "t", "\r": "r"}
_SBATCH_SPECIAL = re.compile(r"[^A-Za-z0-9./:@,=+%_\x80-\U0010ffff-]")
_WDL_SPECIAL = re.compile(r"[^A-Za-z0-9 ./:@,=+_-]")


class Unwritable(ValueError):
    """The language cannot carry this text. value: what was to be printed, once that is known."""

    value: Any = None


def sh(value: Any) -> str:
    r"""A word of bash; of POSIX sh, too, without a carriage return. Numbers stay bare, booleans become true or false.

    sbatch refuses a script with CR LF in it, so CR is written as $'\r'; shlex.quote has put it into single quotes.
    """
    return _bare(value) or shlex.quote(_text(value)).replace("\r", "'$'\\r''")


def sbatch(value: Any) -> str:
    """A word of a `#SBATCH` line: sbatch reads these itself, with \\ before any character that stands for itself.

    Control characters are refused: a line break would begin a line of its own (get_argument() of SLURM's
    src/sbatch/opt.c; tried with 22.05).
    """
    if bare := _bare(value):
        return bare
    text = _text(value)
    if any(ord(character) < 32 or character == "\x7f" for character in text):
        raise Unwritable("a control character cannot stand in a #SBATCH line")
    return _SBATCH_SPECIAL.sub(r"\\\g<0>", text)


def wdl_command(value: Any) -> str:
    """A shell word that survives a WDL `command <<< >>>` block of Cromwell.

    The block must begin with the line `nl='<line break>'` at column 0. Proven byte for byte on a real Cromwell 93
    under dash and bash: Cromwell opens ~{, ends the block at >>>, strips common indentation inside arguments too,
    turns CR LF into LF and afterwards replaces words such as SCRIPT_EPILOGUE anywhere in the script.
    """
    if bare := _bare(value):
        return bare
    raw = _text(value).encode()
    if _PLAIN.fullmatch(raw) and not _CROMWELL_WORD.search(raw):
        return f"'{raw.decode()}'"
    body = raw.rstrip(b"\n")  # $( ) drops final newlines
    form = _octal(body)
    if form.startswith("-"):
        form = "\\055" + form[1:]  # printf would take it for an option
    head = f"\"$(printf '{form}')\"" if body else ""
    return head + '"$nl"' * (len(raw) - len(body))


def _octal(raw: bytes) -> str:
    marked = _CROMWELL_WORD.sub(lambda match: match[1] + b"\0", raw)
    return "".join(_octal_byte(byte) for byte in marked)


def _octal_byte(byte: int) -> str:
    if byte == 0:
        return "\\137"  # the underscore of a word of Cromwell's; text holds no NUL
    plain = byte != ord("%") and _PLAIN.fullmatch(bytes((byte,)))
    return chr(byte) if plain else f"\\{byte:03o}"


def wdl(value: Any) -> str:
    r"""A WDL 1.0 string literal for runtime attributes; numbers and booleans stay bare.

    Everything unusual becomes \uXXXX of its UTF-16 units, since Cromwell misreads \UXXXXXXXX. CR and LF are refused:
    the shell text of Cromwell's configuration would change them.
    """
    if bare := _bare(value):
        return bare
    text = _text(value)
    if "\n" in text or "\r" in text:
        raise Unwritable("a line break cannot stand in a WDL string")
    return f'"{_WDL_SPECIAL.sub(_utf16_escape, text)}"'


def _utf16_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def yaml(value: Any) -> str:
    """A YAML 1.1 and 1.2 flow value on one line: double-quoted strings in ASCII, flow lists and mappings."""
    if value is None:
        return "null"
    if bare := _bare(value):
        return bare
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml(str(k))}: {yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml(item) for item in value) + "]"
    return f'"{_YAML_SPECIAL.sub(_yaml_escape, _text(value))}"'


def _yaml_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _YAML_SHORT:
        return "\\" + _YAML_SHORT[match[0]]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_(value: Any) -> str:
    """A JSON value in ASCII."""
    return json.dumps(_text(value) if isinstance(value, str) else value, allow_nan=False)


def k8s(value: Any) -> str:
    """YAML for a string in command, args or env of a Kubernetes container, or a list of such strings.

    Kubernetes turns $$ into $ and expands $(NAME) there (measured on 1.35), so every $ is doubled.
    """
    if isinstance(value, list | tuple):
        return "[" + ", ".join(k8s(item) for item in value) + "]"
    return yaml(_text(value).replace("$", "$$"))


def go_template(value: Any) -> str:
    """YAML for a string that Docker Swarm expands as a Go template: env entries, mounts and the host name."""
    return yaml(_text(value).replace("{{", '{{"{{"}}'))


def _bare(value: Any) -> str:
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


def _text(value: Any) -> str:
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
