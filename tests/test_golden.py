"""Every target's rendered text, compared whole with tests/golden. Record anew after an intended change:

PMAN_RECORD_GOLDEN=1 pytest tests/test_golden.py   (then read the diff before committing it)
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pman import job, settings
from pman.targets import TARGETS, judge
from pman.templating import render
from tests.rig import ROOT

GOLDEN = ROOT / "tests" / "golden"
RECORD = "PMAN_RECORD_GOLDEN=1 pytest tests/test_golden.py"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.json"))
FILES = {name: Path(target.template).stem for name, target in TARGETS.items()}

HOST = {"STOREBASE": "/data/store"}
PLAIN: dict[str, Any] = {
    "jid": "chris-jid-7", "type": "ds", "auid": "cube", "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
    "entrypoint": ["simpledsapp"], "args": ["--threshold", "0.5"], "number_of_workers": 1, "cpu_limit": 1500,
    "memory_limit": 512, "gpu_limit": 0, "env": ["GREETING=hello"],
}  # fmt: skip


def having(storage_type: str) -> tuple[str, ...]:
    return tuple(name for name, target in TARGETS.items() if storage_type in target.storage_types)


# name -> (targets, fields of the request, settings)
EVERYWHERE = tuple(FILES)
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, str]]] = {
    "plain": (EVERYWHERE, {}, HOST),
    "gpus": (EVERYWHERE, {"gpu_limit": 2}, HOST),
    "image-and-disk": (
        ("k8s",),
        {},
        HOST | {"PULL_POLICY": "always", "EPHEMERAL_STORAGE_MIB": "2048", "JOB_TTL_SECONDS": "600"},
    ),
    "gpus-by-another-name": (("k8s", "swarm"), {"gpu_limit": 1}, HOST | {"GPU_RESOURCE_NAME": "amd.com/gpu"}),
    "limits-ignored": (EVERYWHERE, {"gpu_limit": 1}, HOST | {"IGNORE_LIMITS": "yes"}),
    "time-limit-and-partition": (EVERYWHERE, {"time_limit_minutes": 90, "partition": "gpu-long"}, HOST),
    "settings-of-slurm": (
        ("wdl", "slurm"),
        {},
        HOST
        | {"TIMELIMIT_MINUTES": "30", "SLURM_PARTITION": "short", "SLURM_ACCOUNT": "lab", "SLURM_QOS": "low"}
        | {"CROMWELL_BACKEND": "SLURM"},
    ),
    "user-shm-labels": (
        EVERYWHERE,
        {},
        HOST
        | {"CONTAINER_USER": "1000-1999:2000", "SHM_SIZE": "64", "JOB_LABELS": "site=boston,tier=gold"}
        | {"ENABLE_HOME_WORKAROUND": "yes"},
    ),
    "directories-apart": (
        EVERYWHERE,
        {"input_dir": "key-7/incoming", "output_dir": "chris/feed_1/out put"},
        HOST,
    ),
    "user-shm-podman": (
        ("local", "slurm"),
        {},
        HOST | {"CONTAINER_USER": "1000:2000", "SHM_SIZE": "64", "LOCAL_RUNTIME": "podman", "SLURM_RUNTIME": "podman"},
    ),
    "no-arguments": (EVERYWHERE, {"type": "fs", "args": [], "env": []}, HOST),
    "nfs": (
        having("nfs"),
        {},
        {"STORAGE_TYPE": "nfs", "NFS_SERVER": "nfs.example.org", "STOREBASE": "/export/chris"},
    ),
    "volume": (
        having("docker_local_volume"),
        {},
        {"STORAGE_TYPE": "docker_local_volume", "VOLUME_NAME": "chris-files"},
    ),
    "pvc": (having("kubernetes_pvc"), {}, {"STORAGE_TYPE": "kubernetes_pvc", "VOLUME_NAME": "chris-files"}),
    "placement": (
        ("k8s",),
        {},
        HOST
        | {"NODE_SELECTOR": "disk=ssd,zone=a", "IMAGE_PULL_SECRETS": "hub,quay", "PFCON_SELECTOR": "app=pfcon"}
        | {"SECURITYCONTEXT_RUN_AS_USER": "5000", "SECURITYCONTEXT_RUN_AS_GROUP": "6000"},
    ),
    **{
        f"runtime-{runtime}": (("local",), {"gpu_limit": 1}, HOST | {"LOCAL_RUNTIME": runtime})
        for runtime in ("bubblewrap", "charliecloud", "apptainer", "podman", "docker")
    },
    **{
        f"slurm-{runtime}": (("slurm",), {"gpu_limit": 1}, HOST | {"SLURM_RUNTIME": runtime, "SLURM_IMAGE_DIR": "/img"})
        for runtime in ("bubblewrap", "charliecloud", "apptainer", "singularity", "podman", "none")
    },
}


def cases() -> list[tuple[str, str]]:
    names = [*((target, f"example-{name}") for target in TARGETS for name in EXAMPLES)]
    return names + [(target, name) for name, row in VARIANTS.items() for target in row[0]]


def rendered(target: str, name: str) -> render.Spec:
    if name.startswith("example-"):
        data = json.loads((ROOT / "examples" / f"{name.removeprefix('example-')}.json").read_text())
        environment = HOST
    else:
        _, fields, environment = VARIANTS[name]
        data = PLAIN | fields
    config = settings.load(environment)
    return render.Renderer(config, TARGETS).render(job.make_job(job.validate(data), config), target)


def compare(path: Path, text: str, command: str = RECORD) -> None:
    """Fails unless `path` holds exactly `text`; with PMAN_RECORD_GOLDEN set it is written instead."""
    if os.environ.get("PMAN_RECORD_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    assert path.is_file(), f"{path} is missing; record it:  {command}"
    recorded = path.read_bytes().decode()
    diff = "".join(difflib.unified_diff(recorded.splitlines(True), text.splitlines(True), "recorded", "rendered"))
    assert text == recorded, f"{path}\n{diff}\nIf this is intended, record it:  {command}"


@pytest.mark.parametrize(("target", "name"), cases(), ids=["/".join(case) for case in cases()])
def test_rendered_text_is_as_recorded(target: str, name: str) -> None:
    spec = rendered(target, name)
    assert judge(spec) == []
    compare(GOLDEN / target / name / FILES[target], spec.text)
    for extra, text in spec.extras.items():
        compare(GOLDEN / target / name / extra, text)


def test_nothing_else_is_recorded() -> None:
    known = {GOLDEN / target / name for target, name in cases()}
    recorded = {path.parent for target in FILES for path in (GOLDEN / target).rglob("*") if path.is_file()}
    assert recorded - known == set()
