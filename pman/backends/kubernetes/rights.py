"""What pman may do in the namespace of its jobs, by one call, and what it goes without where a right is missing."""

from collections.abc import Mapping
from typing import Any

REVIEW_PATH = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
Right = tuple[str, str, str]  # verb, API group, resource with subresource

# Without one of these a call of the contract has no answer. deploy/kubernetes/rbac.yaml grants all rights of this file.
NEEDED: tuple[Right, ...] = (
    ("create", "batch", "jobs"),
    ("get", "batch", "jobs"),
    ("list", "batch", "jobs"),
    ("delete", "batch", "jobs"),
    ("list", "", "pods"),
    ("get", "", "pods/log"),
)
# Without one of these users learn less, or wait longer.
HELPFUL: Mapping[Right, str] = {
    ("list", "", "events"): "some jobs that do not start are not explained, or wait for ever",
    ("patch", "batch", "jobs"): "jobs that cannot start wait for ever",
}


def review(namespace: str) -> dict[str, Any]:
    """The body of the call: https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/."""
    return {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace},
    }  # fmt: skip


def missing(status: Mapping[str, Any], namespace: str) -> tuple[list[str], list[str]]:
    """Sentences about needed and about helpful rights that the answer's status does not grant.

    No sentence where the list is incomplete, as that of an authorizer that cannot list its rules: use will tell.
    """
    if status.get("incomplete"):
        return [], []
    rules = status.get("resourceRules") or []
    needed = [f"{_lacks(right, namespace)}." for right in NEEDED if not _granted(right, rules)]
    helpful = [f"{_lacks(right, namespace)}: {cost}." for right, cost in HELPFUL.items() if not _granted(right, rules)]
    return needed, helpful


def _granted(right: Right, rules: list[Mapping[str, Any]]) -> bool:
    names = ("verbs", "apiGroups", "resources")
    # Rules with resourceNames give rights to objects of these names only.
    rows = [[rule.get(name) or [] for name in names] for rule in rules if not rule.get("resourceNames")]
    return any(all(want in have or "*" in have for want, have in zip(right, row, strict=True)) for row in rows)


def _lacks(right: Right, namespace: str) -> str:
    verb, group, resource = right
    what = f"{resource}.{group}" if group else resource
    return f"pman lacks the right to {verb} {what} in the namespace {namespace} (see deploy/kubernetes/rbac.yaml)"
