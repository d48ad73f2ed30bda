"""Backfill: submits a handler's jobs for past events, within bounds and at a limited rate. An interrupted backfill can
be continued where it stopped.

A job's id is derived from event and handler. Jobs that the status table has already are skipped: the router or an
earlier backfill submitted them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.router.router import EventBatch, Routes
from jobledger.definitions.event_types import check_classes
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import BrokerUnavailable, ConfigError, JobledgerError, SchemaError
from jobledger.kafka import acls
from jobledger.kafka.auth import check_connection, denied, join, read
from jobledger.kafka.clients import committed, consumer_config, partitions_of, translate
from jobledger.kafka.clients import consumer as make_consumer
from jobledger.kafka.topic_names import lane
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.process import greenlets
from jobledger.process.identity import source

#: Maximum number of events between two commits of the progress. With a rate, at most the events of a tenth of a second.
CHUNK = 500
#: Seconds that a request for offsets may take.
ASK_S = 15.0
#: How often a commit of the progress is tried before the backfill stops with an error.
COMMITS = 5

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(s|sec|m|min|h|hour)\s*")
_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "hour": 3600.0}


def events_per_second(text: str) -> float:
    """Convert ``"50/s"``, ``"3000/min"`` or ``"1000/h"`` to events per second. Raises `ConfigError` for other text."""
    matched = _RATE.fullmatch(text)
    if matched is None or float(matched[1]) <= 0:
        raise ConfigError(f"rate={text!r} is not a rate: write 50/s, 3000/min or 1000/h")
    return float(matched[1]) / _UNITS[matched[2]]


@dataclass(slots=True)
class BackfillProgress:
    """The progress of a backfill.

    ``total``: number of offsets in its ranges. ``passed``: number of offsets that are done. The other numbers count the
    events of this run. ``events``: events read. ``submitted``: events whose job was submitted (or would be, in a dry
    run). ``known``: events whose job was in the status table already. ``unreadable``: events that cannot be read.
    ``resumed``: whether this run continues an interrupted one. ``done``: whether the run reached its end.
    """

    total: int = 0
    passed: int = 0
    events: int = 0
    submitted: int = 0
    known: int = 0
    unreadable: int = 0
    resumed: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True)
class Range:
    """The offsets of one partition: ``begin`` is the first, ``end`` is one beyond the last, ``at`` is the next to
    read."""

    begin: int
    end: int
    at: int


@dataclass(frozen=True, slots=True)
class BackfillPlan:
    """What to backfill.

    ``handler``: the name of the handler. ``since``, ``until``: timestamps of events in ms; None: the beginning of the
    log, and the end of the log when the backfill starts. ``rate``: events per second; None: no limit. ``dry_run``:
    count events, but send and commit nothing. ``restart``: discard an interrupted run of the same handler.
    """

    handler: str
    since: int | None = None
    until: int | None = None
    rate: float | None = None
    dry_run: bool = False
    restart: bool = False


class Backfill:
    """Runs one backfill. ``known(job_id)``: whether the status table has the job.

    Raises `UnknownTask` if the app has no handler of that name.
    """

    def __init__(
        self, registry: TaskRegistry, settings: Settings, plan: BackfillPlan, known: Callable[[str], bool]
    ) -> None:
        registry.check()
        greenlets.refuse("a backfill")
        settings = settings.acting_as("backfill")
        self.settings, self.names, self.plan, self._known = settings, registry.names, plan, known
        self.handler = registry.handler(plan.handler)
        self.topic = self.handler.event.topic
        self._lookup = SchemaLookup(settings, self.names)
        writer = source("backfill")
        event_builder = WorkerEvents(registry, writer, settings.max_record_bytes)
        self._routes = Routes(registry, event_builder, writer, [self.handler], self._lookup)
        self.progress = BackfillProgress()
        self._group = self.names.backfill_group(plan.handler)
        self._conf = consumer_config(settings, group=self._group)
        self._label = json.dumps({"since": plan.since, "until": plan.until})

    # -- what to read ---------------------------------------------------------------------------------------------

    def _ranges(self, consumer: Consumer) -> dict[int, Range]:
        """Return the range of each partition: the ranges of an interrupted run, or else new ranges."""
        parts = [TopicPartition(self.topic, p) for p in range(partitions_of(self.settings, self.topic))]
        positions = [] if self.plan.dry_run else committed(consumer, parts, self.settings, join(self._group), ASK_S)
        before = {} if self.plan.restart else self._interrupted(positions)
        if before:
            self.progress.resumed = True
            return before
        ranges: dict[int, Range] = {}
        with LogReader(self.settings) as reader:
            for part in parts:
                low, high = reader.bounds(self.topic, part.partition)
                begin = self._at_time(consumer, part.partition, self.plan.since, low, high)
                end = self._at_time(consumer, part.partition, self.plan.until, high, high)
                ranges[part.partition] = Range(max(low, begin), max(low, begin, end), max(low, begin))
        return ranges

    def _interrupted(self, committed: list[TopicPartition]) -> dict[int, Range]:
        ranges: dict[int, Range] = {}
        for part in committed:
            if part.offset < 0 or not part.metadata:
                continue
            saved = json.loads(part.metadata)
            if saved["done"]:
                continue
            if saved["label"] != self._label:
                raise ConfigError(
                    f"a backfill of {self.plan.handler!r} with other bounds was interrupted ({saved['label']}): give the same "
                    "--from and --to to continue it, or --restart to start over"
                )
            ranges[part.partition] = Range(saved["begin"], saved["end"], part.offset)
        return ranges

    def _at_time(self, consumer: Consumer, partition: int, at_ms: int | None, otherwise: int, high: int) -> int:
        if at_ms is None:
            return otherwise
        (position,) = consumer.offsets_for_times([TopicPartition(self.topic, partition, at_ms)], ASK_S)
        if position.error is not None:
            raise translate(position.error, self.settings, f"asking for offsets of {self.topic}", read(self.topic))
        return high if position.offset < 0 else position.offset

    # -- run ------------------------------------------------------------------------------------------------------

    def run(
        self, stop: threading.Event, tell: Callable[[BackfillProgress], None] = lambda progress: None
    ) -> BackfillProgress:
        """Submit the jobs for the events of the ranges, until the end of the ranges or until ``stop`` is set, and
        return the progress. ``tell`` is called with the progress after each chunk of events.

        Raises `BrokerUnavailable`, `TopicMissing`, `AccessDenied`, `ConfigError`, `IncompatibleEvent`, and
        `JobledgerError` for a job whose record is too large. Jobs that were submitted before the error remain
        submitted, and another run continues from there.
        """
        check_connection(self.settings)
        consumer, sender = make_consumer(self._conf), WorkerProducer(self.settings, self.names, 1.0)
        try:
            work_topic = self.names.jobs(lane(self.handler.task.queue, self.handler.task.policy.priority))
            acls.check(self.settings, self.names.namespace, [self.topic, work_topic, self.names.schemas])
            check_classes([self.handler.event], self._lookup.all())
            if not self.plan.dry_run:
                partitions_of(self.settings, work_topic)
                sender.prepare([work_topic])
            ranges = self._ranges(consumer)
            self.progress.total = sum(r.end - r.begin for r in ranges.values())
            self.progress.passed = sum(r.at - r.begin for r in ranges.values())
            if not self.plan.dry_run:
                self._save(consumer, ranges, {p: r.at for p, r in ranges.items()})
            self._go(consumer, sender, ranges, stop, tell)
        except KafkaException as exc:
            needs = (read(self.topic), join(self._group))
            raise translate(exc.args[0], self.settings, f"reading {self.topic}", *needs) from exc
        finally:
            consumer.close()
            sender.close()
            self._lookup.close()
        return self.progress

    def _go(
        self,
        consumer: Consumer,
        sender: WorkerProducer,
        ranges: dict[int, Range],
        stop: threading.Event,
        tell: Callable[[BackfillProgress], None],
    ) -> None:
        at = {partition: r.at for partition, r in ranges.items()}
        pace = _Pace(self.plan.rate)
        size = CHUNK if self.plan.rate is None else max(1, min(CHUNK, int(self.plan.rate / 10)))
        for chunk in self._chunks(ranges, size, stop):
            self._submit(sender, chunk)
            for message in chunk:
                partition, offset = message.partition() or 0, message.offset() or 0
                self.progress.passed += offset + 1 - at[partition]
                at[partition] = offset + 1
            if not self.plan.dry_run:
                self._save(consumer, ranges, at)
            tell(self.progress)
            if stop.wait(pace.pause_after(len(chunk))):
                return
        if stop.is_set():
            return
        self.progress.done, self.progress.passed = True, self.progress.total
        if not self.plan.dry_run:
            self._save(consumer, ranges, {p: r.end for p, r in ranges.items()})
        tell(self.progress)

    def _chunks(self, ranges: dict[int, Range], size: int, stop: threading.Event) -> Iterator[list[Message]]:
        with LogReader(self.settings) as reader:
            for partition, r in sorted(ranges.items()):
                chunk: list[Message] = []
                for message in reader.read(self.topic, partition, r.at, r.end) if r.at < r.end else ():
                    chunk.append(message)
                    if len(chunk) >= size:
                        yield chunk
                        chunk = []
                    if stop.is_set():
                        return
                if chunk:
                    yield chunk

    def _submit(self, sender: WorkerProducer, chunk: list[Message]) -> None:
        batch = EventBatch(sender, self.settings.bootstrap or "the embedded broker")
        for message in chunk:
            self.progress.events += 1
            try:
                jobs, refused = self._routes.jobs(message)
            except SchemaError:
                self.progress.unreadable += 1  # if the router has read this event, it has written its dead letter
                continue
            if refused:
                where = f"{message.topic()}[{message.partition()}]@{message.offset()}"
                raise ConfigError(f"{where}: {refused[0]}: fix it, and run the backfill again")
            if not jobs:
                continue
            ((job_id, record),) = jobs
            if self._known(job_id):
                self.progress.known += 1
                continue
            self.progress.submitted += 1
            if not self.plan.dry_run:
                batch.send(message, record)
        for message, record in batch.await_all():
            raise JobledgerError(
                f"the job of {message.topic()}[{message.partition()}]@{message.offset()} has a record of "
                f"{len(record.value or b'')} bytes, above what {record.topic} accepts (max.message.bytes): raise the limit and continue"
            )

    def _save(self, consumer: Consumer, ranges: dict[int, Range], at: dict[int, int]) -> None:
        """Commit the progress and the ranges, so that another run can continue. Raises `BrokerUnavailable` after
        `COMMITS` failed commits, and `AccessDenied`."""
        done = all(at[p] >= r.end for p, r in ranges.items())
        offsets = [
            TopicPartition(
                self.topic,
                partition,
                at[partition],
                json.dumps({"begin": r.begin, "end": r.end, "label": self._label, "done": done}),
            )
            for partition, r in ranges.items()
        ]
        error: Any = None
        for _ in range(COMMITS):
            try:
                results = consumer.commit(offsets=offsets, asynchronous=False) or ()
            except KafkaException as exc:
                error = exc.args[0]
            else:
                error = next((r.error for r in results if r.error is not None), None)
            if error is None:
                return
            what = "committing the progress of the backfill"
            refused = denied(error, self.settings, what, join(self._group), read(self.topic))
            if refused is not None:
                raise refused
            time.sleep(0.5)
        raise BrokerUnavailable(f"the progress of the backfill could not be committed: {error.str()}")


class _Pace:
    """Computes the waits that limit the backfill to ``rate`` events per second; None: no waits."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._next = rate, time.monotonic()

    def pause_after(self, count: int) -> float:
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        # After a delay by a slow broker, at most 0.1 s is made up for: the rate protects systems downstream.
        self._next = max(self._next, now - 0.1) + count / self._rate
        return max(0.0, self._next - now)


def known_to(job: Callable[[str], object], missing: type[Exception]) -> Callable[[str], bool]:
    """Return a function for the parameter ``known`` of `Backfill`. ``job``: the method of a status table that returns a
    job by its id, and raises ``missing`` for an unknown id."""

    def known(job_id: str) -> bool:
        try:
            job(job_id)
        except missing:
            return False
        return True

    return known
