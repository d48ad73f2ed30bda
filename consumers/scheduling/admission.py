"""Judge work records: a job to run, a job that is done or known already, a record that is not a job, or a record that
this worker cannot judge.

Runs on the event loop; only `SchemaResolver` has a thread. Before anything else is done with a message, the partition's
offset tracker receives its offset, in the order of the log. From then on, the record is done only when acknowledgements
settle it. Exceptions are duplicates, and releases that the log settles already and from which no record derives: these
are marked as done at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from confluent_kafka import Message

from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import BY_KEY, WorkerProducer
from jobledger.consumers.running.executor import Executor
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.lanes import Lane
from jobledger.consumers.scheduling.schema_resolver import Read, SchemaResolver, read
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.scheduling.wait_queues import WaitQueues
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.fast_submission import plain_submission
from jobledger.consumers.state.limiters import closed_gate
from jobledger.consumers.state.outcome import (
    Cancelled,
    Expired,
    Failed,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
    unknown_task,
)
from jobledger.consumers.state.work import Arrived, JobRun, ParkedRecord, Partition, PriorFact, TaskRuntime
from jobledger.definitions.retry import Retry
from jobledger.errors import JobledgerError, RegistryNeeded, SchemaError, UnknownFact
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.events import (
    JobCancelled,
    JobDue,
    JobEvent,
    JobExpired,
    JobFailed,
    JobLeased,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobSubmitted,
    crashes_of,
    lasting,
    later,
)

LOG = get_logger("jobledger.worker")

_OWN = codec.MAGIC + codec.FINGERPRINT


@dataclass(slots=True)
class Counts:
    """Count the records that were taken and whose jobs were not run, for metrics and the health report."""

    duplicates: int = 0
    found_closed: int = 0
    rejected: int = 0


class Admission:
    """Judge records, and pass their jobs to `Starter` or to a wait queue.

    ``unknown``: the backoff of jobs whose task this worker does not know. ``call``: run a function on the loop, from
    any thread. ``wake()``: look for work to begin. ``fail(error)``: stop the worker.
    """

    executor: Executor
    places: Placement

    def __init__(
        self,
        facts: WorkerEvents,
        sender: WorkerProducer,
        decoder: codec.Decoder,
        arrived: Arrived,
        starter: Starter,
        lines: WaitQueues,
        plans: Mapping[str, TaskRuntime],
        stages: Mapping[str, Lane],
        *,
        unknown: Retry,
        call: Callable[..., None],
        wake: Callable[[], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self._facts, self._sender, self._arrived = facts, sender, arrived
        self._starter, self._lines, self._plans, self._stages = starter, lines, plans, stages
        self._backoff, self._wake = unknown, wake
        self._decoder, self._own_form = decoder, decoder.own_form
        self._start = starter.start
        self._fair = any(stage.fair_by is not None for stage in stages.values())
        self.aside = SchemaResolver(decoder, lambda *read: call(self.from_aside, *read), fail)
        self.counts = Counts()

    def take_up(self, partition: Partition, message: Message, now: float) -> None:
        offset = message.offset()
        value = message.value()
        offsets = partition.offsets
        assert offsets is not None
        assert offset is not None
        with partition.lock:
            fresh = offsets.receive(offset)
        if value is not None and (plain := plain_submission(value)) is not None:
            self.accept(partition, message, plain, fresh, now)
            return
        own = value if isinstance(value, bytes) else b""
        if not own.startswith(_OWN):
            framed = self._own_form(own)
            if framed is None:
                if self._decoder.asks(own):
                    partition.aside = True
                    self.aside.put(partition, message, fresh)
                else:
                    self.judge(partition, message, read(self._decoder, value), fresh, now)
                return
            if (plain := plain_submission(framed)) is not None:
                self.accept(partition, message, plain, fresh, now)
                return
            own = framed
        try:
            event = codec.decode(own)
        except UnknownFact as exc:
            self.judge(partition, message, exc, fresh, now)
        except SchemaError as exc:
            self.judge(partition, message, str(exc), fresh, now)
        else:
            self.accept(partition, message, event, fresh, now)

    def judge(self, partition: Partition, message: Message, read: Read, fresh: bool, now: float) -> None:
        """Accept or reject a decoded record. If a newer version wrote the record, or if only a Schema Registry has its
        schema, stop the partition until this worker is upgraded or is configured with the registry."""
        if isinstance(read, UnknownFact):
            partition.stop(message, f"{read}: upgrade this worker")
        elif isinstance(read, RegistryNeeded):
            partition.stop(message, str(read))
        elif isinstance(read, str):
            self.reject(partition, message, read, fresh)
        else:
            self.accept(partition, message, read, fresh, now)

    def scan_passed(self, partition: Partition) -> None:
        """Drop the results of the takeover's scan once all scanned records are received. When no results are left, also
        release the takeover floor."""
        offsets = partition.offsets
        assert offsets is not None
        if offsets.end >= partition.scanned_to and not partition.aside and partition.back is None:
            partition.closed.clear()
            partition.starts.clear()
            partition.held.clear()
            partition.scanned_to = partition.careful = 0
        if not partition.closed and not partition.held and not partition.starts:
            with partition.lock:
                offsets.hold(None)

    def from_aside(self, partition: Partition, message: Message, read: Read, fresh: bool) -> None:
        """Take a record back from `SchemaResolver`. ``read``: see `Read`. The record is judged as the partition's next
        record, when it is the partition's turn. On the loop."""
        partition.aside = False
        partition.back = (message, read, fresh)
        self._wake()

    def accept(self, partition: Partition, message: Message, event: JobEvent, fresh: bool, now: float) -> None:
        """Run the job of a decoded event, or let the job wait. If the event does not belong on a work topic, reject it.
        If its release is done or known already, do not run the job."""
        offset = message.offset() or 0
        fact = event.fact
        if type(fact) is JobSubmitted:
            if fact.delay_ms is not None or fact.due_at is not None:
                self.reject(partition, message, "a conditioned JobSubmitted does not belong on a work topic", fresh)
                return
        elif type(fact) is not JobDue:
            self.reject(partition, message, f"a {type(fact).__name__} does not belong on a work topic", fresh)
            return
        if not event.job_id:
            self.reject(partition, message, "it names no job", fresh)
            return
        key = release_key(event.job_id, event.run, event.release)
        found = partition.closed.pop(key, None) if partition.closed else None
        if not partition.memory.add(key):
            self.counts.duplicates += 1
            if fresh:
                self._done(partition, offset)
            return
        if not fresh:
            return
        spec = fact.spec
        if spec.expires_in_ms is not None or spec.expires_at is not None:
            event = _expiring(event, spec, message.timestamp()[1])
            spec = event.fact.spec  # type: ignore[union-attr]  # one of the two facts checked above
        appended = message.timestamp()[1]
        if (
            (event.key is not None or self._fair)
            and found is None
            and not (partition.scanned_to and (key in partition.starts or key in partition.held))
            and self._lines.crowded(partition)
            and self._deferred(partition, message, event, spec, now)
        ):
            return
        work = JobRun(partition, offset, event, self._arrived)
        work.expires_at = spec.expires_at
        work.appended = appended
        partition.live[offset] = work
        if found is not None:
            self._settle_found(work, found)
            return
        if partition.scanned_to:
            work.takeover = partition.starts.pop(key, 0)
            work.suspect = work.takeover > 0 or offset < partition.careful
            if work.takeover and partition.offsets is not None:
                with partition.lock:  # the next owner must find these starts until a new start counts them
                    partition.offsets.note(offset, partition.floor)
        if spec.tags and (crashes := crashes_of(spec.tags)):
            work.takeover += crashes
            work.suspect = True
        plan = work.plan = self._plans.get(event.task)
        stage = self._stages[partition.topic]
        tenant = "" if stage.fair_by is None else spec.tags.get(stage.fair_by, "")
        if event.key is not None:  # also a job that must not start: the job is closed in its turn
            held = partition.held.pop(key, None) if partition.held else None
            self._lines.enqueue_keyed(work, event.key, held, tenant)
            return
        if not self.executor.takes_arguments(work):
            return
        if work.takeover and (crashed := self.places.crashed(work.takeover)) is not None:
            self.executor.close_with(work, crashed)
            return
        if plan is None:
            self.unknown(work)
            return
        if stage.fair_by is not None:
            self._lines.wait_for_gate(work, plan, _of_tenant(tenant, plan), now, tenant)
        elif plan.gates and (("task", plan.name) in partition.lines or closed_gate(plan.gates, now) is not None):
            self._lines.wait_for_gate(work, plan, ("task", plan.name), now)
        elif (ended := self._starter.refused(work)) is not None:
            self.executor.close_with(work, ended)
        else:
            self._start(work, now)

    def _deferred(self, partition: Partition, message: Message, event: JobEvent, spec: JobSpec, now: float) -> bool:
        """Add a job to its wait queue as a parked record, and return True. Do nothing and return False if the job
        has no wait queue to join, if leases of the job have expired, or if the job should be snoozed instead."""
        stage, plan = self._stages[partition.topic], self._plans.get(event.task)
        if (event.key is None and (stage.fair_by is None or plan is None)) or (spec.tags and crashes_of(spec.tags)):
            return False
        tenant = "" if stage.fair_by is None else spec.tags.get(stage.fair_by, "")
        if event.key is not None:
            identity: tuple[str, ...] = ("key", event.key)
        else:
            assert plan is not None
            if plan.gates and self._lines.half_full(partition) and closed_gate(plan.gates, now) is not None:
                return False
            identity = _of_tenant(tenant, plan)
        offset, value = message.offset() or 0, message.value()
        # Keep the record's bytes, unless they have another schema or framing, or the expiry was made a point in time.
        if not isinstance(value, bytes) or not value.startswith(_OWN) or spec.expires_at is not None:
            value = codec.encode(event)
        one = ParkedRecord(offset, message.timestamp()[1], value, plan, offset < partition.careful)
        self._lines.defer(partition, identity, one, serial=event.key is not None, tenant=tenant)
        return True

    def revive(self, partition: Partition, one: ParkedRecord) -> JobRun:
        """Create the `JobRun` of a parked record. The job's arguments are not decoded yet."""
        event = plain_submission(one.value) or codec.decode(one.value)
        spec = event.fact.spec  # type: ignore[union-attr]  # only `JobSubmitted` and `JobDue` are accepted
        work = JobRun(partition, one.offset, event, self._arrived)
        work.expires_at, work.appended, work.plan, work.suspect = spec.expires_at, one.appended, one.plan, one.suspect
        partition.live[one.offset] = work
        return work

    def unknown(self, work: JobRun) -> None:
        """Close a job whose task this worker does not know. The job is snoozed, because another worker may know the
        task. When the backoff is exhausted, the job fails."""
        event = work.event
        assert event is not None
        outcome = unknown_task(event.task, list(self._plans), _tags(event), self._backoff, random.random())
        self.executor.close_with(work, outcome)

    def _settle_found(self, work: JobRun, found: PriorFact) -> None:
        """Send the records again that derive from ``found``, the fact with which the log settles the release already.
        The job is not run."""
        self.counts.found_closed += 1
        event = work.event
        assert event is not None
        fact = found.fact
        if isinstance(fact, JobLeased):
            self.executor.resend(work, [self._facts.leased(event, fact.worker, fact.lease_ms)], found.offset)
            return
        outcome: Outcome = Succeeded()
        due_at: int | None = None
        if isinstance(fact, JobRetried):
            outcome = Retried(fact.error, fact.delay_ms)
            due_at = later(found.appended_ms, fact.delay_ms)
        elif isinstance(fact, JobSnoozed):
            tags: Mapping[str, str] | None = None
            if fact.reason == "unknown-task":
                again = unknown_task(event.task, [], _tags(event), self._backoff, 0.0)
                tags = again.tags if isinstance(again, Snoozed) else None
            outcome = Snoozed(fact.delay_ms, fact.reason, tags)
            due_at = later(found.appended_ms, fact.delay_ms)
        elif isinstance(fact, JobCancelled):
            outcome = Cancelled(fact.by, fact.reason)
        elif isinstance(fact, JobExpired):
            outcome = Expired(fact.expired_at)
        elif isinstance(fact, JobFailed):
            outcome = Failed(fact.reason, fact.error)  # type: ignore[arg-type]  # a reason that a worker wrote
        self.executor.resend_derived(work, outcome, due_at, found.offset)

    def _done(self, partition: Partition, offset: int) -> None:
        assert partition.offsets is not None
        with partition.lock:
            partition.offsets.done(offset)

    def reject(self, partition: Partition, message: Message, why: str, fresh: bool) -> None:
        """Send a dead letter with a record that is not a job. The record is done when the dead letter is acknowledged.
        Do nothing if the record is not ``fresh``."""
        if not fresh:
            return
        offset = message.offset() or 0
        self.counts.rejected += 1
        LOG.error("%r@%d is rejected: %s", partition, offset, why)
        key, value = message.key(), message.value()
        record = self._facts.rejected(partition.topic, partition.number, offset, _bytes(key), _bytes(value), why)
        work = JobRun(partition, offset, None, self._arrived)
        partition.live[offset] = work
        assert record.value is not None
        self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)


def _of_tenant(tenant: str, plan: TaskRuntime) -> tuple[str, ...]:
    """Return the identity of the wait queue for a tenant's jobs of one task. Each task has its own wait queue, because
    a paused task must not block the others."""
    return ("tag", tenant, plan.name)


def _expiring(event: JobEvent, spec: JobSpec, appended_ms: int) -> JobEvent:
    """Return the event with its expiry as a point in time, because derived records have a later append time."""
    fact = msgspec.structs.replace(event.fact, spec=lasting(spec, appended_ms))
    return msgspec.structs.replace(event, fact=fact)


def _tags(event: JobEvent) -> Mapping[str, str]:
    fact = event.fact
    return fact.spec.tags if isinstance(fact, JobSubmitted | JobDue) else {}


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None if value is None else str(value).encode()
