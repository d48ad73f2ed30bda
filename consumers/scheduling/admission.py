"""Judges work records: a job to run, a job that is done or known already, a record that is not a job, or a record that
this worker cannot judge.

Runs on the event loop; only `SchemaResolver` has a thread. Before anything else is done with a message, the partition's
offset tracker receives its offset, in the order of the log. From then on, the record is marked as done only when the
records that docs/glossary.md names under *work record* are acknowledged: the closing fact of its release and what
derives from it; for a long job that was started, `JobLeased` and `Leased`; for a rejected record, its dead letter.
Duplicates, and releases that the log settles already and from which no record derives, are marked as done at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import msgspec
from confluent_kafka import Message

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.lanes import Lanes
from jobledger.consumers.scheduling.schema_resolver import Read, SchemaResolver, read
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.scheduling.wait_queues import WaitQueues
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.fast_submission import plain_submission
from jobledger.consumers.state.limiters import closed_gate
from jobledger.consumers.state.outcome import Cancelled, Expired, Failed, Outcome, Retried, Snoozed, Succeeded
from jobledger.consumers.state.prior_state import PriorFact
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun, ParkedRecord, Partition
from jobledger.errors import RegistryNeeded, SchemaError, UnknownFact
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.events import (
    JobCancelledFact,
    JobDue,
    JobEvent,
    JobExpiredFact,
    JobFailedFact,
    JobLeased,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobSubmitted,
    crashes_of,
    fact_name,
    lasting,
    later,
)

LOG = get_logger("jobledger.worker")

_OWN = codec.MAGIC + codec.FINGERPRINT


@dataclass(slots=True)
class Counts:
    """Counts duplicates, releases that the log had settled, and rejected records, for metrics and the health report."""

    duplicates: int = 0
    found_settled: int = 0
    rejected: int = 0


class Admission:
    """Judges records, and passes their jobs to `Starter` or to a wait queue. What needs no run goes to `Recorder`."""

    def __init__(
        self,
        decoder: codec.Decoder,
        starter: Starter,
        placement: Placement,
        wait_queues: WaitQueues,
        lanes: Lanes,
        tasks: TaskTable,
        recorder: Recorder,
        reports: Reports,
    ) -> None:
        self._decoder, self._own_form = decoder, decoder.own_form
        self._starter, self._placement, self._wait_queues, self._by_topic = (
            starter,
            placement,
            wait_queues,
            lanes.by_topic,
        )
        self._tasks, self._runtimes, self._recorder, self._reports = tasks, tasks.runtimes, recorder, reports
        self._start = starter.start
        self._fair = bool(lanes.fair)
        self.schema_resolver = SchemaResolver(decoder, partial(reports.calls.call, self.resolved), reports.calls.fail)
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
                    partition.resolving = True
                    self.schema_resolver.put(partition, message, fresh)
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
            partition.start_no_more(f"{read}: upgrade this worker", message)
        elif isinstance(read, RegistryNeeded):
            partition.start_no_more(str(read), message)
        elif isinstance(read, str):
            self.reject(partition, message, read, fresh)
        else:
            self.accept(partition, message, read, fresh, now)

    def scan_passed(self, partition: Partition) -> None:
        """Drop the results of the takeover's scan once all scanned records are received. When no results are left, also
        release the takeover floor."""
        offsets, prior = partition.offsets, partition.prior
        assert offsets is not None
        if offsets.end >= prior.scanned_to and not partition.resolving and partition.resolved is None:
            prior.forget_releases()
            prior.scanned_to = prior.suspect_below = 0
        if prior.used_up:
            with partition.lock:
                offsets.hold(None)

    def resolved(self, partition: Partition, message: Message, read: Read, fresh: bool) -> None:
        """Take a record back from `SchemaResolver`. ``read``: see `Read`. The record is judged as the partition's next
        record, when it is the partition's turn. On the loop."""
        partition.resolving = False
        partition.resolved = (message, read, fresh)
        self._reports.wake()

    def accept(self, partition: Partition, message: Message, event: JobEvent, fresh: bool, now: float) -> None:
        """Run the job of a decoded event, or let the job wait. If the event does not belong on a work topic, reject it.
        If its release is done or known already, do not run the job."""
        offset, prior = message.offset() or 0, partition.prior
        fact = event.fact
        belongs = fact.delay_ms is None and fact.due_at is None if type(fact) is JobSubmitted else type(fact) is JobDue
        if not belongs or not event.job_id:
            self.reject(partition, message, _why_no_job(event), fresh)
            return
        key = release_key(event.job_id, event.run, event.release)
        prior_fact = prior.settled.pop(key, None) if prior.settled else None
        if not partition.memory.add(key):
            self.counts.duplicates += 1
            if fresh:
                self._done(partition, offset)
            return
        if not fresh:
            return
        spec: JobSpec = fact.spec  # type: ignore[union-attr]  # one of the two facts checked above
        if spec.expires_in_ms is not None or spec.expires_at is not None:
            event = _expiring(event, spec, message.timestamp()[1])
            spec = event.fact.spec  # type: ignore[union-attr]  # one of the two facts checked above
        appended = message.timestamp()[1]
        waits = event.key is not None or self._fair
        if (
            waits
            and prior_fact is None
            and self._wait_queues.crowded(partition)
            and self._park_record(partition, message, event, now)
        ):
            return
        work = JobRun(partition, offset, event, self._reports.arrived)
        work.expires_at = spec.expires_at
        work.appended = appended
        partition.live[offset] = work
        if prior_fact is not None:
            self._resend_for_settled(work, prior_fact)
            return
        if prior.scanned_to:
            _note_starts(work, prior.starts.pop(key, 0))
        if spec.tags and (crashes := crashes_of(spec.tags)):
            work.starts_before += crashes
            work.suspect = True
        runtime = work.runtime = self._runtimes.get(event.task)
        lane = self._by_topic[partition.topic]
        tenant = "" if lane.fair_by is None else spec.tags.get(lane.fair_by, "")
        if event.key is not None:  # also a job that must not start: the job is closed in its turn
            next_attempt = prior.next_attempts.pop(key, None) if prior.next_attempts else None
            self._wait_queues.enqueue_keyed(work, event.key, next_attempt, tenant)
            return
        if not self._recorder.takes_arguments(work):
            return
        if work.starts_before and (crashed := self._placement.crashed(work.starts_before)) is not None:
            self._recorder.close_with(work, crashed)
            return
        if runtime is None:
            self._recorder.close_with(work, self._tasks.unknown_task_outcome(event))
            return
        if lane.fair_by is not None:
            self._wait_queues.wait_for_gate(work, runtime, _of_tenant(tenant, runtime), now, tenant)
        elif runtime.gates and (
            ("task", runtime.name) in partition.backlog.wait_queues or closed_gate(runtime.gates, now) is not None
        ):
            self._wait_queues.wait_for_gate(work, runtime, ("task", runtime.name), now)
        elif (ended := self._starter.refused(work)) is not None:
            self._recorder.close_with(work, ended)
        else:
            self._start(work, now)

    def _park_record(self, partition: Partition, message: Message, event: JobEvent, now: float) -> bool:
        """Add a job to its wait queue as a parked record, and return True. Do nothing and return False if the job
        has no wait queue to join, if a former owner started it or made attempts in place, if leases of the job have
        expired, or if the job should be snoozed instead."""
        spec: JobSpec = event.fact.spec  # type: ignore[union-attr]  # one of the two facts that `accept` lets pass
        prior = partition.prior
        if prior.scanned_to:
            key = release_key(event.job_id, event.run, event.release)
            if key in prior.starts or key in prior.next_attempts:
                return False
        lane, runtime = self._by_topic[partition.topic], self._runtimes.get(event.task)
        if (event.key is None and (lane.fair_by is None or runtime is None)) or (spec.tags and crashes_of(spec.tags)):
            return False
        tenant = "" if lane.fair_by is None else spec.tags.get(lane.fair_by, "")
        if event.key is not None:
            identity: tuple[str, ...] = ("key", event.key)
        else:
            assert runtime is not None
            if runtime.gates and self._wait_queues.half_full(partition) and closed_gate(runtime.gates, now) is not None:
                return False
            identity = _of_tenant(tenant, runtime)
        offset, value = message.offset() or 0, message.value()
        # Keep the record's bytes, unless they have another schema or framing, or the expiry was made a point in time.
        if not isinstance(value, bytes) or not value.startswith(_OWN) or spec.expires_at is not None:
            value = codec.encode(event)
        one = ParkedRecord(offset, message.timestamp()[1], value, runtime, offset < prior.suspect_below, now)
        self._wait_queues.add_parked(partition, identity, one, serial=event.key is not None, tenant=tenant)
        return True

    def _resend_for_settled(self, work: JobRun, prior_fact: PriorFact) -> None:
        """Send the records again that derive from ``prior_fact``, the fact with which the log settles the release
        already. The job is not run."""
        self.counts.found_settled += 1
        event = work.event
        assert event is not None
        fact = prior_fact.fact
        if isinstance(fact, JobLeased):
            self._recorder.resend(
                work, [self._recorder.event_builder.leased(event, fact.worker, fact.lease_ms)], prior_fact.offset
            )
            return
        outcome: Outcome = Succeeded()
        due_at: int | None = None
        if isinstance(fact, JobRetried):
            outcome = Retried(fact.error, fact.delay_ms)
            due_at = later(prior_fact.appended_ms, fact.delay_ms)
        elif isinstance(fact, JobSnoozed):
            tags: Mapping[str, str] | None = None
            if fact.reason == "unknown-task":
                again = self._tasks.unknown_task_outcome(event, jitter=0.0)
                tags = again.tags if isinstance(again, Snoozed) else None
            outcome = Snoozed(fact.delay_ms, fact.reason, tags)
            due_at = later(prior_fact.appended_ms, fact.delay_ms)
        elif isinstance(fact, JobCancelledFact):
            outcome = Cancelled(fact.by, fact.reason)
        elif isinstance(fact, JobExpiredFact):
            outcome = Expired(fact.expired_at)
        elif isinstance(fact, JobFailedFact):
            outcome = Failed(fact.reason, fact.error)  # type: ignore[arg-type]  # a reason that a worker wrote
        self._recorder.resend_derived(work, outcome, due_at, prior_fact.offset)

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
        work = JobRun(partition, offset, None, self._reports.arrived)
        partition.live[offset] = work
        self._recorder.reject(work, _bytes(message.key()), _bytes(message.value()), why)


def _why_no_job(event: JobEvent) -> str:
    """Return why an event on a work topic is not a job."""
    if isinstance(event.fact, JobSubmitted) and (event.fact.delay_ms is not None or event.fact.due_at is not None):
        return "a JobSubmitted with a delay or a due time does not belong on a work topic"
    if not isinstance(event.fact, JobSubmitted | JobDue):
        return f"a {fact_name(event.fact)} does not belong on a work topic"
    return "it names no job"


def _note_starts(work: JobRun, starts: int) -> None:
    """Note what the takeover's scan found about a job: how often its release was started without an outcome
    (``starts``), and whether it may have ended the last owner."""
    partition, offset = work.partition, work.offset
    work.starts_before = starts
    work.suspect = starts > 0 or offset < partition.prior.suspect_below
    if starts and partition.offsets is not None:
        with partition.lock:  # the next owner must find these starts until a new start counts them
            partition.offsets.continues_from(offset, partition.prior.floor)


def _of_tenant(tenant: str, runtime: TaskRuntime) -> tuple[str, ...]:
    """Return the identity of the wait queue for a tenant's jobs of one task. Each task has its own wait queue, because
    a paused task must not block the others."""
    return ("tag", tenant, runtime.name)


def _expiring(event: JobEvent, spec: JobSpec, appended_ms: int) -> JobEvent:
    """Return the event with its expiry as a point in time, because derived records have a later append time."""
    fact = msgspec.structs.replace(event.fact, spec=lasting(spec, appended_ms))
    return msgspec.structs.replace(event, fact=fact)


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None if value is None else str(value).encode()
