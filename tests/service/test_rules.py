"""Rules of site.yaml in a running service: what is submitted, refused and logged, and what the playground says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.backends.test_local import local_rig
from tests.rig import Rig, Server, running

SITE = """
policy:
  rules:
    - {name: variables, set: {environment: {SITE: ours}}}
    - {name: closed, when: {gpus: ">= 1"}, refuse: There are no GPUs here.}
    - {name: lost, set: {account: lab}}
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    place = tmp_path_factory.mktemp("rules")
    (place / "site").mkdir()
    (place / "site/site.yaml").write_text(SITE)
    with running(local_rig(place, TEMPLATES_DIR=str(place / "site"))) as made:
        made.start(LOG_LEVEL="DEBUG", LOG_FORMAT="json")
        yield made


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.servers[0]


def test_a_job_gets_what_rules_set_and_is_known_again_after_they_change(server: Server, rig: Rig) -> None:
    request = rig.request("ruled", 'printf "%s" "$SITE"')
    assert server.post(request).status_code == 201
    assert server.wait_final("ruled")["logs"].strip() == "ours"
    site = rig.logs / "site/site.yaml"
    site.write_text(SITE.replace("ours", "other"))
    changed = rig.start()
    site.write_text(SITE)
    again = changed.post(request)
    assert (again.status_code, again.json()["status"]) == (201, "finishedSuccessfully")
    assert changed.wait_final("ruled")["logs"].strip() == "ours"


def test_a_refusal_is_answered_in_the_words_of_the_rule(server: Server, rig: Rig) -> None:
    answer = server.post(rig.request("refused", "true") | {"gpu_limit": 1})
    assert (answer.status_code, answer.json()) == (403, {"message": "There are no GPUs here."})
    assert server.get("refused").status_code == 404


def test_the_log_says_what_rules_decided_and_what_has_no_effect(server: Server, rig: Rig) -> None:
    server.post(rig.request("logged", "true"))
    lines = [json.loads(line)["message"] for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert any("the rule 'lost' sets account, which the templates of local do not print" in line for line in lines)
    (decided,) = [line for line in lines if line.startswith("rules for 'logged': ")]
    found = json.loads(decided.partition(": ")[2])
    assert found["outcome"] == {"environment": {"SITE": "ours"}, "account": "lab"}
    assert [rule["matched"] for rule in found["rules"]] == [True, False, True]


def test_the_playground_says_why(server: Server, rig: Rig) -> None:
    def ask(**fields: int) -> dict[str, object]:
        body = {"request": json.dumps(rig.request("shown", "true") | fields), "target": "local"}
        answer = requests.post(f"{server.url}/render", json=body, timeout=60)
        assert answer.status_code == 200
        found: dict[str, object] = answer.json()
        return found

    found = ask()
    assert ":4: variables: yes\n" in str(found["reasons"])
    assert "account has no effect: the templates of local do not print it" in str(found["reasons"])
    assert "[variables] |   set -- " in str(found["reasons"])
    refused = ask(gpu_limit=1)
    assert refused["problems"] == ["There are no GPUs here."]
    assert "gpus 1 is >= 1" in str(refused["reasons"])
    assert 'id="reasons"' in requests.get(f"{server.url}/render", timeout=10).text


def test_a_broken_rule_keeps_the_service_from_starting(tmp_path: Path, rig: Rig) -> None:
    (tmp_path / "site.yaml").write_text("policy:\n  rules:\n    - {name: a, set: {acount: x}}\n")
    with pytest.raises(AssertionError, match=r"site.yaml:3: policy.rules\[1\].set has no 'acount'"):
        rig.start(TEMPLATES_DIR=str(tmp_path))
