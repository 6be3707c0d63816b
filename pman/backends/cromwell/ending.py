"""Ends the SLURM job of an aborted workflow whose `kill` may not have run, or may have failed.

Cromwell runs `kill` once, and says Aborted whatever comes of it. After a restart it may not run it at all: where the
abort comes before Cromwell is at the job again (engine/.../EngineJobExecutionActor.scala of Cromwell 93,
EngineLifecycleActorAbortCommand), or where it died in the middle of `kill`, before which it writes `rc`
(SharedFileSystemAsyncJobExecutionActor.scala, reconnectToExistingJob). A second workflow then has the reference
configuration do what `kill` does, and fails where that fails.
"""

import itertools
import uuid
from collections.abc import Mapping
from typing import Any

from pman.backends import retry
from pman.backends.cromwell import rest
from pman.errors import BackendError, Unreachable

KEYS = ("workflowProcessingEvents", "runtimeAttributes", "submittedFiles:options")
_ATTRIBUTE = "ends_workflow"  # of deploy/cromwell/slurm.conf
_NAMESPACE = uuid.UUID("0b3a6e0e-6f0c-5c4f-8a43-6d0d3c1c9a55")
_FAILED = ("Failed", "Aborted")


def was_restarted(meta: Mapping[str, Any]) -> bool:
    """Whether Cromwell has begun to work at the workflow more than once: it does so again after each restart."""
    events = meta.get("workflowProcessingEvents", [])
    return [event.get("description") for event in events].count("PickedUp") > 1


def is_possible(meta: Mapping[str, Any]) -> bool:
    """Whether Cromwell's configuration declares the attribute, as the metadata of the job's call shows."""
    calls = [call for entries in meta.get("calls", {}).values() for call in entries]
    return any(_ATTRIBUTE in call.get("runtimeAttributes", {}) for call in calls)


def end_job(client: rest.Client, name: str, meta: Mapping[str, Any], seconds: float) -> None:
    """Run `kill` for the workflow with the id `name`.

    Raises Unreachable where that is not done after `seconds`, BackendError where Cromwell refuses to.
    The ids of these workflows follow from `name`, so that each runs once. One that failed is followed by the next.
    """
    helpers = (str(uuid.uuid5(_NAMESPACE, f"{number}:{name}")) for number in itertools.count(1))
    helper, status = next((x, status) for x in helpers if (status := client.status(x)) not in _FAILED)
    if not status:
        options = meta.get("submittedFiles", {}).get("options") or "{}"  # for the same backend of Cromwell
        answer = client.submit(helper, _WDL % name, options, {})
        if answer.status_code != 201 and not rest.IN_USE.search(answer.text):
            said = f"Cromwell refuses the workflow that ends the job in SLURM: {rest.words(answer)}"
            raise BackendError(said, detail=answer.text)

    def ended() -> str:
        status = client.status(helper)
        return status if status in ("Succeeded", *_FAILED) else ""

    if retry.wait_until(ended, seconds) != "Succeeded":
        raise Unreachable("Cromwell has not ended the job in SLURM yet; delete it again.")


_WDL = f"""version 1.0

task end_job {{
    command {{
        true
    }}
    runtime {{
        {_ATTRIBUTE}: "%s"
    }}
}}

workflow EndJob {{
    call end_job
}}
"""
