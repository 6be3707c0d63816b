"""Jobs that pman 4 to 6 made on Docker, Podman and Swarm, and that were under way when this pman took their place.

Those versions gave their objects no label of pman's. A job is what has the jid as its name, and all that
https://github.com/FNNDSC/pman/tree/v6.3.1/pman (swarmmgr.py, dockermgr.py, resources.py) gave to every job: two binds
and no other mount, one read-only at /share/incoming and one at /share/outgoing, both of directories below the store; a
command line that ends with /share/outgoing; no restart. Whatever lacks any of these is somebody else's.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from typing import Any

from pman.job import INCOMING, OUTGOING, Job

Json = dict[str, Any]
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")  # of a container; a service's has fewer characters


def may_have(jid: str) -> bool:
    """Whether an engine could have an object whose name is this jid."""
    return bool(_NAME.fullmatch(jid))


def is_container(document: Json, jid: str, store: str) -> bool:
    """Whether a container, as the engine's inspect has it, is a job of that jid. store: the directory of all jobs."""
    mounts = [(m["Type"], m["Source"], m["Destination"], not m["RW"]) for m in document.get("Mounts") or []]
    host, labels = document["HostConfig"], document["Config"].get("Labels") or {}
    return (
        document["Name"].lstrip("/") == jid
        and not _is_newer(labels)
        and (host.get("RestartPolicy") or {}).get("Name") in ("no", "")
        and _is_job(document["Config"].get("Cmd"), mounts, store)
    )


def is_service(document: Json, jid: str, store: str) -> bool:
    """Whether a service, as the engine's inspect has it, is a job of that jid. store: the directory of all jobs."""
    spec = document["Spec"]
    task, container = spec["TaskTemplate"], spec["TaskTemplate"]["ContainerSpec"]
    mounts = [(m["Type"], m["Source"], m["Target"], bool(m.get("ReadOnly"))) for m in container.get("Mounts") or []]
    return (
        spec["Name"] == jid
        and not _is_newer(spec.get("Labels") or {})
        and container.get("TTY") is True
        and (task.get("RestartPolicy") or {}).get("Condition") == "none"
        and _is_job(container.get("Command"), mounts, store)
    )


def is_same(job: Job, image: str, argv: list[str], sources: Iterable[str]) -> bool:
    """Whether a request means the job that is there: its image, its command line and its directories."""
    ends = (job.input_dir, job.output_dir)
    found = tuple(sources)
    at = all(source.endswith("/" + end) for source, end in zip(found, ends, strict=True))
    return job.image in (image, image.partition("@")[0]) and tuple(argv) == job.argv and at


def sources(mounts: Iterable[Json]) -> list[str]:
    """The directories of a job's input and output on the machine."""
    by_target = {mount.get("Target") or mount.get("Destination"): str(mount["Source"]) for mount in mounts}
    return [by_target[INCOMING], by_target[OUTGOING]]


def _is_newer(labels: Json) -> bool:
    return any(name.startswith("org.chrisproject.pman.") for name in labels)


def _is_job(argv: list[str] | None, mounts: list[tuple[str, str, str, bool]], store: str) -> bool:
    below = all(kind == "bind" and _is_below(source, store) for kind, source, *_ in mounts)
    targets = sorted((target, read_only) for _, _, target, read_only in mounts)
    return (argv or [""])[-1] == OUTGOING and below and targets == [(INCOMING, True), (OUTGOING, False)]


def _is_below(path: str, store: str) -> bool:
    return posixpath.normpath(path) == path.rstrip("/") and path.startswith(store.rstrip("/") + "/") and store != "/"
