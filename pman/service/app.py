"""start(): settings, renderer and backend wired together, one error handler, one log line per request."""

import contextlib
import functools
import importlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC
from typing import Any, cast

import flask
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, UnsupportedMediaType

from pman import backends, settings
from pman.errors import NotFound, PmanError, Refused, Unreachable
from pman.job import MAX_BODY_BYTES
from pman.service import jobs, metrics, overview, pages, proxies
from pman.service.api import Service, blueprint
from pman.service.auth import Busy, Users, credentials
from pman.targets import TARGETS
from pman.templating.render import Renderer, sample_job

log = logging.getLogger("pman.http")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
FIRST_ANSWER_SECONDS = 5.0  # how long the start waits for a backend; one that hangs is waited for while pman serves
DRAIN_BYTES = 64 * 1024 * 1024  # of a body that is too large


Look = Callable[[Renderer], None]  # looks at the site's templates, and says in the log what is wrong with them


def start(config: settings.Settings, look: Look = lambda _: None) -> flask.Flask:
    """The WSGI application of a server that starts. Raises one of pman's errors when it could not serve any job."""
    set_up_logging(config)
    app = create_app(config, look=look)
    _say_whether_jobs_can_run(app.extensions["pman"].backend, config)
    return app


def create_app(
    config: settings.Settings, backend: backends.Backend | None = None, look: Look = lambda _: None
) -> flask.Flask:
    """The WSGI application. Raises one of pman's errors as `start` does."""
    for warning in backends.check_for_service(config):
        log.warning("%s", warning)
    renderer = Renderer(config, TARGETS)
    look(renderer)
    with contextlib.suppress(Refused):  # a site's policy may well have no place for the sample
        renderer.render(sample_job(config), backends.BACKENDS[config.container_env].target)
    app = flask.Flask("pman", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.default = lambda moment: moment.astimezone(UTC).isoformat()  # type: ignore[attr-defined]
    half = max(1, config.max_concurrent_requests // 2)
    users = Users(config.auth_users_file, half) if config.auth_users_file else None
    followers = threading.Semaphore(max(1, config.max_concurrent_requests // 4))
    app.extensions["pman"] = Service(config, renderer, backend or _backend(config), users, followers)
    for each in (blueprint, jobs.blueprint, overview.blueprint, pages.blueprint):
        app.register_blueprint(each)
    app.before_request(_begin)
    app.wsgi_app = proxies.merging_slashes(app.wsgi_app)  # type: ignore[assignment]
    if config.trusted_proxies:
        app.wsgi_app = proxies.believing(config.trusted_proxies, app.wsgi_app)  # type: ignore[assignment]
    if config.allowed_hosts or (config.listens_locally and users is None):
        app.before_request(functools.partial(_refuse_other_names, config.allowed_hosts))
    _limit_concurrency(app, config.max_concurrent_requests, _PLACELESS if users is None else {"api.healthz"})
    app.before_request(_refuse_encoded_bodies)
    app.before_request(_authenticate)
    app.before_request(_refuse_other_sites)
    app.after_request(_end)
    app.register_error_handler(Exception, _answer)
    return app


def _begin() -> None:
    given = flask.request.headers.get("X-Request-ID", "")
    flask.g.request_id = given if _SANE_ID.fullmatch(given) else secrets.token_hex(8)
    flask.g.started_at = time.monotonic()


def _backend(config: settings.Settings) -> backends.Backend:
    """The backend, or, where it hangs for FIRST_ANSWER_SECONDS, what stands for it until it is there.

    Raises what it raises within that time.
    """
    made: Future[backends.Backend] = Future()
    importlib.import_module(backends.BACKENDS[config.container_env].module)  # takes time whatever the backend does

    def make() -> None:
        try:
            made.set_result(backends.load(config))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        return made.result(FIRST_ANSWER_SECONDS)
    except TimeoutError:
        if made.done():
            raise
        made.add_done_callback(functools.partial(_say_what_came, config))
        return cast(backends.Backend, _Awaited(made, config.container_env))


def _say_what_came(config: settings.Settings, made: Future[backends.Backend]) -> None:
    if error := made.exception():
        log.error("%s cannot be used: %s", config.container_env, error)
    else:
        _say_whether_jobs_can_run(made.result(), config)


class _Awaited:
    """A backend that has not answered yet."""

    def __init__(self, made: Future[backends.Backend], name: str) -> None:
        self._made, self._name = made, name

    def __getattr__(self, operation: str) -> Any:
        if not self._made.done():
            raise Unreachable(f"{self._name} has not answered since pman was started.")
        return getattr(self._made.result(), operation)


def _say_whether_jobs_can_run(backend: backends.Backend, config: settings.Settings) -> None:
    """Say in the log whether the backend answers. The start does not wait for it: it may come up later."""

    def ask() -> None:
        try:
            backend.ping()
            log.info("%s can take jobs", config.container_env)
        except PmanError as error:
            log.warning("%s cannot take jobs yet: %s", config.container_env, error)

    threading.Thread(target=ask, daemon=True).start()


# They ask no backend and answer at once, also while calls of a backend that hangs hold every place.
_PLACELESS = {"api.healthz", "api.show_metrics", "api.about", "api.describe"}


def _limit_concurrency(app: flask.Flask, most: int, placeless: set[str]) -> None:
    """More than `most` requests at once are turned away, so that a flood exhausts neither threads nor the backend.

    POST and DELETE may wait long, for an image or the end of a job, and leave a quarter of the places to what reads.
    """
    every, patient = threading.BoundedSemaphore(most), threading.BoundedSemaphore(most - most // 4)

    def enter() -> flask.Response | None:
        flask.g.has = []
        if flask.request.endpoint in placeless:
            return None
        for places in (every,) if flask.request.method in ("GET", "HEAD") else (patient, every):
            if not places.acquire(blocking=False):
                return _turned_away(f"pman is serving {most} requests already; try again.")
            flask.g.has.append(places)
        return None

    def leave(_: BaseException | None) -> None:
        for places in flask.g.pop("has", []):
            places.release()

    app.before_request(enter)
    app.teardown_request(leave)


def _refuse_other_names(allowed: list[str]) -> flask.Response | None:
    """Refuse host names that are not pman's: a website could point its name at this machine (DNS rebinding).

    A browser would then let that website read pman's answers. Addresses cannot be pointed elsewhere, and every browser
    sends a Host, so addresses and requests without one are served.
    """
    if proxies.is_called_by(flask.request.headers.get("Host", ""), allowed):
        return None
    return _plain("pman is not called by this name; set ALLOWED_HOSTS if it is to be.", 403, {})


def _refuse_encoded_bodies() -> None:
    """Refuse them as RFC 7694 says: a small compressed body may hold any amount of text."""
    encoding = flask.request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType("The body must be sent as it is, without Content-Encoding.")


def _authenticate() -> flask.Response | None:
    service = flask.current_app.extensions["pman"]
    if service.users is None or flask.request.path == "/healthz":
        return None
    given = credentials(flask.request.headers.get("Authorization", ""))
    try:
        if given and service.users.allow(*given):
            return None
    except Busy:
        return _turned_away("pman is comparing other passwords; try again.")
    log.warning("authentication failed", extra={"fields": {"client": flask.request.remote_addr}})
    challenge = {"WWW-Authenticate": 'Basic realm="pman", charset="UTF-8"'}
    return _plain("Wrong user or password." if given else "A user and a password are needed.", 401, challenge)


def _refuse_other_sites() -> flask.Response | None:
    """Refuse what a browser sends for another website, which could otherwise make it post or delete jobs.

    Browsers send Sec-Fetch-Site (W3C Fetch Metadata), or only Origin where pman's address is neither https nor local;
    other clients send neither. Pages are left out: they change nothing, and a proxy may change Host, but not Origin.
    """
    if flask.request.method in ("GET", "HEAD", "OPTIONS") or flask.request.blueprint == pages.blueprint.name:
        return None
    site, origin = flask.request.headers.get("Sec-Fetch-Site"), flask.request.headers.get("Origin")
    own = site in ("same-origin", "none") if site else origin is None or proxies.place(origin) == flask.request.host
    return None if own else _plain("A browser sent this request for another website.", 403, {})


def _turned_away(message: str) -> flask.Response:
    return _plain(message, 503, {"Retry-After": "1"})


def _plain(message: str, code: int, headers: dict[str, str]) -> flask.Response:
    return flask.make_response({"message": message}, code, headers)


def _end(response: flask.Response) -> flask.Response:
    response.headers["X-Request-ID"] = flask.g.request_id
    if response.location:  # of a path that lacks its last slash; a proxy may have other names for all before it
        response.location = proxies.relative(flask.request.environ, response.location)
        response.data, response.mimetype = json.dumps({"message": f"See {response.location}"}), "application/json"
    fields = {
        "method": flask.request.method,
        "path": flask.request.path,
        "status": response.status_code,
        "ms": round((time.monotonic() - flask.g.started_at) * 1000, 1),
    }
    route = flask.request.url_rule.rule if flask.request.url_rule else "unknown"
    # A label of metrics must have few values, whatever clients send.
    method = fields["method"] if fields["method"] in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"
    metrics.REQUESTS.labels(route, method, str(response.status_code)).inc()
    log.info("request", extra={"fields": fields})
    return response


def _answer(error: Exception) -> tuple[flask.Response, int]:
    """Every error as JSON with `message`, or as a page where one was asked for. A stack trace goes to the log alone."""
    if isinstance(error, PmanError):
        level = logging.ERROR if error.http_status >= 500 else logging.INFO
        log.log(level, "%s", error, extra={"fields": {"detail": error.detail[:4096]}})
        page = flask.request.blueprint == pages.blueprint.name and flask.request.method == "GET"
        response = pages.problem(error) if page else flask.jsonify(message=error.message)
        if isinstance(error, Unreachable):
            response.headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
        return response, error.http_status
    if isinstance(error, RequestEntityTooLarge):
        # A client that sends all of the body before it reads would otherwise meet a reset, not the answer.
        left = DRAIN_BYTES
        while left > 0 and (chunk := flask.request.environ["wsgi.input"].read(65536)):
            left -= len(chunk)
        return flask.jsonify(message=f"The body is larger than {MAX_BODY_BYTES} bytes."), 413
    if isinstance(error, HTTPException):
        if error.code == 404 and _asks_for_a_page():
            return pages.problem(NotFound("There is no such page.")), 404
        response = flask.jsonify(message=error.description)
        if allowed := getattr(error, "valid_methods", None):
            response.headers["Allow"] = ", ".join(allowed)
        return response, error.code or 500
    log.exception("unexpected error")
    return flask.jsonify(message="pman met an unexpected error; its log says more under this request's id."), 500


def _asks_for_a_page() -> bool:
    """Whether a browser asks for what it shows; programs, also those of pages, take whatever there is."""
    best = flask.request.accept_mimetypes.best_match(["application/json", "text/html"])
    return best == "text/html" and not flask.request.path.startswith("/api/")


class LineFormatter(logging.Formatter):
    """One line per record, as `key=value` text or as JSON; line breaks in values are escaped.

    Every line that is written while a request is served names it and its jid.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if flask.has_request_context() and "request_id" in flask.g:
            fields |= {"request_id": flask.g.request_id, "jid": flask.g.get("jid", ""), "pid": str(os.getpid())}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(fields)
        return " ".join(v if k in ("time", "level") else f"{k}={json.dumps(v)}" for k, v in fields.items())


def set_up_logging(config: settings.Settings) -> None:
    """Structured lines on stderr, by LOG_FORMAT and LOG_LEVEL."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(config.log_format == "json"))
    logging.basicConfig(level=config.log_level, handlers=[handler], force=True)
