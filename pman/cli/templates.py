"""`pman check`, `pman explain`, `pman templates` and `pman render --watch`: what an author of templates works with."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from pman import __version__, settings
from pman.errors import BadRequest, Misconfigured, PmanError, for_people
from pman.job import Job, parse_request, validate
from pman.policy import Bind, Policy
from pman.storage import Mount, Storage
from pman.targets import TARGETS
from pman.targets.record import Judging, Stuck
from pman.templating import explain as reasons
from pman.templating import rules, sandbox
from pman.templating.files import shipped_templates
from pman.templating.render import SECRETS, Renderer

if TYPE_CHECKING:
    from pman.checking.overlay import Overlay, Template

_POLL_SECONDS = 0.03
_SITES = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def overrides(templates: Path | None, assignments: tuple[str, ...], env_file: Path | None) -> dict[str, str]:
    """Settings that the command line gives: --env-file, over it --set, over it --templates."""
    values, others = settings.split_known(settings.read_file(env_file) if env_file else {})
    if others:  # one file often serves several programs
        click.echo(f"{env_file} also holds what is no setting of pman: {', '.join(others)}", err=True)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise Misconfigured(f"--set takes NAME=VALUE, not {assignment!r}.")
        values[name] = value
    return values | ({"TEMPLATES_DIR": str(templates)} if templates else {})


templates_option = click.option("--templates", "directory", type=_SITES, help="Overlay directory.")
set_option = click.option(
    "--set", "assignments", metavar="NAME=VALUE", multiple=True, help="A setting, before the environment's."
)
env_file_option = click.option("--env-file", type=_FILE, help="Settings as NAME=VALUE lines.")


def ended(sentence: str, exit_code: int) -> click.ClickException:
    """The error that ends a command with a sentence and this exit status."""
    stop = click.ClickException(sentence)
    stop.exit_code = exit_code  # type: ignore[misc]
    return stop


def of_a_request(error: PmanError, where: str = "") -> click.ClickException:
    """Exit status 1 when the request is at fault, 2 when templates or settings are."""
    return ended(where + for_people(error.message), 1 if error.http_status < 500 else 2)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command about a request the settings of these options as `config`, and ends it as of_a_request says."""

    @templates_option
    @set_option
    @env_file_option
    @wraps(command)
    def run(directory: Path | None, assignments: tuple[str, ...], env_file: Path | None, **given: Any) -> None:
        try:
            command(config=settings.load(overrides(directory, assignments, env_file)), **given)
        except PmanError as error:
            raise of_a_request(error) from None

    return run


@click.command()
@click.argument("directories", metavar="[DIR]...", type=_SITES, nargs=-1)
@click.option("--to", "targets", type=click.Choice(list(TARGETS)), multiple=True, help="Only this target; repeatable.")
@click.option("--requests", type=_SITES, help="Directory of request files (*.json) to check as well.")
@click.option("--cromwell-conf", type=_FILE, help="Cromwell's configuration, to judge runtime attributes by.")
@click.option("--kubernetes-version", default=None, help="Version of the Kubernetes API to judge by, such as 1.31.")
@click.option("--live", is_flag=True, help="Ask the backend that CONTAINER_ENV names, too; nothing is run or changed.")
@set_option
@env_file_option
@click.option("--format", "form", type=click.Choice(["text", "json", "sarif"]), default="text", show_default=True)
def check(
    directories: tuple[Path, ...],
    targets: tuple[str, ...],
    requests: Path | None,
    cromwell_conf: Path | None,
    kubernetes_version: str | None,
    live: bool,
    assignments: tuple[str, ...],
    env_file: Path | None,
    form: str,
) -> None:
    """Check template overlays.

    Each DIR is checked, else TEMPLATES_DIR, else the shipped templates. A corpus of requests (and DIR/requests/*.json)
    goes through every template, under the settings of DIR/settings.env; each result is judged by its language's parser,
    and the command line must arrive byte for byte. Exit status: 0, 1 with findings, 2 when nothing could be checked.
    """
    from pman import checking
    from pman.checking import report

    given = overrides(None, assignments, env_file)
    how = Judging(kubernetes=kubernetes_version or "", cromwell_conf=cromwell_conf)
    found = []
    for place in directories or (settings.load(given).templates_dir,):
        run = checking.SiteCheck(place, given, requests, targets, how, live)
        now = run.findings()
        found += now
        if form == "text":
            for finding in now:
                click.secho(str(finding), fg="red" if finding.level == "error" else "yellow")
        counts = ", ".join(f"{run.counts[word]} {word}" for word in ("checked", "refused", "unwritable"))
        click.echo(f"{place or 'shipped templates'}: {counts}, {len(now)} findings", err=True)
    if form != "text":
        click.echo(report.to_json(found) if form == "json" else report.to_sarif(found, __version__))
    sys.exit(any(finding.level == "error" for finding in found))


@click.command()
@click.argument("request_file", metavar="REQUEST", type=click.File("rb"), default="-")
@click.option("--to", "target", type=click.Choice(list(TARGETS)), help="Also the rendered lines of this target.")
@with_settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(request_file: IO[bytes], target: str | None, config: settings.Settings, as_json: bool) -> None:
    """Say why a job becomes what it becomes.

    Shows each rule of site.yaml with the values that it compared and what it changed, then the outcome beside what was
    asked for. With --to, also each rendered line with the template, block and rules that it comes from. REQUEST is a
    file with one JSON object, or - for standard input. Exit status: 0, 1 for a job that is refused or a bad request,
    2 for a bad template or setting.
    """
    found = reasons.explain(Renderer(config, TARGETS), parse_request(request_file.read()), target)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.to_text()))
    sys.exit(1 if found.decision.refused is not None else 2 if found.problem else 0)


@click.group()
def templates() -> None:
    """Begin an overlay, and look at templates.

    Those that pman ships, and those of a site (--templates DIR, else TEMPLATES_DIR).
    """


def _overlay(directory: Path | None, of_a_site: bool = False) -> Overlay:
    """of_a_site: whether there must be one of a site's. Raises Misconfigured where there is none."""
    from pman.checking.overlay import Overlay

    overlay = Overlay(Renderer(settings.load({"TEMPLATES_DIR": str(directory)} if directory else {}), TARGETS))
    if of_a_site and overlay.directory is None:
        raise Misconfigured("Name the site's overlay: give --templates DIR, or set TEMPLATES_DIR.")
    return overlay


@templates.command("list")
@templates_option
def list_(directory: Path | None) -> None:
    """Every template with its blocks, and what the site shadows."""
    overlay = _overlay(directory)
    for name in sorted({*overlay.shipped_names, *overlay.site_names}):
        origin = "shipped" if name not in overlay.site_names else "site"
        also = ", shadows the shipped one" if origin == "site" and name in overlay.shipped_names else ""
        chain = overlay.chain(name)
        parent = f", extends {chain[0].parent}" if chain and chain[0].parent else ""
        click.echo(f"{name}  ({origin}{also}{parent})")
        blocks = {block: template for template in reversed(chain) for block in template.blocks}
        for block, template in blocks.items():
            click.echo(f"  {block}" + ("  (site)" if template.name in overlay.site_names else ""))


@templates.command()
@click.argument("name")
@templates_option
def show(name: str, directory: Path | None) -> None:
    """Print a template as it is used.

    The site's NAME where it has one; shipped/NAME is always pman's.
    """
    overlay = _overlay(directory)
    template = overlay.template(name)
    if template is None:
        known = [*overlay.site_names, *overlay.shipped_names]
        raise Misconfigured(
            "; ".join(str(f) for f in overlay.findings)
            if name in known
            else f"there is no template {name}{sandbox.hint(name, known)}"
        )
    click.echo(f"{template.path}:", err=True)
    click.echo(template.source, nl=False)


@templates.command()
@templates_option
def diff(directory: Path | None) -> None:
    """What the site changes.

    Each of its templates, or of its blocks, against the shipped one.
    """
    overlay = _overlay(directory, of_a_site=True)
    for name in overlay.site_names:
        template, shipped = overlay.template(name), overlay.template(f"shipped/{name}")
        if template and template.parent:
            _diff_blocks(overlay, name)
        elif template:
            _show_diff(shipped.source if shipped else "", template.source, f"shipped/{name}", template.path)


def _diff_blocks(overlay: Overlay, name: str) -> None:
    from pman.checking.overlay import blocks_of, outside_of_blocks

    chain = overlay.chain(name)
    outside, beside = outside_of_blocks(chain[0].source), "outside of blocks"
    _show_diff("", outside, f"{chain[0].parent} {beside}", f"{chain[0].path} {beside}")
    below = {block: text for parent in reversed(chain[1:]) for block, text in blocks_of(parent.source).items()}
    for block, text in blocks_of(chain[0].source).items():
        _show_diff(below.get(block, ""), text, f"{chain[0].parent} block {block}", f"{chain[0].path} block {block}")


def _show_diff(old: str, new: str, old_name: str, new_name: str) -> None:
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm=""):
        click.secho(line, fg={"+": "green", "-": "red", "@": "cyan"}.get(line[:1]))


@templates.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--for", "target", type=click.Choice(list(TARGETS)), required=True)
@click.option("--from-cluster", is_flag=True, help="Ask the cluster, and write a site.yaml of rules that fit.")
def new(directory: Path, target: str, from_cluster: bool) -> None:
    """Write a commented starter overlay.

    DIRECTORY must be new or empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise Misconfigured(f"{directory} is not empty: name a new one, and copy from there what you want of it.")
    if from_cluster:
        from pman import backends

        text = backends.discovered(settings.load({}), target)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "site.yaml").write_text(text, "utf-8")
        click.echo(directory / "site.yaml")
        return
    name, starter = TARGETS[target].template, TARGETS[target].starter
    chain = _overlay(None).chain(f"shipped/{name}")
    known = sorted({found for template in chain for found in template.blocks})
    policy = ", ".join(name for name in sandbox.POLICY if f"set {name} =" in chain[-1].source)
    path = directory / name
    path.parent.mkdir(parents=True)
    path.write_text(
        f'{{% extends "shipped/{name}" %}}\n'
        "{# What this site does differently: each block given here replaces the shipped one of that name.\n"
        "   {{ super() }} puts the shipped text in. Values are quoted for you; site.* comes from site.yaml.\n"
        f"   Blocks: {', '.join(known)}\n   Before the blocks you may {{% set ... %}}: {policy}\n"
        f"   See: pman templates show shipped/{name}; pman templates vars {target}; pman check {directory}\n"
        f"#}}\n{{% block {starter.block} %}}\n{starter.text}{{% endblock %}}\n",
        encoding="utf-8",
    )
    (directory / "site.yaml").write_text(
        f"# Values that this site's templates read as site.NAME.\n{starter.site}", "utf-8"
    )
    click.echo(f"{path}\n{directory / 'site.yaml'}")


@templates.command()
def schema() -> None:
    """Print the JSON Schema of site.yaml.

    An editor with yaml-language-server completes and judges site.yaml by it; the line
    `# yaml-language-server: $schema=FILE` at the top of site.yaml names the file.
    """
    click.echo(json.dumps(rules.schema(), indent=2))


@templates.command("vars")
@click.argument("target", type=click.Choice(list(TARGETS)))
@templates_option
def vars_(target: str, directory: Path | None) -> None:
    """Every variable and filter for templates of TARGET.

    With type, unit and meaning.
    """
    overlay, template = _overlay(directory), TARGETS[target].template
    shipped = "".join(step.source for step in overlay.chain(f"shipped/{template}"))
    rows = list(_variables(overlay.renderer.site, [name for name in sandbox.POLICY if f"set {name} =" in shipped]))
    width = min(40, max(len(name) for name, _, _ in rows))
    for name, kind, meaning in rows:
        click.echo(f"{name:<{width}}  {kind[:28]:<28}  {meaning}")
    click.echo(f"\nFilters that quote ({template}):")
    for name, each in overlay.renderer.filters[TARGETS[target].language].items():
        click.echo(f"  {name:<12}{each.meaning}")


def _variables(site: Mapping[str, Any], policy: list[str]) -> Iterator[tuple[str, str, str]]:
    yield from _fields("job", Job)
    yield from _fields("policy", Policy)
    yield from _fields("policy.binds[]", Bind)
    yield from _fields("storage", Storage)
    yield from _fields("storage.incoming", Mount)
    for name, field in settings.Settings.model_fields.items():
        if name not in SECRETS:
            kind = settings.Settings.__annotations__[name]
            yield f"settings.{name}", kind, str(field.description)
    for name in policy:
        yield name, "may be set", f"job.{name}, unless the site's template sets it before its blocks"
    for name, value in site.items():
        yield f"site.{name}", type(value).__name__, f"site.yaml: {value!r}"
    yield "refuse(reason)", "function", "refuses the job: 403 with that sentence"


def _fields(prefix: str, model: type) -> Iterator[tuple[str, str, str]]:
    """The fields of a dataclass with the comments at their ends, and its properties with their docstrings."""
    for found in re.finditer(r"(?m)^    (\w+): ([^#\n]+?)\s+# (.*)$", inspect.getsource(model)):
        yield f"{prefix}.{found[1]}", found[2], found[3]
    for name, value in vars(model).items():
        if isinstance(value, property) or (inspect.isfunction(value) and not name.startswith("_")):
            function: Any = value.fget if isinstance(value, property) else value
            kind = inspect.formatannotation(inspect.signature(function).return_annotation)
            called = "" if isinstance(value, property) else "(...)"
            yield f"{prefix}.{name}{called}", kind, (value.__doc__ or "").split("\n")[0]


@templates.command("upgrade-check")
@click.argument("old", metavar="OLD_VERSION_DIR", type=_SITES)
@templates_option
def upgrade_check(old: Path, directory: Path | None) -> None:
    """Which overrides touch what a new pman changed.

    OLD_VERSION_DIR holds the templates of the version that you come from. Exit status 1 when any does: read the diff
    and adapt the override. 2 where OLD_VERSION_DIR lacks a template.
    """
    overlay = _overlay(directory, of_a_site=True)
    touched = False
    for name in overlay.site_names:
        if name in overlay.shipped_names and not (old / name).is_file():
            raise Misconfigured(f"{old} holds no {name}: name the `templates` directory of the other version.")
        for place, before, after, shipped_name in _beneath(overlay, overlay.template(name), old):
            if before.splitlines() != after.splitlines():
                touched = True
                click.echo(f"{place} replaces what has changed:")
                _show_diff(before, after, f"old/{shipped_name}", f"new/{shipped_name}")
    sys.exit(touched)


def _beneath(overlay: Overlay, template: Template | None, old: Path) -> Iterator[tuple[str, str, str, str]]:
    """What a site's template replaces: (place, old text, new text, name of the shipped template)."""
    from pman.checking.overlay import blocks_of

    if template is None:
        return
    if not template.parent and template.name in overlay.shipped_names:
        now = (shipped_templates() / template.name).read_text(encoding="utf-8")
        yield template.path, (old / template.name).read_text(encoding="utf-8"), now, template.name
    for base in overlay.chain(template.parent) if template.parent else []:
        if base.name in overlay.site_names:
            continue
        name = base.name.removeprefix("shipped/")
        before = blocks_of((old / name).read_text(encoding="utf-8")) if (old / name).is_file() else {}
        after = blocks_of(base.source)
        for block in template.blocks:
            if block in before or block in after:
                yield f"{template.path} block {block}", before.get(block, ""), after.get(block, ""), name


def watch(request: Path, target: str, config: settings.Settings) -> NoReturn:
    """Render on every save of the request or a template, show the difference and the verdict, until Ctrl-C."""
    renderer = Renderer(config.model_copy(update={"application_mode": "dev"}), TARGETS)
    places = [request, shipped_templates(), *([config.templates_dir] if config.templates_dir else [])]
    shown, seen = "", _stamps(places)
    while True:
        began = time.monotonic()
        text, verdict = _attempt(renderer, request, target)
        if text is not None:
            _show_diff(shown, text, "before", "now")
            shown = text
        for line in verdict or ["good"]:
            click.secho(line, fg="red" if verdict else "green")
        click.echo(f"-- {(time.monotonic() - began) * 1000:.0f} ms; waiting for a save")
        sys.stdout.flush()
        while (now := _stamps(places)) == seen:
            time.sleep(_POLL_SECONDS)
        seen = now


def _attempt(renderer: Renderer, request: Path, target: str) -> tuple[str | None, list[str]]:
    from pman import checking

    try:
        job = renderer.job(validate(json.loads(request.read_bytes())))
        text = renderer.render(job, target).text
    except (ValueError, OSError, BadRequest) as error:
        return None, [f"{request}: {error}"]
    except PmanError as error:
        return None, [str(error)]
    try:
        return text, [str(finding) for finding in checking.proven(renderer, job, target)]
    except Stuck as error:
        return text, [str(error)]


def _stamps(places: list[Path]) -> set[tuple[str, int, int]]:
    stamps = set()
    for file in (file for place in places for file in ([place] if place.is_file() else place.rglob("*"))):
        with suppress(OSError):  # an editor may replace a file at any moment
            status = file.stat()
            stamps.add((str(file), status.st_mtime_ns, status.st_size))
    return stamps
