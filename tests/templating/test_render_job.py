"""The offline script and `pman render`: the same bytes that the service submits, and what goes wrong by exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pman import job, settings
from pman.targets import TARGETS, judge
from pman.templating import render
from tests.rig import ROOT, Rig, running
from tests.test_golden import FILES, GOLDEN, HOST

SCRIPT = str(ROOT / "scripts" / "render_job.py")
EXAMPLE = ROOT / "examples" / "hostile-arguments.json"
BASE = ["--set", "STOREBASE=/data/store"]
Done = subprocess.CompletedProcess[bytes]


def offline(*arguments: str | Path, given: bytes = b"", **environment: str) -> Done:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, check=False, env=inherited | environment)


def good(*arguments: str | Path, **options: Any) -> str:
    done = offline(*arguments, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("target", ["wdl", "k8s", "swarm", "local"])
def test_prints_the_recorded_bytes(target: str) -> None:
    recorded = GOLDEN / target / "example-hostile-arguments" / FILES[target]
    assert good(EXAMPLE, "--to", target, *BASE).encode() == recorded.read_bytes()


@pytest.mark.slow
def test_prints_the_bytes_that_the_service_submits(tmp_path: Path) -> None:
    """A real service over the local backend leaves the script that it ran in the job's state directory."""
    store, state = tmp_path / "store", tmp_path / "state"
    rig = Rig({"LOCAL_STATE_DIR": str(state)}, store, "none", tmp_path)
    with running(rig):
        server = rig.start()
        request = rig.request("chris-jid-9", "true", "it's", "~{x}\n")
        assert server.post(request).status_code == 201
        server.wait_final("chris-jid-9")
    submitted = [path.read_bytes() for path in state.rglob("job.sh")]
    assert submitted == [
        good("-", "--to", "local", "--set", f"STOREBASE={store}", given=json.dumps(request).encode()).encode()
    ]


def test_a_fresh_checkout_says_what_to_install() -> None:
    """-S: without site-packages, as a Python that nothing was installed for."""
    done = subprocess.run([sys.executable, "-S", SCRIPT, EXAMPLE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), "scripts/quickstart" in done.stderr) == (1, 1, True), done.stderr


@pytest.mark.slow
def test_reads_standard_input() -> None:
    for arguments in (("-",), ()):
        assert good(*arguments, "--to", "wdl", *BASE, given=EXAMPLE.read_bytes()) == good(EXAMPLE, "--to", "wdl", *BASE)


@pytest.mark.slow
def test_settings_come_from_the_environment_then_a_file_then_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "pman.env"
    file.write_text("SLURM_PARTITION=from-file\n# comment\nSTOREBASE='/from file'\n")
    environment = {"SLURM_PARTITION": "from-environment", "STOREBASE": "/e"}
    arguments = (EXAMPLE, "--to", "wdl")
    assert 'slurm_partition: "from-environment"' in good(*arguments, **environment)
    from_file = good(*arguments, "--env-file", file, **environment)
    assert 'slurm_partition: "from-file"' in from_file
    assert '"/from file/' in from_file
    option = ("--env-file", file, "--set", "SLURM_PARTITION=from-option")
    assert 'slurm_partition: "from-option"' in good(*arguments, *option, **environment)


def test_an_env_file_may_hold_what_other_programs_read(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("STOREBASE=/s\nPFCON_PASSWORD=x\nSLURM_PARTITON=y\n")
    done = offline(EXAMPLE, "--to", "wdl", "--env-file", file)
    assert done.returncode == 0
    words = b"also holds what is no setting of pman: PFCON_PASSWORD, SLURM_PARTITON; did you mean SLURM_PARTITION?\n"
    assert words in done.stderr


def test_says_when_the_store_is_not_set() -> None:
    done = offline(EXAMPLE, "--to", "k8s")
    assert done.returncode == 0
    assert b"STOREBASE is not set" in done.stderr


def test_an_overlay_is_used(tmp_path: Path) -> None:
    (tmp_path / "wdl").mkdir()
    block = "{% block site_attributes %}    account: {{ site.account }}\n{% endblock %}"
    overlay = '{% extends "shipped/wdl/job.wdl.j2" %}' + block
    (tmp_path / "wdl/job.wdl.j2").write_text(overlay)
    (tmp_path / "site.yaml").write_text("account: lab\n")
    assert '    account: "lab"\n' in good(EXAMPLE, "--to", "wdl", "--templates", tmp_path, *BASE)


def lines(count: int) -> bytes:
    data = json.loads(EXAMPLE.read_text())
    return b"".join(json.dumps(data | {"jid": f"chris-jid-{n}"}).encode() + b"\n" for n in range(count))


def test_many_requests_become_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = offline("-", "--to", "wdl", "--out", out, "--check", *BASE, given=lines(20))
    assert (done.returncode, done.stdout) == (0, b"")
    assert sorted(path.name for path in out.glob("*.wdl")) == sorted(f"chris-jid-{n}.wdl" for n in range(20))
    assert json.loads((out / "chris-jid-0.options.json").read_text())["hogGroup"] == "pman"
    assert b"rendering" not in done.stderr  # the progress bar is for terminals


def test_one_request_over_several_lines_may_go_to_a_directory(tmp_path: Path) -> None:
    good(EXAMPLE, "--to", "k8s", "--out", tmp_path, *BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["chris-jid-2.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["wdl", "k8s", "swarm", "local"])
def test_check_accepts_what_is_shipped(target: str) -> None:
    assert good(EXAMPLE, "--to", target, "--check", *BASE)


BAD_REQUESTS: list[tuple[bytes, str]] = [
    (b"{", "must be JSON"),
    (b"", "must be JSON"),
    (b"[]", "must be a JSON object"),
    (lines(2), "--out"),
    (b'{"jid": "a b"}', "jid"),
    (b'{"jid": "a"}\n{"jid": \n', "Line 2 must be JSON"),
    (json.dumps(json.loads(EXAMPLE.read_text()) | {"cpu_limit": 0}).encode(), "cpu_limit: must be an integer"),
]


@pytest.mark.parametrize(("given", "said"), BAD_REQUESTS, ids=[said for _, said in BAD_REQUESTS])
def test_a_bad_request_exits_with_1_and_names_the_field(given: bytes, said: str) -> None:
    done = offline("-", "--to", "wdl", *BASE, given=given)
    assert done.returncode == 1
    assert done.stdout == b""
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("\n{{ job.imag }}", "wdl/job.wdl.j2:2: "),
        ("\n\n{% block x %}", "wdl/job.wdl.j2:3: "),
        ("version 1.0\ntask t {\n  command <<< >>>\n  runtime { cpu 1 }\n}\n", "wdl/job.wdl.j2:4: "),
    ],
)
def test_a_bad_template_exits_with_2_and_names_file_and_line(tmp_path: Path, overlay: str, said: str) -> None:
    (tmp_path / "wdl").mkdir()
    (tmp_path / "wdl/job.wdl.j2").write_text(overlay)
    done = offline(EXAMPLE, "--to", "wdl", "--templates", tmp_path, "--check", *BASE)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_a_language_that_cannot_carry_a_value_exits_with_1_and_names_the_field() -> None:
    request = json.loads(EXAMPLE.read_text()) | {"input_dir": "a\nb"}
    done = offline("-", "--to", "wdl", *BASE, given=json.dumps(request).encode())
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"input_dir: cannot be written for this scheduler: a line break" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--set", "PORT=x"), ("--set", "PORT"), ("--set", "STORBASE=/x"), ("--to", "cobol")]
)
def test_bad_settings_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = offline(EXAMPLE, "--to", "wdl", *arguments)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_standard_input_cannot_be_watched() -> None:
    done = offline("-", "--to", "wdl", "--watch", given=EXAMPLE.read_bytes())
    assert done.returncode == 1
    assert b"--watch needs a REQUEST file" in done.stderr


def test_a_refusal_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "wdl").mkdir()
    (tmp_path / "wdl/job.wdl.j2").write_text('{{ refuse("this image is not allowed here") }}')
    done = offline(EXAMPLE, "--to", "wdl", "--templates", tmp_path, *BASE)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"this image is not allowed here" in done.stderr


# -- the judges ----------------------------------------------------------------------------------------------------

BROKEN: list[tuple[str, str, str, str]] = [
    ("wdl", "    cpu: 1\n", '    cpu: "1\n', "line"),
    ("wdl", "workers: 1", "workers 1", "line"),
    ("wdl", "set -- ", "set -- ~{x} ", "Unknown identifier x"),
    ("wdl", 'exec "$@"', 'if exec "$@"', "bash: syntax error"),
    ("wdl", 'exec "$@"', "cat <<EOF", "here-document"),
    ("wdl", "  runtime {", "  runtimes {", "line"),
    ("k8s", "backoffLimit: 0", "backoffLimits: 0", "'backoffLimits' was unexpected"),
    ("k8s", "  parallelism: 1", "  parallelism: one", "parallelism"),
    ("k8s", "  parallelism: 1", "   parallelism: 1", "this is no YAML"),
    ("k8s", "  parallelism: 1", "  backoffLimit: 1", "given twice"),
    ("k8s", "kind: Job\n", "", "apiVersion or kind is missing"),
    ("k8s", "kind: Job", "kind: Jobs", "Couldn't find schema"),
    ("swarm", "    TTY: false", "    Tty: false", "'Tty' was unexpected"),
    ("swarm", "Condition: none", "Condition: never", "TaskTemplate.RestartPolicy.Condition"),
    ("swarm", "NanoCPUs: 1000000000", 'NanoCPUs: "1"', "is not of type 'integer'"),
    ("swarm", "Name:", "Names:", "'Name' is a required property"),
    ("local", "run_worker() {", "run_worker() {{", "bash: "),
    ("local", "set -u", "set -u; cat <<X", "here-document"),
]


@pytest.mark.parametrize(("target", "old", "new", "said"), BROKEN, ids=[f"{b[0]}-{b[2]}" for b in BROKEN])
def test_the_judges_find_what_is_broken(target: str, old: str, new: str, said: str) -> None:
    config = settings.load(HOST)
    request = json.loads((ROOT / "examples/copy-and-hash.json").read_text())
    spec = render.Renderer(config, TARGETS).render(job.make_job(job.validate(request), config), target)
    assert judge(spec) == []
    assert old in spec.text
    problems = list(map(str, judge(render.Spec(target, spec.text.replace(old, new, 1), spec.extras))))
    assert said in "; ".join(problems)


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', ""])
def test_extras_are_judged_too(text: str) -> None:
    wdl = (GOLDEN / "wdl/plain/job.wdl").read_text()
    assert str(judge(render.Spec("wdl", wdl, {"options.json": text}))[0]).startswith("options.json")


def test_a_bad_request_among_many_is_named(tmp_path: Path) -> None:
    request = json.loads(EXAMPLE.read_text())
    first = request | {"jid": "first"}
    for bad, words in ((request | {"jid": "a/b"}, "jid: is not usable"), (first, "jid: first was there before")):
        given = "\n".join(json.dumps(data) for data in (first, bad)).encode()
        done = offline("-", "--to", "wdl", "--out", str(tmp_path / "out"), *BASE, given=given)
        assert done.returncode == 1
        assert f"Request 2 of 2: {words}" in done.stderr.decode()
