"""The example sites: recorded whole, silent under `pman check`, and true to every request.

Record anew after an intended change: PMAN_RECORD_GOLDEN=1 pytest tests/checking/test_sites.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values
from hypothesis import assume, given
from hypothesis import strategies as st

from pman import checking, job, settings
from pman.checking import overlay
from pman.errors import Refused
from pman.targets import TARGETS, judge
from pman.templating import render
from tests import deliver
from tests.deliver import PRINT_BOTH
from tests.generate import requests
from tests.rig import ROOT
from tests.templating.test_roundtrip import directory, expected_argv, sbatch_options, unwritable_in_wdl
from tests.test_golden import FILES, GOLDEN, compare

SITES = ROOT / "examples" / "sites"
NAMES = sorted(path.name for path in SITES.iterdir() if path.is_dir())
STORE = "/data/store"
RECORD = "PMAN_RECORD_GOLDEN=1 pytest tests/checking/test_sites.py"
USERS = ("alice", "bob", "carol")
APPS = ("fshack:1.3", "simpledsapp:2.1.0", "dircopy")


class Site:
    """An example's overlay with its settings."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, SITES / name
        own = {key: value or "" for key, value in dotenv_values(self.path / "settings.env").items()}
        self.environment = {"STOREBASE": STORE, **own, "TEMPLATES_DIR": str(self.path)}
        self.settings = settings.load(self.environment)
        self.renderer = render.Renderer(self.settings, TARGETS)
        self.targets = overlay.Overlay(self.renderer).targets()

    def __call__(self, request: dict[str, Any], target: str) -> render.Spec:
        return self.renderer.render(self.renderer.job(job.validate(request)), target)

    def recorded_requests(self) -> dict[str, dict[str, Any]]:
        own = {path.stem: json.loads(path.read_text()) for path in (self.path / "requests").glob("*.json")}
        return {"plain": dict(render.SAMPLE), **own}


EXAMPLES = {name: Site(name) for name in NAMES}
CASES = [(n, t, r) for n, s in EXAMPLES.items() for t in s.targets for r in s.recorded_requests()]


@pytest.mark.parametrize(("name", "target", "request_name"), CASES, ids=["/".join(case) for case in CASES])
def test_rendered_text_is_as_recorded(name: str, target: str, request_name: str) -> None:
    example = EXAMPLES[name]
    spec = example(example.recorded_requests()[request_name], target)
    assert judge(spec) == []
    compare(GOLDEN / "sites" / name / request_name / f"{target}-{FILES[target]}", spec.text, RECORD)


def test_nothing_else_is_recorded() -> None:
    known = {GOLDEN / "sites" / n / r / f"{t}-{FILES[t]}" for n, t, r in CASES}
    assert {path for path in (GOLDEN / "sites").rglob("*") if path.is_file()} - known == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_check_is_silent(name: str) -> None:
    example = EXAMPLES[name]
    run = checking.SiteCheck(example.path)
    assert run.findings() == []
    assert run.counts["checked"] >= 10


def test_every_example_is_listed_and_explained() -> None:
    listed = (SITES / "README.md").read_text()
    assert [name for name in NAMES if f"| {name} |" not in listed] == []
    assert all((SITES / name / "README.md").is_file() and (SITES / name / "site.yaml").is_file() for name in NAMES)


# -- hypothesis: 500 requests through every example ----------------------------------------------------------------


@st.composite
def site_requests(draw: st.DrawFn) -> dict[str, Any]:
    """Hostile requests of users and images that the example sites have rules for."""
    request = draw(requests(entrypoint=PRINT_BOTH))
    image = draw(st.sampled_from(["docker.io/", "ghcr.io/"])) + "fnndsc/pl-" + draw(st.sampled_from(APPS))
    return request | {"auid": draw(st.sampled_from(USERS)), "image": image}


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the examples call: modules do nothing, runtimes say how they were called."""
    place = tmp_path_factory.mktemp("programs")
    for name in ("module", "ch-image"):
        (place / name).write_text("#!/bin/sh\nexit 0\n")
    (place / "profile").write_text('module() { echo "$PROFILE_LEVEL$1" >/dev/null; }\n')  # as careless as real ones
    for name in ("apptainer", "ch-run"):
        (place / name).write_text("#!/bin/sh\nexec printf '%s\\0' \"$@\"\n")
    for path in place.iterdir():
        path.chmod(0o755)
    PATH["PATH"] = f"{place}:{os.environ['PATH']}"
    return place


PATH: dict[str, str] = {}


def image_of(request: dict[str, Any], name: str) -> str:
    image: str = request["image"]
    if name in ("apptainer-mirror", "docker-workstation") and image.startswith("docker.io/"):
        return f"mirror.example.org:5000/{image.removeprefix('docker.io/')}"
    if name == "cromwell-apptainer":
        return f"/software/images/{image.removeprefix('docker.io/').replace('/', '%').replace(':', '+')}.sif"
    return image


def partition_of(request: dict[str, Any], name: str) -> str | None:
    """The rules of the examples, said once more."""
    alice, gpus, large = request["auid"] == "alice", request["gpu_limit"] > 0, request["memory_limit"]
    asked: str | None = request.get("partition")
    if name in ("cromwell-policy", "slurm-accounts"):
        return "gpu" if gpus else "highmem" if large > 128_000 else asked or "normal"
    if name == "partition-rules" and alice:
        return "neuro-gpu" if gpus else "neuro"
    if name == "partition-rules" and request["image"].startswith("docker.io/fnndsc/pl-fshack"):
        return "long"
    if name == "partition-rules":
        return "gpu" if gpus else "highmem" if large >= 128_000 else asked or "normal"
    return asked


ACCOUNTS = {"alice": "neuro", "bob": "cardio", "carol": "chris"}


def check_wdl(name: str, request: dict[str, Any]) -> None:
    spec = EXAMPLES[name](request, "wdl")
    runtime = deliver.wdl_runtime(spec.text)
    env, words = deliver.both(deliver.run(deliver.cromwell_script(spec.text), "bash", **PATH))
    assert [*PRINT_BOTH, *words] == expected_argv(request)
    assert deliver.expected_env(request).items() <= env.items()
    assert runtime["incoming"] == directory(request, "input_dir", STORE)
    assert runtime["outgoing"] == directory(request, "output_dir", STORE)
    assert (runtime["cpu"], runtime["memory"]) == (-(-request["cpu_limit"] // 1000), f"{request['memory_limit']} MiB")
    assert (runtime["gpu_limit"], runtime["number_of_workers"]) == (request["gpu_limit"], request["number_of_workers"])
    assert runtime["image"] == runtime.get("docker", runtime["image"]) == image_of(request, name)
    assert runtime.get("slurm_partition") == partition_of(request, name)
    if name == "cromwell-policy":
        rules = {"docker.io/fnndsc/pl-fshack:1.3": 1440, "docker.io/fnndsc/pl-simpledsapp:2.1.0": 10}
        assert runtime.get("timelimit") == rules.get(request["image"], request.get("time_limit_minutes"))
        assert runtime["slurm_account"] == ACCOUNTS[request["auid"]]
    else:
        assert runtime.get("timelimit") == request.get("time_limit_minutes")


def check_slurm(name: str, request: dict[str, Any]) -> None:
    spec = EXAMPLES[name](request, "slurm")
    script = deliver.supervised(spec.text).replace(". /etc/profile\n", f". {PATH['PATH'].partition(':')[0]}/profile\n")
    printed = deliver.words(deliver.run(script, "bash", "worker", SLURM_PROCID="0", **PATH))
    expected = expected_argv(request)
    assert printed[-len(expected) :] == expected
    before = printed[: -len(expected)]
    entries = [f"{name}={value}" for name, value in deliver.expected_env(request).items()]
    assert before[len(before) - len(entries) :] == entries
    image = image_of(request, name)
    (chosen,) = re.findall(r"(?m)^image=(.*)$", spec.text)
    assert {image, f"docker://{image}"} & {*before, *shlex.split(chosen)}
    for field, target, mode in (("input_dir", "/share/incoming", "ro"), ("output_dir", "/share/outgoing", "")):
        source = directory(request, field, STORE)
        doubled = source.replace('"', '""')
        bound = f"{source}:{target}:{mode}" if mode and name != "charliecloud" else f"{source}:{target}"
        mounted = f'type=bind,"src={doubled}","dst={target}"{mode and "," + mode}'
        assert {bound, mounted} & set(before)
    check_sbatch(name, request, sbatch_options(spec.text))


def check_sbatch(name: str, request: dict[str, Any], options: dict[str, str]) -> None:
    workers, memory, gpus = request["number_of_workers"], request["memory_limit"], request["gpu_limit"]
    cores = -(-request["cpu_limit"] // 1000)
    assert (options["ntasks"], options["cpus-per-task"]) == (str(workers), str(cores))
    one = {"mem": f"{memory}M"} if workers == 1 else {"mem-per-cpu": f"{-(-memory // cores)}M"}
    typed = f"a100:{gpus}" if name == "slurm-accounts" else str(gpus)
    one |= ({"gres": f"gpu:{typed}"} if workers == 1 else {"gpus-per-task": typed}) if gpus else {}
    asked = ("mem", "mem-per-cpu", "gres", "gpus-per-task")
    assert {option: value for option, value in options.items() if option in asked} == one
    assert options.get("time") == (str(request["time_limit_minutes"]) if "time_limit_minutes" in request else None)
    assert options.get("partition") == partition_of(request, name)
    if name == "slurm-accounts":
        assert options["account"] == ACCOUNTS[request["auid"]]
        assert options.get("qos") == ("short" if request.get("time_limit_minutes", 99) <= 30 else None)


def check_kubernetes(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_kubernetes(EXAMPLES[name](request, "k8s"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    assert (found.incoming, found.outgoing) == tuple(directory(request, d, STORE) for d in ("input_dir", "output_dir"))
    pod = found.fields["spec"]["template"]["spec"]
    gpus = {"nvidia.com/gpu": request["gpu_limit"]} if request["gpu_limit"] else {}
    limits = {"cpu": f"{request['cpu_limit']}m", "memory": f"{request['memory_limit']}Mi"}
    assert pod["containers"][0]["resources"] == {"requests": limits, "limits": limits | gpus}
    assert pod["activeDeadlineSeconds"] == request.get("time_limit_minutes", 10080) * 60
    if name == "kubernetes-gpu-nodes":
        assert pod["priorityClassName"] == "chris-jobs"
        assert ("tolerations" in pod, "runtimeClassName" in pod) == (bool(request["gpu_limit"]),) * 2
        assert pod["securityContext"]["fsGroup"] == 2000
        assert found.env["TZ"] == deliver.expected_env(request).get("TZ", "Europe/Zurich")


def check_swarm(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_swarm(EXAMPLES[name](request, "swarm"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    assert found.env["TZ"] == deliver.expected_env(request).get("TZ", "Europe/Zurich")
    assert (found.incoming, found.outgoing) == tuple(directory(request, d, STORE) for d in ("input_dir", "output_dir"))
    given = found.fields["TaskTemplate"]["Resources"]
    limits = {"NanoCPUs": request["cpu_limit"] * 10**6, "MemoryBytes": request["memory_limit"] << 20}
    gpus = {"DiscreteResourceSpec": {"Kind": "NVIDIA-GPU", "Value": request["gpu_limit"]}}
    assert given["Limits"] == limits
    assert given["Reservations"] == limits | ({"GenericResources": [gpus]} if request["gpu_limit"] else {})


def check_docker(name: str, request: dict[str, Any]) -> None:
    found = deliver.of_docker(EXAMPLES[name](request, "docker"))
    assert found.argv == expected_argv(request)
    assert deliver.expected_env(request).items() <= found.env.items()
    assert (found.incoming, found.outgoing) == tuple(directory(request, d, STORE) for d in ("input_dir", "output_dir"))
    assert found.image == image_of(request, name)
    host = found.fields["HostConfig"]
    assert (host["NanoCpus"], host["MemoryReservation"]) == (
        request["cpu_limit"] * 10**6,
        request["memory_limit"] << 20,
    )
    gpus = [{"Count": request["gpu_limit"], "Capabilities": [["gpu"]]}] if request["gpu_limit"] else []
    assert host.get("DeviceRequests", []) == gpus
    assert host["NetworkMode"] == "none"


CHECKS = {
    "wdl": check_wdl, "slurm": check_slurm, "k8s": check_kubernetes, "swarm": check_swarm, "docker": check_docker,
}  # fmt: skip
# Rules that refuse, or change what is asked for: their outcome is recorded, and tests/templating has the rest.
RULED = ("image-allowlist", "hospital-allowlist", "burst-partition", "group-accounts", "typed-gpus", "preemptible")
OPEN = [(name, target) for name, s in EXAMPLES.items() if name not in RULED for target in s.targets]


def is_refused_by_the_language(target: str, request: dict[str, Any]) -> bool:
    """WDL carries no line break in a directory; no container runtime binds one with a colon or a comma."""
    directories = [directory(request, name, STORE) for name in ("input_dir", "output_dir")]
    bound = target == "slurm" and any(c in path for path in directories for c in ":,")
    return bound or (target == "wdl" and unwritable_in_wdl(request))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), OPEN, ids=["/".join(case) for case in OPEN])
@given(request_=site_requests())
def test_every_request_arrives(name: str, target: str, request_: dict[str, Any]) -> None:
    assume(not is_refused_by_the_language(target, request_))
    CHECKS[target](name, request_)


@pytest.mark.slow
@pytest.mark.parametrize("target", EXAMPLES["image-allowlist"].targets)
@given(request_=requests(entrypoint=PRINT_BOTH), allowed=st.booleans())
def test_the_allowlist_refuses_or_delivers(target: str, request_: dict[str, Any], allowed: bool) -> None:
    request_ |= {"image": "docker.io/fnndsc/pl-dircopy"} if allowed else {}
    request_ |= {"gpu_limit": request_["gpu_limit"] % 6}
    assume(not is_refused_by_the_language(target, request_))
    if not allowed or request_["gpu_limit"] > 4:
        with pytest.raises(Refused, match="allowed here"):
            EXAMPLES["image-allowlist"](request_, target)
    else:
        CHECKS[target]("image-allowlist", request_)
