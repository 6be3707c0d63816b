"""The one retry policy: errors marked `transient`, a few times, within a bound that pfcon's 100 s never reaches."""

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import tenacity

from pman.errors import PmanError

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)

ATTEMPTS = 4
TOTAL_SECONDS = 30.0
SOON_SECONDS = 3.0
MOST_RETRY_AFTER_SECONDS = 20.0


_BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, max=2)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_BACKOFF(state), getattr(error, "retry_after_seconds", 0.0))


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("attempt %d failed, trying again: %s", state.attempt_number, error)


_POLICY = tenacity.Retrying(
    retry=tenacity.retry_if_exception(lambda error: isinstance(error, PmanError) and error.transient),
    stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(TOTAL_SECONDS),
    wait=_wait,
    before_sleep=_log,
    reraise=True,
)


def asked_seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, in seconds and within bounds; 0.0 for none and for a date."""
    return min(float(retry_after), MOST_RETRY_AFTER_SECONDS) if retry_after and retry_after.isdecimal() else 0.0


def wait_until(
    condition: Callable[[], R], seconds: float, *, first_pause: float = 0.05, longest_pause: float = 1.0
) -> R | None:
    """The first true value of `condition()`, or None after `seconds`. The pauses between two looks (seconds) grow."""
    deadline, pause = time.monotonic() + seconds, first_pause
    while not (value := condition()):
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(pause * 1.05, longest_pause)
    return value


def call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args, **kwargs)`, repeated while it raises a transient PmanError.

    Only for calls that may be repeated: reads, deletes, and a backend's `submit`, which is built on a name that is
    unique per jid and looks before it creates, so that a repeat never makes a second job.
    """
    return _POLICY.copy()(function, *args, **kwargs)


def call_soon(function: Callable[[], R]) -> R:
    """As `call`, for a DELETE, which is begun anew only in its first SOON_SECONDS.

    Later, another DELETE may have removed the job, and this one would find a job that was posted since.
    """
    soon = tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(SOON_SECONDS)
    return _POLICY.copy(stop=soon)(function)


def call_last(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `call`, within a call that must not be begun anew: an error that is left is no longer transient."""
    try:
        return call(function, *args, **kwargs)
    except PmanError as error:
        error.transient = False
        raise
