"""The newest answer to a question that takes long, and is asked often."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
KEPT_SECONDS = 10.0  # an answer is given for so long before the question is asked again
WAIT_SECONDS = 5.0  # for an answer; meanwhile the one before it is given


class Latest(Generic[T]):
    """Asks once at a time, in a thread of its own, for all who want to know."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: threading.Event | None = None
        self._fresh_until = 0.0
        self._answer: T | None = None

    def get(self, ask: Callable[[], T]) -> T | None:
        """The newest answer, which is old where asking takes long; None before the first one."""
        with self._lock:
            if self._under_way is None and time.monotonic() >= self._fresh_until:
                done = threading.Event()
                threading.Thread(target=self._ask, args=(ask, done), daemon=True).start()
                self._under_way = done  # not before: a thread that cannot start never ends
            under_way = self._under_way
        if under_way:
            under_way.wait(WAIT_SECONDS)
        return self._answer

    def _ask(self, ask: Callable[[], T], done: threading.Event) -> None:
        try:
            self._answer = ask()
        except Exception:
            log.exception("a question was not answered")
        with self._lock:
            self._under_way, self._fresh_until = None, time.monotonic() + KEPT_SECONDS
        done.set()
