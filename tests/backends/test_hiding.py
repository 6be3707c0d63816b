"""What was submitted is shown without the values of the job's environment, whatever they are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pman import job, settings
from pman.backends import hiding
from pman.errors import Refused
from pman.targets import TARGETS
from pman.templating.render import SAMPLE, Renderer
from tests.contract import HOSTILE

CONFIG = settings.load({"STOREBASE": "/data/store"})
RENDERER = Renderer(CONFIG, TARGETS)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), max_size=4)
SECRETS = st.one_of(TEXTS, st.lists(st.sampled_from(HOSTILE), max_size=4))


@pytest.mark.parametrize("target", ["local", "slurm", "wdl"])
@given(SECRETS, TEXTS)
def test_no_value_is_left_in_a_script(target: str, values: list[str], args: list[str]) -> None:
    """What is shown is the same as with other values."""

    def shown(values: list[str]) -> str:
        entries = [f"SECRET_{n}={value}" for n, value in enumerate(values)]
        made = job.make_job(job.validate({**SAMPLE, "env": entries, "args": args}), CONFIG)
        return hiding.in_script(RENDERER.render(made, target).text, len(values))

    assert shown(values) == shown(["x"] * len(values))


LINES = st.lists(st.sampled_from([" env ", "A=1", "B='x y'", "'", '"', " ", "\n", "\u20ac"]), max_size=9).map("".join)


@pytest.mark.parametrize("target", ["local", "slurm", "wdl"])
@given(st.lists(LINES, max_size=3), st.lists(LINES.map(lambda line: line.replace("\u20ac", "")), max_size=3))
def test_no_part_of_a_command_line_in_a_value_is_left(target: str, values: list[str], args: list[str]) -> None:
    entries = [f"SECRET_{n}={value}\u20ac" for n, value in enumerate(values)]
    made = job.make_job(job.validate({**SAMPLE, "env": entries, "args": args}), CONFIG)
    shown = hiding.in_script(RENDERER.render(made, target).text, len(values))
    assert "\u20ac" not in shown
    assert "\\342" not in shown  # as quoting for Cromwell writes it


def test_what_follows_a_value_that_holds_a_command_line_is_shown() -> None:
    script = "exec env A='/usr/bin/env B=1 sh hunter2' C=2 sh -c 'exit 3'\n"
    assert hiding.in_script(script, 2) == "exec env A=*** C=*** sh -c 'exit 3'\n"


def test_a_template_with_a_way_of_its_own_shows_nothing() -> None:
    with pytest.raises(Refused, match="environment=1"):
        hiding.in_script("export TOKEN=hunter2\nexec sh\n", 1)
    with pytest.raises(Refused):
        hiding.in_script("env A=1 sh\n", None)
    with pytest.raises(Refused):  # an argument is not what the job's variable is
        hiding.in_script("export TOKEN=hunter2\nset -- sh -c 'env A=1 true'\n", 1, ["TOKEN"])
    assert hiding.in_script("exec env -i sh\n", 0) == "exec env -i sh\n"


def test_documents_of_engines_and_of_kubernetes() -> None:
    index = {"name": "INDEX", "valueFrom": {"fieldRef": {}}}
    pod = {"containers": [{"env": [{"name": "A", "value": "hunter2"}, index], "args": ["env", "x"]}]}
    body = {"Env": ["A=hunter2", "B=hunter2=c"], "Labels": {"a": "b"}, "HostConfig": {"Env": None}}
    shown = hiding.in_document({"spec": pod, "Config": body})
    assert "hunter2" not in json.dumps(shown)
    assert shown["spec"]["containers"][0]["env"] == [{"name": "A", "value": "***"}, index]
    assert shown["Config"] == {"Env": ["A=***", "B=***"], "Labels": {"a": "b"}, "HostConfig": {"Env": []}}
