"""What the slurm backend says and understands, without SLURM: #SBATCH words, commands, the table of states."""

from __future__ import annotations

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

from pman import job, settings
from pman.backends import directories, slurm
from pman.backends.slurm import commands as slurm_commands
from pman.backends.slurm import state as slurm_state
from pman.errors import BackendError, BadRequest, Misconfigured, NotFound, Unreachable
from pman.status import JobState
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
    assert set(slurm.STATES) == set(DOCUMENTED.split())
    good = {name for name, (state, _) in slurm.STATES.items() if state is JobState.SUCCEEDED}
    assert good == {"COMPLETED"}


def fake(directory: Path, name: str, script: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_rows_of_squeue_and_sacct(tmp_path: Path) -> None:
    made = directories.create(tmp_path, render.sample_job(CONFIG), render.Spec("slurm", ""))
    assert made
    name = slurm_state.slurm_name(made)
    rows = (
        f"812|CANCELLED by 0|1795482846|{name}|None",
        f"813|PENDING|N/A|{name}|Nodes required for job are DOWN, DRAINED|x",
        "814|RUNNING|N/A|somebody else's|None",
        f"815|COMPLETED|1795482846|{name}",
    )
    found = list(slurm_commands.parse_rows("\n".join(rows)))
    assert [(j.id, j.state, j.reason) for j in found] == [
        ("812", "CANCELLED", "None"),
        ("813", "PENDING", "Nodes required for job are DOWN, DRAINED|x"),
        ("815", "COMPLETED", ""),
    ]
    assert found[0].ended_at is not None
    assert found[1].ended_at is None


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", 1, BadRequest),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", 1, Unreachable),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1, Unreachable),
        ("ssh: connect to host login1 port 22: No route to host", 255, Unreachable),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", 1, BadRequest),
        ("sbatch: error: Batch job submission failed: Slurm backup controller in standby mode", 1, Unreachable),
        ("sbatch: error: If munged is up, restart it\nsbatch: error: Munge encode failed: x", 1, Unreachable),
        ("sacct: error: Problem talking to the database: Connection refused", 1, Unreachable),
        ("sbatch: fatal: Could not establish a configuration source", 1, Unreachable),
        ("sbatch: error: invalid partition specified: standby", 1, BadRequest),
        ("sbatch: error: invalid partition specified: munge-communication", 1, BadRequest),
    ],
)  # fmt: skip
def test_refusals_and_silence(tmp_path: Path, words: str, status: int, error: type[Exception]) -> None:
    prefix = fake(tmp_path, "prefix", f"echo {quote.sh(words)} >&2; exit {status}")
    with pytest.raises(error, match=re.escape(words.rpartition(": ")[2])):
        slurm_commands.Commands([prefix], 5).sbatch("#!/bin/sh\n")


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
        with pytest.raises(BadRequest, match="SLURM refused: refused"):
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
        self.say("scancel")
        self.say("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
        self.say("sbatch", "echo x >> submitted; echo 10")
        self.backend = slurm.SlurmBackend(self.root, slurm_commands.Commands([str(directory / "prefix")], 20), 1024)

    def say(self, name: str, script: str = "") -> None:
        fake(self.here, name, script)

    def row(self, number: int, state: str, record: directories.Record) -> str:
        """A line of squeue or sacct, as a command for the shell."""
        return f"echo '{number}|{state}|N/A|{slurm_state.slurm_name(record)}|None'"

    def submit(self, jid: str = "chris-jid-1") -> directories.Record:
        self.backend.submit(named(jid), render.Spec("slurm", "#!/bin/bash\n"))
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
    engine.say("sbatch", f"{claim(made, '77')}; echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    engine.say("squeue", f"[ ! -e {made.directory}/claim.77 ] || {engine.row(77, 'RUNNING', made)}")
    if retry == "POST":
        engine.submit("j")
    else:
        engine.backend.status("j")
    assert engine.backend.status("j").state is JobState.STARTED
    assert (made.directory / "slurm_id").read_text() == "77"


def test_refused_for_good(engine: Fake) -> None:
    engine.say("sbatch", "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    with pytest.raises(BadRequest, match="QOSMaxSubmit"):
        engine.submit("j")
    with pytest.raises(NotFound):
        engine.backend.status("j")


def test_a_directory_without_a_job(engine: Fake) -> None:
    (engine.root / "chris-jid-1" / "x").mkdir(parents=True)
    with pytest.raises(BackendError, match="in the way"):
        engine.submit()


@pytest.mark.parametrize(
    ("words", "error"),
    [("Slurm accounting storage is disabled", None), ("sacct: error: Unknown cluster", Unreachable)],
)
def test_accounts_that_do_not_answer(engine: Fake, words: str, error: type[Exception] | None) -> None:
    """Nothing is judged by what the accounts could not say."""
    record = engine.submit()
    run_shell(claim(record, "10"))
    engine.say("sacct", f"echo '{words}' >&2; exit 1")
    if error:
        with pytest.raises(error, match="Unknown cluster"):
            engine.backend.status(record.jid)
    else:
        assert engine.backend.status(record.jid).state is JobState.FAILED


@pytest.mark.parametrize(("age_seconds", "state"), [(60, JobState.STARTED), (7200, JobState.FAILED)])
def test_a_runaway_record_of_the_accounts(engine: Fake, age_seconds: float, state: JobState) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    path = record.directory / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created_at": time.time() - age_seconds}))
    engine.say("sacct", engine.row(10, "RUNNING", record))
    assert engine.backend.status(record.jid).state is state


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
        ("NODE_FAIL", "0 \n", ""),
    ],
)
def test_whose_explanation_counts(engine: Fake, state: str, said: str, message: str) -> None:
    record = engine.submit()
    run_shell(claim(record, "10"))
    slurm_state.write(record.directory / "rc", said)
    os.utime(record.directory / "rc", (0, 0))
    engine.say("squeue", engine.row(10, state, record))
    status = engine.backend.status(record.jid)
    assert (status.state is JobState.SUCCEEDED, status.message) == (said == "0 \n", message)


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
for call in (lambda: engine.backend.status(record.jid), lambda: engine.submit("other")):
    with pytest.raises(Unreachable, match="cannot be written: No space left on device"):
        call()
engine.backend.delete(record.jid)
with pytest.raises(NotFound):
    engine.backend.status(record.jid)
assert list(engine.root.iterdir()) == []
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """Said as what it is, and a DELETE makes room."""
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
