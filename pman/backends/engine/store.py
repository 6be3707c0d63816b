"""STORAGE_TYPE=docker_local_volume and nfs on an engine: makes a body's mounts such as the engine can do.

A template renders a job's directory as a part of a volume. An engine that can mount a part (Docker 26; 26.1 on every
node of a Swarm) is sent just that, and keeps links from leading out of the volume. For any other, Podman too, the
directory below the volume's mount point is bound, where the driver is `local` and mounts nothing there itself.
"""

import os
from collections.abc import Callable

from pman.backends.engine.api import Engine, Json
from pman.errors import BadRequest, Misconfigured, NotFound, Unreachable
from pman.job import INCOMING, Job
from pman.settings import Settings

SUBPATH_API = (1, 45)  # the first version of the API whose volume mounts have a Subpath; older ones ignore it
PFCON = "org.chrisproject.role=pfcon"
PFCON_STORE = "/var/local/storeBase"  # where pfcon has its store (pfcon's own documentation)


class Store:
    """The volume of all jobs. nodes_mount_parts: whether the nodes of a Swarm know Subpath as the engine does.

    quoted: how the engine wants the source of a bind written.
    """

    def __init__(
        self, engine: Engine, settings: Settings, nodes_mount_parts: Callable[[], bool] = lambda: True,
        quoted: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._settings = settings
        self._nodes_mount_parts = nodes_mount_parts
        self._quoted = quoted

    def check(self) -> tuple[str, str]:
        """The volume's name where parts of it can be mounted, or else its directory on the machine, if it is a volume.

        Raises Misconfigured where jobs would get other directories than their own, Unreachable where none yet.
        """
        if self._settings.storage_type == "nfs" and self._engine.is_podman():
            raise Misconfigured(
                "STORAGE_TYPE=nfs does not work with Podman. Its API for Docker's clients ignores what a volume is "
                "made of. Mount the export on the machine, and set STORAGE_TYPE=host and STOREBASE to that directory."
            )
        return self._volume() if self._settings.storage_type == "docker_local_volume" else ("", "")

    def place(self, job: Job, mounts: list[Json]) -> None:
        """Make each mount of a part of the volume one that the engine has. Raises BadRequest, and what check() does."""
        name, directory = self.check()
        self._refuse_missing(job, directory or self._settings.storebase or "")
        if self._settings.storage_type != "docker_local_volume":
            return
        for mount in mounts:
            part = (mount.get("VolumeOptions") or {}).get("Subpath")
            if not part or mount.get("Source") not in (None, self._settings.volume_name):
                continue
            if name:
                mount["Source"] = name
            else:
                mount |= {"Type": "bind", "Source": self._quoted(os.path.join(directory, part))}
                del mount["VolumeOptions"]

    def directory(self) -> str:
        """The store on the machine of the engine; "" where it has none there."""
        if self._settings.storage_type == "host":
            return self._settings.storebase or ""
        if self._settings.storage_type != "docker_local_volume":
            return ""
        name, directory = (self._settings.volume_name, "") if self._settings.volume_name else self._of_pfcon()
        return directory or str(self._engine.get(f"/volumes/{name}").get("Mountpoint") or "")

    def _refuse_missing(self, job: Job, store: str) -> None:
        """Podman makes missing directories of mounts, as root; Docker refuses them. store: on the engine's machine.

        Where pman does not see the store, an input that the job reads is looked for in a container that does.
        """
        if not self._engine.is_podman():
            return
        base, fields = self._settings.storebase, {"input_dir": job.input_dir, "output_dir": job.output_dir}
        if base is not None and os.path.isdir(base):
            wrong = [name for name, path in fields.items() if not os.path.isdir(os.path.join(base, path))]
        else:
            reads = job.kind != "fs" or INCOMING in job.argv
            wrong = ["input_dir"] if reads and self._is_missing(store, job.input_dir) else []
        if wrong:
            raise BadRequest(dict.fromkeys(wrong, "does not exist in the store; it must be a directory there."))

    def _is_missing(self, store: str, path: str) -> bool:
        """Whether a running container that has the store mounted, such as pfcon's, lacks the path there."""
        for container in self._engine.get("/containers/json"):
            for mount in container.get("Mounts") or []:
                if mount.get("Source") != store:
                    continue
                try:
                    inside = f"{mount['Destination']}/{path}"
                    self._engine.call("GET", f"/containers/{container['Id']}/archive", stream=True, path=inside).close()
                    return False
                except NotFound:
                    if self._engine.find(f"/containers/{container['Id']}/json"):  # it is not the container that is gone
                        return True
        return False

    def _volume(self) -> tuple[str, str]:
        name, directory = (self._settings.volume_name, "") if self._settings.volume_name else self._of_pfcon()
        if not name:
            return "", directory
        version = self._engine.version()
        if not self._engine.is_podman() and version >= SUBPATH_API and self._nodes_mount_parts():
            return name, ""
        volume = self._engine.find(f"/volumes/{name}")
        if volume is None:
            raise Unreachable(f"The engine has no volume {name} yet.")
        if volume["Driver"] == "local" and not volume.get("Options"):
            return "", str(volume["Mountpoint"])
        raise Misconfigured(
            f"The volume {name} is made by the driver {volume['Driver']} with options, and this engine cannot mount a "
            "part of it. Use a plain local volume, Docker 26.1 or later, or STORAGE_TYPE=host."
        )

    def _of_pfcon(self) -> tuple[str, str]:
        """Name and directory of what pfcon's container has as its store, as pman 4 to 6 looked it up."""
        label = self._settings.pfcon_selector or PFCON
        for container in self._engine.get("/containers/json", filters={"label": [label]}):
            for mount in container.get("Mounts") or []:
                if mount["Destination"] == PFCON_STORE:
                    return str(mount.get("Name") or ""), str(mount["Source"])
        raise Unreachable(
            f"No container with the label {label} has a mount at {PFCON_STORE}: start pfcon, or set VOLUME_NAME."
        )
