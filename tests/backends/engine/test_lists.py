"""Lists of an engine, which pman reads one job at a time: their memory, and what is cut off."""

from __future__ import annotations

from typing import Any

import pytest

from pman import backends, settings
from pman.backends.engine import api
from tests.backends.engine.jobs import load, posted
from tests.fakes import crowd, crowd_rig
from tests.fakes.engine import Call, FakeEngine
from tests.rig import with_memory


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_a_listing_is_never_in_memory_as_a_whole(name: str) -> None:
    with crowd_rig.serving(name, 2000) as address:
        env = {"CONTAINER_ENV": name, "STOREBASE": "/data/store", "DOCKER_HOST": f"tcp://{address}"}
        config = settings.load(env)
        backend = backends.load(config)
        posted(backend, config, jid=crowd.FIRST, env=[f"NAME{number}={'x' * 200}" for number in range(20)])
        listed, _, most_kib = with_memory(lambda: backend.jobs(10))
    assert len(listed) == 10
    assert most_kib < 5 * 1024  # it was 31 MiB on Swarm, and 7 MiB on Docker


TWO = [{"Id": "é" * 50, "Labels": {"a": "["}, "Mounts": [1]}, {"Id": "2", "Labels": {"b": {"Mounts": 2}}}]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("found", [[], TWO])
def test_a_list_is_read_whole_in_pieces_of_any_size(
    found: list[Any], size: int, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "CHUNK_BYTES", size)
    engine.routes["GET /containers/json"] = found
    client = api.Engine(load("docker", engine)[1])
    kept = [{"Id": one["Id"], "Labels": {key: {} if key == "b" else "[" for key in one["Labels"]}} for one in found]
    assert client.each("/containers/json", list, {"Mounts"}) == kept


@pytest.mark.parametrize(
    "garbled",
    ["", "{}", "[1]", "[{},]", "[{}]x", '[{"Id": "1"}', '[{"Id": "1"}, {"Id', "[", "null", "<p>"],
)
def test_a_list_that_is_cut_off_is_never_a_shorter_one(garbled: str, engine: FakeEngine) -> None:
    """It is asked for again, and is an error if it does not come whole."""
    whole, answers = [{"Id": "1"}, {"Id": "2"}], iter([garbled, None, *[garbled] * api.READS])
    engine.routes["GET /containers/json"] = whole
    client = api.Engine(load("docker", engine)[1])

    def spoiled(call: Call, sent: bytes) -> bytes:
        text = next(answers) if call.path == "/containers/json" else None
        return sent if text is None else b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + text.encode()

    engine.spoil = spoiled
    assert client.each("/containers/json", list, ()) == whole
    with pytest.raises(api.CutOff):
        client.each("/containers/json", list, ())
    assert next(answers, "all") == "all"
