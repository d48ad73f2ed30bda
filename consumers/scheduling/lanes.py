"""Decide which waiting job is next: among the lines of a lane, and among the lanes of a worker. No Kafka, one thread.

Most jobs wait in no line: their record is taken from its partition and started. A job needs a line if something delays
it: another job of its key runs, its tag's turn has not come, or a gate is closed. All jobs of a line belong to one
partition; they were received and are not begun, so the partition's next owner gets them all.

A stage is one work topic: a queue, or one priority of it. Among stages the next start goes to the one that has had the
fewest starts for its weight (stride scheduling: C. Waldspurger and W. Weihl, 1995). Weights grow with age, so no stage
starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from jobledger.consumers.state.limiters import Limiter
from jobledger.consumers.state.work import WAIT_BOUNDS_MS, JobRun, Partition, WaitQueue
from jobledger.definitions.queues import Queue
from jobledger.kafka.topic_names import lane

#: Starts that a level gets for each start of the low level while all levels have work; age changes this.
WEIGHTS = {"high": 64.0, None: 8.0, "low": 1.0}
#: Seconds of waiting that double a level's weight, and how often it is doubled at most: then low weighs as much as a
#: fresh high.
AGEING_S, AGEING_MOST = 30.0, 6


class Lane:
    """One lane of a queue in this worker. ``scope``: the queue's limits and pauses, shared by its lanes."""

    __slots__ = (
        "_turns",
        "base_weight",
        "fair_by",
        "lane",
        "level",
        "levelled",
        "parts",
        "passed",
        "queue",
        "ready",
        "scope",
        "waited_ms",
        "waiting",
        "waits",
        "weight",
    )

    def __init__(self, queue: Queue, level: str | None, scope: Limiter) -> None:
        self.queue, self.level, self.scope = queue.name, level, scope
        self.lane = lane(queue.name, level)
        self.fair_by = queue.fair_by
        self.levelled = queue.priorities
        self.base_weight = self.weight = WEIGHTS[level]
        self.passed = 0.0
        self.waits = [0] * (len(WAIT_BOUNDS_MS) + 1)  # starts, by `WAIT_BOUNDS_MS`
        self.waited_ms = 0.0
        self.parts: deque[Partition] = deque()
        #: Number of lines whose first job may be startable. ``_turns`` holds them per tenant, in round-robin order.
        self.ready = 0
        self._turns: dict[str, deque[WaitQueue]] = {}
        #: Jobs that may start once their room has a free place, by the room's name.
        self.waiting: dict[str, deque[JobRun]] = {}

    def age(self, broker_ms: float) -> None:
        """Set the weight by how long the oldest record that waits here has waited."""
        heads = [stamp for p in self.parts if (stamp := p.oldest_ms()) is not None]
        waited_s = max(0.0, broker_ms - min(heads)) / 1000 if heads else 0.0
        self.weight = self.base_weight * 2.0 ** min(waited_s / AGEING_S, AGEING_MOST)

    def add(self, line: WaitQueue) -> None:
        """Note that the line's first job may be startable."""
        if not line.queued:
            line.queued = True
            self.ready += 1
            lines = self._turns.get(line.tenant)
            if lines is None:
                lines = self._turns[line.tenant] = deque()
            lines.append(line)

    def next_line(self) -> WaitQueue:
        """Return the next ready line; there must be one. The tenants take turns, and so do the lines of a tenant."""
        tenant = next(iter(self._turns))
        lines = self._turns.pop(tenant)
        line = lines.popleft()
        if lines:
            self._turns[tenant] = lines  # behind the other tenants
        line.queued = False
        self.ready -= 1
        return line

    def clear(self) -> None:
        """Forget all ready lines: no more jobs are to begin."""
        self._turns.clear()
        self.ready = 0

    def forget(self, gone: set[Partition]) -> None:
        """Drop partitions that are no longer owned."""
        self.parts = deque(p for p in self.parts if p not in gone)
        for partition in gone:
            partition.lines.clear()
            partition.nothing_waits()


class Turns:
    """Choose the next stage."""

    def __init__(self) -> None:
        self._passed = 0.0

    def next_of(self, stages: Sequence[Lane]) -> Lane:
        """Return the stage that has had the fewest starts for its weight, of one or more. A stage that had no work
        meanwhile cannot claim the starts that it missed."""
        for stage in stages:
            stage.passed = max(stage.passed, self._passed)
        return min(stages, key=lambda stage: stage.passed)

    def took(self, stage: Lane, count: int) -> None:
        """Note that the stage was given ``count`` starts."""
        self._passed = stage.passed
        stage.passed += count / stage.weight
