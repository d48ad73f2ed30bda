"""Run the code of jobs, coroutines on the event loop and plain functions in a pool of threads, and record the outcomes.

The dispatcher decides which job runs when; this module handles one job at a time. This module sends the closing fact.
When the closing fact is acknowledged, the ack tracker sends the derived records.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import random
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import msgspec
import uuid_utils
from confluent_kafka import KafkaError, KafkaException, Message

from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import BY_KEY, WorkerProducer
from jobledger.consumers.running.hook_runner import HookRunner
from jobledger.consumers.running.interrupts import Interrupts
from jobledger.consumers.running.outcome_log import log_outcome
from jobledger.consumers.state.outcome import (
    UNKNOWN_TASK_TAG,
    Cancelled,
    Expired,
    Failed,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
    bad_result,
    error_info,
    holding,
    judge,
    ran_out,
    timed_out,
)
from jobledger.consumers.state.work import RUN_BOUNDS_S, JobRun
from jobledger.definitions.context import JobContext, enter
from jobledger.definitions.functions import AWAIT
from jobledger.definitions.policy import KEY_HOLD_MAX_S
from jobledger.errors import (
    BadArguments,
    JobledgerError,
    TaskCancelled,
    TaskTimedOut,
    text_of,
    traceback_of,
    type_of,
)
from jobledger.log.writer import Outgoing
from jobledger.process import forks
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.schemas.codec import encode
from jobledger.schemas.events import CRASHES_TAG, JobEvent, JobProgressed, JobSpec, JobSucceeded

LOG = get_logger("jobledger.worker")

_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


class Executor:
    """Run the code of a `JobRun` and send its facts. The ack tracker sends the derived records of a closing fact when
    the fact is acknowledged.

    ``limit``: the largest record, in bytes. ``ended(work)``: a coroutine has ended and its slot is free; called on the
    event loop. ``ended_in_thread(work)``: a plain function has ended; called in the function's thread. ``fail(error)``:
    stop the worker, because a fact cannot be sent; the job's record is then not done. ``settle()``: request
    that the delivery reports that have arrived are taken soon.

    The outcome of a job's code is written even if another worker owns the partition by then. Only the exception of an
    abandoned job is dropped.
    """

    def __init__(
        self,
        facts: WorkerEvents,
        sender: WorkerProducer,
        lifecycle: str,
        source: str,
        limit: int,
        *,
        ended: Callable[[JobRun], None],
        ended_in_thread: Callable[[JobRun], None],
        fail: Callable[[JobledgerError], None],
        settle: Callable[[], None],
    ) -> None:
        self._settle = settle
        self._facts, self._sender, self._lifecycle, self._source, self._limit = facts, sender, lifecycle, source, limit
        self._ended, self._ended_in_thread, self._fail = ended, ended_in_thread, fail
        self._produce = sender.produce
        self.teller: HookRunner | None = None  # None: there are no hooks to call
        self.interrupts = Interrupts()
        self.due: JobRun | None = None  # the job whose coroutine blocks the loop beyond its time limit
        self.stop_child: Callable[[JobRun], None] = lambda work: None
        self.close_lease: Callable[[JobRun, bytes, list[Outgoing]], None]
        self.may_begin: Callable[[JobRun], bool]  # whether code may begin although a lease may be over
        self._queue: queue.SimpleQueue[JobRun | None] = queue.SimpleQueue()
        self._depth = forks.depth
        self._threads: list[threading.Thread] = []

    # -- running --------------------------------------------------------------------------------------------------

    async def run(self, work: JobRun) -> None:
        """Run a job's coroutine on the loop, within its time limit, and record the outcome.

        The worker may have been paused since it created the `asyncio` task, and another worker may have taken the job
        over. So ownership is checked here, too: `may_begin` drops the job or starts it again later.
        """
        partition = work.partition
        lease = work.lease or partition.lease
        if (work.abandoned or partition.gone or _monotonic() > lease.until) and not self.may_begin(work):
            return
        context = _enter(work)
        plan = work.plan
        assert plan is not None
        limit = plan.task.timeout
        clock: asyncio.Timeout | None = None
        try:
            try:
                if limit is None:
                    value = await plan.fn(**work.kwargs)
                else:
                    async with asyncio.timeout(limit) as clock:
                        value = await plan.fn(**work.kwargs)
                        if self.due is work and _monotonic() - work.began >= limit:  # the blocked loop's timer is late
                            work.interrupted = TaskTimedOut
                            raise TaskTimedOut
            except BaseException as error:  # noqa: BLE001  # SystemExit and cancellations end only the job
                if forks.depth != self._depth:  # the code has forked, and this is the child
                    forks.left(error)
                context.ended = True
                if not work.abandoned:
                    self.raised(
                        work, error, clock is not None and (clock.expired() or work.interrupted is TaskTimedOut)
                    )
            else:
                if forks.depth != self._depth:
                    forks.left(None)
                context.ended = True
                self.returned(work, value)
        except BaseException as broken:  # noqa: BLE001  # whatever fails, the slot must become free
            self._unjudged(work, broken)
        work.handle = None
        self._ended(work)

    def takes_arguments(self, work: JobRun) -> bool:
        """Decode the arguments of a job that is to run, and return True. If the arguments do not fit the task, close
        the job as failed and return False. For an unknown task nothing is decoded."""
        plan, event = work.plan, work.event
        if plan is not None:
            assert event is not None
            try:
                work.kwargs = plan.decode_args(event.fact.spec.args)  # type: ignore[union-attr]  # from a work topic
            except BadArguments as exc:
                self.close_with(work, Failed("bad-arguments", error_info(exc)))
                return False
        return True

    def start_threads(self, count: int) -> None:
        """Start the pool of ``count`` threads. The threads are daemons, because a function that never ends must not
        keep the process alive. On the event loop."""
        self.interrupts.loop = asyncio.get_running_loop()
        for n in range(count):
            thread = threading.Thread(target=self._serve, name=f"jobledger-job-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, work: JobRun) -> None:
        """Queue a job's plain function for the next free thread."""
        self._queue.put(work)

    def close(self) -> None:
        """Tell idle threads to end."""
        for _ in self._threads:
            self._queue.put(None)

    def _serve(self) -> None:
        AWAIT.set(self.interrupts.wait)
        while (work := self._queue.get()) is not None:
            partition = work.partition
            lease = work.lease or partition.lease
            if (work.abandoned or partition.gone or _monotonic() > lease.until) and not self.may_begin(work):
                continue  # as in `run`
            contextvars.copy_context().run(self._run_here, work)
            self._ended_in_thread(work)

    def _run_here(self, work: JobRun) -> None:
        context = _enter(work)
        assert work.plan is not None
        try:
            try:
                value = self.interrupts.call(work)
            except BaseException as error:  # noqa: BLE001  # as for coroutines
                context.ended = True
                if not work.abandoned:
                    self.raised(work, error, work.interrupted is TaskTimedOut)
            else:
                context.ended = True
                self.returned(work, value)
        except BaseException as broken:  # noqa: BLE001  # whatever fails, the thread must continue
            self._unjudged(work, broken)

    def _unjudged(self, work: JobRun, broken: BaseException) -> None:
        """Fail a job whose result or exception could not be turned into an outcome."""
        try:
            self.close_with(work, Failed("never", error_info(broken)))
        except BaseException as exc:  # noqa: BLE001  # as in `close_with`
            self._broken(work, exc)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def returned(self, work: JobRun, value: object) -> None:
        """Record the success of code that returned ``value``."""
        plan = work.plan
        assert plan is not None
        task = plan.task
        try:
            result = None if value is None else task.encode_result(value)
        except BaseException as error:  # noqa: BLE001  # the result's own methods may raise anything
            self.close_with(work, bad_result(task.name, error))
            return
        self.succeeded(work, result)

    def succeeded(self, work: JobRun, result: bytes | None) -> None:
        """Send the closing fact of a success. ``result``: the result as JSON, or None."""
        plan = work.plan
        assert plan is not None
        partition = work.partition
        source = work.event
        assert source is not None
        work.flush_progress()
        duration = _monotonic() - work.began
        try:
            fact = encode(
                JobEvent(
                    str(_uuid7()),
                    source.job_id,
                    source.run,
                    source.attempt,
                    source.release,
                    now_us(),
                    source.task,
                    source.queue,
                    source.key,
                    source.home,
                    self._source,
                    source.trace,
                    JobSucceeded(result, int(duration * 1e6)),
                )
            )
            if len(fact) > self._limit:
                where = f"the limit of {self._limit} bytes (JOBLEDGER_MAX_RECORD_BYTES)"
                self.close_with(work, self._facts.too_large(Succeeded(result), len(fact), where))
                return
            try:
                if work.lease is not None:
                    self.close_lease(work, fact, [])
                else:
                    self._produce(self._lifecycle, fact, source.job_id, partition.number, work.closing_delivered)
            except (BufferError, KafkaException):
                self._sender.send(self._lifecycle, fact, source.job_id, partition.number, work.closing_delivered)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not count as done
            self._broken(work, exc)
            return
        plan.succeeded += 1
        plan.seconds += duration
        plan.runs[bisect_left(RUN_BOUNDS_S, duration)] += 1

    def raised(self, work: JobRun, error: BaseException, late: bool) -> None:
        """Record the outcome of code that raised ``error``. ``late``: the attempt's time limit was over. This method
        calls no code of the exception's class."""
        trace = traceback_of(error)
        if trace is not None:  # drop the first frame, which belongs to this module
            BaseException.with_traceback(error, trace.tb_next or trace)
        event, plan = work.event, work.plan
        assert event is not None
        assert plan is not None
        outcome = work.stop_outcome
        if outcome is None:
            task = plan.task
            late = late and ran_out(error)
            error = timed_out(event.task, task.timeout, error) if late else error
            if self.teller is not None:
                self.teller.note(work, error)
            outcome = judge(task.retry, event.attempt, error, random.random(), timed_out=late)
        self.close_with(work, outcome)

    def stop(self, work: JobRun, outcome: Outcome) -> None:
        """Ask running code to end. If the code then raises, ``outcome`` is recorded; if the code returns, the job has
        succeeded. A coroutine is cancelled, and a thread is interrupted at its next bytecode. A child process is told
        to end, and is killed if the code still runs after `SOFT_S` seconds (`jobledger.consumers.isolation.pool`)."""
        work.stop_outcome = outcome
        self.end(work)

    def end(self, work: JobRun) -> None:
        """Ask running code to end: on the event loop, in a thread or in a child process."""
        if work.handle is not None:
            if work.context is not None:
                # The coroutine has not run its first step. If it were cancelled now, it would never run, and its end
                # would not be reported.
                asyncio.get_running_loop().call_soon(self.end, work)
            else:
                work.handle.cancel()
        elif not self.interrupts.interrupt(work, TaskCancelled):
            self.stop_child(work)

    def late(self, work: JobRun) -> None:
        """Interrupt a function in a thread, because the function's time limit is over."""
        self.interrupts.interrupt(work, TaskTimedOut)

    def close_with(self, work: JobRun, outcome: Outcome) -> None:
        """Send the closing fact of an outcome. The ack tracker then sends the derived records.

        A retry or snooze of a keyed job closes nothing: the next attempt is made in place. If the job would hold its
        key for too long, the job fails instead. The outcome of a leased long job is sent to the coordinator.
        """
        event = work.event
        assert event is not None
        if event.key is not None and isinstance(outcome, Retried | Snoozed):
            most = KEY_HOLD_MAX_S if work.plan is None else work.plan.task.policy.key_hold_max
            outcome = holding(outcome, _monotonic() - work.held_since if work.held_since else 0.0, most, event.key)
        if isinstance(outcome, Retried | Snoozed) and outcome.in_place:
            self._goes_on(work, event, outcome)
            return
        try:
            work.flush_progress()
            duration = _monotonic() - work.began if work.began else 0.0
            duration_us = int(duration * 1e6)
            value = self._facts.closing(event, outcome, duration_us)
            if len(value) > self._limit:
                where = f"the limit of {self._limit} bytes (JOBLEDGER_MAX_RECORD_BYTES)"
                outcome = self._facts.too_large(outcome, len(value), where)
                value = self._facts.closing(event, outcome, duration_us)
            work.outcome = outcome
            if work.lease is not None and work.lease.granted:
                self.close_lease(work, value, self._facts.fallback(event, outcome))
                self._told(work, event, outcome, duration)
                return
            # The derived records are sent only when the closing fact is acknowledged. If both were sent together and
            # this process died, the closing fact could be missing in the log. The next owner would then run the job
            # again, while the retry is under way.
            work.derived = self._facts.derived(event, outcome)
            work.remaining = 1 + len(work.derived)
            delivered = partial(self._end_delivered, work) if work.derived else work.closing_delivered
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, delivered)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not count as done
            self._broken(work, exc)
            return
        self._told(work, event, outcome, duration)

    def _end_delivered(self, work: JobRun, error: KafkaError | None, message: Message) -> None:
        """Handle the delivery of a closing fact with derived records: request that its report is taken soon. Any
        thread."""
        work.closing_delivered(error, message)
        self._settle()

    def _told(self, work: JobRun, event: JobEvent, outcome: Outcome, duration: float) -> None:
        """Count and log an outcome that was sent, and pass it to the hooks. Raises nothing, because an exception here
        would be taken for an outcome that was not sent."""
        try:
            _count(work, outcome, duration)
            log_outcome(event, outcome)
            if self.teller is not None:
                self.teller.tell(work, outcome)
        except BaseException as exc:  # noqa: BLE001  # see the docstring
            LOG.error(
                "the outcome of job %s was written, but could not be logged or passed to hooks: %s",
                event.job_id,
                text_of(exc),
            )

    def _goes_on(self, work: JobRun, event: JobEvent, outcome: Retried | Snoozed) -> None:
        """Send the fact that the next attempt is made in place. When the fact is acknowledged, `WaitQueues` begins that
        attempt after `JobRun.again_s` seconds."""
        partition = work.partition
        try:
            work.flush_progress()
            duration = _monotonic() - work.began if work.began else 0.0
            value = self._facts.closing(event, outcome, int(duration * 1e6))
            # The next owner must look for this fact even if the partition is handed over before the acknowledgement.
            with partition.lock:
                if partition.offsets is not None:
                    partition.offsets.goes_on(work.offset)
            self._sender.send(self._lifecycle, value, event.job_id, partition.number, work.noted_delivered)
        except Exception as exc:  # noqa: BLE001  # as in `close_with`
            self._broken(work, exc)
            return
        self._told(work, event, outcome, duration)  # before `work` is changed for its next attempt
        work.outcome = outcome
        work.event = msgspec.structs.replace(event, attempt=event.attempt + isinstance(outcome, Retried))
        work.again_s = outcome.delay_ms / 1000

    def refused_as_too_large(self, work: JobRun, size: int, where: str) -> None:
        """Fail a job whose closing fact the broker refused for its size. The failure names the size, in bytes, and the
        limit."""
        outcome = work.outcome or Succeeded()
        self.close_with(work, self._facts.too_large(outcome, size, where))

    def resend_derived(self, work: JobRun, outcome: Outcome, due_at: int | None, lifecycle_offset: int) -> None:
        """Send the derived records of a closing fact again. The fact is in the log already, at ``lifecycle_offset``.
        ``due_at``: see `WorkerEvents.derived`."""
        assert work.event is not None
        self.resend(work, self._facts.derived(work.event, outcome, due_at), lifecycle_offset)

    def resend(self, work: JobRun, derived: list[Outgoing], lifecycle_offset: int) -> None:
        """Send the records ``derived`` again, which derive from the fact at ``lifecycle_offset``. The work record is
        done when these records are acknowledged, or at once if there are none."""
        offsets = work.partition.offsets
        assert offsets is not None
        work.remaining = len(derived)
        with work.partition.lock:
            if derived:
                offsets.unsettled(work.offset, lifecycle_offset)
            else:
                offsets.done(work.offset)
        if not derived:
            work.partition.live.pop(work.offset, None)
        for record in derived:
            assert record.value is not None
            self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)

    def progressed(self, work: JobRun, fact: JobProgressed) -> None:
        """Send one progress fact. Do not wait for its acknowledgement."""
        event = work.event
        assert event is not None
        try:
            value = encode(self._facts.event(event, fact))
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, None)
        except JobledgerError as exc:  # the fact is too large, or the queue is full: progress may be lost
            LOG.warning("progress of job %s was not sent: %s", event.job_id, exc)

    def _broken(self, work: JobRun, exc: BaseException) -> None:
        event = work.event
        job_id = event.job_id if event is not None else "?"
        # A `JobledgerError` explains itself; the traceback of this code would add nothing.
        known = isinstance(exc, JobledgerError)
        LOG.error("the outcome of job %s could not be written: %s", job_id, exc, exc_info=None if known else exc)
        self._fail(
            exc
            if isinstance(exc, JobledgerError)
            else JobledgerError(f"the outcome of job {job_id} could not be written: {type_of(exc)}: {text_of(exc)}")
        )


def _enter(work: JobRun) -> JobContext:
    """Make the job the current one, and return its context. Also remove the context from the `JobRun`, because the
    context refers to the `JobRun`. Python frees such a reference cycle only when its garbage collector runs, so memory
    would grow without limit at tens of thousands of jobs a second."""
    context, work.context = work.context, None
    assert context is not None
    enter(context)
    return context


def context_of(work: JobRun, *, reports: bool = True) -> JobContext:
    """Return the context through which the task's code sees its job. Without ``reports``: the context for hooks, which
    cannot report progress."""
    event = work.event
    assert event is not None
    spec: JobSpec = event.fact.spec  # type: ignore[union-attr]  # a record of a work topic
    tags = spec.tags
    if UNKNOWN_TASK_TAG in tags or CRASHES_TAG in tags:
        tags = {k: v for k, v in tags.items() if k not in (UNKNOWN_TASK_TAG, CRASHES_TAG)}
    return JobContext(
        job_id=event.job_id,
        task=event.task,
        queue=event.queue,
        run=event.run,
        attempt=event.attempt,
        release=event.release,
        tags=tags,
        parent=spec.parent,
        trace=event.trace,
        report=work.report if reports else None,
    )


def _count(work: JobRun, outcome: Outcome, duration: float) -> None:
    plan = work.plan
    if plan is None:
        return
    plan.seconds += duration
    if work.began:
        plan.runs[bisect_left(RUN_BOUNDS_S, duration)] += 1
    if isinstance(outcome, Retried):
        plan.retried += 1
    elif isinstance(outcome, Snoozed):
        plan.snoozed += 1
    elif isinstance(outcome, Failed):
        plan.failed += 1
    elif isinstance(outcome, Cancelled):
        plan.cancelled += 1
    elif isinstance(outcome, Expired):
        plan.expired += 1
