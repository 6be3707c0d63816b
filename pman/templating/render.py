"""Job -> spec text: the overlay loader, one Jinja environment per language (sandbox.py) with quoting on by default.

`{{ value }}` always comes out as one literal of the language that the template's name says (`.wdl.j2`, `.yaml.j2`,
`.json.j2`, `.sh.j2`). Only a value that is marked safe by hand escapes this, and `pman check` reports those.
"""

import bisect
import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import GeneratorType, MappingProxyType
from typing import Any, NamedTuple, NoReturn, Protocol

import jinja2

from pman.errors import BadRequest, Misconfigured, PmanError, Refused, TemplateError, TooLarge
from pman.job import Job, JobRequest, make_job
from pman.settings import Settings
from pman.storage import mounts
from pman.templating import decide, files, quote, sandbox
from pman.templating.site import read_rules, read_site, scalars

log = logging.getLogger(__name__)

# slurmctld refuses longer scripts (max_script_size, 4 MB by default); Kubernetes and Docker refuse less than that.
MAX_SPEC_BYTES = 4 * 1024 * 1024
SAMPLE: Mapping[str, Any] = {
    "jid": "chris-jid-1", "type": "ds", "auid": "chris", "image": "docker.io/fnndsc/pl-simpledsapp:2.1.0",
    "entrypoint": ["simpledsapp"], "args": ["--threshold", "0.5"], "env": ["GREETING=hello"], "number_of_workers": 1,
    "cpu_limit": 1500, "memory_limit": 512, "gpu_limit": 0,
}  # fmt: skip
_UNUSUAL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
SECRETS = frozenset({"secret_key", "cromwell_auth_password", "cromwell_service_account"})


class Templates(Protocol):
    """What rendering needs to know of a target (pman/targets/)."""

    @property
    def template(self) -> str: ...
    @property
    def extras(self) -> Mapping[str, str]: ...
    @property
    def filters(self) -> Mapping[str, quote.Filter]: ...


@dataclass(frozen=True, slots=True)
class Spec:
    """A rendered job: `text` in the language of `target`, and what is submitted beside it (name -> text)."""

    target: str
    text: str
    extras: Mapping[str, str] = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a rendered text: the file and line that it comes from, and the innermost block, "" outside of all.

    What `super()` brings in is one part, of the line and block that call it. offset: lines from the part's beginning.
    """

    text: str
    file: str
    line: int
    block: str
    offset: int = 0


class Renderer:
    """Renders jobs with the shipped templates and the site's overlay. Safe to share between threads.

    targets: name -> what it can render into. filters: language -> the quoting filters of its templates.
    """

    def __init__(self, settings: Settings, targets: Mapping[str, Templates]) -> None:
        self.settings = settings
        self.targets = targets
        own = ((language(target.template), target.filters) for target in targets.values())
        self.filters = sandbox.languages(own)
        self._read_site()
        self._public = MappingProxyType(settings.model_dump(mode="json", exclude=set(SECRETS)))
        loader = files.loader(settings.templates_dir)
        self._environments = {
            name: sandbox.environment(loader, filters, filters[name].write, settings.dev)
            for name, filters in self.filters.items()
        }

    def _read_site(self) -> None:
        files.require_readable(self.settings.templates_dir)
        self.site = read_site(self.settings.templates_dir)
        self.rules = read_rules(self.settings.templates_dir, self.site, self.targets)

    def decide(self, request: JobRequest) -> decide.Decision:
        if self.settings.dev:
            self._read_site()
        decision = decide.decide(make_job(request, self.settings), self.rules, self.settings.timelimit_max_minutes)
        if decision.steps and log.isEnabledFor(logging.DEBUG):
            log.debug("rules for %s: %s", ascii(request.jid), json.dumps(decision.to_json()))
        return decision

    def job(self, request: JobRequest) -> Job:
        """The job that a request means at this site. Raises Refused in the words of the rule that refuses it."""
        return self.decide(request).accepted()

    def render(self, job: Job, target: str) -> Spec:
        """The spec of `job`. Raises TemplateError (file:line: cause), Refused, TooLarge, or BadRequest (unwritable)."""
        if self.settings.dev:
            self._read_site()
        entry = self.targets[target]
        context = self._context(job)
        extras = {name: self._text(template, context) for name, template in entry.extras.items()}
        return Spec(target, self._text(entry.template, context), extras)

    def pieces(self, job: Job, name: str) -> list[Piece]:
        """The text of the rendered template `name` with where it comes from. Raises as `render` does."""
        with self._explained(name, job), sandbox.time_limit():
            texts = self.environment(name).get_template(name).generate(self._context(job))
            return [Piece(text, *_origin(texts)) for text in texts]

    def lines(self, job: Job, name: str) -> list[list[Piece]]:
        """The lines of the rendered template `name`, each as the parts that it is made of. Raises as `render` does."""
        lines: list[list[Piece]] = []
        at_start = True
        for piece in self.pieces(job, name):
            for offset, text in enumerate(re.findall(r"[^\n]*\n|[^\n]+", piece.text)):
                lines += [[]] if at_start else []
                lines[-1].append(piece._replace(text=text, offset=offset))
                at_start = text.endswith("\n")
        return lines

    def origin(self, line: list[Piece]) -> Piece:
        """The part that a line comes from: the first of the site's, else the first."""
        return next((piece for piece in line if self.is_own(piece.file)), line[0])

    def origins(self, job: Job, name: str) -> list[tuple[str, int]]:
        """File and line that each line of the rendered template `name` comes from. Raises as `render` does."""
        return [(part.file, part.line + part.offset) for part in map(self.origin, self.lines(job, name))]

    def is_own(self, file: str) -> bool:
        """Whether a template's file is one of the site's."""
        overlay = self.settings.templates_dir
        return overlay is not None and Path(file).is_relative_to(overlay)

    def environment(self, template: str) -> jinja2.Environment:
        """The Jinja environment of the language that the template's name says. Raises Misconfigured for another."""
        if (environment := self._environments.get(language(template))) is None:
            raise Misconfigured(f"{template}: a template's name ends in one of .{'.j2 .'.join(self.filters)}.j2")
        return environment

    def _context(self, job: Job) -> dict[str, Any]:
        return {
            "job": job,
            "policy": job.policy,
            "storage": mounts(job, self.settings),
            "settings": self._public,
            "site": self.site,
            "refuse": _refuse,
        }

    def _text(self, name: str, context: Mapping[str, Any]) -> str:
        with self._explained(name, context["job"]), sandbox.time_limit():
            return _join(self.environment(name).get_template(name).generate(context), name)

    def explain(self, error: Exception, name: str) -> str:
        """`file:line: cause` of an error raised while the template `name` was compiled or rendered."""
        place = f"{name}:1"
        if isinstance(error, jinja2.TemplateSyntaxError):
            place = f"{error.filename or error.name or name}:{error.lineno}"
        traceback = error.__traceback__ if not isinstance(error, jinja2.TemplateSyntaxError) else None
        while traceback:
            if traceback.tb_frame.f_code.co_filename.endswith(".j2"):
                place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
            traceback = traceback.tb_next
        return f"{place}: {_cause(error, {word for filters in self.filters.values() for word in filters})}"

    def _blamed(self, error: quote.Unwritable, name: str, job: Job) -> PmanError:
        """What to say of a value that cannot be written: to the user, or to who wrote site.yaml or a setting."""
        fields = {
            "jid": job.jid, "auid": job.auid, "partition": job.partition, "input_dir": job.input_dir,
            "output_dir": job.output_dir, "args": job.argv, "env": [value for _, value in job.env],
        }  # fmt: skip
        of_request = [(name, text) for name, value in fields.items() if value for text in texts(value)]
        of_settings = [(name.upper(), text) for name, value in self._public.items() for text in texts(value)]
        source, part = _blame(error.value, [*of_request, *scalars(self.settings.templates_dir), *of_settings])
        place, said = self.explain(error, name), f"cannot be written for this scheduler: {error}"
        if source in fields:
            return BadRequest({source: f"{said}."}, detail=place)
        here = place.removesuffix(f": {error}")
        if isinstance(source, int):
            return TemplateError(f"{self.settings.templates_dir}/site.yaml:{source}: {part!r} {said} ({here})")
        return TemplateError(f"{here}: {f'the setting {source}' if source else repr(error.value)} {said}")

    @contextmanager
    def _explained(self, name: str, job: Job) -> Iterator[None]:
        try:
            yield
        except PmanError:
            raise
        except quote.Unwritable as error:
            raise self._blamed(error, name, job) from error
        except Exception as error:
            raise TemplateError(self.explain(error, name)) from error


def _blame(value: Any, parts: Iterable[tuple[Any, str]]) -> tuple[Any, str]:
    """The part (its source, its text) for which a value cannot be written; ("", "") where none is in it.

    That is one with a control character or half a surrogate pair, else the longest.
    """
    found_in = texts(value)
    found = [part for part in parts if part[1] and any(part[1] in text for text in found_in)]
    return max(found, key=lambda part: (bool(_UNUSUAL.search(part[1])), len(part[1])), default=("", ""))


def texts(value: Any) -> list[str]:
    """All text in a value, of mappings also the keys."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    return [text for part in value for text in texts(part)] if isinstance(value, list | tuple) else [str(value)]


def sample_job(settings: Settings) -> Job:
    """A plain job, for trying templates at start."""
    return make_job(JobRequest(**SAMPLE), settings)


def language(name: str) -> str:
    return name.removesuffix(".j2").rsplit(".", 1)[-1]


def _cause(error: Exception, quoting: set[str]) -> str:
    message = (error.message if isinstance(error, jinja2.TemplateError) else None) or str(error)
    if isinstance(error, jinja2.TemplateNotFound):
        return f"there is no template {message}"
    if isinstance(error, RecursionError):
        return "a template, block or macro that brings in itself has no end"
    if unknown := re.search(r"No (filter|test) named '(\w+)'", message):
        if unknown[2] in quoting:
            return f"|{unknown[2]} writes another language than this template's"
        return unknown[0] + sandbox.hint(unknown[2], sandbox.known(unknown[1], quoting))
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
