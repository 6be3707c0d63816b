"""The documentation as a site: it is built strictly, needs nothing from elsewhere, and shows what the files say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from pman import __version__
from tests.cli.test_commands import NOT_COPIED
from tests.rig import ROOT
from tests.scripts.test_docs import blocks
from tests.scripts.test_docs_templates import commands, matches

OWN = sorted((ROOT / "docs").rglob("*.md"))
LOADED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose .venv is known to be complete."""
    copy = tmp_path_factory.mktemp("docs") / "checkout"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/mkdocs").write_text(f'#!/bin/sh\nexec {sys.executable} -m mkdocs "$@"\n')
    (copy / ".venv/bin/mkdocs").chmod(0o755)
    stamp = f"cat {copy}/pyproject.toml {copy}/constraints.txt | cksum > {copy}/.venv/pman-docs"
    subprocess.run(["sh", "-c", stamp], check=True)
    return copy


def build(checkout: Path, site: str) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / "scripts/docs"), "--build", site]
    env = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        command, cwd=checkout.parent, env=env, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def site(checkout: Path) -> Path:
    done = build(checkout, "site")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout.parent / "site"


@pytest.mark.slow
def test_every_page_is_in_the_site_and_in_its_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in OWN:
        path = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / path).is_file()
        assert f'href="{path}"' in start


@pytest.mark.slow
def test_pages_that_are_made_with_the_site_are_those_of_the_code(site: Path) -> None:
    page = (site / "reference/errors.html").read_text()
    assert "There is no job with jid …." in page  # pman.errors
    assert "Line … must be JSON: …." in page  # pman.cli
    assert "yours, empty here" in (site / "reference/comments.html").read_text()  # templates/wdl/job.wdl.j2


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert [found for page in site.rglob("*.html") for found in LOADED.findall(page.read_text())] == []
    assert "url(http" not in "".join(style.read_text() for style in site.rglob("*.css"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["way-of-a-job.svg", "who-owns-which-state.svg"])
def test_a_drawing_is_shown_and_loads_nothing(site: Path, name: str) -> None:
    assert f'src="images/{name}"' in (site / "how-it-works.html").read_text()
    drawing = ElementTree.parse(site / "images" / name).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    values = [value for element in drawing.iter() for value in (*element.attrib.values(), element.text or "")]
    assert not any("//" in value for value in values)


@pytest.mark.slow
def test_blocks_tables_and_lists_are_drawn(site: Path) -> None:
    """What Markdown on a page of the repository takes for a block, the site must not take for text."""
    for page in site.rglob("*.html"):
        text = re.sub(r"(?s)<(pre|code)\b.*?</\1>", "", page.read_text())
        assert "```" not in text, page.name
        assert not re.search(r"<p>\|.*\|", text), page.name
        assert not re.search(r"<p>[^<]*\n(?:- |\d\. )", text), page.name


@pytest.mark.slow
def test_a_link_that_leads_nowhere_is_an_error(checkout: Path, site: Path) -> None:
    page = checkout / "docs/usage.md"
    page.write_text(page.read_text() + "\n[a](operators.md#no-such-heading)\n")
    done = build(checkout, "other")
    assert done.returncode == 1
    assert "no-such-heading" in done.stdout + done.stderr


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_a_page_begins_with_what_its_reader_will_have_done(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if line and not line.startswith("<!--")]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("At the end of this page you will ")


def test_the_readme_is_one_screen_and_its_script_is_what_is_rendered() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 60
    first = readme.read_text().split("\n\n")[1:3]
    assert first[0].count(". ") == 0
    assert [line.split()[0] for line in first[1].splitlines()[1:-1]] == ["scripts/quickstart", "scripts/test"]
    assert blocks(readme, "json") == [("json", (ROOT / "examples/docs/templates.json").read_text())]
    for _, text in blocks(readme, "console"):
        for command, expected in commands(text):
            shell = f"exec {sys.executable} {command}"
            done = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
            assert matches(expected, done.stdout)


def test_versions_agree() -> None:
    chart = yaml.safe_load((ROOT / "deploy/helm/Chart.yaml").read_text())
    assert __version__.split(".")[0] == chart["appVersion"]
    headings = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert headings[0] == __version__
