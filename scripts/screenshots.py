"""Pictures of the pages: of jobs on this machine, and of the backend over commands that answer as SLURM does."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_examples import address, http, serve

from tests.browser import chromium, resize, webdriver

WIDTH = 1100
# The programs of the jobs, which the local backend takes from its PATH.
PROGRAMS = {
    "simpledsapp": "echo done",
    "dcm2niix_run": "echo 'there are no DICOM files in the input' >&2; exit 3",
    "recon": "kill -9 $$",
    "segment": r"""
printf '\033[1mreading\033[0m \033[36mbrain.mgz\033[0m (256 x 256 x 256)\n'
printf '\033[33mWARNING\033[0m no GPU was asked for: this runs on 4 CPUs\n'
for plane in axial coronal; do printf "the $plane view ...\n\033[32mOK\033[0m 95 classes\n"; done
echo 'the sagittal view ...'
exec sleep 600""",
}
# jid, user, image, command
JOBS = (
    ("chris-jid-101", "alice", "docker.io/fnndsc/pl-simpledsapp:2.1.0", ["simpledsapp"]),
    ("chris-jid-102", "bob", "docker.io/fnndsc/pl-dcm2niix:1.1.0", ["dcm2niix_run", "-z", "y"]),
    ("chris-jid-103", "alice", "docker.io/fnndsc/pl-simpledsapp:2.1.0", ["simpledsapp", "--prefix", "it's"]),
    ("chris-jid-104", "carol", "docker.io/example/recon:7", ["recon", "--all"]),
    ("chris-jid-105", "bob", "docker.io/fnndsc/pl-simpledsapp:2.1.0", ["simpledsapp"]),
    ("chris-jid-106", "alice", "docker.io/example/segment:1.3", ["segment", "--classes", "95", "--subject", "it's me"]),
)
# Words as SLURM 24.11 has them; tests/backends/test_discovery.py says where they were measured.
SLURM = r"""
case "$*" in
    *--version*) echo slurm 24.11.5 ;;
    *%F) printf 'main|7/5/0/12\nbigmem|1/1/0/2\ngpu|3/0/1/4\n' ;;
    *%G) printf 'main|256000|64|(null)\nbigmem|2048000|96|(null)\ngpu|512000|64|gpu:a100:4\n' ;;
    *scontrol*)
        echo "PartitionName=main AllowAccounts=ALL Default=YES MaxTime=2-00:00:00 State=UP"
        echo "PartitionName=bigmem AllowAccounts=ALL Default=NO MaxTime=7-00:00:00 State=UP"
        echo "PartitionName=gpu AllowAccounts=ALL Default=NO MaxTime=1-00:00:00 State=UP" ;;
esac
"""
SETTINGS = {"SECRET_KEY": "only for the pictures", "PORT": "0"}


def main() -> int:
    pictures = Path(sys.argv[1])
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pman-pictures-") as directory, ExitStack() as running:
        home = Path(directory)
        (home / "store").mkdir()
        (home / "bin").mkdir()
        for name, text in (PROGRAMS | {"slurm": SLURM}).items():
            (home / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (home / "bin" / name).chmod(0o755)
        path = f"{home}/bin:{os.environ['PATH']}"
        local = SETTINGS | {"STOREBASE": str(home / "store"), "LOCAL_STATE_DIR": str(home / "state"), "PATH": path}
        slurm = SETTINGS | {
            "CONTAINER_ENV": "slurm", "STOREBASE": "/data/store", "SLURM_STATE_DIR": str(home / "jobs"),
            "SLURM_COMMAND_PREFIX": str(home / "bin/slurm"), "TIMELIMIT_MINUTES": "60", "TIMELIMIT_MAX_MINUTES": "2880",
        }  # fmt: skip
        url, cluster = (start(running, settings, home / f"{name}.log") for name, settings in enumerate((local, slurm)))
        running.callback(http.delete, f"{url}/api/v1/{JOBS[-1][0]}/", timeout=60)  # it would run on
        for job in JOBS:
            (home / "store" / f"key-{job[0]}" / "incoming").mkdir(parents=True)
            post(url, *job)
        chrome = running.enter_context(chromium(home / "profile"))
        last = f"{url}/jobs/{JOBS[-1][0]}/"
        for name, page, shows in (
            ("jobs", f"{url}/", "started 1"),
            ("job", last, "New lines appear here."),
            ("backend", f"{cluster}/backend", "types of GPUs"),
            ("playground", f"{cluster}/render", "parser accepts this"),
        ):
            take(chrome, page, shows, pictures / f"{name}.png")
    return 0


def start(running: ExitStack, settings: dict[str, str], log: Path) -> str:
    """The address of a pman that runs until the end of `running`."""
    server = serve(settings, log)
    running.callback(server.wait, 10)
    running.callback(server.terminate)
    return address(server, log)


def post(url: str, jid: str, user: str, image: str, command: list[str]) -> None:
    """Run the job, and wait until it has ended or says that it is at its last step."""
    request = {
        "jid": jid, "auid": user, "image": image, "entrypoint": command[:1], "args": command[1:], "type": "ds",
        "env": ["SUBJECTS_DIR=/share/outgoing"], "number_of_workers": 1, "cpu_limit": 4000, "memory_limit": 8192,
        "gpu_limit": 0, "time_limit_minutes": 240,
    }  # fmt: skip
    http.post(f"{url}/api/v1/", json=request, timeout=30).raise_for_status()
    while True:
        job = http.get(f"{url}/api/v1/{jid}/", timeout=30).json()
        if job["status"].startswith("finished") or "sagittal" in job["logs"]:
            return
        time.sleep(0.1)


def take(chrome: webdriver.Chrome, page: str, shows: str, picture: Path) -> None:
    """The picture of a page, as soon as it shows these words; its lower part is cut off where it is very long."""
    chrome.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    resize(chrome, WIDTH, 700)
    chrome.get(page)
    deadline = time.monotonic() + 60
    while shows not in chrome.find_element("tag name", "body").text:
        if time.monotonic() > deadline:
            sys.exit(f"{page} does not show {shows!r}")
        time.sleep(0.1)
    resize(chrome, WIDTH, min(900, chrome.execute_script("return document.body.scrollHeight")))
    chrome.save_screenshot(str(picture))
    print(f"{picture} ({picture.stat().st_size // 1024} KiB)")


if __name__ == "__main__":
    sys.exit(main())
