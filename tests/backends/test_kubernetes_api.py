"""pman and an API server that answers from a script: overload, credentials, objects in deletion."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from urllib3 import PoolManager

from pman import backends, settings
from pman.backends import kubernetes, logs, retry
from pman.backends.kubernetes import api as kubernetes_api
from pman.backends.kubernetes import podlogs
from pman.backends.kubernetes.api import Api, Endpoint
from pman.errors import BackendError, Conflict, Misconfigured, NotFound, TemplateError, TooLarge, Unreachable
from pman.job import Job, make_job, validate
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating.render import Renderer, Spec
from tests.rig import ROOT, wait_for, with_memory_kept

RECORDINGS = ROOT / "tests" / "recordings" / "kubernetes"
CONFIG = settings.load({"CONTAINER_ENV": "kubernetes", "STOREBASE": "/srv/store", "JOB_NAMESPACE": "rec"})
Answer = tuple[int, dict[str, str], Any]
CUT: Answer = (0, {}, None)  # the connection, in place of an answer
HANG: Answer = (-1, {}, None)  # nothing, for a second
NO_PODS: Answer = (200, {}, {"items": []})


def recorded(name: str) -> Answer:
    """The answer of a recording of one call."""
    found = json.loads((RECORDINGS / f"{name}.json").read_text())
    return found["status"], {}, found["body"]


class Script:
    """An HTTP server that gives its answers in order, beside those that it always gives; it notes what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.always: dict[str, Answer] = {}  # by a part of the path, in place of one of the answers
        self.asked: list[tuple[str, str, Any]] = []
        self.before: Callable[[str], object] = lambda _: None
        self.headers: list[Any] = []
        self.moments: list[float] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                script.asked.append((self.command, self.path, json.loads(body or b"null")))
                script.headers.append(self.headers)
                script.moments.append(time.monotonic())
                fixed = next((answer for part, answer in script.always.items() if part in self.path), None)
                status, headers, answer = fixed or script.answers.pop(0)
                script.before(self.path)
                if status <= 0:
                    time.sleep(-status)
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PATCH = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.shutdown()
    script.server.server_close()
    assert script.answers == []


@pytest.fixture
def backend(script: Script) -> Iterator[kubernetes.KubernetesBackend]:
    pool = PoolManager()
    yield kubernetes.KubernetesBackend(Api(lambda: Endpoint(script.url, pool, dict)), CONFIG)
    pool.clear()


def job_and_spec(**fields: Any) -> tuple[Job, Spec]:
    request = {
        "jid": "ok2", "args": ["$(x)"], "auid": "a", "number_of_workers": 2, "cpu_limit": 100, "memory_limit": 64,
        "gpu_limit": 0, "image": "localhost/busybox:1", "entrypoint": ["sh"], "type": "fs",
    }  # fmt: skip
    job = make_job(validate(request | fields), CONFIG)
    return job, Renderer(CONFIG, TARGETS).render(job, "k8s")


STARTED_AT = "2026-11-24T00:00:00Z"


def created(job: Job, spec: Spec, **metadata: Any) -> dict[str, Any]:
    """What the API server answers for a Job that was just created from `spec`."""
    document: dict[str, Any] = json.loads(kubernetes._body(job, spec))
    document["metadata"] |= {"uid": "u", "resourceVersion": "7", "creationTimestamp": STARTED_AT, **metadata}
    return document | {"status": {}}


def test_create_sends_the_rendered_text(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    script.answers = [(201, {}, created(job, spec))]
    status = backend.submit(job, spec)
    assert (status.state, status.cmd, status.image) == (JobState.NOT_STARTED, job.cmd, job.image)
    (asked,) = script.asked
    assert asked[:2] == ("POST", "/apis/batch/v1/namespaces/rec/jobs?fieldValidation=Strict")
    assert asked[2]["spec"]["template"]["spec"]["containers"][0]["args"] == ["$$(x)", "/share/outgoing"]


@pytest.mark.slow
def test_retry_after_is_honoured(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    busy = {"kind": "Status", "message": "too many requests, please try again later", "code": 429}
    script.answers = [
        (429, {"Retry-After": "1"}, busy),
        (503, {"Retry-After": "1"}, busy),
        (201, {}, created(job, spec)),
    ]
    assert retry.call(backend.submit, job, spec).jid == "ok2"
    assert all(later - sooner >= 1 for sooner, later in zip(script.moments, script.moments[1:], strict=False))


def test_overload_that_lasts(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    busy = {"kind": "Status", "message": "please try again later", "code": 429}
    script.answers = [(429, {}, busy)] * retry.ATTEMPTS
    with pytest.raises(Unreachable, match=r"429.*please try again later"):
        retry.call(backend.status, "ok2")


def test_nobody_is_asked_again_after_longer_than_a_client_waits(script: Script) -> None:
    assert kubernetes_api.to_error(429, {}, "3600").retry_after_seconds == 20  # type: ignore[attr-defined]
    assert kubernetes_api.to_error(429, {}, "Wed, 21 Oct").retry_after_seconds == 0  # type: ignore[attr-defined]


def test_credentials_are_read_again_when_they_are_refused(script: Script) -> None:
    tokens = iter(("old", "new"))

    def connect() -> Endpoint:
        token = next(tokens)
        return Endpoint(script.url, pool, lambda: {"Authorization": f"Bearer {token}"})

    pool = PoolManager()
    job, spec = job_and_spec()
    script.answers = [recorded("bad_token_401"), (201, {}, created(job, spec))]
    assert retry.call(kubernetes.KubernetesBackend(Api(connect), CONFIG).submit, job, spec).jid == "ok2"
    assert [headers["Authorization"] for headers in script.headers] == ["Bearer old", "Bearer new"]
    pool.clear()


def test_inside_a_cluster(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account's files are found, an IPv6 address is put into brackets, and a replaced token is read."""
    (tmp_path / "token").write_text("one\n")
    monkeypatch.setattr(kubernetes_api, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    endpoint = kubernetes_api.connect()
    assert endpoint.url == "https://[fd00::1]:443"
    assert endpoint.credentials() == {"Authorization": "Bearer one"}
    (tmp_path / "token").write_text("two\n")
    assert endpoint.credentials() == {"Authorization": "Bearer one"}
    assert kubernetes_api.connect().credentials() == {"Authorization": "Bearer two"}


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


def test_jobs_of_others_are_nobodys(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """A Job of the same name without pman's annotations: never read, never deleted, never taken for the one posted."""
    job, spec = job_and_spec()
    foreign = created(job, spec, annotations={})
    script.answers = [(200, {}, foreign), (200, {}, foreign), recorded("create_duplicate_409"), (200, {}, foreign)]
    for call in (backend.status, backend.delete):
        with pytest.raises(NotFound):
            call("ok2")
    with pytest.raises(Conflict, match="not pman's"):
        backend.submit(job, spec)
    assert {asked[0] for asked in script.asked} == {"GET", "POST"}


FOREIGN_UID = {"kind": "Status", "code": 409, "message": "the UID in the precondition does not match"}


def test_delete_ends_this_very_object_and_its_pods(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """It is marked before, and ends by its deadline where the removal does not come."""
    job, spec = job_and_spec()
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), (409, {}, FOREIGN_UID)]
    backend.delete("ok2")
    marked = {"metadata": {"uid": "u", "annotations": {"pman.deleted": "yes"}}, "spec": {"activeDeadlineSeconds": 1}}
    assert script.asked[1][::2] == ("PATCH", marked)
    assert script.asked[2][2] == {"propagationPolicy": "Foreground", "preconditions": {"uid": "u"}}


def finished(job: Job, spec: Spec, **metadata: Any) -> dict[str, Any]:
    states = json.loads((RECORDINGS / "job_states.json").read_text())
    return created(job, spec, **metadata) | {"status": states["job_indexed"][-1]["status"]}


def test_delete_of_a_job_that_was_seen_does_not_read_it(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    script.answers = [(200, {}, finished(job, spec)), NO_PODS, (200, {}, {}), (200, {}, created(job, spec))]
    backend.status("ok2")
    backend.delete("ok2")
    assert [asked[0] for asked in script.asked] == ["GET", "GET", "PATCH", "DELETE"]


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
    assert script.asked[-1][::2] == ("DELETE", {"propagationPolicy": "Foreground", "preconditions": {"uid": "u"}})


def test_delete_that_is_never_answered(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """503 while it is not certain that the Job is marked; from then on it is gone for pman."""
    job, spec = job_and_spec()
    script.answers = [(200, {}, created(job, spec)), *[CUT] * retry.ATTEMPTS]
    with pytest.raises(Unreachable):
        retry.call(backend.delete, "ok2")
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), *[CUT] * retry.ATTEMPTS]
    retry.call(backend.delete, "ok2")


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


def test_delete_without_the_right_to_it(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """That the Job is marked does not make it a success."""
    job, spec = job_and_spec()
    forbidden: Answer = 403, {}, {"message": 'jobs.batch "ok2" is forbidden: User "u" cannot delete resource "jobs"'}
    script.answers = [(200, {}, created(job, spec)), (200, {}, {}), *[forbidden] * retry.ATTEMPTS]
    with pytest.raises(Unreachable, match="cannot delete"):
        backend.delete("ok2")


def test_what_a_finished_job_costs(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """One call more than its logs need: the Job itself."""
    job, spec = job_and_spec()
    pods = recorded("pods_list_running")
    script.answers = [(200, {}, finished(job, spec)), pods]
    for index, pod in enumerate(reversed(pods[2]["items"])):
        pod["metadata"]["labels"] |= {"batch.kubernetes.io/job-completion-index": str(index)}
        pod["status"]["phase"] = "Succeeded"
        script.always[f"/{pod['metadata']['name']}/log"] = 200, {}, (b"zero\n", b"one\n")[index]
    status = backend.status("ok2")
    assert status.state is JobState.SUCCEEDED
    assert backend.logs(status, 100) == "=== worker 0 ===\nzero\n=== worker 1 ===\none\n"
    assert [path.split("?")[0].rsplit("/", 1)[-1] for _, path, _ in script.asked] == ["ok2", "pods", "log", "log"]
    assert status.message == ""


def test_long_logs_take_little_memory(script: Script) -> None:
    pool = PoolManager()
    api = Api(lambda: Endpoint(script.url, pool, dict))
    script.answers = [(200, {}, b"x" * 5_000_000 + b"end"), (204, {}, b""), recorded("log_while_ContainerCreating_400")]
    assert api.tail("/log", {}, 10, 9) == b"xxxxxxxend"
    assert [api.tail("/log", {}, 10, 9), api.tail("/log", {}, 10, 9)] == [b"", b""]
    pool.clear()


def pods_of(job: Job, *places: tuple[int, str], begun: bool = True) -> list[dict[str, Any]]:
    """Pods of a job at (index, node)."""
    status = recorded("pods_list_running")[2]["items"][0]["status"]
    waits = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
    return [
        {
            "metadata": {
                "name": f"p{index}", "uid": f"p{index}", "creationTimestamp": STARTED_AT,
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            },
            "spec": {"nodeName": node, "containers": [{"name": "job", "image": job.image}]},
            "status": status if begun else waits,
        }
        for index, node in places
    ]  # fmt: skip


def test_workers_keep_their_numbers_when_pods_are_lost(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec(number_of_workers=4)
    failed = json.loads((RECORDINGS / "job_states.json").read_text())["job_failed_one_of_two"][-1]["status"]
    for left in ((1, 2), (2,)):
        pods = {"items": pods_of(job, *((index, "n") for index in left))}
        script.answers = [(200, {}, created(job, spec) | {"status": failed}), (200, {}, pods)]
        script.always = {f"/p{index}/log": (200, {}, f"I am {index}\n".encode()) for index in left}
        expected = "".join(f"=== worker {index} ===\nI am {index}\n" for index in left)
        assert backend.logs(backend.status("ok2"), 100) == expected


def test_logs_of_several_pods_on_a_silent_node(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """They are asked at once, and pods of other nodes are read."""
    job, spec = job_and_spec(number_of_workers=4)
    running = created(job, spec) | {"status": {"active": 4, "ready": 4, "startTime": STARTED_AT}}
    pods = pods_of(job, (0, "dead"), (1, "dead"), (2, "good"), (3, "dead"))
    script.answers = [(200, {}, running), (200, {}, {"items": pods})]
    script.always = {"/p2/log": (200, {}, b"two\n"), "/log": (504, {}, {"message": "no route"})}
    assert backend.logs(backend.status("ok2"), 100) == (
        "=== worker 0 ===\n[pman: these logs cannot be read now: no route]\n"
        "=== worker 1 ===\n[pman: these logs cannot be read now: no route]\n"
        "=== worker 2 ===\ntwo\n"
        "=== worker 3 ===\n[pman: these logs cannot be read now: no route]\n"
    )


def test_logs_end_when_their_time_is_over(
    script: Script, backend: kubernetes.KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "READ_SECONDS", 0)
    job, spec = job_and_spec()
    script.answers = [(200, {}, finished(job, spec)), (200, {}, {"items": pods_of(job, (0, "a"), (1, "b"))})]
    assert backend.logs(backend.status("ok2"), 100).count("no time left") == 2


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


def test_a_login_page_is_no_answer(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Of a proxy before the API server; nor are they a job's logs."""
    job, spec = job_and_spec(number_of_workers=1)
    login: Answer = 302, {"Location": "/login"}, b"<html>log in</html>"
    script.answers = [login]
    with pytest.raises(BackendError, match=r"error \(302\)"):
        backend.status("ok2")
    script.answers = [(200, {}, finished(job, spec)), (200, {}, {"items": pods_of(job, (0, "a"))}), login]
    with pytest.raises(BackendError, match=r"error \(302\)"):
        backend.logs(backend.status("ok2"), 10)


@pytest.mark.parametrize("status", [200, 403, 404])
def test_an_answer_without_its_document_says_nothing(
    script: Script, backend: kubernetes.KubernetesBackend, status: int
) -> None:
    """Not that the job is missing, nor that it is refused; a POST looks what has become of it."""
    job, spec = job_and_spec()
    empty: Answer = status, {}, b""
    found: Answer = 200, {}, finished(job, spec)
    script.answers = [empty, found, empty]
    with pytest.raises(Unreachable, match="was cut off"):
        backend.status("ok2")
    with pytest.raises(Unreachable, match="was cut off"):
        backend.status("ok2")
    script.answers = [empty]
    with pytest.raises(Unreachable, match="was cut off"):
        backend.submit(job, spec)


@pytest.mark.parametrize("page", [b"404 page not found\n", b"<html>no such site</html>", b'{"error": "no route"}'])
def test_a_page_that_is_not_found_is_no_missing_job(
    script: Script, backend: kubernetes.KubernetesBackend, page: bytes
) -> None:
    """Only a Status of Kubernetes says that a Job is missing; what stands before it has other words."""
    script.answers = [(404, {}, page)]
    with pytest.raises(Unreachable):
        backend.status("ok2")
    script.answers = [(404, {}, page)] * retry.ATTEMPTS
    with pytest.raises(Unreachable):
        retry.call(backend.delete, "ok2")


def test_a_page_is_no_job(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Such as a login page that a proxy gives as a 200, or an answer that was cut off within its document."""
    job, spec = job_and_spec()
    for page in (b"<html>log in</html>", json.dumps(created(job, spec)).encode()[:-9], b"[]"):
        script.answers = [(200, {}, page)]
        with pytest.raises(Unreachable):
            backend.status("ok2")


def test_a_list_that_took_too_long_is_begun_again(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec()
    page = {"items": [finished(job, spec)], "metadata": {"continue": "token"}}
    expired = {"reason": "Expired", "message": "The provided continue parameter is too old"}
    last: dict[str, Any] = {"items": [], "metadata": {}}
    script.answers = [(200, {}, page), (410, {}, expired), (200, {}, page), (200, {}, last), (200, {}, last)]
    assert [status.jid for status in retry.call(backend.jobs, 5)] == ["ok2"]


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


def test_the_listing_is_read_in_pages(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Of all jobs the newest are kept, and pods are asked for only where a Job does not say enough."""
    job, spec = job_and_spec()

    def listed(name: str, minute: int, status: dict[str, Any]) -> dict[str, Any]:
        annotations = created(job, spec)["metadata"]["annotations"] | {kubernetes.JID: name}
        made = f"2026-11-24T00:{minute:02}:00Z"
        return created(job, spec, annotations=annotations, uid=name, creationTimestamp=made) | {"status": status}

    condition = {"type": "Failed", "status": "True", "lastTransitionTime": STARTED_AT}
    done, failed = finished(job, spec)["status"], {"conditions": [condition]}
    pages = [[listed("a", 5, done), listed("b", 1, failed)], [listed("c", 9, failed), listed("d", 7, done)]]
    pods = pods_of(job, (0, "n"), (1, "n"))
    for pod, owner in zip(pods, ("a", "c"), strict=True):
        pod["metadata"]["labels"] = {"batch.kubernetes.io/controller-uid": owner}
    pods[1]["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."}

    def page(items: list[dict[str, Any]], more: str = "") -> Answer:
        return 200, {}, {"metadata": {"continue": more}, "items": items}

    script.answers = [page(pages[0], "t/1=="), page(pages[1]), page(pods[:1], "u"), page(pods[1:])]
    found = backend.jobs(3)
    assert [(status.jid, status.state) for status in found] == [
        ("c", JobState.FAILED), ("d", JobState.SUCCEEDED), ("a", JobState.SUCCEEDED),
    ]  # fmt: skip
    assert "Evicted" in found[0].message
    assert all("limit=500" in path for _, path, _ in script.asked)
    assert ["continue=t%2F1%3D%3D" in path for _, path, _ in script.asked] == [False, True, False, False]
    running = listed("e", 3, {"active": 1, "ready": 1, "startTime": STARTED_AT})
    script.answers = [page([running])]
    assert [status.jid for status in backend.jobs(3)] == ["e"]


def test_jobs_that_wait_for_a_queue_share_what_is_asked_for(
    script: Script, backend: kubernetes.KubernetesBackend
) -> None:
    """Kueue's words about all of them are one list, and a suspended job without a counter has no pods."""
    job, spec = job_and_spec()
    suspended = {"conditions": [{"type": "Suspended", "status": "True"}], "uncountedTerminatedPods": {}, "ready": 0}
    held = created(job, spec, labels={"kueue.x-k8s.io/queue-name": "imaging"}) | {"status": suspended}
    script.answers = [(200, {}, held), (200, {}, {"items": []}), (200, {}, held), (200, {}, held)]
    for _ in range(3):
        status = backend.status("ok2")
        assert (status.state, "queue imaging" in status.message) == (JobState.NOT_STARTED, True)
    assert [path.rpartition("/")[2][:6] for _, path, _ in script.asked] == ["ok2", "events", "ok2", "ok2"]


def test_a_listing_keeps_little_of_each_job(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Volumes, variables and managedFields of thousands of jobs took hundreds of MiB."""
    job, spec = job_and_spec(env=[f"NAME{number}={'x' * 900}" for number in range(20)])
    running = created(job, spec, managedFields=["x" * 900] * 20) | {"status": {"ready": 1, "startTime": STARTED_AT}}
    script.answers = [(200, {}, {"metadata": {}, "items": [running] * 200})]
    listed, kept_kib = with_memory_kept(lambda: backend.jobs(1000))
    assert len(listed) == 200
    assert kept_kib < 200 * 10


def test_jobs_of_pman_6_are_listed(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """They carry no label; whether one ran out of memory, its pod tells. Jobs of others are not listed."""
    job, spec = job_and_spec(number_of_workers=1)
    done = finished(job, spec)["status"]
    (pod,) = pods_of(job, (0, "n"))
    pod["metadata"]["labels"] = {kubernetes.OWNER: "u"}
    ended = {"name": job.jid, "state": {"terminated": {"exitCode": 0, "reason": "OOMKilled"}}}
    pod["status"] = {"phase": "Succeeded", "containerStatuses": [ended]}
    others = [of_pman_6(job, done, name="other")[2], of_pman_6(job, done)[2], created(job, spec, annotations={})]
    script.always = {"/jobs?": (200, {}, {"metadata": {}, "items": others})}
    script.always["/pods?labelSelector=batch.kubernetes.io%2Fcontroller-uid&"] = (
        200,
        {},
        {"metadata": {}, "items": [pod]},
    )
    (listed,) = backend.jobs(5)
    assert (listed.jid, listed.state) == ("ok2", JobState.FAILED)
    assert "out of memory" in listed.message


def test_logs_of_a_node_that_is_silent(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    job, spec = job_and_spec(number_of_workers=1)
    running = created(job, spec) | {"status": {"active": 1, "ready": 1, "startTime": "2026-11-24T00:00:00Z"}}
    refused = {"message": "Get https://192.0.2.1:10250/containerLogs/...: dial tcp: connect: connection refused"}
    pods = recorded("pods_list_running")
    pods[2]["items"] = pods[2]["items"][:1]
    script.answers = [(200, {}, running), pods, (500, {}, refused)]
    assert "cannot be read now: Get https" in backend.logs(backend.status("ok2"), 100)


@pytest.mark.parametrize("text", ["[]", "kind: Job", "a: [", "metadata: {name: ok2, annotations: {}}"])
def test_a_template_that_renders_no_job(text: str, backend: kubernetes.KubernetesBackend) -> None:
    with pytest.raises(TemplateError):
        backend.submit(job_and_spec()[0], Spec("k8s", text))


def test_a_job_that_is_too_large(backend: kubernetes.KubernetesBackend) -> None:
    with pytest.raises(TooLarge, match="1500000"):
        backend.submit(*job_and_spec(args=["x" * 100_000] * 16))


def test_an_answer_that_is_no_json(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    script.answers = [(418, {}, b"<html>teapot</html>")]
    with pytest.raises(BackendError, match="teapot"):
        backend.status("ok2")


def test_nobody_answers() -> None:
    pool = PoolManager()
    backend = kubernetes.KubernetesBackend(Api(lambda: Endpoint("http://127.0.0.1:9", pool, dict)), CONFIG)
    with pytest.raises(Unreachable, match=r"http://127.0.0.1:9 cannot be reached: .*refused"):
        backend.status("ok2")


def test_a_handshake_that_breaks_off_is_tried_again() -> None:
    """It says nothing about the certificate."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(4096)
                connection.sendall(b"\x15\x03\x03\x00\x02\x02\x50")  # TLS alert: internal_error
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        pool = PoolManager()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        backend = kubernetes.KubernetesBackend(Api(lambda: Endpoint(url, pool, dict)), CONFIG)
        with pytest.raises(Unreachable, match="cannot be reached"):
            backend.status("ok2")
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("text", ["a: [", "[]", "just words", "", "users: 7", "clusters: [7]", "\0"])
def test_a_file_that_is_no_kubeconfig(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    # The client reads KUBECONFIG once, when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Misconfigured) as caught:
        kubernetes_api.connect()
    said = str(caught.value)
    assert said.startswith("There is no Kubernetes cluster to talk to: ")
    assert said.endswith(". KUBECONFIG must name a kubeconfig file.")
    assert "\n" not in said


# ------------------------------------------------------------------------------------------------- what only explains


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


# ------------------------------------------------------------------------------------------------------ jobs of pman 6


def of_pman_6(job: Job, status: dict[str, Any], **container: Any) -> Answer:
    """A Job as the public source of 6.3.1 makes it (pman/kubernetesmgr.py), and as the API server then shows it."""
    paths = (("/share/incoming", job.input_dir), ("/share/outgoing", job.output_dir))
    mounts: list[dict[str, Any]] = [{"name": "storebase", "mountPath": path, "subPath": below} for path, below in paths]
    mounts[0]["readOnly"] = True
    made = {"name": job.jid, "image": job.image, "command": list(job.argv), "volumeMounts": mounts, **container}
    spec = {"backoffLimit": 0, "parallelism": job.workers, "completions": job.workers, "completionMode": "NonIndexed"}
    metadata = {"name": job.jid, "uid": "u", "resourceVersion": "7", "creationTimestamp": STARTED_AT}
    template = {"template": {"spec": {"restartPolicy": "Never", "containers": [made]}}}
    return 200, {}, {"metadata": metadata, "spec": spec | template, "status": status}


@pytest.mark.parametrize("jid", ["chris-jid-7", "chris-jid-0123456789"])
def test_jobs_of_pman_6_go_on(script: Script, backend: kubernetes.KubernetesBackend, jid: str) -> None:
    """Also under a name that pman gives to no job any more."""
    job, spec = job_and_spec(jid=jid, number_of_workers=1, args=["$$(x)"])
    (pod,) = pods_of(job, (0, "n"))
    pod["status"] = {"phase": "Running", "containerStatuses": [{"name": jid, "state": {"running": {}}}]}
    old = of_pman_6(job, {"active": 1, "ready": 1, "startTime": STARTED_AT})
    missing = recorded("read_unknown_404")
    script.always = {"/pods?": (200, {}, {"items": [pod]}), "/log": (200, {}, b"hello\n"), f"/jobs/{jid}": old}
    script.always |= {f"/jobs/{job.name}": missing} if job.name != jid else {}
    script.always["/jobs?"] = 409, {}, {}
    status = backend.status(jid)
    assert (status.jid, status.state, status.cmd, status.image) == (jid, JobState.STARTED, job.cmd, job.image)
    old[2]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].append({"name": "d", "mountPath": "/dev/shm"})
    assert backend.logs(status, 10) == "hello\n"
    assert f"container={jid}&" in script.asked[-1][1]
    assert backend.submit(job, spec).state is JobState.STARTED
    for other in ({"args": ["other"]}, {"output_dir": "elsewhere"}, {"number_of_workers": 2}):
        with pytest.raises(Conflict, match="another job"):
            backend.submit(*job_and_spec(**{"jid": jid, "number_of_workers": 1, "args": ["$$(x)"], **other}))
    backend.delete(jid)
    assert script.asked[-1][:2] == ("DELETE", f"/apis/batch/v1/namespaces/rec/jobs/{jid}")


def test_what_looks_almost_like_a_job_of_pman_6(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """`kubectl create job` names the container after the Job, too."""
    job, _ = job_and_spec()
    mounts = of_pman_6(job, {})[2]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    others: tuple[dict[str, Any], ...] = (
        {"volumeMounts": []},
        {"name": "other"},
        {"command": [*job.argv, "more"]},
        {"volumeMounts": [mounts[0] | {"readOnly": False}, mounts[1]]},
        {"volumeMounts": [*mounts, {"name": "x", "mountPath": "/x"}]},
    )
    for container in others:
        script.answers = [of_pman_6(job, {}, **container)] * 2
        for call in (backend.status, backend.delete):
            with pytest.raises(NotFound):
                call("ok2")


# -------------------------------------------------------------------------------------------------------------- nodes


def test_a_node_that_keeps_silent_costs_one_get_its_time(
    script: Script, backend: kubernetes.KubernetesBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others say at once why there are no logs, until it is time to ask again."""
    monkeypatch.setattr(kubernetes_api, "TIMEOUT", 0.2)
    job, spec = job_and_spec(number_of_workers=1)
    running = created(job, spec) | {"status": {"active": 1, "ready": 1, "startTime": STARTED_AT}}
    script.always = {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods_of(job, (0, "n"))})}
    script.always["/log"] = HANG
    for _ in range(4):
        assert "the node does not answer" in backend.logs(backend.status("ok2"), 10)
    assert sum("/log" in path for _, path, _ in script.asked) == 1
    pods = pods_of(job, (0, "n"))
    pods[0]["status"] = pods[0]["status"] | {"phase": "Succeeded"}
    script.always |= {"/jobs/ok2": (200, {}, finished(job, spec)), "/pods?": (200, {}, {"items": pods})}
    backend.logs(backend.status("ok2"), 10)
    assert sum("/log" in path for _, path, _ in script.asked) == 2
    script.always |= {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods_of(job, (0, "n"))})}
    monkeypatch.setattr(podlogs, "ASK_AGAIN_SECONDS", 0.0)
    backend._reader.silent["n"] = ("the node does not answer", 0.0)
    script.always["/log"] = 200, {}, b"back\n"
    assert backend.logs(backend.status("ok2"), 10) == "back\n"


def test_logs_of_many_workers_take_as_long_as_the_slowest(
    script: Script, backend: kubernetes.KubernetesBackend
) -> None:
    """All thirty are asked before the first has answered."""
    together = threading.Barrier(30)
    job, spec = job_and_spec(number_of_workers=30)
    pods = pods_of(job, *((index, "n") for index in range(30)))
    running = created(job, spec) | {"status": {"active": 30, "ready": 30, "startTime": STARTED_AT}}
    script.always = {"/jobs/ok2": (200, {}, running), "/pods?": (200, {}, {"items": pods}), "/log": (200, {}, b"x\n")}
    script.before = lambda path: together.wait(60) if "/log" in path else None
    assert backend.logs(backend.status("ok2"), 100).count("x\n") == 30


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JOB_LABELS", "x=a b"), ("JOB_LABELS", "-x=a"), ("JOB_LABELS", f"x={'a' * 64}"),
        ("JOB_LABELS", "app.kubernetes.io/managed-by=Helm"), ("JOB_LABELS", "org.chrisproject.pman.name=x"),
        ("NODE_SELECTOR", "disk=a/b"), ("PFCON_SELECTOR", "app=a b"), ("IMAGE_PULL_SECRETS", "A_b"),
        ("JOB_NAMESPACE", "Chris"), ("GPU_RESOURCE_NAME", "gpu"), ("CONTAINER_USER", "5-1:0"),
        ("CONTAINER_USER", "4294967295:0"), ("SECURITYCONTEXT_RUN_AS_USER", "4294967295"),
    ],
)  # fmt: skip
def test_what_would_fail_every_job_stops_the_start(variable: str, value: str) -> None:
    env = {"CONTAINER_ENV": "kubernetes", "STOREBASE": "/srv", "SECRET_KEY": "x" * 20}
    with pytest.raises(Misconfigured, match=variable):
        backends.check_for_service(settings.load(env | {variable: value}))
