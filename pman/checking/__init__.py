"""What `pman check` knows: whether a site's templates are right, named by file and line.

A rule that needs no rendering belongs in lint.py or quoting.py, a request that must come through in corpus.py, and how
findings are shown in report.py. What one scheduler accepts is not said here but by its target (pman/targets/).
"""

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pman import backends, settings
from pman.checking import corpus, lint, proof
from pman.checking.corpus import Case
from pman.checking.overlay import Finding, Overlay, finding_of
from pman.checking.report import each_once
from pman.errors import BadRequest, Misconfigured, PmanError, Refused, TemplateError
from pman.job import Job, validate
from pman.settings import Settings
from pman.storage import mounts
from pman.targets import TARGETS, judge
from pman.targets.record import Flaw, Judging, Problem, Stuck
from pman.targets.shell import bash_problems
from pman.templating.explain import unexpressed
from pman.templating.files import unreadable
from pman.templating.render import Renderer, Spec
from pman.templating.sandbox import TimedOut

_WORD = r"[\w./:-]{4,}"
_EVERYDAY = ("this", "that", "with")
log = logging.getLogger(__name__)


@dataclass
class SiteCheck:
    """One check of an overlay; its settings.env holds settings that go with it, its requests/ more requests.

    `directory` None checks the shipped templates; `requests` adds a corpus of one's own.
    """

    directory: Path | None
    overrides: Mapping[str, str] = field(default_factory=dict)
    requests: Path | None = None
    targets: Sequence[str] = ()
    how: Judging = field(default_factory=Judging)
    live: bool = False  # whether to ask the configured backend, too
    counts: Counter[str] = field(default_factory=Counter)  # results that are checked, refused, unwritable

    def findings(self) -> list[Finding]:
        """All that is wrong, each once, in the order of files and lines. Raises Misconfigured, BadRequest."""
        hidden = unreadable(self.directory) if self.directory else []
        if hidden:
            return [Finding("unreadable", said, path, 1) for path, said in sorted(hidden)]
        try:
            overlay = Overlay(Renderer(self._settings({}), TARGETS))
        except TemplateError as error:
            return [finding_of(str(error), "site.yaml")]
        targets = self.targets or overlay.targets()
        chosen = bool(self.targets or overlay.site_names or overlay.renderer.rules.targets)
        found = [*lint.findings(overlay), *_not_expressed(overlay.renderer, targets, chosen)]
        for target in targets:
            found += self._target(overlay, target)
        return sorted(each_once(found), key=lambda finding: (finding.file, finding.line))

    def _settings(self, environment: Mapping[str, str]) -> Settings:
        own = {"TEMPLATES_DIR": str(self.directory)} if self.directory else {}
        beside = settings.read_file(self.directory / "settings.env") if self.directory else {}
        base = {"STOREBASE": "/pman-check/it's the store", **beside, **self.overrides}
        return settings.load({**base, **own, **environment})

    def _own_cases(self) -> list[Case]:
        places = (self.directory and self.directory / "requests", self.requests)
        return [case for path in places if path for case in corpus.own_cases(path)]

    def _target(self, overlay: Overlay, target: str) -> list[Finding]:
        made: dict[str, Renderer] = {}
        found: list[Finding] = []
        counts: Counter[str] = Counter()
        known = corpus.accepted(overlay.renderer, target, self._own_cases())
        for case in corpus.cases() + self._own_cases():
            if target not in case.targets:
                continue
            if str(case.settings) not in made:
                made[str(case.settings)] = Renderer(self._settings(case.settings), TARGETS)
            renderer = made[str(case.settings)]
            try:
                for posed in corpus.posings(case, known, renderer):
                    outcome = self._outcome(overlay, target, renderer, posed, found)
                    if outcome != "refused":
                        break
            except Stuck as error:
                return [*found, _placed(overlay, target, Finding("changed", str(error), ""), "argv")]
            counts[outcome] += 1
            if outcome == "timed out":
                return found
        self.counts += counts
        if not counts["checked"] and counts["refused"]:
            said = "every request of the corpus is refused, so nothing is checked: give accepted ones with --requests"
            found.append(_placed(overlay, target, Finding("all-refused", said, "")))
        return found

    def _outcome(
        self, overlay: Overlay, target: str, renderer: Renderer, case: Case, found: list[Finding]
    ) -> Literal["checked", "refused", "unwritable", "timed out"]:
        """What became of one request; adds to `found`. Raises Stuck, and Misconfigured where a parser is missing."""
        try:
            job = renderer.job(validate(dict(case.request)))
            found += self._judge(_Attempt(overlay, target, case.name, renderer, proof.marked(job)), job)
        except Refused:
            return "refused"
        except BadRequest as error:
            found += [] if case.may_be_unwritable else [finding_of(error.detail or str(error))]
            return "unwritable"
        except Misconfigured:
            raise
        except PmanError as error:
            found.append(finding_of(str(error)))
            return "timed out" if isinstance(error.__cause__, TimedOut) else "checked"
        return "checked"

    def _judge(self, attempt: "_Attempt", job: Job) -> list[Finding]:
        """All about one request; `attempt` renders its marked job."""
        spec = attempt.renderer.render(attempt.job, attempt.target)
        backend = attempt.renderer.settings.cromwell_backend or ""
        how = replace(self.how, shellcheck=attempt.case == "plain", cromwell_backend=backend)
        found = attempt.judged(spec, how)
        if any(finding.rule == "invalid" for finding in found):
            return found
        flaws = proof.flaws(job, mounts(job, attempt.renderer.settings), spec)
        found += [attempt.caused(flaw) for flaw in flaws]
        if self.live and (attempt.case == "plain" or attempt.case.endswith(".json")):
            asked, real = replace(attempt, job=job), attempt.renderer.render(job, spec.target)
            found += map(asked.heard, backends.live(attempt.renderer.settings, real))
        return found


def log_findings(renderer: Renderer) -> None:
    """Warn of what can be seen to be wrong in the site's templates without rendering them."""
    lost = _not_expressed(renderer, [backends.BACKENDS[renderer.settings.container_env].target], True)
    for finding in [*lint.findings(Overlay(renderer)), *lost]:
        log.warning("%s", finding)


def _not_expressed(renderer: Renderer, targets: Sequence[str], chosen: bool) -> Iterator[Finding]:
    """What rules set and no template of a target prints. chosen: whether the site speaks of these targets."""
    lost: dict[tuple[str, str, int], list[str]] = {}
    for target in targets:
        with contextlib.suppress(TemplateError):  # told where the template is rendered
            for rule, name in unexpressed(renderer, target):
                lost.setdefault((rule.name, name, rule.lines[name]), []).append(target)
    for (rule_name, name, line), where in lost.items():
        said = f"the rule {rule_name!r} sets {name}, which the templates of {', '.join(where)} do not print"
        level = "error" if chosen or len(where) == len(targets) else "warning"
        yield Finding("not-expressed", said, renderer.rules.file, line, level=level)


def judged(renderer: Renderer, job: Job, spec: Spec) -> list[Finding]:
    """What is wrong with a spec of `job` that `renderer` has made, at the lines of its templates."""
    attempt = _Attempt(Overlay(renderer), spec.target, job.jid, renderer, job)
    return list(each_once(attempt.judged(spec, Judging())))


def proven(renderer: Renderer, job: Job, target: str) -> list[Finding]:
    """What `pman check` says of one job; the rules that need no rendering included. Raises as Renderer.render does."""
    overlay = Overlay(renderer)
    attempt = _Attempt(overlay, target, job.jid, renderer, proof.marked(job))
    found = [*lint.findings(overlay), *SiteCheck(overlay.directory)._judge(attempt, job)]
    return sorted(each_once(found), key=lambda finding: (finding.file, finding.line))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One request of the corpus on its way through one target's templates."""

    overlay: Overlay
    target: str
    case: str
    renderer: Renderer
    job: Job  # as it is rendered

    def judged(self, spec: Spec, how: Judging) -> list[Finding]:
        found = []
        for problem in judge(spec, how):
            said = self._own_part(spec) if problem.message.startswith("bash: ") else None
            exact = problem.rule != "invalid"
            said = said or self.at(problem.rule, problem.message, problem.line, problem.part, exact)
            found.append(replace(said, level="warning") if exact and not self.renderer.is_own(said.file) else said)
        return found

    def _own_part(self, spec: Spec) -> Finding | None:
        """The first lines of the site that bash cannot read by themselves; of the whole, it may name one far below."""
        lines = zip(self.renderer.origins(self.job, TARGETS[self.target].template), spec.text.split("\n"), strict=False)
        for own, part in itertools.groupby(lines, key=lambda line: self.renderer.is_own(line[0][0])):
            places, texts = zip(*part, strict=True)
            wrong = next(bash_problems("\n".join(texts)), None) if own else None
            if wrong:
                file, line = places[min(wrong.line or 1, len(places)) - 1]
                return Finding("invalid", f"{wrong.message} (request: {self.case})", file, line)
        return None

    def heard(self, problem: Problem) -> Finding:
        """What a backend said, where the site's own files name what it is about, else where the line comes from."""
        overlay = self.renderer.settings.templates_dir
        if problem.rule == "not-asked":
            place = str(overlay or TARGETS[self.target].template)
            return Finding(problem.rule, problem.message, place, level="note")
        found = self.at(problem.rule, problem.message, problem.line, exact=True)
        if overlay is None or self.renderer.is_own(found.file):
            return found
        words = set(re.findall(_WORD, problem.message)) - set(_EVERYDAY)
        files = [overlay / name for name in ("site.yaml", *self.overlay.site_names) if (overlay / name).is_file()]
        named = [
            (len(word), str(file), number)
            for file in files
            for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1)
            for word in words.intersection(re.findall(_WORD, line))
        ]
        _, place, number = max(named, default=(0, found.file, found.line))
        return replace(found, file=place, line=number)

    def at(self, rule: str, message: str, line: int | None, part: str = "", exact: bool = False) -> Finding:
        """A finding at the template line that this line of the result comes from.

        A parser names the cause or a line below it, and shipped text is good: so this is the site's last line above.
        """
        template = TARGETS[self.target].extras.get(part, TARGETS[self.target].template)
        until = self.renderer.origins(self.job, template)[: line or 1]
        own = [place for place in until if self.renderer.is_own(place[0])]
        file, number = ((not exact and own) or until or [(template, 1)])[-1]
        return Finding(rule, f"{message} (request: {self.case})", file, number)

    def caused(self, flaw: Flaw) -> Finding:
        if flaw.line:
            return self.at("changed", flaw.message, flaw.line)
        found = Finding("changed", f"{flaw.message} (request: {self.case})", "", level=flaw.level)
        return _placed(self.overlay, self.target, found, flaw.what)


def _placed(overlay: Overlay, target: str, finding: Finding, what: str = "") -> Finding:
    """The finding at the likeliest cause of a flaw (Flaw.what): the first of the target's blocks for it that the site
    overrides, else the last line with `job.WHAT` of its own whole template, else its first template.
    """
    names = sorted(overlay.reach(TARGETS[target].template) & set(overlay.site_names))
    found = [template for name in names if (template := overlay.template(name))]
    for block in TARGETS[target].causes.get(what, ()):
        for template in found:
            if template.parent and block in template.blocks:
                return replace(finding, file=template.path, line=template.blocks[block])
    for template in found:
        lines = [number for number, line in enumerate(template.source.splitlines(), 1) if f"job.{what}" in line]
        if what and lines and not template.parent:
            return replace(finding, file=template.path, line=lines[-1])
    return replace(finding, file=found[0].path if found else TARGETS[target].template, line=1)
