"""Log text of bounded size: the last lines of files and streams, several workers in one text."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pman.status import JobStatus

if TYPE_CHECKING:
    from pman.backends import Backend

AT_ONCE = 32  # workers of one job whose output is read at the same time
READ_SECONDS = 10.0  # for the logs of all workers of a job together; a status waits no longer for them
_BLOCK = 64 * 1024
_MIN_WORKER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much of a worker's output is read: the last `lines` of each text, at most `max_bytes` of it, in that time.

    grows: somebody follows the output, so that a text must only grow at its end from one look to the next.
    """

    lines: int
    max_bytes: int
    seconds: float = READ_SECONDS
    grows: bool = False


def tail_file(path: Path, max_lines: int, max_bytes: int, within: Path | None = None) -> str:
    """The last `max_lines` lines of a file, at most `max_bytes` of them; "" where there is no such file.

    Reads backwards in blocks: the size of the file does not matter. With `within`, for files that a job could have
    replaced: "" for what is no regular file, or not below that directory once every link is followed. `within` itself
    is taken as it is: resolved by the caller, before a job could make a link of it.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if within:  # what was opened is judged, not its name, which may change in between. Linux: /proc/self/fd
                where = os.readlink(f"/proc/self/fd/{file.fileno()}")
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not where.startswith(f"{within}/"):
                    return ""
            return clean(tail_bytes(_last_bytes(file.fileno(), max_lines, max_bytes), max_lines))
    except (FileNotFoundError, NotADirectoryError):
        return ""


def tail_streams(directory: Path, worker: int, wanted: Wanted) -> list[str]:
    """The ends of `stdout.N` and `stderr.N` of one worker."""
    resolved = directory.resolve()
    files = (directory / f"{stream}.{worker}" for stream in ("stdout", "stderr"))
    return [tail_file(file, wanted.lines, wanted.max_bytes, within=resolved) for file in files]


def of_job(backend: Backend, status: JobStatus, max_lines: int, max_bytes: int) -> tuple[str, bool]:
    """The ends of all workers' output as one text, within READ_SECONDS, and whether earlier output may be missing.

    Of several workers, each has its share of the lines. A worker whose turn comes later than READ_SECONDS has a line
    that says so in place of its output.
    """
    deadline = time.monotonic() + READ_SECONDS
    workers = backend.workers(status)
    lines = max(1, max_lines // max(1, workers))
    share = Wanted(lines + 1, max(_MIN_WORKER_BYTES, max_bytes // max(1, workers)))

    def text(worker: int) -> str:
        left = deadline - time.monotonic()
        if left <= 0:
            return "[pman: there was no time left for this log, ask again]\n"
        return join_streams(backend.streams(status, worker, replace(share, seconds=left)))

    if workers < 2:
        return cut("".join(map(text, range(workers))), max_lines, max_bytes)
    with ThreadPoolExecutor(min(AT_ONCE, workers)) as pool:
        parts = [cut(one, lines, max(1024, max_bytes // workers)) for one in pool.map(text, range(workers))]
    joined = "".join(f"=== worker {worker} ===\n{_closed(part)}" for worker, (part, _) in enumerate(parts))
    return joined, any(is_cut for _, is_cut in parts)


def _last_bytes(fd: int, max_lines: int, max_bytes: int) -> bytes:
    end = position = os.fstat(fd).st_size
    blocks: list[bytes] = []
    newlines = 0
    while position > 0 and end - position < max_bytes and newlines <= max_lines:
        start = max(0, position - _BLOCK, end - max_bytes)
        blocks.append(os.pread(fd, position - start, start))
        newlines += blocks[-1].count(b"\n")
        position = start
    return b"".join(reversed(blocks))


def tail_bytes(data: bytes, max_lines: int) -> bytes:
    """The last `max_lines` lines of `data`; a final line break does not count as a line."""
    if max_lines <= 0:
        return b""
    position = len(data) - data.endswith(b"\n")
    for _ in range(max_lines):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return data
    return data[position + 1 :]


def keep_end(kept: bytearray, pieces: Iterable[bytes], max_bytes: int, deadline: float) -> bool:
    """Add the pieces that come until the deadline, and keep the last `max_bytes` of all, or little more.

    deadline: by time.monotonic(). False where it has passed.
    """
    for piece in pieces:
        kept += piece
        if len(kept) > 2 * max_bytes:
            del kept[:-max_bytes]
        if time.monotonic() > deadline:
            return False
    return True


def clean(data: bytes) -> str:
    r"""Text that every reader can store: bad UTF-8 and NUL become U+FFFD, CR LF becomes LF."""
    return data.decode(errors="replace").replace("\r\n", "\n").replace("\0", "\ufffd")


def tail(text: str, max_lines: int, max_bytes: int) -> str:
    """The last `max_lines` lines of `text`, at most `max_bytes` of its UTF-8."""
    data = text.encode(errors="replace")
    return tail_bytes(data[max(0, len(data) - max_bytes) :], max_lines).decode(errors="replace")


def cut(text: str, max_lines: int, max_bytes: int) -> tuple[str, bool]:
    """The last `max_lines` lines of what a backend gave when it was asked for one more, and whether output is missing.

    A text of `max_bytes` counts as cut, since the backend gives no more of a longer one.
    """
    kept = tail(text, max_lines, max_bytes)
    return kept, kept != text or len(text.encode()) >= max_bytes


def join_streams(streams: Iterable[str]) -> str:
    """stdout, then stderr, each ended by a line break where something follows."""
    present = [text for text in streams if text]
    return "".join(_closed(text) for text in present[:-1]) + "".join(present[-1:])


def _closed(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"
