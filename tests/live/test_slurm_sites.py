"""The slurm backend on SLURM as sites run it: profiles and versions of scripts/engines/slurm.

The whole contract on every profile, here or in test_slurm.py, and the tests that tell most of it where only the version
differs. test_cromwell_sites.py has the same sites for Cromwell.
"""

from __future__ import annotations

import getpass
import pwd
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.live.test_slurm import open_directory, own_slurm, run, slurm_id, slurm_rig, wrapped
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("slurm")


def instance(options: str) -> dict[str, str]:
    """The environment of one that every test shares; where there is accounting, it alone knows ended jobs."""
    return development("slurm", *options.split(), *(["--min-job-age", "2"] if "accounted" in options else []))


def site(directory: pytest.TempPathFactory, options: str) -> Iterator[Rig]:
    """A rig on an instance; the time limit is what a guarded site asks for."""
    with running(
        slurm_rig(directory.mktemp("site"), instance(options), *options.split(), TIMELIMIT_MINUTES="10")
    ) as rig:
        yield rig


# What pman's own process or another machine may have had, and what a job must not get.
DIRTY = """
umask 077; ulimit -n 600
export PATH=$here HOME=/dirty LD_LIBRARY_PATH=/dirty LC_ALL=C LANG=dirty USER=dirty LOGNAME=dirty SSH_AUTH_SOCK=/dirty
exec "$@"
"""
KNOWN = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "0022")

# The fixtures of the contract, and what a site is most likely to change: what a job finds, how it ends, what is left.
TELLING = (
    "server", "jid", "limited", "known", "test_good_job", "test_exit_code", "test_same_request_again",
    "test_four_workers", "test_delete_then_post_again", "test_delete_ends_a_running_job",
    "test_hostile_arguments_and_environment",
)  # fmt: skip


class KnownEnvironment:
    """What a job finds, whatever sbatch was started with: behind sudo or ssh, or of a pman of a service manager's."""

    def test_a_known_environment(self, rig: Rig, jid: str) -> None:
        bin_directory = Path(rig.env["SLURM_STATE_DIR"]).parent / "bin"
        wrapped(bin_directory, "dirty", DIRTY)
        for name in ("env", "cat", "bwrap", "sbatch", "squeue", "sacct", "scancel"):
            (bin_directory / name).symlink_to(shutil.which(name, path=rig.env.get("PATH")) or "")
        server = rig.start(SLURM_COMMAND_PREFIX=str(bin_directory / "dirty"), JOB_LABELS="site=it's #1,b=c d")
        try:
            script = "env; umask; ulimit -n"
            request = rig.request(jid, script, number_of_workers=2)
            assert server.post(request).status_code == 201
            job = server.wait_final(jid)
        finally:
            server.stop()
        lines = job["logs"].splitlines()
        user = pwd.getpwnam(rig.user or getpass.getuser())
        own = (f"HOME={user.pw_dir}", f"USER={user.pw_name}", f"LOGNAME={user.pw_name}")
        assert [lines.count(line) for line in (*KNOWN, *own)] == [2] * 6, job
        assert not [line for line in lines if "dirty" in line or line == "600"], job
        comments = run(rig.env, *map(str, rig.prefix), "squeue", "--all", "-h", "-t", "all", "-o", "%k")
        assert f"org.chrisproject.pman.name={jid} site=it's #1 b=c d\n" in comments


class TestProfiles(KnownEnvironment, Contract):
    @pytest.fixture(
        scope="class",
        params=[
            "--profile guarded", "--profile preempting", "--profile configless", "--profile accounted --version 24.11"
        ],
    )  # fmt: skip
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rig]:
        yield from site(tmp_path_factory, request.param)


class TestNewerVersion(KnownEnvironment):
    locals().update({name: vars(Contract)[name] for name in TELLING})

    @pytest.fixture(
        scope="class",
        params=[
            "--version 24.11",
            *(f"--profile {name} --version 24.11" for name in ("guarded", "preempting", "configless")),
        ],
    )
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Rig]:
        yield from site(tmp_path_factory, request.param)


STAGE_OUT = """{% extends "shipped/slurm/job.sh.j2" %}
{% block prologue %}
stored=$outgoing
outgoing=/tmp/pman-scratch/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$outgoing"
{% endblock %}
{% block epilogue %}
trap 'rm -rf "$outgoing"' EXIT
cp -a "$outgoing/." "$stored"
{% endblock %}
"""


class TestPreempting:
    """What a site says in its overlay and its site.yaml."""

    @pytest.fixture
    def jid(self) -> str:
        return f"chris-jid-{uuid.uuid4().hex[:8]}"

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        yield from site(tmp_path_factory, "--profile preempting")

    def start(self, rig: Rig, values: str, template: str = "") -> Server:
        overlay = open_directory(rig.user)
        (overlay / "site.yaml").write_text(values)
        if template:
            (overlay / "slurm").mkdir()
            (overlay / "slurm" / "job.sh.j2").write_text(template)
        return rig.start(TEMPLATES_DIR=str(overlay))

    def test_a_job_that_is_preempted_and_requeued(self, rig: Rig, jid: str) -> None:
        """It waits, begins again when SLURM wills, and is deleted from the queue where that is asked for."""
        server = self.start(rig, "requeue: true\njob_name_prefix: 'chris '\n")
        until = 'until [ -e "$out/go" ]; do sleep 0.1; done; echo done'
        gpus = {"gpu_limit": 4}  # all of the node's, which no other test of this SLURM asks for
        server.post(rig.request(jid, COUNTED + until, partition="idle", **gpus))
        wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
        above = f"{jid}-above"
        server.post(rig.request(above, COUNTED + until, **gpus))
        again = wait_for(lambda: put_back(server, jid), 60, "the job to be back in the queue")
        assert again["status"] == "notstarted"
        (rig.outgoing(above) / "go").touch()
        assert server.wait_final(above)["status"] == "finishedSuccessfully"
        number = slurm_id(rig, jid)
        assert run(rig.env, "squeue", "--all", "-h", "-j", number, "-o", "%j").startswith(f"chris {jid}.")
        run(rig.env, "scontrol", "update", f"jobid={number}", "starttime=now")  # SLURM would wait two minutes
        wait_for(lambda: rig.executions(jid) == 2, 60, "the job to begin again")
        assert server.wait_state(jid, "started")["message"] == ""
        run(rig.env, "scontrol", "requeue", number)
        wait_for(lambda: put_back(server, jid), 60, "the job to be back in the queue")
        assert server.delete(jid).status_code == 204
        states = run(rig.env, "squeue", "--all", "-h", "-t", "all", "-o", "%A %T").splitlines()
        assert not [line for line in states if line.startswith(number) and "CANCELLED" not in line]
        assert rig.executions(jid) == 2
        server.stop()

    def test_a_job_that_is_preempted_and_cancelled(self, rig: Rig, jid: str) -> None:
        """Its command takes the signal for a wish to end well, and answers 0: that is no success."""
        server = rig.start()
        gpus = {"gpu_limit": 4}
        server.post(rig.request(jid, COUNTED + "trap 'exit 0' TERM; sleep 600 & wait", partition="cheap", **gpus))
        wait_for(lambda: rig.executions(jid) == 1, 30, "the job to begin")
        assert server.post(rig.request(f"{jid}-above", "true", **gpus)).status_code == 201
        job = server.wait_final(jid)
        assert (job["status"], job["message"]) == (
            "finishedWithError", "The job was preempted by another one in SLURM.",
        )  # fmt: skip
        assert server.wait_final(f"{jid}-above")["status"] == "finishedSuccessfully"
        assert rig.executions(jid) == 1
        server.stop()

    def test_output_that_cannot_be_stored(self, rig: Rig, jid: str) -> None:
        """The job fails, and the node's disk is freed, as after a job that is ended before its time."""
        server = self.start(rig, "", STAGE_OUT)
        jids = [jid, f"{jid}-full", f"{jid}-ended"]
        good, full, ended = (
            rig.request(name, f'echo x > "$1/out"; {then}')
            for name, then in zip(jids, ("true", "true", "sleep 600"), strict=True)
        )
        shutil.chown(rig.outgoing(jids[1]), 0, 0) if rig.user else rig.outgoing(jids[1]).chmod(0o555)
        for request in (good, full, ended):
            assert server.post(request).status_code == 201
        server.wait_state(jids[2], "started")
        run(rig.env, "scancel", slurm_id(rig, jids[2]))
        found = [server.wait_final(name) for name in jids]
        states = [job["status"] for job in found]
        assert states == ["finishedSuccessfully", "finishedWithError", "finishedWithError"], found
        assert found[1]["message"] == "the site's epilogue failed with exit code 1"
        assert "Permission denied" in found[1]["logs"]
        assert (rig.outgoing(jid) / "out").read_text() == "x\n"
        numbers = [slurm_id(rig, name) for name in jids]
        assert [list(Path("/tmp/pman-scratch").glob(f"{number}.*")) for number in numbers] == [[], [], []]
        server.stop()


def put_back(server: Server, jid: str) -> dict[str, str] | None:
    job: dict[str, str] = server.get(jid).json()
    assert job["status"] in ("notstarted", "started"), job
    return job if "after it had begun" in job["message"] else None


@pytest.mark.parametrize("version", ["22.05", "24.11"])
def test_a_prolog_that_fails(tmp_path_factory: pytest.TempPathFactory, version: str) -> None:
    """SLURM drains the node and holds the job, or cancels it where it must not be requeued. Nothing runs twice."""
    options = ("--profile", "preempting", "--version", version)
    with own_slurm(*options) as slurm:
        home = Path(slurm.environment["PMAN_DEV_SLURM_RUN"])
        fails = home / "fails"
        (home / "prolog").write_text(f"#!/bin/sh\n[ ! -e {fails} ]\n")
        (home / "epilog").write_text("#!/bin/sh\n")
        with running(slurm_rig(tmp_path_factory.mktemp("prolog"), slurm.environment, *options)) as rig:
            overlay = open_directory(rig.user)
            (overlay / "site.yaml").write_text("requeue: true\n")
            held, cancelled = rig.start(TEMPLATES_DIR=str(overlay)), rig.start()
            fails.touch()
            held.post(rig.request("held", COUNTED))
            wait_for(lambda: "requeued held. Somebody has" in held.get("held").json()["message"], 30, "SLURM's reason")
            assert held.get("held").json()["status"] == "notstarted"
            fails.unlink()
            slurm.command("scontrol", "update", "nodename=localhost", "state=resume")
            slurm.command("scontrol", "release", (number := slurm_id(rig, "held")))
            slurm.command("scontrol", "update", f"jobid={number}", "starttime=now")  # SLURM would wait two minutes
            assert held.wait_final("held")["status"] == "finishedSuccessfully"
            fails.touch()
            cancelled.post(rig.request("cancelled", COUNTED))
            job = cancelled.wait_final("cancelled")
            assert job["status"] == "finishedWithError"
            assert job["message"] == (
                "The job was cancelled on localhost before its command began: by somebody, or because a prolog failed. "
                "`sinfo -R` says why a node was drained."
            )
            assert "Prolog error" in slurm.command("sinfo", "-R", "-h")
            assert [rig.executions(jid) for jid in ("held", "cancelled")] == [1, 0]
            fails.unlink()
            slurm.command("scontrol", "update", "nodename=localhost", "state=resume")
            assert cancelled.delete("cancelled").status_code == 204
            assert cancelled.post(rig.request("cancelled", COUNTED)).status_code == 201
            assert cancelled.wait_final("cancelled")["status"] == "finishedSuccessfully"
            assert rig.executions("cancelled") == 1


# The module of a runtime (https://modules.readthedocs.io/en/latest/modulefile.html). Lmod reads this form, too.
MODULEFILE = "#%Module1.0\nprepend-path PATH {bin}\nsetenv SITE_RUNTIME 1.3\n"
MODULES = """{% extends "shipped/slurm/job.sh.j2" %}
{% block prologue %}
set +u # profiles and modules are not written for it
. /etc/profile
module use {{ site.modulefiles | sh }}
module load site-runtime
set -u
{% endblock %}
"""


@pytest.mark.parametrize(("version", "by"), [("22.05", "template"), ("22.05", "rule"), ("24.11", "template")])
def test_a_module(tmp_path_factory: pytest.TempPathFactory, version: str, by: str) -> None:
    """Environment Modules of Debian 12, Lmod of Debian 13: every worker has the runtime that the module brings."""
    options = ("--version", version)
    with running(slurm_rig(tmp_path_factory.mktemp("modules"), development("slurm", *options), *options)) as rig:
        overlay = open_directory(rig.user)
        wrapped(overlay / "bin", "bwrap", 'echo "the runtime of module $SITE_RUNTIME" >&2; exec /usr/bin/bwrap "$@"')
        module = overlay / "modulefiles" / "site-runtime" / "1.3"
        module.parent.mkdir(parents=True)
        module.write_text(MODULEFILE.format(bin=overlay / "bin"))
        if by == "rule":
            (overlay / "site.yaml").write_text(
                f"policy: {{rules: [{{name: runtime, set: {{modules: [{module}]}}}}]}}\n"
            )
        else:
            (overlay / "site.yaml").write_text(f"modulefiles: {overlay}/modulefiles\n")
            (overlay / "slurm").mkdir()
            (overlay / "slurm" / "job.sh.j2").write_text(MODULES)
        server = rig.start(TEMPLATES_DIR=str(overlay))
        server.post(rig.request("loads", COUNTED + "echo ran", number_of_workers=2))
        job = server.wait_final("loads")
        assert job["status"] == "finishedSuccessfully", job
        assert [job["logs"].count(line) for line in ("the runtime of module 1.3\n", "ran\n")] == [2, 2], job["logs"]
        server.stop()


class TestAccounted:
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        yield from site(tmp_path_factory, "--profile accounted --version 24.11")

    def test_a_limit_on_jobs_in_the_queue(self, rig: Rig) -> None:
        """pman submits everybody's jobs as one user: a POST waits until the user may have one more."""
        server = rig.start(SLURM_ACCOUNT="few")
        first, second, third = (f"chris-jid-{uuid.uuid4().hex[:8]}" for _ in range(3))
        for jid in (first, second):
            server.post(rig.request(jid, OUT + 'until [ -e "$out/go" ]; do sleep 0.1; done'))
            server.wait_state(jid, "started")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, rig.request(third, COUNTED))
            wait_for(lambda: "AssocMaxSubmitJobLimit" in server.log.read_text(), 20, "SLURM's limit")
            (rig.outgoing(first) / "go").touch()
            assert answer.result(60).status_code == 201
        assert server.wait_final(third)["status"] == "finishedSuccessfully"
        assert rig.executions(third) == 1
        assert [server.delete(jid).status_code for jid in (first, second, third)] == [204] * 3
        server.stop()
