"""What pman is called, by whom, and whether its links hold wherever a proxy puts it."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urljoin

import flask
import pytest
import requests

from pman import settings
from pman.errors import Misconfigured
from pman.service import app, proxies
from tests.backends.test_local import local_rig
from tests.fakes.engine import Answer, Call, FakeEngine
from tests.rig import Rig, Server, running, wait_for

pytestmark = pytest.mark.slow  # each starts pman


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("proxies"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.mark.parametrize(
    ("path", "target"),
    [("/api/v1", "/api/v1/"), ("/api/v1/x", "/api/v1/x/"), ("/api/v1?a=b", "/api/v1/?a=b"),
     ("/jobs/x", "/jobs/x/"), ("/api/v1/jobs", "/api/v1/jobs/"), ("/api/v1/a:b", "/api/v1/a:b/")],
)  # fmt: skip
def test_redirects_hold_behind_any_proxy(server: Server, path: str, target: str) -> None:
    answer = requests.get(f"{server.url}{path}", allow_redirects=False, timeout=10)
    assert (answer.status_code, "http" in answer.headers["Location"], "http" in answer.text) == (308, False, False)
    for outside in ("https://pman.example", "https://example.org/tools/pman"):
        assert urljoin(f"{outside}{path}", answer.headers["Location"]) == f"{outside}{target}"


def test_a_slash_too_many_is_none_for_pfcon(server: Server, rig: Rig) -> None:
    """It puts COMPUTE_SERVICE_URL and the rest together without looking."""
    for base in ("//api/v1/", "/api/v1//"):
        answer = requests.post(f"{server.url}{base}", json=rig.request("slashes", "true"), timeout=30)
        assert (answer.status_code, answer.history) == (201, [])
        assert requests.get(f"{server.url}{base}slashes/", timeout=30).status_code == 200


def test_links_of_the_pages_hold_behind_any_proxy(server: Server, rig: Rig) -> None:
    server.post(rig.request("a job", "true") | {"jid": "linked"})
    for path in ("/", "/render", "/jobs/linked/", "/jobs/gone/"):
        page = requests.get(f"{server.url}{path}", timeout=10).text
        links = re.findall(r'(?:href|src|action)="([^"]*)"', page)
        assert links
        resolved = {urljoin(f"https://example.org/tools/pman{path}", link) for link in links}
        assert {"https://example.org/tools/pman/", "https://example.org/tools/pman/render"} <= resolved
        assert all(link.startswith("https://example.org/tools/pman/") for link in resolved)
    assert 'href="./jobs/linked/"' in requests.get(f"{server.url}/", timeout=10).text


@pytest.mark.parametrize(
    ("given", "called", "not_called"),
    [
        ("pman.example.org", ["pman.example.org:443", "PMAN.example.org."], ["x.pman.example.org", "example.org"]),
        (".Example.org", ["example.org", "a.b.example.org:5010"], ["badexample.org", "example.org.evil"]),
        ("*.example.org", ["a.example.org"], ["evil.test"]),
        ("pman:5010, other", ["pman", "pman:5010", "other:1"], ["pman.evil"]),
        ("https://pman.site/path", ["pman.site"], ["https"]),
        ("pman.site.", ["pman.site", "pman.site."], ["pman"]),
        ("pmän.example", ["xn--pmn-rla.example"], ["pman.example"]),
        ("my_pman", ["my_pman:5010"], ["mypman"]),
        ("*", ["anything.at.all", "x:1"], []),
        ("", ["localhost", "LOCALHOST.", "127.0.0.1:5010", "[::1]:5010", "10.1.2.3", ""], ["pman", "localhost.evil"]),
    ],
)
def test_allowed_hosts(given: str, called: list[str], not_called: list[str]) -> None:
    allowed = settings.load({"ALLOWED_HOSTS": given} if given else {}).allowed_hosts
    assert [host for host in called if not proxies.is_called_by(host, allowed)] == []
    assert [host for host in not_called if proxies.is_called_by(host, allowed)] == []


@pytest.mark.parametrize("given", ["a b", "http://", ":80", "a..b", "*x", "a.*"])
def test_what_is_no_host_name_stops_the_start(given: str) -> None:
    with pytest.raises(Misconfigured, match=r"ALLOWED_HOSTS: .* is no host name such as"):
        settings.load({"ALLOWED_HOSTS": given})


@pytest.mark.parametrize("given", ["proxy", "10.0.0.1/8", "1,2", "-1"])
def test_what_is_no_proxy_stops_the_start(given: str) -> None:
    with pytest.raises(Misconfigured, match=r"TRUSTED_PROXIES: .* is neither an address or network"):
        settings.load({"TRUSTED_PROXIES": given})


FORWARDED = {"X-Forwarded-For": "192.0.2.1, 198.51.100.7", "X-Forwarded-Host": "pman.example", "Host": "127.0.0.1"}


@pytest.mark.parametrize(
    ("trusted", "client", "believed"),
    [
        ("", "127.0.0.1", False),
        ("0", "127.0.0.1", False),
        ("10.0.0.0/8", "127.0.0.1", False),
        ("1", "198.51.100.7", True),
        ("2", "192.0.2.1", True),
        ("127.0.0.0/8", "198.51.100.7", True),
        ("127.0.0.1,198.51.100.0/24", "192.0.2.1", True),
    ],
)
@pytest.mark.parametrize("peer", ["127.0.0.1", "::ffff:127.0.0.1"])  # the second at a listener for both
def test_forwarded_headers_are_believed_of_trusted_proxies_alone(
    rig: Rig, trusted: str, client: str, believed: bool, peer: str
) -> None:
    values = {"SECRET_KEY": "x" * 20, "STOREBASE": str(rig.store), "ALLOWED_HOSTS": "*", "TRUSTED_PROXIES": trusted}
    application = app.create_app(settings.load(values | rig.env))
    seen: list[tuple[str | None, str]] = []
    application.before_request(lambda: seen.append((flask.request.remote_addr, flask.request.host)))
    headers = FORWARDED | {"Origin": "http://pman.example"}
    answer = application.test_client().post("/api/v1/", json={}, headers=headers, environ_base={"REMOTE_ADDR": peer})
    assert answer.status_code == (400 if believed else 403)  # 403: of another website
    assert seen == ([(client, "pman.example")] if believed else [])


def test_one_listener_for_ipv4_and_ipv6(rig: Rig) -> None:
    server = rig.start(LISTEN_ADDRESS="::")
    port = server.url.rpartition(":")[2]
    for host in ("127.0.0.1", "[::1]"):
        assert requests.get(f"http://{host}:{port}/healthz", timeout=10).status_code == 200


def test_pman_listens_at_once_whatever_the_backend_does(rig: Rig, tmp_path: Path) -> None:
    """Liveness is not readiness: what restarts a pman that does not listen would never let it wait for its engine.

    The engine takes connections and never answers, as a dockerd whose container runtime hangs.
    """
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(f"{tmp_path}/engine.sock")
        engine.listen(200)
        env = {"CONTAINER_ENV": "docker", "DOCKER_HOST": f"unix://{tmp_path}/engine.sock"}
        began = time.monotonic()
        server = rig.start(**env, DOCKER_TIMEOUT_SECONDS="60")
        assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200
        assert time.monotonic() - began < 30
        for path in ("/readyz", "/api/v1/x/"):
            answer = requests.get(f"{server.url}{path}", timeout=10)
            assert (answer.status_code, "docker has not answered" in answer.json()["message"]) == (503, True)
    wait_for(lambda: "cannot take jobs yet: The container engine" in server.log.read_text(), 30, "the engine's end")
    assert server.get("x").json()["message"].startswith("The container engine at")


def test_calls_that_hang_leave_what_asks_no_backend_served(rig: Rig, tmp_path: Path) -> None:
    env = {"CONTAINER_ENV": "docker", "DOCKER_HOST": f"unix://{tmp_path}/engine.sock", "MAX_CONCURRENT_REQUESTS": "2"}
    server = rig.start(**env)  # there is no engine yet
    wait_for(lambda: "cannot take jobs yet: The container engine" in server.log.read_text(), 15, "the end of the start")

    def hang() -> int:
        while "is serving" in (answer := server.get("x")).text:
            time.sleep(0.01)  # the look below had the place
        return answer.status_code

    with socket.socket(socket.AF_UNIX) as engine, ThreadPoolExecutor(2) as pool:
        engine.bind(f"{tmp_path}/engine.sock")
        engine.listen(200)
        hung = [pool.submit(hang) for _ in range(2)]
        page = f"{server.url}/render"  # which takes a place and asks no backend
        wait_for(lambda: requests.get(page, timeout=10).status_code == 503, 15, "all places to be taken")
        for path in ("/healthz", "/metrics", "/api/v1/", "/api/v1/openapi.json"):
            assert requests.get(f"{server.url}{path}", timeout=10).status_code == 200
        engine.close()
        assert [each.result() for each in hung] == [503, 503]


def test_posts_that_wait_leave_room_for_what_reads(rig: Rig, tmp_path: Path) -> None:
    """An engine that gets images for a minute and more, as for the first jobs of many with a new one."""
    pulled = threading.Event()

    def create(_: Call) -> Answer:
        pulled.wait(60)
        return 400, {"message": "the end of the test"}

    with FakeEngine(tmp_path / "engine.sock") as engine, ThreadPoolExecutor(4) as pool:
        engine.routes["POST /containers/create"] = create
        server = rig.start(CONTAINER_ENV="docker", DOCKER_HOST=engine.url, MAX_CONCURRENT_REQUESTS="4")
        answers = [pool.submit(server.post, rig.request(f"waits-{number}", "true")) for number in range(4)]
        try:
            wait_for(lambda: any(answer.done() for answer in answers), 30, "one to be turned away")
            assert [server.get("x").status_code for _ in range(3)] == [404] * 3
        finally:
            pulled.set()
    assert sorted(answer.result().status_code for answer in answers) == [400, 400, 400, 503]
