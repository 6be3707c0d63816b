"""The OpenAPI 3.1 description, made from the models that validate."""

from collections.abc import Mapping, Sequence
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


_TEXT: dict[str, Any] = {"type": "string"}
_MAYBE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_MAYBE_NUMBER, _FLAG = {"type": ["integer", "null"]}, {"type": "integer", "enum": [0, 1]}
_STATE = _TEXT | {"enum": [state.value for state in JobState]}
_LOG_HEADERS = {
    "Pman-Job-State": "the job's state",
    "Pman-Logs-Next": "the value of `since` for what comes next; missing when all has been said",
    "Pman-Logs-Cut": "yes, where output is left out before this text",
}
# Parameter of the query -> what it does, and its schema.
_QUERY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "tail": (
        "How many of the last log lines, at most JOB_LOGS_TAIL.",
        {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    ),
    "state": ("Only jobs in this state.", _STATE),
    "user": ("Only jobs of this user.", _TEXT),
    "image": ("Only jobs whose image has this in its name.", _TEXT),
    "text": ("Only jobs with this in jid, user, image, command or message, in any case.", _TEXT),
    "posted_since": ("Only jobs posted at this time or later.", {"type": "string", "format": "date-time"}),
    "sort": (
        "The field to sort by; -field sorts in reverse. Without it, newest jobs first.",
        {"type": "string", "pattern": f"^-?({'|'.join(SORTED)})$"},
    ),
    "limit": ("The most jobs of a page.", {"type": "integer", "minimum": 1, "maximum": 1000}),
    "after": ("The value of `next` in the previous page.", {"type": "string", "maxLength": 300}),
    "environment": ("1: with the environment's values, for users.", _FLAG),
    "worker": ("Which worker; 0 if not given.", {"type": "integer", "minimum": 0}),
    "since": ("The header Pman-Logs-Next of the previous answer.", _TEXT),
    "follow": ("1: wait up to 20 s for output that is new.", _FLAG),
    "notice": ("1: if earlier output is left out, the first line says so.", _FLAG),
}  # fmt: skip
# Method, path, name, what it is for, the schema that it answers with, the errors beside those that any may answer, and
# its parameters.
_OPERATIONS = (
    ("get", "/api/v1/", "about", "What this pman is", "About", "", ""),
    ("post", "/api/v1/", "submit", "Run a job, once", "Job", "400 409 413 415 500", ""),
    ("get", "/api/v1/backend.json", "backend", "The backend, what it has, and pman's limits", "Backend", "", ""),
    ("get", "/api/v1/jobs/", "list", "pman's jobs", "Page", "400 500",
     "state user image text posted_since sort limit after"),
    ("get", "/api/v1/jobs/{jid}/", "inspect", "All that is known of a job", "JobResource", "404 500", ""),
    ("get", "/api/v1/jobs/{jid}/spec", "spec", "What was submitted", "Spec", "400 404 500", "environment"),
    ("get", "/api/v1/jobs/{jid}/logs", "logs", "What a worker has written", "", "400 404 500",
     "worker since follow notice"),
    ("get", "/api/v1/{jid}/", "read", "A job and its logs", "Job", "400 404 405 500", "tail"),
    ("delete", "/api/v1/{jid}/", "delete", "End and forget a job", "", "404 405 409 500", ""),
)  # fmt: skip


def document(server_has_users: bool) -> dict[str, Any]:
    request = JobRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    for field in request["properties"].values():
        # Generators of clients make a field with a default required, and of a union a class.
        field.pop("default", None)
        field.update(field.pop("anyOf", [{}])[0])
    jid = {"name": "jid", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths: dict[str, Any] = {}
    for method, path, *row in _OPERATIONS:
        paths.setdefault(path, {"parameters": [jid]} if "{jid}" in path else {})[method] = _operation(method, row)
    body = {"required": True, "content": {"application/json": {"schema": _ref("JobRequest")}}}
    paths["/api/v1/"]["post"]["requestBody"] = body
    paths["/api/v1/jobs/{jid}/logs"]["get"]["responses"]["200"] |= {
        "content": {"text/plain": {"schema": _TEXT, "example": "reading the image\n"}},
        "headers": {name: {"description": said, "schema": _TEXT} for name, said in _LOG_HEADERS.items()},
    }
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "pman",
            "version": __version__,
            "description": "Runs jobs on a scheduler, each exactly once.",
        },
        "paths": paths,
        "components": {"schemas": {"JobRequest": request, **_schemas()}},
    }
    if server_has_users:
        result["components"]["securitySchemes"] = {"basic": {"type": "http", "scheme": "basic"}}
        result["security"] = [{"basic": []}]
    return result


def _operation(method: str, row: Sequence[str]) -> dict[str, Any]:
    name, summary, answer, errors, parameters = row
    good: dict[str, Any] = {"description": summary}
    if answer:
        good["content"] = {"application/json": {"schema": _ref(answer)}}
    wrong = {"content": {"application/json": {"schema": _ref("Error")}}}
    responses = {{"post": "201", "delete": "204"}.get(method, "200"): good}
    for error in sorted({*errors.split(), "401", "403", "503"}):
        responses[error] = {"description": _ERRORS[error]} | wrong
    asked = [
        {"name": each, "in": "query", "required": False, "description": _QUERY[each][0], "schema": _QUERY[each][1]}
        for each in parameters.split()
    ]
    return {"operationId": name, "summary": summary, "responses": responses} | ({"parameters": asked} if asked else {})


def _schemas() -> dict[str, Any]:
    job = {name: _TEXT | {"description": text} for name, text in _FIELDS.items()} | {"status": _STATE}
    posted_at = _TEXT | {"description": "when it was submitted, ISO 8601, or empty"}
    sentences = {"type": "object", "additionalProperties": _TEXT}
    message = {"oneOf": [_TEXT, sentences], "description": "a sentence, or one for each wrong field"}
    page = {"jobs": _list(_ref("ListedJob")), "next": _TEXT, "truncated": {"type": "boolean"}}
    values = {"type": "boolean", "description": "whether the parts have the values of the job's environment"}
    parts = {**sentences, "examples": [{"spec": "#!/bin/bash\n"}]}
    return {
        "Job": _object(job),
        "ListedJob": _object(job | {"posted_at": posted_at, "user": _MAYBE_TEXT}),
        "Spec": _object({"jid": _TEXT, "target": _TEXT, "parts": parts, "environment": values}),
        "JobResource": {**_resource(), "examples": [EXAMPLE]},
        "About": _object(dict.fromkeys(("server_version", "container_env", "storage_type"), _TEXT)),
        "Backend": {**_backend(), "examples": [BACKEND]},
        "Page": _object(page | {"counts": _object({state.value: {"type": "integer"} for state in JobState})}),
        "Error": _object({"message": message}),
    }


def _resource() -> dict[str, Any]:
    """The schema of `pman.status.to_resource` and what `service.jobs` adds to it."""
    reason = _MAYBE_TEXT | {"enum": [*(reason.value for reason in Reason), None]}
    moment, texts = _MAYBE_TEXT | {"format": "date-time"}, {"type": ["array", "null"], "items": _TEXT}
    ends = {"reason": reason, "exit_code": _MAYBE_NUMBER, "started_at": moment, "finished_at": moment}
    maybe = _MAYBE_TEXT | {"enum": [*_STATE["enum"], None]}
    worker = {"index": {"type": "integer"}, "state": maybe, **ends, "node": _MAYBE_TEXT, "message": _TEXT}
    plain = dict.fromkeys(("jid", "message", "image", "backend"), _TEXT)
    names = dict.fromkeys(("user", "kind", "partition", "backend_id"), _MAYBE_TEXT)
    limits = dict.fromkeys(("cpu_millicores", "memory_mib", "gpu_count"), _MAYBE_NUMBER)
    links = dict.fromkeys(("logs", "spec"), _TEXT | {"description": "relative to this address"})
    return _object(
        {"state": _STATE, **plain, **ends, "posted_at": moment, "argv": texts, **names, "nodes": texts}
        | {"resources": _object(limits), "time_limit_minutes": _MAYBE_NUMBER, "links": _object(links)}
        | {"workers": _list(_object(worker))}
    )


def _backend() -> dict[str, Any]:
    """The schema of `service.overview.about`."""
    place = dict.fromkeys(("name", "kind", "state", "note"), _TEXT) | {"cpus": {"type": ["number", "null"]}}
    place |= dict.fromkeys(("memory_mib", "gpus", "time_limit_minutes"), _MAYBE_NUMBER)
    limits = {name: {"type": "boolean"} if v is True else _MAYBE_NUMBER for name, v in BACKEND["limits"].items()}
    asked = {"asked_at": _MAYBE_TEXT | {"format": "date-time"}, "ready": {"type": ["boolean", "null"]}}
    return _object(
        dict.fromkeys(("backend", "server_version", "message"), _TEXT)
        | {**asked, "version": _MAYBE_TEXT, "places": _list(_object(place)), "limits": _object(limits)}
        | {"unknown": _list(_TEXT) | {"description": "what the backend does not tell"}}
    )


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": sorted(properties),
        "additionalProperties": False,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
