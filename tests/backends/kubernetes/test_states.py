"""The state table and the sentences of the Kubernetes backend, over what a real Kubernetes 1.35 was recorded to say."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from pman import policy, settings
from pman.backends import kubernetes as backend
from pman.backends.kubernetes import ends, objects, starts
from pman.backends.kubernetes.api import to_error
from pman.errors import BackendError, BadRequest, Refused, TooLarge, Unreachable
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating.render import Renderer, sample_job
from tests.rig import ROOT

RECORDINGS = ROOT / "tests" / "recordings" / "kubernetes"
RANK = {JobState.NOT_STARTED: 0, JobState.STARTED: 1, JobState.SUCCEEDED: 2, JobState.FAILED: 2}
Object = dict[str, Any]


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text())


# Its pod is there to show that nothing ever ran, so that no GET may call it started.
NEVER_RAN = {"pod_command_not_found"}
SCENARIOS: dict[str, list[Object]] = recorded("job_states")


def end_of(statuses: list[Object]) -> JobState | None:
    """What the conditions of the last status say."""
    held = {c["type"] for c in statuses[-1].get("conditions", []) if c["status"] == "True"}
    return JobState.SUCCEEDED if "Complete" in held else JobState.FAILED if "Failed" in held else None


@pytest.mark.parametrize("name", SCENARIOS)
def test_final_exactly_when_the_condition_says_so(name: str) -> None:
    """A Job's status alone: never undefined, final from the condition on and not before."""
    for row in SCENARIOS[name]:
        state = backend.job_state(row["status"])
        assert state is not JobState.UNDEFINED
        assert (state if state and state.final else None) == end_of([row["status"]]), row


@pytest.mark.parametrize("name", SCENARIOS)
def test_states_never_go_back(name: str) -> None:
    """Job and pods together, as a GET after each recorded event would have read them."""
    pods: dict[str, Object] = {}
    job: Object = {}
    seen = [JobState.NOT_STARTED]
    for row in recorded(name)["timeline"]:
        if "deletionTimestamp" in row and row["kind"] == "job":
            break  # no job any more for pman: 404
        if row["kind"] == "job":
            job = row["status"]
        elif row["kind"] == "pod" and row["event"] == "DELETED":
            pods.pop(row["name"], None)
        elif row["kind"] == "pod":
            pods[row["name"]] = {"status": row["status"]}
        read = {"metadata": {}, "status": job}
        seen.append(backend.job_state(job) or backend.pods_state(read, list(pods.values())))
    ranks = [RANK[state] for state in seen]
    assert ranks == sorted(ranks), seen
    if ended := end_of([job]):
        assert seen[-1] is ended
        assert (JobState.STARTED in seen) is (name not in NEVER_RAN)


def test_conditions_that_nobody_knows() -> None:
    strange: Object = {"conditions": [{"type": "Frozen", "status": "True"}]}
    assert backend.job_state(strange) is JobState.UNDEFINED
    assert backend.job_state(strange | {"ready": 1}) is JobState.STARTED
    assert backend.job_state({"conditions": [{"type": "Complete", "status": "False"}]}) is JobState.NOT_STARTED


def as_job(completions: int = 1, memory: str = "16Mi", condition: str = "BackoffLimitExceeded") -> Object:
    container = {"name": "main", "image": "localhost/busybox:1", "resources": {"limits": {"memory": memory}}}
    return {
        "metadata": {"uid": "u"},
        "spec": {
            "completions": completions,
            "completionMode": "Indexed",
            "template": {"spec": {"containers": [container], "activeDeadlineSeconds": 120}},
        },
        "status": {"startTime": "2026-11-23T15:31:00Z", "conditions": [{"type": "Failed", "reason": condition}]},
    }


def as_pods(rows: list[Object]) -> list[Object]:
    """Recorded pods (name and status) in the shape of the API."""
    spec = {"nodeName": "localhost", "containers": [{"name": "main", "image": "localhost/busybox:1"}]}
    return [
        {"metadata": {"name": row["name"], "uid": row["name"]}, "spec": spec, "status": row["status"]} for row in rows
    ]


FAILURES = {
    "job_failed_exit3": "The job ended with exit code 3.",
    "pod_killed_by_signal": "The job was ended by signal 9.",
    "pod_oom_killed": "The job exceeded its memory limit of 16 MiB (out of memory, exit code 137).",
    "pod_oom_child_of_shell": "The job exceeded its memory limit of 16 MiB (out of memory, exit code 9).",
    "pod_activeDeadlineSeconds_exceeded": "The job reached its time limit of 2 min.",
    "pod_deleted_under_running_job": "A pod of the job was deleted or lost, and its result with it.",
    "pod_command_not_found": 'The program could not be started: exec: "/no/such/program": stat /no/such/program: '
    "no such file or directory: unknown.",
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_why_a_job_failed(name: str) -> None:
    recording = recorded(name)
    pods = as_pods(recording.get("pods_final", recording.get("pods")))
    assert ends.failure(as_job(), pods) == FAILURES[name]


def test_why_one_of_two_workers_failed() -> None:
    pods = as_pods(recorded("job_failed_one_of_two")["pods_final"])
    job = as_job(completions=2)
    assert ends.failure(job, pods) == "worker 0: The job ended with exit code 7."
    job["spec"]["completionMode"] = "NonIndexed"  # of pman 6, whose workers have no numbers
    assert ends.failure(job, pods) == "The job ended with exit code 7."


def test_a_deadline_of_the_job() -> None:
    assert ends.failure(as_job(condition="DeadlineExceeded"), []) == "The job reached its time limit."


# Recording -> what the sentence begins with, and whether it may heal.
WAITING = {
    "image_never": ("The image localhost/busybox:1 is not on the node and may not be pulled.", False),
    "image_badname": ("The image localhost/busybox:1 has no valid name: Failed to apply default image tag", False),
    "image_pull": ("The image localhost/busybox:1 cannot be pulled: ", True),
    "pod_missing_secret": ('The container cannot be configured: secret "nosecret" not found.', False),
    "pod_runAsNonRoot_as_root": ("The container cannot be configured: container has runAsNonRoot", False),
    "pod_unschedulable": ("No node can take the job yet: 0/1 nodes are available: 1 Insufficient cpu.", True),
    "pod_hostPath_missing_ContainerCreating": (
        'A directory of the job cannot be mounted: MountVolume.SetUp failed for volume "v" : hostPath type check '
        "failed: /no/such/dir is not a directory.",
        False,
    ),
    "quota_pods_exceeded": (
        "Kubernetes refuses the job's pod: exceeded quota: q, requested: pods=1, used: pods=0, limited: pods=0.",
        False,
    ),
    "quota_cpu_request_missing": (
        "Kubernetes refuses the job's pod: failed quota: q: must specify requests.cpu for: main.",
        False,
    ),
    "podsecurity_baseline_hostPath": ("Kubernetes refuses the job's pod: violates PodSecurity", False),
    "serviceaccount_missing": (
        "Kubernetes refuses the job's pod: error looking up service account rec/nosuch: serviceaccount",
        False,
    ),
    "priorityclass_missing": (
        "Kubernetes refuses the job's pod: no PriorityClass with name nosuch was found.",
        False,
    ),
}  # fmt: skip


def ago(minutes: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


Events = Callable[[str], list[Object] | None]


def waiting(pods: list[Object], events: Events, job: Object | None = None) -> starts.Reason:
    job = job or as_job()
    return starts.waiting(job, pods, lacking=len(pods) < job["spec"]["completions"], events=events)


def event(reason: str, message: str, first: int = 0, last: int = 0) -> Object:
    """A warning, first and last seen so many minutes ago."""
    times = {name: ago(minutes) for name, minutes in (("first", first), ("last", last))}
    return {
        "type": "Warning", "reason": reason, "message": message,
        "firstTimestamp": times["first"], "lastTimestamp": times["last"],
    }  # fmt: skip


def minutes(reason: starts.Reason) -> int | None:
    return None if reason.lasted is None else round(reason.lasted.total_seconds() / 60)


@pytest.mark.parametrize("name", WAITING)
def test_why_a_job_waits(name: str) -> None:
    recording = recorded(name)
    times = event("", "", 30, 10)

    def events(uid: str) -> list[Object]:
        owner = f"Job/{recording['events'][-1]['object'].split('/')[-1]}" if uid == "u" else f"Pod/{uid}"
        seen = {name: times[name] for name in ("firstTimestamp", "lastTimestamp")}
        return [event | seen for event in recording["events"] if event["object"] == owner]

    reason = waiting(as_pods(recording["pods"]), events)
    sentence, can_heal = WAITING[name]
    assert reason.sentence.startswith(sentence)
    assert reason.sentence.endswith(".")
    assert reason.can_heal is can_heal
    if not can_heal:  # what the pod itself says holds now; what events say, when they were last seen
        by_pod = name.startswith(("image_", "pod_missing_secret", "pod_runAsNonRoot"))
        assert minutes(reason) == (30 if by_pod else 20)


def container_waits(reason: str, message: str) -> list[Object]:
    """A pod that was scheduled an hour ago and whose container waits."""
    pods = as_pods(recorded("pod_missing_secret")["pods"])
    for condition in pods[0]["status"]["conditions"]:
        condition["lastTransitionTime"] = ago(60)
    pods[0]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": reason, "message": message}}
    return pods


def test_patience_begins_with_the_cause() -> None:
    """After a long pull, say: neither what came before counts, nor another cause of the same kind."""
    seen = [
        event("Failed", "Failed to pull image: dial tcp: i/o timeout", 59, 40),
        event("Failed", 'Error: configmap "c" not found', 30, 25),
        event("Failed", 'Error: secret "s" not found', 2, 1),
    ]
    missing = waiting(container_waits("CreateContainerConfigError", 'secret "s" not found'), lambda _: seen)
    assert (missing.can_heal, minutes(missing)) == (False, 2)
    unknown = waiting(container_waits("CreateContainerConfigError", "something else"), lambda _: seen)
    assert (unknown.can_heal, unknown.lasted) == (False, None)


def test_patience_with_an_image_begins_with_its_first_refusal() -> None:
    said = 'Back-off pulling image "i": ErrImagePull: rpc error: request 77: repository does not exist or access denied'
    seen = [
        event("Failed", 'Failed to pull image "i": dial tcp: i/o timeout', 50, 20),
        event("Failed", 'Failed to pull image "i": rpc error: request 76: access denied', 4, 4),
        event("Failed", "Error: ErrImagePull", 50, 1),
    ]
    reason = waiting(container_waits("ImagePullBackOff", said), lambda _: seen)
    assert (reason.can_heal, minutes(reason)) == (False, 4)


@pytest.mark.parametrize(
    ("reason", "message", "can_heal"),
    [
        ("CreateContainerError", "context deadline exceeded", True),
        ("RunContainerError", "failed to reserve container name: name is reserved", True),
        ("CreateContainerError", "executable file `x` not found in $PATH: No such file or directory", False),
        ("CreateContainerError", "failed to generate spec: no command specified", False),
    ],
)
def test_a_container_that_is_not_made_may_yet_be(reason: str, message: str, can_heal: bool) -> None:
    assert waiting(container_waits(reason, message), lambda _: []).can_heal is can_heal


def test_a_mount_that_failed_and_was_made_is_forgotten() -> None:
    """Its events live on for an hour, while a large image is pulled."""
    pods = as_pods(recorded("pod_hostPath_missing_ContainerCreating")["pods"])
    pods[0]["status"]["conditions"][0] |= {"status": "True"}
    assert pods[0]["status"]["conditions"][0]["type"] == "PodReadyToStartContainers"
    assert waiting(pods, lambda _: pytest.fail("no need of events")) == starts.Reason("")


def test_a_mount_fails_for_as_long_as_it_is_reported() -> None:
    """Not until now: it may be made by now, with nobody having said so yet."""
    pods = as_pods(recorded("pod_hostPath_missing_ContainerCreating")["pods"])
    seen = [event("FailedMount", 'MountVolume.SetUp failed for volume "v" : hostPath type check failed: x', 40, 35)]
    assert minutes(waiting(pods, lambda _: seen)) == 5


def refused(said: str) -> str:
    return f"Error creating: {said}"


NOT_FITTING = 'pods "a-1" is forbidden: exceeded quota: q, requested: pods=1, used: pods=0, limited: pods=0'
FITTING = 'pods "a-2" is forbidden: exceeded quota: q, requested: pods=1, used: pods=9, limited: pods=9'


def test_patience_with_refusals_begins_with_the_cause() -> None:
    seen = [
        event("FailedCreate", refused(FITTING), 50, 50),
        event("FailedCreate", refused(NOT_FITTING), 7, 7),
        event("FailedCreate", f"(combined from similar events): {refused(NOT_FITTING)}", 40, 1),
    ]
    reason = waiting([], lambda _: seen)
    assert (reason.can_heal, minutes(reason)) == (False, 6)
    assert reason.sentence.startswith("Kubernetes refuses the job's pod: exceeded quota: q")
    assert minutes(waiting([], lambda _: seen[2:])) == 39  # the others are gone after an hour


@pytest.mark.parametrize(
    ("said", "words", "can_heal"),
    [
        ('admission webhook "v.example.org" denied the request: no root', "denied the request: no root", False),
        ('Pod "a-1" is invalid: spec.containers[0].image: Required value', "spec.containers[0].image: Req", False),
        ("pods \"a-1\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no", "no", False),
        ('Internal error occurred: failed calling webhook "v.example.org": EOF', "failed calling webhook", True),
        ("Timeout: request did not complete within requested timeout", "Timeout", True),
        (FITTING, "exceeded quota", True),
    ],
)
def test_refusals(said: str, words: str, can_heal: bool) -> None:
    reason = waiting([], lambda _: [event("FailedCreate", refused(said))])
    assert reason.can_heal is can_heal
    assert words in reason.sentence
    assert "Error creating" not in reason.sentence


@pytest.mark.parametrize(("limit", "can_heal"), [("2", True), ("500m", True), ("400m", False), ("0", False)])
def test_a_quota_that_is_merely_used_up_may_heal(limit: str, can_heal: bool) -> None:
    said = (
        'pods "a" is forbidden: exceeded quota: q, requested: limits.cpu=500m,pods=1, '
        f"used: limits.cpu=1800m,pods=3, limited: limits.cpu={limit},pods=9"
    )
    assert waiting([], lambda _: [event("FailedCreate", refused(said))]).can_heal is can_heal


def test_one_worker_of_several_waits() -> None:
    pods = as_pods(recorded("pod_missing_secret")["pods"])
    pods[0]["metadata"]["annotations"] = {objects.INDEX: "3"}
    reason = starts.waiting(as_job(completions=4), pods, lacking=False, events=lambda _: [])
    assert reason.sentence == 'worker 3: The container cannot be configured: secret "nosecret" not found.'


def test_a_lost_claim_is_told_from_a_busy_node() -> None:
    pods = as_pods(recorded("pod_unschedulable")["pods"])
    scheduled = next(c for c in pods[0]["status"]["conditions"] if c["type"] == "PodScheduled")
    scheduled["message"] = '0/1 nodes are available: persistentvolumeclaim "c" not found. not found'
    seen = [{"type": "Warning", "reason": "FailedScheduling", "message": scheduled["message"]}]
    seen[0] |= {"eventTime": ago(3), "firstTimestamp": None}
    reason = waiting(pods, lambda _: seen)
    assert (reason.can_heal, minutes(reason)) == (False, 3)


def test_quantities() -> None:
    texts = ["100m", "2", "64Mi", "1k", "1.5Gi", "3n", "7E", "1Ei", "junk", "1 "]
    numbers = [float(objects.quantity(text)) for text in texts]
    assert numbers == [0.1, 2, 64 * 2**20, 1000, 1.5 * 2**30, 3e-9, 7e18, 2**60, float("inf"), float("inf")]


def test_nothing_is_wrong_with_a_job_that_was_just_created() -> None:
    pods = as_pods(recorded("image_pull")["pods"])
    pods[0]["status"] = {"phase": "Pending"}
    assert waiting(pods, lambda _: pytest.fail("no need of events")).sentence == ""
    assert waiting([], lambda _: []).sentence == ""


def test_a_node_that_does_not_answer() -> None:
    assert "localhost" in starts.node_silent(as_pods(recorded("node_lost")["pods"]))
    for name in ("job_failed_exit3", "job_succeeded_timeline"):
        rows = [row for row in recorded(name)["timeline"] if row["kind"] == "pod"]
        assert not any(starts.node_silent(as_pods([row])) for row in rows)


ERRORS = {
    "rbac_forbidden_create_403": (Unreachable, 'cannot create resource "jobs"'),
    "rbac_forbidden_get_403": (Unreachable, "cannot get resource"),
    "rbac_forbidden_pod_log_403": (Unreachable, 'cannot get resource "pods/log"'),
    "rbac_forbidden_list_pods_403": (Unreachable, 'cannot list resource "pods"'),
    "create_unknown_namespace_404": (BackendError, 'namespaces "nosuchns" not found'),
    "create_unknown_field_strict_400": (BackendError, 'unknown field "spec.paralellism"'),
    "create_bad_quantity_400": (BackendError, "quantities must match"),
    "create_wrong_type_400": (BackendError, "cannot be handled as a Job"),
    "create_bad_env_name_422": (BadRequest, "spec.template.spec.containers[0].env[0].name"),
    "create_way_too_large": (TooLarge, "3145728"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    answer = recorded(name)
    error = to_error(answer["status"], answer["body"])
    kind, words = ERRORS[name]
    assert isinstance(error, kind)
    assert words in str(error)


def test_errors_of_quota_and_overload() -> None:
    quota = to_error(403, recorded("quota_jobs_exceeded_403")["create"]["body"])
    assert type(quota) is Refused
    assert "exceeded quota" in str(quota)
    overload = to_error(429, {"message": "too many requests"}, "3")
    assert isinstance(overload, Unreachable)
    assert overload.retry_after_seconds == 3
    assert type(to_error(503, {"code": 14, "message": "of a gateway before it", "details": []})) is Unreachable


@pytest.mark.parametrize(
    "said",
    [
        'admission webhook "validation.gatekeeper.sh" denied the request: [no-root] containers cannot run as root',
        'admission webhook "p.example.org" denied the request: team a cannot use resource limits above 4',
    ],
)
def test_a_policy_that_says_cannot_is_no_missing_right(said: str) -> None:
    assert type(to_error(403, {"message": said})) is Refused


# ------------------------------------------------------------------------------------------- ends, and what they hide

ENDS: dict[str, Any] = recorded("ends")
FAILED = {
    "sidecar": "The job ended with exit code 3.",  # beside a native side-car, which kubelet then kills
    "hungpull": "The job reached its time limit of 0.416667 min before its program had begun: Failed to pull image "
    '"127.0.0.1:26999/x:1": ',
    "dl": "The job reached its time limit of 0.166667 min.",
    "evict143": "Kubernetes took a pod of the job away (a drain, an eviction, a preemption, a lost node), and its logs "
    "are gone. The program did not fail: the job may be run again.",
    "evictnopfp": "A pod of the job was deleted or lost, and its result with it.",  # without podFailurePolicy
}  # fmt: skip


def end(name: str) -> tuple[Object, list[Object]]:
    """A recorded Job and its pods, in the shape of the API."""
    metadata = {"name": name, "annotations": {backend.JID: name}}
    recorded = copy.deepcopy(ENDS[name])
    return {"metadata": metadata} | recorded["job"], as_pods(recorded["pods"])


@pytest.mark.parametrize("mirror", [None, "mirror.example.org/fnndsc/pl-simpledsapp:2.1.0"])
def test_the_image_that_was_asked_for_is_shown(mirror: str | None) -> None:
    renderer = Renderer(settings.load({"STOREBASE": "/data"}), TARGETS)
    job = dataclasses.replace(sample_job(renderer.settings), policy=policy.Policy(image=mirror))
    made = yaml.safe_load(renderer.render(job, "k8s").text)
    assert made["spec"]["template"]["spec"]["containers"][0]["image"] == (mirror or job.image)
    assert backend._listed(made | {"status": {}}, []).image == job.image


@pytest.mark.parametrize("name", FAILED)
def test_why_a_job_ended(name: str) -> None:
    job, pods = end(name)
    events = [event for event in ENDS[name]["events"] if event["object"].startswith("Pod/")]
    assert backend.job_state(job["status"]) is JobState.FAILED
    assert ends.failure(job, pods, lambda _: events).startswith(FAILED[name])


def test_the_time_limit_names_the_time_before_the_program() -> None:
    """kubelet counts the pull of the image: 40 s of a minute, say."""
    job, pods = end("dl")
    job["spec"]["template"]["spec"]["activeDeadlineSeconds"] = 60
    pods[0]["status"]["startTime"] = "2026-11-30T10:49:54Z"
    assert ends.failure(job, pods) == (
        "The job reached its time limit of 1 min, which includes 40 s before its program began, perhaps for its image; "
        "the program ran for 15 s."
    )


def test_a_failing_container_beside_the_job_is_named() -> None:
    """An init container: the program has not begun."""
    job, pods = end("sidecar")
    status = pods[0]["status"]
    status["containerStatuses"][0]["state"] = {"waiting": {"reason": "PodInitializing"}}
    status["initContainerStatuses"][0]["state"]["terminated"] |= {"exitCode": 7}
    assert ends.failure(job, pods) == "The container proxy of the job ended with exit code 7."
    status["initContainerStatuses"][0]["state"]["terminated"] |= {"reason": "OOMKilled"}
    assert ends.failure(job, pods).startswith("The container proxy of the job failed. The machine ran out of memory")
    assert backend.pods_state(job | {"status": {"failed": 1}}, pods) is JobState.NOT_STARTED


def test_a_child_that_ran_out_of_memory_is_no_success() -> None:
    """The Job is Complete: its shell ended with 0."""
    job, pods = end("oom0")
    job["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "16Mi"}}
    assert backend.job_state(job["status"]) is JobState.SUCCEEDED
    status = backend._ended(job, JobState.SUCCEEDED, pods)
    assert status.state is JobState.FAILED
    assert status.message == (
        "The job exceeded its memory limit of 16 MiB (out of memory, exit code 0). It went on without the process that "
        "was killed, so its output may be incomplete."
    )


def test_a_success_under_eviction_is_marked() -> None:
    """A program that ends with 0 at SIGTERM; its pod is gone, so it may be that or a pod that was removed later."""
    job, pods = end("evict0")
    assert (backend.job_state(job["status"]), pods) == (JobState.SUCCEEDED, [])
    assert ends.flaw(job, pods).startswith("Pods of the job are gone (1), with their logs. ")
    ending = as_pods(ENDS["evictnopfp"]["pods_while_ending"])
    assert ends.flaw(job, ending) == (
        "Kubernetes told the job to end because its node is being drained, or somebody evicted it. The program then "
        "ended with exit code 0: see whether its output is complete."
    )


@pytest.mark.parametrize("reason", ends._DISRUPTIONS)
def test_why_kubernetes_ended_a_pod(reason: str) -> None:
    job, _ = end("evictnopfp")
    pods = as_pods(ENDS["evictnopfp"]["pods_while_ending"])
    pods[0]["status"] |= {"phase": "Failed"}
    pods[0]["status"]["conditions"][0]["reason"] = reason
    assert ends.failure(job, pods) == f"The job was ended by Kubernetes {ends._DISRUPTIONS[reason]}."


MOUNTS = [
    ("hostPath type check failed: /data/csi.sock is not a directory", False),
    ("mount failed: exit status 32 ... mounting s:/x failed, reason given by server: No such file or directory", False),
    ("mount.nfs: access denied by server while mounting s:/x", False),
    ('secret "s" not found', False),
    ("driver name d.example.org not found in the list of registered CSI drivers", True),
    ('volumeattachments.storage.k8s.io "csi-1" not found', True),
    (
        'volumeattachments.storage.k8s.io "csi-1" is forbidden: no relationship found between node "n" and this object',
        True,
    ),
    ("rpc error: code = NotFound desc = volume 7 not found", True),
    ('connection error: desc = "transport: dial unix /plugins/d/csi.sock: connect: no such file or directory"', True),
    ("failed to sync secret cache: timed out waiting for the condition", True),
    ("something that nobody knows", True),
]


@pytest.mark.parametrize(("said", "can_heal"), MOUNTS)
def test_which_mounts_can_heal(said: str, can_heal: bool) -> None:
    pods = as_pods(recorded("pod_hostPath_missing_ContainerCreating")["pods"])
    seen = [event("FailedMount", f'MountVolume.SetUp failed for volume "v" : {said}', 40, 20)]
    reason = waiting(pods, lambda _: seen)
    assert reason.can_heal is can_heal
    assert (minutes(reason) == 20) is not can_heal


@pytest.mark.parametrize(
    ("said", "can_heal"),
    [
        ("rpc error: code = NotFound desc = failed to pull and unpack image: r/timeout:1: not found", False),
        ("rpc error: code = NotFound desc = reading manifest latest in r/x: manifest unknown", False),
        ("failed to prepare extraction snapshot: parent snapshot sha256:7 does not exist: not found", True),
        ("dial tcp: lookup r.example.org: no such host", True),
        ("read: connection refused: unauthorized", True),
    ],
)
def test_which_pulls_can_heal(said: str, can_heal: bool) -> None:
    assert waiting(container_waits("ErrImagePull", said), lambda _: []).can_heal is can_heal


def test_a_queue_of_kueue() -> None:
    """Kueue's events are of its Workload, which is named after the Job."""
    job = as_job() | {"metadata": {"name": "chris-jid-1", "labels": {"kueue.x-k8s.io/queue-name": "imaging"}}}
    said = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor default, 3 more needed"
    seen = [
        event("Pending", said, 3, 2) | {"involvedObject": {"kind": "Workload", "name": "job-chris-jid-1-ab12c"}},
        event("Pending", "another", 1, 1) | {"involvedObject": {"kind": "Workload", "name": "job-chris-jid-10-ab12c"}},
    ]
    assert starts.suspended(job, lambda: seen) == f"The job waits until Kueue admits it from the queue imaging: {said}."
    untold = "The job waits until Kueue admits it from the queue imaging."
    assert starts.suspended(job, lambda: []) == starts.suspended(job, lambda: None) == untold


def test_what_is_said_without_events() -> None:
    """A wait that is short needs no word; a long one names what pman may not read."""
    job = as_job()
    assert waiting([], lambda _: None, job).sentence.startswith(
        "Kubernetes makes no pod for the job, perhaps by a quota"
    )
    job["status"]["startTime"] = ago(0)
    assert waiting([], lambda _: None, job).sentence == ""
    pods = as_pods(recorded("pod_hostPath_missing_ContainerCreating")["pods"])
    reason = waiting(pods, lambda _: None)
    assert reason.sentence.startswith("The pod waits for a directory of the job, or for its network.")
    assert reason.can_heal
