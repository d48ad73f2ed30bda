"""Handles, which submitting a job and emitting an event return."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, Unpack

from jobledger.definitions.context import maybe_current_job
from jobledger.definitions.copy_options import CopyOptions
from jobledger.definitions.durations import Seconds
from jobledger.errors import ConfigError, JobCancelled, JobExpired, JobFailed, ResultInsideJob, StatusTimeout
from jobledger.explain import Explanation
from jobledger.job import JobStatus, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas.events import Position

R_co = TypeVar("R_co", covariant=True)


class Waiter(Protocol):
    """The methods of a client that a handle calls; see `jobledger.client.client.Client`."""

    def status(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = ...) -> JobStatus: ...

    async def status_async(
        self, job_id: str, *, at_least: Position | None = None, timeout: Seconds = ...
    ) -> JobStatus: ...

    def wait(self, job_id: str, *, at_least: Position | None = None, timeout: Seconds | None = None) -> JobStatus: ...

    async def wait_async(
        self, job_id: str, *, at_least: Position | None = None, timeout: Seconds | None = None
    ) -> JobStatus: ...

    def cancel(self, job_id: str, reason: str | None = None) -> None: ...

    async def cancel_async(self, job_id: str, reason: str | None = None) -> None: ...

    def redrive(self, job_id: str, reason: str | None = None) -> Plan: ...

    def copy(self, job_id: str, task_of: Callable[[str], Any], **options: Unpack[CopyOptions]) -> JobHandle[Any]: ...
    def explain(self, job_id: str, *, at_least: Position | None = None) -> Explanation: ...


class Decodes(Protocol[R_co]):
    """The method of a task that a handle calls."""

    def decode_result(self, value: Any, job_id: str) -> R_co: ...


class JobHandle(Generic[R_co]):
    """A job whose submission the log has acknowledged. ``job_id``: the job's id. ``position``: the position of the
    submission in the log (topic, partition, offset)."""

    __slots__ = ("_client", "_task", "job_id", "position")

    def __init__(self, client: Waiter, task: Decodes[R_co], job_id: str, position: Position) -> None:
        self._client, self._task, self.job_id, self.position = client, task, job_id, position

    def __repr__(self) -> str:
        return f"<job {self.job_id} at {self.position}>"

    def status(self, timeout: Seconds = 10.0) -> JobStatus:
        """Return the job's status from the status table, at least as new as the submission. Raises `StatusTimeout` if
        the table has not read the submission within ``timeout`` seconds."""
        warn_on_loop("handle.status()", "handle.status_async()")
        return self._client.status(self.job_id, at_least=self.position, timeout=timeout)

    async def status_async(self, timeout: Seconds = 10.0) -> JobStatus:
        """Return the job's status as `status` does, without blocking the event loop."""
        return await self._client.status_async(self.job_id, at_least=self.position, timeout=timeout)

    def wait(self, timeout: Seconds | None = None) -> JobStatus:
        """Wait until the job has ended with any outcome, and return its final status.

        Raises `StatusTimeout` after ``timeout`` seconds (None: wait forever), and `ResultInsideJob` inside a job. In a
        thread that runs an event loop, this blocks the loop and issues a `RuntimeWarning`: use `wait_async` there.
        """
        refuse_inside_job(self.job_id)
        warn_on_loop("handle.wait()", "handle.wait_async()")
        return self._client.wait(self.job_id, at_least=self.position, timeout=timeout)

    async def wait_async(self, timeout: Seconds | None = None) -> JobStatus:
        """Wait as `wait` does, without blocking the event loop. Many callers may wait at the same time. Cancelling the
        wait does not cancel the job."""
        return await self._client.wait_async(self.job_id, at_least=self.position, timeout=timeout)

    def cancel(self, reason: str | None = None) -> None:
        """Request that the job be cancelled. A waiting job is then not started, and a running job is asked to stop; see
        `App.cancel`."""
        self._client.cancel(self.job_id, reason)

    async def cancel_async(self, reason: str | None = None) -> None:
        """Request a cancel as `cancel` does, without blocking the event loop."""
        await self._client.cancel_async(self.job_id, reason)

    def redrive(self, reason: str | None = None) -> Plan:
        """Run the job again, if it failed, was cancelled or expired: as the next run of the same id. Return the plan
        that does so; see `App.redrive`. A job in another state is skipped. Raises `JobNotFound` if the status table does
        not know the job."""
        return self._client.redrive(self.job_id, reason)

    def copy(self, **options: Unpack[CopyOptions]) -> JobHandle[R_co]:
        """Submit a new job with the arguments of this one, changed by name, and return its handle; see `App.copy` for
        the options and the errors."""
        return self._client.copy(self.job_id, lambda name: self._task, **options)

    def explain(self) -> Explanation:
        """Return why the job is where it is, and when it is likely to start; see `App.explain`. If the status table has
        not read the submission, the state is ``unknown``."""
        warn_on_loop("handle.explain()", "app.explain_async(…)")
        return self._client.explain(self.job_id, at_least=self.position)

    def result(self, timeout: Seconds | None = None) -> R_co:
        """Wait until the job has ended, and return its result. The result is converted to the task's return annotation;
        without an annotation it is plain JSON.

        Raises `JobFailed` (with the error's type, message and traceback), `JobCancelled`, `JobExpired`,
        `ResultMismatch`, `StatusTimeout` or `ResultInsideJob`. In a thread that runs an event loop, this blocks the
        loop and issues a `RuntimeWarning`: use `result_async` there.
        """
        refuse_inside_job(self.job_id)
        warn_on_loop("handle.result()", "handle.result_async()")
        return self._result(self._client.wait(self.job_id, at_least=self.position, timeout=timeout))

    async def result_async(self, timeout: Seconds | None = None) -> R_co:
        """Return the result as `result` does, without blocking the event loop. Many callers may wait at the same time.
        Cancelling the wait does not cancel the job."""
        return self._result(await self.wait_async(timeout))

    def _result(self, status: JobStatus) -> R_co:
        return self._task.decode_result(result_of(status), self.job_id)


class Steers(Protocol):
    """The methods of a client's plans that a `Plan` calls; see `jobledger.client.plans.Plans`."""

    def status(self, plan_id: str, at_least: Position | None, timeout: Seconds) -> PlanStatus: ...

    def wait(self, plan_id: str, at_least: Position | None, timeout: Seconds | None) -> PlanStatus: ...

    def steer(self, plan_id: str, to: PlanState, reason: str | None = None, by: str | None = None) -> None: ...


class Plan:
    """A plan that the log has acknowledged, or the result of a dry run.

    ``plan``: the plan's id; None for a dry run. ``matched``: number of jobs. ``examples``: the ids of the first jobs.
    ``position``: the position in the log from which on the plan is carried out; None for a dry run.
    """

    __slots__ = ("_plans", "examples", "matched", "plan", "position")

    def __init__(
        self, plans: Steers, plan: str | None, matched: int, examples: Sequence[str], position: Position | None
    ) -> None:
        self._plans, self.plan, self.matched, self.position = plans, plan, matched, position
        self.examples = tuple(examples)

    def __repr__(self) -> str:
        return f"<plan {self.plan or '(dry run)'}: {self.matched} jobs>"

    def status(self, timeout: Seconds = 10.0) -> PlanStatus:
        """Return the plan's state from the status table. Raises `StatusTimeout` if the table has not read the plan
        within ``timeout`` seconds, and `ConfigError` for a dry run."""
        return self._plans.status(self._id(), self.position, timeout)

    def wait(self, timeout: Seconds | None = None) -> PlanStatus:
        """Wait until the plan is done or aborted, and return its final state. When a redrive is done, the status table
        shows the next run of each job. When a plan of cancels is done, all cancels are requested, but some jobs may not
        have ended yet. Raises `StatusTimeout` after ``timeout`` seconds (None: wait forever)."""
        return self._plans.wait(self._id(), self.position, timeout)

    def pause(self, reason: str | None = None, by: str | None = None) -> None:
        """Take no further action until `resume`."""
        self._plans.steer(self._id(), PlanState.PAUSED, reason, by)

    def resume(self, reason: str | None = None, by: str | None = None) -> None:
        """End a pause."""
        self._plans.steer(self._id(), PlanState.RUNNING, reason, by)

    def abort(self, reason: str | None = None, by: str | None = None) -> None:
        """Take no further action. What was done is not undone."""
        self._plans.steer(self._id(), PlanState.ABORTED, reason, by)

    def _id(self) -> str:
        if self.plan is None:
            raise ConfigError("this is the result of a dry run: there is no plan")
        return self.plan


class EventHandle:
    """An event that the log has acknowledged. ``event_id``: the event's id. ``position``: the event's position in the
    log (topic, partition, offset)."""

    __slots__ = ("event_id", "position")

    def __init__(self, event_id: str, position: Position) -> None:
        self.event_id, self.position = event_id, position

    def __repr__(self) -> str:
        return f"<event {self.event_id} at {self.position}>"


def result_of(status: JobStatus) -> Any:
    """Return the result of a job that has ended, as plain JSON. Raises the error of a job that has not succeeded."""
    if status.state is State.SUCCEEDED:
        return status.result
    if status.state is State.CANCELLED:
        raise JobCancelled(f"job {status.job_id} was cancelled: {status.reason or 'no reason given'}")
    if status.state is State.EXPIRED:
        raise JobExpired(f"job {status.job_id} expired before it could start")
    if status.state is State.FAILED:
        error = status.error
        if error is None:
            raise JobFailed(status.job_id, "Unknown", status.reason or "no error was recorded")
        raise JobFailed(status.job_id, error.type, error.message, error.traceback)
    raise StatusTimeout(f"job {status.job_id} has not ended: it is {status.state.value}")


def refuse_inside_job(job_id: str) -> None:
    if maybe_current_job() is not None:
        raise ResultInsideJob(
            f"waiting for job {job_id} inside a job is refused: if every running job waited, no slot would be free for "
            "that job. Submit the next job at the end of this job instead"
        )


def warn_on_loop(called: str, instead: str) -> None:
    """Issue a `RuntimeWarning` to the caller's caller if the call would block the event loop that this thread runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    warnings.warn(
        f"{called} blocks the event loop that runs in this thread until there is an answer: use `await {instead}`",
        RuntimeWarning,
        stacklevel=3,
    )
