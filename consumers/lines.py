"""Jobs that wait in lines: for those before them of their key, for their tag's turn, for a gate to open.

On the event loop. What is in a line was received and is not begun: whoever gets the partition next has it all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from jobledger.consumers.execute import Executor
from jobledger.consumers.gates import Gate, closed_gate
from jobledger.consumers.outcome import Snoozed, answered
from jobledger.consumers.places import Places
from jobledger.consumers.stage import Stage
from jobledger.consumers.starts import Starter
from jobledger.consumers.work import Line, Plan, Work

if TYPE_CHECKING:
    import asyncio

_monotonic = time.monotonic


class Lines:
    """The lines of this worker's partitions. ``lookahead``: records that may wait in all of them.

    ``wake``: there may be something to begin; ``wake_in(seconds)``: there may be then. ``unknown(work)``: ends a job
    whose task this worker does not know.
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
        broker_ms: Callable[[], float],
        wake: Callable[[], None],
        wake_in: Callable[[float | None], None],
        unknown: Callable[[Work], None],
    ) -> None:
        self._starter, self._stages, self._lookahead = starter, stages, lookahead
        self._broker_ms, self._wake, self._wake_in, self._unknown = broker_ms, wake, wake_in, unknown
        #: Gates with lines that wait for them.
        self.parking: dict[Gate, None] = {}
        #: Partitions that share the lookahead.
        self.owned = 0

    @property
    def window(self) -> int:
        """Records of one partition that may wait in lines."""
        return max(100, self._lookahead // max(1, self.owned))

    def enqueue(self, work: Work, identity: tuple[str, ...], *, serial: bool) -> Line:
        partition = work.partition
        line = partition.lines.get(identity)
        if line is None:
            line = partition.lines[identity] = Line(partition, identity, serial)
        work.line = line
        work.waiting = True
        line.works.append(work)
        partition.waiting += 1
        if not line.busy:
            self._stages[partition.topic].add(line)
        return line

    def enqueue_keyed(self, work: Work, key: str, held: tuple[int, int, int] | None) -> None:
        """Behind what there is of its key. ``held``: an earlier owner tried it in place already."""
        line = self.enqueue(work, ("key", key), serial=True)
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

    def wait_for_gate(self, work: Work, plan: Plan, now: float) -> None:
        """Wait here; or, if many do already, go back to the coordinator for a while, so that others can pass."""
        partition = work.partition
        gate = closed_gate(plan.gates, now)
        if gate is not None and partition.waiting >= self.window // 2:
            ahead = len(partition.lines[identity].works) if (identity := ("task", plan.name)) in partition.lines else 0
            seconds = max(5.0, gate.passes_in(ahead * max(1, self.owned))) * (1.0 + 0.2 * random.random())
            self.executor.close_with(work, Snoozed(round(seconds * 1000), f"held back by {gate.describe()}"))
            return
        self.enqueue(work, ("task", plan.name), serial=False)

    def serve(self, stage: Stage, most: int) -> int:
        """Begin the first jobs of lines, the lines in turn."""
        ready = stage.ready
        begun = 0
        now = _monotonic()
        for _ in range(len(ready)):
            if begun >= most:
                break
            line = ready.popleft()
            line.queued = False
            partition = line.partition
            if not line.works or (line.serial and line.busy) or not partition.begin_taking():
                continue
            try:
                if now > partition.lease.until:
                    partition.lease.wanted = True  # the fetch thread asks the coordinator, and wakes us
                    stage.add(line)
                    break
                begun += self._serve_line(stage, line, now)
            finally:
                partition.taking = False
        return begun

    def _serve_line(self, stage: Stage, line: Line, now: float) -> int:
        """Begin the line's first job, end it if it must not be begun, or let the line wait for what keeps it."""
        work = line.works[0]
        plan = work.plan
        ended = self._starter.refused(work)
        if ended is None and plan is not None:
            gate = closed_gate(plan.gates, now)
            if gate is None and (room := self.places.room_of(work, plan)) is not None and room.free(now) <= 0:
                gate = room
            if gate is not None:
                line.queued = True
                gate.parked.append(line)
                self.parking[gate] = None
                self._wake_in(gate.wait(now))
                return 0
        line.works.popleft()
        line.partition.waiting -= 1
        work.waiting = False
        line.busy = line.serial
        if ended is not None or plan is None:
            if ended is not None:
                self.executor.close_with(work, ended)
            else:
                work.held_since = work.held_since or now
                self._unknown(work)
            self.left(work)
        else:
            self._starter.start(work, now)
        if not line.serial:
            if line.works:
                stage.add(line)
            else:
                line.partition.lines.pop(line.identity, None)
        return 1

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
            gate.end(now, now - work.began, answered(work.outcome))
        work.gates = ()
        line = work.line
        if line is None or not line.serial:
            return
        if work.again_s is not None:
            self._hold(work, line, work.again_s)
            return
        line.busy = False
        if line.works:
            self._stages[line.partition.topic].add(line)
        else:
            line.partition.lines.pop(line.identity, None)

    def _hold(self, work: Work, line: Line, seconds: float) -> None:
        """The job goes on in place after a while, and holds its key meanwhile."""
        work.again_s = None
        work.waiting = True
        line.busy = True
        self.loop.call_later(seconds, self._again, work, line)

    def _again(self, work: Work, line: Line) -> None:
        partition = line.partition
        if not partition.owned or not self._starter.accepting:
            return  # the next owner's, who finds in the log how far it is
        if work.plan is not None:
            assert work.event is not None
            work.kwargs = work.plan.decode_args(work.event.fact.spec.args)  # type: ignore[union-attr]  # of a work topic
        work.outcome, work.takeover, work.suspect = None, 0, False
        line.works.appendleft(work)
        partition.waiting += 1
        line.busy = False
        self._stages[partition.topic].add(line)
        self._wake()

    def drop_waiting(self) -> None:
        """Forget all that waits: not begun, so the next owner's."""
        for stage in self._stages.values():
            for partition in stage.parts:
                for line in partition.lines.values():
                    for work in line.works:
                        partition.live.pop(work.offset, None)
                    line.works.clear()
                partition.waiting = 0
            stage.ready.clear()
