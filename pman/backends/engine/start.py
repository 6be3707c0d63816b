"""How a container of one Docker or Podman engine is made, started once, and removed.

The API starts an exited container again, and a request may arrive long after its client gave it up. So a container is
started by the id that its creation returned, by nobody but its maker, and once. Where the start does not come (pman
was killed, the answer was lost), a repeated POST takes the job over: after a while it removes the container, by id and
without force, and makes a new one. An engine refuses to remove what runs, and to start what is removed; so whichever
of the two comes first wins, and the other one fails however late it comes. Only a job that begins and ends between the
last look at it and its removal, which are milliseconds apart, would run again: engines remove what has ended.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from pman.backends import retry
from pman.backends.engine import api as engine
from pman.backends.engine.api import Engine, Json
from pman.backends.engine.images import Images
from pman.errors import BackendError, BadRequest, Conflict, NotFound, PmanError, Unreachable, jid_taken
from pman.job import Job, backend_name

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 4.0  # a container that is unstarted so long after it was made, by the engine's clock, is taken over
LOOKS = 3  # and after so many looks at it: an engine may take longer to make a container of a large image
TAKE_OVERS = 3  # within one POST
NAMED_SECONDS = 10.0  # an engine reserves the name of a container that it is still making
STARTS_AT_ONCE = 8
POLL_SECONDS = 0.2
DELETE_SECONDS = 20.0
OVER = frozenset({"running", "exited", "stopped", "dead"})  # states after which, once killed, nothing of it runs
UNLISTED = frozenset({"Mounts", "NetworkSettings", "HostConfig", "Ports"})
DELETED = "pman.deleted"  # how the name of a container begins whose job is deleted; no job has a dot in its name
SEEN = "pman.seen"  # key of an inspect document: when the engine gave it, by its own clock


class Foreign(Conflict):
    """A container that is not this pman's has the name of the job's first."""


class _CannotStart(BadRequest):
    """Nothing may be left of the job, since nothing there says why."""


class Starter:
    """Makes containers and starts them. `startable` says of an inspect document whether it was never started."""

    def __init__(self, api: Engine, images: Images, startable: Callable[[Json], bool]) -> None:
        self._engine = api
        self._images = images
        self._startable = startable

    def run(self, job: Job, containers: Sequence[tuple[str, Json]]) -> bool:
        """Make sure that each (name, body) exists and has been started, once; the first is the job's lock.

        True where each was made and started by this call. The policy about pulls counts for the first container; the
        others find its image.
        """
        first, *others = containers
        try:
            started = [self._run(job, *first, first=True)]
            with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
                return all(started + list(pool.map(lambda other: self._run(job, *other), others)))
        except _CannotStart:
            remove_all(self._engine, job.jid)
            raise

    def _run(self, job: Job, name: str, body: Json, first: bool = False) -> bool:
        for _ in range(TAKE_OVERS):
            if made := self._create(job, name, body, first):
                return self._start(made)
            if self._is_started(name):
                return False
        raise Unreachable(f"The job {job.jid} is just being started.")

    def _create(self, job: Job, name: str, body: Json, first: bool) -> str:
        """The id of the new container; "" when the job's exists. Raises Conflict when another job's does."""

        def exists() -> bool:
            return self._exists(job, name)

        def create() -> str:
            answer = self._engine.call("POST", "/containers/create", body=body, name=name)
            return str(engine.decoded(answer)["Id"])

        try:
            return self._images.with_image(str(body.get("Image")), create, exists, first)
        except Foreign:
            raise
        except Conflict:
            if not retry.wait_until(exists, NAMED_SECONDS):
                if self._engine.is_podman():
                    self._remove_unfinished(name)
                raise Unreachable(f"The job {job.jid} is just being made or deleted.") from None
            return ""

    def _remove_unfinished(self, name: str) -> None:
        """Remove what a Podman that was killed while it made a container has left in its storage.

        It keeps the name for ever, and is no container for the API's other calls. Podman 4.3 and 5.4 list it with the
        state and the command `storage`; containers of other programs, such as Buildah, have another command. What is
        younger than NAMED_SECONDS is left alone, because somebody may still be making it.
        """
        try:
            listed, now = self._engine.get_dated("/libpod/containers/json", external="true", filters={"name": [name]})
        except (NotFound, BackendError) as error:  # such as a proxy that lets only Docker's calls through
            log.warning("what Podman has left of the name %s cannot be seen: %s", name, error)
            return
        for found in listed:
            age = now - (engine.time_of(found["Created"]) or now)
            if found["State"] != "storage" or name not in found["Names"] or age.total_seconds() < NAMED_SECONDS:
                continue
            if found["Command"] != ["storage"]:
                raise Foreign(f"Podman's storage has a container {name} that is not Podman's.")
            log.warning("removing %s from Podman's storage: a container that was never made", found["Id"])
            with contextlib.suppress(NotFound, Conflict, BackendError):
                self._engine.call("DELETE", f"/containers/{found['Id']}", v=1)

    def _exists(self, job: Job, name: str) -> bool:
        try:
            labels = inspect(self._engine, name)["Config"].get("Labels") or {}
        except NotFound:
            return False
        if labels.get(engine.JID) != job.jid:
            raise Foreign(f"The engine has a container {name} without pman's labels.")
        if labels.get(engine.DIGEST) != job.digest:
            raise jid_taken(job.jid)
        return True

    def _start(self, container_id: str) -> bool:
        """False where the start fails for good: Docker keeps the reason, and the job has failed. Podman does not."""
        try:
            self._engine.call("POST", f"/containers/{container_id}/start")
        except PmanError as error:
            if error.transient:
                raise
            if self._startable(self._engine.get(f"/containers/{container_id}/json")):
                raise _CannotStart(f"The engine cannot start the job: {error}", detail=error.detail) from error
            return False
        return True

    def _is_started(self, name: str) -> bool:
        """True as soon as it is; False when it had to be removed, or was, because nobody started it."""
        looks, container_id = 0, ""
        while True:
            container, now = inspect_dated(self._engine, name)
            if not self._startable(container):
                return True
            if looks and container["Id"] != container_id:
                return False
            container_id, looks = container["Id"], looks + 1
            made_at = engine.time_of(container["Created"]) or now
            if looks >= LOOKS and (now - made_at).total_seconds() >= ABANDONED_SECONDS:
                log.warning("removing the container %s, which whoever made it has not started", name)
                with contextlib.suppress(NotFound, Conflict, BackendError):  # gone, or just started
                    self._engine.call("DELETE", f"/containers/{container_id}", v=1)
                return False
            time.sleep(POLL_SECONDS)


def inspect(api: Engine, name: str) -> Json:
    """The container of exactly this name; the engine would also take an id, or the beginning of one."""
    return inspect_dated(api, name)[0]


def inspect_dated(api: Engine, name: str) -> tuple[Json, datetime]:
    """As `inspect`, with the time of the engine's clock."""
    container, now = api.get_dated(f"/containers/{name}/json")
    container[SEEN] = now
    if container["Name"].lstrip("/") != name:
        raise NotFound(f"There is no container {name}.")
    if api.is_podman() and not container["State"].get("OOMKilled"):
        container["State"].pop("OOMKilled", None)  # it says false where it does not know, too
    return container, now


def remove_all(api: Engine, jid: str, find: Callable[[], list[Json]] | None = None) -> bool:
    """Remove what is there of the job, and wait until it is gone; False when nothing was.

    find: the job's containers, the one last that makes it a job. When all have ended, that one loses its name, by which
    alone a job is known. From then on no error counts, for a DELETE that is repeated may find nothing.
    """
    find, nameless = find or (lambda: _containers(api, jid)), list[str]()
    if not (found := find()):
        return False
    first_id = found[-1]["Id"]
    try:
        # not begun anew, since another look might no longer find the job
        retry.call_last(_remove_all, api, jid, lambda: _older(find(), jid, first_id), nameless)
    except (Unreachable, BackendError) as error:
        if not nameless:
            raise
        log.warning("a container of the deleted job %s is left until the next GET of /readyz: %s", jid, error)
    return True


def _older(found: list[Json], jid: str, first_id: str) -> list[Json]:
    """The containers; [] where they are of a job that was posted after another DELETE of the jid was done."""
    is_new = found and found[-1]["Id"] != first_id and f"/{backend_name(jid)}" in found[-1].get("Names", ())
    return [] if is_new else found


def _remove_all(api: Engine, jid: str, find: Callable[[], list[Json]], nameless: list[str]) -> None:
    deadline = time.monotonic() + DELETE_SECONDS
    while found := find():
        if time.monotonic() > deadline:
            raise Unreachable(f"The engine does not remove the containers of {jid}.")
        for container in found[:-1]:
            _kill(api, container)
            _remove(api, container)
        if _take_name(api, found[-1]):
            nameless.append(found[-1]["Id"])
        _remove(api, found[-1])


def remove_nameless(api: Engine) -> str:
    """Remove what a DELETE has left. Returns what to say of those that the engine cannot remove, or ""."""
    said = ""
    for container in api.get("/containers/json", all=1, filters={"name": [DELETED]}):
        if _is_nameless(container):
            try:
                _remove(api, container)
            except (Unreachable, BackendError) as error:  # jobs run all the same
                said = f"Remove the container {_nameless(container)} of a deleted job; pman cannot: {error}"
    return said


def _take_name(api: Engine, container: Json) -> bool:
    """Whether the container has ended and has another name. Where it cannot have that, it can still be removed."""
    path = f"/containers/{container['Id']}"
    _kill(api, container)
    try:
        if container["State"] == "running":
            api.call("POST", f"{path}/wait", timeout_seconds=DELETE_SECONDS)
        if not _is_nameless(container):
            api.call("POST", f"{path}/rename", name=_nameless(container))
    except (NotFound, Conflict, BadRequest, BackendError):  # 400 of Docker: another DELETE has just named it so
        return False
    return container["State"] in OVER


def _nameless(container: Json) -> str:
    return f"{DELETED}.{container['Id'][:32]}"


def _is_nameless(container: Json) -> bool:
    return f"/{_nameless(container)}" in container.get("Names", ())


def _kill(api: Engine, container: Json) -> None:
    if container["State"] == "running":  # Podman, forced to remove it, would first wait for its grace period
        with contextlib.suppress(NotFound, Conflict, BackendError):
            api.call("POST", f"/containers/{container['Id']}/kill", signal="KILL")


def _remove(api: Engine, container: Json) -> None:
    """Remove a container by force, unless it is gone."""
    try:
        api.call("DELETE", f"/containers/{container['Id']}", force=1, v=1)
    except NotFound:
        pass
    except Conflict:  # another DELETE is at it
        time.sleep(0.05)


def _containers(api: Engine, jid: str) -> list[Json]:
    """What the engine lists of this job, the first worker last: as long as any is left, the job can be found.

    What has lost its name counts only where nothing else is left. The engine may be unable to remove it.
    """
    found = listed(api, jid)
    named = [container for container in found if not _is_nameless(container)]
    return sorted(named or found, key=lambda container: f"/{backend_name(jid)}" in container["Names"])


def listed(api: Engine, jid: str = "") -> list[Json]:
    """What the engine lists of pman's jobs, or of one: what has both of its labels, and the name that they go with.

    Of one, also what has lost its name.
    """
    labels = [f"{engine.JID}={jid}" if jid else engine.JID, engine.DIGEST]

    def named(found: Iterable[Json]) -> list[Json]:
        return [c for c in found if _is_named(c, backend_name(c["Labels"][engine.JID])) or (jid and _is_nameless(c))]

    return api.each("/containers/json", named, UNLISTED, all=1, filters={"label": labels})


def _is_named(container: Json, name: str) -> bool:
    return any(re.fullmatch(rf"/{re.escape(name)}(\.[0-9]+)?", one) for one in container["Names"])
