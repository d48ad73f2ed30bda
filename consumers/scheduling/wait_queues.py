"""Keeps jobs in wait queues: a job waits for earlier jobs of its key, for its tenant's turn, or for a gate to open.

Runs on the event loop. All jobs of a wait queue belong to one partition. The records of these jobs are received, and
the jobs are not begun, so the partition's next owner gets all of them.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from itertools import islice

import msgspec

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.lanes import Lane, Lanes
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.state.limiters import Gate, Slots, closed_gate
from jobledger.consumers.state.outcome import Snoozed, answered
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun, ParkedRecord, Partition, WaitQueue
from jobledger.kafka.broker_clock import BrokerClock

_monotonic = time.monotonic

#: Maximum number of jobs that one call of `make_room` snoozes.
SNOOZED_AT_ONCE = 64
#: Maximum number of wait queues of a gate in which `make_room` looks for such jobs.
SEARCHED_MOST = 1_000
#: The cause of the time in a wait queue during which no gate held its first job back, by the kind of the wait queue.
_CAUSES = {"key": "key", "tag": "tenant", "task": "limit"}
#: A job of a wait queue joins the jobs of its lane that wait for slots of one kind only while fewer than this many
#: wait; in a queue with priorities, only if none waits.
SLOT_QUEUE = 64


@dataclass(frozen=True, slots=True)
class Lookahead:
    """How much may wait in a worker's wait queues. ``jobs``: jobs that wait as `JobRun`. ``size``: bytes of memory for
    further jobs, which wait as `ParkedRecord`."""

    jobs: int
    size: int


class WaitQueues:
    """Holds the wait queues of this worker's partitions.

    The worker continues to read a partition even if its wait queues are long, because the first job of another key may
    be behind a hundred thousand jobs of one key. While many jobs of a partition wait (`crowded`), a new job that must
    wait for its key or its tenant's turn is kept as a `ParkedRecord`. This record becomes a `JobRun` when its turn
    comes.

    A key's next job begins when the last fact of the job before it is acknowledged, not when that fact is sent.
    Otherwise the next owner, after a crash, could run a job again although later jobs of its key have run. For the same
    reason a keyed job that must not start (bad arguments, cancelled, expired) is closed in its turn.
    """

    def __init__(
        self,
        starter: Starter,
        placement: Placement,
        recorder: Recorder,
        lanes: Lanes,
        tasks: TaskTable,
        lookahead: Lookahead,
        clock: BrokerClock,
        reports: Reports,
    ) -> None:
        self._starter, self._placement, self._recorder, self._tasks = starter, placement, recorder, tasks
        self._by_topic, self._lookahead, self._bytes = lanes.by_topic, lookahead.jobs, lookahead.size
        self._clock, self._reports = clock, reports
        self._wake, self._wake_in = reports.wake, reports.wake_in
        #: Gates and slots for which wait queues wait.
        self.awaited: dict[Gate | Slots, None] = {}
        #: Wait queues of keys whose job has freed its slot, while the job's last fact is not acknowledged yet.
        self.awaiting_acknowledgement: dict[WaitQueue, None] = {}
        #: How many partitions share the lookahead.
        self.owned = 0
        #: Bytes of all parked records.
        self.parked_bytes = 0

    @property
    def window(self) -> int:
        """How many jobs of one partition may wait in wait queues, parked records not counted."""
        return max(100, self._lookahead // max(1, self.owned))

    def crowded(self, partition: Partition) -> bool:
        """Return whether so many jobs of the partition wait that a new job that must wait is kept as a parked
        record."""
        backlog = partition.backlog
        return backlog.count - backlog.parked >= self.window // 4

    def room(self, partition: Partition) -> bool:
        """Return whether more records of this partition may be taken.

        A partition may always use its own share of the bytes, and also bytes that other partitions do not use. Records
        of a full partition are taken again only when a quarter of its space is free, because after each pause of the
        partition the client must fetch its records again.
        """
        backlog = partition.backlog
        part = 0.75 if backlog.full else 1.0
        if backlog.count - backlog.parked >= self.window * part:
            return False
        return self.parked_bytes < self._bytes * part or backlog.parked_bytes < self._share * part

    @property
    def _share(self) -> int:
        return self._bytes // max(1, self.owned)

    def half_full(self, partition: Partition) -> bool:
        """Return whether the partition's waiting jobs use half of the space that they may use. Then new jobs at a
        closed gate are snoozed."""
        backlog = partition.backlog
        if backlog.count - backlog.parked >= self.window // 2:
            return True
        return self.parked_bytes >= self._bytes // 2 and backlog.parked_bytes >= self._share // 2

    def enqueue(self, work: JobRun, identity: tuple[str, ...], *, serial: bool, tenant: str = "") -> WaitQueue:
        work.wait_queue = wait_queue = self._join(work.partition, identity, work, serial, tenant)
        work.waiting, work.queued_at = True, _monotonic()
        return wait_queue

    def _join(
        self, partition: Partition, identity: tuple[str, ...], one: JobRun | ParkedRecord, serial: bool, tenant: str
    ) -> WaitQueue:
        backlog = partition.backlog
        wait_queue = backlog.wait_queues.get(identity)
        if wait_queue is None:
            wait_queue = backlog.wait_queues[identity] = WaitQueue(partition, identity, serial, tenant)
        wait_queue.works.append(one)
        backlog.count += 1
        if not wait_queue.busy:
            self._by_topic[partition.topic].add(wait_queue)
        return wait_queue

    def add_parked(
        self, partition: Partition, identity: tuple[str, ...], one: ParkedRecord, *, serial: bool, tenant: str
    ) -> None:
        """Add a parked record to the end of its wait queue."""
        self._join(partition, identity, one, serial, tenant)
        self._count(partition, one, 1)

    def _count(self, partition: Partition, one: ParkedRecord, by: int) -> None:
        backlog = partition.backlog
        backlog.parked += by
        backlog.parked_bytes += by * one.size
        self.parked_bytes += by * one.size

    def enqueue_keyed(
        self, work: JobRun, key: str, next_attempt: tuple[int, int, int] | None, tenant: str = ""
    ) -> None:
        """Add a job behind the other jobs of its key. ``next_attempt``: the job's entry in
        `PriorState.next_attempts`, if a former owner retried or snoozed the job in place."""
        wait_queue = self.enqueue(work, ("key", key), serial=True, tenant=tenant)
        if next_attempt is None:
            return
        attempt, due_ms, stands_at = next_attempt
        assert work.event is not None
        assert work.partition.offsets is not None
        work.event = msgspec.structs.replace(work.event, attempt=attempt)
        with work.partition.lock:
            work.partition.offsets.continues_from(work.offset, stands_at)
        wait_s = (due_ms - self._clock.ms()) / 1000
        if wait_s > 0 and wait_queue.works[0] is work:
            wait_queue.works.popleft()
            work.partition.backlog.count -= 1
            self._hold(work, wait_queue, wait_s)

    def wait_for_gate(
        self, work: JobRun, runtime: TaskRuntime, identity: tuple[str, ...], now: float, tenant: str = ""
    ) -> None:
        """Add a job to a wait queue. If one of the task's gates is closed and many jobs wait already (`half_full`),
        snooze the job instead, so that records behind it can be taken. A suspect is not snoozed, because the next
        release would not be a suspect."""
        partition = work.partition
        gate = closed_gate(runtime.gates, now) if not work.suspect and self.half_full(partition) else None
        if gate is not None:
            wait_queues = partition.backlog.wait_queues
            ahead = len(wait_queues[identity].works) if identity in wait_queues else 0
            self._snooze_at_gate(work, gate, ahead)
            return
        self.enqueue(work, identity, serial=False, tenant=tenant)

    def _snooze_at_gate(self, work: JobRun, gate: Gate, ahead: int) -> None:
        """Snooze a job until about its turn; the coordinator then releases it again. ``ahead``: how many jobs are
        before it in its wait queue."""
        seconds = max(5.0, gate.passes_in(ahead * max(1, self.owned))) * (1.0 + 0.2 * random.random())
        self._recorder.close_with(work, Snoozed(round(seconds * 1000), f"held back by {gate.describe()}"))

    def make_room(self, partition: Partition) -> None:
        """Snooze jobs of a full partition: the newest jobs of the longest wait queue that waits at a gate.

        These jobs were added before the gate closed, or while the gate was open for a moment. There may be startable
        jobs behind them in the partition. Jobs with a key are not snoozed, because they would lose their order.
        Suspects are not snoozed, either.
        """
        kept = [
            (len(wait_queue.works), gate, wait_queue)
            for gate in self.awaited
            if not isinstance(gate, Slots)
            for wait_queue in islice(gate.waiting_queues, SEARCHED_MOST)
            if wait_queue.partition is partition
            and not wait_queue.serial
            and len(wait_queue.works) > 1
            and not wait_queue.works[-1].suspect
        ]
        if not kept:
            return
        _, gate, wait_queue = max(kept, key=lambda each: each[0])
        for _ in range(min(SNOOZED_AT_ONCE, len(wait_queue.works) - 1)):
            one = wait_queue.works[-1]
            if one.suspect:
                break
            if isinstance(one, ParkedRecord):
                self._count(partition, one, -1)
                work = one.revive(partition, self._reports.arrived)
            else:
                work, one.waiting = one, False
            wait_queue.works.pop()
            partition.backlog.count -= 1
            self._snooze_at_gate(work, gate, len(wait_queue.works))
        self._wake()

    def serve(self, lane: Lane, most: int) -> int:
        """Begin the first jobs of a lane's ready wait queues, the wait queues in turn. Return how many jobs were
        handled."""
        handled = 0
        for _ in range(lane.ready):
            if handled >= most:
                break
            wait_queue, now = lane.next_wait_queue(), _monotonic()
            partition = wait_queue.partition
            if not wait_queue.works or (wait_queue.serial and wait_queue.busy) or not partition.begin_taking():
                self._gate_not_used(wait_queue)
                continue
            try:
                if now > partition.lease.until:
                    partition.lease.ask()
                    lane.add(wait_queue)
                    break
                handled += self._serve_wait_queue(lane, wait_queue, now)
            finally:
                partition.taking = False
        return handled

    def _serve_wait_queue(self, lane: Lane, wait_queue: WaitQueue, now: float) -> int:
        """Begin the first job of a wait queue, or close the job if it must not begin. If a gate holds the job back,
        let the wait queue wait at that gate. Return 1 if the job left the wait queue, else 0."""
        work = wait_queue.works[0]
        unread = wait_queue.serial  # whether the job's arguments are not decoded yet
        if isinstance(work, ParkedRecord):
            # Check the gates before the `JobRun` is created. Otherwise, while a gate is closed, each of many wait
            # queues would create one.
            if (runtime := work.runtime) is not None and (
                gate := self._keeping(runtime, runtime.slots, now)
            ) is not None:
                return self._wait_at(wait_queue, gate, now)
            self._count(wait_queue.partition, work, -1)
            wait_queue.works[0] = work = work.revive(wait_queue.partition, self._reports.arrived)
            work.wait_queue, work.waiting, unread = wait_queue, True, True
        runtime = work.runtime
        ended = self._starter.refused(work)
        if ended is None and wait_queue.serial and work.starts_before:
            ended = self._placement.crashed(work.starts_before)
        if ended is None and runtime is not None:
            gate = self._keeping(runtime, self._placement.slots_of(work, runtime), now)
            if gate is not None and not _joins_slot_queue(lane, wait_queue, gate):
                return self._wait_at(wait_queue, gate, now)
        wait_queue.works.popleft()
        wait_queue.partition.backlog.count -= 1
        _note_waits(work, wait_queue, now)
        wait_queue.gate = None
        work.waiting = False
        wait_queue.busy, wait_queue.over = wait_queue.serial, 0
        if ended is not None:
            self._recorder.close_with(work, ended)
            self.left(work)
        elif runtime is None:
            work.held_since = work.held_since or now
            assert work.event is not None
            self._recorder.close_with(work, self._tasks.unknown_task_outcome(work.event))
            self.left(work)
        elif unread and not self._recorder.takes_arguments(work):
            self.left(work)
        else:
            self._starter.start(work, now)
        if not wait_queue.serial:
            self._served(lane, wait_queue)
        return 1

    @staticmethod
    def _served(lane: Lane, wait_queue: WaitQueue) -> None:
        """Add the wait queue to the ready ones of its lane, for its next job. Delete the wait queue if it has no
        job."""
        if wait_queue.works:
            lane.add(wait_queue)
        else:
            wait_queue.partition.backlog.wait_queues.pop(wait_queue.identity, None)

    @staticmethod
    def _keeping(runtime: TaskRuntime, slots: Slots | None, now: float) -> Gate | Slots | None:
        """Return the closed gate or the full slots that hold a job back; None if the job may begin."""
        gate = closed_gate(runtime.gates, now)
        return slots if gate is None and slots is not None and slots.free(now) <= 0 else gate

    def _gate_not_used(self, wait_queue: WaitQueue) -> None:
        """Note that a wait queue begins no job although its gate released it. Call `wake`, so that another wait queue
        of that gate can begin one."""
        if wait_queue.gate is not None and wait_queue.gate.waiting_queues:
            self._wake()
        wait_queue.gate = None

    def _wait_at(self, wait_queue: WaitQueue, gate: Gate | Slots, now: float) -> int:
        if wait_queue.gate is not gate:
            if wait_queue.gate is None:
                wait_queue.gated_at = now
            self._gate_not_used(wait_queue)
        wait_queue.gate, wait_queue.held_by = gate, gate.cause
        wait_queue.queued = True
        gate.waiting_queues.append(wait_queue)
        self.awaited[gate] = None
        self._wake_in(gate.seconds_until_open(now))
        if wait_queue.partition.backlog.full:  # the gate that keeps the partition full is known only now
            self._wake()
        return 0

    def release_opened(self) -> None:
        """Make wait queues ready again that wait at gates that have opened."""
        now = _monotonic()
        for gate in list(self.awaited):
            for _ in range(min(gate.free(now), len(gate.waiting_queues))):
                wait_queue = gate.waiting_queues.popleft()
                wait_queue.queued = False
                self._by_topic[wait_queue.partition.topic].add(wait_queue)
            if gate.waiting_queues:
                self._wake_in(gate.seconds_until_open(now))
            else:
                del self.awaited[gate]

    def left(self, work: JobRun) -> None:
        """Stop counting a job at its gates, because it no longer runs. In a serial wait queue, also note that the job's
        slot is free."""
        now = _monotonic()
        good = None if work.abandoned else answered(work.outcome)
        for gate in work.gates:
            gate.end(now, now - work.began, good, work.counted_at)
        work.gates = ()
        wait_queue = work.wait_queue
        if wait_queue is None or not wait_queue.serial:
            return
        if work.again_s is not None:
            work.waiting = True  # a handover need not wait: the next owner finds the job's last fact in the log
        if work.lease is not None:  # a long job's outcome goes to the coordinator, and no job here waits for it
            self._turn_over(work, wait_queue)
        elif not self._half_over(work, wait_queue) and wait_queue.partition.owned:
            self.awaiting_acknowledgement[wait_queue] = None

    def acknowledged(self, work: JobRun) -> None:
        """Note that the last fact of a keyed job's attempt is acknowledged."""
        wait_queue = work.wait_queue
        if wait_queue is not None and work.lease is None:
            self.awaiting_acknowledgement.pop(wait_queue, None)
            self._half_over(work, wait_queue)

    def _half_over(self, work: JobRun, wait_queue: WaitQueue) -> bool:
        """Note one of two events: the job's slot is free, or the last fact of its attempt is acknowledged. The second
        event ends the job's turn. Return whether this was the second event."""
        wait_queue.over += 1
        if wait_queue.over < 2:
            return False
        self._turn_over(work, wait_queue)
        return True

    def _turn_over(self, work: JobRun, wait_queue: WaitQueue) -> None:
        """Make the key's next job ready, or plan the next attempt of this job."""
        if work.again_s is not None:
            self._hold(work, wait_queue, work.again_s)
            return
        wait_queue.busy = False
        self._served(self._by_topic[wait_queue.partition.topic], wait_queue)

    def _hold(self, work: JobRun, wait_queue: WaitQueue, seconds: float) -> None:
        """Begin the next attempt after ``seconds`` seconds. Until then the job keeps its key.

        The seconds count from now. After an attempt in this worker, the fact that asks for the delay is acknowledged
        now: the broker appended that fact earlier and appends the next start later. So no attempt is early by the times
        in the log, whatever this machine's clock says. For a job of a former owner, `enqueue_keyed` computes the
        seconds from the broker's clock.
        """
        work.again_s = None
        work.waiting = True
        wait_queue.busy = True
        self._reports.calls.later(seconds, self._again, work, wait_queue, _monotonic() + seconds)

    def _again(self, work: JobRun, wait_queue: WaitQueue, due: float) -> None:
        partition = wait_queue.partition
        if not partition.owned or not self._starter.running_jobs.accepting:
            return  # the next owner makes the attempt, and finds the attempt's number in the log
        if (early := due - _monotonic()) > 0:  # the loop's timers count whole milliseconds
            self._reports.calls.later(early, self._again, work, wait_queue, due)
            return
        work.outcome, work.starts_before, work.suspect, work.slots, work.timer = None, 0, False, None, None
        work.interrupted = None  # each attempt has its own time limit
        work.queued_at, work.waits = _monotonic(), {}
        wait_queue.works.appendleft(work)
        partition.backlog.count += 1
        wait_queue.busy = False
        self._by_topic[partition.topic].add(wait_queue)
        self._wake()

    def forget(self, gone: set[Partition]) -> None:
        """Drop the wait queues of partitions that are no longer owned."""
        self.parked_bytes -= sum(partition.backlog.parked_bytes for partition in gone)
        for wait_queue in [wait_queue for wait_queue in self.awaiting_acknowledgement if wait_queue.partition in gone]:
            del self.awaiting_acknowledgement[wait_queue]
        for gate in list(self.awaited):
            kept = [wait_queue for wait_queue in gate.waiting_queues if wait_queue.partition not in gone]
            gate.waiting_queues.clear()
            gate.waiting_queues.extend(kept)

    def drop_waiting(self) -> None:
        """Forget all waiting jobs. These jobs are not begun, so they belong to the next owner."""
        for lane in self._by_topic.values():
            for partition in lane.parts:
                for wait_queue in partition.backlog.wait_queues.values():
                    for one in wait_queue.works:
                        partition.live.pop(one.offset, None)
                    wait_queue.works.clear()
                partition.backlog.reset_counts()
            lane.clear()
        self.parked_bytes = 0


def _joins_slot_queue(lane: Lane, wait_queue: WaitQueue, gate: Gate | Slots) -> bool:
    """Return whether the first job of a task's wait queue, which only lacks a slot, joins the jobs that wait for one.

    Otherwise the jobs of other tasks, whose records are taken directly into the slot queue, would always come first.
    """
    if not isinstance(gate, Slots) or wait_queue.identity[0] != "task":
        return False
    return len(lane.waiting.get(gate.name, ())) < (1 if lane.has_priorities else SLOT_QUEUE)


def _note_waits(work: JobRun, wait_queue: WaitQueue, now: float) -> None:
    """Note on a job that leaves its wait queue how long it waited. The time since the first job was held back by a gate
    counts for the gate that held it back last. The time before counts for the key or the tenant, or, in a task's wait
    queue, for the limit that made the jobs wait."""
    seconds = now - work.queued_at
    if wait_queue.gate is not None:
        held = now - max(wait_queue.gated_at, work.queued_at)
        work.waited(wait_queue.held_by, held)
        seconds -= held
    work.waited(_CAUSES[wait_queue.identity[0]], seconds)
