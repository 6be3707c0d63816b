"""Docker Swarm on a real dockerd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.rig import Rig, running

pytestmark = pytest.mark.live("swarm")


def swarm_rig(tmp_path_factory: pytest.TempPathFactory, **env: str) -> Rig:
    """pman over the development Swarm, with a store of its own."""
    found, directory = development("swarm"), tmp_path_factory.mktemp("swarm")
    (directory / "store").mkdir()
    settings = {"CONTAINER_ENV": "swarm", "DOCKER_HOST": found["DOCKER_HOST"], **env}
    return Rig(settings, directory / "store", found["PMAN_TEST_IMAGE"], directory)


class TestSwarm(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(swarm_rig(tmp_path_factory)) as rig:
            yield rig
