"""`pman templates` and `pman render --watch`: what an author of templates works with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pman import cli, settings
from pman.targets import TARGETS
from pman.templating import render
from tests.checking.overlays import (
    DOCKER,
    K8S,
    LOCAL,
    SLURM,
    SWARM,
    TYPO,
    WDL,
    block,
    extending,
    run,
    shipped,
    write,
)
from tests.rig import ROOT, wait_for


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


def test_diff_shows_what_stands_outside_of_blocks(tmp_path: Path) -> None:
    body = extending(SLURM, "{# a\nnote #}\n{% set partition = 'x' %}\n", block("prologue", "true\n"))
    shown = run("templates", "diff", "--templates", write(tmp_path, {SLURM: body})).stdout
    assert f"+++ {tmp_path}/{SLURM} outside of blocks\n@@ -0,0 +1 @@\n+{{% set partition = 'x' %}}\n---" in shown


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_new_overlays_are_good_and_change_nothing_yet(tmp_path: Path, target: str) -> None:
    place = tmp_path / "overlay"
    done = run("templates", "new", place, "--for", target)
    assert done.exit_code == 0
    assert (place / "site.yaml").is_file()
    policy = ["image", "partition", "time_limit_minutes"]
    if target in ("k8s", "swarm", "docker"):
        policy.remove("partition")
    assert f"{{% set ... %}}: {', '.join(policy)}\n" in Path(done.stdout.split()[0]).read_text()
    result = run("check", place)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert run("templates", "new", place, "--for", target).exit_code == 2
    request = json.dumps(dict(render.SAMPLE))
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
    filters = {line.split()[0] for line in shown.partition("Filters that quote")[2].splitlines()[1:]}
    assert filters == {"wdl", "sh"}
    rows = [line for line in shown.splitlines() if line.startswith(("job.", "storage."))]
    assert all(len(row.split(maxsplit=2)) == 3 for row in rows)


def test_vars_name_what_may_be_set_for_a_target() -> None:
    def settable(target: str) -> set[str]:
        return {
            line.split()[0] for line in run("templates", "vars", target).stdout.splitlines() if "may be set" in line
        }

    assert settable("slurm") == settable("wdl") == {"image", "partition", "time_limit_minutes"}
    assert settable("k8s") == settable("swarm") == settable("docker") == {"image", "time_limit_minutes"}


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
    (old / K8S).unlink()
    lacking = run("templates", "upgrade-check", old, "--templates", place)
    assert (lacking.exit_code, lacking.stdout) == (2, "")
    assert f"{old} holds no {K8S}" in lacking.output


@pytest.mark.slow
def test_watch_renders_again_on_every_save(tmp_path: Path) -> None:
    place = write(
        tmp_path / "overlay", {WDL: extending(WDL, block("site_attributes", "    a: 1\n")), "site.yaml": "x: 1\n"}
    )
    request = write(tmp_path, {"request.json": json.dumps(dict(render.SAMPLE))}) / "request.json"
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
        request.write_text(json.dumps({**render.SAMPLE, "gpu_limit": 3}))
        said("+    gpu_limit: 3\n")
        (place / WDL).write_text(extending(WDL, block("site_attributes", "    b: {{ sitee.x }}\n")))
        said(f"{WDL}:3: 'sitee' is undefined; did you mean site")
        (place / WDL).write_text(extending(WDL, block("site_attributes", "    b 1\n")))
        said("Unexpected")
        (place / WDL).write_text(extending(WDL, block("site_attribute", "")))
        said("the block site_attribute overrides nothing")
        (place / WDL).write_text(extending(WDL, block("command", "exec true\n")))
        said("the command line of the job is never run")
        request.write_text("{")
        said("request.json: ")
    finally:
        process.kill()
        process.wait()
