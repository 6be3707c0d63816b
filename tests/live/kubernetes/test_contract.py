"""The contract on a real cluster, beside two hundred hostile jobs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.contract import Contract
from tests.generate import HOSTILE
from tests.live.kubernetes.cluster import kubernetes_rig, namespace
from tests.rig import COUNTED, Rig, Server, running

pytestmark = pytest.mark.live("kubernetes")
CHANCE = random.Random(200)
LISTS = [["".join(CHANCE.choices(HOSTILE, k=CHANCE.randint(0, 4))) for _ in range(10)] for _ in range(200)]
HOSTILE_SCRIPT = (
    COUNTED
    + r"""printf '%s\0' "$@" > "$out/argv"; for i in 0 1 2 3 4 5 6 7 8 9; do
    eval "printf '%s\0' \"\$V$i\""; done > "$out/env" """
)


@dataclass(frozen=True)
class Crowd:
    """Jobs of a namespace of their own, and the state in which each ends."""

    rig: Rig
    server: Server
    jobs: list[Future[str]]


@pytest.fixture(scope="module")
def crowd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """200 jobs by 8 threads, each with a list as arguments and as environment, while the contract is tested."""
    needed = any("two_hundred" in item.name for item in request.session.items)
    directory = tmp_path_factory.mktemp("crowd")
    with namespace() as cluster, running(kubernetes_rig(cluster, directory)) as rig, ThreadPoolExecutor(8) as pool:
        server = rig.start(IGNORE_LIMITS="yes")

        def run(number: int) -> str:
            env = [f"V{i}={value}" for i, value in enumerate(LISTS[number])]
            answer = server.post(rig.request(f"hostile-{number}", HOSTILE_SCRIPT, *LISTS[number], env=env))
            assert answer.status_code == 201, answer.text
            return server.wait_final(f"hostile-{number}", 300)["status"]

        yield Crowd(rig, server, [pool.submit(run, number) for number in range(200 if needed else 0)])
        pool.shutdown(cancel_futures=True)


class TestKubernetes(Contract):
    """The whole contract, on a cluster that is busy with other jobs."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def busy(cls, crowd: Crowd) -> None:
        """Begin with them."""


def test_two_hundred_hostile_jobs_arrive_byte_for_byte(crowd: Crowd) -> None:
    """None of them lost, each run once."""
    assert {job.result(300) for job in crowd.jobs} == {"finishedSuccessfully"}
    listed = crowd.server.call("GET", "jobs/?limit=1000").json()["jobs"]
    assert {job["jid"] for job in listed} == {f"hostile-{number}" for number in range(200)}
    for number, values in enumerate(LISTS):
        out = crowd.rig.outgoing(f"hostile-{number}")
        expected = b"".join(value.encode() + b"\0" for value in values)
        assert (out / "argv").read_bytes() == expected + b"/share/outgoing\0"
        assert (out / "env").read_bytes() == expected
        assert crowd.rig.executions(f"hostile-{number}") == 1
