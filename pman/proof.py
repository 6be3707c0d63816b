"""Proves that a spec delivers its job: the command line and environment byte for byte, and the right directories.

Shell scripts are run by bash with a PATH that holds nothing: every command ends in a stub, which records the one that
carries the job's command line. Kubernetes' and Swarm's own expansions are done as they document them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pman import check
from pman.job import Job
from pman.render import Spec
from pman.storage import Storage

# Stands in front of the job's own command line while a spec is proven; no program is called like this.
MARK = "pman-check-7f3a9c"
_TIMEOUT_SECONDS = 20
_STUB = r"""
command_not_found_handle() {
  case " $* " in *" $PMAN_MARK "*) ;; *) return 0 ;; esac
  { printf '%s\0' "$@"; printf 'pman-check-part\0'
    for name in $PMAN_NAMES; do printf '%s\0' "$name=${!name-}"; done
    printf 'pman-check-part\0%s\0%s\0' "${incoming-}" "${outgoing-}"; } >>"$PMAN_RECORD"
}
exec() { [ "$#" = 0 ] || { "$@"; exit "$?"; }; }
cd() { :; }
source() { :; }
cd() { :; }
.() { :; }
kill() { :; }
sleep() { :; }
"""


@dataclass(frozen=True, slots=True)
class Flaw:
    """What does not arrive. what: argv, env, incoming or outgoing. line: in the rendered text, from 1, if known."""

    what: str
    message: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class _Delivered:
    words: list[str]  # the whole command line, wrappers included; holds MARK
    env: Mapping[str, str] = field(default_factory=dict)
    incoming: str | None = None
    outgoing: str | None = None


def marked(job: Job) -> Job:
    """The job to render for `flaws`: its command line is an argument list of MARK."""
    return replace(job, argv=(MARK, *job.argv))


def flaws(job: Job, storage: Storage, spec: Spec) -> Iterator[Flaw]:
    """What does not arrive of `job` (not marked) in `spec`, which was rendered from marked(job) and judged good."""
    try:
        found = _READERS[spec.target](job, spec.text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Flaw("argv", f"the job's command cannot be found in the result: {error or type(error).__name__}")
        return
    yield from _argv(job, storage, found.words)
    yield from _environment(job, found)
    for what, mount in (("incoming", storage.incoming), ("outgoing", storage.outgoing)):
        source = getattr(found, what)
        if source is not None and source != mount.source:
            yield Flaw(what, f"{mount.target} is {source!r} instead of {mount.source!r}", _line(spec.text, what))


def _argv(job: Job, storage: Storage, words: list[str]) -> Iterator[Flaw]:
    if MARK not in words:
        yield Flaw("argv", "the command line of the job is never run")
        return
    arrived, expected = words[words.index(MARK) + 1 :], list(job.argv)
    if len(arrived) < len(expected):
        yield Flaw("argv", f"only {len(arrived)} of the {len(expected)} words of the command line arrive")
    elif len(arrived) > len(expected):
        yield Flaw("argv", f"the command line gains words: {arrived[len(expected) :][:3]!r}")
    for number, (got, wanted) in enumerate(zip(arrived, expected, strict=False)):
        if got not in (wanted, storage.on_host(wanted)):
            yield Flaw("argv", f"word {number} of the command line is {got!r} instead of {wanted!r}")
            return


def _environment(job: Job, found: _Delivered) -> Iterator[Flaw]:
    before = found.words[: found.words.index(MARK)] if MARK in found.words else []
    given = dict(found.env) | dict(word.split("=", 1) for word in before if "=" in word)
    for name, value in job.env:
        if name not in given:
            yield Flaw("env", f"the job's variable {name} is not set")
            return
        if given[name] != value:
            yield Flaw("env", f"the job's variable {name} is {given[name]!r} instead of {value!r}")
            return


def _line(text: str, what: str) -> int | None:
    """The line that names the directory: `incoming:`, `incoming=` or /share/incoming."""
    found = re.search(rf"(?m)^.*(?:^\s*{what}\s*[:=]|/share/{what}\b).*$", text)
    return text.count("\n", 0, found.start()) + 1 if found else None


# -- readers -------------------------------------------------------------------------------------------------------


def _wdl(job: Job, text: str) -> _Delivered:
    runtime = check.wdl_runtime(text)
    shared = runtime.get("sharedir")
    incoming = runtime.get("incoming", f"{shared}/incoming" if shared else "")
    outgoing = runtime.get("outgoing", f"{shared}/outgoing" if shared else "")
    found = _run(job, check.wdl_command(text)[1])
    return replace(found, incoming=incoming, outgoing=outgoing)


def _local(job: Job, text: str) -> _Delivered:
    """The supervisor is left out: one worker is run as it would run it."""
    return _run(job, re.sub(r"(?m)^supervise$", "run_worker 0", text), "claim", "1")


def _slurm(job: Job, text: str) -> _Delivered:
    return _run(job, re.sub(r"(?m)^supervise$", "run_worker 0", text), "worker")


def _run(job: Job, script: str, *arguments: str) -> _Delivered:
    programs = {word for word in re.findall(r"(?<![\w./-])/[\w./+-]+", script) if os.access(word, os.X_OK)}
    stubs = "".join(
        f'{path}() {{ command_not_found_handle {path} "$@"; }}\n' for path in sorted(programs) if Path(path).is_file()
    )
    with tempfile.TemporaryDirectory(prefix="pman-check-") as directory:
        record, file = Path(directory, "record"), Path(directory, "script")
        file.write_text(_STUB + stubs + script, encoding="utf-8")
        names = " ".join(name for name, _ in job.env)
        env = {"PATH": "/nonexistent", "PMAN_MARK": MARK, "PMAN_NAMES": names, "PMAN_RECORD": str(record)}
        bash = shutil.which("bash") or "/bin/bash"
        env |= {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "HOME": directory}
        subprocess.run(
            [bash, str(file), *arguments], cwd=directory, env=env, stdin=subprocess.DEVNULL, capture_output=True,
            check=False, timeout=_TIMEOUT_SECONDS,
        )  # fmt: skip
        recorded = record.read_bytes().decode() if record.exists() else ""
    if not recorded:
        return _Delivered([])
    words, variables, directories = (part.split("\0")[:-1] for part in recorded.split("pman-check-part\0")[:3])
    env = dict(entry.split("=", 1) for entry in variables)
    return _Delivered(words, env, *((directories[0] or None, directories[1] or None) if directories else ()))


def _kubernetes(_job: Job, text: str) -> _Delivered:
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    container = next(c for c in pod["containers"] if MARK in [*c.get("command", []), *c.get("args", [])])
    env: dict[str, str] = {}
    for entry in container.get("env", []):
        if "value" in entry:
            env[entry["name"]] = _expand(entry["value"], env)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    sources = {m["mountPath"]: _volume_source(volumes[m["name"]], m) for m in container["volumeMounts"]}
    words = [_expand(word, env) for word in [*container.get("command", []), *container.get("args", [])]]
    return _Delivered(words, env, sources.get("/share/incoming", ""), sources.get("/share/outgoing", ""))


def _volume_source(volume: Mapping[str, Any], mount: Mapping[str, Any]) -> str:
    path = (volume.get("hostPath") or volume.get("nfs") or {}).get("path", "")
    return "/".join(part for part in (path, mount.get("subPath", "")) if part)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """$$ is $, $(NAME) a variable defined so far, any other $ itself (measured on Kubernetes 1.35)."""
    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


def _swarm(_job: Job, text: str) -> _Delivered:
    container = yaml.safe_load(text)["TaskTemplate"]["ContainerSpec"]
    words = [*container.get("Command", []), *container.get("Args", [])]
    return _engine(words, [_go(entry) for entry in container.get("Env", [])], container.get("Mounts", []), _go)


def _docker(_job: Job, text: str) -> _Delivered:
    body = yaml.safe_load(text)
    words = [*(body.get("Entrypoint") or []), *(body.get("Cmd") or [])]
    host = body.get("HostConfig", {})
    binds = [bind.rsplit(":", 2 if bind.count(":") > 1 else 1) for bind in host.get("Binds", [])]
    mounts = [*host.get("Mounts", []), *({"Source": bind[0], "Target": bind[1]} for bind in binds)]
    return _engine(words, body.get("Env") or [], mounts, str)


def _engine(words: list[str], env: list[str], mounts: list[Any], read: Callable[[str], str]) -> _Delivered:
    sources = {mount["Target"]: read(_mount_source(mount)) for mount in mounts}
    pairs = dict(entry.split("=", 1) for entry in env if "=" in entry)
    return _Delivered(words, pairs, sources.get("/share/incoming", ""), sources.get("/share/outgoing", ""))


def _mount_source(mount: Mapping[str, Any]) -> str:
    options = mount.get("VolumeOptions") or {}
    device = ((options.get("DriverConfig") or {}).get("Options") or {}).get("device", "")
    return str(options.get("Subpath") or device.removeprefix(":") or mount.get("Source", ""))


def _go(text: str) -> str:
    """What Swarm makes of a Go template: quoting writes only {{"{{"}}, so any other action changes the text."""
    return "{{".join(re.sub(r"(?s)\{\{.*?(\}\}|$)", "(a Go template)", part) for part in text.split('{{"{{"}}'))


_READERS: Mapping[str, Callable[[Job, str], _Delivered]] = {
    "wdl": _wdl, "k8s": _kubernetes, "swarm": _swarm, "docker": _docker, "slurm": _slurm, "local": _local,
}  # fmt: skip
