"""Kubernetes: a job is one batch/v1 Job in JOB_NAMESPACE, and that object is all that is kept of it.

Identity: the object is named after the jid (`job.name`), its annotations hold the jid itself and the digest of the
request. What is submitted is the rendered template, parsed and otherwise as it is, with fieldValidation=Strict.
Change starts.py for why a job does not start, ends.py for how it ended, known.py for what else is known of it, api.py
for how the API server is asked, rights.py for what pman must be allowed, and naming.py for what settings may hold.
"""

import contextlib
import functools
import heapq
import json
import logging
import re
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, Self

from pman.backends import documents, line_named, retry
from pman.backends.discovery import Overview
from pman.backends.former import may_name
from pman.backends.kubernetes import ends, known, objects, older, rights, starts
from pman.backends.kubernetes.api import Api, Denied, Object, connect
from pman.backends.kubernetes.discovery import GPU, overview
from pman.backends.kubernetes.discovery import discover as discover
from pman.backends.kubernetes.naming import problems as problems
from pman.backends.kubernetes.podlogs import Reader
from pman.backends.logs import Wanted
from pman.backends.shared import Shared, Together
from pman.errors import BackendError, BadRequest, Conflict, PmanError, Refused, TooLarge, jid_taken, no_such_job
from pman.job import Job, backend_name
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus, with_memory
from pman.targets.kubernetes import DIGEST, IDENTITY
from pman.targets.kubernetes import JID as JID
from pman.targets.record import Problem
from pman.templating.render import Spec

log = logging.getLogger(__name__)

# Conditions that are True and counters above zero of a Job's status -> the state; the first row that holds counts.
# https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/#JobStatus lists them. None: whether
# anything has run, only the pods tell.
STATES: Mapping[str, JobState | None] = {
    "Complete": JobState.SUCCEEDED,
    "Failed": JobState.FAILED,
    "SuccessCriteriaMet": JobState.STARTED,  # all pods ended, they are still being counted
    "FailureTarget": None,  # other pods are still being killed and may write until then
    "Suspended": JobState.NOT_STARTED,
    "ready": JobState.STARTED,
    "succeeded": JobState.STARTED,  # of several workers some
    "failed": None,  # and will be tried again, or the condition is about to come
    "uncountedTerminatedPods": None,
    "terminating": None,
    "active": None,  # not ready yet or not any more
    "startTime": JobState.NOT_STARTED,  # no pod could be made yet
    "": JobState.NOT_STARTED,  # nobody has looked at the job yet
}
# https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase
POD_STATES: Mapping[str, JobState] = {
    "Pending": JobState.NOT_STARTED,
    "Running": JobState.STARTED,
    "Succeeded": JobState.STARTED,  # final only when the Job says so
    "Failed": JobState.STARTED,
    "Unknown": JobState.STARTED,  # its node does not answer
}
_CONDITIONS = ("Complete", "Failed", "SuccessCriteriaMet", "FailureTarget", "Suspended")

OWNER = "batch.kubernetes.io/controller-uid"  # label of a Job's pods
NAME = "org.chrisproject.pman.name"  # label of a Job
REMOVAL = "removal of the Job"  # name of a thread
ANSWER_SECONDS = 0.02  # so long the removal of a marked Job lets the answer to the DELETE go first
DELETED = "pman.deleted"  # annotation of a Job that DELETE takes away, also of one that pman 6 has made
# of a Job that DELETE takes away: its pods end at once, and Kubernetes removes it where pman is killed before it does,
# a suspended one when it is resumed.
ENDED = {"activeDeadlineSeconds": 0, "ttlSecondsAfterFinished": 60}
# Removes managedFields. The API server need not note then who set which field: 1.2 of 5.5 ms (measured, 1.35). See
# https://kubernetes.io/docs/reference/using-api/server-side-apply/#clearing-managedfields
NO_MANAGERS: list[Object] = [{}]
NEVER_RAN = "org.chrisproject.pman.never-ran"  # annotation of a job that pman ended before any of its pods had begun
OLDEST_MINOR = 31  # of Kubernetes 1.x. Older ones call a Job failed while its other pods still write (KEP 3939).
# etcd refuses requests above 1.5 MiB, and says so misleadingly (422 "selector not auto-generated", measured).
MAX_BODY_BYTES = 1_500_000
REPLACE_SECONDS = 40.0  # how long a POST waits for the pods of a deleted job with the same jid to end
POLL_SECONDS = 0.25
PAGE = 100  # objects of a listing in one answer. With 500, pages take 10 MiB more (bench/scale.py)
MOST_SEEN = 10_000  # jobs


@dataclass(frozen=True, slots=True)
class _Found:
    """What status() has read."""

    job: Object
    pods: tuple[Object, ...]


class KubernetesBackend:
    """Jobs of one namespace. All state is the cluster's; any number of pman processes may share it."""

    def __init__(self, api: Api, settings: Settings) -> None:
        self._api = api
        self._namespace = settings.job_namespace
        self._core = f"/api/v1/namespaces/{self._namespace}"
        self._jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        self._patience = timedelta(minutes=settings.stuck_job_patience_minutes)
        pods = f"{self._core}/pods"
        self._reader = Reader(api, pods)
        self._gpu = settings.gpu_resource_name or GPU
        self._held_back = Shared(lambda: self._events(starts.HELD_BACK))
        self._said: set[str] = set()  # what is missing or old, and is logged once
        self._of_version: list[str] | None = None  # what is to be said of it; None: not known yet
        self._found = Together(self._read, self._read_several)  # Jobs by name
        # by the uid of their Job
        self._pods_of = Together(lambda uid: self._labelled(pods, f"{OWNER}={uid}"), self._read_pods_of_several)
        self._seen: dict[str, tuple[str, str]] = {}  # jid -> name and uid of the Job that the last GET found

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        body = _body(job, spec)
        deadline = time.monotonic() + REPLACE_SECONDS
        while True:
            existing = self._older(job)
            if existing is None:
                code, created = self._api.call("POST", self._jobs, {"fieldValidation": "Strict"}, body, allow=(409,))
                if code != 409:
                    return _status(created, JobState.NOT_STARTED)
                existing = self._read(job.name)
            if existing and not _is_deleted(existing):
                _check_same(existing, job)
                return self._status(existing)
            if existing and "deletionTimestamp" not in existing["metadata"]:
                self._remove(existing["metadata"]["name"], existing["metadata"]["uid"])
            if existing and time.monotonic() > deadline:
                raise Conflict(f"The deleted job with jid {job.jid} is still there: {self._why_there(existing)}")
            time.sleep(POLL_SECONDS)

    def _older(self, job: Job) -> Object | None:
        """The Job that pman 6 made of this jid, where it would have another name than pman gives it."""
        if job.name == job.jid or not may_name(job.jid):
            return None
        found = self._read(job.jid)
        return found if found and _jid(found) == job.jid else None

    def _why_there(self, ending: Object) -> str:
        pods = self._pods(ending)
        if not all("deletionTimestamp" in pod["metadata"] for pod in pods) or not pods:
            return "Kubernetes does not act on that; its controller manager may be down. Try again later."
        return "its pods do not end, perhaps on a node that does not answer. Try again when they are gone."

    def status(self, jid: str) -> JobStatus:
        job = self._find(jid, self._found.get)
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[jid] = job["metadata"]["name"], job["metadata"]["uid"]
        return self._status(job)

    def _read(self, name: str) -> Object | None:
        code, job = self._api.call("GET", f"{self._jobs}/{name}", allow=(404,))
        return None if code == 404 else job

    def _read_several(self, names: Collection[str]) -> Mapping[str, Object]:
        """Those that have the label with their name, which pman 6 did not set and a site may have changed."""
        found = self._labelled(self._jobs, f"{NAME} in ({','.join(names)})")
        return {job["metadata"]["name"]: job for job in found}

    def _labelled(self, path: str, selector: str) -> list[Object]:
        found: list[Object] = self._api.call("GET", path, {"labelSelector": selector})[1]["items"]
        return found

    def _find(self, jid: str, read: Callable[[str], Object | None] | None = None, *, deleted: bool = False) -> Object:
        """The Job of this jid; deleted: also one that a DELETE has marked, or that is just ending."""
        for name in dict.fromkeys([backend_name(jid), *([jid] if may_name(jid) else [])]):
            job = (read or self._read)(name)
            if job and _jid(job) == jid and (deleted or not _is_deleted(job)):
                return job
        raise no_such_job(jid)

    def _status(self, job: Object) -> JobStatus:
        pods = self._pods(job) if _counters(job["status"]) else ()  # none is made before the first of them is set
        state = job_state(job["status"])
        if state is not None and state.final:
            return _ended(job, state, pods, self._events_of)
        message = starts.node_silent(pods) or self._waits(job, pods)
        return _status(job, state or pods_state(job, pods), message, pods)

    def _pods(self, job: Object) -> tuple[Object, ...]:
        """The pods of this very object, in index order; of those that tried one index the newest."""
        return objects.in_order(self._pods_of.get(job["metadata"]["uid"]), job)

    def _read_pods_of_several(self, uids: Collection[str]) -> Mapping[str, list[Object]]:
        found: dict[str, list[Object]] = {}
        for pod in self._labelled(f"{self._core}/pods", f"{OWNER} in ({','.join(uids)})"):
            found.setdefault(pod["metadata"]["labels"][OWNER], []).append(pod)
        return found

    def _waits(self, job: Object, pods: Sequence[Object]) -> str:
        """Why workers do not start, or "". A job that cannot run whole is ended when patience with that is over."""
        conditions = _held(job["status"])
        if "Suspended" in conditions:
            return starts.suspended(job, self._held_back.get)
        if conditions or not job["status"].get("startTime"):  # ending already; not looked at yet
            return ""
        ahead = [pod for pod in pods if not _begun(pod) and "deletionTimestamp" not in pod["metadata"]]
        reason = starts.waiting(job, ahead, _lacks_pods(job, pods), functools.cache(self._events_of))
        if not reason.can_heal and reason.lasted is not None and reason.lasted >= self._patience:
            self._give_up(job, reason, ran=any(map(_begun, pods)))
        return reason.sentence

    def _events_of(self, uid: str) -> list[Object] | None:
        return self._events(f"involvedObject.uid={uid}")

    def _events(self, selector: str) -> list[Object] | None:
        """Events; None where pman may not read any. They only explain: no error of theirs counts."""
        try:
            return list(self._api.call("GET", f"{self._core}/events", {"fieldSelector": selector})[1]["items"])
        except Denied as error:
            self._say_once(f"{error} Jobs are not explained by their events.")
        except PmanError as error:
            log.warning("events cannot be read: %s", error)
            return []
        return None

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning("%s", sentence)

    def _give_up(self, job: Object, reason: starts.Reason, ran: bool) -> None:
        """Have Kubernetes fail the job: its condition Failed makes it final, for every pman alike.

        A deadline that has passed does it. It ends workers that run, and takes their logs away, as when one of them
        fails. Nothing happens when the job has changed since it was read, or when pman may not change it.
        """
        notes = {ends.GAVE_UP: reason.sentence, ends.GAVE_UP_WORD: reason.word.value}
        notes |= {} if ran else {NEVER_RAN: "true"}
        metadata = {"annotations": notes, "resourceVersion": job["metadata"]["resourceVersion"]}
        patch = {"metadata": metadata, "spec": {"activeDeadlineSeconds": 1}}
        try:
            self._api.call("PATCH", f"{self._jobs}/{job['metadata']['name']}", body=patch, allow=(404, 409))
        except Denied as error:
            self._say_once(f"{error} Jobs that cannot start wait for ever.")
        except PmanError as error:
            log.warning("a job that cannot start goes on waiting: %s", error)

    def workers(self, status: JobStatus) -> int:
        is_waiting = status.state is JobState.NOT_STARTED
        return 0 if is_waiting else int(status.kept(_Found).job["spec"].get("completions", 1))

    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        found = status.kept(_Found)
        numbers = objects.numbers(found.pods, found.job)
        pods = [pod for number, pod in zip(numbers, found.pods, strict=True) if number == worker and _begun(pod)]
        container = _container(found.job)["name"]
        return [self._reader.read(pod, container, wanted) for pod in pods]

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        found = status.kept(_Found)
        labels = {name: found.job["metadata"].get(name) for name in ("name", "labels", "annotations")}
        return documents.shown({"metadata": labels, "spec": found.job["spec"]}, environment)

    def details(self, status: JobStatus) -> Details:
        found = status.kept(_Found)
        return known.details(found.job, found.pods, status, _container(found.job))

    def delete(self, jid: str) -> None:
        """Ends the pods too: Kubernetes keeps the Job until they are gone, so that a new one never runs beside them.

        It is marked before, so that a repeated DELETE finds it however this one ends. A Job that the last GET found is
        not read again.
        """
        seen = self._seen.pop(jid, None)
        if seen and self._end(*seen):
            return
        found = self._find(jid, deleted=True)["metadata"]
        if not self._end(found["name"], found["uid"]):
            retry.call_last(self._remove, found["name"], found["uid"])

    def _end(self, name: str, uid: str) -> bool:
        """False where the Job cannot be marked. A marked one is gone for pman, and its pods end by its deadline.

        So nobody waits for its removal, which may also fail.
        """
        marked = retry.call_last(self._mark, name, uid)
        if marked:
            removal = threading.Timer(ANSWER_SECONDS, self._clear_away, (name, uid))
            removal.name = f"{REMOVAL} {name}"
            removal.start()
        return marked

    def _clear_away(self, name: str, uid: str) -> None:
        try:
            retry.call(self._remove, name, uid)
        except PmanError as error:
            log.warning("the Job %s is deleted for pman, but may be left in Kubernetes: %s", name, error)

    def _mark(self, name: str, uid: str) -> bool:
        """False where there is no such Job, which is a 422 when the uid is another one, or where pman may not.

        pman may not either where a policy of the cluster, made after the Job, refuses the Job as it is.
        """
        metadata = {"uid": uid, "annotations": {DELETED: "yes"}, "managedFields": NO_MANAGERS}
        patch = {"metadata": metadata, "spec": ENDED}
        try:
            return self._api.call("PATCH", f"{self._jobs}/{name}", body=patch, allow=(404, 409, 422))[0] < 400
        except (Denied, Refused) as error:
            self._say_once(f"{error} A DELETE that is repeated after an error may be a 404.")
            return False

    def _remove(self, name: str, uid: str) -> None:
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self._api.call("DELETE", f"{self._jobs}/{name}", body=options, allow=(404, 409))

    def jobs(self, limit: int) -> list[JobStatus]:
        ours: list[_Packed] = []
        for page in self._pages(self._jobs):
            more = [_Packed.of(job) for job in page if _jid(job) and not _is_deleted(job)]
            ours = heapq.nlargest(limit, ours + more, key=lambda job: job.created)
        pods: dict[str, list[bytes]] = {job.uid: [] for job in ours if job.needs_pods}
        for page in self._pages(f"{self._core}/pods", labelSelector=OWNER) if pods else ():
            for pod in page:
                if (owner := pod["metadata"]["labels"][OWNER]) in pods:
                    pods[owner].append(_packed(pod))
        return [_listed(json.loads(job.text), [*map(json.loads, pods.get(job.uid, []))]) for job in ours]

    def _pages(self, path: str, **query: str) -> Iterator[list[Object]]:
        """All objects of a kind, by name, in pieces of bounded size."""
        query["limit"] = str(PAGE)
        while True:
            found = self._api.call("GET", path, query)[1]
            yield found["items"]
            if not (token := found["metadata"].get("continue")):
                return
            query["continue"] = token

    def ping(self) -> str | None:
        notes = self._rights()
        with contextlib.suppress(Refused, BadRequest):  # quota or policy: the job is refused, not pman
            # A namespace that does not exist shows in nothing but this.
            self._api.call("POST", self._jobs, {"dryRun": "All"}, _PROBE)
        if self._of_version is None:
            threading.Thread(target=self._ask_version, daemon=True).start()
        notes += self._of_version or []
        for note in notes:
            self._say_once(note)
        return " ".join(notes) or None

    def overview(self) -> Overview:
        return overview(self._api, self._gpu)

    def _rights(self) -> list[str]:
        """What is to be said of pman's rights. Raises BackendError where one is missing that jobs need."""
        try:
            answer = self._api.call("POST", rights.REVIEW_PATH, body=rights.review(self._namespace))[1]
        except Denied as error:  # use will tell
            return [str(error)]
        needed, helpful = rights.missing(answer["status"], self._namespace)
        if needed:
            raise BackendError(" ".join(needed))
        return helpful

    def _ask_version(self) -> None:
        """Learn what is to be said of the cluster's version. Nobody waits for it: /readyz costs two calls."""
        try:
            self._of_version = _version_notes(self._api.call("GET", "/version")[1])
        except (Denied, Refused):  # 403, which stays so
            self._of_version = []
        except PmanError as error:  # the next look asks again
            log.debug("the version of Kubernetes cannot be read: %s", error)
        for note in self._of_version or []:
            self._say_once(note)


_PROBE = {
    "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pman-probe"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "job", "image": "none"}]}}},
}  # fmt: skip


def live(settings: Settings, spec: Spec) -> Iterator[Problem]:
    """What the API server has against a Job and against its pods, by a dry run of the server."""
    api, job = Api(connect), json.loads(json.dumps(documents.parsed(spec)))
    spec_of_pod = job["spec"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pman-probe"}, "spec": spec_of_pod}
    jobs = f"/apis/batch/v1/namespaces/{settings.job_namespace}/jobs"
    for what, path, body in (("Job", jobs, job), ("pod", f"/api/v1/namespaces/{settings.job_namespace}/pods", pod)):
        try:
            api.call("POST", path, {"dryRun": "All", "fieldValidation": "Strict"}, body, allow=(409,))
        except Denied as error:
            said = f"the pods of a job could not be tried, so that quotas and classes were not asked about: {error}"
            yield Problem(said if what == "pod" else str(error), rule="not-asked" if what == "pod" else "live")
        except (BackendError, BadRequest, Refused) as error:
            refusal = str(error).replace("refuses the job", f"refuses this {what}")
            yield Problem(refusal, line_named(spec.text, refusal), rule="live")
    said = "Kubernetes was not asked whether images, claims and secrets exist, and whether a node fits"
    yield Problem(said, rule="not-asked")


def create(settings: Settings) -> KubernetesBackend:
    """The backend over the cluster that pman runs in, else over KUBECONFIG."""
    return KubernetesBackend(Api(connect), settings)


def job_state(status: Mapping[str, Any]) -> JobState | None:
    """The state that a Job's status stands for by STATES; None where its pods have to be asked."""
    conditions = _held(status)
    counters = _counters(status)
    if unknown := conditions - set(_CONDITIONS):
        log.warning("unknown conditions of a Job: %s", ", ".join(sorted(unknown)))
        if not conditions & set(_CONDITIONS) and not counters:
            return JobState.UNDEFINED
    return next(STATES[name] for name in STATES if name in conditions or name in counters or not name)


def _held(status: Mapping[str, Any]) -> set[str]:
    return {condition["type"] for condition in status.get("conditions", []) if condition["status"] == "True"}


def _counters(status: Mapping[str, Any]) -> set[str]:
    return {name for name in STATES.keys() - set(_CONDITIONS) if _counted(status.get(name))}


def _lacks_pods(job: Object, pods: Sequence[Object]) -> bool:
    """Whether there are fewer pods than workers, beside those that somebody removed after they had succeeded."""
    ended = sum(pod["status"].get("phase") == "Succeeded" for pod in pods)
    removed = max(0, job["status"].get("succeeded", 0) - ended)
    spec = job["spec"]
    return bool(len(pods) + removed < min(spec.get("completions", 1), spec.get("parallelism", 1)))


def pods_state(job: Object, pods: Sequence[Object]) -> JobState:
    """Whether anything of the job has run: what is said of pods that are gone is that they may have."""
    if any(map(_begun, pods)):
        return JobState.STARTED
    status = job["status"]
    uncounted = status.get("uncountedTerminatedPods") or {}
    ended = sum(status.get(name, 0) for name in ("succeeded", "failed", "terminating")) + sum(
        map(len, uncounted.values())
    )
    never_ran = NEVER_RAN in job["metadata"].get("annotations", {})
    return JobState.STARTED if ended > len(pods) and not never_ran else JobState.NOT_STARTED


def _begun(pod: Object) -> bool:
    phase = POD_STATES.get(pod["status"].get("phase", "Pending"), JobState.UNDEFINED)
    return objects.ran(pod) or (phase is not JobState.NOT_STARTED and pod["status"]["phase"] != "Failed")


def _counted(value: object) -> bool:
    return any(value.values()) if isinstance(value, dict) else bool(value)


def _body(job: Job, spec: Spec) -> bytes:
    """The spec as JSON. Raises TemplateError where it is no Job that can be found again under its jid."""
    document = documents.load(job, spec, IDENTITY)
    body = json.dumps(document).encode()
    if len(body) > MAX_BODY_BYTES:
        raise TooLarge(f"The job is too large for Kubernetes: {len(body)} bytes, of which it takes {MAX_BODY_BYTES}.")
    return body


def _jid(job: Object) -> str:
    """The jid of a Job that pman made, or pman 6; "" where it is somebody else's."""
    return _annotation(job, JID) or (str(job["metadata"]["name"]) if older.is_job(job) else "")


def _is_deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"] or bool(_annotation(job, DELETED))


def _check_same(existing: Object, job: Job) -> None:
    if _jid(existing) != job.jid:
        raise Conflict(f"The name {job.name} is taken in the namespace by a job that is not pman's; use another jid.")
    digest = _annotation(existing, DIGEST)
    if digest != job.digest if digest else not older.is_same(existing, job):
        raise jid_taken(job.jid)


def _annotation(job: Object, name: str) -> str:
    return str(job["metadata"].get("annotations", {}).get(name, ""))


def _container(job: Object) -> Object:
    containers: list[Object] = job["spec"]["template"]["spec"]["containers"]
    return next((container for container in containers if container["name"] == objects.MAIN), containers[0])


def _ended(job: Object, state: JobState, pods: Sequence[Object], events: starts.Events = lambda _: ()) -> JobStatus:
    """A final state and what is to be said of it."""
    message = ends.failure(job, pods, events) if state is JobState.FAILED else ends.flaw(job, pods)
    return _status(job, with_memory(state, ends.out_of_memory(pods)), message, pods)


def _status(job: Object, state: JobState, message: str = "", pods: Sequence[Object] = ()) -> JobStatus:
    container = _container(job)
    argv = [*container.get("command", []), *container.get("args", [])]
    escaped = bool(_annotation(job, JID))  # by the template, not by pman 6
    return JobStatus(
        jid=_jid(job),
        image=_annotation(job, known.IMAGE) or container["image"],
        cmd=shlex.join(word.replace("$$", "$") if escaped else word for word in argv),
        state=state,
        message=message,
        finished_at=objects.finished_at(job["status"]) if state.final else None,
        private=_Found(job, tuple(pods)),
        posted_at=objects.time(job["metadata"].get("creationTimestamp")),
        user=_annotation(job, known.USER) or None,
    )


class _Packed(NamedTuple):
    """A Job of a listing, as little as it can be while other pages are read."""

    created: str
    uid: str
    needs_pods: bool
    text: bytes

    @classmethod
    def of(cls, job: Object) -> Self:
        metadata, state = job["metadata"], job_state(job["status"])
        needs_pods = state not in (JobState.NOT_STARTED, JobState.STARTED)
        return cls(str(metadata["creationTimestamp"]), metadata["uid"], needs_pods, _packed(job))


def _packed(thing: Object) -> bytes:
    """A Job or pod as JSON, without what no listing shows: thousands of them would take hundreds of MiB."""
    thing["metadata"].pop("managedFields", None)
    if template := thing["spec"].get("template"):
        kept = template["spec"] = {name: template["spec"].get(name) for name in ("containers", "activeDeadlineSeconds")}
        kept["containers"] = [{name: c[name] for name in _SHOWN if name in c} for c in kept["containers"]]
    else:
        thing["spec"] = {}
    return json.dumps(thing).encode()


_SHOWN = ("name", "image", "command", "args", "resources", "volumeMounts")  # of a container


def _listed(job: Object, pods: list[Object]) -> JobStatus:
    state = job_state(job["status"])
    found = objects.in_order(pods, job)
    status = _ended(job, state, found) if state and state.final else _status(job, state or pods_state(job, found))
    return replace(status, private=None)  # no listing needs it, and it is large


def _version_notes(version: Object) -> list[str]:
    minor = re.match(r"[0-9]+", str(version.get("minor")))  # some providers write `31+`
    if minor is None or int(minor[0]) >= OLDEST_MINOR:
        return []
    return [
        f"Kubernetes {version.get('gitVersion')} is older than 1.{OLDEST_MINOR}: it calls a job of several workers "
        "failed while some of them still write output."
    ]
