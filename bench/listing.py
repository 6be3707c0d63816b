"""The listing and the page of 5,000 jobs, with and without filters: what pman adds to its backend's own time.

    python bench/listing.py [ROUNDS]

Over the local backend with 5,000 directories of jobs, and over one that holds 5,000 statuses in memory. In-process,
with the JSON or the HTML made. Prints medians in milliseconds, by the clock and of the processor: other work on the
machine hardly lengthens the second.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from pman import backends, settings
from pman.backends.local import LocalBackend
from pman.service.app import create_app
from pman.status import JobState, JobStatus

JOBS = 5000
CLOCKS = (time.perf_counter, time.process_time)
API = "/api/v1/jobs/"
QUERIES = (
    API, f"{API}?limit=1000", f"{API}?user=user-7&text=brain", f"{API}?state=started",
    f"{API}?posted_since=2026-01-01T00:00:00Z&image=x", "/", "/?user=user-7&text=brain", "/?sort=-image",
)  # fmt: skip


class Held:
    """A backend that has all its jobs in memory."""

    def __init__(self, jobs: list[JobStatus]) -> None:
        self._jobs = jobs

    def jobs(self, limit: int) -> list[JobStatus]:
        return self._jobs[:limit]


class Timed:
    """A backend, and what its last listing took by each of CLOCKS (s)."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.spent = backend, [0.0, 0.0]

    def jobs(self, limit: int) -> list[JobStatus]:
        found: list[JobStatus]
        found, self.spent = spent(lambda: self._backend.jobs(limit))
        return found

    def ping(self) -> str:
        return ""


def spent(call: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What a call returns, and what it took by each of CLOCKS (s)."""
    began = [clock() for clock in CLOCKS]
    found = call()
    return found, [clock() - start for clock, start in zip(CLOCKS, began, strict=True)]


def held() -> Held:
    states, now = list(JobState), datetime.now(UTC)
    jobs = [(f"jid-{n}", "localhost/x:1", "sh -c brain", states[n % 5], "", None, None, now) for n in range(JOBS)]
    return Held([JobStatus(*job, user=f"user-{n % 50}") for n, job in enumerate(jobs)])


def local(root: Path) -> LocalBackend:
    for n in range(JOBS):
        (root / f"jid-{n}").mkdir(parents=True)
        record = {"jid": f"jid-{n}", "digest": "0", "image": "localhost/x:1", "cmd": "sh -c brain", "workers": 1}
        (root / f"jid-{n}/job.json").write_text(json.dumps(record | {"token": "0" * 16, "created_at": time.time()}))
        (root / f"jid-{n}/about.json").write_text(json.dumps({"user": f"user-{n % 50}", "kind": "fs", "env": 0}))
        (root / f"jid-{n}/claim").write_text("1 1 1 boot host\n")
        (root / f"jid-{n}/ended.{'0' * 16}").touch()
        (root / f"jid-{n}/rc").write_text("0 \n")
    return LocalBackend(root)


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        config = settings.load({"STOREBASE": place, "SECRET_KEY": "a key for the benchmark", "LOG_LEVEL": "ERROR"})
        for name, backend in {"memory": held(), "local": local(Path(place, "state"))}.items():
            timed = Timed(backend)
            client = create_app(config, cast(backends.Backend, timed)).test_client()
            for query in QUERIES:
                rows = []
                for _ in range(rounds):
                    answer, whole = spent(partial(client.get, query))
                    rows.append((timed.spent[0], whole[0] - timed.spent[0], whole[1] - timed.spent[1]))
                    assert answer.status_code == 200, answer.text
                own, added, worked = (round(statistics.median(column) * 1000, 1) for column in zip(*rows, strict=True))
                said = f"backend {own} ms, pman adds {added} ms, of which {worked} ms of the processor"
                print(f"{name:<7} {query:<60} {said}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
