"""What a Job and its pods say of a job beside its state."""

from collections.abc import Sequence

from pman.backends.kubernetes import ends, objects
from pman.backends.kubernetes.api import Object
from pman.status import Details, JobState, JobStatus, Worker

# Annotations. IMAGE: the image that was asked for, where another one runs.
USER, KIND, IMAGE = (f"org.chrisproject.pman.{word}" for word in ("auid", "kind", "image"))
# https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase
_PHASES = {"Pending": JobState.NOT_STARTED, "Succeeded": JobState.SUCCEEDED, "Failed": JobState.FAILED}


def details(job: Object, pods: Sequence[Object], status: JobStatus, container: Object) -> Details:
    """container: that of the job's program, as the Job has it."""
    notes, spec = job["metadata"].get("annotations", {}), job["spec"]
    limits = container.get("resources", {}).get("limits", {})
    seconds = spec["template"]["spec"].get("activeDeadlineSeconds")
    by_index = {number: _worker(job, pod) for number, pod in zip(objects.numbers(pods, job), pods, strict=True)}
    gone = Worker.of(status.state) if status.state in (JobState.SUCCEEDED, JobState.NOT_STARTED) else Worker()
    workers = tuple(by_index.get(index, gone) for index in range(spec.get("completions", 1)))
    return Details(
        user=notes.get(USER),
        kind=notes.get(KIND),
        cpu_millicores=int(objects.quantity(limits["cpu"]) * 1000) if "cpu" in limits else None,
        memory_mib=int(objects.quantity(limits["memory"])) >> 20 if "memory" in limits else None,
        gpu_count=sum(int(amount) for name, amount in limits.items() if "/" in name and amount.isdecimal()),
        time_limit_minutes=seconds // 60 if seconds else None,
        backend_id=job["metadata"]["name"],
        started_at=min((worker.started_at for worker in workers if worker.started_at), default=None),
        nodes=tuple(dict.fromkeys(worker.node for worker in workers if worker.node)) or None,
        workers=workers,
    )


def _worker(job: Object, pod: Object) -> Worker:
    now = objects.main_status(pod).get("state", {})
    ended = now.get("terminated", {})
    began = {**now.get("running", {}), **ended} if objects.ran(pod) else {}
    state, why = _PHASES.get(pod["status"].get("phase", "Pending"), JobState.STARTED), ""
    if state is JobState.FAILED:
        why = ends.pod_failure(job, pod)
    elif state is JobState.NOT_STARTED and began:
        state = JobState.STARTED
    elif state is JobState.SUCCEEDED and ends.out_of_memory([pod]):
        state, why = JobState.FAILED, ends.flaw(job, [pod])
    return Worker.of(
        state,
        why,
        started_at=objects.time(began.get("startedAt")),
        finished_at=objects.time(ended.get("finishedAt")),
        node=pod.get("spec", {}).get("nodeName"),
    )
