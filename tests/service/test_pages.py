"""The pages for people as HTTP has them, without a browser: what they show, and what they let a browser do."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest
import requests
from flask.testing import FlaskClient

from pman import settings
from pman.backends import Backend
from pman.backends.discovery import Overview, Place
from pman.service import latest
from pman.service.app import create_app
from pman.status import JobState, JobStatus, span
from tests.backends.test_local import local_rig
from tests.rig import Rig, Server, running, wait_for


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("pages"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(rig: Rig) -> Server:
    server = rig.start()
    for jid, script in (("b", "exit 3"), ("c", "true"), ("a", "true")):
        server.post(rig.request(jid, script))
        server.wait_final(jid)
    return server


def page(server: Server, path: str = "/", code: int = 200) -> str:
    answer = requests.get(f"{server.url}{path}", timeout=30, headers={"Accept": "text/html,*/*;q=0.8"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (code, "text/html; charset=utf-8")
    return answer.text


def listed(text: str) -> list[str]:
    return re.findall(r'<tr id="job-([^"]+)"', text)


@pytest.mark.parametrize(
    ("query", "jids"),
    [("", "acb"), ("?sort=jid", "abc"), ("?sort=-jid", "cba"), ("?sort=finished_at", "bca"), ("?sort=message", "bac"),
     ("?state=finishedSuccessfully&sort=-jid", "ca"), ("?text=EXIT+code+3", "b"), ("?after=c", "b"),
     ("?sort=jid&after=a", "bc"), ("?user=nobody", "")],
)  # fmt: skip
def test_page_and_api_list_the_same(server: Server, query: str, jids: str) -> None:
    assert listed(page(server, f"/{query}")) == [*jids]
    assert [job["jid"] for job in server.call("GET", f"jobs/{query}").json()["jobs"]] == [*jids]


def test_the_list_is_read_to_its_end_without_a_script(server: Server) -> None:
    seen, path = list[str](), "/?limit=1&sort=jid"
    while path:
        text = page(server, path)
        seen += listed(text)
        following = re.search(r'href="(\?[^"]*)">next page', text)
        path = "/" + following[1].replace("&amp;", "&") if following else ""
    assert seen == ["a", "b", "c"]


def test_filters_that_are_set_are_shown_and_can_be_removed(server: Server) -> None:
    """A link that somebody sent hides no jobs without a word. Names in the list lead to the jobs with that name."""
    text = page(server, "/?user=me&image=x%26y&sort=jid&after=")
    removing = dict(re.findall(r'<a href="([^"]*)" aria-current="true">([^<]*) <span class="dim">\(remove\)', text))
    assert removing == {"?image=x%26y&amp;sort=jid": "user me", "?user=me&amp;sort=jid": "image x&amp;y"}
    day = re.search(r'<a href="\?posted_since=([^"]*)">last day</a>', page(server))
    assert day
    text = page(server, f"/?posted_since={day[1]}")
    assert listed(text) == ["a", "c", "b"]
    assert "last day" not in text
    of_user = re.search(r'class="quiet" href="(\?[^"]*user=[^"]*)">', text)
    assert of_user
    assert listed(page(server, f"/{html.unescape(of_user[1])}")) == ["a", "c", "b"]


def test_a_job_says_how_long_it_waited_and_ran(server: Server) -> None:
    for jid in "ab":
        text = page(server, f"/jobs/{jid}/")
        assert re.search(r"<dt>waited for</dt><dd>\d+ s</dd>\s*<dt>ran for</dt><dd>\d+ s</dd>", text)
        assert f'href="../../api/v1/jobs/{jid}/"' in text
    assert re.search(r"ago</time> <span [^>]*>after \d+ s</span>", page(server))


@pytest.mark.parametrize(
    ("seconds", "units", "said"),
    [(-1, 2, "0 s"), (59.9, 2, "59 s"), (3599, 2, "59 min 59 s"), (3600, 2, "1 h"), (93_784, 2, "1 d 2 h"),
     (93_784, 1, "1 d"), (86_400, 1, "1 d")],
)  # fmt: skip
def test_times_are_said_in_their_largest_units(seconds: float, units: int, said: str) -> None:
    assert span(seconds, units) == said


def test_a_wrong_query_is_named(server: Server) -> None:
    assert "sort: must be one of jid" in page(server, "/?sort=odd", 400)
    assert set(server.call("GET", "jobs/", params={"sort": "odd"}).json()["message"]) == {"sort"}


@pytest.mark.parametrize(
    ("path", "forms"), [("/", "'self'"), ("/jobs/a/", "'none'"), ("/backend", "'none'"), ("/render", "'none'")]
)
def test_what_a_page_may_do(server: Server, path: str, forms: str) -> None:
    """No page has a form that posts; only the search of the list leads anywhere, to the list."""
    answer = requests.get(f"{server.url}{path}", timeout=30)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert (policy["default-src"], policy["connect-src"], policy["form-action"]) == ("'none'", "'self'", forms)
    assert policy["script-src"] == policy["style-src"]
    assert re.fullmatch(r"'nonce-[\w-]{22}'", policy["script-src"])
    assert "method=" not in answer.text.lower()
    for name, kind in (("pages.js", "text/javascript"), ("pages.css", "text/css"), ("icon.svg", "image/svg+xml")):
        static = requests.get(f"{server.url}/static/{name}", timeout=30)
        assert (static.status_code, static.headers["Content-Type"].split(";")[0]) == (200, kind)


@pytest.mark.parametrize("path", ["/nowhere", "/jobs/a/nowhere/at/all", "/static/nowhere"])
def test_what_is_not_there_is_a_page_for_browsers(server: Server, path: str) -> None:
    text = page(server, path, 404)
    assert "There is no such page." in text
    assert f'href="{"../" * (path.count("/") - 1) or "./"}"' in text
    for program in ({}, {"Accept": "application/json"}):
        answer = requests.get(f"{server.url}{path}", headers=program, timeout=30)
        assert (answer.status_code, set(answer.json())) == (404, {"message"})


def test_below_the_api_everything_is_json(server: Server) -> None:
    answer = requests.get(f"{server.url}/api/v2/", headers={"Accept": "text/html"}, timeout=30)
    assert (answer.status_code, set(answer.json())) == (404, {"message"})


def test_a_backend_that_is_away(tmp_path: Path) -> None:
    """The list does not say that there are no jobs, and the page of a job tries again by its script."""
    away = {"CONTAINER_ENV": "cromwell", "CROMWELL_URL": "http://127.0.0.1:9", "TIMELIMIT_MINUTES": "5"}
    (tmp_path / "store").mkdir()
    with running(Rig(away, tmp_path / "store", "none", tmp_path)) as rig:
        server = rig.start()
        text = page(server)
        assert "The backend cannot take jobs:" in text
        assert "No jobs" not in text
        assert 'id="problem" data-live>' in page(server, "/jobs/a/", 503)


def test_what_was_submitted_is_shown_with_the_names_of_its_blocks(server: Server) -> None:
    text = page(server, "/jobs/a/spec")
    assert 'class="tag">claim<' in text
    shown = re.sub(
        r"<[^>]*>", "", re.sub(r'<span class="tag">[^<]*</span>', "", text.partition('<pre id="part-1">')[2])
    )
    submitted = server.call("GET", "jobs/a/spec").json()["parts"]["spec"]
    assert html.unescape(shown).startswith(submitted)
    assert "/render#target=local&amp;request=" in text


def test_the_page_of_the_backend(server: Server) -> None:
    text = page(server, "/backend")
    for words in ("The local backend can take jobs.", "image is not used", "What is not known", "the newest 5000"):
        assert words in text, words
    assert text.count("<th ") == 6  # a node has no time limit


class SlowBackend:
    """Hangs while the test holds its lock. asked: how often it was looked at."""

    def __init__(self) -> None:
        self.hangs, self.asked = threading.Lock(), 0

    def ping(self) -> str:
        with self.hangs:
            self.asked += 1
        return "Accounts are not kept."

    def overview(self) -> Overview:
        places = [
            Place("main", "partition", "UP", 8, 16_000, 0),
            Place("gpu", "partition", "DOWN", gpus=4, note="a100"),
        ]
        return Overview("slurm 22.05.8", places=places)


@pytest.fixture
def slow(rig: Rig) -> tuple[FlaskClient, SlowBackend]:
    backend = SlowBackend()
    config = settings.load({"SECRET_KEY": "a secret key for tests", "STOREBASE": str(rig.store)} | rig.env)
    return create_app(config, cast(Backend, backend)).test_client(), backend


def test_pages_that_poll_do_not_load_the_backend(slow: tuple[FlaskClient, SlowBackend]) -> None:
    client, backend = slow
    for _ in range(20):
        found = client.get("/api/v1/backend.json").get_json()
        assert "Accounts are not kept." in client.get("/backend").text
    assert backend.asked == 1
    assert (found["version"], found["places"][0]["name"]) == ("slurm 22.05.8", "main")
    rows = re.findall(r"(?s)<tr>(.*?)</tr>", client.get("/backend").text)
    cells = [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"(?s)<td>(.*?)</td>", rows[2])]
    assert cells == ["gpu", "DOWN", "CPUs not known", "memory not known", "GPUs 4", "time limit none", "a100"]


def test_a_backend_that_hangs_holds_no_page_up(
    slow: tuple[FlaskClient, SlowBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latest, "WAIT_SECONDS", 0.1)
    client, backend = slow
    with backend.hangs:
        for _ in range(3):
            assert "has not answered yet" in client.get("/backend").text
        nothing = client.get("/api/v1/backend.json").get_json()
        assert (nothing["ready"], nothing["version"], nothing["places"]) == (None, None, [])
    wait_for(lambda: client.get("/api/v1/backend.json").get_json()["ready"], 10, "the answer")
    assert backend.asked == 1


def test_a_question_for_which_there_was_no_thread_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    answers = latest.Latest[str]()
    with monkeypatch.context() as busy:
        busy.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            answers.get(lambda: "asked")
    assert answers.get(lambda: "asked") == "asked"


class ManyJobs:
    """A scheduler that lists more jobs than pman reads, at once."""

    def __init__(self) -> None:
        states, now = list(JobState), datetime.now(UTC)
        self._jobs = [
            JobStatus(
                f"chris-jid-{number}", f"docker.io/fnndsc/pl-{number % 50}:1", "run 'it all' /share/outgoing",
                states[number % len(states)], posted_at=now - timedelta(seconds=9000 - number), user=f"u{number % 20}",
            )
            for number in range(6000, 0, -1)
        ]  # fmt: skip

    def jobs(self, limit: int) -> list[JobStatus]:
        return self._jobs[:limit]

    def ping(self) -> None:
        return None

    def overview(self) -> Overview:
        return Overview()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/api/v1/jobs/"])
def test_more_jobs_than_pman_reads_are_listed(rig: Rig, path: str) -> None:
    config = settings.load({"SECRET_KEY": "a secret key for tests", "STOREBASE": str(rig.store)} | rig.env)
    client = create_app(config, cast(Backend, ManyJobs())).test_client()
    assert client.get("/api/v1/jobs/").get_json()["truncated"]
    for query in ("", "?state=started", "?text=PL-7", "?sort=-image", "?user=u3&sort=posted_at&after=chris-jid-2003"):
        answer = client.get(path + query)
        assert answer.status_code == 200, query
        assert "chris-jid-" in answer.text, query
