"""The listing and the page of 5,000 jobs, with and without filters: what pman adds to its backend's own time.

    python bench/listing.py [ROUNDS]

Over the local backend with 5,000 directories of jobs, and over one that holds 5,000 statuses in memory. In-process,
with the JSON or the HTML made; prints medians in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pman import backends, settings
from pman.backends.local import LocalBackend
from pman.service.app import create_app
from pman.status import JobState, JobStatus

JOBS = 5000
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
    """A backend, and how long its last listing took (s)."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.seconds = backend, 0.0

    def jobs(self, limit: int) -> list[JobStatus]:
        began = time.perf_counter()
        found: list[JobStatus] = self._backend.jobs(limit)
        self.seconds = time.perf_counter() - began
        return found

    def ping(self) -> str:
        return ""


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
    return LocalBackend(root, 1024)


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        config = settings.load({"STOREBASE": place, "SECRET_KEY": "a key for the benchmark", "LOG_LEVEL": "ERROR"})
        for name, backend in {"memory": held(), "local": local(Path(place, "state"))}.items():
            timed = Timed(backend)
            client = create_app(config, cast(backends.Backend, timed)).test_client()
            for query in QUERIES:
                own, added = [], []
                for _ in range(rounds):
                    began = time.perf_counter()
                    answer = client.get(query)
                    added.append(time.perf_counter() - began - timed.seconds)
                    own.append(timed.seconds)
                    assert answer.status_code == 200, answer.text
                medians = [round(statistics.median(values) * 1000, 1) for values in (own, added)]
                print(f"{name:<7} {query:<60} backend {medians[0]} ms, pman adds {medians[1]} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
