"""Many GETs at the same time, over a Swarm that knows many jobs."""

from __future__ import annotations

from pathlib import Path

from pman import backends, settings
from tests.backends.engine.jobs import posted
from tests.fakes import crowd, crowd_rig


def test_gets_at_the_same_time_are_few_calls(tmp_path: Path) -> None:
    """The first GET of a job is alone, since pman does not know the id of its service."""
    with crowd_rig.serving("swarm", 100) as address:
        config = settings.load(
            {"CONTAINER_ENV": "swarm", "STOREBASE": str(tmp_path), "DOCKER_HOST": f"tcp://{address}"}
        )
        backend = backends.load(config)
        posted(backend, config, jid=crowd.FIRST)
        for number in range(99):
            backend.status(crowd.jid_of(number))
        before = crowd_rig.counts(address)[0]
        crowd_rig.ask_at_once(backend, "swarm", 100)
        made = crowd_rig.counts(address)[0] - before
        assert sum(number for call, number in made.items() if "/services" in call or "/tasks" in call) < 120  # of 199
