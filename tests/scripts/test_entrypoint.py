"""deploy/entrypoint.py: whom the container image runs as, with real sockets of several owners and modes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import ROOT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
OWN = 10001
# Who it is, where its home is, and whether the engine's socket lets it in.
SAY = """
import json, os, socket, sys
def may_open(path):
    with socket.socket(socket.AF_UNIX) as end:
        return end.connect_ex(path) == 0
ids = {*os.getresuid()}, {*os.getresgid()}, os.getgroups()
print(json.dumps([*map(list, ids), os.environ["HOME"], may_open(sys.argv[1])]))
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    """The socket of an engine; only root may look into pytest's own directories."""
    for directory in (tmp_path, *tmp_path.parents):  # one more of them with pytest-xdist
        if not directory.stat().st_mode & 0o001:
            directory.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        yield tmp_path / "sock"


def started(engine: Path, *before: str, **env: str) -> tuple[list[int], list[int], list[int], str, bool]:
    """User, group, further groups, home, and whether the socket may be opened, of what the image runs."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    script = shutil.copy(ROOT / "deploy/entrypoint.py", engine.parent)  # others may not see the checkout
    command = [*before, python, "-IS", script, python, "-IS", "-c", SAY, str(engine)]
    given = {"PATH": os.environ["PATH"], "HOME": str(engine.parent), "DOCKER_HOST": f"unix://{engine}", **env}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("owner", "mode", "user", "groups"),
    [
        ((0, 998), 0o660, OWN, [998]),  # Docker's, of the group docker
        ((0, 0), 0o660, OWN, [0]),  # Podman's, where systemd makes it; a rootless user is root inside
        ((1000, 1000), 0o660, OWN, [1000]),  # rootless Podman's, seen by a container of Docker
        ((0, 0), 0o666, OWN, []),
        ((0, 0), 0o600, 0, None),  # `podman system service` alone
        ((1000, 1000), 0o600, 0, None),
        ((0, 998), 0o640, 0, None),  # who may only read a socket may not open it
    ],
)  # fmt: skip
def test_the_socket_says_who_pman_is(
    engine: Path, owner: tuple[int, int], mode: int, user: int, groups: list[int] | None
) -> None:
    os.chown(engine, *owner)
    engine.chmod(mode)
    home = "/" if user else str(engine.parent)
    assert started(engine) == ([user], [user], os.getgroups() if groups is None else groups, home, True)


def test_without_a_socket_pman_is_its_own_user(engine: Path) -> None:
    store = str(engine.parent)
    for host in (f"unix://{engine}-missing", "tcp://engine.example.org:2376"):
        assert started(engine, DOCKER_HOST=host, STOREBASE=store)[:3] == ([OWN], [OWN], [])


def test_root_stays_where_it_is_needed(engine: Path) -> None:
    """Only root gives directories of the store to the user of a job, and reads credentials in its own home."""
    engine.chmod(0o660)
    assert started(engine, STOREBASE=str(engine.parent))[0] == [0]
    assert started(engine, STOREBASE=str(engine.parent / "elsewhere"))[0] == [OWN]  # pman does not see the store
    assert started(engine, STOREBASE="")[0] == [OWN]
    (engine.parent / ".docker").mkdir()
    assert started(engine)[0] == [0]
    assert started(engine, HOME="/nowhere")[0] == [OWN]
    assert started(engine, HOME="/nowhere", DOCKER_CONFIG=str(engine.parent / ".docker"))[0] == [0]


def test_groups_that_the_container_was_given_stay(engine: Path) -> None:
    """Those of `group_add:`, by which pman may read the store, say; not those of the image's root."""
    os.chown(engine, 0, 998)
    engine.chmod(0o660)
    groups = ",".join(map(str, [*os.getgrouplist("root", 0), 5000]))
    before = ["setpriv", f"--groups={groups}"]
    assert started(engine, *before)[:3] == ([OWN], [OWN], [998, 5000])
    assert started(engine, *before, DOCKER_HOST="tcp://engine.example.org:2376")[:3] == ([OWN], [OWN], [5000])


@pytest.mark.parametrize(("user", "group"), [("1234", "0"), ("10001", "10001")])
def test_another_user_stays(engine: Path, user: str, group: str) -> None:
    """That of `user:`, of runAsUser, or of a namespace of OpenShift."""
    engine.chmod(0o600)
    before = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    assert started(engine, *before) == ([int(user)], [int(group)], [], str(engine.parent), False)


def test_root_without_rights_stays(engine: Path) -> None:
    """`--cap-drop=ALL` takes away the right to become another user."""
    engine.chmod(0o660)
    before = ["setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-all", "--no-new-privs"]
    assert started(engine, *before)[0] == [0]


def test_a_command_that_is_missing_is_named(engine: Path) -> None:
    command = [sys.executable, "-IS", str(ROOT / "deploy/entrypoint.py"), "no-such-command"]
    env = {"PATH": "/usr/bin", "DOCKER_HOST": f"unix://{engine}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (127, "no-such-command: No such file or directory\n")
