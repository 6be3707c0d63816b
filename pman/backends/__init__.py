"""The schedulers: one protocol for all of them, a package for each, and the table that names them.

What is particular to a scheduler stays in its package, its rules about settings too. What several of them do alike
(retries, the ends of logs, jobs as directories) is in a module beside the packages.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from pman import settings as pman_settings
from pman.errors import Misconfigured, PmanError
from pman.job import Job
from pman.settings import Settings
from pman.status import Details, JobStatus
from pman.targets import TARGETS
from pman.targets.record import Problem
from pman.templating.render import Spec

if TYPE_CHECKING:  # rendering loads nothing of a backend
    from pman.backends.discovery import Overview
    from pman.backends.logs import Wanted


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

    def details(self, status: JobStatus) -> Details:
        """What is known of the job besides, from what `status()` has read, or from one more call of the backend."""

    def workers(self, status: JobStatus) -> int:
        """How many workers may have output. `status` is what `status()` returned, here and below."""

    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        """The ends of the texts that one worker, counted from 0, writes; [] without output."""

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        """Name -> text of what was submitted, as the backend keeps it; "spec" is the name of the main part.

        environment: with the values of the job's environment. Raises Refused where it cannot be shown without them.
        """

    def delete(self, jid: str) -> None:
        """End the job and forget it: afterwards `status` raises NotFound and the jid may be submitted again.

        After an error, this or another replica repeats it, and NotFound would call that a failure. So the job is ended
        and marked first, and found by its mark; when that is certain, what is left of it may stay behind.
        """

    def jobs(self, limit: int) -> list[JobStatus]:
        """pman's jobs, newest first, at most `limit` of them.

        In one or two calls of the backend. If its list does not say for certain that a job ended well, as where memory
        was short (pman.status.with_memory), one more call for each such job, once.
        """

    def ping(self) -> str | None:
        """Return when the backend can take jobs, else raise with the sentence that says why not.

        What is returned says what does not work although jobs do.
        """

    def overview(self) -> Overview:
        """What the backend says of itself: its version, where jobs run, and what is there. Raises nothing."""


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
    return cast(Backend, _module(settings).create(settings))


def check_for_service(settings: Settings) -> list[str]:
    """Warnings about these settings. Raises Misconfigured, one sentence for each reason not to start a server.

    A backend's own rules about settings stand in its module: `problems(settings)` and `warnings(settings)`, where it
    has any, give a sentence each, as those of pman.settings do.
    """
    if settings.container_env not in BACKENDS:
        raise Misconfigured(f"CONTAINER_ENV: must be one of {', '.join(BACKENDS)}")
    module = _module(settings)
    own = getattr(module, "problems", lambda _: ())
    if found := [*pman_settings.problems(settings), *_storage(settings), *own(settings)]:
        raise Misconfigured(" ".join(found))
    return [*pman_settings.warnings(settings), *getattr(module, "warnings", lambda _: ())(settings)]


def live(settings: Settings, spec: Spec) -> list[Problem]:
    """What the configured backend itself has against a spec, which is not run.

    `live(settings, spec)` of the backend's module asks it and changes nothing there. A Problem with the rule
    `not-asked` says what nobody has looked at.
    """
    entry = BACKENDS[settings.container_env]
    if entry.target != spec.target:
        said = f"CONTAINER_ENV={settings.container_env} takes no {spec.target}, so that nobody was asked about this"
        return [Problem(said, rule="not-asked")]
    ask = getattr(_module(settings), "live", None)
    if ask is None:
        return [Problem(f"{settings.container_env} has nothing that could be asked", rule="not-asked")]
    found: list[Problem] = []
    try:
        found.extend(ask(settings, spec))
    except PmanError as error:
        found.append(Problem(f"{settings.container_env} could not be asked: {error}", rule="live"))
    return found


def discovered(settings: Settings, target: str) -> str:
    """A site.yaml of rules that fit the cluster: what `discover(settings)` of a backend's module has found there.

    Raises Misconfigured where no backend of the target can be asked, or none answers.
    """
    able = {entry.target: module for entry in BACKENDS.values()
            if (module := getattr(importlib.import_module(entry.module), "discover", None))}  # fmt: skip
    if target not in able:
        raise Misconfigured(f"--from-cluster works with --for {' and --for '.join(able)}, not with {target}.")
    return cast(str, able[target](settings).text())


def line_named(text: str, said: str) -> int | None:
    """The line of a spec with the longest value that a backend's sentence names."""
    found = ((re.search(r"[:=]\s*[\"']?([^\"'\s]{3,})", line), n) for n, line in enumerate(text.splitlines(), 1))
    named = [(len(value[1]), n) for value, n in found if value and value[1] in said]
    return max(named)[1] if named else None


def _module(settings: Settings) -> ModuleType:
    return importlib.import_module(BACKENDS[settings.container_env].module)


def _storage(settings: Settings) -> Iterator[str]:
    """Storage that the backend's target cannot mount."""
    types = {name: TARGETS[entry.target].storage_types for name, entry in BACKENDS.items()}
    if settings.storage_type not in types[settings.container_env]:
        allowed = ", ".join(name for name, own in types.items() if settings.storage_type in own)
        yield (
            f"STORAGE_TYPE={settings.storage_type} does not work with CONTAINER_ENV={settings.container_env}, "
            f"only with {allowed}."
        )
