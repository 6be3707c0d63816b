"""docs/reliability.md: the tests that it names are there, and its tables are put where they belong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.rig import ROOT

PAGE = ROOT / "docs/reliability.md"


def test_every_test_that_is_named_is_there() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_reports_of_chaos_become_a_table(tmp_path: Path) -> None:
    """In place of what stood there, and of nothing else."""
    page, report = tmp_path / "page.md", tmp_path / "chaos-local.json"
    page.write_text(PAGE.read_text())
    told = {"backend": "local", "seed": 7, "minutes": 30.0, "date": "2026-11-30T19:00:00", "load": 2.504, "jobs": 600}
    told |= {"executions": 640, "events": {"kill pman": 12}, "answers": {"GET 200": 9000, "POST 201": 600}}
    report.write_text(json.dumps(told | {"findings": ["one"]}))
    for _ in range(2):
        command = [sys.executable, "bench/scale.py", "--page", str(page), "--chaos", str(report)]
        subprocess.run(command, cwd=ROOT, check=True)
    before, after = (text.partition("<!-- end of chaos -->") for text in (PAGE.read_text(), page.read_text()))
    assert after[2] == before[2]
    row = "| local | 7 | 30 | 2026-11-30T19:00:00 | 2.5 | 600 | 640 | kill pman 12 | GET 200 9000, POST 201 600 | 1 |"
    assert after[0].endswith(f"{row}\n\n")
    assert "No run has been put here yet" not in after[0]
