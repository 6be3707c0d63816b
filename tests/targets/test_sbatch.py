"""The judge of #SBATCH lines: what sbatch refuses or does not see, in the words of whoever wrote it."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pman import settings
from pman.service import app
from pman.targets import TARGETS
from pman.targets.record import Judging
from pman.targets.sbatch import OPTIONS, problems
from tests.checking.overlays import SLURM, only, run, write
from tests.conftest import development
from tests.rig import ROOT

SHIPPED = "#SBATCH --cpus-per-task=1\n#SBATCH --mem=64M\n#SBATCH --gres=gpu:1\n#SBATCH --no-requeue\n"
# Lines that a site adds to a shipped script -> what is said of them. Most were tried on a cluster, where SLURM ignored
# or refused every one of them.
WRONG = {
    "true\n#SBATCH --account=x": "does not read this line: the first command, in line 6",
    "# SBATCH --account=x": "does not begin with `#SBATCH`",
    "##SBATCH --account=x": "does not begin with `#SBATCH`",
    " #SBATCH --account=x": "does not begin with `#SBATCH`",
    "#sbatch --account=x": "does not begin with `#SBATCH`",
    "#SBATCH --acount=x": "no option --acount; did you mean --account?",
    "#SBATCH --segmnt=2": "did you mean --segment (from SLURM 24.05 on)?",
    "#SBATCH account=x": "account=x is none; write --account=x",
    "#SBATCH -p=main": "write --partition=main",
    "#SBATCH -y": "no option -y",
    "#SBATCH --account": "--account needs a value",
    "#SBATCH --hold=yes": "--hold takes no value",
    "#SBATCH --mem-per-cpu=1G": "one of --mem, --mem-per-cpu and --mem-per-gpu",
    "#SBATCH --mem-per-gpu=1G": "one of --mem, --mem-per-cpu and --mem-per-gpu",
    "#SBATCH --gpus=a100:1": "--gres of line 4 beside --gpus of line 6",
    "#SBATCH -G 1": "--gres of line 4 beside --gpus of line 6",
    "#SBATCH --gpus-per-node=1": "both ask for GPUs",
    "#SBATCH --cpus-per-gpu=2": "one of --cpus-per-task and --cpus-per-gpu",
    "#SBATCH --exclusive --oversubscribe": "either has its nodes alone or shares them",
    "#SBATCH --wait": "take --wait out",
    "#SBATCH -W": "take --wait out",
    "#SBATCH --test-only": "take --test-only out",
    "#SBATCH --array=1-3": "take --array out",
    "#SBATCH --clusters=other": "take --clusters out",
    "#SBATCH -M other": "take --clusters out",
    "#SBATCH --requeue": "set `requeue: true` in site.yaml",
    "#SBATCH --job-name=a\n#SBATCH --job-name=b": "--job-name is pman's own, from line 6",
    "#SBATCH --chdir=/\n#SBATCH -D /tmp": "--chdir is pman's own",
    "#SBATCH --output=/tmp/log": "--output is pman's own: it has to be slurm-%j.log",
    "#SBATCH hetjob": "take the line with hetjob out",
    "#SBATCH --time=1h": "--time=1h: this is not a time",
    "#SBATCH --time=1:00:00:00": "is not a time",
    "#SBATCH --mem=1.5G": "is not an amount of memory",
    "#SBATCH --mem=4GiB": "is not an amount of memory",
    "#SBATCH --gres=gpu:a100:x": "this is not resources",
    "#SBATCH --gres=gpu:2:a100": "this is not resources",
    "#SBATCH --gpus-per-socket=1:a100": "this is not GPUs",
    "#SBATCH --ntasks=0": "is not a whole number above 0",
    "#SBATCH --nodes=all": "is not a number of nodes",
    "#SBATCH --signal=B:@": "is not a signal",
    "#SBATCH --kill-on-invalid-dep=maybe": "is not yes or no",
    "#SBATCH --comment='x": "the quote ' does not end",
    "#SBATCH --power=level": "SLURM after 23.11 does not know it",
}  # fmt: skip
RIGHT = [
    "#SBATCH --account=x # a comment", "#SBATCH -A x -q long", "#SBATCH -pmain", "#SBATCH --part main",
    "#SBATCH --nice", "#SBATCH --nice=-5", "#SBATCH --exclusive", "#SBATCH --exclusive=user", "#SBATCH --time=1-12",
    "#SBATCH -t 1-12:30:00",
    "#SBATCH --time=UNLIMITED", "#SBATCH --nodes=2-4", "#SBATCH --signal=B:USR2@30", "#SBATCH --mail-type=END,FAIL",
    "#SBATCH --constraint='a|b'", "#SBATCH --licenses=matlab:2", "#SBATCH --tmp=100G", "#SBATCH --reservation=r",
    "#SBATCH --export=NIL", "#SBATCH", "# SBATCH lines stand above", "# --account is for others",
    "cat <<'END'\nEND", "true 'it\n#SBATCH --x'", "true \"it\n#SBATCH --x\"", "# it's\ntrue 'a\n#SBATCH --x'",
]  # fmt: skip


def said(added: str, shipped: str = SHIPPED) -> list[str]:
    return [str(problem) for problem in problems(f"#!/bin/bash\n{shipped}{added}\n")]


@pytest.mark.parametrize("added", WRONG)
def test_wrong(added: str) -> None:
    (problem,) = said(added)
    assert problem.startswith("line ")
    assert WRONG[added] in problem


@pytest.mark.parametrize("added", RIGHT)
def test_right(added: str) -> None:
    assert said(added) == []


@pytest.mark.parametrize(
    "gres", ["gpu:3g.20gb:2", "gpu:a100:1", "gpu", "gres/gpu:2", "gpu:1,shard:2", "lustre:1k", "none"]
)
def test_generic_resources(gres: str) -> None:
    assert said(f"#SBATCH --gres={gres}", "") == []


def test_the_judge_of_the_target_asks_it() -> None:
    script = "#!/bin/bash\n#SBATCH --acount=x\ntrue\n"
    assert any("--acount" in str(problem) for problem in TARGETS["slurm"].judge(script, Judging()))


def test_whoever_judges_says_the_same(tmp_path: Path) -> None:
    """`pman check`, `pman render --check` and the playground."""
    place = write(tmp_path / "site", only(SLURM, "gpus", "#SBATCH --acount=x\n"))
    request = ROOT / "examples" / "copy-and-hash.json"
    checked = run("check", place, "--to", "slurm")
    rendered = run("render", "--check", "--to", "slurm", "--templates", place, request)
    service = app.create_app(
        settings.load(
            {
                "APPLICATION_MODE": "dev", "STOREBASE": str(tmp_path), "LOCAL_STATE_DIR": str(tmp_path / "state"),
                "TEMPLATES_DIR": str(place),
            }
        )
    )  # fmt: skip
    answer = service.test_client().post("/render", json={"request": request.read_text(), "target": "slurm"})
    for said in (checked.output, rendered.output, answer.text):
        assert "sbatch has no option --acount; did you mean --account?" in said
    assert (checked.exit_code, rendered.exit_code) == (1, 2)


def newest(versions: str, version: str) -> bool:
    """Whether an option of these versions is known to `version`."""
    first, _, last = versions.partition("-")
    return (not first or first <= version) and (not last or version <= last)


# Options as sbatch takes and refuses them.
VALUES = [
    "--time=1h", "--time=1:00:00:00", "--time=1-12", "--time=-1", "--time=0", "--time=5:00", "--mem=1.5G", "--mem=4GiB",
    "--mem=4gb", "--mem=4P", "--mem=100", "--gres=gpu:a100:x", "--gres=gpu:2:a100", "--gres=gpu:1", "--gres=none",
    "--gpus=a100:1,v100:2", "--gpus=0", "--ntasks=0", "--ntasks=2k", "--cpus-per-task=1.5", "--nodes=all",
    "--nodes=1-1", "--nodes=1k", "--signal=B:@", "--signal=USR2", "--signal=FOO", "--signal=SIGUSR1@5",
    "--signal=B:15@60",
    "--kill-on-invalid-dep=maybe", "--open-mode=x", "--open-mode=append", "--exclusive=abc", "--exclusive=user",
    "--tmp=x",
    "--core-spec=x", "--ntasks-per-node=0", "--mincpus=x", "--wait-all-nodes=2", "--acount=x", "--part=main",
    "--mem=1G --mem-per-cpu=1G", "--gres=gpu:1 --gpus=a100:1", "--cpus-per-task=1 --cpus-per-gpu=1 --gpus=1",
    "--gpus-per-task=1 --ntasks-per-gpu=1", "account=x", "--hold=yes", "-pmain", "--nice=-5",
]  # fmt: skip


@pytest.mark.live("slurm")
@pytest.mark.parametrize("version", ["22.05", "24.11"])
def test_the_real_sbatch_agrees(version: str) -> None:
    """Of the versions of options, and of values: what SLURM cannot do now is no matter of words."""
    environment = {**os.environ, **development("slurm", "--version", version)}

    def refusal(directive: str, *words: str) -> str:
        script = f"#!/bin/sh\n#SBATCH {directive}\ntrue\n"
        command = ["sbatch", "--test-only", *words]
        done = subprocess.run(command, input=script, env=environment, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode and "allocation failure" not in done.stderr else ""

    with ThreadPoolExecutor(2) as pool:
        names = {
            option.name: f"--{option.name}" + ("=1" if option.argument == "=" else "") for option in OPTIONS.values()
        }
        answers = zip(names, pool.map(lambda word: refusal("", word, "--help"), names.values()), strict=True)
        unknown = {name for name, answer in answers if "unrecognized option" in answer}
        unknown |= {"extra"} if version < "23.02" else set()  # there it is short for --extra-node-info
        assert unknown == {option.name for option in OPTIONS.values() if not newest(option.versions, version)}
        refused = dict(zip(VALUES, pool.map(refusal, VALUES), strict=True))
    judged = {value: said(f"#SBATCH {value}", "") for value in VALUES}
    assert {value for value in VALUES if refused[value]} == {value for value in VALUES if judged[value]}, refused
