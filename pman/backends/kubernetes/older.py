"""Jobs of pman 6 on Kubernetes: the only container is named as the Job is, and mounts parts of one claim."""

from pman.backends.former import Former
from pman.backends.kubernetes.api import Object
from pman.job import Job

_SHM = "/dev/shm"  # noqa: S108 - where pman 6 mounts what SHM_SIZE asks for


def is_job(job: Object) -> bool:
    """Whether pman 6 made this Job, whatever its name."""
    names = [container["name"] for container in job["spec"]["template"]["spec"]["containers"]]
    return names == [job["metadata"]["name"]] and _former(job).is_job(names[0])


def is_same(existing: Object, job: Job) -> bool:
    """Whether pman 6 made `existing` of such a request."""
    return existing["spec"].get("completions", 1) == job.workers and _former(existing).is_same(job)


def _former(job: Object) -> Former:
    metadata, container = job["metadata"], job["spec"]["template"]["spec"]["containers"][0]
    mounts = [
        (mount.get("subPath", ""), mount["mountPath"], bool(mount.get("readOnly")))
        for mount in container.get("volumeMounts", [])
        if mount["mountPath"] != _SHM
    ]
    marks = {**metadata.get("labels", {}), **metadata.get("annotations", {})}
    return Former(metadata["name"], marks, container["image"], container.get("command", ()), mounts)
