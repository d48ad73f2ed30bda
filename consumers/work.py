"""What a worker holds while it runs: the partitions it owns, and the records of them that are being worked on.

State only; who changes it: the fetch thread adds raw messages and ends ownership, the dispatcher (event loop) takes
them, the settler (its own thread) marks records done. `Partition.lock` guards `Partition.offsets`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, Message

from jobledger.consumers.gates import AdaptiveGate, BreakerGate, Gate, Room, Scope
from jobledger.consumers.offsets import PartitionOffsets, Snapshot
from jobledger.consumers.outcome import Outcome
from jobledger.consumers.releases import ReleaseMemory
from jobledger.context import JobContext
from jobledger.errors import TaskInterrupted
from jobledger.log import position_of
from jobledger.logger import get_logger
from jobledger.middleware import runner
from jobledger.schemas.events import Fact, JobEvent, JobProgressed, JobSucceeded
from jobledger.task import Task

if TYPE_CHECKING:
    from jobledger.consumers.leases import JobLease
    from jobledger.writer import Outgoing

LOG = get_logger("jobledger.worker")

#: Delivery reports wait here until the settler takes them: (what was sent for, whether it closes (None: it is said in
#: place, and the job goes on), error, message).
Arrived = deque[tuple["Work", bool | None, KafkaError | None, Message]]

#: Upper bounds of the histograms: of milliseconds that jobs waited, of seconds that attempts ran.
WAIT_BOUNDS_MS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3, 300e3, 1800e3, 7200e3)
RUN_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)

#: Seconds between two progress facts of one job.
PROGRESS_INTERVAL_S = 0.1

_NOWHERE: frozenset[str] = frozenset()  # one for all: Python makes a new one each time


class Lease:
    """Until when a queue's partitions are certainly ours: the coordinator took a commit of this member lately.

    A process that was paused, or that lost the broker, must not start what another worker may have taken over.
    """

    __slots__ = ("_wake", "seconds", "until", "wanted")

    def __init__(self, seconds: float, wake: Callable[[], None] = lambda: None) -> None:
        self.seconds, self._wake = seconds, wake
        self.until = 0.0  # of time.monotonic()
        self.wanted = False  # a confirmation is waited for

    def ask(self) -> None:
        """Have the fetch thread ask the coordinator, and wake the dispatcher when it has confirmed. In any thread."""
        self.wanted = True

    def confirm(self, asked_at: float) -> None:
        """A commit that was begun at ``asked_at`` (`time.monotonic`) was accepted. Whoever waits for that is woken,
        whichever commit it was; if it took so long that the time is over already, the next one is asked for at once."""
        self.until = max(self.until, asked_at + self.seconds)
        if self.wanted and self.until > time.monotonic():
            self.wanted = False
            self._wake()


class Found:
    """A closing fact that the log already holds for a release: where, when it was appended, and what it says."""

    __slots__ = ("appended_ms", "fact", "offset")

    def __init__(self, offset: int, appended_ms: int, fact: Fact) -> None:
        self.offset, self.appended_ms, self.fact = offset, appended_ms, fact


#: Stands in place of an end from which another release has followed already: nothing is to be sent again.
NOTHING_FOLLOWS = JobSucceeded()


class Deferred:
    """A job that waits far back in a line: its record alone, a tenth of what a `Work` takes. ``value``: the event, in
    this version's own form. ``appended``: ms of the broker's clock. ``plan``: None if the task is not known here.
    ``suspect``: as of `Work`."""

    __slots__ = ("appended", "offset", "plan", "suspect", "value")

    #: What one takes in memory beside its value, its place in the offsets included, in bytes.
    OVERHEAD = 300

    def __init__(self, offset: int, appended: int, value: bytes, plan: Plan | None, suspect: bool) -> None:
        self.offset, self.appended, self.value, self.plan, self.suspect = offset, appended, value, plan, suspect

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return len(self.value) + self.OVERHEAD


class Line:
    """Jobs of one partition that wait, in order. ``serial``: one at a time; ``busy``: one of them runs, or waits for its
    next attempt, or the fact that ended it is not acknowledged. ``over``: how many of these two have come: its slot is
    free, and the fact that ended it is acknowledged.

    ``tenant``: with whose lines it takes turns, "" where nobody does. ``queued``: it stands where lines are looked at,
    its stage's or a gate's.
    """

    __slots__ = ("busy", "gate", "identity", "over", "partition", "queued", "serial", "tenant", "works")

    def __init__(self, partition: Partition, identity: tuple[str, ...], serial: bool, tenant: str) -> None:
        self.partition, self.identity, self.serial, self.tenant = partition, identity, serial, tenant
        self.busy = self.queued = False
        self.over = 0
        self.gate: Gate | Room | None = None  # that it waited for last, until one of its jobs is begun
        self.works: deque[Work | Deferred] = deque()


class Partition:
    """One partition of a work topic, from its assignment to its end here. Assigned again, it is a new one."""

    def __init__(self, topic: str, number: int, lease: Lease, committed: int, metadata: str | None) -> None:
        self.topic, self.number, self.lease = topic, number, lease
        #: What the group had committed at assignment; -1: nothing.
        self.committed, self.metadata = committed, metadata
        self.owned = True
        self.gone = False  # lost, or handed over: another worker may run what is not done
        self.ready = False  # the takeover is through
        self.stopped: str | None = None  # why nothing of it may be run any more
        self.taking = False  # the dispatcher is between taking a record and putting it into `live`
        self.aside = False  # a record was received whose schema is looked up; it comes back as `back`
        self.back: tuple[Message, Any, bool] | None = None
        self.braked = False  # its completion map is as long as it may become
        self.full = False  # so much waits in its lines that nothing more is taken
        self.paused = False  # at the client
        self.lock = threading.Lock()
        self.offsets: PartitionOffsets | None = None
        self.memory = ReleaseMemory()
        self.raw: deque[Message] = deque()
        #: Begun and not settled, by offset.
        self.live: dict[int, Work] = {}
        #: From the takeover's scan, until `scanned_to` was received: closing facts and unended starts by release.
        self.closed: dict[int, Found] = {}
        self.starts: dict[int, int] = {}
        self.scanned_to = 0
        #: Where the takeover's scan of lifecycle began.
        self.floor = 0
        #: Below this offset are records that the last owner, who did not leave cleanly, may have begun.
        self.careful = 0
        self.last_commit: tuple[int, str] | None = None
        #: What the last owner, who left cleanly, had committed: still true as long as nothing was begun here.
        self.found_clean: Snapshot | None = None
        #: What waits here, by (kind, name, …); how many jobs that is, how many of them as `Deferred`, and their bytes.
        self.lines: dict[tuple[str, ...], Line] = {}
        self.waiting = self.deferred = self.deferred_bytes = 0
        #: Attempts that a former owner made in place, by release: (attempt to come, due in ms of the broker's clock,
        #: where on lifecycle that stands).
        self.held: dict[int, tuple[int, int, int]] = {}

    def __repr__(self) -> str:
        return f"{self.topic}[{self.number}]"

    def oldest_ms(self) -> int | None:
        """When the oldest record that waits here was appended; None: none waits."""
        try:
            return int(self.raw[0].timestamp()[1])
        except IndexError:
            return None

    @property
    def fetched(self) -> int:
        """Fetched records that count against the prefetch limit: what cannot be taken must not keep out the others."""
        return 0 if self.idle or self.stopped is not None else len(self.raw)

    @property
    def here(self) -> bool:
        """Whether there are records to take up."""
        return bool(self.raw) or self.back is not None

    @property
    def idle(self) -> bool:
        """Whether nothing of it is taken for a while."""
        return self.braked or self.full or not self.ready

    @property
    def busy(self) -> bool:
        """Whether something of it is under way: what merely waits for a thread is not."""
        return self.taking or any(not work.waiting for work in list(self.live.values()))

    def certain(self) -> bool:
        """Whether no other worker can have taken it over, as far as is known now; if that is not known, the group is asked.
        While it is handed over, the group waits for this worker. In any thread."""
        if not self.owned:
            return not self.gone
        if time.monotonic() <= self.lease.until:
            return True
        self.lease.ask()
        return False

    def nothing_waits(self) -> None:
        """What waited in lines is the next owner's."""
        self.waiting = self.deferred = self.deferred_bytes = 0

    def begin_taking(self) -> bool:
        """Claim the right to take records up; False if the partition is owned no more. Ends with ``taking = False``."""
        with self.lock:
            self.taking = self.owned and self.stopped is None and self.offsets is not None
        return self.taking

    def stop(self, message: Message, why: str) -> None:
        """Let nothing more of it be run, because of a message that this worker cannot judge."""
        where = position_of(message)
        here = f"{self!r}@{where.offset}" if where.topic == self.topic else f"{self!r}, because of {where}"
        self._stop(f"{here}: {why}")

    def stop_all(self, why: str) -> None:
        """Let nothing of it be run, whatever it holds."""
        self._stop(f"{self!r}: {why}")

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        LOG.critical("partition stopped: %s", reason)

    def give_up(self) -> None:
        """End the ownership: what is not being taken up now never will be."""
        with self.lock:
            self.owned = False
        self.raw.clear()


class Plan:
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

    def __init__(self, task: Task[Any, Any]) -> None:
        self.task = task
        self.name, self.fn, self.is_async = task.name, runner(task), task.is_async
        self.decode_args = task.decode_args
        self.started = self.succeeded = self.retried = self.snoozed = self.failed = self.cancelled = self.expired = 0
        self.runs = [0] * (len(RUN_BOUNDS_S) + 1)  # attempts that ended, by `RUN_BOUNDS_S`
        self.seconds = 0.0
        self.blocked = 0  # times that its code held the event loop up
        policy = task.policy
        self.scope = Scope(f"task {task.name}", policy.limits)
        self.adaptive = None if policy.adaptive is None else AdaptiveGate(f"task {task.name}", policy.adaptive)
        self.breaker = None if policy.breaker is None else BreakerGate(f"task {task.name}", policy.breaker)
        self.gates: tuple[Gate, ...] = ()
        self.room: Room | None = None  # where its code runs, if there is not room for any number
        self.regate()

    def regate(self) -> None:
        """Its limits or pauses were changed."""
        found = (self.scope if self.scope.active else None, self.adaptive, self.breaker)
        self.gates = tuple(gate for gate in found if gate is not None)


class Work:
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
        self.remaining = 1  # acknowledgements still to come before the record is done
        self.derived: Sequence[Outgoing] = ()  # sent once the closing fact is acknowledged
        self.tries = 0
        self.takeover = 0  # starts of this release without an end, that the log shows
        self.suspect = False  # it may have taken a process down: run where that is seen, its start in the log first
        self.room: Room | None = None  # where it runs and is counted
        self.timer: asyncio.TimerHandle | None = None  # of a thread's time limit
        self.interrupted: type[TaskInterrupted] | None = None  # raised in its thread
        self.lease: JobLease | None = None  # of a long job
        self.began = 0.0
        self.appended = 0  # when its record was (ms, broker's clock); 0: not known, or counted already
        self.abandoned = False  # its outcome must not be written any more
        self.waiting = False  # in a line or for a thread; not begun
        self.line: Line | None = None  # that it waits in, or holds up
        self.gates: tuple[Gate, ...] = ()  # that count it while it runs
        self.expires_at: int | None = None  # µs of the broker's clock
        self.held_since = 0.0  # since when it holds its key
        self.again_s: float | None = None  # tried again in place, so many seconds from now
        self.noted: Callable[[Work], None] | None = None  # called once what it says in place is acknowledged
        self.stop_outcome: Outcome | None = None  # somebody asked it to end: what it comes to then
        #: Topics to which its records go as batches of their own, because a batch was refused for its size.
        self.alone = _NOWHERE
        self.shortened = False  # its outcome was replaced, because it was too large by itself
        self.handle: asyncio.Task[None] | None = None  # while it runs
        self.outcome: Outcome | None = None  # only when it is not a success
        self.unsent: JobProgressed | None = None
        self.reported_at = 0.0
        self.plan: Plan | None = None  # of a task this worker knows
        self.context: JobContext | None = None  # until it begins
        self.kwargs: dict[str, Any]
        self.send_progress: Callable[[Work, JobProgressed], None]

    def closing_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of the closing fact."""
        self.arrived.append((self, True, error, message))

    def delivered(self, closing: bool | None) -> Callable[[KafkaError | None, Message], None]:
        """The delivery callback of one kind of record; as in `Arrived`."""
        return (
            self.noted_delivered if closing is None else self.closing_delivered if closing else self.derived_delivered
        )

    def noted_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a fact that closes nothing, but must be found by a later owner."""
        self.arrived.append((self, None, error, message))

    def derived_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a derived record."""
        self.arrived.append((self, False, error, message))

    def report(self, context: JobContext | None, progressed: JobProgressed) -> None:
        """`JobContext.progress` ends here, in any thread or from a child: sent, or kept until the
        interval is over or the job ends."""
        now = time.monotonic()
        if now - self.reported_at < PROGRESS_INTERVAL_S:
            self.unsent = progressed
            return
        self.unsent = None
        self.reported_at = now
        self.send_progress(self, progressed)

    def flush_progress(self, now: float | None = None) -> None:
        """Send the report that was kept back; with ``now`` only if its time has come."""
        unsent = self.unsent
        if unsent is None or (now is not None and now - self.reported_at < PROGRESS_INTERVAL_S):
            return
        self.unsent = None
        self.reported_at = time.monotonic()
        self.send_progress(self, unsent)
