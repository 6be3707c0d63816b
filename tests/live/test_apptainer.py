"""Jobs in Apptainer's stand-in (tests/fakes/apptainer), on every backend that may call Apptainer.

As root, pman, Cromwell and the jobs run as an ordinary user.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.backends.test_local import local_rig
from tests.conftest import development
from tests.contract import HOSTILE, Contract
from tests.fakes.apptainer_rig import IMAGE, Site, apptainer_site
from tests.fakes.cromwell_rig import Slurm, cromwell, rig_over
from tests.live import runtimes
from tests.live.test_slurm import SCRIPT, open_directory, ordinary, slurm_rig
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("slurm")
ODD = 'it\'s "$x", a:b'


DIGEST = f"docker.io/pman/busybox@sha256:{'ab' * 32}"
KNOWN = {
    "PATH", "LD_LIBRARY_PATH", "HOME", "PWD", "LANG", "SHLVL", "_", "OLDPWD", "APPTAINER_CONTAINER", "TERM",
    "PMAN_WORKER_INDEX", "PMAN_WORKER_COUNT", "SLURM_JOB_ID",
    "PMAN_DIR", "TMPDIR", "_JAVA_OPTIONS", "PMAN_SITE_VALUE",  # with Cromwell
}  # fmt: skip


@pytest.fixture(scope="class")
def site() -> Site:
    site = apptainer_site()
    site.offer(IMAGE, DIGEST, pull_seconds=0.2)
    return site


class InApptainer(Contract):
    """The contract, and what Apptainer in particular shows, on every backend alike."""

    def run(self, server: Server, rig: Rig, jid: str, script: str, **fields: Any) -> dict[str, str]:
        server.post(rig.request(jid, script, **fields))
        return server.wait_final(jid, rig.job_seconds)

    def test_jobs_and_workers_share_neither_tmp_nor_home(self, server: Server, rig: Rig, jid: str) -> None:
        script = 'for d in /tmp /var/tmp "$HOME"; do ls -A "$d"; echo secret > "$d/secret" || exit 9; done'
        for number in range(2):
            job = self.run(server, rig, f"{jid}-{number}", script, number_of_workers=2)
            assert (job["status"], "secret" in job["logs"]) == ("finishedSuccessfully", False), job

    def test_there_is_room_in_tmp_and_the_root_can_be_written(self, server: Server, rig: Rig, jid: str) -> None:
        job = self.run(server, rig, jid, f"dd if=/dev/zero of=/tmp/{jid} bs=1M count=70 && mkdir /made")
        assert job["status"] == "finishedSuccessfully", job
        assert scratch(jid) == []

    def test_the_environment_is_known(self, server: Server, rig: Rig, jid: str) -> None:
        job = self.run(server, rig, jid, "env -0 | tr '\\0' '\\n'", number_of_workers=2, env=["OWN=x"])
        names = set(re.findall(r"(?m)^(\w+)=", job["logs"]))
        assert names - KNOWN == {"OWN"}, job

    def test_what_a_job_sees(self, server: Server, rig: Rig, jid: str) -> None:
        assert runtimes.seen(server, rig, jid).items() <= runtimes.table()["apptainer"].items()

    def test_what_left_its_session_ends_with_the_job(self, server: Server, rig: Rig, jid: str) -> None:
        script = OUT + "setsid sh -c 'while :; do echo x >> $0; sleep 0.05; done' \"$out/beats\" & sleep 0.5"
        assert self.run(server, rig, jid, script)["status"] == "finishedSuccessfully"
        beats = rig.outgoing(jid) / "beats"
        size = beats.stat().st_size
        time.sleep(0.3)  # six beats
        assert beats.stat().st_size == size

    def test_the_program_is_missing(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "", entrypoint=["no-such-program"]))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert "127" in job["message"]
        assert "no-such-program" in job["logs"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_image_is_missing(self, server: Server, rig: Rig, jid: str, workers: int) -> None:
        job = self.run(server, rig, jid, "true", image="docker.io/pman/none:1", number_of_workers=workers)
        assert job["status"] == "finishedWithError"
        assert "the image docker.io/pman/none:1 could not be pulled: " in job["message"]
        assert "manifest unknown" in job["message"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_image_is_cut_off(self, server: Server, rig: Rig, jid: str, images: Path, workers: int) -> None:
        (images / "pman%cut+1.sif").write_text("#!/usr/bin/env run-singularity")
        job = self.run(server, rig, jid, "true", image="pman/cut:1", number_of_workers=workers)
        assert job["status"] == "finishedWithError"
        assert "container could not be run: could not open image " in job["message"], job
        assert "image format not recognized" in job["logs"]

    def test_names_of_an_image(self, server: Server, rig: Rig, jid: str, site: Site, images: Path) -> None:
        before = len(site.pulls)
        tagged = DIGEST.replace("@", ":1@")
        for number, image in enumerate(["pman/busybox:1", "docker.io/pman/busybox:1", tagged, DIGEST]):
            assert self.run(server, rig, f"{jid}-{number}", "true", image=image)["status"] == "finishedSuccessfully"
        assert site.pulls[before:].count(f"docker://{DIGEST.removeprefix('docker.io/')}") == 1
        assert site.pulls.count("docker://pman/busybox:1") == 1
        assert (images / "pman%busybox+1.sif").exists()

    def test_nothing_but_the_command_is_in_the_logs(self, server: Server, rig: Rig, jid: str) -> None:
        job = self.run(server, rig, jid, f"touch /tmp/{jid}; echo last words; kill -KILL $$")
        assert job["status"] == "finishedWithError"
        # Cromwell's script in the container is run by the image's own shell, which says this
        assert job["logs"].replace("Killed\n", "") == "last words\n"
        assert scratch(jid) == []

    def test_delete_removes_what_is_on_the_node(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + f'trap "" TERM; touch /tmp/{jid} "$out/up"; while :; do sleep 1; done'))
        wait_for((rig.outgoing(jid) / "up").exists, rig.job_seconds, "the job to run")
        assert len(scratch(jid)) == 1
        assert server.delete(jid).status_code == 204
        wait_for(lambda: not members(jid), rig.job_seconds, "the job to end")
        self.run(server, rig, f"{jid}-next", "true")  # removes what KILL has left
        assert scratch(jid) == []

    def test_a_burst_of_an_image_that_nobody_has(self, server: Server, rig: Rig, jid: str, site: Site) -> None:
        image = f"pman/{jid}:1"
        site.offer(IMAGE, DIGEST, f"docker.io/{image}", pull_seconds=1)
        jobs, workers = map(int, os.environ.get("PMAN_TEST_BURST", "6x2").split("x"))
        names = [f"{jid}-{number}" for number in range(jobs)]
        requests = [rig.request(name, COUNTED, image=image, number_of_workers=workers) for name in names]
        with ThreadPoolExecutor(8) as pool:
            assert {answer.status_code for answer in pool.map(server.post, requests)} == {201}
        ends = [server.wait_final(name, 40 * jobs) for name in names]
        failed = [
            f"{end['jid']}: {end['message']} {end['logs']}" for end in ends if end["status"] == "finishedWithError"
        ]
        assert not failed, failed
        assert site.pulls.count(f"docker://{image}") == 1
        assert {rig.executions(name) for name in names} == {workers}

    def test_a_pull_that_hangs(self, server: Server, rig: Rig, jid: str, site: Site) -> None:
        image = f"pman/{jid}:1"
        site.offer(IMAGE, DIGEST, f"docker.io/{image}", pull_seconds=300)
        try:
            server.post(rig.request(jid, "true", image=image))
            said = wait_for(lambda: _pulling(server.get(jid).json()), rig.job_seconds, "pman to say that it pulls")
            assert f"ulling the image {image}" in said
            assert server.delete(jid).status_code == 204
            wait_for(lambda: not members(image), rig.job_seconds, "the pull to end")
        finally:
            site.offer(IMAGE, DIGEST, pull_seconds=0.2)


class WithTimeToEnd(InApptainer):
    """Where pman's script waits for the command. Cromwell's script ends at the signal, and the container with it."""

    def test_the_command_has_time_to_end(self, server: Server, rig: Rig, jid: str) -> None:
        bye = 'trap "" TERM; sleep 0.5; echo bye > "$out/bye"; exit 0'
        script = OUT + f"trap '{bye}' TERM; touch \"$out/up\"; while :; do sleep 0.1; done"
        server.post(rig.request(jid, script))
        wait_for((rig.outgoing(jid) / "up").exists, rig.job_seconds, "the job to run")
        assert server.delete(jid).status_code == 204
        wait_for((rig.outgoing(jid) / "bye").exists, 10, "the command to do what it does at its end")


def _pulling(job: dict[str, str]) -> str:
    assert job["status"] in ("notstarted", "started"), job
    return job["message"] if "ulling the image" in job["message"] else ""


def scratch(name: str) -> list[Path]:
    """The files of this name that jobs have in their /tmp, where those are on the node."""
    return list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"pman-*/tmp/{name}"))


def members(word: str) -> list[int]:
    """Processes of the stand-in for Apptainer with this word in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if word in line and "bin/apptainer" in line:
            found.append(process.pid)
    return found


class TestLocal(WithTimeToEnd):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Rig]:
        engine = development("slurm")
        user = ordinary(engine)
        directory = open_directory(user, ODD)
        env = {"LOCAL_RUNTIME": "apptainer", "PATH": site.path, "PMAN_DEV_HOME": engine["PMAN_DEV_HOME"]}
        rig = replace(local_rig(directory, **env), user=user, prefix=(SCRIPT, "run", "--"))
        shutil.chown(rig.store, user or os.getuid())
        with running(replace(rig, image=IMAGE, read_only_input=True)) as rig:
            yield rig

    @pytest.fixture
    @staticmethod
    def tmp_path(rig: Rig) -> Path:
        """One that pman's user may enter."""
        return open_directory(rig.user)

    def test_what_a_site_hands_on(self, rig: Rig, jid: str, tmp_path: Path) -> None:
        """What its block exports arrives byte for byte, what is the node's by pattern, directories by name."""
        (tmp_path / "atlas, 1:2").mkdir()
        (tmp_path / "atlas, 1:2/map").write_text("brain\n")
        (tmp_path / "site/local").mkdir(parents=True)
        container = {
            "binds": [{"source": str(tmp_path / "atlas, 1:2"), "target": "/atlas", "read_only": True}],
            "pass_environment": ["LAN*"],
        }
        (tmp_path / "site/site.yaml").write_text(json.dumps({"container": container, "value": HOSTILE[2]}))
        (tmp_path / "site/local/job.sh.j2").write_text(
            '{% extends "shipped/local/job.sh.j2" %}\n{% block environment %}\n'
            "export PATH=/opt/tools:$PATH OWN={{ site.value }}\n{% endblock %}\n"
        )
        server = rig.start(TEMPLATES_DIR=str(tmp_path / "site"))
        script = 'printf "%s|%s|%s\\n" "$OWN" "$LANG" "$PATH"; cat /atlas/map; touch /atlas/x || echo refused'
        job = self.run(server, rig, jid, script)
        assert job["status"] == "finishedSuccessfully", job
        assert f"{HOSTILE[2]}|C.UTF-8|/usr/local/sbin" in job["logs"]
        assert "brain\n" in job["logs"]
        assert "refused\n" in job["logs"]

    def test_no_directory_becomes_an_option(self, server: Server, rig: Rig, tmp_path: Path) -> None:
        runtimes.assert_no_directory_is_an_option(server, rig, tmp_path)

    @pytest.fixture
    def images(self, rig: Rig) -> Path:
        return Path(rig.env["LOCAL_STATE_DIR"], ".images")


class TestSlurm(WithTimeToEnd):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Rig]:
        engine = development("slurm")
        overlay = site.root / "templates" / "slurm" / "job.sh.j2"
        overlay.parent.mkdir(parents=True)
        prologue = f"{{% block prologue %}}\n{site.profile}\n{{% endblock %}}\n"
        overlay.write_text(f'{{% extends "shipped/slurm/job.sh.j2" %}}\n{prologue}')
        env = {"SLURM_RUNTIME": "apptainer", "TEMPLATES_DIR": str(site.root / "templates")}
        rig = slurm_rig(tmp_path_factory.mktemp("slurm"), engine, **env)
        with running(replace(rig, image=IMAGE)) as rig:
            yield rig

    @pytest.fixture
    def images(self, rig: Rig) -> Path:
        return Path(rig.env["SLURM_STATE_DIR"], ".images")


class TestCromwell(InApptainer):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Rig]:
        engine = development("slurm")
        user = ordinary(engine)
        directory = open_directory(user)
        (site.root / "profile").write_text(f"{site.profile}\nexport PMAN_SITE_VALUE={shlex.quote(HOSTILE[2])}\n")
        slurm = Slurm(engine, (SCRIPT, "run", "--"), user)
        env = {
            "PMAN_PROLOGUE": f". {site.root}/profile",
            "PMAN_PASS_ENVIRONMENT": "PMAN_SITE_* NO_SUCH",
            "PMAN_CONTAINER_ARGS": f"--bind {directory}:/atlas:ro --workdir /no/such",
        }
        with (
            cromwell(directory / "cromwell", slurm, "apptainer", **env) as server,
            rig_over(server, directory) as rig,
        ):
            yield replace(rig, image=IMAGE, read_only_input=True)

    @pytest.fixture
    def images(self, rig: Rig) -> Path:
        return Path(rig.env["CROMWELL_EXECUTION_ROOT_MAP"].partition("=")[0], "images")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_a_site_hands_on(self, server: Server, rig: Rig, jid: str, workers: int) -> None:
        script = 'echo "$PMAN_SITE_VALUE"; ls -d /atlas/logs'
        job = self.run(server, rig, jid, script, number_of_workers=workers)
        assert job["status"] == "finishedSuccessfully", job
        assert f"{HOSTILE[2]}\n/atlas/logs\n" in job["logs"]
