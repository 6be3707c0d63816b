"""Images that stand in for public ones, made of this machine's programs: no registry is asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.rig import ROOT

BASE = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "deploy/Dockerfile").read_text(), re.M)[0]
CROMWELL = re.findall(r"image: \S+:-(\S+cromwell\S+)\}$", (ROOT / "deploy/compose.slurm.yml").read_text(), re.M)[0]
# What the Dockerfile, jobs of the embedded backend, and the jobs and scripts of Cromwell's stand-in call.
PROGRAMS = (
    "awk", "basename", "bash", "cat", "chmod", "cut", "date", "dirname", "env", "expr", "find", "grep", "head",
    "hostname", "id", "ln", "ls", "mkdir", "mkfifo", "mv", "readlink", "rm", "sed", "seq", "setsid", "sh", "sleep",
    "sort", "sync", "tail", "tee", "timeout", "touch", "tr", "uname", "wc",
)  # fmt: skip
# What wheels find in every system beside libc: https://peps.python.org/pep-0599/
OF_WHEELS = (
    "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libutil.so.1",
)  # fmt: skip
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
PATH = f"PATH=/opt/pman/bin:/usr/local/bin:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
# As the public image starts Cromwell: a property of Java's names the configuration, and the logs of workflows are
# written below the working directory. Without file.encoding Java spoils what is not ASCII.
START_CROMWELL = """#!/bin/sh -e
[ "$1" = server ]
mkdir -p cromwell-workflow-logs
property() { printf %s "$JAVA_OPTS" | tr ' ' '\\n' | sed -n "s/^-D$1=//p"; }
[ "$(property file.encoding)" = UTF-8 ]
conf=$(property config.file)
grep -q 'include "slurm.conf"' "$conf"
address=$(sed -n 's/^webservice.interface = "\\(.*\\)"$/\\1/p' "$conf")
database=$(sed -n 's/^ *url = "jdbc:hsqldb:file:\\([^;]*\\)\\/[^;]*;.*/\\1/p' "$conf")
exec python3 -m tests.fakes.cromwell $STAND_IN --listen "$address" --port 8000 --root "$database" --configured-root \\
    --conf "${conf%/*}/slurm.conf"
"""


def out(command: list[str], **kwargs: object) -> str:
    """Its standard output. Fails the test with all that it wrote unless it ends with 0."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return str(done.stdout)


def libraries(program: str) -> set[str]:
    lines = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout.splitlines()
    return {word for line in lines for word in line.split() if word.startswith("/")}


def make_root(root: Path) -> None:
    """A root directory with this machine's Python, a shell and PROGRAMS."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    prefix = Path(sys.base_prefix)
    stdlib = Path(sysconfig.get_path("stdlib"))
    keep = shutil.ignore_patterns("__pycache__", "test", "tests", "site-packages", "dist-packages", "config-*", "*.a")
    shutil.copytree(stdlib, root / stdlib.relative_to("/"), symlinks=True, ignore=keep)
    python = Path(sys.executable).resolve()
    programs = {str(python)} | {path for name in PROGRAMS if (path := shutil.which(name))}
    shared = {str(path) for path in stdlib.rglob("*.so")} | {
        str(path) for path in (prefix / "lib").glob("libpython*.so*")
    }
    needed = set().union(*map(libraries, programs | shared))
    system = next(Path(path).parent for path in needed if path.endswith("/libc.so.6"))
    needed |= {str(system / name) for name in OF_WHEELS if (system / name).exists()}
    wheels = Path("/usr/share/python-wheels")  # where Debian's ensurepip has pip
    if wheels.is_dir():
        shutil.copytree(wheels, root / wheels.relative_to("/"))
    for source in sorted(programs | needed | {path for path in shared if "/libpython" in path}):
        target = root / source.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/python3").symlink_to(python)
    for name in ("tmp", "proc", "sys", "dev", "etc"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")


def make_base(docker: list[str], directory: Path) -> None:
    """BASE, under its public name. Its pip knows the wheels that pman needs, since it has no package index."""
    root = directory / "base"
    make_root(root)
    out(
        [
            *PIP,
            "wheel",
            "--constraint",
            "constraints.txt",
            "--wheel-dir",
            str(root / "wheels"),
            ".[gunicorn,dev]",
            "hatchling",
        ],
        cwd=ROOT,
    )
    (root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    archive = directory / "base.tar"
    out(["tar", "-C", str(root), "-cf", str(archive), "."])
    out([*docker, "import", "--change", f"ENV {PATH}", str(archive), BASE])
    archive.unlink()


def make_cromwell(docker: list[str], directory: Path) -> None:
    """CROMWELL, under its public name: the project's stand-in, with an sbatch of its own that needs no SLURM."""
    fakes = directory / "app/tests/fakes"
    shutil.copytree(ROOT / "tests/fakes", fakes, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/__init__.py", directory / "app/tests")
    target = ["--target", str(directory / "app"), "--constraint", str(ROOT / "constraints.txt")]
    out([*PIP, "install", *target, "flask", "miniwdl", "pyhocon", "pyyaml"])
    (directory / "start").write_text(START_CROMWELL)
    (directory / "start").chmod(0o755)
    (directory / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY app /app\nCOPY start /start\nENV PYTHONPATH=/app STAND_IN=--local\n"
        'RUN mkdir /share && mkdir -m 777 /share/outgoing\nENTRYPOINT ["/start"]\n'
    )
    out([*docker, "build", "--tag", CROMWELL, str(directory)], env={**os.environ, "DOCKER_BUILDKIT": "0"})
