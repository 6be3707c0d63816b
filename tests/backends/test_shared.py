"""One look for all who ask within a second: how often, how old, and what becomes of its errors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pman.backends import shared
from pman.backends.shared import Shared
from pman.errors import BackendError, Unreachable


def test_many_who_ask_at_once_are_one_call() -> None:
    gate, numbers = threading.Event(), itertools.count(1)

    def look() -> int:
        gate.wait(5)
        return next(numbers)

    seen = Shared(look)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(seen.get) for _ in range(8)]
        gate.set()
        assert {one.result() for one in asked} == {1}
    assert seen.get() == 1


def test_a_fresh_look_began_after_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "AGE_SECONDS", 0.2)
    began: list[float] = []
    seen = Shared(lambda: began.append(time.monotonic()))
    seen.get()
    asked_at = time.monotonic()
    seen.get(fresh=True)
    assert len(began) == 2
    assert began[1] > asked_at
    assert began[1] - began[0] >= 0.2  # as seldom as the others


def test_an_error_is_that_of_all_who_ask_and_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "AGE_SECONDS", 0.1)
    answers: Iterator[BackendError | int] = iter([BackendError("It is away."), 7])

    def look() -> int:
        answer = next(answers)
        if isinstance(answer, BackendError):
            raise answer
        return answer

    seen = Shared(look)
    for _ in range(2):
        with pytest.raises(Unreachable, match=r"It is away\."):
            seen.get()
    assert seen.get(fresh=True) == 7
