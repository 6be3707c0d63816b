"""What the slurm backend says and understands, without SLURM: #SBATCH words, commands, the table of states."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman import job, policy, settings
from pman.backends import directories, slurm
from pman.backends.slurm import commands as slurm_commands
from pman.backends.slurm import sources, verdict, words
from pman.backends.slurm import state as slurm_state
from pman.errors import BackendError, BadRequest, Misconfigured, NotFound, TemplateError, Unreachable
from pman.status import JobState, JobStatus, Why
from pman.targets import TARGETS
from pman.targets import slurm as targets_slurm
from pman.templating import quote, render
from tests.generate import requests
from tests.rig import ROOT, wait_for

# "JOB STATE CODES" of squeue(1), SLURM 22.05, and what https://slurm.schedmd.com/job_state_codes.html adds.
DOCUMENTED = """BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING
PREEMPTED RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT
STOPPED
SUSPENDED TIMEOUT EXPEDITING LAUNCH_FAILED POWER_UP_NODE RECONFIG_FAIL UPDATE_DB"""


def read_by_sbatch(line: str) -> list[str]:
    r"""The words of the rest of a #SBATCH line, by sbatch's rules: quotes, # for comments, \ also inside quotes."""
    words: list[str] = []
    word, open_quote, escaped, started = "", "", False, False
    for character in line:
        if escaped:
            assert not character.isspace(), "SLURM 22.05.8 ends the word here"
            word, escaped = word + character, False
        elif character == "\\":
            escaped = started = True
        elif open_quote:
            if character == open_quote:
                open_quote = ""
            else:
                word += character
        elif character in "\"'":
            open_quote, started = character, True
        elif character == "#":
            break
        elif character.isspace() and character.isascii():
            words, word, started = ([*words, word] if started else words), "", False
        else:
            word, started = word + character, True
    assert not escaped
    assert not open_quote
    return [*words, word] if started else words


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_a_value_is_one_word_of_a_directive(value: str) -> None:
    assert read_by_sbatch(f"--comment={targets_slurm.sbatch(value)}") == [f"--comment={value}"]


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\x7f", "\t", "\0"])
def test_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        targets_slurm.sbatch(value)


CONFIG = settings.load({"STOREBASE": "/data/store", "JOB_LABELS": "site=it's #1,b=c", "SLURM_ACCOUNT": 'a "b" c'})
RENDERER = render.Renderer(CONFIG, TARGETS)


@given(requests(entrypoint=["sh"]))
def test_no_value_makes_a_directive(request: dict[str, object]) -> None:
    """sbatch reads #SBATCH lines up to the first line that is no comment."""
    made = job.make_job(job.validate(request), CONFIG)
    text = RENDERER.render(made, "slurm").text
    head = text[: text.index("\nset -u\n")].split("\n")
    assert head[0] == "#!/bin/bash"
    words = [read_by_sbatch(line.removeprefix("#SBATCH ")) for line in head[1:]]
    assert all(line.startswith("#SBATCH --") for line in head[1:])
    assert all(len(found) == 1 for found in words)
    names = [found[0].partition("=")[0] for found in words]
    assert len(names) == len(set(names))
    assert ['--account=a "b" c'] in words
    assert [f"--comment=org.chrisproject.pman.name={made.jid} site=it's #1 b=c"] in words


def test_every_documented_state_is_in_the_table() -> None:
    assert set(verdict.STATES) == set(DOCUMENTED.split())
    good = {name for name, (state, _) in verdict.STATES.items() if state is JobState.SUCCEEDED}
    assert good == {"COMPLETED"}
    failed = {name for name, (state, why) in verdict.STATES.items() if state is JobState.FAILED and why}
    assert {name for name in failed if isinstance(verdict.STATES[name][1], Why)} == failed


def test_names_of_nodes() -> None:
    listed = {"n1": ["n1"], "node[01-03,7],gpu1": ["node01", "node02", "node03", "node7", "gpu1"], "(null)": [], "": []}
    assert {text: list(slurm_commands.hosts(text)) for text in listed} == listed


def fake(directory: Path, name: str, script: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


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
        return slurm.SlurmBackend(self.root, commands, 1024, RENDERER, patience_seconds)

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


@pytest.fixture
def engine(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_job_has_the_name_that_its_script_says(engine: Fake) -> None:
    """The number of an earlier sbatch is found by that name in the accounts."""
    engine.say("sbatch", f"echo $* > {engine.here}/options; echo 10")
    record = engine.submit(script='#!/bin/bash\n#SBATCH --job-name=chris" "0.0123456789abcdef.j\n')
    name = f"chris 0.0123456789abcdef.j.{record.token}"
    assert f"--job-name={name} " in (engine.here / "options").read_text()
    assert [job.token for job in slurm_commands.parse_rows(f"10|RUNNING|N/A|N/A|None|{name}")] == [record.token]


@pytest.mark.slow
@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("earlier", ["FAILED", "PENDING"])
def test_a_claim_that_is_younger_than_the_queue(engine: Fake, earlier: str, listing: bool) -> None:
    """Two SLURM jobs of one attempt: the second one begins while SLURM tells of the first one."""
    record = engine.submit()
    first, second = engine.row(10, earlier, record), engine.row(11, "RUNNING", record)
    engine.say("squeue", f"{first}; {claim(record, '11')} || {second}")
    status = engine.backend.jobs(1)[0] if listing else engine.backend.status(record.jid)
    assert status.state is JobState.STARTED


def test_an_owner_that_only_the_accounts_know(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "11"))
    engine.say("squeue", engine.row(10, "FAILED", record))
    engine.say("sacct", f"{engine.row(10, 'FAILED', record)}; {engine.row(11, 'OUT_OF_MEMORY', record)}")
    assert "more memory" in engine.backend.status(record.jid).message


@pytest.mark.slow
@pytest.mark.parametrize("retry", ["POST", "GET"])
def test_refused_because_an_earlier_sbatch_got_through(engine: Fake, retry: str) -> None:
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", ""))
    made = directories.find(engine.root, "j")
    engine.say("sbatch", f"{claim(made, '77')}; echo 'sbatch: error: invalid partition' >&2; exit 1")
    engine.say("squeue", f"[ ! -e {made.directory}/claim.77 ] || {engine.row(77, 'RUNNING', made)}")
    if retry == "POST":
        engine.submit("j")
    else:
        engine.backend.status("j")
    assert engine.backend.status("j").state is JobState.STARTED
    assert (made.directory / "slurm_id").read_text() == "77"


@pytest.mark.parametrize("said", ["10", "10;cluster", "Welcome.\n10\nThis job is charged to nobody."])
def test_the_number_among_what_sbatch_says(engine: Fake, said: str) -> None:
    """A federated cluster adds its name, and a site's plug-ins and wrappers what they like."""
    engine.say("sbatch", f"echo x >> submitted; echo '{said}'")
    assert read_number(engine.submit()) == "10"
    assert engine.submitted() == 1


def test_a_wrapper_that_takes_no_parsable(engine: Fake) -> None:
    """Its words are no number that can be relied on: the job is looked for by its name, and not submitted again."""
    engine.say("sbatch", "echo x >> submitted; echo Submitted batch job 10")
    with pytest.raises(Unreachable, match="did not say the number"):
        engine.submit()
    engine.say("squeue", engine.row(10, "RUNNING", directories.find(engine.root, "chris-jid-1")))
    assert read_number(engine.submit()) == "10"
    assert engine.submitted() == 1


def read_number(record: directories.Record) -> str:
    return (record.directory / "slurm_id").read_text()


def test_refused_for_good(engine: Fake) -> None:
    engine.say("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(BadRequest, match="invalid partition"):
        engine.submit("j")
    with pytest.raises(NotFound):
        engine.backend.status("j")


def test_a_directory_without_a_job(engine: Fake) -> None:
    (engine.root / "chris-jid-1" / "x").mkdir(parents=True)
    with pytest.raises(BackendError, match="in the way"):
        engine.submit()


@pytest.mark.parametrize(
    ("script", "lasts"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", True),
        ("echo 'sacct: error: Operation not permitted' >&2; exit 1", True),
        ("echo 'sh: 1: sacct: not found: No such file or directory' >&2; exit 127", True),
        ("echo 'sacct: error: Unknown cluster' >&2; exit 1", False),
        ("echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1", False),
        ("exec sleep 30", False),
    ],
)
def test_accounts_that_do_not_answer(engine: Fake, caplog: pytest.LogCaptureFixture, script: str, lasts: bool) -> None:
    """Nothing is judged by what the accounts could not say now; where there are none, that is said once."""
    first, second = engine.submit("first"), engine.submit("second")
    for record in (first, second):
        run_shell(claim(record, "10"))
    engine.say("sacct", script)
    engine.backend = engine.make(timeout_seconds=3)
    if not lasts:
        with pytest.raises(Unreachable):
            engine.backend.status("first")
        assert [status.state for status in engine.backend.jobs(10)] == [JobState.STARTED] * 2
        return
    assert engine.backend.status("first").state is JobState.FAILED
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.FAILED] * 2
    assert len([message for message in caplog.messages if "without SLURM's accounts" in message]) == 1


def test_accounts_whose_command_is_not_there(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (engine.here / "sacct").unlink()
    assert engine.backend.status(record.jid).state is JobState.FAILED


@pytest.mark.parametrize(("age_seconds", "state"), [(60, JobState.STARTED), (7200, JobState.FAILED)])
def test_a_runaway_record_of_the_accounts(engine: Fake, age_seconds: float, state: JobState) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    make_older(record, age_seconds)
    engine.say("sacct", engine.row(10, "RUNNING", record))
    assert engine.backend.status(record.jid).state is state


def make_older(record: directories.Record, age_seconds: float) -> None:
    path = record.directory / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created_at": time.time() - age_seconds}))


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("age_seconds", [0, 7200])
@pytest.mark.parametrize("accounts", ["RUNNING", ""])
def test_an_empty_answer_proves_nothing(engine: Fake, begun: bool, age_seconds: float, accounts: str) -> None:
    """squeue says nothing with exit status 0, as SLURM 22.05 does for a user who does not see the partition."""
    record = engine.submit()
    if begun:
        run_shell(claim(record, "10"))
    make_older(record, age_seconds)
    if accounts:
        engine.say("sacct", engine.row(10, accounts, record))
    fake(engine.here, "squeue", "exit 0")
    with pytest.raises(Unreachable, match="SLURM does not say what has become of its job 10"):
        engine.backend.status(record.jid)
    listed = engine.backend.jobs(10)
    assert [status.state for status in listed] == [JobState.STARTED if begun else JobState.NOT_STARTED]
    assert "job 10" in listed[0].message
    with pytest.raises(Unreachable):
        engine.backend.delete(record.jid)
    engine.say("squeue", engine.row(10, "CANCELLED", record))
    engine.backend.delete(record.jid)
    with pytest.raises(NotFound):
        engine.backend.status(record.jid)


@pytest.mark.parametrize("name", ["site-{}", "{}@site", "another-name"])
def test_a_job_is_found_by_its_number(engine: Fake, name: str) -> None:
    """Whatever a plug-in has made of its name, and also where the list of all jobs lacks it."""
    record = engine.submit()
    run_shell(claim(record, "10"))
    running = engine.row(10, "RUNNING", record, name=name.format(slurm_state.slurm_name(record)))
    engine.say("squeue", running)
    assert engine.backend.status(record.jid).state is JobState.STARTED
    fake(engine.here, "squeue", f'case "$*" in *--jobs=10*) {running} ;; esac')
    assert engine.backend.status(record.jid).state is JobState.STARTED
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.STARTED]


def test_the_commands_that_look_for_jobs_see_hidden_partitions(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    fake(engine.here, "squeue", f'case "$*" in *--all*) {engine.row(10, "RUNNING", record)} ;; esac')
    assert engine.backend.status(record.jid).state is JobState.STARTED


def test_a_delete_waits_for_the_end_of_the_number(engine: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "END_SECONDS", 1.0)
    record = engine.submit()
    run_shell(claim(record, "10"))
    running = engine.row(10, "RUNNING", record, name="renamed")
    fake(engine.here, "squeue", f'case "$*" in *--jobs=10*) {running} ;; esac')
    with pytest.raises(Unreachable, match="SLURM has not ended job 10 within 1 s; delete it again"):
        engine.backend.delete(record.jid)
    assert (engine.here / "cancelled").read_text() == "10\n"
    assert engine.backend.status(record.jid).state is JobState.STARTED
    engine.say("squeue")
    engine.backend.delete(record.jid)
    assert list(engine.root.iterdir()) == []


def test_one_that_cannot_be_judged_does_not_spoil_the_listing(engine: Fake) -> None:
    good, bad = engine.submit("good"), engine.submit("bad")
    run_shell(claim(good, "10"))
    run_shell(claim(bad, "11"))
    shown = engine.row(10, "RUNNING", good)
    fake(engine.here, "squeue", f'case "$*" in *--jobs=*) echo oh no >&2; exit 1 ;; esac; {shown}')
    found = {status.jid: status for status in engine.backend.jobs(10)}
    assert [found[jid].state for jid in ("good", "bad")] == [JobState.STARTED, JobState.STARTED]
    assert "oh no" in found["bad"].message


def test_a_listing_asks_for_few_jobs_by_their_numbers(engine: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LOOKS_AT_ONCE", 2)
    for number in range(4):
        record = engine.submit(f"j{number}")
        run_shell(claim(record, str(100 + number)))
    engine.say("squeue", f"echo $* >> {engine.here}/asked")
    states = [status.state for status in engine.backend.jobs(100)]
    assert states.count(JobState.FAILED) == 2
    assert states.count(JobState.STARTED) == 2
    assert (engine.here / "asked").read_text().count("--jobs=") == 2
    assert {status.state for status in engine.backend.jobs(100)} == {JobState.FAILED}


@pytest.mark.parametrize(("age_seconds", "state"), [(0, JobState.STARTED), (6, JobState.SUCCEEDED)])
def test_an_epilog_that_takes_its_time(engine: Fake, age_seconds: float, state: JobState) -> None:
    """The script has ended, and SLURM has ended what the script left: the node's epilog writes no output."""
    record = engine.submit()
    run_shell(f"{claim(record, '10')}; echo 0 > {record.directory}/rc")
    os.utime(record.directory / "rc", (time.time() - age_seconds,) * 2)
    engine.say("squeue", engine.row(10, "COMPLETING", record))
    assert engine.backend.status(record.jid).state is state
    engine.backend.delete(record.jid)
    assert list(engine.root.iterdir()) == []


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "BadConstraints", "QOSMaxMemoryPerJob", "AssocMaxCpuPerJobLimit"]
)
def test_a_job_that_waits_in_vain(engine: Fake, reason: str) -> None:
    record = engine.submit()
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.NOT_STARTED, f"Waiting in SLURM's queue: {reason}.")
    engine.say("squeue", engine.row(10, "PENDING", record, "Priority"))
    wait_for(lambda: "Priority" in engine.backend.status(record.jid).message, 10, "the next list")
    assert not (record.directory / "stuck").exists()  # patience begins anew
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    wait_for(lambda: reason in engine.backend.status(record.jid).message, 10, "the next list")
    os.utime(record.directory / "stuck", (time.time() - 901,) * 2)
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (
        JobState.FAILED,
        f"SLURM cannot start the job: {reason}. pman gave it up after 15 min.",
    )
    assert (engine.here / "cancelled").read_text() == "10\n"
    assert engine.backend.status(record.jid) == status


@pytest.mark.parametrize(
    "reason",
    ["JobHeldAdmin", "launch_failed_requeued_held", "PartitionNodeLimit", "Resources", "QOSMaxCpuPerUserLimit"],
)
def test_a_reason_that_somebody_or_time_may_heal(engine: Fake, reason: str) -> None:
    engine.backend = engine.make(patience_seconds=0)
    record = engine.submit()
    engine.say("squeue", engine.row(10, "PENDING", record, reason))
    status = engine.backend.status(record.jid)
    assert (status.state, reason in status.message) == (JobState.NOT_STARTED, True)
    assert ("Somebody has to release it." in status.message) == (reason in words.BY_HAND)


REQUEUING = "#!/bin/bash\n#SBATCH --requeue\n"


def test_a_job_that_slurm_begins_again(engine: Fake) -> None:
    """Back in the queue it is not started, whatever its first start has left; then the second start counts."""
    record = engine.submit(script=REQUEUING)
    run_shell(f"{claim(record, '10')}; echo '143 ended by a signal' > {record.directory}/rc")
    os.utime(record.directory / "rc", (time.time() - 600,) * 2)
    fake(engine.here, "squeue", "exit 0")
    with pytest.raises(Unreachable):
        engine.backend.status(record.jid)
    engine.say("squeue", engine.row(10, "PENDING", record, "BeginTime"))
    status = wait_for(lambda: suppressed(engine, record), 10, "the next list")
    assert (status.state, status.message) == (JobState.NOT_STARTED, verdict.REQUEUED)
    engine.say("squeue", engine.row(10, "RUNNING", record, start=str(int(time.time()))))
    wait_for(lambda: engine.backend.status(record.jid).state is JobState.STARTED, 10, "the next list")
    run_shell(f"echo '0 ' > {record.directory}/rc")
    engine.say("squeue", engine.row(10, "COMPLETED", record))
    wait_for(lambda: engine.backend.status(record.jid).state is JobState.SUCCEEDED, 10, "the next list")


def suppressed(engine: Fake, record: directories.Record) -> JobStatus | None:
    with contextlib.suppress(Unreachable):
        return engine.backend.status(record.jid)
    return None


@pytest.mark.parametrize(
    ("state", "result", "log"),
    [
        ("OUT_OF_MEMORY", "0 ", ""),  # a child was killed, and the shell went on: SLURM's accounting knows
        ("OUT_OF_MEMORY", "137 ", ""),
        # cgroup v2, 22.05.8 and 24.11.5: the job of a step of which a process was killed is COMPLETED
        ("COMPLETED", "0 ", "slurmstepd-localhost: error: Detected 1 oom-kill event(s) in StepId=10.0. Some of your "
         "processes may have been killed by the cgroup out-of-memory handler."),
        ("COMPLETED", "0 ", "slurmstepd-localhost: error: Detected 1 oom_kill event in StepId=10.0. Some of the step "
         "tasks have been OOM Killed."),
        ("FAILED", "137 ", "slurmstepd-localhost: error: Exceeded job memory limit\nsrun: error: localhost: tasks 0-1: "
         "Killed"),  # SLURM 22.05.8, two workers
        ("FAILED", "137 ", "srun: error: n1: task 0: Out Of Memory"),
        ("FAILED", "", "slurmstepd-localhost: error: Exceeded job memory limit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forgotten", [False, True])
def test_one_sentence_for_too_much_memory(engine: Fake, state: str, result: str, log: str, forgotten: bool) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (record.directory / "slurm-10.log").write_text(f"a line of the script\n{log}\n")
    if result:
        (record.directory / "rc").write_text(f"{result}\n")
    engine.say("sacct" if forgotten else "squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.FAILED, "The job used more memory than its limit.")


@pytest.mark.parametrize("log", ["slurmstepd: error: *** JOB 10 CANCELLED ***", "I ran out of memory\n", ""])
def test_no_word_of_memory(engine: Fake, log: str) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    (record.directory / "slurm-10.log").write_text(log)
    (record.directory / "rc").write_text("0 \n")
    engine.say("squeue", engine.row(10, "COMPLETED", record))
    assert engine.backend.status(record.jid).state is JobState.SUCCEEDED


@pytest.mark.parametrize("retry", ["POST", "GET"])
def test_a_mended_template_is_used_for_what_slurm_never_took(engine: Fake, retry: str) -> None:
    mended = RENDERER.render(named("j"), "slurm").text
    engine.say("sbatch", "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1")
    with pytest.raises(Unreachable):
        engine.submit("j", script="#!/bin/bash\necho old\n")
    record = directories.find(engine.root, "j")
    engine.say("sbatch", f"cat > {engine.here}/script; echo 10")
    if retry == "POST":
        engine.submit("j", script=mended)
    else:
        assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert (engine.here / "script").read_text() == mended
    assert directories.find(engine.root, "j") == record
    assert (record.directory / "job.sh").read_text() == mended


def test_a_job_is_kept_as_the_rules_left_it(engine: Fake) -> None:
    binds, tolerations = (policy.Bind("/data/é", "/data", read_only=True),), ({"key": "a", "value": "\u2028'"},)
    decided = policy.Policy(
        account="a", nice=5, modules=("m",), binds=binds, tolerations=tolerations, labels={"l": "m"}
    )
    made = dataclasses.replace(named("j"), policy=decided, env=(("A", "é\n'"),), partition="p", gpu_count=2)
    engine.backend.submit(made, render.Spec("slurm", "#!/bin/bash\n"))
    assert directories.posted(directories.find(engine.root, "j")) == made


@pytest.mark.parametrize("got_through", [False, True])
def test_a_template_that_broke_since(engine: Fake, tmp_path: Path, got_through: bool) -> None:
    """The jid is free again, unless an earlier sbatch was heard after all."""
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", "#!/bin/bash\n"))
    (tmp_path / "overlay/slurm").mkdir(parents=True)
    text = '{% extends "shipped/slurm/job.sh.j2" %}{% block limits %}{{ nothing.here }}{% endblock %}'
    (tmp_path / "overlay/slurm/job.sh.j2").write_text(text)
    broken = render.Renderer(settings.load({"TEMPLATES_DIR": str(tmp_path / "overlay")}), TARGETS)
    commands = slurm_commands.Commands([str(tmp_path / "prefix")], 20)
    backend = slurm.SlurmBackend(engine.root, commands, 1024, broken)
    if got_through:
        made = directories.find(engine.root, "j")
        engine.say("sacct", claim(made, "77"))  # asked before the script is made
        assert backend.status("j").state is JobState.NOT_STARTED
        assert (made.directory / "slurm_id").read_text() == "77"
    else:
        with pytest.raises(TemplateError, match=r"slurm/job\.sh\.j2:1: .*nothing"):
            backend.status("j")
        assert list(engine.root.iterdir()) == []


def test_what_got_through_is_not_rendered_again(engine: Fake) -> None:
    engine.say("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(Unreachable):
        engine.submit("j", script="#!/bin/bash\necho old\n")
    record = directories.find(engine.root, "j")
    engine.say("squeue", engine.row(10, "PENDING", record))
    engine.say("sbatch", f"touch {engine.here}/again; echo 11")
    assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert not (engine.here / "again").exists()
    assert (record.directory / "job.sh").read_text() == "#!/bin/bash\necho old\n"
    assert (record.directory / "slurm_id").read_text() == "10"


def test_a_job_of_an_older_pman_is_submitted_with_the_script_that_it_kept(engine: Fake) -> None:
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", "#!/bin/bash\necho kept\n"))
    (directories.find(engine.root, "j").directory / "posted.json").unlink()
    engine.say("sbatch", f"cat > {engine.here}/script; echo 10")
    assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert (engine.here / "script").read_text() == "#!/bin/bash\necho kept\n"


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_template_that_sbatch_refuses_leaves_nothing(engine: Fake, method: str) -> None:
    if method == "GET":
        assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", ""))
    engine.say("sbatch", "echo \"sbatch: unrecognized option '--acount=x'\" >&2; exit 255")
    with pytest.raises(TemplateError, match=r"slurm/job\.sh\.j2: .*unrecognized option '--acount=x'"):
        engine.submit("j") if method == "POST" else engine.backend.status("j")
    assert list(engine.root.iterdir()) == []


@pytest.mark.slow
def test_a_slow_delete_keeps_nobody_waiting(engine: Fake) -> None:
    ending, other = engine.submit("ending"), engine.submit("other")
    run_shell(claim(other, "11"))
    still = f"[ -e {engine.here}/gone ] || {engine.row(10, 'RUNNING', ending)}"
    engine.say("squeue", f"sleep 0.2; {still}; {engine.row(11, 'RUNNING', other)}")
    engine.say("scancel", f"touch {engine.here}/cancelled")
    with ThreadPoolExecutor(1) as pool:
        delete = pool.submit(engine.backend.delete, "ending")
        wait_for((engine.here / "cancelled").exists, 10, "the DELETE to be at work")
        looks, deadline = 0, time.monotonic() + 3
        while time.monotonic() < deadline:
            assert engine.backend.status("other").state is JobState.STARTED
            looks += 1
        (engine.here / "gone").touch()
        delete.result(30)
    assert looks > 20


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT"])
def test_a_job_has_started_when_its_script_has(engine: Fake, state: str) -> None:
    """SLURM may still fail to launch it, be COMPLETING, and queue it again; and another list may be older than this."""
    record = engine.submit()
    engine.say("squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state, status.message) == (JobState.NOT_STARTED, verdict.STATES[state][1] or verdict.LAUNCHING)
    assert [listed.state for listed in engine.backend.jobs(10)] == [JobState.NOT_STARTED]
    run_shell(claim(record, "10"))
    assert engine.backend.status(record.jid).state is JobState.STARTED


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_result_before_slurm_has_cleaned_up(engine: Fake, state: str) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    slurm_state.write(record.directory / "rc", "0 \n")
    engine.say("squeue", engine.row(10, state, record))
    assert engine.backend.status(record.jid).state is JobState.STARTED


@pytest.mark.parametrize(
    ("state", "said", "message"),
    [
        ("FAILED", "3 \n", "The job ended with exit code 3."),
        ("CANCELLED", "143 ended by a signal\n", "The job was cancelled in SLURM."),
        ("SUSPENDED", "3 \n", "The job ended with exit code 3."),  # old enough that SLURM's state does not matter
        ("COMPLETED", "0 \n", ""),
        # The command took SLURM's signal for a wish to end well, before the script heard of it.
        ("CANCELLED", "0 \n", "The job was cancelled in SLURM."),
        ("TIMEOUT", "0 \n", "The job was ended by its time limit."),
        ("PREEMPTED", "0 \n", "The job was preempted by another one in SLURM."),
        ("NODE_FAIL", "0 \n", "A node of the job failed."),
    ],
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_whose_explanation_counts(engine: Fake, state: str, said: str, message: str, forgotten: bool) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    slurm_state.write(record.directory / "rc", said)
    os.utime(record.directory / "rc", (0, 0))
    engine.say("sacct" if forgotten else "squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state is JobState.SUCCEEDED, status.message) == (not message, message)


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_ran_and_is_held(engine: Fake, state: str) -> None:
    record = engine.submit()
    engine.say("squeue", engine.row(10, state, record))
    assert engine.backend.status(record.jid).state is JobState.NOT_STARTED
    run_shell(claim(record, "10"))
    status = engine.backend.status(record.jid)
    assert (status.state, "held in SLURM" in status.message) == (JobState.FAILED, True)


def test_a_delete_that_was_interrupted(engine: Fake) -> None:
    record = engine.submit()
    assert slurm_state.close(record, slurm_state.DELETED) is None
    with pytest.raises(NotFound):
        engine.backend.status(record.jid)
    assert engine.backend.jobs(10) == []
    assert engine.submit().token != record.token
    assert engine.submitted() == 2


@pytest.mark.parametrize("refused", [False, True])
def test_the_lock_is_closed_before_its_file_goes(engine: Fake, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """NFS keeps a file that is open, and with it the directory."""
    removed, still_open = list[Path](), list[str]()

    def look(path: Path, **_: object) -> None:
        removed.append(path)
        links = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        still_open.extend(os.readlink(link) for link in links if link.is_symlink())

    monkeypatch.setattr(shutil, "rmtree", look)
    if refused:
        engine.say("sbatch", "exit 1")
        with pytest.raises(BadRequest):
            engine.submit()
    else:
        engine.backend.delete(engine.submit().jid)
    assert len(removed) == 1
    assert not [path for path in still_open if path.startswith(str(removed[0]))]


def test_a_verdict_that_was_interrupted(engine: Fake) -> None:
    """Killed between shutting the attempt and writing down that it is lost."""
    record = engine.submit()
    assert slurm_state.close(record, slurm_state.LOST) is None
    assert "never began" in engine.backend.status(record.jid).message
    assert engine.submit() == record
    assert engine.submitted() == 1


@pytest.mark.parametrize("left", ["", '{"state":'])
def test_a_verdict_that_a_power_cut_has_emptied(engine: Fake, left: str) -> None:
    record = engine.submit()
    run_shell(f"{claim(record, '10')}; echo 3 > {record.directory}/rc")
    (record.directory / f"final.{record.token}").write_text(left)
    assert [status.message for status in engine.backend.jobs(10)] == ["The job ended with exit code 3."]
    assert engine.backend.status(record.jid) == engine.backend.jobs(10)[0]


def test_a_job_that_writes_over_what_is_kept_of_it(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    for name in ("ending", "slurm_id"):
        (record.directory / name).write_bytes(b"\xff")
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.FAILED]


FULL_DISK = """
import pathlib, sys, pytest
from pman.errors import NotFound, Unreachable
from tests.backends.test_slurm import Fake, claim, run_shell
engine = Fake(pathlib.Path(sys.argv[1]))
record = engine.submit()
run_shell(f"{claim(record, '10')}; echo 0 > {record.directory}/rc")
with pytest.raises(OSError):
    for number in range(1000):
        (engine.here / f"fill{number}").touch()
assert engine.backend.status(record.jid).state == "finishedSuccessfully"
with pytest.raises(Unreachable, match="cannot be written: No space left on device"):
    engine.submit("other")
engine.backend.delete(record.jid)
with pytest.raises(NotFound):
    engine.backend.status(record.jid)
assert list(engine.root.iterdir()) == []
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """An end that is known is answered, what cannot be written is said as what it is, and a DELETE makes room."""
    line = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*line, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    mount = f"mount -t tmpfs -o nr_inodes=100 none {tmp_path} && exec {sys.executable} - {tmp_path}"
    done = subprocess.run([*line, mount], cwd=ROOT, input=FULL_DISK, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_listing_beside_a_delete(engine: Fake) -> None:
    """Its files go while they are read."""
    gone, left = engine.submit("gone"), engine.submit("left")
    (gone.directory / "slurm_id").unlink()
    (gone.directory / "slurm_id").symlink_to("nowhere")
    engine.say("squeue", engine.row(10, "PENDING", left))
    assert [status.jid for status in engine.backend.jobs(10)] == ["left"]


def test_a_state_directory_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Misconfigured, match=r"must be on a file system with flock: No locks available\."):
        Fake(tmp_path)
