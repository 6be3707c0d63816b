"""`pman serve`: a WSGI server that reads slow clients outside its worker threads.

waitress, not granian: both leave other callers served beside slow clients, granian answers a quarter more requests a
second, but takes nearly twice the memory (bench/README.md).
"""

from __future__ import annotations

import json
import logging
import signal
import sys

import waitress
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from pman import app, render
from pman.job import MAX_BODY_BYTES
from pman.settings import Settings

log = logging.getLogger(__name__)
SPARE_THREADS = 8  # beyond MAX_CONCURRENT_REQUESTS: they turn requests away and answer /healthz
# Half-open and idle connections cost waitress a file descriptor each and no thread; it drops silent ones.
CONNECTIONS = 900
IDLE_SECONDS = 60


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses (broken HTTP, a body that says it is too large) in the contract's shape."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"message": f"{error.reason}: {error.body}"}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


def serve(settings: Settings) -> None:
    """Serve until ended by a signal. Raises Misconfigured or TemplateError before anything listens."""
    app.set_up_logging(settings)
    application = app.create_app(settings)
    if settings.dev:
        templates = [render.shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])]
        extra = [str(path) for directory in templates for path in directory.rglob("*") if path.is_file()]
        log.info("listening on http://%s:%s", settings.host, settings.port)
        application.run(settings.host, settings.port, use_reloader=True, extra_files=extra, threaded=True)
        return
    HTTPChannel.error_task_class = _JsonErrorTask
    server = waitress.create_server(
        application,
        host=settings.host,
        port=settings.port,
        threads=settings.max_concurrent_requests + SPARE_THREADS,
        connection_limit=CONNECTIONS,
        channel_timeout=IDLE_SECONDS,
        max_request_body_size=MAX_BODY_BYTES + 1,
        ident="pman",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for host, port in getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]:
        log.info("listening on http://%s:%s", host, port)
    server.run()
