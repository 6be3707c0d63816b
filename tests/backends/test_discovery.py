"""`pman templates new --from-cluster`: rules that fit what SLURM and the API server of Kubernetes say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import urllib3

from pman import settings
from pman.backends.kubernetes.api import Endpoint
from pman.errors import Refused
from pman.job import Job, validate
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer
from tests.backends.test_kubernetes_api import Script, script  # noqa: F401 - a fixture
from tests.checking.overlays import run

# Measured on SLURM 22.05.8 (scripts/engines/slurm --profile accounted, with partitions like those here added): the
# words of each field. Nodes of several sizes, as `man sinfo` has them, one row each for --exact.
_PARTITION = (
    "PartitionName={} AllowGroups=ALL {} AllowQos=ALL AllocNodes=ALL Default={} QoS=N/A DefaultTime=NONE "
    "DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime={} MinNodes=0 LLN=NO "
    "MaxCPUsPerNode={} Nodes=x PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO "
    "OverTimeLimit=NONE PreemptMode=OFF State={} TotalCPUs=8 TotalNodes=1 SelectTypeParameters=NONE "
    "JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode={} TRES=cpu=8,mem=16000M,node=1,billing=8\n"
)
_ALL = "AllowAccounts=ALL"
_SAYS = {
    "id": "Welcome to the cluster\npmantest\n",
    "sacctmgr user": "pman|pman|chris,normal\npman|few|chris,normal\n",
    "sacctmgr qos": "normal|\nchris|1-00:00:00\n",
    "sinfo": "main|16000|8|(null)\nbigmem|512000|64|(null)\nbigmem|256000|64|(null)\ndown|16000|8|(null)\n"
    "gpu|256000|32|gpu:a100:4(S:0-1)\ngpu|128000|32|gpu:a100:8(S:0,1)\nmixed|900000|8|gpu:a100:30,gpu:v100:10\n",
    "scontrol": _PARTITION.format("main", _ALL, "YES", "UNLIMITED", "UNLIMITED", "UP", "UNLIMITED")
    + _PARTITION.format("bigmem", _ALL, "NO", "2-00:00:00", "UNLIMITED", "UP", "UNLIMITED")
    + _PARTITION.format("down", _ALL, "NO", "UNLIMITED", "UNLIMITED", "DOWN", "UNLIMITED")
    + _PARTITION.format("gpu", "AllowAccounts=pman,few", "NO", "01:30:00", "16", "UP", "200000")
    + _PARTITION.format("mixed", "DenyAccounts=pman", "NO", "01:30:00", "UNLIMITED", "UP", "UNLIMITED"),
}
NO_ACCOUNTS = "You are not running a supported accounting_storage plugin"


def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: dict[str, str]) -> None:
    """SLURM's commands behind a prefix; those that are not in `says` fail as sacctmgr does without accounts."""
    prefix = tmp_path / "prefix"
    prefix.write_text(
        f"#!{sys.executable}\nimport sys\nsaid = {says!r}\nwords = sys.argv[3:]\n"
        "name = words[0] + (' ' + words[words.index('show') + 1] if words[0] == 'sacctmgr' else '')\n"
        f"sys.stdout.write(said[name]) if name in said else sys.exit({NO_ACCOUNTS!r})\n"
    )
    prefix.chmod(0o755)
    monkeypatch.setenv("SLURM_COMMAND_PREFIX", str(prefix))


def decided(site: Path, **asked: Any) -> Job:
    renderer = Renderer(settings.load({"TEMPLATES_DIR": str(site), "STOREBASE": "/data"}), TARGETS)
    return renderer.job(validate({**SAMPLE, **asked}))


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, monkeypatch, _SAYS)
    site = tmp_path / "site"
    result = run("templates", "new", site, "--for", "slurm", "--from-cluster")
    assert (result.output, result.exit_code) == (f"{site / 'site.yaml'}\n", 0)
    checked = run("check", site)
    assert (checked.stdout, checked.exit_code) == ("", 0)
    assert checked.stderr.endswith("site: 13 checked, 0 refused, 0 unwritable, 0 findings\n")
    text = (site / "site.yaml").read_text()
    assert "#   account few of the user pmantest, with QOS chris (at most 1-00:00:00), normal\n" in text
    gpu = "its largest node has MiB: 200000, CPUs: 16, GPUs: 8 (a100)"
    assert f"#   partition gpu (UP): at most 90 min; {gpu}\n" in text
    assert "(DOWN, not open" in text
    assert "be asked" not in text

    job = decided(site)
    assert (job.partition, job.policy.account, job.policy.gpu_type) == ("main", "pman", None)
    job = decided(site, gpu_limit=2)
    assert (job.partition, job.policy.gpu_type, job.gpu_count) == ("gpu", "a100", 2)
    assert decided(site, memory_limit=16_001).partition == "bigmem"
    assert decided(site, memory_limit=900_000, partition="mixed").time_limit_minutes is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"memory_limit": 512_001}, "A node of the partition bigmem has 512000 MiB of memory at most."),
        ({"cpu_limit": 8001}, "A node of the partition main has 8000 millicores at most."),
        ({"gpu_limit": 9}, "A node of the partition gpu has 8 GPUs at most."),
        ({"partition": "bigmem", "gpu_limit": 1}, "A node of the partition bigmem has 0 GPUs at most."),
        ({"gpu_limit": 1, "time_limit_minutes": 91}, "The partition gpu ends jobs after 90 min."),
        ({"partition": "bigmem", "time_limit_minutes": 2881}, "The partition bigmem ends jobs after 2880 min."),
    ],
)
def test_what_slurm_cannot_give_is_refused(
    asked: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path, monkeypatch, _SAYS)
    run("templates", "new", tmp_path / "site", "--for", "slurm", "--from-cluster")
    with pytest.raises(Refused, match=said):
        decided(tmp_path / "site", **asked)


def test_what_slurm_does_not_say_stands_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, monkeypatch, {name: said for name, said in _SAYS.items() if name in ("id", "scontrol")})
    site = tmp_path / "site"
    assert run("templates", "new", site, "--for", "slurm", "--from-cluster").exit_code == 0
    text = (site / "site.yaml").read_text()
    for what, name in (("accounts", "sacctmgr"), ("time limits of QOS", "sacctmgr"), ("nodes", "sinfo")):
        assert f"#   {what}: {name} failed: {NO_ACCOUNTS}\n" in text
    assert decided(site, memory_limit=10**6).partition == "main"


@pytest.mark.parametrize(
    ("target", "said"),
    [("slurm", "the cluster could not be asked: who runs"), ("wdl", "works with --for k8s and --for slurm, not")],
)
def test_without_an_answer_nothing_is_written(
    target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path, monkeypatch, {})
    result = run("templates", "new", tmp_path / "site", "--for", target, "--from-cluster")
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "site").exists()


def node(name: str, gpus: str = "0", **spec: Any) -> dict[str, Any]:
    """As the API server of scripts/engines/kubernetes (1.35) shows a node, with the GPUs of NVIDIA's device plug-in.

    https://kubernetes.io/docs/tasks/manage-gpus/scheduling-gpus/.
    """
    labels = {"beta.kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "pool": "gpu" if spec else "cpu"}
    sizes = {"cpu": "7910m", "memory": "24683652Ki", "pods": "110", "nvidia.com/gpu": gpus}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec, "status": {"allocatable": sizes}}


def test_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:  # noqa: F811
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    denied = 'priorityclasses is forbidden: User "u" cannot list resource "priorityclasses" at the cluster scope'
    script.always = {
        "/nodes": (200, {}, {"items": [node("a"), node("b", "4", taints=[taint])]}),
        "/priorityclasses": (403, {}, {"message": denied}),
        "/runtimeclasses": (200, {}, {"items": [{"metadata": {"name": "nvidia"}}]}),
    }
    with urllib3.PoolManager() as pool:
        monkeypatch.setattr("pman.backends.kubernetes.discovery.connect", lambda: Endpoint(script.url, pool, dict))
        site = tmp_path / "site"
        assert run("templates", "new", site, "--for", "k8s", "--from-cluster").exit_code == 0
    text = (site / "site.yaml").read_text()
    for line in (
        "label pool: cpu, gpu", "taint nvidia.com/gpu=present:NoSchedule", "runtime_class nvidia",
        f"priority_class: pman lacks a right on Kubernetes: {denied}.",
    ):  # fmt: skip
        assert f"#   {line}\n" in text
    assert {method for method, *_ in script.asked} == {"GET"}
    checked = run("check", site, "--to", "k8s")
    assert (checked.stdout, checked.exit_code) == ("", 0)
    assert decided(site, gpu_limit=4).policy.tolerations == ({"key": "nvidia.com/gpu", "operator": "Exists"},)
    assert decided(site).policy.tolerations == ()
    for asked in ({"gpu_limit": 5}, {"cpu_limit": 7911}, {"memory_limit": 24_106}):
        with pytest.raises(Refused, match="A node of this cluster has"):
            decided(site, **asked)
