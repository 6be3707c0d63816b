"""The commands that talk to a pman, against a real one, as a person or a script would call them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import HEEDING_INTERRUPTS, ROOT, Rig, Server, running
from tests.test_local import local_rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("client"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


class Pman:
    def __init__(self, server: Server, rig: Rig) -> None:
        self.env = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "PMAN_URL": server.url,
            "STOREBASE": str(rig.store),
        }

    def __call__(self, *words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pman", *words]
        return subprocess.run(
            command, env=self.env | env, input=stdin, capture_output=True, text=True, check=False, timeout=60
        )


@pytest.fixture
def pman(server: Server, rig: Rig) -> Pman:
    return Pman(server, rig)


def test_run_copies_in_and_out(pman: Pman, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "brain").write_text("grey\n")
    script = 'cat "$1/brain" | tee "$2/copy"'
    done = pman(
        "run",
        "localhost/x:1",
        "--in",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--",
        "sh",
        "-c",
        script,
        "sh",
    )
    assert (done.returncode, done.stdout) == (0, "grey\n"), done.stderr
    assert "finishedSuccessfully" in done.stderr
    assert (tmp_path / "out" / "copy").read_text() == "grey\n"


def test_run_uses_directories_of_the_store_in_place(pman: Pman, rig: Rig) -> None:
    out = rig.store / "feed" / "out"
    done = pman("run", "localhost/x:1", "--out", str(out), "--", "sh", "-c", 'echo x > "$1/made"', "sh")
    assert done.returncode == 0, done.stderr
    assert (out / "made").read_text() == "x\n"


def test_exit_codes_are_passed_on(pman: Pman) -> None:
    assert pman("run", "localhost/x:1", "--", "sh", "-c", "exit 7").returncode == 7
    killed = pman("run", "localhost/x:1", "--", "sh", "-c", "kill -9 $$")
    assert killed.returncode not in (0, 7)


def test_a_day_with_a_job(pman: Pman, rig: Rig) -> None:
    request = json.dumps(rig.request("by-hand", "echo one; sleep 1; echo two; exit 5"))
    submitted = pman("submit", "-", "--json", stdin=request)
    assert json.loads(submitted.stdout)["jid"] == "by-hand"
    followed = pman("logs", "-f", "by-hand")
    assert followed.stdout == "one\ntwo\n"
    waited = pman("wait", "by-hand")
    assert (waited.returncode, "exit code 5" in waited.stderr) == (5, True)
    assert "finishedWithError" in pman("status", "by-hand").stdout
    assert json.loads(pman("status", "by-hand", "--json").stdout)["status"] == "finishedWithError"
    assert "by-hand" in pman("list").stdout
    assert json.loads(pman("list", "--json", "--state", "finishedWithError").stdout)["jobs"]
    assert pman("logs", "-n", "1", "by-hand").stdout == "two\n"
    assert pman("delete", "by-hand").returncode == 0
    gone = pman("status", "by-hand")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "There is no job" in gone.stderr


def test_errors_are_sentences(pman: Pman) -> None:
    bad = pman("submit", "-", stdin='{"jid": "x"}')
    assert bad.returncode == 1
    assert "args: is required" in bad.stderr
    nobody = pman("list", PMAN_URL="http://user:hunter2@127.0.0.1:9")
    assert nobody.returncode == 1
    assert "no pman answers" in nobody.stderr
    assert "hunter2" not in nobody.stderr


def test_ctrl_c_ends_the_waiting_and_says_what_goes_on(pman: Pman, server: Server) -> None:
    script = ["sh", "-c", "exec sleep 600"]  # the output directory follows it
    command = [*HEEDING_INTERRUPTS, sys.executable, "-m", "pman", "run", "localhost/x:1", "--jid", "endless", "--"]
    with subprocess.Popen([*command, *script], env=pman.env, stderr=subprocess.PIPE, text=True) as process:
        server.wait_state("endless", "started")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130, errors
    assert "`pman delete endless`" in errors
    assert "Traceback" not in errors
    assert server.delete("endless").status_code == 204
