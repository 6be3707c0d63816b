"""`pman explain`: why a job becomes what it becomes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO

import click

from pman import settings
from pman.cli.templates import overrides
from pman.errors import PmanError, for_people
from pman.job import parse_request
from pman.targets import TARGETS
from pman.templating import explain as reasons
from pman.templating.render import Renderer


@click.command()
@click.argument("request_file", metavar="REQUEST", type=click.File("rb"), default="-")
@click.option("--to", "target", type=click.Choice(list(TARGETS)), help="Also the rendered lines of this target.")
@click.option("--templates", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Overlay directory.")
@click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="A setting, before the environment's.")
@click.option("--env-file", type=click.Path(exists=True, dir_okay=False), help="Settings as NAME=VALUE lines.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    request_file: IO[bytes],
    target: str | None,
    templates: Path | None,
    assignments: tuple[str, ...],
    env_file: str | None,
    as_json: bool,
) -> None:
    """Say why a job becomes what it becomes.

    Shows each rule of site.yaml with the values that it compared and what it changed, then the outcome beside what was
    asked for. With --to, also each rendered line with the template, block and rules that it comes from. REQUEST is a
    file with one JSON object, or - for standard input. Exit status: 0, 1 for a job that is refused or a bad request,
    2 for a bad template or setting.
    """
    try:
        renderer = Renderer(settings.load(overrides(templates, assignments, env_file)), TARGETS)
        found = reasons.explain(renderer, parse_request(request_file.read()), target)
    except PmanError as error:
        stop = click.ClickException(for_people(error.message))
        stop.exit_code = 1 if error.http_status < 500 else 2  # type: ignore[misc]
        raise stop from None
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.to_text()))
    sys.exit(1 if found.decision.refused is not None else 2 if found.problem else 0)
