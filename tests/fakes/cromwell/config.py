"""Reads a Cromwell configuration (HOCON): the pace of the server and its config backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyhocon import ConfigFactory, ConfigTree

from tests.fakes.cromwell.wdl import Attributes, ShellText


@dataclass(frozen=True)
class Pace:
    """How fast the server is, in seconds unless named otherwise. The defaults are those of Cromwell 93."""

    pickup_period: float = 20
    pickup_count: int = 50  # workflows per poll, all of one hog group
    max_workflows: int = 5000
    key_value_flush: float = 5  # a job is polled for the first time only after its id was flushed
    metadata_flush: float = 5
    metadata_batch: int = 200  # events that cause a flush before its time
    summary_period: float = 1
    abort_scan: float = 30
    token_period: float = 10
    token_count: int = 20
    heartbeat_period: float = 120
    heartbeat_ttl: float = 600
    launch: float = 1.05  # from pick-up to the start of the call
    finish: float = 0.6  # from the last poll to the end of the call
    close: float = 0.3  # from the end of the call to that of the workflow
    removal: float = 0.3  # from its final metadata to when the workflow is no longer in progress
    poll_first: float = 1
    poll_factor: float = 1.1
    poll_max: float = 300
    retry_period: float = 60  # between two attempts to initialise a workflow with a wrong-typed attribute
    retry_count: int = 16


# Seconds as in the recordings of the quick server, divided by about ten: for test suites.
TEST_PACE = Pace(
    pickup_period=0.1, pickup_count=50, key_value_flush=0.02, metadata_flush=0.05, summary_period=0.05,
    abort_scan=0.1, token_period=0.05, heartbeat_period=0.5, heartbeat_ttl=3, launch=0.1, finish=0.05, close=0.05,
    removal=0.03, poll_first=0.1, poll_max=2, retry_period=2,
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """One config backend (ConfigBackendLifecycleActorFactory)."""

    name: str
    root: str
    job_shell: str
    attributes: Attributes
    submit: ShellText
    submit_docker: ShellText | None
    kill: ShellText | None
    kill_docker: ShellText | None
    check_alive: ShellText | None
    job_id_regex: str
    exit_code_timeout_seconds: float | None
    concurrent_job_limit: int
    defaults: Mapping[str, Any]  # default-runtime-attributes


@dataclass(frozen=True)
class Config:
    backends: Mapping[str, Backend]
    default_backend: str
    pace: Pace  # as the file says, Cromwell's defaults where it says nothing
    docker_bug: bool = False  # upstream issue 7846: a declared docker attribute fails every job that sets it

    def at(self, root: Path) -> Config:
        """The same with every backend's directories under `root`."""
        backends = {name: replace(backend, root=str(root.absolute())) for name, backend in self.backends.items()}
        return replace(self, backends=backends)


def seconds(value: Any) -> float:
    """A HOCON duration in seconds; a bare number is taken as seconds, as in `new-workflow-poll-rate`."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (int, float, str)):
        return float(value)
    # pyhocon makes a dateutil.relativedelta of seconds and more
    return timedelta(days=value.days, hours=value.hours, minutes=value.minutes, seconds=value.seconds).total_seconds()


_PACE_KEYS = {
    "pickup_period": "system.new-workflow-poll-rate",
    "pickup_count": "system.max-workflow-launch-count",
    "max_workflows": "system.max-concurrent-workflows",
    "key_value_flush": "services.KeyValue.config.db-flush-rate",
    "metadata_flush": "services.MetadataService.config.db-flush-rate",
    "metadata_batch": "services.MetadataService.config.db-batch-size",
    "summary_period": "services.MetadataService.config.metadata-summary-refresh-interval",
    "abort_scan": "system.abort.scan-frequency",
    "token_period": "system.job-rate-control.per",
    "token_count": "system.job-rate-control.jobs",
    "heartbeat_period": "system.workflow-heartbeats.heartbeat-interval",
    "heartbeat_ttl": "system.workflow-heartbeats.ttl",
}
_COUNTS = ("pickup_count", "max_workflows", "metadata_batch", "token_count")


def _pace(tree: ConfigTree) -> Pace:
    found = {field: seconds(tree.get(key)) for field, key in _PACE_KEYS.items() if tree.get(key, None) is not None}
    values: dict[str, Any] = {field: int(v) if field in _COUNTS else v for field, v in found.items()}
    return replace(Pace(), **values)


def _backend(name: str, tree: ConfigTree) -> Backend:
    declarations = tree.get_string("runtime-attributes", "Int cpu = 1\nFloat memory_gb = 2.0")

    def shell(key: str) -> ShellText | None:
        text = tree.get_string(key, None)
        return ShellText(declarations, text) if text is not None else None

    submit = shell("submit")
    if submit is None:
        raise ValueError(f"backend {name} has no submit")
    timeout = tree.get("exit-code-timeout-seconds", None)
    return Backend(
        name=name,
        root=str(Path(tree.get_string("root", "cromwell-executions")).absolute()),
        job_shell=tree.get_string("job-shell", "/bin/bash"),
        attributes=Attributes(declarations),
        submit=submit,
        submit_docker=shell("submit-docker"),
        kill=shell("kill"),
        kill_docker=shell("kill-docker"),
        check_alive=shell("check-alive"),
        job_id_regex=tree.get_string("job-id-regex"),
        exit_code_timeout_seconds=None if timeout is None else float(timeout),
        concurrent_job_limit=tree.get_int("concurrent-job-limit", 1_000_000),
        defaults=dict(tree.get("default-runtime-attributes", {})),
    )


def load(path: Path) -> Config:
    tree = ConfigFactory.parse_file(str(path))
    providers = tree.get_config("backend.providers")
    backends = {name: _backend(name, providers[name].get_config("config")) for name in providers}
    return Config(backends, tree.get_string("backend.default"), _pace(tree))
