"""`pman serve`: a WSGI server that reads slow clients outside its worker threads."""

from __future__ import annotations

import logging

import waitress

from pman import app, render
from pman.settings import Settings

log = logging.getLogger(__name__)
THREADS = 16
# Half-open and idle connections cost waitress a file descriptor each and no thread; it drops silent ones.
CONNECTIONS = 900
IDLE_SECONDS = 60
# Above the limit that pman answers with its own JSON 413; waitress answers in plain text.
MAX_BUFFERED_BYTES = 64 * 1024 * 1024


def serve(settings: Settings) -> None:
    """Serve until ended by a signal. Raises Misconfigured or TemplateError before anything listens."""
    app.set_up_logging(settings)
    application = app.create_app(settings)
    if settings.dev:
        templates = [render.shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])]
        extra = [str(path) for directory in templates for path in directory.rglob("*") if path.is_file()]
        application.run(settings.host, settings.port, use_reloader=True, extra_files=extra, threaded=True)
        return
    server = waitress.create_server(
        application,
        host=settings.host,
        port=settings.port,
        threads=THREADS,
        connection_limit=CONNECTIONS,
        channel_timeout=IDLE_SECONDS,
        max_request_body_size=MAX_BUFFERED_BYTES,
        ident="pman",
    )
    log.info("listening on http://%s:%s", settings.host, server.effective_port)
    server.run()
