"""Files of deploy/ that no engine is needed to judge."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pman.service.server import DRAIN_SECONDS
from pman.settings import Settings
from tests.rig import ROOT

MANIFESTS = sorted(set((ROOT / "deploy/kubernetes").glob("*.yaml")) - {ROOT / "deploy/kubernetes/kustomization.yaml"})
COMPOSE = [ROOT / "deploy/compose.yml", ROOT / "deploy/compose.slurm.yml", ROOT / "compose.dev.yml"]
FOREIGN = {"JAVA_OPTS", "SLURM_CONF", "PATH", "PYTHONPATH"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_api(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_files_set_settings_that_exist(path: Path) -> None:
    for name, service in yaml.safe_load(path.read_text())["services"].items():
        for variable in service.get("environment", {}):
            known = variable.lower() in Settings.model_fields or variable in FOREIGN
            assert known or (name == "cromwell" and variable.startswith("PMAN_")), variable


@pytest.mark.parametrize("path", COMPOSE[:2], ids=lambda path: path.name)
def test_compose_files_give_pman_the_time_that_it_takes_to_end(path: Path) -> None:
    """Docker's own is 10 s; Kubernetes' is 30 s, systemd's 90 s."""
    patience = yaml.safe_load(path.read_text())["services"]["pman"]["stop_grace_period"]
    waitress_seconds = 5
    assert int(patience.removesuffix("s")) > waitress_seconds + DRAIN_SECONDS


def test_manifest_sets_settings_that_exist() -> None:
    deployment = next(yaml.safe_load_all((ROOT / "deploy/kubernetes/pman.yaml").read_text()))
    pod = deployment["spec"]["template"]["spec"]
    container, volumes = pod["containers"][0], pod["volumes"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {name.lower() for name in env} <= set(Settings.model_fields)
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {claim: mounts[name] for name, claim in claims.items()} == {env["VOLUME_NAME"]: env["STOREBASE"]}


def test_systemd_unit() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "deploy/pman.service")
    assert set(parser.sections()) == {"Unit", "Service", "Install"}
    assert parser["Service"]["ExecStart"].endswith("/bin/pman serve")
    assert parser["Service"]["KillMode"] == "process"  # jobs of the embedded backend outlive pman


@pytest.mark.slow  # needs systemd, which not every machine of the quick tests has
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "pman.service"
    unit.write_text((ROOT / "deploy/pman.service").read_text().replace("/opt/pman/bin/pman", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    about_it = [line for line in done.stderr.splitlines() if "pman.service" in line and "slurmctld" not in line]
    assert (done.returncode, about_it) == (0, [])


def test_a_build_takes_files_that_exist_and_no_others() -> None:
    """.dockerignore: nothing of a developer's checkout gets into the image, and a change of tests builds no new one."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
    copied = {name for line in lines for name in line.split()}
    for name in copied:
        assert (ROOT / name).exists(), name
    kept = {line.lstrip("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied
