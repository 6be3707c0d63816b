"""Proves that a spec delivers its job: the command line and environment byte for byte, and the right directories.

Shell scripts are run by bash with a PATH that holds nothing: every command ends in a stub, which records the one that
carries the job's command line. Kubernetes' and Swarm's own expansions are done as they document them. A limit of this:
a program does run that a script calls by a path it puts together, or behind `PATH=... ` on the same line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pman.checking import parsers as check
from pman.job import INCOMING, OUTGOING, Job, image_reference
from pman.storage import Storage
from pman.templating.render import Spec

# Stands in front of the job's own command line while a spec is proven; no program is called like this.
MARK = "pman-check-7f3a9c"
# Stands in values of requests as a command and as a template: one that anything runs or expands was not quoted.
CANARY = "pman-check-injected"
_TIMEOUT_SECONDS = 20
_CPU_SECONDS = 3  # of each process of a script; a whole script takes some 20 ms
_STUB = r"""
ulimit -t "$PMAN_CPU_SECONDS"
set -T
trap 'PATH=/nonexistent' DEBUG # whatever the script makes of it
pman_record() { # KIND WORD...
  local IFS=' ' pman_name pman_kind=$1
  shift
  { printf '%s\0' "$@"; printf 'pman-check-part\0'
    for pman_name in $PMAN_NAMES; do printf '%s\0' "$pman_name=${!pman_name-}"; done
    printf 'pman-check-part\0%s\0%s\0' "${incoming-}" "${outgoing-}"; } >"$PMAN_RECORD.$pman_kind"
}
command_not_found_handle() {
  local pman_word
  [[ $1 != "$PMAN_CANARY" ]] || printf '%s\n' "${BASH_LINENO[0]}" >>"$PMAN_RECORD.injected"
  for pman_word; do [[ $pman_word != "$PMAN_MARK" ]] || pman_record call "$@"; done
  return 0
}
exec() { [[ $# = 0 ]] || { pman_record exec "$@"; exit 0; }; }
command() {
  case ${1-} in
  -v | -V) printf '%s\n' "${2-}" ;;
  -p) shift; "$@" ;;
  *) "$@" ;;
  esac
}
test() { # of files elsewhere, PMAN_FILES is the answer: this machine is not the cluster
  if [[ $# = 3 && $1 = '!' ]]; then ! test "$2" "$3"; return; fi
  if [[ $# = 2 && $1 = -[defrswx] && $2 = /* ]]; then return "$PMAN_FILES"; fi
  builtin test "$@"
}
[() { test "${@:1:$#-1}"; }
sleep() { ((++PMAN_NAPS < 100)) || exit 75; }
cd() { :; }
source() { :; }
.() { :; }
kill() { :; }
type() { :; }
hash() { :; }
"""


class Stuck(Exception):
    """The script of a spec does not come to its end."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """What does not arrive. what: argv, env, incoming, outgoing, volumes, image; injected, script: what runs instead.

    line: in the rendered text, from 1, if known.
    """

    what: str
    message: str
    line: int | None = None
    level: str = "error"


@dataclass(frozen=True, slots=True)
class _Delivered:
    words: list[str]  # the whole command line, wrappers included; holds MARK
    env: Mapping[str, str] = field(default_factory=dict)
    incoming: str | None = None
    outgoing: str | None = None
    injected: Sequence[int | None] = ()  # lines in which CANARY ran
    image: str | None = None  # where an engine pulls it
    others: tuple[Flaw, ...] = ()
    status: int = 0  # exit status of a script


def marked(job: Job) -> Job:
    """The job to render for `flaws`: its command line is an argument list of MARK."""
    return replace(job, argv=(MARK, *job.argv))


def flaws(job: Job, storage: Storage, spec: Spec) -> Iterator[Flaw]:
    """What does not arrive of `job` (not marked) in `spec`, which was rendered from marked(job) and judged good.

    Raises Stuck.
    """
    try:
        found = _READERS[spec.target](job, spec.text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Flaw("argv", f"the job's command cannot be found in the result: {error or type(error).__name__}")
        return
    yield from found.others
    for number in found.injected:
        yield Flaw("injected", "a value of the request runs as a command here", number)
    if MARK not in found.words:
        left = f": the script leaves with status {found.status} before" if not found.words and found.status else ""
        yield Flaw("argv", f"the command line of the job is never run{left}")
        return
    yield from _argv(job, storage, found.words)
    yield from _environment(job, found)
    yield from _directories(job, storage, spec, found)
    try:
        image_reference(found.image or job.image)
    except ValueError as error:
        yield Flaw("image", f"the image {found.image!r} {error}")


def _argv(job: Job, storage: Storage, words: list[str]) -> Iterator[Flaw]:
    arrived, expected = words[words.index(MARK) + 1 :], list(job.argv)
    if len(arrived) < len(expected):
        yield Flaw("argv", f"only {len(arrived)} of the {len(expected)} words of the command line arrive")
    elif len(arrived) > len(expected):
        yield Flaw("argv", f"the command line gains words: {arrived[len(expected) :][:3]!r}")
    for number, (got, wanted) in enumerate(zip(arrived, expected, strict=False)):
        if got not in (wanted, storage.on_host(wanted)):
            yield Flaw("argv", f"word {number} of the command line is {got!r} instead of {wanted!r}")
            return


def _directories(job: Job, storage: Storage, spec: Spec, found: _Delivered) -> Iterator[Flaw]:
    own = {f"{name}={value}" for name, value in job.env}
    wrapper = [word for word in found.words[: found.words.index(MARK)] if word not in own]
    bound = dict(_bound(wrapper))
    for what, mount in (("incoming", storage.incoming), ("outgoing", storage.outgoing)):
        for source in (getattr(found, what), bound.get(mount.target)):
            if source is not None and source != mount.source:
                line = _line(spec.text, what) if spec.target not in _SCRIPTS else None
                yield Flaw(what, f"{mount.target} is {source!r} instead of {mount.source!r}", line)
    if spec.target in _SCRIPTS and OUTGOING in found.words and not any(OUTGOING in word for word in wrapper):
        said = f"nothing in front of the command mounts {OUTGOING}, which it is given"
        yield Flaw("outgoing", said, level="warning")


def _bound(words: list[str]) -> Iterator[tuple[str, str]]:
    """Directory in the container and where it comes from, as SRC:DST[:OPTIONS] or `SRC DST` say."""
    for before, word in zip(["", *words], words, strict=False):
        if pair := re.fullmatch(rf"(?s)(?:--?[\w-]+=)?(.*):({INCOMING}|{OUTGOING})(?::[a-zA-Z,]+)?", word):
            yield pair[2], pair[1]
        elif word in (INCOMING, OUTGOING):
            yield word, before


def _environment(job: Job, found: _Delivered) -> Iterator[Flaw]:
    before = found.words[: found.words.index(MARK)]
    given = dict(found.env) | dict(word.split("=", 1) for word in before if "=" in word)
    for name, value in job.env:
        if name not in given:
            yield Flaw("env", f"the job's variable {name} is not set")
            return
        if given[name] != value:
            yield Flaw("env", f"the job's variable {name} is {given[name]!r} instead of {value!r}")
            return


def _line(text: str, what: str) -> int | None:
    """The line that names the directory: `incoming:` or /share/incoming."""
    found = re.search(rf"(?m)^.*(?:^\s*{what}\s*:|/share/{what}\b).*$", text)
    return text.count("\n", 0, found.start()) + 1 if found else None


# -- readers -------------------------------------------------------------------------------------------------------


def _wdl(job: Job, text: str) -> _Delivered:
    runtime = check.wdl_runtime(text)
    shared = runtime.get("sharedir")
    incoming = runtime.get("incoming", f"{shared}/incoming" if shared else "")
    outgoing = runtime.get("outgoing", f"{shared}/outgoing" if shared else "")
    first, script = check.wdl_command(text)
    found = _run(job, script)
    injected = [line and line + first - 1 for line in found.injected]
    return replace(found, incoming=incoming, outgoing=outgoing, injected=injected)


def _local(job: Job, text: str) -> _Delivered:
    """The supervisor is left out: one worker is run as it would run it."""
    return _run(job, re.sub(r"(?m)^supervise$", "run_worker 0", text), "claim", "1")


def _slurm(job: Job, text: str) -> _Delivered:
    return _run(job, re.sub(r"(?m)^supervise$", "run_worker 0", text), "worker")


def _run(job: Job, script: str, *arguments: str) -> _Delivered:
    """What the script runs on a cluster that has all the files it asks for, or else on one that has none of them."""
    found = _run_where(0, job, script, *arguments)
    if found.words:
        return found
    return replace(_run_where(1, job, script, *arguments), injected=found.injected)


def _run_where(files: int, job: Job, script: str, *arguments: str) -> _Delivered:
    programs = sorted(set(re.findall(r"(?<![\w./-])/[\w./+-]+", script)))
    stubs = "".join(f'{path}() {{ command_not_found_handle {path} "$@"; }}\n' for path in programs)
    with tempfile.TemporaryDirectory(prefix="pman-check-") as directory:
        record, file, stub = (Path(directory, name) for name in ("record", "script", "stub"))
        file.write_text(script, encoding="utf-8")
        stub.write_text(_STUB + stubs, encoding="utf-8")
        env = {
            "BASH_ENV": str(stub), "PATH": "/nonexistent", "HOME": directory, "SLURM_JOB_ID": "1", "SLURM_PROCID": "0",
            "PMAN_MARK": MARK, "PMAN_CANARY": CANARY, "PMAN_NAMES": " ".join(name for name, _ in job.env),
            "PMAN_RECORD": str(record), "PMAN_FILES": str(files), "PMAN_NAPS": "0",
            "PMAN_CPU_SECONDS": str(_CPU_SECONDS),
        }  # fmt: skip
        status = _status([shutil.which("bash") or "/bin/bash", str(file), *arguments], directory, env)
        made = {path.suffix: path.read_bytes().decode() for path in Path(directory).glob("record.*")}
    injected = [int(line) for line in made.get(".injected", "").split()]
    return replace(_recorded(made.get(".exec") or made.get(".call", "")), injected=injected, status=status)


def _status(command: list[str], directory: str, env: Mapping[str, str]) -> int:
    """The exit status of a command, which is killed after a time, with all that it leaves behind."""
    with subprocess.Popen(
        command, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            status = process.wait(_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = -signal.SIGKILL
        _end_session(process.pid)
    if status == -signal.SIGKILL:  # as ends what has used up its CPU time
        raise Stuck("the script does not come to an end: what does it wait for?")
    return status


def _end_session(leader: int) -> None:
    """Kills the processes of a session; a script puts those in the background into groups of their own.

    Where there is no /proc, the limit of CPU time ends them.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            session = stat.read_text().rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _recorded(text: str) -> _Delivered:
    if not text:
        return _Delivered([])
    words, variables, directories = (part.split("\0")[:-1] for part in text.split("pman-check-part\0")[:3])
    env = dict(entry.split("=", 1) for entry in variables)
    return _Delivered(words, env, directories[0] or None, directories[1] or None)


def _kubernetes(_job: Job, text: str) -> _Delivered:
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    container = next((c for c in pod["containers"] if MARK in _words(c)), None)
    if container is None:
        raise ValueError("no container has it in command and args, word by word")
    entries = [entry for entry in container.get("env") or [] if "value" in entry]
    env: dict[str, str] = {}
    for entry in entries:
        env[entry["name"]] = _expand(entry["value"], env)
    volumes = {volume["name"]: volume for volume in pod.get("volumes") or []}
    mounts = container.get("volumeMounts") or []
    lost = [Flaw("volumes", f"the mount {m['name']} has no volume") for m in mounts if m["name"] not in volumes]
    sources = {m["mountPath"]: _volume_source(volumes[m["name"]], m) for m in mounts if m["name"] in volumes}
    words = [_expand(word, env) for word in _words(container)]
    open_ = re.compile(rf"(?<!\$)(?:\$\$)*\$\({CANARY}\)")
    expanded = [text for each in _containers(pod) for text in _expandable(each)]
    others = (*lost, *_in_scripts(pod), *_expanded(expanded, open_, "Kubernetes", "k8s"))
    places = sources.get(INCOMING, ""), sources.get(OUTGOING, "")
    return _Delivered(words, env, *places, image=container["image"], others=others)


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(pod.get("initContainers") or []), *pod["containers"]]


def _expandable(container: Mapping[str, Any]) -> Iterator[str]:
    """The texts in which Kubernetes expands $(NAME)."""
    yield from _words(container)
    yield from (entry["value"] for entry in container.get("env") or [] if "value" in entry)
    yield from (mount.get("subPathExpr", "") for mount in container.get("volumeMounts") or [])


def _words(container: Mapping[str, Any]) -> list[str]:
    return [*(container.get("command") or []), *(container.get("args") or [])]


def _in_scripts(pod: Mapping[str, Any]) -> Iterator[Flaw]:
    """Values in what a shell gets with -c, in front of the job's own command line."""
    for container in _containers(pod):
        words = list(itertools.takewhile(lambda word: word != MARK, _words(container)))
        scripts = [script for flag, script in itertools.pairwise(words) if re.fullmatch(r"-[a-z]*c", flag)]
        if words and words[0].endswith("sh") and any(CANARY in script for script in scripts):
            yield Flaw("script", "a value of the request is part of a shell's script: pass it as a variable (env)")


def _expanded(texts: list[str], open_: re.Pattern[str], who: str, quoting: str) -> Iterator[Flaw]:
    if any(open_.search(text) for text in texts):
        yield Flaw("injected", f"{who} would expand a value of the request here: write |{quoting}")


def _volume_source(volume: Mapping[str, Any], mount: Mapping[str, Any]) -> str:
    path = (volume.get("hostPath") or volume.get("nfs") or {}).get("path", "")
    return "/".join(part for part in (path, mount.get("subPath", "")) if part)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """$$ is $, $(NAME) a variable defined so far, any other $ itself (measured on Kubernetes 1.35)."""
    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


def _swarm(_job: Job, text: str) -> _Delivered:
    container = yaml.safe_load(text)["TaskTemplate"]["ContainerSpec"]
    words = [*container.get("Command", []), *container.get("Args", [])]
    env, mounts = container.get("Env") or [], container.get("Mounts") or []
    found = _engine(words, [_go(entry) for entry in env], mounts, _go)
    texts = [*env, *map(_mount_source, mounts), container.get("Hostname", "")]
    return replace(
        found,
        image=container["Image"],
        others=tuple(_expanded(texts, re.compile(rf"\{{\{{{CANARY}"), "Swarm", "gotemplate")),
    )


def _docker(_job: Job, text: str) -> _Delivered:
    body = yaml.safe_load(text)
    words = [*(body.get("Entrypoint") or []), *(body.get("Cmd") or [])]
    host = body.get("HostConfig", {})
    binds = [bind.rsplit(":", 2 if bind.count(":") > 1 else 1) for bind in host.get("Binds", [])]
    mounts = [*host.get("Mounts", []), *({"Source": bind[0], "Target": bind[1]} for bind in binds)]
    return replace(_engine(words, body.get("Env") or [], mounts, str), image=body["Image"])


def _engine(words: list[str], env: list[str], mounts: list[Any], read: Callable[[str], str]) -> _Delivered:
    sources = {mount["Target"]: read(_mount_source(mount)) for mount in mounts}
    pairs = dict(entry.split("=", 1) for entry in env if "=" in entry)
    return _Delivered(words, pairs, sources.get(INCOMING, ""), sources.get(OUTGOING, ""))


def _mount_source(mount: Mapping[str, Any]) -> str:
    options = mount.get("VolumeOptions") or {}
    device = ((options.get("DriverConfig") or {}).get("Options") or {}).get("device", "")
    return str(options.get("Subpath") or device.removeprefix(":") or mount.get("Source", ""))


def _go(text: str) -> str:
    """What Swarm makes of a Go template: quoting writes only {{"{{"}}, so any other action changes the text."""
    return "{{".join(re.sub(r"(?s)\{\{.*?(\}\}|$)", "(a Go template)", part) for part in text.split('{{"{{"}}'))


_SCRIPTS = ("slurm", "local")
_READERS: Mapping[str, Callable[[Job, str], _Delivered]] = {
    "wdl": _wdl, "k8s": _kubernetes, "swarm": _swarm, "docker": _docker, "slurm": _slurm, "local": _local,
}  # fmt: skip
