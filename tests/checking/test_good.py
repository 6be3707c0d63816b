"""Overlays with nothing wrong in them: `pman check` is silent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pman import checking
from tests.checking.overlays import (
    DOCKER,
    INIT,
    K8S,
    LOCAL,
    SLURM,
    WDL,
    block,
    extending,
    only,
    run,
    write,
)
from tests.rig import ROOT

MACROS = {"lib/m.sh.j2": "{% macro load(name) %}\nmodule load {{ name }}\n{% endmacro %}\n"}
GUARD = "command -v apptainer >/dev/null || { echo 'no apptainer' >&2; exit 126; }\n"
GOOD: dict[str, dict[str, str]] = {
    "macro imported": {
        **MACROS,
        SLURM: extending(
            SLURM,
            '{% from "lib/m.sh.j2" import load %}\n',
            block("prologue", "{{ load('cuda') }}\n{{ load(job.auid) }}\n"),
        ),
    },
    "library imported": {
        **MACROS,
        SLURM: extending(SLURM, '{% import "lib/m.sh.j2" as lib %}\n', block("prologue", "{{ lib.load('cuda') }}\n")),
    },
    "macro of shell text in WDL": {
        WDL: extending(
            WDL,
            "{% macro load(m) %}module load {{ m|sh }}{% endmacro %}\n",
            block("prologue", "{{ load(job.auid) }}\n"),
        )
    },
    "refusing before the blocks": {
        SLURM: extending(SLURM, "{% set _ = refuse('too many') if job.gpu_count > 99 else none %}\n")
    },
    "one word in three parts": only(
        SLURM, "prologue", 'cp "$incoming/"{{ job.auid }}"$outgoing" "$(basename {{ job.auid }})"\n'
    ),
    "numbers in quotes and comments": only(
        LOCAL, "prologue", 'echo "{{ job.workers }} of {{ job.cpu_cores * 2 }}" # {{ job.gpu_count }}\n'
    ),
    "a heredoc that ends before": only(
        LOCAL, "prologue", "cat >note <<-EOF\n\ttext\n\tEOF\nn=$((1 << workers))\ncat {{ job.auid }} <<<x\n"
    ),
    "the whole command in a log": only(
        SLURM, "command", '{{ super() }}\n  logger -t pman "$*"\n  logger -t pman "$@"\n'
    ),
    "PATH set": only(SLURM, "prologue", "export PATH=/usr/local/bin:/usr/bin:/bin\n"),
    "PATH set for Cromwell": only(WDL, "prologue", "export PATH=/usr/local/bin:/usr/bin:/bin\n"),
    "a program asked for": only(SLURM, "prologue", GUARD),
    "a directory asked for": only(SLURM, "prologue", "[ -d /no/scratch ] || exit 1\n"),
    "a file that must not be": only(SLURM, "prologue", "[ ! -e /etc/nologin ] || exit 1\n"),
    "a directory waited for": only(SLURM, "prologue", "until [ -d /no/scratch ]; do sleep 5; done\n"),
    "a wrapper that is not here": only(SLURM, "start", '/no/such/wrapper run_worker; run_worker 0\n'),
    "a user for sbatch": only(SLURM, "directives", "{{ super() }}\n#SBATCH --wckey={{ job.auid|sbatch }}\n"),
    "includes that may be missing": {
        LOCAL: extending(
            LOCAL,
            block(
                "prologue",
                "{% include 'sh/a.sh.j2' ignore missing %}\n{% include ['sh/a.sh.j2', 'sh/b.sh.j2'] %}\n",
            ),
        ),
        "sh/b.sh.j2": "true\n",
    },
    "values of YAML wherever one may begin": only(
        K8S, "pod_annotations",
        "      # for {{ job.auid }}\n      annotations: {a: {{ job.jid }}, b: {% if job.env %}{{ job.auid }}"
        "{% else %}x{% endif %}, {{ job.image }}: {{ job.kind }},\n        {{ job.name }}: !!str {{ job.jid }}}\n",
    ),
    "lists of YAML": only(
        DOCKER, "host_extra",
        "  ExtraHosts: [{% for name in ['a', 'b'] %}{{ name ~ ':192.0.2.7' }},{% endfor %}]\n"
        "  SecurityOpt: [\n    a, {{ 'label=' ~ job.workers }}]\n",
    ),
    "a script of a site's own in YAML": only(
        K8S, "pod_spec_extra", INIT + "          command: [sh, -c]\n          args:\n            - |\n"
        '              mkdir -p "/scratch/$WHO" # {{ job.workers }}\n'
        "          env:\n            - name: WHO\n              value: {{ job.auid|k8s }}\n",
    ),
    "kept in git": {
        ".git/config": "x", ".github/workflows/ci.yml": "x", ".gitignore": "x", "LICENSE": "x", "README.md": "x",
        "slurm/README.md": "x", SLURM: extending(SLURM),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("files", GOOD.values(), ids=GOOD)
def test_what_is_good_is_left_in_peace(files: dict[str, str], tmp_path: Path) -> None:
    assert [str(finding) for finding in checking.SiteCheck(write(tmp_path, files)).findings()] == []


@pytest.mark.slow
def test_whole_copies_of_the_shipped_templates_are_good(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "templates", tmp_path, dirs_exist_ok=True)
    assert [str(finding) for finding in checking.SiteCheck(tmp_path).findings()] == []


@pytest.mark.slow
def test_shipped_templates_are_good() -> None:
    result = run("check")
    assert (result.exit_code, result.stdout) == (0, ""), result.output
