"""What pman writes into Cromwell's labels, which are all that it knows of a job later."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from pman.errors import Misconfigured
from pman.job import Job
from pman.status import Details, JobStatus, workers_alike

PREFIX = "org.chrisproject.pman."  # clusters hold jobs of the older pman under `name` alone
NAME, ATTEMPT, DIGEST, MANAGED, DELETED, IMAGE, CMD, USER, KIND, VARIABLES = (
    PREFIX + word
    for word in ("name", "attempt", "digest", "managed", "deleted", "image", "cmd", "auid", "kind", "variables")
)
_MIB = {"MB": 1, "MiB": 1, "GB": 1024, "GiB": 1024}  # tests/recordings/cromwell: 100M is told as 0.09765625 GB
LABEL_MAX = 255  # characters of a label's key or value
CMD_LABELS = 16  # a longer command line goes into the workflow's options: labels are read with every poll
_NAMESPACE = uuid.UUID("5c1e9d52-3f57-5d0b-9a0e-6f2c6b7d1a43")


def workflow_id(jid: str, attempt: int) -> str:
    """The id of the jid's n-th workflow, the same on every replica."""
    return str(uuid.uuid5(_NAMESPACE, f"{attempt}:{jid}"))


@dataclass(frozen=True, slots=True)
class Workflow:
    """A row of Cromwell's query."""

    id: str
    status: str
    submission: str  # ISO 8601; "" where a crash lost it
    end: str
    labels: Mapping[str, str]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The row as Cromwell answers it; of its fields only `id` and `status` are always there."""
        return cls(row["id"], row["status"], row.get("submission", ""), row.get("end", ""), row.get("labels", {}))

    @property
    def attempt(self) -> int:
        """How often the jid was posted up to this workflow; 0 for one of the older pman."""
        text = self.labels.get(ATTEMPT, "0")
        return int(text) if text.isdecimal() else 0

    @property
    def dead(self) -> bool:
        """Whether DELETE has taken it away."""
        return DELETED in self.labels

    @property
    def posted_at(self) -> datetime | None:
        return datetime.fromisoformat(self.submission) if self.submission else None

    @property
    def user(self) -> str | None:
        """The ChRIS user; None where the label does not say."""
        return str(json.loads(self.labels[USER])) if USER in self.labels else None

    def keys_of_identity(self) -> Sequence[str]:
        """Metadata that has the image and command line of a workflow whose labels do not: read only for those."""
        if MANAGED not in self.labels:
            return ("runtimeAttributes", "commandLine")
        return () if CMD in self.labels else ("submittedFiles",)

    def identity(self, meta: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Image and command line, from the labels or from metadata with keys_of_identity()."""
        if MANAGED not in self.labels:
            call = calls[-1] if calls else {}
            attributes = call.get("runtimeAttributes", {})
            return attributes.get("docker", attributes.get("image", "")), call.get("commandLine", "")
        if CMD in self.labels:
            return _joined(IMAGE, self.labels), _joined(CMD, self.labels)
        options = json.loads(meta.get("submittedFiles", {}).get("options") or "{}")
        return _joined(IMAGE, self.labels), options.get(CMD, "")


def of_site(labels: Mapping[str, str]) -> dict[str, str]:
    """JOB_LABELS. Raises Misconfigured where Cromwell would refuse one."""
    for text in (text for pair in labels.items() for text in pair):
        if len(text) > LABEL_MAX:
            raise Misconfigured(f"JOB_LABELS: Cromwell takes {LABEL_MAX} characters, not {len(text)}: {text[:40]}...")
    return dict(labels)


def of_job(job: Job, attempt: int) -> dict[str, str]:
    """The labels of a job's n-th workflow; without CMD where the command line is too long for labels."""
    own = {NAME: job.jid, ATTEMPT: str(attempt), DIGEST: job.digest, MANAGED: "yes"}
    own |= {KIND: job.kind, VARIABLES: str(len(job.env))}
    if len(user := json.dumps(job.auid)) <= LABEL_MAX:
        own[USER] = user
    cmd = _pieces(CMD, job.cmd)
    return own | _pieces(IMAGE, job.image) | (cmd if len(cmd) <= CMD_LABELS else {})


def details(status: JobStatus, found: Workflow, attributes: Mapping[str, Any]) -> Details:
    """What labels and the attributes of the task say; Cromwell writes attributes as texts."""

    def number(name: str) -> int | None:
        text = str(attributes.get(name, ""))
        return int(text) if text.isdecimal() else None

    amount, _, unit = str(attributes.get("memory", "")).partition(" ")
    memory = round(float(amount) * _MIB[unit]) if unit in _MIB else number("memory_mb")

    cores = number("cpu")
    return Details(
        user=found.user,
        kind=found.labels.get(KIND),
        cpu_millicores=cores * 1000 if cores else None,
        memory_mib=memory,
        gpu_count=number("gpu_limit"),
        time_limit_minutes=number("timelimit"),
        partition=attributes.get("slurm_partition") or None,
        backend_id=found.id,
        workers=workers_alike(status, number("number_of_workers") or 1),
    )


def of_grave(jid: str, attempt: int) -> dict[str, str]:
    """The labels of a workflow that must never count as a job."""
    return {NAME: jid, ATTEMPT: str(attempt), DELETED: "yes"}


def _pieces(key: str, text: str) -> dict[str, str]:
    """A text of any length as labels: ASCII with JSON's escapes, cut. What databases do to other text varies."""
    escaped = json.dumps(text)[1:-1]
    parts = [escaped[i : i + LABEL_MAX] for i in range(0, len(escaped), LABEL_MAX)] or [""]
    return {f"{key}.{i}" if i else key: part for i, part in enumerate(parts)}


def _joined(key: str, labels: Mapping[str, str]) -> str:
    keys = [key, *(f"{key}.{i}" for i in range(1, CMD_LABELS))]
    return str(json.loads(f'"{"".join(labels.get(k, "") for k in keys)}"'))
