"""Blocks and values with which a site changes single lines of slurm/job.sh.j2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pman import job, settings
from pman.targets import TARGETS
from pman.targets.sbatch import problems
from pman.templating import render

REQUEST: dict[str, Any] = {
    "jid": "j1", "type": "fs", "auid": "alice", "image": "busybox", "entrypoint": ["true"], "args": [],
    "number_of_workers": 1, "cpu_limit": 2000, "memory_limit": 512, "gpu_limit": 2, "time_limit_minutes": 5,
}  # fmt: skip
BLOCKS = {
    "resources": ("#SBATCH --mem-per-gpu=4G", "--mem=", "--gres=gpu:2"),
    "gpus": ("#SBATCH --gpus-per-node=a100:2", "--gres=", "--mem=512M"),
    "limits": ("#SBATCH --time-min=1", "--time=", "--mem=512M"),
}


def directives(site: Path, **fields: Any) -> list[str]:
    config = settings.load({"STOREBASE": "/store", "TEMPLATES_DIR": str(site)})
    made = job.make_job(job.validate(REQUEST | fields), config)
    text = render.Renderer(config, TARGETS).render(made, "slurm").text
    assert [str(problem) for problem in problems(text)] == []
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_replaced_alone(tmp_path: Path, block: str) -> None:
    """SLURM refuses the new line of each of them beside the shipped one."""
    new, gone, kept = BLOCKS[block]
    overlay = tmp_path / "slurm" / "job.sh.j2"
    overlay.parent.mkdir()
    overlay.write_text(f'{{% extends "shipped/slurm/job.sh.j2" %}}\n{{% block {block} %}}\n{new}\n{{% endblock %}}\n')
    lines = directives(tmp_path)
    assert new in lines
    assert not [line for line in lines if gone in line]
    assert [line for line in lines if kept in line]


@pytest.mark.parametrize(("workers", "line"), [(1, "--gres=gpu:a100:2"), (3, "--gpus-per-task=a100:2")])
def test_the_type_of_gpus_is_a_value_of_the_site(tmp_path: Path, workers: int, line: str) -> None:
    (tmp_path / "site.yaml").write_text("gpu_type: a100\n")
    lines = directives(tmp_path, number_of_workers=workers)
    assert [one for one in lines if "gpu" in one] == [f"#SBATCH {line}"]


def test_the_prefix_of_names_is_a_value_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("job_name_prefix: 'chris (x) '\n")
    assert r'#SBATCH --job-name=chris" "\(x\)" "j1' in directives(tmp_path)


@pytest.mark.parametrize("requeue", [True, False])
def test_requeue_is_a_value_of_the_site(tmp_path: Path, requeue: bool) -> None:
    (tmp_path / "site.yaml").write_text(f"requeue: {str(requeue).lower()}\n")
    assert [line for line in directives(tmp_path) if "requeue" in line] == [
        f"#SBATCH --{'requeue' if requeue else 'no-requeue'}"
    ]
