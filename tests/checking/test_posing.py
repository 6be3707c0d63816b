"""Requests that a site refuses are posed again within what its rules accept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pman import checking, settings
from pman.checking import corpus
from pman.errors import BadRequest
from pman.job import validate
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer
from tests.checking.overlays import write

# NO stands for a refusal.
_USERS = ", ".join(f"u{number}" for number in range(300))
RULES = {
    "a pattern of users": "{name: a, unless: {user: 'clinic-*'}, NO}",
    "a set of characters": "{name: a, unless: {image: 'ghcr.io/[ab]?/*'}, NO}",
    "a span of memory": "{name: a, unless: {memory_mib: 1000 to 2000}, NO}",
    "less than the sample": "{name: a, unless: {cpu_millicores: '< 200'}, NO}",
    "a number": "{name: a, unless: {workers: [3, 5]}, NO}",
    "a kind": "{name: a, unless: {kind: ts}, NO}",
    "partitions": "{name: a, unless: {partition: [long, short]}, NO}",
    "no partition": "{name: a, when: {partition: null}, NO}",
    "a short time": "{name: a, unless: {time_limit_minutes: '<= 30'}, NO}",
    "a user of a group with a size": "{name: a, unless: {user: {group: g}, gpus: '>= 2', memory_mib: '> 9000'}, NO}",
    "not the first user": "{name: a, unless: {user: {group: g}}, NO}, {name: b, when: {user: u0}, NO}",
    "all but what a last rule lets pass": "{name: a, when: {user: alice, gpus: 1}, set: {}, last: true}, {name: b, NO}",
    "one rule after the other": "{name: a, unless: {user: {group: g}}, NO}, "
    "{name: b, when: {user: u*, memory_mib: '< 4000'}, NO}, {name: c, unless: {partition: p}, NO}",
}


def at(place: Path, text: str) -> Renderer:
    write(place, {"site.yaml": text})
    return Renderer(settings.load({"TEMPLATES_DIR": str(place), "STOREBASE": "/data"}), TARGETS)


def accepts(renderer: Renderer, case: corpus.Case) -> bool:
    try:
        return renderer.decide(validate(dict(case.request))).refused is None
    except BadRequest:
        return True  # no rule is asked about it


@pytest.mark.parametrize("rules", RULES.values(), ids=list(RULES))
def test_requests_are_posed_within_the_rules(rules: str, tmp_path: Path) -> None:
    rules = rules.replace("NO", "refuse: Never.")
    renderer = at(tmp_path, f"policy:\n  groups: {{g: [{_USERS}]}}\n  rules: [{rules}]\n")
    assert not all(accepts(renderer, case) for case in corpus.cases())
    for case in corpus.cases():
        first, *others = itertools.islice(corpus.posings(case, {}, renderer), 2)
        assert accepts(renderer, first) or accepts(renderer, others[0])


def test_a_site_is_checked_within_its_rules(tmp_path: Path) -> None:
    rule = "{name: a, unless: {user: {group: g}, gpus: 2, memory_mib: '> 9000'}, refuse: Never.}"
    text = f"policy:\n  groups: {{g: [alice, bob]}}\n  targets: [docker]\n  rules: [{rule}]\n"
    run = checking.SiteCheck(write(tmp_path, {"site.yaml": text}))
    assert (run.findings(), run.counts["refused"]) == ([], 0)


def test_a_site_that_accepts_nothing(tmp_path: Path) -> None:
    text = "policy: {targets: [docker], rules: [{name: a, when: {workers: '>= 1'}, refuse: Never.}]}\n"
    run = checking.SiteCheck(write(tmp_path, {"site.yaml": text}))
    (finding,) = run.findings()
    assert (finding.rule, run.counts["checked"]) == ("all-refused", 0)


def test_a_request_is_changed_no_further_than_a_rule_asks(tmp_path: Path) -> None:
    renderer = at(tmp_path, "policy: {rules: [{name: a, unless: {memory_mib: '<= 400000'}, refuse: Never.}]}\n")
    (large,) = [case for case in corpus.cases() if case.name.startswith("two GPUs")]
    posed = [case.request for case in corpus.posings(large, SAMPLE, renderer)]
    assert posed[:2] == [large.request, {**large.request, "memory_limit": 400_000}]
