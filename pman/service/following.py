"""What is new in a worker's output since a client looked last. pman keeps nothing: the client sends a cursor.

A cursor has a part for each text that the worker writes. It describes the lines that the client has seen: whether they
are whole from the beginning (w) or were cut (c), their number, a checksum of all, and one of the last half of them (at
most ANCHOR lines).
"""

import itertools
import re
import zlib
from collections.abc import Sequence
from typing import TypeVar

from pman.backends import logs

T = TypeVar("T")
ANCHOR = 32
NOTHING = "w0-0-0"  # no line seen; of a job without output, too, since proxies may leave out an empty header
_PART = re.compile(r"([wc])(\d{1,9})-([0-9a-f]{1,8})-([0-9a-f]{1,8})")


def is_cursor(text: str) -> bool:
    """Whether this may be a cursor."""
    return not text or all(map(_PART.fullmatch, text.split(".")))


def news(cursor: str, streams: Sequence[str], over: bool, max_lines: int, max_bytes: int) -> tuple[str, str, bool]:
    """The text that is new, the next cursor, and whether output in between is left out.

    streams: the ends of the texts, with one line more than `max_lines` if there are more. An unfinished last line waits
    until it has its end, or the job is over. If a text was cut and repeats itself, it is not certain what is new: then
    all of it comes again, and counts as left out.
    """
    texts, parts, left_out = [], [], False
    for stream, part in itertools.zip_longest(streams, filter(None, cursor.split(".")), fillvalue=""):
        kept, cut = logs.cut(stream, max_lines, max_bytes)
        lines = re.findall(r"[^\n]*\n|[^\n]+", kept)
        if not over and lines and not lines[-1].endswith("\n"):
            lines.pop()
        start = _start(lines, cut, part)
        left_out |= start is None
        texts.append("".join(lines[start or 0 :]))
        parts.append(f"{'c' if cut else 'w'}{len(lines)}-{_sum(lines):x}-{_sum(_anchor(lines)):x}")
    return logs.join_streams(texts), ".".join(parts) or NOTHING, left_out


def _start(lines: Sequence[str], cut: bool, part: str) -> int | None:
    """How many of the lines the client has seen; None if that is not certain: lines before them may be left out."""
    found = _PART.fullmatch(part)
    if not found or found[2] == "0":
        return None if cut else 0
    count, whole, anchor = int(found[2]), int(found[3], 16), int(found[4], 16)
    if cut == (found[1] == "c") and _sum(lines[:count]) == whole:
        return count
    size = len(_anchor(range(count)))
    places = (place for place in range(size, len(lines) + 1) if _sum(lines[place - size : place]) == anchor)
    place = next(places, None)
    return place if next(places, None) is None else None


def _anchor(lines: Sequence[T]) -> Sequence[T]:
    return lines[-min(ANCHOR, (len(lines) + 1) // 2) :]


def _sum(lines: Sequence[str]) -> int:
    return zlib.crc32("".join(lines).encode())
