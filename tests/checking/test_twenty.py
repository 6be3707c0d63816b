"""Twenty broken sites, each with all that `pman check` says of it.

The paths in what it says begin at the overlay. Where that is a policy that cannot be read, neither `pman render` nor
`pman serve` goes on without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pman import settings
from pman.errors import TemplateError
from pman.service import app
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.checking.overlays import DOCKER, K8S, SLURM, SWARM, WDL, block, extending, line_of, only, run, shipped, write
from tests.rig import ROOT

ALLOWED = "{% if job.auid not in site.users %}{{ refuse('only members of the project') }}{% endif %}\n"


@dataclass(frozen=True)
class Site:
    """An overlay, as files and what is done beside, and the lines that the check prints."""

    name: str
    target: str
    files: dict[str, str]
    said: str
    more: Callable[[Path], object] = lambda _: None
    unread: bool = False  # a policy that cannot be read


def conf(place: Path) -> None:
    """Beside the overlay, a Cromwell whose default backend is not the first."""
    texts = "image incoming outgoing sharedir jid slurm_partition".split()  # noqa: SIM905
    rest = "\\n".join(f"String {name}" for name in texts)
    numbers = "Int gpu_limit\\nInt number_of_workers\\nInt timelimit\\nString memory"
    (place.parent / "cromwell.conf").write_text(
        'backend { default = B, providers { A { config { runtime-attributes = "String cpu" } }, '
        f'B {{ config {{ runtime-attributes = "Float cpu\\n{numbers}\\n{rest}" }} }} }} }}\n'
    )


def link(name: str, to: str | Path) -> Callable[[Path], object]:
    return lambda place: (place / name).symlink_to(to)


def copy(name: str, old: str, new: str) -> dict[str, str]:
    return {name: shipped(name, old, new)}


SITES = [
    Site(
        "a directory where a template belongs",
        "slurm",
        {SLURM + "/x.sh.j2": "true\n"},
        "slurm/job.sh.j2:1: error: this is a directory: put a file here [unreadable]",
        unread=True,
    ),
    Site(
        "a directory where site.yaml belongs",
        "slurm",
        {"site.yaml/a.yaml": "a: 1\n"},
        "site.yaml:1: error: this is a directory: put a file here [unreadable]",
        unread=True,
    ),
    Site(
        "a pipe",
        "slurm",
        {},
        "policy.sh.j2:1: error: this is no file: put a file here [unreadable]",
        lambda place: os.mkfifo(place / "policy.sh.j2"),
        unread=True,
    ),
    Site(
        "a directory that is a link to nothing",
        "k8s",
        {},
        "k8s:1: error: this cannot be read (a symbolic link to ../old/k8s): No such file or directory [unreadable]",
        link("k8s", "../old/k8s"),
        unread=True,
    ),
    Site(
        "a link to itself",
        "slurm",
        {},
        "site.yaml:1: error: this cannot be read (a symbolic link to site.yaml): Too many levels of "
        "symbolic links [unreadable]",
        link("site.yaml", "site.yaml"),
        unread=True,
    ),
    Site(
        "a template outside of the overlay",
        "slurm",
        {"slurm/README": ""},
        "slurm/job.sh.j2:1: error: a symbolic link leads out of the template directory [template]",
        link(SLURM, ROOT / "templates" / SLURM),
    ),
    Site(
        "a template in UTF-16",
        "slurm",
        {"slurm/README": ""},
        "slurm/job.sh.j2:1: error: this is no UTF-8 [template]",
        lambda place: (place / SLURM).write_bytes(extending(SLURM).encode("utf-16")),
    ),
    Site(
        "site.yaml indented by a tab",
        "slurm",
        {"site.yaml": "slurm:\n\taccount: lab\n"},
        "site.yaml:2: error: found character '\\t' that cannot start any token [site.yaml]",
    ),
    Site(
        "site.yaml under another name",
        "slurm",
        {"Site.yaml": "gpu_type: a100\n"},
        "Site.yaml:1: error: nothing reads this file: templates end in .j2; did you mean site.yaml? [unused-file]",
    ),
    Site(
        "a line break in a value for a #SBATCH line",
        "slurm",
        {
            "site.yaml": "gpu_type: a100\naccounts:\n  - lab\n  - |\n    neuro\n",
            SLURM: extending(SLURM, block("gpus", "#SBATCH --account={{ site.accounts[1] | sbatch }}\n")),
        },
        "site.yaml:4: error: 'neuro\\n' cannot be written for this scheduler: a control character cannot "
        "stand in a #SBATCH line (slurm/job.sh.j2:3) [template]",
    ),
    Site(
        "a line break in a value for WDL",
        "wdl",
        {
            "site.yaml": 'a: 1\nqueue: "long\\nshort"\n',
            **only(WDL, "site_attributes", "    q: {{ 'q-' ~ site.queue }}\n"),
        },
        "site.yaml:2: error: 'long\\nshort' cannot be written for this scheduler: a line break cannot stand "
        "in a WDL string (wdl/job.wdl.j2:3) [template]",
    ),
    Site(
        "a line break in a setting",
        "slurm",
        {"settings.env": 'SLURM_ACCOUNT="lab\nneuro"\n'},
        f"templates/{SLURM}:{line_of(SLURM, '{{ account | sbatch')}: error: "
        "the setting SLURM_ACCOUNT cannot be written for this "
        "scheduler: a control character cannot stand in a #SBATCH line [template]",
    ),
    Site(
        "a copy with another annotation",
        "k8s",
        copy(K8S, "digest: {{ job.digest }}", "digest: {{ job.jid }}"),
        f"{K8S}:{line_of(K8S, 'digest: {{ job.digest')}: error: "
        "metadata annotations org.chrisproject.pman.digest must be {{ "
        "job.digest }}, or pman does not find the job again (request: plain) [changed]",
    ),
    Site(
        "a copy without a label",
        "docker",
        copy(DOCKER, "  org.chrisproject.pman.digest: {{ job.digest }}\n", ""),
        f"{DOCKER}:{line_of(DOCKER, 'Labels:') + 1}: error: "
        "Labels org.chrisproject.pman.digest must be {{ job.digest }}, "
        "or pman does not find the job again (request: plain) [changed]",
    ),
    Site(
        "a copy with another name",
        "swarm",
        copy(SWARM, "Name: {{ job.name }}", "Name: job"),
        f"{SWARM}:{line_of(SWARM, 'Name: {{ job.name')}: error: "
        "Name must be {{ job.name }}, or pman does not find the job again "
        "(request: plain) [changed]",
    ),
    Site(
        "a claim that is gone",
        "slurm",
        only(SLURM, "claim", "true\n"),
        "slurm/job.sh.j2:2:10: warning: the shipped lines of the block claim are gone: begin it with {{ "
        "super() }} [no-super]\n"
        'slurm/job.sh.j2:2: error: the script does not hold `mv -T "$attempt" "claim.$SLURM_JOB_ID"`, '
        "without which the job may run twice (request: plain) [changed]",
    ),
    Site(
        "no return code",
        "local",
        copy("sh/supervise.sh.j2", "mv rc.new rc", "mv rc.new code"),
        "sh/supervise.sh.j2:1: error: the script does not hold `mv rc.new rc`, without which pman never "
        "sees that the job has ended (request: plain) [changed]",
    ),
    Site(
        "a job without its name on the cluster",
        "wdl",
        copy(WDL, "    jid: {{ job.jid }}\n", ""),
        "wdl/job.wdl.j2:1: warning: the runtime attribute jid is not the job's own, by which its SLURM job "
        "is named (request: plain) [changed]",
    ),
    Site(
        "limits that are gone",
        "docker",
        only(DOCKER, "resources", "  Memory: 1000000000\n"),
        "docker/container.yaml.j2:2:10: warning: the memory limit of a request has no effect: the shipped "
        "template hands it on, and nothing here does [lost]\n"
        "docker/container.yaml.j2:2:10: warning: the number of CPUs of a request has no effect: the "
        "shipped template hands it on, and nothing here does [lost]\n"
        "docker/container.yaml.j2:2:10: warning: the number of GPUs of a request has no effect: the "
        "shipped template hands it on, and nothing here does [lost]",
    ),
    Site(
        "an argument lost behind an allow-list",
        "slurm",
        {
            "site.yaml": "users: [alice]\n",
            SLURM: extending(
                SLURM,
                block("prologue", ALLOWED),
                block("command", '{{ super() }}\n  set -- "${@:1:$#-1}"\n'),
            ),
        },
        "slurm/job.sh.j2:5: error: only 4 of the 5 words of the command line arrive (request: plain) [changed]",
    ),
    Site(
        "a type that Cromwell's default backend does not take",
        "wdl",
        copy(WDL, "cpu: {{ job.cpu_cores }}", 'cpu: {{ job.cpu_cores ~ " cores" }}'),
        f"{WDL}:{line_of(WDL, 'cpu: {{ job')}: error: "
        "Cromwell's backend B declares cpu as Float, which '2 cores' is not: a "
        "job would wait for 16 minutes and fail (request: plain) [invalid]\n"
        f"{WDL}:{line_of(WDL, 'container_user: {{')}: error: "
        "Cromwell ignores the runtime attribute container_user: its backend B "
        "does not declare it (request: user, labels) [undeclared-attribute]",
        conf,
    ),
]


@pytest.mark.parametrize("site", SITES, ids=[site.name for site in SITES])
def test_what_an_admin_is_told(site: Site, tmp_path: Path) -> None:
    place = write(tmp_path / "site", site.files)
    place.mkdir(exist_ok=True)
    site.more(place)
    options = ("--cromwell-conf", tmp_path / "cromwell.conf") if (tmp_path / "cromwell.conf").exists() else ()
    result = run("check", place, "--to", site.target, *options)
    said = result.stdout.replace(f"{place}/", "").replace(f"{ROOT}/", "")
    assert re.sub(r" \(and in \d+ more results\)", "", said).strip() == site.said
    assert result.exit_code == (": error: " in site.said)
    if site.unread:
        config = settings.load({"TEMPLATES_DIR": str(place), "STOREBASE": "/data", "APPLICATION_MODE": "dev"})
        with pytest.raises(TemplateError, match="this "):
            Renderer(config, TARGETS)
        with pytest.raises(TemplateError, match="this "):
            app.create_app(config)
