"""The slurm backend on a real SLURM that hides, renames, forgets and answers wrongly.

pman and its jobs run as an ordinary user: SLURM hides nothing from root. Facts about SLURM are those of 22.05.8 and
24.11.5. All tests run on every profile. A guarded site limits who uses its own partitions, and not those made here.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live.test_slurm import Slurm, own_slurm, slurm_id, slurm_rig, wrapped
from tests.rig import COUNTED, FINAL, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("slurm")
CLIENTS = 8
JOBS = int(os.environ.get("PMAN_TEST_FAULTY_JOBS", "24"))
# An answer of squeue is empty one time in five and takes longer than pman waits one time in ten; a list lacks every
# seventh job, and no job has the name that it was given.
FAULTY_SQUEUE = r"""
case $((RANDOM % 10)) in 0 | 1) exit 0 ;; 2) exec sleep 60 ;; esac
said=$($real "$@"); code=$?
[ -z "$said" ] || sed -E 's/\|[^|]*$/|renamed/' <<<"$said" |
  if [[ $* == *--me* ]]; then grep -vE '^[0-9]*[07]\|'; else cat; fi
exit $code
"""
FAULTY_SACCT = 'case $((RANDOM % 5)) in 0) exit 0 ;; esac; exec $real "$@"'
# One call in five fails after SLURM has taken the job, one in ten before.
FAULTY_SBATCH = r"""
late="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
case $((RANDOM % 10)) in
0) echo "$late" >&2; exit 1 ;;
1 | 2) $real "$@" >/dev/null; echo "$late" >&2; exit 1 ;;
esac
exec $real "$@"
"""


# Every profile of scripts/engines/slurm, each on one of the two versions.
SITES = ("plain-22.05", "preempting-22.05", "accounted-24.11", "guarded-24.11", "configless-24.11")


@pytest.fixture(scope="module", params=SITES)
def slurm(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """One with partitions as sites have them, which forgets jobs after two seconds."""
    profile, version = request.param.split("-")
    with own_slurm("--profile", profile, "--version", version) as slurm:
        for words in (
            ("partitionname=chris", "nodes=localhost", "hidden=yes", "state=up"),
            ("partitionname=group", "nodes=localhost", "state=up"),
            ("partitionname=memory", "nodes=localhost", "maxmempercpu=1000", "state=up"),
            ("partitionname=hour", "nodes=localhost", "maxtime=60", "state=up"),
        ):
            slurm.command("scontrol", "create", *words)
        yield slurm


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Iterator[Rig]:
    """Jobs have a time limit, which a guarded site asks for."""
    directory = tmp_path_factory.mktemp("slurm-faults")
    with running(slurm_rig(directory, slurm.environment, *slurm.options, TIMELIMIT_MINUTES="10")) as rig:
        yield rig


@pytest.fixture(scope="module")
def pman(rig: Rig) -> Server:
    return rig.start(STUCK_JOB_PATIENCE_MINUTES="0")


@pytest.fixture
def jid(request: pytest.FixtureRequest) -> str:
    return f"j-{abs(hash(request.node.name)) % 10**8}"


def state_in_slurm(slurm: Slurm, number: str) -> str:
    """As slurmctld knows the job, "" when it does not (any more)."""
    listed = slurm.command("squeue", "--all", "--noheader", "--states=all", "--format=%A|%T").splitlines()
    return dict(line.split("|") for line in listed).get(number, "")


def test_a_hidden_partition(slurm: Slurm, rig: Rig, pman: Server, jid: str) -> None:
    assert pman.post(rig.request(jid, COUNTED + "sleep 3; echo done", partition="chris")).status_code == 201
    pman.post(rig.request(f"{jid}-2", COUNTED + "sleep 600", partition="chris"))
    job = pman.wait_final(jid)
    assert (job["status"], job["logs"]) == ("finishedSuccessfully", "done\n")
    pman.wait_state(f"{jid}-2", "started")
    number = slurm_id(rig, f"{jid}-2")
    assert pman.delete(f"{jid}-2").status_code == 204
    assert state_in_slurm(slurm, number) in ("", "CANCELLED", "COMPLETING")


def test_a_user_who_is_not_found_in_the_group_for_a_moment(slurm: Slurm, rig: Rig, pman: Server, jid: str) -> None:
    pman.post(rig.request(jid, COUNTED + 'until [ -e "$out/go" ]; do sleep 0.1; done', partition="group"))
    pman.wait_state(jid, "started")
    slurm.command("scontrol", "update", "partitionname=group", "allowgroups=daemon")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        assert pman.get(jid).json()["status"] == "started"
    slurm.command("scontrol", "update", "partitionname=group", "allowgroups=ALL")
    (rig.outgoing(jid) / "go").touch()
    assert pman.wait_final(jid)["status"] == "finishedSuccessfully"


def test_jobs_that_slurm_renames(slurm: Slurm, rig: Rig, jid: str) -> None:
    """As job_submit.lua does, whatever is left of the name."""
    renaming = rig.start(
        PATH=wrapped(
            Path(rig.env["SLURM_STATE_DIR"]).parent / "bin-renaming", "sbatch",
            'for word; do case $word in --job-name=*) name=${word#*=} ;; esac; done; case $name in '
            '*-before*) name=site-$name ;; *-behind*) name=$name-of-chris ;; *) name=renamed ;; esac; '
            'exec $real "$@" --job-name="$name"', slurm.environment["PATH"],
        )
    )  # fmt: skip
    short = [f"{jid}-{where}" for where in ("before", "behind", "all")]
    long = [f"{name}-2" for name in short]
    for name in short + long:
        script = COUNTED + ("sleep 2; echo done" if name in short else "sleep 600")
        assert renaming.post(rig.request(name, script)).status_code == 201
    for name in short:
        job = renaming.wait_final(name)
        assert (job["status"], job["logs"]) == ("finishedSuccessfully", "done\n"), job
    for name in long:
        renaming.wait_state(name, "started")
    numbers = [slurm_id(rig, name) for name in long]
    names = {slurm.command("squeue", "--all", "-h", "-j", number, "-o", "%j").strip() for number in numbers}
    assert len({re.sub(r"\.[0-9a-f]{16}", "", name).removeprefix("site-") for name in names}) == 3
    with ThreadPoolExecutor(3) as pool:
        assert [answer.status_code for answer in pool.map(renaming.delete, long)] == [204] * 3
    assert {state_in_slurm(slurm, number) for number in numbers} <= {"", "CANCELLED", "COMPLETING"}
    renaming.stop()


def test_workers_get_the_memory_that_slurm_granted(rig: Rig, pman: Server, jid: str) -> None:
    """MaxMemPerCPU makes 3 CPUs of 834 MiB out of 1 CPU of 2500 MiB; a step that asks for 1 CPU has 834 MiB."""
    eat = "import time; a = b'x' * 1_200_000_000; time.sleep(4)"
    request = rig.request(jid, "", entrypoint=["python3", "-c", eat], partition="memory", number_of_workers=2)
    pman.post(request | {"memory_limit": 2500, "cpu_limit": 1000})
    job = pman.wait_final(jid, 120)
    assert job["status"] == "finishedSuccessfully", job


@pytest.mark.parametrize("workers", [1, 2])
def test_too_much_memory_is_said_in_one_sentence(rig: Rig, pman: Server, jid: str, workers: int) -> None:
    eat = "import time; a = b'x' * 400_000_000; time.sleep(60)"
    pman.post(rig.request(jid, "", entrypoint=["python3", "-c", eat], number_of_workers=workers))
    job = pman.wait_final(jid, 90)
    assert (job["status"], job["message"]) == ("finishedWithError", "The job used more memory than its limit.")


def test_a_job_that_waits_in_vain(slurm: Slurm, rig: Rig, pman: Server, jid: str) -> None:
    assert pman.post(rig.request(jid, COUNTED, partition="hour", time_limit_minutes=120)).status_code == 201
    number = slurm_id(rig, jid)
    job = pman.wait_final(jid)
    assert job["status"] == "finishedWithError"
    assert "SLURM cannot start the job: PartitionTimeLimit." in job["message"]
    assert state_in_slurm(slurm, number) in ("", "CANCELLED")


def test_a_job_that_is_held_waits(slurm: Slurm, rig: Rig, pman: Server, jid: str) -> None:
    pman.post(rig.request(jid, COUNTED, partition="down"))
    slurm.command("scontrol", "hold", slurm_id(rig, jid))
    wait_for(lambda: "Somebody has to release it." in pman.get(jid).json()["message"], 20, "SLURM's reason")
    assert pman.delete(jid).status_code == 204


def test_a_template_that_sbatch_refuses(rig: Rig, jid: str) -> None:
    """500 with the words in the log; nothing is left, and the mended template is used."""
    overlay = Path(rig.env["SLURM_STATE_DIR"]).parent / "overlay" / "slurm" / "job.sh.j2"
    overlay.parent.mkdir(parents=True)
    shipped = '{% extends "shipped/slurm/job.sh.j2" %}{% block directives %}{{ super() }}'
    overlay.write_text(shipped + "#SBATCH --acount=x\n{% endblock %}")
    server = rig.start(TEMPLATES_DIR=str(overlay.parent.parent))
    answer = server.post(rig.request(jid, COUNTED))
    assert (answer.status_code, "--acount=x" in server.log.read_text()) == (500, True), answer.text
    assert server.get(jid).status_code == 404
    overlay.write_text(shipped + "#SBATCH --nice=1\n{% endblock %}")
    server.stop()
    server = rig.start(TEMPLATES_DIR=str(overlay.parent.parent))
    assert server.post(rig.request(jid, COUNTED)).status_code == 201
    assert server.wait_final(jid)["status"] == "finishedSuccessfully"
    server.stop()


@pytest.mark.slow
def test_many_jobs_over_faulty_commands(slurm: Slurm, rig: Rig) -> None:
    """PMAN_TEST_FAULTY_JOBS of them: as many runs, as many right verdicts, and nothing is left after DELETE."""
    here = Path(rig.env["SLURM_STATE_DIR"]).parent / "bin-faulty"
    for name, script in (("squeue", FAULTY_SQUEUE), ("sacct", FAULTY_SACCT), ("sbatch", FAULTY_SBATCH)):
        path = wrapped(here, name, f'echo >>"$here/{name}.calls"; {script}', slurm.environment["PATH"])
    server = rig.start(PATH=path, SLURM_TIMEOUT_SECONDS="3", STUCK_JOB_PATIENCE_MINUTES="15")

    def persist(method: str, jid: str, **body: object) -> int:
        """As pfcon's user does: what is answered 503 is tried again."""
        deadline = time.monotonic() + 300
        while (answer := server.call(method, f"{jid}/" if method != "POST" else "", **body)).status_code == 503:
            assert time.monotonic() < deadline, answer.text
        return int(answer.status_code)

    def live(number: int) -> tuple[str, str, str]:
        jid, code = f"many-{number}", number % 3
        assert persist("POST", jid, json=rig.request(jid, f"{COUNTED} sleep {number % 4}; exit {code}")) == 201
        deadline = time.monotonic() + 400
        while True:
            answer = server.get(jid)
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200 and (job := answer.json())["status"] in FINAL:
                break
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.5)
        taken = slurm_id(rig, jid)
        assert persist("DELETE", jid) == 204
        return jid, job["status"], taken

    with ThreadPoolExecutor(CLIENTS) as pool:
        verdicts = list(pool.map(live, range(JOBS)))
    right = ["finishedWithError" if number % 3 else "finishedSuccessfully" for number in range(JOBS)]
    assert [state for _, state, _ in verdicts] == right
    assert [rig.executions(jid) for jid, _, _ in verdicts] == [1] * JOBS
    assert {"squeue.calls", "sbatch.calls"} <= {path.name for path in here.iterdir()}
    active = [state_in_slurm(slurm, number) for _, _, number in verdicts]
    assert set(active) <= {"", "COMPLETED", "FAILED", "CANCELLED", "COMPLETING"}

    def running_ones() -> list[str]:
        """What carried one of these attempts, by whichever name."""
        rows = slurm.command("squeue", "--all", "-h", "-t", "PD,R", "-o", "%A %Z").splitlines()
        return [row for row in rows if "/many-" in row]

    wait_for(lambda: not running_ones(), 60, "the last of SLURM's jobs")
    # SLURM 24.11 makes a directory anew for the log of a job that carries a deleted attempt and starts late.
    left = list(Path(rig.env["SLURM_STATE_DIR"]).glob("many-*/*"))
    assert [path for path in left if not path.match("slurm-*.log")] == []
    assert {persist("POST", path.parent.name, json=rig.request(path.parent.name, "")) for path in left} <= {201}
    server.stop()
