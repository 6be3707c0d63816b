"""Rules of site.yaml: what they make of a request and say of it, how they are read, and what they cannot do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pman import job, settings
from pman.cli import main
from pman.errors import Refused, TemplateError
from pman.targets import TARGETS
from pman.templating import decide, render, rules
from tests.rig import ROOT

REQUEST: dict[str, Any] = {**render.SAMPLE, "auid": "alice", "image": "docker.io/fnndsc/pl-fshack:1.3"}
GROUPS = {"neuro": ["alice", "bob"], "trusted": ["docker.io/fnndsc/*", "ghcr.io/fnndsc/*"]}
TABLES: dict[str, Any] = {
    "accounts": {"alice": "neuro", "b*": "cardio"},
    "minutes": {"docker.io/fnndsc/pl-fshack": 1440, "*": 60},
    "partitions": {"bob": "cardio"},
}


SCHEMA = jsonschema.Draft202012Validator(rules.schema())


def site(*of: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = [{"name": f"rule {number}"} | rule for number, rule in enumerate(of, 1)]
    return {"policy": {"groups": GROUPS, "tables": TABLES, "rules": named} | more}


def renderer(directory: Path, values: dict[str, Any], **environment: str) -> render.Renderer:
    directory.mkdir(exist_ok=True)
    (directory / "site.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return render.Renderer(
        settings.load({"STOREBASE": "/data", "TEMPLATES_DIR": str(directory), **environment}), TARGETS
    )


def decision(directory: Path, values: dict[str, Any], fields: dict[str, Any], **environment: str) -> decide.Decision:
    return renderer(directory, values, **environment).decide(job.validate(REQUEST | fields))


def told(step: decide.Step) -> str:
    """What a step says of itself, in short: `no: gpus 0 is not >= 1` or `yes: partition None -> gpu`."""
    changes = ", ".join(f"{change.name} {change.before} -> {change.after}" for change in step.changes)
    last = step.compared[-1] if step.compared else None
    why = f"{last.field} {last.found} {'is' if last.holds else 'is not'} {last.wanted}" if last else "always"
    return f"yes: {changes}" if step.matched else f"no: {why}"


NORMAL = {"set": {"partition": {"default": "normal"}}}
GPU = {"when": {"gpus": ">= 1"}, "set": {"partition": "gpu"}}
LARGE = {"when": {"memory_mib": ">= 128000"}, "set": {"partition": "highmem"}}
CAP = {"set": {"memory_mib": {"at_most": 1000}}}
# what the row shows: the rules, the request, what becomes of the job, what the steps say
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], list[str]]] = {
    "no rule": ([], {}, {}, []),
    "without conditions": ([{"set": {"qos": "low"}}], {}, {"qos": "low"}, ["yes: qos None -> low"]),
    "at least": ([GPU], {"gpu_limit": 2}, {"partition": "gpu"}, ["yes: partition None -> gpu"]),
    "not at least": ([GPU], {}, {"partition": None}, ["no: gpus 0 is not >= 1"]),
    "above": (
        [{"when": {"memory_mib": "> 512"}, "set": {"qos": "x"}}], {}, {"qos": None},
        ["no: memory_mib 512 is not > 512"],
    ),
    "below": ([{"when": {"memory_mib": "< 513"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"]),
    "at most": (
        [{"when": {"cpu_millicores": "<= 1500"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "equal": ([{"when": {"workers": 1}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"]),
    "not equal": ([{"when": {"workers": 2}, "set": {"qos": "x"}}], {}, {"qos": None}, ["no: workers 1 is not 2"]),
    "between": (
        [{"when": {"memory_mib": "500 to 512"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "not between": (
        [{"when": {"memory_mib": "513 to 600"}, "set": {"qos": "x"}}], {}, {}, ["no: memory_mib 512 is not 513 to 600"],
    ),
    "any of numbers": (
        [{"when": {"gpus": [2, ">= 8"]}, "set": {"qos": "x"}}], {"gpu_limit": 9}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "none of numbers": (
        [{"when": {"gpus": [2, ">= 8"]}, "set": {"qos": "x"}}], {"gpu_limit": 3}, {}, ["no: gpus 3 is not [2, '>= 8']"],
    ),
    "a user": ([{"when": {"user": "alice"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"]),
    "any of users": (
        [{"when": {"user": ["bob", "al*"]}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "another user": (
        [{"when": {"user": "bob"}, "set": {"qos": "x"}}], {}, {"qos": None}, ["no: user alice is not bob"],
    ),
    "a group of users": (
        [{"when": {"user": {"group": "neuro"}}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "not of the group": (
        [{"when": {"user": {"group": "neuro"}}, "set": {"qos": "x"}}], {"auid": "carol"}, {},
        ["no: user carol is not {'group': 'neuro'}"],
    ),
    "an image": (
        [{"when": {"image": "docker.io/fnndsc/pl-*"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "an image without its tag": (
        [{"when": {"image": "docker.io/fnndsc/pl-fshack"}, "set": {"qos": "x"}}], {}, {"qos": "x"},
        ["yes: qos None -> x"],
    ),
    "an image of another tag": (
        [{"when": {"image": "docker.io/fnndsc/pl-fshack:2"}, "set": {"qos": "x"}}], {}, {},
        ["no: image docker.io/fnndsc/pl-fshack:1.3 is not docker.io/fnndsc/pl-fshack:2"],
    ),
    "an image that leaves its registry out": (
        [{"when": {"image": "docker.io/library/debian"}, "set": {"qos": "x"}}], {"image": "debian:12"}, {"qos": "x"},
        ["yes: qos None -> x"],
    ),
    "an image by digest": (
        [{"when": {"image": "ghcr.io/a/b"}, "set": {"qos": "x"}}], {"image": f"GHCR.io/a/b:1@sha256:{'0' * 64}"},
        {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "an image of a registry with a port": (
        [{"when": {"image": "localhost:5000/a"}, "set": {"qos": "x"}}], {"image": "localhost:5000/a:1"}, {"qos": "x"},
        ["yes: qos None -> x"],
    ),
    "kind": ([{"when": {"kind": ["fs", "ts"]}, "set": {"qos": "x"}}], {}, {}, ["no: kind ds is not ['fs', 'ts']"]),
    "jid": ([{"when": {"jid": "chris-jid-*"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"]),
    "no partition is asked for": (
        [{"when": {"partition": None}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "a partition is asked for": (
        [{"when": {"partition": None}, "set": {"qos": "x"}}], {"partition": "long"}, {},
        ["no: partition long is not None"],
    ),
    "no time limit is longer than any": (
        [{"when": {"time_limit_minutes": "> 60"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "a time limit": (
        [{"when": {"time_limit_minutes": "> 60"}, "set": {"qos": "x"}}], {"time_limit_minutes": 60}, {},
        ["no: time_limit_minutes 60 is not > 60"],
    ),
    "all conditions": (
        [{"when": {"user": "alice", "gpus": ">= 1"}, "set": {"qos": "x"}}], {}, {}, ["no: gpus 0 is not >= 1"],
    ),
    "unless": (
        [{"unless": {"user": "alice"}, "set": {"qos": "x"}}], {}, {"qos": None}, ["no: user alice is alice"],
    ),
    "unless that does not hold": (
        [{"unless": {"user": "bob"}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "unless all hold": (
        [{"unless": {"user": "alice", "gpus": 1}, "set": {"qos": "x"}}], {}, {"qos": "x"}, ["yes: qos None -> x"],
    ),
    "a later rule outweighs": (
        [GPU, LARGE], {"gpu_limit": 1, "memory_limit": 128_000}, {"partition": "highmem"},
        ["yes: partition None -> gpu", "yes: partition gpu -> highmem"],
    ),
    "last": (
        [GPU | {"last": True}, LARGE], {"gpu_limit": 1, "memory_limit": 128_000}, {"partition": "gpu"},
        ["yes: partition None -> gpu"],
    ),
    "last that does not match": (
        [GPU | {"last": True}, LARGE], {"memory_limit": 128_000}, {"partition": "highmem"},
        ["no: gpus 0 is not >= 1", "yes: partition None -> highmem"],
    ),
    "a default": ([NORMAL], {}, {"partition": "normal"}, ["yes: partition None -> normal"]),
    "a default is not needed": ([NORMAL], {"partition": "long"}, {"partition": "long"}, ["yes: "]),
    "a default after a rule": (
        [GPU, NORMAL], {"gpu_limit": 1}, {"partition": "gpu"}, ["yes: partition None -> gpu", "yes: "],
    ),
    "what was asked for is outweighed": (
        [GPU], {"gpu_limit": 1, "partition": "long"}, {"partition": "gpu"}, ["yes: partition long -> gpu"],
    ),
    "a rule sees what the ones above have set": (
        [{"set": {"memory_mib": {"at_least": 200_000}}}, LARGE], {}, {"partition": "highmem", "memory_mib": 200_000},
        ["yes: memory_mib 512 -> 200000", "yes: partition None -> highmem"],
    ),
    "a floor": ([{"set": {"memory_mib": {"at_least": 600}}}], {}, {"memory_mib": 600}, ["yes: memory_mib 512 -> 600"]),
    "a floor that is met": ([{"set": {"memory_mib": {"at_least": 500}}}], {}, {"memory_mib": 512}, ["yes: "]),
    "a cap": ([CAP], {"memory_limit": 2000}, {"memory_mib": 1000}, ["yes: memory_mib 2000 -> 1000"]),
    "a cap that is met": ([CAP], {}, {"memory_mib": 512}, ["yes: "]),
    "a cap holds against a later rule": ([CAP, {"set": {"memory_mib": 5000}}], {}, {"memory_mib": 1000},
        ["yes: ", "yes: memory_mib 512 -> 1000"]),
    "a cap holds against a later cap": (
        [CAP, {"set": {"memory_mib": {"at_most": 5000}}}], {"memory_limit": 9000}, {"memory_mib": 1000},
        ["yes: memory_mib 9000 -> 1000", "yes: "],
    ),
    "a cap holds against a floor": (
        [CAP, {"set": {"memory_mib": {"at_least": 5000}}}], {}, {"memory_mib": 1000},
        ["yes: ", "yes: memory_mib 512 -> 1000"],
    ),
    "an exception from a cap": (
        [CAP | {"unless": {"user": "alice"}}], {"memory_limit": 2000}, {"memory_mib": 2000},
        ["no: user alice is alice"],
    ),
    "a cap of time where no limit is asked for": (
        [{"set": {"time_limit_minutes": {"at_most": 90}}}], {}, {"time_limit_minutes": 90},
        ["yes: time_limit_minutes None -> 90"],
    ),
    "a default of time": (
        [{"set": {"time_limit_minutes": {"default": 30, "at_most": 90}}}], {}, {"time_limit_minutes": 30},
        ["yes: time_limit_minutes None -> 30"],
    ),
    "GPUs and CPUs": (
        [{"set": {"gpus": {"at_most": 0}, "cpu_millicores": 4000}}], {"gpu_limit": 2},
        {"gpu_count": 0, "cpu_millicores": 4000}, ["yes: cpu_millicores 1500 -> 4000, gpus 2 -> 0"],
    ),
    "a table": (
        [{"set": {"account": {"table": "accounts", "default": "chris"}}}], {}, {"account": "neuro"},
        ["yes: account None -> neuro"],
    ),
    "a pattern in a table": (
        [{"set": {"account": {"table": "accounts"}}}], {"auid": "bob"}, {"account": "cardio"},
        ["yes: account None -> cardio"],
    ),
    "the default of a table": (
        [{"set": {"account": {"table": "accounts", "default": "chris"}}}], {"auid": "zoe"}, {"account": "chris"},
        ["yes: account None -> chris"],
    ),
    "not in the table": (
        [{"set": {"account": "own"}}, {"set": {"account": {"table": "accounts"}}}], {"auid": "zoe"}, {"account": "own"},
        ["yes: account None -> own", "yes: "],
    ),
    "a table by image": (
        [{"set": {"time_limit_minutes": {"table": "minutes", "by": "image"}}}], {}, {"time_limit_minutes": 1440},
        ["yes: time_limit_minutes None -> 1440"],
    ),
    "a table of partitions": (
        [{"set": {"partition": {"table": "partitions"}}}], {"auid": "bob"}, {"partition": "cardio"},
        ["yes: partition None -> cardio"],
    ),
    "another image": (
        [{"set": {"image": "debian:12"}}], {}, {"policy_image": "debian:12", "image": REQUEST["image"]},
        [f"yes: image {REQUEST['image']} -> debian:12"],
    ),
    "another registry": (
        [{"set": {"image": {"registry": "mirror.example.org:5000/hub"}}}], {"image": "debian"},
        {"policy_image": "mirror.example.org:5000/hub/library/debian", "image": "debian"},
        ["yes: image debian -> mirror.example.org:5000/hub/library/debian"],
    ),
    "an image is matched as it was asked for": (
        [{"set": {"image": {"registry": "m.org"}}}, {"when": {"image": "docker.io/*"}, "set": {"qos": "x"}}], {},
        {"policy_image": "m.org/fnndsc/pl-fshack:1.3", "qos": "x"},
        [f"yes: image {REQUEST['image']} -> m.org/fnndsc/pl-fshack:1.3", "yes: qos None -> x"],
    ),
    "mappings grow": (
        [{"set": {"environment": {"A": "1", "B": "1"}}}, {"set": {"environment": {"B": "2"}}}], {"env": ["C=3", "A=0"]},
        {"env": (("A", "0"), ("B", "2"), ("C", "3"))},
        ["yes: environment None -> {'A': '1', 'B': '1'}",
         "yes: environment {'A': '1', 'B': '1'} -> {'A': '1', 'B': '2'}"],
    ),
    "lists grow": (
        [{"set": {"modules": ["a", "b"]}}, {"set": {"modules": ["b", "c"]}}], {}, {"modules": ("a", "b", "c")},
        ["yes: modules None -> ['a', 'b']", "yes: modules ['a', 'b'] -> ['a', 'b', 'c']"],
    ),
    "null takes away": (
        [{"set": {"modules": ["a"], "qos": "x"}}, {"set": {"modules": None, "qos": None}}], {},
        {"modules": (), "qos": None},
        ["yes: qos None -> x, modules None -> ['a']", "yes: qos x -> None, modules ['a'] -> None"],
    ),
}  # fmt: skip


def outcome(decided: decide.Decision) -> dict[str, Any]:
    """The fields of the job and of its policy, under one name each."""
    of_policy = {
        field.name: getattr(decided.job.policy, field.name) for field in dataclasses.fields(decided.job.policy)
    }
    of_job = {field.name: getattr(decided.job, field.name) for field in dataclasses.fields(decided.job)}
    return of_policy | {"policy_image": of_policy["image"]} | of_job


@pytest.mark.parametrize("name", ROWS)
def test_what_rules_make_of_a_request(name: str, tmp_path: Path) -> None:
    given_rules, fields, expected, said = ROWS[name]
    values = site(*given_rules)
    assert list(SCHEMA.iter_errors(values)) == []
    decided = decision(tmp_path, values, fields)
    assert [told(step) for step in decided.steps] == said
    found = outcome(decided)
    assert {field: found[field] for field in expected} == expected
    assert decided.job.digest == decided.asked.digest
    assert [rule.name for rule in decided.unseen] == [f"rule {n + 1}" for n in range(len(said), len(given_rules))]
    if not any(step.changes for step in decided.steps):
        assert decided.job == decided.asked


# -- reading -------------------------------------------------------------------------------------------------------

BEGIN = "# a site\npolicy:\n  rules:\n"
# what stands below `rules:`, from line 4 on -> the line and the message
WRONG: dict[str, tuple[str, int, str]] = {
    "a condition that does not exist": (
        "    - name: a\n      when:\n        memry_mib: 5\n      set: {qos: x}\n",
        6,
        "policy.rules[1].when has no 'memry_mib'; did you mean memory_mib?",
    ),
    "no name": (
        "    - set: {qos: x}\n",
        4,
        "policy.rules[1] needs `name`: one line of text that says what the rule is for",
    ),
    "no comparison": (
        "    - name: a\n      when: {gpus: more than 2}\n      set: {qos: x}\n",
        5,
        'policy.rules[1].when.gpus must be a number, a comparison such as ">= 64000" or "1000 to 4000", '
        "or a list of these",
    ),
    "neither set nor refuse": ("    - name: a\n", 4, "the rule 'a' needs one of `set` and `refuse`"),
    "set and refuse": ("    - {name: a, set: {}, refuse: never}\n", 4, "the rule 'a' needs one of `set` and `refuse`"),
    "the same name": (
        "    - {name: a, set: {qos: x}}\n    - name: a\n      set: {qos: y}\n",
        5,
        "two rules are called 'a': each needs a name of its own",
    ),
    "a group that does not exist": (
        "    - name: a\n      when:\n        user: {group: nuro}\n      set: {qos: x}\n  groups: {neuro: [alice]}\n",
        6,
        "there is no group 'nuro'; did you mean neuro?",
    ),
    "a table that does not exist": (
        "    - name: a\n      set:\n        account: {table: acounts}\n  tables: {accounts: {alice: x}}\n",
        6,
        "there is no table 'acounts'; did you mean accounts?",
    ),
    "a value of a table": (
        "    - {name: a, set: {time_limit_minutes: {table: times}}}\n"
        "  tables:\n    times:\n      alice: 5\n      bob: long\n",
        8,
        "policy.tables.times.bob cannot be 'long': time_limit_minutes must be a whole number from 1 to 525600, or "
        "{at_least: N, at_most: N}, or {table: NAME, by: user}",
    ),
    "a line break": (
        '    - name: a\n      set:\n        qos: low\n        account: "a\\n#SBATCH --uid=0"\n',
        7,
        "policy.rules[1].set.account must be one line of text, or {table: NAME, by: user}",
    ),
    "no partition": (
        "    - {name: a, set: {partition: two words}}\n",
        4,
        "policy.rules[1].set.partition must be the name of a partition, {default: NAME}, or {table: NAME, by: user}",
    ),
    "no image": (
        "    - {name: a, set: {image: 'UPPER CASE'}}\n",
        4,
        "policy.rules[1].set.image must be an image reference, {registry: HOST}, or {table: NAME, by: user}",
    ),
    "pman's own label": (
        "    - name: a\n      set:\n        labels: {org.chrisproject.pman.name: x}\n",
        6,
        "policy.rules[1].set.labels must be a mapping of names to text, none set by pman or Kubernetes",
    ),
    "a label that Kubernetes sets": (
        "    - name: a\n      set:\n        labels: {batch.kubernetes.io/job-name: x}\n",
        6,
        "policy.rules[1].set.labels must be a mapping of names to text, none set by pman or Kubernetes",
    ),
    "no variable": (
        "    - {name: a, set: {environment: {A-B: x}}}\n",
        4,
        "policy.rules[1].set.environment must be a mapping of variables to text",
    ),
    "a relative directory": (
        "    - {name: a, set: {binds: [{source: atlas, target: /atlas}]}}\n",
        4,
        "policy.rules[1].set.binds must be a list of {source: /PATH, target: /PATH, read_only: true}",
    ),
    "text for a list": (
        "    - {name: a, set: {modules: fsl}}\n",
        4,
        "policy.rules[1].set.modules must be a list of names",
    ),
    "a cap of nothing": (
        "    - {name: a, set: {memory_mib: {at_most: 0}}}\n",
        4,
        "policy.rules[1].set.memory_mib cannot be 0: memory_mib must be a whole number from 1 to 100000000, or "
        "{at_least: N, at_most: N}, or {table: NAME, by: user}",
    ),
    "a floor above the cap": (
        "    - {name: a, set: {memory_mib: {at_most: 5, at_least: 6}}}\n",
        4,
        "policy.rules[1].set.memory_mib is at_least 6 and at_most 5",
    ),
    "a cap without a number": (
        "    - name: a\n      set:\n        memory_mib:\n          at_most:\n",
        6,
        "policy.rules[1].set.memory_mib must be a whole number from 1 to 100000000, or {at_least: N, at_most: N}, "
        "or {table: NAME, by: user}",
    ),
    "a condition that no number fulfils": (
        '    - {name: a, when: {gpus: "5 to 1"}, set: {qos: x}}\n',
        4,
        'policy.rules[1].when.gpus must be a number, a comparison such as ">= 64000" or "1000 to 4000", '
        "or a list of these",
    ),
    "an empty list, which nobody is in": (
        "    - {name: a, when: {user: []}, set: {qos: x}}\n",
        4,
        "policy.rules[1].when.user must be a name or pattern such as pl-*, {group: NAME}, or a list of these",
    ),
    "a misspelt key": ("    []\n  grups: {}\n", 5, "policy has no 'grups'; did you mean groups or rules?"),
    "a target that does not exist": (
        "    []\n  targets: [slrum]\n",
        5,
        "policy.targets: there is no target 'slrum'; did you mean slurm or swarm?",
    ),
    "no list": ("    name: a\n", 3, "policy.rules must be a list of rules"),
    "no rule": ("    - gpu\n", 3, "policy.rules must be a list of rules"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_file_and_line(name: str, tmp_path: Path) -> None:
    text, line, message = WRONG[name]
    (tmp_path / "site.yaml").write_text(BEGIN + text)
    config = settings.load({"STOREBASE": "/data", "TEMPLATES_DIR": str(tmp_path)})
    with pytest.raises(TemplateError, match=f"^{re.escape(f'{tmp_path}/site.yaml:{line}: {message}')}$"):
        render.Renderer(config, TARGETS)


@pytest.mark.parametrize("value", ["5", "[]", "rules", "null"])
def test_a_policy_that_is_no_mapping(value: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"policy: {value}\n")
    with pytest.raises(TemplateError, match=r"site.yaml:1: policy must be a mapping that holds a list of `rules`$"):
        render.Renderer(settings.load({"STOREBASE": "/data", "TEMPLATES_DIR": str(tmp_path)}), TARGETS)


def test_the_schema_is_printed_and_refuses_what_pman_refuses(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["templates", "schema"])
    schema = json.loads(printed.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    # what only the whole file says, or the table's reader knows
    beyond = (
        "same name",
        "does not exist",
        "value of a table",
        "cap",
        "pman's own",
        "Kubernetes sets",
        "no variable",
        "no image",
    )
    for name, (text, _, _) in WRONG.items():
        found = list(validator.iter_errors(yaml.safe_load(BEGIN + text)))
        assert found or any(word in name for word in beyond) or "condition" in name, name
    for path in (ROOT / "examples" / "sites").glob("*/site.yaml"):
        assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == [], path


def test_site_values_beside_the_rules_stay_as_they_are(tmp_path: Path) -> None:
    made = renderer(tmp_path, {"rules": [{"user": "alice", "partition": "neuro"}], "accounts": {"alice": "x"}})
    assert made.site["rules"] == [{"user": "alice", "partition": "neuro"}]
    assert made.rules == rules.Rules()


# -- refusing ------------------------------------------------------------------------------------------------------


def test_a_refusal_speaks_the_words_of_the_rule(tmp_path: Path) -> None:
    allow = {"unless": {"image": {"group": "trusted"}}, "refuse": "Only images of FNNDSC run here."}
    made = renderer(tmp_path, site(GPU, allow, {"set": {"qos": "x"}}))
    assert made.job(job.validate(REQUEST)).image == REQUEST["image"]
    refused = job.validate(REQUEST | {"image": "quay.io/evil/miner", "gpu_limit": 1})
    with pytest.raises(Refused, match=r"^Only images of FNNDSC run here\.$"):
        made.job(refused)
    decided = made.decide(refused)
    assert [rule.name for rule in decided.unseen] == ["rule 3"]
    assert decided.to_json()["refused"] == "Only images of FNNDSC run here."


def test_changed_rules_do_not_change_the_digest(tmp_path: Path) -> None:
    first = decision(tmp_path / "a", site(GPU), {"gpu_limit": 1}).job
    second = decision(
        tmp_path / "b", site({"set": {"memory_mib": 9000, "image": "debian", "qos": "x"}}), {"gpu_limit": 1}
    ).job
    assert first != second
    assert first.digest == second.digest


def test_a_saved_rule_counts_at_once_with_reload(tmp_path: Path) -> None:
    made = renderer(tmp_path, site(GPU), APPLICATION_MODE="dev")
    request = job.validate(REQUEST | {"gpu_limit": 1})
    assert made.job(request).partition == "gpu"
    renderer(tmp_path, site())
    assert made.job(request).partition is None


# -- what no rule can do -------------------------------------------------------------------------------------------

NUMBERS = st.integers(1, 1000)
LIMITS = st.one_of(
    NUMBERS, st.fixed_dictionaries({}, optional={"at_most": NUMBERS}), st.fixed_dictionaries({"at_least": NUMBERS})
)
WHEN = st.fixed_dictionaries(
    {},
    optional={
        "user": st.sampled_from(["alice", "a*", "bob"]),
        "memory_mib": st.sampled_from([">= 1000", "< 3000", 512]),
        "partition": st.sampled_from([None, "gpu", "*"]),
    },
)
CAPPED = ("memory_mib", "cpu_millicores", "gpus", "time_limit_minutes")
SET = st.fixed_dictionaries({}, optional=dict.fromkeys(CAPPED, LIMITS) | {"partition": st.sampled_from(["gpu", "x"])})
RULE = st.fixed_dictionaries({"set": SET}, optional={"when": WHEN, "unless": WHEN, "last": st.booleans()})


def read(values: dict[str, Any]) -> rules.Rules:
    return rules.read(values["policy"], lambda _: 1, "site.yaml", TARGETS)


CONFIG = settings.load({"STOREBASE": "/data"})


@given(of=st.lists(RULE, max_size=6), most=st.none() | NUMBERS, memory=NUMBERS, limit=st.none() | NUMBERS)
def test_no_rule_weakens_a_cap(of: list[dict[str, Any]], most: int | None, memory: int, limit: int | None) -> None:
    config = CONFIG.model_copy(update={"timelimit_max_minutes": most})
    request = job.validate(REQUEST | {"memory_limit": memory} | ({"time_limit_minutes": limit} if limit else {}))
    decided = decide.decide(job.make_job(request, config), read(site(*of)), most)
    values = decided.job.memory_mib, decided.job.cpu_millicores, decided.job.gpu_count, decided.job.time_limit_minutes
    matched = [rule["set"] for rule, step in zip(of, decided.steps, strict=False) if step.matched]
    for name, value in zip(CAPPED, values, strict=True):
        given_limits = [limits[name] for limits in matched if isinstance(limits.get(name), dict)]
        caps = [limits["at_most"] for limits in given_limits if "at_most" in limits]
        caps += [most] if most and name == "time_limit_minutes" else []
        assert not caps or (value is not None and value <= min(caps))
        assert value is None or value >= (0 if name == "gpus" else 1)
    assert decided.job.digest == job.make_job(request, config).digest
