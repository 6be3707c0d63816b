"""pfcon's four calls, byte for byte: answers as they were before there was a resource with more in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pman import __version__
from tests.backends.test_local import local_rig
from tests.rig import Rig, Server, running

CMD = r"sh -c 'echo \"out\"; echo err >&2; exit 3' sh 'it'\"'\"'s' /share/outgoing"
JOB = (
    r'{"jid":"chris-jid-7","image":"localhost/none:1","cmd":"' + CMD + r'","status":"%s","message":"%s",'
    r'"timestamp":"%s","logs":"%s"}' + "\n"
)
LIMITS = ("an integer from 1 to 1024", "an integer of millicores from 1 to 10000000 (1000 is one core)")
GONE = '{"message":"There is no job with jid chris-jid-7."}\n'


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("pfcon"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    return rig.start()


def answer(server: Server, method: str, path: str = "", **kwargs: object) -> tuple[int, str | None, str]:
    """Status, type and text, with a time of day as T."""
    got = server.call(method, path, **kwargs)
    text = re.sub(r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"', '"T"', got.text)
    return got.status_code, got.headers.get("Content-Type"), text


def test_the_four_calls(server: Server, rig: Rig) -> None:
    request = rig.request("chris-jid-7", 'echo "out"; echo err >&2; exit 3', "it's")
    code, kind, posted = answer(server, "POST", json=request)
    assert (code, kind) == (201, "application/json")
    failed = JOB % ("finishedWithError", "The job ended with exit code 3.", "T", r"out\nerr\n")
    early = [JOB % (state, "", "", "") for state in ("notstarted", "started")]
    assert posted in [*early, failed.replace(r"out\nerr\n", "")]  # a machine that is busy answers late
    server.wait_final("chris-jid-7")
    assert answer(server, "GET", "chris-jid-7/") == (200, "application/json", failed)
    assert answer(server, "POST", json=request) == (201, "application/json", failed.replace(r"out\nerr\n", ""))
    assert answer(server, "DELETE", "chris-jid-7/") == (204, "text/html; charset=utf-8", "")
    for method in ("GET", "DELETE"):
        assert answer(server, method, "chris-jid-7/") == (404, "application/json", GONE)


def test_what_this_pman_is(server: Server) -> None:
    said = f'{{"server_version":"{__version__}","container_env":"local","storage_type":"host"}}\n'
    assert answer(server, "GET") == (200, "application/json", said)


def test_what_is_wrong(server: Server, rig: Rig) -> None:
    wrong = rig.request("chris-jid-8", "true", number_of_workers=0, cpu_limit="much")
    said = '{{"message":{{"number_of_workers":"must be {}.","cpu_limit":"must be {}."}}}}\n'.format(*LIMITS)
    code, kind, text = answer(server, "POST", json=wrong)
    assert (code, kind, text) == (400, "application/json", said)
    other = rig.request("chris-jid-8", "true")
    assert answer(server, "POST", json=other)[0] == 201
    taken = '{"message":"There is another job with jid chris-jid-8; delete it first, or use another jid."}\n'
    assert answer(server, "POST", json=other | {"cpu_limit": 7}) == (409, "application/json", taken)
