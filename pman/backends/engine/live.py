"""What `pman check --live` asks of an engine: whether the image and the networks of a job exist."""

from __future__ import annotations

from collections.abc import Iterator

from pman.backends import documents, line_named
from pman.backends.engine.api import Engine
from pman.errors import PmanError
from pman.settings import Settings
from pman.targets.record import Problem
from pman.templating.render import Spec

_NO_NETWORK = ("", "none", "host", "bridge", "default")


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
