"""The HTTP service at its edges: broken bodies, slow clients, request ids, what never reaches the log or the caller."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from pman import job, settings
from pman.checking import overlay
from pman.service import pages
from pman.targets import TARGETS
from pman.templating import render
from tests.backends.test_local import local_rig
from tests.rig import ROOT, Rig, Server, running, wait_for

LIMIT = 4 * 1024 * 1024


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("http"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start(LOG_FORMAT="json")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'{"jid": NaN}',
        b"1" * 5000,
    ],
)
def test_broken_bodies(server: Server, body: bytes) -> None:
    answer = server.call("POST", data=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["message"]


def test_all_bad_fields_at_once(server: Server) -> None:
    answer = server.post(
        {"jid": "a/b", "args": "abc", "cpu_limit": -1, "env": ["SECRETVALUE"], "gpu_limit": int("9" * 400)}
    )
    assert answer.status_code == 400
    message = answer.json()["message"]
    assert {"jid", "args", "cpu_limit", "env", "gpu_limit", "image", "type"} <= set(message)
    assert all(isinstance(text, str) and text.endswith(".") for text in message.values())


def test_bodies_at_and_above_the_limit(server: Server, rig: Rig) -> None:
    request = rig.request("large", "true")
    padding = LIMIT - len(json.dumps(request | {"unknown": ""}))
    at_limit = json.dumps(request | {"unknown": "x" * padding}).encode()
    assert len(at_limit) == LIMIT
    assert server.call("POST", data=at_limit).status_code == 201
    above = server.call("POST", data=at_limit + b" ")
    assert (above.status_code, bool(above.json()["message"])) == (413, True)
    chunked = server.call("POST", data=iter([at_limit, b" " * 5_000_000]))
    assert (chunked.status_code, bool(chunked.json()["message"])) == (413, True)


def test_wrong_paths_and_methods(server: Server) -> None:
    for method, path, code in [("GET", "a/b/", 404), ("PUT", "", 405), ("PATCH", "x/", 405), ("GET", "../v2/", 404)]:
        answer = server.call(method, path)
        assert answer.status_code == code
        assert answer.json()["message"]


@pytest.mark.parametrize("text", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"])
def test_broken_http_is_answered_in_json(server: Server, text: bytes) -> None:
    head, _, body = raw(server, text).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.")
    assert json.loads(body)["message"]


def test_a_body_that_says_it_is_too_large_is_refused_unread(server: Server) -> None:
    head, _, body = raw(server, b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n").partition(
        b"\r\n\r\n"
    )
    assert b" 413 " in head.splitlines()[0]
    assert json.loads(body)["message"]


def post_as_http_client(server: Server, body: Any, **headers: str) -> tuple[int, str]:
    """By Python's http.client, which sends the whole body before it reads."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/api/v1/", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_reads_late_gets_its_413(server: Server, chunked: bool) -> None:
    body: Any = iter([b" " * 1_000_000] * 20) if chunked else b" " * 20_000_000
    code, message = post_as_http_client(server, body)
    assert (code, "too large" in message.lower()) == (413, True)


def test_a_body_that_is_too_large_and_broken_is_cut_off(server: Server) -> None:
    """Between two chunks waitress would look for the end of a line in ever more text."""
    head = b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head + b"400000\r\n" + b" " * 0x400000 + b"\r\n" + b"1" * 40_000_000)
    assert server.call("GET").status_code == 200


def test_an_encoded_body_is_refused_with_what_is_wrong(server: Server, rig: Rig) -> None:
    body = gzip.compress(json.dumps(rig.request("zipped", "true")).encode())
    assert post_as_http_client(server, body, **{"Content-Encoding": "gzip"}) == (
        415, "The body must be sent as it is, without Content-Encoding.",
    )  # fmt: skip
    plain = json.dumps(rig.request("zipped", "true")).encode()
    answer = server.call("POST", data=plain, headers={"Content-Encoding": "identity"})
    assert answer.status_code == 201


def test_request_ids(server: Server) -> None:
    sane = requests.get(f"{server.url}/api/v1/", headers={"X-Request-ID": "pfcon-42.a"}, timeout=10)
    assert sane.headers["X-Request-ID"] == "pfcon-42.a"
    odd = requests.get(f"{server.url}/api/v1/", headers={"X-Request-ID": "x" * 65}, timeout=10)
    assert odd.headers["X-Request-ID"] != "x" * 65
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any(line.get("request_id") == "pfcon-42.a" and line.get("status") == 200 for line in lines)


def test_the_log_follows_a_job_from_post_to_delete(server: Server, rig: Rig) -> None:
    headers = {"X-Request-ID": "trace-1"}
    server.call("POST", json=rig.request("traced", "true", colour="blue"), headers=headers)
    server.call("POST", json=rig.request("traced", "false"), headers=headers)
    server.wait_final("traced")
    assert requests.get(f"{server.url}/jobs/traced/", timeout=10).status_code == 200
    server.delete("traced")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    of_job = [line for line in lines if line.get("jid") == "traced"]
    served = [(line["method"], line["status"]) for line in of_job if line["message"] == "request"]
    assert (served[0], served[1], served[-1]) == (("POST", 201), ("POST", 409), ("DELETE", 204))
    assert ("GET", 200) in served
    assert "/jobs/traced/" in [line.get("path") for line in of_job]
    conflict = next(line for line in of_job if "another job" in line["message"])
    assert (conflict["request_id"], conflict["level"]) == ("trace-1", "INFO")


def test_output_that_is_left_out_is_said_in_a_header_and_on_request_in_the_first_line(rig: Rig) -> None:
    short = rig.start(JOB_LOGS_TAIL="5")
    short.post(rig.request("chatty", "seq 9"))
    short.wait_final("chatty")
    plain, noticed = (short.call("GET", "jobs/chatty/logs", params={"notice": notice}) for notice in (0, 1))
    assert (plain.headers["Pman-Logs-Cut"], plain.text) == ("yes", "5\n6\n7\n8\n9\n")
    assert (noticed.headers["Pman-Logs-Cut"], noticed.text) == ("yes", "[pman: output is left out here]\n" + plain.text)
    whole = rig.start().call("GET", "jobs/chatty/logs", params={"notice": 1})
    assert ("Pman-Logs-Cut" in whole.headers, whole.text) == (False, "1\n2\n3\n4\n" + plain.text)


def test_secrets_never_reach_the_log(server: Server, rig: Rig) -> None:
    server.post(rig.request("secret", "true", env=["TOKEN=hunter2"]))
    server.post(rig.request("secret", "true", env=["TOKEN=hunter2", "hunter2"]))
    server.post(rig.request("secret", "true", env=["hunter2=5", "TOKEN=hunter2\0"]))
    assert "hunter2" not in server.log.read_text()
    assert rig.env.get("SECRET_KEY", "a secret key for tests") not in server.log.read_text()


def test_unknown_fields_are_ignored_with_a_warning(server: Server, rig: Rig) -> None:
    assert server.post(rig.request("unknown-field", "true", colour="blue")).status_code == 201
    assert "colour" in server.log.read_text()


def test_integers_as_decimal_strings_and_without_directories(server: Server, rig: Rig) -> None:
    """As pman's and pfcon's own tests, and a pfcon before 5.2, send them."""
    request = rig.request(
        "old-pfcon", 'echo done > "$1/x"', number_of_workers="1", cpu_limit="1000", memory_limit="200", gpu_limit="0"
    )
    for name in ("input_dir", "output_dir", "env", "args_path_flags"):
        del request[name]
    assert server.post(request).status_code == 201
    assert server.wait_final("old-pfcon")["status"] == "finishedSuccessfully"
    assert (rig.store / "key-old-pfcon/outgoing/x").exists()


def test_a_symbolic_link_out_of_the_store(server: Server, rig: Rig, tmp_path: Path) -> None:
    (rig.store / "escape").symlink_to(tmp_path)
    answer = server.post(rig.request("escape", "true", output_dir="escape/new"))
    assert answer.status_code == 400
    assert set(answer.json()["message"]) == {"output_dir"}
    assert not list(tmp_path.iterdir())


def test_what_a_template_refuses_leaves_nothing_in_the_store(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    refusing = '{% if job.gpu_count %}{{ refuse("There are no GPUs here.") }}{% endif %}'
    (tmp_path / "local" / "job.sh.j2").write_text(
        f'{{% extends "shipped/local/job.sh.j2" %}}{{% block prologue %}}{refusing}{{% endblock %}}'
    )
    server = rig.start(TEMPLATES_DIR=str(tmp_path))
    answer = server.post(rig.request("refused", "true", gpu_limit=1, output_dir="refused/out"))
    assert (answer.status_code, answer.json()) == (403, {"message": "There are no GPUs here."})
    assert not (rig.store / "refused").exists()


@pytest.mark.slow
def test_a_hundred_thousand_arguments(server: Server, rig: Rig) -> None:
    args = ["--in", "x", *(str(number) for number in range(99_998))]
    request = rig.request("many", 'echo $#; echo "$2" "$100000"', *args, args_path_flags=["--in"])
    assert server.post(request).status_code == 201
    job = server.wait_final("many")
    assert job["status"] == "finishedSuccessfully", job["logs"][:300]
    assert job["logs"].startswith("100001\n")
    assert job["cmd"].endswith("99997 /share/outgoing")


def test_slow_clients_leave_others_served(server: Server) -> None:
    address = (server.url.split(":")[1].strip("/"), int(server.url.rsplit(":", 1)[1]))
    half_open = [socket.create_connection(address) for _ in range(40)]
    for connection in half_open:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
    dribbling = [socket.create_connection(address) for _ in range(40)]
    for connection in dribbling:
        connection.sendall(b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n{")
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.1):
            for connection in dribbling:
                connection.sendall(b" " * 100)

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        for _ in range(20):
            began = time.monotonic()
            assert server.call("GET").status_code == 200
            assert time.monotonic() - began < 10
    finally:
        stop.set()
        thread.join()
        for connection in half_open + dribbling:
            connection.close()


def test_connections_beyond_a_thousand_descriptors(rig: Rig) -> None:
    """A job or a large body takes some, too. select(2) and the usual limit of a process end there."""
    hold = 'ulimit -S -n 1024; for fd in {10..1000}; do eval "exec $fd</dev/null"; done; exec "$@"'
    server = rig.start("bash", "-c", hold, "bash")
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
        idle[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.0 200")
        assert server.post(rig.request("descriptors", "true")).status_code == 201
        assert server.wait_final("descriptors")["status"] == "finishedSuccessfully"
    assert "Traceback" not in server.log.read_text()


def test_an_unexpected_error_is_a_500_without_a_stack_trace(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        server.post(rig.request("broken", "true"))
        server.wait_final("broken")
        claim = Path(rig.env["LOCAL_STATE_DIR"]) / "broken" / "claim"
        claim.unlink()
        claim.mkdir()
        answer = server.get("broken")
        assert answer.status_code == 500
        assert set(answer.json()) == {"message"}
        assert "Traceback" not in answer.text
        assert "Traceback" in server.log.read_text()


def test_sigterm_ends_the_server_in_order(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        server.process.terminate()
        assert server.process.wait(15) == 0


@pytest.mark.slow
def test_what_is_being_served_at_sigterm_is_answered(tmp_path: Path) -> None:
    """A POST that was cut off would be a failed job for ChRIS, and run. Here it waits for the lock of its jid."""
    with running(local_rig(tmp_path)) as rig, contextlib.ExitStack() as held, ThreadPoolExecutor(1) as pool:
        server = rig.start()
        for number in range(256):
            lock = held.enter_context((Path(rig.env["LOCAL_STATE_DIR"]) / f".lock.{number:02x}").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        posted = pool.submit(server.post, rig.request("slow", "true", output_dir="made/by/pman"))
        wait_for((rig.store / "made/by/pman").exists, 10, "the request to be served")
        server.process.terminate()
        wait_for(lambda: "still running" in server.log.read_text(), 20, "the end of waitress' own patience")
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{server.url}/healthz", timeout=5)
        held.close()
        assert posted.result().status_code == 201
        assert server.process.wait(15) == 0


def refused_start(tmp_path: Path, **env: str) -> str:
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PORT": "0", "HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-m", "pman", "serve"], env=base | env, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


GOOD: dict[str, Any] = {"SECRET_KEY": "a secret key for tests", "STOREBASE": "/tmp"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"STOREBASE": "/tmp"}, ["SECRET_KEY", "required"]),
        ({"SECRET_KEY": "x" * 20}, ["STOREBASE", "required"]),
        (GOOD | {"CONTAINER_ENV": "slurmm"}, ["CONTAINER_ENV", "must be one of", "slurm, "]),
        (GOOD | {"CONTAINER_ENV": "cromwell"}, ["CROMWELL_URL", "TIMELIMIT_MINUTES"]),
        (GOOD | {"STORAGE_TYPE": "kubernetes_pvc"}, ["VOLUME_NAME", "does not work with CONTAINER_ENV=local"]),
        (GOOD | {"STORAGE_TYPE": "nfs", "CONTAINER_ENV": "swarm"}, ["NFS_SERVER"]),
        (GOOD | {"JOB_LOGS_TAIL": "many"}, ["JOB_LOGS_TAIL"]),
        (GOOD | {"TEMPLATES_DIR": "/no/such"}, ["TEMPLATES_DIR", "no directory"]),
        (GOOD | {"LOCAL_STATE_DIR": "/dev/null/x"}, ["LOCAL_STATE_DIR=/dev/null/x", "Not a directory"]),
        (GOOD | {"CONTAINER_USER": "root"}, ["CONTAINER_USER", "UID:GID"]),
        (
            GOOD
            | {"CONTAINER_ENV": "cromwell", "CROMWELL_URL": "http://c", "TIMELIMIT_MINUTES": "5", "STOREBASE": "/\n"},
            ["a line break cannot stand in a WDL string"],
        ),
    ],
)
def test_bad_settings_stop_the_server_with_a_sentence_each(
    tmp_path: Path, env: dict[str, str], words: list[str]
) -> None:
    message = refused_start(tmp_path, **env)
    assert all(word in message for word in words), message


def test_a_broken_template_stops_the_server(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "job.sh.j2").write_text("#!/bin/bash\n\necho {{ job.jidd }}\n")
    message = refused_start(tmp_path, **GOOD, TEMPLATES_DIR=str(tmp_path))
    assert "job.sh.j2:3" in message
    assert "did you mean jid" in message


def test_a_short_secret_and_a_misspelt_setting_are_warned_about(tmp_path: Path) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start(SECRET_KEY="short", TIMELIMIT_MINUTE="5")
        assert "SECRET_KEY is short" in server.log.read_text()
        assert "did you mean TIMELIMIT_MINUTES" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, "local can take jobs"),
        ({"APPLICATION_MODE": "dev"}, "local can take jobs"),
        (
            {"CONTAINER_ENV": "cromwell", "CROMWELL_URL": "http://127.0.0.1:9", "TIMELIMIT_MINUTES": "5"},
            "cromwell cannot take jobs yet: Cromwell at http://127.0.0.1:9 does not answer.",
        ),
        (
            {"CONTAINER_ENV": "docker", "DOCKER_HOST": "unix:///no/engine"},
            "docker cannot take jobs yet: The container engine at unix:///no/engine does not answer: there is no",
        ),
    ],
)
def test_the_log_says_at_start_whether_jobs_can_run(tmp_path: Path, env: dict[str, str], words: str) -> None:
    with running(local_rig(tmp_path)) as rig:
        server = rig.start(**env)
        wait_for(lambda: words in server.log.read_text(), 30, words)


@pytest.mark.slow
def test_dev_mode_reloads_templates(tmp_path: Path) -> None:
    overlay = tmp_path / "templates"
    (overlay / "local").mkdir(parents=True)
    template = overlay / "local" / "job.sh.j2"
    body = '{% extends "shipped/local/job.sh.j2" %}{% block prologue %}echo WORD > "$outgoing/word"{% endblock %}'
    template.write_text(body.replace("WORD", "before"))
    with running(local_rig(tmp_path)) as rig:
        server = rig.start(APPLICATION_MODE="dev", TEMPLATES_DIR=str(overlay))
        template.write_text(body.replace("WORD", "after"))
        written = itertools.count()

        def changed() -> bool:
            jid = f"reload-{next(written)}"
            server.post(rig.request(jid, "true"))
            server.wait_final(jid)
            return (rig.outgoing(jid) / "word").read_text() == "after\n"

        wait_for(changed, 10, "the changed template")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raw(server: Server, text: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(text)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_the_page_of_a_job_that_is_not_there(server: Server) -> None:
    answer = requests.get(f"{server.url}/jobs/%3Cb%3Egone/", timeout=10)
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert "There is no job with jid &lt;b&gt;gone." in answer.text
    assert "There is no job with jid <b>gone." in server.log.read_text()


def test_the_playground_renders_what_the_service_submits(server: Server) -> None:
    request = json.loads((ROOT / "examples/hostile-arguments.json").read_text())
    for target in TARGETS:
        body = {"request": json.dumps(request), "target": target}
        answer = requests.post(f"{server.url}/render", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["problems"] == []
        assert len({block for block, _ in found["parts"]["spec"]}) > 1
        text = "".join(part for _, part in found["parts"]["spec"])
        assert "\0" not in text
        assert "simplefsapp" in text


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"9" * 5000, b"null", b'{"target": [], "request": "{}"}', b'{"target": "wdl", "request": 1}'],
)
def test_the_playground_refuses_what_is_no_question(server: Server, body: bytes) -> None:
    answer = requests.post(f"{server.url}/render", body, headers={"Content-Type": "application/json"}, timeout=60)
    assert (answer.status_code, bool(answer.json()["message"])) == (400, True)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples" / "sites").iterdir() if path.is_dir()))
def test_a_traced_rendering_of_an_overlay_is_its_rendering(name: str) -> None:
    """Of examples that call super(), too."""
    directory = ROOT / "examples" / "sites" / name
    given = settings.read_file(directory / "settings.env") | {"TEMPLATES_DIR": str(directory), "STOREBASE": "/store"}
    config = settings.load(given)
    renderer = render.Renderer(config, TARGETS)
    made = job.make_job(job.validate(render.SAMPLE), config)
    for target in overlay.Overlay(renderer).targets():
        parts = pages.segments(renderer.pieces(made, TARGETS[target].template))
        assert "".join(text for _, text in parts) == renderer.render(made, target).text
        assert len({block for block, _ in parts}) > 1
