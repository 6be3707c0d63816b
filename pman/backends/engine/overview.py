"""What an engine, or a Swarm, says of its nodes, and for `pman check --live` of a job's image and networks."""

from collections.abc import Iterator
from typing import Any

from pman.backends import documents, line_named
from pman.backends.discovery import Overview, Place
from pman.backends.engine.api import Engine
from pman.errors import PmanError
from pman.settings import Settings
from pman.targets.record import Problem
from pman.templating.render import Spec

_NO_NETWORK = ("", "none", "host", "bridge", "default")


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


def live(settings: Settings, spec: Spec) -> Iterator[Problem]:
    """What a body names that the engine, and the registry behind it, does not have. Nothing is pulled."""
    engine, body = Engine(settings), documents.parsed(spec)
    task = body.get("TaskTemplate") or {}
    image = str((task.get("ContainerSpec") or body)["Image"])
    networks = [str(network["Target"]) for network in task.get("Networks") or []]
    networks.append(str((body.get("HostConfig") or {}).get("NetworkMode") or ""))
    for name in networks:
        asked = name not in _NO_NETWORK and not name.startswith("container:")
        if asked and engine.find(f"/networks/{name}") is None:
            yield Problem(f"the engine has no network {name}", line_named(spec.text, name), rule="live")
    if engine.find(f"/images/{image}/json") is None:
        yield from _in_registry(engine, image, spec)


def _in_registry(engine: Engine, image: str, spec: Spec) -> Iterator[Problem]:
    if engine.is_podman():
        said = f"Podman has no image {image}, and cannot be asked whether its registry has it"
        yield Problem(said, line_named(spec.text, image), rule="not-asked")
        return
    try:
        engine.call("GET", f"/distribution/{image}/json", headers=engine.registry_auth(image))
    except PmanError as error:
        said = f"the engine has no image {image}, nor has the registry: {error}"
        yield Problem(said, line_named(spec.text, image), rule="live")
