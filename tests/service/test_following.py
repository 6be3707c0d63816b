"""A cursor and two looks at a growing text: nothing is left out in silence, and nothing comes twice without need."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from pman.backends import logs
from pman.service.following import is_cursor, news

SIZE = 1 << 20
LINES = st.lists(st.sampled_from(["a\n", "b\n", "\n", "a\rb\n", "\u2028\n"]), max_size=12)


def look(cursor: str, whole: list[str], over: bool = False, most: int = 5) -> tuple[str, str, bool]:
    """As the service looks at streams of which a backend gives the last lines."""
    return news(cursor, [logs.tail(text, most + 1, SIZE) for text in whole], over, most, SIZE)


@given(st.lists(st.tuples(LINES, LINES), min_size=1, max_size=4))
def test_streams_that_are_whole_come_once(steps: list[tuple[list[str], list[str]]]) -> None:
    cursor, streams, got = "", ["", ""], list[str]()
    for number, step in enumerate(steps, 1):
        streams = [text + "".join(lines) for text, lines in zip(streams, step, strict=True)]
        text, cursor, cut = look(cursor, streams, number == len(steps), most=200)
        assert (cut, is_cursor(cursor)) == (False, True)
        got += re.findall(r"[^\n]*\n", text)
    assert sorted(got) == sorted(re.findall(r"[^\n]*\n", "".join(streams)))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6))
def test_numbered_lines_come_once_or_it_is_said(steps: list[int]) -> None:
    cursor, seen = "", 0
    for end in itertools.accumulate(steps):
        text, cursor, cut = look(cursor, ["".join(f"{n}\n" for n in range(end))])
        if not cut:
            assert [int(line) for line in text.split()] == list(range(seen, end))
        assert text.endswith(f"{end - 1}\n") or end == seen
        seen = end


def test_of_lines_that_repeat_themselves_none_is_missed_in_silence() -> None:
    _, cursor, _ = look("", ["start\n" + "tick\n" * 18], most=20)
    text, cursor, cut = look(cursor, ["start\n" + "tick\n" * 23], most=20)
    assert (text.count("tick"), cut) == (20, True)
    assert look(cursor, ["start\n" + "tick\n" * 23], most=20)[0] == ""


def test_the_cursor_of_a_job_without_output_is_never_empty() -> None:
    """Some proxies leave out empty headers, and without the header the job would seem to have ended."""
    text, cursor, _ = look("", [])
    assert (text, bool(cursor), is_cursor(cursor)) == ("", True, True)
    assert look(cursor, ["one\n", "bad\n"]) == ("one\nbad\n", look("", ["one\n", "bad\n"])[1], False)


def test_a_line_without_an_end() -> None:
    text, cursor, _ = look("", ["one\ntw"])
    assert text == "one\n"
    assert look(cursor, ["one\ntwo\nthr"])[0] == "two\n"
    assert look(cursor, ["one\ntwo\nthr"], over=True)[0] == "two\nthr"
    assert not is_cursor("w1")
