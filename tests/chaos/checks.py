"""What must be true of a run, whatever was killed, cut off or slow. Each check yields sentences about what is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.driver import Answer, Life, Run
from tests.rig import FINAL

RANK = {"notstarted": 0, "started": 1, **dict.fromkeys(FINAL, 2)}
ALLOWED = {"POST": {0, 201, 503}, "GET": {0, 200, 503}, "DELETE": {0, 204, 503}}


def findings(run: Run) -> list[str]:
    named = ((f"{life.errand.kind} {life.errand.name}, life {life.number}", life) for life in run.lives)
    found = [f"{name}: {text}" for name, life in named for text in _of(life, run)]
    found += [f"still there after all was deleted: {one}" for one in sorted(run.left)]
    if run.before != run.after:
        found.append(f"what is foreign was {run.before} and is {run.after}")
    for server in run.world.rig.servers:
        lines = [line for line in server.log.read_text(errors="replace").splitlines() if "unexpected error" in line]
        found += [f"{server.log.name}: {len(lines)} times: ... {lines[0][-700:]}"] if lines else []
    found += [f"the listing of jobs was {code}" for code in run.listing_codes if code not in (200, 503)]
    return found


def _of(life: Life, run: Run) -> Iterator[str]:
    yield from _codes(life)
    yield from _states(life, run.world.restamps)
    if life.accepted is None:
        yield f"was never accepted: {[(a.code, a.job.get('message')) for a in life.answers[-3:]]}"
        return
    message = next((str(answer.job["message"]) for answer in life.answers if answer.state in FINAL), "")
    over = life.over or run.clock()
    harmed = any(life.answers[0].at < end and begin < over and words in message for begin, end, words in run.harms)
    yield from _end(life, harmed)
    begun = next((answer.at for answer in life.answers if RANK.get(answer.state)), life.over or 0)
    forgotten = run.world.forgets and any(life.errand.at <= kill <= begun for kill in run.kills)
    yield from _output(life, harmed, 2 if forgotten else 1)
    yield from _rest(life, any(begin < (life.deleted or 0) < end for begin, end in run.absences))
    yield from _listed(life, run)


def _codes(life: Life) -> Iterator[str]:
    """A GET is 404 after a DELETE and never before.

    A DELETE is 404 only if the answer to an earlier one was lost, which may have been a 204.
    """
    lost = False
    wrong = Counter[str]()
    for answer in life.answers:
        allowed = ALLOWED[answer.call]
        if answer.call == "GET" and life.deleted and answer.at > life.deleted:
            allowed = {0, 404, 503}
        if answer.call == "DELETE" and lost:
            allowed = allowed | {404}
        if answer.code not in allowed:
            wrong[f"{answer.call} was {answer.code}: {answer.job.get('message')}"] += 1
        lost |= answer.call == "DELETE" and not answer.code and answer.replica > 0
    yield from (f"{times} times: {what}" for what, times in wrong.items())


def _states(life: Life, restamps: bool) -> Iterator[str]:
    told = [answer for answer in life.answers if answer.state and not (life.deleting and answer.at > life.deleting)]
    for answer in told:
        if answer.state not in RANK:
            yield f"was {answer.state} at {answer.at:.1f} s: {answer.job['message']}"
    known = [answer for answer in told if answer.state in RANK]
    for before, after in pairwise(known):
        if RANK[after.state] < RANK[before.state]:
            yield f"went back: {_word(before)}, then {_word(after)}"
    told = [answer for answer in known if answer.state in FINAL and answer.call == "GET"]
    ends = {_said(a) if restamps else (a.state, a.job["message"], a.job["timestamp"]): a for a in told}
    if len(ends) > 1:
        yield "has several ends: " + ", then ".join(map(_word, ends.values()))


def _said(answer: Answer) -> tuple[str, str]:
    """The state and the words of its message, but for what is said of memory."""
    return answer.state, re.split(r"(?<=\(exit code 137\)), ", answer.job["message"])[0]


def _word(answer: Answer) -> str:
    job = answer.job
    return f"{answer.state} at {answer.at:.1f} s of replica {answer.replica} ({job['timestamp']}, {job['message']!r})"


def _end(life: Life, harmed: bool) -> Iterator[str]:
    """The state that the job's own doing has, or, where a part of the backend ended under it, an error with words."""
    end = next((answer for answer in life.answers if answer.state in FINAL), None)
    kind = "good" if life.number > 1 else life.errand.kind
    if end is None:
        if kind not in ("deleted", "again"):
            yield f"has no end; the last was {[(a.call, a.code, a.job) for a in life.answers[-2:]]}"
        return
    success, message = end.state == "finishedSuccessfully", end.job["message"]
    if success and kind not in ("good", "workers"):
        yield f"is a success: {_word(end)}"
    if not success and not message:
        yield "failed without a word"
    words = {"bad": "exit code 3", "limit": "time limit"}.get(kind)
    wrong = not success if words is None else words not in message
    if not harmed and wrong:
        yield f"ended as {_word(end)}"


def _output(life: Life, harmed: bool, most: int) -> Iterator[str]:
    """Each worker has begun once, and all that it writes is there when the end is told."""
    end = next((answer for answer in life.answers if answer.state in FINAL), None)
    workers = [str(number) for number in range(life.errand.workers)]
    runs = Counter({w: life.kept.get(f"runs.{w}", 0) // len("run\n") for w in workers})
    for worker in workers:
        if runs[worker] > most or (end and runs[worker] < 1 and (_good(end) or not harmed)):
            calls = [(round(answer.at, 1), answer.call, answer.code) for answer in life.answers]
            yield f"worker {worker} has run {runs[worker]} times: {life.kept}; {calls[:8]}"
        if end and (_good(end) or "exit code 3" in end.job["message"]):
            beats = sum(len(f"{number}\n") for number in range(1, life.beats + 1))
            files = life.at_rest[0][1]
            if files.get(f"beats.{worker}", 0) < beats or f"last.{worker}" not in files:
                yield f"is over and its output is incomplete: {files}"


def _rest(life: Life, away: bool) -> Iterator[str]:
    """Nothing is written after the end, nor after a 204 unless the node was away then."""
    for since, files in life.at_rest:
        if files != life.kept and not (away and life.over is None):
            yield f"wrote after {since}: {files}, {life.kept}"
            return


def _good(answer: Answer) -> bool:
    return answer.state == "finishedSuccessfully"


def _listed(life: Life, run: Run) -> Iterator[str]:
    if life.number > 1:
        return
    for began, ended, jids in run.listings:
        known = life.accepted is not None and life.accepted < began
        if known and ended < (life.deleting or ended + 1) and life.errand.name not in jids:
            yield f"is missing in the listing of {began:.1f} s"
            return
