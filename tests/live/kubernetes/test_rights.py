"""The rights of pman, each of which is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.live.kubernetes.cluster import IMPATIENT, PUBLIC_CHART, kubernetes_rig, namespace, ready, role, wait_message
from tests.rig import COUNTED, Server, running, wait_for

pytestmark = pytest.mark.live("kubernetes")


def test_every_right_is_needed(tmp_path: Path) -> None:
    """Without any one of them /readyz and the call that needs it name it, as verb and resource."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(STUCK_JOB_PATIENCE_MINUTES="15")
        server.post(rig.request("runs", "sleep 600"))
        server.wait_state("runs", "started")
        uses: dict[tuple[str, str], Callable[[], requests.Response]] = {
            ("create", "jobs"): lambda: server.post(rig.request("new", "true")),
            ("get", "jobs"): lambda: server.get("runs"),
            ("list", "jobs"): lambda: server.call("GET", "jobs/"),
            ("list", "pods"): lambda: server.get("runs"),
            ("get", "pods/log"): lambda: server.get("runs"),
            # a DELETE ends the job without it; the POST that follows has to remove what is left
            ("delete", "jobs"): lambda: server.delete("runs") and server.post(rig.request("runs", "true")),
        }
        rules = [rule for document in role() for rule in document.get("rules", [])]
        granted = {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}
        assert granted == {*uses, *HELPFUL}
        for (verb, resource), use in uses.items():
            cluster.apply(*role(verb, resource))
            wait_for(functools.partial(lacks, server, verb, resource), 30, f"the right to {verb} {resource} to go")
            answer = use()
            only_the_log = resource == "pods/log"  # which never costs the status
            assert answer.status_code == (200 if only_the_log else 503), (verb, resource, answer.text)
            assert f'cannot {verb} resource "{resource}"' in answer.json()["logs" if only_the_log else "message"]
        late = rig.start()
        wait_for(lambda: "right to delete jobs.batch" in late.log.read_text(), 30, "the log to name the right")
        cluster.apply(*role())
        wait_for(lambda: ready(server).status_code == 200, 30, "all rights")
        assert server.delete("runs").status_code == 204


HELPFUL = {("list", "events"), ("patch", "jobs")}


def test_the_rights_of_existing_sites_are_enough(tmp_path: Path) -> None:
    """The Role of the public chart, without events: everything is answered, with fewer words."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        given = next(document for document in role() if document["kind"] == "Role")
        cluster.apply(given | {"rules": PUBLIC_CHART})
        server = rig.start(**IMPATIENT)
        wait_for(lambda: "list events" in ready(server).json().get("message", ""), 30, "the right to list events to go")
        assert ready(server).status_code == 200
        assert server.post(rig.request("runs", COUNTED + "echo hello")).status_code == 201
        assert server.post(rig.request("gone", COUNTED, image="localhost/nosuch/image:1")).status_code == 201
        assert server.post(rig.request("lost", COUNTED, type="ds", input_dir="missing")).status_code == 201
        assert server.wait_final("runs")["logs"] == "hello\n"
        wait_message(server, "lost", "waits for a directory of the job")
        assert server.get("lost").json()["status"] == "notstarted"
        text = server.log.read_text()
        assert (text.count("lacks the right to list events"), text.count("cannot list resource")) == (1, 1)
        assert "ERROR" not in text
        assert {server.delete(jid).status_code for jid in ("runs", "gone", "lost")} == {204}


def test_without_the_right_to_change_jobs(tmp_path: Path) -> None:
    """A job that cannot start is explained, and waits."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        cluster.apply(*role("patch", "jobs"))
        server = rig.start(STUCK_JOB_PATIENCE_MINUTES="0")
        wait_for(lambda: "patch jobs.batch" in ready(server).json().get("message", ""), 30, "the right to go")
        server.post(rig.request("stuck", "true", type="ds", input_dir="missing"))
        wait_message(server, "stuck", "cannot be mounted")
        wait_for(lambda: "Jobs that cannot start wait for ever" in server.log.read_text(), 60, "the log to say so")
        assert server.get("stuck").json()["status"] == "notstarted"


def lacks(server: Server, verb: str, resource: str) -> bool:
    answer = ready(server)
    return answer.status_code == 503 and f"lacks the right to {verb} {resource}" in answer.json()["message"]
