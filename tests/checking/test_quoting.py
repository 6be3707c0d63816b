"""Values in a site's templates whose quotes mean nothing where they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checking.overlays import (
    DOCKER,
    INIT,
    K8S,
    LOCAL,
    SLURM,
    WDL,
    Broken,
    block,
    extending,
    is_named,
    only,
)

MISQUOTED = [
    Broken(
        "unquoted insertion",
        only(WDL, "prologue", "echo {{ job.jid|safe }}\n"),
        WDL, 3, "|safe puts a value in unquoted", "marked-safe", 17,
    ),
    Broken(
        "quoting turned off",
        only(LOCAL, "prologue", "{% autoescape false %}echo {{ job.jid }}{% endautoescape %}\n"),
        LOCAL, 3, "quoting cannot be turned off", "marked-safe", 4,
    ),
    Broken(
        "quotes around a value",
        only(LOCAL, "prologue", 'export JOB="{{ job.jid }}"\n'),
        LOCAL, 3, "quotes stand around {{ }}", "quoted-twice",
    ),
    Broken(
        "WDL string in the shell's text",
        {WDL: extending(WDL, block("prologue", "module load {{ site.module }}\n")), "site.yaml": "module: fsl\n"},
        WDL, 3, "write |sh", "wrong-quoting",
    ),
    Broken(
        "value in the author's double quotes",
        only(SLURM, "prologue", 'echo "running for {{ job.auid }} now"\n'),
        SLURM, 3, "quotes stand around {{ }}", "quoted-twice",
    ),
    Broken(
        "value in a quoted heredoc, which the value could end",
        only(LOCAL, "prologue", "cat >note <<'EOF'\nfor\n{{ job.auid }}\nEOF\n"),
        LOCAL, 5, "{{ job.auid }} stands in a heredoc", "wrong-quoting",
    ),
    Broken(
        "value in backquotes",
        only(LOCAL, "prologue", "n=1\nn=`basename {{ job.auid }}`\n"),
        LOCAL, 4, "{{ job.auid }} loses its quotes", "wrong-quoting",
    ),
    Broken(
        "value after a backslash",
        only(LOCAL, "prologue", "logger \\{{ job.auid }}\n"),
        LOCAL, 3, "{{ job.auid }} loses its quotes", "wrong-quoting",
    ),
    Broken(
        "directory in double quotes",
        only(LOCAL, "prologue", 'ls "{{ storage.incoming.source }}/x"\n'),
        LOCAL, 3, "quotes stand around {{ }}", "quoted-twice",
    ),
    Broken(
        "value in a comment",
        only(LOCAL, "prologue", "# job of {{ job.auid }}\n"),
        LOCAL, 3, "stands in a comment", "wrong-quoting",
    ),
    Broken(
        "value for sbatch",
        only(SLURM, "directives", "{{ super() }}\n#SBATCH --comment={{ job.auid }}\n"),
        SLURM, 4, "{{ job.auid }} is read by sbatch here: write |sbatch", "wrong-quoting",
    ),
    Broken(
        "safe in a map",
        only(SLURM, "prologue", "logger {{ job.argv|map('safe')|join(' ') }}\n"),
        SLURM, 3, "|safe puts a value in unquoted", "marked-safe",
    ),
    Broken(
        "WDL string in a macro of shell text",
        {
            WDL: extending(
                WDL, "{% macro load(m) %}module load {{ m }}{% endmacro %}\n",
                block("prologue", "{{ load(site.module) }}\n"),
            ),
            "site.yaml": "module: fsl\n",
        },
        WDL, 2, "{{ m }} is a WDL string here", "wrong-quoting",
    ),
    Broken(
        "WDL strings of an expression in the shell's text",
        {
            WDL: extending(WDL, block("prologue", "module load {{ site.modules|join(' ') }}\n")),
            "site.yaml": "modules: [a]\n",
        },
        WDL, 3, "write |sh", "wrong-quoting",
    ),
    Broken(
        "shell template read into WDL",
        {
            WDL: extending(WDL, block("prologue", '{% include "sh/mods.sh.j2" %}\n')),
            "sh/mods.sh.j2": "module load {{ site.module }}\n", "site.yaml": "module: fsl\n",
        },
        "sh/mods.sh.j2", 1, "write |sh", "wrong-quoting",
    ),
    Broken(
        "shell word in a runtime attribute",
        only(WDL, "site_attributes", "    account: {{ job.auid|sh }}\n"),
        WDL, 3, "a WDL string is needed here", "wrong-quoting", 26,
    ),
    Broken(
        "value that goes on with text in YAML",
        only(DOCKER, "mounts", "    - Type: bind\n      Target: /scratch\n      Source: /scratch/{{ job.auid }}\n"),
        DOCKER, 5, "{{ job.auid }} goes on with what stands before it", "wrong-quoting",
    ),
    Broken(
        "value after a word in YAML",
        only(K8S, "pod_annotations", "      annotations:\n        by: pman for {{ job.auid }}\n"),
        K8S, 4, "{{ job.auid }} goes on with what stands before it", "wrong-quoting",
    ),
    Broken(
        "value in a block of text in YAML",
        only(K8S, "pod_spec_extra", INIT + '          command:\n            - sh\n            - -c\n            - |\n'
             "              true\n              mkdir {{ job.auid }}\n"),
        K8S, 11, "{{ job.auid }} stands in text below | or >", "wrong-quoting",
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("broken", MISQUOTED, ids=[broken.name for broken in MISQUOTED])
def test_what_is_quoted_wrongly_is_named(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_named(broken, tmp_path, monkeypatch)
