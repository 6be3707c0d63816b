"""Cromwell's REST client: addresses, credentials, pooled connections, errors."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import rsa

from pman import settings
from pman.backends import cromwell
from pman.backends.cromwell import rest as cromwell_rest
from pman.errors import BackendError, Misconfigured, Unreachable


class Recorder:
    """Answers everything alike, a token endpoint apart, over kept connections; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []  # (path, Authorization)
        self.ports: set[int] = set()
        self.tokens = 0
        self.answer: tuple[Any, int] = ({"defaultBackend": "SLURM", "supportedBackends": ["SLURM", "Local"]}, 200)
        self.headers: dict[str, str] = {}  # of the answers
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                recorder.asked.append((self.path, self.headers.get("Authorization", "")))
                recorder.ports.add(self.client_address[1])
                self._send(*recorder.answer)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                recorder.tokens += 1
                token = f"token-{recorder.tokens}"
                self._send({"access_token": token, "expires_in": 3600, "token_type": "Bearer"}, 200)

            def _send(self, body: Any, code: int) -> None:
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(code)
                for name, value in {"Content-Length": str(len(data)), **recorder.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.stop()


def config(url: str, **more: str) -> settings.Settings:
    return settings.load({"CONTAINER_ENV": "cromwell", "CROMWELL_URL": url, "TIMELIMIT_MINUTES": "5"} | more)


@pytest.mark.parametrize("tail", ["", "/", "/api", "/api/", "/api/workflows/v1", "/api/workflows/v1/"])
@pytest.mark.parametrize("prefix", ["", "/behind/a/gateway"])
def test_addresses(recorder: Recorder, prefix: str, tail: str) -> None:
    cromwell.create(config(recorder.url + prefix + tail)).ping()
    assert recorder.asked == [(f"{prefix}/api/workflows/v1/backends", "")]


def test_user_and_password(recorder: Recorder) -> None:
    more = {"CROMWELL_AUTH_USER": "Aladdin", "CROMWELL_AUTH_PASSWORD": "open sesame"}
    cromwell.create(config(recorder.url, **more)).ping()
    assert recorder.asked[0][1] == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # the example of RFC 7617


def test_a_password_in_the_address_is_not_said(recorder: Recorder) -> None:
    """What pman says of Cromwell is read by users, also on a page that asks for no password."""
    place = recorder.url.partition("//")[2]
    backend = cromwell.create(config(f"http://Aladdin:open%20sesame@{place}"))
    backend.ping()
    assert recorder.asked[0][1] == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    recorder.answer = ("<html>", 200)
    nobody = cromwell.create(config("http://Aladdin:open%20sesame@127.0.0.1:9"))
    for one, where in ((backend, place), (nobody, "127.0.0.1:9")):
        with pytest.raises(Unreachable, match=f"Cromwell at http://{where}|answers at http://{where}") as caught:
            one.ping()
        assert "sesame" not in f"{caught.value.message} {caught.value.detail}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # google-auth 1 takes times without a time zone
def test_service_account(recorder: Recorder, tmp_path: Path) -> None:
    """One token for many calls; while Google does not answer, calls are refused and may be repeated."""
    private = rsa.newkeys(1024)[1].save_pkcs1().decode()
    key = {
        "type": "service_account", "client_email": "pman@example.iam.gserviceaccount.com", "private_key": private,
        "token_uri": f"{recorder.url}/token", "private_key_id": "1", "project_id": "p", "client_id": "2",
    }  # fmt: skip
    path = tmp_path / "key.json"
    path.write_text(json.dumps(key | {"token_uri": "http://127.0.0.1:9/"}))
    backend = cromwell.create(config(recorder.url, CROMWELL_SERVICE_ACCOUNT=str(path)))
    with pytest.raises(Unreachable):
        backend.ping()
    path.write_text(json.dumps(key))
    for _ in range(3):
        backend.ping()
    assert [who for _, who in recorder.asked] == ["Bearer token-1"] * 3
    assert recorder.tokens == 1


def test_a_missing_key_file_is_said_at_start() -> None:
    with pytest.raises(Misconfigured, match="CROMWELL_SERVICE_ACCOUNT"):
        cromwell.create(config("http://127.0.0.1:9", CROMWELL_SERVICE_ACCOUNT="/no/such/file"))


def test_connections_are_pooled(recorder: Recorder) -> None:
    backend = cromwell.create(config(recorder.url))
    for _ in range(20):
        backend.ping()
    assert len(recorder.ports) == 1
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: backend.ping(), range(200)))
    assert len(recorder.ports) <= 9


def test_a_backend_that_cromwell_does_not_have(recorder: Recorder) -> None:
    cromwell.create(config(recorder.url, CROMWELL_BACKEND="Local")).ping()
    with pytest.raises(Misconfigured, match=r"CROMWELL_BACKEND may be SLURM, Local"):
        cromwell.create(config(recorder.url, CROMWELL_BACKEND="PBS")).ping()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (({"message": "no  such\nthing"}, 400), BackendError, "Cromwell answers 400: no such thing."),
        (({"message": "denied"}, 403), BackendError, "Cromwell answers 403: denied. Look at CROMWELL_AUTH_USER"),
        (("<html>tea</html>", 502), Unreachable, "Cromwell answers 502: Bad Gateway."),
        (("slow down", 429), Unreachable, "Cromwell answers 429: slow down."),
        (("<html>welcome</html>", 200), Unreachable, "is not Cromwell"),
        (("[]", 200), Unreachable, "is not Cromwell"),
        (("", 302), BackendError, "Cromwell answers 302"),
    ],
)
def test_errors(recorder: Recorder, answer: tuple[Any, int], error: type[Exception], words: str) -> None:
    recorder.answer = answer
    with pytest.raises(error) as caught:
        cromwell.create(config(recorder.url)).ping()
    assert words in str(caught.value)
    assert caught.value.detail or not answer[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3), ("3600", 20), ("", 0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("-1", 0)]
)
def test_what_a_busy_gateway_asks_for_is_waited(recorder: Recorder, code: int, header: str, seconds: float) -> None:
    recorder.answer, recorder.headers = ("later", code), {"Retry-After": header}
    with pytest.raises(Unreachable) as caught:
        cromwell.create(config(recorder.url)).ping()
    assert caught.value.retry_after_seconds == seconds


def test_labels_of_the_site_are_checked_at_start() -> None:
    with pytest.raises(Misconfigured, match="JOB_LABELS: Cromwell takes 255 characters, not 256"):
        cromwell.create(config("http://127.0.0.1:9", JOB_LABELS=f"k={'v' * 256}"))


def test_cromwell_tools_is_imported_late() -> None:
    assert "cromwell_tools" not in vars(cromwell_rest)
