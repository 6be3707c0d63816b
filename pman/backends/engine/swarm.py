"""Docker Swarm: a job is a service whose restart condition is `none`; its name is the lock that makes it exist once.

A *replicated* service, not a replicated job: swarmkit's job orchestrator counts completions only, so it starts failed
tasks of a job again whatever the restart condition says, at the next event of the service and at every start of a
manager (seen on 20.10). A replicated service with condition `none` runs each task once, also through restarts.

A time limit is the task's health check (templates/swarm): its only probe comes when the time is up, and fails, because
there is no such program; Swarm then ends the task as unhealthy. So the node itself keeps the limit, whether or not
pman runs, with the precision of the engine and without a thread anywhere. A task with a health check stays in state
`starting` while its container runs.
"""

import contextlib
import heapq
import itertools
import logging
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pman import status as outcome
from pman.backends import documents, retry
from pman.backends.discovery import Overview
from pman.backends.engine import api as engine
from pman.backends.engine import former
from pman.backends.engine import overview as engine_overview
from pman.backends.engine.api import Engine, Json
from pman.backends.engine.store import Store
from pman.backends.former import may_name
from pman.backends.logs import Wanted
from pman.backends.shared import Shared, Together
from pman.errors import BackendError, Conflict, NotFound, PmanError, Unreachable, jid_taken, no_such_job
from pman.job import Job, backend_name
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, Reason, Why, Worker
from pman.targets.swarm import IDENTITY, escaped
from pman.templating.render import Spec

log = logging.getLogger(__name__)

# Every state of https://docs.docker.com/engine/swarm/how-swarm-mode-works/swarm-task-states/, and `allocated`,
# which only https://pkg.go.dev/github.com/moby/moby/api/types/swarm#TaskState lists.
STATES: dict[str, JobState] = {
    "new": JobState.NOT_STARTED,
    "allocated": JobState.NOT_STARTED,
    "pending": JobState.NOT_STARTED,  # also for ever, when no node suits; the message says why
    "assigned": JobState.NOT_STARTED,
    "accepted": JobState.NOT_STARTED,
    "preparing": JobState.NOT_STARTED,  # the node pulls the image
    "ready": JobState.NOT_STARTED,
    "starting": JobState.STARTED,  # all through the run of a job with a time limit
    "running": JobState.STARTED,
    "complete": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "shutdown": JobState.FAILED,  # Swarm ended it
    "rejected": JobState.FAILED,  # the node could not run it: no image, no directory, limits above the node's
    "orphaned": JobState.FAILED,  # its node was away for a day, and Swarm gave it up
    "remove": JobState.STARTED,  # being removed: its container may still write
}
# What an end means that is none of the program's own.
ENDS = {"shutdown": Reason.PREEMPTED, "orphaned": Reason.NODE, "rejected": Reason.REFUSED, "failed": Reason.UNKNOWN}
OVER = frozenset({"complete", "failed", "shutdown", "rejected", "orphaned"})
ENDED = frozenset({"complete", "failed"})  # by itself, or by its node
DELETED = "pman.deleted"  # label of a service that DELETE takes away, also of one that pman 6 has made
CLEARED_SECONDS = 5.0  # it takes 0.25 s, and for ever where a node is away
MOST_SEEN = 50_000  # services
LIST_SECONDS = 5.0  # for several jobs; then each is asked for alone
MARK_AGAIN_SECONDS = 3.0  # a task that is just starting may miss that its service has no replicas (seen on 20.10)
LACKING = "insufficient resources"
KILL_SECONDS = 5.0  # for one container, which the engine waits for
DELETE_SECONDS = 25.0  # for a busy node to end a job, by SIGKILL; pfcon waits 100 s
SUBPATH_ENGINE = (26, 1)  # 26.0 knows Subpath, and drops it on the way to the node (moby/moby#47711)
# Of https://docs.docker.com/reference/api/engine/version/v1.45/#tag/System/operation/SystemInfo, Swarm.LocalNodeState:
# engines that may be a manager again. `inactive`, or `active` without control, is none.
UNSETTLED = frozenset({"pending", "locked", "error"})
UNLISTED = frozenset({"Env", "Mounts", "Endpoint", "PreviousSpec", "NetworksAttachments", "Volumes"})
# How an engine that rejects a task says that it has no image (moby, daemon/images and daemon/containerd).
_NO_IMAGE = re.compile(r"no such image|pull access denied|manifest (for .* )?(not found|unknown)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Found:
    """What status() has read. slots: the newest task of each; workers: those of them, and those without a task."""

    service: Json
    slots: list[Json]
    workers: tuple[Worker, ...]

    @property
    def is_terminal(self) -> bool:
        """Whether the job's log has no frames, as one that pman 6 has made."""
        return bool(self.service["Spec"]["TaskTemplate"]["ContainerSpec"].get("TTY"))


class NotAManager(BackendError):
    """The engine takes no part in a Swarm, or is no manager there. That may be mended without a restart of pman."""

    http_status = 503

    def __init__(self, host: str, detail: str = "") -> None:
        super().__init__(
            f"The engine at {host} is no Swarm manager: run `docker swarm init` there, set DOCKER_HOST to a manager, "
            "or set CONTAINER_ENV=docker to use one engine without a Swarm.",
            detail=detail,
        )


class SwarmBackend:
    """Jobs as services of a Swarm, through one of its managers."""

    def __init__(self, settings: Settings) -> None:
        self._engine = Engine(settings)
        self._store = Store(self._engine, settings, self._nodes_mount_parts, escaped)
        self._node_id = ""
        self._gpu = settings.gpu_resource_name or "NVIDIA-GPU"
        self._nodes = Shared(self._look_at_nodes)
        self._found = Together(self._named, self._several_named)
        self._tasks_of = Together(self._read_tasks, self._read_tasks_of_several)  # by the id of their service
        self._seen: dict[str, str] = {}  # name -> id of the service that the last GET found

    @engine.understood
    def submit(self, job: Job, spec: Spec) -> JobStatus:
        body = documents.load(job, spec, IDENTITY)
        container = body["TaskTemplate"]["ContainerSpec"]
        self._store.place(job, container.get("Mounts") or [])
        headers = self._engine.registry_auth(str(container.get("Image", "")))
        try:
            # Perhaps of a service that is gone: after a DELETE that was cut short, and for a moment during each.
            if any(self._is_up(task) for task in self._living(job.jid)):
                return self._existing(job)
            if job.name != job.jid and self._former(job.jid):
                return self._existing(job)
            self._engine.call("POST", "/services/create", body=body, headers=headers)
        except Conflict:
            return self._existing(job)
        except BackendError as error:
            raise self._explained(error) from error
        return JobStatus(job.jid, job.image, job.cmd, JobState.NOT_STARTED)

    def _existing(self, job: Job) -> JobStatus:
        try:
            service = self._find(job.jid)
            digest = _labels(service).get(engine.DIGEST)
            if digest != job.digest if digest else not former.of_service(service).is_same(job):
                raise jid_taken(job.jid)
            return self._status(service, self._tasks(service))
        except NotFound:
            raise self._taken(job) from None

    def _taken(self, job: Job) -> PmanError:
        """Why a service with the job's name could not be made although pman's job is not there."""
        service = self._named(job.name) or self._former(job.jid, look=job.name != job.jid)
        if service and DELETED in _labels(service):
            if not any(self._is_up(task) for task in self._left(service)):
                self._remove(service)
        elif service and (_labels(service).get(engine.JID) != job.jid or engine.DIGEST not in _labels(service)):
            return Conflict(f"The Swarm has a service {job.name} that is not pman's.")
        return Unreachable(f"The job {job.jid} is just being deleted.")

    @engine.understood
    def status(self, jid: str) -> JobStatus:
        service = self._find(jid, self._found.get)
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[service["Spec"]["Name"]] = service["ID"]
        return self._status(service, self._tasks(service, self._tasks_of.get))

    def _find(self, jid: str, read: Callable[[str], Json | None] | None = None, *, deleted: bool = False) -> Json:
        """The service of exactly this jid; the engine would also take an id, or the beginning of one.

        deleted: also one that a DELETE has marked.
        """
        name = backend_name(jid)
        service = (read or self._named)(name)
        if not service or _labels(service).get(engine.JID) != jid or engine.DIGEST not in _labels(service):
            service = self._former(jid, service if name == jid else None, look=name != jid)
        if not service or (DELETED in _labels(service) and not deleted):
            raise no_such_job(jid)
        return service

    def _named(self, name: str) -> Json | None:
        try:
            service: Json | None = self._engine.find(f"/services/{name}")
        except BackendError as error:
            raise self._explained(error) from error
        return service if service and service["Spec"]["Name"] == name else None

    def _several_named(self, names: Collection[str]) -> Mapping[str, Json]:
        """Those whose ids are known: the engine reads a name as the beginning of many."""
        if not (known := list(filter(None, map(self._seen.get, names)))):
            return {}
        found = self._engine.get("/services", filters={"id": known}, timeout_seconds=LIST_SECONDS)
        return {service["Spec"]["Name"]: service for service in found}

    def _former(self, jid: str, service: Json | None = None, look: bool = True) -> Json | None:
        """The service that pman 4 to 6 made for the jid. look: whether the engine is to be asked for it."""
        if look and may_name(jid):
            service = self._named(jid)
        return service if service and former.is_service(service, jid, self._store.directory()) else None

    def _tasks(self, service: Json, read: Callable[[str], list[Json]] | None = None) -> list[Json]:
        try:
            return (read or self._read_tasks)(service["ID"])
        except NotFound:  # deleted since it was found
            raise no_such_job(_jid(service)) from None

    def _read_tasks(self, service_id: str) -> list[Json]:
        tasks: list[Json] = self._engine.get("/tasks", filters={"service": [service_id]})
        return tasks

    def _read_tasks_of_several(self, service_ids: Collection[str]) -> Mapping[str, list[Json]]:
        """A list fails as a whole where one of the services is gone, and then each is asked for alone."""
        found: dict[str, list[Json]] = {}
        filters = {"service": list(service_ids)}
        for task in self._engine.get("/tasks", filters=filters, timeout_seconds=LIST_SECONDS):
            found.setdefault(task["ServiceID"], []).append(task)
        return found

    def _status(self, service: Json, tasks: Iterable[Json]) -> JobStatus:
        newest = {task.get("Slot", 0): task for task in sorted(tasks, key=lambda task: task["CreatedAt"])}
        slots = [newest[slot] for slot in sorted(newest)]
        replicas = service["Spec"].get("Mode", {}).get("Replicated", {}).get("Replicas", 1)
        missing = int(replicas) - len(slots)
        memory = [self._out_of_memory(task) for task in slots]
        states = [outcome.with_memory(_state(task), out) for task, out in zip(slots, memory, strict=True)]
        states += [JobState.NOT_STARTED] * max(0, missing)
        state = outcome.merge(states)
        labels, container = _labels(service), service["Spec"]["TaskTemplate"]["ContainerSpec"]
        ended = [end for task in slots if (end := engine.time_of(task["Status"].get("Timestamp")))]
        words = [self._words(service, *one) for one in zip(slots, memory, strict=True)]
        return JobStatus(
            jid=_jid(service),
            image=labels.get(engine.IMAGE, container["Image"].split("@")[0]),
            cmd=shlex.join([*container.get("Command", []), *container.get("Args", [])]),
            state=state,
            message=outcome.join_messages(words),
            finished_at=max(ended, default=None) if state.final else None,
            private=_Found(service, slots, tuple(map(Worker.of, states, [*words, *[""] * max(0, missing)]))),
            posted_at=engine.time_of(service.get("CreatedAt")),
            user=labels.get(engine.USER),
        )

    @engine.understood
    def details(self, status: JobStatus) -> Details:
        """The names of nodes are in another list of Swarm's; when a task began is in none."""
        found = status.kept(_Found)
        task = found.service["Spec"]["TaskTemplate"].get("Resources") or {}
        limits, reserved = task.get("Limits") or {}, _resources(task.get("Reservations"))
        names = {node["ID"]: node["Description"].get("Hostname") for node in self._nodes.get()}
        at = [names.get(one.get("NodeID")) for one in found.slots]
        ends = [engine.time_of(one["Status"].get("Timestamp")) for one in found.slots]
        workers = [
            replace(worker, node=node, finished_at=end if worker.state and worker.state.final else None)
            for worker, node, end in itertools.zip_longest(found.workers, at, ends)
        ]
        return Details(
            cpu_millicores=limits.get("NanoCPUs", 0) // 1_000_000 or None,
            memory_mib=limits.get("MemoryBytes", 0) >> 20 or None,
            gpu_count=sum(amount for kind, amount in reserved.items() if kind not in ("NanoCPUs", "MemoryBytes")),
            backend_id=found.service["ID"],
            nodes=tuple(dict.fromkeys(node for node in at if node)) or None,
            workers=tuple(workers),
            **engine.of_labels(_labels(found.service)),
        )

    def _out_of_memory(self, task: Json) -> bool | None:
        """Swarm itself does not say it; the node does, where it is the one that pman asks. None: it is not known."""
        if task["Status"]["State"] not in ENDED or not _container(task):
            return None
        return self._engine.end(_container(task), lambda container: bool(container["State"].get("OOMKilled")))

    def _words(self, service: Json, task: Json, out_of_memory: bool | None) -> str:
        status, text = task["Status"], engine.sentence(task["Status"].get("Err", ""))
        code = status.get("ContainerStatus", {}).get("ExitCode", 0)
        if "unhealthy container" in text:
            return engine.overtime(_labels(service))
        if text.startswith("No such container"):
            said = "The job's container was removed while it ran, for example by an engine that shut down."
            return Why(said, Reason.LOST)
        if out_of_memory or (code == 137 and status["State"] == "failed"):
            limits = (service["Spec"]["TaskTemplate"].get("Resources") or {}).get("Limits") or {}
            return outcome.explain_memory(int(limits.get("MemoryBytes", 0)) >> 20, code, out_of_memory)
        if status["State"] == "failed" and code and (not text or text.startswith("non-zero exit")):
            return Why(f"The job ended with exit code {code}.", outcome.word_of(code), code)
        if LACKING in text:
            return text + self._lacks(service)
        return _end(task, text or _unsaid(task), code)

    def _lacks(self, service: Json) -> str:
        """Whether a job for which no node has room may run later."""
        wanted = _resources(service["Spec"]["TaskTemplate"].get("Resources", {}).get("Reservations"))
        if not (nodes := self._nodes.get()):
            return ""
        for node in nodes:
            has = _resources(node["Description"].get("Resources"))
            if all(has.get(kind, 0) >= amount for kind, amount in wanted.items()):
                return " The job starts when a node has room for it."
        return " No node of the Swarm has as much as the job asks for, so it cannot start; delete it."

    def _look_at_nodes(self) -> list[Json]:
        """No nodes where they cannot be had, since they only explain."""
        try:
            nodes: list[Json] = self._engine.get("/nodes")
        except PmanError as error:
            log.warning("the nodes of the Swarm cannot be read: %s", error)
            return []
        return nodes

    def workers(self, status: JobStatus) -> int:
        return len(status.kept(_Found).slots)

    @engine.understood
    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        found = status.kept(_Found)
        tasks = found.slots[worker : worker + 1]  # none where Swarm has not made it yet
        return [self._log(task, wanted, found.is_terminal) for task in tasks]

    def _log(self, task: Json, wanted: Wanted, raw: bool) -> str:
        if not _container(task):
            return ""
        if task.get("NodeID") == self._own_node():
            text = self._engine.tail(f"/containers/{_container(task)}/logs", wanted, raw=raw)
            if text is not None:
                return text
        # The engine passes over tasks that have not begun, by its own view, unless it is to wait for them.
        follow = task["Status"]["State"] == "starting"
        return self._engine.tail(f"/tasks/{task['ID']}/logs", wanted, follow=follow, raw=raw) or ""

    def _own_node(self) -> str:
        if not self._node_id:
            self.ping()
        return self._node_id

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        found = status.kept(_Found)
        return documents.shown(found.service["Spec"], environment)

    @engine.understood
    def delete(self, jid: str) -> None:
        """A service that is marked and whose tasks are over is gone for pman, whether or not it can be removed."""
        service = self._find(jid, deleted=True)
        retry.call_last(self._end, service)
        try:
            retry.call_last(self._remove, service)
        except Unreachable as error:
            log.warning("the service of the deleted job %s is left until its next POST or DELETE: %s", jid, error)

    def _end(self, service: Json) -> None:
        """Mark the service, and wait until its tasks are over.

        It is looked for by its id: when another DELETE has removed it, a new job may have its name.
        """
        deadline = time.monotonic() + DELETE_SECONDS
        while True:
            if found := self._engine.find(f"/services/{service['ID']}"):
                self._mark(found)
            self._kill(filter(None, map(_container, self._left(service))))
            if retry.wait_until(
                lambda: not self._left(service), MARK_AGAIN_SECONDS, first_pause=0.02, longest_pause=0.25
            ):
                return
            if time.monotonic() > deadline:
                break
        if any(self._is_up(task) for task in self._left(service)):
            said = f"The job {_jid(service)} has not ended within {DELETE_SECONDS:.0f} s; delete it again."
            raise Unreachable(said)
        log.warning("the node of the deleted job %s is away; it ends the job when it is back", _jid(service))

    def _left(self, service: Json) -> list[Json]:
        """Its living tasks, which carry its label; those of pman 6 have none."""
        tasks = self._living(_labels(service).get(engine.JID, ""))
        return [task for task in tasks if task["ServiceID"] == service["ID"]]

    def _mark(self, service: Json) -> None:
        """Have Swarm end the tasks, and let it be seen that this was asked for."""
        mark = {"Labels": _labels(service) | {DELETED: "yes"}, "Mode": {"Replicated": {"Replicas": 0}}}
        path, version = f"/services/{service['ID']}/update", service["Version"]["Index"]
        try:
            self._engine.call("POST", path, body=service["Spec"] | mark, version=version)
        except BackendError as error:
            if "out of sequence" in str(error):  # another DELETE was first
                raise Unreachable(f"The job {_jid(service)} is just being deleted.") from error
            raise

    def _remove(self, service: Json) -> None:
        """Once Swarm has cleared the tasks away: dockerd 20.10 can end by a panic while it does both at once."""
        with contextlib.suppress(NotFound):
            retry.wait_until(lambda: not self._tasks(service), CLEARED_SECONDS, longest_pause=0.25)
            self._engine.call("DELETE", f"/services/{service['ID']}")

    def _kill(self, containers: Iterable[str]) -> None:
        """End those of this engine. Swarm takes a second before it begins to end those of a service (20.10)."""

        def kill(container: str) -> None:
            with contextlib.suppress(PmanError):  # another node's, or gone; Swarm ends it all the same
                self._engine.call("POST", f"/containers/{container}/kill", signal="KILL", timeout_seconds=KILL_SECONDS)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(kill, containers))

    def _living(self, jid: str = "") -> list[Json]:
        """Tasks whose containers may still write, also those of a service that is gone; of this jid, or all of them."""
        tasks = self._engine.get("/tasks", **({"filters": {"label": [f"{engine.JID}={jid}"]}} if jid else {}))
        return [task for task in tasks if task["Status"]["State"] not in OVER]

    def _is_up(self, task: Json) -> bool:
        node = self._engine.find(f"/nodes/{task.get('NodeID', '-')}")
        return node is not None and node["Status"]["State"] == "ready"

    @engine.understood
    def jobs(self, limit: int) -> list[JobStatus]:
        mine = {"label": [engine.JID, engine.DIGEST]}

        def newest(found: Iterable[Json]) -> list[Json]:
            living = (service for service in found if DELETED not in _labels(service))
            return heapq.nlargest(limit, living, key=lambda service: str(service["CreatedAt"]))

        def by_service(found: Iterable[Json]) -> dict[str, list[Json]]:
            tasks: dict[str, list[Json]] = {service["ID"]: [] for service in services}
            for task in found:
                tasks.get(task["ServiceID"], []).append(task)
            return tasks

        services = self._engine.each("/services", newest, UNLISTED, filters=mine)
        tasks = self._engine.each("/tasks", by_service, {"Spec", *UNLISTED}, filters=mine)
        listed = (self._status(service, tasks[service["ID"]]) for service in services)
        return [replace(status, private=None) for status in listed]  # no listing needs it, and it is large

    def _nodes_mount_parts(self) -> bool:
        """Whether every node mounts a part of a volume where it is asked to; any other would mount all of it."""
        for node in self._engine.get("/nodes"):
            found = re.match(r"(\d+)\.(\d+)", node["Description"]["Engine"].get("EngineVersion", ""))
            if not found or (int(found[1]), int(found[2])) < SUBPATH_ENGINE:
                return False
        return True

    @engine.understood
    def overview(self) -> Overview:
        return engine_overview.overview(self._engine, is_swarm=True, gpu=self._gpu)

    @engine.understood
    def ping(self) -> None:
        swarm = self._engine.get("/info")["Swarm"]
        if not swarm.get("ControlAvailable"):
            if (state := swarm.get("LocalNodeState")) in UNSETTLED:
                why = engine.sentence(swarm.get("Error") or state)
                raise Unreachable(f"The engine at {self._engine.host} does not take part in its Swarm now: {why}")
            raise NotAManager(self._engine.host)
        self._node_id = swarm.get("NodeID", "")
        self._store.check()

    def _explained(self, error: BackendError) -> BackendError:
        """The engine's answer to anything that only a manager can do, in words that help."""
        if "swarm manager" in str(error):
            return NotAManager(self._engine.host, error.detail)
        return error


problems, live = engine.problems, engine_overview.live


def create(settings: Settings) -> SwarmBackend:
    """The backend of this Swarm. Raises Misconfigured where the engine answers and is no manager."""
    backend = SwarmBackend(settings)
    engine.check(backend.ping)
    if not settings.ignore_limits:
        log.info(
            "on Swarm, a job's CPU and memory are reserved and limited, which pman 6 did not do. A job that asks for "
            "more than a node has does not start. IGNORE_LIMITS=yes turns this off"
        )
    return backend


def _labels(service: Json) -> Json:
    return service["Spec"].get("Labels") or {}


def _jid(service: Json) -> str:
    """A job's; one of pman 4 to 6 has no label, and the jid as its name."""
    return str(_labels(service).get(engine.JID) or service["Spec"]["Name"])


def _container(task: Json) -> str:
    return str(task["Status"].get("ContainerStatus", {}).get("ContainerID", ""))


def _resources(document: Json | None) -> dict[str, int]:
    """Amounts by kind, of a node or of a reservation; a generic resource counts by name or by number."""
    found = {kind: int((document or {}).get(kind, 0)) for kind in ("NanoCPUs", "MemoryBytes")}
    for resource in (document or {}).get("GenericResources") or []:
        for kind, one in resource.items():
            amount = int(one["Value"]) if kind == "DiscreteResourceSpec" else 1
            found[one["Kind"]] = found.get(one["Kind"], 0) + amount
    return found


def _end(task: Json, said: str, code: int) -> str:
    """The sentence with its word, where the task has failed."""
    word = ENDS.get(task["Status"]["State"])
    return Why(said, Reason.IMAGE if _NO_IMAGE.search(said) else word, code or None) if word else said


def _unsaid(task: Json) -> str:
    """A sentence about a task without an error, "" where all is well."""
    state = task["Status"]["State"]
    if state == "shutdown":
        return "Swarm ended the job, as it does when its node is drained or somebody changes its service."
    if state in OVER - {"complete"}:
        return engine.sentence(f"Swarm says {state}: {task['Status'].get('Message', '')}")
    if state not in OVER and task.get("DesiredState") == "shutdown":
        return "Swarm has given the job up, but its node does not say that it has ended; it may be away."
    return ""


def _state(task: Json) -> JobState:
    name = task["Status"]["State"]
    if name not in STATES:
        log.warning("Swarm says %r of a task, which pman does not know", name)
    return STATES.get(name, JobState.UNDEFINED)
