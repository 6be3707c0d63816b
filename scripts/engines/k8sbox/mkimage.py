#!/usr/bin/env python3
"""Write a docker-archive image of one layer from a root directory.

Needs no container engine; containerd, Docker, Podman, kind and k3d load the archive. The same directory gives the same
bytes: owners are root, times are zero.
Format: "Combined Image JSON + Filesystem Changeset Format" of
https://github.com/moby/docker-image-spec/blob/main/v1.2.md
"""

import argparse
import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path

# The names that images use for what uname calls the machine (https://go.dev/doc/install/source#environment, GOARCH).
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x"}


def normalised(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Take away what differs from one run or user to the next."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def layer_of(root: Path) -> bytes:
    """The tar archive of everything below `root`, in the order of the names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, str(path.relative_to(root)), recursive=False, filter=normalised)
    return buffer.getvalue()


def configuration_of(layer_digest: str, command: list[str]) -> bytes:
    """The image's configuration as JSON; no entry point, so that what a job asks for replaces `command` whole."""
    machine = platform.machine()
    return json.dumps(
        {
            "architecture": ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        }
    ).encode()


def add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one regular file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_image(root: Path, target: Path, names: list[str], command: list[str]) -> None:
    """Write the archive `target` with the image of `root` under all `names`; `command` is what it runs if not told."""
    layer = layer_of(root)
    layer_digest = hashlib.sha256(layer).hexdigest()
    configuration = configuration_of(layer_digest, command)
    configuration_name = hashlib.sha256(configuration).hexdigest() + ".json"
    layer_name = f"{layer_digest}/layer.tar"
    manifest = [{"Config": configuration_name, "RepoTags": names, "Layers": [layer_name]}]
    with tarfile.open(target, "w") as archive:
        add_bytes(archive, configuration_name, configuration)
        add_bytes(archive, layer_name, layer)
        add_bytes(archive, "manifest.json", json.dumps(manifest).encode())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="directory that becomes the image's root")
    parser.add_argument("archive", type=Path, help="file to write")
    parser.add_argument("names", nargs="+", metavar="name", help="repository:tag; all are names of the one image")
    parser.add_argument("--command", default="sh", help="what the image runs if not told, split at blanks")
    arguments = parser.parse_args()
    write_image(arguments.root, arguments.archive, arguments.names, arguments.command.split())


if __name__ == "__main__":
    main()
