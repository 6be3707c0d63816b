"""Kubernetes: a job is one batch/v1 Job in JOB_NAMESPACE, and that object is all that is kept of it.

Identity: the object is named after the jid (`job.name`), its annotations hold the jid itself and the digest of the
request. What is submitted is the rendered template, parsed and otherwise as it is, with fieldValidation=Strict.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import json
import logging
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pman.backends import documents, logs, retry
from pman.backends.kubernetes import reasons as reasons
from pman.backends.kubernetes.api import Api, Object, connect
from pman.backends.kubernetes.podlogs import Reader
from pman.errors import BackendError, BadRequest, Conflict, Refused, TooLarge, jid_taken, no_such_job
from pman.job import Job, backend_name
from pman.settings import Settings
from pman.status import JobState, JobStatus, merge
from pman.templating.render import Spec

log = logging.getLogger(__name__)

# Conditions that are True and counters above zero of a Job's status -> the state; the first row that holds counts.
# https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/#JobStatus lists them.
STATES: Mapping[str, JobState | None] = {
    "Complete": JobState.SUCCEEDED,
    "Failed": JobState.FAILED,
    "SuccessCriteriaMet": JobState.STARTED,  # all pods ended, they are still being counted
    "FailureTarget": JobState.STARTED,  # other pods are still being killed and may write until then
    "Suspended": JobState.NOT_STARTED,
    "ready": JobState.STARTED,
    "succeeded": JobState.STARTED,  # of several workers some
    "failed": JobState.STARTED,  # and will be tried again, or the condition is about to come
    "uncountedTerminatedPods": JobState.STARTED,
    "terminating": JobState.STARTED,
    "active": None,  # not ready yet or not any more: the pods say which
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

# What deploy/kubernetes/rbac.yaml grants: verb, API group, resource, subresource.
RIGHTS = (
    ("create", "batch", "jobs", ""),
    ("get", "batch", "jobs", ""),
    ("list", "batch", "jobs", ""),
    ("patch", "batch", "jobs", ""),
    ("delete", "batch", "jobs", ""),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
    ("list", "", "events", ""),
)
JID, DIGEST = "org.chrisproject.pman.jid", "org.chrisproject.pman.digest"
OURS = "app.kubernetes.io/managed-by=pman"
# etcd refuses requests above 1.5 MiB, and says so misleadingly (422 "selector not auto-generated", measured).
MAX_BODY_BYTES = 1_500_000
REPLACE_SECONDS = 40.0  # how long a POST waits for the pods of a deleted job with the same jid to end
POLL_SECONDS = 0.25
PAGE = 500  # objects of a listing in one answer
MOST_SEEN = 10_000  # jobs


@dataclass(frozen=True, slots=True)
class _Found:
    """What status() has read: the Job, and its pods where they were needed."""

    job: Object
    pods: tuple[Object, ...] | None


class KubernetesBackend:
    """Jobs of one namespace. All state is the cluster's; any number of pman processes may share it."""

    def __init__(self, api: Api, settings: Settings) -> None:
        self._api = api
        self._namespace = settings.job_namespace
        self._core = f"/api/v1/namespaces/{self._namespace}"
        self._jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        self._patience = timedelta(minutes=settings.stuck_job_patience_minutes)
        self._max_log_bytes = settings.job_logs_max_kib * 1024
        self._seen: dict[str, dict[str, str]] = {}  # jid -> what names its Job just as the last GET found it

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        body = _body(job, spec)
        deadline = time.monotonic() + REPLACE_SECONDS
        while True:
            code, created = self._api.call("POST", self._jobs, {"fieldValidation": "Strict"}, body, allow=(409,))
            if code != 409:
                return _status(created, JobState.NOT_STARTED)
            existing = self._read(job.name)
            if existing and "deletionTimestamp" not in existing["metadata"]:
                _check_same(existing, job)
                return self._status(existing)
            if time.monotonic() > deadline:
                raise Conflict(
                    f"The deleted job with jid {job.jid} has pods that do not end, perhaps on a node that does not "
                    "answer; try again when they are gone."
                )
            time.sleep(POLL_SECONDS)

    def status(self, jid: str) -> JobStatus:
        job = self._find(jid)
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[jid] = {name: job["metadata"][name] for name in ("uid", "resourceVersion")}
        return self._status(job)

    def _read(self, name: str) -> Object | None:
        code, job = self._api.call("GET", f"{self._jobs}/{name}", allow=(404,))
        return None if code == 404 else job

    def _find(self, jid: str) -> Object:
        job = self._read(backend_name(jid))
        if job is None or _annotation(job, JID) != jid or "deletionTimestamp" in job["metadata"]:
            raise no_such_job(jid)
        return job

    def _status(self, job: Object) -> JobStatus:
        state = job_state(job["status"])
        if state is JobState.SUCCEEDED:
            return _status(job, state)
        pods = self._pods(job)
        if state is JobState.FAILED:
            return _status(job, state, reasons.failure(job, pods), pods)
        message = reasons.node_silent(pods) or self._waits(job, pods)
        return _status(job, state or pods_state(pods), message, pods)

    def _pods(self, job: Object) -> tuple[Object, ...]:
        """The pods of this very object, in index order; of those that tried one index the newest."""
        selector = f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"
        found = self._api.call("GET", f"{self._core}/pods", {"labelSelector": selector})[1]["items"]
        return reasons.in_order(found, _is_indexed(job))

    def _waits(self, job: Object, pods: Sequence[Object]) -> str:
        """Why workers do not start, or "". A job that cannot run whole is ended when patience with that is over."""
        conditions = _held(job["status"])
        if "Suspended" in conditions:
            return "The job is suspended."
        if conditions or not job["status"].get("startTime"):  # ending already; not looked at yet
            return ""
        ahead = [pod for pod in pods if not _begun(pod) and "deletionTimestamp" not in pod["metadata"]]
        reason = reasons.waiting(job, ahead, _lacks_pods(job, pods), functools.cache(self._events))
        if not reason.can_heal and reason.lasted is not None and reason.lasted >= self._patience:
            self._give_up(job, reason.sentence)
        return reason.sentence

    def _events(self, uid: str) -> list[Object]:
        found = self._api.call("GET", f"{self._core}/events", {"fieldSelector": f"involvedObject.uid={uid}"})[1]
        return list(found["items"])

    def _give_up(self, job: Object, sentence: str) -> None:
        """Have Kubernetes fail the job: its condition Failed makes it final, for every pman alike.

        A deadline that has passed does it. It ends workers that run, and takes their logs away, as when one of them
        fails. Nothing happens when the job has changed since it was read, or when a policy of the cluster forbids it.
        """
        metadata = {"annotations": {reasons.GAVE_UP: sentence}, "resourceVersion": job["metadata"]["resourceVersion"]}
        patch = {"metadata": metadata, "spec": {"activeDeadlineSeconds": 1}}
        with contextlib.suppress(Refused, BadRequest):
            self._api.call("PATCH", f"{self._jobs}/{job['metadata']['name']}", body=patch, allow=(404, 409))

    def logs(self, status: JobStatus, max_lines: int) -> str:
        found = status.private
        assert isinstance(found, _Found)
        if status.state is JobState.NOT_STARTED or max_lines <= 0:
            return ""
        pods = self._pods(found.job) if found.pods is None else found.pods
        share = max(1, max_lines // max(1, len(pods)))
        reader = Reader(self._api, f"{self._core}/pods", _container(found.job)["name"], share)

        def read(pod: Object, share_bytes: int, seconds: float) -> str:
            return reader.read(pod, share_bytes, seconds) if _begun(pod) else ""

        several = _is_indexed(found.job) and found.job["spec"].get("completions", 1) > 1
        numbers = [reasons.index(pod) for pod in pods] if several else None
        return logs.of_workers(read, pods, max_lines, self._max_log_bytes, numbers=numbers)

    def delete(self, jid: str) -> None:
        """Ends the pods too: Kubernetes keeps the Job until they are gone, so that a new one never runs beside them.

        One call where the Job is still as the last GET found it, else it is read first: to touch no other, and to say
        NotFound of one that is ending already.
        """
        seen = self._seen.pop(jid, None)
        if not (seen and self._end(jid, seen)):
            self._end(jid, {"uid": self._find(jid)["metadata"]["uid"]})

    def _end(self, jid: str, preconditions: dict[str, str]) -> bool:
        """Whether this deleted the Job that the preconditions name.

        When no answer comes, it may have been done: what is repeated goes to the same object whatever became of it.
        """
        path = f"{self._jobs}/{backend_name(jid)}"
        each = itertools.chain([preconditions], itertools.repeat({"uid": preconditions["uid"]}))

        def attempt() -> bool:
            wanted = next(each)
            options = {"propagationPolicy": "Foreground", "preconditions": wanted}
            code, _ = self._api.call("DELETE", path, body=options, allow=(404, 409))
            return code < 400 or "resourceVersion" not in wanted

        return retry.call_last(attempt)  # since a second look could find the Job ending, and call it NotFound

    def jobs(self, limit: int) -> list[JobStatus]:
        ours: list[Object] = []
        for page in self._pages(self._jobs):
            more = [job for job in page if _annotation(job, JID) and "deletionTimestamp" not in job["metadata"]]
            ours = heapq.nlargest(limit, ours + more, key=lambda job: str(job["metadata"]["creationTimestamp"]))
        unclear = (job["metadata"]["uid"] for job in ours if job_state(job["status"]) in (None, JobState.FAILED))
        pods: dict[str, list[Object]] = {uid: [] for uid in unclear}
        for page in self._pages(f"{self._core}/pods") if pods else ():
            for pod in page:
                owner = pod["metadata"]["labels"].get("batch.kubernetes.io/controller-uid")
                if owner in pods:
                    pods[owner].append(pod)
        return [_listed(job, pods.get(job["metadata"]["uid"], [])) for job in ours]

    def _pages(self, path: str) -> Iterator[list[Object]]:
        """All of pman's objects of a kind, by name, in pieces of bounded size."""
        query = {"labelSelector": OURS, "limit": str(PAGE)}
        while True:
            found = self._api.call("GET", path, query)[1]
            yield found["items"]
            if not (token := found["metadata"].get("continue")):
                return
            query["continue"] = token

    def ping(self) -> None:
        missing = [right for right in RIGHTS if not self._may(*right)]
        if missing:
            raise BackendError(" ".join(_missing(*right, self._namespace) for right in missing))
        with contextlib.suppress(Refused, BadRequest):  # quota or policy: the job is refused, not pman
            # A namespace that does not exist shows in nothing but this.
            self._api.call("POST", self._jobs, {"dryRun": "All"}, _PROBE)

    def _may(self, verb: str, group: str, resource: str, subresource: str) -> bool:
        attributes = {"namespace": self._namespace, "verb": verb, "group": group, "resource": resource}
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes | {"subresource": subresource}},
        }  # fmt: skip
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self._api.call("POST", path, body=review)[1]["status"]["allowed"])


_PROBE = {
    "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pman-probe"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "job", "image": "none"}]}}},
}  # fmt: skip


def create(settings: Settings) -> KubernetesBackend:
    """The backend over the cluster that pman runs in, else over KUBECONFIG."""
    return KubernetesBackend(Api(connect), settings)


def job_state(status: Mapping[str, Any]) -> JobState | None:
    """The state that a Job's status stands for by STATES; None where its pods have to be asked."""
    conditions = _held(status)
    counters = {name for name in STATES.keys() - set(_CONDITIONS) if _counted(status.get(name))}
    if unknown := conditions - set(_CONDITIONS):
        log.warning("unknown conditions of a Job: %s", ", ".join(sorted(unknown)))
        if not conditions & set(_CONDITIONS) and not counters:
            return JobState.UNDEFINED
    return next(STATES[name] for name in STATES if name in conditions or name in counters or not name)


def _held(status: Mapping[str, Any]) -> set[str]:
    return {condition["type"] for condition in status.get("conditions", []) if condition["status"] == "True"}


def _is_indexed(job: Object) -> bool:
    return bool(job["spec"].get("completionMode") == "Indexed")


def _lacks_pods(job: Object, pods: Sequence[Object]) -> bool:
    """Whether there are fewer pods than workers, beside those that somebody removed after they had succeeded."""
    ended = sum(pod["status"].get("phase") == "Succeeded" for pod in pods)
    removed = max(0, job["status"].get("succeeded", 0) - ended)
    spec = job["spec"]
    return bool(len(pods) + removed < min(spec.get("completions", 1), spec.get("parallelism", 1)))


def pods_state(pods: Iterable[Mapping[str, Any]]) -> JobState:
    """Whether any of the pods has begun."""
    return merge(JobState.STARTED if _begun(pod) else JobState.NOT_STARTED for pod in pods)


def _begun(pod: Mapping[str, Any]) -> bool:
    status = pod["status"]
    states = [container.get("state", {}) for container in status.get("containerStatuses", [])]
    ran = any("running" in state or "terminated" in state for state in states)
    return ran or POD_STATES.get(status.get("phase", "Pending"), JobState.UNDEFINED) is not JobState.NOT_STARTED


def _counted(value: object) -> bool:
    return any(value.values()) if isinstance(value, dict) else bool(value)


def _body(job: Job, spec: Spec) -> bytes:
    """The spec as JSON. Raises TemplateError where it is no Job that can be found again under its jid."""

    def identity(document: Any) -> tuple[str, str, str]:
        metadata = document["metadata"]
        return metadata["name"], metadata["annotations"][JID], metadata["annotations"][DIGEST]

    document = documents.load(job, spec, identity, f"metadata.name and the annotations {JID} and {DIGEST}")
    body = json.dumps(document).encode()
    if len(body) > MAX_BODY_BYTES:
        raise TooLarge(f"The job is too large for Kubernetes: {len(body)} bytes, of which it takes {MAX_BODY_BYTES}.")
    return body


def _check_same(existing: Object, job: Job) -> None:
    if _annotation(existing, JID) != job.jid:
        raise Conflict(f"The name {job.name} is taken in the namespace by a job that is not pman's; use another jid.")
    if _annotation(existing, DIGEST) != job.digest:
        raise jid_taken(job.jid)


def _annotation(job: Object, name: str) -> str:
    return str(job["metadata"].get("annotations", {}).get(name, ""))


def _container(job: Object) -> Object:
    containers: list[Object] = job["spec"]["template"]["spec"]["containers"]
    return next((container for container in containers if container["name"] == "job"), containers[0])


def _status(job: Object, state: JobState, message: str = "", pods: tuple[Object, ...] | None = None) -> JobStatus:
    container = _container(job)
    argv = [word.replace("$$", "$") for word in [*container.get("command", []), *container.get("args", [])]]
    return JobStatus(
        jid=_annotation(job, JID),
        image=container["image"],
        cmd=shlex.join(argv),
        state=state,
        message=message,
        finished_at=reasons.finished_at(job["status"]) if state.final else None,
        private=_Found(job, pods),
        posted_at=reasons.time(job["metadata"].get("creationTimestamp")),
    )


def _listed(job: Object, pods: list[Object]) -> JobStatus:
    state = job_state(job["status"])
    message = reasons.failure(job, pods) if state is JobState.FAILED else ""
    return _status(job, state or pods_state(pods), message)


def _missing(verb: str, group: str, resource: str, subresource: str, namespace: str) -> str:
    what = f"{resource}/{subresource}" if subresource else f"{resource}.{group}" if group else resource
    return f"pman lacks the right to {verb} {what} in the namespace {namespace}: see deploy/kubernetes/rbac.yaml."
