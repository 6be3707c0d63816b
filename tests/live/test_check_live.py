"""`pman check --live` on the real thing: nothing is run, and what the backend says stands at the site's line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import docker
import pytest

from pman import settings
from pman.templating.render import sample_job
from tests.checking.overlays import DOCKER, K8S, SLURM, block, extending, only, run, write
from tests.conftest import development

ELSEWHERE = (
    "{% set partition = 'nowhere' %}\n",
    "invalid partition specified: nowhere allocation failure: Invalid partition name specified",
)
ASKED = "SLURM was not asked whether its nodes see STOREBASE and SLURM_STATE_DIR [not-asked]"
NO_ACCOUNTS = "SLURM was not asked about accounts and QOS: it enforces none (AccountingStorageEnforce) [not-asked]"


def told(place: Path, target: str) -> list[str]:
    result = run("check", place, "--to", target, "--live")
    return [line.replace(f"{place}/", "").replace(str(place), "") for line in result.stdout.splitlines()]


def on(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], **more: str) -> None:
    for name, value in {**env, **more}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.live("slurm")
def test_slurm_without_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, development("slurm"), CONTAINER_ENV="slurm")
    place = write(tmp_path, {SLURM: extending(SLURM, ELSEWHERE[0])})
    assert told(place, "slurm") == [
        f": note: {NO_ACCOUNTS}",
        f": note: {ASKED}",
        f"{SLURM}:2: error: SLURM would not take this: {ELSEWHERE[1]} (request: plain) [live]",
    ]
    names = subprocess.run(["squeue", "--noheader", "--format=%j"], capture_output=True, check=True).stdout.decode()
    assert sample_job(settings.load()).name not in {name.partition(".")[0] for name in names.splitlines()}


@pytest.mark.live("slurm")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--account=nobody", "Invalid account or account/partition combination specified"),
        ("--qos=golden", "Invalid qos specification"),
        ("--mem=900G", "Requested node configuration is not available"),
    ],
)
def test_slurm_with_accounts(line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = development("slurm", "--profile", "accounted")
    on(monkeypatch, engine, CONTAINER_ENV="slurm")
    block = "resources" if "mem" in line else "gpus"
    place = write(tmp_path, only(SLURM, block, f"#SBATCH {line}\n"))
    found = [finding for finding in told(place, "slurm") if "[live]" in finding]
    assert [re.sub(r"this: .*failure: ", "this: ", finding) for finding in found] == [
        f"{SLURM}:3: error: SLURM would not take this: {said} (request: plain) [live]"
    ]


@pytest.mark.live("podman")
def test_podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = development("podman")
    on(monkeypatch, engine, CONTAINER_ENV="podman", DOCKER_HOST=engine["PODMAN_DOCKER_HOST"])
    place = write(tmp_path, {DOCKER: extending(DOCKER), "site.yaml": "a: 1\ndocker_network: chris-net\n"})
    image = "docker.io/fnndsc/pl-simpledsapp:2.1.0"
    assert told(place, "docker") == [
        f": note: Podman has no image {image}, and cannot be asked whether its registry has it [not-asked]",
        "site.yaml:2: error: the engine has no network chris-net (request: plain) [live]",
    ]


@pytest.mark.live("swarm")
@pytest.mark.parametrize("backend", ["docker", "swarm"])
def test_docker(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is asked for the networks and the image, and its registry for an image that it does not have."""
    engine = development("swarm")
    development("swarm", command=("start", "registry"))
    on(monkeypatch, engine, CONTAINER_ENV=backend)
    pushed, missing = "127.0.0.1:5000/checked:1", "127.0.0.1:5000/missing:1"
    network = f"checked-{backend}"
    with docker.APIClient(base_url=engine["DOCKER_HOST"]) as api:
        api.tag(engine["PMAN_TEST_IMAGE"], *pushed.rsplit(":", 1))
        api.push(pushed)
        api.remove_image(pushed)
        api.create_network(network, driver="overlay" if backend == "swarm" else "bridge")
        before = api.images(), api.services()
        try:
            found = [
                told(sited(tmp_path / f"{number}", image, name), backend)
                for number, (image, name) in enumerate(
                    [(engine["PMAN_TEST_IMAGE"], network), (pushed, network), (missing, "chris-net")]
                )
            ]
            assert (api.images(), api.services()) == before  # nothing was pulled
        finally:
            api.remove_network(network)
    assert found[:2] == [[], []]
    absent, no_network = found[2]
    assert absent.startswith(f"site.yaml:4: error: the engine has no image {missing}, nor has the registry: ")
    assert "manifest unknown" in absent
    assert no_network == "site.yaml:5: error: the engine has no network chris-net (request: plain) [live]"


def sited(place: Path, image: str, network: str) -> Path:
    """A site whose rule sets the image in line 4 and the network in line 5."""
    rule = f"  - name: all\n    set: {{image: '{image}',\n      networks: [{network}]}}\n"
    place.mkdir()
    return write(place, {"site.yaml": f"policy:\n  rules:\n{rule}"})


@pytest.mark.live("kubernetes")
def test_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = development("kubernetes")
    on(monkeypatch, engine, CONTAINER_ENV="kubernetes")
    blocks = (
        block("job_spec_extra", "  podReplacementPolicy: Never\n"),
        block("service_account", "      serviceAccountName: robot\n"),
    )
    place = write(tmp_path, {K8S: extending(K8S, *blocks)})
    asked = "Kubernetes was not asked whether images, claims and secrets exist, and whether a node fits"
    assert told(place, "k8s") == [
        f": note: {asked} [not-asked]",
        f'{K8S}:3: error: Kubernetes refuses this Job: spec.podReplacementPolicy: Unsupported value: "Never": '
        'supported values: "Failed". (request: plain) [live]',
        f'{K8S}:6: error: Kubernetes refuses this pod: pods "pman-probe" is forbidden: error looking up '
        'service account default/robot: serviceaccount "robot" not found. (request: plain) [live]',
    ]
    for kind in ("jobs", "pods"):
        ran = subprocess.run([engine["KUBECTL"], "get", kind, "--output=name"], capture_output=True, check=True)
        assert b"chris-jid-1" not in ran.stdout + ran.stderr
        assert b"pman-probe" not in ran.stdout


@pytest.mark.live("slurm")
def test_what_slurm_says_of_itself_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, development("slurm", "--profile", "accounted"), CONTAINER_ENV="slurm")
    place = tmp_path / "site"
    assert run("templates", "new", place, "--for", "slurm", "--from-cluster").exit_code == 0
    text = (place / "site.yaml").read_text()
    assert "partition short (UP): at most 1 min; its largest node has MiB: 16000, CPUs: 8, GPUs: 4\n" in text
    assert "      set: {account: pman}\n" in text
    assert "be asked:" not in text
    assert told(place, "slurm") == [f": note: {ASKED}"]


@pytest.mark.live("kubernetes")
def test_what_kubernetes_says_of_itself_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, development("kubernetes"), CONTAINER_ENV="kubernetes")
    place = tmp_path / "site"
    assert run("templates", "new", place, "--for", "k8s", "--from-cluster").exit_code == 0
    text = (place / "site.yaml").read_text()
    assert "#   priority_class system-node-critical\n" in text
    assert "be asked:" not in text
    assert [line.partition(": ")[2][:27] for line in told(place, "k8s")] == ["note: Kubernetes was not as"]
