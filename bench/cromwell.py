"""What pman adds to Cromwell's own calls, in turns, and how long a job takes from POST to sbatch.

    python bench/cromwell.py [ROUNDS]

Over Cromwell's stand-in with deploy/cromwell/slurm.conf and the SLURM of scripts/engines/slurm. A raw call goes over
one kept requests session to the same server; pman's goes over another to `pman serve`. Raw is what is asked of Cromwell
for the same: POST is a label query and a submission (and, where workflows show at once, queries until this one does),
GET a label query and the job's metadata.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pman import settings
from pman.backends.cromwell import METADATA
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer, Spec
from tests.fakes.cromwell_rig import Cromwell, cromwell, rig_over, shared_slurm
from tests.rig import Rig, Server, wait_for

NAME = "org.chrisproject.pman.name"
STOCK = ("metadata_flush=5", "summary_period=1", "pickup_period=3600")  # nothing is picked up: nothing but the calls


class Raw:
    """The calls themselves."""

    def __init__(self, engine: Cromwell) -> None:
        self.base = f"{engine.url}/api/workflows/v1"
        self.session = requests.Session()

    def query(self, jid: str) -> list[dict[str, object]]:
        params = {"label": f"{NAME}:{jid}", "additionalQueryResultFields": "labels"}
        found: list[dict[str, object]] = self.session.get(f"{self.base}/query", params=params).json()["results"]
        return found

    def post(self, jid: str, spec: Spec, until_shown: bool) -> None:
        self.query(jid)
        parts = {
            "workflowSource": spec.text, "workflowOptions": spec.extras["options.json"],
            "labels": json.dumps({NAME: jid}), "requestedWorkflowId": str(uuid.uuid4()),
        }  # fmt: skip
        assert self.session.post(self.base, files=parts).status_code == 201
        while until_shown and not self.query(jid):
            time.sleep(0.05)

    def get(self, jid: str) -> None:
        (row,) = self.query(jid)
        self.session.get(f"{self.base}/{row['id']}/metadata", params={"includeKey": list(METADATA)}).json()


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pman-bench-") as directory:
        place = Path(directory)
        stock = [word for change in STOCK for word in ("--set", change)]
        with cromwell(place / "stock", shared_slurm(), "bubblewrap", "--pace", "stock", *stock) as engine:
            (place / "1").mkdir()
            with rig_over(engine, place / "1") as rig:
                server = rig.start()
                post(server, rig, Raw(engine), rounds, until_shown=False)
        with cromwell(place / "quick", shared_slurm(), "bubblewrap", "--pace", "quick") as engine:
            (place / "2").mkdir()
            with rig_over(engine, place / "2") as rig:
                server = rig.start()
                post(server, rig, Raw(engine), min(rounds, 10), until_shown=True)
                get(server, rig, Raw(engine), rounds)
                to_sbatch(server, rig, engine, min(rounds, 15))


def post(server: Server, rig: Rig, raw: Raw, rounds: int, until_shown: bool) -> None:
    session = requests.Session()
    config = settings.load({"TIMELIMIT_MINUTES": "10", "STOREBASE": str(rig.store)})
    renderer = Renderer(config, TARGETS)
    pman, bare = [], []
    assert server.post(rig.request("first", "true")).status_code == 201  # where pman learns that a server is slow
    for number in range(rounds):
        request = rig.request(f"bench-{number}", "true")
        spec = renderer.render(make_job(validate(request), config), "wdl")
        bare.append(milliseconds(lambda n=number, s=spec: raw.post(f"raw-{n}", s, until_shown)))  # type: ignore[misc]
        pman.append(milliseconds(lambda r=request: created(session.post(f"{server.url}/api/v1/", json=r))))  # type: ignore[misc]
    show("POST, shown at once" if until_shown else "POST, stock server", pman, bare)


def created(answer: requests.Response) -> None:
    assert answer.status_code == 201, answer.text


def get(server: Server, rig: Rig, raw: Raw, rounds: int) -> None:
    session = requests.Session()
    server.post(rig.request("read", "echo done"))
    server.wait_final("read")
    pman, bare = [], []
    for _ in range(rounds):
        bare.append(milliseconds(lambda: raw.get("read")))
        pman.append(milliseconds(lambda: session.get(f"{server.url}/api/v1/read/", params={"tail": 0})))
    show("GET of a finished job", pman, bare)


def to_sbatch(server: Server, rig: Rig, engine: Cromwell, rounds: int) -> None:
    """Seconds from the begin of POST to when sbatch said its job id."""
    seconds = []
    for number in range(rounds):
        seen = set(engine.executions.rglob("stdout.submit"))
        began = time.time()
        server.post(rig.request(f"sbatch-{number}", "true"))
        (file,) = wait_for(lambda s=seen: set(engine.executions.rglob("stdout.submit")) - s, 60, "sbatch")  # type: ignore[misc]
        wait_for(lambda f=file: "Submitted" in f.read_text(), 10, "the job id")  # type: ignore[misc]
        seconds.append(file.stat().st_mtime - began)
        server.wait_final(f"sbatch-{number}")
    print(f"{'POST to sbatch, reference configuration':42} {statistics.median(seconds):7.2f} s"
          f"   ({min(seconds):.2f} to {max(seconds):.2f})")  # fmt: skip


def milliseconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def show(name: str, pman: list[float], bare: list[float]) -> None:
    added = [p - b for p, b in zip(pman, bare, strict=True)]
    print(f"{name:42} pman {statistics.median(pman):7.1f} ms   raw {statistics.median(bare):7.1f} ms"
          f"   pman adds {statistics.median(added):5.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
