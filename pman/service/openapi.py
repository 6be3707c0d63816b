"""The OpenAPI 3.1 description, made from the models that validate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pman import __version__
from pman.job import JobRequest
from pman.status import JobState

_FIELDS = {
    "jid": "what ChRIS calls the job",
    "image": "its container image",
    "cmd": "its command line, shell-quoted into one string",
    "message": "one sentence about its state",
    "timestamp": "when it ended, ISO 8601, or empty",
    "logs": "the end of its output",
}
_ERRORS = {
    "400": "The request is wrong; `message` says which field, and what would be valid.",
    "401": "A user and a password are needed.",
    "403": "The site refuses this job, pman is called by another name, or a browser asks for another website.",
    "404": "There is no such job.",
    "405": "The path knows no such method.",
    "409": "Another job has that jid.",
    "413": "The body, or what it renders to, is too large.",
    "415": "The body has a Content-Encoding.",
    "500": "The backend or a template failed.",
    "503": "The backend does not answer, or too many requests are being served.",
}


def document(server_has_users: bool) -> dict[str, Any]:
    """The description of this service as a JSON-compatible dict."""
    request = JobRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    for field in request["properties"].values():
        # Generators of clients make a field with a default required, and of a union a class.
        field.pop("default", None)
        field.update(field.pop("anyOf", [{}])[0])
    jid = {"name": "jid", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    tail = _query(
        "tail", "Fewer log lines than JOB_LOGS_TAIL.", {"type": "integer", "minimum": 0, "maximum": 999_999_999}
    )
    state = _query("state", "Only jobs in this state.", {"type": "string", "enum": [s.value for s in JobState]})
    limit = _query("limit", "At most so many jobs.", {"type": "integer", "minimum": 1, "maximum": 1000})
    after = _query("after", "The `next` of the page before.", {"type": "string", "maxLength": 300})
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
            "/api/v1/jobs/": {
                "get": _operation("list", "pman's jobs, newest first", "200", _ref("Page"), "400", "500")
                | {"parameters": [state, limit, after]},
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
    }
    return {
        "Job": _object(fields | {"status": status}),
        "ListedJob": _object(fields | {"status": status, "posted_at": posted_at}),
        "About": _object(about),
        "Page": _object(page),
        "Error": _object({"message": message}),
    }


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
