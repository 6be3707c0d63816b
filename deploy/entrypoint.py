"""The entry point of pman's image: root becomes pman's own user and runs the command; another user runs it at once.

A container engine's socket lets its group in, so that group becomes one of that user's. Groups that the container was
given (`group_add`) stay. Root stays root where only root can do what is asked: the socket lets nobody else in, or pman
sees the store of the engine's jobs and gives directories there to their users, or root has credentials for registries.
Whoever may open the socket could become root anyway.
"""

import contextlib
import os
import stat
import sys
from pathlib import Path

USER = 10001  # and group
SOCKETS = ("/var/run/docker.sock", "/run/podman/podman.sock")


def become_ordinary() -> None:
    """Raises OSError where this container may not change its user."""
    host = os.environ.get("DOCKER_HOST")
    sockets = [path for path in map(Path, [host.removeprefix("unix://")] if host else SOCKETS) if path.is_socket()]
    credentials = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    if sockets and (credentials.exists() or os.path.isdir(os.environ.get("STOREBASE", ""))):
        return
    groups = set(os.getgroups()) - set(os.getgrouplist("root", 0))  # those that this container was given, if any
    for found in map(Path.stat, sockets):
        if found.st_mode & stat.S_IWOTH:
            continue
        if not found.st_mode & stat.S_IWGRP:
            return
        groups.add(found.st_gid)
    os.setgroups(sorted(groups))
    os.setgid(USER)
    os.setuid(USER)
    os.environ["HOME"] = "/"  # as engines set it for a user whom /etc/passwd does not know


if __name__ == "__main__":
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # such as --cap-drop=ALL: it is a root without rights
            become_ordinary()
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        sys.stderr.write(f"{sys.argv[1]}: {error.strerror}\n")
        sys.exit(127)
