"""STORAGE_TYPE -> the two mounts of a job, confined to the store."""

import logging
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from pman.errors import BadRequest
from pman.job import INCOMING, OUTGOING, Job
from pman.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mount:
    """One directory of a job. `source` is absolute for directories and NFS, relative to the volume otherwise."""

    source: str  # where the directory is: a path on the node or the server, or below the volume
    target: str  # where the container sees it
    read_only: bool  # whether the job may not write there


@dataclass(frozen=True, slots=True)
class Storage:
    type: str  # host, nfs, docker_local_volume or kubernetes_pvc
    incoming: Mount  # the input directory
    outgoing: Mount  # the output directory
    shared: str | None  # the directory that holds both, where they are its `incoming` and `outgoing`
    nfs_server: str | None  # host name or address of the NFS server
    nfs_path: str | None  # what the NFS server exports: STOREBASE
    volume: str | None  # name of the Docker volume or PersistentVolumeClaim

    def on_host(self, arg: str) -> str:
        """`arg` for a command that runs without a container: the job's own directories in place of /share."""
        for mount in (self.incoming, self.outgoing):
            if arg == mount.target or arg.startswith(mount.target + "/"):
                return mount.source + arg[len(mount.target) :]
        return arg


def mounts(job: Job, settings: Settings) -> Storage:
    """Where the directories of `job` are under these settings."""
    volume = settings.storage_type in ("docker_local_volume", "kubernetes_pvc")
    base = "" if volume else (settings.storebase or "/")
    source, target = posixpath.join(base, job.input_dir), posixpath.join(base, job.output_dir)
    parent = posixpath.dirname(source)
    siblings = (source, target) == (posixpath.join(parent, "incoming"), posixpath.join(parent, "outgoing"))
    return Storage(
        type=settings.storage_type,
        incoming=Mount(source, INCOMING, read_only=True),
        outgoing=Mount(target, OUTGOING, read_only=False),
        shared=parent if siblings else None,
        nfs_server=settings.nfs_server,
        nfs_path=settings.storebase if settings.storage_type == "nfs" else None,
        volume=settings.volume_name,
    )


def prepare(job: Job, settings: Settings) -> None:
    """If pman sees the store: refuse directories that leave it through a symbolic link, and make the output directory.

    pfcon's filesystem stores do not make the output directory, and an engine would make it as root. A missing input
    directory is made only for `fs` jobs that read nothing there, and must fail every other job. It is refused here if
    the arguments of a `fs` job name it. It is also refused for a claim, because kubelet would make it, as root.
    Raises BadRequest.
    """
    if settings.storebase is None or not Path(settings.storebase).is_dir():
        return
    base = os.path.realpath(settings.storebase)
    fields = {"input_dir": job.input_dir, "output_dir": job.output_dir}
    below = base.rstrip("/") + "/"
    if bad := [name for name, path in fields.items() if not os.path.realpath(below + path).startswith(below)]:
        said = "leaves the store through a symbolic link; it must be a path that stays below the store."
        raise BadRequest(dict.fromkeys(bad, said))
    owner = _owner(job, settings)
    _make(os.path.join(base, job.output_dir), owner, "output_dir")
    if os.path.isdir(os.path.join(base, job.input_dir)):
        return
    if job.kind == "fs" and (job.input_dir == f"key-{job.jid}/incoming" or INCOMING not in job.argv):
        _make(os.path.join(base, job.input_dir), owner, "input_dir")
    elif job.kind == "fs" or settings.storage_type == "kubernetes_pvc":
        raise BadRequest({"input_dir": "does not exist in the store; it must be a directory there."})


def _owner(job: Job, settings: Settings) -> tuple[int, int]:
    """User and group that the job runs as, -1 for those of pman itself; the template of Kubernetes chooses the same."""
    uid, gid = job.uid, job.gid
    if settings.container_env == "kubernetes":
        given = settings.securitycontext_run_as_user, settings.securitycontext_run_as_group
        uid, gid = (own if ask is None else ask for own, ask in zip((uid, gid), given, strict=True))
    return -1 if uid is None else uid, -1 if gid is None else gid


def _make(path: str, owner: tuple[int, int], name: str) -> None:
    """The directory and those above it that are missing, each owned by the job's user."""
    missing: list[str] = []  # from above
    while not os.path.isdir(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    try:
        for made in missing:
            try:
                os.mkdir(made)
            except FileExistsError:
                if os.path.isdir(made):  # another request was quicker
                    continue
                raise BadRequest({name: "is a file in the store, or lies below one; it must be a directory."}) from None
            if os.geteuid() == 0:  # nobody else may give a directory away
                os.chown(made, *owner)
    except OSError as error:
        log.warning("cannot make %s, or give it to the user %s:%s of the job: %s", name, *owner, error.strerror)
