"""qsub, qstat and qdel of a PBS of one machine, for the test that adds a backend: `fake_pbs.py SPOOL COMMAND WORD...`.

It does what OpenPBS documents (https://github.com/openpbs/openpbs): qsub copies the script, reads the #PBS lines above
its first command, splits them as make_argv() in src/cmds/qsub.c does, and prints the number of the job, which starts
with an environment of its own; qstat -x -f -F json shows ended jobs too; an unknown job is exit status 153, one that
has ended is 35 for qdel (src/include/pbs_error.h); qdel sends TERM, and KILL after 10 s.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

UNKNOWN, ENDED, NO_QUEUE = 153, 35, 170
KILL_DELAY_SECONDS = 10
QUEUES = ("workq", "gpu-long")


def words_of(line: str) -> list[str]:
    """The words of a #PBS line: quotes, and a backslash before any character."""
    parts = re.findall(r"""\s+|"[^"]*"|'[^']*'|\\.|[^\s"'\\]+""", line.strip())
    words = [""]
    for part in parts:
        if part.isspace():
            words.append("")
        else:
            words[-1] += part[1:-1] if part[0] in "\"'" else part[1:] if part[0] == "\\" else part
    return words


def options_of(words: list[str]) -> dict[str, list[str]]:
    """Letter -> what was given with it."""
    found: dict[str, list[str]] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if not re.fullmatch("-[NSjorlqAv]", flag):
            fail(2, f"qsub: invalid option -- '{flag}'")
        found.setdefault(flag[1:], []).append(value)
    return found


def fail(status: int, said: str) -> NoReturn:
    print(said, file=sys.stderr)
    sys.exit(status)


class Spool:
    """A directory below which every job has one of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, number: str) -> dict[str, Any] | None:
        file = self.path / number / "job.json"
        return json.loads(file.read_text()) if re.fullmatch(r"\d+\.fake", number) and file.is_file() else None

    def write(self, number: str, job: dict[str, Any]) -> None:
        new = self.path / number / "new.json"
        new.write_text(json.dumps(job))
        new.rename(self.path / number / "job.json")

    def add(self) -> str:
        for number in range(1, 10_000):
            try:
                (self.path / f"{number}.fake").mkdir()
            except FileExistsError:
                continue
            return f"{number}.fake"
        fail(1, "qsub: the spool is full")


def qsub(spool: Spool, words: list[str]) -> None:
    script = Path(words[-1]).read_text()
    head = re.match(r"(?:[ \t]*(?:#.*|:)?\n)*", script)
    lines = re.findall(r"(?m)^#PBS(.*)$", head[0] if head else "")
    options = options_of([word for line in lines for word in words_of(line)]) | options_of(words[:-1])
    if options.get("q", ["workq"])[-1] not in QUEUES:
        fail(NO_QUEUE, "qsub: Unknown queue")
    number = spool.add()
    (spool.path / number / "script").write_text(script)
    variables = dict(pair.split("=", 1) for given in options.get("v", []) for pair in given.split(","))
    job = {"Job_Name": options["N"][-1], "job_state": "Q", "directory": os.getcwd(), "Variable_List": variables}
    spool.write(number, job)
    command = [sys.executable, __file__, str(spool.path), "mom", number]
    null = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, cwd="/", stdin=null, stdout=null, stderr=null)
    print(number)


def mom(spool: Spool, words: list[str]) -> None:
    """What runs the job on its machine."""
    number, job = words[0], spool.read(words[0])
    assert job
    own = {"PBS_JOBID": number, "PBS_JOBNAME": job["Job_Name"], "PBS_O_WORKDIR": job["directory"]}
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **own, **job["Variable_List"]}
    with (spool.path / number / "output").open("wb") as output:
        process = subprocess.Popen(
            ["bash", str(spool.path / number / "script")],
            env=env, cwd=env["HOME"], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        spool.write(number, job | {"job_state": "R", "session_id": process.pid})
        status = process.wait()
    spool.write(number, job | {"job_state": "F", "session_id": process.pid, "Exit_status": status})


def qstat(spool: Spool, words: list[str]) -> None:
    if words == ["-B"]:
        print("Server             Max   Tot\nfake                 0     0")
        return
    assert words[:4] == ["-x", "-f", "-F", "json"]
    found = {number: spool.read(number) for number in words[4:]}
    print(json.dumps({"Jobs": {number: job for number, job in found.items() if job}}))
    for number in [number for number, job in found.items() if not job]:
        fail(UNKNOWN, f"qstat: Unknown Job Id {number}")


def qdel(spool: Spool, words: list[str]) -> None:
    job = spool.read(words[0])
    if job is None:
        fail(UNKNOWN, f"qdel: Unknown Job Id {words[0]}")
    deadline = time.monotonic() + KILL_DELAY_SECONDS
    while job["job_state"] == "Q":  # it starts at once on this machine
        time.sleep(0.02)
        job = spool.read(words[0]) or job
    if job["job_state"] == "F":
        fail(ENDED, f"qdel: Job has finished {words[0]}")
    os.kill(job["session_id"], signal.SIGTERM)
    while (spool.read(words[0]) or job)["job_state"] != "F" and time.monotonic() < deadline:
        time.sleep(0.02)
    if (spool.read(words[0]) or job)["job_state"] != "F":
        os.killpg(job["session_id"], signal.SIGKILL)


if __name__ == "__main__":
    COMMANDS = {"qsub": qsub, "mom": mom, "qstat": qstat, "qdel": qdel}
    COMMANDS[sys.argv[2]](Spool(Path(sys.argv[1])), sys.argv[3:])
