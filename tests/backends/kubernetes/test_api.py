"""Calls that are refused, overloaded, cut off or answered by somebody else, and how pman logs in."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from urllib3 import PoolManager

from pman import backends, settings
from pman.backends import kubernetes, logs, retry
from pman.backends.kubernetes import api as kubernetes_api
from pman.backends.kubernetes.api import Api, Endpoint
from pman.errors import BackendError, Conflict, Misconfigured, NotFound, TemplateError, TooLarge, Unreachable
from pman.status import JobState
from pman.templating.render import Spec
from tests.backends.kubernetes.script import CONFIG, Answer, Script, created, finished, job_and_spec, pods_of, recorded


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


def test_a_login_page_is_no_answer(script: Script, backend: kubernetes.KubernetesBackend) -> None:
    """Of a proxy before the API server; nor are they a job's logs."""
    job, spec = job_and_spec(number_of_workers=1)
    login: Answer = 302, {"Location": "/login"}, b"<html>log in</html>"
    script.answers = [login]
    with pytest.raises(BackendError, match=r"error \(302\)"):
        backend.status("ok2")
    script.answers = [(200, {}, finished(job, spec)), (200, {}, {"items": pods_of(job, (0, "a"))}), login]
    with pytest.raises(BackendError, match=r"error \(302\)"):
        logs.of_job(backend, backend.status("ok2"), 10, 1 << 20)


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


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JOB_LABELS", "x=a b"), ("JOB_LABELS", "-x=a"), ("JOB_LABELS", f"x={'a' * 64}"),
        ("JOB_LABELS", "app.kubernetes.io/managed-by=Helm"), ("JOB_LABELS", "org.chrisproject.pman.name=x"),
        ("JOB_LABELS", "controller-uid=x"), ("JOB_LABELS", "batch.kubernetes.io/job-name=x"),
        ("NODE_SELECTOR", "disk=a/b"), ("PFCON_SELECTOR", "app=a b"), ("IMAGE_PULL_SECRETS", "A_b"),
        ("JOB_NAMESPACE", "Chris"), ("GPU_RESOURCE_NAME", "gpu"), ("CONTAINER_USER", "5-1:0"),
        ("CONTAINER_USER", "4294967295:0"), ("SECURITYCONTEXT_RUN_AS_USER", "4294967295"),
    ],
)  # fmt: skip
def test_what_would_fail_every_job_stops_the_start(variable: str, value: str) -> None:
    env = {"CONTAINER_ENV": "kubernetes", "STOREBASE": "/srv", "SECRET_KEY": "x" * 20}
    with pytest.raises(Misconfigured, match=variable):
        backends.check_for_service(settings.load(env | {variable: value}))
