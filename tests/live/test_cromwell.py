"""pman, Cromwell's stand-in and a real SLURM: the contract, and what only this deployment has."""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.contract import HOSTILE, Contract
from tests.fakes.cromwell_rig import Cromwell, Slurm, cromwell, image_storage, rig_over, shared_slurm
from tests.fakes.faultproxy import FaultProxy
from tests.live import runtimes
from tests.rig import COUNTED, FINAL, OUT, ROOT, Rig, Server, wait_for

pytestmark = pytest.mark.live("slurm")
NAME = "org.chrisproject.pman.name"
# What Cromwell's own process may have had, and what a job must not get.
DIRTY = {
    "LD_LIBRARY_PATH": "/dirty", "LANG": "dirty", "DATABASE_PASSWORD": "dirty", "SBATCH_JOB_NAME": "dirty",
    "USER": "dirty",
}  # fmt: skip


class TestCharliecloud(Contract):
    """In containers of an image directory, unprivileged, as on a cluster without Docker."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        directory = tmp_path_factory.mktemp("charliecloud")
        storage = image_storage(directory / "storage")
        with (
            cromwell(directory / "cromwell", shared_slurm(), "charliecloud", CH_IMAGE_STORAGE=str(storage)) as server,
            rig_over(server, directory) as rig,
        ):
            yield rig

    def test_what_a_job_sees(self, server: Server, rig: Rig, jid: str) -> None:
        assert runtimes.seen(server, rig, jid).items() <= runtimes.table()["charliecloud"].items()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bubblewrap")


@pytest.fixture(scope="module")
def slurm() -> Slurm:
    return shared_slurm()


@pytest.fixture(scope="module")
def engine(directory: Path, slurm: Slurm) -> Iterator[Cromwell]:
    with cromwell(directory / "cromwell", slurm, "bubblewrap", **DIRTY) as server:
        yield server


@pytest.fixture(scope="module")
def rig(engine: Cromwell, directory: Path) -> Iterator[Rig]:
    with rig_over(engine, directory) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.fixture
def jid(server: Server) -> Iterator[str]:
    name = f"chris-jid-{uuid.uuid4().hex[:8]}"
    yield name
    server.delete(name)


class TestBubblewrap(Contract):
    """On the node's own files with a /share of the job's own, its input read-only."""

    def test_what_a_job_sees(self, server: Server, rig: Rig, jid: str) -> None:
        assert runtimes.seen(server, rig, jid).items() <= runtimes.table()["bubblewrap"].items()

    def test_delete_ends_a_command_that_ignores_term(self, server: Server, rig: Rig, jid: str) -> None:
        runtimes.assert_delete_ends_what_ignores_term(rig, {f"{jid}-1": (server, 1), f"{jid}-2": (server, 2)})


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.json")), ids=lambda path: path.stem)
def test_examples(server: Server, rig: Rig, slurm: Slurm, path: Path) -> None:
    request: dict[str, Any] = json.loads(path.read_text())
    jid = request["jid"] = f"{request['jid']}-{uuid.uuid4().hex[:6]}"
    for name in ("incoming", "outgoing"):
        request[f"{name.removesuffix('coming').removesuffix('going')}put_dir"] = f"key-{jid}/{name}"
        (rig.store / f"key-{jid}" / name).mkdir(parents=True)
    (rig.store / f"key-{jid}" / "incoming" / "scan.txt").write_text("pixels\n")
    assert server.post(request).status_code == 201
    job = server.wait_final(jid)
    assert (job["status"], job["message"]) == ("finishedSuccessfully", ""), job
    made = sorted(file.name for file in (rig.store / f"key-{jid}" / "outgoing").iterdir())
    expected = {
        "copy-and-hash": ["SHA256SUMS", "scan.txt"],
        "four-workers": [f"worker-{i}.txt" for i in range(4)],
        "hostile-arguments": ["arguments.txt"],
    }
    assert made == expected[path.stem]
    if path.stem == "hostile-arguments":
        printed = "".join(f"<{arg}>\n" for arg in [*request["args"], "/share/outgoing"])
        assert (rig.store / f"key-{jid}" / "outgoing" / "arguments.txt").read_text() == printed
    assert len(slurm.jobs(jid)) == 1
    assert server.delete(jid).status_code == 204


def test_a_known_environment(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, "env; umask; ulimit -n", number_of_workers=2))
    lines = server.wait_final(jid)["logs"].splitlines()
    user = pwd.getpwuid(os.geteuid())
    known = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "0022")
    own = (f"HOME={user.pw_dir}", f"USER={user.pw_name}", f"LOGNAME={user.pw_name}")
    assert [one for one in (*known, *own) if not any(line.startswith(one) for line in lines)] == [], lines
    assert not [line for line in lines if "dirty" in line], lines


# -- what becomes of jobs in SLURM ---------------------------------------------------------------------------------


def test_pending_in_a_full_partition(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    first = f"{jid}-first"
    server.post(rig.request(first, "sleep 300", partition="tiny"))
    running = server.wait_state(first, "started")
    server.post(rig.request(jid, COUNTED, partition="tiny"))
    (number,) = wait_for(lambda: slurm.jobs(jid, "PENDING"), 30, "the second job to be pending")
    told = wait_for(lambda: _if(server.get(jid).json(), "Queued in SLURM"), 30, "pman to say that it is queued")
    assert told["status"] == "notstarted"
    assert re.fullmatch(rf"Queued in SLURM as job {number}(: \w+)?\.", told["message"])
    assert running["message"].startswith("Running as SLURM job ")
    assert server.delete(first).status_code == 204
    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
    assert rig.executions(jid) == 1


def _if(job: dict[str, str], words: str) -> dict[str, str] | None:
    return job if words in job["message"] else None


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_delete_empties_the_queue(server: Server, rig: Rig, slurm: Slurm, jid: str, state: str) -> None:
    blocker = f"{jid}-blocker"
    if state == "PENDING":
        server.post(rig.request(blocker, "sleep 300", partition="tiny"))
        server.wait_state(blocker, "started")
    server.post(rig.request(jid, COUNTED + "sleep 300", partition="tiny"))
    began = 0 if state == "PENDING" else 1
    wait_for(lambda: slurm.jobs(jid, state) and rig.executions(jid) == began, 60, f"the job to be {state}")
    assert server.delete(jid).status_code == 204
    wait_for(lambda: not slurm.jobs(jid, "PENDING,RUNNING,COMPLETING"), 15, "squeue to be empty")
    assert server.get(jid).status_code == 404
    server.delete(blocker)
    assert server.post(rig.request(jid, COUNTED + "exit 0")).status_code == 201
    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
    assert rig.executions(jid) == began + 1


def test_sbatch_refuses_the_partition(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    server.post(rig.request(jid, COUNTED, partition="no-such-partition"))
    job = server.wait_final(jid)
    assert job["status"] == "finishedWithError"
    assert job["message"].startswith("SLURM refused the job: sbatch: error: "), job
    assert "invalid partition specified: no-such-partition" in job["message"]
    assert "Invalid partition name specified" in job["logs"]
    assert slurm.jobs(jid) == []


def test_sbatch_refuses_the_resources(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, COUNTED, memory_limit=10_000_000))
    job = server.wait_final(jid)
    assert job["status"] == "finishedWithError"
    assert "SLURM refused the job: sbatch: error: Memory specification" in job["message"]


@pytest.mark.parametrize(("script", "words"), [("kill -9 $$", "killed (exit code 137)"), ("exit 143", "143")])
def test_a_job_that_is_killed(server: Server, rig: Rig, jid: str, script: str, words: str) -> None:
    """Cromwell hides these exit codes; the file `rc` has them."""
    server.post(rig.request(jid, script))
    job = server.wait_final(jid)
    assert (job["status"], words in job["message"]) == ("finishedWithError", True), job


@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_memory(server: Server, rig: Rig, jid: str, workers: int) -> None:
    """Also where SLURM leaves the rest of the job alone, which then returns 0."""
    eat = "import time; a = b'x' * 400_000_000; time.sleep(20)"
    server.post(rig.request(jid, f'python3 -c "{eat}"; exit 0', memory_limit=64, number_of_workers=workers))
    job = server.wait_final(jid)
    assert (job["status"], job["message"]) == ("finishedWithError", "The job used more memory than its limit."), job


def test_exit_codes_of_time_limits_are_the_commands_own(server: Server, rig: Rig, jid: str) -> None:
    server.post(rig.request(jid, "exit 125"))
    assert "125" in server.wait_final(jid)["message"]


def test_scancel_behind_cromwells_back(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    server.post(rig.request(jid, "echo before; sleep 300"))
    (number,) = wait_for(lambda: slurm.jobs(jid, "RUNNING"), 30, "the job to run")
    wait_for(lambda: "before" in server.get(jid).json()["logs"], 30, "the job's first line")
    slurm.run("scancel", number)
    job = server.wait_final(jid)
    assert job["status"] == "finishedWithError"
    assert job["message"].startswith("The job was ended by SLURM after "), job
    assert "before" in job["logs"]


def test_a_program_that_ignores_the_signal_writes_nothing_after_its_end(
    server: Server, rig: Rig, slurm: Slurm, jid: str
) -> None:
    """ChRIS fetches the output as soon as it sees a final state."""
    server.post(rig.request(jid, OUT + "trap '' TERM; while :; do echo more >> \"$out/lines\"; sleep 0.1; done"))
    lines = rig.outgoing(jid) / "lines"
    wait_for(lines.exists, 30, "the job to write")
    (number,) = slurm.jobs(jid, "RUNNING")
    slurm.run("scancel", number)
    assert server.wait_final(jid)["status"] == "finishedWithError"
    written = lines.read_text()
    wait_for(lambda: not slurm.jobs(jid, "RUNNING,COMPLETING"), 30, "SLURM to be done with the job")
    assert lines.read_text() == written


def test_the_end_of_a_job_spares_another_clusters_job_of_the_same_number(
    server: Server, rig: Rig, slurm: Slurm, jid: str
) -> None:
    server.post(rig.request(jid, COUNTED + "sleep 300"))
    wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
    (number,) = slurm.jobs(jid, "RUNNING")
    with subprocess.Popen(["sleep", "300"], env={**os.environ, "SLURM_JOB_ID": number}) as other:
        try:
            slurm.run("scancel", number)
            assert server.wait_final(jid)["status"] == "finishedWithError"
            assert other.poll() is None
        finally:
            other.kill()


def test_requeued_by_an_admin_runs_once(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    server.post(rig.request(jid, COUNTED + "sleep 600"))
    wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
    (number,) = slurm.jobs(jid, "RUNNING")
    slurm.run("scontrol", "update", f"jobid={number}", "requeue=1")
    slurm.run("scontrol", "requeue", number)
    wait_for(lambda: slurm.jobs(jid, "PENDING"), 30, "the job to be back in the queue")
    slurm.run("scontrol", "update", f"jobid={number}", "starttime=now")  # SLURM would wait two minutes
    assert server.wait_final(jid)["status"] == "finishedWithError"
    wait_for(lambda: not slurm.jobs(jid, "PENDING,RUNNING,COMPLETING"), 30, "SLURM to be done with the job")
    assert rig.executions(jid) == 1


def test_a_signal_is_not_the_time_limit(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    """As before a preemption, or by somebody's scancel: the job is RUNNING in SLURM."""
    server.post(rig.request(jid, COUNTED + "sleep 300"))
    wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
    (number,) = slurm.jobs(jid, "RUNNING")
    slurm.run("scancel", "--full", "--signal=TERM", number)
    assert server.wait_final(jid)["message"].startswith("The job was ended by SLURM after ")


def test_what_each_worker_asks_for(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    """Memory and GPUs are a worker's own, also where several share a node."""
    more = {"number_of_workers": 3, "cpu_limit": 2000, "memory_limit": 301, "gpu_limit": 1}
    server.post(rig.request(jid, COUNTED, **more))
    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
    (number,) = slurm.jobs(jid)
    reserved = slurm.run("scontrol", "-o", "show", "job", number)
    assert "NumCPUs=6 " in reserved
    assert "MinMemoryCPU=151M" in reserved
    assert re.search(r"TresPerTask=\S*gpu[:=]1\b", reserved)
    assert rig.executions(jid) == 3


def test_a_command_line_too_long_for_labels(server: Server, rig: Rig, jid: str) -> None:
    posted = server.post(rig.request(jid, 'printf %s "$1" | wc -c', "x" * 100_000)).json()
    job = server.wait_final(jid)
    assert job["logs"].strip() == "100000"
    assert job["cmd"] == posted["cmd"]


def test_environment_and_labels_of_the_site(rig: Rig, engine: Cromwell, jid: str) -> None:
    site = rig.start(ENABLE_HOME_WORKAROUND="yes", JOB_LABELS="site=here,team=a b", SLURM_PARTITION="short")
    site.post(rig.request(jid, 'echo "$HOME $X" > "$1/env"', env=["X=it's ~{x}"], time_limit_minutes=1))
    assert site.wait_final(jid)["status"] == "finishedSuccessfully"
    assert (rig.outgoing(jid) / "env").read_text() == "/tmp it's ~{x}\n"
    found = query(engine, "team:a b")
    assert [row["labels"][NAME] for row in found] == [jid]
    site.stop()


def query(engine: Cromwell, label: str) -> list[dict[str, Any]]:
    params = {"label": label, "additionalQueryResultFields": "labels"}
    answer = requests.get(f"{engine.url}/api/workflows/v1/query", params=params, timeout=10)
    rows: list[dict[str, Any]] = answer.json()["results"]
    return rows


# -- jobs of the older pman ----------------------------------------------------------------------------------------

OLD_WDL = """version 1.0
task plugin_instance {
    command { echo from the older pman; sleep SECONDS }
    runtime { docker: 'docker.io/fnndsc/pl-old:1' sharedir: 'SHARED' cpu: '1' memory: '105M' timelimit: '5' }
}
workflow ChRISJob { call plugin_instance }
"""


def post_as_the_older_pman(engine: Cromwell, rig: Rig, jid: str, seconds: int, held: bool = False) -> str:
    """The workflow's id, once a query shows it."""
    rig.request(jid, "")  # makes its directories
    wdl = OLD_WDL.replace("SECONDS", str(seconds)).replace("SHARED", str(rig.outgoing(jid).parent))
    labels = json.dumps({NAME: jid})
    form = {"workflowSource": wdl, "labels": labels, "workflowOnHold": str(held).lower()}
    answer = requests.post(f"{engine.url}/api/workflows/v1", files=form, timeout=10)
    assert answer.status_code == 201
    wait_for(lambda: query(engine, f"{NAME}:{jid}"), 10, "the old job to show")
    return str(answer.json()["id"])


def test_a_finished_job_of_the_older_pman(server: Server, rig: Rig, engine: Cromwell, jid: str) -> None:
    post_as_the_older_pman(engine, rig, jid, 0)
    job = server.wait_final(jid)
    assert (job["status"], job["logs"]) == ("finishedSuccessfully", "from the older pman\n")
    assert job["cmd"] == "echo from the older pman; sleep 0"
    assert server.delete(jid).status_code == 204
    assert server.get(jid).status_code == 404
    assert server.post(rig.request(jid, COUNTED)).status_code == 201
    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
    assert rig.executions(jid) == 1


def test_its_duplicates_are_deleted_together(server: Server, rig: Rig, engine: Cromwell, jid: str) -> None:
    """Its retries made several workflows of one job; held ones too."""
    ids = [post_as_the_older_pman(engine, rig, jid, 300, held) for held in (True, False)]
    server.wait_state(jid, "started")
    assert server.delete(jid).status_code == 204
    states = {row["id"]: row["status"] for row in query(engine, f"{NAME}:{jid}")}
    assert states == dict.fromkeys(ids, "Aborted")
    assert server.get(jid).status_code == 404


# -- many at once --------------------------------------------------------------------------------------------------


def test_two_processes_make_one_slurm_job(server: Server, rig: Rig, slurm: Slurm, jid: str) -> None:
    second = rig.start()
    request = rig.request(jid, COUNTED)
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda number: (server, second)[number % 2].post(request).status_code, range(16)))
    assert codes == [201] * 16
    server.wait_final(jid)
    assert len(slurm.jobs(jid)) == 1
    second.stop()


COUNT = 300
_ALPHABET = [
    *map(chr, range(1, 0x180)),
    *"\u2028\ufeff\U0001f9e0\U0001d11e",
    *HOSTILE,
    "~{",
    "${",
    ">>>",
    "EOF\n",
    "\r\n",
]


def hostile_words(seed: int) -> list[str]:
    """Up to six arguments made of what shells, WDL and Cromwell find special."""
    choice = random.Random(seed)
    return ["".join(choice.choices(_ALPHABET, k=choice.randrange(12))) for _ in range(choice.randrange(1, 7))]


def test_300_hostile_jobs_through_broken_connections(engine: Cromwell, directory: Path, slurm: Slurm) -> None:
    """One connection in five to Cromwell is cut at a random point; 8 clients repeat what was not answered.

    Every job has other arguments and another environment; none is lost, none runs twice, every byte arrives.
    """
    script = OUT + r"""echo run >> "$out/runs"; { printf '%s\0' "$@"; printf '%s\0' "$V"; } > "$out/words" """
    place = directory / "many"
    place.mkdir()
    with (
        FaultProxy(f"tcp://127.0.0.1:{engine.port}") as proxy,
        rig_over(engine, place, proxy.url.replace("tcp:", "http:")) as rig,
    ):
        server = rig.start()
        proxy.cut_at_random(0.05, seed=1)

        def one(number: int) -> str:
            jid, words = f"many-{number}", hostile_words(number)
            request = rig.request(jid, script, *words, env=[f"V={''.join(words)}"])
            wait_for(lambda: until_answered(server.post(request), 201), 60, f"{jid} to be accepted")
            job = wait_for(lambda: final(server.get(jid)), 240, f"the end of {jid}", every=1)
            sent = [*words, "/share/outgoing", "".join(words)]
            received = (rig.outgoing(jid) / "words").read_bytes()
            assert received == b"".join(word.encode() + b"\0" for word in sent), (number, words)
            assert rig.executions(jid) == 1
            return job["status"]

        with ThreadPoolExecutor(8) as pool:
            states = list(pool.map(one, range(COUNT)))
        assert states == ["finishedSuccessfully"] * COUNT
        assert proxy.cuts > COUNT / 5
    workflows = query(engine, "org.chrisproject.pman.managed:yes")
    mine = [row["labels"][NAME] for row in workflows if row["labels"][NAME].startswith("many-")]
    assert sorted(mine) == sorted(f"many-{number}" for number in range(COUNT))
    comments = slurm.run("squeue", "-h", "-t", "all", "-o", "%k").split()
    assert all(comments.count(f"many-{number}") <= 1 for number in range(COUNT))


def until_answered(answer: requests.Response, code: int) -> bool:
    """True for this code; False where the client shall try again."""
    assert answer.status_code in (code, 503), answer.text
    return answer.status_code == code


def final(answer: requests.Response) -> dict[str, str] | None:
    job: dict[str, str] = answer.json() if until_answered(answer, 200) else {}
    return job if job.get("status") in FINAL else None
