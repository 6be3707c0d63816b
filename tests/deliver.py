"""What each scheduler makes of a spec: the command line, environment and directories that a job would really get.

WDL goes through miniwdl and Cromwell's own changes, shell scripts through bash and dash, Kubernetes and Swarm through
the expansions that they document. None of pman's own reading of specs is used.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pman.templating.render import Spec
from tests.fakes.cromwell import wdl

# Words that Cromwell replaces in the finished script, wherever they stand (measured on Cromwell 93).
CROMWELL_WORDS = (
    "ENVIRONMENT_VARIABLES", "DOCKER_OUTPUT_DIR_LINK", "SCRIPT_PREAMBLE", "SCRIPT_EPILOGUE", "SCRIPT_CLOSURE",
    "INSTANTIATED_COMMAND",
)  # fmt: skip
PRINT_ARGV = ["printf", "%s\\0"]
PRINT_BOTH = ["sh", "-c", "env -0; printf 'END-OF-ENV\\0'; printf '%s\\0' \"$@\"", "sh"]


@dataclass(frozen=True)
class Delivery:
    """argv and env as the container gets them, where each directory comes from, and what the scheduler reserves."""

    argv: list[str]
    env: dict[str, str]
    incoming: str
    outgoing: str
    image: str
    fields: dict[str, Any]


@functools.lru_cache(maxsize=1)
def _plan(text: str) -> wdl.Plan:
    return wdl.plan(text, {})


def cromwell_script(text: str) -> str:
    """The script that Cromwell 93 makes of a workflow."""
    command = _plan(text).command
    for word in CROMWELL_WORDS:
        command = command.replace(word, "")
    return command


def wdl_runtime(text: str) -> dict[str, Any]:
    return {name: value.json for name, value in _plan(text).runtime.items()}


def run(script: str, shell: str = "bash", *arguments: str, **environment: str) -> str:
    """Standard output of a script whose program is PRINT_ARGV or PRINT_BOTH."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "script.sh")
        path.write_text(script, encoding="utf-8", newline="")
        done = subprocess.run(
            [shell, str(path), *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=directory,
            env=os.environ | environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


def supervised(text: str, index: int = 0) -> str:
    """A script of `local` or `slurm` that runs one worker and nothing else."""
    functions = re.sub(r"(?ms)^# First stage.*?^  rm -f \"\.claim\.\$\$\"\nfi$", "", text)
    return re.sub(r"(?m)^supervise$", f"run_worker {index}", functions)


def words(text: str) -> list[str]:
    """NUL-ended words."""
    return text.split("\0")[:-1]


def both(text: str) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments, as PRINT_BOTH prints them."""
    env, arguments = text.split("END-OF-ENV\0", 1)
    return dict(word.split("=", 1) for word in words(env)), words(arguments)


def kubernetes_expand(text: str, env: dict[str, str]) -> str:
    """`$$` is `$`, `$(NAME)` a variable defined so far, any other `$` itself (measured on Kubernetes 1.35)."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", replace, text)


def go_expand(text: str) -> str:
    """A Go template that only prints string literals; any other action is one that no value may bring about."""

    def replace(match: re.Match[str]) -> str:
        literal = re.fullmatch(r'"((?:[^"\\]|\\.)*)"', match[1])
        assert literal is not None, f"an action would run: {match[0]}"
        return literal[1]

    return re.sub(r"\{\{(.*?)\}\}", replace, text, flags=re.DOTALL)


def of_kubernetes(spec: Spec) -> Delivery:
    body = yaml.safe_load(spec.text)
    pod = body["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env: dict[str, str] = {}
    for entry in container["env"]:
        if "value" in entry:
            env[entry["name"]] = kubernetes_expand(entry["value"], env)
    sources = {volume["name"]: volume for volume in pod["volumes"]}
    places = {mount["mountPath"]: (sources[mount["name"]], mount) for mount in container["volumeMounts"]}
    assert places["/share/incoming"][1]["readOnly"] is True
    return Delivery(
        [kubernetes_expand(word, env) for word in [*container["command"], *container["args"]]],
        env,
        places["/share/incoming"][0]["hostPath"]["path"],
        places["/share/outgoing"][0]["hostPath"]["path"],
        container["image"],
        body,
    )


def of_swarm(spec: Spec) -> Delivery:
    body = yaml.safe_load(spec.text)
    container = body["TaskTemplate"]["ContainerSpec"]
    # The template's own entry is an action on purpose: it computes the index from the task's slot.
    env = [entry for entry in container["Env"] if not entry.startswith('PMAN_WORKER_INDEX={{define "i"}}')]
    mounts = {mount["Target"]: mount for mount in container["Mounts"]}
    assert mounts["/share/incoming"]["ReadOnly"] is True
    return Delivery(
        [*container["Command"], *container.get("Args", [])],
        dict(go_expand(entry).split("=", 1) for entry in env),
        go_expand(mounts["/share/incoming"]["Source"]),
        go_expand(mounts["/share/outgoing"]["Source"]),
        container["Image"],
        body,
    )


def of_docker(spec: Spec) -> Delivery:
    body = yaml.safe_load(spec.text)
    mounts = {mount["Target"]: mount for mount in body["HostConfig"]["Mounts"]}
    assert mounts["/share/incoming"]["ReadOnly"] is True
    return Delivery(
        [*(body.get("Entrypoint") or []), *(body.get("Cmd") or [])],
        dict(entry.split("=", 1) for entry in body["Env"]),
        mounts["/share/incoming"]["Source"],
        mounts["/share/outgoing"]["Source"],
        body["Image"],
        body,
    )


def expected_env(request: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in request["env"])
