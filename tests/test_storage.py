"""Directories that pman makes, and whose they are."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from pman import settings
from pman.errors import BadRequest
from pman.job import Job, make_job, validate
from pman.storage import prepare

REQUEST = {
    "jid": "j", "args": [], "auid": "a", "number_of_workers": 1, "cpu_limit": 1, "memory_limit": 1, "gpu_limit": 0,
    "image": "i", "entrypoint": ["sh"], "type": "fs", "input_dir": "a/b/incoming", "output_dir": "feeds/c/out",
}  # fmt: skip


def job_of(store: Path, **env: str) -> tuple[Job, settings.Settings]:
    config = settings.load({"CONTAINER_ENV": "kubernetes", "STOREBASE": str(store), **env})
    return make_job(validate(REQUEST), config), config


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
@pytest.mark.parametrize(
    ("env", "owner"),
    [
        ({}, (0, 0)),
        ({"CONTAINER_USER": "1000:1001"}, (1000, 1001)),
        ({"SECURITYCONTEXT_RUN_AS_USER": "1002"}, (1002, 0)),
        ({"SECURITYCONTEXT_RUN_AS_GROUP": "1003"}, (0, 1003)),
        ({"CONTAINER_USER": "1000:1001", "SECURITYCONTEXT_RUN_AS_USER": "1002"}, (1002, 1001)),
        ({"SECURITYCONTEXT_RUN_AS_USER": "1002", "CONTAINER_ENV": "swarm"}, (0, 0)),  # which has no such thing
    ],
)
def test_made_directories_are_the_jobs_users(tmp_path: Path, env: dict[str, str], owner: tuple[int, int]) -> None:
    """All that are made, so that the user can also remove them; none that was there."""
    (tmp_path / "feeds").mkdir()
    prepare(*job_of(tmp_path, **env))
    for made in ("a", "a/b", "a/b/incoming", "feeds/c", "feeds/c/out"):
        assert ((tmp_path / made).stat().st_uid, (tmp_path / made).stat().st_gid) == owner, made
    assert (tmp_path / "feeds").stat().st_uid == 0


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "feeds").write_text("")
    with pytest.raises(BadRequest, match="output_dir: is a file in the store, or lies below one"):
        prepare(*job_of(tmp_path))


def test_a_directory_that_cannot_be_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The job may fail of it, or not: a group or an access list may let it write. The log says so."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)  # as for a user who is not root
    caplog.set_level(logging.WARNING)
    prepare(*job_of(tmp_path, CONTAINER_USER="1000:1001"))
    assert "give it to the user 1000:1001 of the job: Operation not permitted" in caplog.text


def test_two_requests_that_make_the_same_directories(tmp_path: Path) -> None:
    """None is refused because the other one was quicker."""
    for number in range(50):
        store = tmp_path / str(number)
        store.mkdir()
        gate = threading.Barrier(4)
        errors: list[Exception] = []

        def make(store: Path = store, gate: threading.Barrier = gate, errors: list[Exception] = errors) -> None:
            gate.wait()
            try:
                prepare(*job_of(store))
            except BadRequest as error:
                errors.append(error)

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert (store / "feeds/c/out").is_dir()
