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

from pman.status import explain_exit, explain_memory

Object = Mapping[str, Any]
Events = Callable[[str], Sequence[Object] | None]  # uid of an object -> its events; None: pman may not read them

INDEX = "batch.kubernetes.io/job-completion-index"
GAVE_UP = "org.chrisproject.pman.gave-up"  # annotation: the sentence for which pman ended the job
MAIN = "job"  # the container of the job's program; every other one serves it
LOOKED_AT = 16  # pods that have not begun and whose events may be read, each a call, in one GET

# What passes by itself, although it may use the words of what does not -> who says it. This is looked at first.
_PASSING: Mapping[str, str] = {
    # The node's part of a storage driver registers itself after a node or the driver has started.
    r"not found in the list of registered CSI drivers": "kubernetes/pkg/volume/csi/csi_client.go",
    # The controller that attaches volumes is behind, or the node may not see the attachment yet.
    r"volumeattachments?\b|no relationship found between node": "kubernetes/pkg/volume/csi/csi_attacher.go",
    # The socket of a storage driver or of a runtime that is being replaced.
    r"dial (?:unix|tcp)|connection refused|\.sock": "net.OpError of Go's package net",
    # A storage driver's own look for its volume, which may lag behind the volume's creation.
    r"rpc error: code = (?:NotFound|Unavailable|Aborted) desc = (?!failed to (?:pull|resolve)|.*manifest)": "CSI",
    r"failed to sync (?:secret|configmap) cache": "kubernetes/pkg/kubelet/util/manager/watch_based_manager.go",
    r"timed out waiting|i/o timeout|handshake timeout|context deadline exceeded|toomanyrequests": "Go, registries",
    # Layers of an image that the runtime is just removing or unpacking.
    r"(?:parent|extraction) snapshot|extract layer|content digest sha256": "containerd/core/unpack",
}
_PASSES = re.compile("|".join(_PASSING), re.IGNORECASE)
# What registries, kubelet and runtimes say of something that is not there, or that pman's jobs may not have.
_ANYTHING = re.compile("")
_FINAL_PULL = re.compile(r"not found|manifest unknown|denied|unauthorized|no match for platform", re.IGNORECASE)
_UNSIGNED = re.compile("signature", re.IGNORECASE)
# A directory, an export (mount.nfs of nfs-utils), or what a volume is made of (pkg/volume/secret and configmap).
_FINAL_MOUNT = re.compile(
    r"hostPath type check failed|no such file or directory|access denied by server while mounting"
    r'|(?:secret|configmap) "[^"]*" not found|references non-existent',
    re.IGNORECASE,
)
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
# Reasons of an end without a beginning: of the runtime, and of kubelet for a container that it does not find.
NEVER_RAN = ("StartError", "ContainerCannotRun")
_UNTOLD = "Why, its events tell, which pman lacks the right to list."
_SOON = timedelta(seconds=30)  # a wait that needs no word
_TROUBLE = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
_DISRUPTIONS: Mapping[str, str] = {
    "PreemptionByScheduler": "to make room for a pod of higher priority",
    "DeletionByTaintManager": "because its node was lost or closed to it by a taint",
    "EvictionByEvictionAPI": "because its node is being drained, or somebody evicted it",
    "DeletionByPodGC": "because its node is gone",
    "TerminationByKubelet": "because its node ran short of something or is shut down",
}
_LOST_CLAIM = re.compile(r"persistentvolumeclaim.* not found")
_COMBINED = "(combined from similar events): "  # client-go's record.EventAggregator, from the tenth text on
# How the API server refuses a pod for good: built-in admission, validation, a webhook. Whatever else it says may pass.
_REFUSED = re.compile(
    r'^Error creating: (?:pods "[^"]*" is forbidden: |Pod "[^"]*" is invalid: |(?=admission webhook "[^"]*" denied ))'
)
_QUOTA = re.compile(r"exceeded quota: \S+ requested: (\S+), used: \S+, limited: (\S+)")
_QUANTITY = re.compile(r"([0-9.]+)(n|u|m|k|[KMGTPE]i?)?")
_UNITS: Mapping[str, Decimal] = {
    **{unit: Decimal(10) ** power for unit, power in zip("num kMGTPE", range(-9, 19, 3), strict=True)},
    **{f"{unit}i": Decimal(2) ** power for unit, power in zip("KMGTPE", range(10, 70, 10), strict=True)},
}  # fmt: skip
_SEE = "see whether its output is complete."
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
    if lacking and (reason := _no_pod(job, events(job["metadata"]["uid"]))).sentence:
        return reason
    for pod in pods[:LOOKED_AT]:
        reason = _pod_waits(pod, events)
        if reason.sentence:
            one_of_several = len(pods) < job["spec"].get("completions", 1)
            return replace(reason, sentence=_of_worker(job, pod, reason.sentence)) if one_of_several else reason
    return Reason("")


def _no_pod(job: Object, events: Sequence[Object] | None) -> Reason:
    if events is None:
        began = time(job["status"].get("startTime"))
        soon = began is None or datetime.now(UTC) - began < _SOON
        return Reason("" if soon else f"Kubernetes makes no pod for the job, perhaps by a quota or a policy. {_UNTOLD}")
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
    return Decimal(match[1]) * _UNITS[match[2] or " "] if match else Decimal("Infinity")


def _pod_waits(pod: Object, events: Events) -> Reason:
    conditions = {condition["type"]: condition for condition in pod["status"].get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unscheduled(pod, scheduled, events)
    for status in containers(pod):
        wait = status.get("state", {}).get("waiting", {})
        if wait.get("reason") in WAITING:
            return _container_waits(pod, status, wait, events)
    # Events outlive what they tell of by an hour; once this condition holds, the volumes are mounted.
    ready = conditions.get("PodReadyToStartContainers", {}).get("status") == "True"
    return Reason("") if ready or not scheduled else _pod_trouble(pod, events(pod["metadata"]["uid"]))


def _unscheduled(pod: Object, condition: Object, events: Events) -> Reason:
    if condition.get("reason") == "SchedulingGated":
        return Reason("The job is held back by a scheduling gate of the cluster.")
    said = condition.get("message", "").split(" preemption: ")[0].split(". no new claims")[0]
    sentence = one_sentence(f"No node can take the job yet: {said}")
    if not _LOST_CLAIM.search(said):
        return Reason(sentence)
    return _until_now(sentence, pod, events, lambda text: bool(_LOST_CLAIM.search(text)))


def _container_waits(pod: Object, status: Object, wait: Object, events: Events) -> Reason:
    form, final = WAITING[wait["reason"]]
    message = wait.get("message", "")
    if wait["reason"] == "ImagePullBackOff" and ": " not in message:  # before 1.32 the cause is in the event alone
        message = failed_pull(events(pod["metadata"]["uid"])) or message
    spec = [*pod.get("spec", {}).get("containers", []), *pod.get("spec", {}).get("initContainers", [])]
    image = next((c["image"] for c in spec if c["name"] == status.get("name")), status.get("image", ""))
    cause = message.rsplit("failed to resolve reference ", 1)[-1].removeprefix("failed to do request: ")
    sentence = one_sentence(form.format(image=image, message=cause))
    if not _cannot_heal(final, message):
        return Reason(sentence)
    same = (message or wait["reason"])[:200]

    def of_this_cause(text: str) -> bool:  # of a pull, what is said may differ from one attempt to the next
        pull = final is _FINAL_PULL and text.startswith("Failed to pull")
        return same in text or (pull and _cannot_heal(final, text))

    return _until_now(sentence, pod, events, of_this_cause)


def failed_pull(events: Sequence[Object] | None) -> str:
    """What the last attempt to pull an image met, as its event says it; "" for none."""
    said = [_message(event) for event in events or () if event.get("reason") == "Failed"]
    return next((text for text in reversed(said) if text.startswith("Failed to pull")), "")


def _cannot_heal(final: re.Pattern[str], said: str) -> bool:
    """What names a directory or a program is not looked through for other words, which the name may hold."""
    named = final is _FINAL_START or "hostPath type check failed" in said
    return bool(final.search(said)) and (named or not _PASSES.search(said))


def _pod_trouble(pod: Object, events: Sequence[Object] | None) -> Reason:
    if events is None:
        soon = datetime.now(UTC) - _since(pod) < _SOON
        return Reason("" if soon else f"The pod waits for a directory of the job, or for its network. {_UNTOLD}")
    warnings = [e for e in events if e.get("type") == "Warning" and e.get("reason") in _TROUBLE]
    if not warnings:
        return Reason("")
    last = max(warnings, key=_last_seen)
    if last["reason"] == "FailedCreatePodSandBox":
        return Reason(one_sentence(f"The pod cannot be set up: {_message(last)}"))
    sentence = one_sentence(f"A directory of the job cannot be mounted: {_message(last)}")
    same = [event for event in warnings if event["reason"] == last["reason"]]
    can_heal = not _cannot_heal(_FINAL_MOUNT, _message(last))
    return Reason(sentence, can_heal, _lasted(same, lambda text: _cannot_heal(_FINAL_MOUNT, text)))


def _until_now(sentence: str, pod: Object, events: Events, final: Callable[[str], bool]) -> Reason:
    """A reason that cannot heal and holds now: only its beginning has to be looked up.

    Where events may not be read, it began no later than the last change of the pod's conditions.
    """
    seen = events(pod["metadata"]["uid"])
    warnings = [event for event in seen or () if event.get("type") == "Warning"]
    began = _since(pod) if seen is None else _began(warnings, final)
    return Reason(sentence, can_heal=False, lasted=datetime.now(UTC) - began if began else None)


def _since(pod: Object) -> datetime:
    """When a condition of the pod changed last, as far as that is known."""
    times = [time(c.get("lastTransitionTime")) for c in pod["status"].get("conditions", [])]
    return max((moment for moment in times if moment), default=datetime.now(UTC))


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


def suspended(job: Object, events: Callable[[], Sequence[Object]]) -> str:
    """Who holds back a suspended job. events: of Kueue's Workloads of the namespace, where pman may read them.

    Kueue (https://kueue.sigs.k8s.io) suspends a Job that names a queue, and says on its Workload why it does so.
    """
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if not queue:
        return "The job is suspended: it waits until somebody resumes it."
    workload = re.compile(rf"job-{re.escape(job['metadata']['name'])}-[0-9a-f]{{5}}")
    ours = [event for event in events() if workload.fullmatch(event.get("involvedObject", {}).get("name", ""))]
    why = f": {_message(max(ours, key=_last_seen))}" if ours else ""
    return one_sentence(f"The job waits until Kueue admits it from the queue {queue}{why}")


def out_of_memory(pods: Iterable[Object]) -> bool:
    """Whether a process of the job's program was ended for lack of memory; the program itself may have gone on."""
    return any(_end(main_status(pod)).get("reason") == "OOMKilled" for pod in pods)


def flaw(job: Object, pods: Sequence[Object]) -> str:
    """What is wrong with a job whose pods all ended with 0, or ""."""
    for pod in pods:
        if out_of_memory([pod]):
            return _of_worker(job, pod, _memory(job, main_status(pod)))
        if disrupted := _disruption(pod):
            sentence = f"Kubernetes told the job to end {disrupted}. The program then ended with exit code 0: {_SEE}"
            return _of_worker(job, pod, sentence)
    removed = job["status"].get("succeeded", 0) - sum(pod["status"].get("phase") == "Succeeded" for pod in pods)
    if removed <= 0:
        return ""
    return (
        f"Pods of the job are gone ({removed}), with their logs. If one was removed while its program ran (a drained "
        f"node, an eviction), the program was told to end: {_SEE}"
    )


def failure(job: Object, pods: Sequence[Object], events: Events = lambda _: ()) -> str:
    """Why a job with the condition Failed failed. pods: those that are left, in index order."""
    if gave_up := job["metadata"].get("annotations", {}).get(GAVE_UP):
        return str(gave_up)
    failed = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
    if not failed:
        return _without_pod(job)
    pod = min(failed, key=lambda pod: _ended(pod) or datetime.now(UTC))
    return _of_worker(job, pod, one_sentence(_pod_failed(job, pod, events)))


def _of_worker(job: Object, pod: Object, sentence: str) -> str:
    return f"worker {index(pod)}: {sentence}" if job["spec"].get("completions", 1) > 1 else sentence


def _disruption(pod: Object) -> str:
    """For what Kubernetes itself ended the pod, as the end of a sentence; "" where it did not."""
    held = (c for c in pod["status"].get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True")
    condition = next(held, None)
    if condition is None:
        return ""
    reason = condition.get("reason", "")
    return _DISRUPTIONS.get(reason, f"({reason}: {condition.get('message', '')})")


def _without_pod(job: Object) -> str:
    conditions = job["status"].get("conditions", [])
    condition: Object = next((c for c in conditions if c["type"] == "Failed"), {})
    if condition.get("reason") == "DeadlineExceeded":
        return "The job reached its time limit."
    if condition.get("reason") == "BackoffLimitExceeded":
        return "A pod of the job was deleted or lost, and its result with it."
    if "DisruptionTarget" in condition.get("message", ""):  # by the template's podFailurePolicy
        return (
            "Kubernetes ended a pod of the job to have its node or its place (a drain, an eviction, a preemption, a "
            "lost node), and its logs are gone. The program did not fail: the job may be run again."
        )
    return one_sentence(f"Kubernetes ended the job: {condition.get('message') or condition.get('reason', '')}")


def _pod_failed(job: Object, pod: Object, events: Events) -> str:
    status = pod["status"]
    if status.get("reason") == "DeadlineExceeded":
        return _time_is_over(job, pod, events)
    if status.get("reason"):  # Evicted, Preempting, NodeShutdown, OutOfmemory, UnexpectedAdmissionError ...
        return f"The job was ended by Kubernetes: {status['reason']}: {status.get('message', '')}"
    if disrupted := _disruption(pod):
        return f"The job was ended by Kubernetes {disrupted}"
    failed = next((container for container in containers(pod) if _end(container).get("exitCode")), None)
    if failed is None:
        return f"The job failed: {status.get('message', 'no reason is known')}"
    beside = "" if failed is main_status(pod) else f"The container {failed['name']} of the job"
    return _container_failed(job, failed, beside)


def _time_is_over(job: Object, pod: Object, events: Events) -> str:
    """kubelet counts from when it took the pod: the pull of the image is within the limit."""
    seconds = job["spec"]["template"]["spec"].get("activeDeadlineSeconds", 0)
    sentence = f"The job reached its time limit of {seconds / 60:g} min"
    ended = _end(main_status(pod))
    took, began, end = time(pod["status"].get("startTime")), time(ended.get("startedAt")), time(ended.get("finishedAt"))
    if took is None:
        return sentence
    if not ran(pod) or began is None or end is None:
        pull = failed_pull(events(pod["metadata"]["uid"]))
        why = f": {pull}" if pull else ", perhaps while its image was pulled"
        return f"{sentence} before its program had begun{why}"
    waited = (began - took).total_seconds()
    if waited < max(5.0, seconds / 100):
        return sentence
    return (
        f"{sentence}, which includes {waited:.0f} s before its program began (for the image, say); the program ran for "
        f"{(end - began).total_seconds():.0f} s"
    )


def _container_failed(job: Object, status: Object, beside: str) -> str:
    """beside: what to call a container that is not the job's."""
    ended = _end(status)
    if ended.get("reason") == "OOMKilled":
        return f"{beside} failed. {_memory(job, status)}" if beside else _memory(job, status)
    if ended.get("reason") in NEVER_RAN:
        return f"The program could not be started: {ended.get('message', '').rsplit('container process: ', 1)[-1]}"
    return explain_exit(ended["exitCode"], beside or "The job")


def _memory(job: Object, status: Object) -> str:
    every = job["spec"]["template"]["spec"]["containers"]
    limits = (c.get("resources", {}).get("limits", {}).get("memory") for c in every if c["name"] == status["name"])
    limit = next(limits, None)
    return explain_memory(int(quantity(limit) / 2**20) if limit else 0, _end(status)["exitCode"], known=True)


def main_status(pod: Object) -> Object:
    """The status of the container that runs the job's program; {} before kubelet has taken the pod."""
    every: Sequence[Object] = pod["status"].get("containerStatuses", [])
    return next((status for status in every if status["name"] == MAIN), every[0] if every else {})


def ran(pod: Object) -> bool:
    """Whether the job's program has begun in this pod."""
    status = main_status(pod)
    ended = _end(status)
    return "running" in status.get("state", {}) or bool(ended.get("startedAt") and ended.get("reason") not in NEVER_RAN)


def _end(status: Object) -> Object:
    """How a container ended, {} before that."""
    ended: Object = status.get("state", {}).get("terminated", {})
    return ended


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


def containers(pod: Object) -> Iterator[Object]:
    """The states of the pod's containers: first the job's, then those beside it, then init containers and side-cars."""
    main = main_status(pod)
    yield from [main] if main else []
    yield from (status for status in pod["status"].get("containerStatuses", []) if status is not main)
    yield from pod["status"].get("initContainerStatuses", [])


def _ended(pod: Object) -> datetime | None:
    times = [time(_end(container).get("finishedAt")) for container in containers(pod)]
    return min((moment for moment in times if moment), default=None)
