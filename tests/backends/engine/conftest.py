"""The fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pman.backends.engine import swarm
from tests.fakes.engine import FakeEngine


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    monkeypatch.setattr(swarm, "CLEARED_SECONDS", 0.05)  # most tests' tasks stay for ever
    with FakeEngine(tmp_path / "engine.sock") as engine:
        yield engine
