"""The documentation is true: its commands run as written, its links lead somewhere, its table is the settings'."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pman.backends import BACKENDS
from pman.settings import markdown_table
from tests.backends.test_local import local_rig
from tests.rig import ROOT, running

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/README.md"]


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the page's fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [(language, text) for language, text in found if language in languages]


def test_settings_table() -> None:
    """Record again with `python -m tests.scripts.test_docs`, which puts `pman settings` into README.md."""
    table = re.search(r"<!-- settings.*?-->\n(.*)<!-- end of settings -->", (ROOT / "README.md").read_text(), re.S)
    assert table
    assert table[1] == markdown_table(BACKENDS), "README.md is out of date: run `python -m tests.scripts.test_docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_every_example_of_the_usage_page(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "pman"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pman "$@"\n')
    command.chmod(0o755)
    (tmp_path / "work").mkdir()
    with running(local_rig(tmp_path)) as rig:
        server = rig.start()
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        env |= {"PMAN_URL": server.url, "STOREBASE": str(rig.store)}
        shown = []
        for language, text in blocks(ROOT / "docs/usage.md", "sh", "python"):
            program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
            done = subprocess.run(
                [*program, text],
                cwd=tmp_path / "work",
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            shown.append(done.stdout)
    output = "\n".join(shown)
    for words in ("12", "hello, world", "hello-1", "finishedSuccessfully", "workflow ChRISJob", "kind: Job", "args"):
        assert words in output, words


def record() -> None:
    readme = ROOT / "README.md"
    begin, end = "<!-- settings: made by `pman settings` -->\n", "<!-- end of settings -->"
    head, _, rest = readme.read_text().partition(begin)
    readme.write_text(head + begin + markdown_table(BACKENDS) + end + rest.partition(end)[2])


if __name__ == "__main__":
    record()
