"""A SLURM of executables, and jobs on it."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from pman import job, settings
from pman.backends import directories, slurm
from pman.backends.slurm import commands as slurm_commands
from pman.backends.slurm import state as slurm_state
from pman.targets import TARGETS
from pman.templating import render

CONFIG = settings.load({"STOREBASE": "/data/store", "JOB_LABELS": "site=it's #1,b=c", "SLURM_ACCOUNT": 'a "b" c'})
RENDERER = render.Renderer(CONFIG, TARGETS)


def fake(directory: Path, name: str, script: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


class Fake:
    """A SLURM of executables: `say(name, script)` is what that command does from now on."""

    def __init__(self, directory: Path) -> None:
        self.here = directory
        self.root = directory / "state"
        fake(directory, "prefix", f'here={directory}; cd $here; shift 2; exec "$here/$@"')
        self.say("squeue")
        self.say("scancel", "shift; echo $* >> cancelled")
        self.say("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
        self.say("sbatch", "echo x >> submitted; echo 10")
        self.backend = self.make()

    def make(self, timeout_seconds: float = 20, patience_seconds: float = 900) -> slurm.SlurmBackend:
        commands = slurm_commands.Commands([str(self.here / "prefix")], timeout_seconds)
        return slurm.SlurmBackend(self.root, commands, RENDERER, patience_seconds)

    def say(self, name: str, script: str = "") -> None:
        """squeue answers as slurmctld does when it is asked for a job of a number that `script` does not show."""
        if name == "squeue":
            unknown = "slurm_load_jobs error: Invalid job id specified"  # SLURM 22.05.8, exit status 1
            script = (
                f'said=$({script or ":"}); case "$*" in *--jobs=*) n=${{*##*--jobs=}}; n=${{n%% *}}; '
                f'said=$(grep "^$n|" <<<"$said") || {{ echo "{unknown}" >&2; exit 1; }} ;; esac; '
                '[ -z "$said" ] || echo "$said"'
            )
        fake(self.here, name, script)

    def row(
        self,
        number: int,
        state: str,
        record: directories.Record,
        reason: str = "None",
        name: str = "",
        start: str = "N/A",
    ) -> str:
        """A line of squeue, or of sacct, whose lines have no reason, as a command for the shell."""
        return f"echo '{number}|{state}|{start}|N/A|{reason}|{name or slurm_state.slurm_name(record)}'"

    def submit(self, jid: str = "chris-jid-1", script: str = "#!/bin/bash\n") -> directories.Record:
        self.backend.submit(named(jid), render.Spec("slurm", script))
        return directories.find(self.root, jid)

    def submitted(self) -> int:
        return len((self.here / "submitted").read_text().splitlines())


def named(jid: str) -> job.Job:
    return dataclasses.replace(render.sample_job(CONFIG), jid=jid, name=job.backend_name(jid), digest=jid)


def claim(record: directories.Record, word: str) -> str:
    """A command for the shell that takes the claim, as the script of the job does."""
    return f"mv -T {record.directory}/attempt.* {record.directory}/claim.{word} 2>/dev/null"


def run_shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True)
