"""A job request as pfcon sends it, judged field by field, and the frozen Job that templates and backends see."""

import hashlib
import json
import logging
import math
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from pman.errors import BadRequest
from pman.policy import Policy
from pman.settings import Settings, must

log = logging.getLogger(__name__)

INCOMING = "/share/incoming"
OUTGOING = "/share/outgoing"
MAX_BODY_BYTES = 4 * 1024 * 1024
# Linux takes no longer single argument or NAME=value: MAX_ARG_STRLEN, 32 pages, the final NUL included (execve(2)).
MAX_ARG_BYTES = 131_071
MAX_NAME_BYTES = 255  # of a file or directory; NAME_MAX of limits.h
RESERVED_JIDS = frozenset({".", "..", "jobs", "openapi.json", "backend.json"})

_ENV_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# The grammar of https://pkg.go.dev/github.com/distribution/reference: [domain/]path[:tag][@digest].
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_PATH = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>(?:{_DOMAIN}/)?{_PATH}(?:/{_PATH})*)"
    r"(?::\w[\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)


def _text(value: str) -> str:
    """A string that every scheduler, file system and shell can carry: no NUL, no lone surrogate."""
    if "\0" in value:
        raise ValueError("holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no valid Unicode") from None
    return value


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,12}", value, re.ASCII) else value


def _jid(value: str) -> str:
    jid = value.lstrip("/")
    bad = [c for c in jid if c in "/?#%" or c.isspace() or not c.isprintable()]
    if not jid or len(jid) > 200 or bad or jid in RESERVED_JIDS:
        raise ValueError("is not usable in a URL")
    return jid


def image_reference(value: str) -> str:
    """The value, where it is an OCI image reference. Raises ValueError."""
    match = _IMAGE.fullmatch(value) if len(value) <= 600 else None
    if not match or len(match["name"]) > 255:
        raise ValueError("is no OCI image reference")
    return value


def _relative(value: str) -> str:
    path = posixpath.normpath(value) if value else "."
    if path == "." or path.startswith("/") or ".." in value.split("/"):
        raise ValueError("does not name a directory below the store")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in path.split("/")) or len(path.encode()) > 3072:
        raise ValueError("is longer than a path may be")
    return path


_SHORT_ENOUGH = must(
    lambda value: len(value.encode()) <= MAX_ARG_BYTES,
    f"holds an argument longer than {MAX_ARG_BYTES} bytes, the most that Linux takes",
)
_IS_NAMED = must(_ENV_ENTRY.match, "does not begin with NAME=")  # never repeats the entry: it may be a secret
# env(1), which sets a job's environment, would take other words for its own.
_HAS_PROGRAM = must(
    lambda words: words and words[0] and not words[0].startswith("-") and "=" not in words[0], "names no program"
)
Text = Annotated[str, Field(strict=True), AfterValidator(_text)]
Argument = Annotated[Text, _SHORT_ENOUGH]
StorePath = Annotated[Text, AfterValidator(_relative)]
Word = Annotated[Text, must(re.compile(r"[A-Za-z0-9][A-Za-z0-9._,@+-]{0,199}").fullmatch, "is no name")]
EnvEntry = Annotated[Text, _IS_NAMED, _SHORT_ENOUGH, Field(json_schema_extra={"pattern": f"^{_ENV_ENTRY.pattern}"})]
Item = TypeVar("Item")
# One sentence a field: an error for each of the two million wrong items that a body may hold would take 2 GiB.
Items = Annotated[list[Item], FailFast()]
Integer = Annotated[int, BeforeValidator(_integer)]
Minutes = Annotated[int, Field(strict=True, ge=1, le=525_600), BeforeValidator(_integer)]


class JobRequest(BaseModel):
    """The body of POST. A field's description completes "must be ..." in the sentence that rejects it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    jid: Annotated[Text, AfterValidator(_jid)] = Field(
        description="1 to 200 characters without / ? # %, white space or control characters, "
        f"and not one of {' '.join(sorted(RESERVED_JIDS))}",
        json_schema_extra={"pattern": r"^/*[^/?#%\s\u0000-\u0020\u007f-\u00a0]{1,200}$"},
    )
    args: Items[Argument] = Field(description="a list of strings, which may be empty")
    args_path_flags: Items[Text] = Field([], description="a list of those flags in args that a path follows")
    auid: Text = Field(description="a string, the ChRIS user")
    number_of_workers: Integer = Field(strict=True, ge=1, le=1024, description="an integer from 1 to 1024")
    cpu_limit: Integer = Field(
        strict=True, ge=1, le=10_000_000, description="an integer of millicores from 1 to 10000000 (1000 is one core)"
    )
    memory_limit: Integer = Field(
        strict=True, ge=1, le=100_000_000, description="an integer of MiB from 1 to 100000000"
    )
    gpu_limit: Integer = Field(strict=True, ge=0, le=1024, description="an integer from 0 to 1024")
    image: Annotated[Text, AfterValidator(image_reference)] = Field(
        description="an OCI image reference such as docker.io/fnndsc/pl-simpledsapp:2.1.0",
        json_schema_extra={"pattern": f"^{_IMAGE.pattern.replace('?P<name>', '?:')}$"},
    )
    entrypoint: Annotated[Items[Argument], _HAS_PROGRAM] = Field(
        description="a list of strings, of which the first names a program, has no = and does not begin with -",
        json_schema_extra={"minItems": 1},  # not prefixItems, which clients' generators read in different ways
    )
    type: Literal["ds", "fs", "ts"] = Field(description="one of ds, fs, ts")
    env: Items[EnvEntry] = Field(
        [],
        description="a list of NAME=value strings, NAME made of letters, digits and _ and not beginning with a digit",
    )
    input_dir: StorePath | None = Field(None, description="a path relative to the store, without ..")
    output_dir: StorePath | None = Field(None, description="a path relative to the store, without ..")
    time_limit_minutes: Minutes | None = Field(None, description="an integer of minutes from 1 to 525600")
    partition: Word | None = Field(None, description="the name of a partition: letters, digits and . _ , @ + -")
    append_directories: bool = Field(
        True, strict=True, description="true, or false where the command does not end with its directories"
    )


def parse_request(body: bytes) -> JobRequest:
    """The request in a JSON body of at most 4 MiB. Raises BadRequest with a sentence for each field that is wrong."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
        raise BadRequest(f"The body must be JSON: {said}.") from None
    return validate(data)


def validate(data: object) -> JobRequest:
    """The request that `data` (decoded JSON) holds. Unknown fields are ignored with a warning in the log."""
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object whose fields describe one job.")
    unknown = sorted(str(name)[:60] for name in set(data) - set(JobRequest.model_fields))
    if unknown:
        log.warning("unknown request fields are ignored: %s", ascii(", ".join(unknown[:20])))
    try:
        request = JobRequest.model_validate(data)
    except ValidationError as error:
        raise BadRequest(dict(_sentences(error))) from None
    if len(f"key-{request.jid}".encode()) > MAX_NAME_BYTES and not (request.input_dir and request.output_dir):
        raise BadRequest({"jid": "is too long for the name of a directory, so input_dir and output_dir must be given."})
    return request


def _sentences(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Field and sentence, for the first error of each field."""
    first = {str(item["loc"][0]): item for item in reversed(error.errors(include_url=False))}
    for name, item in reversed(first.items()):
        hint = JobRequest.model_fields[name].description
        if item["type"] == "missing":
            yield name, f"is required and must be {hint}."
        elif item["type"] == "value_error":
            index = item["loc"][-1]
            place = f"item {index + 1} " if isinstance(index, int) else ""
            yield name, f"{place}{item['ctx']['error']}; it must be {hint}."
        else:
            yield name, f"must be {hint}."


_NO_POLICY = Policy()


@dataclass(frozen=True, slots=True)
class Job:
    """A job as templates and backends see it: everything decided, nothing left to look up.

    argv is the whole command line with paths as the container sees them. `partition` and `time_limit_minutes` are
    None where neither the request nor the settings name one. `name` is a DNS label, unique per jid, for backends
    whose objects need such a name; the jid is what users see.
    """

    jid: str  # what ChRIS calls the job
    name: str  # the jid as a DNS label of at most 50 characters
    digest: str  # hexadecimal SHA-256 of the request; equal requests have equal digests
    auid: str  # the ChRIS user
    kind: str  # ds, fs or ts
    image: str  # OCI image reference
    argv: tuple[str, ...]  # the command line: entrypoint, arguments, directories
    env: tuple[tuple[str, str], ...]  # environment variables, in order, each name once
    workers: int  # copies of the command that run in parallel
    cpu_millicores: int  # CPU limit of each worker; 1000 is one core
    memory_mib: int  # memory limit of each worker
    gpu_count: int  # GPUs of each worker
    time_limit_minutes: int | None  # wall clock time after which the job is ended
    partition: str | None  # SLURM partition
    input_dir: str  # relative to the store
    output_dir: str  # relative to the store
    uid: int | None  # user that the job runs as, from CONTAINER_USER
    gid: int | None  # group that the job runs as, from CONTAINER_USER
    policy: Policy = _NO_POLICY  # what the rules of site.yaml decided beside the above

    @property
    def cpu_cores(self) -> int:
        """Whole cores, rounded up: what schedulers without fractions of a core need."""
        return math.ceil(self.cpu_millicores / 1000)

    @property
    def auid_label(self) -> str:
        """The ChRIS user as the value of a label: at most 63 of the characters A-Z a-z 0-9 . _ -, others as _."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", self.auid)[:63].strip("._-")

    @property
    def cmd(self) -> str:
        """The command line, shell-quoted into one string."""
        return shlex.join(self.argv)


def make_job(request: JobRequest, settings: Settings) -> Job:
    digest = _digest(request)
    user = settings.container_user
    uid, gid = (_draw(part, request.jid) if part else None for part in (user or ":").split(":"))
    env = dict(entry.split("=", 1) for entry in request.env)
    if settings.enable_home_workaround:
        env.setdefault("HOME", "/tmp")  # noqa: S108
    return Job(
        jid=request.jid,
        name=backend_name(request.jid),
        digest=digest,
        auid=request.auid,
        kind=request.type,
        image=request.image,
        argv=tuple(_argv(request)),
        env=tuple(env.items()),
        workers=request.number_of_workers,
        cpu_millicores=request.cpu_limit,
        memory_mib=request.memory_limit,
        gpu_count=request.gpu_limit,
        time_limit_minutes=_time_limit(request, settings),
        partition=request.partition or settings.slurm_partition,
        input_dir=_input_dir(request),
        output_dir=_output_dir(request),
        uid=uid,
        gid=gid,
    )


def backend_name(jid: str) -> str:
    """A DNS label of at most 50 characters, so that `<name>-<index>` is one too (63, RFC 1123), unique per jid.

    A jid that is such a label stays as it is; any other is sanitised and gets ten digits of its SHA-256, and so does
    one that ends like that, so that no two jids meet.
    """
    if len(jid) <= 50 and _DNS_LABEL.fullmatch(jid) and not re.search(r"-[0-9a-f]{10}$", jid):
        return jid
    clean = re.sub(r"[^a-z0-9]+", "-", jid.lower()).strip("-")[:39].strip("-") or "job"
    return f"{clean}-{hashlib.sha256(jid.encode()).hexdigest()[:10]}"


def _digest(request: JobRequest) -> str:
    # Fields that younger versions have added count only where they are used: a job of an older pman keeps its digest.
    later = {"append_directories"} if request.append_directories else set()
    fields = request.model_dump(exclude=later) | {"input_dir": _input_dir(request), "output_dir": _output_dir(request)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _input_dir(request: JobRequest) -> str:
    return request.input_dir or f"key-{request.jid}/incoming"


def _output_dir(request: JobRequest) -> str:
    return request.output_dir or f"key-{request.jid}/outgoing"


def _argv(request: JobRequest) -> Iterator[str]:
    flags = frozenset(request.args_path_flags)
    yield from request.entrypoint
    after_flag = False
    for arg in request.args:
        yield INCOMING if after_flag else arg
        after_flag = not after_flag and arg in flags
    if request.append_directories:
        yield from (INCOMING, OUTGOING) if request.type == "ds" else (OUTGOING,)


def _time_limit(request: JobRequest, settings: Settings) -> int | None:
    limit = request.time_limit_minutes or settings.timelimit_minutes
    most = settings.timelimit_max_minutes
    return most if most is not None and (limit is None or limit > most) else limit


def _draw(numbers: str, jid: str) -> int:
    low, _, high = numbers.partition("-")
    span = int(high or low) - int(low) + 1
    return int(low) + int(hashlib.sha256(jid.encode()).hexdigest(), 16) % max(span, 1)
