"""Prometheus metrics of this service, summed over its server processes where there are several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess, registry

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
    """`function()` under the retry policy, what is more than one attempt counted as `operation`."""
    attempts = 0

    def attempt() -> T:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            RETRIES.labels(operation).inc()
        return function()

    return retry.call(attempt)


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


class _Everyone(multiprocess.MultiProcessCollector):
    """Without files that are empty: of a process that is just beginning one, or was killed at that."""

    @staticmethod
    def merge(files: Iterable[str], accumulate: bool = True) -> Any:
        written = [file for file in files if os.path.getsize(file)]
        return multiprocess.MultiProcessCollector.merge(written, accumulate)  # type: ignore[no-untyped-call]


def text() -> bytes:
    """All metrics in Prometheus' text format; of every process that shares PROMETHEUS_MULTIPROC_DIR."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(registry.REGISTRY)
    everyone = CollectorRegistry()
    _Everyone(everyone)  # type: ignore[no-untyped-call]
    return generate_latest(everyone)
