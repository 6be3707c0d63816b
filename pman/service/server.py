"""`pman serve`: a WSGI server that reads slow clients outside its worker threads, in one process or several.

waitress, not granian: both leave other callers served beside slow clients, granian answers a quarter more requests a
second, but takes nearly twice the memory (bench/README.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import waitress
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

from pman.backends import Backend
from pman.errors import Misconfigured, PmanError
from pman.job import MAX_BODY_BYTES
from pman.settings import Settings

log = logging.getLogger(__name__)
SPARE_THREADS = 8  # beyond MAX_CONCURRENT_REQUESTS: they turn requests away and answer /healthz
# Beside one for each thread. Half-open and idle ones cost waitress no thread; it drops silent ones.
SPARE_CONNECTIONS = 850
DESCRIPTORS = 4096  # a connection takes up to two: a body above 512 KiB waits in a file
IDLE_SECONDS = 60
# A request that is cut off is an error for ChRIS although its job runs. Kubernetes kills after 30 s.
DRAIN_SECONDS = 20
BACKLOG = 1024
CANNOT_START = 2
RESPAWN_SECONDS = 1.0  # a server process that dies younger than that is replaced only then
# What werkzeug's reloader and its parent process tell each other.
RELOADED = "WERKZEUG_RUN_MAIN"
LOOK_SECONDS = 0.3  # how often the reloader looks; with the new start a change is live within 2 s
RELOAD = 3
_PR_SET_PDEATHSIG = 1  # prctl(2)


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
    """Serve until ended by a signal. Raises pman's errors before anything listens."""
    if settings.dev:
        _serve_with_reload(settings)
    elif settings.server_processes == 1:
        _serve(settings, None)
    else:
        with tempfile.TemporaryDirectory(prefix="pman-metrics-") as directory:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # read when prometheus_client is imported
            _supervise(settings)


def _serve(settings: Settings, listener: socket.socket | None) -> None:
    from pman.service import app

    app.set_up_logging(settings)
    application = app.create_app(settings)
    HTTPChannel.error_task_class = _JsonErrorTask
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
        ident="pman",
    )

    def end(_signal: int, _frame: FrameType | None) -> None:
        listener.close()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    log.info("listening on %s", _url(*listener.getsockname()[:2]))
    _say_whether_jobs_can_run(application.extensions["pman"].backend, settings)
    server.run()  # until the signal, and 5 s more for the requests that are being served
    server.task_dispatcher.shutdown(timeout=DRAIN_SECONDS)


def _say_whether_jobs_can_run(backend: Backend, settings: Settings) -> None:
    """Once, in the log. A backend that does not answer may come later, and need not be waited for."""

    def ask() -> None:
        try:
            backend.ping()
            log.info("%s can take jobs", settings.container_env)
        except PmanError as error:
            log.warning("%s cannot take jobs yet: %s", settings.container_env, error)

    threading.Thread(target=ask, daemon=True).start()


def _allow_descriptors() -> None:
    """The usual limit of 1,024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listener(settings: Settings) -> socket.socket:
    """Raises Misconfigured."""
    family = socket.AF_INET6 if ":" in settings.listen_address else socket.AF_INET
    try:
        return socket.create_server((settings.listen_address, settings.port), family=family, backlog=BACKLOG)
    except (OSError, ValueError) as error:
        place = f"LISTEN_ADDRESS={settings.listen_address} PORT={settings.port}"
        raise Misconfigured(f"{place} cannot be listened on: {error}.") from None


def _serve_with_reload(settings: Settings) -> None:
    """Flask's development server; a change of code starts it anew, templates reload by themselves."""
    if RELOADED not in os.environ:
        _restart_on_change(settings)
    from pman.service import app

    app.set_up_logging(settings)
    logging.getLogger("werkzeug").addFilter(lambda record: " HTTP/" not in record.getMessage())  # pman's line says more
    application = app.create_app(settings)
    _say_whether_jobs_can_run(application.extensions["pman"].backend, settings)
    address, port = settings.listen_address, settings.port
    application.run(address, port, use_reloader=True, reloader_interval=LOOK_SECONDS, threaded=True)


def _restart_on_change(settings: Settings) -> NoReturn:
    """In place of werkzeug's own parent process, which ends for good when code is saved that cannot be imported."""
    from pman.service import app

    app.set_up_logging(settings)
    listener = _listener(settings)
    log.info("listening on %s", _url(*listener.getsockname()[:2]))
    command, fd = [sys.executable, *sys.orig_argv[1:]], listener.fileno()
    env = os.environ | {RELOADED: "true", "WERKZEUG_SERVER_FD": str(fd)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    served = False
    while True:
        before = _newest_source()
        with subprocess.Popen(command, env=env, pass_fds=(fd,)) as child:
            try:
                code = child.wait()
            finally:
                child.terminate()
        if code != RELOAD and (not served or code in (0, -signal.SIGINT)):
            sys.exit(code)
        served = True
        while code != RELOAD and _newest_source() == before:
            time.sleep(0.2)


def _newest_source() -> float:
    """When one of pman's modules was last saved."""
    return max(path.stat().st_mtime for path in Path(__file__).parent.parent.rglob("*.py"))


def _supervise(settings: Settings) -> None:
    """Keep SERVER_PROCESSES children on one socket; one that dies is replaced, which may take until it can start.

    Where the first ones cannot, nothing is right yet, and all end.
    """
    from pman.service import app

    app.set_up_logging(settings)
    listener = _listener(settings)
    children: dict[int, float] = {}
    stopping = False

    def start() -> None:
        child = _fork(settings, listener)
        children[child] = time.monotonic()
        if stopping:
            os.kill(child, signal.SIGTERM)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        listener.close()
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and is not yet struck off
                os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for _ in range(settings.server_processes):
        if not stopping:
            start()
    first = frozenset(children)
    failed = False
    while children:
        pid, status = os.wait()
        if pid not in children:  # as process 1 of a container this one gets everybody's orphans
            continue
        age_seconds = time.monotonic() - children.pop(pid)
        if os.waitstatus_to_exitcode(status) == CANNOT_START and pid in first and not stopping:
            failed = True
            stop(signal.SIGTERM, None)
        elif not stopping:
            log.warning("server process %d ended with status %d and is replaced", pid, status)
            time.sleep(max(0.0, RESPAWN_SECONDS - age_seconds))
            if not stopping:
                start()
    if failed:
        sys.exit(CANNOT_START)


def _fork(settings: Settings, listener: socket.socket) -> int:
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the child would take them for the supervisor's
    pid = os.fork()
    if not pid:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    if pid:
        return pid
    if sys.platform == "linux":  # when the supervisor is killed, nothing keeps the port
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    code = 1
    try:
        _serve(settings, listener)
        code = 0
    except PmanError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = CANNOT_START
    except SystemExit:
        code = 0
    except BaseException:
        log.critical("the server process ended", exc_info=True)
    finally:
        sys.stderr.flush()
        os._exit(code)
