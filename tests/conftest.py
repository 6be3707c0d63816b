"""Profiles of generated tests, and the engines of live suites."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.rig import ROOT

_SLOW_MACHINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("full", max_examples=500, **_SLOW_MACHINE)  # type: ignore[arg-type]
settings.register_profile("fast", max_examples=40, **_SLOW_MACHINE)  # type: ignore[arg-type]
settings.load_profile("full")
NEEDS_SOMETHING = 3  # exit status of scripts/engines/* that cannot be had here


@functools.cache
def _brought_up(
    _home: str | None, name: str, options: tuple[str, ...], command: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """What `up` said, and in place of its output the lines of `env`. An engine of that home that failed to start is not
    started again by the next test.
    """
    script = str(ROOT / "scripts" / "engines" / name)
    up = subprocess.run(
        [script, *command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if up.returncode == 0:
        up = subprocess.run([script, "env", *options], capture_output=True, text=True, check=True)
    return up


def development(name: str, *options: str, command: tuple[str, ...] = ("up",)) -> dict[str, str]:
    """Environment variables of what `scripts/engines/<name> up` (or another command) starts, unless it runs.

    Skips the test where it cannot be had, which fails it under CI=true.
    """
    up = _brought_up(os.environ.get("PMAN_DEV_HOME"), name, options, command)
    if up.returncode == NEEDS_SOMETHING and os.environ.get("CI") != "true":
        pytest.skip(f"{name}: {up.stderr.strip()}")
    assert up.returncode == 0, f"scripts/engines/{name} {command}: {up.stdout}{up.stderr}"
    words = [word for line in up.stdout.splitlines() for word in shlex.split(line)[1:]]
    return dict(word.split("=", 1) for word in words)


# Engines whose tests stop and start what all of them share, by a word in the ids of their tests.
ENGINES = {"kubernetes": "kubernetes", "odman": "podman", "swarm": "swarm", "docker": "swarm", "deploy": "swarm"}
# How many seconds a test takes, by a part of its id: the first part that fits counts. Most tests take less than 2.
SECONDS = {
    "live/test_chaos": 45, "live/kubernetes": 9, "live/test_deploy": 28, "live/test_bench": 20, "cromwell_faults": 10,
    "slurm_faults": 7,
    "test_sites": 10, "test_new_backend": 20, "test_example.py": 60, "test_commands": 4, "": 2,
}  # fmt: skip


def scope_of(nodeid: str) -> str:
    """What one worker of pytest-xdist runs, test by test: a file, or all the live tests of a shared engine."""
    file = nodeid.partition("::")[0]
    if "tests/live/" not in nodeid:
        return file
    return next((engine for word, engine in ENGINES.items() if word in nodeid), file)


class ByEngine(LoadScopeScheduling):  # type: ignore[misc]
    """Gives out what `scope_of` keeps together, in the order of the collected tests."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByEngine:
    config.option.loadscopereorder = False
    return ByEngine(config, log)


@pytest.hookimpl(trylast=True)  # when it is known which tests will run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the workers of pytest-xdist begin with what takes longest, so that none is left alone with it at the end."""
    if hasattr(config, "workerinput"):
        seconds = Counter[str]()
        for item in items:
            seconds[scope_of(item.nodeid)] += next(time for part, time in SECONDS.items() if part in item.nodeid)
        items.sort(key=lambda item: -seconds[scope_of(item.nodeid)])
