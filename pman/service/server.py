"""`pman serve`: waitress, a WSGI server that reads slow clients outside its worker threads, in one process.

waitress, not granian: both leave other callers served beside slow clients, granian answers a quarter more requests a
second, but takes nearly twice the memory (bench/README.md). Start more replicas to serve more.
"""

import ipaddress
import json
import logging
import resource
import shlex
import signal
import socket
import sys
from pathlib import Path
from types import FrameType, SimpleNamespace

import flask
import waitress
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from waitress.utilities import RequestEntityTooLarge

from pman import backends
from pman.errors import Misconfigured, PmanError
from pman.job import MAX_BODY_BYTES
from pman.service import app
from pman.settings import Settings
from pman.targets import TARGETS
from pman.templating.render import Renderer

log = logging.getLogger(__name__)
SPARE_THREADS = 8  # beyond MAX_CONCURRENT_REQUESTS: they turn requests away and answer /healthz
# Beside one for each thread. Half-open and idle ones cost waitress no thread; it drops silent ones.
SPARE_CONNECTIONS = 850
DESCRIPTORS = 4096  # a connection takes up to two: a body above 512 KiB waits in a file
IDLE_SECONDS = 60
# A request that is cut off is an error for ChRIS although its job runs. Kubernetes kills after 30 s.
DRAIN_SECONDS = 20
BACKLOG = 1024
MAX_LINE_BYTES = 4096  # between two chunks of a body


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


_NOWHERE = SimpleNamespace(append=lambda _: None, close=lambda: None)  # takes the place of a body's buffer


class _DrainingParser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a body that is too large to its end before the 413, and keeps nothing of it.

    A client that sends its whole body before it reads (Python's http.client) would otherwise find the connection
    reset, not the answer. A body that says it is larger than DRAIN_BYTES is answered, and cut off, at once.
    """

    refused = False
    drained = 0

    def received(self, data: bytes) -> int:
        if self.refused:
            taken: int = self.body_rcv.received(data)
            self.drained += taken
            self.completed = self._has_drained()
            return taken
        consumed: int = super().received(data)
        if isinstance(self.error, RequestEntityTooLarge) and self.content_length <= app.DRAIN_BYTES:
            self.body_rcv.getbuf().close()
            self.body_rcv.buf, self.refused = _NOWHERE, True
            self.completed = self._has_drained()
        return consumed

    def _has_drained(self) -> bool:
        body = self.body_rcv
        # waitress reads a line between chunks again and again from its beginning until it has its end.
        line = len(getattr(body, "control_line", "")) + len(getattr(body, "trailer", ""))
        return bool(body.completed or body.error or line > MAX_LINE_BYTES or self.drained > app.DRAIN_BYTES)


def serve(settings: Settings, look: app.Look) -> None:
    """Serve until ended by a signal. Raises pman's errors before anything listens."""
    if settings.dev:
        _serve_with_restart(settings, look)
    else:
        _serve(app.start(settings, look), settings)


def _serve(application: flask.Flask, settings: Settings, listener: socket.socket | None = None) -> None:
    HTTPChannel.error_task_class = _JsonErrorTask
    HTTPChannel.parser_class = _DrainingParser
    _allow_descriptors()
    listener = listener or _listener(settings)
    threads = settings.max_concurrent_requests + SPARE_THREADS
    server = waitress.create_server(
        application,
        sockets=[listener],
        threads=threads,
        connection_limit=threads + SPARE_CONNECTIONS,
        channel_timeout=IDLE_SECONDS,
        max_request_body_size=MAX_BODY_BYTES + 1,
        backlog=BACKLOG,
        asyncore_use_poll=True,  # select(2) ends the process at the first descriptor above 1,023
        clear_untrusted_proxy_headers=False,  # TRUSTED_PROXIES says whom the application believes
        ident="pman",
    )

    def end(_signal: int, _frame: FrameType | None) -> None:
        listener.close()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    url = _say_where(listener)
    if sys.stderr.isatty() and not settings.dev:  # scripts/dev says it itself
        print(_next_steps(url, settings), file=sys.stderr)
    server.run()  # until the signal, and 5 s more for the requests that are being served
    server.task_dispatcher.shutdown(timeout=DRAIN_SECONDS)


def _allow_descriptors() -> None:
    """The usual limit of 1,024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listener(settings: Settings) -> socket.socket:
    """A socket at LISTEN_ADDRESS and PORT; at `::` for IPv6 and IPv4. Raises Misconfigured."""
    address, port = settings.listen_address, settings.port
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    both = address == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((address, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, ValueError) as error:
        raise Misconfigured(f"LISTEN_ADDRESS={address} PORT={port} cannot be listened on: {error}.") from None


def _say_where(listener: socket.socket) -> str:
    """Say in the log where pman listens, and return an address by which this machine reaches it."""
    address, port = listener.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    log.info("listening on http://%s:%d", host, port)
    return f"http://{'localhost' if ipaddress.ip_address(address).is_unspecified else host}:{port}"


def _next_steps(url: str, settings: Settings) -> str:
    """What somebody who has started pman in a terminal may do next."""
    store = f" STOREBASE={shlex.quote(settings.storebase)}" if settings.storebase else ""
    bare = "The local backend runs commands on this machine itself and uses no image."
    return f"""
Jobs are shown at {url}/. Send a first one from another terminal:

    export PMAN_URL={url}{store}
    pman run docker.io/library/busybox -- echo hello
    pman list --watch

{bare if settings.container_env == "local" and settings.local_runtime == "none" else ""}"""


def _serve_with_restart(settings: Settings, look: app.Look) -> None:
    """For developers: a change of pman's code starts it anew. Templates are read anew without that.

    The parent keeps the port, so that it stays the same, and goes on when code is saved that cannot be imported.
    """
    app.set_up_logging(settings)
    try:
        import watchfiles
    except ImportError:
        log.warning("Install pman[dev] (the package watchfiles) to have pman started anew when its code changes.")
        _serve(app.start(settings, look), settings)
        return
    backends.check_for_service(settings)
    look(Renderer(settings, TARGETS))
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    code, only_python = Path(__file__).parents[1], watchfiles.PythonFilter()
    listener = _listener(settings)
    _say_where(listener)
    watchfiles.run_process(code, target=_serve_once, args=(settings, listener), watch_filter=only_python)


def _serve_once(settings: Settings, listener: socket.socket) -> None:
    try:
        _serve(app.start(settings), settings, listener)
    except PmanError as error:
        print(f"Error: {error}", file=sys.stderr)
