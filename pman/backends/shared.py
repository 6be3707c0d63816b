"""Few calls of a scheduler for many threads: one that shows what all of them want, or one for several questions."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar

from pman.errors import PmanError, Unreachable

log = logging.getLogger(__name__)
T = TypeVar("T")
AGE_SECONDS = 1.0
AT_ONCE = 2  # calls for several questions: a thread that is held up then holds no other one up
MOST = 100  # questions in one call: names of 63 characters then fit into an address, of which proxies take 8 KiB
CALLS_A_SECOND = 100  # for several questions, on average after the first BURST
BURST = 20
PATIENCE_SECONDS = 1.0  # behind calls that hang: so long waits who makes the next one, and twice as long who joins it


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


class Together(Generic[T]):
    """Questions of many threads in few calls: what is asked before the next call may begin is asked together in it.

    A call may begin while fewer than AT_ONCE run, and CALLS_A_SECOND are the most, however many ask. While there are
    fewer calls, a question waits for nobody. Each answer comes from a call that began after its question.
    What the call for several leaves unanswered is asked alone and at once, and so is everything if that call fails: one
    job cannot fail the question about another, and nothing follows from what is missing in an answer.
    """

    def __init__(self, one: Callable[[str], T], several: Callable[[Collection[str]], Mapping[str, T]]) -> None:
        self._one, self._several = one, several
        self._turn = threading.BoundedSemaphore(AT_ONCE)  # held while a call runs
        self._lock = threading.Lock()  # of the two below
        self._next = _Batch[T]()
        self._begin = 0.0  # of the last call, by time.monotonic(), if all had been CALLS_A_SECOND apart

    def get(self, key: str) -> T:
        """The answer to `key`. Raises what `one` raises."""
        with self._lock:
            if len(self._next.keys) >= MOST:
                self._next = _Batch()
            batch = self._next
            leads = not batch.keys
            batch.keys[key] = None
        if leads:
            self._ask(batch)
        with contextlib.suppress(TimeoutError):
            if key in (found := batch.found.result(2 * PATIENCE_SECONDS)):
                return found[key]
        return self._one(key)

    def _ask(self, batch: "_Batch[T]") -> None:
        is_turn = self._turn.acquire(timeout=PATIENCE_SECONDS)
        try:
            time.sleep(self._pause())
            with self._lock:
                if self._next is batch:
                    self._next = _Batch()
            batch.found.set_result(self._answers(batch.keys))
        except Exception as error:
            batch.found.set_exception(error)
        finally:
            if is_turn:
                self._turn.release()

    def _pause(self) -> float:
        """Seconds until a call may begin, which is taken to begin then."""
        now = time.monotonic()
        with self._lock:
            self._begin = max(now - BURST / CALLS_A_SECOND, self._begin + 1 / CALLS_A_SECOND)
            return max(0.0, self._begin - now)

    def _answers(self, keys: Collection[str]) -> Mapping[str, T]:
        if len(keys) == 1:
            return {key: self._one(key) for key in keys}
        try:
            return self._several(keys)
        except Exception as error:
            log.debug("%d questions are asked one by one: %s", len(keys), error)
            return {}


class _Batch(Generic[T]):
    """Questions that are asked in one call."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}
        self.found: Future[Mapping[str, T]] = Future()
