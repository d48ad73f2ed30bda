"""Hold a worker's state: the partitions it owns, and the work records it is processing.

State only. The fetch thread adds raw messages and ends ownership. The dispatcher (event loop) takes the messages and
marks duplicates done. The settler marks other records done; `AckTracker.drain` runs in any thread. `Partition.lock` guards
`Partition.offsets`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import KafkaError, Message

from jobledger.consumers.state.dedup import ReleaseMemory
from jobledger.consumers.state.limiters import AdaptiveGate, BreakerGate, Gate, Limiter, Slots
from jobledger.consumers.state.offset_tracker import PartitionOffsets, Snapshot
from jobledger.consumers.state.outcome import Outcome
from jobledger.definitions.context import JobContext
from jobledger.definitions.middleware import Hooks, runner
from jobledger.definitions.task import Task
from jobledger.errors import TaskInterrupted
from jobledger.kafka.clients import position_of
from jobledger.process.logger import get_logger
from jobledger.schemas.events import Fact, JobEvent, JobProgressed, JobSucceeded

if TYPE_CHECKING:
    from jobledger.log.writer import Outgoing

LOG = get_logger("jobledger.worker")

#: Delivery reports that the settler has not taken yet: (the job they are about, whether the fact closes the release,
#: error, message). True: a closing fact; False: a derived record; None: a fact after which the job continues here.
Arrived = deque[tuple["JobRun", bool | None, KafkaError | None, Message]]

#: Upper bounds of the histograms: how long jobs waited, in milliseconds, and how long attempts ran, in seconds.
WAIT_BOUNDS_MS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3, 300e3, 1800e3, 7200e3)
RUN_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)

#: Seconds between two progress facts of one job.
PROGRESS_INTERVAL_S = 0.1

_NOWHERE: frozenset[str] = frozenset()  # shared by all jobs: Python makes a new frozenset each time


class OwnershipLease:
    """The time until which this worker surely owns its partitions of a lane. Each accepted commit of the group member
    extends it.

    A process that was paused, or that has lost the broker, must not start jobs that another worker may have taken over.
    """

    __slots__ = ("_wake", "seconds", "until", "wanted")

    def __init__(self, seconds: float, wake: Callable[[], None] = lambda: None) -> None:
        self.seconds, self._wake = seconds, wake
        self.until = 0.0  # as of time.monotonic()
        self.wanted = False  # the dispatcher waits for a confirmation

    def ask(self) -> None:
        """Request a confirmation from the coordinator; the fetch thread sends it, and the dispatcher is woken once it
        is there. Any thread."""
        self.wanted = True

    def confirm(self, asked_at: float) -> None:
        """Extend the lease: a commit begun at ``asked_at`` (`time.monotonic`) was accepted. Any accepted commit serves
        a request for a confirmation. If the commit took so long that the lease is over already, the request stays open
        and the fetch thread commits again at once."""
        self.until = max(self.until, asked_at + self.seconds)
        if self.wanted and self.until > time.monotonic():
            self.wanted = False
            self._wake()


class PriorFact:
    """A fact in the log that settles a release already: its offset on lifecycle, when it was appended (ms), and the
    fact."""

    __slots__ = ("appended_ms", "fact", "offset")

    def __init__(self, offset: int, appended_ms: int, fact: Fact) -> None:
        self.offset, self.appended_ms, self.fact = offset, appended_ms, fact


#: Replaces the fact of a release that a later release has followed already: no derived record is sent again.
NOTHING_FOLLOWS = JobSucceeded()


class ParkedRecord:
    """A job far back in a line, kept as its record alone: a tenth of the memory of a `JobRun`.

    ``value``: the event, encoded with this version's schema. ``appended``: ms of the broker's clock. ``plan``: None if
    this worker does not know the task. ``suspect``: see `JobRun`.
    """

    __slots__ = ("appended", "offset", "plan", "suspect", "value")

    #: Bytes of memory that one takes beside its value, its entry in the offsets included.
    OVERHEAD = 300

    def __init__(self, offset: int, appended: int, value: bytes, plan: TaskRuntime | None, suspect: bool) -> None:
        self.offset, self.appended, self.value, self.plan, self.suspect = offset, appended, value, plan, suspect

    @property
    def size(self) -> int:
        """Return about how many bytes of memory it takes."""
        return len(self.value) + self.OVERHEAD


class WaitQueue:
    """Jobs of one partition that wait, in order.

    ``serial``: its jobs run one at a time. ``busy``: one of its jobs runs, waits for its next attempt, or its attempt's
    last fact is not acknowledged. ``over``: how many of two events have happened for that job: its slot is free; that
    fact is acknowledged.

    ``tenant``: the line takes turns with the lines of other tenants; "" where the queue has none. ``queued``: the line
    is in its stage's turns or parked at a gate.
    """

    __slots__ = ("busy", "gate", "identity", "over", "partition", "queued", "serial", "tenant", "works")

    def __init__(self, partition: Partition, identity: tuple[str, ...], serial: bool, tenant: str) -> None:
        self.partition, self.identity, self.serial, self.tenant = partition, identity, serial, tenant
        self.busy = self.queued = False
        self.over = 0
        self.gate: Gate | Slots | None = None  # the gate that it waited for last, until one of its jobs begins
        self.works: deque[JobRun | ParkedRecord] = deque()


class Partition:
    """One partition of a work topic, from its assignment to its end here. A new assignment makes a new object."""

    def __init__(self, topic: str, number: int, lease: OwnershipLease, committed: int, metadata: str | None) -> None:
        self.topic, self.number, self.lease = topic, number, lease
        #: The offset that the group had committed at assignment, and its metadata; -1: nothing was committed.
        self.committed, self.metadata = committed, metadata
        self.owned = True
        self.gone = False  # lost, or handed over: another worker may run the records that are not done
        self.ready = False  # the takeover is complete
        self.stopped: str | None = None  # why no job of it may run any more
        self.taking = False  # the dispatcher is taking records up, or starting jobs that wait
        self.aside = False  # the schema of a received record is being looked up; the record returns as `back`
        self.back: tuple[Message, Any, bool] | None = None
        self.braked = False  # its completion map is as long as it may become
        self.full = False  # so many jobs wait in its lines that no more records are taken
        self.paused = False  # its fetching is paused at the Kafka client
        self.lock = threading.Lock()
        self.offsets: PartitionOffsets | None = None
        self.memory = ReleaseMemory()
        self.raw: deque[Message] = deque()
        self.missing = 0  # offsets without a record, as far as a warning has told them
        #: Records that are taken up and not settled, by offset.
        self.live: dict[int, JobRun] = {}
        #: By release, from the takeover's scan: facts that settle it; the number of its starts without an outcome. Kept
        #: until all records below `scanned_to` are received.
        self.closed: dict[int, PriorFact] = {}
        self.starts: dict[int, int] = {}
        self.scanned_to = 0
        #: The offset of lifecycle where the takeover's scan began.
        self.floor = 0
        #: The last owner may have begun records below this offset, and did not leave cleanly. 0: no such owner.
        self.careful = 0
        self.last_commit: tuple[int, str] | None = None
        #: What the last owner committed when it left cleanly. It stays true as long as no job of it begins here.
        self.found_clean: Snapshot | None = None
        #: Its lines by (kind, name, …); how many jobs wait in them, how many of these are `ParkedRecord`, and the bytes of
        #: the deferred ones.
        self.lines: dict[tuple[str, ...], WaitQueue] = {}
        self.waiting = self.deferred = self.deferred_bytes = 0
        #: Jobs that a former owner was retrying in place, by release: (next attempt, when it is due in ms of the
        #: broker's clock, the offset on lifecycle of the fact that says so).
        self.held: dict[int, tuple[int, int, int]] = {}

    def __repr__(self) -> str:
        return f"{self.topic}[{self.number}]"

    def oldest_ms(self) -> int | None:
        """Return when the oldest record that waits here was appended, in ms; None if no record waits."""
        try:
            return int(self.raw[0].timestamp()[1])
        except IndexError:
            return None

    @property
    def fetched(self) -> int:
        """Return how many fetched records count against the prefetch limit. Records of a paused or stopped partition do
        not count: they must not keep out those of other partitions."""
        return 0 if self.idle or self.stopped is not None else len(self.raw)

    @property
    def here(self) -> bool:
        """Whether records are ready to be taken up."""
        return bool(self.raw) or self.back is not None

    @property
    def idle(self) -> bool:
        """Whether no records of it are taken for the time being."""
        return self.braked or self.full or not self.ready

    @property
    def busy(self) -> bool:
        """Whether jobs of it are under way. A job that only waits does not count."""
        return self.taking or any(not work.waiting for work in list(self.live.values()))

    def certain(self) -> bool:
        """Return whether surely no other worker has taken the partition over; if that is not known, ask the group.

        During a hand-over the group waits for this worker, so it is still certain. Any thread.
        """
        owned = self.owned  # read before `gone`, which is set first when the partition is lost
        if self.gone:
            return False
        if not owned or time.monotonic() <= self.lease.until:
            return True
        self.lease.ask()
        return False

    def nothing_waits(self) -> None:
        """Set the counts of waiting jobs to zero: those jobs belong to the next owner."""
        self.waiting = self.deferred = self.deferred_bytes = 0

    def begin_taking(self) -> bool:
        """Claim the right to take records up; the caller ends the claim with ``taking = False``.

        Returns False if the partition is no longer owned, is stopped, or has no offsets yet.
        """
        with self.lock:
            self.taking = self.owned and self.stopped is None and self.offsets is not None
        return self.taking

    def stop(self, message: Message, why: str) -> None:
        """Run no more jobs of the partition, because this worker cannot judge ``message``."""
        where = position_of(message)
        here = f"{self!r}@{where.offset}" if where.topic == self.topic else f"{self!r}, because of {where}"
        self._stop(f"{here}: {why}")

    def stop_all(self, why: str) -> None:
        """Run no jobs of the partition, whatever its records are."""
        self._stop(f"{self!r}: {why}")

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        LOG.critical("partition stopped: %s", reason)

    def give_up(self) -> None:
        """End the ownership. Only the records that are being taken up at this moment are still processed."""
        with self.lock:
            self.owned = False
        self.raw.clear()


class TaskRuntime:
    """A task as the worker runs it, and its counts."""

    __slots__ = (
        "adaptive",
        "blocked",
        "breaker",
        "cancelled",
        "decode_args",
        "expired",
        "failed",
        "fn",
        "gates",
        "is_async",
        "name",
        "retried",
        "room",
        "runs",
        "scope",
        "seconds",
        "snoozed",
        "started",
        "succeeded",
        "task",
    )

    def __init__(self, task: Task[Any, Any], hooks: Hooks) -> None:
        self.task = task
        self.name, self.fn, self.is_async = task.name, runner(task, hooks), task.is_async
        self.decode_args = task.decode_args
        self.started = self.succeeded = self.retried = self.snoozed = self.failed = self.cancelled = self.expired = 0
        self.runs = [0] * (len(RUN_BOUNDS_S) + 1)  # attempts that ended, by `RUN_BOUNDS_S`
        self.seconds = 0.0
        self.blocked = 0  # how often its code blocked the event loop
        policy = task.policy
        self.scope = Limiter(f"task {task.name}", policy.limits)
        self.adaptive = None if policy.adaptive is None else AdaptiveGate(f"task {task.name}", policy.adaptive)
        self.breaker = None if policy.breaker is None else BreakerGate(f"task {task.name}", policy.breaker)
        self.gates: tuple[Gate, ...] = ()
        self.room: Slots | None = None  # where its code runs, if the number of jobs there is limited
        self.regate()

    def regate(self) -> None:
        """Choose the gates again, after limits or pauses have changed."""
        found = (self.scope if self.scope.active else None, self.adaptive, self.breaker)
        self.gates = tuple(gate for gate in found if gate is not None)


class LeaseKeeper(Protocol):
    """Takes, renews and gives back the leases of long jobs; see `jobledger.consumers.running.job_leases`."""

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the loop. Any thread."""

    def grant(self, work: JobRun) -> None:
        """Begin the job's code: both facts of its lease are acknowledged."""

    def give_back(self, work: JobRun) -> None:
        """Give the lease back, so that another worker starts the job at once."""


class JobLease:
    """One job's lease. ``until``: the `time.monotonic` until which this worker certainly holds it."""

    __slots__ = ("closing", "granted", "leases", "renew_at", "seconds", "tries", "until")

    def __init__(self, leases: LeaseKeeper, seconds: float, now: float) -> None:
        self.leases, self.seconds = leases, seconds
        self.until, self.renew_at = now + seconds, now + seconds / 3
        self.granted = False
        self.closing = False  # the job's outcome is being sent
        self.tries = 0

    def settled(self, work: JobRun) -> None:
        """Note that both facts are acknowledged, and the work record is done. Any thread."""
        self.leases.call(self.leases.grant, work)


class JobRun:
    """One record of a work topic, from the moment it is taken up until it is done."""

    __slots__ = (
        "abandoned",
        "again_s",
        "alone",
        "appended",
        "arrived",
        "began",
        "context",
        "derived",
        "event",
        "expires_at",
        "gates",
        "handle",
        "held_since",
        "interrupted",
        "kwargs",
        "lease",
        "line",
        "noted",
        "offset",
        "outcome",
        "partition",
        "plan",
        "progressed",
        "remaining",
        "reported_at",
        "room",
        "send_progress",
        "shortened",
        "stop_outcome",
        "suspect",
        "takeover",
        "timer",
        "tries",
        "unsent",
        "waiting",
    )

    def __init__(self, partition: Partition, offset: int, event: JobEvent | None, arrived: Arrived) -> None:
        self.partition, self.offset, self.event, self.arrived = partition, offset, event, arrived
        self.remaining = 1  # acknowledgements to wait for before the record is done
        self.derived: Sequence[Outgoing] = ()  # records to send once the closing fact is acknowledged
        self.tries = 0
        self.takeover = 0  # starts without an outcome: in the log, in the job's tags, or a death of its process here
        self.suspect = False  # may have ended a process: runs in a child, after its start is acknowledged
        self.room: Slots | None = None  # where it runs and is counted
        self.timer: asyncio.TimerHandle | None = None  # of a thread's time limit
        self.interrupted: type[TaskInterrupted] | None = None  # raised in its thread
        self.lease: JobLease | None = None  # of a long job
        self.began = 0.0
        self.appended = 0  # when the record was appended (ms, broker's clock); 0: not known, or counted
        self.abandoned = False  # given up: its exception is not recorded; a thread or coroutine may still succeed
        self.waiting = False  # its code does not run: it waits in a line, for room, a child or its next attempt
        self.line: WaitQueue | None = None  # the line it waits in, or keeps busy
        self.gates: tuple[Gate, ...] = ()  # the gates that count it while it runs
        self.expires_at: int | None = None  # µs of the broker's clock
        self.held_since = 0.0  # since when it holds its key (`time.monotonic`); 0: not yet
        self.again_s: float | None = None  # the next attempt is made in place, after so many seconds
        self.noted: Callable[[JobRun], None] | None = None  # called once its fact that closes nothing is acknowledged
        self.stop_outcome: Outcome | None = None  # the outcome to record when its code was asked to end
        #: Topics to which its records are sent as batches of one, because a batch was refused for its size.
        self.alone = _NOWHERE
        self.shortened = False  # its outcome was replaced, because its record alone was too large
        self.handle: asyncio.Task[None] | None = None  # while it runs on the event loop
        self.outcome: Outcome | None = None  # None also stands for a success
        self.unsent: JobProgressed | None = None
        self.reported_at = 0.0
        self.plan: TaskRuntime | None = None  # None: this worker does not know the task
        self.context: JobContext | None = None  # until its code begins
        self.kwargs: dict[str, Any]
        self.send_progress: Callable[[JobRun, JobProgressed], None]

    def closing_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of the closing fact."""
        self.arrived.append((self, True, error, message))

    def delivered(self, closing: bool | None) -> Callable[[KafkaError | None, Message], None]:
        """Return the delivery callback for one kind of record; ``closing`` as in `Arrived`."""
        return (
            self.noted_delivered if closing is None else self.closing_delivered if closing else self.derived_delivered
        )

    def noted_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a fact that closes nothing, but that a later owner must find."""
        self.arrived.append((self, None, error, message))

    def derived_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a derived record."""
        self.arrived.append((self, False, error, message))

    def report(self, context: JobContext | None, progressed: JobProgressed) -> None:
        """Send the progress that `JobContext.progress` reports, or keep it until `PROGRESS_INTERVAL_S` is over or the
        job ends. Any thread; a child's reports arrive here, too."""
        now = time.monotonic()
        if now - self.reported_at < PROGRESS_INTERVAL_S:
            self.unsent = progressed
            return
        self.unsent = None
        self.reported_at = now
        self.send_progress(self, progressed)

    def flush_progress(self, now: float | None = None) -> None:
        """Send the progress that was kept back; with ``now``, only if the interval is over."""
        unsent = self.unsent
        if unsent is None or (now is not None and now - self.reported_at < PROGRESS_INTERVAL_S):
            return
        self.unsent = None
        self.reported_at = time.monotonic()
        self.send_progress(self, unsent)
