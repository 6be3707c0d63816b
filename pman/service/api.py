"""The HTTP contract of pfcon: four calls below /api/v1/. Beside it OpenAPI, metrics and two probes."""

import threading
from dataclasses import dataclass, field
from typing import Any

import flask

from pman import __version__
from pman.backends import BACKENDS, Backend, logs
from pman.errors import BadRequest, NotFound, PmanError
from pman.job import parse_request
from pman.service import metrics, openapi
from pman.service.auth import Users
from pman.service.latest import Latest
from pman.settings import Settings
from pman.status import JobStatus
from pman.storage import prepare
from pman.templating.render import Renderer

blueprint = flask.Blueprint("api", __name__)
Reply = tuple[dict[str, str], int]


@dataclass(frozen=True, slots=True)
class Service:
    """What a request handler needs, made once at start and shared by all threads."""

    settings: Settings
    renderer: Renderer
    backend: Backend
    users: Users | None  # None: everybody may do everything
    followers: threading.Semaphore  # requests that may wait for output at once
    looks: Latest[Any] = field(default_factory=Latest)  # at the backend as a whole (overview.py)


def service() -> Service:
    found = flask.current_app.extensions["pman"]
    assert isinstance(found, Service)
    return found


@blueprint.get("/api/v1/")
def about() -> Reply:
    s = service().settings
    return {"server_version": __version__, "container_env": s.container_env, "storage_type": s.storage_type}, 200


@blueprint.post("/api/v1/")
def submit() -> Reply:
    """201 with the job, also when exactly this request was posted before: it runs once."""
    s = service()
    try:
        request = parse_request(flask.request.get_data(cache=False))
        flask.g.jid = request.jid
        job = s.renderer.job(request)
        spec = s.renderer.render(job, BACKENDS[s.settings.container_env].target)
        prepare(job, s.settings)  # what a template refuses leaves nothing in the store
        status = metrics.ask("submit", lambda: s.backend.submit(job, spec))
    except PmanError as error:
        metrics.SUBMITTED.labels(type(error).__name__).inc()
        raise
    metrics.SUBMITTED.labels("accepted").inc()
    return status.to_json(), 201


@blueprint.get("/api/v1/<jid>/")
def read(jid: str) -> tuple[dict[str, str], int, dict[str, str]]:
    """The job with the end of its logs; `?tail=N` asks for fewer lines than JOB_LOGS_TAIL.

    The header Pman-Logs-Cut is there where the logs are, or may be, not all of the output.
    """
    s = service()
    flask.g.jid = jid
    lines = number("tail", s.settings.job_logs_tail, s.settings.job_logs_tail)
    status, text, cut = look(jid, lines)
    return status.to_json(text), 200, {"Pman-Logs-Cut": "yes"} if cut else {}


def look(jid: str, lines: int) -> tuple[JobStatus, str, bool]:
    """A job, the end of its logs, and whether earlier output may be missing there.

    Under one retry policy, since two after each other could outlast pfcon's patience.
    Where the log cannot be had, a line in its place says so: a job's status never waits for its log.
    """
    backend, max_bytes = service().backend, service().settings.job_logs_max_kib * 1024
    seen: list[JobStatus] = []

    def once() -> tuple[str, bool]:
        seen[:] = [metrics.ask_once("status", lambda: backend.status(jid))]
        if not lines:
            return "", False
        return metrics.ask_once("logs", lambda: logs.of_job(backend, seen[0], lines, max_bytes))

    try:
        text, cut = metrics.repeat("status", once)
    except PmanError as error:
        if not seen or isinstance(error, NotFound):
            raise
        text, cut = f"[pman: the log cannot be had now: {error}]\n", False
    return seen[0], text, cut


@blueprint.delete("/api/v1/<jid>/")
def delete(jid: str) -> tuple[str, int]:
    s = service()
    flask.g.jid = jid
    if s.settings.remove_jobs:
        metrics.ask("delete", lambda: s.backend.delete(jid))
    else:
        metrics.ask("status", lambda: s.backend.status(jid))
    return "", 204


@blueprint.get("/api/v1/openapi.json")
def describe() -> tuple[dict[str, object], int]:
    return openapi.document(service().users is not None), 200


@blueprint.get("/metrics")
def show_metrics() -> flask.Response:
    return flask.Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


@blueprint.get("/healthz")
def healthz() -> Reply:
    """The process is up."""
    return {"status": "up"}, 200


@blueprint.get("/readyz")
def readyz() -> Reply:
    """The backend can take jobs, or 503 and why not. `message`: what does not work although jobs do."""
    try:
        note = metrics.ask_once("ping", service().backend.ping)
    except PmanError as error:
        return {"message": str(error)}, 503
    return {"status": "ready"} | ({"message": note} if note else {}), 200


def number(name: str, default: int, most: int) -> int:
    """A whole number of the query, at most `most`. Raises BadRequest."""
    text = flask.request.args.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest({name: "must be a whole number from 0 to 999999999."})
    return min(int(text), most)
