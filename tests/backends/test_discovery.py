"""What backends say of themselves: the rules of `pman templates new --from-cluster`, and the page of the backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import urllib3

from pman import backends, settings
from pman.backends.discovery import Overview, Place
from pman.backends.kubernetes import discovery as kubernetes_discovery
from pman.backends.kubernetes.api import Api, Endpoint
from pman.backends.slurm import discovery as slurm_discovery
from pman.backends.slurm.commands import Commands
from pman.errors import Refused
from pman.job import Job, validate
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer
from tests.backends.kubernetes.conftest import script  # noqa: F401 - a fixture
from tests.backends.kubernetes.script import Script
from tests.checking.overlays import run
from tests.fakes.engine import FakeEngine

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
        "name += ' --version' if '--version' in words else ' %F' if words[-1].endswith('%F') else ''\n"
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


def partitions(seen: Overview) -> dict[str, Place]:
    return {place.name: place for place in seen.places}


def test_the_page_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = "main|1/3/0/4\nbigmem|2/0/1/3\n"
    slurm(tmp_path, monkeypatch, {**_SAYS, "sinfo --version": "Welcome\nslurm-wlm 22.05.8\n", "sinfo %F": idle})
    seen = slurm_discovery.overview(Commands([str(tmp_path / "prefix")], 20))
    assert (seen.version, seen.unasked) == ("SLURM 22.05.8", [])
    found = partitions(seen)
    assert found["main"] == Place("main", "partition", "UP", 8, 16_000, 0, None, "the default; 3 of 4 nodes are idle")
    assert found["gpu"] == Place("gpu", "partition", "UP", 16, 200_000, 8, 90, "types of GPUs: a100")
    assert found["down"].state == "DOWN"


def test_the_page_of_slurm_says_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, monkeypatch, {"scontrol": _SAYS["scontrol"]})
    seen = slurm_discovery.overview(Commands([str(tmp_path / "prefix")], 20))
    asked = [line.partition(":")[0] for line in seen.unasked]
    assert asked == ["its version", "idle nodes", "nodes"]
    found = partitions(seen)["gpu"]
    assert (found.cpus, found.memory_mib, found.gpus, found.time_limit_minutes) == (None, None, None, 90)


def test_the_page_of_kubernetes(script: Script) -> None:  # noqa: F811
    ready, unready = ({"conditions": [{"type": "Ready", "status": status}]} for status in ("True", "Unknown"))
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    nodes = [node("a"), node("b", "4", taints=[taint])]
    nodes[0]["status"] |= ready
    nodes[1]["status"] |= unready
    script.always = {
        "/version": (200, {}, {"gitVersion": "v1.35.0"}),
        "/api/v1/nodes?limit=500": (200, {}, {"items": nodes, "metadata": {"continue": "abc"}}),
    }
    with urllib3.PoolManager() as pool:
        seen = kubernetes_discovery.overview(Api(lambda: Endpoint(script.url, pool, dict)), kubernetes_discovery.GPU)
    assert seen.version == "Kubernetes v1.35.0"
    assert seen.unasked == ["all nodes but the first 500, since there are so many"]
    assert seen.places == [
        Place("a", "node", "Ready", 7.91, 24_105, 0),
        Place("b", "node", "not ready", 7.91, 24_105, 4, note="taints: nvidia.com/gpu:NoSchedule"),
    ]


def test_the_page_of_kubernetes_without_the_right_to_see_nodes(script: Script) -> None:  # noqa: F811
    denied = 'nodes is forbidden: User "u" cannot list resource "nodes" in API group "" at the cluster scope'
    script.always = {"/version": (200, {}, {"gitVersion": "v1.35.0"}), "/nodes": (403, {}, {"message": denied})}
    with urllib3.PoolManager() as pool:
        seen = kubernetes_discovery.overview(Api(lambda: Endpoint(script.url, pool, dict)), kubernetes_discovery.GPU)
    assert (seen.places, seen.unasked) == ([], [f"nodes: pman lacks a right on Kubernetes: {denied}."])


# Measured on Podman 4.3 and Docker 20.10 (scripts/engines/podman, swarm), with generic resources as
# https://docs.docker.com/reference/api/engine/version/v1.45/#tag/Node/operation/NodeList has them.
_INFO = {"Name": "login1", "NCPU": 8, "MemTotal": 16_000 << 20, "ServerVersion": "20.10.24"}
_GPUS = [
    {"NamedResourceSpec": {"Kind": "NVIDIA-GPU", "Value": "GPU-1"}},
    {"NamedResourceSpec": {"Kind": "NVIDIA-GPU", "Value": "GPU-2"}},
    {"DiscreteResourceSpec": {"Kind": "SSD", "Value": 3}},
]
_NODES = [
    {
        "ID": "abc", "Spec": {"Role": "manager", "Availability": "drain"}, "Status": {"State": "ready"},
        "Description": {"Hostname": "m1", "Resources": {"NanoCPUs": 8 * 10**9, "MemoryBytes": 16_000 << 20}},
    },
    {
        "ID": "def", "Spec": {"Role": "worker", "Availability": "active"}, "Status": {"State": "down"},
        "Description": {"Hostname": "w1", "Resources": {"NanoCPUs": 5 * 10**8, "GenericResources": _GPUS}},
    },
]  # fmt: skip


def test_the_page_of_engines(tmp_path: Path) -> None:
    with FakeEngine(tmp_path / "engine.sock") as engine:
        engine.routes["GET /nodes"] = _NODES
        config = {"DOCKER_HOST": engine.url, "STOREBASE": "/data"}
        engine.routes["GET /info"] = {**_INFO, "Swarm": {"ControlAvailable": True}}
        one = backends.load(settings.load(config | {"CONTAINER_ENV": "docker"})).overview()
        manager = backends.load(settings.load(config | {"CONTAINER_ENV": "swarm"}))
        swarm = manager.overview()
        engine.routes.clear()
        silent = manager.overview()
    assert (one.version, one.unasked) == ("Docker 20.10.24", ["GPUs: Docker does not say which it has"])
    assert one.places == [Place("login1", "node", "up", 8, 16_000)]
    assert swarm.places == [
        Place("m1", "node", "ready, drain", 8, 16_000, 0, note="manager"),
        Place("w1", "node", "down, active", 0.5, None, 2, note="worker"),
    ]
    assert (silent.version, silent.places) == ("", [])
    assert [line.partition(":")[0] for line in silent.unasked] == ["the engine", "nodes"]


def test_the_page_of_a_cromwell_that_is_away() -> None:
    config = {"CONTAINER_ENV": "cromwell", "TIMELIMIT_MINUTES": "5", "CROMWELL_URL": "http://127.0.0.1:9"}
    seen = backends.load(settings.load(config)).overview()
    assert seen.places == []
    assert [line.partition(":")[0] for line in seen.unasked] == ["its version", "its backends", "partitions and nodes"]
