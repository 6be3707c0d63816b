"""Why a Kubernetes job does not start, in one sentence for its user, from what pods and events say.

Pure functions over decoded JSON of the API; the forms of the messages were recorded on 1.35.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from pman.backends.kubernetes.objects import Object, containers, of_worker, one_sentence, quantity, time
from pman.status import Reason as Word

Events = Callable[[str], Sequence[Object] | None]  # uid of an object -> its events; None: pman may not read them
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
_UNTOLD = "Why, its events tell, which pman lacks the right to list."
_SOON = timedelta(seconds=30)  # a wait that needs no word
_TROUBLE = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume")
_LOST_CLAIM = re.compile(r"persistentvolumeclaim.* not found")
_COMBINED = "(combined from similar events): "  # client-go's record.EventAggregator, from the tenth text on
# How the API server refuses a pod for good: built-in admission, validation, a webhook. Whatever else it says may pass.
_REFUSED = re.compile(
    r'^Error creating: (?:pods "[^"]*" is forbidden: |Pod "[^"]*" is invalid: |(?=admission webhook "[^"]*" denied ))'
)
_QUOTA = re.compile(r"exceeded quota: \S+ requested: (\S+), used: \S+, limited: (\S+)")
HELD_BACK = "involvedObject.kind=Workload,reason=Pending"  # selects what Kueue says of the jobs that wait for it
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job does not start. lasted: since this cause was first seen, None where that is not known."""

    sentence: str
    can_heal: bool = True
    lasted: timedelta | None = None
    word: Word = Word.REFUSED


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
            return replace(reason, sentence=of_worker(job, pod, reason.sentence)) if one_of_several else reason
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
    word = Word.IMAGE if "{image}" in form else Word.REFUSED
    same = (message or wait["reason"])[:200]

    def of_this_cause(text: str) -> bool:  # of a pull, what is said may differ from one attempt to the next
        pull = final is _FINAL_PULL and text.startswith("Failed to pull")
        return same in text or (pull and _cannot_heal(final, text))

    return replace(_until_now(sentence, pod, events, of_this_cause), word=word)


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


def suspended(job: Object, events: Callable[[], Sequence[Object] | None]) -> str:
    """Who holds back a suspended job. events: of the selector HELD_BACK, for all jobs of the namespace.

    Kueue (https://kueue.sigs.k8s.io) suspends a Job that names a queue, and says on its Workload why it does so.
    """
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    if not queue:
        return "The job is suspended: it waits until somebody resumes it."
    workload = re.compile(rf"job-{re.escape(job['metadata']['name'])}-[0-9a-f]{{5}}")
    said = events() or ()
    ours = [event for event in said if workload.fullmatch(event.get("involvedObject", {}).get("name", ""))]
    why = f": {_message(max(ours, key=_last_seen))}" if ours else ""
    return one_sentence(f"The job waits until Kueue admits it from the queue {queue}{why}")
