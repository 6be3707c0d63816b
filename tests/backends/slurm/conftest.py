"""The fake SLURM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.slurm.fake import Fake


@pytest.fixture
def engine(tmp_path: Path) -> Fake:
    return Fake(tmp_path)
