"""Newer engines than this machine's, and a Swarm of two nodes: the contract, and what tells most beside it.

TELLING is what a version is most likely to change: what a value may become, how a job ends, where its directories come
from, what pman 6 has left. All of test_swarm.py and test_docker.py was run on these versions once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import docker
import pytest

from pman.backends.engine import swarm
from tests.contract import Contract
from tests.live import test_docker, test_swarm
from tests.live.engine_cases import SITE, EngineCases, engine_rig
from tests.rig import Rig, Server, running, wait_for

DOCKER = ("--version", "26.1", "--nodes", "2")
PODMAN = ("--version", "5.4")
HELPERS = (
    "knows_memory", "api", "with_log", "volume", "run_in_volume", "make_as_pman_6", "is_there", "_sees_only_its_own",
)  # fmt: skip
TELLING = (
    "test_no_value_becomes_an_option", "test_no_list_of_values_becomes_an_option", "test_out_of_memory",
    "test_out_of_memory_of_a_child", "test_what_the_engine_says_of_a_job_that_does_not_start", "test_missing_image",
    "test_logs_while_it_runs", "test_one_line_of_forty_megabytes", "test_nfs", "test_local_volume",
    "test_missing_input_in_a_volume",
    "test_jobs_of_pman_6", "test_what_is_nearly_a_job_of_pman_6", "test_cut_connection",
)  # fmt: skip


class Newer(Contract):
    locals().update({name: vars(EngineCases)[name] for name in HELPERS + TELLING})


@pytest.mark.live("swarm")
class TestNewerDocker(Newer):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("docker", tmp_path_factory.mktemp("newer"), *DOCKER)) as rig:
            yield rig


@pytest.mark.live("podman")
class TestNewerPodman(Newer):
    options = PODMAN
    test_podman_is_killed_while_it_makes_a_container = (
        test_docker.TestPodman.test_podman_is_killed_while_it_makes_a_container
    )

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("podman", tmp_path_factory.mktemp("p5"), *PODMAN, DOCKER_TIMEOUT_SECONDS="60")) as rig:
            yield rig


@pytest.mark.live("swarm")
class TestTwoNodes(Newer):
    knows_memory = False  # of what ran on the other node
    test_gets_at_the_same_time = test_swarm.TestSwarm.test_gets_at_the_same_time

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        with running(engine_rig("swarm", tmp_path_factory.mktemp("nodes"), *DOCKER)) as rig:
            yield rig

    @contextmanager
    def volume(self, rig: Rig, api: docker.APIClient, **env: str) -> Iterator[Rig]:
        """Each node has volumes of its own: the site says which one has the store."""
        overlay = rig.logs / "with-store"
        overlay.mkdir(exist_ok=True)
        (overlay / "site.yaml").write_text(SITE + "swarm_constraints: ['node.role == manager']\n")
        of_volume = EngineCases.volume(self, rig, api, **env, TEMPLATES_DIR=str(overlay))  # type: ignore[arg-type]
        with of_volume as rig_of_volume:
            yield rig_of_volume

    def test_workers_on_both_nodes(self, server: Server, rig: Rig, jid: str, api: docker.APIClient) -> None:
        """The log of the other node comes by way of the Swarm, and DELETE waits for both."""
        script = "echo I am $PMAN_WORKER_INDEX; trap 'exit 0' TERM; sleep 600 & wait"
        assert server.post(rig.request(jid, script, number_of_workers=4)).status_code == 201
        lines = [f"I am {index}" for index in range(4)]

        def said() -> bool:
            return [line for line in server.get(jid).json()["logs"].splitlines() if "=" not in line] == lines

        wait_for(said, rig.job_seconds, "the logs of all four", every=0.5)
        tasks = api.tasks(filters={"service": jid})
        assert {task["NodeID"] for task in tasks} == {node["ID"] for node in api.nodes()}
        assert server.delete(jid).status_code == 204
        left = {task["ID"] for task in api.tasks() if task["Status"]["State"] not in swarm.OVER}
        assert not left & {task["ID"] for task in tasks}
