"""Log texts of the pods of one job, all of them within one time: nodes that do not answer take a read time-out each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pman import logs
from pman.backends.kubernetes_api import Api, LogsUnavailable, Object

SECONDS = 20.0  # for all pods of a GET; pfcon waits 100 s for its answer


@dataclass(slots=True)
class Reader:
    """Reads, one pod after the other, at most `max_lines` and `max_bytes` of each.

    path: of the namespace's pods. container: whose logs. silent: nodes that did not answer, and in which words; their
    other pods are not asked.
    """

    api: Api
    path: str
    container: str
    max_lines: int
    max_bytes: int
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    silent: dict[str, str] = field(default_factory=dict)

    def read(self, pod: Object) -> str:
        """The end of the pod's log, or a line that says why it cannot be read."""
        node = pod["spec"].get("nodeName", "")
        if node not in self.silent:
            query = {"container": self.container, "tailLines": str(self.max_lines)}
            path, seconds = f"{self.path}/{pod['metadata']['name']}/log", self.deadline - time.monotonic()
            try:
                return logs.clean(self.api.tail(path, query, self.max_bytes, seconds))
            except LogsUnavailable as error:
                self.silent[node] = str(error)
        return f"[pman: these logs cannot be read now: {self.silent[node]}]\n"
