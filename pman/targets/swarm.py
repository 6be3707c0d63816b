"""The body with which Docker Swarm creates a service, judged by a schema of Docker's API."""

import re
from dataclasses import replace
from typing import Any

import yaml

from pman.job import Job
from pman.targets import docker
from pman.targets.docker import CAUSES, engine, mount_source, schema_problems
from pman.targets.documents import Identity, expanded
from pman.targets.record import Delivered, Starter, Target
from pman.templating import quote

IDENTITY = Identity({("Name",): "job.name", **docker.IDENTITY.parts})


def escaped(text: str) -> str:
    """What Swarm, which expands it as a Go template, makes this text of."""
    return text.replace("{{", '{{"{{"}}')


def go_template(value: Any) -> str:
    """YAML for a string that Docker Swarm expands as a Go template: env entries, mounts and the host name."""
    return quote.yaml(escaped(quote.text_of(value)))


def _read(job: Job, text: str) -> Delivered:
    body = yaml.safe_load(text)
    container = body["TaskTemplate"]["ContainerSpec"]
    words = [*container.get("Command", []), *container.get("Args", [])]
    env, mounts = container.get("Env") or [], container.get("Mounts") or []
    found = engine(words, [_go(entry) for entry in env], mounts, _go)
    targets = [mount.get("Target", "") for mount in mounts]
    texts = [*env, *map(mount_source, mounts), *targets, container.get("Hostname", "")]
    return replace(
        found,
        image=container["Image"],
        others=(*IDENTITY.flaws(job, body, text), *expanded(texts, r"\{\{", "Swarm", "gotemplate")),
    )


def _go(text: str) -> str:
    """What Swarm makes of a Go template: quoting writes only {{"{{"}}, so any other action changes the text."""
    return "{{".join(re.sub(r"(?s)\{\{.*?(\}\}|$)", "(a Go template)", part) for part in text.split('{{"{{"}}'))


TARGET = Target(
    name="swarm",
    template="swarm/service.yaml.j2",
    filters={
        "gotemplate": quote.Filter(
            go_template, "YAML for env and mounts of a Swarm service: `{{` is kept from being expanded"
        )
    },
    storage_types=("host", "nfs", "docker_local_volume"),
    starter=Starter(
        "placement",
        "{% if site.constraints %}\n  Placement:\n    Constraints: {{ site.constraints }}\n{% endif %}\n",
        "# Placement constraints of every job, e.g. [node.role == worker]\nconstraints: []\n",
    ),
    judge=lambda text, _: schema_problems(text, "ServiceCreate"),
    read=_read,
    causes=CAUSES,
)
