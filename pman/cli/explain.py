"""`pman explain`: why a job becomes what it becomes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO

import click

from pman import settings
from pman.cli.templates import env_file_option, of_a_request, overrides, set_option, templates_option
from pman.errors import PmanError
from pman.job import parse_request
from pman.targets import TARGETS
from pman.templating import explain as reasons
from pman.templating.render import Renderer


@click.command()
@click.argument("request_file", metavar="REQUEST", type=click.File("rb"), default="-")
@click.option("--to", "target", type=click.Choice(list(TARGETS)), help="Also the rendered lines of this target.")
@templates_option
@set_option
@env_file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    request_file: IO[bytes],
    target: str | None,
    templates: Path | None,
    assignments: tuple[str, ...],
    env_file: Path | None,
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
        raise of_a_request(error) from None
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.to_text()))
    sys.exit(1 if found.decision.refused is not None else 2 if found.problem else 0)
