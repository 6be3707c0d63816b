"""One Docker engine and one Podman engine, both real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import development
from tests.contract import Contract
from tests.rig import Rig, running


def engine_rig(name: str, tmp_path_factory: pytest.TempPathFactory, **env: str) -> Rig:
    """pman over the development engine of this name (docker or podman), with a store of its own."""
    found, directory = development("swarm" if name == "docker" else name), tmp_path_factory.mktemp(name)
    (directory / "store").mkdir()
    host = found["DOCKER_HOST" if name == "docker" else "PODMAN_DOCKER_HOST"]
    settings = {"CONTAINER_ENV": name, "DOCKER_HOST": host, **env}
    return Rig(settings, directory / "store", found["PMAN_TEST_IMAGE"], directory)


@pytest.mark.live("swarm")
class TestDocker(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("docker", tmp_path_factory)) as rig:
            yield rig


@pytest.mark.live("podman")
class TestPodman(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("podman", tmp_path_factory)) as rig:
            yield rig
