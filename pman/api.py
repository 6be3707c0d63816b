"""The HTTP contract of pfcon: four calls below /api/v1/, and two probes."""

from __future__ import annotations

from dataclasses import dataclass

import flask

from pman import __version__, retry
from pman.backends import BACKENDS, Backend
from pman.errors import BadRequest, PmanError
from pman.job import make_job, parse_request
from pman.render import Renderer
from pman.settings import Settings
from pman.storage import prepare

blueprint = flask.Blueprint("api", __name__)
Reply = tuple[dict[str, str], int]


@dataclass(frozen=True, slots=True)
class Service:
    """What a request handler needs, made once at start and shared by all threads."""

    settings: Settings
    renderer: Renderer
    backend: Backend


def service() -> Service:
    """The service of the application that handles this request."""
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
    job = make_job(parse_request(flask.request.get_data(cache=False)), s.settings)
    flask.g.jid = job.jid
    prepare(job, s.settings)
    spec = s.renderer.render(job, BACKENDS[s.settings.container_env].target)
    return retry.call(s.backend.submit, job, spec).to_json(), 201


@blueprint.get("/api/v1/<jid>/")
def read(jid: str) -> Reply:
    """The job with the end of its logs; `?tail=N` asks for fewer lines than JOB_LOGS_TAIL."""
    s = service()
    flask.g.jid = jid
    lines = _tail(s.settings.job_logs_tail)
    status = retry.call(s.backend.status, jid)
    return status.to_json(retry.call(s.backend.logs, status, lines) if lines else ""), 200


@blueprint.delete("/api/v1/<jid>/")
def delete(jid: str) -> tuple[str, int]:
    s = service()
    flask.g.jid = jid
    retry.call(s.backend.delete if s.settings.remove_jobs else s.backend.status, jid)
    return "", 204


@blueprint.get("/healthz")
def healthz() -> Reply:
    """The process is up."""
    return {"status": "up"}, 200


@blueprint.get("/readyz")
def readyz() -> Reply:
    """The backend can take jobs, or 503 and why not."""
    try:
        service().backend.ping()
    except PmanError as error:
        return {"message": str(error)}, 503
    return {"status": "ready"}, 200


def _tail(most: int) -> int:
    text = flask.request.args.get("tail")
    if text is None:
        return most
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest({"tail": "must be the number of log lines that you want, 0 or more."})
    return min(int(text), most)
