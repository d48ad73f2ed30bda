"""Which record runs next: takes raw messages from the partitions in turn, judges them and starts what may run.

Runs on the event loop only (but for `Aside`). Every message is received by the partition's offsets before anything else
is done with it, in the log's order; from then on it is not done until the settler says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import uuid_utils
from confluent_kafka import KafkaException, Message

from jobledger.consumers.aside import Aside, Read
from jobledger.consumers.execute import Executor, context_of
from jobledger.consumers.facts import Facts
from jobledger.consumers.fetch import Fetcher
from jobledger.consumers.outcome import (
    UNKNOWN_TASK_TAG,
    Failed,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
    error_info,
    unknown_task,
)
from jobledger.consumers.quick import plain_submission
from jobledger.consumers.releases import release_key
from jobledger.consumers.send import BY_KEY, UNACKNOWLEDGED_LIMIT, Sender
from jobledger.consumers.work import Arrived, Found, Partition, Plan, Work
from jobledger.errors import BadArguments, JobledgerError, RegistryNeeded, SchemaError, UnknownFact
from jobledger.log import now_us
from jobledger.names import Names
from jobledger.retry import Retry
from jobledger.schemas import codec
from jobledger.schemas.codec import encode
from jobledger.schemas.events import JobDue, JobEvent, JobFailed, JobRetried, JobSnoozed, JobStarted, JobSubmitted
from jobledger.task import Registry

LOG = logging.getLogger("jobledger.worker")

#: Records taken from one partition before the next one's turn.
SLICE = 16
#: Records begun in one go before the loop gets a turn.
BUDGET = 64

#: Records of one partition that may wait for `Aside` to find their schemas: what looks for them wakes us.
ASIDE_LIMIT = 1_000

#: Seconds until it is looked again whether enough is acknowledged.
REST_S = 0.005

#: Seconds until delivery callbacks are run when nothing else happens.
POLL_S = 0.005

_OWN = codec.MAGIC + codec.FINGERPRINT
_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


@dataclass(slots=True)
class Counts:
    """What came in, for metrics and health."""

    started: int = 0
    duplicates: int = 0
    found_closed: int = 0
    rejected: int = 0
    reasons: dict[str, str] = field(default_factory=dict)  # partition → why it stopped


class Dispatcher:
    """Starts jobs while there are slots: ``concurrency`` in all, ``threads`` of them plain functions."""

    def __init__(
        self,
        registry: Registry,
        facts: Facts,
        sender: Sender,
        decoder: codec.Decoder,
        arrived: Arrived,
        *,
        concurrency: int,
        threads: int,
        waiting_limit: int,
        unknown_task_backoff: Retry,
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self._registry, self._facts, self._sender, self._arrived = registry, facts, sender, arrived
        self._concurrency, self._threads = concurrency, threads
        self._waiting_limit, self._backoff, self.fail = waiting_limit, unknown_task_backoff, fail
        self._names: Names = registry.names
        self._lifecycle = self._names.lifecycle
        self._source, self._produce = facts.source, sender.produce
        self._own_form = decoder.own_form
        self.plans = {name: Plan(task) for name, task in registry.tasks.items()}
        self.executor: Executor
        self.fetchers: list[Fetcher] = []
        self.counts = Counts()
        self.running: dict[Work, None] = {}
        self._in_threads = 0
        self._waiting: deque[Work] = deque()  # plain functions for which no thread is free
        self._finished: deque[Work] = deque()  # by threads, not yet noticed here
        self._ring: deque[Partition] = deque()
        self._loop: asyncio.AbstractEventLoop
        self._awake = False
        self.accepting = True
        self.needs_tick = False
        self._resting = self._polling = False
        self.idle = asyncio.Event()
        self._aside = Aside(decoder, lambda *read: self.call(self.from_aside, *read), fail)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on ``loop``, which must be the running one."""
        self._loop = loop
        self._aside.start()

    def close(self) -> None:
        """End the helper thread."""
        self._aside.close()

    def tick(self) -> None:
        """Called by the settler every 0.1 s: late progress is sent, and what waited for acknowledgements goes on."""
        now = _monotonic()
        for work in list(self.running):
            if work.unsent is not None:
                work.flush_progress(now)
        if self.needs_tick:
            self.needs_tick = False
            self.wake()

    # -- called from other threads --------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to do. Callable from any thread."""
        if not self._awake:
            self._awake = True
            self.call(self.pump)

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the loop. Callable from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has ended
            self._loop.call_soon_threadsafe(function, *args)

    def ready(self, partitions: list[Partition]) -> None:
        """Partitions whose takeover is through. Callable from any thread."""
        self.call(self._ring_add, partitions)

    def _ring_add(self, partitions: list[Partition]) -> None:
        self._ring.extend(p for p in partitions if p.owned)
        # From here, not from where `ready` is called: a pump that was on its way then goes before this, and sees nothing.
        self.wake()

    def ended(self, partitions: list[Partition]) -> None:
        """Partitions that are owned no more; what runs of them goes on. Callable from any thread."""
        gone = set(partitions)

        def forget() -> None:
            self._ring = deque(p for p in self._ring if p not in gone)

        self.call(forget)

    def ended_in_thread(self, work: Work) -> None:
        """A plain function ended. Called in its thread."""
        self._finished.append(work)
        self.wake()

    # -- the loop's side ------------------------------------------------------------------------------------------

    def ended_here(self, work: Work) -> None:
        """A coroutine ended. Called on the loop."""
        del self.running[work]
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self.pump)

    def pump(self) -> None:
        """Take up what fits, one partition after the other."""
        self._awake = False
        running = self.running
        while self._finished:
            del running[self._finished.popleft()]
            self._in_threads -= 1
        # Every time: few delivery callbacks at once cost less than many (measured: a tenth of the whole).
        self._sender.poll()
        if not self._polling and self._sender.unacknowledged:
            self._polling = True
            self._loop.call_later(POLL_S, self._poll)
        if not self.accepting:
            if not running:
                self.idle.set()
            return
        try:
            begun = self._start_waiting()
            begun += self._take_turns(BUDGET)
        except Exception as exc:  # noqa: BLE001  # the record at hand would neither be run nor be missed
            self._broken(exc)
            return
        # Records that are passed take no slot, so nothing else would wake us for what follows them.
        if begun and len(running) < self._concurrency and not self._awake:
            self._awake = True
            self._loop.call_soon(self.pump)
        for fetcher in self.fetchers:
            fetcher.taken()

    def _poll(self) -> None:
        """Acknowledgements come also when no job begins or ends, and what they settle is to be committed."""
        self._sender.poll()
        self._polling = bool(self._sender.unacknowledged)
        if self._polling:
            self._loop.call_later(POLL_S, self._poll)

    def _take_turns(self, budget: int) -> int:
        ring, running = self._ring, self.running
        free = min(self._concurrency - len(running), budget)
        if free <= 0 or len(self._waiting) >= self._waiting_limit:
            return 0
        if self._sender.unacknowledged > UNACKNOWLEDGED_LIMIT:
            if not self._resting:
                self._resting = True
                self._loop.call_later(REST_S, self._rested)
            return 0
        taken = empty = 0
        while taken < free and empty < len(ring):
            partition = ring[0]
            ring.rotate(-1)
            got = self._take_slice(partition, min(SLICE, free - taken)) if partition.raw else 0
            if got:
                empty = 0
                taken += got
            else:
                empty += 1
            if len(self._waiting) >= self._waiting_limit:
                break
        return taken

    def _rested(self) -> None:
        self._resting = False
        self.wake()

    def _take_slice(self, partition: Partition, most: int) -> int:
        """Take up to ``most`` records of one partition."""
        raw, lease, offsets = partition.raw, partition.lease, partition.offsets
        if offsets is None or partition.aside > ASIDE_LIMIT or not partition.begin_taking():
            return 0
        taken = 0
        try:
            with partition.lock:
                partition.braked = offsets.braked
            if partition.braked:
                self.needs_tick = True
                return 0
            while taken < most and partition.owned and partition.stopped is None:
                now = _monotonic()
                if now > lease.until:
                    partition.lease.wanted = True  # the fetch thread asks the coordinator, and wakes us
                    break
                try:
                    message = raw.popleft()
                except IndexError:  # the fetch thread may have dropped them
                    break
                taken += 1
                self._take_up(partition, message, now)
            if partition.scanned_to:
                self._scan_passed(partition)
        finally:
            partition.taking = False
        return taken

    def _take_up(self, partition: Partition, message: Message, now: float) -> None:
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
                partition.aside += 1
                self._aside.put(partition, message, fresh)
                return
            if (plain := plain_submission(framed)) is not None:
                self.accept(partition, message, plain, fresh, now)
                return
            own = framed
        try:
            event = codec.decode(own)
        except UnknownFact as exc:
            self.stop_partition(partition, message, f"{exc}: upgrade this worker")
        except SchemaError as exc:
            self.reject(partition, message, str(exc), fresh)
        else:
            self.accept(partition, message, event, fresh, now)

    def _scan_passed(self, partition: Partition) -> None:
        """Let go of what the takeover's scan found, once nothing that is still to come can need it."""
        offsets = partition.offsets
        assert offsets is not None
        if offsets.end >= partition.scanned_to and not partition.aside:
            partition.closed.clear()
            partition.starts.clear()
            partition.scanned_to = 0
        if not partition.closed:
            with partition.lock:
                offsets.hold(None)

    def from_aside(self, partition: Partition, message: Message, read: Read, fresh: bool) -> None:
        """A record came back from `Aside`: as an event, what keeps this worker from judging it, or why it cannot be read."""
        partition.aside -= 1
        if not partition.begin_taking():
            return  # received and not done: the next owner's
        try:
            if isinstance(read, UnknownFact):
                self.stop_partition(partition, message, f"{read}: upgrade this worker")
            elif isinstance(read, RegistryNeeded):
                self.stop_partition(partition, message, str(read))
            elif isinstance(read, str):
                self.reject(partition, message, read, fresh)
            else:
                self.accept(partition, message, read, fresh, _monotonic())
            if partition.scanned_to:
                self._scan_passed(partition)
        except Exception as exc:  # noqa: BLE001  # as in `pump`
            self._broken(exc)
        finally:
            partition.taking = False
        self.wake()

    def _broken(self, exc: Exception) -> None:
        if isinstance(exc, JobledgerError):
            self.fail(exc)
        else:
            LOG.error("the dispatcher broke", exc_info=exc)
            self.fail(JobledgerError(f"the dispatcher broke: {exc!r}"))

    def accept(self, partition: Partition, message: Message, event: JobEvent, fresh: bool, now: float) -> None:
        """A readable event at a work position: run it, unless it is done, known already, or does not belong here."""
        offset = message.offset() or 0
        fact = event.fact
        if type(fact) is JobSubmitted:
            if fact.delay_ms is not None or fact.due_at is not None:
                self.reject(partition, message, "a conditioned JobSubmitted does not belong on a work topic", fresh)
                return
        elif type(fact) is not JobDue:
            self.reject(partition, message, f"a {type(fact).__name__} does not belong on a work topic", fresh)
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
        work = Work(partition, offset, event, self._arrived)
        partition.live[offset] = work
        if found is not None:
            self._settle_found(work, found)
            return
        plan = self.plans.get(event.task)
        spec = fact.spec
        if plan is None:
            outcome = unknown_task(event.task, list(self.plans), spec.tags, self._backoff, random.random())
            self.executor.close_with(work, outcome)
            return
        work.plan = plan
        try:
            work.kwargs = plan.decode_args(spec.args)
        except BadArguments as exc:
            self.executor.close_with(work, Failed("bad-arguments", error_info(exc)))
            return
        tags = spec.tags
        if UNKNOWN_TASK_TAG in tags:
            tags = {k: v for k, v in tags.items() if k != UNKNOWN_TASK_TAG}
        work.send_progress = self.executor.progressed
        work.context = context_of(work, tags, spec.parent)
        self._start(work, now, partition.starts.pop(key, 0) if partition.starts else 0)

    def _start(self, work: Work, now: float, takeover: int) -> None:
        """Run a job that may run: where its task's code runs, now or as soon as there is room."""
        assert work.plan is not None
        if work.plan.is_async:
            self._begin(work, now, takeover)
            work.handle = self._loop.create_task(self.executor.run(work))
        elif self._in_threads < self._threads:
            self._begin(work, now, takeover)
            self._in_threads += 1
            self.executor.submit(work)
        else:
            work.takeover = takeover
            work.waiting = True
            self._waiting.append(work)

    def _begin(self, work: Work, now: float, takeover: int) -> None:
        """Say that the job starts. Nobody waits for that: the closing fact follows it in the same partition."""
        work.began = now
        event = work.event
        assert event is not None
        partition = work.partition
        started = encode(
            JobEvent(
                str(_uuid7()),
                event.job_id,
                event.run,
                event.attempt,
                event.release,
                now_us(),
                event.task,
                event.queue,
                event.key,
                event.home,
                self._source,
                event.trace,
                JobStarted(self._source, partition.topic, work.offset, takeover),
            )
        )
        try:
            self._produce(self._lifecycle, started, event.job_id, partition.number)
        except (BufferError, KafkaException):
            self._sender.send(self._lifecycle, started, event.job_id, partition.number, None)
        self.counts.started += 1
        self.running[work] = None

    def _start_waiting(self) -> int:
        """Give free threads what waits for them."""
        begun = 0
        waiting = self._waiting
        while waiting and self._in_threads < self._threads and len(self.running) < self._concurrency:
            work = waiting[0]
            now = _monotonic()
            partition = work.partition
            if not partition.begin_taking():  # not begun: the next owner's
                waiting.popleft()
                continue
            try:
                if now > partition.lease.until:
                    partition.lease.wanted = True  # the fetch thread asks the coordinator, and wakes us
                    break
                waiting.popleft()
                work.waiting = False
                self._begin(work, now, work.takeover)
                self._in_threads += 1
                self.executor.submit(work)
                begun += 1
            finally:
                partition.taking = False
        return begun

    def drop_waiting(self) -> None:
        """Forget what waits for a thread: not begun, so the next owner's."""
        while self._waiting:
            work = self._waiting.popleft()
            work.partition.live.pop(work.offset, None)

    # -- records that are not run ---------------------------------------------------------------------------------

    def _settle_found(self, work: Work, found: Found) -> None:
        """The log holds this release's end: it is not run; what derives from the end is sent again."""
        self.counts.found_closed += 1
        event = work.event
        assert event is not None
        fact = found.fact
        outcome: Outcome = Succeeded()
        due_at: int | None = None
        if isinstance(fact, JobRetried):
            outcome = Retried(fact.error, fact.delay_ms)
            due_at = (found.appended_ms + fact.delay_ms) * 1000
        elif isinstance(fact, JobSnoozed):
            tags: Mapping[str, str] | None = None
            if fact.reason == "unknown-task":
                again = unknown_task(event.task, [], _tags(event), self._backoff, 0.0)
                tags = again.tags if isinstance(again, Snoozed) else None
            outcome = Snoozed(fact.delay_ms, fact.reason, tags)
            due_at = (found.appended_ms + fact.delay_ms) * 1000
        elif isinstance(fact, JobFailed):
            outcome = Failed(fact.reason, fact.error)  # type: ignore[arg-type]  # as it was written
        self.executor.resend_derived(work, outcome, due_at, found.offset)

    def _done(self, partition: Partition, offset: int) -> None:
        assert partition.offsets is not None
        with partition.lock:
            partition.offsets.done(offset)

    def reject(self, partition: Partition, message: Message, why: str, fresh: bool) -> None:
        """Put a record that is no job into the dead-letter topic, as it is; done once that is acknowledged."""
        if not fresh:
            return
        offset = message.offset() or 0
        self.counts.rejected += 1
        LOG.error("%r@%d is rejected: %s", partition, offset, why)
        key, value = message.key(), message.value()
        record = self._facts.rejected(partition.topic, partition.number, offset, _bytes(key), _bytes(value), why)
        work = Work(partition, offset, None, self._arrived)
        partition.live[offset] = work
        assert record.value is not None
        self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)

    def stop_partition(self, partition: Partition, message: Message, why: str) -> None:
        """A newer version wrote this record, or only a registry explains it: nothing of the partition is run until this
        worker is upgraded, or told the registry."""
        self.counts.reasons[repr(partition)] = partition.stop(message, why)


def _tags(event: JobEvent) -> Mapping[str, str]:
    fact = event.fact
    return fact.spec.tags if isinstance(fact, JobSubmitted | JobDue) else {}


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None if value is None else str(value).encode()
