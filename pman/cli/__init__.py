"""The `pman` command: `serve`, `settings` and `render` here, what asks a running pman in jobs.py and listing.py, what
helps authors of templates in templates.py.

Imports are local to commands where they take long: rendering needs neither flask nor a backend's library.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from pman import __version__, settings
from pman.backends import BACKENDS
from pman.cli import images, listing
from pman.cli import jobs as client
from pman.cli import templates as cli_templates
from pman.errors import BadRequest, Misconfigured, PmanError, TemplateError
from pman.job import Job, validate
from pman.targets import TARGETS
from pman.templating.files import own_directory
from pman.templating.render import Renderer, Spec


class _Group(click.Group):
    """Commands that end with 2 and the sentence of an error of pman's, unless they catch it themselves.

    They end with 141, as a shell says for SIGPIPE, where nobody reads their output any more.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            try:
                return super().invoke(context)
            except PmanError as error:
                raise cli_templates.ended(str(error), 2) from None
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself flushes at its end
            context.exit(141)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Render job requests into the language of a scheduler, run them, and see what became of them.

    run, submit, status, logs, wait, delete and list ask the pman at PMAN_URL (http://127.0.0.1:5010).
    """
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        context.color = False
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # what a job prints may not be in the terminal's encoding


_OF_JOBS = (client.run, client.submit, client.status, client.logs, client.wait, client.delete, listing.list_jobs)
for command in (*_OF_JOBS, cli_templates.check, cli_templates.templates, cli_templates.explain, images.images):
    main.add_command(command)


@main.command()
def serve() -> None:
    """Serve the HTTP API.

    Everything is set by environment variables, which `pman settings` lists.
    """
    from pman.service import server

    def look(renderer: Renderer) -> None:
        if renderer.settings.templates_dir:  # the shipped ones have been looked at
            from pman import checking

            checking.log_findings(renderer)

    server.serve(settings.load(), look)


@main.command("help")
@click.argument("topic", type=click.Choice(["exit-codes"]), required=False)
@click.pass_context
def show_help(context: click.Context, topic: str | None) -> None:
    """List the commands, or explain exit-codes."""
    click.echo(client.EXIT_CODES if topic else context.find_root().get_help())


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    In bash or zsh, put `eval "$(pman completion bash)"` (or zsh) into ~/.bashrc (or ~/.zshrc); in fish, put
    `pman completion fish | source` into ~/.config/fish/config.fish.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found
    click.echo(found(main, {}, "pman", "_PMAN_COMPLETE").source())


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def examples(directory: Path) -> None:
    """Copy pman's examples into the new directory DIRECTORY.

    They are job requests, and whole overlays of sites below sites/, each with a README of its own.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise Misconfigured(f"{directory} is not empty: name a new directory.")
    unwanted = shutil.ignore_patterns("__pycache__")  # pip compiles what it installs
    shutil.copytree(own_directory("examples", "sites"), directory, ignore=unwanted, dirs_exist_ok=True)
    click.echo(f"{directory}/README.md says what there is.")


@main.command("settings")
def show_settings() -> None:
    """Print every setting of `pman serve`.

    A Markdown table of environment variables with their defaults and meanings.
    """
    click.echo(settings.markdown_table(BACKENDS), nl=False)


@main.command()
@click.argument("request_file", metavar="REQUEST", type=click.File("rb"), default="-")
@click.option("--to", "target", type=click.Choice(list(TARGETS)), required=True, help="The language to render into.")
@cli_templates.with_settings
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write a file per request here.")
@click.option("--check", is_flag=True, help="Judge each result with the real parser of its language.")
@click.option(
    "--watch", is_flag=True, help="Render again whenever REQUEST or a template is saved, and show what changed."
)
def render(
    request_file: IO[bytes], target: str, config: settings.Settings, out: Path | None, check: bool, watch: bool
) -> None:
    """Print exactly what the service would submit.

    REQUEST (a file, or - for standard input) holds one JSON object, or one a line; several need --out. Exit status: 0,
    1 for a bad request, 2 for a bad template or setting.
    """
    where = ""
    try:
        if config.storebase is None and config.storage_type in ("host", "nfs"):
            click.echo("STOREBASE is not set: directories are shown below /.", err=True)
        if watch and request_file.name == "<stdin>":
            raise BadRequest("--watch needs a REQUEST file: standard input cannot be read again.")
        if watch:
            cli_templates.watch(Path(request_file.name), target, config)
        renderer = Renderer(config, TARGETS)
        requests = list(_requests(request_file.read()))
        if len(requests) != 1 and out is None:
            raise BadRequest(f"{len(requests)} requests were given: name a directory with --out.")
        quiet = out is None or not sys.stderr.isatty()
        with click.progressbar(requests, label="rendering", file=sys.stderr, hidden=quiet) as progress:
            written: set[str] = set()
            for number, data in enumerate(progress, 1):
                where = f"Request {number} of {len(requests)}: " if len(requests) > 1 else ""
                job = renderer.job(validate(data))
                if job.name in written:
                    raise BadRequest({"jid": f"{job.jid} was there before; every request needs its own."})
                spec = renderer.render(job, target)
                if check:
                    _check(renderer, job, spec)
                _write(spec, job.name, out)
                written.add(job.name)
    except PmanError as error:
        raise cli_templates.of_a_request(error, where) from None


def _requests(data: bytes) -> Iterator[object]:
    try:
        yield json.loads(data)
        return
    except (ValueError, RecursionError) as error:
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].lstrip().startswith(b"{") or not lines[0].rstrip().endswith(b"}"):
            raise BadRequest(f"The request must be JSON: {error}.") from None
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"Line {number} must be JSON: {error}.") from None


def _write(spec: Spec, name: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.buffer.write(spec.text.encode())
        sys.stdout.buffer.flush()
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / (name + TARGETS[spec.target].suffix)).write_bytes(spec.text.encode())
    for extra, text in spec.extras.items():
        (out / f"{name}.{extra}").write_bytes(text.encode())


def _check(renderer: Renderer, job: Job, spec: Spec) -> None:
    from pman import checking

    found = checking.judged(renderer, job, spec)
    if found:
        raise TemplateError("\n".join(map(str, found)))
