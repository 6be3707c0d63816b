"""One attempt of a call: its directory, its script, and what is run to submit, watch and kill it."""

from __future__ import annotations

import hashlib
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.cromwell.config import Backend
from tests.fakes.cromwell.wdl import Values

SIGTERM_CODE = 143  # what an abort leaves in rc before it kills
LOST_CODE = 79  # what stands in rc when the job is gone and left none
TERMINATED = frozenset({130, 137, 143})  # codes that are taken for a kill

# The wrapper around the command. The words in capitals are replaced one after the other in the whole text,
# the user's command included, which is what the real one does too.
_SCRIPT = """\
#!{shell}
DOCKER_OUTPUT_DIR_LINK
cd {execution}
mkdir -p {tmp} && chmod 777 {tmp}
export _JAVA_OPTIONS=-Djava.io.tmpdir={tmp} TMPDIR={tmp}
(
cd {execution}
SCRIPT_PREAMBLE
)
out="{tmp}/out.$$" err="{tmp}/err.$$"
mkfifo "$out" "$err"
trap 'rm -f "$out" "$err"' EXIT
touch {execution}/stdout {execution}/stderr
tee {execution}/stdout < "$out" &
tee {execution}/stderr < "$err" >&2 &
(
cd {execution}
ENVIRONMENT_VARIABLES
INSTANTIATED_COMMAND
) > "$out" 2> "$err"
echo $? > {execution}/rc.tmp
(
cd {execution}
find . -type d -empty -exec touch {{}}/.file \\;
)
(
cd {execution}
sync
SCRIPT_EPILOGUE
)
mv {execution}/rc.tmp {execution}/rc
SCRIPT_CLOSURE
"""
_WORDS = {
    "ENVIRONMENT_VARIABLES": "", "DOCKER_OUTPUT_DIR_LINK": "", "SCRIPT_PREAMBLE": "", "SCRIPT_EPILOGUE": "",
    "SCRIPT_CLOSURE": "", "INSTANTIATED_COMMAND": "",
}  # fmt: skip


class NotStarted(Exception):
    """The submit command failed, or did not name a job."""


class NoSuchTask(Exception):
    """The configuration lacks the text that this job needs."""


@dataclass(frozen=True)
class Job:
    backend: Backend
    workflow: str
    workflow_name: str
    task_name: str
    attempt: int
    docker: bool  # the workflow sets a `docker` attribute that the backend declares

    @property
    def call_root(self) -> Path:
        call = Path(self.backend.root, self.workflow_name, self.workflow, f"call-{self.task_name}")
        return call / f"attempt-{self.attempt}" if self.attempt > 1 else call

    @property
    def execution(self) -> Path:
        return self.call_root / "execution"

    def file(self, name: str) -> Path:
        return self.execution / name

    def script(self, command: str) -> str:
        tag = hashlib.sha256(str(self.call_root).encode()).hexdigest()[:8]
        paths = {"execution": str(self.execution), "tmp": f"{self.call_root}/tmp.{tag}"}
        text = _SCRIPT.format(shell=self.backend.job_shell, **paths).replace("INSTANTIATED_COMMAND", command)
        for word, replacement in _WORDS.items():
            text = text.replace(word, replacement)
        return text

    def _names(self, job_id: str = "") -> dict[str, str]:
        return {
            "script": str(self.file("script")), "cwd": str(self.call_root), "out": str(self.file("stdout")),
            "err": str(self.file("stderr")), "job_name": f"cromwell_{self.workflow[:8]}_{self.task_name}",
            "job_shell": self.backend.job_shell, "docker_cwd": f"/cromwell-executions/{self.workflow}",
            "docker_script": str(self.file("script")), "docker_out": str(self.file("stdout")),
            "docker_err": str(self.file("stderr")), "docker_cid": "", "job_id": job_id,
        }  # fmt: skip

    def _run(self, kind: str, text: str) -> int:
        """Run a shell text as `script.<kind>`, output to `stdout.<kind>` and `stderr.<kind>`; its exit code."""
        path = self.file(f"script.{kind}")
        path.write_text("#!/bin/bash\n" + text)
        with self.file(f"stdout.{kind}").open("wb") as out, self.file(f"stderr.{kind}").open("wb") as err:
            command, null = ["/bin/bash", str(path)], subprocess.DEVNULL
            done = subprocess.run(command, check=False, cwd=self.call_root, stdin=null, stdout=out, stderr=err)
        return done.returncode

    def submit(self, command: str, values: Values) -> str:
        """Write the script and submit it; the scheduler's job id."""
        text = self.backend.submit_docker if self.docker else self.backend.submit
        if text is None:
            raise NoSuchTask("Unable to find task submit_docker")
        self.execution.mkdir(parents=True, exist_ok=True)
        self.file("script").write_text(self.script(command))
        code = self._run("submit", text.render(values, self._names()))
        hint = f"Check the stderr file for possible errors: {self.file('stderr.submit')}"
        if code != 0:
            raise NotStarted(f"Unable to start job. {hint}")
        found = re.search(self.backend.job_id_regex, self.file("stdout.submit").read_text(errors="replace"))
        if found is None:
            raise NotStarted(f"Could not find job ID from stdout file.{hint}")
        return found[1]

    def alive(self, job_id: str, values: Values) -> bool:
        """Whether the scheduler still has the job; true when there is nothing to ask it with."""
        text = self.backend.check_alive
        return text is None or self._run("check", text.render(values, self._names(job_id))) == 0

    def kill(self, job_id: str, values: Values) -> None:
        """Abort: note the signal as return code unless there is one, then run kill where it is configured."""
        self.put_code(SIGTERM_CODE)
        text = self.backend.kill_docker if self.docker else self.backend.kill
        if text is not None:
            self._run("kill", text.render(values, self._names(job_id)))

    def put_code(self, code: int) -> None:
        """Leave a return code unless the job has left one already."""
        temporary = self.file("rc.kill")
        temporary.write_text(f"{code}\n")
        with suppress(FileExistsError):
            self.file("rc").hardlink_to(temporary)
        temporary.unlink()

    def code(self) -> int | None:
        """The return code, None while there is none."""
        try:
            return int(self.file("rc").read_text().strip() or 0)
        except FileNotFoundError:
            return None

    def stderr_bytes(self) -> int:
        return self.file("stderr").stat().st_size if self.file("stderr").exists() else 0
