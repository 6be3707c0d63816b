"""What Swarm, Docker and Podman mount into a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pman.errors import BadRequest, Misconfigured, Unreachable
from tests.backends.engine.jobs import PODMAN, load, posted
from tests.fakes.engine import FakeEngine

LOCAL = {"Driver": "local", "Mountpoint": "/mnt/store", "Options": None}
OF_NFS = LOCAL | {"Options": {"type": "nfs", "device": ":/x"}}
BIND = {"Type": "bind", "Source": "/mnt/store/key-chris-jid-1/incoming"}
PART = {"Type": "volume", "Source": "store", "VolumeOptions": {"NoCopy": True, "Subpath": "key-chris-jid-1/incoming"}}


def podman(version: str) -> dict[str, Any]:
    return {"ApiVersion": version, "Components": [{"Name": "Podman Engine"}]}


@pytest.mark.parametrize(
    ("kind", "version", "nodes", "volume", "expected"),
    [
        ("docker", {"ApiVersion": "1.41"}, [], LOCAL, BIND),
        ("docker", {"ApiVersion": "1.45"}, [], LOCAL, PART),
        ("docker", {"ApiVersion": "1.45"}, [], OF_NFS, PART),
        ("docker", podman("1.45"), [], LOCAL, BIND),
        ("docker", {"ApiVersion": "1.44"}, [], OF_NFS, None),
        ("docker", {"ApiVersion": "1.44"}, [], LOCAL | {"Driver": "rexray"}, None),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.0", "27.3.1+dfsg1", "29.0"], LOCAL, PART),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.4", "26.0.2"], LOCAL, BIND),
        ("swarm", {"ApiVersion": "1.45"}, ["26.1.4", "26.0.2"], OF_NFS, None),
        ("swarm", {"ApiVersion": "1.45"}, ["dev"], OF_NFS, None),
        ("swarm", {"ApiVersion": "1.45"}, [""], OF_NFS, None),
    ],
)  # fmt: skip
def test_a_part_of_a_volume(
    engine: FakeEngine, kind: str, version: dict[str, Any], nodes: list[str], volume: dict[str, Any],
    expected: dict[str, Any] | None,
) -> None:  # fmt: skip
    """By Subpath where it works (a Swarm's nodes with Docker 26.0 ignore it), by its directory, or not at all."""
    engine.routes |= {
        "GET /version": version, "GET /volumes/store": volume,
        "GET /nodes": [{"Description": {"Engine": {"EngineVersion": version}}} for version in nodes],
        "POST /services/create": {"ID": "s1"}, "POST /containers/create": {"Id": "c1"},
        "POST /containers/c1/start": {},
    }  # fmt: skip
    of_volume = {"STORAGE_TYPE": "docker_local_volume", "VOLUME_NAME": "store"}
    if expected is None:
        with pytest.raises(Misconfigured, match="cannot mount a part of it"):
            load(kind, engine, **of_volume)
        return
    posted(*load(kind, engine, **of_volume))
    (body,) = [call.body for call in engine.calls if call.path.endswith("/create")]
    host = body["TaskTemplate"]["ContainerSpec"] if kind == "swarm" else body["HostConfig"]
    mount = host["Mounts"][0]
    assert {name: mount.get(name) for name in ("Type", "Source", "VolumeOptions")} == {"VolumeOptions": None} | expected


def test_an_engine_that_cannot_mount_a_part_of_a_volume_is_never_ready(engine: FakeEngine) -> None:
    """Also where it comes up after pman."""
    is_up: list[bool] = []
    engine.routes["GET /version"] = lambda _: (200, {"ApiVersion": "1.44"}) if is_up else None
    engine.routes["GET /volumes/store"] = OF_NFS
    backend, _ = load("docker", engine, STORAGE_TYPE="docker_local_volume", VOLUME_NAME="store")
    is_up.append(True)
    with pytest.raises(Misconfigured, match="cannot mount a part of it"):
        backend.ping()


@pytest.mark.parametrize("mount", [{"Name": "store", "Source": "/mnt/store"}, {"Source": "/mnt/store"}])
def test_the_volume_of_pfcon(engine: FakeEngine, mount: dict[str, str]) -> None:
    """Found at pfcon's container, as pman 4 to 6 did, where VOLUME_NAME is not set; pfcon may come up after pman."""
    engine.routes |= {
        "GET /volumes/store": LOCAL, "POST /containers/create": {"Id": "c1"}, "POST /containers/c1/start": {},
    }  # fmt: skip
    backend, config = load("docker", engine, STOREBASE="")
    assert config.storage_type == "docker_local_volume"
    with pytest.raises(Unreachable, match="start pfcon, or set VOLUME_NAME"):
        posted(backend, config)
    engine.routes["GET /containers/json"] = [{"Mounts": [{"Destination": "/var/local/storeBase"} | mount]}]
    posted(backend, config)
    (body,) = [call.body for call in engine.calls if call.path.endswith("/create")]
    assert body["HostConfig"]["Mounts"][0]["Source"] == BIND["Source"]


def test_nfs_on_podman_is_refused(engine: FakeEngine) -> None:
    engine.routes["GET /version"] = podman("1.41")
    for kind in ("docker", "podman"):
        with pytest.raises(Misconfigured, match="STORAGE_TYPE=nfs does not work with Podman"):
            load(kind, engine, STORAGE_TYPE="nfs", NFS_SERVER="nfs.example.org")


@pytest.mark.parametrize("text", [",source=/etc", ',"', "\n", "\r"])
@pytest.mark.parametrize("field", ["input_dir", "output_dir"])
@pytest.mark.parametrize("name", ["docker", "podman"])
def test_podman_is_sent_no_mount_option(engine: FakeEngine, name: str, field: str, text: str) -> None:
    """Also where CONTAINER_ENV says docker: the engine says what it is."""
    engine.routes["GET /version"] = PODMAN
    with pytest.raises(BadRequest) as caught:
        posted(*load(name, engine), **dict[str, Any]({field: f"key-a/x{text}"}))
    assert list(caught.value.message) == [field]
    assert not [call for call in engine.calls if call.method == "POST"]


def test_a_sites_mount_is_judged_too(engine: FakeEngine, tmp_path: Path) -> None:
    engine.routes["GET /version"] = PODMAN
    overlay = tmp_path / "overlay" / "docker"
    overlay.mkdir(parents=True)
    (overlay / "container.yaml.j2").write_text(
        '{% extends "shipped/docker/container.yaml.j2" %}\n{% block mounts %}\n'
        "    - {Type: bind, Source: /scratch, Target: {{ '/scratch/' ~ job.auid }}}\n{% endblock %}\n"
    )
    with pytest.raises(BadRequest, match="mount option"):
        posted(*load("podman", engine, TEMPLATES_DIR=str(tmp_path / "overlay")), auid="a,rw,source=/etc")
