"""Holds a worker's state, and nothing else: the partitions that the worker owns, and the work records in progress.

The fetch thread adds raw messages and ends ownership. The dispatcher (event loop) takes the messages, and marks records
as done that need no acknowledgement, for example duplicates. `AckTracker.drain`, in any thread, marks all other records
as done. `Partition.lock` guards `Partition.offsets`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import KafkaError, Message

from jobledger.consumers.state.dedup import ReleaseMemory
from jobledger.consumers.state.fast_submission import plain_submission
from jobledger.consumers.state.limiters import Gate, Slots
from jobledger.consumers.state.offset_tracker import PartitionOffsets
from jobledger.consumers.state.outcome import Outcome
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.prior_state import PriorState
from jobledger.consumers.state.progress import PROGRESS_INTERVAL_S
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.definitions.context import JobContext
from jobledger.errors import TaskInterrupted
from jobledger.kafka.clients import position_of
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobProgressed

if TYPE_CHECKING:
    from jobledger.log.writer import Outgoing

LOG = get_logger("jobledger.worker")


class RecordKind(Enum):
    """What the acknowledgement of a record means for the job's work record."""

    SETTLING = auto()  # a fact after which the work record can be done: a closing fact or a `JobLeased`
    DERIVED = auto()  # a derived record, or the dead letter of a rejected record
    CONTINUING = auto()  # a fact after which the job continues in this worker


# These names are read for each job, and a global name costs less than an attribute of an enum.
_SETTLING, _DERIVED, _CONTINUING = RecordKind.SETTLING, RecordKind.DERIVED, RecordKind.CONTINUING

#: Delivery reports that the ack tracker has not taken yet: (job, kind of the record, error, message).
Arrived = deque[tuple["JobRun", RecordKind, KafkaError | None, Message]]

_NOWHERE: frozenset[str] = frozenset()  # shared by all jobs, because each call of `frozenset` creates an object
_NO_WAITS: dict[str, int] = {}  # shared in the same way, and never changed


class ParkedRecord:
    """A job far back in a wait queue, of which only the record is kept: a tenth of the memory of a `JobRun`.

    ``value``: the event, encoded with this version's schema. ``appended``: when the record was appended, in ms of the
    broker's clock. ``runtime``: None if this worker does not know the task. ``suspect``, ``queued_at``: see `JobRun`.
    """

    __slots__ = ("appended", "offset", "queued_at", "runtime", "suspect", "value")

    #: Bytes of memory that a parked record takes in addition to its value, including its entry in `PartitionOffsets`.
    OVERHEAD = 330

    def __init__(
        self, offset: int, appended: int, value: bytes, runtime: TaskRuntime | None, suspect: bool, queued_at: float
    ) -> None:
        self.offset, self.appended, self.value, self.runtime, self.suspect = offset, appended, value, runtime, suspect
        self.queued_at = queued_at

    def revive(self, partition: Partition, arrived: Arrived) -> JobRun:
        """Create the `JobRun` of the record. The job's arguments are not decoded yet."""
        event = plain_submission(self.value) or codec.decode(self.value)
        spec = event.fact.spec  # type: ignore[union-attr]  # only `JobSubmitted` and `JobDue` are accepted
        work = JobRun(partition, self.offset, event, arrived)
        work.expires_at, work.appended, work.runtime, work.suspect = (
            spec.expires_at,
            self.appended,
            self.runtime,
            self.suspect,
        )
        work.queued_at = self.queued_at
        partition.live[self.offset] = work
        return work

    @property
    def size(self) -> int:
        """The approximate memory that the parked record takes, in bytes."""
        return len(self.value) + self.OVERHEAD


class WaitQueue:
    """Jobs of one partition that wait, in order.

    ``serial``: the jobs of this wait queue run one at a time. ``busy``: a job of this serial wait queue runs, waits for
    its next attempt, or waits until the last fact of its attempt is acknowledged. ``over``: 0, 1 or 2. It counts two
    events of that job: its slot became free, and the last fact of its attempt was acknowledged.

    ``tenant``: this wait queue takes turns with the wait queues of other tenants; "" if the job queue has no tenants.
    ``queued``: this wait queue is in the turns of its lane, or waits at a gate. ``gated_at``: when a gate began to hold
    its first job back (`time.monotonic`). ``held_by``: the cause that the last of these gates gives (`Gate.cause`).
    """

    __slots__ = (
        "busy",
        "gate",
        "gated_at",
        "held_by",
        "identity",
        "over",
        "partition",
        "queued",
        "serial",
        "tenant",
        "works",
    )

    def __init__(self, partition: Partition, identity: tuple[str, ...], serial: bool, tenant: str) -> None:
        self.partition, self.identity, self.serial, self.tenant = partition, identity, serial, tenant
        self.busy = self.queued = False
        self.over = 0
        self.gate: Gate | Slots | None = None  # held this queue back last; None after a job left the queue
        self.gated_at, self.held_by = 0.0, ""
        self.works: deque[JobRun | ParkedRecord] = deque()


class Backlog:
    """The jobs of one partition that wait in wait queues. Not the backlog of the log, which is the records that are not
    done yet.

    ``wait_queues``: by (kind, name, …). ``count``: the number of waiting jobs; ``parked``: how many of them are parked
    records; ``parked_bytes``: the memory that the parked records take. ``full``: so many jobs wait that no more records
    of the partition are taken.
    """

    __slots__ = ("count", "full", "parked", "parked_bytes", "wait_queues")

    def __init__(self) -> None:
        self.wait_queues: dict[tuple[str, ...], WaitQueue] = {}
        self.count = self.parked = self.parked_bytes = 0
        self.full = False

    def reset_counts(self) -> None:
        """Set the counts of waiting jobs to zero, because these jobs belong to the next owner."""
        self.count = self.parked = self.parked_bytes = 0


class Partition:
    """One partition of a work topic, as this worker holds it. Each assignment of the partition creates a new object."""

    def __init__(self, topic: str, number: int, lease: OwnershipLease, committed: int, metadata: str | None) -> None:
        self.topic, self.number, self.lease = topic, number, lease
        self.prior = PriorState(committed, metadata)
        self.owned = True
        self.gone = False  # lost or handed over: another worker may run the jobs of records that are not done
        self.ready = False  # the takeover is complete
        self.stopped: str | None = None  # the reason why no more jobs of this partition may run
        self.taking = False  # the dispatcher is taking up records, or starting jobs that wait
        self.resolving = False  # the schema resolver looks up a received record's schema; then it sets `resolved`
        self.resolved: tuple[Message, Any, bool] | None = None
        self.braked = False  # no records are taken, because the completion map could become too long
        self.paused = False  # the Kafka client does not fetch this partition
        self.lock = threading.Lock()
        self.offsets: PartitionOffsets | None = None
        self.memory = ReleaseMemory()
        self.raw: deque[Message] = deque()
        self.missing_reported = 0  # number of offsets without a record that warnings have reported
        #: Records that were taken up and are not done, by offset. Parked records are not included.
        self.live: dict[int, JobRun] = {}
        #: Offset and metadata of the last commit of this worker that was accepted.
        self.last_commit: tuple[int, str] | None = None
        self.backlog = Backlog()

    def __repr__(self) -> str:
        return f"{self.topic}[{self.number}]"

    def oldest_ms(self) -> int | None:
        """Return when the oldest record in `raw` was appended, in ms since the epoch; None if there is no record."""
        try:
            return int(self.raw[0].timestamp()[1])
        except IndexError:
            return None

    @property
    def fetched(self) -> int:
        """The number of fetched records that count against the prefetch limit. Records of an idle or stopped partition
        do not count, because they must not keep the worker from fetching other partitions."""
        return 0 if self.idle or self.stopped is not None else len(self.raw)

    @property
    def has_records(self) -> bool:
        """Whether records are ready to be taken up."""
        return bool(self.raw) or self.resolved is not None

    @property
    def idle(self) -> bool:
        """Whether the dispatcher takes no records of this partition for the time being."""
        return self.braked or self.backlog.full or not self.ready

    @property
    def busy(self) -> bool:
        """Whether jobs of this partition are in progress. A job that only waits does not count."""
        return self.taking or any(not work.waiting for work in list(self.live.values()))

    def certain(self) -> bool:
        """Return whether it is certain that no other worker has taken the partition over.

        If the ownership lease is over, request a confirmation from the group, and return False. During a handover the
        group waits for this worker, so the result is True even after the end of the lease. Any thread.
        """
        owned = self.owned  # read before `gone`: when the partition is lost, `gone` is set before `owned` is cleared
        if self.gone:
            return False
        if not owned or time.monotonic() <= self.lease.until:
            return True
        self.lease.ask()
        return False

    def begin_taking(self) -> bool:
        """Claim the right to take up records. The caller ends the claim with ``taking = False``.

        Returns False if the partition is no longer owned, is stopped, or has no offsets yet.
        """
        with self.lock:
            self.taking = self.owned and self.stopped is None and self.offsets is not None
        return self.taking

    def start_no_more(self, why: str, message: Message | None = None) -> None:
        """Start no more jobs of the partition. ``message``: the record that this worker cannot judge, if that is the
        reason. Running jobs continue, except suspects."""
        here = repr(self)
        if message is not None:
            where = position_of(message)
            here += f"@{where.offset}" if where.topic == self.topic else f", because of {where}"
        self.stopped = f"{here}: {why}"
        LOG.critical("partition stopped: %s", self.stopped)

    def give_up(self) -> None:
        """End the ownership, and drop the raw messages. Only a record that is being taken up at this moment is still
        processed."""
        with self.lock:
            self.owned = False
        self.raw.clear()


class LeaseKeeper(Protocol):
    """Takes, renews and gives back job leases; see `jobledger.consumers.running.job_leases`."""

    def written(self, work: JobRun) -> None:
        """Report that both facts of the job's lease are acknowledged. Any thread."""

    def send_outcome(self, work: JobRun, value: bytes, before: list[Outgoing]) -> None:
        """Send the job's outcome, encoded in ``value``, after the records ``before`` are acknowledged. Any thread."""

    def give_back(self, work: JobRun) -> None:
        """Give the lease back, so that another worker can start the job at once."""


class JobLease:
    """The job lease of one long job. ``until``: the `time.monotonic` until which this worker certainly holds the
    lease."""

    __slots__ = ("closing", "granted", "keeper", "renew_at", "seconds", "tries", "until")

    def __init__(self, keeper: LeaseKeeper, seconds: float, now: float) -> None:
        self.keeper, self.seconds = keeper, seconds
        self.until, self.renew_at = now + seconds, now + seconds / 3
        self.granted = False
        self.closing = False  # the job's outcome is being sent
        self.tries = 0

    def acknowledged(self, work: JobRun) -> None:
        """Note that both facts of the lease are acknowledged, and that the work record is done. Any thread."""
        self.keeper.written(work)


class JobRun:
    """One release of a job in this worker (not a *run* of the glossary): its work record, from the moment when it is
    taken up until it is done; for a long job, until its outcome is acknowledged."""

    __slots__ = (
        "abandoned",
        "again_s",
        "appended",
        "arrived",
        "began",
        "context",
        "counted_at",
        "derived",
        "event",
        "expires_at",
        "gates",
        "handle",
        "held_since",
        "interrupted",
        "kwargs",
        "lease",
        "offset",
        "on_continuing_fact",
        "outcome",
        "partition",
        "progressed",
        "queued_at",
        "remaining",
        "reported_at",
        "runtime",
        "send_progress",
        "shortened",
        "single_record_topics",
        "slots",
        "starts_before",
        "stop_outcome",
        "suspect",
        "timer",
        "tries",
        "unsent",
        "wait_queue",
        "waiting",
        "waits",
    )

    def __init__(self, partition: Partition, offset: int, event: JobEvent | None, arrived: Arrived) -> None:
        self.partition, self.offset, self.event, self.arrived = partition, offset, event, arrived
        self.remaining = 1  # acknowledgements to wait for before the record is done
        self.derived: Sequence[Outgoing] = ()  # records to send once the closing fact is acknowledged
        self.tries = 0
        # Starts without an outcome: those in the log and in the job's tags, and deaths of the job's process here.
        self.starts_before = 0
        self.suspect = False  # may have ended a process: runs in a child process, after its start is acknowledged
        self.slots: Slots | None = None  # the slots that count the job while it runs
        self.timer: asyncio.TimerHandle | None = None  # for the timeout of a job in a thread
        self.interrupted: type[TaskInterrupted] | None = None  # raised in the job's code by this worker
        self.lease: JobLease | None = None  # of a long job
        self.began = 0.0
        self.appended = 0  # when the record was appended (ms, broker's clock); 0: not known, or already counted
        self.abandoned = False  # given up: its exception is not recorded; a thread or coroutine may still succeed
        # Its code does not run: the job waits in a wait queue, for slots, for a child process, for the acknowledgement
        # of its start, or for its next attempt.
        self.waiting = False
        self.wait_queue: WaitQueue | None = None  # the wait queue in which the job waits, or which the job keeps busy
        self.queued_at = 0.0  # when it joined the wait queue or the slot queue in which it waits (`time.monotonic`)
        self.waits = _NO_WAITS  # ms that it waited in this worker before its next start, by cause; see `waited`
        self.gates: tuple[Gate, ...] = ()  # the gates that count the job while it runs
        self.counted_at = 0.0  # when these gates counted the job as begun (`time.monotonic`)
        self.expires_at: int | None = None  # µs of the broker's clock
        self.held_since = 0.0  # when the job began to hold its key (`time.monotonic`); 0: not yet
        self.again_s: float | None = None  # seconds until the next attempt in place
        # Called when the next continuing fact (`RecordKind.CONTINUING`) is acknowledged.
        # None: `Reports.attempt_acknowledged` is called.
        self.on_continuing_fact: Callable[[JobRun], None] | None = None
        self.stop_outcome: Outcome | None = None  # the outcome to record after the job's code was asked to end
        #: Topics to which its records are sent as batches of one, because the broker refused a batch for its size.
        self.single_record_topics = _NOWHERE
        self.shortened = False  # its outcome was replaced, because the record was too large even in its own batch
        self.handle: asyncio.Task[None] | None = None  # while the code runs on the event loop
        self.outcome: Outcome | None = None  # None also stands for a success
        self.unsent: JobProgressed | None = None
        self.reported_at = 0.0
        self.runtime: TaskRuntime | None = None  # None: this worker does not know the task
        self.context: JobContext | None = None  # until its code begins
        self.kwargs: dict[str, Any]
        self.send_progress: Callable[[JobRun, JobProgressed], None]

    def waited(self, cause: str, seconds: float) -> None:
        """Add to the time that the job waited before its next start. ``cause``: ``key``, ``tenant``, ``limit``,
        ``pause``, ``circuit`` or ``slots``; see docs/wire.md. Less than a millisecond is not noted."""
        ms = int(seconds * 1000)
        if ms > 0:
            self.waits = {**self.waits, cause: self.waits.get(cause, 0) + ms}

    def settling_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Queue the delivery report of a closing fact or a `JobLeased`. A delivery callback; runs in the thread that
        polls."""
        self.arrived.append((self, _SETTLING, error, message))

    def derived_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Queue the delivery report of a derived record. A delivery callback."""
        self.arrived.append((self, _DERIVED, error, message))

    def continuing_delivered(self, error: KafkaError | None, message: Message) -> None:
        """Queue the delivery report of a fact after which the job continues, and that a later owner must find. A
        delivery callback."""
        self.arrived.append((self, _CONTINUING, error, message))

    def delivery_callback(self, kind: RecordKind) -> Callable[[KafkaError | None, Message], None]:
        """Return the delivery callback for one kind of record."""
        if kind is _SETTLING:
            return self.settling_delivered
        return self.derived_delivered if kind is _DERIVED else self.continuing_delivered

    def report(self, context: JobContext | None, progressed: JobProgressed) -> None:
        """Send the progress that `JobContext.progress` reports, or keep it until `PROGRESS_INTERVAL_S` is over or the
        attempt ends. Any thread. Reports from child processes are also passed to this method."""
        now = time.monotonic()
        if now - self.reported_at < PROGRESS_INTERVAL_S:
            self.unsent = progressed
            return
        self.unsent = None
        self.reported_at = now
        self.send_progress(self, progressed)

    def flush_progress(self, now: float | None = None) -> None:
        """Send the progress that `report` has kept; with ``now`` (`time.monotonic`), only if the interval is over."""
        unsent = self.unsent
        if unsent is None or (now is not None and now - self.reported_at < PROGRESS_INTERVAL_S):
            return
        self.unsent = None
        self.reported_at = time.monotonic()
        self.send_progress(self, unsent)
