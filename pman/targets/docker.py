"""The body with which Docker and Podman create a container, judged by a schema of Docker's API."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pman.job import INCOMING, OUTGOING, Job
from pman.targets.documents import Identity, line, need, said, yaml_document
from pman.targets.record import Delivered, Problem, Starter, Target

JID, DIGEST = "org.chrisproject.pman.name", "org.chrisproject.pman.digest"  # labels
IDENTITY = Identity({("Labels", JID): "job.jid", ("Labels", DIGEST): "job.digest"})
CAUSES: Mapping[str, tuple[str, ...]] = {
    "argv": ("environment", "container_extra"),
    "env": ("environment",),
    "injected": ("environment", "mounts", "container_extra"),
    **dict.fromkeys(("incoming", "outgoing"), ("mounts", "environment")),
}


def schema_problems(text: str, operation: str) -> Iterator[Problem]:
    """What Docker's API refuses of the body of an operation, one of those in docker.json."""
    data = yield from yaml_document(text)
    for error in _validator(operation).iter_errors(data) if data is not None else ():
        yield Problem(said(error), line(text, error))


@functools.cache
def _validator(operation: str) -> Any:
    schema = json.loads((Path(__file__).parent / "docker.json").read_text(encoding="utf-8"))
    return need("jsonschema").Draft202012Validator(schema | {"$ref": f"#/$defs/{operation}"})


def _read(job: Job, text: str) -> Delivered:
    body = yaml.safe_load(text)
    # An empty program takes the image's own ENTRYPOINT away.
    words = [*filter(None, body.get("Entrypoint") or []), *(body.get("Cmd") or [])]
    host = body.get("HostConfig", {})
    binds = [bind.rsplit(":", 2 if bind.count(":") > 1 else 1) for bind in host.get("Binds", [])]
    mounts = [*host.get("Mounts", []), *({"Source": bind[0], "Target": bind[1]} for bind in binds)]
    return replace(
        engine(words, body.get("Env") or [], mounts, str),
        image=body["Image"],
        others=tuple(IDENTITY.flaws(job, body, text)),
    )


def engine(words: list[str], env: list[str], mounts: list[Any], read: Callable[[str], str]) -> Delivered:
    """What an engine is given. read: what it makes of a text."""
    sources = {mount["Target"]: read(mount_source(mount)) for mount in mounts}
    pairs = dict(entry.split("=", 1) for entry in env if "=" in entry)
    return Delivered(words, pairs, sources.get(INCOMING, ""), sources.get(OUTGOING, ""))


def mount_source(mount: Mapping[str, Any]) -> str:
    options = mount.get("VolumeOptions") or {}
    device = ((options.get("DriverConfig") or {}).get("Options") or {}).get("device", "")
    return str(options.get("Subpath") or device.removeprefix(":") or mount.get("Source", ""))


TARGET = Target(
    name="docker",
    template="docker/container.yaml.j2",
    storage_types=("host", "nfs", "docker_local_volume"),
    starter=Starter(
        "host_extra",
        "{% if site.extra_hosts %}\n  ExtraHosts: {{ site.extra_hosts }}\n{% endif %}\n",
        '# Lines for every container\'s /etc/hosts, e.g. ["license:192.0.2.7"]\nextra_hosts: []\n',
    ),
    judge=lambda text, _: schema_problems(text, "ContainerCreate"),
    read=_read,
    causes=CAUSES,
)
