"""Specs that are YAML: what all backends that submit one ask of it."""

import json
from typing import Any

import yaml

from pman.backends import hiding
from pman.errors import TemplateError
from pman.job import Job
from pman.targets import TARGETS
from pman.targets.documents import Identity
from pman.templating.render import Spec

_TEXT = "tag:yaml.org,2002:str"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Takes text as it is. PyYAML's way, which is for values that hold themselves, too, is longer: 0.1 ms a job."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag == _TEXT:
            return node.value
        return super().construct_object(node, deep)


def load(job: Job, spec: Spec, identity: Identity) -> dict[str, Any]:
    """The spec as a document. Raises TemplateError where it is none that can be found again under the job's jid."""
    document = parsed(spec)
    if found := identity.lacks(job, document):
        raise TemplateError(f"{TARGETS[spec.target].template}:1: {found[1]}")
    return document


def parsed(spec: Spec) -> dict[str, Any]:
    """The spec as a document. Raises TemplateError where it is no YAML."""
    try:
        document: dict[str, Any] = yaml.load(spec.text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        said = f"the template renders no YAML: {' '.join(str(error).split())}"
        raise TemplateError(f"{TARGETS[spec.target].template}:1: {said}") from error
    return document


def shown(document: Any, environment: bool) -> dict[str, str]:
    """What was submitted, as `Backend.spec` returns it; environment: with the values of the job's environment."""
    return {"spec": json.dumps(document if environment else hiding.in_document(document), indent=2)}
