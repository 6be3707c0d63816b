"""One Docker engine and one Podman engine, both real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import docker
import pytest

from tests.conftest import development
from tests.live.engine_cases import EngineCases, engine_rig, proxied, published
from tests.rig import COUNTED, ROOT, Rig, Server, running, wait_for

DEV_PODMAN = str(ROOT / "scripts" / "engines" / "podman")


class _OneEngine(EngineCases):
    def test_containers_of_others_are_invisible(
        self, server: Server, rig: Rig, jid: str, api: docker.APIClient
    ) -> None:
        other = f"others-{jid[-8:]}"
        container_id = api.create_container(rig.image, ["sleep", "600"], name=other)["Id"]
        try:
            for name in (other, container_id, container_id[:12]):
                assert server.get(name).status_code == 404
                assert server.delete(name).status_code == 404
            answer = server.post(rig.request(other, "true"))
            assert answer.status_code == 409
            assert other in answer.json()["message"]
            assert api.inspect_container(container_id)["Id"] == container_id
        finally:
            api.remove_container(container_id, force=True)

    def test_pman_is_killed_between_create_and_start(
        self, rig: Rig, tmp_path: Path, jid: str, api: docker.APIClient
    ) -> None:
        """The retry starts what was left, once, however many retry at two processes."""
        request = rig.request(jid, COUNTED)
        with proxied(rig, tmp_path) as (between, proxy):
            victim = between.start()
            proxy.cut_before(b"/start")
            with ThreadPoolExecutor(1) as pool:
                posting = pool.submit(victim.post, request)
                wait_for(lambda: proxy.cuts, 20, "the start to be cut off")
                victim.kill()
                assert posting.exception() is not None
        assert api.inspect_container(jid)["State"]["Status"] == "created"
        servers = [rig.start(), rig.start()]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: servers[number % 2].post(request), range(8)))
        codes = {answer.status_code for answer in answers}
        assert codes <= {201, 503}, [answer.text for answer in answers]
        assert 201 in codes
        assert servers[0].wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
        assert servers[1].post(request).status_code == 201
        assert rig.executions(jid) == 1
        for server in servers:
            server.stop()

    def test_engine_removes_nothing_that_runs_and_starts_nothing_that_is_removed(
        self, rig: Rig, api: docker.APIClient
    ) -> None:
        """What taking over a job stands on: of a start and a removal without force only the first one is done."""
        started, removed = (api.create_container(rig.image, ["sleep", "600"])["Id"] for _ in range(2))
        try:
            api.start(started)
            with pytest.raises(docker.errors.APIError, match="running"):
                api.remove_container(started)
            assert api.inspect_container(started)["State"]["Running"]
            api.remove_container(removed)
            with pytest.raises(docker.errors.NotFound):
                api.start(removed)
        finally:
            api.remove_container(started, force=True)

    def test_start_that_arrives_late(self, rig: Rig, tmp_path: Path, jid: str) -> None:
        """After pman gave it up, took the job over, and the job ended: it starts nothing."""
        with proxied(rig, tmp_path) as (between, proxy):
            server = between.start(DOCKER_TIMEOUT_SECONDS="5")
            proxy.hold(b"/start")
            deadline = time.monotonic() + 120
            while (answer := server.post(rig.request(jid, COUNTED))).status_code != 201:
                assert answer.status_code == 503, answer.text
                assert time.monotonic() < deadline, answer.text
            wait_for(lambda: server.get(jid).json().get("status") == "finishedSuccessfully", 60, "the end of the job")
            proxy.deliver()
            late = wait_for(lambda: proxy.late_answers, 60, "the late start")
            assert late[0].startswith(b"HTTP/1.1 404")
            assert rig.executions(jid) == 1
            assert server.wait_final(jid)["status"] == "finishedSuccessfully"

    def test_pull_policy_never(self, rig: Rig, jid: str) -> None:
        server = rig.start(PULL_POLICY="never")
        answer = server.post(rig.request(jid, "true", image="localhost/pman-no-such-image:1"))
        assert answer.status_code == 400
        assert "localhost/pman-no-such-image:1" in answer.json()["message"]
        assert "PULL_POLICY=never" in answer.json()["message"]
        server.stop()

    def test_pull_policy_always(self, rig: Rig, jid: str) -> None:
        """The image is here, its registry is not."""
        server = rig.start(PULL_POLICY="always")
        answer = server.post(rig.request(jid, "true"))
        assert answer.status_code == 400
        assert rig.image in answer.json()["message"]
        server.stop()

    def test_pull_policies_of_an_image_that_is_there(
        self, rig: Rig, jid: str, api: docker.APIClient, registry: str
    ) -> None:
        image = f"{registry}/pull-{jid[-8:]}:1"
        with published(api, rig.image, image):
            for policy, which in (("missing", "here"), ("never", "here"), ("always", "registry")):
                server = rig.start(PULL_POLICY=policy)
                answer = server.post(rig.request(jid, 'echo "$WHICH"', image=image, number_of_workers=2))
                assert answer.status_code == 201, answer.text
                assert server.wait_final(jid, rig.job_seconds)["logs"].count(f"{which}\n") == 2
                assert server.delete(jid).status_code == 204
                assert server.log.read_text().count("pulling the image") == (policy == "always")
                server.stop()

    def test_memory_and_entrypoint_as_the_site_says(
        self, rig: Rig, tmp_path: Path, jid: str, api: docker.APIClient
    ) -> None:
        """By default the image's ENTRYPOINT gets the command line, and memory may be exceeded while there is enough."""
        image = f"localhost/pman-test:{jid[-8:]}"
        made = api.create_container(rig.image, ["true"])["Id"]
        api.commit(
            made, *image.rsplit(":", 1), changes=['ENTRYPOINT ["/bin/sh", "-c", "echo first; exec \\"$0\\" \\"$@\\""]']
        )
        api.remove_container(made)
        script = "head -c 50000000 /dev/zero | tail -c 50000000 | wc -c"
        for site, printed in (("{}", "first\n50000000\n"), ("docker_replace_entrypoint: true", "50000000\n")):
            (tmp_path / "site.yaml").write_text(site)
            server = rig.start(TEMPLATES_DIR=str(tmp_path))
            posted = server.post(rig.request(jid, script, image=image, memory_limit=16))
            assert posted.status_code == 201, posted.text
            job = server.wait_final(jid, rig.job_seconds)
            assert (job["status"], job["logs"]) == ("finishedSuccessfully", printed), job
            assert job["cmd"] == posted.json()["cmd"]
            assert server.delete(jid).status_code == 204
            server.stop()
        api.remove_image(image, force=True)

    def test_environment_of_minichris(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """What https://github.com/FNNDSC/miniChRIS-docker sets in docker-compose.yml; the volume is that of pfcon."""
        env = {
            "CONTAINER_ENV": "docker", "CONTAINER_USER": "1001:", "ENABLE_HOME_WORKAROUND": "yes",
            "JOB_LABELS": "org.chrisproject.miniChRIS=plugininstance", "SECRET_KEY": "secret", "REMOVE_JOBS": "yes",
            "PFCON_SELECTOR": f"test={jid}", "NAME": "VOLUME",
        }  # fmt: skip
        with self.volume(rig, api, **env) as of_volume:
            binds = api.create_host_config(binds=[f"{of_volume.env.pop('NAME')}:/var/local/storeBase"])
            pfcon = api.create_container(rig.image, ["sleep", "600"], labels={"test": jid}, host_config=binds)["Id"]
            api.start(pfcon)
            try:
                self.run_in_volume(of_volume, jid)
            finally:
                api.remove_container(pfcon, force=True)

    def test_impossible_cpu_limit(self, server: Server, rig: Rig, jid: str) -> None:
        answer = server.post(rig.request(jid, "true", cpu_limit=9_000_000))
        assert answer.status_code in (201, 400)
        if answer.status_code == 400:
            assert "CPU" in answer.json()["message"]


@pytest.mark.live("swarm")
class TestDocker(_OneEngine):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("docker", tmp_path_factory.mktemp("docker"))) as rig:
            yield rig


@pytest.mark.live("podman")
class TestPodman(_OneEngine):
    many = 40
    knows_memory = False  # Podman 4.3 says false, as seen with runc on a machine that has both versions of cgroups
    options: tuple[str, ...] = ()  # of scripts/engines/podman
    last_words = "echo end"  # 4.3 joins a last line that has no end to the one before it, where it is asked for a tail

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("podman", tmp_path_factory.mktemp("podman"), DOCKER_TIMEOUT_SECONDS="60")) as rig:
            yield rig

    def test_podman_ends_under_a_running_job(self, server: Server, rig: Rig, jid: str) -> None:
        """Its service, that is: a job goes on without it, and pman recovers by itself."""
        waiting = COUNTED + 'echo began; while [ ! -e "$out/go" ]; do sleep 0.1; done; echo ended'
        assert server.post(rig.request(jid, waiting)).status_code == 201
        wait_for(lambda: rig.executions(jid), rig.job_seconds, "the job to run")
        subprocess.run([DEV_PODMAN, "kill", "podman"], check=True)
        try:
            assert server.get(jid).status_code == 503
            assert server.call("GET", "../../readyz").status_code == 503
        finally:
            subprocess.run([DEV_PODMAN, "start", "podman"], check=True)
        wait_for(lambda: server.get(jid).json().get("status") == "started", 60, "pman to see the job again")
        (rig.outgoing(jid) / "go").touch()
        job = server.wait_final(jid, rig.job_seconds)
        assert (job["status"], job["logs"]) == ("finishedSuccessfully", "began\nended\n")
        assert rig.executions(jid) == 1

    def test_container_of_a_build_stays(self, server: Server, rig: Rig, api: docker.APIClient) -> None:
        """Podman has it in its storage, as what is left where it was killed, and would remove it by its id."""
        run = Path(development("podman", *self.options)["PMAN_DEV_PODMAN_RUN"])

        def podman(*words: str) -> str:
            files = (f"CONTAINERS_CONF={run}/containers.conf", f"CONTAINERS_STORAGE_CONF={run}/storage.conf")
            inside = ("nsenter", "--target", (run / "pid/namespaces").read_text().split()[0], "--net", "--mount")
            return subprocess.check_output([*inside, "env", *files, "podman", *words], text=True)

        def left() -> list[str]:
            return re.findall(r"(\S+) buildah\n", podman("ps", "--external", "--format={{.Names}} {{.Command}}"))

        recipe = BytesIO(f"FROM {rig.image}\nLABEL a=b\n".encode())
        list(api.build(fileobj=recipe, rm=False, nocache=True, network_mode="none"))
        (name,) = before = left()
        podman("umount", name)  # as a restart of the machine does
        try:
            answer = server.post(rig.request(name, "true"))
            assert (answer.status_code, name in answer.text, left()) == (409, True, before), answer.text
        finally:
            podman("rm", "--ignore", name)

    def test_podman_is_killed_while_it_makes_a_container(
        self, server: Server, rig: Rig, jid: str, api: docker.APIClient
    ) -> None:
        """Its storage then keeps the name of a container that Podman does not have, for ever; pman removes that."""
        run = Path(development("podman", *self.options)["PMAN_DEV_PODMAN_RUN"])
        stored = run / "storage/vfs-containers/containers.json"
        pid = int((run / "pid/podman").read_text().split()[0])

        def is_left(name: str) -> bool:
            return f'"{name}"' in stored.read_text() and name not in str(api.containers(all=True))

        for tried in range(20):
            request = rig.request(name := f"{jid}-{tried}", COUNTED)
            before = stored.stat().st_mtime_ns
            with ThreadPoolExecutor(1) as pool:
                posting = pool.submit(server.post, request)
                while stored.stat().st_mtime_ns == before and not posting.done():
                    pass  # the storage has the name some milliseconds before Podman has the container
                os.kill(pid, signal.SIGKILL)
                subprocess.run([DEV_PODMAN, "start", "podman", *self.options], check=True)
                pid = int((run / "pid/podman").read_text().split()[0])
                if is_left(name):
                    break
                wait_for(posting.done, 100, "the answer")
        else:
            raise AssertionError("Podman was never killed at the right moment.")
        wait_for(lambda: server.post(request).status_code == 201, 100, "the job to be accepted")
        assert server.wait_final(name, rig.job_seconds)["status"] == "finishedSuccessfully"
        assert rig.executions(name) == 1
