"""The backend as a whole, at /api/v1/backend.json: whether it takes jobs, what it has, and what this service allows."""

import functools
from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at the backend has found; asked_at and ready are None while none has come to its end.

    message: why it takes no jobs, or what does not work although jobs do.
    """

    asked_at: datetime | None = None
    ready: bool | None = None
    message: str = "The backend has not answered yet."
    overview: Overview = field(default_factory=Overview)


@blueprint.get("/api/v1/backend.json")
def about() -> tuple[dict[str, Any], int]:
    """The backend as it was a few seconds ago, and the limits of this service. null for what is not known."""
    config, seen = service().settings, newest()
    return {
        "backend": config.container_env, "server_version": __version__,
        "asked_at": seen.asked_at.isoformat() if seen.asked_at else None, "ready": seen.ready, "message": seen.message,
        "version": seen.overview.version or None, "places": [asdict(place) for place in seen.overview.places],
        "unknown": seen.overview.unasked, "limits": limits(config),
    }, 200  # fmt: skip


def newest() -> Seen:
    """The last look at the backend that has come to its end."""
    s = service()
    return s.looks.get(functools.partial(_look, s.backend)) or Seen()


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
