"""What is wrong with a site's templates when they are rendered: what their language or the job does not bear."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from pman import checking
from tests.checking.overlays import (
    DOCKER,
    INIT,
    K8S,
    LOCAL,
    LOOP,
    SLURM,
    SWARM,
    WDL,
    Broken,
    block,
    extending,
    is_named,
    line_of,
    only,
    shipped,
    write,
)
from tests.rig import wait_for

BROKEN = [
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
        "value in a comment that runs",
        only(LOCAL, "prologue", "# job of {{ job.auid }}\n"),
        LOCAL, 4, "a value of the request runs as a command here", "changed",
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
        "label that is no name",
        only(K8S, "pod_labels", "{{ super() }}\n        user: {{ job.auid }}\n"),
        K8S, 4, "the label user cannot be '$(pman-check-injected)", "invalid",
    ),
    Broken(
        "label that Kubernetes sets",
        only(K8S, "pod_labels", "{{ super() }}\n        job-name: mine\n"),
        K8S, 4, "the label job-name of the pods is set by Kubernetes", "invalid",
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
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=[broken.name for broken in BROKEN])
def test_what_is_broken_is_named(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_named(broken, tmp_path, monkeypatch)


@pytest.mark.slow
def test_one_cause_is_told_once_however_many_words_a_request_has(tmp_path: Path) -> None:
    files = only(K8S, "environment", "            - name: TZ\n              value: UTC\n")
    found = checking.SiteCheck(write(tmp_path, files)).findings()
    assert [finding.rule for finding in found] == ["no-super", "invalid"]
    assert found[1].message.endswith(" more results)")


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
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found += [pid] if str(place).encode() in Path("/proc", pid, "cmdline").read_bytes() else []
    return found
