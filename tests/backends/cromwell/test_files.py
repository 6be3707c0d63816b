"""Reading what Cromwell leaves in execution directories: confined, bounded, and honest where nothing is seen."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pman import settings
from pman.backends import logs
from pman.backends.cromwell import CromwellBackend, _Seen
from pman.backends.cromwell.files import Files, explain, progress
from pman.backends.logs import Wanted, tail_file
from pman.errors import Misconfigured
from pman.status import JobState, JobStatus
from tests.rig import ROOT

CLUSTER = "/cluster/cromwell-executions"
FOLLOWED = Wanted(10, 1000, grows=True)
BELOW = "ChRISJob/8d1f/call-plugin_instance/execution"


@pytest.fixture
def execution(tmp_path: Path) -> Path:
    """The execution directory as pman sees it."""
    path = tmp_path / "here" / BELOW
    path.mkdir(parents=True)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(f"{CLUSTER}={tmp_path}/here")


def call(**more: Any) -> dict[str, Any]:
    return {"stdout": f"{CLUSTER}/{BELOW}/stdout", "stderr": f"{CLUSTER}/{BELOW}/stderr", "jobId": "7"} | more


def output(files: Files, entry: dict[str, Any], max_lines: int, max_bytes: int) -> str:
    """The log of a job with this one attempt, as pfcon gets it."""
    backend = CromwellBackend(settings.load({"CROMWELL_URL": "http://127.0.0.1:9", "STOREBASE": "/"}))
    backend._files = files
    status = JobStatus("x", "", "", JobState.STARTED, private=_Seen(calls=[entry]))
    return logs.of_job(backend, status, max_lines, max_bytes)[0]


def test_stdout_then_stderr(execution: Path, files: Files) -> None:
    (execution / "stdout").write_text("a\nb")
    (execution / "stderr").write_text("c\n")
    assert output(files, call(), 10, 1000) == "a\nb\nc\n"


def test_what_is_said_of_a_job_that_waits_is_no_output(execution: Path, files: Files) -> None:
    """Who follows the log would else be told that output is left out, as soon as the job begins."""
    (execution / "stderr.submit").write_text("sbatch: error: SLURM does not answer\n")
    assert files.streams(call(), 0, FOLLOWED, over=False) == ["", ""]
    assert files.streams(call(), 0, FOLLOWED, over=True) == [
        "sbatch: error: SLURM does not answer\n",
        "",
    ]
    (execution / "stdout").write_text("begun\n")
    assert files.streams(call(), 0, FOLLOWED, over=True) == ["begun\n", ""]


def test_each_worker_has_a_heading(execution: Path, files: Files) -> None:
    make_workers(execution, 11, lambda index: f"I am {index}\n")
    said = "".join(f"=== worker {index} ===\nI am {index}\n" for index in range(11))
    assert output(files, call(), 100, 100_000) == said


def make_workers(execution: Path, count: int, text: Callable[[int], str]) -> None:
    for index in range(count):
        (execution / f"worker-{index}").mkdir()
        (execution / f"worker-{index}" / "script").touch()
        (execution / f"worker-{index}" / "stdout").write_text(text(index))


def test_what_a_program_calls_like_a_worker_hides_no_log(execution: Path, files: Files) -> None:
    (execution / "stdout").write_text("the log\n")
    (execution / "worker-pool.log").touch()
    (execution / "worker-0").mkdir()
    (execution / "worker-1").write_text("script")
    assert output(files, call(), 100, 100_000) == "the log\n"


def test_many_workers_share_the_memory_of_one(execution: Path, files: Files) -> None:
    make_workers(execution, 100, lambda index: f"{index:1023}\n" * 1024)
    tracemalloc.start()
    try:
        text = output(files, call(), 100_000, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert text.count("=== worker ") == 100
    assert len(text) < 2 << 20


def test_words_of_the_container_runtime_for_a_command_that_never_began(execution: Path, files: Files) -> None:
    (execution / "stderr").write_text("pman: the job script ended without a result (exit 255)\n")
    (execution / "slurm.err").write_text(
        "FATAL: no such image\npman: the job script ended without a result (exit 255)\n"
    )
    assert output(files, call(), 100, 10_000) == (execution / "slurm.err").read_text()
    assert explain("Failed", {}, call(returnCode=255), files) == (
        "The job failed: the job script ended without a result (exit 255): FATAL: no such image."
    )
    (execution / "stdout").write_text("begun\n")
    assert "FATAL" not in output(files, call(), 100, 10_000)
    (execution / "stdout").unlink()
    make_workers(execution, 2, lambda _: "")
    for worker in execution.glob("worker-*"):
        (worker / "stdout").unlink()
    assert output(files, call(), 100, 10_000).count("FATAL") == 1


def test_words_of_sbatch_for_a_job_that_never_began(execution: Path, files: Files) -> None:
    (execution / "stderr.submit").write_text("sbatch: error: no\nsbatch: error: really\n")
    entry = {key: value for key, value in call().items() if key != "jobId"}
    assert output(files, entry, 10, 1000) == "sbatch: error: no\nsbatch: error: really\n"
    failure = [{"message": "Unable to start job. Check the stderr file for possible errors: x", "causedBy": []}]
    assert explain("Failed", {}, entry | {"failures": failure}, files) == (
        "SLURM refused the job: sbatch: error: no sbatch: error: really."
    )


@pytest.mark.parametrize("root_map", [None, "/elsewhere=/tmp", f"{CLUSTER}=/no/such/directory"])
def test_where_nothing_is_seen_the_logs_say_where_they_are(root_map: str | None) -> None:
    files = Files(root_map)
    said = output(files, call(), 10, 1000)
    assert f"{CLUSTER}/{BELOW}/stdout" in said
    assert f"{CLUSTER}/{BELOW}/stderr" in said
    failure = [{"message": "Unable to start job.", "causedBy": []}]
    assert f"{CLUSTER}/{BELOW}/stderr.submit" in explain("Failed", {}, call(failures=failure), files)
    assert output(files, {}, 10, 1000) == ""


@pytest.mark.parametrize("path", ["/etc/passwd", f"{CLUSTER}/../../etc/passwd", f"{CLUSTER}x/stdout", "stdout"])
def test_paths_outside_the_mapped_root_are_not_read(files: Files, execution: Path, path: str) -> None:
    assert "root:" not in output(files, call(stdout=path, stderr=path), 10, 1000)


@pytest.mark.parametrize("kind", ["absolute", "relative", "another job's", "worker", "fifo", "device"])
def test_what_a_job_put_in_place_of_its_log_is_not_followed(
    execution: Path, files: Files, tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "secret"
    other = execution.parents[2] / "another/call-plugin_instance/execution"
    for directory in (secret, other):
        directory.mkdir(parents=True)
        (directory / "stdout").write_text("SECRET")
    stdout = execution / "stdout"
    if kind == "absolute":
        stdout.symlink_to(secret / "stdout")
    elif kind == "relative":
        stdout.symlink_to(os.path.relpath(secret / "stdout", execution))
    elif kind == "another job's":
        stdout.symlink_to(os.path.relpath(other / "stdout", execution))
    elif kind == "worker":
        (other / "script").touch()
        (execution / "worker-0").symlink_to(os.path.relpath(other, execution))
    elif kind == "fifo":
        os.mkfifo(stdout)
    else:
        stdout.symlink_to("/dev/zero")
    assert output(files, call(), 10, 1000) == ""


@pytest.mark.parametrize("target", ["secret", "here/ChRISJob/another/call-plugin_instance/execution"])
def test_a_link_in_place_of_its_directory_is_not_followed(
    execution: Path, files: Files, tmp_path: Path, target: str
) -> None:
    (tmp_path / target).mkdir(parents=True)
    for name in ("stdout", "stderr", "rc", "stderr.submit"):
        (tmp_path / target / name).write_text("pman: SECRET")
    execution.rmdir()
    execution.symlink_to(tmp_path / target)
    assert "SECRET" not in output(files, call(), 10, 1000)
    assert output(files, call(), 10, 1000).startswith("The output is on the cluster: ")
    assert (files.note(call()), files.exit_code(call())) == ("", None)
    assert "SECRET" not in files.refusal(call())
    assert files.has_begun(call()) is False


def test_a_link_that_stays_inside_is_followed(execution: Path, files: Files) -> None:
    (execution / "stdout.background").write_text("text\n")
    (execution / "stdout").symlink_to("stdout.background")
    assert output(files, call(), 10, 1000) == "text\n"


def test_ten_gigabytes_cost_little_memory(execution: Path, files: Files) -> None:
    with (execution / "stdout").open("wb") as file:
        file.truncate(10 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    tracemalloc.start()
    try:
        assert output(files, call(), 2, 1 << 20) == "last but one\nlast\n"
        assert len(output(files, call(), 1000, 1 << 20).encode()) <= 4 << 20
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_log_that_grows_while_it_is_read(execution: Path) -> None:
    with (execution / "stdout").open("ab", buffering=0) as file:
        file.write(b"1\n2\n3\n")
        assert tail_file(execution / "stdout", 2, 100) == "2\n3\n"
        file.write(b"4\nhalf a line")
        assert tail_file(execution / "stdout", 2, 100) == "4\nhalf a line"


def test_what_pman_may_not_read_is_said(execution: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (execution / "stdout").touch()
    monkeypatch.setattr("pman.backends.logs.os.open", refuse)
    assert output(files, call(), 10, 1000).startswith("pman cannot read stdout: Permission denied\n")


@pytest.mark.parametrize(
    ("stderr", "rc", "more", "sentence"),
    [
        ("", None, {"returnCode": 3}, "The job ended with exit code 3."),
        ("", "137", {}, "The job was killed (exit code 137), for instance for more memory than it asked for."),
        ("pman: used more memory than its limit\n", "137", {}, "The job used more memory than its limit."),
        ("", "130", {}, "The job ended with exit code 130."),
        ("", None, {"returnCode": 124}, "The job was ended by its time limit (exit code 124)."),
        ("x\npman: ended by the time limit of 1 min\n", None, {"returnCode": 124},
         "The job was ended by the time limit of 1 min."),
        ("pman: no such directory on node7: /share/x\n", None, {"returnCode": 126},
         "The job was not run: no such directory on node7: /share/x."),
        ("pman: ended by SLURM after 5 s (cancelled, preempted or node taken)", None, {"returnCode": 125},
         "The job was ended by SLURM after 5 s (cancelled, preempted or node taken)."),
        ("pman: the job script ended without a result (exit 143)\n", None, {"returnCode": 143},
         "The job failed: the job script ended without a result (exit 143)."),
        ("pman: not the last\nline\n", None, {"returnCode": 1}, "The job ended with exit code 1."),
        ("", "nonsense", {}, "The job failed: Cromwell does not say why."),
    ],
)  # fmt: skip
def test_sentences(execution: Path, files: Files, stderr: str, rc: str | None, more: Any, sentence: str) -> None:
    (execution / "stderr").write_text(stderr)
    if rc is not None:
        (execution / "rc").write_text(rc + "\n")
    assert explain("Failed", {}, call(**more), files) == sentence


def test_whether_a_job_has_begun(execution: Path, files: Files) -> None:
    assert files.has_begun(call()) is False
    (execution / "stdout").touch()
    assert files.has_begun(call()) is True
    assert Files(None).has_begun(call()) is None
    assert files.has_begun(call(stdout=f"{CLUSTER}/late/execution/stdout")) is False


@pytest.mark.parametrize("status", ["Running", "Done", "Failed", "Aborted"])
def test_what_a_job_that_waits_is_said_to_do(execution: Path, files: Files, status: str) -> None:
    """Until something has begun it is never `started`, whatever Cromwell says of its call."""
    wait = JobState.NOT_STARTED
    unsent = {key: value for key, value in call(executionStatus=status).items() if key != "jobId"}
    assert progress(unsent, files) == (wait, "Being submitted to SLURM.")
    away = call(executionStatus=status, jobId="0")
    assert progress(away, files) == (wait, "Waiting to be submitted: SLURM did not answer.")
    (execution / "slurm.reason").write_text("SLURM does not take the job now: no\n")
    assert progress(away, files) == (wait, "Waiting to be submitted: SLURM does not take the job now: no.")
    (execution / "slurm.id").write_text("8\n")
    (execution / "slurm.reason").write_text("PartitionTimeLimit\n")
    assert progress(away, files) == (wait, "Queued in SLURM as job 8: PartitionTimeLimit.")
    (execution / "slurm.reason").write_text("None\n")
    assert progress(away, files) == (wait, "Queued in SLURM as job 8.")
    (execution / "slurm.job").symlink_to("refused")
    (execution / "slurm.out").touch()
    assert progress(away, files) == (wait, "Queued in SLURM as job 8.")
    (execution / "slurm.job").unlink()
    (execution / "slurm.job").symlink_to("9")
    assert progress(away, files) == (JobState.STARTED, "Running as SLURM job 9.")


def test_cromwells_database_is_out_of_pmans_sight() -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.slurm.yml").read_text())["services"]
    ((database, more),) = re.findall(
        r"jdbc:hsqldb:file:([^;\"]+);([^\"]+)", (ROOT / "deploy/cromwell/main.conf").read_text()
    )
    assert "hsqldb.write_delay=false" in more.split(";")  # what was accepted is on the disk
    assert "hsqldb.lob_file_scale=1" in more.split(";")  # else each job takes 3 MB of it
    assert services["cromwell"]["user"].startswith("${PMAN_SLURM_USER:?")  # or jobs would run as root
    assert services["pman"]["user"] == "${PMAN_SLURM_USER}"  # it makes the output directories
    places = {name: [mount["target"] for mount in service["volumes"]] for name, service in services.items()}
    assert str(Path(database).parent) in places["cromwell"]
    assert str(Path(database).parent) not in places["pman"]


def test_the_database_of_the_engine_for_developers_stays_small() -> None:
    assert ";hsqldb.lob_file_scale=1;" in (ROOT / "scripts/engines/slurm").read_text()


@pytest.mark.parametrize("wrong", ["/a", "a=/b", "/a=b", "=", "/a="])
def test_a_wrong_map_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(Misconfigured, match="CROMWELL_EXECUTION_ROOT_MAP"):
        Files(wrong)
