"""What a job sees of its node, in the words of the table of docs/runtimes.md."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.live.engine_cases import LOOK, OPTIONS
from tests.rig import OUT, ROOT, Rig, Server, wait_for

PAGE = ROOT / "docs" / "runtimes.md"
# Devices that every container has.
_USUAL = {"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "fd", "core", "mqueue",
          "stdin", "stdout", "stderr", "cpu_dma_latency"}  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """Runtime -> row -> cell of the first table of the page, without what stands in brackets behind the word."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [name.strip("`") for name in rows[0][1:]]
    cells = {row[0]: [cell.partition(" (")[0] for cell in row[1:]] for row in rows[2:] if len(row) == len(rows[0])}
    return {name: {row: values[number] for row, values in cells.items()} for number, name in enumerate(names)}


def seen(server: Server, rig: Rig, jid: str) -> Mapping[str, str]:
    """The same rows, as a job of this server finds them."""
    device = min(set(os.listdir("/dev")) - _USUAL)
    with (
        _gpu() as gpu,
        tempfile.NamedTemporaryFile(dir="/tmp") as tmp,
        tempfile.NamedTemporaryFile(dir=Path.home()) as home,
        tempfile.NamedTemporaryFile(dir="/dev/shm") as memory,
    ):
        nodes = {
            "environment": "env | grep -q -e ^PMAN_JOB_TOKEN= -e ^SLURM_JOB_UID=",
            "HOME": f'[ -e "$HOME/{Path(home.name).name}" ]',
            "`/tmp`": f"[ -e {tmp.name} ]",
            "network": f'[ "$(readlink /proc/self/ns/net)" = {shlex.quote(os.readlink("/proc/self/ns/net"))} ]',
            "processes": f"[ -e /proc/{os.getpid()}/stat ]",
            "devices": f"[ -e /dev/{device} ]",
            "GPUs": f"[ -c /dev/{gpu} ]",
            "shared memory": f"[ -e {memory.name} ]",
        }
        script = OUT + "".join(
            f'if {test}; then echo "the node\'s"; else echo own; fi >> "$out/seen"\n' for test in nodes.values()
        )
        script += 'if mkdir /probe 2>/dev/null; then rmdir /probe; echo yes; else echo no; fi >> "$out/seen"\n'
        script += 'if touch "$1/probe" 2>/dev/null; then echo no; else echo yes; fi >> "$out/seen"\n'
        script += 'id -u >> "$out/seen"\n'
        server.post(rig.request(jid, script, type="ds"))
        job = server.wait_final(jid, rig.job_seconds)
    assert job["status"] == "finishedSuccessfully", job
    *words, root, read_only, user = (rig.outgoing(jid) / "seen").read_text().splitlines()
    submitter = pwd.getpwnam(rig.user).pw_uid if rig.user else os.getuid()
    whose = "the submitter's" if int(user) == submitter else user
    found = dict(zip(nodes, words, strict=True))
    found |= {"root can be written": root, "input is read-only": read_only, "user": whose}
    if found["GPUs"] == "own":  # a runtime gives GPUs where it is asked to, which this job has not done
        del found["GPUs"]
    return found


@contextmanager
def _gpu() -> Iterator[str]:
    """The name of a device node like that of a GPU, whose driver need not be there. Only root can make one."""
    name = f"nvidia-pman-{os.getpid()}"
    if os.getuid():
        yield "null"
        return
    os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(195, 200))
    try:
        yield name
    finally:
        os.unlink(f"/dev/{name}")


def assert_no_directory_is_an_option(server: Server, rig: Rig, outside: Path) -> None:
    """Each job gets the two directories that it names and no other, or fails with a sentence about its paths."""
    (outside / "secret").write_text("the secret")
    requests = {}
    for number, text in enumerate(OPTIONS):
        path = f"{number}/v{text}".replace("OUTSIDE", str(outside))
        directories = {"input_dir": f"{path}/in{text[-1:]}", "output_dir": f"{path}/out{text[-1:]}"}
        request = requests[text] = rig.request(f"option-{number}", LOOK, type="ds", **directories)
        for path in directories.values():
            (rig.store / path).mkdir(parents=True)
            (rig.store / path / "own").touch()
            shutil.chown(rig.store / path, rig.user or os.getuid())
        assert server.post(request).status_code == 201
    for text, request in requests.items():
        job = server.wait_final(request["jid"], rig.job_seconds)
        assert "secret" not in job["logs"], (text, job)
        if job["status"] == "finishedSuccessfully":
            assert (rig.store / request["output_dir"] / "written").read_text() == "x\n", (text, job)
            assert job["logs"].split().count("own") == 2, (text, job)
        else:
            assert {",", ":"} & set(text), (text, job)
            assert job["message"].startswith("a path must not hold a colon or a comma"), (text, job)
    assert not (outside / "written").exists()


def assert_delete_ends_what_ignores_term(rig: Rig, jobs: Mapping[str, tuple[Server, int]]) -> None:
    """No worker of these jobs does anything after the 204. jobs: jid -> who runs it, number of its workers."""
    script = OUT + 'trap "" TERM; while :; do echo beat >> "$out/beats.$PMAN_WORKER_INDEX"; sleep 0.1; done'

    def delete(jid: str) -> None:
        server, workers = jobs[jid]
        assert server.post(rig.request(jid, script, number_of_workers=workers)).status_code == 201
        beats = [rig.outgoing(jid) / f"beats.{worker}" for worker in range(workers)]
        wait_for(lambda: all(file.exists() for file in beats), rig.job_seconds, f"the first beats of {jid}")
        assert server.delete(jid).status_code == 204, jid
        sizes = [file.stat().st_size for file in beats]
        time.sleep(0.5)  # five beats
        assert [file.stat().st_size for file in beats] == sizes, jid

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(delete, jobs))
