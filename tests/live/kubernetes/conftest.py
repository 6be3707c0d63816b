"""One namespace of the cluster, and one pman over it, for all the tests of this package."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.live.kubernetes.cluster import IMPATIENT, OVERLAY, Cluster, kubernetes_rig, namespace
from tests.rig import Rig, Server, running


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with namespace() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def rig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(kubernetes_rig(cluster, tmp_path_factory.mktemp("kubernetes"))) as rig:
        yield rig


@pytest.fixture(scope="package")
def server(rig: Rig) -> Server:
    return rig.start()


@pytest.fixture
def jid(server: Server) -> Iterator[str]:
    name = f"chris-jid-{uuid.uuid4().hex[:8]}"
    yield name
    server.delete(name)


@pytest.fixture(scope="package")
def overlaid(rig: Rig) -> Server:
    """pman with little patience and a site's overlay, which breaks jobs of some users."""
    (rig.logs / "overlay" / "k8s").mkdir(parents=True)
    (rig.logs / "overlay" / "k8s" / "job.yaml.j2").write_text(OVERLAY)
    return rig.start(TEMPLATES_DIR=str(rig.logs / "overlay"), **IMPATIENT)
