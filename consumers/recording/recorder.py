"""Records what becomes of jobs: sends their starts, their progress and their outcomes, and the dead letters of records
that are no jobs.

This module sends the closing fact. When the closing fact is acknowledged, the ack tracker sends the derived records.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from functools import partial
from typing import Protocol

import msgspec
import uuid_utils
from confluent_kafka import KafkaError, KafkaException, Message

from jobledger.consumers.recording.outcome_log import log_outcome
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import BY_KEY, Delivered, WorkerProducer
from jobledger.consumers.state.outcome import (
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
    timeout_error,
)
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.task_runtime import ATTEMPT_BOUNDS_S
from jobledger.consumers.state.work import JobRun
from jobledger.definitions.policy import KEY_HOLD_MAX_S
from jobledger.errors import BadArguments, JobledgerError, text_of, traceback_of, type_of
from jobledger.log.writer import Outgoing
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.schemas.codec import encode
from jobledger.schemas.events import JobEvent, JobProgressed, JobStarted, JobSucceeded

LOG = get_logger("jobledger.worker")

_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


class OutcomeHooks(Protocol):
    """Calls the hooks of tasks; see `jobledger.consumers.running.hook_runner`."""

    def note(self, work: JobRun, error: BaseException) -> None:
        """Store the exception of an attempt until `tell` is called. Any thread."""

    def tell(self, work: JobRun, outcome: Outcome) -> None:
        """Queue the hook calls for an attempt's outcome. Any thread."""


class Recorder:
    """Sends the facts of jobs. Any thread, except where a docstring says otherwise.

    ``hooks``: None if there are no hooks to call. If a closing fact or a derived record cannot be sent, the worker
    stops, and the job's record is not done. A progress fact may be lost, and so may a `JobStarted` for whose
    acknowledgement nothing waits (see `started`).

    The outcome of a job's code is written even if another worker owns the partition by then. Only the exception of an
    abandoned job is dropped.
    """

    def __init__(
        self, event_builder: WorkerEvents, sender: WorkerProducer, reports: Reports, hooks: OutcomeHooks | None = None
    ) -> None:
        self.event_builder, self._sender, self._reports, self._hooks = event_builder, sender, reports, hooks
        self._lifecycle, self._source = event_builder.names.lifecycle, event_builder.source
        self._limit = event_builder.limit
        self._version = event_builder.version
        self._produce = sender.produce

    # -- before the code ------------------------------------------------------------------------------------------

    def takes_arguments(self, work: JobRun) -> bool:
        """Decode the arguments of a job that is to run, and return True. If the arguments do not fit the task, close
        the job as failed and return False. For an unknown task nothing is decoded."""
        runtime, event = work.runtime, work.event
        if runtime is not None:
            assert event is not None
            try:
                work.kwargs = runtime.decode_args(event.fact.spec.args)  # type: ignore[union-attr]  # from a work topic
            except BadArguments as exc:
                self.close_with(work, Failed("bad-arguments", error_info(exc)))
                return False
        return True

    def started(self, work: JobRun, at_us: int, delivered: Delivered | None = None) -> None:
        """Send the job's `JobStarted`. ``at_us``: when the job was begun, in µs. ``delivered``: the delivery callback;
        None: nothing waits for the acknowledgement, because the closing fact follows in the same partition."""
        event, partition = work.event, work.partition
        assert event is not None
        started = encode(
            JobEvent(  # not by `event_factory.about`: one more call for each job costs too much
                str(_uuid7()),
                event.job_id,
                event.run,
                event.attempt,
                event.release,
                at_us,
                event.task,
                event.queue,
                event.key,
                event.home,
                self._source,
                event.trace,
                JobStarted(self._source, self._version, work.waits, partition.topic, work.offset, work.starts_before),
            )
        )
        if delivered is not None:
            self._sender.send(self._lifecycle, started, event.job_id, partition.number, delivered)
            return
        try:
            self._produce(self._lifecycle, started, event.job_id, partition.number)
        except (BufferError, KafkaException):
            self._sender.send(self._lifecycle, started, event.job_id, partition.number, None)

    def progressed(self, work: JobRun, fact: JobProgressed) -> None:
        """Send one progress fact. Do not wait for its acknowledgement."""
        event = work.event
        assert event is not None
        try:
            value = encode(self.event_builder.event(event, fact))
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, None)
        except JobledgerError as exc:  # the fact is too large, or the queue is full: progress may be lost
            LOG.warning("progress of job %s was not sent: %s", event.job_id, exc)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def returned(self, work: JobRun, value: object) -> None:
        """Record the success of code that returned ``value``."""
        runtime = work.runtime
        assert runtime is not None
        task = runtime.task
        try:
            result = None if value is None else task.encode_result(value)
        except BaseException as error:  # noqa: BLE001  # the result's own methods may raise anything
            self.close_with(work, bad_result(task.name, error))
            return
        self.succeeded(work, result)

    def succeeded(self, work: JobRun, result: bytes | None) -> None:
        """Send the closing fact of a success. ``result``: the result as JSON, or None."""
        runtime = work.runtime
        assert runtime is not None
        partition = work.partition
        source = work.event
        assert source is not None
        work.flush_progress()
        duration = _monotonic() - work.began
        try:
            fact = encode(
                JobEvent(  # as in `started`, without a call of the factory
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
                self.close_with(work, self.event_builder.too_large(Succeeded(result), len(fact), where))
                return
            try:
                if work.lease is not None:
                    work.lease.keeper.send_outcome(work, fact, [])
                else:
                    self._produce(self._lifecycle, fact, source.job_id, partition.number, work.settling_delivered)
            except (BufferError, KafkaException):
                self._sender.send(self._lifecycle, fact, source.job_id, partition.number, work.settling_delivered)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not count as done
            self.fail_unwritten(work, exc)
            return
        runtime.succeeded += 1
        runtime.seconds += duration
        runtime.attempt_counts[bisect_left(ATTEMPT_BOUNDS_S, duration)] += 1

    def raised(self, work: JobRun, error: BaseException, late: bool) -> None:
        """Record the outcome of code that raised ``error``. ``late``: the attempt's time limit was over. The
        exception's traceback is changed without a call of the exception's own methods."""
        trace = traceback_of(error)
        if trace is not None:  # drop the first frame, which belongs to `Executor`
            BaseException.with_traceback(error, trace.tb_next or trace)
        event, runtime = work.event, work.runtime
        assert event is not None
        assert runtime is not None
        outcome = work.stop_outcome
        if outcome is None:
            task = runtime.task
            late = late and ran_out(error)
            error = timeout_error(event.task, task.timeout, error) if late else error
            if self._hooks is not None:
                self._hooks.note(work, error)
            outcome = judge(task.retry, event.attempt, error, random.random(), timed_out=late)
        self.close_with(work, outcome)

    def close_with(self, work: JobRun, outcome: Outcome) -> None:
        """Send the closing fact of an outcome. The ack tracker then sends the derived records.

        A retry or snooze of a keyed job closes nothing: the next attempt is made in place. If the job would hold its
        key for too long, the job fails instead. The outcome of a leased long job is sent to the coordinator.
        """
        event = work.event
        assert event is not None
        if event.key is not None and isinstance(outcome, Retried | Snoozed):
            most = KEY_HOLD_MAX_S if work.runtime is None else work.runtime.task.policy.key_hold_max
            outcome = holding(outcome, _monotonic() - work.held_since if work.held_since else 0.0, most, event.key)
        if isinstance(outcome, Retried | Snoozed) and outcome.in_place:
            self._continue_in_place(work, event, outcome)
            return
        try:
            work.flush_progress()
            duration = _monotonic() - work.began if work.began else 0.0
            duration_us = int(duration * 1e6)
            value = self.event_builder.closing(event, outcome, duration_us)
            if len(value) > self._limit:
                where = f"the limit of {self._limit} bytes (JOBLEDGER_MAX_RECORD_BYTES)"
                outcome = self.event_builder.too_large(outcome, len(value), where)
                value = self.event_builder.closing(event, outcome, duration_us)
            work.outcome = outcome
            if work.lease is not None and work.lease.granted:
                work.lease.keeper.send_outcome(work, value, self.event_builder.fallback(event, outcome))
                self._count_and_tell(work, event, outcome, duration)
                return
            # The derived records are sent only when the closing fact is acknowledged. If both were sent together and
            # this process died, the closing fact could be missing in the log. The next owner would then run the job
            # again, while the retry is under way.
            work.derived = self.event_builder.derived(event, outcome)
            work.remaining = 1 + len(work.derived)
            delivered = partial(self._end_delivered, work) if work.derived else work.settling_delivered
            self._sender.send(self._lifecycle, value, event.job_id, work.partition.number, delivered)
        except Exception as exc:  # noqa: BLE001  # whatever it is, the job must not count as done
            self.fail_unwritten(work, exc)
            return
        self._count_and_tell(work, event, outcome, duration)

    def _end_delivered(self, work: JobRun, error: KafkaError | None, message: Message) -> None:
        """Handle the delivery of a closing fact with derived records: request that its report is taken soon. Any
        thread."""
        work.settling_delivered(error, message)
        self._reports.drain_soon()

    def _count_and_tell(self, work: JobRun, event: JobEvent, outcome: Outcome, duration: float) -> None:
        """Count and log an outcome that was sent, and pass it to the hooks. Raises nothing, because an exception here
        would be taken for an outcome that was not sent."""
        try:
            _count(work, outcome, duration)
            log_outcome(event, outcome)
            if self._hooks is not None:
                self._hooks.tell(work, outcome)
        except BaseException as exc:  # noqa: BLE001  # see the docstring
            LOG.error(
                "the outcome of job %s was written, but could not be logged or passed to hooks: %s",
                event.job_id,
                text_of(exc),
            )

    def _continue_in_place(self, work: JobRun, event: JobEvent, outcome: Retried | Snoozed) -> None:
        """Send the fact that the next attempt is made in place. When the fact is acknowledged, `WaitQueues` begins that
        attempt after `JobRun.again_s` seconds."""
        partition = work.partition
        try:
            work.flush_progress()
            duration = _monotonic() - work.began if work.began else 0.0
            value = self.event_builder.closing(event, outcome, int(duration * 1e6))
            # The next owner must look for this fact even if the partition is handed over before the acknowledgement.
            with partition.lock:
                if partition.offsets is not None:
                    partition.offsets.continues_after_next_fact(work.offset)
            self._sender.send(self._lifecycle, value, event.job_id, partition.number, work.continuing_delivered)
        except Exception as exc:  # noqa: BLE001  # as in `close_with`
            self.fail_unwritten(work, exc)
            return
        self._count_and_tell(work, event, outcome, duration)  # before `work` is changed for its next attempt
        work.outcome = outcome
        work.event = msgspec.structs.replace(event, attempt=event.attempt + isinstance(outcome, Retried))
        work.again_s = outcome.delay_ms / 1000

    def refused_as_too_large(self, work: JobRun, size: int, where: str) -> None:
        """Fail a job whose closing fact the broker refused for its size. The failure names the size, in bytes, and the
        limit."""
        outcome = work.outcome or Succeeded()
        self.close_with(work, self.event_builder.too_large(outcome, size, where))

    # -- releases that the log settles already, and records that are no jobs ------------------------------------------

    def resend_derived(self, work: JobRun, outcome: Outcome, due_at: int | None, lifecycle_offset: int) -> None:
        """Send the derived records of a closing fact again. The fact is in the log already, at ``lifecycle_offset``.
        ``due_at``: see `WorkerEvents.derived`."""
        assert work.event is not None
        self.resend(work, self.event_builder.derived(work.event, outcome, due_at), lifecycle_offset)

    def resend(self, work: JobRun, derived: list[Outgoing], lifecycle_offset: int) -> None:
        """Send the records ``derived`` again, which derive from the fact at ``lifecycle_offset``. The work record is
        done when these records are acknowledged, or at once if there are none."""
        offsets = work.partition.offsets
        assert offsets is not None
        work.remaining = len(derived)
        with work.partition.lock:
            if derived:
                offsets.must_find_from(work.offset, lifecycle_offset)
            else:
                offsets.done(work.offset)
        if not derived:
            work.partition.live.pop(work.offset, None)
        for record in derived:
            assert record.value is not None
            self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)

    def reject(self, work: JobRun, key: bytes | None, value: bytes | None, why: str) -> None:
        """Send a dead letter with a record that is not a job. ``work``: a `JobRun` without an event, which stands for
        the record. The record is done when the dead letter is acknowledged."""
        partition = work.partition
        record = self.event_builder.rejected(partition.topic, partition.number, work.offset, key, value, why)
        assert record.value is not None
        self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)

    def fail_unwritten(self, work: JobRun, exc: BaseException) -> None:
        """Stop the worker, because an outcome of the job could not be written."""
        event = work.event
        job_id = event.job_id if event is not None else "?"
        # A `JobledgerError` explains itself; the traceback of this code would add nothing.
        known = isinstance(exc, JobledgerError)
        LOG.error("the outcome of job %s could not be written: %s", job_id, exc, exc_info=None if known else exc)
        self._reports.calls.fail(
            exc
            if isinstance(exc, JobledgerError)
            else JobledgerError(f"the outcome of job {job_id} could not be written: {type_of(exc)}: {text_of(exc)}")
        )


def _count(work: JobRun, outcome: Outcome, duration: float) -> None:
    runtime = work.runtime
    if runtime is None:
        return
    runtime.seconds += duration
    if work.began:
        runtime.attempt_counts[bisect_left(ATTEMPT_BOUNDS_S, duration)] += 1
    if isinstance(outcome, Retried):
        runtime.retried += 1
    elif isinstance(outcome, Snoozed):
        runtime.snoozed += 1
    elif isinstance(outcome, Failed):
        runtime.failed += 1
    elif isinstance(outcome, Cancelled):
        runtime.cancelled += 1
    elif isinstance(outcome, Expired):
        runtime.expired += 1
