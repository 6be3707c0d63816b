"""Overlays for tests of `pman check`, and what must be found in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pman import checking, cli
from tests.rig import ROOT

WDL, K8S, SWARM = "wdl/job.wdl.j2", "k8s/job.yaml.j2", "swarm/service.yaml.j2"
LOCAL, SLURM, DOCKER = "local/job.sh.j2", "slurm/job.sh.j2", "docker/container.yaml.j2"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}\n"
LOOP = "{% for name, value in job.env %}\n      - {{ name ~ '=' ~ value }}\n{% endfor %}\n"
INIT = "      initContainers:\n        - name: scratch\n          image: busybox\n"


def extending(name: str, *blocks: str) -> str:
    return f'{{% extends "shipped/{name}" %}}\n' + "".join(blocks)


def block(name: str, text: str) -> str:
    return f"{{% block {name} %}}\n{text}{{% endblock %}}\n"


def only(name: str, block_name: str, text: str) -> dict[str, str]:
    """An overlay of one template that overrides one block."""
    return {name: extending(name, block(block_name, text))}


def shipped(name: str, old: str, new: str) -> str:
    """A whole copy of the shipped template with one change."""
    text = (ROOT / "templates" / name).read_text()
    assert old in text, f"{name} no longer holds {old!r}"
    return text.replace(old, new, 1)


def line_of(name: str, text: str) -> int:
    """Where the shipped template holds `text`."""
    lines = (ROOT / "templates" / name).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@dataclass(frozen=True)
class Broken:
    """An overlay (path -> text) and the finding that it must bring: file, line and what is said."""

    name: str
    files: dict[str, str]
    file: str
    line: int
    said: str
    rule: str
    column: int = 0


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


TYPO = only(WDL, "site_attributes", "    who: {{ job.auidd }}\n")


def is_named(broken: Broken, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless `pman check` finds what the overlay, written to `place`, must bring."""
    monkeypatch.setattr("pman.templating.sandbox.MAX_RENDER_SECONDS", 0.5)
    monkeypatch.setattr("pman.targets.shell._CPU_SECONDS", 1)
    found = checking.SiteCheck(write(place, broken.files)).findings()
    told = "\n".join(map(str, found))
    matching = [
        f for f in found
        if f.rule == broken.rule and f.file == str(place / broken.file) and broken.said in f.message
    ]  # fmt: skip
    assert matching, told
    if broken.line:
        assert broken.line in [f.line for f in matching], told
    assert not broken.column or broken.column in [f.column for f in matching], told
