"""`python -m tests.chaos BACKEND`: see scripts/chaos."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import checks, plan
from tests.chaos.driver import Run
from tests.chaos.worlds import WORLDS
from tests.rig import FINAL, ROOT

LABS = {"docker": "swarm", "swarm": "swarm", "podman": "podman", "kubernetes": "kubernetes"}
JOBS_PER_MINUTE = 20


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("backend", choices=WORLDS)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long things go wrong (10)")
    parser.add_argument("--jobs", type=int, help=f"how many jobs ({JOBS_PER_MINUTE} a minute, at least 200)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats a plan")
    parser.add_argument("--report", type=Path, help="file for the report, as JSON")
    parser.add_argument("--here", action="store_true", help="use the engine of PMAN_DEV_HOME, not one of its own")
    return parser.parse_args()


def report(run: Run, backend: str, minutes: float) -> dict[str, Any]:
    lives, count = run.lives, collections.Counter
    answers = [answer for life in lives for answer in life.answers]
    ends = (next((a.state for a in life.answers if a.state in FINAL), "deleted before") for life in lives)
    runs = (size // len("run\n") for life in lives for name, size in life.kept.items() if name.startswith("runs."))
    return {
        "backend": backend, "seed": run.plan.seed, "minutes": minutes, "date": datetime.now(UTC).isoformat()[:19],
        "processors": os.cpu_count(), "load": os.getloadavg()[1], "clocks_shifted": bool(run.clock_shift),
        "jobs": len(run.plan.errands), "kinds": count(errand.kind for errand in run.plan.errands), "lives": len(lives),
        "executions": sum(runs), "ends": count(ends), "listings": run.listing_codes,
        "answers": count(f"{answer.call} {answer.code or 'unanswered'}" for answer in answers),
        "events": run.done, "harmful_seconds": round(sum(end - begin for begin, end, _ in run.harms)),
        "failed_starts": run.failed_starts, "findings": checks.findings(run),
    }  # fmt: skip


def show(told: dict[str, Any]) -> None:
    def line(name: str) -> str:
        return ", ".join(f"{key} {number}" for key, number in sorted(told[name].items()))

    print(f"{told['backend']}, seed {told['seed']}, {told['minutes']:g} minutes: {told['jobs']} jobs ({line('kinds')})")
    print(f"ended: {line('ends')}; {told['executions']} executions of workers")
    print(f"answers: {line('answers')}")
    print(f"events: {line('events')}")
    print(f"findings: {len(told['findings'])}")
    for finding in told["findings"]:
        print(f"- {finding}")


def main() -> int:
    given = options()
    os.nice(5)
    jobs = given.jobs or max(200, round(JOBS_PER_MINUTE * given.minutes))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp")))
        lab = LABS.get(given.backend)
        if lab and not given.here:
            os.environ["PMAN_DEV_HOME"] = str(directory / "h")
            down = [str(ROOT / "scripts/engines" / lab), "down"]
            stack.callback(lambda: subprocess.run(down, check=True, capture_output=True))
        world = WORLDS[given.backend](stack, directory)
        chaos = plan.make(given.seed, given.minutes * 60, jobs, world.parts, world.calls)
        print(f"seed {given.seed}", flush=True)
        run = Run(world, chaos)
        try:
            run.go()
        finally:
            with contextlib.suppress(Exception):
                world.calm()
        told = report(run, given.backend, given.minutes)
    if given.report:
        given.report.write_text(json.dumps(told, indent=1) + "\n")
    show(told)
    return 1 if told["findings"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pytest.skip.Exception as reason:
        print(reason, file=sys.stderr)
        sys.exit(3)
