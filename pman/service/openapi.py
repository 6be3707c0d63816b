"""The OpenAPI 3.1 description, made from the models that validate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pman import __version__
from pman.job import JobRequest
from pman.status import JobState, Reason

_FIELDS = {
    "jid": "what ChRIS calls the job",
    "image": "its container image",
    "cmd": "its command line, shell-quoted into one string",
    "message": "one sentence about its state",
    "timestamp": "when it ended, ISO 8601, or empty",
    "logs": "the end of its output",
}
SORTED = ("jid", "state", "user", "posted_at", "finished_at", "image", "message")  # what the listing is sorted by
_ERRORS = {
    "400": "The request is wrong; `message` says which field, and what would be valid.",
    "401": "A user and a password are needed.",
    "403": "The site refuses this job, pman is called by another name, or a browser calls from another website.",
    "404": "There is no such job.",
    "405": "This path does not have that method.",
    "409": "Another job has that jid.",
    "413": "The body, or what it renders to, is too large.",
    "415": "The body has a Content-Encoding.",
    "500": "The backend or a template failed.",
    "503": "The backend does not answer, or too many requests are being served.",
}
EXAMPLE = {
    "jid": "chris-jid-42", "state": "finishedWithError", "reason": "out_of_memory", "exit_code": 137,
    "message": "The job exceeded its memory limit of 64 MiB (out of memory, exit code 137).",
    "posted_at": "2026-11-30T12:00:00+00:00", "started_at": "2026-11-30T12:00:02+00:00",
    "finished_at": "2026-11-30T12:01:00+00:00", "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
    "argv": ["simpledsapp", "/share/incoming", "/share/outgoing"],
    "resources": {"cpu_millicores": 1000, "memory_mib": 64, "gpu_count": 0},
    "user": "chris", "kind": "ds", "time_limit_minutes": 60, "partition": None, "backend_id": "3f1c0a",
    "nodes": ["node1"],
    "workers": [
        {
            "index": 0, "state": "finishedWithError", "reason": "out_of_memory", "exit_code": 137,
            "started_at": "2026-11-30T12:00:02+00:00", "finished_at": "2026-11-30T12:01:00+00:00", "node": "node1",
            "message": "The job exceeded its memory limit of 64 MiB (out of memory, exit code 137).",
        }
    ],
    "backend": "docker", "links": {"logs": "logs", "spec": "spec"},
}  # fmt: skip
BACKEND: dict[str, Any] = {
    "backend": "slurm", "server_version": __version__, "asked_at": "2026-11-30T12:00:00+00:00", "ready": True,
    "message": "", "version": "SLURM 24.11.5",
    "places": [
        {
            "name": "main", "kind": "partition", "state": "UP", "cpus": 64, "memory_mib": 256000, "gpus": 0,
            "time_limit_minutes": 2880, "note": "the default; 3 of 12 nodes are idle",
        }
    ],
    "unknown": [],
    "limits": {
        "time_limit_minutes": 60, "max_time_limit_minutes": None, "cpu_and_memory": True, "requests_at_once": 40,
        "log_lines": 1000, "log_kib": 1024, "listed_jobs": 5000, "request_kib": 4096, "spec_kib": 4096,
    },
}  # fmt: skip


def document(server_has_users: bool) -> dict[str, Any]:
    """The description of this service as a JSON-compatible dict."""
    request = JobRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    for field in request["properties"].values():
        # Generators of clients make a field with a default required, and of a union a class.
        field.pop("default", None)
        field.update(field.pop("anyOf", [{}])[0])
    jid = {"name": "jid", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    lines = {"type": "integer", "minimum": 0, "maximum": 999_999_999}
    tail = _query("tail", "How many of the last log lines, at most JOB_LOGS_TAIL.", lines)
    state = _query("state", "Only jobs in this state.", {"type": "string", "enum": [s.value for s in JobState]})
    limit = _query("limit", "The most jobs of a page.", {"type": "integer", "minimum": 1, "maximum": 1000})
    flag = {"type": "integer", "enum": [0, 1]}
    filters = [
        _query("user", "Only jobs of this user.", {"type": "string"}),
        _query("image", "Only jobs whose image has this in its name.", {"type": "string"}),
        _query("text", "Only jobs with this in jid, user, image, command or message, in any case.", {"type": "string"}),
        _query("posted_since", "Only jobs posted at this time or later.", {"type": "string", "format": "date-time"}),
    ]
    order = {"type": "string", "pattern": f"^-?({'|'.join(SORTED)})$"}
    sort = _query("sort", "The field to sort by; -field sorts in reverse. Without it, newest jobs first.", order)
    after = _query("after", "The value of `next` in the previous page.", {"type": "string", "maxLength": 300})
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "pman",
            "version": __version__,
            "description": "Runs jobs on a scheduler, each exactly once.",
        },
        "paths": {
            "/api/v1/": {
                "get": _operation("about", "What this pman is", "200", _ref("About")),
                "post": _operation("submit", "Run a job, once", "201", _ref("Job"), "400", "409", "413", "415", "500")
                | {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref("JobRequest")}}}},
            },
            "/api/v1/backend.json": {
                "get": _operation("backend", "The backend, what it has, and pman's limits", "200", _ref("Backend")),
            },
            "/api/v1/jobs/": {
                "get": _operation("list", "pman's jobs", "200", _ref("Page"), "400", "500")
                | {"parameters": [state, *filters, sort, limit, after]},
            },
            "/api/v1/jobs/{jid}/": {
                "parameters": [jid],
                "get": _operation("inspect", "All that is known of a job", "200", _ref("JobResource"), "404", "500"),
            },
            "/api/v1/jobs/{jid}/spec": {
                "parameters": [jid],
                "get": _operation("spec", "What was submitted", "200", _ref("Spec"), "400", "404", "500")
                | {"parameters": [_query("environment", "1: with the environment's values, for users.", flag)]},
            },
            "/api/v1/jobs/{jid}/logs": {
                "parameters": [jid],
                "get": _text_operation("logs", "What a worker has written", "400", "404", "500")
                | {
                    "parameters": [
                        _query("worker", "Which worker; 0 if not given.", {"type": "integer", "minimum": 0}),
                        _query("since", "The header Pman-Logs-Next of the previous answer.", {"type": "string"}),
                        _query("follow", "1: wait up to 20 s for output that is new.", flag),
                        _query("notice", "1: if earlier output is left out, the first line says so.", flag),
                    ]
                },
            },
            "/api/v1/{jid}/": {
                "parameters": [jid],
                "get": _operation("read", "A job and its logs", "200", _ref("Job"), "400", "404", "405", "500")
                | {"parameters": [tail]},
                "delete": _operation("delete", "End and forget a job", "204", None, "404", "405", "409", "500"),
            },
        },
        "components": {"schemas": {"JobRequest": request, **_schemas()}},
    }
    if server_has_users:
        result["components"]["securitySchemes"] = {"basic": {"type": "http", "scheme": "basic"}}
        result["security"] = [{"basic": []}]
    return result


def _schemas() -> dict[str, Any]:
    fields = {name: {"type": "string", "description": text} for name, text in _FIELDS.items()}
    status = {"type": "string", "enum": [state.value for state in JobState]}
    posted_at = {"type": "string", "description": "when it was submitted, ISO 8601, or empty"}
    about = {name: {"type": "string"} for name in ("server_version", "container_env", "storage_type")}
    sentences = {"type": "object", "additionalProperties": {"type": "string"}}
    message = {"oneOf": [{"type": "string"}, sentences], "description": "a sentence, or one for each wrong field"}
    page = {
        "jobs": {"type": "array", "items": _ref("ListedJob")},
        "next": {"type": "string"},
        "truncated": {"type": "boolean"},
        "counts": _object({state.value: {"type": "integer"} for state in JobState}),
    }
    spec = {
        "jid": {"type": "string"},
        "target": {"type": "string"},
        "parts": {**sentences, "examples": [{"spec": "#!/bin/bash\n"}]},
        "environment": {"type": "boolean", "description": "whether the parts have the values of the job's environment"},
    }
    return {
        "Job": _object(fields | {"status": status}),
        "ListedJob": _object(fields | {"status": status, "posted_at": posted_at, "user": {"type": ["string", "null"]}}),
        "Spec": _object(spec),
        "JobResource": {**_resource(), "examples": [EXAMPLE]},
        "About": _object(about),
        "Backend": {**_backend(), "examples": [BACKEND]},
        "Page": _object(page),
        "Error": _object({"message": message}),
    }


def _resource() -> dict[str, Any]:
    """The schema of `pman.status.to_resource` and what `service.jobs` adds to it."""
    state = {"type": "string", "enum": [state.value for state in JobState]}
    reason = {"type": ["string", "null"], "enum": [*(reason.value for reason in Reason), None]}
    moment = {"type": ["string", "null"], "format": "date-time"}
    text, number = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    texts = {"type": ["array", "null"], "items": {"type": "string"}}
    ends = {"reason": reason, "exit_code": number, "started_at": moment, "finished_at": moment}
    maybe = {**state, "type": ["string", "null"], "enum": [*state["enum"], None]}
    worker = {"index": {"type": "integer"}, "state": maybe, **ends, "node": text, "message": {"type": "string"}}
    plain = {name: {"type": "string"} for name in ("jid", "message", "image", "backend")}
    names = dict.fromkeys(("user", "kind", "partition", "backend_id"), text)
    limits = dict.fromkeys(("cpu_millicores", "memory_mib", "gpu_count"), number)
    links = {name: {"type": "string", "description": "relative to this address"} for name in ("logs", "spec")}
    return _object(
        {"state": state, **plain, **ends, "posted_at": moment, "argv": texts, **names, "nodes": texts}
        | {"resources": _object(limits), "time_limit_minutes": number, "links": _object(links)}
        | {"workers": {"type": "array", "items": _object(worker)}}
    )


def _backend() -> dict[str, Any]:
    """The schema of `service.overview.about`."""
    text, number = {"type": ["string", "null"]}, {"type": ["integer", "null"]}
    place = {name: {"type": "string"} for name in ("name", "kind", "state", "note")}
    sizes = {
        "cpus": {"type": ["number", "null"]},
        **dict.fromkeys(("memory_mib", "gpus", "time_limit_minutes"), number),
    }
    limits = {name: {"type": "boolean"} if value is True else number for name, value in BACKEND["limits"].items()}
    return _object(
        {name: {"type": "string"} for name in ("backend", "server_version", "message")}
        | {"asked_at": {**text, "format": "date-time"}, "ready": {"type": ["boolean", "null"]}, "version": text}
        | {"places": {"type": "array", "items": _object(place | sizes)}, "limits": _object(limits)}
        | {"unknown": {"type": "array", "items": {"type": "string"}, "description": "what the backend does not tell"}}
    )


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": sorted(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _text_operation(name: str, summary: str, *errors: str) -> dict[str, Any]:
    """Of an operation that answers with text."""
    headers = {
        "Pman-Job-State": "the job's state",
        "Pman-Logs-Next": "the value of `since` for what comes next; missing when all has been said",
        "Pman-Logs-Cut": "yes, where output is left out before this text",
    }
    operation = _operation(name, summary, "200", None, *errors)
    operation["responses"]["200"] |= {
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "reading the image\n"}},
        "headers": {each: {"description": text, "schema": {"type": "string"}} for each, text in headers.items()},
    }
    return operation


def _operation(name: str, summary: str, code: str, answer: dict[str, str] | None, *errors: str) -> dict[str, Any]:
    """errors: beside those that any operation may answer."""
    good: dict[str, Any] = {"description": summary}
    if answer:
        good["content"] = {"application/json": {"schema": answer}}
    wrong = {"content": {"application/json": {"schema": _ref("Error")}}}
    responses = {code: good} | {
        error: {"description": _ERRORS[error]} | wrong for error in sorted({*errors, "401", "403", "503"})
    }
    return {"operationId": name, "summary": summary, "responses": responses}
