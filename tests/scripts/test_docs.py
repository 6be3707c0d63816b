"""The documentation is true: its commands run as written, its links lead somewhere, its reference is the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.test_local import local_rig
from tests.rig import ROOT, running
from tests.scripts import reference

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "bench/README.md"]
# Requests of pages, which `pman examples` copies -> page, and what stands before and behind it there.
REQUESTS = {
    "usage.json": ("docs/usage.md", "cat > request.json <<'JSON'\n", "JSON\n"),
    "templates.json": ("docs/templates.md", "```json request.json\n", "```\n"),
}


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the page's fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [(language, text) for language, text in found if language in languages]


def request_of(name: str) -> str:
    page, before, behind = REQUESTS[name]
    return (ROOT / page).read_text().partition(before)[2].partition(behind)[0]


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_tables(name: str) -> None:
    """Record again with `python -m tests.scripts.test_docs`."""
    recorded = (reference.DIRECTORY / name).read_text()
    if name == "licences.md":  # what another version of Python does without may be listed
        names = {
            f"| {each} | {licence} |" for group in reference.licences().values() for each, licence in group.items()
        }
        assert names - set(recorded.splitlines()) == set(), "run `python -m tests.scripts.test_docs`"
    else:
        assert recorded == reference.page(name), f"{name} is out of date: run `python -m tests.scripts.test_docs`"


def test_no_other_page_is_in_the_reference() -> None:
    assert {path.name for path in reference.DIRECTORY.iterdir()} == set(reference.PAGES)


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_pages_are_among_the_examples(name: str) -> None:
    assert (ROOT / "examples/docs" / name).read_text() == request_of(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pictures_are_small_and_shown() -> None:
    """`scripts/screenshots` makes them again; tests/live/test_pages.py runs it."""
    pictures = list((ROOT / "docs/images").glob("*.png"))
    shown = {
        name for page in PAGES for name in re.findall(r"!\[[^\]]+\]\([^)]*images/([\w-]+\.png)\)", page.read_text())
    }
    assert shown == {picture.name for picture in pictures} != set()
    assert sum(picture.stat().st_size for picture in pictures) < 1_000_000


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
    reference.record()
    for name in REQUESTS:
        (ROOT / "examples/docs" / name).write_text(request_of(name))


if __name__ == "__main__":
    record()
