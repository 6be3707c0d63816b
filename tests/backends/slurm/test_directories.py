"""The directory of a job: interrupted writes, full disks, locks, and DELETE."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pman.backends import slurm
from pman.backends.slurm import state as slurm_state
from pman.errors import BadRequest, Misconfigured, NotFound, Unreachable
from pman.status import JobState
from tests.backends.slurm.fake import Fake, claim, fake, run_shell
from tests.rig import ROOT, wait_for


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
from tests.backends.slurm.fake import Fake, claim, run_shell
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
