"""`pman check` and `pman templates`: broken overlays, each named by file, line and cause; good ones are silent."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from pman import app, cli, overlay, settings, site
from pman.errors import BadRequest, TemplateError
from tests.rig import ROOT, wait_for

WDL, K8S, SWARM = "wdl/job.wdl.j2", "k8s/job.yaml.j2", "swarm/service.yaml.j2"
LOCAL, SLURM, DOCKER = "local/job.sh.j2", "slurm/job.sh.j2", "docker/container.yaml.j2"


def extending(name: str, *blocks: str) -> str:
    return f'{{% extends "shipped/{name}" %}}\n' + "".join(blocks)


def block(name: str, text: str) -> str:
    return f"{{% block {name} %}}\n{text}{{% endblock %}}\n"


def shipped(name: str, old: str, new: str) -> str:
    """A whole copy of the shipped template with one change."""
    text = (ROOT / "templates" / name).read_text()
    assert old in text, f"{name} no longer holds {old!r}"
    return text.replace(old, new, 1)


def line_of(name: str, text: str) -> int:
    """Where the shipped template holds `text`."""
    lines = (ROOT / "templates" / name).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@dataclass(frozen=True)
class Broken:
    """An overlay (path -> text) and the finding that it must bring: file, line and what is said."""

    name: str
    files: dict[str, str]
    file: str
    line: int
    said: str
    rule: str
    column: int = 0


FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}\n"
LOOP = "{% for name, value in job.env %}\n      - {{ name ~ '=' ~ value }}\n{% endfor %}\n"
TABLE = [
    Broken(
        "typo in a variable",
        {WDL: extending(WDL, block("site_attributes", "    who: {{ job.auidd }}\n"))},
        WDL, 3, "job has no 'auidd'; did you mean auid", "undefined", 17,
    ),
    Broken(
        "typo in a branch that no request takes",
        {WDL: extending(WDL, block("limits", '{% if job.kind == "z" %}\n    a: {{ jb.cpu }}\n{% endif %}\n'))},
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
        {WDL: extending(WDL, block("site_attributes", "    a: {{ settings.secret_key }}\n"))},
        WDL, 3, "settings has no 'secret_key'", "undefined", 20,
    ),
    Broken(
        "missing endblock",
        {WDL: extending(WDL, "{% block limits %}\n    timelimit: 5\n")},
        WDL, 3, "'endblock'", "template",
    ),
    Broken(
        "unknown filter",
        {WDL: extending(WDL, block("prologue", "echo {{ job.jid|shell }}\n"))},
        WDL, 3, "No filter named 'shell'", "template",
    ),
    Broken(
        "unquoted insertion",
        {WDL: extending(WDL, block("prologue", "echo {{ job.jid|safe }}\n"))},
        WDL, 3, "|safe puts a value in unquoted", "marked-safe", 17,
    ),
    Broken(
        "quoting turned off",
        {LOCAL: extending(LOCAL, block("prologue", "{% autoescape false %}echo {{ job.jid }}{% endautoescape %}\n"))},
        LOCAL, 3, "quoting cannot be turned off", "marked-safe", 4,
    ),
    Broken(
        "quotes around a value",
        {LOCAL: extending(LOCAL, block("prologue", 'export JOB="{{ job.jid }}"\n'))},
        LOCAL, 3, "quotes stand around {{ }}", "quoted-twice",
    ),
    Broken(
        "quoted value joined to text",
        {LOCAL: extending(LOCAL, block("prologue", "echo {{ 'id=<' ~ (job.jid|sh) }}\n"))},
        LOCAL, 3, "a quoted value cannot be joined", "template",
    ),
    Broken(
        "WDL string in the shell's text",
        {WDL: extending(WDL, block("prologue", "module load {{ site.module }}\n")), "site.yaml": "module: fsl\n"},
        WDL, 3, "write |sh", "wrong-quoting",
    ),
    Broken(
        "YAML indentation slip",
        {K8S: extending(K8S, block("pod_spec_extra", "       priorityClassName: low\n"))},
        K8S, 3, "this is no YAML", "invalid",
    ),
    Broken(
        "YAML under the wrong parent",
        {K8S: extending(K8S, block("pod_spec_extra", "  priorityClassName: low\n"))},
        K8S, 3, "this is no YAML", "invalid",
    ),
    Broken(
        "unknown Kubernetes field",
        {K8S: extending(K8S, block("pod_spec_extra", "      priorityClas: low\n"))},
        K8S, 3, "'priorityClas' was unexpected", "invalid",
    ),
    Broken(
        "wrong type for Kubernetes",
        {K8S: extending(K8S, block("pod_spec_extra", "      terminationGracePeriodSeconds: soon\n"))},
        K8S, 3, "terminationGracePeriodSeconds", "invalid",
    ),
    Broken(
        "key given twice",
        {K8S: extending(K8S, block("pod_spec_extra", "      restartPolicy: Always\n"))},
        K8S, 3, "given twice", "invalid",
    ),
    Broken(
        "unknown Swarm field",
        {SWARM: extending(SWARM, block("container_extra", "    Priviliged: true\n"))},
        SWARM, 3, "'Priviliged' was unexpected", "invalid",
    ),
    Broken(
        "unknown Docker field",
        {DOCKER: extending(DOCKER, block("host_extra", "  ReadOnlyRootfs: true\n"))},
        DOCKER, 3, "'ReadOnlyRootfs' was unexpected", "invalid",
    ),
    Broken(
        "runtime attribute without colon",
        {WDL: extending(WDL, block("site_attributes", '    account "lab"\n'))},
        WDL, 3, "Unexpected", "invalid",
    ),
    Broken(
        "runtime attribute without closing quote",
        {WDL: extending(WDL, block("site_attributes", '    account: "lab\n'))},
        WDL, 3, "", "invalid",
    ),
    Broken(
        "placeholder of WDL in the command",
        {WDL: extending(WDL, block("prologue", "cd ~{scratch}\n"))},
        WDL, 3, "Unknown identifier scratch", "invalid",
    ),
    Broken(
        "unclosed heredoc",
        {WDL: extending(WDL, block("prologue", "cat > note <<END\nhello\n"))},
        WDL, 3, "here-document", "invalid",
    ),
    Broken(
        "shell syntax error",
        {SLURM: extending(SLURM, block("prologue", "if module load fsl; do\n"))},
        SLURM, 3, "bash: syntax error", "invalid",
    ),
    Broken(
        "shell mistake that only shellcheck sees",
        {LOCAL: extending(LOCAL, block("prologue", 'for f in "$(ls /scratch)"; do echo "$f"; done\n'))},
        LOCAL, 3, "shellcheck SC2066", "invalid",
    ),
    Broken(
        "block renamed",
        {WDL: extending(WDL, block("limit", "    timelimit: 5\n"))},
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
        "wdl/job.wdl", 0, "templates end in .j2", "unused-file",
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
        {WDL: extending(WDL, block("limits", "    slurm_partition: {{ job.partition }}\n"))},
        WDL, 3, "NoneType is not text", "template",
    ),
    Broken(
        "arguments dropped",
        {WDL: extending(WDL, block("command", "exec {{ job.argv[0]|sh }}\n"))},
        WDL, 2, "only 0 of the", "changed",
    ),
    Broken(
        "arguments split by the shell",
        {LOCAL: extending(LOCAL, block("command", "  set -- $* {{ job.argv|join(' ') }}\n"))},
        LOCAL, 2, "", "changed",
    ),
    Broken(
        "arguments not kept from Kubernetes",
        {K8S: shipped(K8S, "- {{ arg|k8s }}", "- {{ arg }}")},
        K8S, line_of(K8S, "in job.argv[1:]"), "instead of", "changed",
    ),
    Broken(
        "environment not kept from Swarm",
        {SWARM: extending(SWARM, block("environment", LOOP))},
        SWARM, 2, "instead of", "changed",
    ),
    Broken(
        "environment forgotten",
        {K8S: extending(K8S, block("environment", "          env: []\n"))},
        K8S, 2, "the job's variable GREETING is not set", "changed",
    ),
    Broken(
        "input and output swapped for Cromwell",
        {
            WDL: extending(
                WDL,
                block("directories", "    incoming: {{ storage.outgoing.source }}\n    outgoing: {{ job.jid }}\n"),
            )
        },
        WDL, 3, "/share/incoming is ", "changed",
    ),
    Broken(
        "input and output swapped for a shell",
        {LOCAL: extending(LOCAL, block("environment", 'swap=$incoming incoming=$outgoing\noutgoing=$swap\n'))},
        LOCAL, 0, "/share/incoming is ", "changed",
    ),
    Broken(
        "every request refused",
        {WDL: extending(WDL, block("prologue", '{{ refuse("closed") }}\n'))},
        WDL, 1, "every request of the corpus is refused", "all-refused",
    ),
    Broken(
        "a loop without end",
        {WDL: extending(WDL, block("prologue", FOREVER))},
        WDL, 3, "it may loop for ever", "template",
    ),
]  # fmt: skip


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("broken", TABLE, ids=[broken.name for broken in TABLE])
def test_what_is_broken_is_named(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pman.sandbox.MAX_RENDER_SECONDS", 0.5)
    found = site.SiteCheck(write(tmp_path, broken.files)).findings()
    told = "\n".join(map(str, found))
    matching = [
        f for f in found
        if f.rule == broken.rule and f.file == str(tmp_path / broken.file) and broken.said in f.message
    ]  # fmt: skip
    if broken.line == 0 and not matching:
        matching = [f for f in found if f.rule == broken.rule and broken.said in f.message]
    assert matching, told
    if broken.line:
        assert broken.line in [f.line for f in matching], told
    assert not broken.column or broken.column in [f.column for f in matching], told


def test_there_are_at_least_25_broken_overlays() -> None:
    assert len({broken.name for broken in TABLE}) == len(TABLE) >= 25


def test_shipped_templates_are_good() -> None:
    result = run("check")
    assert (result.exit_code, result.stdout) == (0, ""), result.output


def test_the_service_warns_at_start_and_refuses_what_cannot_render(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    place = write(tmp_path / "a", {LOCAL: extending(LOCAL, block("prologe", "x\n"))})
    app.create_app(settings.load({**base, "TEMPLATES_DIR": str(place)}))
    assert f"{place}/{LOCAL}:2:10: error: the block prologe overrides nothing" in caplog.text
    place = write(tmp_path / "b", {LOCAL: extending(LOCAL, block("prologue", "{{ jobs }}\n"))})
    with pytest.raises(TemplateError, match=r"local/job\.sh\.j2:3: 'jobs' is undefined"):
        app.create_app(settings.load({**base, "TEMPLATES_DIR": str(place)}))


# -- the command ---------------------------------------------------------------------------------------------------

TYPO = {WDL: extending(WDL, block("site_attributes", "    who: {{ job.auidd }}\n"))}


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
    place = write(tmp_path / "overlay", {WDL: extending(WDL, block("prologue", refusing))})
    assert run("check", place).exit_code == 1
    own = write(tmp_path / "own", {"big.json": json.dumps({**site.PLAIN, "cpu_limit": 200_000})})
    assert run("check", place, "--requests", own).exit_code == 0
    with pytest.raises(BadRequest):
        site.own_corpus(write(tmp_path / "bad", {"x.json": "{"}))


def test_attributes_that_cromwell_does_not_declare(tmp_path: Path) -> None:
    conf = ROOT / "deploy" / "cromwell" / "slurm.conf"
    place = write(tmp_path, {WDL: extending(WDL, block("site_attributes", '    scratch: "10 GB"\n'))})
    assert run("check", place).exit_code == 0
    result = run("check", place, "--cromwell-conf", conf)
    assert result.exit_code == 1
    assert f"{place}/{WDL}:3: error: Cromwell ignores the runtime attribute scratch" in result.stdout
    assert {"cpu", "memory", "timelimit", "incoming", "outgoing", "image"} <= site.declared_attributes(conf)
    assert run("check", "--cromwell-conf", conf, "--to", "wdl").exit_code == 0


def test_an_older_kubernetes_can_be_asked() -> None:
    assert run("check", "--to", "k8s", "--kubernetes-version", "1.27").exit_code == 0
    assert run("check", "--to", "k8s", "--kubernetes-version", "9.99").exit_code == 1


# -- pman templates ------------------------------------------------------------------------------------------------


def test_list_names_blocks_and_what_the_site_shadows(tmp_path: Path) -> None:
    plain = run("templates", "list").stdout
    for name in (WDL, K8S, SWARM, DOCKER, LOCAL, SLURM):
        assert f"{name}  (shipped" in plain
    changed = run("templates", "list", "--templates", write(tmp_path, TYPO)).stdout
    assert f"{WDL}  (site, shadows the shipped one, extends shipped/{WDL})" in changed
    assert "  site_attributes  (site)\n" in changed
    assert "  limits\n" in changed


def test_show_prints_what_is_used(tmp_path: Path) -> None:
    write(tmp_path, TYPO)
    assert run("templates", "show", WDL, "--templates", tmp_path).stdout == TYPO[WDL]
    whole = (ROOT / "templates" / WDL).read_text()
    assert run("templates", "show", f"shipped/{WDL}", "--templates", tmp_path).stdout == whole
    unknown = run("templates", "show", "wdl/jobb.wdl.j2")
    assert unknown.exit_code == 2
    assert "did you mean wdl/job.wdl.j2" in unknown.output


def test_diff_shows_blocks_and_whole_templates(tmp_path: Path) -> None:
    write(tmp_path, {**TYPO, K8S: shipped(K8S, "backoffLimit: 0", "backoffLimit: 1")})
    shown = run("templates", "diff", "--templates", tmp_path).stdout
    assert "+    who: {{ job.auidd }}" in shown
    assert "-  backoffLimit: 0\n+  backoffLimit: 1" in shown


@pytest.mark.parametrize("target", ["wdl", "k8s", "swarm", "docker", "slurm", "local"])
def test_new_overlays_are_good_and_change_nothing_yet(tmp_path: Path, target: str) -> None:
    place = tmp_path / "overlay"
    assert run("templates", "new", place, "--for", target).exit_code == 0
    assert (place / "site.yaml").is_file()
    result = run("check", place)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert run("templates", "new", place, "--for", target).exit_code == 2
    request = json.dumps(dict(site.PLAIN))
    arguments = ["render", "--to", target, "--set", "STOREBASE=/s"]
    plain = CliRunner().invoke(cli.main, arguments, input=request)
    same = CliRunner().invoke(cli.main, [*arguments, "--templates", str(place)], input=request)
    assert [line for line in same.stdout.splitlines() if line] == [line for line in plain.stdout.splitlines() if line]


def test_vars_come_from_the_models(tmp_path: Path) -> None:
    shown = run("templates", "vars", "wdl", "--templates", write(tmp_path, {"site.yaml": "account: lab\n"})).stdout
    for name in ("job.memory_mib ", "job.cpu_cores ", "storage.incoming.source ", "storage.shared ", "site.account "):
        assert f"\n{name}" in f"\n{shown}"
    names = {line.split()[0] for line in shown.splitlines() if line.startswith("settings.")}
    public = set(settings.Settings.model_fields) - {"secret_key", "cromwell_auth_password", "cromwell_service_account"}
    assert names == {f"settings.{name}" for name in public}
    rows = [line for line in shown.splitlines() if line.startswith(("job.", "storage."))]
    assert all(len(row.split(maxsplit=2)) == 3 for row in rows)


def test_upgrade_check_names_what_changed_beneath_an_override(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write(old, {name: (ROOT / "templates" / name).read_text() for name in (WDL, K8S)})
    place = write(
        tmp_path / "overlay",
        {WDL: extending(WDL, block("limits", "    timelimit: 7\n")), K8S: (ROOT / "templates" / K8S).read_text()},
    )
    same = run("templates", "upgrade-check", old, "--templates", place)
    assert (same.exit_code, same.stdout) == (0, "")
    (old / WDL).write_text(shipped(WDL, "    cpu: ", "    cores: "))
    assert run("templates", "upgrade-check", old, "--templates", place).exit_code == 0
    (old / WDL).write_text(shipped(WDL, "    timelimit: ", "    time: "))
    changed = run("templates", "upgrade-check", old, "--templates", place)
    assert changed.exit_code == 1
    assert f"{place}/{WDL} block limits replaces what has changed" in changed.stdout
    assert "-    time: " in changed.stdout
    (old / K8S).write_text("other")
    assert f"{place}/{K8S} replaces" in run("templates", "upgrade-check", old, "--templates", place).stdout


def test_blocks_are_read_whole() -> None:
    source = "{% block a %}\n1\n{% block b %}2{% endblock %}\n{% endblock %}\n{% block c %}{% endblock %}\n"
    template = overlay.Template("x", "x", source, None, {"a": 1, "b": 3, "c": 5}, None, ())  # type: ignore[arg-type]
    assert overlay.blocks_of(template)["a"].count("\n") == 3
    assert overlay.blocks_of(template)["b"] == "{% block b %}2{% endblock %}"


# -- the author's loop ---------------------------------------------------------------------------------------------


def test_watch_renders_again_on_every_save(tmp_path: Path) -> None:
    place = write(
        tmp_path / "overlay", {WDL: extending(WDL, block("site_attributes", "    a: 1\n")), "site.yaml": "x: 1\n"}
    )
    request = write(tmp_path, {"request.json": json.dumps(dict(site.PLAIN))}) / "request.json"
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pman", "render", request, "--to", "wdl", "--watch", "--templates", place]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*map(str, command), "--set", "STOREBASE=/store"], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    try:

        def said(text: str) -> None:
            wait_for(lambda: text in log.read_text(), 60, f"{text!r} after {log.read_text()[-500:]!r}")

        said("good\n")
        (place / WDL).write_text(extending(WDL, block("site_attributes", "    b: {{ site.x }}\n")))
        said("-    a: 1\n+    b: 1\n")
        (place / "site.yaml").write_text("x: 77\n")
        said("-    b: 1\n+    b: 77\n")
        request.write_text(json.dumps({**site.PLAIN, "gpu_limit": 3}))
        said("+    gpu_limit: 3\n")
        (place / WDL).write_text(extending(WDL, block("site_attributes", "    b: {{ sitee.x }}\n")))
        said(f"{WDL}:3: 'sitee' is undefined; did you mean site")
        (place / WDL).write_text(extending(WDL, block("site_attributes", "    b 1\n")))
        said("Unexpected")
        request.write_text("{")
        said("request.json: ")
    finally:
        process.kill()
        process.wait()
