"""A job is submitted once, also when an answer of sbatch was lost or its template has changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pman import policy, settings
from pman.backends import directories, slurm
from pman.backends.slurm import commands as slurm_commands
from pman.backends.slurm import state as slurm_state
from pman.errors import BackendError, BadRequest, NotFound, TemplateError, Unreachable
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating import render
from tests.backends.slurm.fake import RENDERER, Fake, claim, fake, named, run_shell


def test_a_job_has_the_name_that_its_script_says(engine: Fake) -> None:
    """The number of an earlier sbatch is found by that name in the accounting."""
    engine.say("sbatch", f"echo $* > {engine.here}/options; echo 10")
    record = engine.submit(script='#!/bin/bash\n#SBATCH --job-name=chris" "0.0123456789abcdef.j\n')
    name = f"chris 0.0123456789abcdef.j.{record.token}"
    assert f"--job-name={name} " in (engine.here / "options").read_text()
    assert [job.token for job in slurm_commands.parse_rows(f"10|RUNNING|N/A|N/A|None|{name}")] == [record.token]


@pytest.mark.slow
@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("earlier", ["FAILED", "PENDING"])
def test_a_claim_that_is_younger_than_the_queue(engine: Fake, earlier: str, listing: bool) -> None:
    """Two SLURM jobs of one attempt: the second one begins while SLURM tells of the first one."""
    record = engine.submit()
    first, second = engine.row(10, earlier, record), engine.row(11, "RUNNING", record)
    engine.say("squeue", f"{first}; {claim(record, '11')} || {second}")
    status = engine.backend.jobs(1)[0] if listing else engine.backend.status(record.jid)
    assert status.state is JobState.STARTED


def test_an_owner_that_only_the_accounts_know(engine: Fake) -> None:
    record = engine.submit()
    run_shell(claim(record, "11"))
    engine.say("squeue", engine.row(10, "FAILED", record))
    engine.say("sacct", f"{engine.row(10, 'FAILED', record)}; {engine.row(11, 'OUT_OF_MEMORY', record)}")
    assert "more memory" in engine.backend.status(record.jid).message


@pytest.mark.slow
@pytest.mark.parametrize("retry", ["POST", "GET"])
def test_refused_because_an_earlier_sbatch_got_through(engine: Fake, retry: str) -> None:
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", ""))
    made = directories.find(engine.root, "j")
    engine.say("sbatch", f"{claim(made, '77')}; echo 'sbatch: error: invalid partition' >&2; exit 1")
    engine.say("squeue", f"[ ! -e {made.directory}/claim.77 ] || {engine.row(77, 'RUNNING', made)}")
    if retry == "POST":
        engine.submit("j")
    else:
        engine.backend.status("j")
    assert engine.backend.status("j").state is JobState.STARTED
    assert (made.directory / "slurm_id").read_text() == "77"


@pytest.mark.parametrize("said", ["10", "10;cluster", "Welcome.\n10\nThis job is charged to nobody."])
def test_the_number_among_what_sbatch_says(engine: Fake, said: str) -> None:
    """A federated cluster adds its name, and a site's plug-ins and wrappers what they like."""
    engine.say("sbatch", f"echo x >> submitted; echo '{said}'")
    assert read_number(engine.submit()) == "10"
    assert engine.submitted() == 1


def test_a_wrapper_that_takes_no_parsable(engine: Fake) -> None:
    """Its words are no number that can be relied on: the job is looked for by its name, and not submitted again."""
    engine.say("sbatch", "echo x >> submitted; echo Submitted batch job 10")
    with pytest.raises(Unreachable, match="did not say the number"):
        engine.submit()
    engine.say("squeue", engine.row(10, "RUNNING", directories.find(engine.root, "chris-jid-1")))
    assert read_number(engine.submit()) == "10"
    assert engine.submitted() == 1


def read_number(record: directories.Record) -> str:
    return (record.directory / "slurm_id").read_text()


def test_refused_for_good(engine: Fake) -> None:
    engine.say("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(BadRequest, match="invalid partition"):
        engine.submit("j")
    with pytest.raises(NotFound):
        engine.backend.status("j")


def test_a_directory_without_a_job(engine: Fake) -> None:
    (engine.root / "chris-jid-1" / "x").mkdir(parents=True)
    with pytest.raises(BackendError, match="in the way"):
        engine.submit()
    (engine.root / "j" / "slurm-9.log").mkdir(parents=True)  # as a file that pman may not remove
    with pytest.raises(BackendError, match="in the way"):
        engine.submit("j")


def test_a_directory_that_slurm_has_made_anew(engine: Fake) -> None:
    """For the log of a job that carries a deleted attempt and starts late, as slurmstepd of SLURM 24.11.5 does."""
    engine.backend.delete(engine.submit("j").jid)
    (engine.root / "j").mkdir()
    (engine.root / "j" / "slurm-9.log").write_text("mv: cannot stat 'attempt'\n")
    assert engine.backend.jobs(9) == []
    record = engine.submit("j")
    assert (read_number(record), list(record.directory.glob("slurm-*.log"))) == ("10", [])


@pytest.mark.parametrize("name", ["site-{}", "{}@site", "another-name"])
def test_a_job_is_found_by_its_number(engine: Fake, name: str) -> None:
    """Whatever a plug-in has made of its name, and also where the list of all jobs lacks it."""
    record = engine.submit()
    run_shell(claim(record, "10"))
    running = engine.row(10, "RUNNING", record, name=name.format(slurm_state.slurm_name(record)))
    engine.say("squeue", running)
    assert engine.backend.status(record.jid).state is JobState.STARTED
    fake(engine.here, "squeue", f'case "$*" in *--jobs=10*) {running} ;; esac')
    assert engine.backend.status(record.jid).state is JobState.STARTED
    assert [status.state for status in engine.backend.jobs(10)] == [JobState.STARTED]


@pytest.mark.parametrize("retry", ["POST", "GET"])
def test_a_mended_template_is_used_for_what_slurm_never_took(engine: Fake, retry: str) -> None:
    mended = RENDERER.render(named("j"), "slurm").text
    engine.say("sbatch", "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1")
    with pytest.raises(Unreachable):
        engine.submit("j", script="#!/bin/bash\necho old\n")
    record = directories.find(engine.root, "j")
    engine.say("sbatch", f"cat > {engine.here}/script; echo 10")
    if retry == "POST":
        engine.submit("j", script=mended)
    else:
        assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert (engine.here / "script").read_text() == mended
    assert directories.find(engine.root, "j") == record
    assert (record.directory / "job.sh").read_text() == mended


def test_a_job_is_kept_as_the_rules_left_it(engine: Fake) -> None:
    binds, tolerations = (policy.Bind("/data/é", "/data", read_only=True),), ({"key": "a", "value": "\u2028'"},)
    decided = policy.Policy(
        account="a", nice=5, modules=("m",), binds=binds, tolerations=tolerations, labels={"l": "m"}
    )
    made = dataclasses.replace(named("j"), policy=decided, env=(("A", "é\n'"),), partition="p", gpu_count=2)
    engine.backend.submit(made, render.Spec("slurm", "#!/bin/bash\n"))
    assert directories.posted(directories.find(engine.root, "j")) == made


@pytest.mark.parametrize("got_through", [False, True])
def test_a_template_that_broke_since(engine: Fake, tmp_path: Path, got_through: bool) -> None:
    """The jid is free again, unless an earlier sbatch was heard after all."""
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", "#!/bin/bash\n"))
    (tmp_path / "overlay/slurm").mkdir(parents=True)
    text = '{% extends "shipped/slurm/job.sh.j2" %}{% block limits %}{{ nothing.here }}{% endblock %}'
    (tmp_path / "overlay/slurm/job.sh.j2").write_text(text)
    broken = render.Renderer(settings.load({"TEMPLATES_DIR": str(tmp_path / "overlay")}), TARGETS)
    commands = slurm_commands.Commands([str(tmp_path / "prefix")], 20)
    backend = slurm.SlurmBackend(engine.root, commands, broken)
    if got_through:
        made = directories.find(engine.root, "j")
        engine.say("sacct", claim(made, "77"))  # asked before the script is made
        assert backend.status("j").state is JobState.NOT_STARTED
        assert (made.directory / "slurm_id").read_text() == "77"
    else:
        with pytest.raises(TemplateError, match=r"slurm/job\.sh\.j2:1: .*nothing"):
            backend.status("j")
        assert list(engine.root.iterdir()) == []


def test_what_got_through_is_not_rendered_again(engine: Fake) -> None:
    engine.say("sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(Unreachable):
        engine.submit("j", script="#!/bin/bash\necho old\n")
    record = directories.find(engine.root, "j")
    engine.say("squeue", engine.row(10, "PENDING", record))
    engine.say("sbatch", f"touch {engine.here}/again; echo 11")
    assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert not (engine.here / "again").exists()
    assert (record.directory / "job.sh").read_text() == "#!/bin/bash\necho old\n"
    assert (record.directory / "slurm_id").read_text() == "10"


def test_a_job_of_an_older_pman_is_submitted_with_the_script_that_it_kept(engine: Fake) -> None:
    assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", "#!/bin/bash\necho kept\n"))
    (directories.find(engine.root, "j").directory / "posted.json").unlink()
    engine.say("sbatch", f"cat > {engine.here}/script; echo 10")
    assert engine.backend.status("j").state is JobState.NOT_STARTED
    assert (engine.here / "script").read_text() == "#!/bin/bash\necho kept\n"


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_template_that_sbatch_refuses_leaves_nothing(engine: Fake, method: str) -> None:
    if method == "GET":
        assert slurm_state.create_directory(engine.root, named("j"), render.Spec("slurm", ""))
    engine.say("sbatch", "echo \"sbatch: unrecognized option '--acount=x'\" >&2; exit 255")
    with pytest.raises(TemplateError, match=r"slurm/job\.sh\.j2: .*unrecognized option '--acount=x'"):
        engine.submit("j") if method == "POST" else engine.backend.status("j")
    assert list(engine.root.iterdir()) == []
