"""The commands that talk to a pman, against a real one, as a person or a script would call them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest
import requests

from pman.cli import jobs as client
from pman.cli import listing
from tests.backends.test_local import local_rig
from tests.rig import HEEDING_INTERRUPTS, OUT, ROOT, Rig, Server, running, wait_for

pytestmark = pytest.mark.slow  # each starts pman


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
    assert pman("run", "localhost/x:1", "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert pman("run", "localhost/x:1", "--", "sh", "-c", "exit 130").returncode == 130


@pytest.mark.parametrize(
    ("reason", "of_program", "code"),
    [("time_limit", 124, 124), ("exit", 7, 7), ("out_of_memory", 0, 1), ("signal", 137, 137), ("lost", None, 1)],
)
def test_what_backends_say_becomes_an_exit_code(reason: str, of_program: int | None, code: int) -> None:
    job = {"state": "finishedWithError", "reason": reason, "exit_code": of_program}
    assert client.exit_code(job) == code


def test_run_leaves_nothing_in_the_store(pman: Pman, rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    before = sorted(rig.store.iterdir())
    words = ("--in", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--", "true")
    assert pman("run", "localhost/x:1", *words).returncode == 0
    assert pman("run", "not an image", *words).returncode == 125
    assert sorted(rig.store.iterdir()) == before


def test_waiting_reads_no_logs(pman: Pman, server: Server, rig: Rig) -> None:
    def logs_read() -> float:
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        found = re.search(r'pman_backend_seconds_count{operation="logs"} ([0-9.]+)', text)
        return float(found[1]) if found else 0

    server.post(rig.request("read-by-nobody", "sleep 1; echo here"))
    before = logs_read()
    assert pman("wait", "read-by-nobody").returncode == 0
    assert logs_read() == before


def test_output_comes_while_the_job_runs(pman: Pman, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo first; until [ -e {go} ]; do sleep 0.05; done; echo second"
    command = [sys.executable, "-m", "pman", "run", "localhost/x:1", "--", "sh", "-c", script]
    with subprocess.Popen(command, env=pman.env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "first\n"
        go.touch()
        assert process.stdout.read() == "second\n"
    assert process.returncode == 0


def test_a_command_without_directories_needs_no_store(pman: Pman) -> None:
    done = pman("run", "localhost/x:1", "--", "echo", "hi", STOREBASE="")
    assert (done.returncode, done.stdout) == (0, "hi\n"), done.stderr


@pytest.mark.parametrize(("flags", "last"), [((), "outgoing\n"), (("--bare",), "hi\n")])
def test_directories_end_the_command_unless_it_is_bare(
    pman: Pman, tmp_path: Path, flags: tuple[str, ...], last: str
) -> None:
    done = pman("run", "localhost/x:1", "--out", str(tmp_path / "out"), *flags, "--", "echo", "hi")
    assert done.stdout.endswith(last), done.stdout


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("then", ["wait", "delete"])
def test_what_an_interrupted_run_has_left_is_fetched_or_removed(
    pman: Pman, server: Server, rig: Rig, tmp_path: Path, signum: signal.Signals, code: int, then: str
) -> None:
    jid, go, before = f"left-{then}-{code}", tmp_path / "go", sorted(rig.store.iterdir())
    script = f'echo x > "$1/made"; until [ -e {go} ]; do sleep 0.05; done; exit 3'
    words = ["run", "localhost/x:1", "--jid", jid, "--out", str(tmp_path / "out"), "--", "sh", "-c", script, "sh"]
    with subprocess.Popen(
        [*HEEDING_INTERRUPTS, sys.executable, "-m", "pman", *words], env=pman.env, stderr=subprocess.PIPE, text=True
    ) as process:
        server.wait_state(jid, "started")
        process.send_signal(signum)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == code, errors
    assert f"`pman wait` copies it to {tmp_path / 'out'}" in errors
    go.touch()
    if then == "wait":
        assert pman("wait", jid).returncode == 3
        assert (tmp_path / "out" / "made").read_text() == "x\n"
    assert pman("delete", jid).returncode == 0
    assert sorted(rig.store.iterdir()) == before


def test_a_log_that_is_cut_says_so(pman: Pman, server: Server, rig: Rig) -> None:
    server.post(rig.request("chatty", "seq 1000"))
    assert pman("wait", "chatty").returncode == 0
    whole = pman("logs", "chatty")
    assert (whole.stdout.count("\n"), whole.stderr) == (1000, "")
    last = pman("logs", "-n", "10", "chatty")
    assert last.stdout == "".join(f"{number}\n" for number in range(991, 1001))
    assert "Earlier output is not shown" in last.stderr
    assert "Pman-Logs-Cut" not in server.get("chatty").headers
    assert server.get("chatty", tail=999).headers["Pman-Logs-Cut"] == "yes"


def test_a_log_of_one_worker_that_is_cut_says_so(server: Server, rig: Rig) -> None:
    """Each worker has its share of the lines, also where the others need less than theirs."""
    server.post(rig.request("two", "[ $PMAN_WORKER_INDEX = 1 ] || seq 30", number_of_workers=2))
    server.wait_final("two")
    cut, whole = server.get("two", tail=40), server.get("two", tail=60)
    assert (cut.json()["logs"].count("\n"), cut.headers["Pman-Logs-Cut"]) == (22, "yes")
    assert (whole.json()["logs"].count("\n"), "Pman-Logs-Cut" in whole.headers) == (32, False)


def test_several_jobs_at_once(pman: Pman, server: Server, rig: Rig) -> None:
    for number, code in enumerate((0, 4, 5)):
        server.post(rig.request(f"many-{number}", f"echo {code}; exit {code}"))
    jids = [f"many-{number}" for number in range(3)]
    assert pman("wait", *jids).returncode == 4
    shown = pman("status", *jids, "no-such-job")
    assert (shown.returncode, shown.stdout.count("jid ")) == (1, 3)
    for follow in ([], ["-f"]):
        read = pman("logs", *jids[:2], *follow)
        assert (read.returncode, read.stdout) == (0, "==> many-0 <==\n0\n==> many-1 <==\n4\n")
    assert pman("logs", "no-such-job", jids[0]).stdout == "==> many-0 <==\n0\n"
    assert pman("delete", *jids).returncode == 0


def test_a_reader_that_goes_is_no_error(pman: Pman, server: Server, rig: Rig) -> None:
    server.post(rig.request("listed", "true"))
    line = f"set -o pipefail; {sys.executable} -m pman list | true"
    done = subprocess.run(["bash", "-c", line], env=pman.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 141)  # 0 where the listing was written before its reader had gone
    assert done.stderr == ""


def row(jid: str, status: str, image: str = "docker.io/x", message: str = "") -> dict[str, str]:
    return {"jid": jid, "status": status, "posted_at": "", "image": image, "message": message}


def test_a_table_as_wide_as_the_terminal() -> None:
    rows = [row("a" * 30, "started", message="A long\nsentence\033[2J. " * 9), row("started-b", "undefined")]
    colored = list(listing._table(rows, 80))
    lines = [click.unstyle(line) for line in colored]
    assert max(map(len, lines)) == 80
    assert all(line.isprintable() for line in lines)
    assert {line.find(word) for line, word in zip(lines, ("STATUS", "started", "undefined"), strict=True)} == {32}
    assert click.style("undefined", fg="magenta") in colored[2]
    assert "docker.io" not in colored[1]
    assert "docker.io" in list(listing._table(rows, None))[1]


def test_the_list_takes_the_filters_of_the_service(pman: Pman, server: Server, rig: Rig) -> None:
    for jid in ("sift-1", "sift-2"):
        server.post(rig.request(jid, "true", auid=jid))
        server.wait_final(jid)
    names = ("--text", "SIFT", "--sort", "jid", "--image", "none:1", "--posted-since", "2026-01-01T00:00Z")
    shown = pman("list", *names, "--limit", "1")
    assert (re.findall(r"(?m)^sift-\d", shown.stdout), shown.stderr) == (["sift-1"], "there are more: --after sift-1\n")
    assert re.findall(r"(?m)^sift-\d", pman("list", "--user", "sift-2").stdout) == ["sift-2"]
    wrong = pman("list", "--sort", "odd")
    assert (wrong.returncode, wrong.stderr.startswith("Error: sort: must be one of")) == (1, True)


class Terminal:
    """A terminal of 24 rows and 80 columns, and all that was written to it."""

    def __init__(self) -> None:
        self._here, self.there = os.openpty()
        fcntl.ioctl(self.there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.written = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO, when nothing has it open any more
            while data := os.read(self._here, 65536):
                self.written += data.decode()
        os.close(self._here)

    def screen(self) -> str:
        """What was drawn last."""
        return self.written.rpartition("\033[H")[2]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_table_that_lives(pman: Pman, rig: Rig, signum: int, code: int) -> None:
    own, terminal, jid = rig.start(), Terminal(), f"lives-{code}"
    env = pman.env | {"TERM": "xterm", "PMAN_URL": own.url, "NO_COLOR": "1" if code else ""}
    command = [*HEEDING_INTERRUPTS, sys.executable, "-m", "pman", "list", "--watch", "--text", jid]
    with subprocess.Popen(command, env=env, stdout=terminal.there, stderr=terminal.there) as process:
        os.close(terminal.there)
        wait_for(lambda: "no jobs" in terminal.screen(), 20, "the empty table")
        own.post(rig.request(jid, "true"))
        ended = "finishedSuccessfully 1"
        wait_for(lambda: ended in terminal.screen() and jid in terminal.screen(), 20, "the job")
        own.kill()
        wait_for(lambda: "no pman answers" in terminal.screen(), 20, "the word about pman")
        assert jid in terminal.screen()
        process.send_signal(signum)
        assert process.wait(20) == code
    wait_for(lambda: "\033[?1049l" in terminal.written, 5, "the end")
    assert jid in terminal.written.partition("\033[?25h\033[?1049l")[2]  # on the screen of before
    assert ("\033[32m" in terminal.written) == (code == 0)
    frames = re.split(r"\033\[H|\033\[\?1049[hl]", terminal.written)
    assert all(len(click.unstyle(line)) <= 80 for frame in frames for line in frame.splitlines())


def test_serve_in_a_terminal_says_what_to_do_next(rig: Rig, tmp_path: Path) -> None:
    terminal = Terminal()
    own = {"PATH": "/usr/bin:/bin", "PORT": "0", "SECRET_KEY": "a secret key for tests", "STOREBASE": str(tmp_path)}
    command = [sys.executable, "-m", "pman", "serve"]
    with subprocess.Popen(command, env=rig.env | own, cwd=ROOT, stderr=terminal.there) as process:
        os.close(terminal.there)
        wait_for(lambda: "uses no image" in terminal.written, 20, "the next steps")
        process.terminate()
        assert process.wait(20) == 0
    url = re.findall(r"listening on (http://127[\d.:]+)", terminal.written)[0]
    words = (
        f"Jobs are shown at {url}/",
        f"export PMAN_URL={url} STOREBASE={tmp_path}",
        "pman run ",
        "pman list --watch",
    )
    assert all(each in terminal.written for each in words)


def test_a_long_table_leaves_the_screen_its_size() -> None:
    terminal = os.terminal_size((80, 24))
    page = {"counts": {"started": 40}, "jobs": [row(f"j{number}", "started") for number in range(40)], "next": ""}
    lines = listing._frame(page, "12:00:00", terminal)
    assert len(lines) == 23
    assert "there are more jobs" in lines[-1]


def test_a_pman_that_was_slow_is_asked_again_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) > 2:
            raise KeyboardInterrupt

    def page() -> dict[str, object]:
        now[0] += client.HTTP_SECONDS
        if pauses:
            raise client.NoAnswer("no pman answers.")
        return {"counts": {}, "jobs": [], "next": ""}

    monkeypatch.setattr("pman.cli.listing.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pman.cli.listing.time.sleep", sleep)
    listing._watch(page)
    assert pauses == [listing.WATCH_SECONDS, 60, 60]


def test_a_table_that_lives_needs_a_terminal(pman: Pman) -> None:
    for words in (["--watch"], ["--watch", "--json"]):
        done = pman("list", *words)
        assert (done.returncode, "needs a terminal" in done.stderr) == (2, True)


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_no_color(pman: Pman, no_color: str, colored: bool) -> None:
    here, there = os.openpty()
    env = pman.env | {"NO_COLOR": no_color}
    with gateway(job_answer("finishedSuccessfully")) as found:
        env["PMAN_URL"] = f"http://127.0.0.1:{found.server_port}"
        command = [sys.executable, "-m", "pman", "wait", "x"]
        subprocess.run(command, env=env, stderr=there, timeout=60, check=True)
    assert (b"\x1b[32m" in os.read(here, 4096)) == colored
    os.close(here)
    os.close(there)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(pman: Pman, shell: str) -> None:
    assert "_PMAN_COMPLETE" in pman("completion", shell).stdout


def test_exit_codes_are_explained(pman: Pman) -> None:
    said = pman("help", "exit-codes").stdout
    assert all(re.search(rf"(?m)^  {code} ", said) for code in (0, 124, 125, 130, 143))
    assert pman("help").stdout == pman("--help").stdout


def test_links_of_a_job_are_not_followed(pman: Pman, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not for jobs")
    script = f'ln -s {tmp_path}/secret "$1/secret"; ln -s /no/where "$1/dangling"; exit 3'
    done = pman("run", "localhost/x:1", "--out", str(tmp_path / "out"), "--", "sh", "-c", script, "sh")
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "out" / "secret").is_symlink()
    assert (tmp_path / "out" / "dangling").is_symlink()


def test_run_says_what_is_wrong_with_directories(pman: Pman, rig: Rig, tmp_path: Path) -> None:
    holds_the_store = pman("run", "localhost/x:1", "--in", str(rig.store.parent), "--", "true")
    assert holds_the_store.returncode == 125
    assert "cannot be copied into it" in holds_the_store.stderr
    out = ("run", "localhost/x:1", "--out", str(tmp_path / "out"), "--", "true")
    nowhere = pman(*out, STOREBASE="/proc")
    assert (nowhere.returncode, "cannot be made" in nowhere.stderr) == (125, True)
    missing = pman(*out, STOREBASE=str(tmp_path / "typo"))
    assert (missing.returncode, "set STOREBASE" in missing.stderr) == (125, True)
    assert not (tmp_path / "typo").exists()
    unset = pman(*out, STOREBASE="")
    assert (unset.returncode, "set STOREBASE" in unset.stderr) == (125, True)
    typo = pman("run", "--memroy", "5", "localhost/x:1", "--", "true")
    assert (typo.returncode, "--memory" in typo.stderr) == (2, True)
    as_with_docker = pman("run", "localhost/x:1", "ls", "-la")
    assert (as_with_docker.returncode, "IMAGE -- COMMAND" in as_with_docker.stderr) == (2, True)


def test_waiting_outlives_a_restart_of_pman(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        pman = Pman(server, rig)
        go = tmp_path / "go"
        script = f"until [ -e {go} ]; do sleep 0.05; done; exit 4"
        command = [sys.executable, "-m", "pman", "run", "localhost/x:1", "--jid", "long", "--", "sh", "-c", script]
        with subprocess.Popen(command, env=pman.env, stderr=subprocess.PIPE, text=True) as process:
            server.wait_state("long", "started")
            server.kill()
            again = rig.start(PORT=server.url.rpartition(":")[2])
            go.touch()
            errors = process.communicate(timeout=60)[1]
        assert process.returncode == 4, errors
        assert again.get("long").status_code == 404


def test_following_shows_whole_lines_once(pman: Pman, server: Server, rig: Rig) -> None:
    begin = r"printf 'first\na\rb'; " + 'until [ -e "$out/go" ]; do sleep 0.05; done; '
    server.post(rig.request("lines", OUT + begin + r"printf 'c\n\033[1mbold\n'; yes | head -60"))
    command = [sys.executable, "-m", "pman", "logs", "-f", "-n", "10", "lines"]
    with subprocess.Popen(command, env=pman.env, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"first\n"
        (rig.outgoing("lines") / "go").touch()
        assert process.communicate(timeout=60)[0] == b"a\rbc\n\x1b[1mbold\n" + b"y\n" * 60
    assert process.returncode == 0


def test_each_worker_is_followed_by_itself(pman: Pman, server: Server, rig: Rig) -> None:
    script = 'seq 3; echo "worker $PMAN_WORKER_INDEX"'
    server.post(rig.request("pair", script) | {"number_of_workers": 2})
    server.wait_final("pair")
    parts = [f"=== worker {n} ===\n1\n2\n3\nworker {n}\n" for n in (0, 1)]
    assert pman("logs", "-f", "pair").stdout == "".join(parts)
    last = pman("logs", "-f", "-n", "1", "pair")
    assert last.stdout == "=== worker 0 ===\nworker 0\n=== worker 1 ===\nworker 1\n"
    assert "Earlier output is not shown" in last.stderr


def test_output_comes_once_where_the_job_ends_between_two_looks(pman: Pman) -> None:
    begun, ended = job_answer("started", exit_code=None), job_answer("finishedSuccessfully")
    with gateway(begun, begun, log_answer("finishedSuccessfully", b"all of it\n"), ended) as found:
        done = pman("logs", "-f", "x", PMAN_URL=f"http://127.0.0.1:{found.server_port}")
    assert (done.returncode, done.stdout) == (0, "all of it\n"), done.stderr


def test_following_goes_on_behind_a_proxy_that_leaves_out_empty_headers(pman: Pman) -> None:
    """Only the state says that all has been said, not a header that is missing."""
    begun, ended = job_answer("started", exit_code=None), job_answer("finishedSuccessfully")
    logs = log_answer("started", b""), log_answer("finishedSuccessfully", b"late\n")
    with gateway(begun, begun, logs[0], ended, logs[1]) as found:
        done = pman("logs", "-f", "x", PMAN_URL=f"http://127.0.0.1:{found.server_port}")
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr


def test_jids_are_taken_literally(pman: Pman, server: Server, rig: Rig) -> None:
    server.post(rig.request("kept", "true"))
    for jid in ("../v1/kept", "kept?x=1", "kept#part", "no-such-job"):
        assert pman("delete", jid).returncode == 1, jid
    assert server.get("kept").status_code == 200
    for jid in ("", "/", "jobs"):
        assert (pman("status", jid).returncode, pman("wait", jid).returncode) == (2, 2)
    assert pman("delete", "no-such-job", "kept").returncode == 1
    assert server.get("kept").status_code == 404


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
    heading, *rows = pman("list").stdout.splitlines()
    row = next(row for row in rows if row.startswith("by-hand "))
    assert heading.index("STATUS") == row.index("finishedWithError")
    assert heading.index("IMAGE") == row.index("localhost/")
    assert json.loads(pman("list", "--json", "--state", "finishedWithError").stdout)["jobs"]
    assert pman("logs", "-n", "1", "by-hand").stdout == "two\n"
    assert pman("delete", "by-hand").returncode == 0
    gone = pman("status", "by-hand")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "There is no job" in gone.stderr


def test_a_misspelt_field_is_warned_about(pman: Pman, rig: Rig) -> None:
    request = json.dumps(rig.request("misspelt", "true", time_limit_minute=5))
    done = pman("submit", "-", stdin=request)
    assert (done.returncode, "ignored: 'time_limit_minute'" in done.stderr) == (0, True), done.stderr
    assert pman("delete", "misspelt").returncode == 0


def test_errors_are_sentences(pman: Pman) -> None:
    bad = pman("submit", "-", stdin='{"jid": "x"}')
    assert bad.returncode == 1
    assert "\n  args: is required" in bad.stderr  # a line for each field
    one = pman("list", "--state", "ended")
    assert (one.returncode, "'ended' is not one of 'notstarted', 'started'" in one.stderr) == (2, True)
    alone = pman("run", "localhost/x:1", "--", "true", PMAN_URL="http://127.0.0.1:9")
    assert (alone.returncode, alone.stdout) == (125, "")
    assert (
        alone.stderr == "Error: no pman answers at PMAN_URL=http://127.0.0.1:9/api/v1.\n"
    )  # there is no job to delete
    nobody = pman("list", PMAN_URL="http://user:hunter2@127.0.0.1:9")
    assert nobody.returncode == 1
    assert "no pman answers" in nobody.stderr
    assert "hunter2" not in nobody.stderr


@pytest.mark.parametrize(
    "url",
    ["user:hunter2@127.0.0.1:9", "http://user:hunter2@host:99999", "htp://user:hunter2@host", "http://u:hunter2/x@h:9"],
)
def test_no_error_repeats_a_password(pman: Pman, url: str) -> None:
    done = pman("list", PMAN_URL=url)
    assert done.returncode == 1
    assert "hunter2" not in done.stderr
    assert "PMAN_URL=" in done.stderr


def test_no_proxy_comes_before_a_pman_of_this_machine(pman: Pman) -> None:
    assert pman("list", http_proxy="http://127.0.0.1:9").returncode == 0


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


def test_ctrl_c_ends_the_following(pman: Pman, server: Server, rig: Rig) -> None:
    server.post(rig.request("followed", "echo begun; sleep 600"))
    command = [*HEEDING_INTERRUPTS, sys.executable, "-m", "pman", "logs", "-f", "followed"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=pman.env, text=True, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert (process.returncode, "`pman delete followed`" in errors) == (130, True), errors
    assert server.delete("followed").status_code == 204


class Gateway(ThreadingHTTPServer):
    """What may stand where a pman is expected: raw answers, one for each request, the last one for all that follow.

    A request with the method `silent` is never answered.
    """

    def __init__(self, *answers: bytes, silent: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.silent = silent
        self.asked = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == self.server.silent:
            self.server.asked.set()
            self.connection.recv(1)  # until the client goes
            return
        self.wfile.write(self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0])
        self.close_connection = True

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def gateway(*answers: bytes, silent: str = "") -> Iterator[Gateway]:
    with Gateway(*answers, silent=silent) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield found
        finally:
            found.shutdown()


def job_answer(state: str, message: str = "", *, jid: str = "x", exit_code: int | None = 0) -> bytes:
    """An answer about a job, good for both of its addresses: pfcon's and the resource with all that is known."""
    both = {"jid": jid, "message": message}
    job = both | {"status": state, "logs": "", "state": state, "reason": "exit", "exit_code": exit_code}
    return b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(job).encode()


def log_answer(state: str, text: bytes) -> bytes:
    """An answer with output, without the header Pman-Logs-Next."""
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nPman-Job-State: %b\r\n\r\n%b" % (
        state.encode(), text,
    )  # fmt: skip


def test_waiting_outlives_a_restart_behind_a_gateway(pman: Pman) -> None:
    ended = job_answer("finishedWithError", "The job ended with exit code 6.", exit_code=6)
    answers = (b"HTTP/1.0 502 Bad Gateway\r\n\r\n<h1>502</h1>", b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n{")
    with gateway(*answers, b"HTTP/1.0 504 Gateway Timeout\r\n\r\n", ended) as found:
        done = pman("wait", "x", PMAN_URL=f"http://127.0.0.1:{found.server_port}")
    assert done.returncode == 6, done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n<h1>Welcome</h1>",
        b"HTTP/1.0 301 Moved\r\nLocation: https://elsewhere/\r\n\r\n",
        b"HTTP/1.0 404 Not Found\r\n\r\n<!DOCTYPE HTML>\n<html><h1>Error response</h1></html>",
    ],
)
def test_what_is_no_pman_is_called_so(pman: Pman, answer: bytes) -> None:
    with gateway(answer) as found:
        done = pman("list", PMAN_URL=f"http://127.0.0.1:{found.server_port}")
    assert (done.returncode, done.stderr.count("\n"), "is no pman (" in done.stderr) == (1, 1, True), done.stderr


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_ctrl_c_while_pman_is_asked_says_what_may_be_left(pman: Pman, method: str) -> None:
    ended = job_answer("finishedSuccessfully", jid="maybe")
    command = [
        *HEEDING_INTERRUPTS,
        sys.executable,
        "-m",
        "pman",
        "run",
        "localhost/x:1",
        "--jid",
        "maybe",
        "--",
        "true",
    ]
    with gateway(ended, silent=method) as found:
        env = pman.env | {"PMAN_URL": f"http://127.0.0.1:{found.server_port}"}
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
            assert found.asked.wait(30)
            process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=30)[1]
    assert (process.returncode, "`pman delete maybe`" in errors) == (130, True), errors


def test_output_that_the_terminal_cannot_show(pman: Pman) -> None:
    script = r"printf 'gr\303\274n\n'; exit 7"
    done = pman("run", "localhost/x:1", "--", "sh", "-c", script, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (7, "gr\\xfcn\n"), done.stderr


def test_output_begins_on_an_empty_row_of_a_terminal(pman: Pman) -> None:
    """What told of the progress is gone before the first line."""
    here, there = os.openpty()
    command = [sys.executable, "-m", "pman", "run", "localhost/x:1", "--", "sh", "-c", "sleep 1; echo going"]
    subprocess.run(command, env=pman.env, stdout=there, stderr=there, timeout=60, check=True)
    shown = os.read(here, 65536).decode()
    os.close(here)
    os.close(there)
    assert re.search(r"started \d s\r\x1b\[Kgoing\r\n", shown), shown


def test_progress_stays_on_one_row_of_a_narrow_terminal(pman: Pman) -> None:
    message = "The image cannot be pulled:\nno such host."
    begun, ended = job_answer("notstarted", message, exit_code=None), job_answer("finishedSuccessfully", message)
    here, there = os.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with gateway(begun, ended) as found:
        env = pman.env | {"PMAN_URL": f"http://127.0.0.1:{found.server_port}"}
        command = [sys.executable, "-m", "pman", "wait", "x"]
        assert subprocess.run(command, env=env, stderr=there, timeout=60, check=False).returncode == 0
    rows = os.read(here, 4096).decode().split("\r\033[K")[1:-1]
    os.close(here)
    os.close(there)
    assert [row[:12] for row in rows] == ["x notstarted"]
    assert all(len(row) < 40 and "\n" not in row for row in rows), rows
