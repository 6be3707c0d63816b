"""The stand-in as one object: HTTP threads, one thread of the engine, one directory."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Self

from werkzeug.serving import WSGIRequestHandler, make_server

from tests.fakes.cromwell.api import create_app
from tests.fakes.cromwell.config import Config, Pace
from tests.fakes.cromwell.engine import Engine
from tests.fakes.cromwell.store import Store


class _Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True  # head and body are two writes; without this each answer may wait 40 ms

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class Cromwell:
    """Serves on `address` from `start` to `stop`; the port is known at once, also when 0 was asked for."""

    def __init__(
        self, config: Config, root: Path, port: int = 0, pace: Pace | None = None, write_delay: float = 0,
        address: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        self.pace = pace or config.pace
        root.mkdir(parents=True, exist_ok=True)
        self.store = Store(root / "cromwell.db", write_delay > 0, self.pace.metadata_batch)
        self.engine = Engine(config, self.store, self.pace)
        app = create_app(config, self.store)
        self._http = make_server(address, port, app, threaded=True, request_handler=_Handler)
        self.url = f"http://{address}:{self._http.server_port}"
        self._write_delay = write_delay
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._threads = [
            threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}),
            threading.Thread(target=self._loop.run_until_complete, args=[self._work()]),
        ]

    async def _work(self) -> None:
        commits = asyncio.create_task(self._commits()) if self._write_delay else None
        await self.engine.run(self._stop)
        if commits:
            commits.cancel()

    async def _commits(self) -> None:
        while True:
            await asyncio.sleep(self._write_delay)
            self.store.commit()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._loop.call_soon_threadsafe(self._stop.set)
        for thread in self._threads:
            thread.join()
        self._http.server_close()
        self._loop.close()
        self.store.close()

    def now(self, name: str) -> None:
        """Do a periodic task of the engine at once: `pick_up`, `dispense` or `scan_aborts`."""
        asyncio.run_coroutine_threadsafe(getattr(self.engine, name)(), self._loop).result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
