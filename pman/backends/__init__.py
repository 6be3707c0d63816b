"""The seam between the service and the schedulers: one protocol, and one table of who implements it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from pman.job import Job
from pman.settings import Settings
from pman.status import JobStatus
from pman.templating.render import Spec


class Backend(Protocol):
    """A scheduler. Shared by all threads; answers in bounded time; raises pman's errors and returns pman's types.

    Only pman's own jobs exist for it, found by exactly their jid: NotFound for anything else.
    """

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        """Run `spec`, exactly once per jid however often this is called, by however many replicas.

        The job that exists when its digest is the same; Conflict when it is another. Safe to repeat after any error.
        """

    def status(self, jid: str) -> JobStatus:
        """What became of the job. Final only when nothing writes output any more."""

    def logs(self, status: JobStatus, max_lines: int) -> str:
        """The end of the job's output; "" while there is none. `status` is what `status()` returned."""

    def delete(self, jid: str) -> None:
        """End the job and forget it: afterwards `status` raises NotFound and the jid may be submitted again."""

    def jobs(self, limit: int) -> list[JobStatus]:
        """pman's jobs by its labels, newest first, at most `limit` of them; in one or two calls of the backend."""

    def ping(self) -> None:
        """Return when the backend can take jobs, else raise with the sentence that says why not."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table: the module (with `create(settings) -> Backend`) and the target it submits."""

    module: str
    target: str


BACKENDS: Mapping[str, Entry] = {
    "local": Entry("pman.backends.local", "local"),
    "cromwell": Entry("pman.backends.cromwell", "wdl"),
    "kubernetes": Entry("pman.backends.kubernetes", "k8s"),
    "swarm": Entry("pman.backends.engine.swarm", "swarm"),
    "slurm": Entry("pman.backends.slurm", "slurm"),
    "docker": Entry("pman.backends.engine.docker", "docker"),
    "podman": Entry("pman.backends.engine.docker", "docker"),
}


def load(settings: Settings) -> Backend:
    """The backend that CONTAINER_ENV names. Its client library is imported here and nowhere else."""
    module = importlib.import_module(BACKENDS[settings.container_env].module)
    return cast(Backend, module.create(settings))
