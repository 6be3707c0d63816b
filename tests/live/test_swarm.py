"""Docker Swarm on a real dockerd."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from tests.fakes.faultproxy import FaultProxy
from tests.live.engine_cases import LABEL, EngineCases, engine_rig, proxied
from tests.rig import COUNTED, OUT, Rig, Server, running, wait_for

pytestmark = pytest.mark.live("swarm")


class TestSwarm(EngineCases):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("swarm", tmp_path_factory.mktemp("swarm"))) as rig:
            yield rig

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def yielding(cls, rig: Rig, server: Server, api: docker.APIClient) -> Iterator[str]:
        """A job that runs into its time limit, and would answer SIGTERM with success.

        Its image has a health check of its own that is never unhealthy, since it has an hour to start.
        """
        name, image = f"yielding-{uuid.uuid4().hex[:8]}", "localhost/pman-test:healthy"
        container = api.create_container(rig.image, ["true"])["Id"]
        check = "HEALTHCHECK --interval=1s --start-period=1h --retries=9 CMD true"
        api.commit(container, *image.split(":"), changes=[check])
        api.remove_container(container)
        script = COUNTED + "trap 'exit 0' TERM; echo before; sleep 600 & wait"
        assert server.post(rig.request(name, script, image=image, time_limit_minutes=1)).status_code == 201
        yield name
        server.delete(name)
        api.remove_image(image, force=True)

    def objects(self, api: docker.APIClient) -> set[str]:
        return {service["Spec"]["Labels"][LABEL] for service in api.services(filters={"label": LABEL})}

    def test_index_of_every_worker(self, server: Server, rig: Rig, jid: str) -> None:
        """The template computes it from the slot, digit by digit: 9, 10 and 20 are where that could go wrong."""
        script = OUT + 'touch "$out/$PMAN_WORKER_INDEX"'
        server.post(rig.request(jid, script, number_of_workers=21, cpu_limit=10, memory_limit=16))
        assert server.wait_final(jid, 120)["status"] == "finishedSuccessfully"
        assert {path.name for path in rig.outgoing(jid).iterdir()} == {str(index) for index in range(21)}

    def test_gets_at_the_same_time(self, server: Server, rig: Rig, jid: str) -> None:
        """They share calls of Swarm. The last job has the jid, and so the name, of one that was deleted."""
        scripts = {"well": "true", "badly": "exit 3", "not": "sleep 600"}
        expected = {"well": "finishedSuccessfully", "badly": "finishedWithError", "not": "started"}
        jobs = {f"{jid}-{how}-{number}": how for how in scripts for number in (1, 10)}
        for name, how in jobs.items():
            assert server.post(rig.request(name, scripts[how], cpu_limit=10, memory_limit=16)).status_code == 201
        for name, how in jobs.items():
            wait_for(lambda: server.get(name).json()["status"] == expected[how], rig.job_seconds, name)  # noqa: B023
        again = f"{jid}-well-1"
        assert server.delete(again).status_code == 204
        assert server.post(rig.request(again, "exit 3", cpu_limit=10, memory_limit=16)).status_code == 201
        jobs[again] = "badly"
        server.wait_final(again, rig.job_seconds)
        with ThreadPoolExecutor(12) as pool:
            for name, answer in pool.map(lambda name: (name, server.get(name)), list(jobs) * 10):
                assert answer.json()["status"] == expected[jobs[name]], name
            codes = pool.map(lambda name: server.get(name).status_code, [f"{jid}-well", again] * 10)
            assert list(codes) == [404, 200] * 10
        assert {server.delete(name).status_code for name in jobs} == {204}

    def test_units_of_the_service(self, server: Server, rig: Rig, jid: str, api: docker.APIClient) -> None:
        server.post(rig.request(jid, "true", cpu_limit=250, memory_limit=48))
        resources = api.inspect_service(jid)["Spec"]["TaskTemplate"]["Resources"]
        expected = {"NanoCPUs": 250_000_000, "MemoryBytes": 48 * 1024 * 1024}
        assert resources["Limits"] == expected
        assert resources["Reservations"] == expected

    def test_ignore_limits(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        server = rig.start(IGNORE_LIMITS="yes")
        server.post(rig.request(jid, "true", cpu_limit=10_000_000))
        assert server.wait_final(jid, rig.job_seconds)["status"] == "finishedSuccessfully"
        assert not any(api.inspect_service(jid)["Spec"]["TaskTemplate"]["Resources"].values())
        server.stop()

    @pytest.mark.parametrize(
        ("wanted", "reason"),
        [({"cpu_limit": 1_000_000}, "insufficient resources"), ({"gpu_limit": 500}, "insufficient resources")],
    )
    def test_impossible_reservation(
        self, server: Server, rig: Rig, jid: str, wanted: dict[str, int], reason: str
    ) -> None:
        server.post(rig.request(jid, "true", **wanted))
        wait_for(lambda: reason in server.get(jid).json()["message"], 30, "a reason")
        assert "No node of the Swarm has as much" in server.wait_state(jid, "notstarted")["message"]
        assert server.delete(jid).status_code == 204

    def test_gpu(self, rig: Rig, jid: str) -> None:
        server = rig.start(GPU_RESOURCE_NAME="NVIDIA-GPU")
        script = "tr '\\0' '\\n' < /proc/1/environ | grep ^DOCKER_RESOURCE_"  # no shell passes such a name on
        server.post(rig.request(jid, script, gpu_limit=1))
        job = server.wait_final(jid, rig.job_seconds)
        assert job["logs"].startswith("DOCKER_RESOURCE_NVIDIA-GPU=GPU-"), job
        server.stop()

    def test_placement_from_the_site(self, rig: Rig, jid: str, tmp_path: Path) -> None:
        (tmp_path / "site.yaml").write_text("swarm_constraints: ['node.labels.pman-nowhere == true']\n")
        server = rig.start(TEMPLATES_DIR=str(tmp_path))
        server.post(rig.request(jid, "true"))
        wait_for(lambda: "scheduling constraints" in server.get(jid).json()["message"], 30, "a reason")
        server.stop()

    def test_labels(self, rig: Rig, jid: str, api: docker.APIClient) -> None:
        server = rig.start(JOB_LABELS="team=x: y,b={{.Node.ID}}")
        server.post(rig.request(jid, "true"))
        labels = api.inspect_service(jid)["Spec"]["Labels"]
        assert (labels["team"], labels["b"], labels[LABEL]) == ("x: y", "{{.Node.ID}}", jid)
        server.stop()

    def test_services_of_others_are_invisible(self, server: Server, rig: Rig, api: docker.APIClient) -> None:
        body = {"ContainerSpec": {"Image": rig.image, "Command": ["sleep", "600"]}}
        service_id = api.create_service(body, name="somebody-elses")["ID"]
        try:
            for jid in ("somebody-elses", service_id, service_id[:8]):
                assert server.get(jid).status_code == 404
                assert server.delete(jid).status_code == 404
            assert server.post(rig.request("somebody-elses", "true")).status_code == 409
            assert api.inspect_service(service_id)["ID"] == service_id
        finally:
            api.remove_service(service_id)

    def test_containers_are_gone_after_delete(self, server: Server, rig: Rig, jid: str, api: docker.APIClient) -> None:
        server.post(rig.request(jid, "trap 'exit 0' TERM; sleep 600 & wait", number_of_workers=2, cpu_limit=10))
        server.wait_state(jid, "started", rig.job_seconds)
        mine = {"label": f"com.docker.swarm.service.name={jid}"}
        assert server.delete(jid).status_code == 204
        assert api.containers(filters=mine) == []
        wait_for(lambda: not api.containers(all=True, filters=mine), 30, "the containers to be removed")

    def test_log_of_another_node(self, rig: Rig, jid: str, tmp_path: Path, api: docker.APIClient) -> None:
        """The way through the task's log, which is the only one to other nodes, also of a job with a time limit.

        The engine says that it is another node than the one that the tasks run on.
        """
        node = api.info()["Swarm"]["NodeID"].encode()
        expected = "=== worker 0 ===\nnear\n=== worker 1 ===\nnear\n"
        with proxied(rig, tmp_path) as (between, proxy):
            proxy.replace(b'"NodeID":"' + node + b'","NodeAddr"', b'"NodeID":"' + node[::-1] + b'","NodeAddr"')
            server = between.start()
            assert proxy.replaced
            for limit in (None, 5):
                server.post(rig.request(jid, "echo near; sleep 600", number_of_workers=2, time_limit_minutes=limit))
                wait_for(lambda: server.get(jid).json().get("logs") == expected, 60, "both logs")
                server.delete(jid)
            server.post(rig.request(jid, "while :; do echo never quiet; sleep 0.1; done", time_limit_minutes=5))
            wait_for(lambda: "quiet" in server.get(jid).json().get("logs", ""), 60, "its log")
            began = time.monotonic()
            assert server.get(jid).status_code == 200
            assert time.monotonic() - began < 10  # of DOCKER_TIMEOUT_SECONDS=20

    def test_tls(self, rig: Rig, jid: str, tmp_path: Path) -> None:
        """Both sides show a certificate of the same authority, or nothing is said."""
        for name in ("right", "wrong"):
            certificates(tmp_path / name)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "right" / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(tmp_path / "right" / "cert.pem", tmp_path / "right" / "key.pem")
        with FaultProxy(rig.env["DOCKER_HOST"], tls=context) as proxy:
            env = {"DOCKER_HOST": proxy.url, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path / "right")}
            server = rig.start(**env)
            assert server.post(rig.request(jid, "echo said; sleep 600", time_limit_minutes=5)).status_code == 201
            wait_for(lambda: server.get(jid).json().get("logs") == "said\n", rig.job_seconds, "the log")
            assert server.delete(jid).status_code == 204
            for name in ("cert.pem", "key.pem"):
                shutil.copy(tmp_path / "wrong" / name, tmp_path / "right" / name)
            stranger = rig.start(**env)
            gullible = rig.start(**env | {"DOCKER_CERT_PATH": str(tmp_path / "wrong")})
            for one in (stranger, gullible):
                assert one.call("GET", "../../readyz").status_code == 503
            for one in (server, stranger, gullible):
                one.stop()
        (tmp_path / "right" / "key.pem").unlink()
        with pytest.raises(AssertionError, match=r"must hold ca.pem, cert.pem and key.pem"):
            rig.start(**env)

    @pytest.mark.slow
    def test_time_limit_of_a_job_that_ends_when_asked(self, rig: Rig, server: Server, yielding: str) -> None:
        """Last, since the job was posted first."""
        job = server.wait_final(yielding, 60 + rig.job_seconds + 60)
        assert (job["status"], job["logs"]) == ("finishedWithError", "before\n")
        assert job["message"] == "The job ran into its time limit of 1 minutes."
        assert rig.executions(yielding) == 1


def certificates(directory: Path) -> None:
    """An authority, and a certificate of its for 127.0.0.1 and for clients, under the names that Docker gives them."""
    directory.mkdir()
    (directory / "extensions").write_text("subjectAltName = IP:127.0.0.1\nextendedKeyUsage = serverAuth, clientAuth\n")
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        f"{new} -x509 -subj /CN=authority -days 2 -keyout ca-key.pem -out ca.pem",
        f"{new} -subj /CN=engine -keyout key.pem -out request.pem",
        "openssl x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile extensions"
        " -out cert.pem",
    ):
        subprocess.run(command.split(), cwd=directory, check=True, capture_output=True)


def test_not_a_manager(tmp_path: Path) -> None:
    """An engine that says so in its /info; pman ends with the sentence that helps."""
    import http.server
    import threading

    class Worker(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = {"ApiVersion": "1.41", "Swarm": {"LocalNodeState": "inactive", "ControlAvailable": False}}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Worker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rig = engine_rig("swarm", tmp_path, host=f"tcp://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(AssertionError, match=r"is no Swarm manager: run `docker swarm init` there"):
            rig.start()
        server.shutdown()
