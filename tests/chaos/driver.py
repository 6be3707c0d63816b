"""Carries a plan out over a world, with two replicas of pman, and notes what pman answers."""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.chaos.plan import Errand, Event, Plan
from tests.chaos.worlds import World
from tests.live.test_slurm import open_directory
from tests.rig import FINAL, OUT, Server

REPLICAS = 2
QUICK_BEATS = 2  # of the second life of a job
CLIENT_SECONDS = 100  # pfcon's patience
SCRIPT = (
    OUT
    + """w=${PMAN_WORKER_INDEX-0}; echo run >> "$out/runs.$w"; n=0; max=%d; [ ! -e "$out/quick" ] || max=%d
while [ $n -lt $max ]; do n=$((n + 1)); echo $n >> "$out/beats.$w"; sleep 0.2; done
echo last >> "$out/last.$w"; exit %d"""
)


@dataclass(frozen=True)
class Answer:
    """replica: the pid of the pman. code: 0 where none came. job: the job JSON, without its logs, or the error."""

    at: float
    call: str
    replica: int
    code: int
    job: dict[str, Any]

    @property
    def state(self) -> str:
        return str(self.job.get("status", "")) if self.code in (200, 201) else ""


@dataclass
class Life:
    """A job from its first POST to the end of the run or to its DELETE; a job that is posted again has two.

    accepted, over, deleting, deleted: when its first 201, its end, its first DELETE and a 204 came, by the run's clock.
    at_rest: its output when nothing may write any more, and since when; kept: the same when the run was over.
    """

    errand: Errand
    number: int
    outgoing: Path
    accepted: float | None = None
    over: float | None = None
    deleting: float | None = None
    deleted: float | None = None
    answers: list[Answer] = field(default_factory=list)
    at_rest: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def beats(self) -> int:
        return QUICK_BEATS if self.number > 1 else self.errand.beats

    def files(self) -> dict[str, int]:
        """Name -> number of bytes of each file of the output."""
        with contextlib.suppress(FileNotFoundError):
            return {path.name: path.stat().st_size for path in self.outgoing.iterdir()}
        return {}


@functools.cache
def _compiled() -> str:
    """clock.c as a library that every user may load; "" without a C compiler, and then all clocks are right."""
    library = open_directory("") / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("clock.c"))]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(command, check=True, capture_output=True)
        return str(library)
    return ""


class Run:
    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.clock_shift = _compiled()
        self.lives: list[Life] = []
        self.listings: list[tuple[float, float, set[str]]] = []
        self.listing_codes: collections.Counter[int] = collections.Counter()
        self.harms: list[tuple[float, float, str]] = []  # when a part may have ended jobs, and its words
        self.absences: list[tuple[float, float]] = []  # when a node was away
        self.kills: list[float] = []  # when a part was killed
        self.done: collections.Counter[str] = collections.Counter()  # events
        self.failed_starts: list[str] = []
        self.replicas: list[Server | None] = [None] * REPLICAS
        self.before: object = None
        self.after: object = None
        self.left: set[str] = set()
        self.began = 0.0
        self.healed: float | None = None
        self._calm, self._ended = threading.Event(), threading.Event()

    def clock(self) -> float:
        return time.monotonic() - self.began

    def go(self) -> None:
        self.world.plant()
        self.before = self.world.foreign()
        for index in range(REPLICAS):
            self._start_pman(index, 0)
        self.began = time.monotonic()
        lanes = {event.lane: [e for e in self.plan.events if e.lane == event.lane] for event in self.plan.events}
        with ThreadPoolExecutor(len(self.plan.errands) + len(lanes) + 1) as pool:
            lister = pool.submit(self._list)
            clients = [pool.submit(self._client, errand) for errand in self.plan.errands]
            try:
                for lane in [pool.submit(self._events, events) for events in lanes.values()]:
                    lane.result()
                self._wait(self.plan.seconds)
            finally:  # else the clients would never give up
                self.world.calm()
                self.healed = self.clock()
                self._calm.set()
            for client in clients:
                client.result()
            self._ended.set()
            lister.result()
            list(pool.map(self._sweep, self.lives))
        self._look_behind()

    def _look_behind(self) -> None:
        deadline = time.monotonic() + 20
        while (left := self.world.runs()) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.left, self.after = left, self.world.foreign()
        for life in self.lives:
            life.kept = life.files()

    # ------------------------------------------------------------------------------------------------------ faults

    def _events(self, events: list[Event]) -> None:
        for event in events:
            self._wait(event.at)
            self.done[f"{event.lane}: {event.kind}" + (f" {event.what}" if event.lane == "part" else "")] += 1
            getattr(self, f"_{event.lane}")(event)

    def _pman(self, event: Event) -> None:
        chosen = range(REPLICAS) if event.what == "both" else [int(event.what)]
        for index in chosen:
            server, self.replicas[index] = self.replicas[index], None
            if server:
                server.kill()
        self._wait(self.clock() + event.lasting)
        for index in chosen:
            self._start_pman(index, event.skew)

    def _start_pman(self, index: int, skew: int) -> None:
        env = {"LD_PRELOAD": self.clock_shift, "CLOCK_SKEW_SECONDS": str(skew)} if skew and self.clock_shift else {}
        while self.replicas[index] is None:
            try:
                self.replicas[index] = self.world.rig.start(**env)
            except AssertionError as error:
                self.failed_starts.append(str(error)[-300:])
                if not self._patient():
                    raise
                time.sleep(1)

    def _part(self, event: Event) -> None:
        began = self.clock()
        if event.what.startswith("kill"):
            self.kills.append(began)
        self.world.stop(event.what)
        self._wait(self.clock() + event.lasting)
        self.world.start(event.what)
        if event.what in self.world.harmful:
            self.harms.append((began, self.clock(), self.world.harmful[event.what]))
        if event.what in self.world.nodes:
            self.absences.append((began, self.clock()))

    def _call(self, event: Event) -> None:
        self.world.fault(event.kind, event.what, event.times, event.lasting)

    def _line(self, event: Event) -> None:
        self.world.line(event.kind, self.plan.seed)
        self._wait(self.clock() + event.lasting)
        self.world.calm(calls=False)

    def _wait(self, until: float) -> None:
        self._calm.wait(max(0, until - self.clock()))

    # ----------------------------------------------------------------------------------------------------- clients

    def _client(self, errand: Errand) -> None:
        """What pfcon does with a job; gives up only when the run has been healed for long."""
        chance = random.Random(errand.name)
        self._wait(errand.at)
        life = self._begin(errand, 1)
        if not self._post(life, chance):
            return
        if errand.kind in ("deleted", "again"):
            until = self.clock() + errand.delete_after
            while self.clock() < until and not life.over:
                self._get(life, chance)
                time.sleep(min(errand.pause, max(0.05, until - self.clock())))
            self._delete(life, chance)
            if errand.again and life.deleted:
                self._post_again(life, chance)
            return
        self._see_the_end(life, chance)
        if life.over and errand.tidy:
            self._delete(life, chance)

    def _begin(self, errand: Errand, number: int) -> Life:
        life = Life(errand, number, self.world.rig.outgoing(errand.name))
        self._request(life)
        self.lives.append(life)
        return life

    def _request(self, life: Life) -> dict[str, Any]:
        errand = life.errand
        script = SCRIPT % (errand.beats, QUICK_BEATS, 3 if errand.kind == "bad" else 0)
        fields: dict[str, Any] = {"time_limit_minutes": 1} if errand.kind == "limit" else {}
        if errand.beats > 1000:
            script = f"trap 'exit 0' TERM; {script}"
        fields |= {"number_of_workers": errand.workers, "cpu_limit": 50, "memory_limit": 32}
        return self.world.rig.request(errand.name, script, **fields)

    def _post_again(self, life: Life, chance: random.Random) -> None:
        """The same request, after its output was put aside, as pfcon does with that of a deleted job."""
        while self.world.ends_later and self._patient() and self._runs(life.errand.name):
            time.sleep(0.5)
        aside = life.outgoing.with_name("before")
        life.outgoing.rename(aside)
        life.outgoing = aside
        second = self._begin(life.errand, 2)
        (second.outgoing / "quick").touch()
        if self._post(second, chance):
            life.at_rest.append((f"the same jid was accepted again at {self.clock():.1f} s", life.files()))
            self._see_the_end(second, chance)

    def _runs(self, jid: str) -> bool:
        with contextlib.suppress(AssertionError):  # the backend may be away
            return any(jid in one for one in self.world.runs())
        return True

    def _see_the_end(self, life: Life, chance: random.Random) -> None:
        while not life.over and self._patient():
            time.sleep(life.errand.pause)
            self._get(life, chance)
            if chance.random() < 0.05:
                self._call_pman(life, "POST", chance)
        for _ in range(2):
            time.sleep(life.errand.pause)
            self._get(life, chance)
        if chance.random() < 0.3:
            self._call_pman(life, "POST", chance)

    def _post(self, life: Life, chance: random.Random) -> bool:
        while self._patient():
            if self._call_pman(life, "POST", chance).code == 201:
                return True
            time.sleep(chance.uniform(0.1, 1))
        return False

    def _get(self, life: Life, chance: random.Random) -> None:
        self._call_pman(life, "GET", chance)

    def _delete(self, life: Life, chance: random.Random) -> None:
        life.deleting = self.clock()
        while self._patient():
            answer = self._call_pman(life, "DELETE", chance)
            if answer.code in (204, 404):
                life.deleted = answer.at
                self._get(life, chance)
                return
            time.sleep(chance.uniform(0.1, 1))

    def _patient(self) -> bool:
        return self.healed is None or self.clock() < self.healed + self.world.settle

    def _sweep(self, life: Life) -> None:
        """After all is well: the same word at every replica, then a DELETE."""
        if life.accepted and not life.deleting:
            for index in range(REPLICAS):
                self._call_pman(life, "GET", random.Random(0), index)
            self._delete(life, random.Random(0))

    def _call_pman(self, life: Life, method: str, chance: random.Random, index: int | None = None) -> Answer:
        """One call of a client that now and then goes away before it is answered.

        It stays for the answer to a POST, since pman may still be at work on it when the client sends a DELETE.
        """
        leaves = chance.random() < 0.05 and index is None and method != "POST"
        patience = chance.uniform(0.005, 0.5) if leaves else CLIENT_SECONDS
        index = chance.randrange(REPLICAS) if index is None else index
        server = self.replicas[index] or self.replicas[1 - index]
        path, body = ("", self._request(life)) if method == "POST" else (f"{life.errand.name}/", None)
        code, job = 0, {"message": "no pman runs"}
        if server:
            try:
                url = f"{server.url}/api/v1/{path}"
                answer = requests.request(method, url, json=body, timeout=patience)
                code, job = answer.status_code, answer.json() if answer.content else {}
                job.pop("logs", None)
            except requests.RequestException as error:
                job = {"message": type(error).__name__}
        said = Answer(self.clock(), method, server.process.pid if server else 0, code, job)
        life.answers.append(said)
        if said.state in FINAL or (code == 204 and not self.world.ends_later):
            life.at_rest.append((f"{method} {code} {said.state} at {said.at:.1f} s", life.files()))
        if code == 201 and life.accepted is None:
            life.accepted = said.at
        if said.state in FINAL and life.over is None:
            life.over = said.at
        return said

    def _list(self) -> None:
        """The listing of all jobs, time and again."""
        while not self._ended.wait(2) and self._patient():
            for server in [one for one in self.replicas if one][:1]:
                began = self.clock()
                with contextlib.suppress(requests.RequestException):
                    answer = server.call("GET", "jobs/", params={"limit": 1000})
                    self.listing_codes[answer.status_code] += 1
                    if answer.status_code == 200:
                        self.listings.append((began, self.clock(), {job["jid"] for job in answer.json()["jobs"]}))
