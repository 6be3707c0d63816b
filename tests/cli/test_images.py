"""`pman images` with Apptainer's stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.apptainer_rig import IMAGE, Site, apptainer_site
from tests.rig import ROOT, wait_for

REQUEST = json.loads((ROOT / "examples/copy-and-hash.json").read_text()) | {"image": IMAGE}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return apptainer_site(tmp_path)


def pman(site: Site, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pman", "images", *words], env={**os.environ, "PATH": site.path, **env},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_each_image_is_pulled_once_and_listed(site: Site, tmp_path: Path) -> None:
    directory = str(tmp_path / "images")
    for _ in range(2):
        done = pman(site, "pull", IMAGE, "pman/busybox:1", "--directory", directory)
        assert done.returncode == 0, done.stderr
    assert site.pulls == ["docker://pman/busybox:1"]
    assert pman(site, "list", "--directory", directory).stdout.split() == ["1", "pman/busybox:1"]


def test_the_image_of_a_request_is_the_one_that_the_site_chooses(site: Site, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay" / "slurm"
    overlay.mkdir(parents=True)
    (overlay / "job.sh.j2").write_text(
        '{% extends "shipped/slurm/job.sh.j2" %}\n'
        '{% set image = "mirror.example.org:5000/" ~ job.image.removeprefix("docker.io/") %}\n'
    )
    site.offer("mirror.example.org:5000/pman/busybox:1", root=tmp_path)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    settings = {
        "CONTAINER_ENV": "slurm",
        "SLURM_STATE_DIR": str(tmp_path / "state"),
        "STOREBASE": "/data",
        "TEMPLATES_DIR": str(overlay.parent),
    }
    done = pman(site, "pull", str(tmp_path / "request.json"), **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state/.images/mirror.example.org+5000%pman%busybox+1.sif").stat().st_size


def test_two_images_at_once(site: Site, tmp_path: Path) -> None:
    """They may share layers, and so a cache that simultaneous pulls spoil."""
    names = (IMAGE, "docker.io/pman/other:1")
    site.offer(*names, root=tmp_path, pull_seconds=2)
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda name: pman(site, "pull", name, "--directory", str(tmp_path / "images")), names))
    assert [(end.returncode, end.stderr) for end in done] == [(0, f"pulling {name}\n") for name in names]


def test_an_image_that_is_not_there(site: Site, tmp_path: Path) -> None:
    done = pman(site, "pull", "pman/none:1", IMAGE, "--directory", str(tmp_path))
    assert (done.returncode, "manifest unknown" in done.stderr) == (1, True)
    assert site.pulls == ["docker://pman/none:1", "docker://pman/busybox:1"]
    assert not list(tmp_path.glob("*none*.sif*.part*"))


def test_behind_the_prefix_and_without_a_directory(site: Site, tmp_path: Path) -> None:
    done = pman(site, "pull", IMAGE)
    assert (done.returncode, "SLURM_IMAGE_DIR" in done.stderr) == (2, True)
    prefix = f"env PMAN_TEST_PREFIX={tmp_path}"
    done = pman(site, "pull", IMAGE, SLURM_COMMAND_PREFIX=prefix, SLURM_IMAGE_DIR=str(tmp_path / "it's"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "it's/pman%busybox+1.sif").exists()


@pytest.fixture
def shared(site: Site) -> dict[str, str]:
    """Settings with an image directory that everybody may write, and commands that run as an ordinary user."""
    images = site.root / "images"
    images.mkdir()
    images.chmod(0o777)
    user = "" if os.getuid() else "setpriv --reuid nobody --regid nogroup --clear-groups"
    return {"SLURM_IMAGE_DIR": str(images), "SLURM_COMMAND_PREFIX": user}


def test_a_puller_that_is_killed(site: Site, shared: dict[str, str], tmp_path: Path) -> None:
    """What it began is waited for, since it writes into the same cache, and then thrown away."""
    site.offer(IMAGE, root=tmp_path, pull_seconds=1.5)
    words = [sys.executable, "-m", "pman", "images", "pull", IMAGE]
    with subprocess.Popen(
        words, cwd=ROOT, env=os.environ | shared | {"PATH": site.path}, start_new_session=True
    ) as one:
        wait_for(lambda: site.pulls, 20, "the pull to begin")
        os.killpg(one.pid, signal.SIGKILL)
    images = Path(shared["SLURM_IMAGE_DIR"])
    (images / "pman%busybox+1.sif.part.7").write_text("half")  # of a puller on another node
    done = pman(site, "pull", IMAGE, **shared)
    assert done.returncode == 0, done.stderr
    assert len(site.pulls) == 2
    assert {path.name for path in images.iterdir()} == {".lock", "pman%busybox+1.sif"}
    assert not (images / "pman%busybox+1.sif").read_bytes().startswith(b"half")


def test_a_directory_that_cannot_be_written(site: Site, shared: dict[str, str]) -> None:
    Path(shared["SLURM_IMAGE_DIR"]).chmod(0o555)
    done = pman(site, "pull", IMAGE, **shared)
    assert (done.returncode, site.pulls) == (1, [])
    assert f"no image directory can be written: {shared['SLURM_IMAGE_DIR']}" in done.stderr


def test_cromwell_has_the_same_functions() -> None:
    """deploy/cromwell/slurm.conf cannot include a template of pman's."""
    text = (ROOT / "templates/sh/container.sh.j2").read_text().partition("#}\n")[2]
    shared = "".join(f"        {line}" for line in text.splitlines(keepends=True))
    assert shared in (ROOT / "deploy/cromwell/slurm.conf").read_text()
    assert not set("{}\\") & set(text)
