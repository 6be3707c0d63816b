"""What SLURM's commands say, whose fault a refusal is, and commands that hang or are missing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman.backends.slurm import commands as slurm_commands
from pman.backends.slurm import verdict, words
from pman.errors import BackendError, BadRequest, TemplateError, Unreachable
from pman.status import JobState, Why
from pman.templating import quote, render
from tests.backends.slurm.fake import CONFIG, RENDERER, fake

# "JOB STATE CODES" of squeue(1), SLURM 22.05, and what https://slurm.schedmd.com/job_state_codes.html adds.
DOCUMENTED = """BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING
PREEMPTED RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT
STOPPED
SUSPENDED TIMEOUT EXPEDITING LAUNCH_FAILED POWER_UP_NODE RECONFIG_FAIL UPDATE_DB"""


def test_every_documented_state_is_in_the_table() -> None:
    assert set(verdict.STATES) == set(DOCUMENTED.split())
    good = {name for name, (state, _) in verdict.STATES.items() if state is JobState.SUCCEEDED}
    assert good == {"COMPLETED"}
    failed = {name for name, (state, why) in verdict.STATES.items() if state is JobState.FAILED and why}
    assert {name for name in failed if isinstance(verdict.STATES[name][1], Why)} == failed


def test_names_of_nodes() -> None:
    listed = {"n1": ["n1"], "node[01-03,7],gpu1": ["node01", "node02", "node03", "node7", "gpu1"], "(null)": [], "": []}
    assert {text: list(slurm_commands.hosts(text)) for text in listed} == listed


def test_rows_of_squeue_and_sacct() -> None:
    token = "0123456789abcdef"
    rows = (
        f"812|CANCELLED by 0|1795482840|1795482846|None|chris-jid-1.{token}",
        f"813|PENDING|N/A|N/A|Nodes required for job are DOWN, DRAINED|site_{token}.x-job.{token}_chris|y",
        "814|RUNNING|1795482840|N/A|None|somebody else's",
        f"815|COMPLETED|1795482840|1795482846|chris-jid-1.{token}",
        "Welcome to the cluster | please read the news",
    )
    found = list(slurm_commands.parse_rows("\n".join(rows)))
    assert [(j.id, j.state, j.reason, j.token) for j in found] == [
        ("812", "CANCELLED", "None", token),
        ("813", "PENDING", "Nodes required for job are DOWN, DRAINED", token),
        ("814", "RUNNING", "None", ""),
        ("815", "COMPLETED", "", token),
    ]
    assert found[0].ended_at is not None
    assert found[1].ended_at is None


# Words of sbatch, its exit status, the error. Those of status 255 and most others: SLURM 22.05.8.
SUBMITTING = "sbatch: error: Batch job submission failed: "
REFUSED: list[tuple[str, int, type[Exception]]] = [
    (SUBMITTING + "Invalid partition name specified", 1, BadRequest),
    ("sbatch: error: invalid partition specified: standby", 1, BadRequest),
    ("sbatch: error: invalid partition specified: munge-communication", 1, BadRequest),
    ("sbatch: error: invalid partition specified: QOSMaxSubmit", 1, BadRequest),
    (SUBMITTING + "Requested node configuration is not available", 1, BadRequest),
    (SUBMITTING + "Invalid account or account/partition combination specified", 1, BadRequest),
    ("sbatch: error: AssocMaxCpuPerJobLimit\n" + SUBMITTING + "Job violates accounting/QOS policy (job submit limit, "
     "user's size and/or time limits)", 1, BadRequest),
    ("sbatch: error: a rule of this site that nobody has written down", 1, BadRequest),
    ("sbatch: error: Unable to contact slurm controller (connect failure)", 1, Unreachable),
    (SUBMITTING + "Socket timed out on send/recv operation", 1, Unreachable),
    (SUBMITTING + "Slurm backup controller in standby mode", 1, Unreachable),
    ("sbatch: error: If munged is up, restart it\nsbatch: error: Munge encode failed: x", 1, Unreachable),
    ("sbatch: error: Problem talking to the database: Connection refused", 1, Unreachable),
    ("sbatch: fatal: Could not establish a configuration source", 1, Unreachable),
    (SUBMITTING + "Unable to connect to database", 1, Unreachable),
    (SUBMITTING + "Transport endpoint is not connected", 1, Unreachable),
    (SUBMITTING + "I/O error writing script/environment to file", 1, Unreachable),
    (SUBMITTING + "No route to host", 1, Unreachable),
    (SUBMITTING + "Required partition not available (inactive or drain)", 1, Unreachable),
    ("sbatch: error: AssocMaxSubmitJobLimit\n" + SUBMITTING + "Job violates accounting/QOS policy (job submit limit, "
     "user's size and/or time limits)", 1, Unreachable),
    ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n" + SUBMITTING + "Job violates accounting policy", 1, Unreachable),
    ("sbatch: unrecognized option '--acount=x'\nTry \"sbatch --help\" for more information", 255, TemplateError),
    ("sbatch: error: Invalid --mem specification", 255, TemplateError),
    ('sbatch: error: "a" is not a valid node count', 255, TemplateError),
    ("sbatch: error: Invalid directive found in batch script: account", 255, TemplateError),
    ("sbatch: error: something that only a later version says", 255, TemplateError),
    ("sbatch: fatal: --mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive.", 1, TemplateError),
    (SUBMITTING + "Invalid feature specification", 1, TemplateError),
    (SUBMITTING + "Requested reservation is invalid", 1, TemplateError),
    (SUBMITTING + "Invalid license specification", 1, TemplateError),
    ("env: 'sbatch': No such file or directory", 127, BackendError),
]  # fmt: skip


@pytest.mark.parametrize(("said", "code", "error"), REFUSED)
@pytest.mark.parametrize("program", ["sudo", "ssh"])
def test_whose_fault_a_refusal_is(tmp_path: Path, program: str, said: str, code: int, error: type[Exception]) -> None:
    """ssh hands on the exit status of its command, so that one of 255 tells nothing by itself."""
    prefix = fake(tmp_path, program, f"echo {quote.sh(said)} >&2; exit {code}")
    with pytest.raises(error, match=re.escape(said.splitlines()[0].rpartition(": ")[2])):
        slurm_commands.Commands([prefix], 5).sbatch("#!/bin/sh\n")


@pytest.mark.parametrize(
    "said",
    [
        "ssh: connect to host login1 port 22: No route to host",
        "kex_exchange_identification: Connection closed by remote host",
        "chris@login1: Permission denied (publickey).",
        "Host key verification failed.",
        "Connection closed by 10.0.0.7 port 22",
        "client_loop: send disconnect: Broken pipe",
        "",
    ],
)
def test_a_connection_of_ssh_that_fails(tmp_path: Path, said: str) -> None:
    prefix = fake(tmp_path, "ssh", f"echo {quote.sh(said)} >&2; exit 255")
    with pytest.raises(Unreachable):
        slurm_commands.Commands([prefix], 5).sbatch("#!/bin/sh\n")


def test_a_limit_of_jobs_is_tried_again_later(tmp_path: Path) -> None:
    prefix = fake(tmp_path, "prefix", "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1")
    with pytest.raises(Unreachable, match="SLURM takes no more jobs of pman's user for now: AssocMax") as caught:
        slurm_commands.Commands([prefix], 5).sbatch("#!/bin/sh\n")
    assert caught.value.retry_after_seconds > 1


def test_every_row_of_the_refusals_names_its_source() -> None:
    assert {fault for _, fault, _ in words.REFUSALS} == {words.Fault.PASSING, words.Fault.TEMPLATE}
    assert all(source for _, _, source in words.REFUSALS)


@pytest.mark.parametrize("option", ["--clusters=a,b", "--comment=x --cluster=b", "-M a"])
def test_another_cluster_is_refused_before_it_gets_the_job(tmp_path: Path, option: str) -> None:
    prefix = fake(tmp_path, "prefix", f"touch {tmp_path}/called; echo '10;b'")
    with pytest.raises(TemplateError, match="a pman for each cluster"):
        slurm_commands.Commands([prefix], 5).sbatch(f"#!/bin/bash\n#SBATCH {option}\ntrue\n")
    assert not (tmp_path / "called").exists()


def test_what_the_commands_know_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script drops again what is for the commands alone."""
    given = {name: f"value of {name}" for name in (*slurm_commands.COMMANDS_ONLY, "SLURM_CONF")}
    for name, value in (given | {"SBATCH_PARTITION": "x", "SECRET_KEY": "x"}).items():
        monkeypatch.setenv(name, value)
    text = slurm_commands.Commands([fake(tmp_path, "prefix", "env")], 5).run("squeue")
    found = dict(line.split("=", 1) for line in text.splitlines())
    assert given.items() <= found.items()
    assert not {"SBATCH_PARTITION", "SECRET_KEY"} & set(found)
    script = RENDERER.render(render.sample_job(CONFIG), "slurm").text
    dropped = [line.split()[1:] for line in script.splitlines() if line.strip().startswith("unset SLURM_JWT")]
    assert [{*slurm_commands.COMMANDS_ONLY, "LC_ALL", "LD_LIBRARY_PATH"} <= set(names) for names in dropped] == [True]


def test_a_command_that_hangs_or_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="longer than"):
        slurm_commands.Commands([fake(tmp_path, "prefix", "exec sleep 60")], 0.2).run("squeue")
    with pytest.raises(BackendError, match="cannot be run"):
        slurm_commands.Commands([str(tmp_path / "none")], 5).run("squeue")
    with pytest.raises(Unreachable, match="does not answer"):
        slurm_commands.Commands([fake(tmp_path, "prefix", "kill -KILL $$")], 5).run("squeue")


def test_what_a_command_leaves_behind(tmp_path: Path) -> None:
    """As ssh does its master connection; older ones leave it the standard error."""
    prefix = fake(
        tmp_path, "prefix", f"sleep 600 & echo $! >> {tmp_path}/pids; echo said; echo refused >&2; exit $CODE"
    )
    try:
        with pytest.raises(slurm_commands.Failed, match="squeue failed: refused"):
            slurm_commands.Commands(["env", "CODE=1", prefix], 20).run("squeue")
        assert slurm_commands.Commands(["env", "CODE=0", prefix], 20).run("squeue") == "said\n"
    finally:
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=5))
def test_ssh_gets_one_word_that_its_shell_takes_apart_again(words: list[str]) -> None:
    line = slurm_commands.Commands(["ssh", "login1"], 5).line(["printf", "%s\\0", *words])
    assert line[:2] == ["ssh", "login1"]
    assert len(line) == 3
    if words:
        printed = subprocess.run(["sh", "-c", line[2]], capture_output=True, check=True).stdout
        assert printed.split(b"\0")[:-1] == [word.encode() for word in words]
