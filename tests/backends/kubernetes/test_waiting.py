"""Jobs that wait or cannot start: what is said of them, and how long pman is patient."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pman.backends import kubernetes, retry
from pman.job import Job
from pman.status import JobState
from pman.templating.render import Spec
from tests.backends.kubernetes.script import CUT, STARTED_AT, Answer, Script, created, job_and_spec, pods_of


def running_one_of_two(job: Job, spec: Spec) -> list[Answer]:
    """What a GET reads of a job with one worker that runs, and one that has not begun."""
    status = {"active": 2, "ready": 1, "startTime": STARTED_AT}
    pods = [*pods_of(job, (0, "n")), *pods_of(job, (1, "m"), begun=False)]
    return [(200, {}, created(job, spec) | {"status": status}), (200, {}, {"items": pods})]


def mount_events(lasted_minutes: int) -> Answer:
    last = datetime.fromisoformat(STARTED_AT) + timedelta(minutes=lasted_minutes)
    event = {
        "type": "Warning", "reason": "FailedMount", "message": "hostPath type check failed: /x is not a directory",
        "firstTimestamp": STARTED_AT, "lastTimestamp": last.isoformat(),
    }  # fmt: skip
    return 200, {}, {"items": [event]}


STUCK = "worker 1: A directory of the job cannot be mounted: hostPath type check failed: /x is not a directory."


def test_one_stuck_worker_is_explained_and_ends_the_job(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    script.answers = [*running_one_of_two(job, spec), mount_events(14)]
    status = backend.status("ok2")
    assert (status.state, status.message) == (JobState.STARTED, STUCK)
    assert "involvedObject.uid%3Dp1" in script.asked[2][1]
    script.answers = [*running_one_of_two(job, spec), mount_events(15), (200, {}, created(job, spec))]
    assert backend.status("ok2").message == STUCK
    method, _, patch = script.asked[-1]
    assert (method, patch["spec"]) == ("PATCH", {"activeDeadlineSeconds": 1})
    notes = {"gave-up": STUCK, "gave-up-reason": "refused"}
    assert patch["metadata"]["annotations"] == {f"org.chrisproject.pman.{name}": text for name, text in notes.items()}


def test_a_job_that_may_not_be_ended_is_still_shown(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    denied = {"message": 'admission webhook "w.example.org" denied the request: jobs do not change'}
    script.answers = [*running_one_of_two(job, spec), mount_events(15), (403, {}, denied)]
    status = backend.status("ok2")
    assert (status.state, status.message) == (JobState.STARTED, STUCK)


def test_a_refused_worker_is_explained(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """The job has one pod less than workers."""
    job, spec = job_and_spec()
    status, pods = running_one_of_two(job, spec)
    pods[2]["items"].pop()
    refusal = {"reason": "FailedCreate", "message": 'Error creating: admission webhook "w" denied the request: no'}
    script.answers = [status, pods, (200, {}, {"items": [refusal]})]
    found = backend.status("ok2")
    assert found.state is JobState.STARTED
    assert found.message == 'Kubernetes refuses the job\'s pod: admission webhook "w" denied the request: no.'


@pytest.mark.slow
def test_events_are_read_only_when_they_are_needed(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Not while all workers run, nor when those that have not begun are being ended, nor for each of a crowd."""
    job, spec = job_and_spec()
    status, pods = running_one_of_two(job, spec)
    everybody = {"items": pods_of(job, (0, "n"), (1, "m"))}
    ending = status[2] | {"status": status[2]["status"] | {"conditions": [{"type": "FailureTarget", "status": "True"}]}}
    for answers in ([status, (200, {}, everybody)], [(200, {}, ending), pods]):
        script.answers = answers
        assert backend.status("ok2").message == ""
    crowd_job, crowd_spec = job_and_spec(number_of_workers=100)
    crowd = {"items": pods_of(crowd_job, *((index, "n") for index in range(100)), begun=False)}
    waiting = created(crowd_job, crowd_spec) | {"status": {"active": 100, "startTime": STARTED_AT}}
    script.answers = [(200, {}, waiting), (200, {}, crowd), *[(200, {}, {"items": []})] * 16]
    assert backend.status("ok2").state is JobState.NOT_STARTED


SUSPENDED = "The job is suspended: it waits until somebody resumes it."


@pytest.mark.parametrize(("held", "message"), [("True", SUSPENDED), ("False", "")])
def test_a_job_is_suspended_while_the_condition_holds(
    script: Script, backend: kubernetes.KubernetesBackend, held: str, message: str
) -> None:
    job, spec = job_and_spec()
    status = {"conditions": [{"type": "Suspended", "status": held}], "startTime": STARTED_AT}
    script.answers = [(200, {}, created(job, spec) | {"status": status}), (200, {}, {"items": []})]
    script.answers += [(200, {}, {"items": []})] if held == "False" else []
    found = backend.status("ok2")
    assert (found.state, found.message) == (JobState.NOT_STARTED, message)


DENIED: Answer = 403, {}, {"message": 'events is forbidden: User "u" cannot list resource "events" in API group ""'}


def stuck_pod(job: Job, waiting: dict[str, str], since: str = STARTED_AT) -> Answer:
    """The list of pods with one whose container waits since then."""
    (pod,) = pods_of(job, (0, "n"), begun=False)
    pod["status"]["conditions"][0]["lastTransitionTime"] = since
    pod["status"]["containerStatuses"] = [{"name": "job", "image": job.image, "state": {"waiting": waiting}}]
    return 200, {}, {"items": [pod]}


def test_events_that_may_not_be_read_cost_the_explanation_alone(
    script: Script, backend: kubernetes.KubernetesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """A pending job is answered, without a repeated call; the log has one line however many jobs wait."""
    job, spec = job_and_spec(number_of_workers=1)
    pending = created(job, spec) | {"status": {"active": 1, "ready": 0, "startTime": STARTED_AT}}
    (pod,) = pods_of(job, (0, "n"), begun=False)
    script.always = {"/events": DENIED, "/pods": (200, {}, {"items": [pod]}), "/jobs/ok2": (200, {}, pending)}
    for _ in range(3):
        assert retry.call(backend.status, "ok2").state is JobState.NOT_STARTED
    assert len(script.asked) == 9
    assert caplog.text.count("cannot list resource") == 1


def test_patience_acts_without_events(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """From the pod's own conditions: the job of an image that is not there is ended."""
    job, spec = job_and_spec(number_of_workers=1)
    pending = created(job, spec) | {"status": {"active": 1, "ready": 0, "startTime": STARTED_AT}}
    gone = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "i": ErrImagePull: i:1: not found'}
    script.always = {"/events": DENIED, "/pods": stuck_pod(job, gone), "/jobs/ok2": (200, {}, pending)}
    assert "cannot be pulled" in backend.status("ok2").message
    method, _, patch = script.asked[-1]
    assert (method, patch["spec"]) == ("PATCH", {"activeDeadlineSeconds": 1})
    assert patch["metadata"]["annotations"][kubernetes.NEVER_RAN] == "true"
    script.always["/pods"] = stuck_pod(job, gone, datetime.now(UTC).isoformat())
    backend.status("ok2")
    assert script.asked[-1][0] == "GET"


@pytest.mark.parametrize("answer", [CUT, (500, {}, {"message": "etcdserver: request timed out"})])
def test_events_that_cannot_be_read_now(script: Script, backend: kubernetes.KubernetesBackend, answer: Answer) -> None:
    job, spec = job_and_spec(number_of_workers=1)
    pending = created(job, spec) | {"status": {"active": 1, "ready": 0, "startTime": STARTED_AT}}
    gone = {"reason": "ErrImagePull", "message": "i:1: not found"}
    script.always = {"/events": answer, "/pods": stuck_pod(job, gone), "/jobs/ok2": (200, {}, pending)}
    assert "cannot be pulled" in backend.status("ok2").message
    assert {asked[0] for asked in script.asked} == {"GET"}


DENIED_PATCH = {"message": 'jobs.batch "ok2" is forbidden: User "u" cannot patch resource "jobs" in API group "batch"'}


@pytest.mark.parametrize("answer", [(403, {}, DENIED_PATCH), (500, {}, {"message": "etcdserver: timeout"}), CUT])
def test_a_stuck_job_that_pman_cannot_change_is_shown(
    script: Script, backend: kubernetes.KubernetesBackend, answer: Answer
) -> None:
    """In one attempt: the next GET makes another."""
    job, spec = job_and_spec()
    script.answers = [*running_one_of_two(job, spec), mount_events(15), answer]
    assert retry.call(backend.status, "ok2").message == STUCK
