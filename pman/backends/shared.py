"""One look at a scheduler for all threads that ask within a second, where one look shows what all of them want."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from pman.errors import PmanError, Unreachable

T = TypeVar("T")
AGE_SECONDS = 1.0


class Shared(Generic[T]):
    """Calls `look` at most once in AGE_SECONDS; whoever asks gets what the last call returned, or its error.

    What is seen may be a second old, and another replica may have seen something later. So no state of a job stands on
    it alone: it explains, or a second source is read beside it.
    """

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._lock = threading.Lock()  # held while a call runs; who waits for the next one does so without it
        self._seen: tuple[float, T | None, str] = (-AGE_SECONDS, None, "")  # begin (time.monotonic()), result, error

    def get(self, *, fresh: bool = False) -> T:
        """What a call has returned that began less than AGE_SECONDS ago, or after this one did (`fresh`).

        Raises Unreachable.
        """
        begun_after = time.monotonic() - (0.0 if fresh else AGE_SECONDS)
        while (seen := self._seen)[0] < begun_after:
            if (pause := seen[0] + AGE_SECONDS - time.monotonic()) > 0:
                time.sleep(pause)
                continue
            with self._lock:
                if self._seen is seen:
                    self._seen = self._called()
        _, found, error = seen
        if error:
            raise Unreachable(error)
        return found  # type: ignore[return-value] # a T: nothing is older than the first call

    def _called(self) -> tuple[float, T | None, str]:
        begun_at = time.monotonic()
        try:
            return begun_at, self._look(), ""
        except PmanError as error:
            return begun_at, None, str(error)
