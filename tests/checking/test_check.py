"""`pman check` and `pman templates`: broken overlays, each named by file, line and cause; good ones are silent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from pman import checking, cli, settings
from pman.checking import corpus, overlay
from pman.errors import BadRequest, TemplateError
from pman.service import app
from pman.targets import wdl as targets_wdl
from pman.templating import render
from tests.rig import ROOT, wait_for

WDL, K8S, SWARM = "wdl/job.wdl.j2", "k8s/job.yaml.j2", "swarm/service.yaml.j2"
LOCAL, SLURM, DOCKER = "local/job.sh.j2", "slurm/job.sh.j2", "docker/container.yaml.j2"


def extending(name: str, *blocks: str) -> str:
    return f'{{% extends "shipped/{name}" %}}\n' + "".join(blocks)


def block(name: str, text: str) -> str:
    return f"{{% block {name} %}}\n{text}{{% endblock %}}\n"


def only(name: str, block_name: str, text: str) -> dict[str, str]:
    """An overlay of one template that overrides one block."""
    return {name: extending(name, block(block_name, text))}


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
INIT = "      initContainers:\n        - name: scratch\n          image: busybox\n"
TABLE = [
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
        "quoted value joined to text",
        only(LOCAL, "prologue", "echo {{ 'id=<' ~ (job.jid|sh) }}\n"),
        LOCAL, 3, "a quoted value cannot be joined", "template",
    ),
    Broken(
        "WDL string in the shell's text",
        {WDL: extending(WDL, block("prologue", "module load {{ site.module }}\n")), "site.yaml": "module: fsl\n"},
        WDL, 3, "write |sh", "wrong-quoting",
    ),
    Broken(
        "YAML indentation slip",
        only(K8S, "pod_spec_extra", "       priorityClassName: low\n"),
        K8S, 3, "this is no YAML", "invalid",
    ),
    Broken(
        "YAML under the wrong parent",
        only(K8S, "pod_spec_extra", "  priorityClassName: low\n"),
        K8S, 3, "this is no YAML", "invalid",
    ),
    Broken(
        "unknown Kubernetes field",
        only(K8S, "pod_spec_extra", "      priorityClas: low\n"),
        K8S, 3, "'priorityClas' was unexpected", "invalid",
    ),
    Broken(
        "wrong type for Kubernetes",
        only(K8S, "pod_spec_extra", "      terminationGracePeriodSeconds: soon\n"),
        K8S, 3, "terminationGracePeriodSeconds", "invalid",
    ),
    Broken(
        "key given twice",
        only(K8S, "pod_spec_extra", "      restartPolicy: Always\n"),
        K8S, 3, "given twice", "invalid",
    ),
    Broken(
        "unknown Swarm field",
        only(SWARM, "container_extra", "    Priviliged: true\n"),
        SWARM, 3, "'Priviliged' was unexpected", "invalid",
    ),
    Broken(
        "unknown Docker field",
        only(DOCKER, "host_extra", "  ReadOnlyRootfs: true\n"),
        DOCKER, 3, "'ReadOnlyRootfs' was unexpected", "invalid",
    ),
    Broken(
        "runtime attribute without colon",
        only(WDL, "site_attributes", '    account "lab"\n'),
        WDL, 3, "Unexpected", "invalid",
    ),
    Broken(
        "runtime attribute without closing quote",
        only(WDL, "site_attributes", '    account: "lab\n'),
        WDL, 3, "", "invalid",
    ),
    Broken(
        "placeholder of WDL in the command",
        only(WDL, "prologue", "cd ~{scratch}\n"),
        WDL, 3, "Unknown identifier scratch", "invalid",
    ),
    Broken(
        "unclosed heredoc",
        only(WDL, "prologue", "cat > note <<END\nhello\n"),
        WDL, 3, "here-document", "invalid",
    ),
    Broken(
        "shell syntax error",
        only(SLURM, "prologue", "if module load fsl; do\n"),
        SLURM, 3, "bash: syntax error", "invalid",
    ),
    Broken(
        "shell mistake that only shellcheck sees",
        only(LOCAL, "prologue", 'for f in "$(ls /scratch)"; do echo "$f"; done\n'),
        LOCAL, 3, "shellcheck SC2066", "invalid",
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
        "wdl/job.wdl", 0, "templates end in .j2", "unused-file",
    ),
    Broken(
        "site.yaml with another suffix",
        {"site.yml": "account: lab\n"},
        "site.yml", 0, "nothing reads this file: templates end in .j2; did you mean site.yaml?", "unused-file",
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
        "arguments dropped",
        only(WDL, "command", "exec {{ job.argv[0]|sh }}\n"),
        WDL, 2, "only 0 of the", "changed",
    ),
    Broken(
        "arguments split by the shell",
        only(LOCAL, "command", "  set -- $* {{ job.argv|join(' ') }}\n"),
        LOCAL, 2, "", "changed",
    ),
    Broken(
        "arguments not kept from Kubernetes",
        {K8S: shipped(K8S, "- {{ arg|k8s }}", "- {{ arg }}")},
        K8S, line_of(K8S, "in job.argv[1:]"), "instead of", "changed",
    ),
    Broken(
        "environment not kept from Swarm",
        only(SWARM, "environment", LOOP),
        SWARM, 2, "instead of", "changed",
    ),
    Broken(
        "environment forgotten",
        only(K8S, "environment", "          env: []\n"),
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
        only(LOCAL, "environment", 'swap=$incoming incoming=$outgoing\noutgoing=$swap\n'),
        LOCAL, 2, "/share/incoming is ", "changed",
    ),
    Broken(
        "value in the author's double quotes",
        only(SLURM, "prologue", 'echo "running for {{ job.auid }} now"\n'),
        SLURM, 3, "quotes stand around {{ }}", "quoted-twice",
    ),
    Broken(
        "shell word in double quotes for Cromwell",
        only(WDL, "prologue", 'echo "for {{ job.auid|sh }}"\n'),
        WDL, 3, "a value of the request runs as a command here", "changed",
    ),
    Broken(
        "value in the author's single quotes",
        only(SLURM, "prologue", "echo 'user {{ job.auid }}'\n"),
        SLURM, 3, "a value of the request runs as a command here", "changed",
    ),
    Broken(
        "value in a heredoc",
        only(LOCAL, "prologue", "cat >note <<EOF\n{{ job.jid }}\nEOF\n"),
        LOCAL, 3, "a value of the request runs as a command here", "changed",
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
        "value in a comment that runs",
        only(LOCAL, "prologue", "# job of {{ job.auid }}\n"),
        LOCAL, 4, "a value of the request runs as a command here", "changed",
    ),
    Broken(
        "value for sbatch",
        only(SLURM, "directives", "{{ super() }}\n#SBATCH --comment={{ job.auid }}\n"),
        SLURM, 4, "{{ job.auid }} is read by sbatch here: write |sbatch", "wrong-quoting",
    ),
    Broken(
        "another language's filter",
        only(SLURM, "prologue", "logger {{ job.auid|yaml }}\n"),
        SLURM, 3, "|yaml writes another language", "template",
    ),
    Broken(
        "value that Swarm expands",
        only(SWARM, "environment", "{{ super() }}\n      - {{ 'U=' ~ job.auid }}\n"),
        SWARM, 2, "Swarm would expand a value of the request here: write |gotemplate", "changed",
    ),
    Broken(
        "value that Kubernetes expands",
        {
            K8S: extending(
                K8S, block("environment", "{{ super() }}\n            - {name: U, value: {{ job.auid }}}\n")
            )
        },
        K8S, 2, "Kubernetes would expand a value of the request here: write |k8s", "changed",
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
        "input and output swapped for a container runtime",
        {
            SLURM: extending(
                SLURM,
                block(
                    "runtime",
                    '  set -- apptainer exec --bind "$outgoing:/share/incoming:ro" '
                    '--bind "$incoming:/share/outgoing" "$image"\n',
                ),
            )
        },
        SLURM, 2, "/share/incoming is ", "changed",
    ),
    Broken(
        "nothing mounted",
        only(SLURM, "runtime", '  set -- apptainer exec "docker://$image"\n'),
        SLURM, 2, "nothing in front of the command mounts /share/outgoing", "changed",
    ),
    Broken(
        "another command instead",
        only(SLURM, "command", '{{ super() }}\n  logger -t pman "$@"\n  set -- true\n'),
        SLURM, 2, "the command line of the job is never run", "changed",
    ),
    Broken(
        "a script that leaves",
        only(SLURM, "prologue", 'cp "$no_such_variable" .\n'),
        SLURM, 2, "is never run: the script leaves with status 1 before", "changed",
    ),
    Broken(
        "a script that waits",
        only(SLURM, "prologue", "while squeue | grep -q lic; do sleep 5; done\n"),
        SLURM, 2, "is never run: the script leaves with status 75 before", "changed",
    ),
    Broken(
        "a script that never ends",
        only(SLURM, "prologue", "while squeue; do :; done\n"),
        SLURM, 2, "the script does not come to an end", "changed",
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
        "command in one word of a shell",
        {
            K8S: shipped(
                K8S, "command: [{{ job.argv[0]|k8s }}]", "command: [sh, -c, {{ job.argv|join(' ')|k8s }}]"
            ).replace("in job.argv[1:]", "in []").replace("job.argv|length == 1", "true")
        },
        K8S, line_of(K8S, "command: ["), "no container has it in command and args", "changed",
    ),
    Broken(
        "mount without volume",
        only(K8S, "volume_mounts", "            - {name: licences, mountPath: /l}\n"),
        K8S, 2, "the mount licences has no volume", "changed",
    ),
    Broken(
        "environment emptied",
        only(K8S, "environment", "          env:\n"),
        K8S, 2, "the job's variable GREETING is not set", "changed",
    ),
    Broken(
        "unclosed mapping far above where YAML stumbles",
        {
            K8S: extending(
                K8S,
                block("node_selector", "      nodeSelector: {a: b\n"),
                block("tolerations", "      tolerations: []\n"),
            )
        },
        K8S, 3, "this is no YAML", "invalid",
    ),
    Broken(
        "unclosed quote far above where bash stumbles",
        {SLURM: extending(SLURM, block("prologue", 'echo "hello\n'), block("environment", "export A=1\n"))},
        SLURM, 3, "bash: unexpected EOF", "invalid",
    ),
    Broken(
        "options that are no JSON",
        {"wdl/options.json.j2": extending("wdl/options.json.j2", '{% block site_options %}\n"a": 1{% endblock %}\n')},
        "wdl/options.json.j2", 3, "this is no JSON", "invalid",
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
    Broken(
        "path that Kubernetes expands",
        only(K8S, "volume_mounts", "            - {name: incoming, mountPath: /me, subPathExpr: {{ job.auid }}}\n"),
        K8S, 2, "Kubernetes would expand a value of the request here", "changed",
    ),
    Broken(
        "argument of another container that Kubernetes expands",
        only(K8S, "pod_spec_extra", INIT + "          args: [{{ job.auid }}]\n"),
        K8S, 2, "Kubernetes would expand a value of the request here", "changed",
    ),
    Broken(
        "value in a shell's script in YAML",
        only(K8S, "pod_spec_extra", INIT + '          args: [-ec, {{ ("mkdir /s/" ~ job.auid)|k8s }}]\n'
             "          command: [sh]\n"),
        K8S, 2, "a value of the request is part of a shell's script", "changed",
    ),
    Broken(
        "script that begins with an empty line",
        {"sh/job.sh.j2": shipped("sh/job.sh.j2", "#!", "\n#!")},
        "sh/job.sh.j2", 1, "sbatch takes no script that does not begin with #!", "invalid",
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
        "label that is no name",
        only(K8S, "pod_labels", "{{ super() }}\n        user: {{ job.auid }}\n"),
        K8S, 4, "the label user cannot be '$(pman-check-injected)", "invalid",
    ),
    Broken(
        "image that is no reference",
        {DOCKER: extending(DOCKER, '{% set image = "https://mirror.example.org/" ~ job.image %}\n')},
        DOCKER, 1, "fnndsc/pl-simpledsapp:2.1.0' is no OCI image reference", "changed",
    ),
    Broken(
        "every request refused",
        only(WDL, "prologue", '{{ refuse("closed") }}\n'),
        WDL, 1, "every request of the corpus is refused", "all-refused",
    ),
    Broken(
        "a loop without end",
        only(WDL, "prologue", FOREVER),
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


@pytest.mark.slow
@pytest.mark.parametrize("broken", TABLE, ids=[broken.name for broken in TABLE])
def test_what_is_broken_is_named(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pman.templating.sandbox.MAX_RENDER_SECONDS", 0.5)
    monkeypatch.setattr("pman.targets.shell._CPU_SECONDS", 1)
    found = checking.SiteCheck(write(tmp_path, broken.files)).findings()
    told = "\n".join(map(str, found))
    matching = [
        f for f in found
        if f.rule == broken.rule and f.file == str(tmp_path / broken.file) and broken.said in f.message
    ]  # fmt: skip
    assert matching, told
    if broken.line:
        assert broken.line in [f.line for f in matching], told
    assert not broken.column or broken.column in [f.column for f in matching], told


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
def test_one_cause_is_told_once_however_many_words_a_request_has(tmp_path: Path) -> None:
    files = only(K8S, "environment", "            - name: TZ\n              value: UTC\n")
    found = checking.SiteCheck(write(tmp_path, files)).findings()
    assert [finding.rule for finding in found] == ["no-super", "invalid"]
    assert found[1].message.endswith(" more results)")


@pytest.mark.slow
def test_whole_copies_of_the_shipped_templates_are_good(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "templates", tmp_path, dirs_exist_ok=True)
    assert [str(finding) for finding in checking.SiteCheck(tmp_path).findings()] == []


def test_the_check_runs_no_program_of_this_machine(tmp_path: Path) -> None:
    made = tmp_path / "made"
    lines = (
        f"export PATH={os.environ['PATH']}\ntouch {made}\ncommand touch {made}\n(touch {made})\n/usr/bin/touch {made}\n"
    )
    place = write(tmp_path / "overlay", only(SLURM, "prologue", lines))
    assert checking.SiteCheck(place).findings() == []
    assert not made.exists()


def test_the_check_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines = "while squeue; do :; done &\n"
    place = write(tmp_path / "overlay", {SLURM: extending(SLURM, block("prologue", lines))})
    assert checking.SiteCheck(place, targets=["slurm"]).findings() == []
    wait_for(lambda: not processes_of(tmp_path), 20, "the end of all processes")


def processes_of(place: Path) -> list[str]:
    """The processes whose command line names `place`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if str(place).encode() in path.read_bytes() else []
    return found


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


def test_there_are_at_least_25_broken_overlays() -> None:
    assert len({broken.name for broken in TABLE}) == len(TABLE) >= 25


@pytest.mark.slow
def test_shipped_templates_are_good() -> None:
    result = run("check")
    assert (result.exit_code, result.stdout) == (0, ""), result.output


def test_the_service_warns_at_start_and_refuses_what_cannot_render(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    place = write(tmp_path / "a", only(LOCAL, "prologe", "x\n"))
    app.create_app(settings.load({**base, "TEMPLATES_DIR": str(place)}))
    assert f"{place}/{LOCAL}:2:10: error: the block prologe overrides nothing" in caplog.text
    place = write(tmp_path / "b", only(LOCAL, "prologue", "{{ jobs }}\n"))
    with pytest.raises(TemplateError, match=r"local/job\.sh\.j2:3: 'jobs' is undefined"):
        app.create_app(settings.load({**base, "TEMPLATES_DIR": str(place)}))


def test_the_service_starts_where_the_template_refuses_its_sample(tmp_path: Path) -> None:
    place = write(tmp_path / "site", only(LOCAL, "prologue", "{{ refuse('only images of this site') }}\n"))
    given = {"APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state")}
    app.create_app(settings.load({**given, "TEMPLATES_DIR": str(place)}))


# -- the command ---------------------------------------------------------------------------------------------------

TYPO = only(WDL, "site_attributes", "    who: {{ job.auidd }}\n")


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
    assert {"cpu", "memory", "timelimit", "incoming", "outgoing", "image"} <= targets_wdl.declared_attributes(conf)
    assert run("check", "--cromwell-conf", conf, "--to", "wdl").exit_code == 0


@pytest.mark.slow
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


def test_diff_shows_what_stands_outside_of_blocks(tmp_path: Path) -> None:
    body = extending(SLURM, "{# a\nnote #}\n{% set partition = 'x' %}\n", block("prologue", "true\n"))
    shown = run("templates", "diff", "--templates", write(tmp_path, {SLURM: body})).stdout
    assert f"+++ {tmp_path}/{SLURM} outside of blocks\n@@ -0,0 +1 @@\n+{{% set partition = 'x' %}}\n---" in shown


@pytest.mark.slow
@pytest.mark.parametrize("target", ["wdl", "k8s", "swarm", "docker", "slurm", "local"])
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


# -- the author's loop ---------------------------------------------------------------------------------------------


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
