"""Jobs with all that is known of them, below /api/v1/jobs/: the listing, a job's resource, its spec and its output."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

import flask

from pman.backends import BACKENDS
from pman.backends.logs import Wanted
from pman.errors import BadRequest, NotFound, Refused, Unreachable
from pman.service import following, metrics
from pman.service.api import number, service
from pman.service.openapi import SORTED
from pman.status import JobState, JobStatus, to_resource

blueprint = flask.Blueprint("jobs", __name__, url_prefix="/api/v1/jobs")
MAX_LISTED = 5000
MAX_PAGE = 1000
FOLLOW_SECONDS = 20.0  # how long a request waits for output; proxies end one that is silent for 30 s or 60 s
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the listing. next: the jid that the next page comes behind, "" on the last one.

    counts: of all that pass the filters, by state, whatever the filter `state` says. truncated: there are older jobs,
    which no page shows and no count has.
    """

    jobs: list[JobStatus]
    next: str
    truncated: bool
    counts: dict[JobState, int]


@blueprint.get("/")
def listing() -> tuple[dict[str, object], int]:
    """The newest MAX_LISTED jobs, in pages: `limit` jobs that come behind the jid `after` and pass the filters."""
    page = asked_page()
    rows = [
        {**job.to_json(), "posted_at": job.posted_at.isoformat() if job.posted_at else "", "user": job.user}
        for job in page.jobs
    ]
    return {"jobs": rows, "next": page.next, "truncated": page.truncated, "counts": page.counts}, 200


def asked_page() -> Page:
    """The page of the listing that the query asks for, newest first or in the order `sort`. Raises BadRequest."""
    limit, asked = number("limit", 100, MAX_PAGE), flask.request.args
    wanted, after, sort = asked.get("state"), asked.get("after"), asked.get("sort", "")
    bad = {"limit": "must be 1 or more."} if limit == 0 else {}
    if wanted is not None and wanted not in set(JobState):
        bad["state"] = f"must be one of {', '.join(JobState)}."
    if sort and sort.removeprefix("-") not in SORTED:
        bad["sort"] = f"must be one of {', '.join(SORTED)}, or one of them after a minus sign."
    if bad:
        raise BadRequest(bad)
    passes = _filter()
    found = metrics.ask("jobs", lambda: service().backend.jobs(MAX_LISTED + 1))
    jobs = _sorted(found[:MAX_LISTED], sort)
    behind = next((number for number, job in enumerate(jobs, 1) if job.jid == after), 0)
    if after and not behind:  # deleted since: to begin again without a word would show jobs twice
        raise BadRequest({"after": "is no job that is listed; begin again without it."})
    passing = [(place, job) for place, job in enumerate(jobs) if passes(job)]
    rest = [job for place, job in passing if place >= behind and wanted in (None, job.state)]
    counts = dict.fromkeys(JobState, 0) | Counter(job.state for _, job in passing)
    return Page(rest[:limit], rest[limit - 1].jid if len(rest) > limit else "", len(found) > MAX_LISTED, counts)


def _sorted(jobs: list[JobStatus], by: str) -> list[JobStatus]:
    """By one of SORTED, downwards behind a minus sign. Jobs of which it is not known come last."""
    if not by:
        return jobs
    value = attrgetter(by.removeprefix("-"))
    known = sorted((job for job in jobs if value(job)), key=value, reverse=by.startswith("-"))
    return known + [job for job in jobs if not value(job)]


def _filter() -> Callable[[JobStatus], bool]:
    """Whether a job passes the filters user, image (a part of it), text (in what is said of it), posted_since."""
    asked = flask.request.args
    user, image, text = asked.get("user"), asked.get("image", ""), asked.get("text", "").casefold()
    since = _moment(asked.get("posted_since"))

    def passes(job: JobStatus) -> bool:
        return (
            user in (None, job.user)
            and image in job.image
            and (not text or text in " ".join((job.jid, job.image, job.cmd, job.message, job.user or "")).casefold())
            and (since is None or (job.posted_at is not None and job.posted_at >= since))
        )

    return passes


def _moment(text: str | None) -> datetime | None:
    """A time in ISO 8601, of UTC where it names no zone. An uncoded `+` arrives as a blank. Raises BadRequest."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
    except ValueError:
        raise BadRequest({"posted_since": "must be a time such as 2026-11-30T12:00:00Z."}) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@blueprint.get("/<jid>/")
def resource(jid: str) -> tuple[dict[str, Any], int]:
    """The job with all that its backend knows of it; null for what it does not know."""
    backend, status = service().backend, read(jid)
    details = metrics.ask("details", lambda: backend.details(status))
    own = {"backend": service().settings.container_env, "links": {"logs": "logs", "spec": "spec"}}
    return to_resource(status, details) | own, 200


def read(jid: str) -> JobStatus:
    """What the backend knows of the job. Raises NotFound."""
    flask.g.jid = jid
    return metrics.ask("status", lambda: service().backend.status(jid))


@blueprint.get("/<jid>/spec")
def spec(jid: str) -> tuple[dict[str, Any], int]:
    """What was submitted. `?environment=1` asks for the values of the job's environment, too."""
    _, parts, values = submitted(jid)
    target = BACKENDS[service().settings.container_env].target
    return {"jid": jid, "target": target, "parts": parts, "environment": values}, 200


def submitted(jid: str) -> tuple[JobStatus, dict[str, str], bool]:
    """The job, name -> text of what was submitted, and whether that has the environment's values, as the query may ask.

    Those are secrets as a rule: nobody gets them from a pman that does not know its users.
    """
    s, values = service(), bool(number("environment", 0, 1))
    if values and s.users is None:
        raise Refused(
            "The environment's values are shown to users alone: set AUTH_USERS_FILE, and ask with a password."
        )
    status = read(jid)
    return status, metrics.ask("spec", lambda: s.backend.spec(status, values)), values


@blueprint.get("/<jid>/logs")
def output(jid: str) -> flask.Response:
    """The end of what a worker has written, as text: `worker` counts from 0.

    `since`: only what came after the answer whose header Pman-Logs-Next this is. `follow=1`: wait for that up to
    FOLLOW_SECONDS. There is no such header when all has been said. Pman-Logs-Cut: output is left out in front of the
    text; with `notice=1` its first line says so, too.
    """
    cursor, worker = flask.request.args.get("since", ""), number("worker", 0, 1023)
    if not following.is_cursor(cursor):
        raise BadRequest({"since": "must be the header Pman-Logs-Next of an answer."})
    state, text, following_cursor, cut = _first(_looks(jid, worker, cursor), bool(number("follow", 0, 1)))
    if cut and number("notice", 0, 1):
        text = f"[pman: output is left out here]\n{text}"
    headers = {"X-Content-Type-Options": "nosniff", "Pman-Job-State": state.value}
    headers |= {"Pman-Logs-Cut": "yes"} if cut else {}
    headers |= {} if state.final else {"Pman-Logs-Next": following_cursor}
    return flask.Response(text, headers=headers, content_type="text/plain; charset=utf-8")


Look = tuple[JobState, str, str, bool]


def _looks(jid: str, worker: int, cursor: str) -> Iterator[Look]:
    """One after another: the job's state, what is new of its output, the next cursor, whether some is left out.

    Raises NotFound where the job has fewer workers.
    """
    known = worker == 0 or not {*cursor.split(".")} <= {"", following.NOTHING}  # an answer had output of the worker
    while True:
        status = read(jid)  # before its output: what is final has written all of it
        found = news(status, worker, cursor)
        if not known and status.state is not JobState.NOT_STARTED:
            count = len(metrics.ask("details", functools.partial(service().backend.details, status)).workers)
            if 0 < count <= worker:
                raise NotFound(f"The job {jid} has no worker {worker}: there are {count}, and the first one is 0.")
        known = True
        yield status.state, *found


def news(status: JobStatus, worker: int, cursor: str) -> tuple[str, str, bool]:
    """What is new of a worker's output, the next cursor, and whether some is left out."""
    s = service()
    lines, size = s.settings.job_logs_tail, s.settings.job_logs_max_kib * 1024
    wanted = Wanted(lines + 1, size, grows=True)
    streams = metrics.ask("logs", functools.partial(s.backend.streams, status, worker, wanted))
    return following.news(cursor, streams, status.state.final, lines, size)


def _first(looks: Iterator[Look], follow: bool) -> Look:
    """The first look that shows anything, or that of the moment. Raises Unreachable where too many wait already."""
    seen = next(looks)
    if not follow or seen[1] or seen[0].final:
        return seen
    followers = service().followers
    if not followers.acquire(blocking=False):
        raise Unreachable("Too many requests wait for output already; try again.")
    try:
        deadline = time.monotonic() + FOLLOW_SECONDS
        while time.monotonic() < deadline and not seen[1] and not seen[0].final:
            time.sleep(LOOK_SECONDS)
            seen = next(looks)
        return seen
    finally:
        followers.release()
