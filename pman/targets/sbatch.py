"""`#SBATCH` lines as sbatch reads them: which lines it reads, which options there are, what their values look like.

Options, arguments and versions are those of src/common/slurm_opt.c in SLURM 22.05 to 25.05; lines are read as in
src/sbatch/opt.c; values and exclusions are those of sbatch(1), tried with 22.05.8 and 24.11.5.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pman.targets.record import Problem

# What an option's value has to look like, and how a message says so. Other kinds are not judged.
_GRES = r"(?:gres[/:])?[A-Za-z_][\w.-]*(?::[\w.+-]*[A-Za-z_][\w.+-]*)?(?:[:=]\d+[kKmMgGtTpP]?)?"
_GPUS = r"(?:\d+|[\w.+-]*[A-Za-z_][\w.+-]*(?:[:=]\d+)?)"
_SIGNAL = (
    r"(?:[RB]+:)?(?:\d+|(?i:SIG)?(?i:HUP|INT|QUIT|ABRT|KILL|ALRM|TERM|USR[12]|CHLD|CONT|STOP|TSTP|TTIN|TTOU|URG|XCPU))"
    r"(?:@\d+)?"
)
FORMS: Mapping[str, tuple[str, str]] = {
    "time": (r"-1|(?i:infinite|unlimited)|(\d+-)?\d+(:\d+){0,2}", "a time: MINUTES, HH:MM:SS or DAYS-HH:MM:SS"),
    "memory": (r"\d+(?:[kKmMgGtT][bB]?)?", "an amount of memory: a whole number with K, M, G or T (MiB without)"),
    "count": (r"[1-9]\d*", "a whole number above 0"),
    "number": (r"\d+", "a whole number"),
    "signed": (r"[+-]?\d+", "a whole number"),
    "nodes": (r"\d+[kKmM]?(-\d+[kKmM]?)?(:\d+)?(,\d+(-\d+)?(:\d+)?)*", "a number of nodes: N or MIN-MAX"),
    "gres": (rf"(?i:none)|{_GRES}(?:,{_GRES})*", "resources: NAME[:TYPE]:COUNT,..."),
    "gpus": (rf"{_GPUS}(?:,{_GPUS})*", "GPUs: [TYPE:]COUNT"),
    "signal": (_SIGNAL, "a signal: [B:]NAME[@SECONDS]"),
    "mode": (r"[aA]\w*|[tT]\w*", "append or truncate"),
    "switch": (r"[01]", "0 or 1"),
    "yes-no": (r"(?i:yes|no)", "yes or no"),
    "sharing": (r"(?i:user|mcs|topo)", "user, mcs or topo"),
}  # fmt: skip
# ARGUMENT FORM: NAME[/SHORT][@VERSIONS] ...; ARGUMENT: = needs one, ? may have one with `=`, - has none.
_TABLE = """
= text: account/A acctg-freq array/a autocomplete@23.02- batch bb bbf begin/b chdir/D cluster cluster-constraint
  clusters/M comment constraint/C container container-id@23.02- context cores-per-socket cpu-freq deadline delay-boot
  dependency/d distribution/m error/e exclude/x export export-file extra@23.02- extra-node-info/B gid gpu-bind
  gpu-freq gres-flags hint input/i job-name/J licenses/L mail-type mail-user mcs-label mem-bind network nodefile/F
  nodelist/w output/o partition/p power@-23.11 prefer priority profile qos/q reservation sockets-per-node switches
  threads-per-core tres-bind@23.11- tres-per-task@23.02- uid wckey wrap
= count: cpus-per-gpu cpus-per-task/c mincpus ntasks/n ntasks-per-core ntasks-per-gpu ntasks-per-node
  ntasks-per-socket tasks-per-node
= gpus: gpus/G gpus-per-node gpus-per-socket gpus-per-task
= gres: gres
= memory: mem mem-per-cpu mem-per-gpu tmp
= mode: open-mode
= nodes: nodes/N
= number: core-spec/S ntasks-per-tres segment@24.05- thread-spec
= signal: signal
= switch: wait-all-nodes
= time: time/t time-min
= yes-no: kill-on-invalid-dep
? text: get-user-env no-kill/k propagate
- -: contiguous external@25.05- help/h hold/H ignore-pbs no-requeue overcommit/O oversubscribe/s parsable quiet/Q
  reboot requeue spread-job stepmgr@24.05- test-only usage use-min-nodes verbose/v version/V wait/W
? number: oom-kill-step@24.11- resv-ports@24.05-
? sharing: exclusive
? signed: nice
"""
# Options that SLURM does not take together, and why. The shipped script may have given one of them.
_EXCLUSIVE = (
    (("mem", "mem-per-cpu", "mem-per-gpu"), "SLURM takes one of --mem, --mem-per-cpu and --mem-per-gpu"),
    (("cpus-per-task", "cpus-per-gpu"), "SLURM takes one of --cpus-per-task and --cpus-per-gpu"),
    (("exclusive", "oversubscribe"), "a job either has its nodes alone or shares them"),
    (("gres", "gpus"), "both ask for GPUs; leave one of them out"),
    (("gres", "gpus-per-node"), "both ask for GPUs; leave one of them out"),
    (("gres", "gpus-per-task"), "both ask for GPUs; leave one of them out"),
    (("gpus-per-task", "ntasks-per-gpu"), "SLURM takes one of --gpus-per-task and --ntasks-per-gpu"),
)
# Options with which a job is not one that pman can follow.
_REFUSED = {
    "array": "pman follows one SLURM job for each job; number_of_workers starts several processes",
    "cluster": "pman looks for its jobs on the cluster of slurm.conf alone; run a pman for each cluster",
    "external": "such a job runs nothing",
    "help": "sbatch would print its help and submit nothing",
    "input": "pman's script reads nothing",
    "test-only": "sbatch would submit nothing",
    "usage": "sbatch would print its help and submit nothing",
    "version": "sbatch would print its version and submit nothing",
    "wait": "sbatch would not return before the job has ended, and a POST with it",
    "wrap": "the script is the job",
}
_REFUSED |= {"clusters": _REFUSED["cluster"]}
# Options that pman gives itself, and the only value that they may have, if there is one: pman relies on them.
_OWN = {
    "chdir": "", "error": "", "job-name": "", "comment": "", "open-mode": "append", "output": "slurm-%j.log",
}  # fmt: skip
_LOOKS_LIKE_ONE = re.compile(r"[ \t]*#+[ \t]*SBATCH[ \t]+-", re.IGNORECASE)
# One piece of a shell script after another, so that a line that stands in quotes is not taken for one of the script.
_PIECE = re.compile(
    r"\\.|\$?'(?:(?<=\$')(?:\\.|[^'\\])*|[^']*)'|\"(?:\\.|[^\"\\])*\"|(?<![^\s;&|(])#[^\n]*|\n|[^\n]", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Option:
    """One of sbatch's. argument: `=` it needs one, `?` it may have one, `-` it has none. versions: as in the table."""

    name: str
    short: str
    argument: str
    form: str
    versions: str


def _options() -> Iterator[Option]:
    for row in _TABLE.strip().replace("\n  ", " ").splitlines():
        kind, _, names = row.partition(": ")
        for name, short, versions in re.findall(r"([^\s/@]+)/?([^\s/@]*)@?(\S*)", names):
            yield Option(name, short, kind[0], kind[2:], versions)


OPTIONS: Mapping[str, Option] = {option.name: option for option in sorted(_options(), key=lambda option: option.name)}
_SHORT = {option.short: option for option in OPTIONS.values() if option.short}


@dataclass(frozen=True, slots=True)
class _Given:
    """An option of a line, with its value as sbatch understands it."""

    option: Option
    value: str | None
    line: int


class _Bad(Exception):
    """What sbatch says no to, in a sentence."""


def problems(text: str) -> Iterator[Problem]:
    """What sbatch refuses or does not see in the `#SBATCH` lines of a script."""
    first_command = _first_command(text)
    given: list[_Given] = []
    for number, line in _lines_of_the_script(text):
        if line.startswith("#SBATCH") and number < first_command:
            try:
                given += _line(line.removeprefix("#SBATCH"), number)
            except _Bad as error:
                yield Problem(str(error), number)
        elif line.startswith("#SBATCH"):
            message = f"sbatch does not read this line: the first command, in line {first_command}, ends its reading"
            yield Problem(f"{message}; move the line into the block directives", number, rule="ignored")
        elif _LOOKS_LIKE_ONE.match(line):
            message = "sbatch does not read this line, since it does not begin with `#SBATCH`"
            yield Problem(f"{message}; write it so, or take it out", number, rule="ignored")
    yield from _together(given)
    if (again := [one for one in given if one.option.name == "requeue"]) and 'flock "$begun"' not in text:
        message = (
            "SLURM may begin a job with --requeue anew, which this script refuses; set `requeue: true` in site.yaml"
        )
        yield Problem(f"{message} in place of the option", again[-1].line)


def _first_command(text: str) -> int:
    """The line of the first command; sbatch reads no directive behind it."""
    lines = text.split("\n")
    return next((n for n, line in enumerate(lines, 1) if (word := line.strip()) and word[0] != "#"), len(lines) + 1)


def _lines_of_the_script(text: str) -> Iterator[tuple[int, str]]:
    """Those that do not begin inside of quotes, with their numbers."""
    number, lines = 1, text.split("\n")
    yield 1, lines[0]
    for piece in _PIECE.finditer(text):
        number += piece[0].count("\n")
        if piece[0] == "\n":
            yield number, lines[number - 1]


def _words(line: str) -> list[str]:
    """get_argument() of opt.c: \\ before any character, quotes of both kinds, a comment behind an unquoted #."""
    words, word, quote, escaped = list[str](), "", "", False
    for character in line:
        if escaped and character.isspace():
            raise _Bad("SLURM 22.05 ends a value at a blank behind \\; put the value into quotes")
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            words, word = ([*words, word] if word else words), ""
        else:
            word += character
    if quote:
        raise _Bad(f"the quote {quote} does not end")
    return [*words, word] if word else words


def _line(text: str, number: int) -> Iterator[_Given]:
    words = _words(text)
    if words and words[0].lower() in ("hetjob", "packjob"):
        raise _Bad("pman follows jobs of one part: take the line with hetjob out")
    while words:
        word = words.pop(0)
        option, value = _long(word[2:]) if word.startswith("--") else _one_letter(word)
        if option.argument == "=" and value is None:
            if not words:
                raise _Bad(f"--{option.name} needs a value: --{option.name}=VALUE")
            value = words.pop(0)
        yield _Given(option, value, number)


def _long(word: str) -> tuple[Option, str | None]:
    """As getopt_long(3) takes it: the beginning of a name will do where it is that of one option alone."""
    name, equals, value = word.partition("=")
    found = [option for option in OPTIONS.values() if option.name.startswith(name)]
    option = OPTIONS.get(name) or (found[0] if len(found) == 1 and name else None)
    if option is None:
        raise _Bad(f"sbatch has no option --{name}{_nearest(name)}")
    if equals and option.argument == "-":
        raise _Bad(f"--{option.name} takes no value: write --{option.name}")
    return option, value if equals else None


def _one_letter(word: str) -> tuple[Option, str | None]:
    if len(word) < 2 or word[0] != "-":
        name = word.partition("=")[0]
        hint = f"; write --{word}" if name in OPTIONS else _nearest(name)
        raise _Bad(f"sbatch takes options alone, and {word} is none{hint}")
    option = _SHORT.get(word[1])
    if option is None:
        raise _Bad(f"sbatch has no option -{word[1]}")
    if word[2:3] == "=":
        raise _Bad(f"sbatch takes the = for a part of the value: write --{option.name}{word[2:]}")
    return option, word[2:] or None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.6)
    return f"; did you mean --{near[0]}{_since(OPTIONS[near[0]])}?" if near else ""


def _since(option: Option) -> str:
    first, _, last = option.versions.partition("-")
    return f" (from SLURM {first} on)" if first else f" (up to SLURM {last})" if last else ""


def _together(given: list[_Given]) -> Iterator[Problem]:
    """What is wrong with options that sbatch knows, each for itself and beside the others."""
    seen: dict[str, _Given] = {}
    for one in given:
        yield from (Problem(message, one.line) for message in _alone(one))
        if one.option.name in _OWN and one.option.name in seen:
            yield Problem(f"--{one.option.name} is pman's own, from line {seen[one.option.name].line}", one.line)
        seen[one.option.name] = one
    for names, why in _EXCLUSIVE:
        together = [
            seen[name] for name in names if name in seen and (name != "gres" or "gpu" in (seen[name].value or ""))
        ]
        if len(together) > 1:
            words = " beside ".join(f"--{one.option.name} of line {one.line}" for one in together)
            yield Problem(f"{words}: {why}", max(one.line for one in together))


def _alone(one: _Given) -> Iterator[str]:
    name, value = one.option.name, one.value
    if name in _REFUSED:
        yield f"take --{name} out: {_REFUSED[name]}"
    pattern, form = FORMS.get(one.option.form, ("", ""))
    if pattern and value is not None and not re.fullmatch(pattern, value):
        yield f"--{name}={value}: this is not {form}"
    if one.option.versions.startswith("-"):
        yield f"take --{name} out: SLURM after {one.option.versions[1:]} does not know it"
    if _OWN.get(name) and value != _OWN[name]:
        yield f"--{name} is pman's own: it has to be {_OWN[name]}"
