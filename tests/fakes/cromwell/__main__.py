"""python -m tests.fakes.cromwell --conf deploy/cromwell/slurm.conf --root DIR --port N [--pace quick|stock|test]"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path

from tests.fakes.cromwell.config import TEST_PACE, Config, Pace, load
from tests.fakes.cromwell.server import Cromwell

BIN = Path(__file__).parent / "bin"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.cromwell", description="A stand-in for Cromwell.")
    parser.add_argument("--conf", type=Path, required=True, help="Cromwell's configuration (HOCON)")
    parser.add_argument("--root", type=Path, required=True, help="directory of the database and of the executions")
    parser.add_argument("--configured-root", action="store_true", help="executions are where the configuration says")
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--pace", choices=["quick", "stock", "test"], default="quick",
        help="quick: as the configuration says; stock: Cromwell's defaults; test: about ten times quicker",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=SECONDS",
        help="one value of the pace: " + ", ".join(field.name for field in fields(Pace)),
    )  # fmt: skip
    parser.add_argument(
        "--write-delay", type=float, default=0, metavar="SECONDS",
        help="commit that seldom, as HSQLDB does by default (0.5): a kill -9 may lose a workflow after its 201",
    )  # fmt: skip
    parser.add_argument("--docker-bug", action="store_true", help="a declared docker attribute fails the job")
    parser.add_argument(
        "--local", action="store_true", help="put a tiny sbatch, squeue and scancel that need no SLURM first on PATH"
    )
    return parser.parse_args()


def pace(config: Config, name: str, changes: list[str]) -> Pace:
    chosen = {"quick": config.pace, "stock": Pace(), "test": TEST_PACE}[name]
    pairs = [change.split("=", 1) for change in changes]
    return replace(chosen, **{key: type(getattr(chosen, key))(float(value)) for key, value in pairs})


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    options = arguments()
    if options.local:
        os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
        os.environ.setdefault("PMAN_PROLOGUE", f'PATH="{BIN}:$PATH"')  # a job of slurm.conf has the PATH of its node
        os.environ["SLURM_CONF"] = str((options.root / "local-slurm").absolute())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = replace(load(options.conf), docker_bug=options.docker_bug)
    if not options.configured_root:
        config = config.at(options.root / "executions")
    chosen = pace(config, options.pace, options.set)
    with Cromwell(config, options.root, options.port, chosen, options.write_delay, options.listen) as server:
        print(f"Cromwell's stand-in serves {server.url}", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
