"""Jobs that wait in lines: for those before them of their key, for their tag's turn, for a gate to open.

On the event loop. What is in a line was received and is not begun: whoever gets the partition next has it all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from jobledger.consumers.execute import Executor
from jobledger.consumers.gates import Gate, Room, closed_gate
from jobledger.consumers.outcome import Snoozed, answered
from jobledger.consumers.places import Places
from jobledger.consumers.stage import Stage
from jobledger.consumers.starts import Starter
from jobledger.consumers.work import Deferred, Line, Partition, Plan, Work

if TYPE_CHECKING:
    import asyncio

_monotonic = time.monotonic

#: Jobs of a full partition that are set aside before something else is done, and lines at a gate that are looked at.
ASIDE_AT_ONCE, LOOKED_AT = 64, 1_000


class Lines:
    """The lines of this worker's partitions. ``lookahead``: jobs that may wait in all of them ready to be begun;
    ``lookahead_bytes``: what further ones may take, as bare records.

    A partition whose lines are long is read on all the same: behind a hundred thousand jobs of one key may stand the
    first one of another. What is far back in its line is put down as its record (`Deferred`), and becomes a job again
    when its turn comes.

    ``wake``: there may be something to begin; ``wake_in(seconds)``: there may be then. ``unknown(work)``: ends a job
    whose task this worker does not know. ``revive(partition, deferred)``: the job that a bare record stands for; its
    arguments are not read yet. ``call``: runs a function on the loop; what it raises ends the worker.

    The next job of a key begins when the fact that ended the one before is acknowledged, not when it is sent: else the next
    owner, after a crash, could run jobs again that later ones of their key have followed. So a keyed job that must not be
    started (bad arguments, cancelled, expired) ends in its turn, too.
    """

    executor: Executor
    places: Places
    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        starter: Starter,
        stages: Mapping[str, Stage],
        *,
        lookahead: int,
        lookahead_bytes: int,
        broker_ms: Callable[[], float],
        wake: Callable[[], None],
        wake_in: Callable[[float | None], None],
        unknown: Callable[[Work], None],
        revive: Callable[[Partition, Deferred], Work],
        call: Callable[..., None],
    ) -> None:
        self._starter, self._stages, self._lookahead = starter, stages, lookahead
        self._bytes, self._revive, self._call = lookahead_bytes, revive, call
        self._broker_ms, self._wake, self._wake_in, self._unknown = broker_ms, wake, wake_in, unknown
        #: Gates with lines that wait for them.
        self.parking: dict[Gate | Room, None] = {}
        #: Lines of keys whose job has left its slot, and the fact that ended it is not acknowledged yet.
        self.unacknowledged: dict[Line, None] = {}
        #: Partitions that share the lookahead.
        self.owned = 0
        #: Bytes of all that is deferred.
        self.deferred_bytes = 0

    @property
    def window(self) -> int:
        """Jobs of one partition that may wait in lines, but for those that are deferred."""
        return max(100, self._lookahead // max(1, self.owned))

    def crowded(self, partition: Partition) -> bool:
        """Whether so much waits here that what comes now is deferred, if it is to wait in a line."""
        return partition.waiting - partition.deferred >= self.window // 4

    def room(self, partition: Partition) -> bool:
        """Whether more records may be taken from here. A partition may always have its own share of the bytes, and
        more as long as others leave it. Once full, not before a quarter is free: it is paused and fetched again."""
        part = 0.75 if partition.full else 1.0
        if partition.waiting - partition.deferred >= self.window * part:
            return False
        return self.deferred_bytes < self._bytes * part or partition.deferred_bytes < self._share * part

    @property
    def _share(self) -> int:
        return self._bytes // max(1, self.owned)

    def half_full(self, partition: Partition) -> bool:
        """Whether what waits here takes half of what it may: what can be set aside should be."""
        if partition.waiting - partition.deferred >= self.window // 2:
            return True
        return self.deferred_bytes >= self._bytes // 2 and partition.deferred_bytes >= self._share // 2

    def enqueue(self, work: Work, identity: tuple[str, ...], *, serial: bool, tenant: str = "") -> Line:
        work.line = line = self._join(work.partition, identity, work, serial, tenant)
        work.waiting = True
        return line

    def _join(
        self, partition: Partition, identity: tuple[str, ...], one: Work | Deferred, serial: bool, tenant: str
    ) -> Line:
        line = partition.lines.get(identity)
        if line is None:
            line = partition.lines[identity] = Line(partition, identity, serial, tenant)
        line.works.append(one)
        partition.waiting += 1
        if not line.busy:
            self._stages[partition.topic].add(line)
        return line

    def defer(
        self, partition: Partition, identity: tuple[str, ...], one: Deferred, *, serial: bool, tenant: str
    ) -> None:
        """Put a record down at the end of its line."""
        self._join(partition, identity, one, serial, tenant)
        self._count(partition, one, 1)

    def _count(self, partition: Partition, one: Deferred, by: int) -> None:
        partition.deferred += by
        partition.deferred_bytes += by * one.size
        self.deferred_bytes += by * one.size

    def enqueue_keyed(self, work: Work, key: str, held: tuple[int, int, int] | None, tenant: str = "") -> None:
        """Behind what there is of its key. ``held``: an earlier owner tried it in place already."""
        line = self.enqueue(work, ("key", key), serial=True, tenant=tenant)
        if held is None:
            return
        attempt, due_ms, stands_at = held
        assert work.event is not None
        assert work.partition.offsets is not None
        work.event = msgspec.structs.replace(work.event, attempt=attempt)
        with work.partition.lock:
            work.partition.offsets.note(work.offset, stands_at)
        wait_s = (due_ms - self._broker_ms()) / 1000
        if wait_s > 0 and line.works[0] is work:
            line.works.popleft()
            work.partition.waiting -= 1
            self._hold(work, line, wait_s)

    def wait_for_gate(self, work: Work, plan: Plan, identity: tuple[str, ...], now: float, tenant: str = "") -> None:
        """Wait here; or, if many do already, go back to the coordinator for a while, so that others can pass."""
        partition = work.partition
        gate = closed_gate(plan.gates, now) if self.half_full(partition) else None
        if gate is not None:
            ahead = len(partition.lines[identity].works) if identity in partition.lines else 0
            self._set_aside(work, gate, ahead)
            return
        self.enqueue(work, identity, serial=False, tenant=tenant)

    def _set_aside(self, work: Work, gate: Gate, ahead: int) -> None:
        """Give a job back to the coordinator until about its turn, with so many ``ahead`` of it here."""
        seconds = max(5.0, gate.passes_in(ahead * max(1, self.owned))) * (1.0 + 0.2 * random.random())
        self.executor.close_with(work, Snoozed(round(seconds * 1000), f"held back by {gate.describe()}"))

    def make_room(self, partition: Partition) -> None:
        """Of a partition that is full, set jobs aside that a gate keeps: the newest of the longest such line. Behind them
        may stand what nothing keeps. They came before the gate had closed, or while it was open for a moment. Not jobs
        of keys, which would lose their order; nor what may have taken a process down."""
        kept = [
            (len(line.works), gate, line)
            for gate in self.parking
            if not isinstance(gate, Room)
            for line in islice(gate.parked, LOOKED_AT)
            if line.partition is partition and not line.serial and len(line.works) > 1
        ]
        if not kept:
            return
        _, gate, line = max(kept, key=lambda each: each[0])
        for _ in range(min(ASIDE_AT_ONCE, len(line.works) - 1)):
            one = line.works[-1]
            if one.suspect:
                return
            if isinstance(one, Deferred):
                self._count(partition, one, -1)
                work = self._revive(partition, one)
            else:
                work, one.waiting = one, False
            line.works.pop()
            partition.waiting -= 1
            self._set_aside(work, gate, len(line.works))
        self._wake()

    def serve(self, stage: Stage, most: int) -> int:
        """Begin the first jobs of lines, the lines in turn."""
        begun = 0
        for _ in range(stage.ready):
            if begun >= most:
                break
            line, now = stage.next_line(), _monotonic()
            partition = line.partition
            if not line.works or (line.serial and line.busy) or not partition.begin_taking():
                self._passed(line)
                continue
            try:
                if now > partition.lease.until:
                    partition.lease.ask()
                    stage.add(line)
                    break
                begun += self._serve_line(stage, line, now)
            finally:
                partition.taking = False
        return begun

    def _serve_line(self, stage: Stage, line: Line, now: float) -> int:
        """Begin the line's first job, end it if it must not be begun, or let the line wait for what keeps it."""
        work = line.works[0]
        unread = line.serial  # its arguments
        if isinstance(work, Deferred):
            # Judged before it becomes a job: else the first of each of many lines would, while a gate is closed.
            if (plan := work.plan) is not None and (gate := self._keeping(plan, plan.room, now)) is not None:
                return self._park(line, gate, now)
            self._count(line.partition, work, -1)
            line.works[0] = work = self._revive(line.partition, work)
            work.line, work.waiting, unread = line, True, True
        plan = work.plan
        ended = self._starter.refused(work)
        if ended is None and line.serial and work.takeover:
            ended = self.places.crashed(work.takeover)
        if ended is None and plan is not None:
            gate = self._keeping(plan, self.places.room_of(work, plan), now)
            if gate is not None:
                return self._park(line, gate, now)
        line.works.popleft()
        line.partition.waiting -= 1
        line.gate = None
        work.waiting = False
        line.busy, line.over = line.serial, 0
        if ended is not None:
            self.executor.close_with(work, ended)
            self.left(work)
        elif plan is None:
            work.held_since = work.held_since or now
            self._unknown(work)
            self.left(work)
        elif unread and not self.executor.takes_arguments(work):
            self.left(work)
        else:
            self._starter.start(work, now)
        if not line.serial:
            self._served(stage, line)
        return 1

    @staticmethod
    def _served(stage: Stage, line: Line) -> None:
        """The line's next job may be startable; if there is none, the line has ended."""
        if line.works:
            stage.add(line)
        else:
            line.partition.lines.pop(line.identity, None)

    @staticmethod
    def _keeping(plan: Plan, room: Room | None, now: float) -> Gate | Room | None:
        """What keeps a job from being begun."""
        gate = closed_gate(plan.gates, now)
        return room if gate is None and room is not None and room.free(now) <= 0 else gate

    def _passed(self, line: Line) -> None:
        """The line was let through by a gate and makes nothing of it: it is another's turn."""
        if line.gate is not None and line.gate.parked:
            self._wake()
        line.gate = None

    def _park(self, line: Line, gate: Gate | Room, now: float) -> int:
        if line.gate is not gate:
            self._passed(line)
        line.gate = gate
        line.queued = True
        gate.parked.append(line)
        self.parking[gate] = None
        self._wake_in(gate.wait(now))
        if line.partition.full:  # now it is known what keeps it so
            self._wake()
        return 0

    def unpark(self) -> None:
        """Gates that have opened let lines through."""
        now = _monotonic()
        for gate in list(self.parking):
            for _ in range(min(gate.free(now), len(gate.parked))):
                line = gate.parked.popleft()
                line.queued = False
                self._stages[line.partition.topic].add(line)
            if gate.parked:
                self._wake_in(gate.wait(now))
            else:
                del self.parking[gate]

    def left(self, work: Work) -> None:
        """A job that was counted, or held others up, does not run any more."""
        now = _monotonic()
        for gate in work.gates:
            gate.end(now, now - work.began, None if work.abandoned else answered(work.outcome))
        work.gates = ()
        line = work.line
        if line is None or not line.serial:
            return
        if work.again_s is not None:
            work.waiting = True  # it no longer delays a hand-over: the next owner looks for the fact that asks for it
        if work.lease is not None:  # its outcome goes to the coordinator; nobody waits for that here
            self._turn_over(work, line)
        elif not self._half_over(work, line) and line.partition.owned:
            self.unacknowledged[line] = None

    def acknowledged(self, work: Work) -> None:
        """The fact that ended an attempt of a keyed job is acknowledged."""
        line = work.line
        if line is not None and work.lease is None:
            self.unacknowledged.pop(line, None)
            self._half_over(work, line)

    def _half_over(self, work: Work, line: Line) -> bool:
        """Either the job's slot is free, or the fact that ended its attempt is acknowledged. The second of the two ends its
        turn; whether it was that one."""
        line.over += 1
        if line.over < 2:
            return False
        self._turn_over(work, line)
        return True

    def _turn_over(self, work: Work, line: Line) -> None:
        """The next job of the key may begin, or this one again after a while."""
        if work.again_s is not None:
            self._hold(work, line, work.again_s)
            return
        line.busy = False
        self._served(self._stages[line.partition.topic], line)

    def _hold(self, work: Work, line: Line, seconds: float) -> None:
        """The next attempt begins after so many ``seconds``, and the job holds its key meanwhile. They count from now, when the
        fact that asks for them is acknowledged: the broker appended it earlier and appends the next start later, so by the
        log's times no attempt is early, whatever this machine's clock says."""
        work.again_s = None
        work.waiting = True
        line.busy = True
        self.loop.call_later(seconds, self._call, self._again, work, line, _monotonic() + seconds)

    def _again(self, work: Work, line: Line, due: float) -> None:
        partition = line.partition
        if not partition.owned or not self._starter.accepting:
            return  # the next owner's, who finds in the log how far it is
        if (early := due - _monotonic()) > 0:  # the loop counts whole milliseconds
            self.loop.call_later(early, self._call, self._again, work, line, due)
            return
        work.outcome, work.takeover, work.suspect, work.room, work.timer = None, 0, False, None, None
        work.interrupted = None  # the time limit is of one attempt
        line.works.appendleft(work)
        partition.waiting += 1
        line.busy = False
        self._stages[partition.topic].add(line)
        self._wake()

    def forget(self, gone: set[Partition]) -> None:
        """These partitions are owned no more: their lines take no turns any longer."""
        self.deferred_bytes -= sum(partition.deferred_bytes for partition in gone)
        for line in [line for line in self.unacknowledged if line.partition in gone]:
            del self.unacknowledged[line]
        for gate in list(self.parking):
            kept = [line for line in gate.parked if line.partition not in gone]
            gate.parked.clear()
            gate.parked.extend(kept)

    def drop_waiting(self) -> None:
        """Forget all that waits: not begun, so the next owner's."""
        for stage in self._stages.values():
            for partition in stage.parts:
                for line in partition.lines.values():
                    for one in line.works:
                        partition.live.pop(one.offset, None)
                    line.works.clear()
                partition.nothing_waits()
            stage.clear()
        self.deferred_bytes = 0
