"""deploy/pman.service under a real systemd: process 1 of namespaces of its own, over a copy of this machine's files."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.rig import ROOT, wait_for
from tests.service.test_http import free_port

pytestmark = pytest.mark.live
UNIT = ROOT / "deploy/pman.service"
NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--cgroup")
# Its arguments: an empty directory, and what is /tmp/source inside. None of this machine's own units is started, and
# none that acts on its kernel.
START = """
set -e
cd "$1"
mount -t tmpfs tmpfs .
mkdir upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
rm -rf etc/systemd/system/*.wants lib/systemd/system/{sysinit,sockets,timers,local-fs,multi-user}.target.wants
chmod go+x root  # where a Python of its own may be
mount -t proc proc proc
mount --rbind /dev dev
mount -t sysfs sysfs sys
mount -t tmpfs tmpfs sys/fs/cgroup
mkdir sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p "tmp/source"
mount --bind "$2" tmp/source
exec chroot . env -i container=test PATH="$PATH" /lib/systemd/systemd --unit=basic.target
"""
Inside = Callable[..., "subprocess.CompletedProcess[str]"]


def documented() -> tuple[list[str], str]:
    """The commands of the unit's header: those before the settings are written, and the one after."""
    found = re.findall(r"^#   (.*)$", UNIT.read_text(), re.M)
    return found[:-1], found[-1]


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    if os.environ.get("CI") != "true" and (os.geteuid() or not Path("/lib/systemd/systemd").exists()):
        pytest.skip("needs root, and Debian's package systemd")
    (tmp_path / "machine").mkdir()
    command = [
        "unshare",
        *NAMESPACES,
        "--fork",
        "--kill-child",
        "--propagation=private",
        "bash",
        "-c",
        START,
        "systemd",
    ]
    with (tmp_path / "log").open("wb") as log:
        outer = subprocess.Popen(
            [*command, tmp_path / "machine", ROOT], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def systemd() -> int | None:
            assert outer.poll() is None, (tmp_path / "log").read_text()
            first = children.read_text().split()
            return int(first[0]) if first and Path(f"/proc/{first[0]}/comm").read_text() == "systemd\n" else None

        enter = ["nsenter", f"--target={wait_for(systemd, 20, 'systemd')}", *NAMESPACES, "--root"]

        def run(command: str, **settings: str) -> subprocess.CompletedProcess[str]:
            path = f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"
            words = [
                *enter,
                "env",
                "--chdir=/tmp/source",
                f"PATH={path}",
                *(f"{key}={value}" for key, value in settings.items()),
            ]
            return subprocess.run([*words, "bash", "-c", command], capture_output=True, text=True, check=False)

        wait_for(lambda: run("systemctl is-system-running").stdout == "running\n", 30, "systemd to be ready", every=0.2)
        yield run
    finally:
        outer.send_signal(signal.SIGKILL)
        outer.wait()


def test_the_unit_as_its_header_says(inside: Inside) -> None:
    """Installed, started, restarted beside a running job, killed, stopped."""

    def done(command: str, **settings: str) -> str:
        ended = inside(command, **settings)
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}{inside('journalctl -u pman').stdout}"
        return ended.stdout

    install, start = documented()
    for command in install:
        done(command)
    port = free_port()
    settings = f"PORT={port}\nSECRET_KEY=a secret key for tests\nSTOREBASE=/srv/store\n"
    done(f"install -d -o pman /srv/store && printf %s {shlex.quote(settings)} >>/etc/pman/environment")
    assert done("stat -c %a /etc/pman/environment") == "600\n"
    done(start)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return requests.get(f"{url}/readyz", timeout=10).ok
        except requests.ConnectionError:
            return False

    def main_pid() -> str:
        return done("systemctl show --property=MainPID --value pman").strip()

    wait_for(answers, 30, "pman")
    shown = done("/opt/pman/bin/pman run localhost/x:1 -- sh -c 'id -un'", PMAN_URL=url, STOREBASE="/srv/store")
    assert shown == "pman\n"

    # a restart and a crash of pman do not end, repeat or lose a job
    script = 'echo run >>"$1"/runs; until [ -e "$1"/end ]; do sleep 0.05; done; echo ended'
    request = {
        "jid": "long", "image": "localhost/x:1", "entrypoint": ["sh", "-c", script, "sh"], "args": [], "type": "fs",
        "auid": "chris", "number_of_workers": 1, "cpu_limit": 1000, "memory_limit": 100, "gpu_limit": 0,
        "input_dir": "in", "output_dir": "out",
    }  # fmt: skip
    done("install -d -o pman /srv/store/in")
    assert requests.post(f"{url}/api/v1/", json=request, timeout=30).status_code == 201

    def job() -> dict[str, str]:
        answer: dict[str, str] = requests.get(f"{url}/api/v1/long/", timeout=30).json()
        return answer

    wait_for(lambda: not inside("test -e /srv/store/out/runs").returncode, 20, "the job to run")
    before = main_pid()
    done("systemctl restart pman")
    wait_for(answers, 30, "pman to be back")
    assert (main_pid() != before, job()["status"]) == (True, "started")
    before = main_pid()
    done(f"kill -KILL {before}")
    wait_for(lambda: main_pid() not in ("0", before), 20, "systemd to start pman again", every=0.2)
    wait_for(answers, 30, "pman to be back")
    assert job()["status"] == "started"
    done("touch /srv/store/out/end")
    wait_for(lambda: job()["status"] == "finishedSuccessfully", 20, "the job to end")
    assert (job()["logs"], done("cat /srv/store/out/runs")) == ("ended\n", "run\n")
    done("test -d /var/lib/pman/jobs")
    done("systemctl stop pman")
    assert main_pid() == "0"
    assert not answers()
