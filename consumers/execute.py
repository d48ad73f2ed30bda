"""Runs jobs and writes what became of them: coroutines on the event loop, plain functions in a pool of threads.

The dispatcher decides what runs when; this module knows only one job at a time. The closing fact and what derives from
it are sent here; that they arrived is the settler's business.
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

from jobledger import forks
from jobledger.consumers.facts import Facts
from jobledger.consumers.interrupts import Interrupts
from jobledger.consumers.outcome import (
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
from jobledger.consumers.outcome_log import log_outcome
from jobledger.consumers.send import BY_KEY, Sender
from jobledger.consumers.telling import Teller
from jobledger.consumers.work import RUN_BOUNDS_S, Work
from jobledger.context import JobContext, enter
from jobledger.errors import (
    BadArguments,
    JobledgerError,
    TaskCancelled,
    TaskTimedOut,
    text_of,
    traceback_of,
    type_of,
)
from jobledger.functions import AWAIT
from jobledger.log import now_us
from jobledger.logger import get_logger
from jobledger.policy import KEY_HOLD_MAX_S
from jobledger.schemas.codec import encode
from jobledger.schemas.events import CRASHES_TAG, JobEvent, JobProgressed, JobSpec, JobSucceeded
from jobledger.writer import Outgoing

LOG = get_logger("jobledger.worker")

_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


class Executor:
    """Runs `Work` and sends its facts; what derives from a closing fact the settler sends, when that is acknowledged. ``ended`` is called on the event loop when a job's slot is free again.

    ``fail`` stops the worker when a fact cannot be sent: the job then stays not done. The outcome of a
    job's code is always written, also if another worker owns the partition by then. ``settle``: have the delivery reports that arrived taken soon.
    """

    def __init__(
        self,
        facts: Facts,
        sender: Sender,
        lifecycle: str,
        source: str,
        limit: int,
        *,
        ended: Callable[[Work], None],
        ended_in_thread: Callable[[Work], None],
        fail: Callable[[JobledgerError], None],
        settle: Callable[[], None],
    ) -> None:
        self._settle = settle
        self._facts, self._sender, self._lifecycle, self._source, self._limit = facts, sender, lifecycle, source, limit
        self._ended, self._ended_in_thread, self._fail = ended, ended_in_thread, fail
        self._produce = sender.produce
        self.teller: Teller | None = None  # if somebody wants to be told
        self.interrupts = Interrupts()
        self.due: Work | None = None  # the coroutine that blocks the loop beyond its time limit
        self.stop_child: Callable[[Work], None] = lambda work: None
        self.close_lease: Callable[[Work, bytes, list[Outgoing]], None]
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._depth = forks.depth
        self._threads: list[threading.Thread] = []

    # -- running --------------------------------------------------------------------------------------------------

    async def run(self, work: Work) -> None:
        """Run a coroutine task on the loop, within its time limit, to its closing fact."""
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
                        if self.due is work and _monotonic() - work.began >= limit:  # the loop's clock could not tell
                            work.interrupted = TaskTimedOut
                            raise TaskTimedOut
            except BaseException as error:  # noqa: BLE001  # SystemExit and cancellations are the job's, not the worker's
                if forks.depth != self._depth:  # the code forked, and this is the child
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
        except BaseException as broken:  # noqa: BLE001  # the last guard: a slot is never lost
            self._unjudged(work, broken)
        work.handle = None
        self._ended(work)

    def takes_arguments(self, work: Work) -> bool:
        """Read the arguments of a job that is to run; False if they do not fit: then it has failed. Of a task that is not
        known here nothing is read."""
        plan, event = work.plan, work.event
        if plan is not None:
            assert event is not None
            try:
                work.kwargs = plan.decode_args(event.fact.spec.args)  # type: ignore[union-attr]  # of a work topic
            except BadArguments as exc:
                self.close_with(work, Failed("bad-arguments", error_info(exc)))
                return False
        return True

    def start_threads(self, count: int) -> None:
        """Start the pool. Daemons: a function that never ends must not keep the process alive."""
        self.interrupts.loop = asyncio.get_running_loop()
        for n in range(count):
            thread = threading.Thread(target=self._serve, name=f"jobledger-job-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, work: Work) -> None:
        """Run a plain function in the next free thread."""
        self._queue.put(work)

    def close(self) -> None:
        """Tell idle threads to end."""
        for _ in self._threads:
            self._queue.put(None)

    def _serve(self) -> None:
        AWAIT.set(self.interrupts.wait)
        while (work := self._queue.get()) is not None:
            contextvars.copy_context().run(self._run_here, work)
            self._ended_in_thread(work)

    def _run_here(self, work: Work) -> None:
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
        except BaseException as broken:  # noqa: BLE001  # the last guard: a thread is never lost
            self._unjudged(work, broken)

    def _unjudged(self, work: Work, broken: BaseException) -> None:
        """Neither the return nor the exception of a job's code could be judged: the job fails."""
        try:
            self.close_with(work, Failed("never", error_info(broken)))
        except BaseException as exc:  # noqa: BLE001  # as in `close_with`
            self._broken(work, exc)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def returned(self, work: Work, value: object) -> None:
        """The task's code ended well."""
        plan = work.plan
        assert plan is not None
        task = plan.task
        try:
            result = None if value is None else task.encode_result(value)
        except BaseException as error:  # noqa: BLE001  # a result's own hooks may raise anything
            self.close_with(work, bad_result(task.name, error))
            return
        self.succeeded(work, result)

    def succeeded(self, work: Work, result: bytes | None) -> None:
        """Send the closing fact of a success. ``result``: JSON, or None."""
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

    def raised(self, work: Work, error: BaseException, late: bool) -> None:
        """The task's code raised. ``late``: its time limit was over. No code of the exception's is called here."""
        trace = traceback_of(error)
        if trace is not None:  # the first frame is this module's
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

    def stop(self, work: Work, outcome: Outcome) -> None:
        """Ask running code to end; what it raises from now on comes to ``outcome``. One that returns
        all the same has succeeded. A coroutine is cancelled, a thread is told at its next bytecode, a
        child process killed in the end."""
        work.stop_outcome = outcome
        self.end(work)

    def end(self, work: Work) -> None:
        """Let running code end, wherever it runs."""
        if work.handle is not None:
            if work.context is not None:
                # It has not taken its first step: cancelled now it never would, and nobody would hear of its end.
                asyncio.get_running_loop().call_soon(self.end, work)
            else:
                work.handle.cancel()
        elif not self.interrupts.interrupt(work, TaskCancelled):
            self.stop_child(work)

    def late(self, work: Work) -> None:
        """The time limit of a function in a thread is over."""
        self.interrupts.interrupt(work, TaskTimedOut)

    def close_with(self, work: Work, outcome: Outcome) -> None:
        """Send the closing fact of any outcome and what derives from it; under a key, an attempt that
        is made again closes nothing."""
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
            # Not at once: were this process to die in between, a retry could be under way of a job that the next
            # owner runs again, because it finds no end of it.
            work.derived = self._facts.derived(event, outcome)
            work.remaining = 1 + len(work.derived)
            delivered = partial(self._end_delivered, work) if work.derived else work.closing_delivered
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, delivered)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not count as done
            self._broken(work, exc)
            return
        self._told(work, event, outcome, duration)

    def _end_delivered(self, work: Work, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of an end from which more derives: the settler shall not take its time."""
        work.closing_delivered(error, message)
        self._settle()

    def _told(self, work: Work, event: JobEvent, outcome: Outcome, duration: float) -> None:
        """Count and tell an outcome that is sent. Raises nothing: it must not be taken for one that is not sent."""
        try:
            _count(work, outcome, duration)
            log_outcome(event, outcome)
            if self.teller is not None:
                self.teller.tell(work, outcome)
        except BaseException as exc:  # noqa: BLE001  # see above
            LOG.error(
                "the outcome of job %s was written, but could not be logged or passed to hooks: %s",
                event.job_id,
                text_of(exc),
            )

    def _goes_on(self, work: Work, event: JobEvent, outcome: Retried | Snoozed) -> None:
        """Say that the job is tried again in place; the dispatcher sees to it after ``again_s``."""
        partition = work.partition
        try:
            work.flush_progress()
            duration = _monotonic() - work.began if work.began else 0.0
            value = self._facts.closing(event, outcome, int(duration * 1e6))
            # From now on, not from its acknowledgement: handed over in between, the next owner must look for it.
            with partition.lock:
                if partition.offsets is not None:
                    partition.offsets.goes_on(work.offset)
            self._sender.send(self._lifecycle, value, event.job_id, partition.number, work.noted_delivered)
        except Exception as exc:  # noqa: BLE001  # as in `close_with`
            self._broken(work, exc)
            return
        self._told(work, event, outcome, duration)  # of the attempt that has ended: before the job is at its next one
        work.outcome = outcome
        work.event = msgspec.structs.replace(event, attempt=event.attempt + isinstance(outcome, Retried))
        work.again_s = outcome.delay_ms / 1000

    def refused_as_too_large(self, work: Work, size: int, where: str) -> None:
        """The broker would not take the closing fact: the job fails instead, saying so."""
        outcome = work.outcome or Succeeded()
        self.close_with(work, self._facts.too_large(outcome, size, where))

    def resend_derived(self, work: Work, outcome: Outcome, due_at: int | None, lifecycle_offset: int) -> None:
        """Send again what derives from a closing fact that the log already holds."""
        assert work.event is not None
        self.resend(work, self._facts.derived(work.event, outcome, due_at), lifecycle_offset)

    def resend(self, work: Work, derived: list[Outgoing], lifecycle_offset: int) -> None:
        """Send records again that derive from a fact at this place of the log; then the work record is done."""
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

    def progressed(self, work: Work, fact: JobProgressed) -> None:
        """Send one progress fact; nobody waits for it."""
        event = work.event
        assert event is not None
        try:
            value = encode(self._facts.event(event, fact))
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, None)
        except JobledgerError as exc:  # too long a message, a full queue: progress is a courtesy
            LOG.warning("progress of job %s was not sent: %s", event.job_id, exc)

    def _broken(self, work: Work, exc: BaseException) -> None:
        event = work.event
        job_id = event.job_id if event is not None else "?"
        # What is known to go wrong says itself; where in our code it was noticed says nothing more.
        known = isinstance(exc, JobledgerError)
        LOG.error("the outcome of job %s could not be written: %s", job_id, exc, exc_info=None if known else exc)
        self._fail(
            exc
            if isinstance(exc, JobledgerError)
            else JobledgerError(f"the outcome of job {job_id} could not be written: {type_of(exc)}: {text_of(exc)}")
        )


def _enter(work: Work) -> JobContext:
    """Make the job the current one. From here on its work forgets the context, which knows the work: of a cycle nothing
    is freed until Python's collector comes by, and at tens of thousands of jobs a second that is memory without end."""
    context, work.context = work.context, None
    assert context is not None
    enter(context)
    return context


def context_of(work: Work, *, reports: bool = True) -> JobContext:
    """What the task's code sees of its job. Without ``reports``: what hooks see that are told of its outcome."""
    event = work.event
    assert event is not None
    spec: JobSpec = event.fact.spec  # type: ignore[union-attr]  # it stood on a work topic
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


def _count(work: Work, outcome: Outcome, duration: float) -> None:
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
