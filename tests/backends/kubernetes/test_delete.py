"""What a DELETE ends, and when it is done."""

from __future__ import annotations

import threading

import pytest

from pman.backends import kubernetes, retry
from pman.errors import Conflict, NotFound, Unreachable
from pman.status import JobState
from tests.backends.kubernetes.script import (
    CUT,
    STARTED_AT,
    Answer,
    Script,
    await_removals,
    created,
    finished,
    job_and_spec,
    pods_of,
    recorded,
)

NO_PODS: Answer = (200, {}, {"items": []})


def test_a_job_in_deletion_is_waited_for(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    old = created(job, spec, deletionTimestamp="2026-11-24T00:00:00Z")
    exists = recorded("create_duplicate_409")
    script.answers = [exists, (200, {}, old), exists, recorded("read_unknown_404"), (201, {}, created(job, spec))]
    assert backend.submit(job, spec).state is JobState.NOT_STARTED
    assert [asked[0] for asked in script.asked] == ["POST", "GET", "POST", "GET", "POST"]


def test_a_job_whose_pods_never_end(
    script: Script, backend: kubernetes.KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "REPLACE_SECONDS", 0)
    job, spec = job_and_spec()
    old = created(job, spec, deletionTimestamp="2026-11-24T00:00:00Z")
    (pod,) = pods_of(job, (0, "n"))
    for there, words in (
        ([pod | {"metadata": pod["metadata"] | {"deletionTimestamp": STARTED_AT}}], "its pods do not end, perhaps on"),
        ([pod], "controller manager may be down"),
        ([], "controller manager may be down"),
    ):
        script.answers = [recorded("create_duplicate_409"), (200, {}, old), (200, {}, {"items": there})]
        with pytest.raises(Conflict, match=f"ok2 is still there: .*{words}"):
            backend.submit(job, spec)


FOREIGN_UID = {"kind": "Status", "code": 409, "message": "the UID in the precondition does not match"}


def test_delete_ends_this_very_object_and_its_pods(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """It is marked before, and ends by its deadline where the removal does not come."""
    job, spec = job_and_spec()
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), (409, {}, FOREIGN_UID)]
    backend.delete("ok2")
    await_removals()
    metadata = {"uid": "u", "annotations": {"pman.deleted": "yes"}, "managedFields": [{}]}
    assert script.asked[1][::2] == ("PATCH", {"metadata": metadata, "spec": kubernetes.ENDED})
    assert script.asked[2][2] == {"propagationPolicy": "Foreground", "preconditions": {"uid": "u"}}


def test_delete_of_a_job_that_was_seen_does_not_read_it(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    script.answers = [(200, {}, finished(job, spec)), NO_PODS, (200, {}, {}), (200, {}, created(job, spec))]
    backend.status("ok2")
    backend.delete("ok2")
    await_removals()
    assert [asked[0] for asked in script.asked] == ["GET", "GET", "PATCH", "DELETE"]


def test_delete_waits_for_one_call(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """That a marked Job is removed takes time, and changes nothing for whoever asks."""
    job, spec = job_and_spec()
    script.answers = [(200, {}, finished(job, spec)), NO_PODS, (200, {}, {}), (200, {}, created(job, spec))]
    backend.status("ok2")
    go = threading.Event()
    script.before = lambda _: go.wait(30) if script.asked[-1][0] == "DELETE" else None
    backend.delete("ok2")
    go.set()
    await_removals()
    assert script.asked[-1][0] == "DELETE"


@pytest.mark.parametrize("code", [404, 409, 422])
@pytest.mark.parametrize("metadata", [{"uid": "v"}, {"uid": "v", "deletionTimestamp": STARTED_AT}])
def test_delete_of_a_job_that_is_another_one_looks_again(
    script: Script, backend: kubernetes.KubernetesBackend, code: int, metadata: dict[str, str]
) -> None:
    """One that is ending already may do so by a DELETE that got no answer."""
    job, spec = job_and_spec()
    found: Answer = 200, {}, created(job, spec, **metadata)
    script.answers = [(200, {}, finished(job, spec)), NO_PODS, (code, {}, FOREIGN_UID), found, (200, {}, {}), found]
    backend.status("ok2")
    backend.delete("ok2")
    await_removals()
    assert script.asked[-1][2]["preconditions"] == {"uid": "v"}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("again", [200, 404, 409])
def test_delete_whose_answer_is_lost(
    script: Script, backend: kubernetes.KubernetesBackend, seen: bool, again: int
) -> None:
    """It may have been done: then the Job is ending or gone, which is no reason to say that there is none."""
    job, spec = job_and_spec()
    found: Answer = 200, {}, finished(job, spec)
    script.answers = [found, *([NO_PODS] if seen else []), CUT, (200, {}, {}), CUT, (again, {}, FOREIGN_UID)]
    if seen:
        backend.status("ok2")
    retry.call(backend.delete, "ok2")
    await_removals()
    assert script.asked[-1][::2] == ("DELETE", {"propagationPolicy": "Foreground", "preconditions": {"uid": "u"}})


def test_delete_that_is_never_answered(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """503 while it is not certain that the Job is marked; from then on it is gone for pman."""
    job, spec = job_and_spec()
    script.answers = [(200, {}, created(job, spec)), *[CUT] * retry.ATTEMPTS]
    with pytest.raises(Unreachable):
        retry.call(backend.delete, "ok2")
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), *[CUT] * retry.ATTEMPTS]
    retry.call(backend.delete, "ok2")
    await_removals()
    assert script.answers == []


def test_a_deleted_job_that_is_left(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """There is no such job, and the next POST of the jid removes it."""
    job, spec = job_and_spec()
    left: Answer = 200, {}, created(job, spec)
    left[2]["metadata"]["annotations"] |= {"pman.deleted": "yes"}
    script.answers = [left]
    with pytest.raises(NotFound):
        backend.status("ok2")
    script.answers = [recorded("create_duplicate_409"), left, (200, {}, {}), (201, {}, created(job, spec))]
    assert backend.submit(job, spec).state is JobState.NOT_STARTED
    assert [asked[0] for asked in script.asked[1:]] == ["POST", "GET", "DELETE", "POST"]


def test_delete_without_the_right_to_patch(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    forbidden: Answer = 403, {}, {"message": 'jobs.batch "ok2" is forbidden: User "u" cannot patch resource "jobs"'}
    script.answers = [(200, {}, created(job, spec)), forbidden, (200, {}, {})]
    backend.delete("ok2")
    assert [asked[0] for asked in script.asked] == ["GET", "PATCH", "DELETE"]


def test_delete_of_a_job_that_a_policy_lets_nobody_change(
    script: Script, backend: kubernetes.KubernetesBackend
) -> None:
    """It is younger than the job, and asks for a label, say. A deletion changes nothing that it looks at."""
    job, spec = job_and_spec()
    refused = {"kind": "Status", "message": 'admission webhook "validate.kyverno.svc-fail" denied the request: no team'}
    script.answers = [(200, {}, created(job, spec)), (403, {}, refused), (200, {}, {})]
    backend.delete("ok2")
    assert [asked[0] for asked in script.asked] == ["GET", "PATCH", "DELETE"]


def test_delete_without_the_right_to_it(
    script: Script, backend: kubernetes.KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """The marked Job is gone for pman, and its pods end; the log names the right."""
    job, spec = job_and_spec()
    forbidden: Answer = 403, {}, {"message": 'jobs.batch "ok2" is forbidden: User "u" cannot delete resource "jobs"'}
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), *[forbidden] * retry.ATTEMPTS]
    backend.delete("ok2")
    await_removals()
    assert "may be left in Kubernetes: pman lacks a right" in caplog.text
