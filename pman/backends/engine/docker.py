"""One Docker or Podman engine, without a Swarm: each worker of a job is a container.

The name of the first container is the lock that makes a job exist once.

Time limits are kept at every look: GET, POST and DELETE of the job, and readiness probes for all jobs. The engine has
no deadline, and a thread of pman's would end with it; pfcon polls its jobs all the time, and whatever happens between
looks, a job that ran longer than its limit counts as failed.
"""

import contextlib
import json
import logging
import re
import shlex
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from pman import status as outcome
from pman.backends import documents
from pman.backends.discovery import Overview
from pman.backends.engine import api as engine
from pman.backends.engine import former
from pman.backends.engine import overview as engine_overview
from pman.backends.engine import start as docker_start
from pman.backends.engine.api import Engine, Json
from pman.backends.engine.images import Images
from pman.backends.engine.start import Starter
from pman.backends.engine.store import Store
from pman.backends.former import may_name
from pman.backends.logs import Wanted
from pman.backends.shared import MOST, Together
from pman.errors import BackendError, BadRequest, Conflict, NotFound, Unreachable, jid_taken, no_such_job
from pman.job import Job, backend_name
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, Reason, Why, Worker
from pman.targets.docker import IDENTITY
from pman.templating.render import Spec, texts

log = logging.getLogger(__name__)

# Every state of https://docs.docker.com/reference/api/engine/version/v1.45/#tag/Container/operation/ContainerInspect,
# then those that https://github.com/containers/podman/blob/v4.3/libpod/define/containerstate.go has besides.
STATES: dict[str, JobState] = {
    "created": JobState.NOT_STARTED,  # or FAILED, where the engine could not start it, or has forgotten it
    "running": JobState.STARTED,
    "paused": JobState.STARTED,
    "restarting": JobState.STARTED,
    "removing": JobState.STARTED,  # being deleted; its processes may still write
    "exited": JobState.SUCCEEDED,  # or FAILED, by the exit code
    "dead": JobState.FAILED,  # the engine failed to remove it
    "configured": JobState.NOT_STARTED,
    "initialized": JobState.NOT_STARTED,
    "stopping": JobState.STARTED,
    "stopped": JobState.SUCCEEDED,  # as exited
}
POSTED = "org.chrisproject.pman.posted"  # nanoseconds of the epoch; the engine lists whole seconds
WORKERS = "org.chrisproject.pman.workers"
MAX_WORKERS = 200  # each takes an engine a third of a second to start, and pfcon gives up on a POST after 100 s
READ = frozenset({"Id", "Name", "Created", "State", "Config", "HostConfig"})  # of an inspect document
MOST_RUNNING = 20_000  # jobs that are remembered, in 1 KiB each
LIST_SECONDS = 5.0  # for several jobs; then each is asked for alone
_JOINED = re.compile(r'[,"\n\r]')


class DockerBackend:
    """Jobs as containers of one engine."""

    def __init__(self, settings: Settings) -> None:
        self._engine = Engine(settings)
        self._store = Store(self._engine, settings)
        images = Images(self._engine, settings.pull_policy or "missing")
        self._starter = Starter(self._engine, images, lambda found: _state(found) is JobState.NOT_STARTED)
        self._together = Together(self._look, self._unchanged)
        self._running: dict[str, bytes] = {}  # jid -> what the last look at its containers read, if all of them ran

    @engine.understood
    def submit(self, job: Job, spec: Spec) -> JobStatus:
        body = documents.load(job, spec, IDENTITY)
        self._store.place(job, body.get("HostConfig", {}).get("Mounts") or [])
        if self._engine.is_podman():
            _refuse_options(job, body)
        if job.workers > MAX_WORKERS:
            raise BadRequest({"number_of_workers": f"One engine runs at most {MAX_WORKERS} workers of a job."})
        workers = []
        for index in range(job.workers):
            own: Json = {"Env": [*body.get("Env", []), f"PMAN_WORKER_INDEX={index}"]}
            own["Labels"] = {**body.get("Labels", {}), POSTED: f"{time.time_ns():020}"}
            workers.append((_name(job.name, index), body | own))
        if job.name != job.jid and self._former(job.jid):
            return self._existing_former(job)
        try:
            if self._starter.run(job, workers):  # to ask an engine about a job that is just ending takes it a while
                return JobStatus(job.jid, job.image, job.cmd, JobState.STARTED)
            return self.status(job.jid)
        except docker_start.Foreign:
            return self._existing_former(job)
        except NotFound:
            raise Unreachable(f"The job {job.jid} is just being deleted.") from None

    def _existing_former(self, job: Job) -> JobStatus:
        found = self._former(job.jid)
        if not found:
            said = f"The engine has a container {job.name} that is not pman's; remove it, or use another jid."
            raise Conflict(said)
        if not former.of_container(found).is_same(job):
            raise jid_taken(job.jid)
        return self.status(job.jid)

    @engine.understood
    def status(self, jid: str) -> JobStatus:
        # A list of Podman takes longer than a look at each container in it: 77 and 35 ms for 20 of 150 (4.3).
        workers = self._workers(jid) if self._engine.is_podman() else self._together.get(jid)
        if self._end_overdue([container for container in workers if container]):
            workers = self._workers(jid)
        present = [container for container in workers if container]
        first = present[0]
        states = [_state(container) for container in present] + [JobState.NOT_STARTED] * workers.count(None)
        state = outcome.merge(states)
        ended = [end for container in present if (end := engine.time_of(container["State"].get("FinishedAt")))]
        labels, config = _labels(first), first["Config"]
        return JobStatus(
            jid=jid,
            image=labels.get(engine.IMAGE, config["Image"]),
            cmd=shlex.join(_list(config.get("Cmd"))),
            state=state,
            message=outcome.join_messages([_words(container) for container in workers]),
            finished_at=(max(ended, default=None) or engine.time_of(first["Created"])) if state.final else None,
            private=workers,
            posted_at=engine.time_of(first["Created"]),
            user=labels.get(engine.USER),
        )

    @engine.understood
    def details(self, status: JobStatus) -> Details:
        containers = status.kept(list)
        workers = [_worker(container) for container in containers]
        began = [worker.started_at for worker in workers if worker.started_at]
        host = containers[0].get("HostConfig") or {}
        return Details(
            cpu_millicores=(host.get("NanoCpus") or 0) // 1_000_000 or None,
            memory_mib=(host.get("Memory") or host.get("MemoryReservation") or 0) >> 20 or None,
            gpu_count=sum(request.get("Count", 0) for request in host.get("DeviceRequests") or []),
            backend_id=containers[0]["Id"],
            started_at=min(began, default=None),
            workers=tuple(workers),
            **engine.of_labels(_labels(containers[0])),
        )

    def _look(self, jid: str) -> list[Json | None]:
        workers = self._workers(jid)
        self._running.pop(jid, None)
        if all(container and container["State"]["Status"] == "running" for container in workers):
            if len(self._running) >= MOST_RUNNING:
                self._running.clear()
            kept = [{key: one[key] for key in READ & one.keys()} for one in workers if one]
            self._running[jid] = zlib.compress(json.dumps(kept).encode())
        return workers

    def _unchanged(self, jids: Collection[str]) -> Mapping[str, list[Json | None]]:
        """The containers of those jobs of which each ran when it was looked at, and is listed as running.

        dockerd shows no end in any answer before its lists have it (moby, daemon/monitor.go, handleContainerExit). They
        do not say when a container began, so one that may be overdue is looked at: it may have been started anew.
        """
        known = {jid: json.loads(zlib.decompress(self._running[jid])) for jid in jids if jid in self._running}
        if not (ids := [container["Id"] for workers in known.values() for container in workers][:MOST]):
            return {}
        filters = {"id": ids}
        listed, now = self._engine.get_dated("/containers/json", filters=filters, timeout_seconds=LIST_SECONDS)
        names = {found["Id"]: found["Names"] for found in listed if found["State"] == "running"}

        def runs(container: Json) -> bool:
            container[docker_start.SEEN] = now
            return container["Name"] in names.get(container["Id"], ()) and not _overdue(container)

        return {jid: workers for jid, workers in known.items() if all(map(runs, workers))}

    def _workers(self, jid: str) -> list[Json | None]:
        """The containers of a job in order, as inspect says; None for one that is not made yet, never for the first."""
        name = backend_name(jid)
        try:
            first = self._find(jid, name)
        except NotFound:
            if found := self._former(jid):
                return [found]
            raise
        count = int(_labels(first).get(WORKERS, 1))
        return [first, *(self._worker(jid, _name(name, index)) for index in range(1, count))]

    def _find(self, jid: str, name: str) -> Json:
        """The container of exactly this name and jid; the engine would also take an id, or the beginning of one."""
        try:
            container = docker_start.inspect(self._engine, name)
        except NotFound:
            raise no_such_job(jid) from None
        if _labels(container).get(engine.JID) != jid or engine.DIGEST not in _labels(container):
            raise no_such_job(jid)
        return container

    def _former(self, jid: str) -> Json | None:
        """The container that pman 4 to 6 made for the jid."""
        if not may_name(jid):
            return None
        try:
            container = docker_start.inspect(self._engine, jid)
        except NotFound:
            return None
        return container if former.is_container(container, jid, self._store.directory()) else None

    def _worker(self, jid: str, name: str) -> Json | None:
        try:
            return self._find(jid, name)
        except NotFound:
            return None

    def workers(self, status: JobStatus) -> int:
        return len(status.kept(list))

    @engine.understood
    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        containers = status.kept(list)
        begun = (one for one in containers[worker : worker + 1] if one and _state(one) is not JobState.NOT_STARTED)
        return [self._engine.tail(f"/containers/{one['Id']}/logs", wanted) or "" for one in begun]

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        """As the engine keeps it, with what it took from the image."""
        containers = status.kept(list)
        return documents.shown({name: containers[0].get(name) for name in ("Config", "HostConfig")}, environment)

    @engine.understood
    def delete(self, jid: str) -> None:
        if docker_start.remove_all(self._engine, jid):
            return
        if not docker_start.remove_all(self._engine, jid, lambda: self._listed_former(jid)):
            raise no_such_job(jid)

    def _listed_former(self, jid: str) -> list[Json]:
        found = self._former(jid)
        return [{"Id": found["Id"], "State": found["State"]["Status"]}] if found else []

    def _end_overdue(self, containers: Iterable[Json]) -> bool:
        """Stop those whose time is up, all at once; False when there were none."""
        overdue = [
            container
            for container in containers
            if _state(container) is JobState.STARTED and _overdue(container) and container["State"].get("Running")
        ]
        if overdue:
            with ThreadPoolExecutor(min(16, len(overdue))) as pool:
                list(pool.map(self._stop, overdue))
        return bool(overdue)

    def _stop(self, container: Json) -> None:
        """SIGTERM, and when the grace period is over the engine's own `stop`, whose signal the template sets."""
        path, grace = f"/containers/{container['Id']}", container["Config"].get("StopTimeout") or 10
        try:
            self._engine.call("POST", f"{path}/kill", signal="TERM")
            with contextlib.suppress(Unreachable):
                self._engine.call("POST", f"{path}/wait", timeout_seconds=grace)
            self._engine.call("POST", f"{path}/stop")
        except (NotFound, Conflict, BackendError) as error:  # gone by itself; Podman stops none that somebody paused
            log.info("the container %s was not stopped: %s", container["Name"], error)

    @engine.understood
    def jobs(self, limit: int) -> list[JobStatus]:
        found = docker_start.listed(self._engine)
        firsts = [c for c in found if f"/{backend_name(c['Labels'][engine.JID])}" in c["Names"]]
        workers: dict[str, list[Json]] = {}
        for container in found:
            workers.setdefault(container["Labels"][engine.JID], []).append(container)
        firsts.sort(key=lambda container: container["Labels"].get(POSTED, ""), reverse=True)
        return [self._listed(container, workers[container["Labels"][engine.JID]]) for container in firsts[:limit]]

    def _listed(self, first: Json, workers: Iterable[Json]) -> JobStatus:
        """From the list of containers, which has no messages. One that has ended well in it is looked at once."""
        labels = first["Labels"]
        state = outcome.merge(self._listed_state(container) for container in workers)
        image, posted_at = labels.get(engine.IMAGE, first["Image"]), datetime.fromtimestamp(first["Created"], UTC)
        user = labels.get(engine.USER)
        return JobStatus(labels[engine.JID], image, first["Command"], state, posted_at=posted_at, user=user)

    def _listed_state(self, container: Json) -> JobState:
        state = STATES.get(container["State"], JobState.UNDEFINED)
        if state is not JobState.SUCCEEDED:
            return state
        if not re.match(r"Exited \(0\)", container.get("Status", "")):
            return JobState.FAILED
        return self._engine.end(container["Id"], _state) or state

    @engine.understood
    def overview(self) -> Overview:
        return engine_overview.overview(self._engine, is_swarm=False)

    @engine.understood
    def ping(self) -> str | None:
        self._engine.call("GET", "/_ping")
        self._store.check()
        note = docker_start.remove_nameless(self._engine)
        with_limit = {"label": [engine.LIMIT, engine.JID]}
        limited, now = self._engine.get_dated("/containers/json", filters=with_limit)
        old = [c for c in limited if now.timestamp() - c["Created"] > _limit(c["Labels"]).total_seconds()]
        self._end_overdue([c for c in (self._worker(c["Labels"][engine.JID], c["Names"][0][1:]) for c in old) if c])
        return note or None


problems, live = engine.problems, engine_overview.live


def create(settings: Settings) -> DockerBackend:
    """The backend of the engine at DOCKER_HOST. Raises Misconfigured where it answers and cannot serve."""
    backend = DockerBackend(settings)
    engine.check(backend.ping)
    log.info(
        "on one engine, memory limits are soft and an image's ENTRYPOINT gets the job's command line, as with pman 6; "
        "docker_hard_memory and docker_replace_entrypoint in site.yaml change that"
    )
    return backend


def _refuse_options(job: Job, body: Json) -> None:
    """Raises BadRequest for a value that Podman would read as something else than one value.

    Its Docker-compatible API writes each mount as one line of `key=value` joined by commas, without quotes, and parses
    that line as CSV; a program that is alone in Entrypoint is parsed as JSON where it can be
    (https://github.com/containers/podman/blob/v5.4.2/pkg/api/handlers/compat/containers_create.go, cliOpts).
    """
    for mount in body.get("HostConfig", {}).get("Mounts") or []:
        for text in texts(mount):
            if _JOINED.search(text):
                fields = {"input_dir": job.input_dir, "output_dir": job.output_dir}
                said = "must not hold a comma, a double quote or a line break: Podman would read a mount option there."
                wrong = {name: said for name, path in fields.items() if path in text and _JOINED.search(path)}
                raise BadRequest(wrong or f"The mount {text!r} {said}")
    program = _list(body.get("Entrypoint"))
    if len(program) == 1 and _is_json_list(program[0]):
        raise BadRequest({"entrypoint": "names a program that Podman would read as a JSON list."})


def _is_json_list(text: str) -> bool:
    """Whether Go's decoder may take the text for a list; it takes null for an empty one."""
    try:
        read = json.loads(text)
    except ValueError:
        return False
    except RecursionError:
        return True
    return read is None or isinstance(read, list)


def _name(name: str, index: int) -> str:
    """A dot is in no other job's name, which are DNS labels."""
    return f"{name}.{index}" if index else name


def _labels(container: Json) -> Json:
    return container["Config"].get("Labels") or {}


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _limit(labels: Json) -> timedelta:
    return timedelta(minutes=int(labels.get(engine.LIMIT, 0) or 525_600_000))


def _broken_off(container: Json) -> str:
    """Why a container counts as failed that neither its state nor its exit code calls so; "" for any other.

    It could not be started, or nobody saw it end: when its machine has restarted, Podman 4 says of what ran there that
    it is created, and Podman 5 that it exited with code 0.
    """
    state = container["State"]
    name, began, ended = STATES.get(state["Status"]), *map(engine.time_of, (state["StartedAt"], state["FinishedAt"]))
    if name in (JobState.NOT_STARTED, JobState.SUCCEEDED) and began and not ended:
        return "The job was cut off: the machine restarted while it ran."
    return str(state.get("Error") or "") if name is JobState.NOT_STARTED else ""


def _overdue(container: Json) -> bool:
    """Whether it runs, or ran, longer than its limit, by the engine's clock where that is known."""
    began, ended = (engine.time_of(container["State"].get(key)) for key in ("StartedAt", "FinishedAt"))
    now = container.get(docker_start.SEEN) or datetime.now(UTC)
    running = container["State"].get("Running")
    return began is not None and (now if running else ended or now) - began >= _limit(_labels(container))


def _state(container: Json) -> JobState:
    name = container["State"]["Status"]
    state = STATES.get(name, JobState.UNDEFINED)
    if state is JobState.UNDEFINED:
        log.warning("the engine says %r of a container, which pman does not know", name)
    if state is JobState.SUCCEEDED and (container["State"].get("ExitCode") or _overdue(container)):
        return JobState.FAILED
    return (
        JobState.FAILED if _broken_off(container) else outcome.with_memory(state, container["State"].get("OOMKilled"))
    )


def _words(container: Json | None) -> str:
    if container is None:
        return "There is no container yet, or somebody removed it."
    state, labels, became = container["State"], _labels(container), _state(container)
    if became is JobState.NOT_STARTED:
        return "The container has been made, but not started; post the job again."
    if became is not JobState.FAILED:
        return ""
    if error := _broken_off(container):
        began = engine.time_of(state["StartedAt"])
        return Why(engine.sentence(error), Reason.NODE if began else Reason.REFUSED)
    if _overdue(container):
        return engine.overtime(labels)
    return _end(state, container.get("HostConfig", {}).get("Memory") or 0)


def _worker(container: Json | None) -> Worker:
    if container is None:
        return Worker.of(JobState.NOT_STARTED, _words(None))
    began, ended = (engine.time_of(container["State"].get(key)) for key in ("StartedAt", "FinishedAt"))
    state = _state(container)
    return Worker.of(state, _words(container), started_at=began, finished_at=ended if state.final else None)


def _end(state: Json, limit_bytes: int) -> Why:
    code = state.get("ExitCode", 0)
    if state.get("OOMKilled") or code == 137:
        return outcome.explain_memory(limit_bytes >> 20, code, state.get("OOMKilled"))
    error = state.get("Error")
    word = Reason.UNKNOWN if error else outcome.word_of(code)
    return Why(engine.sentence(error or f"The job ended with exit code {code}"), word, code)
