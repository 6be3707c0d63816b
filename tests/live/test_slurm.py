"""The slurm backend on a real SLURM: the contract, with and without accounting, and what is particular to it.

As root, pman and its jobs run as an ordinary user, from whom SLURM hides what it does not hide from root. Tests that
drain nodes or stop daemons have a SLURM of their own, which forgets jobs after two seconds.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import NEEDS_SOMETHING, development
from tests.contract import HOSTILE, Contract
from tests.live import runtimes
from tests.rig import COUNTED, ROOT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("slurm")
SCRIPT = str(ROOT / "scripts" / "engines" / "slurm")


@dataclass
class Slurm:
    """A SLURM of this test module's own."""

    environment: dict[str, str]
    options: tuple[str, ...]

    def dev(self, *words: str) -> str:
        done = subprocess.run(
            [SCRIPT, *words, *self.options], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode == NEEDS_SOMETHING and os.environ.get("CI") != "true":
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(self, *argv: str) -> str:
        """As this process's user, whom a site without slurm.conf lets use the one of slurmctld."""
        return run({**self.environment, "SLURM_CONF": self.environment["PMAN_DEV_SLURM_RUN"] + "/slurm.conf"}, *argv)


def run(environment: dict[str, str], *argv: str) -> str:
    """Standard output of one of SLURM's commands."""
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout


@contextmanager
def own_slurm(*options: str) -> Iterator[Slurm]:
    """Brought up in a short directory of its own and taken down again."""
    home = tempfile.mkdtemp(prefix="pman-s-", dir="/tmp")
    os.chmod(home, 0o755)
    slurm = Slurm({**os.environ, "PMAN_DEV_HOME": home}, options)
    try:
        slurm.dev("up", "--min-job-age", "2")
        words = [word for line in slurm.dev("env").splitlines() for word in shlex.split(line)[1:]]
        slurm.environment |= dict(word.split("=", 1) for word in words)
        yield slurm
    finally:
        slurm.dev("down")
        shutil.rmtree(home, ignore_errors=True)


def ordinary(engine: dict[str, str]) -> str:
    """The user of pman and its jobs where that is not this process's; pytest runs as root in CI."""
    return engine["PMAN_TEST_USER"] if os.geteuid() == 0 else ""


def open_directory(user: str, name: str = "") -> Path:
    """An empty directory that `user` owns and every user may enter, which pytest's are not; gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f"pman-t-{name}", dir="/tmp"))
    directory.chmod(0o755)
    if user:
        shutil.chown(directory, user, user)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def slurm_rig(logs: Path, engine: dict[str, str], *options: str, **env: str) -> Rig:
    """pman over the slurm backend, with its store and its state in a directory of its user's.

    options: of scripts/engines/slurm, which name the instance. env: settings of pman.
    """
    user = ordinary(engine)
    directory = open_directory(user)
    (directory / "store").mkdir()
    if user:
        shutil.chown(directory / "store", user, user)
    passed = ("SLURM_CONF", "SLURM_CONF_SERVER", "PATH", "PMAN_DEV_HOME", "PMAN_TEST_USER")
    settings = {
        "CONTAINER_ENV": "slurm",
        "SLURM_STATE_DIR": str(directory / "state"),
        "SLURM_RUNTIME": "bubblewrap",
        **{name: engine[name] for name in passed if name in engine},
        **env,
    }
    prefix = (SCRIPT, "run", *options, "--")
    return Rig(settings, directory / "store", "localhost/none:1", logs, user=user, prefix=prefix)


def slurm_jobs(rig: Rig, jid: str) -> list[str]:
    """States of the SLURM jobs of all attempts at a jid, as squeue knows them."""
    text = run(rig.env, "squeue", "--all", "-h", "-t", "all", "-o", "%T %j")
    rows = [line.split(" ", 1) for line in text.splitlines()]
    return [state for state, name in rows if is_of(name, jid)]


def is_of(name: str, jid: str) -> bool:
    """The name of a SLURM job is the jid and a token, behind what the site puts before it."""
    return name.removeprefix("site-").rpartition(".")[0] == jid


def all_slurm_jobs(rig: Rig, jid: str) -> list[str]:
    """As slurm_jobs, with those that only the accounting knows."""
    said = subprocess.run(
        ["sacct", "-anXP", "-o", "JobName,State"],
        env=os.environ | rig.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [line.split("|") for line in said.stdout.splitlines()]
    return [state for name, state in rows if is_of(name, jid)] or slurm_jobs(rig, jid)


def slurm_id(rig: Rig, jid: str) -> str:
    return Path(rig.env["SLURM_STATE_DIR"], jid, "slurm_id").read_text()


def wrapped(directory: Path, name: str, script: str, commands: str = "") -> str:
    """A PATH whose `name` is `script`, a shell script in which $real is the command of the PATH `commands`."""
    commands = commands or os.environ["PATH"]
    real = shutil.which(name, path=commands)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o777)  # the script runs as pman's user
    path = directory / name
    path.write_text(f"#!/bin/bash\nreal={real}\nhere={shlex.quote(str(directory))}\n{script}\n")
    path.chmod(0o755)
    return f"{directory}:{commands}"


@pytest.fixture
def tmp_path() -> Path:
    """One that pman's user may enter."""
    return open_directory(ordinary(development("slurm")))


@pytest.fixture
def jid() -> str:
    return f"chris-jid-{uuid.uuid4().hex[:8]}"


class TestSlurm(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(slurm_rig(tmp_path_factory.mktemp("slurm"), development("slurm"))) as rig:
            yield rig


@pytest.fixture(scope="module")
def accounting() -> Iterator[Slurm]:
    with own_slurm("--accounting") as slurm:
        yield slurm


class TestSlurmWithAccounting(Contract):
    """squeue forgets jobs after two seconds here, so most of what is asked comes from the accounting or the files."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, accounting: Slurm) -> Iterator[Rig]:
        with running(
            slurm_rig(tmp_path_factory.mktemp("slurm-acct"), accounting.environment, *accounting.options)
        ) as rig:
            yield rig


class TestAccounts:
    """What squeue has forgotten and the accounting knows, which may hear of it later."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, accounting: Slurm) -> Iterator[Rig]:
        with running(
            slurm_rig(tmp_path_factory.mktemp("slurm-told"), accounting.environment, *accounting.options)
        ) as rig:
            yield rig

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, rig: Rig) -> Server:
        return rig.start()

    def test_cancelled_and_forgotten(self, accounting: Slurm, server: Server, rig: Rig, jid: str) -> None:
        assert server.post(rig.request(jid, COUNTED, partition="down")).status_code == 201
        accounting.command("scancel", slurm_id(rig, jid))
        wait_for(lambda: not slurm_jobs(rig, jid), 30, "squeue to forget the job")
        job = server.wait_final(jid)
        assert job["status"] == "finishedWithError"
        assert "cancelled in SLURM" in job["message"]

    def test_node_fails(self, accounting: Slurm, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, COUNTED + "sleep 600"))
        server.wait_state(jid, "started")
        accounting.command("scontrol", "update", "nodename=localhost", "state=down", "reason=test")
        job = server.wait_final(jid)
        wait_for(lambda: accounting.command("sinfo", "-h", "-o", "%T").split()[0] == "idle", 60, "slurmd to be back")
        assert (job["status"], job["message"]) == ("finishedWithError", "A node of the job failed.")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(slurm_rig(tmp_path_factory.mktemp("slurm-more"), development("slurm"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def pman(shared: Rig) -> Server:
    return shared.start(SUPER_SECRET="hidden")


class TestOnTheSharedSlurm:
    def test_pending_with_reason(self, shared: Rig, pman: Server, jid: str) -> None:
        pman.post(shared.request(jid, COUNTED, partition="down"))

        def waiting() -> bool:
            job = pman.get(jid).json()
            assert job["status"] == "notstarted"
            return "PartitionDown" in job["message"]

        wait_for(waiting, 20, "SLURM's reason")
        assert pman.delete(jid).status_code == 204
        assert set(slurm_jobs(shared, jid)) <= {"CANCELLED"}

    def test_bad_partition_in_the_words_of_sbatch(self, shared: Rig, pman: Server, jid: str) -> None:
        answer = pman.post(shared.request(jid, COUNTED, partition="no-such"))
        assert answer.status_code == 400
        assert "invalid partition" in answer.json()["message"].lower()
        assert pman.get(jid).status_code == 404
        assert pman.post(shared.request(jid, COUNTED)).status_code == 201
        assert pman.wait_final(jid)["status"] == "finishedSuccessfully"

    def test_impossible_size_in_the_words_of_sbatch(self, shared: Rig, pman: Server, jid: str) -> None:
        answer = pman.post(shared.request(jid, "true", memory_limit=9_000_000))
        assert answer.status_code == 400
        assert "memory" in answer.json()["message"].lower()

    def test_cancelled_by_an_admin(self, shared: Rig, pman: Server, jid: str) -> None:
        pman.post(shared.request(jid, "trap 'echo bye' TERM; echo begun; sleep 600 & wait; sleep 600"))
        wait_for(lambda: "begun" in pman.get(jid).json()["logs"], 60, "the command to begin")
        run(shared.env, "scancel", slurm_id(shared, jid))
        job = pman.wait_final(jid)
        assert (job["status"], job["message"]) == ("finishedWithError", "The job was cancelled in SLURM.")
        assert "begun" in job["logs"]

    def test_delete_ends_a_command_that_ignores_term(self, shared: Rig, tmp_path: Path, jid: str) -> None:
        """KillWait is 8 s, and SLURM finds the processes of a job by their parents."""
        root = development("slurm")["PMAN_TEST_IMAGE_DIR"]
        shutil.copytree(root, tmp_path / "images" / "img" / "localhost%none+1", symlinks=True)
        with running(dataclasses.replace(shared, servers=[])) as rig:
            none, bubblewrap, charliecloud = (
                rig.start(SLURM_RUNTIME=runtime, SLURM_IMAGE_DIR=str(tmp_path / "images"))
                for runtime in ("none", "bubblewrap", "charliecloud")
            )
            jobs = {"none": (none, 1), "bwrap": (bubblewrap, 1), "bwraps": (bubblewrap, 2), "ch": (charliecloud, 2)}
            runtimes.assert_delete_ends_what_ignores_term(rig, {f"{jid}-{name}": job for name, job in jobs.items()})

    def test_suspended_by_an_admin_goes_on(self, shared: Rig, pman: Server, jid: str) -> None:
        pman.post(shared.request(jid, COUNTED + 'until [ -e "$out/go" ]; do sleep 0.1; done', time_limit_minutes=5))
        wait_for(lambda: shared.executions(jid), 60, "the job to begin")
        number = slurm_id(shared, jid)
        run(shared.env, "scontrol", "suspend", number)
        wait_for(lambda: pman.get(jid).json()["message"] == "The job is suspended in SLURM.", 20, "SLURM's word")
        script = int(run(shared.env, "scontrol", "listpids", number).splitlines()[1].split()[0])
        wait_for(lambda: ") T " in Path(f"/proc/{script}/stat").read_text(), 20, "the STOP that comes after TSTP")
        run(shared.env, "scontrol", "resume", number)
        (shared.outgoing(jid) / "go").touch()
        assert pman.wait_final(jid)["status"] == "finishedSuccessfully"

    @pytest.mark.slow
    def test_the_limit_of_a_partition(self, shared: Rig, pman: Server, jid: str) -> None:
        """SLURM warns the script, so that this tells the end of its time from a cancellation."""
        pman.post(shared.request(jid, COUNTED + "sleep 600", partition="short"))
        wait_for(lambda: shared.executions(jid), 60, "the job to begin")
        # More than the 30 s between two looks of SLURM at limits, so that it warns in one look and ends in another.
        soon = time.strftime("%FT%T", time.localtime(time.time() + 35))
        run(shared.env, "scontrol", "update", f"jobid={slurm_id(shared, jid)}", f"endtime={soon}")
        job = pman.wait_final(jid, 240)
        assert (job["status"], "time limit" in job["message"]) == ("finishedWithError", True)
        result = Path(shared.env["SLURM_STATE_DIR"], jid, "rc")
        assert result.read_text() == "124 ended by its time limit\n"

    def test_many_posts_are_one_sbatch(self, shared: Rig, pman: Server, jid: str) -> None:
        second = shared.start()
        request = shared.request(jid, COUNTED)
        with ThreadPoolExecutor(16) as pool:
            codes = set(pool.map(lambda n: (pman, second)[n % 2].post(request).status_code, range(16)))
        assert codes == {201}
        assert pman.wait_final(jid)["status"] == "finishedSuccessfully"
        assert len(slurm_jobs(shared, jid)) == 1
        second.stop()

    def test_requeued_by_an_admin_runs_once(self, shared: Rig, pman: Server, jid: str) -> None:
        pman.post(shared.request(jid, COUNTED + "sleep 600"))
        wait_for(lambda: shared.executions(jid), 30, "the job to begin")
        number = slurm_id(shared, jid)
        run(shared.env, "scontrol", "update", f"jobid={number}", "requeue=1")
        run(shared.env, "scontrol", "requeue", number)
        wait_for(lambda: slurm_jobs(shared, jid) == ["PENDING"], 30, "the job to be back in the queue")
        run(shared.env, "scontrol", "update", f"jobid={number}", "starttime=now")  # SLURM would wait two minutes
        assert pman.wait_final(jid)["status"] == "finishedWithError"
        assert pman.delete(jid).status_code == 204
        assert shared.executions(jid) == 1

    def test_out_of_memory(self, shared: Rig, pman: Server, jid: str) -> None:
        eat = "import time; a = b'x' * 400_000_000; time.sleep(60)"
        request = shared.request(jid, "", entrypoint=["python3", "-c", eat], memory_limit=64)
        pman.post(request)
        job = pman.wait_final(jid)
        assert job["status"] == "finishedWithError"
        assert "memory" in job["message"], job

    def test_comment_and_environment(self, shared: Rig, pman: Server) -> None:
        jid = f"It's-\"o'dd\\{uuid.uuid4().hex[:6]}$(x)~"
        pman.post(shared.request(jid, "env"))
        assert "hidden" not in pman.wait_final(jid)["logs"]
        comments = run(shared.env, "squeue", "--all", "-h", "-t", "all", "-o", "%k").splitlines()
        assert f"org.chrisproject.pman.name={jid}" in comments

    def test_charliecloud(self, shared: Rig, tmp_path: Path, jid: str) -> None:
        root = development("slurm")["PMAN_TEST_IMAGE_DIR"]
        shutil.copytree(root, tmp_path / "images" / "img" / "localhost%busybox+1", symlinks=True)
        server = shared.start(SLURM_RUNTIME="charliecloud", SLURM_IMAGE_DIR=str(tmp_path / "images"))
        script = r"""printf '%s\0' "$@" > "/share/outgoing/argv.$PMAN_WORKER_INDEX"; cat "/share/incoming/a b"; env"""
        request = shared.request(jid, script, *HOSTILE, number_of_workers=2, type="ds", env=["A=it's $(x)\n~"])
        request["image"] = "localhost/busybox:1"
        (shared.store / request["input_dir"] / "a b").write_text("pixels\n")
        assert server.post(request).status_code == 201
        job = server.wait_final(jid)
        assert job["status"] == "finishedSuccessfully", job
        assert job["logs"].count("pixels\n") == 2
        assert "A=it's $(x)\n~\n" in job["logs"]
        for worker in range(2):
            argv = (shared.outgoing(jid) / f"argv.{worker}").read_bytes().split(b"\0")
            assert argv[: len(HOSTILE)] == [value.encode() for value in HOSTILE]
        server.stop()

    def test_behind_ssh(self, shared: Rig, tmp_path: Path, jid: str) -> None:
        """The stand-in does what sshd does: the words joined by blanks, handed to a shell."""
        wrapped(tmp_path / "bin", "ssh", 'shift; echo "$*" >> "$here/calls"; exec sh -c "$*"')
        server = shared.start(SLURM_COMMAND_PREFIX=f"{tmp_path}/bin/ssh login1")
        assert server.post(shared.request(jid, COUNTED, *HOSTILE)).status_code == 201
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert server.delete(jid).status_code == 204
        calls = (tmp_path / "bin" / "calls").read_text()
        assert all(f"SLURM_TIME_FORMAT=%s {name} " in calls for name in ("sbatch", "squeue"))
        server.stop()

    def test_many_polls_are_few_calls_of_squeue(self, shared: Rig, tmp_path: Path, jid: str) -> None:
        server = shared.start(PATH=wrapped(tmp_path / "bin", "squeue", 'date +%s.%N >> "$here/calls"; exec $real "$@"'))
        server.post(shared.request(jid, "sleep 600"))
        server.wait_state(jid, "started")
        calls = tmp_path / "bin" / "calls"
        calls.unlink()
        began_at, answers = time.monotonic(), list[str]()
        with ThreadPoolExecutor(40) as pool:  # as many as one pman answers at once
            while (elapsed_seconds := time.monotonic() - began_at) < 5:
                answers += pool.map(lambda _: server.get(jid).json()["status"], range(200))
        assert set(answers) == {"started"}
        made = len(calls.read_text().splitlines())
        assert 1 < made <= 1 + elapsed_seconds
        assert server.delete(jid).status_code == 204
        server.stop()


# What stands for sbatch the first time it is called; later calls are the real thing at once.
KILLED = {
    "before": 'mkdir "$here/once" 2>/dev/null || exec $real "$@"; echo $$ > "$here/pid"; exec sleep 600',
    "after": 'mkdir "$here/once" 2>/dev/null || exec $real "$@"; $real "$@" > "$here/said"; '
    'echo $$ > "$here/pid"; exec sleep 600',
    "late": 'mkdir "$here/once" 2>/dev/null || exec $real "$@"; cat > "$here/script"; echo $$ > "$here/pid"; '
    'until [ -e "$here/go" ]; do sleep 0.05; done; $real "$@" < "$here/script" > "$here/said"; touch "$here/done"',
}


def wait_for_the_queue(rig: Rig, jid: str, jobs: int) -> None:
    def ended() -> bool:
        states = all_slurm_jobs(rig, jid)
        return len(states) == jobs and not {"PENDING", "RUNNING", "COMPLETING"} & set(states)

    wait_for(ended, 30, f"the end of {jobs} jobs of SLURM")


class TestKilled:
    """kill -9 of pman while it is handing the job to sbatch: exactly one job after the retry."""

    @pytest.fixture(scope="class", params=["plain", "accounting"])
    @classmethod
    def shared(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        plain = request.param == "plain"
        slurm = Slurm(development("slurm"), ()) if plain else request.getfixturevalue("accounting")
        with running(slurm_rig(tmp_path_factory.mktemp("slurm-killed"), slurm.environment, *slurm.options)) as rig:
            yield rig

    @pytest.fixture(scope="class")
    @classmethod
    def pman(cls, shared: Rig) -> Server:
        return shared.start()

    @pytest.mark.parametrize("retry", ["POST", "GET"])
    @pytest.mark.parametrize("when", list(KILLED))
    def test_exactly_one_job(self, shared: Rig, pman: Server, tmp_path: Path, jid: str, when: str, retry: str) -> None:
        here = tmp_path / "bin"
        first = shared.start(PATH=wrapped(here, "sbatch", KILLED[when]))
        request = shared.request(jid, COUNTED + "sleep 1")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(first.post, request)
            wait_for((here / "pid").exists, 20, "sbatch to be called")
            first.kill()
            assert answer.exception(20) is not None
        pid = int(wait_for((here / "pid").read_text, 5, "its number"))
        if when != "late":
            os.kill(pid, signal.SIGKILL)
        if retry == "POST":
            assert pman.post(request).status_code == 201
        else:
            assert pman.get(jid).status_code == 200
        if when == "late":  # the first sbatch gets through after the second
            wait_for(lambda: shared.executions(jid), 30, "the job to begin")
            (here / "go").touch()
            wait_for((here / "done").exists, 20, "the first sbatch")
        job = pman.wait_final(jid)
        assert job["status"] == "finishedSuccessfully", job
        wait_for_the_queue(shared, jid, 2 if when == "late" else 1)
        assert pman.get(jid).json() == job
        assert shared.executions(jid) == 1

    def test_deleted_while_sbatch_is_on_its_way(self, shared: Rig, pman: Server, tmp_path: Path, jid: str) -> None:
        here = tmp_path / "bin"
        first = shared.start(PATH=wrapped(here, "sbatch", KILLED["late"]))
        request = shared.request(jid, COUNTED)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(first.post, request)
            wait_for((here / "pid").exists, 20, "sbatch to be called")
            first.kill()
            assert answer.exception(20) is not None
        assert pman.delete(jid).status_code == 204
        assert pman.post(request | {"memory_limit": 65}).status_code == 201
        (here / "go").touch()
        wait_for((here / "done").exists, 20, "the first sbatch")
        assert pman.wait_final(jid)["status"] == "finishedSuccessfully"
        wait_for_the_queue(shared, jid, 2)
        assert shared.executions(jid) == 1


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Slurm]:
    with own_slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory, forgetful: Slurm) -> Iterator[Rig]:
    with running(slurm_rig(tmp_path_factory.mktemp("slurm-own"), forgetful.environment)) as rig:
        yield rig


@pytest.fixture(scope="module")
def alone(lonely: Rig) -> Server:
    return lonely.start()


class TestWithoutAccounting:
    def test_forgotten_after_success(self, lonely: Rig, alone: Server, jid: str) -> None:
        alone.post(lonely.request(jid, COUNTED + "echo done"))
        wait_for(lambda: lonely.executions(jid) and not slurm_jobs(lonely, jid), 40, "squeue to forget the job")
        job = alone.get(jid).json()
        assert (job["status"], job["logs"]) == ("finishedSuccessfully", "done\n")

    def test_forgotten_after_failure(self, lonely: Rig, alone: Server, jid: str) -> None:
        alone.post(lonely.request(jid, COUNTED + "exit 9"))
        wait_for(lambda: lonely.executions(jid) and not slurm_jobs(lonely, jid), 40, "squeue to forget the job")
        job = alone.get(jid).json()
        assert (job["status"], job["message"]) == ("finishedWithError", "The job ended with exit code 9.")

    def test_forgotten_after_cancelled_in_the_queue(
        self, forgetful: Slurm, lonely: Rig, alone: Server, jid: str
    ) -> None:
        request = lonely.request(jid, COUNTED, partition="down")
        alone.post(request)
        forgetful.command("scancel", slurm_id(lonely, jid))
        wait_for(lambda: not slurm_jobs(lonely, jid), 40, "squeue to forget the job")
        job = alone.get(jid).json()
        assert job["status"] == "finishedWithError"
        assert "never began" in job["message"]
        assert alone.post(request).json()["status"] == "finishedWithError"

    def test_forgotten_after_killed(self, forgetful: Slurm, lonely: Rig, alone: Server, jid: str) -> None:
        alone.post(lonely.request(jid, COUNTED + "sleep 600"))
        wait_for(lambda: lonely.executions(jid), 40, "the job to begin")
        processes = forgetful.command("scontrol", "listpids", slurm_id(lonely, jid)).splitlines()[1:]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # or else the script would see its command end
            for pid in {int(line.split()[0]) for line in processes} - {-1}:
                os.kill(pid, number)
        wait_for(lambda: not slurm_jobs(lonely, jid), 40, "squeue to forget the job")
        job = alone.get(jid).json()
        assert job["status"] == "finishedWithError"
        assert "without a result" in job["message"]

    def test_node_drained(self, forgetful: Slurm, lonely: Rig, alone: Server, jid: str) -> None:
        forgetful.command("scontrol", "update", "nodename=localhost", "state=drain", "reason=test")
        alone.post(lonely.request(jid, COUNTED))

        def waiting() -> bool:
            job = alone.get(jid).json()
            assert job["status"] == "notstarted"
            return "DRAINED" in job["message"]

        wait_for(waiting, 30, "SLURM's reason")
        forgetful.command("scontrol", "update", "nodename=localhost", "state=resume")
        assert alone.wait_final(jid)["status"] == "finishedSuccessfully"

    def test_slurmctld_down(self, forgetful: Slurm, lonely: Rig, alone: Server, jid: str) -> None:
        done, begun = f"{jid}-done", f"{jid}-begun"
        alone.post(lonely.request(done, "echo fine"))
        alone.wait_final(done)
        alone.post(lonely.request(begun, COUNTED + "sleep 600"))
        alone.wait_state(begun, "started")
        hasty = lonely.start(SLURM_TIMEOUT_SECONDS="0.5")
        forgetful.dev("stop", "slurmctld")
        try:
            assert hasty.get(done).json()["logs"] == "fine\n"
            # What it saw of the queue as it started may be a moment old.
            wait_for(lambda: hasty.get(begun).status_code == 503, 30, "pman to miss SLURM")
            assert hasty.call("GET", "../../readyz").status_code == 503
            answer = hasty.post(lonely.request(jid, COUNTED))
            assert (answer.status_code, "SLURM does not answer" in answer.text) == (503, True)
        finally:
            forgetful.dev("start", "slurmctld")
        assert alone.post(lonely.request(jid, COUNTED)).status_code == 201
        assert alone.wait_final(jid)["status"] == "finishedSuccessfully"
        assert lonely.executions(jid) == 1
        alone.wait_state(begun, "started")
        assert alone.delete(begun).status_code == 204
