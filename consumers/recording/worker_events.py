"""Builds records from an outcome: the closing fact, and the records that derive from it. The caller sends the records.

The ids of derived records are computed from the job. So if derived records are sent again after a takeover, the new
records are copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import uuid_utils

from jobledger.consumers.state.outcome import (
    Cancelled,
    Expired,
    Failed,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
)
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.kafka.topic_names import Names, lane
from jobledger.log.writer import Outgoing
from jobledger.process.identity import now_us
from jobledger.schemas import codec
from jobledger.schemas.dead_letters import rejection
from jobledger.schemas.event_factory import about, derived, submission
from jobledger.schemas.events import (
    DeadLettered,
    ErrorInfo,
    Fact,
    JobCancelledFact,
    JobEvent,
    JobExpiredFact,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobSucceeded,
    Leased,
    ReleaseRequested,
    crashes_of,
    users_tags,
)
from jobledger.schemas.ids import derived_id

#: Characters that are kept of an error's message if the record would be too large otherwise.
_SHORT_MESSAGE = 200


class WorkerEvents:
    """Builds a worker's records. ``source``: the worker's name in its events. ``limit``: maximum size of a record, in
    bytes. ``version``: the version of the app's code, if it is known."""

    def __init__(self, registry: TaskRegistry, source: str, limit: int, version: str | None = None) -> None:
        self._registry = registry
        self.names: Names = registry.names
        self.source = source
        self.limit = limit
        self.version = version

    def event(self, job: JobEvent, fact: Fact) -> JobEvent:
        """Return this worker's event with ``fact`` about the job of a work record."""
        return about(job, fact, str(uuid_utils.uuid7()), now_us(), self.source)

    def closing(self, job: JobEvent, outcome: Outcome, duration_us: int) -> bytes:
        """Encode the event with the fact that records the outcome. The text of an error is shortened if the record
        would be too large. ``duration_us``: how long the attempt ran, in µs."""
        if isinstance(outcome, Succeeded):
            return codec.encode(self.event(job, JobSucceeded(outcome.result, duration_us)))
        if isinstance(outcome, Snoozed):
            return codec.encode(
                self.event(job, JobSnoozed(outcome.delay_ms, outcome.reason, duration_us, outcome.in_place))
            )
        if isinstance(outcome, Cancelled):
            return codec.encode(self.event(job, JobCancelledFact(outcome.by, outcome.reason)))
        if isinstance(outcome, Expired):
            return codec.encode(self.event(job, JobExpiredFact(outcome.at)))

        def fact(error: ErrorInfo) -> Fact:
            if isinstance(outcome, Retried):
                return JobRetried(error, outcome.delay_ms, duration_us, outcome.in_place)
            return JobFailedFact(outcome.reason, error, duration_us)

        value = codec.encode(self.event(job, fact(outcome.error)))
        if len(value) > self.limit:
            value = codec.encode(self.event(job, fact(_shortened(outcome.error))))
        return value

    def too_large(self, outcome: Outcome, size: int, where: str) -> Failed:
        """Return the failure that replaces an outcome whose record is too large. ``size``: size of the record in bytes;
        ``where``: text that names the limit."""
        what = "result" if isinstance(outcome, Succeeded) else "error"
        return Failed(
            "bad-result",
            ErrorInfo(
                "PayloadTooLarge",
                f"the {what} makes a record of {size} bytes, above {where}: "
                "store the data elsewhere and return a reference to it",
            ),
        )

    def derived(self, job: JobEvent, outcome: Outcome, due_at: int | None = None) -> list[Outgoing]:
        """Return the records that derive from the outcome, on which other parts must act. ``due_at``: when the next
        release is due, in µs of the broker's clock; None if the append time of the closing fact is not known."""
        if getattr(outcome, "in_place", False):
            return []
        if isinstance(outcome, Retried):
            return [self._release(job, job.attempt + 1, outcome.delay_ms, due_at, _spec(job))]
        if isinstance(outcome, Snoozed):
            spec = _spec(job) if outcome.tags is None else _tagged(_spec(job), outcome.tags)
            return [self._release(job, job.attempt, outcome.delay_ms, due_at, spec)]
        if isinstance(outcome, Failed):
            return [self._dead_letter(job, outcome), *self._fallback(job)]
        return []

    def fallback(self, job: JobEvent, outcome: Outcome) -> list[Outgoing]:
        """Return the derived records of a leased job's outcome that the coordinator cannot build: the job of
        ``fallback=``."""
        return self._fallback(job) if isinstance(outcome, Failed) else []

    def leased(self, job: JobEvent, worker: str, lease_ms: int) -> Outgoing:
        """Return the record that derives from `JobLeased`. With this record the coordinator keeps the job while the job
        runs."""
        spec = _spec(job)
        fact = Leased(spec, worker, lease_ms, crashes_of(spec.tags))
        event = derived(job, "leased", fact, now_us(), self.source)
        return Outgoing(self.names.coordination, codec.encode(event), job.home or job.job_id)

    def _release(self, job: JobEvent, attempt: int, delay_ms: int, due_at: int | None, spec: JobSpec) -> Outgoing:
        requested = msgspec.structs.replace(job, attempt=attempt, release=job.release + 1)
        fact = ReleaseRequested(spec, None if due_at is not None else delay_ms, due_at)
        event = derived(requested, "request", fact, now_us(), self.source)
        return Outgoing(self.names.coordination, codec.encode(event), job.home or job.job_id)

    def _dead_letter(self, job: JobEvent, outcome: Failed) -> Outgoing:
        def encoded(error: ErrorInfo) -> bytes:
            fact = DeadLettered(_spec(job), outcome.reason, error)
            return codec.encode(derived(job, "dead-letter", fact, now_us(), self.source))

        value = encoded(outcome.error)
        if len(value) > self.limit:
            value = encoded(_shortened(outcome.error))
        return Outgoing(self.names.dead_letter, value, job.job_id)

    def _fallback(self, job: JobEvent) -> list[Outgoing]:
        failed = self._registry.tasks.get(job.task)
        if failed is None or failed.fallback is None:
            return []
        task = self._registry.task(failed.fallback)
        job_id = derived_id(job.job_id, job.run, "fallback")
        spec = _spec(job)
        spec = msgspec.structs.replace(
            spec,
            # The worker's own tags belong to the failed job: the fallback's code has crashed no process.
            tags=users_tags(spec.tags),
            parent=job.job_id,
            expires_in_ms=None,
            expires_at=None,
            priority=task.policy.priority,
        )
        event = submission(job_id, task.name, task.queue, None, spec, now_us(), self.source, job.trace)
        return [Outgoing(self.names.jobs(lane(task.queue, task.policy.priority)), codec.encode(event), job_id)]

    def rejected(
        self, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None, error: str
    ) -> Outgoing:
        """Return the dead letter of a rejected record. Key and value are kept unchanged; if one of them is too large,
        only its beginning is kept."""
        record = rejection(
            topic,
            partition,
            offset,
            key,
            value,
            error,
            event_id=derived_id("record", topic, partition, offset),
            at_us=now_us(),
            source=self.source,
            limit=self.limit,
        )
        return Outgoing(self.names.dead_letter, record, f"{topic}/{partition}/{offset}")


def _spec(job: JobEvent) -> JobSpec:
    spec: JobSpec = job.fact.spec  # type: ignore[union-attr]  # work topics hold only submissions and releases
    return spec


def _tagged(spec: JobSpec, tags: Mapping[str, str]) -> JobSpec:
    return msgspec.structs.replace(spec, tags=dict(tags))


def _shortened(error: ErrorInfo) -> ErrorInfo:
    return ErrorInfo(error.type, error.message[:_SHORT_MESSAGE], None)
