"""docs/templates.md and docs/rules.md: every snippet is written or run as it stands; tables are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pman import settings
from pman.checking import overlay
from pman.cli import templates as cli_templates
from pman.targets import TARGETS
from pman.templating import render
from tests.rig import ROOT

TEXT = "".join((ROOT / "docs" / page).read_text() for page in ("templates.md", "rules.md"))
ALL = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))  # a target may have its own
SECTIONS = [section for section in re.split(r"(?m)^##+ ", TEXT) if "```" in section]
FENCE = re.compile(r"(?ms)^```(\w+)(?: (\S+))?\n(.*?)^```$")
REQUEST = next(match[3] for match in FENCE.finditer(TEXT) if match[2] == "request.json")


def matches(expected: str, said: str) -> bool:
    """Line by line; `...` stands for anything, alone on a line also for any number of lines."""
    lines = [re.escape(line).replace(r"\.\.\.", ".*") for line in expected.splitlines()]
    pattern = "".join("(?:.*\n)*" if line == ".*" else f"{line}\n" for line in lines)
    return re.fullmatch(pattern, said) is not None


def commands(block: str) -> list[tuple[str, str]]:
    """(command, output that must follow) for each line that begins with `$ `."""
    parts = re.split(r"(?m)^\$ (.*)\n", block)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_snippets_do_what_is_said(section: str, tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "pman").write_text(f'#!/bin/sh\nexec {sys.executable} -m pman "$@"\n')
    (binaries / "pman").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "request.json").write_text(REQUEST)
    env = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    for kind, name, text in FENCE.findall(section):
        if kind != "console":
            assert name, f"a snippet without a file name: {text}"
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
            continue
        for command, expected in commands(text):
            shell = ["bash", "-c", f"{{ {command}; }} 2>&1"]
            said = subprocess.run(shell, cwd=work, env=env, capture_output=True, text=True, check=False).stdout
            assert matches(expected, said), f"$ {command}\n{said}"


def test_the_table_of_blocks_is_true() -> None:
    found = overlay.Overlay(render.Renderer(settings.load({}), TARGETS))
    rows = re.findall(r"(?m)^\| (\w+/[\w.]+\.j2) \| (.+) \|$", ALL)
    for name, blocks in rows:
        known = {block for template in found.chain(name) for block in template.blocks}
        assert set(blocks.split(", ")) == known, name
    shipped = {name for name in found.shipped_names if found.chain(name)[0].blocks and not name.startswith("sh/")}
    assert {name for name, _ in rows} == shipped


def test_the_table_of_filters_is_true() -> None:
    languages = render.Renderer(settings.load({}), TARGETS).filters.values()
    tables = re.findall(r"(?m)^\| filter \|.*\n\|---.*\n((?:\|.*\n)+)", ALL)
    assert {name for rows in tables for name in re.findall(r"(?m)^\| `(\w+)` \|", rows)} == {
        name for filters in languages for name in filters
    }


def test_every_command_is_named() -> None:
    names = set(cli_templates.templates.commands)
    assert [name for name in names if f"pman templates {name}" not in TEXT] == []
