"""The checks see what must not be, and a seed gives the same plan again."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.chaos import checks, plan
from tests.chaos.driver import Answer, Life, Run
from tests.chaos.worlds import Kubernetes, World
from tests.rig import FINAL, Rig

OUTPUT = {"runs.0": 4, "beats.0": 2, "last.0": 5}


def errand(kind: str) -> plan.Errand:
    return plan.Errand("c1-0", 0, kind, workers=1, beats=1, delete_after=0, again=False, tidy=True, pause=1)


def answer(at: float, call: str, code: int, state: str = "", replica: int = 1, **job: str) -> Answer:
    return Answer(at, call, replica, code, {"status": state, "message": "", "timestamp": "", **job})


STARTED = [answer(1, "POST", 201, "notstarted"), answer(2, "GET", 200, "started")]
ENDED = [*STARTED, answer(3, "GET", 200, "finishedSuccessfully")]
FAILED = answer(3, "GET", 200, "finishedWithError", message="The job ended with exit code 3.")


def found(
    directory: Path,
    life: Life,
    harms: tuple[tuple[float, float, str], ...] = (),
    kills: tuple[float, ...] = (),
    absences: tuple[tuple[float, float], ...] = (),
) -> list[str]:
    world = World(ExitStack(), directory)
    world.forgets = bool(kills)
    world.rig = Rig({}, directory, "", directory)
    run = Run(world, plan.Plan(1, 1, (life.errand,), ()))
    run.lives, run.harms, run.kills, run.absences = [life], list(harms), list(kills), list(absences)
    life.accepted, life.over = 1, next((answer.at for answer in life.answers if answer.state in FINAL), None)
    life.kept = life.kept or OUTPUT
    life.at_rest = life.at_rest or [("its end", OUTPUT)]
    return checks.findings(run)


def test_a_seed_gives_the_same_plan() -> None:
    parts, calls = ("stop this", "kill that"), ("GET", "POST")
    first, again, other = (plan.make(seed, 600, 200, parts, calls) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert len(first.errands) == 200
    assert {errand.kind for errand in first.errands} == set(plan.SHARES)
    assert {event.lane for event in first.events} == {"pman", "part", "call", "line"}
    assert {event.kind for event in first.events if event.lane == "call"} == set(plan.FAULTS)


def test_nothing_is_found_where_all_is_well(tmp_path: Path) -> None:
    deleted = [answer(4, "DELETE", 0), answer(5, "DELETE", 404)]
    assert found(tmp_path, Life(errand("good"), 1, tmp_path, answers=[*ENDED, *deleted])) == []
    assert found(tmp_path, Life(errand("bad"), 1, tmp_path, answers=[*STARTED, FAILED])) == []


@pytest.mark.parametrize(
    ("kind", "answers", "words"),
    [
        ("good", [*ENDED, answer(4, "GET", 500)], "GET was 500"),
        ("good", [*ENDED, answer(4, "GET", 404)], "GET was 404"),
        ("good", [*ENDED, answer(4, "DELETE", 404)], "DELETE was 404"),
        ("good", [*ENDED, answer(4, "DELETE", 503), answer(5, "DELETE", 404, replica=2)], "DELETE was 404"),
        ("good", [*ENDED, answer(4, "DELETE", 0, replica=0), answer(5, "DELETE", 404)], "DELETE was 404"),
        ("good", [*STARTED, answer(3, "GET", 200, "notstarted"), ENDED[-1]], "went back"),
        ("good", [*ENDED, FAILED], "has several ends"),
        ("good", [*ENDED, answer(4, "GET", 200, "finishedSuccessfully", timestamp="later")], "has several ends"),
        ("good", [*STARTED, answer(3, "GET", 200, "undefined"), ENDED[-1]], "was undefined"),
        ("good", STARTED, "has no end"),
        ("good", [*STARTED, FAILED], "ended as finishedWithError"),
        ("bad", ENDED, "is a success"),
        ("limit", ENDED, "is a success"),
    ],
)
def test_answers_that_must_not_be(tmp_path: Path, kind: str, answers: list[Answer], words: str) -> None:
    assert words in " ".join(found(tmp_path, Life(errand(kind), 1, tmp_path, answers=answers)))


@pytest.mark.parametrize(
    ("kept", "at_rest", "words"),
    [
        (OUTPUT | {"runs.0": 8}, OUTPUT, "has run 2 times"),
        ({"beats.0": 2, "last.0": 5}, OUTPUT, "has run 0 times"),
        (OUTPUT, {"runs.0": 4}, "incomplete"),
        (OUTPUT | {"beats.0": 9}, OUTPUT, "wrote after"),
    ],
)
def test_output_that_must_not_be(tmp_path: Path, kept: dict[str, int], at_rest: dict[str, int], words: str) -> None:
    life = Life(errand("good"), 1, tmp_path, answers=ENDED, kept=kept, at_rest=[("its end", at_rest)])
    assert words in " ".join(found(tmp_path, life))


def test_a_job_that_ended_with_its_part_of_the_backend(tmp_path: Path) -> None:
    """It has failed, and says why; it is no success without its output all the same."""
    lost = answer(3, "GET", 200, "finishedWithError", message="It was killed.")
    harms = ((2.5, 9.0, ""),)
    assert found(tmp_path, Life(errand("good"), 1, tmp_path, answers=[*STARTED, lost]), harms) == []
    life = Life(errand("good"), 1, tmp_path, answers=ENDED, at_rest=[("its end", {"runs.0": 4})])
    assert "incomplete" in " ".join(found(tmp_path, life, harms))


@pytest.mark.parametrize(
    ("stopped", "message", "findings"),
    [
        ((2.5, 9.0), "The program could not be started: context canceled", 0),
        ((5.0, 9.0), "The program could not be started: context canceled", 2),
        ((2.5, 9.0), "The job ended with exit code 1.", 2),
    ],
)
def test_what_a_part_of_the_backend_may_do_to_a_job(
    tmp_path: Path, stopped: tuple[float, float], message: str, findings: int
) -> None:
    """A job may fail with the words of that part alone, and while that part was away."""
    words = Kubernetes.harmful["stop containerd"]
    failed = answer(3, "GET", 200, "finishedWithError", message=message)
    life = Life(errand("good"), 1, tmp_path, answers=[*STARTED[:1], failed], kept={"quick": 0})
    life.at_rest = [("its end", life.kept)]
    assert len(found(tmp_path, life, ((*stopped, words),))) == findings


@pytest.mark.parametrize(
    ("first", "later", "findings"),
    [
        (
            "The job was killed (exit code 137), not by its memory limit.",
            "The job was killed (exit code 137), perhaps.",
            0,
        ),
        ("The job was killed (exit code 137), not by its memory limit.", "The job ended with exit code 137.", 1),
        ("The job ended with exit code 3.", "The job ended with exit code 4.", 1),
    ],
)
def test_an_engine_that_has_forgotten_whether_memory_was_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, later: str, findings: int
) -> None:
    monkeypatch.setattr(World, "restamps", True)
    ends = [answer(at, "GET", 200, "finishedWithError", message=text) for at, text in ((3, first), (4, later))]
    life = Life(errand("good"), 1, tmp_path, answers=[*STARTED, *ends])
    assert len(found(tmp_path, life, harms=((2.5, 9.0, ""),))) == findings


@pytest.mark.parametrize(("absence", "findings"), [((3.5, 6.0), 0), ((3.5, 4.5), 1), ((5.5, 6.0), 1)])
def test_a_delete_whose_node_is_away(tmp_path: Path, absence: tuple[float, float], findings: int) -> None:
    """Its job may write on, but only if the node was away when the 204 came."""
    deleted = [answer(4, "DELETE", 503), answer(5, "DELETE", 204)]
    life = Life(errand("deleted"), 1, tmp_path, answers=[*STARTED, *deleted], deleting=4, deleted=5)
    life.kept = OUTPUT | {"beats.0": 4}
    life.at_rest = [("DELETE 204", OUTPUT)]
    assert len(found(tmp_path, life, absences=(absence,))) == findings


@pytest.mark.parametrize(("runs", "kills", "findings"), [(2, (1.5,), 0), (3, (1.5,), 1), (2, (2.5,), 1), (2, (), 1)])
def test_an_engine_that_was_killed_in_the_moment_of_a_start(
    tmp_path: Path, runs: int, kills: tuple[float, ...], findings: int
) -> None:
    """Only before the job was seen to run."""
    output = OUTPUT | {"runs.0": runs * len("run\n")}
    life = Life(errand("good"), 1, tmp_path, answers=ENDED, kept=output, at_rest=[("its end", output)])
    assert len(found(tmp_path, life, ((0.5, 3, ""),), kills)) == findings


def test_what_is_left_or_foreign(tmp_path: Path) -> None:
    world = SimpleNamespace(rig=SimpleNamespace(servers=[]))
    run = SimpleNamespace(lives=[], left={"a pod"}, before=[1], after=[], listing_codes={500: 1}, world=world)
    assert len(checks.findings(run)) == 3  # type: ignore[arg-type]


@pytest.mark.slow  # needs a C compiler, which not every machine of the quick tests has
def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    library = Run(World(ExitStack(), tmp_path), plan.Plan(1, 1, (), ())).clock_shift
    env = {"LD_PRELOAD": library, "CLOCK_SKEW_SECONDS": "-420"}
    told = [int(subprocess.check_output(["date", "+%s"], env=one)) for one in ({}, env)]
    assert 418 <= told[0] - told[1] <= 420
