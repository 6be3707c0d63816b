"""WDL 1.0 for Cromwell: read by miniwdl, its command by bash."""

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pman.job import Job
from pman.targets import cromwell_conf, shell
from pman.targets.documents import need
from pman.targets.record import Delivered, Flaw, Judging, Problem, Starter, Target
from pman.templating.quote import Filter, Unwritable, bare, text_of

# Words that Cromwell goes on replacing in the finished script, also inside the user's text (measured on Cromwell 93).
_CROMWELL_WORD = re.compile(rb"(SCRIPT|DOCKER|INSTANTIATED|ENVIRONMENT)_")
# Printable ASCII but ' (shell), \ (shell and WDL), ~ > < $ (which open or close something in WDL) and `.
_PLAIN = re.compile(rb"[ !\"#%&()*+,./0-9:;=?@A-Z\[\]^_a-z{|}-]*")
_WDL_SPECIAL = re.compile(r"[^A-Za-z0-9 ./:@,=+_-]")
# https://github.com/openwdl/wdl: draft-2 has no such line. Cromwell (up to 93) takes no 1.2; 1.1 from version 89 on.
_VERSION = re.compile(r"(?m)^version[ \t]+(\S+)")
_VERSIONS = ("draft-3", "1.0", "1.1", "development", "development-1.1")


def wdl_command(value: Any) -> str:
    """A shell word that survives a WDL `command <<< >>>` block of Cromwell.

    The block must begin with the line `nl='<line break>'` at column 0. Proven byte for byte on a real Cromwell 93
    under dash and bash: Cromwell opens ~{, ends the block at >>>, strips common indentation inside arguments too,
    turns CR LF into LF and afterwards replaces words such as SCRIPT_EPILOGUE anywhere in the script.
    """
    if number := bare(value):
        return number
    raw = text_of(value).encode()
    if _PLAIN.fullmatch(raw) and not _CROMWELL_WORD.search(raw):
        return f"'{raw.decode()}'"
    body = raw.rstrip(b"\n")  # $( ) drops final newlines
    form = "".join(map(_octal_byte, _CROMWELL_WORD.sub(lambda match: match[1] + b"\0", body)))
    if form.startswith("-"):
        form = "\\055" + form[1:]  # printf would take it for an option
    head = f"\"$(printf '{form}')\"" if body else ""
    return head + '"$nl"' * (len(raw) - len(body))


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
    if number := bare(value):
        return number
    text = text_of(value)
    if "\n" in text or "\r" in text:
        raise Unwritable("a line break cannot stand in a WDL string")
    return f'"{_WDL_SPECIAL.sub(_utf16_escape, text)}"'


def _utf16_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def command_of(text: str) -> tuple[int, str]:
    """The line that a WDL task's command begins in, and the script that Cromwell makes of it.

    Raises ValueError when a placeholder in it would be evaluated. Cromwell drops blank lines at both ends and the
    indentation that all lines share.
    """
    tasks = _document(text).tasks
    if not tasks:
        raise ValueError("this is no workflow: it holds no task")
    command = tasks[0].command
    if any(not isinstance(part, str) for part in command.parts):
        raise ValueError("the command holds ~{, which Cromwell would evaluate")
    body = "".join(command.parts)
    script = re.sub(r"\A(?:[ \t]*\n)+", "", body)
    lines = script.rstrip().split("\n")
    cut = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    first = command.pos.line + body[: len(body) - len(script)].count("\n")
    return first, "\n".join(line[cut:] for line in lines)


def runtime_of(text: str) -> dict[str, Any]:
    """The runtime attributes of the task in a WDL text, evaluated."""
    wdl = need("WDL")
    runtime = _document(text).tasks[0].runtime
    return {
        name: expression.eval(wdl.Env.Bindings(), wdl.StdLib.Base("1.0")).json for name, expression in runtime.items()
    }


@functools.lru_cache(maxsize=4)
def _document(text: str) -> Any:
    document = need("WDL").parse_document(text)
    document.typecheck(check_quant=False)
    return document


def _judge(text: str, how: Judging) -> Iterator[Problem]:
    wdl = need("WDL")
    try:
        first, script = command_of(text)
        runtime_of(text)
    except wdl.Error.MultipleValidationErrors as error:
        yield from (Problem(str(e), e.pos.line) for e in error.exceptions)
    except (wdl.Error.SyntaxError, wdl.Error.ValidationError, wdl.Error.EvalError) as error:
        yield Problem(shell.first_line(str(error))[:200], error.pos.line)
    except ValueError as error:
        yield Problem(str(error))
    else:
        yield from (
            Problem(p.message, p.line and p.line + first - 1) for p in shell.bash_problems(script, how.shellcheck)
        )
        yield from _refused_by_cromwell(text, how)


def _refused_by_cromwell(text: str, how: Judging) -> Iterator[Problem]:
    """What miniwdl takes and Cromwell does not."""
    version = _VERSION.search(text)
    if version and version[1] not in _VERSIONS:
        said = f"no Cromwell takes WDL of version {version[1]}; write `version 1.0`"
        yield Problem(said, text[: version.start()].count("\n") + 1)
    places = _attribute_lines(text)
    for name, lines in places.items():
        if len(lines) > 1:
            yield Problem(f"the runtime attribute {name} is given twice, here and in line {lines[0]}", lines[1])
    if how.cromwell_conf:
        backend = cromwell_conf.provider(how.cromwell_conf, how.cromwell_backend)
        for name, rule, said in backend.complaints(runtime_of(text)):
            yield Problem(said, places.get(name, [None])[0], rule=rule)


def _attribute_lines(text: str) -> dict[str, list[int]]:
    """Name -> the lines in which the last runtime section of the text gives that attribute."""
    *_, begin = re.finditer(r"(?m)^[ \t]*runtime[ \t]*\{", text)
    found: dict[str, list[int]] = {}
    for match in re.finditer(r"(?m)^[ \t]*(\w+)[ \t]*:", text[begin.end() :]):
        found.setdefault(match[1], []).append(text[: begin.end() + match.start(1)].count("\n") + 1)
    return found


def _read(job: Job, text: str) -> Delivered:
    runtime = runtime_of(text)
    shared = runtime.get("sharedir")
    incoming = runtime.get("incoming", f"{shared}/incoming" if shared else "")
    outgoing = runtime.get("outgoing", f"{shared}/outgoing" if shared else "")
    first, script = command_of(text)
    found = shell.run(job, script, env={"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})
    injected = [line and line + first - 1 for line in found.injected]
    said = "the runtime attribute jid is not the job's own, by which its SLURM job is named"
    others = () if runtime.get("jid") == job.jid else (Flaw("identity", said, level="warning"),)
    return replace(found, incoming=incoming, outgoing=outgoing, injected=injected, others=others)


TARGET = Target(
    name="wdl",
    template="wdl/job.wdl.j2",
    extras={"options.json": "wdl/options.json.j2"},
    filters={
        "wdl": Filter(wdl, "a WDL 1.0 string literal"),
        "sh": Filter(wdl_command, "a word of POSIX sh that also survives Cromwell's command block"),
    },
    storage_types=("host",),
    starter=Starter(
        "prologue",
        f"{{{{ super() }}}}{shell.LOAD_MODULES}",
        "# Environment modules of the image: the prologue runs inside the container, e.g. [fsl/6.0]\nmodules: []\n",
    ),
    need_super=("environment",),
    shell_blocks=("prologue", "environment", "command"),
    judge=_judge,
    read=_read,
    causes={
        **shell.CAUSES,
        "identity": ("runtime",),
        **dict.fromkeys(("incoming", "outgoing"), ("directories", *shell.CAUSES["incoming"])),
    },
)
