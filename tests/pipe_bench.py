"""Builds the parts of a worker's event loop for tests that need no Kafka.

`Parts` has a loop and a clock that the test drives by hand; the test plays the dispatcher, and no thread runs. `Bench`
runs the dispatcher itself on the running event loop. In both, the parts are the real ones; records for Kafka are kept
in a list (`Kept`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

import pytest
import uuid_utils
from confluent_kafka import KafkaError, Message

from jobledger import App
from jobledger.config import Settings
from jobledger.consumers.isolation.child_handle import ChildHandle
from jobledger.consumers.isolation.pool import ChildPool, ChildSettings
from jobledger.consumers.recording import recorder as recorder_module
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.running import executor, job_leases, placement
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling import dispatcher, slot_queues, starter, wait_queues
from jobledger.consumers.scheduling.dispatcher import Dispatcher
from jobledger.consumers.scheduling.pipe import Pipe, PipeOptions, build
from jobledger.consumers.scheduling.wait_queues import Lookahead
from jobledger.consumers.state import ownership_lease, running, work
from jobledger.consumers.state.event_loop import LoopCalls
from jobledger.consumers.state.offset_tracker import PartitionOffsets
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.definitions.retry import Retry
from jobledger.errors import JobledgerError
from jobledger.kafka import broker_clock
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.kafka.topic_names import lane
from jobledger.log.commit_metadata import Restored
from jobledger.schemas import codec
from jobledger.schemas.events import Fact, JobEvent, JobSpec, JobStarted, JobSubmitted, settles
from tests.patience import PATIENCE

#: Maximum size of a worker's record, in bytes.
LIMIT = 1_000_000


# -- records ----------------------------------------------------------------------------------------------------------


class Record:
    """A message as Kafka's client returns it. ``at``: when the record was appended, in seconds since the epoch."""

    def __init__(self, offset: int, value: bytes | None, *, at: float | None = None, key: bytes | None = None) -> None:
        self._offset, self._value, self._key = offset, value, key
        self._at = int((time.time() if at is None else at) * 1000)

    def offset(self) -> int:
        return self._offset

    def topic(self) -> str:
        return "shop.lifecycle"

    def partition(self) -> int:
        return 0

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def timestamp(self) -> tuple[int, int]:
        return 2, self._at


class Kept:
    """A producer that keeps the sent records in order. The next poll acknowledges them; with ``lingers``, only
    `deliver` does. While ``frozen`` is true, a poll acknowledges nothing. ``now``: the broker's clock, in seconds since
    the epoch."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.sent: list[bytes] = []
        #: The topic of each sent record.
        self.topics: list[str] = []
        self.frozen = self.lingers = False
        self.acknowledged_at: list[float] = []
        self.clock, self.polled_at = BrokerClock(), 0.0
        self._now = now
        self._waiting: deque[tuple[int, Callable[[KafkaError | None, Any], None] | None]] = deque()

    def produce(
        self,
        topic: str,
        value: bytes,
        key: object,
        partition: int,
        on_delivery: Callable[[KafkaError | None, Any], None] | None = None,
    ) -> None:
        self._waiting.append((len(self.sent), on_delivery))
        self.sent.append(value)
        self.topics.append(topic)

    send = produce

    @property
    def unacknowledged(self) -> int:
        return len(self._waiting)

    def poll(self, seconds: float = 0.0) -> None:
        if not self.frozen and not self.lingers:
            self.deliver(len(self._waiting))

    def deliver(self, most: int) -> None:
        """Acknowledge the oldest records."""
        for _ in range(min(most, len(self._waiting))):
            offset, on_delivery = self._waiting.popleft()
            self.acknowledged_at.append(time.monotonic())
            if on_delivery is not None:
                on_delivery(None, Record(offset, self.sent[offset], at=self._now()))

    def events(self) -> list[JobEvent]:
        return [codec.decode(value) for value in self.sent]

    def facts(self) -> list[Any]:
        return [event.fact for event in self.events()]

    def ended(self) -> list[str]:
        """Return the jobs whose closing fact is acknowledged."""
        left = {offset for offset, _ in self._waiting}
        read = [codec.decode(value) for n, value in enumerate(self.sent) if n not in left]
        return [event.job_id for event in read if settles(event.fact)]


def event(
    fact: Fact,
    task: str,
    *,
    key: str | None = None,
    queue: str = "default",
    job_id: str | None = None,
    run: int = 1,
    attempt: int = 1,
    release: int = 1,
) -> bytes:
    """Return the record of a client's event. ``job_id`` None: a new job."""
    job_id = str(uuid_utils.uuid7()) if job_id is None else job_id
    about = JobEvent(job_id, job_id, run, attempt, release, 0, task, queue, key, None, "c", None, fact)
    return codec.encode(about)


def job(
    task: str,
    *,
    key: str | None = None,
    queue: str = "default",
    tags: dict[str, str] | None = None,
    expires_at: int | None = None,
    expires_in_ms: int | None = None,
    **args: Any,
) -> bytes:
    """Return the record of a submission. ``args``: the arguments of the task."""
    spec = JobSpec(json.dumps(args).encode(), tags or {}, expires_at=expires_at, expires_in_ms=expires_in_ms)
    return event(JobSubmitted(spec), task, key=key, queue=queue)


def put(partition: Partition, values: list[bytes]) -> None:
    """Add fetched records to the partition."""
    first = len(partition.raw) + (partition.offsets.end if partition.offsets else 0)
    partition.raw.extend(cast(Message, Record(first + n, value)) for n, value in enumerate(values))


# -- parts ------------------------------------------------------------------------------------------------------------


def pipe_of(app: App, kept: Kept, calls: LoopCalls, *, decoder: codec.Decoder | None = None, **options: Any) -> Pipe:
    """Build the parts of a worker on the loop of ``calls``."""
    sender, reports = cast(WorkerProducer, kept), Reports(calls)
    recorder = Recorder(WorkerEvents(app.registry, "worker@unit:1", LIMIT), sender, reports)
    lookahead = Lookahead(options.get("lookahead", 10_000), options.get("lookahead_bytes", 1 << 20))
    limits = PipeOptions(options.get("queues", list(app.registry.queues)), options.get("concurrency", 10), lookahead)
    unknown_backoff = options.get("unknown_backoff", Retry())
    tasks = TaskTable(app.registry, options.get("threads", 4), options.get("children", 1), unknown_backoff)
    return build(app.registry, decoder or codec.Decoder(), sender, recorder, reports, tasks, limits)


def owned_partition(
    app: App,
    number: int = 0,
    queue: str = "default",
    *,
    level: str | None = None,
    restored: Restored | None = None,
    now: float | None = None,
) -> Partition:
    """Return a partition whose takeover is complete, with an ownership lease of an hour from ``now`` on."""
    lease = OwnershipLease(3600.0)
    lease.confirm(time.monotonic() if now is None else now)
    made = Partition(app.names.jobs(lane(queue, level)), number, lease, 0, None)
    made.offsets, made.ready = PartitionOffsets(restored or Restored(0), 0), True
    return made


class FreeChildren:
    """A pool without real child processes. A test says when a child is free, and the jobs for it are kept in
    ``given``."""

    def __init__(self, of: Placement) -> None:
        self.given: list[JobRun] = []
        self.pool = ChildPool(ChildSettings(1, 0, 10, "m:a", Settings(), needed=True), of)
        self.pool._fork_client._process = cast(Any, object())  # counts as started, and forks no child
        self.pool._give = lambda child, work: self.given.append(work)  # type: ignore[method-assign]  # no process
        of.children = self.pool

    def free(self) -> None:
        """Make one more child free."""
        self.pool._use(ChildHandle(self.pool))


# -- driven by hand ---------------------------------------------------------------------------------------------------


class HandClock:
    """A monotonic clock that only `PartsBench.advance` moves. `wall`: the same as seconds since the epoch."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now


class HandLoop(asyncio.SelectorEventLoop):
    """An event loop whose callbacks run only in `step`, and whose timers follow a `HandClock`."""

    def __init__(self, clock: HandClock) -> None:
        self._by_hand = clock
        super().__init__()

    def time(self) -> float:
        return self._by_hand.now

    def step(self) -> None:
        """Run all callbacks that are ready, and those that they add, without waiting."""
        for _ in range(10):
            self.call_soon(self.stop)
            self.run_forever()


class HeldCode:
    """The code of jobs that begins, and ends only when the test says so. Jobs are named by their number ``n``."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self._ends: dict[int, asyncio.Future[None]] = {}

    async def run(self, n: int) -> None:
        self.began.append(n)
        self._ends[n] = asyncio.get_running_loop().create_future()
        try:
            await self._ends[n]
        finally:
            self._ends.pop(n, None)

    @property
    def running(self) -> set[int]:
        """The jobs whose code has begun and has not ended."""
        return set(self._ends)

    def end(self, n: int, error: BaseException | None = None) -> None:
        """Let the code of job ``n`` return, or raise ``error``, in the next step of the loop."""
        if error is None:
            self._ends[n].set_result(None)
        else:
            self._ends[n].set_exception(error)


class PartsBench:
    """The parts of a worker with a loop and a clock of the test. Use it as a context manager.

    The test plays the dispatcher: nothing is taken, begun, acknowledged or freed unless the test calls for it.
    ``woken``: how often the parts asked for a pass of the dispatcher.
    """

    def __init__(self, app: App, **options: Any) -> None:
        self.app, self.clock, self.failed, self.woken = app, HandClock(), list[JobledgerError](), 0
        self.loop = HandLoop(self.clock)
        self.kept = Kept(self.clock.wall)
        calls = LoopCalls(self.failed.append)
        calls.loop = self.loop
        self.pipe = pipe_of(app, self.kept, calls, **options)
        self.reports, self.lanes = self.pipe.reports, self.pipe.lanes
        self.ack_tracker = AckTracker(Settings(), cast(WorkerProducer, self.kept), self.pipe.recorder, self.reports)
        self.reports.on_wake, self.reports.on_drain = self._wake, self.ack_tracker.drain
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for module in (
            dispatcher,
            executor,
            job_leases,
            placement,
            recorder_module,
            running,
            slot_queues,
            starter,
            wait_queues,
        ):
            self._patches.setattr(module, "_monotonic", self.clock)
        times = SimpleNamespace(monotonic=self.clock, time=self.clock.wall)
        for module in (broker_clock, ownership_lease, work):
            self._patches.setattr(module, "time", times)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.step()
        finally:
            self.loop.close()
            self._patches.undo()
        if error is None:
            assert self.failed == []

    def _wake(self) -> None:
        self.woken += 1
        self.reports.awake = False

    # -- what the test does -------------------------------------------------------------------------------------------

    def partition(self, number: int = 0, queue: str = "default", **about: Any) -> Partition:
        """Make a partition that this worker owns."""
        made = owned_partition(self.app, number, queue, now=self.clock.now, **about)
        self.lanes.by_topic[made.topic].parts.append(made)
        self.pipe.wait_queues.owned = self.lanes.owned
        self.lanes.divide()
        return made

    def message(self, partition: Partition, value: bytes | None, *, key: bytes | None = None) -> Message:
        """Return ``value`` as the next record of the partition, appended now."""
        assert partition.offsets is not None
        return cast(Message, Record(partition.offsets.end, value, at=self.clock.wall(), key=key))

    def take(self, partition: Partition, *values: bytes | None) -> None:
        """Pass records to admission, as the next records of the partition."""
        for value in values:
            self.pipe.admission.take_up(partition, self.message(partition, value), self.clock.now)

    def serve(self, most: int = 100) -> int:
        """Begin jobs of ready wait queues, in all lanes, until none may begin. Return how many were handled."""
        handled = 0
        self.pipe.wait_queues.release_opened()
        while got := sum(self.pipe.wait_queues.serve(lane, most - handled) for lane in self.lanes.all):
            handled += got
            if handled >= most:
                break
        return handled

    def step(self) -> None:
        """Run what is ready on the loop."""
        self.loop.step()

    def advance(self, seconds: float) -> None:
        """Move the clock, and run the timers that are due."""
        self.clock.now += seconds
        self.loop.step()

    def acknowledge(self, most: int = 1_000_000) -> None:
        """Acknowledge the oldest records, and also those that are sent because of that, up to ``most`` in all."""
        while most > 0 and (waiting := self.kept.unacknowledged):
            self.kept.deliver(most)
            most -= waiting
            self.ack_tracker.drain()
            self.loop.step()

    def free(self) -> list[JobRun]:
        """Free the slots of jobs that have ended, and end the turn of keys whose last fact is acknowledged. Return the
        ended jobs."""
        self.loop.step()
        freed = []
        while self.reports.finished:
            ended = self.reports.finished.popleft()
            del self.pipe.running.jobs[ended]
            if ended.slots is not None:
                ended.slots.running -= 1
            if ended.timer is not None:
                ended.timer.cancel()
            self.pipe.wait_queues.left(ended)
            freed.append(ended)
        while self.reports.acknowledged:
            self.pipe.wait_queues.acknowledged(self.reports.acknowledged.popleft())
        return freed

    def succeed(self, one: JobRun) -> None:
        """Let a job succeed that runs in a thread or a child process."""
        self.pipe.recorder.succeeded(one, None)
        self.reports.ended(one)
        self.free()

    def pause(self, kind: str, name: str) -> None:
        """Pause the queue or task, depending on ``kind``."""
        self.pipe.control.paused[kind, name] = "by me"
        self.lanes.regate(self.pipe.control)

    def resume(self) -> None:
        """End all pauses."""
        self.pipe.control.paused.clear()
        self.lanes.regate(self.pipe.control)

    # -- what the test sees -------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[int]:
        """The offsets of the jobs that were begun and not freed, in the order of their starts."""
        return [one.offset for one in self.pipe.running.jobs]

    def runtime(self, task: str) -> TaskRuntime:
        return self.pipe.tasks.runtimes[task]

    def facts(self, kind: type[Any]) -> list[Any]:
        """Return the sent facts of one kind."""
        return [fact for fact in self.kept.facts() if isinstance(fact, kind)]

    def kinds(self) -> list[str]:
        """Return the names of the classes of all sent facts, in order."""
        return [type(fact).__name__ for fact in self.kept.facts()]


# -- with the dispatcher ----------------------------------------------------------------------------------------------


class Bench:
    """A worker's loop over partitions that a test fills."""

    def __init__(self, app: App, *, decoder: codec.Decoder | None = None, **options: Any) -> None:
        self.kept, self.failed = Kept(), list[JobledgerError]()
        self.app, self.hurried = app, 0
        sender = cast(WorkerProducer, self.kept)
        calls = LoopCalls(self.failed.append)
        calls.loop = asyncio.get_running_loop()
        pipe = pipe_of(app, self.kept, calls, decoder=decoder, **options)
        self.arrived = pipe.reports.arrived
        self.ack_tracker = AckTracker(Settings(), sender, pipe.recorder, pipe.reports)
        self.ack_tracker.hurry = self._hurry  # type: ignore[method-assign]  # its thread does not run
        self.dispatcher = Dispatcher(pipe, sender, self.ack_tracker, options.get("waiting_limit", 64))
        self.leases = pipe.leases
        self.dispatcher.start()

    def _hurry(self) -> None:
        self.hurried += 1
        if not self.kept.frozen:
            self.kept.deliver(self.kept.unacknowledged)
        self.dispatcher.call(self.ack_tracker.drain)

    def partition(self, number: int = 0, queue: str = "default") -> Partition:
        """Make a partition that this worker owns."""
        made = owned_partition(self.app, number, queue)
        self.dispatcher.ready([made])
        return made

    def reported(self, fact: object) -> bool:
        """Process the delivery reports that have arrived, as the ack tracker's thread does. Return whether ``fact``,
        which was computed before, is true."""
        self.ack_tracker.serve()
        return bool(fact)

    def close(self) -> None:
        self.dispatcher.close()


async def until(check: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until ``check`` is true, for at most ``seconds`` times `PATIENCE`. Time in which this process is paused does
    not count."""
    began, pause = time.monotonic(), 0.005
    for _ in range(int(PATIENCE * seconds / pause)):
        if check():
            return
        await asyncio.sleep(pause)
    tasks = [task.get_coro() for task in asyncio.all_tasks()]
    took = time.monotonic() - began
    raise AssertionError(f"not so after {PATIENCE * seconds:g} s ({took:.1f} s on the clock); tasks: {tasks}")


async def for_ever() -> None:
    """Wait until the job is cancelled or the test ends."""
    await asyncio.Event().wait()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run the test in a new event loop."""

    async def whole() -> None:
        await test()

    asyncio.run(whole())


def starts(bench: Bench) -> int:
    """Return the number of `JobStarted` facts that were sent."""
    return sum(isinstance(fact, JobStarted) for fact in bench.kept.facts())
