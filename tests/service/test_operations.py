"""Authentication, the limit on concurrent requests, metrics, and the API's description."""

from __future__ import annotations

import base64
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from pman.errors import Misconfigured
from pman.service.auth import Users, read_users
from tests.backends.test_local import local_rig
from tests.rig import Rig, Server, running, wait_for
from tests.service.test_http import refused_start

pytestmark = pytest.mark.slow  # each starts pman

PASSWORD = "correct horse: battery \u00e4"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("operations"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()
    path.write_text(f"# people\nchris:{hashed}\nold:{hashed.replace('$2b$', '$2y$')}\n")
    return path


def get(server: Server, path: str, auth: tuple[bytes, bytes] | None = None) -> requests.Response:
    headers = {"Authorization": f"Basic {base64.b64encode(b':'.join(auth)).decode()}"} if auth else {}
    return requests.get(f"{server.url}{path}", headers=headers, timeout=30)


def test_basic_authentication(rig: Rig, users_file: Path) -> None:
    server = rig.start(AUTH_USERS_FILE=str(users_file))
    right = (b"chris", PASSWORD.encode())
    for auth in (right, (b"old", PASSWORD.encode())):
        assert get(server, "/api/v1/", auth).status_code == 200
    wrong: list[tuple[bytes, bytes] | None] = [
        None,
        (b"chris", b"wrong"),
        (b"chris", b""),
        (b"nobody", PASSWORD.encode()),
        (b"", b""),
        (b"chris", b"x" * 100),
    ]
    for given_auth in wrong:
        for path in ("/api/v1/", "/api/v1/jobs/", "/api/v1/x/", "/metrics", "/readyz", "/nowhere"):
            answer = get(server, path, given_auth)
            assert answer.status_code == 401, (given_auth, path)
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
            said = "Wrong user or password." if given_auth else "A user and a password are needed."
            assert answer.json() == {"message": said}
    assert get(server, "/healthz").status_code == 200
    with_userinfo = server.url.replace("http://", "http://chris:correct%20horse%3A%20battery%20%C3%A4@")
    assert requests.get(f"{with_userinfo}/api/v1/", timeout=30).status_code == 200
    assert "horse" not in server.log.read_text()
    assert "authentication failed" in server.log.read_text()


def test_users_see_the_values_of_the_environment_if_they_ask(rig: Rig, users_file: Path) -> None:
    server, right = rig.start(AUTH_USERS_FILE=str(users_file)), (b"chris", PASSWORD.encode())
    request = rig.request("secret", "true", env=["TOKEN=hunter2"])
    user = ("chris", PASSWORD)
    assert requests.post(f"{server.url}/api/v1/", json=request, auth=user, timeout=30).status_code == 201
    place = "/api/v1/jobs/secret/spec"
    shown, hidden = get(server, f"{place}?environment=1", right), get(server, place, right)
    assert (shown.json()["environment"], "hunter2" in shown.text) == (True, True)
    assert (hidden.json()["environment"], "hunter2" in hidden.text) == (False, False)
    assert get(server, f"{place}?environment=1").status_code == 401


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://elsewhere.example"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "OWN"}, 201),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"}, 201),
        ({}, 201),
    ],
)
def test_a_browser_posts_and_deletes_for_no_other_website(
    rig: Rig, server: Server, headers: dict[str, str], code: int
) -> None:
    headers = {name: value.replace("OWN", server.url) for name, value in headers.items()}
    request = rig.request("website", "true")
    posted = server.call("POST", json=request, headers=headers | {"Content-Type": "text/plain"})
    assert posted.status_code == code
    assert posted.headers["X-Request-ID"]
    assert server.get("website").status_code == (200 if code == 201 else 404)
    deleted = server.call("DELETE", "website/", headers=headers)
    assert deleted.status_code == (204 if code == 201 else 403)


@pytest.mark.parametrize(
    ("host", "code"),
    [("evil.example:5010", 403), ("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200), ("10.1.2.3", 200),
     ("pman.test", 200), ("localhost.evil.example", 403), ("[", 200)],
)  # fmt: skip
def test_a_website_cannot_turn_its_name_on_a_local_pman(rig: Rig, host: str, code: int) -> None:
    server = rig.start(ALLOWED_HOSTS="Pman.Test")
    assert server.call("GET", headers={"Host": host}).status_code == code
    answer = server.call("POST", json=rig.request("rebound", "true"), headers={"Host": host})
    assert answer.status_code == (201 if code == 200 else 403)


def test_a_pman_that_others_reach_or_that_asks_for_users_goes_by_any_name(rig: Rig, users_file: Path) -> None:
    open_to_all = rig.start(LISTEN_ADDRESS="0.0.0.0")
    assert open_to_all.call("GET", headers={"Host": "pman:5005"}).status_code == 200
    assert "Whoever reaches LISTEN_ADDRESS can run jobs" in open_to_all.log.read_text()
    with_users = rig.start(AUTH_USERS_FILE=str(users_file))
    auth = ("chris", PASSWORD.encode())
    assert with_users.call("GET", headers={"Host": "pman:5005"}, auth=auth).status_code == 200


def test_listing_from_a_job_that_is_gone(server: Server) -> None:
    answer = server.call("GET", "jobs/", params={"after": "gone", "state": "started"})
    assert (answer.status_code, set(answer.json()["message"])) == (400, {"after"})
    answer = server.call("GET", "jobs/", params={"state": "odd"})
    assert (answer.status_code, set(answer.json()["message"])) == (400, {"state"})


def test_users_file_changes_and_goes(rig: Rig, users_file: Path) -> None:
    server = rig.start(AUTH_USERS_FILE=str(users_file))
    right = (b"chris", PASSWORD.encode())
    assert get(server, "/api/v1/", right).status_code == 200
    users_file.write_text("chris:" + bcrypt.hashpw(b"new", bcrypt.gensalt(5)).decode())
    assert get(server, "/api/v1/", right).status_code == 401
    assert get(server, "/api/v1/", (b"chris", b"new")).status_code == 200
    before = users_file.stat()
    users_file.write_text("chris:" + bcrypt.hashpw(b"newer", bcrypt.gensalt(5)).decode())
    os.utime(users_file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert get(server, "/api/v1/", (b"chris", b"new")).status_code == 401
    assert get(server, "/api/v1/", (b"chris", b"newer")).status_code == 200
    users_file.write_text("chris:plain")
    assert get(server, "/api/v1/", (b"chris", b"newer")).status_code == 401
    assert "nobody is let in: " in server.log.read_text()
    users_file.write_bytes(
        "\ufeffchris:".encode() + bcrypt.hashpw(b"newest", bcrypt.gensalt(5)) + b"\r\nj\xf6rg:plain\n"
    )
    assert get(server, "/api/v1/", (b"chris", b"newest")).status_code == 200
    assert f"{users_file}:2: a line must be user:hash" in server.log.read_text()
    users_file.unlink()
    assert get(server, "/api/v1/", (b"chris", b"new")).status_code == 401


def test_hashes_that_nothing_can_be_compared_with_are_refused_at_once(tmp_path: Path) -> None:
    """Else they would be a 500 for whoever comes, since an unknown user's password is compared with a hash, too."""
    path = tmp_path / "users"
    hashed = bcrypt.hashpw(b"x", bcrypt.gensalt(4)).decode()
    salt_ends = 28
    for bad in (hashed.replace("$04$", "$03$"), hashed.replace("$04$", "$32$"), f"{hashed[:salt_ends]}z{hashed[29:]}"):
        with pytest.raises(ValueError, match="salt"):
            bcrypt.checkpw(b"x", bad.encode())
        path.write_text(f"chris:{bad}\n")
        with pytest.raises(Misconfigured, match="users:1"):
            read_users(path)
    path.write_text(f"good:{hashed}\nchris:{bad}\n")
    assert list(read_users(path)) == ["good"]
    path.write_text("".join(f"user{n}:{bcrypt.gensalt(4).decode()}{hashed[29:]}\n" for n in range(200)))
    assert len(read_users(path)) == 200


def test_every_wrong_password_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever it is for, and however weak that user's hash is."""
    path = tmp_path / "users"
    hashes = {name: bcrypt.hashpw(b"x", bcrypt.gensalt(cost)).decode() for name, cost in (("weak", 4), ("strong", 7))}
    path.write_text("".join(f"{name}:{hashed}\n" for name, hashed in hashes.items()))
    users = Users(path, 1)
    hashpw, checkpw = bcrypt.hashpw, bcrypt.checkpw
    spent: list[int] = []

    def rounds(hashed: bytes) -> int:
        return 1 << int(hashed.split(b"$")[2])

    def count_hash(password: bytes, salt: bytes) -> bytes:
        spent.append(rounds(salt))
        return hashpw(password, salt)

    def count_check(password: bytes, hashed: bytes) -> bool:
        spent.append(rounds(hashed))
        return checkpw(password, hashed)

    monkeypatch.setattr(bcrypt, "hashpw", count_hash)
    monkeypatch.setattr(bcrypt, "checkpw", count_check)
    for name in ("weak", "strong", "nobody"):
        spent.clear()
        assert not users.allow(name, "wrong")
        assert sum(spent) == 2**7, name
    assert users.allow("weak", "x")
    path.write_text("")
    assert not users.allow("weak", "x")


def test_a_flood_of_wrong_passwords_keeps_no_known_user_out(rig: Rig, users_file: Path) -> None:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    users_file.write_text(f"chris:{hashed}\n")
    server = rig.start(AUTH_USERS_FILE=str(users_file), MAX_CONCURRENT_REQUESTS="8")
    right = (b"chris", PASSWORD.encode())
    assert get(server, "/api/v1/", right).status_code == 200
    answers: list[requests.Response] = []
    stop = threading.Event()

    def guess(number: int) -> None:
        while not stop.is_set():
            answers.append(get(server, "/api/v1/", (b"chris", f"wrong {number}".encode())))

    with ThreadPoolExecutor(7) as pool:  # one place is left for the known user
        guesses = [pool.submit(guess, number) for number in range(7)]
        try:
            wait_for(lambda: {answer.status_code for answer in answers} >= {401, 503}, 30, "both answers")
            known = {get(server, "/api/v1/", right).status_code for _ in range(20)}
        finally:
            stop.set()
        for each in guesses:
            each.result()
    assert known == {200}
    assert {answer.status_code for answer in answers} == {401, 503}
    turned_away = next(answer for answer in answers if answer.status_code == 503)
    assert (turned_away.headers["Retry-After"], "password" in turned_away.json()["message"]) == ("1", True)


def test_a_flood_is_turned_away_and_health_still_answers(rig: Rig) -> None:
    server = rig.start(MAX_CONCURRENT_REQUESTS="2")
    answers: list[requests.Response] = []
    request = rig.request("flood", "true")

    def post(_: int) -> None:
        answers.append(server.post(request))

    with ThreadPoolExecutor(24) as pool:
        flood = [pool.submit(post, number) for number in range(72)]
        wait_for(lambda: any(answer.status_code == 503 for answer in answers), 30, "a request to be turned away")
        assert get(server, "/healthz").status_code == 200
        for posted in flood:
            posted.result()
    codes = {answer.status_code for answer in answers}
    assert codes == {201, 503}
    turned_away = next(answer for answer in answers if answer.status_code == 503)
    assert turned_away.headers["Retry-After"] == "1"
    assert turned_away.json()["message"]
    assert server.post(request).status_code == 201
    server.delete("flood")


def counted(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)} ([0-9.e+]+)$", text, re.M))


def test_metrics(rig: Rig) -> None:
    server = rig.start()
    for number in range(5):
        assert server.post(rig.request(f"metric-{number}", "true")).status_code == 201
        server.wait_final(f"metric-{number}")
    assert server.post({"jid": "metric-bad"}).status_code == 400
    for _ in range(20):
        assert server.get("unknown-job").status_code == 404
    text = get(server, "/metrics").text
    assert counted(text, 'pman_http_requests_total{code="404",method="GET",route="/api/v1/<jid>/"}') == 20
    assert counted(text, 'pman_jobs_submitted_total{outcome="accepted"}') == 5
    assert counted(text, 'pman_jobs_submitted_total{outcome="BadRequest"}') == 1
    assert counted(text, 'pman_backend_seconds_count{operation="submit"}') == 5
    for number in range(5):
        server.delete(f"metric-{number}")


def test_a_setting_of_before_is_no_reason_to_stop(rig: Rig) -> None:
    server = rig.start(SERVER_PROCESSES="4")
    assert server.call("GET").status_code == 200
    assert "SERVER_PROCESSES has no effect: pman serves in one process." in server.log.read_text()


def test_a_port_in_use_and_a_state_directory_that_cannot_be(tmp_path: Path, rig: Rig) -> None:
    port = rig.start().url.rpartition(":")[2]
    message = refused_start(tmp_path, SECRET_KEY="x" * 20, STOREBASE="/tmp", PORT=port)
    assert f"PORT={port} cannot be listened on" in message
    message = refused_start(tmp_path, SECRET_KEY="x" * 20, STOREBASE="/tmp", LOCAL_STATE_DIR="/dev/null/x")
    assert "LOCAL_STATE_DIR=/dev/null/x cannot be made" in message


CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
)  # fmt: skip


def harmless(case: Any, known: str) -> Any:
    """The case, with a program that may be run, once, in place of one made up; half of the jids are of a job."""
    if isinstance(case.body, dict):
        if isinstance(case.body.get("entrypoint"), list) and case.body["entrypoint"][:1] not in ([], [""]):
            case.body["entrypoint"] = ["true", *case.body["entrypoint"][1:]]
        if isinstance(case.body.get("number_of_workers"), int):
            case.body["number_of_workers"] = min(1, case.body["number_of_workers"])
        if len(case.body) % 2 and len(case.body) > 9:  # a whole request: such numbers and images are seldom made up
            case.body |= {"image": "localhost/x:1", "entrypoint": ["true"], "jid": f"made-{len(str(case.body))}"}
            case.body |= dict.fromkeys(("number_of_workers", "cpu_limit", "memory_limit"), 1) | {"gpu_limit": 0}
            case.body |= {"input_dir": "in", "output_dir": "out"} if "input_dir" in case.body else {}
    if case.path_parameters and len(str(case.path_parameters.get("jid"))) % 2:
        case.path_parameters["jid"] = known
    return case


@pytest.mark.slow
def test_every_answer_fits_the_description(rig: Rig) -> None:
    """schemathesis makes requests from the description, good and bad; no answer is a 5xx or outside the description."""
    server = rig.start()
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/api/v1/openapi.json")
    wanted = [checks.CHECKS.get_one(name) for name in CHECKS]
    known = rig.request("known", "true")
    seen: Counter[tuple[str, int]] = Counter()

    for result in schema.get_all_operations():
        operation = result.ok()
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        strategies = [operation.as_strategy(generation_mode=mode) for mode in modes]

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=strategies[0] | strategies[1])
        def run(case: Any) -> None:
            if case.method == "DELETE":
                server.post(known)
            answer = harmless(case, "known").call_and_validate(base_url=server.url, checks=wanted)
            seen[case.method, answer.status_code] += 1

        server.post(known)
        run()
    assert seen.total() >= 1000, seen
    good = {("POST", 201), ("GET", 200), ("DELETE", 204), ("POST", 400), ("GET", 404), ("DELETE", 404)}
    assert min(seen[answer] for answer in good) >= 3, seen
