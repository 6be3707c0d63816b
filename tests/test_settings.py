"""Environment variables: what is accepted, what is said about what is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pman import backends, settings
from pman.backends import BACKENDS
from pman.errors import Misconfigured

SERVICE = {"SECRET_KEY": "0123456789abcdef", "STOREBASE": "/store"}


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("IGNORE_LIMITS", "yes", True), ("IGNORE_LIMITS", "1", True), ("IGNORE_LIMITS", "off", False),
        ("REMOVE_JOBS", "no", False), ("REMOVE_JOBS", "true", True), ("JOB_LOGS_TAIL", "7", 7),
        ("JOB_LABELS", "a=b, c=d=e,", {"a": "b", "c": "d=e"}), ("JOB_LABELS", "", {}),
        ("NODE_SELECTOR", "disk=ssd", {"disk": "ssd"}), ("IMAGE_PULL_SECRETS", "a, b,", ["a", "b"]),
        ("CONTAINER_USER", "1000:2000", "1000:2000"), ("CONTAINER_USER", "1-5:7-9", "1-5:7-9"),
        ("CONTAINER_USER", "1001:", "1001:"), ("CONTAINER_USER", ":1001", ":1001"), ("CONTAINER_USER", ":", ":"),
        ("CONTAINER_USER", "", None),
        ("SHM_SIZE", "64", 64), ("TIMELIMIT_MINUTES", "30", 30), ("STORAGE_TYPE", "nfs", "nfs"),
        ("PFCON_SELECTOR", "app=pfcon", "app=pfcon"), ("SECRET_KEY", "", None),
    ],
)  # fmt: skip
def test_values(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: Any) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(settings.load(), name.lower()) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORAGE_TYPE", "floppy"), ("IGNORE_LIMITS", "perhaps"), ("JOB_LOGS_TAIL", "-1"),
        ("JOB_LABELS", "org.chrisproject.pman.name=x"), ("JOB_LABELS", "a=b,org.chrisproject.pman.digest=x"),
        ("JOB_LABELS", "a"), ("NODE_SELECTOR", "x,y=z"), ("CONTAINER_USER", "root"), ("CONTAINER_USER", "1000"),
        ("SHM_SIZE", "0"), ("TIMELIMIT_MINUTES", "0"), ("STOREBASE", "relative"), ("PORT", "65536"),
        ("PFCON_SELECTOR", "a=b,c=d"), ("APPLICATION_MODE", "test"), ("LOG_LEVEL", "LOUD"),
        ("SECURITYCONTEXT_RUN_AS_USER", "-1"), ("CROMWELL_URL", "cromwell:8000"), ("CROMWELL_URL", "http://"),
    ],
)  # fmt: skip
def test_bad_values_are_named_by_their_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(Misconfigured, match=f"^{name}: ") as caught:
        settings.load()
    assert "\n" not in str(caught.value)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(Misconfigured, match=r"PORT: .*; .*SHM_SIZE: "):
        settings.load({"PORT": "x", "SHM_SIZE": "x"})


def test_what_a_yes_or_no_takes_is_said() -> None:
    with pytest.raises(Misconfigured, match=r"^REMOVE_JOBS: must be yes or no$"):
        settings.load({"REMOVE_JOBS": "never"})


def test_an_override_that_is_no_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(Misconfigured, match=r"STORBASE is no setting of pman; did you mean STOREBASE\?"):
        settings.load({"STORBASE": "/x"})


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"STOREBASE": "/s"}, "SECRET_KEY is required in production"),
        ({"SECRET_KEY": "x" * 20}, "STOREBASE is required with STORAGE_TYPE=host"),
        (SERVICE | {"CONTAINER_ENV": "swarm", "STORAGE_TYPE": "nfs"}, "NFS_SERVER is required"),
        (SERVICE | {"CONTAINER_ENV": "kubernetes", "STORAGE_TYPE": "kubernetes_pvc"}, "VOLUME_NAME is required"),
        (SERVICE | {"STORAGE_TYPE": "nfs", "NFS_SERVER": "n"}, "does not work with CONTAINER_ENV=local"),
        (
            SERVICE | {"CONTAINER_ENV": "swarm", "STORAGE_TYPE": "kubernetes_pvc", "VOLUME_NAME": "v"},
            "only with kubernetes",
        ),
        (SERVICE | {"CONTAINER_ENV": "cromwell", "TIMELIMIT_MINUTES": "5"}, "CROMWELL_URL is required"),
        (SERVICE | {"CONTAINER_ENV": "cromwell", "CROMWELL_URL": "http://c"}, "TIMELIMIT_MINUTES is required"),
        (SERVICE | {"TEMPLATES_DIR": "/nowhere"}, "TEMPLATES_DIR=/nowhere is no directory"),
        (SERVICE | {"CONTAINER_ENV": "docker", "DOCKER_TLS_VERIFY": "1"}, "DOCKER_CERT_PATH is required"),
        (SERVICE | {"CONTAINER_ENV": "cromwell", "CROMWELL_AUTH_USER": "u"}, "go together"),
        (SERVICE | {"CONTAINER_ENV": "mesos"}, "CONTAINER_ENV: must be one of local, cromwell, "),
    ],
)
def test_contradictions_stop_the_server(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        backends.check_for_service(settings.load(environment))
    assert sentence in str(caught.value)


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(Misconfigured) as caught:
        backends.check_for_service(settings.load({"CONTAINER_ENV": "cromwell"}))
    for name in ("SECRET_KEY", "STOREBASE", "CROMWELL_URL", "TIMELIMIT_MINUTES"):
        assert f"{name} is required" in str(caught.value)


def test_a_short_key_and_near_misses_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_ENVV", "swarm")
    warnings = backends.check_for_service(settings.load(SERVICE | {"SECRET_KEY": "short"}))
    assert any(w.startswith("SECRET_KEY is short") for w in warnings)
    assert "CONTAINER_ENVV is no setting of pman; did you mean CONTAINER_ENV?" in warnings


def test_dev_mode_needs_no_key() -> None:
    assert backends.check_for_service(settings.load({"APPLICATION_MODE": "dev", "STOREBASE": "/s"})) == []


def test_secrets_are_not_shown() -> None:
    config = settings.load(SERVICE)
    assert "0123456789abcdef" not in repr(config)
    assert "0123456789abcdef" not in settings.markdown_table(BACKENDS)


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (?:`[^`]*`)? ?\| \S.*\|$", settings.markdown_table(BACKENDS))
    assert rows == [name.upper() for name in settings.Settings.model_fields]


def test_a_user_that_has_no_effect_is_warned_about() -> None:
    base = {"SECRET_KEY": "x" * 20, "STOREBASE": "/data", "CONTAINER_USER": "1000:1000"}
    assert "CONTAINER_USER has no effect" in " ".join(backends.check_for_service(settings.load(base)))
    assert backends.check_for_service(settings.load(base | {"LOCAL_RUNTIME": "podman"})) == []
