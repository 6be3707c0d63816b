"""Settings that become names and labels of Kubernetes: what its API would refuse in every job stops the start.

The rules: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/.
"""

import re
from collections.abc import Iterator

from pman.settings import SET_BY_KUBERNETES, Settings

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){_LABEL.pattern}(\.{_LABEL.pattern})*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
# Labels that the template sets, because selectors or policies rely on them, and labels that Kubernetes sets itself.
OWN_LABELS = re.compile(rf"app\.kubernetes\.io/(managed-by|name|instance|component)|{SET_BY_KUBERNETES.pattern}")
MOST_USER = 2**31 - 1  # runAsUser and runAsGroup


def problems(s: Settings) -> Iterator[str]:
    """A sentence for each setting that would fail every job."""
    selector = dict([s.pfcon_selector.split("=", 1)]) if s.pfcon_selector else {}
    for setting, labels in (
        ("JOB_LABELS", s.job_labels), ("NODE_SELECTOR", s.node_selector), ("PFCON_SELECTOR", selector),
    ):  # fmt: skip
        yield from (f"{setting}: {name!r} is no name of a Kubernetes label." for name in labels if not _is_key(name))
        yield from (
            f"{setting}: {value!r} is no value of a Kubernetes label: use at most 63 letters, digits, - _ and ."
            for value in labels.values()
            if value and not _NAME.fullmatch(value)
        )
    own = [name for name in s.job_labels if OWN_LABELS.fullmatch(name)]
    yield from (f"JOB_LABELS: pman or Kubernetes sets the label {name}; leave it out." for name in own)
    yield from _bad_names(s)
    users = {"CONTAINER_USER": max([0, *map(int, re.findall(r"[0-9]+", s.container_user or ""))])}
    users["SECURITYCONTEXT_RUN_AS_USER"] = s.securitycontext_run_as_user or 0
    users["SECURITYCONTEXT_RUN_AS_GROUP"] = s.securitycontext_run_as_group or 0
    large = [setting for setting, number in users.items() if number > MOST_USER]
    yield from (f"{setting}: Kubernetes takes numbers up to {MOST_USER}." for setting in large)


def _bad_names(s: Settings) -> Iterator[str]:
    names = [("IMAGE_PULL_SECRETS", name) for name in s.image_pull_secrets]
    if s.storage_type == "kubernetes_pvc":
        names.append(("VOLUME_NAME", s.volume_name or ""))
    yield from (
        f"{setting}: {name!r} is no name of a Kubernetes object: use small letters, digits, - and ."
        for setting, name in names
        if not _SUBDOMAIN.fullmatch(name)
    )
    if not _LABEL.fullmatch(s.job_namespace):
        yield f"JOB_NAMESPACE: {s.job_namespace!r} is no name of a namespace: use small letters, digits and -."
    if s.gpu_resource_name and not ("/" in s.gpu_resource_name and _is_key(s.gpu_resource_name)):
        yield f"GPU_RESOURCE_NAME: {s.gpu_resource_name!r} is no Kubernetes resource such as nvidia.com/gpu."


def _is_key(name: str) -> bool:
    prefix, slash, rest = name.rpartition("/")
    return _NAME.fullmatch(rest) is not None and (not slash or _SUBDOMAIN.fullmatch(prefix) is not None)
