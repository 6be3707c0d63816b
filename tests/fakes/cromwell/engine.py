"""The part of Cromwell that works by itself: picks workflows up, runs their call, watches and aborts it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import WDL

from tests.fakes.cromwell import wdl
from tests.fakes.cromwell.api import VERSION
from tests.fakes.cromwell.config import Backend, Config, Pace
from tests.fakes.cromwell.job import LOST_CODE, TERMINATED, Job, NoSuchTask, NotStarted
from tests.fakes.cromwell.store import Event, Store, Workflow, timestamp

log = logging.getLogger("cromwell")
T = TypeVar("T")

TERMINATED_MESSAGE = (
    "The compute backend terminated the job. If this termination is unexpected, examine likely causes such as "
    "preemption, running out of disk or memory on the compute instance, or exceeding the backend's maximum job "
    "duration."
)
UNCAUGHT = (
    "DispatchedConfigAsyncJobExecutionActor failed and didn't catch its exception. This condition has been handled "
    "and the job will be marked as failed."
)
_PHASES = (
    "Pending", "RequestingExecutionToken", "WaitingForValueStore", "PreparingJob", "RunningJob", "UpdatingJobStore",
)  # fmt: skip


def failure(message: str, *causes: dict[str, Any]) -> dict[str, Any]:
    return {"message": message, "causedBy": list(causes)}


class CallFailed(Exception):
    """The call ends as Failed, for this reason; `terminated` when its return code looks like a kill."""

    def __init__(self, reason: dict[str, Any], terminated: bool = False) -> None:
        super().__init__(reason["message"])
        self.reason = reason
        self.terminated = terminated


class CallAborted(Exception):
    pass


@dataclass
class Run:
    """A workflow that this process works on."""

    row: Workflow
    store: Store
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    phases: list[str] = field(default_factory=list)

    def put(self, **values: Any) -> None:
        self.store.put(*(Event(self.row.id, key, value) for key, value in values.items()))

    def put_call(self, call: str, attempt: int, **values: Any) -> None:
        self.store.put(*(Event(self.row.id, key, value, call, attempt) for key, value in values.items()))

    async def pause(self, seconds: float) -> None:
        """Sleep, but not beyond an abort."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.aborted.wait(), seconds)


class Engine:
    def __init__(self, config: Config, store: Store, pace: Pace) -> None:
        self.config, self.store, self.pace = config, store, pace
        self.cromwell_id = f"cromid-{uuid.uuid4().hex[:7]}"
        self._began = time.monotonic()
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tokens: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        self._jobs = 0  # tokens in use
        self._threads = ThreadPoolExecutor(32)

    # -- loops -----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, then release the workflows so that the next process takes them over at once."""
        pace = self.pace
        loops = [
            self._every(pace.pickup_period, self.pick_up),
            self._every(pace.token_period, self.dispense),
            self._every(pace.abort_scan, self.scan_aborts),
            self._every(pace.heartbeat_period, self._beat),
            self._every(pace.metadata_flush, self._flush),
            self._every(pace.summary_period, self._summarize),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        await stop.wait()
        for task in [*tasks, *self._tasks]:
            task.cancel()
        await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what those tasks cancelled in turn
        self.store.beat(self._runs, None)
        self._threads.shutdown(cancel_futures=True)

    async def _every(self, period: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self.tick(period)
            try:
                await work()
            except Exception:
                log.exception("a periodic task failed")

    async def tick(self, period: float) -> None:
        """Wait for the next multiple of `period` since the start."""
        await asyncio.sleep(period - (time.monotonic() - self._began) % period)

    async def _flush(self) -> None:
        await self.off(self.store.flush)

    async def _summarize(self) -> None:
        await self.off(self.store.summarize)

    async def off(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def pick_up(self) -> None:
        room = min(self.pace.pickup_count, self.pace.max_workflows - len(self._runs))
        for row in self.store.pick_up(room, self.pace.heartbeat_ttl) if room > 0 else []:
            run = self._runs[row.id] = Run(row, self.store)
            task = asyncio.create_task(self._guard(run))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def dispense(self) -> None:
        limit = min(backend.concurrent_job_limit for backend in self.config.backends.values())
        for _ in range(min(self.pace.token_count, self._tokens.qsize(), limit - self._jobs)):
            token = self._tokens.get_nowait()
            if not token.done():
                self._jobs += 1
                token.set_result(None)

    async def scan_aborts(self) -> None:
        for workflow in self.store.aborting():
            run = self._runs.get(workflow)
            if run is not None and not run.aborted.is_set():
                run.put(status="Aborting")
                run.aborted.set()

    async def _beat(self) -> None:
        self.store.beat(self._runs, time.time())

    # -- a workflow ------------------------------------------------------------------------------------------------

    async def _guard(self, run: Run) -> None:
        try:
            await self._workflow(run)
        except Exception as error:
            log.exception("workflow %s", run.row.id)
            await self._end(run, "Failed", failure("Workflow failed", failure(f"{type(error).__name__}: {error}")))

    async def _end(self, run: Run, status: str, reason: dict[str, Any] | None = None) -> None:
        if reason is not None:
            run.put(failures=[reason])
        run.put(**{"status": status, "end": timestamp(), "workflowProcessingEvents[]": self._event("Finished")})
        await asyncio.sleep(self.pace.removal)
        self.store.remove(run.row.id)
        del self._runs[run.row.id]

    def _event(self, description: str) -> dict[str, str]:
        return {
            "cromwellId": self.cromwell_id, "description": description, "timestamp": timestamp(),
            "cromwellVersion": VERSION,
        }  # fmt: skip

    async def _workflow(self, run: Run) -> None:
        row = run.row
        labels = {f"labels:{key}": value for key, value in row.labels.items()}
        status = "Aborting" if row.state == "Aborting" else "Running"
        run.put(**{"workflowProcessingEvents[]": self._event("PickedUp")}, status=status, start=timestamp(), **labels)
        version = "1.0" if "version 1.0" in row.source else "draft-2"
        run.put(actualWorkflowLanguage="WDL", actualWorkflowLanguageVersion=version)
        await self._end(run, *await self._outcome(run))

    async def _outcome(self, run: Run) -> tuple[str, dict[str, Any] | None]:
        """The final status and the reason of a failure."""
        try:
            plan = await self.off(wdl.plan, run.row.source, json.loads(run.row.inputs))
            run.put(workflowName=plan.workflow_name, inputs=json.loads(run.row.inputs))
            backend, values = await self._initialise(run, plan)
            run.put(workflowRoot=f"{backend.root}/{plan.workflow_name}/{run.row.id}")
            await run.pause(self.pace.launch)
            await self._attempts(run, plan, backend, values)
        except wdl.InvalidWorkflow as error:
            return "Failed", failure("Workflow input processing failed", failure(str(error)))
        except CallAborted:
            return "Aborted", None
        except CallFailed as error:
            await asyncio.sleep(self.pace.close)
            return "Failed", failure("Workflow failed", error.reason)
        await asyncio.sleep(self.pace.close)
        return "Succeeded", None

    async def _initialise(self, run: Run, plan: wdl.Plan) -> tuple[Backend, wdl.Values]:
        """Find the backend and check types; a wrong-typed attribute is tried again for a quarter of an hour."""
        name = json.loads(run.row.options).get("backend", self.config.default_backend)
        backend = self.config.backends.get(name)
        if backend is None:
            raise wdl.InvalidWorkflow(f"Backend for call {plan.call} ('{name}') not registered in configuration file")
        for _ in range(self.pace.retry_count):
            try:
                return backend, backend.attributes.resolve(plan.runtime, backend.defaults)
            except wdl.WrongType as error:
                message = str(error)
            await run.pause(self.pace.retry_period)
            if run.aborted.is_set():
                raise CallAborted
        raise wdl.InvalidWorkflow(f"Runtime attribute validation failed: {message}")

    # -- a call ----------------------------------------------------------------------------------------------------

    async def _attempts(self, run: Run, plan: wdl.Plan, backend: Backend, values: wdl.Values) -> None:
        rules = wdl.ReturnRules.of(plan.runtime, backend.defaults)
        known = self.store.jobs(run.row.id)
        docker = not isinstance(values.get("docker", WDL.Value.Null()), WDL.Value.Null)
        for attempt in range(max(known, default=1), rules.max_retries + 2):
            job = Job(backend, run.row.id, plan.workflow_name, plan.task_name, attempt, docker)
            call = _Call(self, run, plan, job, values, rules, known.get(attempt))
            if await call.succeeds(last=attempt > rules.max_retries):
                return

    async def token(self, run: Run, job_id: str | None) -> None:
        """A workflow that is aborted meanwhile gets none, and its job is not killed, even if it runs since a restart.

        This is so in EngineJobExecutionActor.scala. If the workflow was being aborted when Cromwell was restarted,
        WorkflowExecutionActor.scala sends ReconnectToAbortingJobCommand, and the job is killed.
        """
        token: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tokens.put_nowait(token)
        abort = asyncio.ensure_future(run.aborted.wait())
        reconnects = job_id is not None and run.row.state == "Aborting"
        both: list[asyncio.Future[Any]] = [token] if reconnects else [token, abort]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            abort.cancel()
        if not token.done():
            token.cancel()
            raise CallAborted

    def give_back(self) -> None:
        self._jobs -= 1


@dataclass
class _Call:
    """One attempt of the call of one workflow."""

    engine: Engine
    run: Run
    plan: wdl.Plan
    job: Job
    values: wdl.Values
    rules: wdl.ReturnRules
    job_id: str | None  # known from before a restart
    _may_kill: bool = True
    _times: list[str] = field(default_factory=list)

    def put(self, **values: Any) -> None:
        self.run.put_call(self.plan.call, self.job.attempt, **values)

    def _phase(self) -> None:
        self._times.append(timestamp())

    def _events(self) -> list[dict[str, str]]:
        ends = [*self._times[1:], timestamp()]
        times = zip(_PHASES, self._times, ends, strict=False)
        return [{"description": name, "startTime": begin, "endTime": end} for name, begin, end in times]

    async def succeeds(self, last: bool) -> bool:
        """Run the attempt to its end; False when it failed and another may follow. Raises when none may."""
        self.put(executionStatus="QueuedInCromwell", backend=self.job.backend.name, start=timestamp())
        try:
            await self._work()
        except CallAborted:
            self.put(executionStatus="Aborted", end=timestamp(), executionEvents=self._events())
            raise
        except CallFailed as error:
            if not error.terminated:
                self._phase()
            await asyncio.sleep(self.engine.pace.finish)
            status = "Failed" if last else "RetryableFailure"
            self.put(executionStatus=status, retryableFailure=not last, failures=[error.reason], end=timestamp())
            self.put(executionEvents=self._events())
            if last:
                raise
            return False
        self._phase()
        await asyncio.sleep(self.engine.pace.finish)
        self.put(executionStatus="Done", outputs={}, end=timestamp(), executionEvents=self._events())
        return True

    async def _work(self) -> None:
        self._phase()
        self._phase()
        await self.engine.token(self.run, self.job_id)
        try:
            for _ in _PHASES[2:-1]:
                self._phase()
            seen = self._prepare()
            if self.job_id is not None and self.run.row.state == "Aborting":
                # reconnectToExistingJob of SharedFileSystemAsyncJobExecutionActor.scala: an abort of before the restart
                # has left a code, and `kill` is not run again, also if that one died in the middle of it
                self._may_kill = self.job.code() is None
            if self.job_id is None:
                self.job_id = await self._submit(seen)
                self.engine.store.set_job(self.run.row.id, self.job.attempt, self.job_id)
                self.put(jobId=self.job_id)
                await self.engine.tick(self.engine.pace.key_value_flush)
            await self._watch(seen)
        finally:
            self.engine.give_back()

    def _prepare(self) -> wdl.Values:
        caching = {"allowResultReuse": False, "effectiveCallCachingMode": "CallCachingOff"}
        self.put(callCaching=caching, inputs={})
        try:
            seen, shown = self.job.backend.attributes.convert(self.values, self.plan.runtime)
        except wdl.InvalidAttribute as error:
            cause = failure("Runtime attribute validation failed", failure(str(error)))
            raise CallFailed(failure(UNCAUGHT, cause)) from error
        self.put(
            executionStatus="Running",
            runtimeAttributes=shown | self.rules.shown,
            commandLine=self.plan.command,
            callRoot=str(self.job.call_root),
            stdout=str(self.job.file("stdout")),
            stderr=str(self.job.file("stderr")),
        )
        return seen

    async def _submit(self, seen: wdl.Values) -> str:
        if self.job.docker and self.engine.config.docker_bug:
            image = seen["docker"].value
            text = f"No coercion defined from '{image}' of type 'cromwell.backend.validation.Containers' to 'String?'."
            raise CallFailed(failure(f"java.lang.IllegalArgumentException: {text}", failure(text)))
        try:
            return await self.engine.off(self.job.submit, self.plan.command, seen)
        except NoSuchTask as error:
            raise CallFailed(failure(f"java.lang.RuntimeException: {error}", failure(str(error)))) from error
        except NotStarted as error:
            raise CallFailed(failure(str(error))) from error

    async def _watch(self, seen: wdl.Values) -> None:
        """Poll until there is a return code. The pauses become longer, and the first poll never looks at the code."""
        assert self.job_id is not None
        pace, job = self.engine.pace, self.job
        self.put(jobId=self.job_id, backendStatus="Running")
        wait, status, killed = pace.poll_first, "Running", False
        patience = job.backend.exit_code_timeout_seconds
        deadline = time.monotonic() + (patience or 0)
        while True:
            if self.run.aborted.is_set() and not killed:
                killed = True
                if self._may_kill:
                    await self.engine.off(job.kill, self.job_id, seen)
            await (asyncio.sleep(wait) if killed else self.run.pause(wait))
            wait = min(wait * pace.poll_factor, pace.poll_max)
            code = job.code()
            if code is not None:
                return self._finish(code, "Done")
            if patience is None or time.monotonic() < deadline:
                continue
            if status == "WaitingForReturnCode":
                job.put_code(LOST_CODE)
                return self._finish(LOST_CODE, "Failed")
            if not await self.engine.off(job.alive, self.job_id, seen):
                status = "WaitingForReturnCode"
                self.put(backendStatus=status)
            deadline = time.monotonic() + patience

    def _finish(self, code: int, status: str) -> None:
        self.put(backendStatus=status)
        name = f"{self.plan.call}:NA:{self.job.attempt}"
        if code in TERMINATED:
            if self.run.aborted.is_set():
                raise CallAborted
            raise CallFailed(failure(TERMINATED_MESSAGE), terminated=True)
        self.put(returnCode=code)
        size = self.job.stderr_bytes() if self.rules.fail_on_stderr else 0
        if size:
            text = f"stderr for job {name} has length {size} and 'failOnStderr' runtime attribute was true."
            raise CallFailed(failure(text))
        if self.rules.codes is not None and code not in self.rules.codes:
            text = f"Job {name} exited with return code {code} which has not been declared as a valid return code."
            raise CallFailed(failure(f"{text} See 'continueOnReturnCode' runtime attribute for more details."))
