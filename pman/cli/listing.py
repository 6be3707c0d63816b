"""`pman list`: pman's jobs as a table, once or as one that lives."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import click

from pman.cli.jobs import COLORS, TERMINATED, NoAnswer, Service, as_json
from pman.status import JobState, span

WATCH_SECONDS = 2.0
MAX_WATCH_SECONDS = 60.0
_HEADING = ["JID", "STATUS", "AGE", "IMAGE", "MESSAGE"]
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
# https://invisible-island.net/xterm/ctlseqs/ctlseqs.html: another screen without a cursor, and back to the first one.
_ENTER, _LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"


@click.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--user", help="Only jobs of this user.")
@click.option("--image", help="Only jobs whose image has this in its name.")
@click.option("--text", help="Only jobs with this in jid, user, image, command or message.")
@click.option("--posted-since", metavar="TIME", help="Only jobs posted since this time, such as 2026-11-30T12:00Z.")
@click.option("--sort", metavar="FIELD", help="In the order of jid, state, user, ...; --sort=-jid is the reverse.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@click.option("--after", metavar="JID", help="Only jobs that come behind this one.")
@click.option("-w", "--watch", is_flag=True, help="Keep the table up to date until Ctrl-C.")
@as_json
def list_jobs(as_json: bool, watch: bool, **params: Any) -> None:
    """List pman's jobs, newest first."""
    asked, service = {name: value for name, value in params.items() if value is not None}, Service()

    def page() -> dict[str, Any]:
        found: dict[str, Any] = service.call("GET", "jobs/", params=asked)
        return found

    if watch:
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            raise click.UsageError("--watch needs a terminal to draw on, and does not go with --json.")
        _watch(page)
    elif as_json:
        click.echo(json.dumps(page()))
    else:
        found = page()
        for line in _table(found["jobs"], shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
            click.echo(line)
        if found["next"]:
            click.echo(f"there are more: --after {found['next']}", err=True)
        elif found["truncated"]:
            click.echo("there are older jobs, which are not listed", err=True)


def _watch(page: Callable[[], dict[str, Any]]) -> None:
    """Draw the table every WATCH_SECONDS, or less often if pman is slow. What was drawn last stays at the end."""

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
    found, problem, seen, pause = page(), "", time.localtime(), 0.0
    lines = list[str]()
    sys.stdout.write(_ENTER)
    try:
        while True:
            known = time.strftime("%H:%M:%S", seen)
            said = f"{problem} This was known at {known}." if problem else known
            lines = _frame(found, said, shutil.get_terminal_size())
            sys.stdout.write("\033[H" + "\033[K\n".join(lines) + "\033[J")
            sys.stdout.flush()
            time.sleep(min(max(WATCH_SECONDS, pause), MAX_WATCH_SECONDS))
            began = time.monotonic()
            try:
                found, problem, seen = page(), "", time.localtime()
            except NoAnswer as error:
                problem = error.message
            pause = 10 * (time.monotonic() - began)
    except KeyboardInterrupt:
        pass  # this is how it ends
    finally:
        sys.stdout.write(_LEAVE + "".join(f"{line}\n" for line in lines))


def _frame(page: dict[str, Any], said: str, terminal: os.terminal_size) -> list[str]:
    """The lines of a screen: the counts and what is said beside them, and as much of the table as there is room for."""
    columns, rows = terminal
    counts = ", ".join(f"{state} {count}" for state, count in page["counts"].items() if count)
    head = [line[:columns] for line in (said, counts or "no jobs")]
    table = list(_table(page["jobs"], columns))
    room = max(2, rows - len(head) - 1)  # one row stays empty for the prompt at the end
    lines = [*head, *table[:room]]
    if len(table) > room or page["next"]:
        lines = lines[: len(head) + room - 1]
        lines.append("there are more jobs; --state, --user, --text and --sort choose among them"[:columns])
    return [click.unstyle(line) for line in lines] if os.environ.get("NO_COLOR") else lines


def _table(jobs: list[dict[str, str]], columns: int | None) -> Iterator[str]:
    """Lines of equal columns. columns: where lines are cut; to need no cut, images first lose their registry."""
    posted = [datetime.fromisoformat(at).timestamp() if (at := job.get("posted_at")) else None for job in jobs]
    ages = [span(time.time() - at, 1) if at else "" for at in posted]
    rows = [[j["jid"], j["status"], age, j["image"], j["message"]] for j, age in zip(jobs, ages, strict=True)]
    rows = [_HEADING, *([_CONTROLS.sub(" ", text) for text in row] for row in rows)]
    if columns and max(sum(map(len, row)) for row in rows) + 8 > columns:
        rows = [[*row[:3], row[3].rpartition("/")[2], row[4]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()[:columns]
        begin, end = widths[0] + 2, widths[0] + 2 + len(row[1])
        yield line[:begin] + click.style(line[begin:end], fg=COLORS.get(row[1])) + line[end:]
