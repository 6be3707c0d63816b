"""The example sites: recorded whole, silent under `pman check`, and true to every request.

Record anew after an intended change: PMAN_RECORD_GOLDEN=1 pytest tests/test_sites.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st

from pman import check, job, overlay, render, settings, site
from pman.errors import Refused
from tests import deliver
from tests.deliver import PRINT_ARGV
from tests.generate import requests
from tests.rig import ROOT
from tests.test_golden import FILES, GOLDEN, compare
from tests.test_roundtrip import directory, expected_argv, sbatch_options, unwritable_in_wdl

SITES = ROOT / "examples" / "sites"
NAMES = sorted(path.name for path in SITES.iterdir() if path.is_dir())
STORE = "/data/store"
RECORD = "PMAN_RECORD_GOLDEN=1 pytest tests/test_sites.py"
USERS = ("alice", "bob", "carol")
APPS = ("fshack:1.3", "simpledsapp:2.1.0", "dircopy")


class Site:
    """An example's overlay with its settings."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, SITES / name
        own = {key: value or "" for key, value in dotenv_values(self.path / "settings.env").items()}
        self.environment = {"STOREBASE": STORE, **own, "TEMPLATES_DIR": str(self.path)}
        self.settings = settings.load(self.environment)
        self.renderer = render.Renderer(self.settings)
        self.targets = overlay.Overlay(self.renderer, self.path).targets()

    def __call__(self, request: dict[str, Any], target: str) -> render.Spec:
        return self.renderer.render(job.make_job(job.validate(request), self.settings), target)

    def recorded_requests(self) -> dict[str, dict[str, Any]]:
        own = {path.stem: json.loads(path.read_text()) for path in (self.path / "requests").glob("*.json")}
        return {"plain": dict(site.PLAIN), **own}


EXAMPLES = {name: Site(name) for name in NAMES}
CASES = [(n, t, r) for n, s in EXAMPLES.items() for t in s.targets for r in s.recorded_requests()]


@pytest.mark.parametrize(("name", "target", "request_name"), CASES, ids=["/".join(case) for case in CASES])
def test_rendered_text_is_as_recorded(name: str, target: str, request_name: str) -> None:
    example = EXAMPLES[name]
    spec = example(example.recorded_requests()[request_name], target)
    assert check.judge(spec) == []
    compare(GOLDEN / "sites" / name / request_name / f"{target}-{FILES[target]}", spec.text, RECORD)


def test_nothing_else_is_recorded() -> None:
    known = {GOLDEN / "sites" / n / r / f"{t}-{FILES[t]}" for n, t, r in CASES}
    assert {path for path in (GOLDEN / "sites").rglob("*") if path.is_file()} - known == set()


@pytest.mark.parametrize("name", NAMES)
def test_check_is_silent(name: str) -> None:
    example = EXAMPLES[name]
    run = site.SiteCheck(example.path)
    assert run.findings() == []
    assert run.rendered >= 10


def test_every_example_is_listed_and_explained() -> None:
    listed = (SITES / "README.md").read_text()
    assert [name for name in NAMES if f"| {name} |" not in listed] == []
    assert all((SITES / name / "README.md").is_file() and (SITES / name / "site.yaml").is_file() for name in NAMES)


# -- hypothesis: 500 requests through every example ----------------------------------------------------------------


@st.composite
def site_requests(draw: st.DrawFn) -> dict[str, Any]:
    """Hostile requests of users and images that the example sites have rules for."""
    request = draw(requests(entrypoint=PRINT_ARGV))
    image = draw(st.sampled_from(["docker.io/", "ghcr.io/"])) + "fnndsc/pl-" + draw(st.sampled_from(APPS))
    return request | {"auid": draw(st.sampled_from(USERS)), "image": image}


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the examples call: modules do nothing, runtimes say how they were called."""
    place = tmp_path_factory.mktemp("programs")
    for name in ("module", "ch-image"):
        (place / name).write_text("#!/bin/sh\nexit 0\n")
    for name in ("apptainer", "ch-run"):
        (place / name).write_text("#!/bin/sh\nexec printf '%s\\0' \"$@\"\n")
    for path in place.iterdir():
        path.chmod(0o755)
    PATH["PATH"] = f"{place}:{os.environ['PATH']}"
    return place


PATH: dict[str, str] = {}


def image_of(request: dict[str, Any], name: str) -> str:
    mirrored = name in ("apptainer-mirror", "docker-workstation")
    return f"mirror.example.org:5000/{request['image'].removeprefix('docker.io/')}" if mirrored else request["image"]


def partition_of(request: dict[str, Any]) -> str:
    """The rule of cromwell-policy and slurm-accounts, said once more."""
    if request["gpu_limit"]:
        return "gpu"
    return "highmem" if request["memory_limit"] > 128_000 else request.get("partition", "normal")


ACCOUNTS = {"alice": "neuro", "bob": "cardio", "carol": "chris"}


def check_wdl(name: str, request: dict[str, Any]) -> None:
    spec = EXAMPLES[name](request, "wdl")
    runtime = deliver.wdl_runtime(spec.text)
    words = deliver.words(deliver.run(deliver.cromwell_script(spec.text), "bash", **PATH))
    assert words == expected_argv(request)[len(PRINT_ARGV) :]
    assert runtime["incoming"] == directory(request, "input_dir", STORE)
    assert runtime["outgoing"] == directory(request, "output_dir", STORE)
    assert (runtime["cpu"], runtime["memory"]) == (-(-request["cpu_limit"] // 1000), f"{request['memory_limit']} MiB")
    assert runtime["gpu_limit"] == request["gpu_limit"]
    assert runtime["image"] == image_of(request, name)
    if name == "cromwell-policy":
        rules = {"docker.io/fnndsc/pl-fshack:1.3": 1440, "docker.io/fnndsc/pl-simpledsapp:2.1.0": 10}
        assert runtime.get("timelimit") == rules.get(request["image"], request.get("time_limit_minutes"))
        assert runtime["slurm_partition"] == partition_of(request)
        assert runtime["slurm_account"] == ACCOUNTS[request["auid"]]
    else:
        assert runtime.get("timelimit") == request.get("time_limit_minutes")


def check_slurm(name: str, request: dict[str, Any]) -> None:
    spec = EXAMPLES[name](request, "slurm")
    printed = deliver.words(deliver.run(deliver.supervised(spec.text), "bash", "worker", SLURM_PROCID="0", **PATH))
    expected = expected_argv(request)
    assert printed[-len(expected) :] == expected
    before = printed[: -len(expected)]
    entries = [f"{name}={value}" for name, value in deliver.expected_env(request).items()]
    assert before[len(before) - len(entries) :] == entries
    image = image_of(request, name)
    assert image in before or f"docker://{image}" in before
    assert f"{directory(request, 'output_dir', STORE)}:/share/outgoing" in before
    options = sbatch_options(spec.text)
    assert options["cpus-per-task"] == str(-(-request["cpu_limit"] // 1000))
    assert options.get("time") == (str(request["time_limit_minutes"]) if "time_limit_minutes" in request else None)
    if name == "slurm-accounts":
        assert options["partition"] == partition_of(request)
        assert options["account"] == ACCOUNTS[request["auid"]]
        assert options.get("qos") == ("short" if request.get("time_limit_minutes", 99) <= 30 else None)


def check_kubernetes(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_kubernetes(EXAMPLES[name](request, "k8s"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    limits = found.fields["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["memory"]) == (f"{request['cpu_limit']}m", f"{request['memory_limit']}Mi")
    pod = found.fields["spec"]["template"]["spec"]
    assert pod["activeDeadlineSeconds"] == request.get("time_limit_minutes", 10080) * 60
    if name == "kubernetes-gpu-nodes":
        assert pod["priorityClassName"] == "chris-jobs"
        assert ("tolerations" in pod, "runtimeClassName" in pod) == (bool(request["gpu_limit"]),) * 2
        assert pod["securityContext"]["fsGroup"] == 2000
        assert found.env["TZ"] == "Europe/Zurich"


def check_swarm(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_swarm(EXAMPLES[name](request, "swarm"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    limits = found.fields["TaskTemplate"]["Resources"]["Limits"]
    assert limits == {"NanoCPUs": request["cpu_limit"] * 10**6, "MemoryBytes": request["memory_limit"] << 20}


def check_docker(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_docker(EXAMPLES[name](request, "docker"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    assert found.image == image_of(request, name)
    host = found.fields["HostConfig"]
    assert (host["NanoCpus"], host["Memory"]) == (request["cpu_limit"] * 10**6, request["memory_limit"] << 20)
    assert host["NetworkMode"] == "none"


CHECKS = {
    "wdl": check_wdl, "slurm": check_slurm, "k8s": check_kubernetes, "swarm": check_swarm, "docker": check_docker,
}  # fmt: skip
OPEN = [(name, target) for name, s in EXAMPLES.items() if name != "image-allowlist" for target in s.targets]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), OPEN, ids=["/".join(case) for case in OPEN])
@given(request_=site_requests())
def test_every_request_arrives(name: str, target: str, request_: dict[str, Any]) -> None:
    if target == "wdl" and unwritable_in_wdl(request_):
        return
    if target == "slurm" and any(
        c in f"{directory(request_, d, STORE)}" for d in ("input_dir", "output_dir") for c in ":,"
    ):
        return  # refused by the script itself, with words: no container runtime can bind such a directory
    CHECKS[target](name, request_)


@pytest.mark.slow
@pytest.mark.parametrize("target", EXAMPLES["image-allowlist"].targets)
@given(request_=requests(entrypoint=PRINT_ARGV), allowed=st.booleans())
def test_the_allowlist_refuses_or_delivers(target: str, request_: dict[str, Any], allowed: bool) -> None:
    example = EXAMPLES["image-allowlist"]
    request_ |= {"image": "docker.io/fnndsc/pl-dircopy"} if allowed else {}
    if target == "wdl" and unwritable_in_wdl(request_):
        return
    if not allowed or request_["gpu_limit"] > 4:
        with pytest.raises(Refused, match="allowed here"):
            example(request_, target)
    elif target != "slurm":
        CHECKS[target]("image-allowlist", request_)
    else:
        assert check.judge(example(request_, target)) == []
