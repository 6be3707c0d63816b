"""Holds the stand-in to what was recorded from a real Cromwell 93, and tests what no recording shows."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.cromwell.config import TEST_PACE, Config, Pace, load
from tests.fakes.cromwell.server import Cromwell
from tests.fakes.cromwell_replay import FINAL, RECORDINGS, TIMEOUT_SECONDS, Client, parts, recording, shape
from tests.rig import wait_for

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parent.parent.parent
FAKE = PROJECT / "tests" / "fakes" / "cromwell"
RECORDED_CONF = FAKE / "recorded.conf"
PROJECT_CONF = PROJECT / "deploy" / "cromwell" / "slurm.conf"

NEVER = 3600.0
# Metadata is written when the test says so: what lags in the real one lags here, on a machine of any speed.
PACE = replace(TEST_PACE, metadata_flush=NEVER, metadata_batch=1_000_000)


@pytest.fixture(autouse=True)
def local_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the tiny sbatch first on PATH and ends every job that is left."""
    monkeypatch.setenv("PATH", str(FAKE / "bin"), prepend=":")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm"))
    monkeypatch.setenv("PMAN_PROLOGUE", f'PATH="{FAKE}/bin:$PATH"')
    monkeypatch.setenv("RECORDED_RC_WAIT", "1")
    (tmp_path / "slurm").mkdir()
    yield
    for job in jobs():
        subprocess.run(["scancel", "-s", "KILL", job], check=False)


@pytest.fixture
def short_minute(tmp_path: Path) -> None:
    """The tiny sbatch takes a minute of a time limit for 1.5 s."""
    (tmp_path / "slurm/minute-seconds").write_text("1.5")


def jobs() -> list[str]:
    """Ids of the jobs that have not ended."""
    listed = subprocess.run(["squeue"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def loaded(conf: Path) -> Config:
    """A configuration, read once for each value of what tests set differently of the environment that it looks at."""
    return _loaded(conf, *map(os.environ.get, ("PMAN_RC_WAIT", "PMAN_ALIVE_CHECK", "PMAN_CONTAINER", "PMAN_PROLOGUE")))


@cache
def _loaded(conf: Path, *_: str | None) -> Config:
    return load(conf)


@contextmanager
def serving(
    tmp_path: Path, pace: Pace = PACE, conf: Path = RECORDED_CONF, now: str = "", **changes: Any
) -> Iterator[Client]:
    """A client of a new server; `now` names a periodic task that is done whenever the client is kept waiting."""
    config = replace(loaded(conf).at(tmp_path / "executions"), **changes)
    with Cromwell(config, tmp_path / "cromwell", pace=pace) as server:

        def advance() -> None:
            if now:
                server.now(now)
            server.store.flush()
            server.store.summarize()

        yield Client(server.url, tmp_path / "executions", advance)


# -- recorded exchanges --------------------------------------------------------------------------------------------

TIMELINES = ("11-lifecycle-ok-timeline", "71-docker-bug-timeline")
RESTARTS = (
    "50-restart-with-file-database", "51-crash-before-metadata-flush", "52-after-crash-recovery",
    "53-limbo-after-crash",
)  # fmt: skip
HELD = ("24-query-variations", "25-patch-labels", "26-on-hold-release")
# Each of these has a test of its own; 28 holds latencies only.
APART = {*TIMELINES, *RESTARTS, *HELD, "28-latency", "45-abort-staggered"}
REPLAYED = sorted({path.stem for path in RECORDINGS.glob("*.json")} - APART)

# Same status code and shape, but a message in the words of another parser; README.md lists them.
WORDED_OTHERWISE = {
    "21-submit-validation", "30-case-heredoc-tilde-string-expr", "31-escape-at-escaped-dollar",
    "31-escape-at-escaped-tilde",
}  # fmt: skip

# What must wait in a recording, and the periodic task that makes it go on.
PACES: dict[str, tuple[Pace, str]] = {
    "41-abort-submitted": (replace(PACE, pickup_period=NEVER), ""),
    "44-abort-in-the-same-second": (replace(PACE, pickup_period=NEVER, token_period=NEVER), "pick_up"),
    **{
        path.stem: (replace(PACE, abort_scan=NEVER, poll_first=2), "scan_aborts")
        for path in RECORDINGS.glob("43-*.json")
    },
}


def same(got: Any, wanted: Any) -> bool:
    return bool(got == wanted)


def same_shape(got: Any, wanted: Any) -> bool:
    return bool(shape(got) == shape(wanted))


def submit_at_once(target: Client, action: dict[str, Any]) -> None:
    """Many submissions of one id: one is accepted, the others are told so in one of two recorded ways."""
    workflow = next(body["id"] for code, body in action["responses"] if code == 201)
    form = next(iter(target.forms.values())) | {"requestedWorkflowId": workflow, "workflowOnHold": "true"}

    def post(_: int) -> tuple[int, str]:
        answer = target.session.post(f"{target.url}/api/workflows/v1", files=parts(form), timeout=10)
        return answer.status_code, json.dumps(answer.json(), sort_keys=True)

    with ThreadPoolExecutor(len(action["responses"])) as pool:
        got = Counter(pool.map(post, range(len(action["responses"]))))
    recorded = {(code, json.dumps(body, sort_keys=True)) for code, body in action["responses"]}
    assert sum(count for (code, _), count in got.items() if code == 201) == 1
    assert set(got) <= recorded


def act(target: Client, action: dict[str, Any]) -> None:
    """What was done beside single requests."""
    if "responses" in action:
        return submit_at_once(target, action)
    assert action["case"] == "external scancel", action
    job = wait_for(lambda: next(filter(None, map(target.job_id, target.ids)), None), TIMEOUT_SECONDS, "job")
    subprocess.run(["scancel", job], check=True)
    return None


def replay(target: Client, name: str) -> None:
    for exchange in recording(name)["exchanges"]:
        if "request" not in exchange:
            act(target, exchange)
            continue
        if name.startswith("43-") and exchange.get("case") == "abort":
            wait_for(
                lambda: [c for w in target.ids for c in target.calls(w) if "backendStatus" in c],
                TIMEOUT_SECONDS,
                "poll",
            )
        if exchange.get("case") == "abort after end":
            # 200 was recorded too: the workflow is in progress a little longer than its status says.
            assert target.send(exchange["request"]).status_code in (200, 404)
            continue
        target.replay(exchange, same_shape if name in WORDED_OTHERWISE else same)


def is_gone(target: Client, workflow: str) -> bool:
    """Whether a finished workflow is no longer in progress."""
    return target.post(workflow, "abort").status_code == 404


@pytest.mark.parametrize("name", REPLAYED)
def test_recorded_exchanges(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bug = name.startswith("7")
    if "timelimit" in name:
        request.getfixturevalue("short_minute")
    pace, now = PACES.get(name, (PACE, ""))
    with serving(tmp_path, pace, now=now, docker_bug=bug) as target:
        for workflow in target.mentioned(recording(name)["exchanges"]):
            target.submit(workflow)
            target.wait_for_status(workflow, "Submitted", "On Hold", "Running", *FINAL)
            if name == "40-abort-finished":
                target.wait_for_status(workflow, *FINAL)
                wait_for(partial(is_gone, target, workflow), TIMEOUT_SECONDS, "removal")
        replay(target, name)


def test_recorded_queries_labels_and_hold(tmp_path: Path) -> None:
    """24 to 26 are about two workflows on hold, whose submission was not recorded, and one that was aborted."""
    queries = {exchange["case"]: exchange for exchange in recording(HELD[0])["exchanges"]}
    with serving(tmp_path) as target:
        form = target.forms["b5f53448-9e17-45b2-8d74-a7d6ffe83d3b"]
        for result in queries["label + fields"]["response"]["body"]["results"]:
            labels = {key: value for key, value in result["labels"].items() if key != "cromwell-workflow-id"}
            more = {"labels": json.dumps(labels), "workflowOnHold": "true"}
            target.forms[result["id"]] = form | more
            target.submit(result["id"])
        done, aborted = (result["id"] for result in queries["name"]["response"]["body"]["results"])
        target.submit(aborted)
        wait_for(lambda: target.job_id(aborted), TIMEOUT_SECONDS, "job")
        target.post(aborted, "abort")
        wait_for(lambda: target.status(aborted) == "Aborted", TIMEOUT_SECONDS, "end")
        target.submit(done)
        wait_for(lambda: target.status(done) == "Succeeded", TIMEOUT_SECONDS, "end")
        for case, exchange in queries.items():
            target.replay(exchange, same_shape if case == "name" else same)
        for name in HELD[1:]:
            replay(target, name)


def test_recorded_aborts_at_any_time(tmp_path: Path) -> None:
    """45: aborts 1.5 to 7.5 s after the submission; all were picked up by then, some not yet visible."""
    exchanges = recording("45-abort-staggered")["exchanges"]
    with serving(tmp_path) as target:
        for exchange in exchanges:
            if str(exchange.get("case")).endswith("before"):
                assert target.send(exchange["request"]).status_code in (200, 404)
            elif str(exchange.get("case")).endswith("abort"):
                workflow = exchange["response"]["body"]["id"]
                path = tmp_path / "executions" / "ChRISJob" / target.ids[workflow] / "call-plugin_instance"
                wait_for((path / "execution" / "stdout.submit").exists, TIMEOUT_SECONDS, "submission")
                target.replay(exchange, same)
            else:
                target.replay(exchange, same)
    wait_for(lambda: not jobs(), TIMEOUT_SECONDS, "end of the jobs")


# -- timelines -----------------------------------------------------------------------------------------------------


def brief(endpoint: str, code: int, body: Any) -> list[Any]:
    """What the recorder noted of an answer."""
    if code != 200:
        return [code, body["message"].split(":")[0]]
    if endpoint == "query":
        return [code, body["totalResultsCount"], [[result["status"], sorted(result)] for result in body["results"]]]
    if endpoint != "md":
        return [code, body["status"] if endpoint == "status" else sorted(body["labels"])]
    call: dict[str, Any] = next((entry for entries in body["calls"].values() for entry in entries), {})
    states = [call.get(key) for key in ("executionStatus", "backendStatus")]
    return [code, body["status"], *states, "jobId" in call, sorted(body), sorted(call)]


@pytest.mark.parametrize("name", TIMELINES)
def test_recorded_timeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each endpoint goes through the recorded states, in their order."""
    monkeypatch.setenv("LOCAL_SLURM_SUBMIT_SECONDS", "1")
    timeline = recording(name)["timeline"]
    paths = {entry["endpoint"]: entry["exchange"]["request"] for entry in timeline}
    submission = recording("70-docker-bug-submit" if name.startswith("7") else "10-submit-ok")["exchanges"][0]
    pace = replace(PACE, pickup_period=NEVER, token_period=NEVER, launch=1, key_value_flush=1, poll_first=1)
    seen: dict[str, list[Any]] = {endpoint: [] for endpoint in paths}
    config = replace(loaded(RECORDED_CONF).at(tmp_path / "executions"), docker_bug=name.startswith("7"))
    with Cromwell(config, tmp_path / "cromwell", pace=pace) as server:
        target = Client(server.url, tmp_path / "executions")
        target.replay(submission, same)

        def ended() -> bool:
            for endpoint, request in paths.items():
                response = target.send(request)
                seen[endpoint].append(brief(endpoint, response.status_code, response.json()))
            last = seen["md"][-1]
            server.store.flush()
            server.store.summarize()
            # Every state has been seen at every endpoint before the next one may come.
            if last[1] == "Submitted":
                server.now("pick_up")
            elif last[2:3] == ["QueuedInCromwell"]:
                server.now("dispense")
            return seen["status"][-1][1] in FINAL and last[1] in FINAL

        wait_for(ended, TIMEOUT_SECONDS, "end")
    for endpoint, answers in seen.items():
        responses = [entry["exchange"]["response"] for entry in timeline if entry["endpoint"] == endpoint]
        recorded = [brief(endpoint, response["status"], response["body"]) for response in responses]
        assert answers[-1] == recorded[-1]
        passed, wanted = states(answers), states(recorded)
        if endpoint == "md":
            # The real one writes every 5 s, so that some states in between were not recorded.
            passed = [state for state in passed if state in wanted]
        assert passed == wanted, endpoint


def states(answers: list[Any]) -> list[Any]:
    """Answers without their keys, which depend on where a batch of metadata happens to end; repetitions left out."""
    found: list[Any] = []
    for answer in answers:
        bare = [answer[0], answer[1], [r[0] for r in answer[2]]] if len(answer) == 3 else answer[:5]
        if bare not in found[-1:]:
            found.append(bare)
    return found


# -- kill -9 -------------------------------------------------------------------------------------------------------


class Process:
    """The stand-in as a process of its own, for kill -9; the port stays."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = "0"

    def start(self, **pace: float) -> str:
        """Its URL; `write_delay` is an option of its own."""
        command = [sys.executable, "-m", "tests.fakes.cromwell", "--conf", str(RECORDED_CONF), "--root", str(self.root)]
        command += ["--pace", "test", "--port", self.port, "--write-delay", str(pace.pop("write_delay", 0))]
        command += [word for name, value in pace.items() for word in ("--set", f"{name}={value}")]
        self.child = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        url = self.child.stdout.readline().split()[-1]
        self.port = url.rsplit(":", 1)[1]
        return url

    def end(self, number: signal.Signals) -> int:
        self.child.send_signal(number)
        code = self.child.wait(20)
        assert self.child.stdout is not None
        self.child.stdout.close()
        return code


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    found = Process(tmp_path)
    yield found
    if found.child.returncode is None:
        found.end(signal.SIGKILL)


def stored(root: Path, workflow: str, table: str = "workflow", condition: str = "1") -> bool:
    """Whether another process sees the workflow in a table of the database."""
    database = sqlite3.connect(root / "cromwell.db")
    found = database.execute(f"SELECT 1 FROM {table} WHERE id=? AND {condition}", [workflow]).fetchone()
    database.close()
    return found is not None


def requests_of(name: str) -> list[dict[str, Any]]:
    return [exchange for exchange in recording(name)["exchanges"] if "request" in exchange]


def test_recorded_restarts(process: Process, tmp_path: Path) -> None:
    """50 to 53: a running job, a workflow whose 201 is lost, and one whose metadata is lost, over kill -9."""
    first, *others = requests_of(RESTARTS[0])
    # No poll, so that metadata stays as it was when the real one was killed; commits that a test can overtake.
    target = Client(process.start(write_delay=1, key_value_flush=NEVER), tmp_path / "executions")
    target.replay(first, same)
    running = first["response"]["body"]["id"]
    target.wait_for_status(running, "Running")
    wait_for(lambda: target.job_id(running), TIMEOUT_SECONDS, "job")
    wait_for(lambda: stored(tmp_path, target.ids[running], "job"), TIMEOUT_SECONDS, "commit")
    wait_for(lambda: stored(tmp_path, target.ids[running], "summary"), TIMEOUT_SECONDS, "commit")
    while True:
        target.replay(others[0], same)
        process.end(signal.SIGKILL)
        lost = others[0]["request"]["form"]["requestedWorkflowId"]
        if not stored(tmp_path, lost):
            break
        # A commit came in between: once more with another id.
        others = json.loads(json.dumps(others).replace(lost, str(uuid.uuid4())))
        process.start(write_delay=1, heartbeat_ttl=NEVER)

    process.start(heartbeat_ttl=NEVER, metadata_flush=NEVER, key_value_flush=NEVER)
    for exchange in others[1:]:
        target.replay(exchange, same)
    limbo = requests_of(RESTARTS[1])
    target.replay(limbo[0], same)
    target.replay(limbo[1], same)
    picked_up = limbo[0]["request"]["form"]["requestedWorkflowId"]
    wait_for(lambda: stored(tmp_path, picked_up, condition="heartbeat IS NOT NULL"), TIMEOUT_SECONDS, "pick-up")
    process.end(signal.SIGKILL)

    process.start(heartbeat_ttl=NEVER)
    for exchange in limbo[2:]:
        target.replay(exchange, same)
    process.end(signal.SIGKILL)

    process.start(heartbeat_ttl=1, launch=1)
    for exchange in requests_of(RESTARTS[3])[1:] + requests_of(RESTARTS[2]):
        target.replay(exchange, same_shape)


def test_sigterm_releases_workflows_at_once(process: Process, tmp_path: Path) -> None:
    target = Client(process.start(), tmp_path / "executions")
    workflow = submit(target, "sleep 1; echo done")
    wait_for(lambda: target.job_id(workflow), TIMEOUT_SECONDS, "job")
    assert process.end(signal.SIGTERM) == 0
    process.start(heartbeat_ttl=NEVER)
    target.wait_for_status(workflow, "Succeeded")
    assert len(list((tmp_path / "slurm").iterdir())) == 1


# -- what no recording shows ---------------------------------------------------------------------------------------

WDL = """version 1.0

task plugin_instance {{
    command <<<
{command}
    >>>
    runtime {{
{attributes}
    }}
}}

workflow ChRISJob {{
    call plugin_instance
}}
"""


def literal(value: int | str) -> str:
    """A WDL literal; in strings everything but plain characters as UTF-16 units."""
    if isinstance(value, int):
        return str(value)
    units = value.encode("utf-16-be")
    pairs = (chr(units[i] << 8 | units[i + 1]) for i in range(0, len(units), 2))
    return '"' + "".join(c if c.isascii() and (c.isalnum() or c in " /") else f"\\u{ord(c):04x}" for c in pairs) + '"'


def submit(
    target: Client, command: str = "true", options: str = '{"hogGroup": "pman"}', **attributes: int | str
) -> str:
    """The id of a new workflow."""
    lines = "\n".join(f"        {name}: {literal(value)}" for name, value in attributes.items())
    source = WDL.format(command=command, attributes=lines)
    form = {"workflowSource": source, "workflowOptions": options}
    answer = target.session.post(f"{target.url}/api/workflows/v1", files=parts(form), timeout=10)
    assert answer.status_code == 201, answer.text
    workflow = str(answer.json()["id"])
    target.ids[workflow] = workflow
    return workflow


def final(target: Client, workflow: str) -> dict[str, Any]:
    """The first call of a workflow that has come to its end."""
    wait_for(lambda: target.status(workflow) in FINAL, TIMEOUT_SECONDS, "end")
    return target.calls(workflow)[0]


def output(call: dict[str, Any], name: str = "stdout") -> str:
    """What is in a file of the execution directory so far."""
    path = Path(call["stdout"]).with_name(name)
    return path.read_text() if path.exists() else ""


def test_probe_tells_known_from_unknown_and_leaves_nothing(tmp_path: Path) -> None:
    def probe(target: Client, workflow: str) -> dict[str, Any]:
        options = json.dumps({"hogGroup": "h" * 101})
        form = {"workflowSource": "", "workflowOptions": options, "workflowOnHold": "true"}
        files = parts(form | {"requestedWorkflowId": workflow})
        answer = target.session.post(f"{target.url}/api/workflows/v1", files=files, timeout=10)
        assert answer.status_code == 400
        found: dict[str, Any] = answer.json()
        return found

    with serving(tmp_path) as target:
        target.advance = lambda: None
        invisible = submit(target)
        assert target.get(invisible, "status")["message"].startswith("Unrecognized workflow ID")
        assert "already in use" in probe(target, invisible)["message"]
        unknown = str(uuid.uuid4())
        assert "truncation" in probe(target, unknown)["message"]
        assert "truncation" in probe(target, unknown)["message"]


def test_one_hog_group_is_picked_up_at_once_others_one_per_poll(tmp_path: Path) -> None:
    pace = replace(PACE, pickup_period=NEVER, token_period=NEVER)  # picked up by hand, and not run
    with Cromwell(loaded(RECORDED_CONF).at(tmp_path / "executions"), tmp_path / "cromwell", pace=pace) as server:
        target = Client(server.url, tmp_path / "executions")
        together = [submit(target, options='{"hogGroup": "pman"}') for _ in range(5)]
        alone = [submit(target, options="{}") for _ in range(3)]

        def picked_up() -> list[str]:
            server.now("pick_up")
            rows = [server.store.get(workflow) for workflow in [*together, *alone]]
            return [row.id for row in rows if row and row.state == "Running"]

        assert [picked_up() for _ in range(4)] == [together + alone[:count] for count in range(4)]


def test_literal_markers_in_a_command_are_replaced(tmp_path: Path) -> None:
    with serving(tmp_path) as target:
        call = final(target, submit(target, "echo 'a SCRIPT_EPILOGUE b'"))
        assert "SCRIPT_EPILOGUE" in call["commandLine"]
        assert output(call) == "a  b\n"


def test_thirty_clients_at_once(tmp_path: Path) -> None:
    def one(number: int) -> str:
        mine = Client(target.url, target.root, target.advance)
        workflow = submit(mine, f"echo {number}")
        wait_for(lambda: mine.status(workflow) in FINAL, 60, "end")
        return output(mine.calls(workflow)[0])

    with serving(tmp_path) as target, ThreadPoolExecutor(30) as pool:
        assert list(pool.map(one, range(30))) == [f"{number}\n" for number in range(30)]


@pytest.fixture
def project_conf(monkeypatch: pytest.MonkeyPatch) -> Path:
    """deploy/cromwell/slurm.conf without containers."""
    monkeypatch.setenv("PMAN_CONTAINER", "none")
    return PROJECT_CONF


def test_project_configuration_states_its_pace(project_conf: Path) -> None:
    pace = load(project_conf).pace
    assert (pace.pickup_period, pace.pickup_count, pace.abort_scan) == (1, 50, 1)
    assert (pace.metadata_flush, pace.summary_period, pace.heartbeat_ttl) == (0.2, 0.2, 120)


def test_project_configuration_hands_any_value_to_the_job(project_conf: Path, tmp_path: Path) -> None:
    hostile = '/tmp/it\'s a "$(touch x)" `y` \\ é漢🙂 ~{x} ${HOME} ; # -'
    with serving(tmp_path, conf=project_conf) as target:
        call = final(target, submit(target, "printf '%s' \"$SHAREDIR\"", sharedir=hostile, image="i"))
        assert (call["executionStatus"], output(call)) == ("Done", hostile), output(call, "stderr")


@pytest.mark.usefixtures("short_minute")
def test_project_configuration_notes_the_time_limit(project_conf: Path, tmp_path: Path) -> None:
    with serving(tmp_path, conf=project_conf) as target:
        call = final(target, submit(target, "sleep 300", timelimit=1))
        assert call["returnCode"] == 124, call
        assert "ended by the time limit" in output(call, "stderr")
    wait_for(lambda: not jobs(), TIMEOUT_SECONDS, "end of the job")


def test_project_configuration_notes_a_cancelled_job(project_conf: Path, tmp_path: Path) -> None:
    with serving(tmp_path, conf=project_conf) as target:
        workflow = submit(target, "echo begin; sleep 300")
        job = wait_for(lambda: target.job_id(workflow), TIMEOUT_SECONDS, "job")
        wait_for(lambda: "begin" in output(target.calls(workflow)[0]), TIMEOUT_SECONDS, "begin")
        subprocess.run(["scancel", job], check=True)
        assert final(target, workflow)["returnCode"] == 125


def test_project_configuration_aborts_where_slurm_does_not_say_the_end(
    project_conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent"
    for name, words in {"squeue": "exec sleep 60", "scancel": "exit 0"}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n[ ! -e {silent} ] || {words}\nexec {FAKE}/bin/{name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with serving(tmp_path, conf=project_conf) as target:
        workflow = submit(target, "echo begin; sleep 300")
        wait_for(lambda: target.job_id(workflow), TIMEOUT_SECONDS, "job")
        wait_for(lambda: "begin" in output(target.calls(workflow)[0]), TIMEOUT_SECONDS, "begin")
        silent.touch()
        target.post(workflow, "abort")
        wait_for(lambda: target.status(workflow) == "Aborted", 30, "end")
        silent.unlink()


def test_project_configuration_notes_a_job_that_left_no_code(
    project_conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMAN_RC_WAIT", "1")
    monkeypatch.setenv("PMAN_ALIVE_CHECK", "1")
    with serving(tmp_path, conf=project_conf) as target:
        workflow = submit(target, "echo begin; sleep 300")
        job = wait_for(lambda: target.job_id(workflow), TIMEOUT_SECONDS, "job")
        wait_for(lambda: "begin" in output(target.calls(workflow)[0]), TIMEOUT_SECONDS, "begin")
        subprocess.run(["scancel", "-s", "KILL", job], check=True)
        call = final(target, workflow)
        assert (call["returnCode"], call["backendStatus"]) == (79, "Failed")


# Where a job is among the groups, and what is counted there when one of its processes was killed for memory. cgroup v1:
# measured with SLURM 22.05.8, where the group of the job itself counts nothing. cgroup v2: with 22.05.8 and 24.11.5 on
# Linux 6.1 (User-mode Linux), the same for a process of the script and for one of srun.
OLD_GROUP = "memory/slurm_localhost/uid_1001/job_JOB/step_batch/task_0"
OLD_LINE, OLD_COUNTS = OLD_GROUP.replace("memory", "4:memory:", 1), f"{OLD_GROUP}/memory.oom_control"
NEW_GROUP = "system.slice/localhost_slurmstepd.scope/job_JOB"
NEW_LINE, NEW_COUNTS = f"0::/{NEW_GROUP}/step_batch/user/task_0", f"{NEW_GROUP}/memory.events"
OLD = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
NEW = "low 0\nhigh 0\nmax 69\noom 1\noom_kill {}\noom_group_kill 0\n"
SAID = "slurmstepd-localhost: error: Detected 1 oom-kill event(s) in StepId=1.0. Some of your processes may have been "


@pytest.mark.parametrize(
    ("line", "counts", "text", "words", "over"),
    [
        (OLD_LINE, OLD_COUNTS, OLD.format(1), "", True),
        (OLD_LINE, OLD_COUNTS, OLD.format(0), "", False),
        (NEW_LINE, NEW_COUNTS, NEW.format(2), "", True),
        (NEW_LINE, NEW_COUNTS, NEW.format(0), "I ran out of memory", False),
        ("4:memory:/slurmd", "memory/slurmd/memory.oom_control", OLD.format(1), "", False),  # not the job's own group
        ("", "none", "", SAID, True),
    ],
)
def test_project_configuration_calls_nothing_a_success_that_was_killed_for_memory(
    project_conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, counts: str, text: str, words: str,
    over: bool,
) -> None:  # fmt: skip
    """The command went on without the process and returned 0."""
    (tmp_path / "bin").mkdir()
    sed = tmp_path / "bin/sed"
    sed.write_text(
        f"""#!/bin/bash
        [ "${{!#}}" = /proc/self/cgroup ] || exec /bin/sed "$@"
        echo "{line.replace("JOB", "1")}" | /bin/sed "${{@:1:$#-1}}" | /bin/sed "s#/sys/fs/cgroup#{tmp_path}#"
        """
    )
    sed.chmod(0o755)
    monkeypatch.setenv("PMAN_PROLOGUE", f'PATH="{tmp_path}/bin:{FAKE}/bin:$PATH"')
    (tmp_path / counts.replace("JOB", "1")).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / counts.replace("JOB", "1")).write_text(text)
    with serving(tmp_path, conf=project_conf) as target:
        call = final(target, submit(target, f"echo '{words}' >&2"))
        sentence = "pman: used more memory than its limit\n" if over else ""
        status = "Failed" if over else "Done"
        assert (call["executionStatus"], output(call, "stderr")) == (status, f"{words}\n{sentence}"), call
        assert call["jobId"] == "1"


@pytest.mark.usefixtures("short_minute")
@pytest.mark.parametrize(
    ("pull", "code", "said"),
    [
        ("exec sleep 300", 124, "ended by the time limit of 1 min while its image was being pulled"),
        ("exit 124", 126, "the image i could not be pulled within 30 min and the memory of the job; pman images"),
        ("kill -KILL $$", 126, "the image i could not be pulled within 30 min and the memory of the job; pman images"),
        ("echo FATAL: no space left >&2; exit 255", 126, "the image i could not be pulled: no space left"),
        ("exit 255", 126, "the image i could not be pulled: exit code 255"),
    ],
)
def test_project_configuration_says_why_an_image_was_not_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pull: str, code: int, said: str
) -> None:
    """Whatever the pull ends with is no exit code of the job's command, which does not run."""
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(f'#!/bin/bash\nif [ "$2" = pull ]; then {pull}; fi\ntouch {tmp_path}/ran\n')
    apptainer.chmod(0o755)
    monkeypatch.setenv("PMAN_PROLOGUE", f'PATH="{tmp_path}:{FAKE}/bin:$PATH"')
    monkeypatch.setenv("PMAN_CONTAINER", "apptainer")
    with serving(tmp_path, conf=PROJECT_CONF) as target:
        call = final(target, submit(target, "true", image="i", timelimit=1))
        assert (call["returnCode"], (tmp_path / "ran").exists()) == (code, False)
        assert output(call, "stderr").startswith(f"pman: {said}")


def test_project_configuration_tells_a_container_the_number_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which Apptainer's --containall hides with the rest of the environment."""
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(
        '#!/bin/bash\n[ "$2" != pull ] || exec touch "$3"\nuntil [ "$1" = env ]; do shift; done\n'
        'exec env -i PATH="$PATH" "$@"\n'
    )
    apptainer.chmod(0o755)
    monkeypatch.setenv("PMAN_PROLOGUE", f'PATH="{tmp_path}:{FAKE}/bin:$PATH"')
    monkeypatch.setenv("PMAN_CONTAINER", "apptainer")
    with serving(tmp_path, conf=PROJECT_CONF) as target:
        call = final(target, submit(target, 'printf %s "$SLURM_JOB_ID"', image="i"))
        assert output(call) == call["jobId"], output(call, "stderr")
