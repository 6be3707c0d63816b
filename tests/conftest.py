"""Profiles of generated tests, and the engines of live suites."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess

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
def development(name: str, *options: str, command: tuple[str, ...] = ("up",)) -> dict[str, str]:
    """Environment variables of what `scripts/engines/<name> up` (or another command) starts, unless it runs.

    Skips the test where it cannot be had, which fails it under CI=true.
    """
    script = str(ROOT / "scripts" / "engines" / name)
    up = subprocess.run(
        [script, *command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if up.returncode == NEEDS_SOMETHING and os.environ.get("CI") != "true":
        pytest.skip(f"{name}: {up.stderr.strip()}")
    assert up.returncode == 0, f"{script} {command}: {up.stdout}{up.stderr}"
    lines = subprocess.run([script, "env", *options], capture_output=True, text=True, check=True).stdout.splitlines()
    words = [word for line in lines for word in shlex.split(line)[1:]]
    return dict(word.split("=", 1) for word in words)


# Engines whose tests stop and start what all of them share, by a word in the ids of their tests.
ENGINES = {"kubernetes": "kubernetes", "odman": "podman", "swarm": "swarm", "docker": "swarm", "deploy": "swarm"}


class ByEngine(LoadScopeScheduling):  # type: ignore[misc]
    """One worker of pytest-xdist for each file, or for all the live tests of a shared engine."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if "tests/live/" not in nodeid:
            return file
        return next((engine for word, engine in ENGINES.items() if word in nodeid), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByEngine:
    return ByEngine(config, log)
