"""Checks a site's overlay: every template over a corpus of requests, judged, proven, and named by file and line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pman import settings
from pman.checking import lint, proof
from pman.checking import parsers as check
from pman.checking.overlay import Finding, Overlay, finding_of
from pman.errors import BadRequest, PmanError, Refused, TemplateError
from pman.job import Job, make_job, validate
from pman.settings import Settings
from pman.storage import mounts
from pman.templating.render import SAMPLE, TARGETS, Renderer, Spec
from pman.templating.sandbox import TimedOut

_HOSTILE = (
    "it's", 'a "quote"', "$(touch x) `y`", "~{wdl} >>> ${x} $HOME", "$(PMAN_WORKER_COUNT) $$", "{{.Node.ID}} {{",
    "%s\\n", "", "*", "&amp;", "two\n  lines\n", "\r\n", "tab\t", "na\u00efve \U0001f9e0", "SCRIPT_EPILOGUE", "-n",
    "a=b", "null", "# x",
)  # fmt: skip
# Run, where an author's own quotes stand around them; {{ for Swarm, no $ for WDL, a line break for comments.
_RUN = f"$({proof.CANARY}){{{{{proof.CANARY}}}}}"
_RUN_QUOTED = f'";{proof.CANARY};"'
_RUN_BELOW = f"x\n{proof.CANARY} #"
_ALL = ("wdl", "k8s", "swarm", "docker", "slurm", "local")
_ENGINES = ("k8s", "swarm", "docker")


@dataclass(frozen=True, slots=True)
class Case:
    """A request and the settings to render it under."""

    name: str
    request: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)
    targets: Sequence[str] = _ALL
    may_be_unwritable: bool = False  # a language may have no way to write its values


def corpus() -> list[Case]:
    """Plain and hostile, small and large, with every optional field and without, over every kind of storage."""
    every_option = {"time_limit_minutes": 90, "partition": "gpu-long", "args_path_flags": ["--in"], "gpu_limit": 1}
    volume = {"VOLUME_NAME": "chris-files"}
    rows: list[tuple[str, dict[str, Any], dict[str, str], Sequence[str]]] = [
        ("plain", {}, {}, _ALL),
        ("hostile", {"args": list(_HOSTILE), "env": [f"V{n}={v}" for n, v in enumerate(_HOSTILE)]}, {}, _ALL),
        ("nothing optional", {"type": "fs", "args": [], "env": []}, {}, _ALL),
        ("every option", every_option, {}, _ALL),
        ("two GPUs, large", {"gpu_limit": 2, "cpu_limit": 64_000, "memory_limit": 500_000, "type": "ts"}, {}, _ALL),
        ("many workers", {"number_of_workers": 64, "cpu_limit": 1, "memory_limit": 1}, {}, _ALL),
        ("many arguments", {"args": [f"--a{n}=$(x)" for n in range(200)]}, {}, _ALL),
        ("directories apart", {"input_dir": "key 1/it's", "output_dir": "feed_1/$(out)"}, {}, _ALL),
        ("commands in values", _hostile(_RUN), {}, _ALL),
        ("commands in quotes", _hostile(_RUN_QUOTED), {}, _ALL),
        ("limits ignored", {"gpu_limit": 1}, {"IGNORE_LIMITS": "yes"}, _ALL),
        ("user, labels", {}, {"CONTAINER_USER": "1000:2000", "SHM_SIZE": "64", "JOB_LABELS": "site=a"}, _ALL),
        ("nfs", {}, {"STORAGE_TYPE": "nfs", "NFS_SERVER": "nfs.example.org"}, _ENGINES),
        ("volume", {}, {"STORAGE_TYPE": "docker_local_volume", **volume}, _ENGINES[1:]),
        ("claim", {}, {"STORAGE_TYPE": "kubernetes_pvc", **volume}, _ENGINES[:1]),
    ]
    cases = [Case(name, {**SAMPLE, **fields}, environment, targets) for name, fields, environment, targets in rows]
    return [*cases, Case("line break in a name", {**SAMPLE, "auid": _RUN_BELOW}, may_be_unwritable=True)]


def _hostile(value: str) -> dict[str, Any]:
    """Fields that hold the value wherever a user may put it."""
    directories = {"input_dir": f"{value}/in", "output_dir": f"{value}/out"}
    return {"jid": value, "auid": value, "args": [value], "env": [f"V={value}"], **directories}


def own_corpus(directory: Path) -> list[Case]:
    """The requests of a directory's *.json files. Raises BadRequest for one that is no request."""
    cases = []
    for path in sorted(directory.glob("*.json")):
        try:
            data = json.loads(path.read_bytes())
            validate(data)
        except (ValueError, PmanError) as error:
            raise BadRequest(f"{path}: {error}") from None
        cases.append(Case(path.name, data))
    return cases


@dataclass
class SiteCheck:
    """One check of an overlay; its settings.env holds settings that go with it, its requests/ more requests.

    `directory` None checks the shipped templates; `requests` adds a corpus of one's own.
    """

    directory: Path | None
    overrides: Mapping[str, str] = field(default_factory=dict)
    requests: Path | None = None
    targets: Sequence[str] = ()
    kubernetes: str = check.KUBERNETES_VERSION
    cromwell_conf: Path | None = None
    rendered: int = 0

    def findings(self) -> list[Finding]:
        """All that is wrong, each once, in the order of files and lines. Raises Misconfigured, BadRequest."""
        try:
            overlay = Overlay(Renderer(self._settings({})))
        except TemplateError as error:
            return [finding_of(str(error), "site.yaml")]
        found = lint.findings(overlay)
        for target in self.targets or overlay.targets():
            found += self._target(overlay, target)
        return sorted(_each_once(found), key=lambda finding: (finding.file, finding.line))

    def _settings(self, environment: Mapping[str, str]) -> Settings:
        own = {"TEMPLATES_DIR": str(self.directory)} if self.directory else {}
        beside = settings.read_file(self.directory / "settings.env") if self.directory else {}
        base = {"STOREBASE": "/pman-check/it's the store", **beside, **self.overrides}
        return settings.load({**base, **own, **environment})

    def _cases(self) -> list[Case]:
        own = [self.directory / "requests"] if self.directory else []
        return [*corpus(), *(case for path in [*own, *filter(None, [self.requests])] for case in own_corpus(path))]

    def _target(self, overlay: Overlay, target: str) -> list[Finding]:
        made: dict[str, Renderer] = {}
        found: list[Finding] = []
        refusals, cases = 0, [case for case in self._cases() if target in case.targets]
        for case in cases:
            if str(case.settings) not in made:
                made[str(case.settings)] = Renderer(self._settings(case.settings))
            renderer = made[str(case.settings)]
            job = make_job(validate(dict(case.request)), renderer.settings)
            try:
                attempt = _Attempt(overlay, target, case.name, renderer, proof.marked(job))
                found += self._judge(attempt, job)
            except Refused:
                refusals += 1
            except BadRequest as error:
                refusals += case.may_be_unwritable
                found += [] if case.may_be_unwritable else [finding_of(error.detail or str(error))]
            except proof.Stuck as error:
                return [*found, _placed(overlay, target, Finding("changed", str(error), ""), _CAUSES["argv"])]
            except PmanError as error:
                found.append(finding_of(str(error)))
                if isinstance(error.__cause__, TimedOut):
                    return found
            self.rendered += 1
        if refusals == len(cases):
            said = "every request of the corpus is refused, so nothing is checked: give accepted ones with --requests"
            found.append(_placed(overlay, target, Finding("all-refused", said, ""), ()))
        return found

    def _judge(self, attempt: _Attempt, job: Job) -> list[Finding]:
        """All about one request; `attempt` renders its marked job."""
        spec = attempt.renderer.render(attempt.job, attempt.target)
        found = attempt.judged(spec, self.kubernetes, shellcheck=attempt.case == "plain")
        if found:
            return found
        flaws = proof.flaws(job, mounts(job, attempt.renderer.settings), spec)
        return [
            *(attempt.caused(flaw) for flaw in flaws),
            *(self._undeclared(attempt, spec) if attempt.target == "wdl" else ()),
        ]

    def _undeclared(self, attempt: _Attempt, spec: Spec) -> Iterator[Finding]:
        """Runtime attributes that Cromwell's configuration does not declare: it ignores them."""
        if self.cromwell_conf is None:
            return
        for name in set(check.wdl_runtime(spec.text)) - declared_attributes(self.cromwell_conf):
            line = next(n for n, text in enumerate(spec.text.splitlines(), 1) if re.match(rf"\s*{name}\s*:", text))
            said = f"Cromwell ignores the runtime attribute {name}: {self.cromwell_conf} does not declare it"
            found = attempt.at("undeclared-attribute", said, line, exact=True)
            yield found if attempt.renderer.is_own(found.file) else replace(found, level="warning")


def judged(renderer: Renderer, job: Job, spec: Spec) -> list[Finding]:
    """What is wrong with a spec of `job` that `renderer` has made, at the lines of its templates."""
    attempt = _Attempt(Overlay(renderer), spec.target, job.jid, renderer, job)
    return list(_each_once(attempt.judged(spec, check.KUBERNETES_VERSION, shellcheck=False)))


def proven(renderer: Renderer, job: Job, target: str) -> list[Finding]:
    """What `pman check` says of one job; the rules that need no rendering included. Raises as Renderer.render does."""
    overlay = Overlay(renderer)
    attempt = _Attempt(overlay, target, job.jid, renderer, proof.marked(job))
    found = [*lint.findings(overlay), *SiteCheck(overlay.directory)._judge(attempt, job)]
    return sorted(_each_once(found), key=lambda finding: (finding.file, finding.line))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One request of the corpus on its way through one target's templates."""

    overlay: Overlay
    target: str
    case: str
    renderer: Renderer
    job: Job  # as it is rendered

    def judged(self, spec: Spec, kubernetes: str, shellcheck: bool) -> list[Finding]:
        """What the parser or schema of the language says."""
        found = []
        for problem in check.problems(spec, kubernetes, shellcheck):
            own = self._own_part(spec) if problem.message.startswith("bash: ") else None
            found.append(own or self.at("invalid", problem.message, problem.line, problem.part))
        return found

    def _own_part(self, spec: Spec) -> Finding | None:
        """The first run of the site's lines that bash cannot read by itself: what it names may be far below."""
        lines = zip(self.renderer.origins(self.job, TARGETS[self.target].template), spec.text.split("\n"), strict=False)
        for own, part in itertools.groupby(lines, key=lambda line: self.renderer.is_own(line[0][0])):
            places, texts = zip(*part, strict=True)
            wrong = next(check.bash_problems("\n".join(texts)), None) if own else None
            if wrong:
                file, line = places[min(wrong.line or 1, len(places)) - 1]
                return Finding("invalid", f"{wrong.message} (request: {self.case})", file, line)
        return None

    def at(self, rule: str, message: str, line: int | None, part: str = "", exact: bool = False) -> Finding:
        """A finding at the template line that this line of the result comes from.

        A parser stumbles at or after the cause, and shipped text is good: the site's line before it is the one.
        """
        template = TARGETS[self.target].extras.get(part, TARGETS[self.target].template)
        until = self.renderer.origins(self.job, template)[: line or 1]
        own = [place for place in until if self.renderer.is_own(place[0])]
        file, number = ((not exact and own) or until or [(template, 1)])[-1]
        return Finding(rule, f"{message} (request: {self.case})", file, number)

    def caused(self, flaw: proof.Flaw) -> Finding:
        if flaw.line:
            return self.at("changed", flaw.message, flaw.line)
        found = Finding("changed", f"{flaw.message} (request: {self.case})", "", level=flaw.level)
        return _placed(self.overlay, self.target, found, _CAUSES[flaw.what], f"job.{flaw.what}")


# Where a change of the words, the environment or the directories is made, the likeliest block first.
_CAUSES: Mapping[str, Sequence[str]] = {
    "argv": ("command", "runtime", "prologue", "environment", "container_extra"),
    "env": ("environment", "command", "runtime", "prologue"),
    "injected": ("environment", "mounts", "container_extra", "prologue", "command", "volume_mounts", "pod_spec_extra"),
    "script": ("pod_spec_extra",),
    "volumes": ("volume_mounts", "volumes"),
    "image": (),
    **dict.fromkeys(
        ("incoming", "outgoing"),
        ("directories", "mounts", "volume_mounts", "volumes", "runtime", "environment", "prologue", "command"),
    ),
}
# Attributes that every Cromwell backend knows.
_ALWAYS = frozenset({"docker", "maxRetries", "continueOnReturnCode", "failOnStderr", "preemptible"})


def declared_attributes(conf: Path) -> frozenset[str]:
    """The names in the runtime-attributes of a Cromwell configuration file; `memory` for memory_mb and the like."""
    blocks = re.findall(r'(?s)runtime-attributes\s*[=:]\s*"""(.*?)"""', conf.read_text(encoding="utf-8"))
    names = {name for block in blocks for name in re.findall(r"(?m)^\s*[A-Z]\w*(?:\[\w+\])?[?+]*\s+(\w+)", block)}
    return frozenset({"memory" if name.startswith("memory_") else name for name in names}) | _ALWAYS


def _each_once(findings: Sequence[Finding]) -> Iterator[Finding]:
    """What the first request that shows it says of each cause, and how many more show it."""
    groups: dict[tuple[str, str, int, str], list[Finding]] = {}
    undefined = {(finding.file, finding.line) for finding in findings if finding.rule == "undefined"}
    for finding in findings:
        if finding.rule == "template" and (finding.file, finding.line) in undefined:
            continue  # the same name, met again while rendering
        cause = re.sub(r" \(request: [^()]*\)$", "", finding.message)
        if finding.rule == "changed":  # whatever it is instead
            cause = re.split(r" is ['\"]|variable |^word ", cause, maxsplit=1)[0]
        if finding.rule == "invalid":  # parsers count the words of the request, and go on to quote it
            cause = re.sub(r"\d+", "", cause)[:40]
        groups.setdefault((finding.rule, finding.file, finding.line, cause), []).append(finding)
    for first, *more in groups.values():
        yield replace(first, message=f"{first.message} (and in {len(more)} more results)") if more else first


def _placed(overlay: Overlay, target: str, finding: Finding, blocks: Sequence[str], word: str = "") -> Finding:
    """The finding at the first of `blocks` that the site overrides, else at the last line with `word` of its own
    whole template, else at its first template.
    """
    names = sorted(overlay.reach(TARGETS[target].template) & set(overlay.site_names))
    found = [template for name in names if (template := overlay.template(name))]
    for block in blocks:
        for template in found:
            if template.parent and block in template.blocks:
                return replace(finding, file=template.path, line=template.blocks[block])
    for template in found:
        lines = [number for number, line in enumerate(template.source.splitlines(), 1) if word and word in line]
        if lines and not template.parent:
            return replace(finding, file=template.path, line=lines[-1])
    return replace(finding, file=found[0].path if found else TARGETS[target].template, line=1)


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list."""
    names = ("level", "rule", "file", "line", "column", "message")
    return json.dumps([{name: getattr(finding, name) for name in names} for finding in findings], indent=2)


def to_sarif(findings: Sequence[Finding], version: str) -> str:
    """The findings as SARIF 2.1.0 (docs.oasis-open.org/sarif/sarif/v2.1.0), which code hosts show beside the lines."""
    rules = [{"id": rule} for rule in sorted({finding.rule for finding in findings})]
    driver = {"name": "pman check", "version": version, "rules": rules}
    return json.dumps(
        {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": [_sarif(finding) for finding in findings]}],
        },
        indent=2,
    )


def _sarif(finding: Finding) -> dict[str, Any]:
    region = {"startLine": max(finding.line, 1)} | ({"startColumn": finding.column} if finding.column else {})
    place = {"artifactLocation": {"uri": Path(finding.file).as_posix()}, "region": region}
    return {
        "ruleId": finding.rule,
        "level": finding.level,
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": place}],
    }
