"""What an engine, or a Swarm, says of its nodes."""

from __future__ import annotations

from typing import Any

from pman.backends.discovery import Overview, Place
from pman.backends.engine.api import Engine


def overview(engine: Engine, is_swarm: bool, gpu: str = "") -> Overview:
    """The nodes of the Swarm, or the one of the engine, with their sizes. gpu: what a GPU is called."""
    seen = Overview()
    name = "Podman" if seen.ask("its name", engine.is_podman) else "Docker"
    info = seen.ask("the engine", lambda: engine.get("/info")) or {}
    seen.version = f"{name} {info['ServerVersion']}" if info.get("ServerVersion") else ""
    if is_swarm:
        nodes = seen.ask("nodes", lambda: engine.get("/nodes")) or []
        seen.places += [_node(node, gpu) for node in nodes]
    elif info:
        seen.places.append(Place(info.get("Name", ""), "node", "up", info.get("NCPU"), _mib(info.get("MemTotal"))))
        seen.unasked.append(f"GPUs: {name} does not say which it has")
    return seen


def _node(node: dict[str, Any], gpu: str) -> Place:
    """https://docs.docker.com/reference/api/engine/version/v1.45/#tag/Node/operation/NodeList."""
    about, spec = node.get("Description") or {}, node.get("Spec") or {}
    sizes = about.get("Resources") or {}
    state = ", ".join(filter(None, (node.get("Status", {}).get("State"), spec.get("Availability"))))
    gpus = sum(_count(each, gpu) for each in sizes.get("GenericResources") or [])
    cpus = sizes["NanoCPUs"] / 1e9 if "NanoCPUs" in sizes else None
    name, note = about.get("Hostname") or node["ID"], spec.get("Role", "")
    return Place(name, "node", state, cpus, _mib(sizes.get("MemoryBytes")), gpus, note=note)


def _count(resource: dict[str, Any], kind: str) -> int:
    """How many of a generic resource there are: a number of them, or one that has a name."""
    (found,) = resource.values()
    return 0 if found.get("Kind") != kind else found["Value"] if isinstance(found["Value"], int) else 1


def _mib(size: int | None) -> int | None:
    return None if size is None else size >> 20
