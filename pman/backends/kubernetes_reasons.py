"""Why a Kubernetes job waits or failed, in one sentence for its user, from what pods and events say.

Pure functions over decoded JSON of the API (https://kubernetes.io/docs/reference/kubernetes-api/); the forms of the
messages were recorded on 1.35.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

Object = Mapping[str, Any]
Events = Callable[[str], Sequence[Object]]  # uid of an object -> its events

INDEX = "batch.kubernetes.io/job-completion-index"
GAVE_UP = "org.chrisproject.pman.gave-up"  # annotation: the sentence for which pman ended the job

# Reason of a waiting container -> sentence, and whether it may heal without a new job. kubelet's own list:
# https://github.com/kubernetes/kubernetes/blob/v1.35.4/pkg/kubelet/images/types.go, .../kuberuntime_container.go
WAITING: Mapping[str, tuple[str, bool]] = {
    "InvalidImageName": ("The image {image} has no valid name: {message}", False),
    "ErrImageNeverPull": ("The image {image} is not on the node and may not be pulled", False),
    "ErrImagePull": ("The image {image} cannot be pulled: {message}", True),
    "ImagePullBackOff": ("The image {image} cannot be pulled: {message}", True),
    "ImageInspectError": ("The image {image} cannot be read: {message}", True),
    "RegistryUnavailable": ("The registry of the image {image} does not answer: {message}", True),
    "SignatureValidationFailed": ("The image {image} has no valid signature: {message}", False),
    "CreateContainerConfigError": ("The container cannot be configured: {message}", False),
    "CreateContainerError": ("The container cannot be made: {message}", False),
    "RunContainerError": ("The container cannot be run: {message}", False),
}
# What registries and kubelet say of something that is not there, or that pman's jobs may not have.
_FINAL_PULL = re.compile(r"not found|manifest unknown|denied|unauthorized|no match for platform", re.IGNORECASE)
_FINAL_MOUNT = re.compile(r"hostPath type check failed|no such file or directory|not found", re.IGNORECASE)
_TROUBLE = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
_FORBIDDEN = re.compile(r'Error creating: pods "[^"]*" is forbidden: ')
_QUOTA = re.compile(r"exceeded quota: \S+ requested: (\S+), used: \S+, limited: (\S+)")
_QUANTITY = re.compile(r"([0-9.]+)(n|u|m|k|[KMGTPE]i?)?")
_SUFFIX = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15"}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job does not start. since: when that began, None where that is not known."""

    sentence: str
    can_heal: bool = True
    since: datetime | None = None


def waiting(job: Object, pods: Sequence[Object], events: Events) -> Reason:
    """Why no pod of the job has begun; an empty sentence where nothing is wrong (yet)."""
    if not pods:
        return _no_pod(events(job["metadata"]["uid"])) if job.get("status", {}).get("startTime") else Reason("")
    found = (_pod_waits(pod, events) for pod in pods)
    return next((reason for reason in found if reason.sentence), Reason(""))


def _no_pod(events: Sequence[Object]) -> Reason:
    refusals = [event for event in events if event.get("reason") == "FailedCreate"]
    if not refusals:
        return Reason("")
    said = max(refusals, key=lambda event: moment(event) or _NEVER).get("message", "")
    cause = _FORBIDDEN.sub("", said)
    can_heal = cause == said or _quota_can_fit(cause)
    return Reason(one_sentence(f"Kubernetes refuses the job's pod: {cause}"), can_heal, _first(refusals))


def _quota_can_fit(cause: str) -> bool:
    """Whether `exceeded quota` goes away when other pods end; any other refusal does not."""
    match = _QUOTA.search(cause)
    if not match:
        return False
    requested, limited = (dict(part.split("=", 1) for part in text.split(",")) for text in match.groups())
    return all(quantity(requested[name]) <= quantity(limited.get(name, "0")) for name in requested)


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity (`100m`, `64Mi`, `2`) as a number; infinity for what is none."""
    match = _QUANTITY.fullmatch(text)
    if not match:
        return Decimal("Infinity")
    suffix = match[2] or ""
    factor = Decimal(2) ** _BINARY[suffix] if suffix in _BINARY else Decimal(_SUFFIX.get(suffix, "1"))
    return Decimal(match[1]) * factor


def _pod_waits(pod: Object, events: Events) -> Reason:
    conditions = {condition["type"]: condition for condition in pod["status"].get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled)
    since = time(scheduled.get("lastTransitionTime"))
    for status in _containers(pod):
        wait = status.get("state", {}).get("waiting", {})
        if wait.get("reason") in WAITING:
            return _container_waits(pod, status, wait, events, since)
    return _pod_trouble(events(pod["metadata"]["uid"])) if scheduled else Reason("")


def _unscheduled(condition: Object) -> Reason:
    if condition.get("reason") == "SchedulingGated":
        return Reason("The job is held back by a scheduling gate of the cluster.")
    said = condition.get("message", "").split(" preemption: ")[0].split(". no new claims")[0]
    lost = "persistentvolumeclaim" in said and "not found" in said
    sentence = one_sentence(f"No node can take the job yet: {said}")
    return Reason(sentence, not lost, time(condition.get("lastTransitionTime")))


def _container_waits(pod: Object, status: Object, wait: Object, events: Events, since: datetime | None) -> Reason:
    form, can_heal = WAITING[wait["reason"]]
    message = wait.get("message", "")
    if wait["reason"] == "ImagePullBackOff" and ": " not in message:  # before 1.32 the cause is in the event alone
        said = [e.get("message", "") for e in events(pod["metadata"]["uid"]) if e.get("reason") == "Failed"]
        message = next((text for text in reversed(said) if text.startswith("Failed to pull")), message)
    spec = [*pod.get("spec", {}).get("containers", []), *pod.get("spec", {}).get("initContainers", [])]
    image = next((c["image"] for c in spec if c["name"] == status.get("name")), status.get("image", ""))
    cause = message.rsplit("failed to resolve reference ", 1)[-1].removeprefix("failed to do request: ")
    can_heal = can_heal and not _FINAL_PULL.search(message)
    return Reason(one_sentence(form.format(image=image, message=cause)), can_heal, since)


def _pod_trouble(events: Sequence[Object]) -> Reason:
    warnings = [e for e in events if e.get("type") == "Warning" and e.get("reason") in _TROUBLE]
    if not warnings:
        return Reason("")
    last = max(warnings, key=lambda event: moment(event) or _NEVER)
    said = last.get("message", "")
    mount = last["reason"] != "FailedCreatePodSandBox"
    what = "A directory of the job cannot be mounted" if mount else "The pod cannot be set up"
    can_heal = not (mount and _FINAL_MOUNT.search(said))
    same = [event for event in warnings if event["reason"] == last["reason"]]
    return Reason(one_sentence(f"{what}: {said}"), can_heal, _first(same))


def node_silent(pods: Iterable[Object]) -> str:
    """A sentence when the node of a running pod has stopped answering, else ""."""
    for pod in pods:
        conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
        running = pod["status"].get("phase") == "Running" and conditions.get("ContainersReady") == "True"
        if running and conditions.get("Ready") == "False":  # set alone, by the node controller
            return f"The node {pod.get('spec', {}).get('nodeName', '')} that runs the job does not answer."
    return ""


def failure(job: Object, pods: Sequence[Object]) -> str:
    """Why a job with the condition Failed failed. pods: those that are left, in index order."""
    if gave_up := job["metadata"].get("annotations", {}).get(GAVE_UP):
        return str(gave_up)
    failed = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
    if not failed:
        return _without_pod(job)
    pod = min(failed, key=lambda pod: _ended(pod) or datetime.now(UTC))
    worker = f"Worker {index(pod)}" if job["spec"].get("completions", 1) > 1 else "The job"
    return one_sentence(_pod_failed(job, pod, worker))


def _without_pod(job: Object) -> str:
    conditions = job["status"].get("conditions", [])
    condition: Object = next((c for c in conditions if c["type"] == "Failed"), {})
    if condition.get("reason") == "DeadlineExceeded":
        return "The job reached its time limit."
    if condition.get("reason") == "BackoffLimitExceeded":
        return "A pod of the job was deleted or lost, and its result with it."
    return one_sentence(f"Kubernetes ended the job: {condition.get('message') or condition.get('reason', '')}")


def _pod_failed(job: Object, pod: Object, worker: str) -> str:
    status = pod["status"]
    if status.get("reason") == "DeadlineExceeded":
        seconds = job["spec"]["template"]["spec"].get("activeDeadlineSeconds", 0)
        return f"The job reached its time limit of {seconds / 60:g} min"
    if status.get("reason"):  # Evicted, Preempting, NodeShutdown, OutOfmemory, UnexpectedAdmissionError ...
        return f"{worker} was ended by Kubernetes: {status['reason']}: {status.get('message', '')}"
    for container in _containers(pod):
        ended = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode"):
            return _container_failed(job, container["name"], ended, worker)
    return f"{worker} failed: {status.get('message', 'no reason is known')}"


def _container_failed(job: Object, name: str, ended: Object, worker: str) -> str:
    code, reason = ended["exitCode"], ended.get("reason")
    if reason == "OOMKilled":
        containers = job["spec"]["template"]["spec"]["containers"]
        found = (c.get("resources", {}).get("limits", {}).get("memory") for c in containers if c["name"] == name)
        limit = next(found, None) or "the node's"
        return f"{worker} ran out of memory: its limit is {limit}"
    if reason in ("StartError", "ContainerCannotRun"):
        return f"The program could not be started: {ended.get('message', '').rsplit('container process: ', 1)[-1]}"
    if code > 128:
        return f"{worker} was ended by signal {code - 128}"
    return f"{worker} ended with exit code {code}"


def index(pod: Object) -> int:
    """Completion index of a pod of an indexed job, else 0."""
    marks = {**pod["metadata"].get("annotations", {}), **pod["metadata"].get("labels", {})}
    return int(marks.get(INDEX, 0))


def in_order(pods: Iterable[dict[str, Any]], indexed: bool) -> tuple[dict[str, Any], ...]:
    """The pods by completion index and age; of an indexed job's only the newest of each index."""
    ordered = sorted(pods, key=lambda pod: (index(pod), str(pod["metadata"]["creationTimestamp"])))
    return tuple({index(pod): pod for pod in ordered}.values()) if indexed else tuple(ordered)


def finished_at(status: Object) -> datetime | None:
    """When a Job with this status ended."""
    conditions = (c for c in status.get("conditions", []) if c["type"] in ("Complete", "Failed"))
    return time(status.get("completionTime") or next((c["lastTransitionTime"] for c in conditions), None))


def time(text: str | None) -> datetime | None:
    """A time of the API, RFC 3339."""
    return datetime.fromisoformat(text) if text else None


def moment(event: Object) -> datetime | None:
    """When an event was last seen."""
    return time(event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp"))


def one_sentence(text: str) -> str:
    """On one line, ended by a full stop, at most 1,000 characters."""
    return " ".join(text.split())[:999].rstrip(" .:;,") + "."


_NEVER = datetime.min.replace(tzinfo=UTC)


def _first(events: Iterable[Object]) -> datetime | None:
    times = (time(event.get("firstTimestamp") or event.get("eventTime")) for event in events)
    return min((moment for moment in times if moment), default=None)


def _containers(pod: Object) -> Iterator[Object]:
    status = pod["status"]
    yield from [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(pod: Object) -> datetime | None:
    times = [time(c.get("state", {}).get("terminated", {}).get("finishedAt")) for c in _containers(pod)]
    return min((moment for moment in times if moment), default=None)
