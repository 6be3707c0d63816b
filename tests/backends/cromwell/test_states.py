"""The recorded timelines of a real Cromwell 93, replayed reply by reply to pman's backend."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.serving import make_server

from pman import settings
from pman.backends import cromwell
from pman.backends.cromwell.labels import workflow_id
from pman.errors import BadRequest, Conflict, NotFound, Unreachable
from pman.job import Job, make_job, validate
from pman.status import JobState, JobStatus
from pman.targets import TARGETS
from pman.templating.render import Renderer, Spec
from tests.fakes.cromwell import store
from tests.fakes.cromwell.config import TEST_PACE, load
from tests.fakes.cromwell.server import Cromwell
from tests.fakes.cromwell_replay import FINAL, RECORDINGS, recording
from tests.rig import ROOT

JID = "chris-jid-77"
BASE = "/api/workflows/v1"
NAME = "org.chrisproject.pman.name"
RANK = {JobState.NOT_STARTED: 0, JobState.STARTED: 1, JobState.SUCCEEDED: 2, JobState.FAILED: 2}
LEVEL = ("On Hold", "Submitted", "Running", "Aborting", *FINAL)
# POST, abort and POST of one id without a pause: metadata of two workflows in one, which pman never causes.
MIXED = {"210e76bf-10e0-4fbb-8eaf-9a19e7a3f70c"}


@dataclass
class Timeline:
    """The replies about one recorded workflow in the order of time: (endpoint, status code, body)."""

    workflow: str
    posted: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    replies: list[tuple[str, int, Any]] = field(default_factory=list)


def _exchanges() -> Iterator[dict[str, Any]]:
    """Every recorded exchange about one workflow, over all recordings."""
    found = []
    for path in RECORDINGS.glob("*.json"):
        data = recording(path.stem)
        found += [e for e in data.get("exchanges", []) if "request" in e]
        found += [step["exchange"] for step in data.get("timeline", [])]
    yield from sorted(found, key=lambda exchange: str(exchange["at"]))


@cache
def timelines() -> dict[str, Timeline]:
    """Workflow id -> what was recorded of it. Several recordings may tell of one workflow."""
    found: dict[str, Timeline] = {}
    by_name: dict[str, str] = {}
    for exchange in _exchanges():
        request, code, body = exchange["request"], exchange["response"]["status"], exchange["response"]["body"]
        last = request["path"].rsplit("/", 1)[-1]
        if last == "v1" and code == 201:
            labels = json.loads((request["form"].get("labels") or {"content": "{}"})["content"])
            by_name[labels.get(NAME, "")] = body["id"]
            found.setdefault(body["id"], Timeline(body["id"], posted=True, labels=labels))
        elif last in ("status", "metadata") and request["method"] == "GET":
            whole = last == "status" or not request["params"]
            workflow = request["path"].split("/")[-2]
            if whole and len(workflow) == 36:
                found.setdefault(workflow, Timeline(workflow)).replies.append((last, code, body))
        elif last == "query" and isinstance(request["params"], dict):
            workflow = by_name.get(request["params"].get("label", "").removeprefix(f"{NAME}:"), "")
            if workflow in found:
                found[workflow].replies.append((last, code, body))
    return {name: line for name, line in found.items() if line.replies and name not in MIXED}


class Player:
    """A server that answers as the recorded one did after the first `position` replies about the workflow.

    The recordings hold some endpoints at some times. What is between is made of these rules of Cromwell: the status and
    the label query come from one summary; metadata is ahead of it.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.position = 0
        self.submitted: dict[str, dict[str, str]] = {}  # workflow id -> labels
        self.known: set[str] = set()
        self.seen_keys: list[str] = []
        self.posts = 0
        self.refusal: dict[str, str] | str | None = None

    def _past(self, *endpoints: str) -> list[tuple[str, int, Any]]:
        return [reply for reply in self.timeline.replies[: self.position] if reply[0] in endpoints]

    def summary(self) -> str:
        """The status in the summary, "" while the workflow is unknown."""
        for endpoint, code, body in reversed(self._past("status", "query")):
            if endpoint == "status":
                return str(body["status"]) if code == 200 else ""
            if "results" in body:
                return str(body["results"][0]["status"]) if body["results"] else ""
        metadata = self._past("metadata")
        return str(metadata[-1][2]["status"]) if metadata and metadata[-1][1] == 200 else ""

    def metadata(self) -> dict[str, Any]:
        """Recorded last, or where the summary is ahead of that the one recorded next."""
        status = self.summary()
        past = [body for _, code, body in self._past("metadata") if code == 200]
        later = [b for e, code, b in self.timeline.replies[self.position :] if e == "metadata" and code == 200]
        for body in [*reversed(past), *(later if status in FINAL else [])]:
            if LEVEL.index(body["status"]) >= LEVEL.index(status):
                return dict(body)
        return {"status": status, "calls": {}}

    def app(self) -> flask.Flask:
        app = flask.Flask("player")
        app.add_url_rule(BASE, view_func=self._submit, methods=["POST"])
        app.add_url_rule(f"{BASE}/query", view_func=self._query)
        app.add_url_rule(f"{BASE}/<name>/status", view_func=self._status)
        app.add_url_rule(f"{BASE}/<name>/metadata", view_func=self._metadata)
        app.add_url_rule(f"{BASE}/<name>/labels", view_func=self._patch_labels, methods=["PATCH"])
        return app

    def _submit(self) -> tuple[dict[str, str] | str, int]:
        name = flask.request.form["requestedWorkflowId"]
        if self.refusal is not None:
            return self.refusal, 400
        parts = {key: part.read().decode() for key, part in flask.request.files.items()}
        if name in self.submitted:
            return {"status": "fail", "message": f"Requested workflow IDs are already in use: {name}"}, 400
        if len(json.loads(parts["workflowOptions"]).get("hogGroup", "")) > 100:
            return {"status": "fail", "message": "data exception: string data, right truncation"}, 400
        self.posts += 1
        self.submitted[name] = json.loads(parts["labels"])
        return {"id": name, "status": "Submitted"}, 201

    def _query(self) -> dict[str, Any]:
        key, _, value = flask.request.args["label"].partition(":")
        status = self.summary()
        rows = [
            {"id": name, "status": status, "labels": labels, "metadataArchiveStatus": "Unarchived"}
            for name, labels in self.submitted.items()
            if status and labels.get(key) == value
        ]
        return {"results": rows, "totalResultsCount": len(rows)}

    def _status(self, name: str) -> tuple[dict[str, str], int]:
        if name in self.submitted and (status := self.summary()):
            return {"status": status, "id": name}, 200
        return {"status": "fail", "message": f"Unrecognized workflow ID: {name}"}, 404

    def _metadata(self, name: str) -> tuple[dict[str, Any], int]:
        if name not in self.submitted or not self.summary():
            return {"status": "fail", "message": f"Unrecognized workflow ID: {name}"}, 404
        self.seen_keys = flask.request.args.getlist("includeKey")
        body = _chosen(self.metadata(), self.seen_keys)
        calls = {
            call: [{"attempt": 1, "shardIndex": -1, **_chosen(entry, self.seen_keys)} for entry in entries]
            for call, entries in self.metadata().get("calls", {}).items()
        }
        return body | {"id": name, "calls": calls}, 200

    def _patch_labels(self, name: str) -> dict[str, Any]:
        self.submitted[name] |= flask.request.get_json()
        return {"id": name, "labels": self.submitted[name]}


class ShowsWhenAsked(Player):
    """Shows a workflow from the first question for its status on."""

    def _status(self, name: str) -> tuple[dict[str, str], int]:
        self.position = 1
        return super()._status(name)


def _chosen(body: dict[str, Any], prefixes: list[str]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if any(key.startswith(prefix) for prefix in prefixes)}


@contextmanager
def playing(timeline: Timeline, kind: type[Player] = Player) -> Iterator[tuple[Player, str]]:
    player = kind(timeline)
    server = make_server("127.0.0.1", 0, player.app(), threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield player, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def backend(url: str, **more: str) -> cromwell.CromwellBackend:
    given = {
        "CROMWELL_URL": url,
        "CONTAINER_ENV": "cromwell",
        "TIMELIMIT_MINUTES": "5",
        "CROMWELL_TIMEOUT_SECONDS": "5",
    }
    return cromwell.create(settings.load(given | more))


def job(**fields: Any) -> tuple[Job, Spec]:
    config = settings.load({"CONTAINER_ENV": "cromwell", "TIMELIMIT_MINUTES": "5"})
    request = {
        "jid": JID, "args": ["--x", "\u00e9 'quoted' \U0001f9e0"], "auid": "chris", "number_of_workers": 1,
        "cpu_limit": 1000, "memory_limit": 200, "gpu_limit": 0, "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
        "entrypoint": ["simpledsapp"], "type": "ds", "env": [],
    } | fields  # fmt: skip
    made = make_job(validate(request), config)
    return made, Renderer(config, TARGETS).render(made, "wdl")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded time does not pass by itself."""
    monkeypatch.setattr(cromwell, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(cromwell, "WINDOW_SECONDS", 0.4)


def walk(player: Player, url: str, own: cromwell.CromwellBackend) -> Iterator[tuple[int, JobStatus]]:
    """The status after each recorded reply, as the process that posted the job sees it and as another one does."""
    for position in range(len(player.timeline.replies) + 1):
        player.position = position
        first, second = own.status(JID), backend(url).status(JID)
        assert (first.state, first.message, first.finished_at) == (second.state, second.message, second.finished_at)
        yield position, first


WALKED = sorted(name for name, line in timelines().items() if line.posted)


def test_the_recordings_are_there() -> None:
    assert len(timelines()) > 100
    assert len(WALKED) > 90
    assert sum(len(line.replies) for line in timelines().values()) > 300


@pytest.mark.parametrize("name", WALKED)
def test_states_are_monotonic_and_never_final_early(name: str) -> None:
    with playing(timelines()[name]) as (player, url):
        own = backend(url)
        made, spec = job()
        assert own.submit(made, spec).state is JobState.NOT_STARTED
        rank = 0
        for position, status in walk(player, url, own):
            assert status.state in RANK, status
            assert RANK[status.state] >= rank, f"after reply {position}: {status}"
            assert status.jid == JID
            assert status.state.final == (player.summary() in FINAL), f"after reply {position}: {status}"
            rank = RANK[status.state]
            if player.summary():
                assert (status.image, status.cmd) == (made.image, made.cmd)
        assert player.posts == 1
        if player.summary() in FINAL:
            good = player.summary() == "Succeeded"
            assert status.state is (JobState.SUCCEEDED if good else JobState.FAILED)
            assert bool(status.message) != good
            end = player.metadata().get("end")
            assert (status.finished_at is None) == (end is None)


SHOWN = [name for name, line in timelines().items() if any(code == 200 for _, code, _ in line.replies)]


@pytest.mark.parametrize("name", sorted(set(SHOWN) - set(WALKED)) + sorted(set(SHOWN) & set(WALKED))[:5])
def test_workflows_of_the_older_pman(name: str) -> None:
    """Found by the one label that it set; image and command come from metadata."""
    with playing(timelines()[name]) as (player, url):
        player.submitted[name] = {NAME: JID}
        rank = 0
        for position in range(1, len(player.timeline.replies) + 1):
            player.position = position
            if not player.summary():
                with pytest.raises(NotFound):
                    backend(url).status(JID)
                continue
            status = backend(url).status(JID)
            assert status.state in RANK
            assert RANK[status.state] >= rank
            rank = RANK[status.state]
        calls = [entry for entries in player.metadata().get("calls", {}).values() for entry in entries]
        if calls and "runtimeAttributes" in calls[-1]:
            assert status.image == calls[-1]["runtimeAttributes"].get("docker", "")
            assert status.cmd == calls[-1]["commandLine"]
        made, spec = job()
        assert backend(url).submit(made, spec).state is status.state
        assert player.posts == 0


SENTENCES = {
    "30-case-exit3": "The job ended with exit code 3.",
    "30-case-exit137": "The job failed: The compute backend terminated the job.",
    "30-case-cmdnotfound": "The job's command was not found (exit code 127).",
    "30-case-bad-partition": "SLURM refused the job: its words are on the cluster, in /shared/cromwell-executions/",
    "30-case-too-much-memory": "SLURM refused the job: ",
    "30-case-wdl-garbage": "Cromwell refused the workflow: ERROR: Finished parsing without consuming all tokens.",
    "30-case-unknown-backend": "Cromwell refused the workflow: ",
    "30-case-cpu-zero": "The job failed: Expecting cpu runtime attribute value greater than 0.",
    "33-timelimit-exit-code-timeout": "SLURM lost the job: ",
    "41-abort-submitted": "The job was aborted, ",
    "43-abort-running-no-docker-attr": "The job was aborted, ",
    "71-docker-bug-timeline": "This Cromwell cannot run jobs with the attribute `docker`, which",
    "32-case-maxRetries1": "The job ended with exit code ",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(name: str) -> None:
    data = recording(name)
    exchanges = data.get("exchanges") or [step["exchange"] for step in data["timeline"]]
    asked = [e for e in exchanges if "request" in e and e["request"]["path"].endswith("/metadata")]
    ended = asked[-1]["response"]["body"]
    assert ended["status"] in FINAL
    with playing(Timeline(ended["id"], replies=[("metadata", 200, ended)])) as (player, url):
        own = backend(url)
        own.submit(*job())
        player.position = 1
        status = own.status(JID)
        assert status.state is JobState.FAILED
        assert status.message.startswith(SENTENCES[name]), status.message
        assert status.message.endswith(".")
        assert "\n" not in status.message


QUEUED = {"status": "Running", "calls": {"ChRISJob.plugin_instance": [{"executionStatus": "QueuedInCromwell"}]}}


def test_unknown_states_are_undefined() -> None:
    odd = {"status": "Reticulating", "calls": {}}
    with playing(Timeline("x", replies=[("metadata", 200, QUEUED), ("status", 200, odd)])) as (player, url):
        own = backend(url)
        own.submit(*job())
        player.position = 2
        player.metadata = lambda: odd  # type: ignore[method-assign]
        assert own.status(JID).state is JobState.UNDEFINED


def test_an_unknown_jid_is_a_404_and_nothing_is_left() -> None:
    with playing(Timeline("x")) as (player, url):
        for jid in ("nobody", "n" * 300, "a:b"):
            with pytest.raises(NotFound):
                backend(url).status(jid)
            with pytest.raises(NotFound):
                backend(url).delete(jid)
        assert not player.submitted


def test_a_job_that_cromwell_lost_can_be_posted_again() -> None:
    """Recording 50: accepted, killed at once, never heard of again; the same id is accepted again."""
    with playing(Timeline("x")) as (player, url):
        own = backend(url)
        own.submit(*job())
        assert own.status(JID).state is JobState.NOT_STARTED
        player.submitted.clear()
        assert own.status(JID).state is JobState.NOT_STARTED  # it was just accepted
        with pytest.raises(NotFound):
            backend(url).status(JID)
        assert backend(url).submit(*job()).state is JobState.NOT_STARTED
        assert list(player.submitted) == [workflow_id(JID, 1)]


@pytest.mark.slow
def test_a_job_in_limbo_is_not_posted_twice() -> None:
    """Recording 51: accepted and killed 2 s later; invisible for ten minutes, its id taken."""
    with playing(Timeline("x")) as (player, url):
        backend(url).submit(*job())
        other = backend(url)
        with pytest.raises(Unreachable):
            other.submit(*job())
        assert other.status(JID).state is JobState.NOT_STARTED
        with pytest.raises(Unreachable):
            other.delete(JID)
        assert player.posts == 1


def test_another_request_with_the_jid_is_a_conflict_even_while_invisible() -> None:
    with playing(Timeline("x", replies=[("metadata", 200, QUEUED)])) as (player, url):
        own = backend(url)
        own.submit(*job())
        with pytest.raises(Conflict):
            own.submit(*job(args=["other"]))
        player.position = 1
        with pytest.raises(Conflict):
            backend(url).submit(*job(args=["other"]))
        assert backend(url).submit(*job()).state is JobState.NOT_STARTED
        assert player.posts == 1


def test_another_request_that_shows_late_keeps_its_labels() -> None:
    """A second process posts while it is invisible, and finds it between two questions."""
    with playing(Timeline("x", replies=[("metadata", 200, QUEUED)]), ShowsWhenAsked) as (player, url):
        backend(url).submit(*job())
        labels = dict(player.submitted[workflow_id(JID, 1)])
        with pytest.raises(Conflict):
            backend(url).submit(*job(args=["other"]))
        assert player.submitted == {workflow_id(JID, 1): labels}


def test_a_job_that_lost_its_labels_gets_them_back() -> None:
    """Recording 52: its id is known, and no label."""
    with playing(Timeline("x", replies=[("metadata", 200, QUEUED)])) as (player, url):
        backend(url).submit(*job())
        labels = dict(player.submitted[workflow_id(JID, 1)])
        player.submitted[workflow_id(JID, 1)] = {}
        player.position = 1
        assert backend(url).submit(*job()).state is JobState.NOT_STARTED
        assert player.submitted == {workflow_id(JID, 1): labels}
        assert player.posts == 1


@pytest.mark.slow
def test_a_database_that_takes_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is never given to a second workflow, as the abort of one that does not show yet would do."""
    monkeypatch.setattr(cromwell, "WINDOW_SECONDS", 10.0)
    monkeypatch.setattr(store, "HOG_GROUP_MAX", 1000)
    pace = replace(TEST_PACE, metadata_flush=1, pickup_period=3600)
    config = load(ROOT / "deploy" / "cromwell" / "slurm.conf").at(tmp_path / "executions")
    with Cromwell(config, tmp_path, pace=pace) as server:
        own = backend(server.url)
        with pytest.raises(NotFound):
            own.status(JID)
        assert own.submit(*job()).state is JobState.NOT_STARTED
        rows = [server.store.get(workflow_id(JID, attempt)) for attempt in (1, 2)]
        assert [row and row.state for row in rows] == ["On Hold", "Submitted"]
        other = backend(server.url)
        assert other.submit(*job()).state is JobState.NOT_STARTED
        other.delete(JID)
        with pytest.raises(NotFound):
            own.status(JID)


@pytest.mark.slow
def test_a_delete_where_new_jobs_of_others_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jid has been deleted before. That is no reason to answer 204 while another replica has posted it anew."""
    monkeypatch.setattr(cromwell, "WINDOW_SECONDS", 10.0)
    monkeypatch.setattr(store, "HOG_GROUP_MAX", 1000)
    pace = replace(TEST_PACE, metadata_flush=3, pickup_period=3600)
    config = load(ROOT / "deploy" / "cromwell" / "slurm.conf").at(tmp_path / "executions")
    with Cromwell(config, tmp_path, pace=pace) as server:
        own, other = backend(server.url), backend(server.url)
        with pytest.raises(NotFound):
            other.status("another")  # asked once whether its id is taken, and not again
        for deleting in (own, other):
            own.submit(*job())
            deleting.delete(JID)
            with pytest.raises(NotFound):
                own.status(JID)
        other.delete(JID)


SUBMITTED = {"status": "Submitted", "calls": {}}


@pytest.mark.parametrize("length", [0, 200, 5000, 100_000])
@pytest.mark.parametrize("shown", [SUBMITTED, QUEUED], ids=["Submitted", "Running"])
def test_image_and_command_come_back_whole(shown: dict[str, Any], length: int) -> None:
    """Short ones from labels, the others from what was submitted."""
    with playing(Timeline("x", replies=[("metadata", 200, shown)])) as (player, url):
        made, spec = job(args=["\U0001f9e0\\\"'\n" * (length // 8)], image="a/" * 120 + "b:" + "1" * 120)
        backend(url).submit(made, spec)
        labels = player.submitted[workflow_id(JID, 1)]
        assert all(0 < len(key) <= 255 >= len(value) for key, value in labels.items())
        assert len(labels) <= 25
        options = json.dumps({"org.chrisproject.pman.cmd": made.cmd})
        body = shown | {"submittedFiles": {"options": options}}
        player.metadata = lambda: body  # type: ignore[method-assign]
        player.position = 1
        status = backend(url).status(JID)
        assert (status.image, status.cmd) == (made.image, made.cmd)
        assert ("submittedFiles" in player.seen_keys) == (length >= 5000)
        assert bool(player.seen_keys) == (length >= 5000 or shown is QUEUED)


def test_a_poll_is_small() -> None:
    longest = max(timelines().values(), key=lambda line: len(json.dumps(line.replies)))
    with playing(longest) as (player, url):
        own = backend(url)
        own.submit(*job())
        player.position = len(longest.replies)
        own.status(JID)
        small = _chosen(player.metadata(), player.seen_keys)
        assert "submittedFiles" not in small
        assert "commandLine" not in player.seen_keys


def test_words_of_a_refusal() -> None:
    said = {"status": "fail", "message": "Error(s): Invalid workflow options provided: no"}
    with playing(Timeline("x")) as (player, url):
        player.refusal = said
        with pytest.raises(BadRequest, match="Invalid workflow options provided"):
            backend(url).submit(*job())
        assert not player.submitted


def test_a_refusal_that_lost_its_words_says_nothing() -> None:
    """It may be that of an id that is taken: the job runs, and neither is its request bad, nor is it unknown."""
    with playing(Timeline("x")) as (player, url):
        backend(url).submit(*job())
        player.refusal = ""
        other = backend(url)
        for ask in (lambda: other.submit(*job()), lambda: other.status(JID), lambda: other.delete(JID)):
            with pytest.raises(Unreachable):
                ask()


@pytest.mark.parametrize("word", ["NotStarted", "QueuedInCromwell", "Starting", "Running"])
def test_a_job_that_slurm_has_is_not_being_prepared(word: str) -> None:
    """A Cromwell that was killed and started again says of each of its calls that it is queued in Cromwell."""
    calls = {"ChRISJob.plugin_instance": [{"executionStatus": word, "jobId": "76"}]}
    shown = {"status": "Running", "calls": calls}
    with playing(Timeline("x", replies=[("metadata", 200, shown)])) as (player, url):
        own = backend(url)
        own.submit(*job())
        player.position = 1
        assert own.status(JID).state is JobState.STARTED


def test_a_cluster_that_binds_one_directory_refuses_others_at_post() -> None:
    """Cromwell itself would let such a job wait for 15 minutes before it fails."""
    with playing(Timeline("x", replies=[("metadata", 200, QUEUED)])) as (player, url):
        own = backend(url, CROMWELL_SHAREDIR_ONLY="yes", STOREBASE="/data")
        for directories in ({"input_dir": "home/x/data"}, {"output_dir": "home/x/feed_1/out"}):
            with pytest.raises(BadRequest, match="must be `incoming` and `outgoing` of one directory"):
                own.submit(*job(**directories))
        assert not player.submitted
        assert own.submit(*job()).state is JobState.NOT_STARTED
