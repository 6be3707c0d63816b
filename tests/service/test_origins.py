"""The blocks and rules that the page of a spec names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from pman import settings
from pman.backends import hiding
from pman.job import Job, validate
from pman.service.origins import origins, request_of
from pman.status import Details, JobState, JobStatus
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer
from tests.checking.overlays import SLURM, write

RULE = {"name": "small ones", "when": {"memory_mib": "< 1000"}, "set": {"partition": "short"}}
SECRET = "a secret"


def renderer(site: Path) -> Renderer:
    return Renderer(settings.load({"TEMPLATES_DIR": str(site), "STOREBASE": "/data"}), TARGETS)


def seen(job: Job) -> tuple[JobStatus, Details]:
    """As a backend tells it after the job was submitted: rules have decided, and its environment is not told."""
    status = JobStatus(job.jid, job.image, job.cmd, JobState.STARTED)
    return status, Details(user="chris", kind="ds", cpu_millicores=1500, memory_mib=512, gpu_count=0, partition="short")


def test_what_was_submitted_has_the_names_of_blocks_and_rules(tmp_path: Path) -> None:
    site = write(tmp_path, {"site.yaml": yaml.safe_dump({"policy": {"rules": [RULE]}})})
    made = renderer(site)
    job = made.job(validate({**SAMPLE, "env": [f"TOKEN={SECRET}"], "input_dir": "else/where", "output_dir": "there"}))
    text = hiding.in_script(made.render(job, "slurm").text, 1, ["TOKEN"])
    request = request_of(*seen(job))
    assert request
    named = origins(made, "slurm", request, text)
    assert "".join(part for _, part in named) == text
    assert SECRET not in str(named)
    names = {line: name for name, part in named for line in part.splitlines()}
    assert names["#SBATCH --partition=short"] == "directives [small ones]"
    hidden = next(line for line in names if "TOKEN=***" in line)
    assert names[hidden]


def test_a_rule_that_only_limits_is_named_beside_its_line(tmp_path: Path) -> None:
    """What was asked for is not known: the job has what its rules left of it."""
    rules = [
        {"name": "two cores", "set": {"cpu_millicores": {"at_most": 1500}}},
        {"name": "some memory", "set": {"memory_mib": {"at_least": 512}}},
        {"name": "ten hours", "set": {"time_limit_minutes": {"default": 60, "at_most": 600}}},
        {"name": "more than it has", "set": {"cpu_millicores": {"at_most": 9000}, "gpus": {"at_most": 4}}},
        RULE,
    ]
    made = renderer(write(tmp_path, {"site.yaml": yaml.safe_dump({"policy": {"rules": rules}})}))
    job = made.job(validate({**SAMPLE, "cpu_limit": 8000, "memory_limit": 100, "time_limit_minutes": 1000}))
    status, details = seen(job)
    request = request_of(status, replace(details, time_limit_minutes=600))
    assert request
    named = origins(made, "slurm", request, made.render(job, "slurm").text)
    names = {line: name for name, part in named for line in part.splitlines()}
    assert names["#SBATCH --cpus-per-task=2"] == "resources [two cores]"
    assert names["#SBATCH --mem=512M"] == "resources [some memory]"
    assert names["#SBATCH --time=600"] == "limits [ten hours]"
    assert names["#SBATCH --partition=short"] == "directives [small ones]"


def test_templates_that_have_changed_name_nothing(tmp_path: Path) -> None:
    before = renderer(write(tmp_path / "before", {"site.yaml": "a: 1\n"}))
    job = before.job(validate(SAMPLE))
    text = before.render(job, "slurm").text
    request = request_of(*seen(job))
    assert request
    after = renderer(write(tmp_path / "after", {SLURM: "#!/bin/sh\necho something else\n"}))
    assert origins(after, "slurm", request, text) == []
    refusing = {"policy": {"rules": [{"name": "none", "refuse": "No job is taken today."}]}}
    closed = renderer(write(tmp_path / "closed", {"site.yaml": yaml.safe_dump(refusing)}))
    assert origins(closed, "slurm", request, text) == []


def test_documents_in_a_form_of_the_backend_name_nothing(tmp_path: Path) -> None:
    made = renderer(write(tmp_path, {"site.yaml": "a: 1\n"}))
    request = request_of(*seen(made.job(validate(SAMPLE))))
    assert request
    assert origins(made, "k8s", request, "metadata:\n  name: chris-jid-1\nspec:\n  backoffLimit: 0\n") == []


def test_a_job_of_which_too_little_is_known_has_no_request() -> None:
    assert request_of(JobStatus("a", "b", "it's", JobState.STARTED), Details()) is None
