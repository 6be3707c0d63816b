"""A proxy between pman and a real engine that cuts, holds, hangs, repeats and refuses when a test says so.

with FaultProxy("unix:///run/docker.sock", "unix:///tmp/x/proxy.sock") as proxy:    # or tcp://HOST:PORT for each
    proxy.cut_after(b"POST /v1.41/services/create")   # the engine gets it and answers, the client sees a reset
    ... pman with DOCKER_HOST=proxy.url ...
    assert proxy.cuts == 1
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_BLOCK = 65536
Passes = Callable[[bytes], tuple[bytes, bool]]


class FaultProxy:
    """Forwards bytes between `listen` and `target` (`unix:///path` or `tcp://host:port`; port 0 takes a free one).

    With `tls`, a server's context, clients speak TLS and the target does not.
    Faults are armed by method and may be armed at any time; each holds for connections that exist already, too.
    """

    def __init__(self, target: str, listen: str = "tcp://127.0.0.1:0", tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self._listen = listen
        self.url = ""
        self.cuts = 0
        self.late_answers: list[bytes] = []  # first blocks of the target's answers to what was held and delivered
        self.late_seconds = 2.0
        self.replaced = 0
        self._replacement = (b"", b"")
        self._armed: list[tuple[bytes, str]] = []
        self._skip = 0
        self._delivered = threading.Event()
        self._chance = 0.0
        self._inside = False
        self._random = random.Random(0)
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: socket.socket | None = None

    def __enter__(self) -> FaultProxy:
        self.accept()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.refuse()
        self._flowing.set()
        self._delivered.set()

    # -------------------------------------------------------------------------------------------------------- faults

    def cut_before(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """When a client's block of bytes holds `match`, cut its connection and forward nothing of the block.

        skip: how many such blocks, of whatever connection, are passed on whole before that. times: how often it holds.
        """
        self._arm(match, "cut before", skip, times)

    def cut_within(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """As cut_before, but forward the block, and cut after half of the target's answer."""
        self._arm(match, "cut within", skip, times)

    def cut_after(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """As cut_before, but forward the block, and cut when the target answers, instead of passing that on."""
        self._arm(match, "cut after", skip, times)

    def late(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """As cut_before, but pass all of it on, the target's answer `late_seconds` after it has come."""
        self._arm(match, "late", skip, times)

    def empty(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """As cut_before, but forward the block, and pass on the status line of the target's answer without a body."""
        self._arm(match, "empty", skip, times)

    def twice(self, match: bytes, skip: int = 0, times: int = 1) -> None:
        """As cut_before, but bring the request to the target twice, as a proxy does that lost the first answer.

        The client gets the second answer. The body of the request has a Content-Length.
        """
        self._arm(match, "twice", skip, times)

    def _arm(self, match: bytes, fault: str, skip: int, times: int) -> None:
        self._skip = skip
        self._armed += [(match, fault)] * times

    def disarm(self) -> bool:
        """Forget what was armed and has not come; False when there was nothing of that."""
        with self._lock:
            left, self._armed = self._armed, []
        return bool(left)

    def hold(self, match: bytes) -> None:
        """Once: keep a request (one block) that holds `match` on the way until `deliver()`, whoever gives it up."""
        self._armed.append((match, "hold"))

    def deliver(self) -> None:
        """Pass on what was held; the target's answer goes to `late_answers`."""
        self._delivered.set()

    def replace(self, old: bytes, new: bytes) -> None:
        """From now on put `new` in the place of `old`, of the same length and within a block, in answers."""
        assert len(old) == len(new)
        self._replacement = (old, new)

    def cut_at_random(self, chance: float, seed: int, inside: bool = False) -> None:
        """From now on cut before any block, in either direction, with this probability; 0 ends it.

        inside: at a random offset of the block.
        """
        self._chance, self._random, self._inside = chance, random.Random(seed), inside

    def hang(self) -> None:
        """Accept connections and bytes, and pass nothing on until `resume()`."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def refuse(self) -> None:
        """Stop listening and cut what is open, as if the target had been stopped, until `accept()`."""
        with self._lock:
            server, self._server = self._server, None
            sockets = [*self._open, *([server] if server else [])]
        for one in sockets:
            _reset(one)
        if self._listen.startswith("unix://"):
            Path(self._listen.removeprefix("unix://")).unlink(missing_ok=True)

    def accept(self) -> None:
        """Listen, at the same address as before `refuse()`."""
        if self._listen.startswith("unix://"):
            server = socket.socket(socket.AF_UNIX)
            server.bind(self._listen.removeprefix("unix://"))
            self.url = self._listen
        else:
            host, port = self._listen.removeprefix("tcp://").rsplit(":", 1)
            server = socket.create_server((host, int(port)))
            self.url = self._listen = f"tcp://{host}:{server.getsockname()[1]}"
        server.listen(128)
        self._server = server
        _thread(self._serve, server)

    # ------------------------------------------------------------------------------------------------------ plumbing

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
                if self._tls:
                    client = self._tls.wrap_socket(client, server_side=True)
                upstream = _connect(self._target)
            except OSError:
                if self._server is not server:
                    return
                with contextlib.suppress(OSError, UnboundLocalError):
                    _reset(client)
                continue
            with self._lock:
                self._open |= {client, upstream}
            faults: list[str] = []  # what becomes of the answer to what was forwarded last
            _thread(self._forward, client, upstream, lambda block, c=client, f=faults: self._of_client(block, c, f))
            _thread(self._forward, upstream, client, lambda block, f=faults: self._of_target(block, f))

    def _of_client(self, block: bytes, client: socket.socket, faults: list[str]) -> tuple[bytes, bool]:
        """What of a client's block goes on now, and whether the connection stays."""
        kind = self._armed_for(block)
        if faults == ["swallow"]:  # what was still to come of the answer before
            faults.clear()
        if kind in ("cut within", "cut after", "late", "empty"):
            faults.append(kind)
        if kind == "twice":
            block = _whole(client, block)
            with contextlib.suppress(OSError):
                self._deliver(block)
        if kind == "hold":
            _thread(self._deliver_later, block)
            return b"", True
        return (b"", False) if kind == "cut before" else (block, True)

    def _of_target(self, block: bytes, faults: list[str]) -> tuple[bytes, bool]:
        old, new = self._replacement
        if old and old in block:
            self.replaced += 1
            block = block.replace(old, new)
        fault = faults.pop() if faults else ""
        if fault == "late":
            time.sleep(self.late_seconds)
        if fault in ("empty", "swallow"):
            faults.append("swallow")
            status = block.partition(b"\r\n")[0]
            return status + b"\r\nContent-Length: 0\r\n\r\n" if fault == "empty" else b"", True
        if fault.startswith("cut"):
            return block[: len(block) // 2] if fault == "cut within" else b"", False
        return block, True

    def _armed_for(self, block: bytes) -> str:
        with self._lock:
            for fault in self._armed:
                if fault[0] in block:
                    if self._skip:
                        self._skip -= 1
                        return ""
                    self._armed.remove(fault)
                    return fault[1]
        return ""

    def _deliver_later(self, request: bytes) -> None:
        self._delivered.wait()
        with contextlib.suppress(OSError):
            self.late_answers.append(self._deliver(request))

    def _deliver(self, request: bytes) -> bytes:
        """The first block of the answer, over a connection of its own, which stays open whatever the client does."""
        with _connect(self._target) as upstream:
            upstream.sendall(request)
            return upstream.recv(_BLOCK)

    def _forward(self, source: socket.socket, sink: socket.socket, passes: Passes) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                self._flowing.wait()
                rest, stays = passes(block)
                if rest and stays and self._unlucky():
                    rest, stays = rest[: self._random.randrange(len(rest)) if self._inside else 0], False
                sink.sendall(rest)
                if not stays:
                    with self._lock:
                        self.cuts += 1
                    break
            else:
                self._end(source, sink)
                return
        with self._lock:
            self._open -= {source, sink}
        _reset(source)
        _reset(sink)

    def _end(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass the end of one direction on; close after both, without a reset, which could overtake data."""
        with self._lock:
            both = source not in self._open
            self._open.discard(sink)
        sink.shutdown(socket.SHUT_WR)
        if both:
            source.close()
            sink.close()

    def _unlucky(self) -> bool:
        with self._lock:
            return self._chance > 0 and self._random.random() < self._chance


def _thread(function: Callable[..., None], *args: object) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _connect(address: str) -> socket.socket:
    if address.startswith("unix://"):
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(address.removeprefix("unix://"))
        return upstream
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host, int(port)))


def _whole(client: socket.socket, request: bytes) -> bytes:
    """The request with what is still to come of its body."""
    head, _, body = request.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    missing = int(found[1]) - len(body) if found else 0
    while missing > 0 and (block := client.recv(missing)):
        request, missing = request + block, missing - len(block)
    return request


def _reset(one: socket.socket) -> None:
    """Close at once, with a reset where the protocol has one, also under a thread that is blocked on it."""
    with contextlib.suppress(OSError):
        if one.family == socket.AF_INET:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    one.close()
