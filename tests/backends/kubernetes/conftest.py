"""The API server that answers from a script."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from urllib3 import PoolManager

from pman.backends import kubernetes
from pman.backends.kubernetes.api import Api, Endpoint
from tests.backends.kubernetes.script import CONFIG, Script


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.shutdown()
    script.server.server_close()
    assert script.answers == []


@pytest.fixture
def backend(script: Script) -> Iterator[kubernetes.KubernetesBackend]:
    pool = PoolManager()
    yield kubernetes.KubernetesBackend(Api(lambda: Endpoint(script.url, pool, dict)), CONFIG)
    pool.clear()
