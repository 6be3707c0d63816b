"""Job -> spec text: the overlay loader, one Jinja environment per language (sandbox.py) with quoting on by default.

`{{ value }}` always comes out as one literal of the language that the template's name says (`.wdl.j2`, `.yaml.j2`,
`.json.j2`, `.sh.j2`). Only a value that is marked safe by hand escapes this, and `pman check` reports those.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import GeneratorType, MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jinja2
import yaml

from pman.errors import BadRequest, Misconfigured, PmanError, Refused, TemplateError, TooLarge
from pman.job import Job, JobRequest, make_job
from pman.settings import Settings
from pman.storage import mounts
from pman.templating import quote, sandbox

# slurmctld refuses longer scripts (max_script_size, 4 MB by default); Kubernetes and Docker refuse less than that.
MAX_SPEC_BYTES = 4 * 1024 * 1024
SAMPLE: Mapping[str, Any] = {
    "jid": "chris-jid-1", "type": "ds", "auid": "chris", "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
    "entrypoint": ["simpledsapp"], "args": ["--threshold", "0.5"], "env": ["GREETING=hello"], "number_of_workers": 1,
    "cpu_limit": 1500, "memory_limit": 512, "gpu_limit": 0,
}  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class Spec:
    """A rendered job: `text` in the language of `target`, and what is submitted beside it (name -> text)."""

    target: str
    text: str
    extras: Mapping[str, str] = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a rendered text: the file and line that it comes from, and the innermost block, "" outside of all.

    What `super()` brings in is one part, of the line and block that call it.
    """

    text: str
    file: str
    line: int
    block: str


class Renderer:
    """Renders jobs with the shipped templates and the site's overlay. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.site = read_site(settings.templates_dir)  # the values of site.yaml
        self._public = MappingProxyType(settings.model_dump(mode="json", exclude=set(SECRETS)))
        loader = _loader(settings.templates_dir)
        self._environments = {name: sandbox.environment(loader, name, settings.dev) for name in sandbox.LANGUAGES}

    def render(self, job: Job, target: str) -> Spec:
        """The spec of `job`. Raises TemplateError (file:line: cause), Refused, TooLarge, or BadRequest (unwritable)."""
        if self.settings.dev:
            self.site = read_site(self.settings.templates_dir)
        entry = TARGETS[target]
        context = self._context(job)
        extras = {name: self._text(template, context) for name, template in entry.extras.items()}
        return Spec(target, self._text(entry.template, context), extras)

    def pieces(self, job: Job, name: str) -> list[Piece]:
        """The text of the rendered template `name` with where it comes from. Raises as `render` does."""
        with _explained(name, job), sandbox.time_limit():
            texts = self.environment(name).get_template(name).generate(self._context(job))
            return [Piece(text, *_origin(texts)) for text in texts]

    def origins(self, job: Job, name: str) -> list[tuple[str, int]]:
        """File and line of each line of the rendered template `name`: where it begins, or the site's first part of it.

        Raises as `render` does.
        """
        lines: list[tuple[str, int]] = []
        at_start = True
        for piece in self.pieces(job, name):
            for offset, text in enumerate(re.findall(r"[^\n]*\n|[^\n]+", piece.text)):
                if at_start:
                    lines.append((piece.file, piece.line + offset))
                elif self.is_own(piece.file) and not self.is_own(lines[-1][0]):
                    lines[-1] = (piece.file, piece.line + offset)
                at_start = text.endswith("\n")
        return lines

    def is_own(self, file: str) -> bool:
        """Whether a template's file is one of the site's."""
        overlay = self.settings.templates_dir
        return overlay is not None and Path(file).is_relative_to(overlay)

    def environment(self, template: str) -> jinja2.Environment:
        """The Jinja environment of the language that the template's name says. Raises Misconfigured for another."""
        if (environment := self._environments.get(language(template))) is None:
            raise Misconfigured(f"{template}: a template's name ends in one of .{'.j2 .'.join(sandbox.LANGUAGES)}.j2")
        return environment

    def _context(self, job: Job) -> dict[str, Any]:
        return {
            "job": job,
            "storage": mounts(job, self.settings),
            "settings": self._public,
            "site": self.site,
            "refuse": _refuse,
        }

    def _text(self, name: str, context: Mapping[str, Any]) -> str:
        with _explained(name, context["job"]), sandbox.time_limit():
            return _join(self.environment(name).get_template(name).generate(context), name)


@contextmanager
def _explained(name: str, job: Job) -> Iterator[None]:
    try:
        yield
    except PmanError:
        raise
    except quote.Unwritable as error:
        said = f"cannot be written for this scheduler: {error}."
        raise BadRequest({_field(job, error.value): said}, detail=explain(error, name)) from error
    except Exception as error:
        raise TemplateError(explain(error, name)) from error


def _field(job: Job, value: Any) -> str:
    """The field of the request that most of a printed value comes from."""
    parts = {
        "jid": [job.jid], "auid": [job.auid], "input_dir": [job.input_dir], "output_dir": [job.output_dir],
        "args": job.argv, "env": [value for _, value in job.env],
    }  # fmt: skip
    text = str(value)
    lengths = {name: max((len(part) for part in given if part in text), default=0) for name, given in parts.items()}
    return max(lengths, key=lambda name: lengths[name]) if any(lengths.values()) else "job"


def sample_job(settings: Settings) -> Job:
    """A plain job, for trying templates at start."""
    return make_job(JobRequest(**SAMPLE), settings)


def read_site(overlay: Path | None) -> Mapping[str, Any]:
    """The values of the overlay's site.yaml, {} without one. Raises TemplateError with file and line."""
    path = overlay / "site.yaml" if overlay else None
    if path is None or not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_SiteLoader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}:1: this is no UTF-8: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise TemplateError(f"{path}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TemplateError(f"{path}:1: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise TemplateError(f"{path}:1: site.yaml must be a mapping of names to values")
    return values or {}


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem="a key must be one word or text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _SiteLoader(StrictLoader):
    """StrictLoader of text, numbers, booleans, null, lists and mappings; a date is text, other types are refused.

    So are numbers and booleans that would be printed in other words than they are written: YAML reads 12:30 as 750,
    1.10 as 1.1, 010 as 8 and `no` as false.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, bool | int | float):
            read = quote.yaml(value) if math.isfinite(value) else "no finite number"
            if read != node.value.lower():
                said = f"{node.value} would be {read}: write what it shall be, in quotes if that is text"
                raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)
        return value

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        said = f"{node.tag.removeprefix('tag:yaml.org,2002:')} is no type that site.yaml may hold: quotes make it text"
        raise yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)


_TYPES = ("str", "int", "float", "bool", "null", "seq", "map")
_SiteLoader.yaml_constructors = {
    **{f"tag:yaml.org,2002:{name}": StrictLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"] for name in _TYPES},
    None: _SiteLoader.construct_undefined,
}
_SiteLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if not tag.endswith((":timestamp", ":value"))]
    for first, rows in StrictLoader.yaml_implicit_resolvers.items()
}


def explain(error: Exception, name: str) -> str:
    """`file:line: cause` of an error raised while the template `name` was compiled or rendered."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename or error.name or name}:{error.lineno}: {_cause(error)}"
    place = f"{name}:1"
    traceback = error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename.endswith(".j2"):
            place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{place}: {_cause(error)}"


def language(name: str) -> str:
    """The language of a template of this name."""
    return name.removesuffix(".j2").rsplit(".", 1)[-1]


def _cause(error: Exception) -> str:
    message = (error.message if isinstance(error, jinja2.TemplateError) else None) or str(error)
    if isinstance(error, jinja2.TemplateNotFound):
        return f"there is no template {message}"
    if isinstance(error, RecursionError):
        return "a template, block or macro that brings in itself has no end"
    if unknown := re.search(r"No (filter|test) named '(\w+)'", message):
        if unknown[2] in sandbox.QUOTING:
            return f"|{unknown[2]} writes another language than this template's"
        return unknown[0] + sandbox.hint(unknown[2], sandbox.known(unknown[1]))
    return message


def _origin(texts: Iterator[str]) -> tuple[str, int, str]:
    """File, line and block of the text that a template's generator has just yielded, through blocks and includes."""
    inner: Any = texts
    block = ""
    while isinstance(inner, GeneratorType) and inner.gi_frame is not None:
        frame = inner.gi_frame
        if frame.f_code.co_name.startswith("block_"):  # so Jinja calls what it makes of a block
            block = frame.f_code.co_name.removeprefix("block_")
        inner = inner.gi_yieldfrom or frame.f_locals.get("gen")  # Jinja loops over what it includes with this name
    begun, lines = _compiled_lines(frame.f_globals.get("debug_info", ""))
    passed = bisect.bisect_right(begun, frame.f_lineno)
    return frame.f_code.co_filename, lines[passed - 1] if passed else 1, block


@functools.lru_cache(maxsize=100)
def _compiled_lines(debug_info: str) -> tuple[list[int], list[int]]:
    """Where in the compiled template each line of the template begins, and that line: `line=compiled&line=...`."""
    pairs = re.findall(r"(\d+)=(\d+)", debug_info)
    return [int(compiled) for _, compiled in pairs], [int(line) for line, _ in pairs]


@functools.cache
def shipped_templates() -> Path:
    """The directory of the shipped templates: inside the wheel, or beside `pman/` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "templates", package.parent / "templates"):
        if (directory / "wdl").is_dir():
            return directory
    raise Misconfigured("pman's own templates are missing: the installation is incomplete.")


def _join(chunks: Iterator[str], name: str) -> str:
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk) if chunk.isascii() else len(chunk.encode())
        if size > MAX_SPEC_BYTES:
            raise TooLarge(f"The job is too large: {name} renders to more than {MAX_SPEC_BYTES} bytes.")
    return "".join(parts)


def _refuse(reason: str) -> NoReturn:
    raise Refused(str(reason))


def _loader(overlay: Path | None) -> jinja2.BaseLoader:
    shipped = jinja2.FileSystemLoader(shipped_templates())
    site = [_Confined(overlay)] if overlay else []
    return jinja2.ChoiceLoader([jinja2.PrefixLoader({"shipped": shipped}), *site, shipped])


class _Confined(jinja2.FileSystemLoader):
    """Reads no file that a symbolic link puts outside its directory."""

    def get_source(self, environment: jinja2.Environment, template: str) -> Any:
        try:
            found = super().get_source(environment, template)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise TemplateError(f"{self.searchpath[0]}/{template}:{line}: this is no UTF-8") from None
        root = os.path.realpath(self.searchpath[0])
        if not os.path.realpath(found[1]).startswith(root + os.sep):
            raise TemplateError(f"{found[1]}:1: a symbolic link leads out of the template directory")
        return found
