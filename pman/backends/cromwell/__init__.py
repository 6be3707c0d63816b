"""SLURM through Cromwell: a job is a workflow, run by Cromwell with sbatch. How Cromwell behaves: docs/cromwell.md.

Cromwell's labels are all the state there is. A jid's n-th life is the workflow with the id uuid5(jid, n), which
Cromwell accepts once only, so that no retry, replica or kill can make two; DELETE labels it `deleted`. A new workflow
stays invisible for up to 5 s on a stock server: until then this process remembers what it posted, and another one
asks with a submission that cannot succeed whether the id is taken.
Change labels.py for what pman writes into labels, files.py for what is read of a call's files and why a job failed,
ending.py for a DELETE around a restart of Cromwell, and rest.py for how Cromwell is asked.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pman.backends import hiding, retry
from pman.backends.cromwell import ending
from pman.backends.cromwell import files as cromwell_files
from pman.backends.cromwell import labels as label
from pman.backends.cromwell import rest as cromwell_rest
from pman.backends.cromwell.labels import Workflow
from pman.backends.discovery import Overview, Place
from pman.backends.logs import Wanted
from pman.backends.shared import Together
from pman.errors import BadRequest, Misconfigured, Unreachable, jid_taken, no_such_job
from pman.job import Job
from pman.settings import Settings
from pman.status import Details, JobState, JobStatus
from pman.storage import mounts
from pman.targets.record import Problem
from pman.templating.render import Spec

log = logging.getLogger(__name__)

# Status of the workflow x of its call ("" without one, ANY where it does not matter) -> state.
# https://github.com/broadinstitute/cromwell, core/.../WorkflowState.scala and ExecutionStatus.scala
ANY = "any"
STATES: dict[tuple[str, str], JobState] = {
    ("On Hold", ANY): JobState.NOT_STARTED,
    ("Submitted", ANY): JobState.NOT_STARTED,
    ("Running", ""): JobState.NOT_STARTED,  # picked up; for 16 min where an attribute has a wrong type
    ("Running", "NotStarted"): JobState.NOT_STARTED,
    ("Running", "WaitingForQueueSpace"): JobState.NOT_STARTED,
    ("Running", "QueuedInCromwell"): JobState.NOT_STARTED,
    ("Running", "Starting"): JobState.NOT_STARTED,
    ("Running", "Running"): JobState.STARTED,  # also while pending in SLURM, where no file says so
    ("Running", "Aborting"): JobState.STARTED,
    # The call has ended; the workflow's end follows, and only that is final.
    ("Running", "Done"): JobState.STARTED,
    ("Running", "Failed"): JobState.STARTED,
    ("Running", "RetryableFailure"): JobState.STARTED,
    ("Running", "Aborted"): JobState.STARTED,
    ("Running", "Bypassed"): JobState.STARTED,
    ("Running", "Unstartable"): JobState.STARTED,
    ("Aborting", ANY): JobState.STARTED,  # its processes may still write
    ("Succeeded", ANY): JobState.SUCCEEDED,
    ("Failed", ANY): JobState.FAILED,
    ("Aborted", ANY): JobState.FAILED,
}

_HOG_GROUP_TOO_LONG = "x" * 300  # the database's column takes 100 characters
METADATA = ("status", "end", "failures", "executionStatus", "jobId", "returnCode", "stdout", "stderr")

PATIENCE_SECONDS = 1.0  # a POST waits no longer until its workflow shows; quick servers need 0.2-0.45 s
STOCK_SECONDS = 600.0  # a server that was slower than that is asked again after this time
WINDOW_SECONDS = 12.0  # a stock server shows a workflow, or a new label, after 5-7 s
KEPT_SECONDS = 600.0  # metadata of a job that SLURM has; a site's templates may let Cromwell run it again
MAX_KEPT = 20_000  # workflows, in 1.5 KiB each
MAX_REMEMBERED = 1000  # jobs that nobody asked for since they were posted
RECONNECT_SECONDS = 5.0  # for a configuration that cannot do what ending.py needs
KILL_FAILS_SECONDS = 8.0  # the reference configuration's `kill` gives up after 10 s at the earliest
ABORT_SECONDS = 60.0  # a stock server looks for aborts every 30 s


@dataclass(frozen=True, slots=True)
class _Posted:
    """A workflow that this process submitted and that has not been seen since."""

    attempt: int
    digest: str
    image: str
    cmd: str
    at: float  # seconds of the monotonic clock


@dataclass(frozen=True, slots=True)
class _Seen:
    """What status() has read; nothing of a workflow that Cromwell does not show yet."""

    workflow: Workflow | None = None
    calls: Sequence[Mapping[str, Any]] = ()


class CromwellBackend:
    """Jobs as workflows of one Cromwell. Keeps nothing that another process would need."""

    def __init__(self, settings: Settings) -> None:
        self._client = cromwell_rest.connect(settings)
        self._files = cromwell_files.Files(settings.cromwell_execution_root_map)
        self._settings = settings
        self._labels = label.of_site(settings.job_labels)
        self._posted: dict[str, _Posted] = {}
        self._together = Together(self._find, self._find_several)
        self._kept: dict[str, tuple[float, Mapping[str, Any]]] = {}  # workflow id -> when metadata was read, and it
        self._stock_until = 0.0
        self._may_probe = True

    # -- submit ----------------------------------------------------------------------------------------------------

    def submit(self, job: Job, spec: Spec) -> JobStatus:
        while True:
            found = self._find(job.jid)
            attempt = found.attempt + 1 if found else 1
            if found and not found.dead:
                _require_same(found.labels.get(label.DIGEST, job.digest), job)
                return self._describe(job.jid, found)
            posted = self._recently_posted(job.jid, attempt)
            if posted:
                _require_same(posted.digest, job)
                return _unseen(job.jid, posted)
            labels = self._labels | label.of_job(job, attempt)
            if self._create(job, spec, labels, attempt):
                return self._accepted(job, attempt)
            self._await_taken(job.jid, attempt, labels)

    def _create(self, job: Job, spec: Spec, labels: Mapping[str, str], attempt: int) -> bool:
        """False when the id is taken."""
        if self._settings.cromwell_sharedir_only and not mounts(job, self._settings).shared:
            raise BadRequest(_NO_SIBLINGS)
        options = spec.extras["options.json"]
        if label.CMD not in labels:
            options = json.dumps(json.loads(options) | {label.CMD: job.cmd})
        answer = self._client.submit(label.workflow_id(job.jid, attempt), spec.text, options, labels)
        if answer.status_code != 201 and not cromwell_rest.IN_USE.search(answer.text):
            raise BadRequest(f"Cromwell refuses the job: {cromwell_rest.words(answer)}", detail=answer.text)
        return answer.status_code == 201

    def _accepted(self, job: Job, attempt: int) -> JobStatus:
        """After a 201: wait until the workflow shows, on a server that shows it soon."""
        posted = _Posted(attempt, job.digest, job.image, job.cmd, time.monotonic())
        self._posted[job.jid] = posted
        self._forget_old()
        with contextlib.suppress(Unreachable):  # the job is accepted all the same
            if posted.at > self._stock_until and not self._await_shown(job.jid, attempt, PATIENCE_SECONDS):
                self._stock_until = time.monotonic() + STOCK_SECONDS
        return _unseen(job.jid, posted)

    def _forget_old(self) -> None:
        if len(self._posted) > MAX_REMEMBERED:
            now = time.monotonic()
            for jid in [jid for jid, posted in list(self._posted.items()) if now - posted.at > WINDOW_SECONDS]:
                self._posted.pop(jid, None)

    def _await_shown(self, jid: str, attempt: int, seconds: float) -> Workflow | None:
        return retry.wait_until(lambda: self._shown(jid, attempt), seconds)

    def _shown(self, jid: str, attempt: int) -> Workflow | None:
        found = self._find(jid)
        return found if found and found.attempt >= attempt else None

    def _await_taken(self, jid: str, attempt: int, labels: Mapping[str, str]) -> None:
        """Somebody else's submission of this id was first: wait until it shows, or give it back its labels."""
        if self._await_shown(jid, attempt, WINDOW_SECONDS / 2):
            return
        # A workflow that only its id finds lost its labels when Cromwell was killed. It may also have begun to show
        # since the last look, so there is another one before it gets labels.
        if self._client.status(label.workflow_id(jid, attempt)) and not self._shown(jid, attempt):
            self._client.patch_labels(label.workflow_id(jid, attempt), labels)
        if not self._await_shown(jid, attempt, WINDOW_SECONDS / 2):
            raise Unreachable("Cromwell has accepted the job but does not show it yet; it may have been restarted.")

    # -- look up ---------------------------------------------------------------------------------------------------

    def _find(self, jid: str) -> Workflow | None:
        """The jid's last workflow, a living one before a deleted one (the older pman may have made several)."""
        return self._last(jid, map(Workflow.of, self._client.query(f"{label.NAME}:{jid}")))

    def _find_several(self, jids: Collection[str]) -> Mapping[str, Workflow]:
        """The same of those that one query shows."""
        found = [*map(Workflow.of, self._client.query_several(f"{label.NAME}:{jid}" for jid in jids))]
        return {jid: last for jid in jids if (last := self._last(jid, found))}

    def _last(self, jid: str, found: Iterable[Workflow]) -> Workflow | None:
        # Some databases compare without regard to case.
        mine = [w for w in found if w.labels.get(label.NAME) == jid]
        last = max(mine, key=lambda w: (w.attempt, not w.dead, w.submission), default=None)
        posted = self._posted.get(jid)
        if last and posted and last.attempt >= posted.attempt:
            self._posted.pop(jid, None)
        return last

    def _recently_posted(self, jid: str, attempt: int) -> _Posted | None:
        """What this process posted, while a stock server may not show it; later it may have been lost in a crash."""
        posted = self._posted.get(jid)
        recent = posted and time.monotonic() - posted.at < WINDOW_SECONDS
        return posted if posted and recent and posted.attempt == attempt else None

    def _is_taken(self, jid: str, attempt: int) -> bool:
        """Whether Cromwell has accepted this attempt, shown or not. Changes nothing.

        Posts a workflow of that id whose hog group is too long to be stored: Cromwell looks at the id first, so that
        its complaint tells whether the id is taken. A database that cuts long texts short does take the workflow: it
        is on hold and labelled as deleted, so it counts as a dead attempt, and pman does not ask like this again. It
        stays on hold, since an abort before Cromwell shows it would free its id for another workflow.
        """
        if not self._may_probe:
            return False
        name, labels = label.workflow_id(jid, attempt), label.of_grave(jid, attempt)
        answer = self._client.submit(name, "", json.dumps({"hogGroup": _HOG_GROUP_TOO_LONG}), labels, on_hold=True)
        if answer.status_code == 201:
            log.warning("Cromwell's database accepts any hogGroup, so that other replicas may not see a new job")
            self._may_probe = False
            return False
        return bool(cromwell_rest.IN_USE.search(answer.text))

    def status(self, jid: str) -> JobStatus:
        _require_possible(jid)
        found = self._together.get(jid)
        if found and not found.dead:
            return self._describe(jid, found)
        attempt = found.attempt + 1 if found else 1
        posted = self._recently_posted(jid, attempt)
        if posted or self._is_taken(jid, attempt):
            return _unseen(jid, posted or self._posted.get(jid))
        self._posted.pop(jid, None)
        raise no_such_job(jid)

    def _describe(self, jid: str, found: Workflow) -> JobStatus:
        """The status of a workflow. Its end is final when the query shows it, a second or so after metadata does.

        So no replica can see it end before another one, which keeps metadata, sees it run.
        """
        meta = self._metadata(found)
        calls = [entry for entries in meta.get("calls", {}).values() for entry in entries]
        image, cmd = found.identity(meta, calls)
        state, message = self._judge(found.status, meta, calls)
        end = datetime.fromisoformat(meta["end"]) if state.final and "end" in meta else None
        return JobStatus(jid, image, cmd, state, message, end, _Seen(found, calls), found.posted_at, found.user)

    def _metadata(self, found: Workflow) -> Mapping[str, Any]:
        """What the query does not say: whether the job of a running workflow waits or runs, and where its logs are.

        Once SLURM has the job, metadata has nothing new before the job ends. The query, and the job's files where pman
        sees them, show that too; so it is read again then.
        """
        more = found.keys_of_identity()
        if found.status in ("On Hold", "Submitted"):
            return self._client.metadata(found.id, more) if more else {}
        read_at, meta = self._kept.pop(found.id, (0.0, {}))
        is_running, now = found.status == "Running", time.monotonic()
        if not is_running or now - read_at > KEPT_SECONDS or not self._is_in_slurm(meta):
            read_at, meta = now, self._client.metadata(found.id, [*METADATA, *more])
        if is_running and not more:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            self._kept[found.id] = read_at, meta
        return meta

    def _is_in_slurm(self, meta: Mapping[str, Any]) -> bool:
        calls = [call for entries in meta.get("calls", {}).values() for call in entries]
        numbered = (call.get("executionStatus") == "Running" and "jobId" in call for call in calls)
        return bool(calls) and all(numbered) and self._files.exit_code(calls[-1]) is None

    def _judge(self, status: str, meta: Mapping[str, Any], calls: list[Mapping[str, Any]]) -> tuple[JobState, str]:
        states = [_call_state(status, call) for call in calls or [{}]]
        state = JobState.STARTED if JobState.STARTED in states else states[-1]
        last = calls[-1] if calls else {}
        if state is JobState.FAILED:
            return state, cromwell_files.explain(status, meta, last, self._files)
        if state is not JobState.STARTED or not calls:
            return state, _WAITING.get((status, state), "")
        seen = [cromwell_files.progress(call, self._files) for call in calls]
        state = JobState.STARTED if any(word is JobState.STARTED for word, _ in seen) else JobState.NOT_STARTED
        return state, _WAITING.get((status, JobState.STARTED), seen[-1][1])

    # -- the rest --------------------------------------------------------------------------------------------------

    def workers(self, status: JobStatus) -> int:
        return max((self._files.workers(call) for call in status.kept(_Seen).calls), default=0)

    def streams(self, status: JobStatus, worker: int, wanted: Wanted) -> list[str]:
        """Of all attempts, one after another."""
        over = status.state.final
        each = (self._files.streams(call, worker, wanted, over=over) for call in status.kept(_Seen).calls)
        return [text for texts in each for text in texts]

    def spec(self, status: JobStatus, environment: bool) -> dict[str, str]:
        seen = status.kept(_Seen)
        found = seen.workflow
        files = (self._client.metadata(found.id, ["submittedFiles"]) or {}).get("submittedFiles", {}) if found else {}
        text = files.get("workflow", "")
        count = found.labels.get(label.VARIABLES, "") if found else "0"
        shown = text if environment else hiding.in_script(text, int(count) if count.isdecimal() else None)
        return {"spec": shown, "options.json": files.get("options", "")}

    def details(self, status: JobStatus) -> Details:
        """The task's attributes are in metadata alone. When and where SLURM runs the job, Cromwell does not say."""
        seen = status.kept(_Seen)
        if not seen.workflow:
            return Details()
        meta = self._client.metadata(seen.workflow.id, ["runtimeAttributes"]) if seen.calls else None
        calls = [entry for entries in (meta or {}).get("calls", {}).values() for entry in entries]
        return label.details(status, seen.workflow, calls[-1].get("runtimeAttributes", {}) if calls else {})

    def delete(self, jid: str) -> None:
        _require_possible(jid)
        found = self._find(jid)
        if found is None or found.dead:
            attempt = found.attempt + 1 if found else 1
            known = self._recently_posted(jid, attempt) or self._is_taken(jid, attempt)
            if not known and not found:
                raise no_such_job(jid)
            if not known and self._may_probe:  # deleted before, by a DELETE whose answer may have been lost
                return
            # An abort before it shows would mix two workflows up; and what nobody can ask for may be another replica's.
            shown = self._await_shown(jid, attempt, WINDOW_SECONDS)
            if not shown and known:
                raise Unreachable("Cromwell does not show the job yet; it may have been restarted.")
            if not shown or shown.dead:
                return
            found = shown
        began = time.monotonic()
        retry.call_last(
            self._remove, jid, found, began
        )  # a second look would find what this one has labelled as deleted

    def _remove(self, jid: str, found: Workflow | None, began: float) -> None:
        """End this workflow and label it as deleted; then the jid's others of the same life, or of one before."""
        assert found is not None
        last = found.attempt  # what is posted meanwhile is another life
        while found and not found.dead and found.attempt <= last:
            self._end(found, began)
            self._bury(jid, found)
            found = self._find(jid)

    def _end(self, found: Workflow, began: float) -> None:
        """Abort the workflow. Where its `kill` may not have run, or may have failed, have it run again."""
        if found.status != "Aborted":
            if _state(found.status, "").final:
                return
            self._abort(found)
        meta = self._client.metadata(found.id, ending.KEYS)
        quick = not found.status.startswith("Abort") and time.monotonic() - began < KILL_FAILS_SECONDS
        if ending.is_possible(meta) and (ending.was_restarted(meta) or not quick):
            ending.end_job(self._client, found.id, meta, ABORT_SECONDS)

    def _abort(self, found: Workflow) -> None:
        meta = self._client.metadata(found.id, ending.KEYS)
        if ending.was_restarted(meta) and not ending.is_possible(meta):
            time.sleep(RECONNECT_SECONDS)  # by now Cromwell is at most jobs again, and runs `kill`
        self._client.abort(found.id)
        if not retry.wait_until(lambda: _state(self._client.status(found.id), "").final, ABORT_SECONDS):
            raise Unreachable("Cromwell has not ended the job yet; delete it again.")

    def _bury(self, jid: str, found: Workflow) -> None:
        self._client.patch_labels(found.id, {label.DELETED: "yes"})

        def buried() -> bool:
            last = self._find(jid)
            return last is None or last.dead or last.id != found.id

        if not retry.wait_until(buried, WINDOW_SECONDS):
            raise Unreachable("Cromwell does not show that the job was deleted; delete it again.")

    def jobs(self, limit: int) -> list[JobStatus]:
        """From one query: a job that Cromwell runs is `started` here, also while it is queued in SLURM."""
        more = {"page": "1", "pagesize": str(limit), "excludeLabelAnd": f"{label.DELETED}:yes"}
        rows = sorted(map(Workflow.of, self._client.query(f"{label.MANAGED}:yes", more)), key=lambda w: w.submission)
        return [_listed(found) for found in reversed(rows)]

    def ping(self) -> None:
        known, wanted = self._client.backends(), self._settings.cromwell_backend
        if wanted not in (None, *known):
            raise Misconfigured(f"Cromwell has no backend {wanted}; CROMWELL_BACKEND may be {', '.join(known)}.")

    def overview(self) -> Overview:
        seen = Overview()
        version = seen.ask("its version", self._client.version)
        seen.version = f"Cromwell {version}" if version else ""
        known = seen.ask("its backends", self._client.backends) or []
        used = self._settings.cromwell_backend or "".join(known[:1])
        seen.places += [Place(name, "backend", note="runs pman's jobs" if name == used else "") for name in known]
        seen.unasked.append("partitions and nodes: Cromwell does not say what is behind its backends")
        return seen


def problems(settings: Settings) -> Iterator[str]:
    if settings.cromwell_url is None:
        yield "CROMWELL_URL is required with CONTAINER_ENV=cromwell."
    if settings.timelimit_minutes is None:
        yield "TIMELIMIT_MINUTES is required with CONTAINER_ENV=cromwell."
    if (settings.cromwell_auth_user is None) != (settings.cromwell_auth_password is None):
        yield "CROMWELL_AUTH_USER and CROMWELL_AUTH_PASSWORD go together."


def live(settings: Settings, spec: Spec) -> Iterator[Problem]:
    """What Cromwell has against a workflow, which it reads and does not run, and against CROMWELL_BACKEND."""
    client = cromwell_rest.connect(settings)
    errors = client.describe(spec.text)
    for said in errors or ():
        line = re.search(r"line[: ]+(\d+)", said)
        yield Problem(f"Cromwell does not take this: {said}", int(line[1]) if line else None, rule="live")
    known = client.backends()
    if settings.cromwell_backend not in (None, *known):
        said = f"Cromwell has no backend {settings.cromwell_backend}; CROMWELL_BACKEND may be {', '.join(known)}"
        yield Problem(said, rule="live")
    unasked = "what its configuration makes of runtime attributes (--cromwell-conf), and SLURM"
    if errors is None:
        unasked = f"the workflow, for this Cromwell is too old, {unasked}"
    yield Problem(f"Cromwell was not asked about {unasked}", rule="not-asked")


def create(settings: Settings) -> CromwellBackend:
    """The backend over CROMWELL_URL. Nothing is sent yet: Cromwell may come up later."""
    return CromwellBackend(settings)


_NO_SIBLINGS = (
    "input_dir and output_dir must be `incoming` and `outgoing` of one directory, such as key-x/incoming and "
    "key-x/outgoing: Cromwell's configuration knows that directory alone (CROMWELL_SHAREDIR_ONLY)."
)
_WAITING = {
    ("On Hold", JobState.NOT_STARTED): "On hold in Cromwell.",
    ("Submitted", JobState.NOT_STARTED): "Waiting for Cromwell to pick it up.",
    ("Running", JobState.NOT_STARTED): "Being prepared by Cromwell.",
    ("Aborting", JobState.STARTED): "Being ended by Cromwell.",
}


def _listed(found: Workflow) -> JobStatus:
    state = _state(found.status, "Running")
    end = datetime.fromisoformat(found.end) if state.final and found.end else None
    name = found.labels.get(label.NAME, "")
    identity = found.identity({}, [])
    return JobStatus(name, *identity, state, finished_at=end, posted_at=found.posted_at, user=found.user)


def _state(status: str, call: str) -> JobState:
    """The table's word; `undefined` for what is not in it, never final."""
    state = STATES.get((status, call)) or STATES.get((status, ANY))
    if state is None and status:
        log.warning("unknown state of Cromwell: workflow %r, call %r", status, call)
    return state or JobState.UNDEFINED


def _call_state(status: str, call: Mapping[str, Any]) -> JobState:
    """A Cromwell that was killed and started again prepares anew what SLURM has: that does not go back."""
    state = _state(status, call.get("executionStatus", ""))
    return _state(status, "Running") if state is JobState.NOT_STARTED and "jobId" in call else state


def _unseen(jid: str, posted: _Posted | None) -> JobStatus:
    image, cmd = (posted.image, posted.cmd) if posted else ("", "")
    message = _WAITING["Submitted", JobState.NOT_STARTED]
    return JobStatus(jid, image, cmd, JobState.NOT_STARTED, message, private=_Seen())


def _require_possible(jid: str) -> None:
    if len(jid) > label.LABEL_MAX:
        raise no_such_job(jid)


def _require_same(digest: str, job: Job) -> None:
    if digest != job.digest:
        raise jid_taken(job.jid)
