"""The pages for people: the jobs at /, one job at /jobs/<jid>/, the backend at /backend, and the playground at /render.

They change nothing: no form and no script of theirs posts, deletes or submits a job, so there is nothing to forge.
static/pages.js keeps them up to date; all but the playground can be read without it.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import flask

from pman import __version__
from pman.backends import BACKENDS
from pman.errors import BadRequest, Misconfigured, PmanError, Unreachable
from pman.job import parse_request
from pman.service import jobs, metrics, origins, overview
from pman.service.api import number, service
from pman.service.proxies import root
from pman.status import Details, span, to_resource
from pman.targets import TARGETS, judge
from pman.templating.explain import explain
from pman.templating.render import SAMPLE, Piece

blueprint = flask.Blueprint(
    "pages", __name__, template_folder="html", static_folder="static", static_url_path="/static"
)
EXAMPLE = {**SAMPLE, "args": ["--prefix", "it's $(here)"]}
MAX_LINK = 100_000  # characters of a link to the playground
COLUMNS = {
    "jid": "jid", "state": "state", "user": "user", "posted_at": "posted", "finished_at": "ended", "image": "image",
    "message": "message",
}  # fmt: skip
SINCE = {"hour": 1, "day": 24, "week": 168}


@blueprint.get("/")
def listing() -> flask.Response:
    """The backend with its health, and a page of the jobs, with what the API's listing takes as filters and order."""
    s, page, note, problem = service(), None, None, ""
    try:
        note = metrics.ask_once("ping", s.backend.ping)
        page = jobs.asked_page()
    except BadRequest:
        raise
    except PmanError as error:
        problem = str(error)
    now = datetime.now(UTC).replace(microsecond=0)
    since = {name: (now - timedelta(hours=hours)).isoformat() for name, hours in SINCE.items()}
    shown = {"page": page, "note": note, "problem": problem, "columns": COLUMNS, "link": _link, "since": since}
    return _page("jobs.html", forms="'self'", **shown, age=_age, span=span)


def _link(**changes: str) -> str:
    """A link to this page with another query, from its beginning where `after` is not among the changes."""
    asked = {**flask.request.args.to_dict(), "after": "", **changes}
    return "?" + urlencode({name: value for name, value in asked.items() if value})


@blueprint.get("/jobs/<jid>/")
def job(jid: str) -> flask.Response:
    """All that is known of a job, and the end of what one of its workers has written."""
    worker, status, notes = number("worker", 0, 1023), jobs.read(jid), list[str]()
    details, text, cut = Details(), "", False
    try:
        details = metrics.ask_once("details", lambda: service().backend.details(status))
    except Unreachable as error:
        notes.append(f"Not all that is known of the job can be had now: {error}")
    try:
        text, _, cut = jobs.news(status, worker, "")
    except Unreachable as error:
        notes.append(f"The log cannot be had now: {error}")
    shown = {"job": status, "details": details, "argv": to_resource(status, details)["argv"], "notes": notes}
    now = datetime.now(UTC)
    return _page("job.html", **shown, worker=worker, logs=_plain(text), cut=cut, age=_age, span=span, now=now)


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")


def _plain(text: str) -> str:
    """Output without colours and the like. What a carriage return begins replaces what stands before it in its line."""
    lines = _ESCAPES.sub("", text).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


@blueprint.get("/jobs/<jid>/spec")
def spec(jid: str) -> flask.Response:
    """What was submitted for a job, as the API shows it, with the blocks and rules that its parts come from."""
    (status, parts, values), s = jobs.submitted(jid), service()
    request, named = None, list[tuple[str, str]]()
    target = BACKENDS[s.settings.container_env].target
    with suppress(Unreachable):  # then it is shown without them
        request = origins.request_of(status, metrics.ask_once("details", lambda: s.backend.details(status)))
    if request:
        named = origins.origins(s.renderer, target, request, parts["spec"])
    again = urlencode({"target": target, "request": json.dumps(request, indent=2)}) if request else ""
    again = again if len(again) <= MAX_LINK else ""
    return _page("spec.html", jid=jid, parts=parts, values=values, users=s.users is not None, named=named, again=again)


def problem(error: PmanError) -> flask.Response:
    """What is shown in place of a page."""
    return _page("problem.html", jid=flask.g.get("jid", ""), problem=str(error), again=error.transient)


@blueprint.get("/backend")
def backend() -> flask.Response:
    """Whether the backend can take jobs, where it runs them, and what this pman allows."""
    limits = overview.limits(service().settings)
    return _page("backend.html", seen=overview.newest(), limits=limits, age=_age)


@blueprint.get("/render")
def playground() -> flask.Response:
    """A request to edit, and what it renders to."""
    own = BACKENDS[service().settings.container_env].target
    return _page("render.html", request=json.dumps(EXAMPLE, indent=2), targets=list(TARGETS), own=own)


@blueprint.post("/render")
def render() -> tuple[dict[str, Any], int]:
    """What a request renders to, with the block of each part, the verdict of its language's parser, and the reasons.

    Body: {"request": text, "target": one of TARGETS}. Nothing is submitted and nothing is stored.
    """
    try:
        data = flask.request.get_json()
    except RecursionError:
        data = None
    if not isinstance(data, dict) or data.get("target") not in [*TARGETS] or not isinstance(data.get("request"), str):
        raise BadRequest(
            {"target": f"must be one of {', '.join(TARGETS)}.", "request": "must be the text of a request."}
        )
    s = service()
    request = parse_request(data["request"].encode(errors="surrogatepass"))
    why = explain(s.renderer, request, data["target"])
    told = {"explanation": why.to_json(), "reasons": "\n".join(why.to_text())}
    if why.decision.refused is not None:
        return {"parts": {}, "problems": [why.decision.refused], **told}, 200
    job = why.decision.job
    spec = s.renderer.render(job, data["target"])
    templates = {"spec": TARGETS[spec.target].template, **TARGETS[spec.target].extras}
    parts = {name: segments(s.renderer.pieces(job, template)) for name, template in templates.items()}
    try:
        problems = list(map(str, judge(spec)))
    except Misconfigured as error:
        problems = [f"not checked: {error}"]
    return {"parts": parts, "problems": problems, **told}, 200


def segments(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """(block, text) for each part of a rendered text."""
    groups = itertools.groupby(pieces, key=lambda piece: piece.block)
    return [(block, "".join(piece.text for piece in group)) for block, group in groups]


def _page(name: str, forms: str = "'none'", **values: Any) -> flask.Response:
    """forms: where the page's forms may lead."""
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'"
    policy += f"; img-src 'self'; base-uri 'none'; form-action {forms}; frame-ancestors 'none'"
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    shown = {"nonce": nonce, "version": __version__, "settings": service().settings, "root": root(flask.request.path)}
    return flask.make_response(flask.render_template(name, **shown, **values), headers)


def _age(moment: datetime | None) -> str:
    """How long ago that was, in the largest fitting unit; "" for None."""
    return f"{span((datetime.now(UTC) - moment).total_seconds(), 1)} ago" if moment else ""
