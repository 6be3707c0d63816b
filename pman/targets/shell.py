"""Scripts of bash: what is wrong with one, and what it runs.

To see what a script runs, bash runs it with a PATH that holds nothing: every command ends in a stub, which records the
one that carries the job's command line. This has a limit: a program does run where a script puts its path together from
parts, or calls it behind `PATH=... ` on the same line.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pman.job import Job
from pman.targets.record import CANARY, MARK, Delivered, Flaw, Problem, Starter, Stuck

_TIMEOUT_SECONDS = 20
_CPU_SECONDS = 3  # of each process of a script; a whole script takes some 20 ms
# SC2140: {{ }} writes a word of its own between two others.
_SHELLCHECK = (
    "shellcheck", "--format=json", "--severity=warning", "--shell=bash", "--exclude=SC2034,SC1111,SC1112,SC2140", "-",
)  # fmt: skip
LOAD_MODULES = "{% for name in site.modules %}\nmodule load {{ name|sh }}\n{% endfor %}\n"
# On a node, where `module` is a function of the profile.
STARTER = Starter(
    "prologue",
    "{{ super() }}{% if site.modules %}\nset +u # profiles and modules are not written for it\n. /etc/profile\n"
    f"{LOAD_MODULES}set -u\n{{% endif %}}\n",
    "# Environment modules to load before the command, e.g. [apptainer/1.3]\nmodules: []\n",
)
CAUSES: Mapping[str, tuple[str, ...]] = {
    "argv": ("command", "runtime", "prologue", "environment"),
    "env": ("environment", "command", "runtime", "prologue"),
    "identity": ("claim", "start"),
    "injected": ("environment", "prologue", "command"),
    **dict.fromkeys(("incoming", "outgoing"), ("runtime", "environment", "prologue", "command")),
}
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


def bash_problems(script: str, shellcheck: bool = False) -> Iterator[Problem]:
    run = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    found = re.findall(r"(?m)^bash: line (\d+): (.*)$", run.stderr.decode(errors="replace"))
    for line, message in found:
        opened = re.search(r"here-document at line (\d+)", message)
        yield Problem(f"bash: {message}", int(opened[1] if opened else line))
    if run.returncode and not found:
        yield Problem(first_line(run.stderr.decode(errors="replace")))
    if shellcheck and not found and shutil.which("shellcheck"):
        run = subprocess.run(_SHELLCHECK, input=script.encode(), capture_output=True, check=False)
        for item in json.loads(run.stdout or b"[]"):
            yield Problem(f"shellcheck SC{item['code']}: {item['message']}", item["line"])


def identity(claim: str, text: str) -> Iterator[Flaw]:
    """What a script lacks that pman needs to run its job once and to see its end: the claim, and the return code."""
    for line, without in ((claim, "the job may run twice"), ("mv rc.new rc", "pman never sees that the job has ended")):
        if line not in text:
            yield Flaw("identity", f"the script does not hold `{line}`, without which {without}")


def first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def run_worker(job: Job, text: str, *arguments: str, env: Mapping[str, str] | None = None) -> Delivered:
    """What a script that extends sh/job.sh.j2 runs: one worker, as its supervisor would run it."""
    text = re.sub(r'(?m)^( *)run_command "\$@"$', r'\1exec "$@"', text)  # a builtin leaves no record where it is called
    found = run(job, re.sub(r"(?m)^supervise$", "run_worker 0", text), *arguments, env=env)
    return replace(found, wraps=True)


def run(job: Job, script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Delivered:
    """What the script runs on a cluster that has all the files it asks for, or else on one that has none of them.

    env: what the scheduler sets. Raises Stuck.
    """
    found = _run_where(0, job, script, arguments, env or {})
    if found.words:
        return found
    return replace(_run_where(1, job, script, arguments, env or {}), injected=found.injected)


def _run_where(files: int, job: Job, script: str, arguments: tuple[str, ...], given: Mapping[str, str]) -> Delivered:
    programs = sorted(set(re.findall(r"(?<![\w./-])/[\w./+-]+", script)))
    stubs = "".join(f'{path}() {{ command_not_found_handle {path} "$@"; }}\n' for path in programs)
    with tempfile.TemporaryDirectory(prefix="pman-check-") as directory:
        record, file, stub = (Path(directory, name) for name in ("record", "script", "stub"))
        file.write_text(script, encoding="utf-8")
        stub.write_text(_STUB + stubs, encoding="utf-8")
        env = {
            **given, "BASH_ENV": str(stub), "PATH": "/nonexistent", "HOME": directory,
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
    for pid in glob.glob("[0-9]*", root_dir="/proc"):  # of pathlib's, a process that ends is an error
        with contextlib.suppress(OSError):
            session = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[3]
            if int(session) == leader:
                os.kill(int(pid), signal.SIGKILL)


def _recorded(text: str) -> Delivered:
    if not text:
        return Delivered([])
    words, variables, directories = (part.split("\0")[:-1] for part in text.split("pman-check-part\0")[:3])
    env = dict(entry.split("=", 1) for entry in variables)
    return Delivered(words, env, directories[0] or None, directories[1] or None)
