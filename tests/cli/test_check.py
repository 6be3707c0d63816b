"""`pman check`: its output, its options and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from pman.checking import corpus
from pman.errors import BadRequest
from pman.templating import render
from tests.checking.overlays import (
    SLURM,
    TYPO,
    WDL,
    block,
    extending,
    only,
    run,
    write,
)
from tests.rig import ROOT


def test_text_says_file_line_column(tmp_path: Path) -> None:
    result = run("check", write(tmp_path, TYPO))
    assert result.exit_code == 1
    assert f"{tmp_path}/{WDL}:3:17: error: job has no 'auidd'; did you mean auid" in result.stdout


def test_json_is_a_list_of_findings(tmp_path: Path) -> None:
    result = run("check", write(tmp_path, TYPO), "--format", "json", "--to", "wdl")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found[0]["line"] == 3
    assert set(found[0]) == {"level", "rule", "file", "line", "column", "message"}


SARIF = {  # the parts of the SARIF 2.1.0 schema that readers rest on
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array", "minItems": 1,
            "items": {
                "type": "object", "required": ["tool", "results"],
                "properties": {
                    "tool": {"type": "object", "properties": {"driver": {"required": ["name", "version", "rules"]}}},
                    "results": {
                        "type": "array", "minItems": 1,
                        "items": {
                            "type": "object", "required": ["ruleId", "level", "message", "locations"],
                            "properties": {"level": {"enum": ["error", "warning", "note", "none"]}},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def test_sarif_for_code_hosts(tmp_path: Path) -> None:
    result = run("check", write(tmp_path, TYPO), "--format", "sarif", "--to", "wdl")
    data = json.loads(result.stdout)
    jsonschema.validate(data, SARIF)
    place = data["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert place["region"] == {"startLine": 3, "startColumn": 17}
    assert place["artifactLocation"]["uri"].endswith(WDL)


def test_status_2_where_nothing_can_be_checked(tmp_path: Path) -> None:
    assert run("check", tmp_path / "nowhere").exit_code == 2
    assert run("check", tmp_path, "--set", "PORT=x").exit_code == 2
    write(tmp_path, {"requests/a.json": '{"jid": 1}'})
    result = run("check", tmp_path)
    assert result.exit_code == 2
    assert "a.json" in result.output


@pytest.mark.slow
def test_several_overlays_and_their_settings(tmp_path: Path) -> None:
    body = block("directives", "{{ super() }}\n#SBATCH --account={{ settings.slurm_account|sbatch }}\n")
    place = write(tmp_path / "a", {SLURM: extending(SLURM, body)})
    other = write(tmp_path / "b", TYPO)
    assert "NoneType is not text" in run("check", place).stdout
    write(place, {"settings.env": "SLURM_ACCOUNT=lab\n"})
    result = run("check", place, other)
    assert result.exit_code == 1
    assert result.stdout.count("error:") == 1


def test_requests_of_ones_own(tmp_path: Path) -> None:
    refusing = '{% if job.cpu_cores < 100 %}{{ refuse("too small") }}{% endif %}\n'
    place = write(tmp_path / "overlay", only(WDL, "prologue", refusing))
    assert run("check", place).exit_code == 1
    own = write(tmp_path / "own", {"big.json": json.dumps({**render.SAMPLE, "cpu_limit": 200_000})})
    assert run("check", place, "--requests", own).exit_code == 0
    with pytest.raises(BadRequest):
        corpus.own_cases(write(tmp_path / "bad", {"x.json": "{"}))


@pytest.mark.slow
def test_attributes_that_cromwell_does_not_declare(tmp_path: Path) -> None:
    conf = ROOT / "deploy" / "cromwell" / "slurm.conf"
    place = write(tmp_path, only(WDL, "site_attributes", '    scratch: "10 GB"\n'))
    assert run("check", place).exit_code == 0
    result = run("check", place, "--cromwell-conf", conf)
    assert result.exit_code == 1
    assert f"{place}/{WDL}:3: error: Cromwell ignores the runtime attribute scratch" in result.stdout
    assert run("check", "--cromwell-conf", conf, "--to", "wdl").exit_code == 0


@pytest.mark.slow
def test_an_older_kubernetes_can_be_asked() -> None:
    assert run("check", "--to", "k8s", "--kubernetes-version", "1.27").exit_code == 0
    assert run("check", "--to", "k8s", "--kubernetes-version", "9.99").exit_code == 1
