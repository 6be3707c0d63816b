"""What Swarm, Docker and Podman have to show beside the contract, on the real engine."""

from __future__ import annotations

import functools
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
import psutil
import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.fakes.faultproxy import FaultProxy
from tests.generate import HOSTILE
from tests.rig import COUNTED, FINAL, Rig, Server, running, wait_for

LABEL = "org.chrisproject.pman.name"
CLIENTS = 16
CHANCE_OF_CUT = 0.2
SITE = "stop_grace_seconds: 1\ndocker_hard_memory: true\n"  # a shell that is process 1 obeys no SIGTERM
EATING = 'x=$(head -c 300000000 /dev/zero | tr "\\0" a); echo ${#x}'
# Texts that separate, quote or end an option in some program. OUTSIDE stands for a directory that is not the job's.
OPTIONS = (
    ",source=OUTSIDE", ",src=OUTSIDE", ",destination=/mnt", ",U=true", ",rw", ",", '"', '""', "\n", "\r\n,rw", ":",
    ":OUTSIDE:rw", "::ro", "=", ";", "'", " ", "\\", "$HOME", "$(id)", "{{.Node.ID}}", '["sh"]', "null", "#", "%2C",
)  # fmt: skip
LOOK = "ls -a /share/outgoing /share/incoming; echo x > /share/outgoing/written"
PRINT = (
    COUNTED
    + r"""
printf '%s\0' "$@" > "$out/argv"
for i in 0 1 2; do eval "printf '%s\0' \"\$V$i\""; done > "$out/env"
echo "$PMAN_WORKER_INDEX of $PMAN_WORKER_COUNT"
"""
)


def engine_rig(name: str, directory: Path, *options: str, host: str = "", **env: str) -> Rig:
    """pman over the development engine for CONTAINER_ENV `name`, or over the one at `host`, with a store of its own.

    options: of the script in scripts/engines/ that starts the engine.
    """
    found = development("podman" if name == "podman" else "swarm", *options)
    (directory / "store").mkdir(exist_ok=True)
    (directory / "overlay").mkdir(exist_ok=True)
    (directory / "overlay" / "site.yaml").write_text(SITE)
    own = found["PODMAN_DOCKER_HOST" if name == "podman" else "DOCKER_HOST"]
    settings = {"CONTAINER_ENV": name, "DOCKER_HOST": host or own, "TEMPLATES_DIR": f"{directory}/overlay", **env}
    return Rig(settings, directory / "store", found["PMAN_TEST_IMAGE"], directory)


@contextmanager
def proxied(rig: Rig, directory: Path) -> Iterator[tuple[Rig, FaultProxy]]:
    """A rig over the same engine, with a fault proxy between."""
    with FaultProxy(rig.env["DOCKER_HOST"], f"unix://{directory}/proxy.sock") as proxy, ExitStack() as stack:
        between = Rig({**rig.env, "DOCKER_HOST": proxy.url}, rig.store, rig.image, directory)
        stack.callback(between.stop)
        yield between, proxy


@contextmanager
def published(api: docker.APIClient, base: str, image: str) -> Iterator[None]:
    """`image` in its registry, where WHICH=registry, and in the engine, where WHICH=here."""
    repository, tag = image.rsplit(":", 1)
    container = api.create_container(base, ["true"])["Id"]
    try:
        api.commit(container, repository, tag, changes=["ENV WHICH=registry"])
        assert "error" not in api.push(repository, tag)
        api.commit(container, repository, tag, changes=["ENV WHICH=here"])
        yield
    finally:
        api.remove_container(container, force=True)
        with suppress(docker.errors.ImageNotFound):
            api.remove_image(image, force=True)


class EngineCases(Contract):
    """The contract, and then what containers make possible.

    many: how many jobs the hostile crowd has. cut: how many are submitted where a fifth of all blocks is cut.
    knows_memory: the engine says which container ran out of memory.
    """

    many = 200
    knows_memory = True
    cut = int(os.environ.get("PMAN_TEST_CUT_JOBS", "12"))

    @pytest.fixture(scope="class")
    @classmethod
    def api(cls, rig: Rig) -> Iterator[docker.APIClient]:
        with docker.APIClient(base_url=rig.env["DOCKER_HOST"]) as client:
            yield client

    @pytest.fixture(scope="class")
    @classmethod
    def registry(cls, rig: Rig) -> str:
        """The address of a registry that the development engine of the rig can reach."""
        development("podman" if rig.env["CONTAINER_ENV"] == "podman" else "swarm", command=("start", "registry"))
        return "127.0.0.1:5000"

    def objects(self, api: docker.APIClient) -> set[str]:
        """The jids for which the engine has anything."""
        found = api.containers(all=True, filters={"label": LABEL})
        return {container["Labels"][LABEL] for container in found}

    def test_many_hostile_jobs(self, server: Server, rig: Rig, api: docker.APIClient) -> None:
        """Distinct jobs posted by 16 threads: none lost, none run twice, every value as it was, all deleted."""
        chance = random.Random(11)
        prefix = f"many-{uuid.uuid4().hex[:6]}"
        jobs = {f"{prefix}-{number}": [_hostile(chance) for _ in range(9)] for number in range(self.many)}

        def run(jid: str) -> str:
            values = jobs[jid]
            env = [f"V{index}={value}" for index, value in enumerate(values[:3])]
            request = rig.request(jid, PRINT, *values[3:], env=env, cpu_limit=10, memory_limit=16)
            answer = server.post(request)
            assert answer.status_code == 201, answer.text
            return server.wait_final(jid, 300)["status"]

        with ThreadPoolExecutor(CLIENTS) as pool:
            assert list(pool.map(run, jobs)) == ["finishedSuccessfully"] * self.many
        for jid, values in jobs.items():
            assert rig.executions(jid) == 1
            assert (rig.outgoing(jid) / "env").read_bytes().split(b"\0")[:-1] == [v.encode() for v in values[:3]]
            assert (rig.outgoing(jid) / "argv").read_bytes().split(b"\0")[:-2] == [v.encode() for v in values[3:]]
        with ThreadPoolExecutor(CLIENTS) as pool:
            assert [answer.status_code for answer in pool.map(server.delete, jobs)] == [204] * self.many
        assert not self.objects(api) & set(jobs)

    @pytest.mark.parametrize("text", OPTIONS)
    @pytest.mark.parametrize("field", ["input_dir", "output_dir", "entrypoint"])
    def test_no_value_becomes_an_option(
        self, server: Server, rig: Rig, jid: str, tmp_path: Path, field: str, text: str
    ) -> None:
        request = rig.request(jid, LOOK, type="ds")
        if field == "entrypoint":
            request[field] = [text.replace("OUTSIDE", str(tmp_path)) or "/", *request[field]]
        else:
            request[field] = f"key-{jid}/v{text}".replace("OUTSIDE", str(tmp_path))
            (rig.store / request[field]).mkdir(parents=True)
        self._sees_only_its_own(server, rig, request, tmp_path, field)

    @pytest.mark.parametrize("field", ["args", "env", "auid", "jid"])
    def test_no_list_of_values_becomes_an_option(
        self, server: Server, rig: Rig, jid: str, tmp_path: Path, field: str
    ) -> None:
        values = [f"v{text}".replace("OUTSIDE", str(tmp_path)) for text in OPTIONS]
        fields = {
            "args": values,
            "env": [f"V{number}={value}" for number, value in enumerate(values)],
            "auid": "".join(values),
            "jid": jid + ",source=/etc:rw;x='\"",
        }
        request = rig.request(jid, LOOK, type="ds") | {field: fields[field]}
        self._sees_only_its_own(server, rig, request, tmp_path, field)

    def _sees_only_its_own(self, server: Server, rig: Rig, request: dict[str, Any], outside: Path, field: str) -> None:
        """The job gets the two directories that it named and nothing else of the machine, or is refused with a 400."""
        (outside / "secret").write_text("the secret")
        answer = server.post(request)
        if answer.status_code == 400:
            assert field == "entrypoint" or field in answer.json()["message"], answer.text
            return
        assert answer.status_code == 201, answer.text
        job = server.wait_final(request["jid"], rig.job_seconds)
        assert "secret" not in job["logs"]
        assert not (outside / "written").exists()
        if field != "entrypoint":
            assert job["status"] == "finishedSuccessfully", job
            assert (rig.store / request["output_dir"] / "written").read_text() == "x\n"
        assert server.delete(request["jid"]).status_code == 204

    def test_limits_of_the_container(self, server: Server, rig: Rig, jid: str) -> None:
        script = (
            "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us memory.max cpu.max 2>&-; true"
        )
        server.post(rig.request(jid, script, cpu_limit=250, memory_limit=48))
        printed = server.wait_final(jid, rig.job_seconds)["logs"].split()
        assert printed[:2] == [str(48 << 20), "25000"]

    def test_out_of_memory(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, EATING, memory_limit=16))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert "memory limit of 16 MiB" in job["message"]

    def test_out_of_memory_of_a_child(self, server: Server, rig: Rig, jid: str) -> None:
        """The job goes on without it and ends with exit code 0; what it wrote may be incomplete."""
        first = "echo 1000 >/proc/self/oom_score_adj"  # else a busy kernel may take the shell around it
        server.post(rig.request(jid, f"sh -c '{first}; {EATING}' || echo going on", memory_limit=16))
        job = server.wait_final(jid, rig.job_seconds)
        assert "going on\n" in job["logs"], job
        if job["status"] == "finishedSuccessfully":
            assert not self.knows_memory, job
            return
        assert "its output may be incomplete" in job["message"]
        (listed,) = [one for one in server.call("GET", "jobs/").json()["jobs"] if one["jid"] == jid]
        assert listed["status"] == "finishedWithError"

    def test_what_the_engine_says_of_a_job_that_does_not_start(self, server: Server, rig: Rig, jid: str) -> None:
        answer = server.post(rig.request(jid, "", entrypoint=["/nope"]))
        said = answer.json() if answer.status_code == 400 else server.wait_final(jid, rig.job_seconds)
        assert "/nope" in said["message"]
        assert "no such file" in said["message"].lower()

    def test_user_home_and_shared_memory(self, rig: Rig, jid: str) -> None:
        server = rig.start(
            CONTAINER_USER="1234:4321", ENABLE_HOME_WORKAROUND="yes", SHM_SIZE="12", JOB_LABELS="a.b/c=d{{x}}"
        )
        server.post(rig.request(jid, 'id -u; id -g; echo "$HOME"; df -k /dev/shm | tail -n 1'))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["logs"].split()[:3] == ["1234", "4321", "/tmp"]
        assert str(12 * 1024) in job["logs"]
        assert server.delete(jid).status_code == 204
        server.stop()

    def test_streams_in_the_order_of_time(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "echo one; sleep 0.3; echo two >&2; sleep 0.3; printf 'three\\r\\n\\377\\n'"))
        assert server.wait_final(jid, rig.job_seconds)["logs"] == "one\ntwo\nthree\n\ufffd\n"

    def test_logs_while_it_runs(self, server: Server, rig: Rig, jid: str) -> None:
        for limit in (None, 5):
            server.post(rig.request(jid, "echo early; sleep 600", time_limit_minutes=limit))
            server.wait_state(jid, "started", rig.job_seconds)
            deadline = time.monotonic() + 20
            while server.get(jid).json()["logs"] != "early\n":
                assert time.monotonic() < deadline, server.get(jid).text
                time.sleep(0.1)
            server.delete(jid)

    def test_fifty_megabytes_of_log(self, server: Server, rig: Rig, jid: str) -> None:
        script = "yes 0123456789012345678901234567890123456789012345678 | head -n 1000000; echo the end"
        server.post(rig.request(jid, script))
        job = server.wait_final(jid, 120)
        assert job["logs"].endswith("8\nthe end\n")
        assert len(job["logs"].splitlines()) == 1000
        before = psutil.Process(server.process.pid).memory_info().rss
        with ThreadPoolExecutor(8) as pool:
            assert {len(pool_answer.content) for pool_answer in pool.map(server.get, [jid] * 16)} == {
                len(server.get(jid).content)
            }
        assert psutil.Process(server.process.pid).memory_info().rss - before < 64 << 20

    def test_one_line_of_forty_megabytes(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "head -c 40000000 /dev/zero | tr '\\0' x; echo; echo the end"))
        wait_for(lambda: server.get(jid, tail=0).json().get("status") in FINAL, 120, "the end of the job")
        began = time.monotonic()
        answer = server.get(jid)
        assert answer.json()["logs"].endswith("x\nthe end\n"), answer.json()["logs"][-200:]
        assert time.monotonic() - began < 20
        assert len(answer.content) <= 1100 * 1024
        assert server.get(jid, tail=1).json()["logs"] == "the end\n"
        assert psutil.Process(server.process.pid).memory_info().rss < 300 << 20

    def test_missing_image(self, server: Server, rig: Rig, jid: str) -> None:
        missing = f"localhost/pman-no-such-image:{jid[-6:]}"
        answer = server.post(rig.request(jid, "true", image=missing))
        if answer.status_code == 201:
            job = server.wait_final(jid, rig.job_seconds)
            assert (job["status"], job["image"]) == ("finishedWithError", missing)
            assert missing in job["message"]
            return
        assert answer.status_code == 400
        assert missing in answer.json()["message"]
        assert server.get(jid).status_code == 404

    @pytest.mark.parametrize("image", ["dir:tmp", "docker-archive:x.tar", "a" * 64])
    def test_image_that_is_read_in_another_way(self, server: Server, rig: Rig, jid: str, image: str) -> None:
        """As a directory or an archive of the engine's machine, or as an id: there is no such image."""
        answer = server.post(rig.request(jid, "true", image=image))
        if answer.status_code == 201:
            job = server.wait_final(jid, rig.job_seconds)
            assert (job["status"], image in job["message"]) == ("finishedWithError", True), job
            return
        assert (answer.status_code, image in answer.json()["message"]) == (400, True)

    def test_image_of_the_sites_mirror(
        self, rig: Rig, tmp_path: Path, jid: str, api: docker.APIClient, registry: str
    ) -> None:
        """What is pulled is what the site's template names."""
        path = "swarm/service.yaml.j2" if rig.env["CONTAINER_ENV"] == "swarm" else "docker/container.yaml.j2"
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(
            f'{{% extends "shipped/{path}" %}}{{% set image = "{registry}/" ~ job.image.removeprefix("docker.io/") %}}'
        )
        image = f"fnndsc/pl-{jid[-8:]}:1"
        server = rig.start(TEMPLATES_DIR=str(tmp_path))
        with published(api, rig.image, f"{registry}/{image}"):
            api.remove_image(f"{registry}/{image}", force=True)
            answer = server.post(
                rig.request(jid, 'echo "from $WHICH"', image=f"docker.io/{image}", number_of_workers=2)
            )
            assert answer.status_code == 201, answer.text
            job = server.wait_final(jid, rig.job_seconds)
            assert (job["status"], job["image"]) == ("finishedSuccessfully", f"docker.io/{image}"), job
            assert job["logs"].count("from registry\n") == 2
            assert server.delete(jid).status_code == 204
        server.stop()

    def test_forty_half_open_connections(self, server: Server, rig: Rig, jid: str) -> None:
        server.post(rig.request(jid, "true"))
        server.wait_final(jid, rig.job_seconds)
        where = urlsplit(server.url)
        assert where.hostname
        assert where.port
        with ExitStack() as stack:
            for _ in range(40):
                half = stack.enter_context(socket.create_connection((where.hostname, where.port)))
                half.sendall(b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert server.wait_final(jid)["status"] == "finishedSuccessfully"

    # -------------------------------------------------------------------------------------------------------- storage

    def test_nfs(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """There is no server: what can be seen is that the engine takes the volumes and tries to mount them."""
        nfs = {"STORAGE_TYPE": "nfs", "NFS_SERVER": "127.0.0.1", "STOREBASE": "/no/export"}
        if rig.env["CONTAINER_ENV"] == "podman":
            with pytest.raises(AssertionError, match="STORAGE_TYPE=nfs does not work with Podman"):
                rig.start(**nfs)
            return
        server = rig.start(**nfs)
        request = rig.request(jid, "true", output_dir='out,addr=1.2.3.4:"{{.Node.ID}}\n,rw')
        assert server.post(request).status_code == 201
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedWithError"
        assert "mount" in job["message"]
        assert "/no/export" in job["message"]
        label = "com.docker.swarm.service.name" if rig.env["CONTAINER_ENV"] == "swarm" else LABEL
        for made in api.containers(all=True, filters={"label": f"{label}={jid}"}):  # none if it is on another node
            volumes = [api.inspect_volume(mount["Name"])["Options"] for mount in made["Mounts"]]
            assert {(one["o"], one["device"]) for one in volumes} == {
                ("addr=127.0.0.1,ro", f":/no/export/{request['input_dir']}"),
                ("addr=127.0.0.1,rw", f":/no/export/{request['output_dir']}"),
            }
        assert server.delete(jid).status_code == 204
        server.stop()

    @contextmanager
    def volume(self, rig: Rig, api: docker.APIClient, **env: str) -> Iterator[Rig]:
        """A rig whose store is a local volume, which VOLUME in `env` stands for."""
        name = f"pman-test-{uuid.uuid4().hex[:8]}"
        store = Path(api.create_volume(name)["Mountpoint"])
        own = {key: value.replace("VOLUME", name) for key, value in env.items()}
        try:
            with running(Rig({**rig.env, "STOREBASE": "", **own}, store, rig.image, rig.logs)) as of_volume:
                yield of_volume
        finally:
            api.remove_volume(name, force=True)

    def run_in_volume(self, rig: Rig, jid: str) -> None:
        server = rig.start()
        request = rig.request(jid, 'cat "$1/in" > "$2/out"; id -u', type="ds")
        for path in (request["input_dir"], request["output_dir"]):
            (rig.store / path).chmod(0o777)
        (rig.store / request["input_dir"] / "in").write_text("pixels\n")
        assert server.post(request).status_code == 201
        job = server.wait_final(jid, rig.job_seconds)
        assert job["status"] == "finishedSuccessfully", job
        assert (rig.outgoing(jid) / "out").read_text() == "pixels\n"
        assert server.delete(jid).status_code == 204
        server.stop()
        cleaner = rig.start(REMOVE_JOBS="yes")
        assert cleaner.delete(jid).status_code in (204, 404)
        cleaner.stop()

    def test_local_volume(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """With what https://github.com/FNNDSC/miniChRIS-podman sets in podman/pfcon-podman.yml."""
        env = {"STORAGE_TYPE": "docker_local_volume", "VOLUME_NAME": "VOLUME", "REMOVE_JOBS": "no", "SHM_SIZE": "1024"}
        if rig.env["CONTAINER_ENV"] != "swarm":
            env["CONTAINER_ENV"] = "docker"
        with self.volume(rig, api, **env) as of_volume:
            self.run_in_volume(of_volume, jid)

    def test_missing_input_in_a_volume(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """pman does not see the volume; a container that does, as pfcon's, knows what is there. Nothing is made."""
        with self.volume(rig, api, STORAGE_TYPE="docker_local_volume", VOLUME_NAME="VOLUME") as of_volume:
            server = of_volume.start()
            binds = api.create_host_config(binds=[f"{of_volume.env['VOLUME_NAME']}:/store"])
            pfcon = api.create_container(rig.image, ["sleep", "600"], host_config=binds)["Id"]
            api.start(pfcon)
            try:
                answer = server.post(of_volume.request(jid, "true", type="ds", input_dir="no/such"))
                if answer.status_code == 400:
                    assert "does not exist" in answer.text
                else:
                    assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedWithError"
                assert not (of_volume.store / "no").exists()
                server.delete(jid)
                self.run_in_volume(of_volume, jid)
            finally:
                api.remove_container(pfcon, force=True)
                server.stop()

    # ---------------------------------------------------------------------------------------------------- the upgrade

    def make_as_pman_6(self, api: docker.APIClient, rig: Rig, request: dict[str, Any]) -> str:
        """The object that pman 6.3.1 makes for this request, by the calls of the docker SDK that it uses; its id.

        https://github.com/FNNDSC/pman/blob/v6.3.1/pman/dockermgr.py, swarmmgr.py
        """
        client = docker.DockerClient.__new__(docker.DockerClient)
        client.api = api
        command = [*request["entrypoint"], *request["args"], "/share/outgoing"]
        store, name, image = rig.store, request["jid"], request["image"]
        if rig.env["CONTAINER_ENV"] == "swarm":
            mounts = [
                f"{store}/{request['input_dir']}:/share/incoming:ro",
                f"{store}/{request['output_dir']}:/share/outgoing:rw",
            ]
            never = docker.types.RestartPolicy(condition="none")
            made = client.services.create(
                image, command, name=name, env=request["env"], mounts=mounts, restart_policy=never, tty=True
            )
            return str(made.id)
        volumes = {
            f"{store}/{request['input_dir']}": {"bind": "/share/incoming", "mode": "ro"},
            f"{store}/{request['output_dir']}": {"bind": "/share/outgoing", "mode": "rw"},
        }
        made = client.containers.run(
            image=image, command=command, name=name, environment=request["env"], labels={"site": "x"}, detach=True,
            restart_policy={"Name": "no", "MaximumRetryCount": 0}, nano_cpus=int(1e8), volumes=volumes,
            mem_reservation=64 << 20,
        )  # fmt: skip
        return str(made.id)

    def is_there(self, api: docker.APIClient, rig: Rig, object_id: str) -> bool:
        try:
            (api.inspect_service if rig.env["CONTAINER_ENV"] == "swarm" else api.inspect_container)(object_id)
        except docker.errors.NotFound:
            return False
        return True

    def with_log(self, server: Server, jid: str) -> dict[str, str] | None:
        job: dict[str, str] = server.get(jid).json()
        return job if job["logs"] else None

    def test_jobs_of_pman_6(self, server: Server, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """They are read, and deleted; a POST that is repeated across the upgrade makes no second one."""
        scripts = {
            f"{jid}-ok": "echo to stdout", f"{jid}-bad": "echo to stdout; exit 3", f"{jid}-runs": "echo on; sleep 600",
            f"{jid}_ODD": "echo to stdout",  # no DNS label: the new pman calls it otherwise
        }  # fmt: skip
        requests = {name: rig.request(name, COUNTED + script) for name, script in scripts.items()}
        ids = {name: self.make_as_pman_6(api, rig, request) for name, request in requests.items()}
        for name, state in zip(scripts, (*FINAL, "started", FINAL[0]), strict=True):
            job = server.wait_state(name, state, rig.job_seconds)
            assert job["cmd"].endswith(" sh /share/outgoing")
            if state == "started":  # what it writes comes a moment later
                job = wait_for(functools.partial(self.with_log, server, name), 20, "the log of a job that runs")
            assert job["logs"].splitlines()[0] in ("to stdout", "on")
            same = server.post(requests[name])
            assert (same.status_code, same.json().get("jid")) == (201, name), same.text
            assert server.post(rig.request(name, "true")).status_code == 409
            assert rig.executions(name) == 1
        for name in scripts:
            assert server.delete(name).status_code == 204
            assert server.get(name).status_code == 404
            assert not self.is_there(api, rig, ids[name])
        assert server.post(requests[f"{jid}-ok"]).status_code == 201
        assert server.wait_final(f"{jid}-ok", rig.job_seconds)["status"] == "finishedSuccessfully"
        assert server.delete(f"{jid}-ok").status_code == 204

    def test_what_is_nearly_a_job_of_pman_6(
        self, server: Server, rig: Rig, jid: str, api: docker.APIClient, tmp_path: Path
    ) -> None:
        """A neighbour's, of another store. It is neither seen nor touched."""
        request = rig.request(jid, "sleep 600")
        for path in (request["input_dir"], request["output_dir"]):
            (tmp_path / path).mkdir(parents=True)
        made = self.make_as_pman_6(api, Rig(rig.env, tmp_path, rig.image, tmp_path), request)
        try:
            assert server.get(jid).status_code == 404
            assert server.delete(jid).status_code == 404
            assert server.post(request).status_code == 409
            assert self.is_there(api, rig, made)
        finally:
            if rig.env["CONTAINER_ENV"] == "swarm":
                api.remove_service(made)
            else:
                api.remove_container(made, force=True)

    # -------------------------------------------------------------------------------------------------------- faults

    def test_engine_is_down_at_start_and_later(self, rig: Rig, tmp_path: Path, jid: str) -> None:
        with proxied(rig, tmp_path) as (between, proxy):
            proxy.refuse()
            server = between.start()
            for _ in range(2):
                assert server.call("GET", "../../healthz").status_code == 200
                down = server.call("GET", "../../readyz")
                assert (down.status_code, down.json()["message"].count(".sock")) == (503, 1)
                assert server.post(rig.request(jid, COUNTED)).status_code == 503
                assert server.get(jid).status_code == 503
                proxy.accept()
                assert server.call("GET", "../../readyz").status_code == 200
                assert server.post(rig.request(jid, COUNTED)).status_code == 201
                assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
                proxy.refuse()
            proxy.accept()
            assert rig.executions(jid) == 1
            assert server.delete(jid).status_code == 204

    def test_engine_hangs(self, server: Server, rig: Rig, tmp_path: Path, jid: str) -> None:
        with proxied(rig, tmp_path) as (between, proxy):
            hasty = between.start(DOCKER_TIMEOUT_SECONDS="1")
            server.post(rig.request(jid, "true"))
            server.wait_final(jid, rig.job_seconds)
            proxy.hang()
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(hasty.get, [jid] * 8))
            assert {answer.status_code for answer in answers} == {503}
            assert "does not answer" in answers[0].json()["message"]
            proxy.resume()
            wait_for(lambda: hasty.get(jid).json().get("status") == "finishedSuccessfully", 30, "pman to go on")

    @pytest.mark.parametrize("call", ["create", "start"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_cut_connection(self, rig: Rig, tmp_path: Path, jid: str, call: str, when: str) -> None:
        if call == "start" and rig.env["CONTAINER_ENV"] == "swarm":
            return  # a Swarm starts its services itself
        with proxied(rig, tmp_path) as (between, proxy):
            server = between.start()
            arm = proxy.cut_before if when == "before" else proxy.cut_after
            arm(f"/{call}".encode())
            assert server.post(rig.request(jid, COUNTED)).status_code == 201
            assert proxy.cuts == 1
            assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
            assert rig.executions(jid) == 1

    def test_connections_cut_at_random(self, rig: Rig, tmp_path: Path, api: docker.APIClient) -> None:
        jids = [f"cut-{uuid.uuid4().hex[:8]}" for _ in range(self.cut)]
        with proxied(rig, tmp_path) as (between, proxy):
            server = between.start()
            proxy.cut_at_random(CHANCE_OF_CUT, seed=3, inside=True)

            def run(jid: str) -> None:
                request = rig.request(jid, COUNTED)

                def made() -> bool:
                    answer = server.post(request)
                    assert answer.status_code in (201, 503), answer.text
                    return answer.status_code == 201

                wait_for(made, 120, "a POST to get through", every=0.2)

            def end(jid: str) -> None:
                allowed = [204, 503]

                def gone() -> bool:
                    answer = server.delete(jid)
                    assert answer.status_code in allowed, answer.text
                    allowed.append(404)  # where the answer to an earlier DELETE was lost, after all of its attempts
                    return answer.status_code != 503

                wait_for(gone, 120, "a DELETE to get through", every=0.2)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(run, jids))
            wait_for(
                lambda: server.get(jids[0]).status_code in (200, 503) and proxy.cuts > 2, 60, "a few cuts", every=0
            )
            proxy.cut_at_random(0, seed=0)
            for jid in jids:
                assert server.wait_final(jid, 120)["status"] == "finishedSuccessfully"
            assert [rig.executions(jid) for jid in jids] == [1] * len(jids)
            proxy.cut_at_random(CHANCE_OF_CUT, seed=4, inside=True)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(end, jids))
            proxy.cut_at_random(0, seed=0)
            for jid in self.objects(api) & set(jids):  # gone for pman, though each call that removes it was cut
                assert server.get(jid).status_code == 404
                assert server.delete(jid).status_code == 204
            assert not self.objects(api) & set(jids)
            assert [rig.executions(jid) for jid in jids] == [1] * len(jids)


def _hostile(chance: random.Random) -> str:
    odd = "".join(chr(chance.choice((chance.randrange(1, 128), chance.randrange(160, 0x2FFF)))) for _ in range(5))
    return "".join(chance.choice((*HOSTILE, odd)) for _ in range(chance.randrange(1, 4)))
