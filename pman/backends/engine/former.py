"""Jobs of pman 4 to 6 on Docker, Podman and Swarm: two binds of directories below the store, and no restart."""

import posixpath

from pman.backends.engine.api import Json
from pman.backends.former import Former


def of_container(document: Json) -> Former:
    config = document["Config"]
    mounts = [(m["Source"], m["Destination"], not m["RW"]) for m in document.get("Mounts") or []]
    return Former(
        document["Name"].lstrip("/"), config.get("Labels") or {}, config["Image"], config.get("Cmd") or (), mounts
    )


def of_service(document: Json) -> Former:
    spec, container = document["Spec"], document["Spec"]["TaskTemplate"]["ContainerSpec"]
    mounts = [(m.get("Source", ""), m["Target"], bool(m.get("ReadOnly"))) for m in container.get("Mounts") or []]
    return Former(spec["Name"], spec.get("Labels") or {}, container["Image"], container.get("Command") or (), mounts)


def is_container(document: Json, jid: str, store: str) -> bool:
    """Whether a container is a job of that jid. store: the directory of all jobs."""
    restart = (document["HostConfig"].get("RestartPolicy") or {}).get("Name")
    below = _are_binds_below(document.get("Mounts"), store)
    return restart in ("no", "") and below and of_container(document).is_job(jid)


def is_service(document: Json, jid: str, store: str) -> bool:
    """Whether a service is a job of that jid. store: the directory of all jobs."""
    task = document["Spec"]["TaskTemplate"]
    container, restart = task["ContainerSpec"], (task.get("RestartPolicy") or {}).get("Condition")
    below = _are_binds_below(container.get("Mounts"), store)
    return restart == "none" and container.get("TTY") is True and below and of_service(document).is_job(jid)


def _are_binds_below(mounts: list[Json] | None, store: str) -> bool:
    return all(mount["Type"] == "bind" and _is_below(mount["Source"], store) for mount in mounts or ())


def _is_below(path: str, store: str) -> bool:
    return posixpath.normpath(path) == path.rstrip("/") and path.startswith(store.rstrip("/") + "/") and store != "/"
