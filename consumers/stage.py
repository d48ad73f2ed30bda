"""What waits for its turn: the lines of a partition, the stages of a worker, and which
comes next. No Kafka, one thread.

Most jobs wait in no line: a record is taken from its partition and started. A line is needed where something comes
between: the key whose jobs run one after the other, the tag whose values take turns, a condition that is not met. A
line's jobs are of one partition, were received, and are not begun: whoever gets the partition next has them all.

A stage is one work topic: a queue, or one priority of it. Between stages the next start goes to who has had the least
for its weight (stride scheduling: C. Waldspurger and W. Weihl, 1995), and weights grow with age, so nothing starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from jobledger.consumers.gates import Scope
from jobledger.consumers.work import WAIT_BOUNDS_MS, Line, Partition, Work
from jobledger.names import lane
from jobledger.queues import Queue

#: Starts that a level gets for each of a low one while all have work, before age is looked at.
WEIGHTS = {"high": 64.0, None: 8.0, "low": 1.0}
#: Seconds of waiting that double a level's weight, and how often it is doubled at most: then low weighs what high does.
AGEING_S, AGEING_MOST = 30.0, 6


class Stage:
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

    def __init__(self, queue: Queue, level: str | None, scope: Scope) -> None:
        self.queue, self.level, self.scope = queue.name, level, scope
        self.lane = lane(queue.name, level)
        self.fair_by = queue.fair_by
        self.levelled = queue.priorities
        self.base_weight = self.weight = WEIGHTS[level]
        self.passed = 0.0
        self.waits = [0] * (len(WAIT_BOUNDS_MS) + 1)  # starts, by `WAIT_BOUNDS_MS`
        self.waited_ms = 0.0
        self.parts: deque[Partition] = deque()
        #: How many lines there are whose first job may be startable, and they, by tenant; the tenants in turn.
        self.ready = 0
        self._turns: dict[str, deque[Line]] = {}
        #: Jobs that may start as soon as their room has room, by the room's name.
        self.waiting: dict[str, deque[Work]] = {}

    def age(self, broker_ms: float) -> None:
        """Let the weight grow with how long the oldest record that is here has waited."""
        heads = [stamp for p in self.parts if (stamp := p.oldest_ms()) is not None]
        waited_s = max(0.0, broker_ms - min(heads)) / 1000 if heads else 0.0
        self.weight = self.base_weight * 2.0 ** min(waited_s / AGEING_S, AGEING_MOST)

    def add(self, line: Line) -> None:
        """The line's first job may be startable."""
        if not line.queued:
            line.queued = True
            self.ready += 1
            lines = self._turns.get(line.tenant)
            if lines is None:
                lines = self._turns[line.tenant] = deque()
            lines.append(line)

    def next_line(self) -> Line:
        """The next of the lines that are ready, of which there must be one: the tenants in turn, and the lines of each."""
        tenant = next(iter(self._turns))
        lines = self._turns.pop(tenant)
        line = lines.popleft()
        if lines:
            self._turns[tenant] = lines  # at the end, now
        line.queued = False
        self.ready -= 1
        return line

    def clear(self) -> None:
        """Nothing is to be begun any more."""
        self._turns.clear()
        self.ready = 0

    def forget(self, gone: set[Partition]) -> None:
        """These partitions are owned no more."""
        self.parts = deque(p for p in self.parts if p not in gone)
        for partition in gone:
            partition.lines.clear()
            partition.nothing_waits()


class Turns:
    """Which stage is next."""

    def __init__(self) -> None:
        self._passed = 0.0

    def next_of(self, stages: Sequence[Stage]) -> Stage:
        """Of one or more the one that has had the least for its weight; who had nothing
        to do has no claims from then."""
        for stage in stages:
            stage.passed = max(stage.passed, self._passed)
        return min(stages, key=lambda stage: stage.passed)

    def took(self, stage: Stage, count: int) -> None:
        """The stage was given so many starts."""
        self._passed = stage.passed
        stage.passed += count / stage.weight
