"""An API server that answers from a script, and what it answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pman import settings
from pman.backends import kubernetes
from pman.job import Job, make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer, Spec
from tests.rig import ROOT

RECORDINGS = ROOT / "tests" / "recordings" / "kubernetes"
CONFIG = settings.load({"CONTAINER_ENV": "kubernetes", "STOREBASE": "/srv/store", "JOB_NAMESPACE": "rec"})
Answer = tuple[int, dict[str, str], Any]
CUT: Answer = (0, {}, None)  # the connection, in place of an answer


def recorded(name: str) -> Answer:
    """The answer of a recording of one call."""
    found = json.loads((RECORDINGS / f"{name}.json").read_text())
    return found["status"], {}, found["body"]


class Script:
    """An HTTP server that gives its answers in order, beside those that it always gives; it notes what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.always: dict[str, Answer] = {}  # by a part of the path, in place of one of the answers
        self.asked: list[tuple[str, str, Any]] = []
        self.before: Callable[[str], object] = lambda _: None
        self.headers: list[Any] = []
        self.moments: list[float] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                script.asked.append((self.command, self.path, json.loads(body or b"null")))
                script.headers.append(self.headers)
                script.moments.append(time.monotonic())
                fixed = next((answer for part, answer in script.always.items() if part in self.path), None)
                status, headers, answer = fixed or script.answers.pop(0)
                script.before(self.path)
                if status <= 0:
                    time.sleep(-status)
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PATCH = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def job_and_spec(**fields: Any) -> tuple[Job, Spec]:
    request = {
        "jid": "ok2", "args": ["$(x)"], "auid": "a", "number_of_workers": 2, "cpu_limit": 100, "memory_limit": 64,
        "gpu_limit": 0, "image": "localhost/busybox:1", "entrypoint": ["sh"], "type": "fs",
    }  # fmt: skip
    job = make_job(validate(request | fields), CONFIG)
    return job, Renderer(CONFIG, TARGETS).render(job, "k8s")


STARTED_AT = "2026-11-24T00:00:00Z"


def await_removals() -> None:
    """Until no marked Job is being removed, for which no DELETE waits."""
    for thread in threading.enumerate():
        if thread.name.startswith(kubernetes.REMOVAL):
            thread.join(30)


def created(job: Job, spec: Spec, **metadata: Any) -> dict[str, Any]:
    """What the API server answers for a Job that was just created from `spec`."""
    document: dict[str, Any] = json.loads(kubernetes._body(job, spec))
    document["metadata"] |= {"uid": "u", "resourceVersion": "7", "creationTimestamp": STARTED_AT, **metadata}
    return document | {"status": {}}


def finished(job: Job, spec: Spec, **metadata: Any) -> dict[str, Any]:
    states = json.loads((RECORDINGS / "job_states.json").read_text())
    return created(job, spec, **metadata) | {"status": states["job_indexed"][-1]["status"]}


def pods_of(job: Job, *places: tuple[int, str], begun: bool = True) -> list[dict[str, Any]]:
    """Pods of a job at (index, node)."""
    status = recorded("pods_list_running")[2]["items"][0]["status"]
    waits = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
    return [
        {
            "metadata": {
                "name": f"p{index}", "uid": f"p{index}", "creationTimestamp": STARTED_AT,
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            },
            "spec": {"nodeName": node, "containers": [{"name": "job", "image": job.image}]},
            "status": status if begun else waits,
        }
        for index, node in places
    ]  # fmt: skip
