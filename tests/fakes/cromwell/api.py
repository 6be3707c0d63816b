"""The REST interface, worded as recorded from Cromwell 93."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from tests.fakes.cromwell.config import Config
from tests.fakes.cromwell.store import RANK, Event, Refused, Store, Workflow, timestamp
from tests.fakes.cromwell.wdl import InvalidWorkflow, plan

VERSION = "93-c805f3c-SNAP"
LABEL_MAX = 255  # characters of a key or a value

_PARTS = {
    "workflowSource", "workflowUrl", "workflowRoot", "workflowType", "workflowTypeVersion", "workflowInputs",
    *(f"workflowInputs_{n}" for n in range(2, 6)), "workflowOptions", "labels", "workflowDependencies",
    "requestedWorkflowId", "workflowOnHold", "wdlSource", "wdlDependencies",
}  # fmt: skip
_QUERY_KEYS = {
    "label", "labelor", "excludelabeland", "excludelabelor", "id", "status", "name", "excludestatus", "submission",
    "start", "end", "page", "pagesize", "additionalqueryresultfields", "includesubworkflows", "metadataarchivestatus",
    "newestfirst",
}  # fmt: skip


class Problem(Exception):
    def __init__(self, code: int, message: str, status: str = "fail", errors: list[str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = {"status": status, "message": message} | ({"errors": errors} if errors else {})


def reply(body: Any, code: int = 200) -> Response:
    return Response(json.dumps(body, ensure_ascii=False), code, content_type="application/json")


def java_uuid(text: str) -> str | None:
    """A UUID as lenient as Java's: groups of any length, shortened to the bits that fit."""
    if not re.fullmatch(r"[0-9a-fA-F]+(-[0-9a-fA-F]+){4}", text):
        return None
    widths = (8, 4, 4, 4, 12)
    return "-".join(f"{int(group, 16):x}"[-n:].zfill(n) for group, n in zip(text.split("-"), widths, strict=True))


def _json_error(error: json.JSONDecodeError, text: str, expected: str) -> str:
    line = (text.splitlines() or [""])[error.lineno - 1] if text else ""
    what = f"Unexpected character '{text[error.pos]}'" if error.pos < len(text) else "Unexpected end-of-input"
    where = f"at input index {error.pos} (line {error.lineno}, position {error.colno})"
    return f"{what} {where}, expected {expected}:\n{line}\n{' ' * (error.colno - 1)}^\n"


def _label_problem(key: str, value: Any) -> Iterable[str]:
    if not isinstance(value, str):
        shown = json.dumps(value, separators=(",", ":"))
        yield f"Invalid label {key}: {shown} : Labels must be strings. A Label key must be non-empty."
        return
    if not key:
        yield "Invalid label: `` can't be empty"
    for text in (key, value):
        if len(text) > LABEL_MAX:
            yield f"Invalid label: `{text}` is {len(text)} characters. The maximum is {LABEL_MAX}."


def check_labels(text: str) -> tuple[dict[str, str], list[str]]:
    """Labels and what is wrong with them; a lone surrogate becomes a question mark."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, [f"Workflow contains invalid labels JSON: {_json_error(error, text, 'JSON Value')}"]
    if not isinstance(found, dict):
        return {}, ['Invalid workflow labels JSON. Expected a JsObject of "labelKey": "labelValue" values.']
    problems = [message for key, value in found.items() for message in _label_problem(key, value)]
    if problems:
        return {}, problems
    return {k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode() for k, v in found.items()}, []


def _requested_id(text: str) -> str:
    found = yaml.safe_load(text) if text else False
    if isinstance(found, list) and len(found) != 1:
        raise ValueError(f"Mismatch between requested IDs count ({len(found)}) and workflow inputs counts (1)")
    found = found[0] if isinstance(found, list) else found
    if not isinstance(found, str):
        raise ValueError(f"Requested workflow IDs must be strings but got: '{json.dumps(found, default=str)}'")
    workflow = java_uuid(found)
    if workflow is None:
        raise ValueError(f"Failed to parse requested workflow ID as UUID (reason 1 of 1): Invalid UUID string: {found}")
    return workflow


def _on_hold(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f'For input string: "{text}"')
    return text.lower() == "true"


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Invalid workflow options provided: {_json_error(error, text, _expected(error))}") from error
    if not isinstance(found, dict):
        raise ValueError("Invalid workflow options provided: the value is not an object")
    return found


def _expected(error: json.JSONDecodeError) -> str:
    return "'\"'" if "property name" in error.msg else "JSON Value"


def _inputs(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"Input file is not a valid yaml or json. Inputs data: '{text}'. Error: ParsingFailure: {error}."
        ) from error
    if isinstance(found, list) and len(found) > 1:
        raise Problem(400, "To submit more than one workflow at a time, use the batch endpoint.")
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


def _fields() -> dict[str, str]:
    if request.mimetype != "multipart/form-data":
        kind = request.mimetype or "none/none"
        text = f"The request's Content-Type [{kind}] is not supported. Expected:\nmultipart/form-data"
        raise Unsupported(text)
    parts = dict(request.form.items())
    return parts | {name: part.read().decode("utf-8", "replace") for name, part in request.files.items()}


class Unsupported(Exception):
    pass


def _submission(fields: dict[str, str]) -> tuple[Workflow, dict[str, Any]]:
    """The workflow and its metadata of submission; raises Problem with all that is wrong."""
    problems = [f"Unexpected body part name: {name}" for name in fields if name not in _PARTS]
    source = fields.get("workflowSource", fields.get("wdlSource"))
    if source is None and "workflowUrl" not in fields:
        problems.append("workflowSource or workflowUrl needs to be supplied")
    if source is not None and "workflowUrl" in fields:
        problems.append("workflowSource and workflowUrl can't both be supplied")

    def read(name: str, parse: Callable[[str], Any], default: Any) -> Any:
        try:
            return parse(fields[name]) if name in fields else default
        except ValueError as error:
            problems.append(str(error))
            return default

    labels, bad_labels = check_labels(fields.get("labels", "{}"))
    problems += bad_labels
    options = read("workflowOptions", _options, {})
    on_hold = read("workflowOnHold", _on_hold, False)
    inputs = read("workflowInputs", _inputs, {})
    workflow = read("requestedWorkflowId", _requested_id, None) or str(uuid.uuid4())
    if problems:
        raise Problem(400, "Error(s): " + "\n".join(problems))
    state = "On Hold" if on_hold else "Submitted"
    hog_group = str(options.get("hogGroup", workflow))
    labels |= {"cromwell-workflow-id": f"cromwell-{workflow}"}
    row = Workflow(workflow, state, hog_group, source or "", json.dumps(inputs), json.dumps(options), labels)
    pretty = json.dumps(options, indent=2, ensure_ascii=False) if options else "{\n\n}"
    files = {
        "workflow": source or "", "root": fields.get("workflowRoot", ""), "options": pretty,
        "inputs": json.dumps(inputs, separators=(",", ":")), "workflowUrl": fields.get("workflowUrl", ""),
        "labels": fields.get("labels", "{}"),
    }  # fmt: skip
    return row, files


# -- metadata ------------------------------------------------------------------------------------------------------


def _chosen(key: str, include: list[str], exclude: list[str]) -> bool:
    if any(key.startswith(prefix) for prefix in exclude):
        return False
    return not include or any(key.startswith(prefix) for prefix in include)


def _apply(target: dict[str, Any], key: str, value: Any) -> None:
    if key.endswith("[]"):
        target.setdefault(key[:-2], []).append(value)
    elif key.startswith("labels:"):
        target.setdefault("labels", {})[key[7:]] = value
    elif key == "start":
        target.setdefault(key, value)
    elif key != "status" or key not in target or RANK[value] >= RANK[target[key]] < RANK["Aborted"]:
        target[key] = value


def metadata(events: list[Event], include: Iterable[str] = (), exclude: Iterable[str] = ()) -> dict[str, Any]:
    """The metadata of one workflow; `{}` when no event has one of the keys asked for."""
    wanted, unwanted = list(include), list(exclude)
    chosen = [event for event in events if _chosen(event.key, wanted, unwanted)]
    if not chosen:
        return {}
    top: dict[str, Any] = {"id": chosen[0].workflow, "calls": {}}
    if not wanted:
        top |= {"inputs": {}, "outputs": {}}
    calls: dict[tuple[str, int], dict[str, Any]] = {}
    for event in chosen:
        if event.call:
            entry = calls.setdefault((event.call, event.attempt), {"attempt": event.attempt, "shardIndex": -1})
            _apply(entry, event.key, event.value)
        else:
            _apply(top, event.key, event.value)
    for (call, _), entry in sorted(calls.items(), key=lambda item: item[0][1]):
        top["calls"].setdefault(call, []).append(entry)
    return top


# -- query ---------------------------------------------------------------------------------------------------------


def _pair(text: str) -> list[str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise Problem(400, f"Label values do not match allowed pattern label-key:label-value: {text}")
    wrong = list(_label_problem(key, value))
    if wrong:
        raise Problem(400, f"Label values do not match allowed pattern label-key:label-value: {wrong[0]}")
    return [key, value]


class Query:
    """A WHERE clause made of query parameters."""

    _HAS = "EXISTS (SELECT 1 FROM label l WHERE l.id = s.id AND l.key = ? AND l.value = ?)"

    def __init__(self, parameters: list[tuple[str, str]]) -> None:
        self._given: dict[str, list[str]] = {}
        for name, value in parameters:
            if name.lower() not in _QUERY_KEYS:
                raise Problem(400, f"Unrecognized query keys: {name}")
            self._given.setdefault(name.lower(), []).append(value)
        self.clauses: list[str] = ["1"]
        self.values: list[str] = []
        self._labels("label", " AND ", "")
        self._labels("labelor", " OR ", "")
        self._labels("excludelabeland", " AND ", "NOT ")
        self._labels("excludelabelor", " OR ", "NOT ")
        self._among("id", "id", [self._id(text) for text in self._given.get("id", [])])
        self._among("status", "status", [self._status(text) for text in self._given.get("status", [])])
        self._among("name", "name", self._given.get("name", []))
        if any(value == "Archived" for value in self._given.get("metadataarchivestatus", [])):
            self.clauses.append("0")
        self.fields = self._given.get("additionalqueryresultfields", [])
        for field in self.fields:
            if field not in ("labels", "parentWorkflowId"):
                raise Problem(400, f"Keys should be from List(labels, parentWorkflowId). Unrecognized values: {field}")
        self.page, self.page_size = self._number("page", 1), self._number("pagesize", 10_000_000)

    def _labels(self, name: str, joint: str, negation: str) -> None:
        pairs = [_pair(text) for text in self._given.get(name, [])]
        if pairs:
            self.clauses.append(f"{negation}(" + joint.join([self._HAS] * len(pairs)) + ")")
            self.values += [text for pair in pairs for text in pair]

    def _among(self, name: str, column: str, texts: list[str]) -> None:
        if name in self._given:
            self.clauses.append(f"s.{column} IN ({','.join('?' * len(texts))})")
            self.values += texts

    @staticmethod
    def _id(text: str) -> str:
        workflow = java_uuid(text)
        if workflow is None:
            raise Problem(400, f"Id values do match allowed workflow id pattern: invalid Id value: '{text}'")
        return workflow

    @staticmethod
    def _status(text: str) -> str:
        for state in RANK:
            if state.lower() == text.lower():
                return state
        raise Problem(400, f"Unrecognized status values: {text}")

    def _number(self, name: str, default: int) -> int:
        text = self._given.get(name, [str(default)])[0]
        if not text.isdigit() or int(text) < 1:
            raise Problem(400, "Integer value not greater than 0")
        return int(text)


def _result(row: sqlite3.Row, labels: dict[str, str] | None) -> dict[str, Any]:
    names = ("id", "status", "name", "submission", "start", "end")
    found = {name: row[name] for name in names if row[name] is not None}
    found["metadataArchiveStatus"] = "Unarchived"
    return found if labels is None else found | {"labels": labels}


# -- the application -----------------------------------------------------------------------------------------------


class Service:
    """What the routes do."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config = config
        self.store = store

    def known(self, text: str) -> str:
        workflow = self.valid(text)
        if not self.store.recognised(workflow):
            raise Problem(404, f"Unrecognized workflow ID: {workflow}")
        return workflow

    @staticmethod
    def valid(text: str) -> str:
        workflow = java_uuid(text)
        if workflow is None:
            raise Problem(400, f"Invalid workflow ID: '{text}'.")
        return workflow

    def submit(self) -> Response:
        row, files = _submission(_fields())
        try:
            self.store.add(row)
        except Refused as error:
            raise Problem(400, str(error), errors=[f"HsqlException: {error}"] if error.database else None) from error
        events = {
            "status": row.state, "submission": timestamp(), "submittedFiles": files,
            **{f"labels:{key}": value for key, value in row.labels.items()},
        }  # fmt: skip
        self.store.put(*(Event(row.id, key, value) for key, value in events.items()))
        return reply({"id": row.id, "status": row.state}, 201)

    def status(self, text: str) -> Response:
        workflow = self.known(text)
        return reply({"status": self.store.status(workflow), "id": workflow})

    def metadata(self, text: str) -> Response:
        workflow = self.known(text)
        args = request.args
        return reply(metadata(self.store.events(workflow), args.getlist("includeKey"), args.getlist("excludeKey")))

    def labels(self, text: str) -> Response:
        workflow = self.known(text)
        return reply({"id": workflow, "labels": self.store.labels(workflow)})

    def set_labels(self, text: str) -> Response:
        labels, problems = check_labels(request.get_data(as_text=True))
        if problems:
            raise Problem(400, "\n".join(problems))
        workflow = self.known(text)
        self.store.put(*(Event(workflow, f"labels:{key}", value) for key, value in labels.items()))
        return reply({"id": workflow, "labels": self.store.labels(workflow) | labels})

    def logs(self, text: str) -> Response:
        workflow = self.known(text)
        found = metadata(self.store.events(workflow), ["stdout", "stderr"])
        return reply({"id": workflow} | ({"calls": found["calls"]} if found.get("calls") else {}))

    def outputs(self, text: str) -> Response:
        workflow = self.known(text)
        return reply({"outputs": {}, "id": workflow})

    def failed_jobs(self, text: str) -> Response:
        workflow = self.known(text)
        calls = metadata(self.store.events(workflow)).get("calls", {})
        failed = {name: [e for e in entries if e.get("executionStatus") == "Failed"] for name, entries in calls.items()}
        found = {name: entries for name, entries in failed.items() if entries}
        return reply({workflow: {"calls": found}} if found else {})

    def cost(self, text: str) -> Response:
        workflow = self.known(text)
        status = self.store.status(workflow)
        return reply({"id": workflow, "status": status, "currency": "USD", "cost": 0, "errors": []})

    def timing(self, text: str) -> Response:
        return Response(f"<html><body>{self.known(text)}</body></html>", content_type="text/html; charset=UTF-8")

    def abort(self, text: str) -> Response:
        workflow = self.valid(text)
        if self.store.remove(workflow, ["On Hold", "Submitted"]):
            self.store.put(Event(workflow, "status", "Aborted"))
            return reply({"id": workflow, "status": "Aborted"})
        if self.store.change(workflow, ["Running", "Aborting"], "Aborting"):
            return reply({"id": workflow, "status": "Aborting"})
        raise Problem(404, f"Couldn't abort {workflow} because no workflow with that ID is in progress", "error")

    def release(self, text: str) -> Response:
        workflow = self.known(text)
        if not self.store.change(workflow, ["On Hold"], "Submitted"):
            raise Problem(
                403,
                f"Couldn't change status of workflow {workflow} to 'Submitted' because the workflow is not in "
                "'On Hold' state",
                "error",
            )
        self.store.put(Event(workflow, "status", "Submitted"))
        return reply({"id": workflow, "status": "Submitted"})

    def query(self) -> Response:
        parameters = list(request.args.items(multi=True))
        if request.method == "POST":
            parameters = [item for part in request.get_json(force=True) for item in part.items()]
        query = Query(parameters)
        where = " AND ".join(query.clauses)
        rows, total = self.store.query(where, query.values, query.page_size, (query.page - 1) * query.page_size)
        named = "labels" in query.fields
        results = [_result(row, self.store.labels(row["id"]) if named else None) for row in rows]
        return reply({"results": results, "totalResultsCount": total})

    def backends(self) -> Response:
        names = {"defaultBackend": self.config.default_backend, "supportedBackends": sorted(self.config.backends)}
        return reply(names)

    def describe(self) -> Response:
        """As in Cromwell's REST API documentation; of the answer only what says whether the text is a workflow."""
        source = request.files.get("workflowSource")
        text = source.read().decode() if source else request.form["workflowSource"]
        try:
            plan(text, {})
        except InvalidWorkflow as error:
            return reply({"valid": False, "errors": [str(error)], "validWorkflow": False})
        return reply({"valid": True, "errors": [], "validWorkflow": True})


def _compress(response: Response) -> Response:
    """Only metadata is compressed, 404s of it included."""
    if "/metadata" in request.path and "gzip" in request.headers.get("Accept-Encoding", ""):
        response.set_data(gzip.compress(response.get_data(), 1))
        response.headers["Content-Encoding"] = "gzip"
    return response


def _routes(service: Service) -> Iterable[tuple[str, str, Callable[..., Response]]]:
    base = "/api/workflows/<version>"
    yield "GET", "/", lambda: Response("<title>Swagger UI</title>", content_type="text/html; charset=UTF-8")
    yield "GET", "/engine/<version>/version", lambda: reply({"cromwell": VERSION})
    yield "GET", "/engine/<version>/status", lambda: reply({})
    yield "POST", base, service.submit
    yield "GET", f"{base}/query", service.query
    yield "POST", f"{base}/query", service.query
    yield "GET", f"{base}/backends", service.backends
    yield "POST", "/api/womtool/<version>/describe", service.describe
    for name in ("status", "metadata", "labels", "logs", "outputs", "cost", "timing"):
        yield "GET", f"{base}/<text>/{name}", getattr(service, name)
    yield "GET", f"{base}/<text>/metadata/failed-jobs", service.failed_jobs
    yield "PATCH", f"{base}/<text>/labels", service.set_labels
    yield "POST", f"{base}/<text>/abort", service.abort
    yield "POST", f"{base}/<text>/releaseHold", service.release


def create_app(config: Config, store: Store) -> Flask:
    app = Flask(__name__, static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=None, MAX_FORM_MEMORY_SIZE=64 << 20, MAX_FORM_PARTS=1000)
    for number, (method, path, view) in enumerate(_routes(Service(config, store))):

        def bound(view: Callable[..., Response] = view, version: str = "", **values: str) -> Response:
            return view(**values)

        app.add_url_rule(path, f"route-{number}", bound, methods=[method], provide_automatic_options=False)
    plain = "text/plain; charset=UTF-8"
    missing = "The requested resource could not be found."
    app.register_error_handler(Problem, lambda error: reply(error.body, error.code))
    app.register_error_handler(Unsupported, lambda error: Response(str(error), 415, content_type=plain))
    app.register_error_handler(HTTPException, lambda error: Response(missing, 404, content_type=plain))
    app.after_request(_compress)
    return app
