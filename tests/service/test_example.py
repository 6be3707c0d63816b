"""The client of examples/ runs three jobs and reads why they ended, without a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.backends.test_local import local_rig
from tests.rig import ROOT, running


def test_the_client_of_twenty_lines(tmp_path: Path) -> None:
    script = ROOT / "examples" / "client.py"
    with running(local_rig(tmp_path)) as rig:
        command = [sys.executable, str(script), rig.start().url]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = ["good", "one finishedSuccessfully None 0", "bad", "two finishedWithError exit 3"]
    assert done.stdout.splitlines() == [*said, "three finishedWithError signal 137"]
    assert len(script.read_text().splitlines()) <= 22
