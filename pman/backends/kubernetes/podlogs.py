"""Log texts of the pods of one job. A node that does not answer takes a read time-out, once."""

from __future__ import annotations

from dataclasses import dataclass, field

from pman.backends import logs
from pman.backends.kubernetes.api import Api, LogsUnavailable, Object


@dataclass(slots=True)
class Reader:
    """Reads at most `max_lines` of each.

    path: of the namespace's pods. container: whose logs. silent: nodes that did not answer, and in which words; their
    other pods are not asked.
    """

    api: Api
    path: str
    container: str
    max_lines: int
    silent: dict[str, str] = field(default_factory=dict)

    def read(self, pod: Object, max_bytes: int, seconds: float) -> str:
        """The end of the pod's log, or a line that says why it cannot be read (in that time)."""
        node = pod["spec"].get("nodeName", "")
        if node not in self.silent:
            query = {"container": self.container, "tailLines": str(self.max_lines)}
            path = f"{self.path}/{pod['metadata']['name']}/log"
            try:
                return logs.clean(self.api.tail(path, query, max_bytes, seconds))
            except LogsUnavailable as error:
                self.silent[node] = str(error)
        return f"[pman: these logs cannot be read now: {self.silent[node]}]\n"
