"""The backend as a whole, at /api/v1/backend.json: whether it takes jobs, what it has, and what this service allows."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import flask

from pman import __version__
from pman.backends import Backend
from pman.backends.discovery import Overview
from pman.errors import PmanError
from pman.job import MAX_BODY_BYTES
from pman.service import metrics
from pman.service.api import service
from pman.service.jobs import MAX_LISTED
from pman.settings import Settings
from pman.templating.render import MAX_SPEC_BYTES

blueprint = flask.Blueprint("overview", __name__)
NO_ANSWER = "The backend has not answered yet."


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at the backend has found. message: why it takes no jobs, or what does not work although jobs do."""

    asked_at: datetime
    ready: bool
    message: str
    overview: Overview


@blueprint.get("/api/v1/backend.json")
def about() -> tuple[dict[str, Any], int]:
    """The backend as it was a few seconds ago, and the limits of this service. null for what is not known."""
    config, seen = service().settings, newest()
    known = {
        "asked_at": seen.asked_at.isoformat() if seen else None, "ready": seen.ready if seen else None,
        "message": seen.message if seen else NO_ANSWER, "version": (seen.overview.version or None) if seen else None,
        "places": [dataclasses.asdict(place) for place in seen.overview.places] if seen else [],
        "unknown": seen.overview.unasked if seen else [],
    }  # fmt: skip
    own = {"backend": config.container_env, "server_version": __version__}
    return own | known | {"limits": limits(config)}, 200


def newest() -> Seen | None:
    """The last look at the backend; None where none has come to its end."""
    s = service()
    return s.looks.get(functools.partial(_look, s.backend))


def _look(backend: Backend) -> Seen:
    ready, message, found = True, "", Overview()
    try:
        message = metrics.ask_once("ping", backend.ping) or ""
    except PmanError as error:
        ready, message = False, str(error)
    if ready:
        found = metrics.ask_once("overview", backend.overview)
    return Seen(datetime.now(UTC), ready, message, found)


def limits(config: Settings) -> dict[str, int | bool | None]:
    """What this service allows; null for no limit."""
    return {
        "time_limit_minutes": config.timelimit_minutes, "max_time_limit_minutes": config.timelimit_max_minutes,
        "cpu_and_memory": not config.ignore_limits, "requests_at_once": config.max_concurrent_requests,
        "log_lines": config.job_logs_tail, "log_kib": config.job_logs_max_kib, "listed_jobs": MAX_LISTED,
        "request_kib": MAX_BODY_BYTES // 1024, "spec_kib": MAX_SPEC_BYTES // 1024,
    }  # fmt: skip
