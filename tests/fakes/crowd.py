"""The API of a scheduler that knows thousands of jobs: the first job that is posted, copied under other names.

    python -m tests.fakes.crowd kubernetes|docker|swarm|cromwell JOBS

For benchmarks: it says on standard output where it listens, answers after the time that the real thing was measured to
take (SECONDS), and `GET /-/counts` tells how many calls came and how long the answers took. Of ten jobs seven wait, two
run and one has succeeded; on Docker, where no job waits, nine run.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, Any]  # status and body: bytes, a text of JSON, or what becomes one
Query = dict[str, str]
FIRST = "crowd-00000"  # the jid of the job that is copied
POSTED = 600.0  # seconds ago
# Seconds of an answer, by the first pattern that is found in the call. They are medians of bench/README.md, divided by
# the calls that they stand for; Cromwell's were recorded of a real one (tests/recordings/cromwell/28-latency.json).
SECONDS = {
    "kubernetes": {"^GET": 0.004, "": 0.006},
    "docker": {"^GET": 0.0012, "/start$": 0.326, "": 0.036},
    "swarm": {"^GET": 0.0014, "": 0.0017},
    "cromwell": {"/metadata$": 0.0136, "^GET|/query$": 0.0083, "": 0.0142},
}
FILLER = "x" * 3000  # what pman does not read of a document: 3 KB of a pod, of a container that is inspected
LINES = b"".join(b"a line of the output of a job, number %d\n" % n for n in range(20))


def jid_of(number: int) -> str:
    return f"crowd-{number:05d}"


def stamp(seconds_ago: float = POSTED) -> str:
    return datetime.fromtimestamp(time.time() - seconds_ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Crowd:
    """The jobs. `stage` is 0 for one that waits, 1 for one that runs, 2 for one that has succeeded."""

    waits = True

    def __init__(self, jobs: int) -> None:
        self.size = jobs
        self.first = ""  # what was posted of the job FIRST, as text
        self.posted: dict[str, str] = {}  # jid -> what was posted of it
        self.deleted: set[str] = set()
        self.made: dict[tuple[str, int], str] = {}  # documents of FIRST by kind and stage

    def document(self, kind: str, jid: str) -> str:
        """What the method `kind` makes of the job, as JSON; made once for all copies, since benchmarks wait for it."""
        if jid in self.posted:
            return json.dumps(getattr(self, kind)(jid, json.loads(self.posted[jid]), self.stage(jid)))
        key = kind, self.stage(jid)
        if key not in self.made:
            self.made[key] = json.dumps(getattr(self, kind)(FIRST, json.loads(self.first), self.stage(jid)))
        return self.made[key].replace(FIRST, jid)

    def documents(self, kind: str, jids: Iterable[str]) -> str:
        return f"[{','.join(self.document(kind, jid) for jid in jids)}]"

    def stage(self, jid: str) -> int:
        last = jid[-1]
        return 2 if last == "9" else 1 if last in "78" or not self.waits else 0

    def text(self, jid: str) -> str:
        """What was posted of a job; "" where there is none."""
        if jid in self.deleted:
            return ""
        number = jid.removeprefix("crowd-")
        copied = self.first and number.isdecimal() and int(number) < self.size and jid == jid_of(int(number))
        return self.first.replace(FIRST, jid) if copied else self.posted.get(jid, "")

    def add(self, jid: str, text: str) -> bool:
        """Whether there was no such job."""
        if self.text(jid):
            return False
        if jid == FIRST:
            self.first = text
        else:
            self.posted[jid] = text
        return True

    def jids(self) -> list[str]:
        every = [*map(jid_of, range(self.size if self.first else 0)), *self.posted]
        return [jid for jid in every if jid not in self.deleted]

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        raise NotImplementedError


class Kubernetes(Crowd):
    """https://kubernetes.io/docs/reference/kubernetes-api/; statuses as recorded in tests/recordings/kubernetes."""

    STATUS = (
        {"active": 1, "ready": 0, "terminating": 0, "uncountedTerminatedPods": {}},
        {"active": 1, "ready": 1, "terminating": 0, "uncountedTerminatedPods": {}},
        {"succeeded": 1, "ready": 0, "terminating": 0, "uncountedTerminatedPods": {}},
    )

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        *_, kind, name = ["", *path.split("/")]
        if method == "POST":
            return self.post(kind, query, body)
        if method == "DELETE":
            self.deleted.add(name)
            return 200, {}
        if path.endswith("/log"):
            return 200, LINES
        if kind == "jobs":
            missing = {"kind": "Status", "message": f'jobs.batch "{name}" not found'}
            return (200, self.document("job", name)) if self.text(name) else (404, missing)
        if name in ("jobs", "pods"):
            asked = re.findall(r"(?:[=(,]|uid-)((?:crowd|post)-[\w-]+)", query.get("labelSelector", ""))
            found = [jid for jid in asked if self.text(jid)] if asked else self.jids()
            return 200, self.page(name[:-1], query, found)
        return (200, {"metadata": {}, "items": []}) if name == "events" else (200, {"major": "1", "minor": "35"})

    def post(self, kind: str, query: Query, body: bytes) -> Answer:
        if "dryRun" in query:
            return 201, {}
        if b'"SelfSubjectRulesReview"' in body:
            every = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
            return 201, {"status": {"resourceRules": [every], "incomplete": False}}
        jid = json.loads(body)["metadata"]["name"]
        return (201, self.document("job", jid)) if self.add(jid, body.decode()) else (409, {"message": "AlreadyExists"})

    def page(self, kind: str, query: Query, jids: list[str]) -> str:
        begin = int(query.get("continue", 0))
        end = begin + int(query.get("limit", len(jids)))
        metadata = json.dumps({"continue": str(end)} if end < len(jids) else {})
        return f'{{"metadata": {metadata}, "items": {self.documents(kind, jids[begin:end])}}}'

    def job(self, jid: str, document: Any, stage: int) -> Any:
        document["metadata"] |= {"uid": f"uid-{jid}", "resourceVersion": "1000", "creationTimestamp": stamp()}
        document["metadata"]["managedFields"] = FILLER[:1500]
        status = self.STATUS[stage] | {"startTime": stamp()}
        if stage == 2:
            ended = {"status": "True", "lastTransitionTime": stamp(60)}
            conditions = [{"type": name, **ended} for name in ("SuccessCriteriaMet", "Complete")]
            status |= {"completionTime": stamp(60), "conditions": conditions}
        return document | {"status": status}

    def pod(self, jid: str, document: Any, stage: int) -> Any:
        template = document["spec"]["template"]
        owner = "batch.kubernetes.io/controller-uid"
        labels = template.get("metadata", {}).get("labels", {}) | {owner: f"uid-{jid}"}
        name = f"{jid}-0-abcde"
        metadata = {"name": name, "uid": f"pod-{jid}", "creationTimestamp": stamp(), "labels": labels}
        metadata["managedFields"] = FILLER
        said = (
            "0/3 nodes are available: 3 Insufficient cpu. preemption: 0/3 nodes are available: 3 No preemption victims."
        )
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
        status: dict[str, Any] = {"phase": "Pending", "conditions": [scheduled]}
        if stage:
            begun = {"startedAt": stamp(300)}
            ended = {"terminated": {**begun, "exitCode": 0, "reason": "Completed", "finishedAt": stamp(60)}}
            container = {"name": "job", "state": {"running": begun} if stage == 1 else ended}
            conditions = [scheduled | {"status": "True"}]
            phase = ("Running", "Succeeded")[stage - 1]
            status = {"phase": phase, "conditions": conditions, "containerStatuses": [container]}
        return {"metadata": metadata, "spec": template["spec"] | {"nodeName": "node-1"}, "status": status}


class Engine(Crowd):
    """What Docker and Swarm have in common: https://docs.docker.com/reference/api/engine/version/v1.45/."""

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        path = re.sub(r"^/v[\d.]+", "", path)
        if path.endswith("/logs"):
            return 200, b"\1\0\0\0" + len(LINES).to_bytes(4, "big") + LINES
        fixed = {
            "/version": {"ApiVersion": "1.45", "Components": [{"Name": "Engine"}]},
            "/_ping": b"OK",
            "/info": {"Swarm": {"ControlAvailable": True, "NodeID": "node-1"}},
            "/nodes": [{"ID": "node-1", "Description": {"Hostname": "node-1", "Resources": {"NanoCPUs": 16 * 10**9}}}],
        }
        found = fixed[path] if path in fixed else self.of_job(method, path, query, body)
        return (200, found) if found is not None else (404, {"message": f"no such thing: {path}"})

    def of_job(self, method: str, path: str, query: Query, body: bytes) -> Any:
        raise NotImplementedError


class Docker(Engine):
    waits = False

    def of_job(self, method: str, path: str, query: Query, body: bytes) -> Any:
        if path == "/containers/create":
            self.add(query["name"], body.decode())
            return {"Id": query["name"]}
        if path.endswith("/start"):
            return {}
        if path == "/containers/json":
            if "limit-minutes" in query.get("filters", ""):
                return []
            asked = json.loads(query.get("filters", "{}")).get("id")
            running = (jid for jid in asked or () if self.text(jid) and self.stage(jid) == 1)
            return self.documents("row", running if asked else self.jids())
        jid = path.split("/")[2]
        return self.document("inspected", jid) if self.text(jid) else None

    def inspected(self, jid: str, body: Any, stage: int) -> Any:
        over = stage == 2
        state = {
            "Status": "exited" if over else "running", "Running": not over, "ExitCode": 0, "OOMKilled": False,
            "StartedAt": stamp(300), "FinishedAt": stamp(60) if over else "0001-01-01T00:00:00Z", "Error": "",
        }  # fmt: skip
        config = {name: value for name, value in body.items() if name != "HostConfig"}
        return {
            "Id": jid, "Name": f"/{jid}", "Created": stamp(), "State": state, "Config": config,
            "HostConfig": body.get("HostConfig", {}), "NetworkSettings": FILLER,
        }  # fmt: skip

    def row(self, jid: str, body: Any, stage: int) -> Any:
        over = stage == 2
        return {
            "Id": jid, "Names": [f"/{jid}"], "Image": body["Image"], "Created": int(time.time() - POSTED),
            "Command": " ".join(body.get("Cmd") or []), "Labels": body["Labels"],
            "State": "exited" if over else "running",
            "Status": "Exited (0) a minute ago" if over else "Up 5 minutes", "Mounts": FILLER[:600],
        }  # fmt: skip


class Swarm(Engine):
    def of_job(self, method: str, path: str, query: Query, body: bytes) -> Any:
        filters = json.loads(query.get("filters", "{}"))
        if path == "/services/create":
            jid = json.loads(body)["Name"]
            self.add(jid, body.decode())
            return {"ID": f"id-{jid}"}
        if path == "/services":
            known = [one[3:] for one in filters.get("id", ())]
            return self.documents("service", filter(self.text, known) if known else self.jids())
        if path == "/tasks":
            asked = filters.get("service") or filters.get("label", [""])
            if asked[0].startswith("id-"):
                return self.documents("task", [one[3:] for one in asked])
            return [] if "=" in asked[0] else self.documents("task", self.jids())
        jid = path.split("/")[2].removeprefix("id-")
        return self.document("service", jid) if self.text(jid) else None

    def service(self, jid: str, body: Any, _: int) -> Any:
        return {"ID": f"id-{jid}", "CreatedAt": stamp(), "Version": {"Index": 1}, "Spec": body}

    def task(self, jid: str, body: Any, stage: int) -> Any:
        status: dict[str, Any] = {"Timestamp": stamp(60), "State": ("pending", "running", "complete")[stage]}
        status |= {"ContainerStatus": {"ContainerID": f"container-{jid}", "ExitCode": 0}} if stage else {}
        if not stage:
            status["Err"] = "no suitable node (insufficient resources on 1 node)"
        return {
            "ID": f"task-{jid}", "ServiceID": f"id-{jid}", "Slot": 1, "NodeID": "node-1", "CreatedAt": stamp(),
            "DesiredState": "running", "Status": status, "Spec": body["TaskTemplate"], "Labels": body.get("Labels", {}),
        }  # fmt: skip


class Cromwell(Crowd):
    """https://cromwell.readthedocs.io/en/latest/api/RESTAPI/; rows as recorded in tests/recordings/cromwell."""

    NAME = "org.chrisproject.pman.name"
    STATES = ("Submitted", "Running", "Succeeded")

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        if path.endswith("/query"):
            labels = [part["labelor"] for part in json.loads(body) if "labelor" in part] if body else [query["label"]]
            name, asked = labels[0].partition(":")[0], [one.partition(":")[2] for one in labels]
            found = [*filter(self.text, asked)] if name == self.NAME else self.jids()[: int(query["pagesize"])]
            return 200, f'{{"results": {self.documents("row", found)}, "totalResultsCount": {len(found)}}}'
        if method == "POST":
            parts = {
                m[1].decode(): m[2].decode() for m in re.finditer(rb'name="(\w+)".*?\r\n\r\n(.*?)\r\n--', body, re.S)
            }
            if not self.add(json.loads(parts["labels"])[self.NAME], parts["labels"]):
                return 400, {"message": "Requested workflow IDs are already in use"}
            return 201, {"id": parts["requestedWorkflowId"], "status": "Submitted"}
        if path.endswith("/backends"):
            return 200, {"supportedBackends": ["SLURM"], "defaultBackend": "SLURM"}
        jid = path.split("/")[-2].removeprefix("id-")
        call = {"executionStatus": "Done" if self.stage(jid) == 2 else "Running", "jobId": "17", "attempt": 1}
        paths = {name: f"/cromwell/{jid}/call-x/execution/{name}" for name in ("stdout", "stderr")}
        times = {"end": stamp(60)} if self.stage(jid) == 2 else {}
        return 200, {"status": self.STATES[self.stage(jid)], "calls": {"ChRISJob.x": [call | paths]}, **times}

    def row(self, jid: str, labels: Any, stage: int) -> Any:
        times = {"submission": stamp()} | ({"end": stamp(60)} if stage == 2 else {})
        return {"id": f"id-{jid}", "status": self.STATES[stage], "labels": labels, **times}


KINDS: dict[str, type[Crowd]] = {"kubernetes": Kubernetes, "docker": Docker, "swarm": Swarm, "cromwell": Cromwell}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with kept connections. Not http.server, which would cost as much as pman, which is measured."""

    crowd: Crowd
    seconds: dict[str, float]
    counts: ClassVar[Counter[str]] = Counter()
    waited: ClassVar[float] = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if not end or len(rest) < (int(length[1]) if length else 0):
            return
        self.received = b""
        began = time.perf_counter()
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        status, found = self.answer(method, unquote(url.path), query, rest)
        seconds = 0.0
        if url.path != "/-/counts":
            seconds = next(s for pattern, s in self.seconds.items() if re.search(pattern, f"{method} {url.path}"))
            kind = re.sub(r"(id-|uid-|task-|container-)?(crowd|post)-[\w-]+", "*", url.path)
            Connection.counts[f"{method} {kind}"] += 1
            Connection.waited += seconds + time.perf_counter() - began
        self.send(status, found, seconds)

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        if path == "/-/counts":
            return 200, {"calls": self.counts, "seconds": Connection.waited}
        return self.crowd.answer(method, path, query, body)

    def send(self, status: int, found: Any, seconds: float) -> None:
        data = found if isinstance(found, bytes) else (found if isinstance(found, str) else json.dumps(found)).encode()
        kind = "application/octet-stream" if isinstance(found, bytes) else "application/json"
        head = f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        asyncio.get_running_loop().call_later(seconds, self.transport.write, head.encode() + data)  # type: ignore[attr-defined]


async def serve(kind: str, jobs: int) -> None:
    Connection.crowd, Connection.seconds = KINDS[kind](jobs), SECONDS[kind]
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
