"""The promises of pman over PBS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest
import requests

from tests.contract import Contract
from tests.new_backend import fake_pbs
from tests.rig import Rig, Server, running


class TestPbs(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        place = tmp_path_factory.mktemp("pbs")
        for name in ("store", "spool", "bin"):
            (place / name).mkdir()
        for name in ("qsub", "qstat", "qdel"):
            command = place / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_pbs.__file__} {place}/spool {name} "$@"\n')
            command.chmod(0o755)
        env = {"CONTAINER_ENV": "pbs", "PBS_STATE_DIR": str(place / "state")}
        env["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
        lacking = frozenset({"partition", "started_at", "nodes"})
        rig = Rig(env, place / "store", "localhost/none:1", place, read_only_input=False, unknown=lacking)
        with running(rig):
            yield rig

    def test_the_playground_renders_and_judges_it(self, server: Server, rig: Rig, jid: str) -> None:
        assert "<option selected>pbs</option>" in requests.get(f"{server.url}/render", timeout=60).text
        body = {"request": json.dumps(rig.request(jid, "true")), "target": "pbs"}
        answer = requests.post(f"{server.url}/render", json=body, timeout=60).json()
        assert answer["problems"] == []
        assert any(block == "directives" and f"#PBS -N {jid}" in text for block, text in answer["parts"]["spec"])

    def test_a_queue_that_there_is_not(self, server: Server, rig: Rig, jid: str) -> None:
        answer = server.post(rig.request(jid, "true", partition="no-such"))
        assert answer.status_code == 500
        assert "Unknown queue" in answer.json()["message"]
