"""What is sent to the engine for a POST, and what is refused before."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pman.backends import retry
from pman.backends.engine import start
from pman.errors import BackendError, BadRequest, Conflict, PmanError, TemplateError, Unreachable
from pman.job import make_job, validate
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.backends.engine.jobs import PODMAN, REQUEST, container, load, once, posted, service, task
from tests.fakes.engine import FakeEngine


def test_a_post_while_the_leader_changes(engine: FakeEngine) -> None:
    """The old leader does not know what became of it: here, the service was made."""
    backend, config = load("swarm", engine)
    service(engine, task("running"), **{"org.chrisproject.pman.digest": make_job(validate(REQUEST), config).digest})
    lost = "rpc error: code = Unknown desc = raft: failed to process the request: node lost leader status"
    engine.routes["POST /services/create"] = once(
        lambda _: (500, {"message": lost}), lambda _: (409, {"message": "name conflicts with an existing object"})
    )
    assert posted(backend, config).state is JobState.STARTED


# A container's name is no part of its body: pman gives it beside.
UNFINDABLE = (
    ("org.chrisproject.pman.name: ", "name: "), ("pman.digest: \"", "pman.digest: \"x"), ("Labels:", "- Labels:"),
    ("", "a: ["),
)  # fmt: skip


@pytest.mark.parametrize(("name", "change"), [
    *(("docker", change) for change in UNFINDABLE), *(("swarm", change) for change in UNFINDABLE),
    ("swarm", ("Labels:", "Name: another\nLabels:")),
])  # fmt: skip
def test_a_template_whose_job_could_not_be_found_again(engine: FakeEngine, name: str, change: tuple[str, str]) -> None:
    """It would run, and be a 404."""
    backend, config = load(name, engine)
    job = make_job(validate(REQUEST), config)
    spec = Renderer(config, TARGETS).render(job, name)
    with pytest.raises(TemplateError, match=re.escape(f"{TARGETS[name].template}:1: ")):
        backend.submit(job, replace(spec, text=spec.text.replace(*change, 1)))
    assert not [call for call in engine.calls if call.method == "POST"]


@pytest.mark.slow
def test_a_container_that_is_still_being_made(engine: FakeEngine) -> None:
    """Its name is taken, and nothing is there yet: another request is making it, which takes a while."""
    backend, config = load("docker", engine)
    job = make_job(validate(REQUEST), config)
    container(engine, Status="exited")
    found = engine.routes["GET /containers/chris-jid-1/json"]
    found["Config"]["Labels"]["org.chrisproject.pman.digest"] = job.digest
    until = time.monotonic() + 1
    words = 'Conflict. The container name "/chris-jid-1" is already in use by container "x".'
    engine.routes["POST /containers/create"] = lambda _: (409, {"message": words})
    engine.routes["GET /containers/chris-jid-1/json"] = lambda _: (
        (200, found) if time.monotonic() > until else (404, {"message": "No such container"})
    )
    assert posted(backend, config).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({}, Unreachable), ({"Command": ["buildah"]}, Conflict), ({"Created": "2999-01-01T00:00:00Z"}, Unreachable),
        ({"Names": ["chris-jid-10"]}, Unreachable), ({"State": "exited"}, Unreachable),
    ],
)  # fmt: skip
def test_what_podman_has_in_its_storage(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[PmanError]
) -> None:
    """Only what a killed Podman has left there is removed. The document is that of Podman 4.3 and 5.4."""
    monkeypatch.setattr(start, "NAMED_SECONDS", 0)
    monkeypatch.setattr(retry, "_BACKOFF", lambda _: 0)
    found = {"Id": "a" * 64, "Names": ["chris-jid-1"], "State": "storage", "Command": ["storage"]}
    found["Created"] = "2020-12-01T02:55:43.054066423Z"
    engine.routes["GET /version"] = PODMAN
    engine.routes["GET /libpod/containers/json"] = [found | changed]
    words = 'creating container storage: the container name "chris-jid-1" is already in use by bbb'
    engine.routes["POST /containers/create"] = lambda _: (500, {"message": words})
    with pytest.raises(error):
        posted(*load("podman", engine))
    removed = {call.path for call in engine.calls if call.method == "DELETE"}
    assert removed == ({f"/containers/{'a' * 64}"} if not changed else set())


def test_credentials_are_those_of_the_templates_image(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"mirror.example.org": {"auth": "YTpi"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    overlay = tmp_path / "overlay" / "swarm"
    overlay.mkdir(parents=True)
    (overlay / "service.yaml.j2").write_text(
        '{% extends "shipped/swarm/service.yaml.j2" %}{% set image = "mirror.example.org/pl-x:1" %}'
    )
    backend, config = load("swarm", engine, TEMPLATES_DIR=str(overlay.parent))
    engine.routes["POST /services/create"] = {"ID": "s1"}
    posted(backend, config)
    sent = engine.calls[-1]
    assert sent.body["TaskTemplate"]["ContainerSpec"]["Image"] == "mirror.example.org/pl-x:1"
    assert "X-Registry-Auth" in sent.headers


@pytest.mark.filterwarnings("ignore:docker-credential-")
def test_a_credential_helper_that_is_missing(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"registry.example.org": "pman-nowhere"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    backend, config = load("swarm", engine)
    with pytest.raises(BackendError, match=r"credentials for registry.example.org .*pman-nowhere"):
        posted(backend, config)


def test_a_credential_helper_is_asked_once_for_many_jobs(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-pman-test"
    helper.write_text(
        f"#!/bin/sh\necho asked >> {tmp_path}/asked\n"
        """echo '{"Username": "a", "Secret": "b", "ServerURL": "x"}'\n"""
    )
    helper.chmod(0o755)
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"registry.example.org": "pman-test"}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    backend, config = load("swarm", engine)
    engine.routes["POST /services/create"] = {"ID": "s1"}
    for number in range(3):
        posted(backend, config, jid=f"chris-jid-{number}")
        assert "X-Registry-Auth" in engine.calls[-1].headers
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("name", ["swarm", "docker"])
def test_an_image_that_is_no_name(engine: FakeEngine, name: str) -> None:
    backend, config = load(name, engine, PULL_POLICY="always")
    with pytest.raises(BadRequest, match="image"):
        posted(backend, config, image="-/x:1")


def test_too_many_workers_for_one_engine(engine: FakeEngine) -> None:
    backend, config = load("docker", engine)
    with pytest.raises(BadRequest, match="at most 200 workers"):
        posted(backend, config, number_of_workers=201)


@pytest.mark.parametrize("program", ['["sh", "-c"]', "[]", "null", "[" * 100_000])
def test_podman_is_sent_no_program_that_it_would_parse(engine: FakeEngine, tmp_path: Path, program: str) -> None:
    """Of a site that sets Entrypoint itself."""
    engine.routes["GET /version"] = PODMAN
    template = tmp_path / "overlay" / "docker" / "container.yaml.j2"
    template.parent.mkdir(parents=True)
    template.write_text(
        '{% extends "shipped/docker/container.yaml.j2" %}'
        "{% block container_extra %}\nEntrypoint: [{{ job.argv[0] }}]\n{% endblock %}"
    )
    with pytest.raises(BadRequest) as caught:
        posted(*load("podman", engine, TEMPLATES_DIR=str(tmp_path / "overlay")), entrypoint=[program])
    assert list(caught.value.message) == ["entrypoint"]
