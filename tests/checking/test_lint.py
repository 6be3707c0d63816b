"""What is wrong in a site's templates and can be seen without rendering them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pman import checking, settings
from pman.checking import overlay
from pman.targets import TARGETS
from pman.templating import render
from tests.checking.overlays import (
    FOREVER,
    K8S,
    LOCAL,
    SLURM,
    WDL,
    Broken,
    block,
    extending,
    is_named,
    only,
    run,
    write,
)
from tests.rig import ROOT

BROKEN = [
    Broken(
        "typo in a variable",
        only(WDL, "site_attributes", "    who: {{ job.auidd }}\n"),
        WDL, 3, "job has no 'auidd'; did you mean auid", "undefined", 17,
    ),
    Broken(
        "typo in a branch that no request takes",
        only(WDL, "limits", '{% if job.kind == "z" %}\n    a: {{ jb.cpu }}\n{% endif %}\n'),
        WDL, 4, "'jb' is undefined; did you mean job", "undefined", 11,
    ),
    Broken(
        "name that site.yaml does not hold",
        {WDL: extending(WDL, block("limits", "    account: {{ site.acount }}\n")), "site.yaml": "account: lab\n"},
        WDL, 3, "site has no 'acount'; did you mean account", "undefined", 22,
    ),
    Broken(
        "name below a mapping of site.yaml",
        {WDL: extending(WDL, block("limits", "    a: {{ site.slurm.qos }}\n")), "site.yaml": "slurm: {qoss: x}\n"},
        WDL, 3, "site.slurm has no 'qos'; did you mean qoss", "undefined", 22,
    ),
    Broken(
        "secret",
        only(WDL, "site_attributes", "    a: {{ settings.secret_key }}\n"),
        WDL, 3, "settings has no 'secret_key'", "undefined", 20,
    ),
    Broken(
        "missing endblock",
        {WDL: extending(WDL, "{% block limits %}\n    timelimit: 5\n")},
        WDL, 3, "'endblock'", "template",
    ),
    Broken(
        "unknown filter",
        only(WDL, "prologue", "echo {{ job.jid|shell }}\n"),
        WDL, 3, "No filter named 'shell'", "template",
    ),
    Broken(
        "quoted value joined to text",
        only(LOCAL, "prologue", "echo {{ 'id=<' ~ (job.jid|sh) }}\n"),
        LOCAL, 3, "a quoted value cannot be joined", "template",
    ),
    Broken(
        "block renamed",
        only(WDL, "limit", "    timelimit: 5\n"),
        WDL, 2, "the block limit overrides nothing in shipped/wdl/job.wdl.j2; did you mean limits", "unknown-block", 10,
    ),
    Broken(
        "text outside all blocks",
        {WDL: extending(WDL, "\n\n    account: lab\n")},
        WDL, 4, "never rendered", "outside-blocks",
    ),
    Broken(
        "file that nothing reads",
        {"wdl/jobs.wdl.j2": extending(WDL)},
        "wdl/jobs.wdl.j2", 1, "nothing reads this template; did you mean wdl/job.wdl.j2", "unused-file",
    ),
    Broken(
        "template without its suffix",
        {"wdl/job.wdl": extending(WDL)},
        "wdl/job.wdl", 1, "templates end in .j2; did you mean wdl/job.wdl.j2?", "unused-file",
    ),
    Broken(
        "site.yaml with another suffix",
        {"site.yml": "account: lab\n"},
        "site.yml", 1, "nothing reads this file: templates end in .j2; did you mean site.yaml?", "unused-file",
    ),
    Broken(
        "parent that does not exist",
        {WDL: '{% extends "shipped/wdl/jobs.wdl.j2" %}\n'},
        WDL, 1, "there is no template shipped/wdl/jobs.wdl.j2", "template",
    ),
    Broken(
        "site.yaml with a key given twice",
        {"site.yaml": "a: 1\nb: 2\na: 3\n"},
        "site.yaml", 3, "the key 'a' is given twice", "site.yaml",
    ),
    Broken(
        "site.yaml that is a list",
        {"site.yaml": "- a\n"},
        "site.yaml", 1, "must be a mapping", "site.yaml",
    ),
    Broken(
        "wrong type in site.yaml",
        {WDL: extending(WDL, block("limits", "    timelimit: {{ site.limit + 5 }}\n")), "site.yaml": "limit: long\n"},
        WDL, 3, "can only concatenate str", "template",
    ),
    Broken(
        "value that is not always there",
        only(WDL, "limits", "    slurm_partition: {{ job.partition }}\n"),
        WDL, 3, "NoneType is not text", "template",
    ),
    Broken(
        "another language's filter",
        only(SLURM, "prologue", "logger {{ job.auid|yaml }}\n"),
        SLURM, 3, "|yaml writes another language", "template",
    ),
    Broken(
        "template of another language",
        {
            K8S: extending(K8S, block("pod_spec_extra", '{% include "sh/x.sh.j2" %}\n')),
            "sh/x.sh.j2": "{# nothing #}",
        },
        K8S, 3, "whose quoting it gets", "wrong-language",
    ),
    Broken(
        "block in an if",
        {SLURM: extending(SLURM, "{% if job.gpu_count %}\n", block("directives", "{{ super() }}\n"), "{% endif %}\n")},
        SLURM, 3, "the block directives counts always", "outside-blocks", 10,
    ),
    Broken(
        "policy set in a loop",
        {
            SLURM: extending(
                SLURM,
                "{% for r in site.rules %}\n{% if job.image == r %}\n",
                "{% set partition = r %}\n{% endif %}\n{% endfor %}\n",
            ),
            "site.yaml": "rules: [a]\n",
        },
        SLURM, 4, "partition is forgotten at the end of this for", "unused-set", 8,
    ),
    Broken(
        "policy set in a block",
        only(SLURM, "directives", "{% set partition = 'big' %}\n{{ super() }}\n"),
        SLURM, 3, "partition is forgotten at the end of this block", "unused-set", 8,
    ),
    Broken(
        "misspelt policy in an if",
        {SLURM: extending(SLURM, "{% if job.gpu_count %}\n{% set partiton = 'gpu' %}\n{% endif %}\n")},
        SLURM, 3, "nothing reads partiton here; did you mean partition", "unused-set", 8,
    ),
    Broken(
        "policy that the target does not have",
        {K8S: extending(K8S, "{% set partition = 'gpu' %}\n")},
        K8S, 2, "nothing reads partition here", "unused-set", 8,
    ),
    Broken(
        "text where site.yaml should hold a list",
        {
            WDL: extending(WDL, block("prologue", "{% for m in site.modules %}{{ m|sh }}{% endfor %}\n")),
            "site.yaml": "modules: fsl\n",
        },
        WDL, 3, "a list is needed here, not the text 'fsl'", "template",
    ),
    Broken(
        "time limit that is text",
        {WDL: extending(WDL, "{% set time_limit_minutes = site.minutes %}\n"), "site.yaml": 'minutes: "60"\n'},
        WDL, 2, "time_limit_minutes must be a whole number of minutes above 0 or none, not '60'", "template",
    ),
    Broken(
        "image as the text of a set block",
        {K8S: extending(K8S, "{% set image %}mirror/{{ job.image }}{% endset %}\n")},
        K8S, 2, "write {% set image = ... %}", "template",
    ),
    Broken(
        "shipped lines for sbatch lost",
        only(SLURM, "directives", "#SBATCH --account=lab\n"),
        SLURM, 2, "the shipped lines of the block directives are gone", "no-super", 10,
    ),
    Broken(
        "number of the worker lost",
        only(WDL, "environment", "export TZ=UTC\n"),
        WDL, 2, "the shipped lines of the block environment are gone", "no-super", 10,
    ),
    Broken(
        "environment of Kubernetes lost",
        only(K8S, "environment", "            - name: TZ\n              value: UTC\n"),
        K8S, 2, "the shipped lines of the block environment are gone", "no-super", 10,
    ),
    Broken(
        "include that does not exist, in a branch that no request takes",
        only(LOCAL, "prologue", '\n{% if job.kind == "z" %}{% include "sh/a.sh.j2" %}{% endif %}\n'),
        LOCAL, 4, "there is no template sh/a.sh.j2", "template",
    ),
    Broken(
        "template that extends itself",
        {SLURM: f'{{% extends "{SLURM}" %}}\n'},
        SLURM, 1, f"this extends itself: write shipped/{SLURM}", "template",
    ),
    Broken(
        "template without a language",
        {SLURM: extending(SLURM, '{% from "lib/m.j2" import a %}\n'), "lib/m.j2": "{% macro a() %}{% endmacro %}\n"},
        "lib/m.j2", 1, "a template's name ends in one of", "template",
    ),
    Broken(
        "loop variable misspelt, over a list that is empty",
        {
            SLURM: extending(SLURM, block("prologue", "{% for n in site.modules %}\nload {{ name }}\n{% endfor %}\n")),
            "site.yaml": "modules: []\n",
        },
        SLURM, 4, "'name' is undefined", "undefined", 9,
    ),
    Broken(
        "member misspelt in brackets",
        only(WDL, "limits", '{% if job.kind == "z" %}\n    a: {{ job["imagee"] }}\n{% endif %}\n'),
        WDL, 4, "job has no 'imagee'; did you mean image", "undefined", 16,
    ),
    Broken(
        "method of text misspelt",
        only(WDL, "limits", '{% if job.kind == "z" and job.image.startwith("a") %}\n{% endif %}\n'),
        WDL, 3, "job.image has no 'startwith'; did you mean startswith", "undefined", 37,
    ),
    Broken(
        "template where pman's own are named",
        {"shipped/" + SLURM: extending("sh/job.sh.j2"), SLURM: extending(SLURM)},
        "shipped/" + SLURM, 1, "nothing reads this template", "unused-file",
    ),
    Broken(
        "line that goes on after its block",
        only(SLURM, "directives", "{{ super() }}\n#SBATCH --mem={{ job.memory_mib }}"),
        SLURM, 2, "the last line of the block directives has no end", "unended-line", 10,
    ),
    Broken(
        "line that goes on after its block, in a branch",
        only(WDL, "prologue", "{% if job.env %}\ntrue\n{% else %}module load x{% endif %}\n"),
        WDL, 2, "the last line of the block prologue has no end", "unended-line", 10,
    ),
    Broken(
        "name looked for in a text",
        {
            SLURM: extending(SLURM, "{% set partition = 'all' if job.auid in site.admins else none %}\n"),
            "site.yaml": "admins: alice\n",
        },
        SLURM, 2, "site.admins is text, any part of which is in it", "text-for-list",
    ),
    Broken(
        "extends forgotten",
        {K8S: block("tolerations", "      tolerations: []\n")},
        K8S, 1, f'this lacks its first line: {{% extends "shipped/{K8S}" %}}', "no-extends",
    ),
    Broken(
        "a loop without end",
        only(WDL, "prologue", FOREVER),
        WDL, 3, "it may loop for ever", "template",
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=[broken.name for broken in BROKEN])
def test_what_is_broken_is_named(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_named(broken, tmp_path, monkeypatch)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**only(SLURM, "prologue", "true\n"), "site.yaml": "\ufeffa: 1\n", "settings.env": "\ufeffSTOREBASE=/x\n"},
    )
    (tmp_path / SLURM).write_text("\ufeff" + (tmp_path / SLURM).read_text())
    assert checking.SiteCheck(tmp_path).findings() == []
    assert render.Renderer(settings.load({"TEMPLATES_DIR": str(tmp_path)}), TARGETS).site == {"a": 1}


def test_what_the_user_may_not_read_counts_as_unreadable(tmp_path: Path) -> None:
    """Root reads everything, unless it gives up the capability."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm").chmod(0)
    drop = (
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--"]
        if os.geteuid() == 0
        else []
    )
    for command in (["check", str(tmp_path)], ["render", "-", "--to", "slurm", "--templates", str(tmp_path)]):
        ran = subprocess.run(
            [*drop, sys.executable, "-m", "pman", *command], capture_output=True, text=True, check=False
        )
        assert "slurm:1: " in ran.stdout + ran.stderr
        assert "this cannot be read: Permission denied" in ran.stdout + ran.stderr
        assert ran.returncode == (1 if command[0] == "check" else 2)


def test_nothing_is_checked_where_a_parser_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes_validate", None)
    result = run("check", "--to", "k8s")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "kubernetes_validate is needed to check this: pip install 'pman[check]'" in result.stderr


@pytest.mark.parametrize("command", [["diff"], ["upgrade-check", str(ROOT / "templates")]])
def test_commands_about_an_overlay_want_one(command: list[str]) -> None:
    result = run("templates", *command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Name the site's overlay" in result.stderr


def test_a_name_of_pmans_without_j2_is_an_error(tmp_path: Path) -> None:
    (finding,) = checking.SiteCheck(write(tmp_path, {K8S.removesuffix(".j2"): "a: 1\n"}), targets=["k8s"]).findings()
    assert (finding.level, finding.message) == (
        "error", "nothing reads this file: templates end in .j2; did you mean k8s/job.yaml.j2?",
    )  # fmt: skip


def test_a_mounted_configmap_is_read_through_its_links(tmp_path: Path) -> None:
    write(tmp_path / "..2024", only(SLURM, "prologe", "true\n"))
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "slurm").symlink_to("..data/slurm")
    assert [finding.rule for finding in checking.SiteCheck(tmp_path).findings()] == ["unknown-block"]


def test_a_template_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / SLURM).write_bytes(extending(SLURM).encode() + b"\n# caf\xe9\n")
    found = checking.SiteCheck(tmp_path).findings()
    assert [(finding.file, finding.line) for finding in found] == [(str(tmp_path / SLURM), 3)]


def test_blocks_are_read_whole() -> None:
    source = "{% block a %}\n1\n{% block b %}2{% endblock %}\n{% endblock %}\n{% block c %}{% endblock %}\n"
    assert list(overlay.blocks_of(source)) == ["a", "b", "c"]
    assert overlay.blocks_of(source)["a"].count("\n") == 3
    assert overlay.blocks_of(source)["b"] == "{% block b %}2{% endblock %}"


def test_a_block_may_begin_over_two_lines_or_stand_in_a_comment(tmp_path: Path) -> None:
    base = extending(LOCAL, "{%\n  block prologue %}\n{# {% block other %} #}\necho hi\n{% endblock %}\n")
    place = write(tmp_path, {"local/base.sh.j2": base, **only(LOCAL, "prologue", "{{ super() }}\n")})
    own = place / LOCAL
    own.write_text(own.read_text().replace(f"shipped/{LOCAL}", "local/base.sh.j2"))
    result = run("check", place)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
