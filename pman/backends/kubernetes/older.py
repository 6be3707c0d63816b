"""Jobs of pman 6, which are under way when a site upgrades.

That pman marks nothing. By the public source of 6.3.1 (pman/kubernetesmgr.py) the Job is named after the jid, and so is
its only container, which mounts the output directory.
"""

from __future__ import annotations

import posixpath
import re

from pman.backends.kubernetes.api import Object
from pman.job import OUTGOING, Job

# What it could name a Job by: a DNS subdomain (RFC 1123) that fits into the label job-name.
_NAME = re.compile(r"(?=.{1,63}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def may_name(jid: str) -> bool:
    """Whether pman 6 could make a Job of that jid."""
    return _NAME.fullmatch(jid) is not None


def is_job(job: Object) -> bool:
    """Whether pman 6 made this Job, whatever its name."""
    containers = job["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in containers[0].get("volumeMounts", [])}
    return len(containers) == 1 and containers[0]["name"] == job["metadata"]["name"] and OUTGOING in mounts


def is_same(existing: Object, job: Job) -> bool:
    """Whether pman 6 made `existing` of such a request: it has no digest, so what it shows is compared."""
    container = existing["spec"]["template"]["spec"]["containers"][0]
    made = (container["image"], tuple(container.get("command", ())), existing["spec"].get("completions", 1))
    below = next((mount.get("subPath") for mount in container["volumeMounts"] if mount["mountPath"] == OUTGOING), None)
    there = below is None or posixpath.normpath(below) == job.output_dir
    return there and made == (job.image, job.argv, job.workers)
