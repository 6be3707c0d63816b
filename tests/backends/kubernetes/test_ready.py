"""What /readyz says of rights and of the version of the cluster."""

from __future__ import annotations

import threading

import pytest

from pman.backends import kubernetes
from pman.errors import BackendError
from tests.backends.kubernetes.script import Answer, Script
from tests.rig import wait_for


def granted(*rules: tuple[list[str], list[str], list[str]], incomplete: bool = False) -> Answer:
    rows = [dict(zip(("verbs", "apiGroups", "resources"), rule, strict=True)) for rule in rules]
    return 201, {}, {"status": {"resourceRules": rows, "nonResourceRules": [], "incomplete": incomplete}}


# The rules of the Role in the public chart pfcon 1.0.0 (FNNDSC/charts).
PUBLIC_CHART = (
    (["get", "list", "watch", "create", "update", "patch", "delete"], ["batch"], ["jobs"]),
    (["get", "list", "watch", "create", "update", "patch", "delete"], [""], ["pods"]),
    (["get", "list", "watch"], [""], ["pods/log"]),
)
NO_VERSION: Answer = (403, {}, {"message": 'forbidden: User "u" cannot get path "/version"'})
VERSION = {"major": "1", "minor": "30+", "gitVersion": "v1.30.4-eks"}


def test_ready_says_what_does_not_work_although_jobs_do(
    script: Script, backend: kubernetes.KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """In two calls that it waits for. The version is asked for once, and told from the next look on."""
    script.always = {"selfsubjectrulesreviews": granted(*PUBLIC_CHART), "/jobs?dryRun": (201, {}, {})}
    script.always["/version"] = 200, {}, VERSION
    may_answer = threading.Event()
    script.before = lambda path: path != "/version" or may_answer.wait(30)
    note = backend.ping()
    assert note is not None
    assert "lacks the right to list events in the namespace rec" in note
    assert "older" not in note
    may_answer.set()
    wait_for(lambda: "older than 1.31" in caplog.text, 30, "the version in the log")
    for _ in range(2):
        before = len(script.asked)
        note = backend.ping()
        assert note is not None
        assert "Kubernetes v1.30.4-eks is older than 1.31" in note
        assert len(script.asked) == before + 2
    assert [path for _, path, _ in script.asked].count("/version") == 1
    assert caplog.text.count("older than 1.31") == caplog.text.count("list events") == 1


@pytest.mark.parametrize(("answer", "asked"), [(NO_VERSION, 1), ((404, {}, {}), 2)])
def test_the_version_of_a_cluster_that_does_not_tell_it(
    script: Script, backend: kubernetes.KubernetesBackend, answer: Answer, asked: int
) -> None:
    """A refusal stays one. After another answer the next look asks again."""
    script.always = {"reviews": granted((["*"], ["*"], ["*"])), "/jobs?dryRun": (201, {}, {}), "/version": answer}
    for _ in range(2):
        assert backend.ping() is None
        wait_for(lambda: not any("_ask_version" in thread.name for thread in threading.enumerate()), 30, "the answer")
    assert [path for _, path, _ in script.asked].count("/version") == asked


def test_ready_where_rights_may_not_be_asked(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """The answer only explains."""
    denied = {
        "message": 'User "u" cannot create resource "selfsubjectrulesreviews" in API group "authorization.k8s.io"'
    }
    script.always = {"reviews": (403, {}, denied), "/jobs?dryRun": (201, {}, {}), "/version": (403, {}, denied)}
    assert "selfsubjectrulesreviews" in (backend.ping() or "")


def test_ready_without_a_needed_right(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    script.answers = [granted(*PUBLIC_CHART[:2])]
    with pytest.raises(BackendError, match="lacks the right to get pods/log in the namespace rec"):
        backend.ping()


@pytest.mark.parametrize(
    "review",
    [granted((["*"], ["*"], ["*"])), granted(incomplete=True), granted(*PUBLIC_CHART, (["*"], [""], ["events"]))],
)
def test_ready_with_all_rights(script: Script, backend: kubernetes.KubernetesBackend, review: Answer) -> None:
    """An authorizer that cannot list its rules may grant more than it says."""
    script.always = {"reviews": review, "/jobs?dryRun": (201, {}, {}), "/version": (200, {}, {"minor": "31"})}
    assert backend.ping() is None
