"""The slurm backend under the contract on a real SLURM, and what is particular to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.rig import Rig, running

pytestmark = pytest.mark.live("slurm")


def slurm_rig(directory: Path, engine: dict[str, str], **env: str) -> Rig:
    """pman over the slurm backend, with its store and its state below `directory`."""
    (directory / "store").mkdir()
    settings = {
        "CONTAINER_ENV": "slurm",
        "SLURM_STATE_DIR": str(directory / "state"),
        "SLURM_RUNTIME": "bubblewrap",
        "SLURM_CONF": engine["SLURM_CONF"],
        **env,
    }
    return Rig(settings, directory / "store", "localhost/none:1", directory)


class TestSlurm(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(slurm_rig(tmp_path_factory.mktemp("slurm"), development("slurm"))) as rig:
            yield rig
