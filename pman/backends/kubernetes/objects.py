"""What is read of Jobs, pods and quantities: https://kubernetes.io/docs/reference/kubernetes-api/, as decoded JSON."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

Object = Mapping[str, Any]

INDEX = "batch.kubernetes.io/job-completion-index"
MAIN = "job"  # the container of the job's program; every other one serves it
# Reasons of an end without a beginning: of the runtime, and of kubelet for a container that it does not find.
NEVER_RAN = ("StartError", "ContainerCannotRun")
_QUANTITY = re.compile(r"([0-9.]+)(n|u|m|k|[KMGTPE]i?)?")
_UNITS: Mapping[str, Decimal] = {
    **{unit: Decimal(10) ** power for unit, power in zip("num kMGTPE", range(-9, 19, 3), strict=True)},
    **{f"{unit}i": Decimal(2) ** power for unit, power in zip("KMGTPE", range(10, 70, 10), strict=True)},
}  # fmt: skip


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity (`100m`, `64Mi`, `2`) as a number; infinity for what is none."""
    match = _QUANTITY.fullmatch(text)
    return Decimal(match[1]) * _UNITS[match[2] or " "] if match else Decimal("Infinity")


def is_indexed(job: Object) -> bool:
    """Whether its pods have numbers, as those of pman's jobs have; pman 6 gave them none."""
    return bool(job["spec"].get("completionMode") == "Indexed")


def is_numbered(job: Object) -> bool:
    """Whether there are several workers, each with a number."""
    return is_indexed(job) and job["spec"].get("completions", 1) > 1


def of_worker(job: Object, pod: Object, sentence: str) -> str:
    return f"worker {index(pod)}: {sentence}" if is_numbered(job) else sentence


def main_status(pod: Object) -> Object:
    """The status of the container that runs the job's program; {} before kubelet has taken the pod."""
    every: Sequence[Object] = pod["status"].get("containerStatuses", [])
    return next((status for status in every if status["name"] == MAIN), every[0] if every else {})


def ran(pod: Object) -> bool:
    """Whether the job's program has begun in this pod."""
    status = main_status(pod)
    ended = end_of(status)
    return "running" in status.get("state", {}) or bool(ended.get("startedAt") and ended.get("reason") not in NEVER_RAN)


def end_of(status: Object) -> Object:
    """How a container ended, {} before that."""
    ended: Object = status.get("state", {}).get("terminated", {})
    return ended


def index(pod: Object) -> int:
    """Completion index of a pod of an indexed job, else 0."""
    marks = {**pod["metadata"].get("annotations", {}), **pod["metadata"].get("labels", {})}
    return int(marks.get(INDEX, 0))


def numbers(pods: Sequence[Object], job: Object) -> list[int]:
    """The worker that each pod of the job is of. Pods of pman 6 have no index, and count in their order."""
    last = job["spec"].get("completions", 1) - 1
    return [index(pod) if is_indexed(job) else min(place, last) for place, pod in enumerate(pods)]


def in_order(pods: Iterable[dict[str, Any]], job: Object) -> tuple[dict[str, Any], ...]:
    """A job's pods by completion index and age; where they have one, only the newest of each index."""
    ordered = sorted(pods, key=lambda pod: (index(pod), str(pod["metadata"]["creationTimestamp"])))
    return tuple({index(pod): pod for pod in ordered}.values()) if is_indexed(job) else tuple(ordered)


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
