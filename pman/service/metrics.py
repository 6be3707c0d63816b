"""Prometheus metrics of this process."""

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

from prometheus_client import Counter, Histogram, generate_latest

from pman.backends import retry
from pman.errors import PmanError

T = TypeVar("T")

REQUESTS = Counter("pman_http_requests", "HTTP requests answered.", ["route", "method", "code"])
BACKEND_SECONDS = Histogram("pman_backend_seconds", "Time of one call of the backend.", ["operation"])
BACKEND_ERRORS = Counter(
    "pman_backend_errors", "Calls of the backend that failed, each attempt.", ["operation", "error"]
)
RETRIES = Counter("pman_backend_retries", "Calls of the backend that were tried again.", ["operation"])
SUBMITTED = Counter("pman_jobs_submitted", "Submissions by outcome.", ["outcome"])


def ask(operation: str, function: Callable[[], T]) -> T:
    """`function()` under the retry policy, each attempt measured as `operation`."""
    return repeat(operation, lambda: ask_once(operation, function))


def repeat(operation: str, function: Callable[[], T]) -> T:
    """`function()` under the retry policy; each attempt after the first counts as a retry of `operation`."""
    retries = itertools.count()

    def attempt() -> T:
        if next(retries):
            RETRIES.labels(operation).inc()
        return function()

    return (retry.call_soon if operation == "delete" else retry.call)(attempt)


def ask_once(operation: str, function: Callable[[], T]) -> T:
    """`function()`, measured as `operation`."""
    began = time.perf_counter()
    try:
        return function()
    except Exception as error:
        if not isinstance(error, PmanError) or error.http_status >= 500:
            BACKEND_ERRORS.labels(operation, type(error).__name__).inc()
        raise
    finally:
        BACKEND_SECONDS.labels(operation).observe(time.perf_counter() - began)


def text() -> bytes:
    return generate_latest()
