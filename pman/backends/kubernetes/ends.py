"""How a Kubernetes job ended, in one sentence for its user, from what the Job and its pods say.

Pure functions over decoded JSON of the API; the forms of the messages were recorded on 1.35.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from pman.backends.kubernetes import objects
from pman.backends.kubernetes.objects import Object, containers, end_of, main_status, of_worker, one_sentence, ran, time
from pman.backends.kubernetes.starts import Events, failed_pull
from pman.status import Reason, Why, explain_exit, explain_memory, word_of

GAVE_UP = "org.chrisproject.pman.gave-up"  # annotation: the sentence for which pman ended the job
GAVE_UP_WORD = "org.chrisproject.pman.gave-up-reason"  # annotation: the word for it
# https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions
_DISRUPTIONS: Mapping[str, str] = {
    "PreemptionByScheduler": "to make room for a pod of higher priority",
    "DeletionByTaintManager": "because its node was lost or closed to it by a taint",
    "EvictionByEvictionAPI": "because its node is being drained, or somebody evicted it",
    "DeletionByPodGC": "because its node is gone",
    "TerminationByKubelet": "because its node ran short of memory, disk or processes, or is shut down",
}
_PREEMPTIONS = ("PreemptionByScheduler", "EvictionByEvictionAPI")  # the others are of the node
_SEE = "see whether its output is complete."


def out_of_memory(pods: Iterable[Object]) -> bool:
    """Whether a process of the job's program was ended for lack of memory; the program itself may have gone on."""
    return any(end_of(main_status(pod)).get("reason") == "OOMKilled" for pod in pods)


def flaw(job: Object, pods: Sequence[Object]) -> str:
    """What is wrong with a job whose pods all ended with 0, or ""."""
    for pod in pods:
        if out_of_memory([pod]):
            why = _memory(job, main_status(pod))
            return Why(of_worker(job, pod, why), why.reason, why.exit_code)
        if disrupted := _disruption(pod):
            sentence = f"Kubernetes told the job to end {disrupted}. The program then ended with exit code 0: {_SEE}"
            return of_worker(job, pod, sentence)
    removed = job["status"].get("succeeded", 0) - sum(pod["status"].get("phase") == "Succeeded" for pod in pods)
    if removed <= 0:
        return ""
    return (
        f"Pods of the job are gone ({removed}), with their logs. If one was removed while its program ran (a drained "
        f"node, an eviction), the program was told to end: {_SEE}"
    )


def failure(job: Object, pods: Sequence[Object], events: Events = lambda _: ()) -> Why:
    """Why a job with the condition Failed failed. pods: those that are left, in index order."""
    notes = job["metadata"].get("annotations", {})
    if GAVE_UP in notes:
        return Why(notes[GAVE_UP], Reason(notes.get(GAVE_UP_WORD, Reason.UNKNOWN)))
    failed = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
    if not failed:
        return _without_pod(job)
    pod = min(failed, key=lambda pod: _ended(pod) or datetime.now(UTC))
    return pod_failure(job, pod, events)


def pod_failure(job: Object, pod: Object, events: Events = lambda _: ()) -> Why:
    """Why a pod in the phase Failed failed."""
    why = _pod_failed(job, pod, events)
    return Why(of_worker(job, pod, one_sentence(why)), why.reason, why.exit_code)


def _disruption(pod: Object) -> str:
    """For what Kubernetes itself ended the pod, as the end of a sentence; "" where it did not."""
    held = (c for c in pod["status"].get("conditions", []) if c["type"] == "DisruptionTarget" and c["status"] == "True")
    condition = next(held, None)
    if condition is None:
        return ""
    reason = condition.get("reason", "")
    return _DISRUPTIONS.get(reason, f"({reason}: {condition.get('message', '')})")


def _without_pod(job: Object) -> Why:
    conditions = job["status"].get("conditions", [])
    condition: Object = next((c for c in conditions if c["type"] == "Failed"), {})
    if condition.get("reason") == "DeadlineExceeded":
        return Why("The job reached its time limit.", Reason.TIME_LIMIT)
    if condition.get("reason") == "BackoffLimitExceeded":
        return Why("A pod of the job was deleted or lost, and its result with it.", Reason.LOST)
    if "DisruptionTarget" in condition.get("message", ""):  # by the template's podFailurePolicy
        return Why(
            "Kubernetes took a pod of the job away (a drain, an eviction, a preemption, a lost node), and its logs are "
            "gone. The program did not fail: the job may be run again.",
            Reason.PREEMPTED,
        )
    return Why(one_sentence(f"Kubernetes ended the job: {condition.get('message') or condition.get('reason', '')}"))


def _pod_failed(job: Object, pod: Object, events: Events) -> Why:
    status = pod["status"]
    if status.get("reason") == "DeadlineExceeded":
        return Why(_time_is_over(job, pod, events), Reason.TIME_LIMIT)
    if status.get("reason"):  # Evicted, Preempting, NodeShutdown, OutOfmemory, UnexpectedAdmissionError ...
        word = Reason.PREEMPTED if status["reason"] == "Preempting" else Reason.NODE
        return Why(f"The job was ended by Kubernetes: {status['reason']}: {status.get('message', '')}", word)
    if disrupted := _disruption(pod):
        word = Reason.PREEMPTED if disrupted in [_DISRUPTIONS[name] for name in _PREEMPTIONS] else Reason.NODE
        return Why(f"The job was ended by Kubernetes {disrupted}", word)
    failed = next((container for container in containers(pod) if end_of(container).get("exitCode")), None)
    if failed is None:
        return Why(f"The job failed: {status.get('message', 'no reason is known')}")
    beside = "" if failed is main_status(pod) else f"The container {failed['name']} of the job"
    return _container_failed(job, failed, beside)


def _time_is_over(job: Object, pod: Object, events: Events) -> str:
    """kubelet counts from when it took the pod: the pull of the image is within the limit."""
    seconds = job["spec"]["template"]["spec"].get("activeDeadlineSeconds", 0)
    sentence = f"The job reached its time limit of {seconds / 60:g} min"
    ended = end_of(main_status(pod))
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
        f"{sentence}, which includes {waited:.0f} s before its program began, perhaps for its image; the program ran "
        f"for {(end - began).total_seconds():.0f} s"
    )


def _container_failed(job: Object, status: Object, beside: str) -> Why:
    """beside: what to call a container that is not the job's."""
    ended = end_of(status)
    if ended.get("reason") == "OOMKilled":
        why = _memory(job, status)
        return Why(f"{beside} failed. {why}", why.reason, why.exit_code) if beside else why
    code = ended["exitCode"]
    if ended.get("reason") in objects.NEVER_RAN:
        said = ended.get("message", "").rsplit("container process: ", 1)[-1]
        return Why(f"The program could not be started: {said}", Reason.REFUSED)
    return Why(explain_exit(code, beside or "The job"), word_of(code), code)


def _memory(job: Object, status: Object) -> Why:
    every = job["spec"]["template"]["spec"]["containers"]
    limits = (c.get("resources", {}).get("limits", {}).get("memory") for c in every if c["name"] == status["name"])
    limit = next(limits, None)
    return explain_memory(int(objects.quantity(limit) / 2**20) if limit else 0, end_of(status)["exitCode"], known=True)


def _ended(pod: Object) -> datetime | None:
    times = [time(end_of(container).get("finishedAt")) for container in containers(pod)]
    return min((moment for moment in times if moment), default=None)
