"""A job on a fake engine, as the tests of this package prepare it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from email.utils import format_datetime
from typing import Any

from pman import backends, settings
from pman.backends import Backend
from pman.job import make_job, validate
from pman.service import metrics
from pman.status import JobStatus
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.fakes.engine import Answer, Call, FakeEngine

IMAGE = "registry.example.org/pl-x:1"
REQUEST: dict[str, Any] = {
    "jid": "chris-jid-1", "args": [], "auid": "x", "number_of_workers": 1, "cpu_limit": 100, "memory_limit": 64,
    "gpu_limit": 0, "image": IMAGE, "entrypoint": ["echo"], "type": "fs",
}  # fmt: skip
TIME = "2026-01-01T00:00:00.123456789Z"
NO_TIME = "0001-01-01T00:00:00Z"
IDENTITY = {"org.chrisproject.pman.name": "chris-jid-1", "org.chrisproject.pman.digest": "the digest"}


def load(name: str, engine: FakeEngine, **env: str) -> tuple[Backend, settings.Settings]:
    config = settings.load(
        {"CONTAINER_ENV": name, "STOREBASE": "/data/store", "DOCKER_HOST": engine.url, "DOCKER_TIMEOUT_SECONDS": "5"}
        | env
    )
    return backends.load(config), config


def posted(backend: Backend, config: settings.Settings, **fields: Any) -> JobStatus:
    job = make_job(validate(REQUEST | fields), config)
    spec = Renderer(config, TARGETS).render(job, "swarm" if config.container_env == "swarm" else "docker")
    return metrics.ask("submit", lambda: backend.submit(job, spec))


def service(engine: FakeEngine, *tasks: dict[str, Any], **labels: str) -> None:
    """The job of REQUEST as a service with these tasks."""
    spec = {
        "Name": "chris-jid-1",
        "Labels": {"org.chrisproject.pman.time-limit-minutes": "5"} | IDENTITY | labels,
        "Mode": {"Replicated": {"Replicas": max(1, len(tasks))}},
        "TaskTemplate": {"ContainerSpec": {"Image": IMAGE, "Command": ["echo"]}},
    }
    found = {"ID": "s1", "Version": {"Index": 7}, "Spec": spec, "CreatedAt": TIME}
    engine.routes["GET /services/chris-jid-1"] = engine.routes["GET /services/s1"] = found
    engine.routes |= {"GET /tasks": list(tasks), "POST /services/s1/update": {"Warnings": None}}


def task(state: str, slot: int = 1, created: str = TIME, error: str = "", code: int = 0) -> dict[str, Any]:
    container = {"ContainerID": f"c{slot}", "ExitCode": code}
    status = {"State": state, "Err": error, "Timestamp": created, "Message": "words", "ContainerStatus": container}
    return {
        "ID": f"t{slot}", "ServiceID": "s1", "NodeID": "node-1", "Slot": slot, "CreatedAt": created, "Status": status,
    }  # fmt: skip


def container(engine: FakeEngine, **state: Any) -> None:
    """The job of REQUEST as a container."""
    labels = {"org.chrisproject.pman.time-limit-minutes": "5"} | IDENTITY
    engine.routes["GET /containers/chris-jid-1/json"] = {
        "Id": "c1", "Name": "/chris-jid-1", "Created": TIME, "Config": {"Image": IMAGE, "Labels": labels},
        "HostConfig": {"Memory": 64 << 20},
        "State": {"StartedAt": NO_TIME, "FinishedAt": NO_TIME, "ExitCode": 0} | state,
    }  # fmt: skip


def once(cut: Callable[[Call], Answer], then: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
    """`cut` answers the first call, `then` all others."""
    left = [cut]

    def answer(call: Call) -> Answer:
        return left.pop()(call) if left else then(call)

    return answer


def at(now: datetime) -> Callable[[Call, bytes], bytes]:
    """What an engine of that clock sends; the fake closes the connection behind what a test has changed."""
    date = re.compile(rb"\r\nDate: [^\r]*")
    return lambda _, sent: date.sub(
        f"\r\nConnection: close\r\nDate: {format_datetime(now, usegmt=True)}".encode(), sent
    )


def workers(engine: FakeEngine, count: int, *states: dict[str, Any] | None) -> None:
    """The job of REQUEST as several containers, None for one that is not there."""
    for number, state in reversed(list(enumerate(states))):
        container(engine, **(state or {}))
        found = engine.routes.pop("GET /containers/chris-jid-1/json")
        found["Config"]["Labels"]["org.chrisproject.pman.workers"] = str(count)
        name = f"chris-jid-1.{number}" if number else "chris-jid-1"
        if state is not None:
            engine.routes[f"GET /containers/{name}/json"] = found | {"Id": f"c{number}", "Name": f"/{name}"}
        engine.routes[f"GET /containers/c{number}/logs"] = "x"


PODMAN = {"ApiVersion": "1.41", "Components": [{"Name": "Podman Engine", "Version": "4.3.1"}]}
