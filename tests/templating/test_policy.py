"""What templates make of the rules' decisions: on which target each has a place, quoted like any other value."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pman import checking, job, settings
from pman.cli import main
from pman.errors import TemplateError
from pman.targets import TARGETS, judge
from pman.templating import decide, explain, files, render, rules
from tests import deliver
from tests.rig import ROOT
from tests.templating.test_roundtrip import sbatch_options
from tests.templating.test_rules import REQUEST, renderer, site

SHIPPED = render.Renderer(settings.load({"STOREBASE": "/data"}), TARGETS)
APPTAINER = "/atlas/mni /atlas ro"
BIND = [{"source": "/atlas/mni", "target": "/atlas"}]
# target, what a rule sets, text of the spec
EXPRESSED: list[tuple[str, dict[str, Any], str]] = [
    ("slurm", {"account": "a b"}, '#SBATCH --account=a" "b\n'),
    ("slurm", {"qos": "low"}, "#SBATCH --qos=low\n"),
    ("slurm", {"constraint": "intel&gpu"}, "#SBATCH --constraint=intel\\&gpu\n"),
    ("slurm", {"reservation": "course"}, "#SBATCH --reservation=course\n"),
    ("slurm", {"licenses": "matlab:1"}, "#SBATCH --licenses=matlab:1\n"),
    ("slurm", {"nice": 0}, "#SBATCH --nice=0\n"),
    ("slurm", {"requeue": True}, "#SBATCH --requeue\n"),
    ("slurm", {"exclusive": True}, "#SBATCH --exclusive\n"),
    ("slurm", {"gpu_type": "a100", "gpus": 2}, "#SBATCH --gres=gpu:a100:2\n"),
    ("slurm", {"partition": "gpu"}, "#SBATCH --partition=gpu\n"),
    ("slurm", {"modules": ["apptainer/1.3", "it's"]}, "\nmodule load apptainer/1.3 'it'\"'\"'s' || {\n"),
    ("slurm", {"binds": BIND}, f'--mount "$(mount_words {APPTAINER})"\n'),
    ("slurm", {"environment": {"TZ": "a b"}}, " env 'TZ=a b' GREETING=hello simpledsapp"),
    ("slurm", {"labels": {"tier": "gold"}}, 'pman.name=chris-jid-1" "tier=gold\n'),
    ("slurm", {"image": "debian:12"}, "\nimage=debian:12\n"),
    ("slurm", {"time_limit_minutes": 7}, "#SBATCH --time=7\n"),
    ("slurm", {"memory_mib": 900, "cpu_millicores": 2000}, "#SBATCH --cpus-per-task=2\n#SBATCH --mem=900M\n"),
    ("local", {"modules": ["fsl"]}, "\nmodule load fsl || {\n"),
    ("local", {"environment": {"TZ": "a b"}}, " env 'TZ=a b' "),
    ("wdl", {"account": "a b"}, '    slurm_account: "a b"\n'),
    ("wdl", {"qos": "low"}, '    slurm_qos: "low"\n'),
    ("wdl", {"constraint": "intel&gpu"}, '    slurm_constraint: "intel\\u0026gpu"\n'),
    ("wdl", {"reservation": "course"}, '    slurm_reservation: "course"\n'),
    ("wdl", {"licenses": "matlab:1"}, '    slurm_licenses: "matlab:1"\n'),
    ("wdl", {"gpu_type": "a100"}, '    gpu_type: "a100"\n'),
    ("wdl", {"environment": {"TZ": "it's"}}, "env \"$(printf 'TZ=it\\047s')\" "),
    ("wdl", {"image": "debian:12"}, '    docker: "debian:12"\n    image: "debian:12"\n'),
    ("k8s", {"node_selector": {"pool": "chris"}}, '      nodeSelector: {"pool": "chris"}\n'),
    (
        "k8s",
        {"tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]},
        '      tolerations: [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]\n',
    ),
    ("k8s", {"priority_class": "low"}, '      priorityClassName: "low"\n'),
    ("k8s", {"runtime_class": "nvidia"}, '      runtimeClassName: "nvidia"\n'),
    ("k8s", {"service_account": "jobs"}, '      serviceAccountName: "jobs"\n'),
    ("k8s", {"annotations": {"a/b": "c d"}}, '    "a/b": "c d"\nspec:\n'),
    ("k8s", {"annotations": {"a/b": "c d"}}, '      annotations: {"a/b": "c d"}\n'),
    ("k8s", {"labels": {"tier": "gold"}}, '    "tier": "gold"\n  annotations:\n'),
    ("k8s", {"labels": {"tier": "gold"}}, '        "tier": "gold"\n    spec:\n'),
    ("k8s", {"environment": {"TZ": "$(x)"}}, '            - name: "TZ"\n              value: "$$(x)"\n'),
    (
        "k8s",
        {"binds": BIND},
        '            - name: "bind-1"\n              mountPath: "/atlas"\n              readOnly: true\n',
    ),
    ("k8s", {"binds": BIND}, '          hostPath:\n            path: "/atlas/mni"\n            type: Directory\n'),
    ("k8s", {"image": "debian:12"}, '          image: "debian:12"\n'),
    ("swarm", {"placement": ["node.role == worker"]}, '    Constraints:\n      - "node.role == worker"\n'),
    ("swarm", {"networks": ["licences"]}, '  Networks:\n    - Target: "licences"\n'),
    ("swarm", {"labels": {"tier": "gold"}}, '  "tier": "gold"\nMode:\n'),
    ("swarm", {"environment": {"TZ": "{{x"}}, '      - "TZ={{\\"{{\\"}}x"\n'),
    ("swarm", {"binds": BIND}, '        ReadOnly: true\n        Type: bind\n        Source: "/atlas/mni"\n'),
    ("docker", {"networks": ["none"]}, '  NetworkMode: "none"\n'),
    (
        "docker",
        {"networks": ["a", "b"]},
        'NetworkingConfig:\n  EndpointsConfig:\n    "a": {}\n    "b": {}\n',
    ),
    ("docker", {"labels": {"tier": "gold"}}, '  "tier": "gold"\nCmd:\n'),
    ("docker", {"environment": {"TZ": "UTC"}}, 'Env:\n  - "PMAN_WORKER_COUNT=1"\n  - "TZ=UTC"\n'),
    ("swarm", {"binds": [BIND[0] | {"target": "/{{x"}]}, '      - Target: "/{{\\"{{\\"}}x"\n'),
    (
        "docker",
        {"binds": [BIND[0] | {"read_only": False}]},
        '      ReadOnly: false\n      Type: bind\n      Source: "/atl',
    ),
    ("docker", {"image": "debian:12"}, 'Image: "debian:12"\n'),
    ("docker", {"memory_mib": {"at_most": 100}}, f"  MemoryReservation: {100 << 20}\n"),
]


def rendered(target: str, wanted: dict[str, Any], fields: dict[str, Any] | None = None) -> render.Spec:
    """The spec of a job under one rule, of the shipped templates."""
    read = rules.read(site({"set": wanted})["policy"], lambda _: 1, "site.yaml", TARGETS)
    asked = job.make_job(job.validate({**render.SAMPLE, **(fields or {})}), SHIPPED.settings)
    return SHIPPED.render(decide.decide(asked, read, None).job, target)


@pytest.mark.parametrize("runtime", ["podman", "charliecloud"])
def test_a_directory_that_a_runtime_would_read_as_more_is_not_bound(runtime: str, tmp_path: Path) -> None:
    def code(source: str) -> int:
        rule = {"name": "a", "set": {"binds": [{"source": source, "target": "/atlas"}]}}
        text = renderer(tmp_path, site(rule), SLURM_RUNTIME=runtime)
        script = text.render(text.job(job.validate(REQUEST)), "slurm").text
        guard = re.search(r'case "\$incoming\$outgoing".*?esac', script, re.DOTALL)
        assert guard
        script = f"cannot_run() {{ exit 126; }}; incoming=/i outgoing=/o; {guard[0]}"
        return subprocess.run(["bash", "-c", script], check=False).returncode

    assert code("/atlas/mni") == 0
    assert code("/atlas:/etc") == 126
    assert code("/atlas,rw") == 126


@pytest.mark.parametrize(("target", "wanted", "text"), EXPRESSED, ids=[f"{t}/{'-'.join(s)}" for t, s, _ in EXPRESSED])
def test_what_a_rule_sets_stands_in_the_spec(target: str, wanted: dict[str, Any], text: str) -> None:
    spec = rendered(target, wanted)
    assert text in spec.text
    assert judge(spec) == []
    assert text not in rendered(target, {}).text


@pytest.mark.parametrize("target", TARGETS)
def test_a_cap_that_ignored_limits_make_void_is_said(target: str, tmp_path: Path) -> None:
    rule = {"name": "a", "set": {"memory_mib": {"at_most": 100}, "cpu_millicores": {"at_most": 100}}}
    kept = explain.unexpressed(renderer(tmp_path, site(rule)), target)
    void = explain.unexpressed(renderer(tmp_path, site(rule), IGNORE_LIMITS="yes"), target)
    assert {name for _, name in void} == {"memory_mib", "cpu_millicores"}
    assert target == "local" or kept == []


def names_of(target: str) -> set[str]:
    return {
        name
        for found in explain.printed(SHIPPED, TARGETS[target].template).values()
        for name in explain.by_rules(found)
    }


def test_the_table_of_the_page_says_what_each_target_expresses() -> None:
    page = (ROOT / "docs" / "rules.md").read_text()
    table = page.partition("| set by rules |")[2].partition("\n\n")[0].splitlines()
    rows = {cells[1].strip(" `"): cells[2] for line in table[2:] if (cells := line.split("|"))}
    said = {name: set(re.findall(r"\w+", targets)) for name, targets in rows.items()}
    found = {name: {target for target in TARGETS if name in names_of(target)} for name in rules._Set.model_fields}
    assert said == {name: targets for name, targets in found.items() if targets}


def test_what_the_site_says_elsewhere_stays_beside_the_rules(tmp_path: Path) -> None:
    values = site({"set": {"placement": ["a"], "networks": ["b"], "account": "rules", "node_selector": {"x": "2"}}})
    values |= {"swarm_constraints": ["c"], "swarm_networks": ["d"]}
    made = renderer(tmp_path, values, NODE_SELECTOR="x=1,y=1", SLURM_ACCOUNT="setting")
    swarm, k8s, slurm = (
        made.render(made.job(job.validate(REQUEST)), target).text for target in ("swarm", "k8s", "slurm")
    )
    task = yaml.safe_load(swarm)["TaskTemplate"]
    assert task["Placement"] == {"Constraints": ["c", "a"]}
    assert task["Networks"] == [{"Target": "d"}, {"Target": "b"}]
    assert yaml.safe_load(k8s)["spec"]["template"]["spec"]["nodeSelector"] == {"x": "2", "y": "1"}
    assert sbatch_options(slurm)["account"] == "rules"


def test_a_template_can_override_what_rules_set(tmp_path: Path) -> None:
    made = renderer(tmp_path, site({"set": {"image": "debian:12", "partition": "gpu"}}))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job.sh.j2").write_text(
        '{% extends "shipped/slurm/job.sh.j2" %}\n{% set image = policy.image ~ ".1" %}\n{% set partition = "own" %}\n'
    )
    text = made.render(made.job(job.validate(REQUEST)), "slurm").text
    assert "\nimage=debian:12.1\n" in text
    assert sbatch_options(text)["partition"] == "own"


# -- what no rule can do -------------------------------------------------------------------------------------------

LINE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20) | st.sampled_from(
    ["$(x)", "`x`", "'", '"', "\\", "a b", "{{x}}", "~{x}", ">>>", "#", ": ", "%j", "*", "-n"]
)
VALUE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | LINE
NAME = st.from_regex(r"[A-Z][A-Z0-9_]{0,5}Q", fullmatch=True)
OF_SLURM = dict.fromkeys(("account", "qos", "constraint", "reservation", "licenses"), LINE)
OF_KUBERNETES = dict.fromkeys(("priority_class", "runtime_class", "service_account"), LINE)
ENVIRONMENT = st.dictionaries(NAME, VALUE, max_size=2)
quickly = hypothesis_settings(max_examples=60)


@quickly
@given(st.fixed_dictionaries({"environment": ENVIRONMENT, "modules": st.lists(LINE, max_size=2)}, optional=OF_SLURM))
def test_no_value_of_a_rule_leaves_its_word_on_slurm(wanted: dict[str, Any]) -> None:
    text = rendered("slurm", wanted, {"env": []}).text
    plain = sbatch_options(rendered("slurm", {}, {"env": []}).text)
    assert sbatch_options(text) == plain | {name: wanted[name] for name in OF_SLURM if name in wanted}
    loads = re.findall(r"(?ms)^module load (.*?) \|\| {\n  said=", text)
    given_words = deliver.words(deliver.run(f"printf '%s\\0' {loads[0]}")) if loads else []
    assert given_words == list(dict.fromkeys(wanted["modules"]))


@quickly
@given(st.fixed_dictionaries({}, optional=OF_SLURM))
def test_no_value_of_a_rule_leaves_its_literal_in_wdl(wanted: dict[str, Any]) -> None:
    runtime = deliver.wdl_runtime(rendered("wdl", wanted).text)
    assert {name: runtime[f"slurm_{name}"] for name in wanted} == wanted
    assert runtime.keys() - {f"slurm_{name}" for name in wanted} == deliver.wdl_runtime(rendered("wdl", {}).text).keys()


@quickly
@given(
    st.fixed_dictionaries(
        {"environment": ENVIRONMENT, "annotations": st.dictionaries(LINE, VALUE, max_size=2)}, optional=OF_KUBERNETES
    )
)
def test_no_value_of_a_rule_leaves_its_scalar_on_kubernetes(wanted: dict[str, Any]) -> None:
    found = deliver.of_kubernetes(rendered("k8s", wanted, {"env": []}))
    pod = found.fields["spec"]["template"]
    assert wanted["environment"].items() <= found.env.items()
    assert wanted["annotations"].items() <= found.fields["metadata"]["annotations"].items()
    assert pod["metadata"].get("annotations", {}) == wanted["annotations"]
    fields = {"priority_class": "priorityClassName", "runtime_class": "runtimeClassName"}
    assert {name: pod["spec"][field] for name, field in fields.items() if name in wanted} == {
        name: wanted[name] for name in fields if name in wanted
    }


@quickly
@given(st.fixed_dictionaries({"environment": ENVIRONMENT, "placement": st.lists(LINE, unique=True, max_size=2)}))
def test_no_value_of_a_rule_leaves_its_scalar_on_swarm(wanted: dict[str, Any]) -> None:
    found = deliver.of_swarm(rendered("swarm", wanted, {"env": []}))
    assert wanted["environment"].items() <= found.env.items()
    assert found.fields["TaskTemplate"].get("Placement", {}).get("Constraints", []) == wanted["placement"]


def test_what_a_language_cannot_carry_is_refused_and_never_changed() -> None:
    with pytest.raises(TemplateError, match="cannot be written"):
        rendered("slurm", {"labels": {"a": "b\n#SBATCH --uid=0"}})


def test_the_last_of_many_rules_that_match_decides(tmp_path: Path) -> None:
    conditions = {"user": ["a*", "bob"], "image": "docker.io/fnndsc/pl-*", "memory_mib": ">= 500", "gpus": "0 to 4"}
    many = [{"when": conditions, "set": {"qos": f"q{n}", "memory_mib": {"at_least": n}}} for n in range(1, 101)]
    many += [{"when": conditions | {"gpus": ">= 1"}, "set": {"qos": "x"}} for _ in range(100)]
    made = renderer(tmp_path, site(*many))
    decided = decide.decide(job.make_job(job.validate(REQUEST), made.settings), made.rules, None)
    assert decided.job.policy.qos == "q100"


# -- explaining ----------------------------------------------------------------------------------------------------

RULES = [
    {"name": "caps", "set": {"memory_mib": {"at_most": 400}}},
    {"name": "large", "when": {"memory_mib": ">= 1000"}, "set": {"partition": "highmem"}},
    {"name": "everybody", "set": {"partition": "normal", "environment": {"TZ": "UTC"}, "account": "lab"}},
]


def explained(directory: Path, *words: str, status: int = 0, request: dict[str, Any] | None = None) -> str:
    (directory / "site").mkdir(exist_ok=True)
    (directory / "request.json").write_text(json.dumps(request or dict(render.SAMPLE)))
    run = CliRunner().invoke(
        main, ["explain", str(directory / "request.json"), "--templates", str(directory / "site"), *words],
        env={"STOREBASE": "/data"},
    )  # fmt: skip
    assert run.exit_code == status, run.output
    return run.output


def test_explain_says_what_was_compared_and_changed(tmp_path: Path) -> None:
    renderer(tmp_path / "site", site(*RULES))
    said = explained(tmp_path).replace(str(tmp_path), "")
    lines = re.findall(r"(?m)^/site/site.yaml:(\d+): (.*)$", said)
    assert [text for _, text in lines] == ["caps: yes", "large: no", "everybody: yes"]
    source = (tmp_path / "site/site.yaml").read_text().splitlines()
    assert [source[int(number) - 1].split(": ")[1] for number, _ in lines] == ["caps", "large", "everybody"]
    assert "    memory_mib: 512 -> 400\n" in said
    assert "    memory_mib 400 is not >= 1000\n" in said
    assert "    partition: normal (none without rules)\n" in said


def test_explain_names_the_rule_behind_each_line(tmp_path: Path) -> None:
    renderer(tmp_path / "site", site(*RULES))
    found = json.loads(explained(tmp_path, "--to", "slurm", "--json"))
    rules_of = {line["text"].strip(): line["rules"] for line in found["lines"]}
    assert rules_of["#SBATCH --mem=400M"] == ["caps"]
    assert rules_of["#SBATCH --partition=normal"] == ["everybody"]
    assert rules_of["#SBATCH --account=lab"] == ["everybody"]
    assert rules_of["#SBATCH --ntasks=1"] == []
    assert "\n".join(line["text"] for line in found["lines"]) + "\n" == SHIPPED_WITH(tmp_path)
    assert found["outcome"] == {
        "memory_mib": 400,
        "partition": "normal",
        "environment": {"TZ": "UTC"},
        "account": "lab",
    }
    (mem,) = [line for line in found["lines"] if line["text"] == "#SBATCH --mem=400M"]
    assert (mem["file"], mem["block"]) == ("shipped/slurm/job.sh.j2", "resources")
    shipped = (files.shipped_templates() / "slurm/job.sh.j2").read_text().splitlines()
    assert "--mem=" in shipped[mem["line"] - 1]


def SHIPPED_WITH(directory: Path) -> str:  # noqa: N802
    """What render prints under the rules of a directory."""
    run = CliRunner().invoke(
        main, ["render", str(directory / "request.json"), "--to", "slurm", "--templates", str(directory / "site")],
        env={"STOREBASE": "/data"},
    )  # fmt: skip
    return run.stdout


def test_explain_follows_sets_and_super_of_the_site(tmp_path: Path) -> None:
    renderer(tmp_path / "site", site(*RULES))
    (tmp_path / "site/slurm").mkdir()
    (tmp_path / "site/slurm/job.sh.j2").write_text(
        '{% extends "shipped/slurm/job.sh.j2" %}\n{% set lab = "x" ~ policy.account %}\n'
        "{% block directives %}\n{{ super() }}\n{% if job.partition %}\n#SBATCH --wckey={{ lab|sbatch }}\n{% endif %}\n"
        "{% endblock %}\n"
    )
    found = json.loads(explained(tmp_path, "--to", "slurm", "--json"))
    by_text = {line["text"]: line for line in found["lines"]}
    assert by_text["#SBATCH --wckey=xlab"]["rules"] == ["everybody"]
    assert by_text["#SBATCH --wckey=xlab"]["line"] == 6
    assert by_text["#SBATCH --partition=normal"]["rules"] == ["everybody"]
    assert by_text["#SBATCH --nodes=1"]["rules"] == []


def test_explain_says_what_a_target_cannot_express(tmp_path: Path) -> None:
    renderer(tmp_path / "site", site(*RULES))
    said = explained(tmp_path, "--to", "k8s")
    assert "account has no effect: the templates of k8s do not print it\n" in said
    assert "partition has no effect: the templates of k8s do not print it\n" in said
    assert "memory_mib has no effect" not in said


def test_explain_of_a_refused_job(tmp_path: Path) -> None:
    renderer(tmp_path / "site", site({"refuse": "Not here.", "name": "closed"}, {"set": {"qos": "x"}}))
    said = explained(tmp_path, "--to", "slurm", status=1)
    assert "\nRefused: Not here.\n" in said
    assert "rule 2: not looked at" in said
    said = explained(tmp_path, status=1, request={"jid": "x"})
    assert "is required" in said


def test_explain_without_rules_and_with_a_broken_template(tmp_path: Path) -> None:
    (tmp_path / "site/slurm").mkdir(parents=True)
    assert "site.yaml has none under `policy`" in explained(tmp_path)
    renderer(tmp_path / "site", site(*RULES))
    (tmp_path / "site/slurm/job.sh.j2").write_text("{% if %}")
    assert re.search(r"slurm/job.sh.j2:1: ", explained(tmp_path, "--to", "slurm", status=2))


# -- checking ------------------------------------------------------------------------------------------------------


def findings(directory: Path, *targets: str) -> list[str]:
    found = checking.SiteCheck(directory, targets=targets).findings()
    return [f"{finding.level} {finding.line} {finding.message}" for finding in found if finding.rule == "not-expressed"]


def test_what_a_target_cannot_express_is_a_finding(tmp_path: Path) -> None:
    renderer(tmp_path, site({"set": {"node_selector": {"a": "b"}}}))
    line = (tmp_path / "site.yaml").read_text().splitlines().index("      node_selector:") + 1
    said = "the rule 'rule 1' sets node_selector, which the templates of"
    assert findings(tmp_path, "slurm") == [f"error {line} {said} slurm do not print"]
    assert findings(tmp_path, "k8s") == []


def test_a_site_names_the_targets_that_it_speaks_of(tmp_path: Path) -> None:
    values = site({"set": {"account": "a"}})
    values["policy"]["targets"] = ["slurm"]
    renderer(tmp_path, values)
    assert checking.SiteCheck(tmp_path).findings() == []
    values["policy"]["targets"] = ["slurm", "docker"]
    renderer(tmp_path, values)
    assert len(findings(tmp_path)) == 1


def test_a_value_that_a_namespace_keeps_is_not_lost(tmp_path: Path) -> None:
    renderer(tmp_path, site({"set": {"gpu_type": "a100"}}))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job.sh.j2").write_text(
        '{% extends "shipped/slurm/job.sh.j2" %}\n{% set kept = namespace(type="") %}\n{% block gpus %}\n'
        "{% for kind in [policy.gpu_type] %}{% set kept.type = kind %}{% endfor %}\n"
        "#SBATCH --gpus={{ kept.type|sbatch }}:{{ job.gpu_count }}\n{% endblock %}\n"
    )
    assert findings(tmp_path) == []


def test_a_block_of_the_site_that_drops_a_value_is_a_finding(tmp_path: Path) -> None:
    renderer(tmp_path, site({"set": {"gpu_type": "a100"}}))
    (tmp_path / "slurm").mkdir()
    template = '{% extends "shipped/slurm/job.sh.j2" %}\n{% block gpus %}\n'
    template += "#SBATCH --gpus={{ job.gpu_count }}\n{% endblock %}\n"
    (tmp_path / "slurm/job.sh.j2").write_text(template)
    assert len(findings(tmp_path)) == 1
    (tmp_path / "slurm/job.sh.j2").write_text(template.replace("--gpus=", "--gpus={{ policy.gpu_type|sbatch }}:"))
    assert findings(tmp_path) == []
