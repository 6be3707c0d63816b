"""How a container of one Docker or Podman engine is made, started once, and removed.

The API starts an exited container again, so two that start it one after the other would run a job twice. Who made a
container starts it at once. Where that did not happen (pman was killed, the answer was lost), a repeated POST takes
the start over: after a while, and under a guard, a container that is never started and whose name is the lock.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pman.backends import engine
from pman.backends.docker_images import Images
from pman.backends.engine import Engine
from pman.errors import BackendError, BadRequest, Conflict, NotFound, PmanError, Unreachable, jid_taken
from pman.job import Job, backend_name

log = logging.getLogger(__name__)

GUARD = "org.chrisproject.pman.guard"
START_SECONDS = 2.0  # who made a container may start it for so long
ABANDONED_SECONDS = 4.0  # a container that others leave unstarted for so long is taken over
GUARD_SECONDS = 15.0  # a guard of this age is one of a pman that was killed or cut off
POLL_SECONDS = 0.2
DELETE_SECONDS = 20.0
Json = dict[str, Any]


class Starter:
    """Makes containers and starts them. `startable` says of an inspect document whether it was never started."""

    def __init__(self, api: Engine, images: Images, startable: Callable[[Json], bool]) -> None:
        self._engine = api
        self._images = images
        self._startable = startable

    def run(self, job: Job, name: str, body: Json) -> None:
        """Make sure that the container exists and has been started, once."""
        began = time.monotonic()
        if self._create(job, name, body) and time.monotonic() - began < START_SECONDS:
            self._start(job.jid, name)
        else:
            self._await_start(job, name)

    def _create(self, job: Job, name: str, body: Json) -> bool:
        """False when the job's container exists already. Raises Conflict when another job's does."""
        try:
            return self._images.with_image(job.image, lambda: self._post(name, body), lambda: self._exists(job, name))
        except Conflict:
            if not self._exists(job, name):
                raise Unreachable(f"The job {job.jid} is just being made or deleted.") from None
            return False

    def _post(self, name: str, body: Json) -> bool:
        self._engine.call("POST", "/containers/create", body=body, name=name)
        return True

    def _exists(self, job: Job, name: str) -> bool:
        try:
            labels = inspect(self._engine, name)["Config"].get("Labels") or {}
        except NotFound:
            return False
        if labels.get(engine.JID) != job.jid:
            raise BadRequest(f"The engine has a container {name} that is not pman's; remove it, or use another jid.")
        if labels.get(engine.DIGEST) != job.digest:
            raise jid_taken(job.jid)
        return True

    def _start(self, jid: str, name: str) -> None:
        """Where the start fails for good: Docker keeps the reason, and the job has failed; Podman does not."""
        try:
            self._engine.call("POST", f"/containers/{name}/start")
        except PmanError as error:
            if error.transient:
                raise
            if self._startable(inspect(self._engine, name)):
                remove_all(self._engine, jid)
                raise BadRequest(f"The engine cannot start the job: {error}", detail=error.detail) from error

    def _await_start(self, job: Job, name: str) -> None:
        while self._startable(container := inspect(self._engine, name)):
            if self._age(container) > ABANDONED_SECONDS:
                self._take_over(job, name)
                return
            time.sleep(POLL_SECONDS)

    def _age(self, container: Json) -> float:
        """Seconds since a container was made, by the engine's own clock."""
        answer = self._engine.call("GET", "/_ping")
        said = answer.headers.get("Date")
        now = email.utils.parsedate_to_datetime(said) if said else datetime.now(UTC)
        made_at = engine.time_of(container["Created"]) or now
        return (now - made_at).total_seconds()

    def _take_over(self, job: Job, name: str) -> None:
        """A guard stays where the start was cut off: it may still be under way in the engine."""
        guard = f"{name}.start"
        body = {"Image": job.image, "Entrypoint": ["true"], "Labels": {engine.JID: job.jid, GUARD: name}}
        try:
            made = self._engine.call("POST", "/containers/create", body=body, name=guard).json()
        except Conflict:
            self._remove_if_stale(guard)
            raise Unreachable(f"The job {job.jid} is just being started.") from None
        if self._startable(inspect(self._engine, name)):
            log.warning("starting the container %s, which whoever made it has left", name)
            self._start(job.jid, name)
        remove(self._engine, made["Id"])

    def _remove_if_stale(self, guard: str) -> None:
        try:
            found = inspect(self._engine, guard)
        except NotFound:
            return
        if self._age(found) > GUARD_SECONDS:
            remove(self._engine, found["Id"])  # by id: a new guard of the same name stays


def inspect(api: Engine, name: str) -> Json:
    """The container of exactly this name; the engine would also take an id, or the beginning of one."""
    container: Json = api.get(f"/containers/{name}/json")
    if container["Name"].lstrip("/") != name:
        raise NotFound(f"There is no container {name}.")
    return container


def remove(api: Engine, container_id: str) -> None:
    """Remove a container by force, unless it is gone."""
    try:
        api.call("DELETE", f"/containers/{container_id}", force=1, v=1)
    except NotFound:
        pass
    except Conflict:  # another DELETE is at it
        time.sleep(0.05)


def _kill(api: Engine, container_id: str) -> None:
    """Podman, forced to remove a running container, would first wait for its grace period."""
    with contextlib.suppress(NotFound, Conflict, BackendError):
        api.call("POST", f"/containers/{container_id}/kill", signal="KILL")


def remove_all(api: Engine, jid: str) -> bool:
    """Remove what is there of the job, and wait until it is gone; False when nothing was."""
    deadline = time.monotonic() + DELETE_SECONDS
    found = _containers(api, jid)
    any_there = bool(found)
    while found:
        for container in found:
            if container["State"] == "running":
                _kill(api, container["Id"])
            remove(api, container["Id"])
        found = _containers(api, jid)
        if found and time.monotonic() > deadline:
            raise Unreachable(f"The engine does not remove the containers of {jid}.")
    return any_there


def _containers(api: Engine, jid: str) -> list[Json]:
    """What the engine lists of this job, the first worker last: as long as any is left, the job can be found."""
    found: list[Json] = api.get("/containers/json", all=1, filters={"label": [f"{engine.JID}={jid}"]})
    return sorted(found, key=lambda container: f"/{backend_name(jid)}" in container["Names"])
