"""The local backend with bubblewrap, Charliecloud or Podman around its jobs, also as a user without rights.

The first two come with `scripts/engines/slurm`, whose image is a directory with a root file system.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.backends.test_local import GATED, command_line, local_rig, members, state_of
from tests.conftest import development
from tests.contract import HOSTILE, Contract
from tests.live import runtimes
from tests.live.test_slurm import slurm_rig
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for


def test_what_a_job_sees_without_a_container(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        assert runtimes.seen(rig.start(), rig, "seen").items() <= runtimes.table()["none"].items()


@pytest.mark.live("slurm")
class TestBubblewrap(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        development("slurm")
        rig = local_rig(tmp_path_factory.mktemp('it\'s "$x"'), LOCAL_RUNTIME="bubblewrap")
        with running(replace(rig, read_only_input=True)) as rig:
            yield rig

    def test_what_a_job_sees(self, server: Server, rig: Rig, jid: str) -> None:
        assert runtimes.seen(server, rig, jid).items() <= runtimes.table()["bubblewrap"].items()

    def test_no_directory_becomes_an_option(self, server: Server, rig: Rig, tmp_path: Path) -> None:
        runtimes.assert_no_directory_is_an_option(server, rig, tmp_path)

    def test_the_command_hears_of_its_end(self, server: Server, rig: Rig, jid: str) -> None:
        script = OUT + 'trap \'echo bye > "$out/bye"; exit 0\' TERM; echo up > "$out/up"; while :; do sleep 0.1; done'
        server.post(rig.request(jid, script))
        wait_for((rig.outgoing(jid) / "up").exists, rig.job_seconds, "the job to run")
        assert server.delete(jid).status_code == 204
        assert (rig.outgoing(jid) / "bye").read_text() == "bye\n"

    def test_as_a_user_without_rights_where_there_is_no_share(self, rig: Rig, server: Server, jid: str) -> None:
        """The script that pman renders, run by nobody on a machine where only root could make /share."""
        server.post(rig.request(jid, OUT + 'id -un > "$out/user"'))
        server.wait_final(jid)
        script = (state_of(rig, jid) / "job.sh").read_text()
        nobody = pwd.getpwnam("nobody")
        with tempfile.TemporaryDirectory() as home:
            for name in ("incoming", "outgoing"):
                Path(home, name).mkdir()
                script = script.replace(f"{name}=", f"{name}={home}/{name} #", 1)
            Path(home, "job.sh").write_text(script)
            for path in (home, f"{home}/outgoing"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            entries = [entry for entry in Path("/").iterdir() if entry != Path("/share")]
            machine = [word for entry in entries for word in _shown(entry)]
            user = ["setpriv", "--reuid", "nobody", "--regid", str(nobody.pw_gid), "--clear-groups"]
            subprocess.run(["bwrap", "--cap-add", "ALL", *machine, "--", *user, "bash", "job.sh"], cwd=home, check=True)
            wait_for(Path(home, "rc").exists, 20, "the job to end")
            assert Path(home, "rc").read_text() == "0 \n", Path(home, "stderr.0").read_text()
            assert Path(home, "outgoing/user").read_text() == "nobody\n"


def _shown(entry: Path) -> list[str]:
    if entry.is_symlink():
        return ["--symlink", str(entry.readlink()), str(entry)]
    return ["--dev-bind", str(entry), str(entry)]


@pytest.mark.live("slurm")
class TestCharliecloud:
    """An image reference is looked up in Charliecloud's storage directory. It has no read-only binds."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        image = development("slurm")["PMAN_TEST_IMAGE_DIR"]
        directory = tmp_path_factory.mktemp('it\'s "$x"')
        shutil.copytree(image, directory / "images" / "img" / "localhost%none+1", symlinks=True)
        storage = str(directory / "images")
        with running(local_rig(directory, LOCAL_RUNTIME="charliecloud", SLURM_IMAGE_DIR=storage)) as rig:
            yield rig

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, rig: Rig) -> Server:
        return rig.start()

    def test_what_a_job_sees(self, server: Server, rig: Rig) -> None:
        assert runtimes.seen(server, rig, "seen").items() <= runtimes.table()["charliecloud"].items()

    def test_files_arguments_and_environment(self, server: Server, rig: Rig) -> None:
        script = OUT + r"""printf '%s\0' "$@" > "$out/argv"; printf '%s' "$V" > "$out/env"; ls /etc > "$out/etc"; """
        script += 'cat "$out/../incoming/in.txt"'
        request = rig.request("files", script, *HOSTILE, type="ds", env=[f"V={HOSTILE[4]}\n"])
        (rig.store / request["input_dir"] / "in.txt").write_text("pixels\n")
        server.post(request)
        job = server.wait_final("files")
        assert job["status"] == "finishedSuccessfully", job
        assert "pixels\n" in job["logs"]
        argv = (rig.outgoing("files") / "argv").read_bytes().split(b"\0")[:-1]
        assert argv == [*(value.encode() for value in HOSTILE), b"/share/incoming", b"/share/outgoing"]
        assert (rig.outgoing("files") / "env").read_text() == f"{HOSTILE[4]}\n"
        assert "debian_version" not in (rig.outgoing("files") / "etc").read_text()

    def test_no_directory_becomes_an_option(self, server: Server, rig: Rig, tmp_path: Path) -> None:
        runtimes.assert_no_directory_is_an_option(server, rig, tmp_path)

    def test_workers_and_exit_code(self, server: Server, rig: Rig) -> None:
        server.post(rig.request("workers", 'echo "I am $PMAN_WORKER_INDEX"; exit 3', number_of_workers=2))
        job = server.wait_final("workers")
        assert (job["status"], job["message"]) == ("finishedWithError", "worker 0: The job ended with exit code 3.")
        assert "I am 0\n" in job["logs"]
        assert "I am 1\n" in job["logs"]

    def test_an_image_that_is_not_there(self, server: Server, rig: Rig) -> None:
        server.post(rig.request("missing", "true", image="localhost/missing:1"))
        job = server.wait_final("missing")
        assert job["status"] == "finishedWithError"
        assert "localhost/missing:1" in job["logs"]

    def test_delete(self, server: Server, rig: Rig) -> None:
        request = rig.request("deleted", COUNTED + 'while :; do echo beat >> "$out/beats"; sleep 0.1; done')
        server.post(request)
        beats = rig.outgoing("deleted") / "beats"
        wait_for(beats.exists, rig.job_seconds, "the first beat")
        assert server.delete("deleted").status_code == 204
        size = beats.stat().st_size
        assert server.post(request | {"entrypoint": ["true"]}).status_code == 201
        assert server.wait_final("deleted")["status"] == "finishedSuccessfully"
        assert beats.stat().st_size == size
        assert rig.executions("deleted") == 1


@pytest.mark.live("podman")
class TestPodman(Contract):
    """In the namespaces of what scripts/engines/podman starts."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        engine = development("podman")
        run = Path(engine["PMAN_DEV_PODMAN_RUN"])
        directory = tmp_path_factory.mktemp('it\'s "$x"')
        process = (run / "pid/namespaces").read_text().split()[0]
        enter = ["nsenter", "--target", process, "--net", "--mount", "--", "env"]
        enter += [f"CONTAINERS_CONF={run}/containers.conf", f"CONTAINERS_STORAGE_CONF={run}/storage.conf"]
        (directory / "bin").mkdir()
        # --init needs catatonit, which is not everywhere; without it sh, being process 1, does not heed TERM
        drop = 'for word; do shift; [ "$word" = --init ] || set -- "$@" "$word"; done'
        program = directory / "bin" / "podman"
        program.write_text(f'#!/bin/bash\n{drop}\nexec {shlex.join([*enter, shutil.which("podman") or ""])} "$@"\n')
        program.chmod(0o755)
        rig = local_rig(directory, LOCAL_RUNTIME="podman", PATH=f"{program.parent}:{os.environ['PATH']}")
        with running(replace(rig, image=engine["PMAN_TEST_IMAGE"], read_only_input=True)) as rig:
            yield rig

    def test_what_a_job_sees(self, server: Server, rig: Rig, jid: str) -> None:
        assert runtimes.seen(server, rig, jid).items() <= runtimes.table()["podman"].items()

    def test_no_directory_becomes_an_option(self, server: Server, rig: Rig, tmp_path: Path) -> None:
        runtimes.assert_no_directory_is_an_option(server, rig, tmp_path)

    def test_the_environment_stands_in_no_arguments(self, server: Server, rig: Rig, jid: str) -> None:
        """Which all users of the machine may read."""
        script = OUT + 'echo "$TOKEN" > "$out/token"; ' + GATED
        server.post(rig.request(jid, script, env=[f"TOKEN={jid}-hidden"]))
        wait_for((rig.outgoing(jid) / "token").exists, rig.job_seconds, "the job to run")
        lines = [command_line(pid) for pid in psutil.pids()]
        (rig.outgoing(jid) / "go").touch()
        assert any(jid.encode() in line for line in lines)
        assert not [line for line in lines if f"{jid}-hidden".encode() in line]
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"

    def test_what_a_killed_script_left(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, OUT + 'while :; do echo beat >> "$out/beats"; sleep 0.1; done'))
        beats = rig.outgoing(jid) / "beats"
        wait_for(beats.exists, rig.job_seconds, "the first beat")
        for pid in members(int((state_of(rig, jid) / "claim").read_text().split()[0])):
            os.kill(pid, signal.SIGKILL)
        assert server.delete(jid).status_code == 204
        size = beats.stat().st_size
        server.post(rig.request(jid, "sleep 1"))
        assert server.wait_final(jid)["status"] == "finishedSuccessfully"
        assert beats.stat().st_size == size

    @pytest.mark.live("slurm")
    def test_delete_ends_a_container_that_ignores_term_on_slurm(self, rig: Rig, jid: str, tmp_path: Path) -> None:
        """SLURM, whose KillWait is 8 s here, kills the client and not the container."""
        overlay = tmp_path / "slurm" / "job.sh.j2"
        overlay.parent.mkdir()
        path = f"PATH={shlex.quote(rig.env['PATH'].partition(':')[0])}:$PATH"
        overlay.write_text(f'{{% extends "shipped/slurm/job.sh.j2" %}}{{% block prologue %}}\n{path}\n{{% endblock %}}')
        over = slurm_rig(rig.logs, development("slurm"), SLURM_RUNTIME="podman", TEMPLATES_DIR=str(tmp_path))
        with running(replace(over, image=rig.image, user="", prefix=())) as over:  # as root, whom the engine serves
            server = over.start()
            runtimes.assert_delete_ends_what_ignores_term(over, {f"{jid}-1": (server, 1), f"{jid}-2": (server, 2)})


@pytest.mark.live("swarm")
class TestDocker:
    """The engine that scripts/engines/swarm starts. `docker` is in the names of these tests: see tests/conftest.py."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        engine = development("swarm")
        directory = tmp_path_factory.mktemp('it\'s "$x"')
        rig = local_rig(directory, LOCAL_RUNTIME="docker", DOCKER_HOST=engine["DOCKER_HOST"])
        with running(replace(rig, image=engine["PMAN_TEST_IMAGE"], read_only_input=True)) as rig:
            yield rig

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, rig: Rig) -> Server:
        return rig.start()

    def test_what_a_job_sees_in_docker(self, server: Server, rig: Rig) -> None:
        assert runtimes.seen(server, rig, "seen").items() <= runtimes.table()["docker"].items()

    def test_user_and_shared_memory_of_docker(self, rig: Rig) -> None:
        server = rig.start(CONTAINER_USER="1234:5678", SHM_SIZE="7")
        server.post(rig.request("user", "echo $(id -u) $(id -g) $(df -m /dev/shm | tail -n 1)"))
        job = server.wait_final("user")
        assert re.match(r"1234 5678 shm +7 ", job["logs"]), job

    def test_files_arguments_and_environment_in_docker(self, server: Server, rig: Rig) -> None:
        script = OUT + r"""printf '%s\0' "$@" > "$out/argv"; printf '%s' "$V" > "$out/env"; touch /share/incoming/x"""
        server.post(rig.request("files", script, *HOSTILE, type="ds", env=[f"V={HOSTILE[4]}\n"]))
        job = server.wait_final("files")
        assert (job["status"], "Read-only" in job["logs"]) == ("finishedWithError", True), job
        argv = (rig.outgoing("files") / "argv").read_bytes().split(b"\0")[:-1]
        assert argv == [*(value.encode() for value in HOSTILE), b"/share/incoming", b"/share/outgoing"]
        assert (rig.outgoing("files") / "env").read_text() == f"{HOSTILE[4]}\n"

    def test_no_directory_becomes_an_option_of_docker(self, server: Server, rig: Rig, tmp_path: Path) -> None:
        runtimes.assert_no_directory_is_an_option(server, rig, tmp_path)

    def test_exit_codes_of_docker(self, server: Server, rig: Rig) -> None:
        server.post(rig.request("code", 'echo "I am $PMAN_WORKER_INDEX"; exit 3', number_of_workers=2))
        server.post(rig.request("program", "", entrypoint=["no-such-program"]))
        server.post(rig.request("image", "true", image="localhost/missing:1"))
        job = server.wait_final("code")
        assert (job["message"], "I am 1\n" in job["logs"]) == ("worker 0: The job ended with exit code 3.", True), job
        job = server.wait_final("program")
        assert (job["message"], "no-such-program" in job["logs"]) == ("The job ended with exit code 127.", True), job
        job = server.wait_final("image")
        assert (job["status"], "localhost/missing:1" in job["logs"]) == ("finishedWithError", True), job

    def test_delete_in_docker(self, server: Server, rig: Rig) -> None:
        server.post(
            rig.request("deleted", OUT + 'trap "" TERM; while :; do echo beat >> "$out/beats"; sleep 0.1; done')
        )
        beats = rig.outgoing("deleted") / "beats"
        wait_for(beats.exists, rig.job_seconds, "the first beat")
        assert server.delete("deleted").status_code == 204
        size = beats.stat().st_size
        server.post(rig.request("deleted", "sleep 1"))
        assert server.wait_final("deleted")["status"] == "finishedSuccessfully"
        assert beats.stat().st_size == size
