"""What happens when Cromwell or SLURM is down, slow, restarted or cut off: the right word, and recovery by itself.

On a SLURM of its own, since its controller is stopped here.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from pman.backends.cromwell.labels import workflow_id
from tests.fakes.cromwell_rig import CONF, Cromwell, Slurm, cromwell, own_slurm, rig_over
from tests.fakes.faultproxy import FaultProxy
from tests.live import runtimes
from tests.rig import COUNTED, FINAL, OUT, ROOT, Rig, wait_for

pytestmark = pytest.mark.live("slurm")
QUICK = {"PMAN_RC_WAIT": "2", "PMAN_ALIVE_CHECK": "1"}  # of the reference configuration, in seconds


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with own_slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Iterator[Cromwell]:
    root = tmp_path_factory.mktemp("engine")
    with cromwell(root, slurm, "bubblewrap", **QUICK) as server:
        yield server


@pytest.fixture
def jid() -> str:
    return f"fault-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def rig(engine: Cromwell, tmp_path: Path) -> Iterator[Rig]:
    with rig_over(engine, tmp_path) as rig:
        yield rig


@contextmanager
def proxied(engine: Cromwell, tmp_path: Path) -> Iterator[tuple[Rig, FaultProxy]]:
    with (
        FaultProxy(f"tcp://127.0.0.1:{engine.port}") as proxy,
        rig_over(engine, tmp_path, proxy.url.replace("tcp:", "http:")) as rig,
    ):
        yield rig, proxy


UNTIL_GO = OUT + 'until [ -e "$out/go" ]; do sleep 0.1; done; '  # a job that runs until a test lets it go on


def let_go(rig: Rig, jid: str) -> None:
    (rig.outgoing(jid) / "go").touch()


def noted_jobs(engine: Cromwell, jid: str) -> list[str]:
    """The SLURM job ids that Cromwell has noted for the first life of `jid`: what it would still know after a kill."""
    with closing(sqlite3.connect(engine.root / "cromwell.db")) as database:
        rows = database.execute("SELECT job_id FROM job WHERE id = ?", [workflow_id(jid, 1)]).fetchall()
    return [row[0] for row in rows]


def test_cromwell_is_down_at_start_and_later(engine: Cromwell, tmp_path: Path, jid: str) -> None:
    with proxied(engine, tmp_path) as (rig, proxy):
        proxy.refuse()
        server = rig.start()
        request = rig.request(jid, COUNTED + UNTIL_GO)
        for answer in (server.post(request), server.get(jid), server.delete(jid), server.call("GET", "../../readyz")):
            assert answer.status_code == 503
            assert answer.json()["message"].startswith("Cromwell at http://127.0.0.1:")
            assert "does not answer" in answer.json()["message"]
        assert server.call("GET", "../../healthz").status_code == 200
        proxy.accept()
        wait_for(lambda: server.call("GET", "../../readyz").status_code == 200, 10, "pman to find Cromwell")
        assert server.post(request).status_code == 201
        server.wait_state(jid, "started")
        proxy.refuse()
        assert server.get(jid).status_code == 503
        proxy.accept()
        let_go(rig, jid)
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1
        assert server.delete(jid).status_code == 204


class _Failing(http.server.BaseHTTPRequestHandler):
    """A gateway in front of Cromwell that answers an error, as HTML, while `code` is set; else it passes on."""

    code = 0
    target = ""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if self.code:
            status, kind, text = self.code, "text/html", b"<html><h1>not now</h1></html>"
        else:
            headers = {"Content-Type": self.headers.get("Content-Type", "")}
            answer = requests.request(self.command, self.target + self.path, data=body, headers=headers, timeout=20)
            status, kind, text = answer.status_code, answer.headers["Content-Type"], answer.content
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = _answer  # noqa: N815 - names of the library

    def log_message(self, *args: object) -> None:
        pass


def test_errors_of_a_gateway(engine: Cromwell, tmp_path: Path, jid: str) -> None:
    _Failing.target = engine.url
    gateway = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
    threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        with rig_over(engine, tmp_path, f"http://127.0.0.1:{gateway.server_port}/api/workflows/v1/") as rig:
            server, request = rig.start(), rig.request(jid, COUNTED)
            for code in (500, 502, 429):
                _Failing.code = code
                answer = server.post(request)
                assert answer.status_code == 503
                assert answer.json()["message"].startswith(f"Cromwell answers {code}: ")
                assert "<" not in answer.json()["message"]
            for code in (401, 403):
                _Failing.code = code
                answer = server.post(request)
                assert answer.status_code == 500
                assert "CROMWELL_AUTH_USER" in answer.json()["message"]
            _Failing.code = 200  # a page of somebody else's
            assert "is not Cromwell" in server.get(jid).json()["message"]
            _Failing.code = 0
            assert server.post(request).status_code == 201
            assert server.wait_final(jid)["status"] == "finishedSuccessfully"
            assert rig.executions(jid) == 1
    finally:
        gateway.shutdown()
        gateway.server_close()


def test_cromwell_hangs(engine: Cromwell, tmp_path: Path, jid: str) -> None:
    with proxied(engine, tmp_path) as (rig, proxy):
        hasty, server = rig.start(CROMWELL_TIMEOUT_SECONDS="0.5"), rig.start()
        request = rig.request(jid, COUNTED + UNTIL_GO)
        proxy.hang()
        with ThreadPoolExecutor(2) as pool:
            calls = (pool.submit(hasty.post, request), pool.submit(hasty.get, jid))
            assert [call.result().status_code for call in calls] == [503, 503]
        proxy.resume()
        assert server.post(request).status_code == 201
        proxy.hang()
        assert hasty.get(jid).status_code == 503
        proxy.resume()
        let_go(rig, jid)
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1


@pytest.mark.parametrize("fault", ["cut_before", "cut_after"])
def test_the_connection_is_cut_around_the_submission(
    engine: Cromwell, slurm: Slurm, tmp_path: Path, jid: str, fault: str
) -> None:
    with proxied(engine, tmp_path) as (rig, proxy):
        server = rig.start()
        getattr(proxy, fault)(b"POST /api/workflows/v1 ")
        assert server.post(rig.request(jid, COUNTED)).status_code == 201
        assert proxy.cuts == 1
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1
        assert len(slurm.jobs(jid)) == 1


def test_cromwell_is_killed_while_a_job_runs(engine: Cromwell, rig: Rig, jid: str) -> None:
    server = rig.start()
    server.post(rig.request(jid, COUNTED + UNTIL_GO + "echo survived"))
    server.wait_state(jid, "started")
    engine.kill()
    assert server.get(jid).status_code == 503
    engine.start()
    let_go(rig, jid)
    job = server.wait_final(jid)
    assert job["status"] == "finishedSuccessfully"
    assert "survived" in job["logs"]
    assert rig.executions(jid) == 1


@pytest.mark.parametrize(("how", "seconds"), [("kill", 0.0), ("stop", 0.15), ("stop", 2.0)])
def test_a_job_is_deleted_right_after_a_restart_of_cromwell(
    slurm: Slurm, tmp_path: Path, jid: str, how: str, seconds: float
) -> None:
    """An abort before Cromwell is at the job again ends the workflow, and leaves the job of SLURM alone.

    After its restart, this Cromwell gives jobs their tokens only after 6 s. The job is deleted after so many seconds.
    """
    with cromwell(tmp_path / "engine", slurm, "bubblewrap", **QUICK) as engine, rig_over(engine, tmp_path) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED + UNTIL_GO))
        server.wait_state(jid, "started")
        (number,) = slurm.jobs(jid, "RUNNING")
        getattr(engine, how)()
        engine.options += ("--set", "token_period=6")
        engine.start()
        time.sleep(seconds)
        wait_for(lambda: server.delete(jid).status_code == 204, 90, "a DELETE that is done")
        assert number not in slurm.jobs(jid, "RUNNING")
        assert server.get(jid).status_code == 404


def test_a_configuration_that_cannot_run_kill_again(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """DELETE waits until Cromwell is at its jobs again, and submits no workflow that would become a job of SLURM."""
    conf = CONF.read_text().replace('String ends_workflow = ""\n', "").replace("'${ends_workflow}'", "")
    assert "ends_workflow" not in "".join(line for line in conf.splitlines() if not line.strip().startswith("#"))
    (tmp_path / "slurm.conf").write_text(conf)
    options = ("--pace", "test", "--conf", str(tmp_path / "slurm.conf"))
    with (
        cromwell(tmp_path / "engine", slurm, "bubblewrap", *options, **QUICK) as engine,
        rig_over(engine, tmp_path) as rig,
    ):
        server = rig.start()
        server.post(rig.request(jid, COUNTED + UNTIL_GO))
        server.wait_state(jid, "started")
        (number,) = slurm.jobs(jid, "RUNNING")
        engine.kill()
        engine.options += ("--set", "token_period=4")
        engine.start()
        query = f"{engine.url}/api/workflows/v1/query"
        (found,) = requests.get(query, timeout=20).json()["results"]
        events = f"{engine.url}/api/workflows/v1/{found['id']}/metadata?includeKey=workflowProcessingEvents"
        wait_for(lambda: requests.get(events, timeout=20).text.count('"PickedUp"') == 2, 30, "the second pick-up")
        assert server.delete(jid).status_code == 204
        wait_for(lambda: number not in slurm.jobs(jid, "RUNNING"), 20, "the job of SLURM to end")
        assert len(requests.get(query, timeout=20).json()["results"]) == 1


def test_cromwell_and_its_kill_are_killed(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """After its restart, Cromwell finds the code that an abort writes first, and does not run `kill` again.

    It does not ask whether the job is alive, since an abort would wait for the answer (pollStatusAsync of Cromwell 93's
    StandardAsyncExecutionActor.scala).
    """
    with (
        cromwell(tmp_path / "engine", slurm, "bubblewrap", PMAN_ALIVE_CHECK="300") as engine,
        rig_over(engine, tmp_path) as rig,
    ):
        server = rig.start()
        server.post(rig.request(jid, COUNTED + UNTIL_GO))
        server.wait_state(jid, "started")
        (number,) = slurm.jobs(jid, "RUNNING")
        slurm.daemon("stop", "slurmctld")
        try:
            with ThreadPoolExecutor(1) as pool:
                deleted = pool.submit(server.delete, jid)
                processes = wait_for(lambda: _tree_of(engine), 30, "Cromwell to run `kill`")
                engine.kill()
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                assert deleted.result().status_code == 503
        finally:
            slurm.daemon("start", "slurmctld")
        engine.start()
        wait_for(lambda: server.delete(jid).status_code == 204, 90, "a DELETE that is done")
        assert number not in slurm.jobs(jid, "RUNNING")


def test_scancel_fails_for_a_while(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """Cromwell says Aborted after its one `kill` has failed. The job must have ended before a DELETE is a 204."""
    broken, env = _faulty(tmp_path, "scancel", "exit 1")
    with cromwell(tmp_path / "engine", slurm, "bubblewrap", **env) as engine, rig_over(engine, tmp_path) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED + UNTIL_GO))
        server.wait_state(jid, "started")
        (number,) = slurm.jobs(jid, "RUNNING")
        broken.touch()
        answer = server.delete(jid)
        assert answer.status_code == 503
        assert "has not ended the job in SLURM yet" in answer.json()["message"]
        assert number in slurm.jobs(jid, "RUNNING")
        broken.unlink()
        assert server.delete(jid).status_code == 204
        assert number not in slurm.jobs(jid, "RUNNING")
        assert server.get(jid).status_code == 404


def test_squeue_hangs_at_a_delete(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """That it says nothing does not mean that the job has ended."""
    broken, env = _faulty(tmp_path, "squeue", "exec sleep 60")
    with cromwell(tmp_path / "engine", slurm, "bubblewrap", **env) as engine, rig_over(engine, tmp_path) as rig:
        broken.touch()
        runtimes.assert_delete_ends_what_ignores_term(rig, {jid: (rig.start(), 1)})


def _faulty(tmp_path: Path, name: str, fault: str) -> tuple[Path, dict[str, str]]:
    """A file, and the environment of a Cromwell whose command `name` does `fault` while that file is there."""
    broken, command = tmp_path / "broken", tmp_path / "bin" / name
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ ! -e {broken} ] || {fault}\nexec {shutil.which(name)} "$@"\n')
    command.chmod(0o755)
    return broken, {"PMAN_ALIVE_CHECK": "300", "PATH": f"{command.parent}:{os.environ['PATH']}"}


def _tree_of(server: Cromwell) -> list[psutil.Process]:
    """What Cromwell has started, once `kill` is among it."""
    assert server.process
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(server.process.pid).children(recursive=True)
        return below if any("script.kill" in " ".join(process.cmdline()) for process in below) else []
    return []


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_cromwell_is_killed_before_it_notes_the_job_id(
    engine: Cromwell, slurm: Slurm, rig: Rig, jid: str, state: str
) -> None:
    """It submits the job again; the reference configuration finds the SLURM job that is there."""
    server, blocker = rig.start(), f"{jid}-blocker"
    if state == "PENDING":
        server.post(rig.request(blocker, UNTIL_GO, partition="tiny"))
        server.wait_state(blocker, "started")
    server.post(rig.request(jid, COUNTED + UNTIL_GO, partition="tiny"))
    began = 1 if state == "RUNNING" else 0
    wait_for(lambda: noted_jobs(engine, jid) and rig.executions(jid) == began, 60, f"the job to be {state}")
    (number,) = slurm.jobs(jid, state)
    engine.kill()
    with closing(sqlite3.connect(engine.root / "cromwell.db")) as database:
        database.execute("DELETE FROM job WHERE id = ?", [workflow_id(jid, 1)])
        database.commit()
    engine.start()
    assert wait_for(lambda: noted_jobs(engine, jid), 30, "Cromwell to submit the job again") == [number]
    for name in (blocker, jid) if state == "PENDING" else (jid,):
        let_go(rig, name)
        assert server.wait_final(name)["status"] == "finishedSuccessfully"
    assert slurm.jobs(jid) == [number]
    assert rig.executions(jid) == 1


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@contextmanager
def with_program(slurm: Slurm, directory: Path, name: str, script: str) -> Iterator[Rig]:
    """A rig over a Cromwell whose program of SLURM's of that name is this shell script; $REAL is the real one."""
    (directory / "bin").mkdir()
    program = directory / "bin" / name
    program.write_text(f"#!/bin/sh\nREAL={shutil.which(name)}\n{script}\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    with (
        cromwell(directory / "engine", slurm, "bubblewrap", **QUICK, PATH=path) as engine,
        rig_over(engine, directory) as rig,
    ):
        yield rig


def with_sbatch(slurm: Slurm, directory: Path, script: str) -> AbstractContextManager[Rig]:
    """with_program() for an sbatch that fails after all."""
    return with_program(slurm, directory, "sbatch", f"{script}\necho '{TIMED_OUT}' >&2\nexit 1")


# Apptainer's --containall: the container has an environment and process ids of its own.
APPTAINER = r"""#!/bin/bash
[[ $2 != pull ]] || exec touch "$3"
shift 2
binds=()
while [[ $1 == -* ]]; do
  case $1 in --mount | --workdir | --cwd)
    source=${2#*src=} target=${2#*dst=}
    [[ $target != /share/* ]] || binds+=(--bind "${source%%[,\"]*}" "${target%%[,\"]*}")
    shift ;;
  --nv) binds+=(--setenv ASKED "for GPUs") ;;
  esac
  shift
done
exec env -i PATH="$PATH" bwrap --unshare-pid --bind / / --dev-bind /dev /dev --tmpfs /share "${binds[@]}" "${@:2}"
"""


@contextmanager
def with_apptainer(slurm: Slurm, directory: Path) -> Iterator[Rig]:
    apptainer = directory / "apptainer"
    apptainer.write_text(APPTAINER)
    apptainer.chmod(0o755)
    env = {"PMAN_PROLOGUE": f'PATH="{directory}:$PATH"'}
    with cromwell(directory / "engine", slurm, "apptainer", **env) as engine, rig_over(engine, directory) as rig:
        yield rig


@pytest.mark.parametrize("workers", [1, 2])
def test_a_container_with_an_environment_of_its_own(slurm: Slurm, tmp_path: Path, jid: str, workers: int) -> None:
    """It has the GPUs that SLURM chose, and writes nothing after its end."""
    stubborn = "trap '' TERM; while :; do echo more >> \"$out/lines\"; sleep 0.1; done"
    with with_apptainer(slurm, tmp_path) as rig:
        server = rig.start()
        script = OUT + 'echo "GPU $CUDA_VISIBLE_DEVICES asked $ASKED"; touch "$out/began-${PMAN_WORKER_INDEX-0}"; '
        server.post(rig.request(jid, script + stubborn, number_of_workers=workers, gpu_limit=1))
        lines = rig.outgoing(jid) / "lines"
        began = [rig.outgoing(jid) / f"began-{index}" for index in range(workers)]
        wait_for(lambda: lines.exists() and all(path.exists() for path in began), 30, "every worker to write")
        (number,) = slurm.jobs(jid, "RUNNING")
        slurm.run("scancel", number)
        job = server.wait_final(jid)
        gpus = set(re.findall(r"^GPU \d asked for GPUs$", job["logs"], re.M))
        assert (job["status"], len(gpus)) == ("finishedWithError", workers)
        written = lines.read_text()
        wait_for(lambda: not slurm.jobs(jid, "RUNNING,COMPLETING"), 60, "SLURM to be done with the job")
        assert lines.read_text() == written


def test_workers_with_the_same_process_ids(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    with with_apptainer(slurm, tmp_path) as rig:
        server = rig.start()
        server.post(rig.request(jid, 'echo "$PMAN_WORKER_INDEX of 4"', number_of_workers=4))
        job = server.wait_final(jid)
        said = "".join(f"=== worker {index} ===\n{index} of 4\n" for index in range(4))
        assert (job["status"], job["logs"]) == ("finishedSuccessfully", said)


def test_squeue_says_more_than_the_state(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """A job that runs is not taken for a dead one."""
    asked = tmp_path / "asked"
    script = f'echo \'squeue: warning: something is deprecated\' >&2; echo >> {asked}; exec "$REAL" "$@"'
    with with_program(slurm, tmp_path, "squeue", script) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED + UNTIL_GO))
        server.wait_state(jid, "started")
        before = len(asked.read_text()) if asked.exists() else 0
        wait_for(lambda: asked.exists() and len(asked.read_text()) > before + 2, 60, "Cromwell to look for the job")
        let_go(rig, jid)
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"


def test_slurm_is_away_when_a_job_is_deleted(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    script = f"""[ -e {tmp_path}/tried ] && exec "$REAL" "$@"
touch {tmp_path}/tried
echo 'scancel: error: Unable to contact slurm controller (connect failure)' >&2
exit 1"""
    with with_program(slurm, tmp_path, "scancel", script) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED + "sleep 300"))
        wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
        assert server.delete(jid).status_code == 204
        assert not slurm.jobs(jid, "RUNNING,PENDING")


def test_sbatch_gives_up_on_a_job_that_slurm_has_taken(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    with with_sbatch(slurm, tmp_path, '"$REAL" "$@" > /dev/null') as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED))
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == len(slurm.jobs(jid)) == 1


def test_slurm_takes_a_job_after_its_sbatch_has_failed(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """Again and again: the job waits, with sbatch's words, and what SLURM takes in the end runs once."""
    later = tmp_path / "later"
    late = f'(until [ -e "{later}" ]; do sleep 0.1; done; exec "$REAL" "$@") > /dev/null 2>&1 &'
    with with_sbatch(slurm, tmp_path, late) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED))
        said = f"Waiting to be submitted: SLURM does not take the job now: {TIMED_OUT}."
        try:
            told = wait_for(lambda: _if(server.get(jid).json(), said), 60, "pman to say that it waits")
        finally:
            later.touch()
        assert told["status"] == "notstarted"
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        wait_for(lambda: not slurm.jobs(jid, "PENDING,RUNNING,COMPLETING"), 30, "the other late jobs")
        assert rig.executions(jid) == 1


def test_a_limit_on_jobs_in_the_queue(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """pman submits everybody's jobs as one user: the job waits until the limit allows one more."""
    limit, fewer = "AssocGrpSubmitJobsLimit", tmp_path / "fewer"
    words = f"sbatch: error: {limit}\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    full = f'[ ! -e "{fewer}" ] || exec "$REAL" "$@"\necho "{words}" >&2\nexit 1'
    with with_program(slurm, tmp_path, "sbatch", full) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED))
        told = wait_for(lambda: _if(server.get(jid).json(), limit), 60, "pman to say that it waits")
        fewer.touch()
        assert told["status"] == "notstarted"
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1


def test_a_job_that_waits_for_slurm_is_deleted(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """What SLURM takes after that does not run."""
    later = tmp_path / "later"
    late = f'(until [ -e "{later}" ]; do sleep 0.1; done; exec "$REAL" "$@") > /dev/null 2>&1 &'
    with with_sbatch(slurm, tmp_path, late) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED))
        try:
            wait_for(lambda: _if(server.get(jid).json(), "Waiting to be submitted: "), 60, "pman to say that it waits")
            assert server.delete(jid).status_code == 204
        finally:
            later.touch()
        wait_for(lambda: slurm.jobs(jid) and not slurm.jobs(jid, "PENDING,RUNNING,COMPLETING"), 30, "the late job")
        assert rig.executions(jid) == 0


def _if(job: dict[str, str], words: str) -> dict[str, str] | None:
    return job if words in job["message"] else None


@contextmanager
def stock(slurm: Slurm, directory: Path, *changes: str) -> Iterator[tuple[Cromwell, Rig]]:
    """A Cromwell that shows a new workflow late, as without the reference configuration, and its rig."""
    options = [word for change in ("metadata_flush=5", "summary_period=1", *changes) for word in ("--set", change)]
    with (
        cromwell(directory / "stock", slurm, "bubblewrap", "--pace", "test", *options) as engine,
        rig_over(engine, directory) as rig,
    ):
        yield engine, rig


def shown(engine: Cromwell, jid: str) -> list[str]:
    """The ids of the workflows that Cromwell shows for `jid`: none while its listing lags."""
    params = {"label": f"org.chrisproject.pman.name:{jid}"}
    answer = requests.get(f"{engine.url}/api/workflows/v1/query", params=params, timeout=10)
    return [row["id"] for row in answer.json()["results"]]


def test_a_new_job_on_a_stock_server(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """POST does not wait; while Cromwell does not show the job, no replica says 404, and it can be deleted."""
    with stock(slurm, tmp_path) as (engine, rig):
        first, second = rig.start(), rig.start()
        first.post(rig.request(f"{jid}-slow", "true"))  # from this one it learns that the server is slow

        def unseen() -> str:
            """A job of which everything was asked before Cromwell showed it."""
            name = f"{jid}-{uuid.uuid4().hex[:4]}"
            assert first.post(rig.request(name, COUNTED + "sleep 5")).status_code == 201
            answers = [server.get(name) for server in (first, second)]
            unknown = second.get(f"{name}-unknown").status_code
            assert [answer.status_code for answer in answers] == [200, 200]
            assert unknown == 404
            words = {answer.json()["status"] for answer in answers}
            return name if not shown(engine, name) and words == {"notstarted"} else ""

        jid = wait_for(unseen, 60, "a job that is asked for while it is invisible")
        assert second.post(rig.request(jid, COUNTED + "sleep 5")).status_code == 201  # waits until it can compare
        assert first.wait_final(jid)["status"] == "finishedSuccessfully"
        assert second.get(jid).json()["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1
        gone = rig.request(f"{jid}-gone", COUNTED + "sleep 300")
        assert first.post(gone).status_code == 201
        assert second.delete(f"{jid}-gone").status_code == 204
        assert first.get(f"{jid}-gone").status_code == second.get(f"{jid}-gone").status_code == 404
        wait_for(lambda: not slurm.jobs(f"{jid}-gone", "PENDING,RUNNING,COMPLETING"), 15, "squeue to be empty")
        assert second.post(gone | {"entrypoint": ["true"]}).status_code == 201
        assert second.wait_final(f"{jid}-gone")["status"] == "finishedSuccessfully"


def test_cromwell_is_killed_before_it_shows_a_job(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """The workflow is in limbo, invisible and its id taken, until it is taken over: without `submission`."""
    with stock(slurm, tmp_path, "pickup_period=1", "heartbeat_ttl=4", "metadata_flush=600") as (engine, rig):
        servers = (rig.start(), rig.start())
        # It still runs when it is taken over: in the real one, too, no workflow ends before its first metadata show.
        assert servers[0].post(rig.request(jid, COUNTED + UNTIL_GO)).status_code == 201
        wait_for(lambda: noted_jobs(engine, jid), 30, "Cromwell to note the job id")
        assert not shown(engine, jid)
        engine.kill()
        engine.options = (*engine.options, "--set", "metadata_flush=0.1", "--set", "summary_period=0.1")
        engine.start()
        words: list[str] = []

        def ended() -> bool:
            answers = [server.get(jid) for server in servers]
            assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
            words.extend(str(answer.json()["status"]) for answer in answers)
            if words[-1] == "started":
                let_go(rig, jid)
            return words[-1] in FINAL

        wait_for(ended, 90, "the job to end", every=0.3)
        order = ["notstarted", "started", "finishedSuccessfully"]
        assert [order.index(word) for word in words] == sorted(order.index(word) for word in words)
        assert rig.executions(jid) == 1


def test_a_job_aborted_before_it_was_picked_up(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """Its metadata has no `end`."""
    with stock(slurm, tmp_path, "pickup_period=600", "metadata_flush=0.2") as (engine, rig):
        server = rig.start()
        server.post(rig.request(jid, COUNTED))
        (workflow,) = wait_for(lambda: shown(engine, jid), 30, "Cromwell to show the job")
        assert requests.post(f"{engine.url}/api/workflows/v1/{workflow}/abort", timeout=10).status_code == 200
        job = server.wait_final(jid)
        assert (job["status"], job["timestamp"], job["logs"]) == ("finishedWithError", "", "")
        assert job["message"] == "The job was aborted, by DELETE or by somebody at Cromwell."
        assert server.delete(jid).status_code == 204
        assert server.get(jid).status_code == 404


OUTAGE_SECONDS = int(os.environ.get("PMAN_TEST_OUTAGE_SECONDS", "45"))  # longer than sbatch tries by itself
BURST = int(os.environ.get("PMAN_TEST_OUTAGE_JOBS", "6"))


def test_slurmctld_is_away_in_the_middle_of_a_burst(slurm: Slurm, engine: Cromwell, rig: Rig, jid: str) -> None:
    """What runs goes on; what is submitted meanwhile waits until SLURM answers, says so, and runs once."""
    server = rig.start()
    server.post(rig.request(jid, COUNTED + UNTIL_GO + "echo through"))
    server.wait_state(jid, "started")
    burst = [f"{jid}-{index}" for index in range(BURST)]
    for name in burst[: BURST // 2]:
        assert server.post(rig.request(name, COUNTED)).status_code == 201
    down = time.monotonic()
    slurm.daemon("stop", "slurmctld")
    try:
        for name in burst[BURST // 2 :]:
            assert server.post(rig.request(name, COUNTED)).status_code == 201
        let_go(rig, jid)
        waits = wait_for(
            lambda: _if(server.get(burst[-1]).json(), "SLURM does not take the job now"), 240, "pman to say so"
        )
        assert waits["status"] == "notstarted"
        # Cromwell sees the end only after its squeue has given up.
        assert server.wait_final(jid, 240)["status"] == "finishedSuccessfully"
        assert "through" in server.get(jid).json()["logs"]
        wait_for(lambda: time.monotonic() - down > OUTAGE_SECONDS, OUTAGE_SECONDS, "the end of the outage", every=0.5)
    finally:
        slurm.daemon("start", "slurmctld")
    ends = {name: server.wait_final(name, 400) for name in burst}
    assert {end["status"] for end in ends.values()} == {"finishedSuccessfully"}, ends
    assert [rig.executions(name) for name in [jid, *burst]] == [1] * (BURST + 1)
    assert [len(slurm.jobs(name)) for name in burst] == [1] * BURST


def test_a_pending_job_is_cancelled(slurm: Slurm, tmp_path: Path, jid: str) -> None:
    """With the settings as they are shipped. It says why it waits, and at no time that it had started."""
    with cromwell(tmp_path / "engine", slurm, "bubblewrap") as engine, rig_over(engine, tmp_path) as rig:
        server = rig.start()
        server.post(rig.request(jid, COUNTED, partition="short", time_limit_minutes=5))
        (number,) = wait_for(lambda: slurm.jobs(jid, "PENDING"), 30, "the job to be pending")
        said = f"Queued in SLURM as job {number}: PartitionTimeLimit."
        wait_for(lambda: _if(server.get(jid).json(), said), 30, "pman to say why it waits")
        slurm.run("scancel", number)
        seen: list[dict[str, str]] = []

        def final() -> bool:
            seen.append(server.get(jid).json())
            return seen[-1]["status"] in FINAL

        wait_for(final, 30, "the end")
        assert {job["status"] for job in seen[:-1]} == {"notstarted"}
        assert all(job["message"].startswith("Queued in SLURM") for job in seen[:-1])
        assert seen[-1]["message"] == "The job was ended by SLURM before it began (CANCELLED)."
        assert rig.executions(jid) == 0


def test_what_sbatch_refuses_never_starts(slurm: Slurm, rig: Rig, jid: str) -> None:
    server = rig.start()
    server.post(rig.request(jid, COUNTED, partition="no-such-partition"))
    seen: list[dict[str, str]] = []

    def final() -> bool:
        seen.append(server.get(jid).json())
        return seen[-1]["status"] in FINAL

    wait_for(final, 60, "the end", every=0.02)
    assert "started" not in {job["status"] for job in seen}
    assert all(job["message"] for job in seen)


# A server that answers anything, and notes how it was started.
JAVA = """#!/bin/sh
{ echo "$LC_ALL"; printf '%s\\n' "$@"; } > started
port=$(sed -n 's/.*webservice.*port = \\([0-9]*\\).*/\\1/p' "$(printf '%s\\n' "$@" | sed -n 's/^-Dconfig.file=//p')")
exec python3 -m http.server --bind 127.0.0.1 "$port"
"""


def test_the_engine_starts_java_with_utf_8(slurm: Slurm, tmp_path: Path) -> None:
    """In the C locale, directories that are not ASCII would be question marks."""
    java, jar = tmp_path / "java", tmp_path / "cromwell.jar"
    java.write_text(JAVA.replace("started", f"{tmp_path}/started"))
    java.chmod(0o755)
    jar.touch()
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CROMWELL_JAR": str(jar), "CROMWELL_URL": ""}
    script = str(ROOT / "scripts" / "engines" / "slurm")
    try:
        Slurm(slurm.env | more).run(script, "up", "--cromwell")
        locale, *words = (tmp_path / "started").read_text().splitlines()
    finally:
        slurm.run(script, "stop", "cromwell")
    assert locale == "C.UTF-8"
    assert words[0] == "-Dfile.encoding=UTF-8"
