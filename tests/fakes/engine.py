"""A container engine's API that answers what a test says: for answers that no real engine can be brought to at will."""

from __future__ import annotations

import http.server
import io
import json
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Call:
    """path: without the API's version and the query."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


Answer = tuple[int, Any] | None  # status and JSON; None cuts the connection
ROUTES: dict[str, Any] = {
    "GET /version": {"ApiVersion": "1.41"},
    "GET /_ping": "OK",
    "GET /containers/json": [],
    "GET /tasks": [],
    "GET /info": {"Swarm": {"ControlAvailable": True, "NodeID": "node-1"}},
}


@dataclass
class FakeEngine:
    """Listens on a unix socket while it is entered.

    routes: "METHOD /path" -> the JSON of a 200, or a function of the Call. Anything else is answered 404.
    closes: after each answer, as some proxies before an engine do.
    spoil: what is sent in place of the bytes of an answer to the Call, from its status line to its end.
    """

    socket: Path
    routes: dict[str, Any] = field(default_factory=lambda: dict(ROUTES))
    calls: list[Call] = field(default_factory=list)
    closes: bool = False
    spoil: Callable[[Call, bytes], bytes] = lambda _, sent: sent

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def answer(self, call: Call) -> Answer:
        self.calls.append(call)
        found = self.routes.get(f"{call.method} {call.path}", lambda _: (404, {"message": f"no {call.path}"}))
        answer: Answer = found(call) if callable(found) else (200, found)
        return answer

    def spoiled(self, call: Call, sent: bytes) -> bytes:
        return self.spoil(call, sent)

    def __enter__(self) -> FakeEngine:
        engine = self

        class Handler(_Handler):
            answer = staticmethod(engine.answer)
            closes = engine.closes
            spoil = staticmethod(engine.spoiled)

        self._server = _Server(str(self.socket), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Callable[[Call], Answer]
    closes: bool
    spoil: Callable[[Call, bytes], bytes]

    def setup(self) -> None:
        super().setup()
        self.client_address = ("", 0)  # a unix socket has none

    def reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        path = re.sub(r"^/v[\d.]+", "", url.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        call = Call(self.command, path, query, dict(self.headers), json.loads(body) if body else None)
        if (answer := self.answer(call)) is None:
            self.close_connection = True
            return
        connection, self.wfile = self.wfile, io.BytesIO()
        payload = b"" if answer[0] == 204 else json.dumps(answer[1]).encode()
        self.send_response(answer[0])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if self.closes:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(payload)
        sent, self.wfile = self.wfile.getvalue(), connection
        spoiled = self.spoil(call, sent)
        self.wfile.write(spoiled)
        self.close_connection = self.close_connection or spoiled != sent

    do_GET = do_POST = do_PATCH = do_DELETE = reply  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass
