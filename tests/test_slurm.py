"""What the slurm backend says and understands, without SLURM: #SBATCH words, commands, the table of states."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman import job, quote, render, settings
from pman.backends import directories, slurm, slurm_commands, slurm_state
from pman.errors import BackendError, BadRequest, Unreachable
from pman.status import JobState
from tests.generate import requests

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
    assert read_by_sbatch(f"--comment={quote.sbatch(value)}") == [f"--comment={value}"]


@pytest.mark.parametrize("value", ["a\nb", "a\r", "\x7f", "\t", "\0"])
def test_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        quote.sbatch(value)


CONFIG = settings.load({"STOREBASE": "/data/store", "JOB_LABELS": "site=it's #1,b=c", "SLURM_ACCOUNT": 'a "b" c'})
RENDERER = render.Renderer(CONFIG)


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


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=5))
def test_ssh_gets_one_word_that_its_shell_takes_apart_again(words: list[str]) -> None:
    line = slurm_commands.Commands(["ssh", "login1"], 5).line(["printf", "%s\\0", *words])
    assert line[:2] == ["ssh", "login1"]
    assert len(line) == 3
    if words:
        printed = subprocess.run(["sh", "-c", line[2]], capture_output=True, check=True).stdout
        assert printed.split(b"\0")[:-1] == [word.encode() for word in words]
