"""What a Cromwell configuration says of a WDL's runtime attributes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from pman import settings
from pman.backends.slurm.words import REFUSALS, Fault
from pman.errors import Misconfigured, Unreachable
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.targets.cromwell_conf import provider
from pman.targets.record import Judging, Problem
from pman.templating.render import Renderer
from tests.backends.slurm.test_commands import REFUSED
from tests.rig import ROOT

REFERENCE = ROOT / "deploy" / "cromwell" / "slurm.conf"
# A site's: the attributes in a file of their own, put together by substitution, for one backend of three.
SITE = """
include required(classpath("application"))
include "attributes.conf"
backend {
  default = "SLURM"
  providers {
    Local { config { runtime-attributes = "String scratch" } }
    SLURM { config { runtime-attributes = ${common}${gpus} } }
    JSON { config: {"runtime-attributes": "String cpu\\nFloat? memory_gb"} }
  }
}
"""
ATTRIBUTES = 'common = "Int cpu = 1\\n Int memory_mb = 1000\\n"\ngpus = "Int gpu_limit = 0\\nString? sharedir"\n'


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "attributes.conf").write_text(ATTRIBUTES)
    (tmp_path / "main.conf").write_text(SITE)
    return tmp_path / "main.conf"


def test_includes_substitutions_and_json(conf: Path) -> None:
    own = {"cpu": "Int", "memory": "Int", "gpu_limit": "Int", "sharedir": "String"}
    assert own.items() <= provider(conf).attributes.items()
    assert "scratch" not in provider(conf).attributes  # of a backend that runs no job of pman's
    assert provider(conf, "JSON").attributes["cpu"] == "String"
    assert provider(conf, "Local").attributes["scratch"] == "String"
    assert provider(ROOT / "deploy" / "cromwell" / "main.conf").attributes == provider(REFERENCE).attributes
    with pytest.raises(Misconfigured, match=r"has no backend\.providers\.PBS"):
        provider(conf, "PBS")
    conf.write_text("backend { default = ")
    provider.cache_clear()
    with pytest.raises(Misconfigured, match="cannot be read as a configuration of Cromwell"):
        provider(conf)


def wdl(more: Mapping[str, str] = MappingProxyType({}), **fields: object) -> str:
    config = settings.load({"CONTAINER_ENV": "cromwell", "STOREBASE": "/data", **more})
    request = {
        "jid": "chris-jid-1", "args": [], "auid": "chris", "number_of_workers": 1, "cpu_limit": 1000, "gpu_limit": 0,
        "memory_limit": 200, "image": "image", "entrypoint": ["true"], "type": "fs", "env": [],
    }  # fmt: skip
    return Renderer(config, TARGETS).render(make_job(validate(request | fields), config), "wdl").text


def problems(text: str, conf: Path | None = None, backend: str = "") -> list[Problem]:
    return list(TARGETS["wdl"].judge(text, Judging(cromwell_conf=conf, cromwell_backend=backend)))


def test_the_shipped_template_suits_the_reference_configuration() -> None:
    assert problems(wdl(time_limit_minutes=5, partition="main"), REFERENCE) == []


def test_the_type_of_an_attribute() -> None:
    text = wdl()
    line = text[: text.index("    cpu: 1\n")].count("\n") + 1
    (found,) = problems(text.replace("    cpu: 1\n", '    cpu: "two"\n'), REFERENCE)
    assert (found.line, found.rule) == (line, "invalid")
    assert found.message.startswith(
        "Cromwell's backend SLURM declares cpu as Int, which 'two' is not: a job would wait"
    )
    assert problems(text.replace("    cpu: 1\n", "    cpu: 0.5\n"), REFERENCE)
    assert not problems(text.replace("    cpu: 1\n", '    cpu: "2"\n'), REFERENCE)  # Cromwell reads it
    assert not problems(text.replace("    cpu: 1\n", '    cpu: "two"\n'))  # nobody knows


def test_an_attribute_that_is_given_twice() -> None:
    text = wdl().replace("    cpu: 1\n", '    cpu: 1\n    jid: "x"\n    cpu: 2\n')
    assert [problem.message.partition(", here")[0] for problem in problems(text)] == [
        "the runtime attribute cpu is given twice", "the runtime attribute jid is given twice",
    ]  # fmt: skip


@pytest.mark.parametrize(("version", "good"), [("1.0", True), ("1.1", True), ("1.2", False), ("2.0", False)])
def test_versions_of_wdl(version: str, good: bool) -> None:
    assert (problems(wdl().replace("version 1.0", f"version {version}")) == []) == good


def test_a_cluster_that_knows_one_directory_only(conf: Path) -> None:
    said = [problem.message for problem in problems(wdl(), conf)]
    assert any("knows the attribute sharedir only" in m and m.endswith("CROMWELL_SHAREDIR_ONLY=yes") for m in said)
    ignored = {message.split()[5].rstrip(":") for message in said if message.startswith("Cromwell ignores")}
    assert ignored == {"image", "number_of_workers", "incoming", "outgoing", "jid"}
    assert not any("knows the attribute" in problem.message for problem in problems(wdl(), REFERENCE))


def test_a_job_of_cromwell_waits_for_what_passes() -> None:
    """The words are those of the backend `slurm`, and grep takes them as Python does."""
    lines = re.findall(r"(?m)^ *(away=.+)$", REFERENCE.read_text())
    script = "\n".join([*lines, 'echo "$away" >&2; grep -iE "$away"'])
    said = [words.replace("\n", " ") for words, _, _ in REFUSED]
    found = subprocess.run(["bash", "-c", script], input="\n".join(said), capture_output=True, text=True, check=True)
    passing = [words for words, fault, _ in REFUSALS if fault is Fault.PASSING]
    assert found.stderr == "|".join([*passing, "did not say the number"]) + "\n"
    waits = [words for words, (_, _, error) in zip(said, REFUSED, strict=True) if error is Unreachable]
    assert found.stdout.splitlines() == waits
