"""Why a Kubernetes job waits or failed, in one sentence for its user, from what pods and events say.

Pure functions over decoded JSON of the API (https://kubernetes.io/docs/reference/kubernetes-api/); the forms of the
messages were recorded on 1.35.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from pman.status import explain_exit

Object = Mapping[str, Any]
Events = Callable[[str], Sequence[Object]]  # uid of an object -> its events

INDEX = "batch.kubernetes.io/job-completion-index"
GAVE_UP = "org.chrisproject.pman.gave-up"  # annotation: the sentence for which pman ended the job
LOOKED_AT = 16  # pods that have not begun and whose events may be read, each a call, in one GET

# What registries, kubelet and runtimes say of something that is not there, or that pman's jobs may not have.
_ANYTHING = re.compile("")
_FINAL_PULL = re.compile(r"not found|manifest unknown|denied|unauthorized|no match for platform", re.IGNORECASE)
_UNSIGNED = re.compile("signature", re.IGNORECASE)
_FINAL_MOUNT = re.compile(r"hostPath type check failed|no such file or directory|not found", re.IGNORECASE)
_FINAL_START = re.compile(r"no such file or directory|not found in \$PATH|no command specified", re.IGNORECASE)
# Reason of a waiting container -> sentence, and the messages with which it cannot heal without a new job. kubelet's own
# list: https://github.com/kubernetes/kubernetes/blob/v1.35.4/pkg/kubelet/images/types.go, .../kuberuntime_container.go
WAITING: Mapping[str, tuple[str, re.Pattern[str]]] = {
    "InvalidImageName": ("The image {image} has no valid name: {message}", _ANYTHING),
    "ErrImageNeverPull": ("The image {image} is not on the node and may not be pulled", _ANYTHING),
    "ErrImagePull": ("The image {image} cannot be pulled: {message}", _FINAL_PULL),
    "ImagePullBackOff": ("The image {image} cannot be pulled: {message}", _FINAL_PULL),
    "ImageInspectError": ("The image {image} cannot be read: {message}", _FINAL_PULL),
    "RegistryUnavailable": ("The registry of the image {image} does not answer: {message}", _FINAL_PULL),
    "SignatureValidationFailed": ("The image {image} has no valid signature: {message}", _UNSIGNED),
    "CreateContainerConfigError": ("The container cannot be configured: {message}", _ANYTHING),
    "CreateContainerError": ("The container cannot be made: {message}", _FINAL_START),
    "RunContainerError": ("The container cannot be run: {message}", _FINAL_START),
}
_TROUBLE = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
_LOST_CLAIM = re.compile(r"persistentvolumeclaim.* not found")
_COMBINED = "(combined from similar events): "  # client-go's record.EventAggregator, from the tenth text on
# How the API server refuses a pod for good: built-in admission, validation, a webhook. Whatever else it says may pass.
_REFUSED = re.compile(
    r'^Error creating: (?:pods "[^"]*" is forbidden: |Pod "[^"]*" is invalid: |(?=admission webhook "[^"]*" denied ))'
)
_QUOTA = re.compile(r"exceeded quota: \S+ requested: (\S+), used: \S+, limited: (\S+)")
_QUANTITY = re.compile(r"([0-9.]+)(n|u|m|k|[KMGTPE]i?)?")
_SUFFIX = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15"}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job does not start. lasted: since this cause was first seen, None where that is not known."""

    sentence: str
    can_heal: bool = True
    lasted: timedelta | None = None


def waiting(job: Object, pods: Sequence[Object], lacking: bool, events: Events) -> Reason:
    """Why `pods`, which have not begun, have not; an empty sentence where nothing is wrong (yet).

    lacking: the job has fewer pods than workers, so its own events may say why.
    """
    if lacking and (reason := _no_pod(events(job["metadata"]["uid"]))).sentence:
        return reason
    for pod in pods[:LOOKED_AT]:
        reason = _pod_waits(pod, events)
        if reason.sentence:
            one_of_several = len(pods) < job["spec"].get("completions", 1)
            return replace(reason, sentence=f"Worker {index(pod)}: {reason.sentence}") if one_of_several else reason
    return Reason("")


def _no_pod(events: Sequence[Object]) -> Reason:
    refusals = [event for event in events if event.get("reason") == "FailedCreate"]
    if not refusals:
        return Reason("")
    said = _message(max(refusals, key=_last_seen))
    cause = _REFUSED.sub("", said).removeprefix("Error creating: ")
    sentence = one_sentence(f"Kubernetes refuses the job's pod: {cause}")
    return Reason(sentence, not _refused_for_good(said), _lasted(refusals, _refused_for_good))


def _refused_for_good(said: str) -> bool:
    """Whether no later attempt can do better; a quota that other pods have used up will."""
    if not _REFUSED.match(said):
        return False
    match = _QUOTA.search(said)
    if not match:
        return True
    requested, limited = (dict(part.split("=", 1) for part in text.split(",")) for text in match.groups())
    return any(quantity(requested[name]) > quantity(limited.get(name, "0")) for name in requested)


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
        return _unscheduled(pod, scheduled, events)
    for status in _containers(pod):
        wait = status.get("state", {}).get("waiting", {})
        if wait.get("reason") in WAITING:
            return _container_waits(pod, status, wait, events)
    # Events outlive what they tell of by an hour; once this condition holds, the volumes are mounted.
    ready = conditions.get("PodReadyToStartContainers", {}).get("status") == "True"
    return Reason("") if ready or not scheduled else _pod_trouble(events(pod["metadata"]["uid"]))


def _unscheduled(pod: Object, condition: Object, events: Events) -> Reason:
    if condition.get("reason") == "SchedulingGated":
        return Reason("The job is held back by a scheduling gate of the cluster.")
    said = condition.get("message", "").split(" preemption: ")[0].split(". no new claims")[0]
    sentence = one_sentence(f"No node can take the job yet: {said}")
    if not _LOST_CLAIM.search(said):
        return Reason(sentence)
    return _until_now(sentence, events(pod["metadata"]["uid"]), lambda text: bool(_LOST_CLAIM.search(text)))


def _container_waits(pod: Object, status: Object, wait: Object, events: Events) -> Reason:
    form, final = WAITING[wait["reason"]]
    message = wait.get("message", "")
    if wait["reason"] == "ImagePullBackOff" and ": " not in message:  # before 1.32 the cause is in the event alone
        said = [_message(event) for event in events(pod["metadata"]["uid"]) if event.get("reason") == "Failed"]
        message = next((text for text in reversed(said) if text.startswith("Failed to pull")), message)
    spec = [*pod.get("spec", {}).get("containers", []), *pod.get("spec", {}).get("initContainers", [])]
    image = next((c["image"] for c in spec if c["name"] == status.get("name")), status.get("image", ""))
    cause = message.rsplit("failed to resolve reference ", 1)[-1].removeprefix("failed to do request: ")
    sentence = one_sentence(form.format(image=image, message=cause))
    if not final.search(message):
        return Reason(sentence)
    same = (message or wait["reason"])[:200]

    def of_this_cause(text: str) -> bool:  # of a pull, what is said may differ from one attempt to the next
        pull = final is _FINAL_PULL and text.startswith("Failed to pull")
        return same in text or (pull and bool(final.search(text)))

    return _until_now(sentence, events(pod["metadata"]["uid"]), of_this_cause)


def _pod_trouble(events: Sequence[Object]) -> Reason:
    warnings = [e for e in events if e.get("type") == "Warning" and e.get("reason") in _TROUBLE]
    if not warnings:
        return Reason("")
    last = max(warnings, key=_last_seen)
    if last["reason"] == "FailedCreatePodSandBox":
        return Reason(one_sentence(f"The pod cannot be set up: {_message(last)}"))
    sentence = one_sentence(f"A directory of the job cannot be mounted: {_message(last)}")
    same = [event for event in warnings if event["reason"] == last["reason"]]
    can_heal = not _FINAL_MOUNT.search(_message(last))
    return Reason(sentence, can_heal, _lasted(same, lambda text: bool(_FINAL_MOUNT.search(text))))


def _until_now(sentence: str, events: Sequence[Object], final: Callable[[str], bool]) -> Reason:
    """A reason that cannot heal and holds now: only its beginning has to be looked up."""
    began = _began([event for event in events if event.get("type") == "Warning"], final)
    return Reason(sentence, can_heal=False, lasted=datetime.now(UTC) - began if began else None)


def _lasted(events: Sequence[Object], final: Callable[[str], bool]) -> timedelta | None:
    """From the first to the last time that a cause which cannot heal was seen: that it holds, only the events tell."""
    began = _began(events, final)
    ended = max((_last_seen(event) for event in events if final(_message(event))), default=None)
    return ended - began if began and ended else None


def _began(events: Sequence[Object], final: Callable[[str], bool]) -> datetime | None:
    """When a cause which cannot heal was first seen. A combined event's first time may be another cause's."""
    single = [event for event in events if not event.get("message", "").startswith(_COMBINED)] or events
    times = (time(e.get("firstTimestamp") or e.get("eventTime")) for e in single if final(_message(e)))
    return min((moment for moment in times if moment), default=None)


def _message(event: Object) -> str:
    return str(event.get("message", "")).removeprefix(_COMBINED)


def _last_seen(event: Object) -> datetime:
    series = (event.get("series") or {}).get("lastObservedTime")
    return time(event.get("lastTimestamp") or series or event.get("eventTime") or event.get("firstTimestamp")) or _NEVER


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
    return explain_exit(code, worker)


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


def one_sentence(text: str) -> str:
    """On one line, ended by a full stop, at most 1,000 characters."""
    return " ".join(text.split())[:999].rstrip(" .:;,") + "."


def _containers(pod: Object) -> Iterator[Object]:
    status = pod["status"]
    yield from [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(pod: Object) -> datetime | None:
    times = [time(c.get("state", {}).get("terminated", {}).get("finishedAt")) for c in _containers(pod)]
    return min((moment for moment in times if moment), default=None)
