"""`pman images`: fills the directory of images of Apptainer and Singularity before jobs need them, and lists it."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click

from pman import settings
from pman.errors import BadRequest, Misconfigured
from pman.job import image_reference, validate
from pman.settings import Settings
from pman.targets import TARGETS
from pman.templating.files import shipped_templates
from pman.templating.render import Renderer

_PULL = 'pull_image "$@"'
_LIST = 'for file in "$1"/*.sif; do [ ! -s "$file" ] || du -m "$file"; done'
# Target, and the line of its spec that holds the image, which a site's templates may have changed.
_CHOSEN = {"cromwell": ("wdl", r'(?m)^    image: "(.*)"$'), "local": ("local", r"(?m)^image=(.*)$")}
_CHOSEN_ON_SLURM = ("slurm", r"(?m)^image=(.*)$")


@click.group()
def images() -> None:
    """Pull and list the images that jobs share on a cluster.

    They are files of Apptainer or Singularity in SLURM_IMAGE_DIR, else in .images below SLURM_STATE_DIR. The commands
    run behind SLURM_COMMAND_PREFIX.
    """


_directory = click.option("--directory", metavar="DIR", help="The image directory, in place of the settings'.")


@images.command()
@click.argument("wanted", metavar="REQUEST|IMAGE...", nargs=-1, required=True)
@_directory
@click.option("--program", type=click.Choice(["apptainer", "singularity"]), help="By default what the settings name.")
@click.option("--minutes", type=click.IntRange(1), default=60, show_default=True, help="How long one pull may take.")
def pull(wanted: tuple[str, ...], directory: str | None, program: str | None, minutes: int) -> None:
    """Pull images that no job has pulled yet.

    REQUEST is a file of a job request, whose image the site's templates may change. Exit status 1 where one could not
    be pulled.
    """
    config = settings.load()
    names = [_name(word, config) for word in wanted]
    usual = "singularity" if config.slurm_runtime == "singularity" else "apptainer"
    place, tool = directory or _place(config), program or usual
    failed = 0
    for name in dict.fromkeys(names):
        click.echo(f"pulling {name}", err=True)
        done = _run(config, _PULL, tool, str(minutes * 60), name, place)
        failed += done.returncode != 0
        if done.returncode == 124:
            click.echo(f"pulling {name} took longer than {minutes} min", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@images.command("list")
@_directory
def list_images(directory: str | None) -> None:
    """Print the size of each image in MiB, and its name."""
    config = settings.load()
    done = _run(config, _LIST, directory or _place(config), capture_output=True, text=True)
    for line in done.stdout.splitlines():
        size, _, path = line.partition("\t")
        name = Path(path).stem.replace("%", "/").replace("+", ":")
        click.echo(f"{size:>8} {name}")
    if done.returncode:
        raise Misconfigured(done.stderr.strip())


def _name(word: str, config: Settings) -> str:
    """The image of a request in a file, or the one that is named."""
    if not Path(word).is_file():
        try:
            return image_reference(word)
        except ValueError as error:
            raise BadRequest(f"{word} is no file, and {error}.") from None
    try:
        data = json.loads(Path(word).read_bytes())
    except ValueError as error:
        raise BadRequest(f"{word} must be JSON: {error}.") from None
    renderer = Renderer(config, TARGETS)
    job = renderer.job(validate(data))
    target, pattern = _CHOSEN.get(config.container_env, _CHOSEN_ON_SLURM)
    chosen = re.search(pattern, renderer.render(job, target).text)
    return shlex.split(chosen[1])[0] if chosen else job.image


def _place(config: Settings) -> str:
    if config.slurm_image_dir:
        return config.slurm_image_dir
    if not config.slurm_state_dir:
        raise Misconfigured("Name the image directory with --directory, or set SLURM_IMAGE_DIR.")
    return f"{config.slurm_state_dir}/.images"


def _run(config: Settings, script: str, *words: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run `script` with `words` as its arguments, behind the shell functions of job scripts."""
    from pman.backends.slurm.commands import Commands

    functions = (shipped_templates() / "sh/container.sh.j2").read_text(encoding="utf-8").partition("#}\n")[2]
    command = Commands(config.slurm_command_prefix, config.slurm_timeout_seconds).line(
        ["bash", "-c", functions + script, "pman", *words]
    )
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False, **options)
