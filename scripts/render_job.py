#!/usr/bin/env python3
"""Print exactly what pman would submit for a job request, offline: `render_job.py REQUEST.json --to wdl`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from pman.cli import render
except ModuleNotFoundError as error:
    sys.exit(f"{error}: scripts/quickstart installs what pman needs; then run `. .venv/bin/activate`.")

if __name__ == "__main__":
    render()
