"""Job -> spec text: the overlay loader, one Jinja environment per language with quoting on by default.

`{{ value }}` always comes out as one literal of the language that the template's name says (`.wdl.j2`, `.yaml.j2`,
`.json.j2`, `.sh.j2`). Only a value that is marked safe by hand escapes this, and `pman check` reports those.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.sandbox
import yaml
from markupsafe import Markup

from pman import quote
from pman.errors import Misconfigured, PmanError, Refused, TemplateError, TooLarge
from pman.job import Job, JobRequest, make_job
from pman.settings import Settings
from pman.storage import mounts

# slurmctld refuses longer scripts (max_script_size, 4 MB by default); Kubernetes and Docker refuse less than that.
MAX_SPEC_BYTES = 4 * 1024 * 1024
VARIABLES = ("job", "storage", "settings", "site", "refuse")
SECRETS = frozenset({"secret_key", "cromwell_auth_password", "cromwell_service_account"})


@dataclass(frozen=True, slots=True)
class Target:
    """A language that jobs are rendered into: its template, and templates that go with it by name."""

    template: str
    extras: Mapping[str, str] = field(default_factory=dict)


TARGETS: Mapping[str, Target] = {
    "wdl": Target("wdl/job.wdl.j2", {"options.json": "wdl/options.json.j2"}),
    "k8s": Target("k8s/job.yaml.j2"),
    "swarm": Target("swarm/service.yaml.j2"),
    "docker": Target("docker/container.yaml.j2"),
    "slurm": Target("slurm/job.sh.j2"),
    "local": Target("local/job.sh.j2"),
}

LANGUAGES: Mapping[str, Callable[[Any], str]] = {
    "wdl": quote.wdl,
    "yaml": quote.yaml,
    "json": quote.json_,
    "sh": quote.sh,
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A rendered job: `text` in the language of `target`, and what is submitted beside it (name -> text)."""

    target: str
    text: str
    extras: Mapping[str, str] = field(default_factory=dict)


class Renderer:
    """Renders jobs with the shipped templates and the site's overlay. Safe to share between threads."""

    def __init__(self, settings: Settings, template_class: type[jinja2.Template] | None = None) -> None:
        """`template_class` replaces Jinja's, for who wants to watch templates at work."""
        self._settings = settings
        self._dev = settings.dev
        self._overlay = settings.templates_dir
        self._site = read_site(self._overlay)
        self._public = MappingProxyType(settings.model_dump(exclude=set(SECRETS)))
        self._environments = {name: _environment(name, settings) for name in LANGUAGES}
        for environment in self._environments.values():
            environment.template_class = template_class or environment.template_class

    def render(self, job: Job, target: str) -> Spec:
        """The spec of `job`. Raises TemplateError (file:line: cause), Refused or TooLarge."""
        if self._dev:
            self._site = read_site(self._overlay)
        entry = TARGETS[target]
        context = {
            "job": job,
            "storage": mounts(job, self._settings),
            "settings": self._public,
            "site": self._site,
            "refuse": _refuse,
        }
        extras = {name: self._text(template, context) for name, template in entry.extras.items()}
        return Spec(target, self._text(entry.template, context), extras)

    def environment(self, template: str) -> jinja2.Environment:
        """The Jinja environment of the language that the template's name says. Raises Misconfigured for another."""
        language = template.removesuffix(".j2").rsplit(".", 1)[-1]
        if language not in self._environments:
            raise Misconfigured(f"{template}: a template's name ends in one of .{'.j2 .'.join(LANGUAGES)}.j2")
        return self._environments[language]

    def _text(self, name: str, context: Mapping[str, Any]) -> str:
        try:
            return _join(self.environment(name).get_template(name).generate(context), name)
        except PmanError:
            raise
        except Exception as error:
            raise TemplateError(explain(error, name)) from error


def sample_job(settings: Settings) -> Job:
    """A plain job, for trying templates at start."""
    request = JobRequest(
        jid="chris-jid-1", args=["--threshold", "0.5"], auid="chris", number_of_workers=1, cpu_limit=1000,
        memory_limit=200, gpu_limit=0, image="fnndsc/pl-simpledsapp:2.1.0", entrypoint=["simpledsapp"], type="ds",
        env=["GREETING=hello"],
    )  # fmt: skip
    return make_job(request, settings)


def read_site(overlay: Path | None) -> Mapping[str, Any]:
    """The values of the overlay's site.yaml, {} without one. Raises TemplateError with file and line."""
    path = overlay / "site.yaml" if overlay else None
    if path is None or not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TemplateError(f"{path}:{line}: {error.problem}") from None
    if values is not None and not isinstance(values, dict):
        raise TemplateError(f"{path}:1: site.yaml must be a mapping of names to values")
    return values or {}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def explain(error: Exception, name: str) -> str:
    """`file:line: cause` of an error raised while the template `name` was compiled or rendered."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename or error.name or name}:{error.lineno}: {error.message}"
    if isinstance(error, jinja2.TemplateNotFound):
        return f"{name}:1: there is no template {error.message}"
    place = name
    traceback = error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename.endswith(".j2"):
            place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{place}: {error}"


@functools.cache
def shipped_templates() -> Path:
    """The directory of the shipped templates: inside the wheel, or beside `pman/` in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "templates", package.parent / "templates"):
        if (directory / "wdl").is_dir():
            return directory
    raise Misconfigured("pman's own templates are missing: the installation is incomplete.")


def _environment(language: str, settings: Settings) -> jinja2.Environment:
    shipped = jinja2.FileSystemLoader(shipped_templates())
    overlay = [jinja2.FileSystemLoader(settings.templates_dir)] if settings.templates_dir else []
    environment = _Environment(
        loader=jinja2.ChoiceLoader([*overlay, shipped, jinja2.PrefixLoader({"shipped": shipped})]),
        autoescape=True,
        finalize=functools.partial(_literal, LANGUAGES[language]),
        undefined=_Undefined,
        auto_reload=settings.dev,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shell_word = quote.wdl_command if language == "wdl" else quote.sh
    filters = {"sh": shell_word, "wdl": quote.wdl, "yaml": quote.yaml, "json": quote.json_, "k8s": quote.k8s}
    filters["gotemplate"] = quote.go_template
    for name, function in filters.items():
        environment.filters[name] = functools.partial(_literal, function)
    return environment


def _literal(function: Callable[[Any], str], value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises, with the name
    return Markup(function(value))  # noqa: S704 - what makes it safe


def _join(chunks: Iterator[str], name: str) -> str:
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_SPEC_BYTES:
            raise TooLarge(f"The job is too large: {name} renders to more than {MAX_SPEC_BYTES} bytes.")
    return "".join(parts)


def _refuse(reason: str) -> NoReturn:
    raise Refused(str(reason))


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Quotes constants at run time too: Jinja would HTML-escape `{{ "a'b" }}` before finalize sees it."""

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator


class _Undefined(jinja2.StrictUndefined):
    """StrictUndefined whose message names what would have been valid."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        known = list(VARIABLES) if self._undefined_obj is jinja2.utils.missing else _members(self._undefined_obj)
        near = difflib.get_close_matches(str(self._undefined_name), known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known here: {', '.join(sorted(known)[:30])}"
        return f"{super()._undefined_message}{hint if known else ''}"


def _members(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    try:
        return [f.name for f in fields(value)]
    except TypeError:
        return []
