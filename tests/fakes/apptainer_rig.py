"""A site with the stand-in for Apptainer, for the tests of every backend that calls it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import development
from tests.rig import ROOT

IMAGE = "docker.io/pman/busybox:1"
PROGRAM = ROOT / "tests" / "fakes" / "apptainer" / "apptainer"


@dataclass(frozen=True)
class Site:
    """What the machines of a cluster share: the program, and the registry that it pulls from."""

    root: Path

    @property
    def path(self) -> str:
        """PATH of a machine that has the program."""
        return f"{self.root / 'bin'}:{os.environ['PATH']}"

    @property
    def profile(self) -> str:
        """The line of a shell that gives a job of such a machine the program."""
        return f'export PATH="{self.root}/bin:$PATH"'

    @property
    def pulls(self) -> list[str]:
        """What was pulled, one source for each try."""
        file = self.root / "pulls"
        return file.read_text().splitlines() if file.exists() else []

    def offer(self, *images: str, root: Path | None = None, **fields: Any) -> None:
        """Let the registry have these images, all of the same busybox (or `root`); `fields` as in registry.json."""
        image = {"root": str(root or development("slurm")["PMAN_TEST_IMAGE_DIR"])}
        content = {"images": dict.fromkeys(images, image), **fields}
        (self.root / "registry.json").write_text(json.dumps(content))


def apptainer_site(root: Path | None = None) -> Site:
    """A new site, gone at the end, whose registry has IMAGE. root: as of offer().

    Every user may use it: tests that run as root let jobs run as another one, who may see neither this repository nor
    the directories of pytest.
    """
    place = Path(tempfile.mkdtemp(prefix="pman-a-", dir="/tmp"))
    place.chmod(0o777)
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    (place / "bin").mkdir()
    for program in ("apptainer", "singularity"):
        shutil.copy(PROGRAM, place / "bin" / program)
    site = Site(place)
    site.offer(IMAGE, root=root, pull_seconds=0.2)
    return site
