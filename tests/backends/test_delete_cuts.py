"""DELETE whose calls to the scheduler are cut: it ends in 204, or in a 503 after which the same DELETE is 204.

pfcon takes a 404 for a deletion that failed, and tells its user so. The table is the same for every backend: each call
of a DELETE in turn is cut before it arrives, within its answer or before it, once or until pman gives up. Another
replica, which knows nothing of the first one, repeats it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tenacity
import urllib3
from flask.testing import FlaskClient
from pydantic import SecretStr

from pman import backends, settings
from pman.backends import Backend, kubernetes, retry, shared
from pman.backends.directories import Record
from pman.backends.kubernetes.api import Api, Endpoint
from pman.service.app import create_app
from tests.backends.engine.jobs import IDENTITY, REQUEST, TIME, load, task
from tests.backends.engine.jobs import service as swarm_service
from tests.backends.kubernetes.script import CONFIG, await_removals, created, finished, job_and_spec
from tests.backends.slurm.fake import Fake as Slurm
from tests.backends.slurm.fake import fake
from tests.fakes.cromwell import config as cromwell_config
from tests.fakes.cromwell.server import Cromwell
from tests.fakes.engine import Answer, Call, FakeEngine
from tests.fakes.faultproxy import FaultProxy

pytestmark = pytest.mark.slow
WHEN = ("before", "within", "after")
TIMES = {"once": 1, "until pman gives up": 1000}
STATES = ("running", "ended")


@dataclass
class Place:
    """A backend, another replica of it, and what both speak to.

    begin: makes a new job there and says its jid. arm: cuts the Nth call from now on, and so many from then on; when.
    disarm: no more of it; True where nothing was cut.
    """

    client: FlaskClient
    other: FlaskClient
    begin: Callable[[], str]
    arm: Callable[[int, str, int], object]
    disarm: Callable[[], bool]


def over(proxy: FaultProxy, load: Callable[[], tuple[Backend, settings.Settings]], begin: Callable[[], str]) -> Place:
    def arm(number: int, when: str, times: int) -> None:
        cuts[:] = [proxy.cuts]
        getattr(proxy, f"cut_{when}")(b" HTTP/1.1", skip=number, times=times)

    def disarm() -> bool:
        proxy.disarm()
        return cuts == [proxy.cuts]

    cuts: list[int] = []
    return Place(client(*load()), client(*load()), begin, arm, disarm)


def client(backend: Backend, config: settings.Settings) -> FlaskClient:
    return create_app(config.model_copy(update={"secret_key": SecretStr("for tests")}), backend).test_client()


@contextmanager
def docker(directory: Path, state: str) -> Iterator[Place]:
    containers: list[dict[str, Any]] = []

    def kill(_: object) -> Answer:
        containers[0]["State"] = "exited"
        return 204, None

    def rename(call: Call) -> Answer:
        containers[0]["Names"] = [f"/{call.query['name']}"]
        return 204, None

    def inspect(_: object) -> Answer:
        if not containers or containers[0]["Names"] != ["/chris-jid-1"]:
            return 404, {"message": "No such container: chris-jid-1"}
        state = {"Status": containers[0]["State"], "ExitCode": 0, "StartedAt": TIME, "FinishedAt": TIME}
        config = {"Image": "x", "Cmd": [], "Labels": IDENTITY}
        return 200, {"Id": "c1", "Name": "/chris-jid-1", "Created": TIME, "State": state, "Config": config}

    def remove(_: object) -> Answer:
        if not containers:
            return 404, {"message": "No such container: c1"}
        containers.clear()
        return 204, None

    def begin() -> str:
        word = "running" if state == "running" else "exited"
        containers[:] = [{"Id": "c1", "Names": ["/chris-jid-1"], "Labels": IDENTITY, "State": word}]
        return "chris-jid-1"

    with FakeEngine(directory / "engine") as engine, FaultProxy(engine.url, f"unix://{directory}/proxy") as proxy:
        engine.routes |= {
            "GET /containers/json": lambda _: (200, containers),
            "GET /containers/chris-jid-1/json": inspect,
            "POST /containers/c1/kill": kill,
            "POST /containers/c1/wait": {"StatusCode": 137},
            "POST /containers/c1/rename": rename,
            "DELETE /containers/c1": remove,
        }
        yield over(proxy, lambda: load("docker", engine, DOCKER_HOST=proxy.url), begin)


@contextmanager
def swarm(directory: Path, state: str) -> Iterator[Place]:
    with FakeEngine(directory / "engine") as engine, FaultProxy(engine.url, f"unix://{directory}/proxy") as proxy:
        asked_for_tasks: list[int] = []

        def tasks(_: object) -> Answer:
            """The last one ends a while after its service has been scaled down."""
            service = engine.routes.get("GET /services/chris-jid-1")
            scaled = not service or not service["Spec"]["Mode"]["Replicated"]["Replicas"]
            if scaled:
                asked_for_tasks.append(1)
            there = not scaled or len(asked_for_tasks) < 3
            return 200, [task("running" if state == "running" else "complete")] if there else []

        def update(call: Call) -> Answer:
            service = engine.routes.get("GET /services/chris-jid-1")
            if not service:
                return 404, {"message": "service s1 not found"}
            if int(call.query["version"]) != service["Version"]["Index"]:
                return 500, {"message": "rpc error: code = Unknown desc = update out of sequence"}
            service |= {"Spec": call.body, "Version": {"Index": service["Version"]["Index"] + 1}}
            return 200, {"Warnings": None}

        def remove(_: object) -> Answer:
            for name in ("chris-jid-1", "s1"):
                found = engine.routes.pop(f"GET /services/{name}", None)
            return (200, {}) if found else (404, {"message": "service s1 not found"})

        def begin() -> str:
            swarm_service(engine)
            asked_for_tasks.clear()
            engine.routes["GET /services/chris-jid-1"]["Version"] = {"Index": 7}
            engine.routes |= {"GET /tasks": tasks, "POST /services/s1/update": update, "DELETE /services/s1": remove}
            return "chris-jid-1"

        yield over(proxy, lambda: load("swarm", engine, DOCKER_HOST=proxy.url), begin)


@contextmanager
def on_kubernetes(directory: Path, state: str) -> Iterator[Place]:
    job, spec = job_and_spec()
    place = "/apis/batch/v1/namespaces/rec/jobs/ok2"
    gone: tuple[int, Any] = (404, {"kind": "Status", "code": 404, "message": 'jobs.batch "ok2" not found'})
    found: list[tuple[int, Any]] = []

    def patch(call: Call) -> Answer:
        if found == [gone]:
            return gone
        code, there = found[0]
        metadata = call.body["metadata"]
        assert metadata.pop("uid") == there["metadata"]["uid"]
        annotations = there["metadata"]["annotations"] | metadata["annotations"]
        found[:] = [(code, there | {"metadata": there["metadata"] | {"annotations": annotations}})]
        return found[0]

    def remove(_: object) -> Answer:
        if found == [gone]:
            return gone
        # a Job whose pods are there stays until they have ended
        found[:] = (
            [(200, created(job, spec, deletionTimestamp="2026-11-24T00:00:00Z"))] if state == "running" else [gone]
        )
        return 200, created(job, spec)

    def begin() -> str:
        await_removals()  # of the job before, whose name and UID are the same
        found[:] = [(200, created(job, spec) if state == "running" else finished(job, spec))]
        return "ok2"

    with FakeEngine(directory / "engine") as engine, FaultProxy(engine.url) as proxy:
        engine.routes[f"PATCH {place}"] = patch
        engine.routes |= {f"GET {place}": lambda _: found[0], f"DELETE {place}": remove}
        engine.routes[f"GET {place}x"] = lambda _: gone  # another jid
        with urllib3.PoolManager() as pool:
            url = proxy.url.replace("tcp:", "http:")
            api = Api(lambda: Endpoint(url, pool, dict))
            made = over(proxy, lambda: (kubernetes.KubernetesBackend(api, CONFIG), CONFIG), begin)

            def disarm() -> bool:
                await_removals()
                return made.disarm()

            yield replace(made, disarm=disarm)
            await_removals()


# Cromwell with the simplest of configurations: jobs are processes of this machine.
CONF = r"""backend { default = here, providers { here { config {
  root = "executions"
  job-id-regex = "(\\d+)"
  submit = "setsid /bin/sh ${script} > ${out} 2> ${err} < /dev/null & echo $!"
  kill = "kill -KILL -- -${job_id}"
  check-alive = "kill -0 ${job_id}"
} } } }
"""


PACE = replace(
    cromwell_config.TEST_PACE, pickup_period=0.02, metadata_flush=0.02, summary_period=0.02, abort_scan=0.02,
    token_period=0.01, launch=0.01, finish=0.01, close=0.01, removal=0.01, poll_first=0.02, poll_max=0.1,
)  # fmt: skip


@contextmanager
def on_cromwell(directory: Path, state: str) -> Iterator[Place]:
    (directory / "conf").write_text(CONF)
    loaded = cromwell_config.load(directory / "conf").at(directory / "executions")
    with (
        Cromwell(loaded, directory / "cromwell", pace=PACE) as server,
        FaultProxy(server.url.replace("http:", "tcp:")) as proxy,
    ):
        config = settings.load(
            {
                "CONTAINER_ENV": "cromwell", "CROMWELL_URL": proxy.url.replace("tcp:", "http:"),
                "TIMELIMIT_MINUTES": "10", "STOREBASE": "/srv/store",
            }
        )  # fmt: skip

        def begin() -> str:
            name = f"cut-{uuid.uuid4().hex[:8]}"
            words = ["sh", "-c", "sleep 300"] if state == "running" else ["true"]
            assert made.client.post("/api/v1/", json=REQUEST | {"jid": name, "entrypoint": words}).status_code == 201
            wanted = ("started",) if state == "running" else ("finishedSuccessfully", "finishedWithError")
            assert retry.wait_until(lambda: made.client.get(f"/api/v1/{name}/").json["status"] in wanted, 30)  # type: ignore[index]
            return name

        made = over(proxy, lambda: (backends.load(config), config), begin)
        yield made


# The Nth command of SLURM's is cut off: it was not run, it was cut off in its answer, or it was run and says nothing.
CUT_OFF = """
here={here}; cd "$here"; shift 2
n=$(($(cat calls) + 1)); echo $n > calls
read -r first when times < cut
if [ $n -ge $first ] && [ $n -lt $((first + times)) ]; then
  touch was-cut
  [ $when != within ] || "$here/$@" 2>/dev/null | head -c 5
  [ $when != after ] || "$here/$@" > /dev/null 2>&1
  echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2
  exit 1
fi
exec "$here/$@"
"""


@contextmanager
def on_slurm(directory: Path, state: str) -> Iterator[Place]:
    engine = Slurm(directory)
    (directory / "calls").write_text("0")
    (directory / "cut").write_text("1 before 0")
    fake(directory, "prefix", CUT_OFF.replace("{here}", str(directory)))
    config = settings.load({"CONTAINER_ENV": "slurm", "SLURM_STATE_DIR": str(engine.root), "STOREBASE": "/srv/store"})

    def begin() -> str:
        (directory / "cancelled").unlink(missing_ok=True)
        record: Record = engine.submit()
        running, cancelled = engine.row(10, "RUNNING", record), engine.row(10, "CANCELLED", record)
        engine.say("squeue", f"if [ -e cancelled ]; then {cancelled}; else {running}; fi")
        if state == "ended":
            engine.say("squeue", engine.row(10, "COMPLETED", record))
            (record.directory / "rc").write_text("0 \n")
        return record.jid

    def arm(number: int, when: str, times: int) -> None:
        (directory / "was-cut").unlink(missing_ok=True)
        called = int((directory / "calls").read_text())
        (directory / "cut").write_text(f"{called + number + 1} {when} {times}")

    def disarm() -> bool:
        (directory / "cut").write_text("1 before 0")
        return not (directory / "was-cut").exists()

    yield Place(client(engine.backend, config), client(engine.make(), config), begin, arm, disarm)


PLACES = {"docker": docker, "swarm": swarm, "kubernetes": on_kubernetes, "cromwell": on_cromwell, "slurm": on_slurm}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", PLACES)
def test_every_call_of_a_delete_is_cut(
    name: str, state: str, when: str, times: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", tenacity.wait_none())
    monkeypatch.setattr(shared, "AGE_SECONDS", 0.01)
    with PLACES[name](tmp_path, state) as place:
        for number in range(20):
            jid = place.begin()
            path = f"/api/v1/{jid}/"
            place.arm(number, when, TIMES[times])
            codes = [place.client.delete(path).status_code]
            done = place.disarm()
            if codes[-1] == 503:
                codes.append(place.other.delete(path).status_code)
            assert codes in ([204], [503, 204]), f"call {number} of a DELETE: {codes}"
            assert times != "once" or codes == [204], f"call {number} of a DELETE: {codes}"
            assert place.client.get(path).status_code == place.other.get(path).status_code == 404
            # this one comes too late; 204 where the backend shows that there was a job
            assert place.client.delete(path).status_code in (204, 404)
            assert place.client.delete(f"{path[:-1]}x/").status_code == 404
            if done:
                break
        assert 1 <= number < 19
