"""One call for all who ask within a second, or who wait: how often, how old, and what becomes of its errors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pman.backends import shared
from pman.backends.shared import Shared, Together
from pman.errors import BackendError, NotFound, Unreachable


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


class Desk:
    """Answers with the moment when the call began. No list has `missing`, and lists with `bad` fail."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.moments = itertools.count()
        self.calls: list[set[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.together = Together(self.one, self.several)

    def one(self, key: str) -> int:
        found = self._look({key})
        if key == "missing":
            raise NotFound("There is no such job.")
        if key == "bad":
            raise BackendError("It cannot be read.")
        return found

    def several(self, keys: Collection[str]) -> dict[str, int]:
        found = self._look(set(keys))
        if "bad" in keys:
            raise ValueError("no JSON")
        return {key: found for key in keys if key != "missing"}

    def _look(self, keys: set[str]) -> int:
        began = next(self.moments)
        self.calls.append(keys)
        time.sleep(self.seconds)
        self.gate.wait(10)
        return began

    def while_calls_run(self, pool: ThreadPoolExecutor, keys: Collection[str]) -> dict[str, Future[int]]:
        """Asks for all keys while as many calls run as may, and lets these end."""
        self.gate.clear()
        first = []
        for number in range(shared.AT_ONCE):
            first.append(pool.submit(self.together.get, f"first-{number}"))
            while len(self.calls) <= number:
                time.sleep(0.001)
        self.calls.clear()
        asked = {key: pool.submit(self.together.get, key) for key in keys}
        while len(self.together._next.keys) < len(keys):
            time.sleep(0.001)
        self.gate.set()
        for one in first:
            one.result(10)
        return asked


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 30.0)  # a busy machine is no call that hangs
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_what_is_asked_while_a_call_runs_is_asked_together(pool: ThreadPoolExecutor) -> None:
    desk = Desk()
    asked = desk.while_calls_run(pool, ["a", "b", "c"])
    assert {one.result(10) for one in asked.values()} == {shared.AT_ONCE}
    assert desk.calls == [{"a", "b", "c"}]
    assert desk.together.get("d") == shared.AT_ONCE + 1  # at once, and by a call of its own


def test_what_is_missing_and_what_fails_is_asked_alone(pool: ThreadPoolExecutor) -> None:
    desk = Desk()
    asked = desk.while_calls_run(pool, ["a", "missing"])
    assert asked["a"].result(10) == shared.AT_ONCE
    with pytest.raises(NotFound):
        asked["missing"].result(10)
    assert desk.calls == [{"a", "missing"}, {"missing"}]

    desk = Desk()
    asked = desk.while_calls_run(pool, ["a", "b", "bad"])
    assert min(asked[key].result(10) for key in "ab") > shared.AT_ONCE
    with pytest.raises(BackendError, match=r"It cannot be read\."):
        asked["bad"].result(10)
    assert sorted(map(len, desk.calls)) == [1, 1, 1, 3]


def test_a_call_that_hangs_holds_nobody_up(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE_SECONDS", 0.05)
    gate = threading.Event()

    def one(key: str) -> str:
        if "hangs" in key:
            gate.wait(10)
        return key

    together = Together(one, lambda keys: {key: one(key) for key in keys})
    hang = []
    for number in range(shared.AT_ONCE):
        hang.append(pool.submit(together.get, f"hangs-{number}"))
        while together._next.keys or together._turn._value > shared.AT_ONCE - 1 - number:
            time.sleep(0.001)
    asked = [pool.submit(together.get, key) for key in "abcd"]
    assert [one.result(5) for one in asked] == list("abcd")
    assert not any(one.done() for one in hang)
    gate.set()
    assert [one.result(5) for one in hang] == [f"hangs-{number}" for number in range(shared.AT_ONCE)]


def test_a_call_asks_for_a_bounded_number(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST", 3)
    desk = Desk(0.005)
    list(pool.map(desk.together.get, [str(number) for number in range(64)]))
    assert max(map(len, desk.calls)) == 3


def test_calls_are_bounded_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "CALLS_A_SECOND", 5)
    monkeypatch.setattr(shared, "BURST", 2)
    began: list[float] = []

    def one(key: str) -> str:
        began.append(time.monotonic())
        return key

    together = Together(one, lambda keys: {key: one(key) for key in keys})
    asked_at = time.monotonic()
    for key in "abcde":
        assert together.get(key) == key
    assert began[4] - asked_at >= 0.4


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", "missing", "bad"]), min_size=1, max_size=40), st.integers(2, 12))
def test_no_answer_is_older_than_its_question(keys: list[str], threads: int) -> None:
    desk = Desk(0.0005)

    def ask(key: str) -> None:
        asked_at = next(desk.moments)
        try:
            assert desk.together.get(key) > asked_at
            assert key not in ("missing", "bad")
        except NotFound:
            assert key == "missing"
        except BackendError:
            assert key == "bad"

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, keys))
