"""The fault proxy itself: a test of faults is worth what its faults are."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fakes.faultproxy import FaultProxy
from tests.rig import wait_for


class _Target(http.server.BaseHTTPRequestHandler):
    paths: list[str] = []  # noqa: RUF012 - shared on purpose

    def do_GET(self) -> None:
        self._answer(b"ok")

    def do_POST(self) -> None:
        self._answer(str(len(self.rfile.read(int(self.headers["Content-Length"])))).encode())

    def _answer(self, body: bytes) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    _Target.paths.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Target) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with FaultProxy(f"tcp://127.0.0.1:{server.server_address[1]}") as proxy:
            yield proxy
        server.shutdown()


def get(proxy: FaultProxy, path: str) -> str:
    return requests.get(f"http{proxy.url.removeprefix('tcp')}{path}", timeout=2).text


def test_cut_before_and_after(proxy: FaultProxy) -> None:
    proxy.cut_before(b"/lost")
    proxy.cut_after(b"/unanswered")
    assert get(proxy, "/plain") == "ok"
    for path in ("/lost", "/unanswered"):
        with pytest.raises(requests.ConnectionError):
            get(proxy, path)
    assert _Target.paths == ["/plain", "/unanswered"]
    assert get(proxy, "/lost") == "ok"
    assert proxy.cuts == 2


def test_cut_within_again_and_again(proxy: FaultProxy) -> None:
    proxy.cut_within(b"/halved", skip=1, times=2)
    assert get(proxy, "/halved") == "ok"
    for _ in range(2):
        with contextlib.suppress(requests.ConnectionError):
            assert get(proxy, "/halved") != "ok"
    assert get(proxy, "/halved") == "ok"
    assert _Target.paths == ["/halved"] * 4


def test_late_empty_and_twice(proxy: FaultProxy) -> None:
    proxy.late_seconds = 0.4
    proxy.late(b"/late")
    proxy.empty(b"/empty")
    proxy.twice(b"/twice")
    before = time.monotonic()
    assert get(proxy, "/late") == "ok"
    assert time.monotonic() - before > 0.4
    assert get(proxy, "/empty") == ""
    assert get(proxy, "/twice") == "ok"
    assert _Target.paths == ["/late", "/empty", "/twice", "/twice"]
    assert proxy.cuts == 0


def test_twice_with_a_body_that_comes_later(proxy: FaultProxy) -> None:
    proxy.twice(b"POST /made")
    for number in range(2):
        answer = requests.post(f"http{proxy.url.removeprefix('tcp')}/made", data=b"x" * 200_000, timeout=5)
        assert (answer.status_code, answer.text) == (200, "200000"), number
    assert _Target.paths == ["/made"] * 3


def test_hold_then_deliver(proxy: FaultProxy) -> None:
    """The request arrives although its client is gone."""
    proxy.hold(b"/held")
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"http{proxy.url.removeprefix('tcp')}/held", timeout=0.3)
    assert get(proxy, "/other") == "ok"
    assert _Target.paths == ["/other"]
    proxy.deliver()
    wait_for(lambda: proxy.late_answers, 10, "the late answer")
    assert proxy.late_answers[0].startswith(b"HTTP/1.0 200")
    assert _Target.paths == ["/other", "/held"]
    assert proxy.cuts == 0


def test_replace(proxy: FaultProxy) -> None:
    proxy.replace(b"ok", b"no")
    assert get(proxy, "/") == "no"
    assert proxy.replaced == 1


def test_hang_and_refuse(proxy: FaultProxy) -> None:
    proxy.hang()
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"http{proxy.url.removeprefix('tcp')}/late", timeout=0.3)
    proxy.resume()
    assert get(proxy, "/now") == "ok"
    proxy.refuse()
    with pytest.raises(requests.ConnectionError):
        get(proxy, "/down")
    proxy.accept()
    assert get(proxy, "/up") == "ok"


def test_random_cuts(proxy: FaultProxy) -> None:
    proxy.cut_at_random(0.3, seed=5)
    outcomes = [_outcome(proxy) for _ in range(40)]
    proxy.cut_at_random(0, seed=0)
    assert 0 < sum(outcomes) < 40
    assert proxy.cuts == outcomes.count(False)
    assert get(proxy, "/") == "ok"


def _outcome(proxy: FaultProxy) -> bool:
    try:
        return get(proxy, "/") == "ok"
    except requests.RequestException:
        return False


def test_unix_socket(proxy: FaultProxy, tmp_path: Path) -> None:
    with FaultProxy(proxy.url, f"unix://{tmp_path}/p.sock") as inner, FaultProxy(inner.url) as outer:
        assert get(outer, "/through") == "ok"
