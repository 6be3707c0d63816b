"""Log texts of pods. A node that does not answer costs a read time-out once in a while, not in every GET."""

import time
from dataclasses import dataclass, field

from pman.backends import logs
from pman.backends.kubernetes.api import Api, LogsUnavailable, Object

ASK_AGAIN_SECONDS = 60.0


@dataclass(slots=True)
class Reader:
    """The logs of a namespace's pods, for all threads.

    path: of the pods. silent: nodes that kept pman waiting in vain: in which words, and until when (time.monotonic())
    nobody asks them.
    """

    api: Api
    path: str
    silent: dict[str, tuple[str, float]] = field(default_factory=dict)

    def read(self, pod: Object, container: str, wanted: logs.Wanted) -> str:
        """The end of the pod's log, or a line that says why it cannot be read (in that time).

        A pod that has ended is asked for in any case: kubelet has told of its end, and ChRIS reads a job's logs for the
        last time when it has ended.
        """
        node = pod["spec"].get("nodeName", "")
        words, until = self.silent.get(node, ("", 0.0))
        if time.monotonic() >= until or pod["status"].get("phase") in ("Succeeded", "Failed"):
            if words:  # one asks, the others need not wait with it
                self.silent[node] = words, time.monotonic() + ASK_AGAIN_SECONDS
            query = {"container": container, "tailLines": str(wanted.lines)}
            try:
                text = self.api.tail(f"{self.path}/{pod['metadata']['name']}/log", query, wanted)
            except LogsUnavailable as error:
                words = str(error)
                if error.waited:
                    self.silent[node] = words, time.monotonic() + ASK_AGAIN_SECONDS
            else:
                self.silent.pop(node, None)
                return logs.clean(text)
        return f"[pman: these logs cannot be read now: {words}]\n"
