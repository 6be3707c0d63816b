"""Replays recorded exchanges against a server and compares the answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import requests

from tests.rig import wait_for

RECORDINGS = Path(__file__).parent.parent / "recordings" / "cromwell"
RECORDED_ROOT = "/shared/cromwell-executions"
FINAL = ("Succeeded", "Failed", "Aborted")
TIMEOUT_SECONDS = 20

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def recording(name: str) -> dict[str, Any]:
    """A recording; jobs that came to their end in it sleep less than they did."""
    text = re.sub(r"\bsleep (?:5|20|25|75)\b", "sleep 0.2", (RECORDINGS / f"{name}.json").read_text())
    text = re.sub(r"\bsleep 100\b", "sleep 8", text)
    found: dict[str, Any] = json.loads(text)
    return found


def _form(files: dict[str, str]) -> dict[str, str]:
    """The form of a submission, made of what metadata says was submitted."""
    names = {"workflowSource": "workflow", "labels": "labels", "workflowOptions": "options"}
    return {part: files[name] for part, name in names.items()}


@cache
def submissions() -> dict[str, dict[str, Any]]:
    """Workflow id -> form that it was submitted with, over all recordings."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RECORDINGS.glob("*.json")):
        for exchange in recording(path.stem).get("exchanges", []):
            body = exchange.get("response", {}).get("body")
            if exchange.get("request", {}).get("form") and exchange["response"]["status"] == 201:
                found[body["id"]] = exchange["request"]["form"]
            elif isinstance(body, dict) and "submittedFiles" in body:
                found.setdefault(body["id"], _form(body["submittedFiles"]))
    return found


def parts(form: dict[str, Any]) -> dict[str, tuple[str | None, bytes]]:
    """A recorded form as requests' `files`."""
    return {
        name: (part["filename"], part["content"].encode()) if isinstance(part, dict) else (None, part.encode())
        for name, part in form.items()
    }


def _walk(value: Any, key: str = "") -> Any:
    """The value without what differs from run to run: times, job ids, the order of events and results."""
    if isinstance(value, dict):
        return {name: _walk(item, name) for name, item in value.items()}
    if isinstance(value, list):
        items = [_walk(item, key) for item in value]
        unordered = key in ("executionEvents", "workflowProcessingEvents", "results")
        return sorted(items, key=json.dumps) if unordered else items
    if isinstance(value, str):
        return {"jobId": "JOB", "cromwellId": "CROMWELL"}.get(key, _TIME.sub("TIME", value))
    return value


def shape(value: Any) -> Any:
    """Keys and types only."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(item), sort_keys=True) for item in value})
    return type(value).__name__


class Client:
    """Talks to one server and knows by which id it calls each recorded workflow."""

    def __init__(self, url: str, root: Path, advance: Callable[[], None] = lambda: None) -> None:
        """`advance` brings the server's visible state up to date, where that does not happen by itself."""
        self.url = url
        self.root = root
        self.advance = advance
        self.session = requests.Session()
        self.ids: dict[str, str] = {}
        self.forms = dict(submissions())

    def rename(self, text: str) -> str:
        return _UUID.sub(lambda found: self.ids.get(found[0], found[0]), text)

    def expected(self, body: Any) -> Any:
        text = self.rename(json.dumps(body)).replace(RECORDED_ROOT, str(self.root))
        return _walk(json.loads(text))

    def send(self, request: dict[str, Any]) -> requests.Response:
        options: dict[str, Any] = {}
        request = json.loads(self.rename(json.dumps(request)))
        kind = request["request_headers"].get("Content-Type", "")
        if kind.startswith("multipart/"):
            options["files"] = parts(request["form"])
        elif kind:
            options |= {"data": request["data"], "headers": {"Content-Type": kind}}
        if request["json"] is not None:
            options = {"json": request["json"]}
        params = request["params"]
        pairs = [tuple(pair) for pair in params] if isinstance(params, list) else params
        return self.session.request(request["method"], self.url + request["path"], params=pairs, timeout=10, **options)

    def body(self, response: requests.Response) -> Any:
        """JSON or text; of an HTML page only that it is one."""
        kind = response.headers["Content-Type"]
        if kind.startswith("text/html"):
            return "(a page of Swagger UI)"
        return response.json() if kind == "application/json" else response.text

    def submit(self, workflow: str) -> None:
        """Submit a recorded workflow again, under the id it had."""
        form = self.forms[workflow] | {"requestedWorkflowId": workflow}
        answer = self.session.post(f"{self.url}/api/workflows/v1", files=parts(form), timeout=10)
        assert answer.status_code == 201, answer.text
        self.ids[workflow] = workflow

    def get(self, workflow: str, what: str) -> Any:
        self.advance()
        return self.session.get(f"{self.url}/api/workflows/v1/{self.rename(workflow)}/{what}", timeout=10).json()

    def post(self, workflow: str, what: str) -> requests.Response:
        return self.session.post(f"{self.url}/api/workflows/v1/{self.rename(workflow)}/{what}", timeout=10)

    def status(self, workflow: str) -> str:
        """Its status; "fail" while it is unknown."""
        return str(self.get(workflow, "status")["status"])

    def wait_for_status(self, workflow: str, *wanted: str, seconds: float = TIMEOUT_SECONDS) -> None:
        wait_for(lambda: self.status(workflow) in wanted, seconds, f"status {' or '.join(wanted)}", every=0.01)

    def calls(self, workflow: str) -> list[dict[str, Any]]:
        return [entry for entries in self.get(workflow, "metadata").get("calls", {}).values() for entry in entries]

    def job_id(self, workflow: str) -> str | None:
        return next((entry["jobId"] for entry in self.calls(workflow) if "jobId" in entry), None)

    def mentioned(self, exchanges: list[dict[str, Any]]) -> list[str]:
        """Recorded workflows that these exchanges are about but do not submit."""
        requests_made = [exchange for exchange in exchanges if "request" in exchange]
        posted = {e["response"]["body"]["id"] for e in requests_made if e["response"]["status"] == 201}
        found = dict.fromkeys(w for e in requests_made for w in _UUID.findall(e["request"]["path"]))
        return [workflow for workflow in found if workflow in self.forms and workflow not in posted]

    def replay(self, exchange: dict[str, Any], same: Callable[[Any, Any], bool]) -> None:
        """Send one exchange; a GET is repeated until its answer is the recorded one, for a limited time.

        What was recorded right after a change is asked before `advance`, so that it is still as it was.
        """
        recorded = exchange["response"]
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            response = self.send(exchange["request"])
            got = self.body(response)
            if exchange["request"]["form"] and response.status_code == recorded["status"] == 201:
                self.ids[recorded["body"]["id"]] = got["id"]
            wanted = self.expected(recorded["body"])
            if response.status_code == recorded["status"] and same(_walk(got), wanted):
                break
            late = time.monotonic() > deadline or exchange["request"]["method"] != "GET"
            assert not late, f"{exchange.get('case')} {response.url}\n{response.status_code} {_walk(got)}\n{recorded}"
            time.sleep(0.01)
            self.advance()
        for header in ("Content-Type", "Content-Encoding"):
            assert response.headers.get(header) == recorded["headers"].get(header)
