"""Specs that are YAML: what all backends that submit one ask of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from pman.errors import TemplateError
from pman.job import Job
from pman.targets import TARGETS
from pman.templating.render import Spec

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(job: Job, spec: Spec, identity: Callable[[Any], tuple[str, str, str]], places: str) -> dict[str, Any]:
    """The spec as a document. Raises TemplateError where it is none that can be found again under the job's jid.

    identity: name, jid and digest, as the document has them at `places`.
    """
    where = f"{TARGETS[spec.target].template}:1: "
    try:
        document: dict[str, Any] = yaml.load(spec.text, _LOADER)  # noqa: S506 - a safe loader
        found = identity(document)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise TemplateError(f"{where}the template renders no job with {places}: {said}") from error
    if found != (job.name, job.jid, job.digest):
        raise TemplateError(f"{where}job.name, jid and digest must be the job's own in {places}")
    return document
