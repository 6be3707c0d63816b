"""The pages for people: the jobs at /, one job at /jobs/<jid>/, and the template playground at /render.

They change nothing: no form and no script of theirs posts, deletes or submits a job, so there is nothing to forge.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import flask
import jinja2

from pman import __version__, metrics
from pman.api import Service, look, service
from pman.backends import BACKENDS
from pman.errors import BadRequest, Misconfigured, PmanError
from pman.job import make_job, parse_request
from pman.render import TARGETS, Renderer
from pman.status import JobStatus

blueprint = flask.Blueprint("pages", __name__, template_folder="pages")
SHOWN = 100
MARK = f"\0{secrets.token_hex(8)}"  # NUL stands in no value of a job, and the rest in no template
EXAMPLE = {
    "jid": "chris-jid-1", "type": "ds", "auid": "cube", "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
    "entrypoint": ["simpledsapp"], "args": ["--prefix", "it's $(here)"], "env": ["GREETING=hello"],
    "number_of_workers": 1, "cpu_limit": 1000, "memory_limit": 200, "gpu_limit": 0,
}  # fmt: skip


class TracedTemplate(jinja2.Template):
    """A template whose blocks begin and end with MARK, so that every part of the text can be traced to its block."""

    @classmethod
    def from_code(cls, *args: Any, **kwargs: Any) -> jinja2.Template:
        template = super().from_code(*args, **kwargs)
        for name, block in template.blocks.items():
            traced = template.blocks[name] = _traced(name, block)
            block.__globals__[block.__name__] = traced  # which super() looks for among the blocks
        return template


def _traced(name: str, block: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    def traced(context: Any) -> Iterator[str]:
        yield f"{MARK}+{name}\0"
        yield from block(context)
        yield f"{MARK}-\0"

    return traced


def segments(text: str) -> list[tuple[str, str]]:
    """(block, text) for each part of a traced rendering; the block is "" outside all blocks."""
    found: list[tuple[str, str]] = []
    stack = [""]
    for number, part in enumerate(text.split(MARK)):
        mark, _, rest = part.partition("\0") if number else ("", "", part)
        if mark.startswith("+"):
            stack.append(mark[1:])
        elif mark == "-":
            stack.pop()
        if rest:
            found.append((stack[-1], rest))
    return found


@blueprint.get("/")
def jobs() -> flask.Response:
    """The backend with its health, and the newest jobs."""
    s, listed, problem = service(), list[JobStatus](), ""
    try:
        metrics.ask_once("ping", s.backend.ping)
        listed = metrics.ask("jobs", lambda: s.backend.jobs(SHOWN + 1))
    except PmanError as error:
        problem = str(error)
    rows = [(job, _age(job.posted_at), _age(job.finished_at)) for job in listed[:SHOWN]]
    return _page("jobs.html", jobs=rows, more=len(listed) > SHOWN, problem=problem)


@blueprint.get("/jobs/<jid>/")
def job(jid: str) -> flask.Response:
    """One job and the end of its output."""
    flask.g.jid = jid
    found, text = look(jid, service().settings.job_logs_tail)
    return _page("job.html", job=found, logs=text)


@blueprint.get("/render")
def playground() -> flask.Response:
    """A request to edit, and what it renders to."""
    own = BACKENDS[service().settings.container_env].target
    return _page("render.html", request=json.dumps(EXAMPLE, indent=2), targets=list(TARGETS), own=own)


@blueprint.post("/render")
def render() -> tuple[dict[str, Any], int]:
    """What a request renders to, with the block of each part and the verdict of its language's parser.

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
    job = make_job(parse_request(data["request"].encode(errors="surrogatepass")), s.settings)
    traced = _tracer(s).render(job, data["target"])
    parts = {"spec": segments(traced.text)} | {name: segments(text) for name, text in traced.extras.items()}
    return {"parts": parts, "problems": _problems(s, data["target"], job)}, 200


def _tracer(s: Service) -> Renderer:
    """Made at the first use: most servers never show the playground."""
    kept = flask.current_app.extensions
    if "pman.tracer" not in kept:
        kept["pman.tracer"] = Renderer(s.settings, TracedTemplate)
    found: Renderer = kept["pman.tracer"]
    return found


def _problems(s: Service, target: str, job: Any) -> list[str]:
    try:
        from pman.check import judge

        return judge(s.renderer.render(job, target))
    except Misconfigured as error:
        return [f"not checked: {error}"]


def _page(name: str, **values: Any) -> flask.Response:
    nonce = secrets.token_urlsafe(16)
    s = service().settings
    response = flask.make_response(
        flask.render_template(
            name, nonce=nonce, version=__version__, settings=s, root=flask.request.script_root, **values
        )
    )
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'"
    response.headers["Content-Security-Policy"] = (
        f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cache-Control"] = "no-store"
    return response


def _age(moment: datetime | None) -> str:
    """How long ago that was, in the largest fitting unit; "" for None."""
    if moment is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
