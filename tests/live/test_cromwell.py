"""pman, Cromwell's stand-in and a real SLURM: the contract, and what only this deployment has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract import Contract
from tests.cromwell_rig import cromwell, image_storage, rig_over
from tests.rig import Rig

pytestmark = pytest.mark.live("slurm")


class TestCharliecloud(Contract):
    """In containers of an image directory, unprivileged, as on a cluster without Docker."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        directory = tmp_path_factory.mktemp("charliecloud")
        storage = image_storage(directory / "storage")
        with (
            cromwell(directory / "cromwell", "charliecloud", CH_IMAGE_STORAGE=str(storage)) as server,
            rig_over(server, directory) as rig,
        ):
            yield rig


class TestBubblewrap(Contract):
    """On the node's own files with a /share of the job's own, its input read-only."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        directory = tmp_path_factory.mktemp("bubblewrap")
        with cromwell(directory / "cromwell", "bubblewrap") as server, rig_over(server, directory) as rig:
            yield rig
