"""Decides which wait queue of a lane, and which lane of a worker, is next. No Kafka, one thread.

Most jobs wait in no wait queue: their record is taken from its partition, and the job is started. A job with a key or a
tenant always joins a wait queue before it starts. Any other job joins one only if a gate of its task is closed, or jobs
of its task wait already. Among lanes, the next start goes to the lane that has had the fewest starts for its weight
(stride scheduling: C. Waldspurger and W. Weihl, 1995). A lane's weight grows while its records wait, so no lane
starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from jobledger.consumers.scheduling.control_reader import Control
from jobledger.consumers.state.limiters import Limiter
from jobledger.consumers.state.task_runtime import WAIT_BOUNDS_MS
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun, Partition, WaitQueue
from jobledger.definitions.queues import Queue
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.kafka.topic_names import lane as lane_name

#: Starts that a priority gets for each start of low priority, while all priorities have work and their records have not
#: waited. See `AGEING_S`.
WEIGHTS = {"high": 64.0, None: 8.0, "low": 1.0}
#: Seconds of waiting that double a lane's weight, and how often the weight is doubled at most. After all doublings, low
#: priority weighs as much as high priority whose records have not waited.
AGEING_S, AGEING_MOST = 30.0, 6


class Lane:
    """One lane in this worker: one work topic, which is a queue or one priority of a queue. ``limiter``: the queue's
    limits and pauses, which its lanes share."""

    __slots__ = (
        "_turns",
        "base_weight",
        "fair_by",
        "has_priorities",
        "limiter",
        "parts",
        "priority",
        "queue",
        "ready",
        "stride_pass",
        "wait_counts",
        "waited_ms",
        "waiting",
        "weight",
    )

    def __init__(self, queue: Queue, priority: str | None, limiter: Limiter) -> None:
        self.queue, self.priority, self.limiter = queue.name, priority, limiter
        self.fair_by = queue.fair_by
        self.has_priorities = queue.priorities
        self.base_weight = self.weight = WEIGHTS[priority]
        self.stride_pass = 0.0
        self.wait_counts = [0] * (len(WAIT_BOUNDS_MS) + 1)  # starts, by `WAIT_BOUNDS_MS`
        self.waited_ms = 0.0
        self.parts: deque[Partition] = deque()
        #: Number of ready wait queues, whose first job may be startable. ``_turns`` holds them by tenant, in
        #: round-robin order.
        self.ready = 0
        self._turns: dict[str, deque[WaitQueue]] = {}
        #: Jobs that may start once a slot is free where their code runs, by the name of the `Slots`.
        self.waiting: dict[str, deque[JobRun]] = {}

    def age(self, broker_ms: float) -> None:
        """Set the lane's weight from the time that its oldest fetched record has waited. ``broker_ms``: ms of the
        broker's clock."""
        heads = [stamp for p in self.parts if (stamp := p.oldest_ms()) is not None]
        waited_s = max(0.0, broker_ms - min(heads)) / 1000 if heads else 0.0
        self.weight = self.base_weight * 2.0 ** min(waited_s / AGEING_S, AGEING_MOST)

    def add(self, wait_queue: WaitQueue) -> None:
        """Add a wait queue to the ready ones, because its first job may be startable."""
        if not wait_queue.queued:
            wait_queue.queued = True
            self.ready += 1
            wait_queues = self._turns.get(wait_queue.tenant)
            if wait_queues is None:
                wait_queues = self._turns[wait_queue.tenant] = deque()
            wait_queues.append(wait_queue)

    def next_wait_queue(self) -> WaitQueue:
        """Remove and return the next ready wait queue; there must be one. The tenants take turns, and so do the wait
        queues of one tenant."""
        tenant = next(iter(self._turns))
        wait_queues = self._turns.pop(tenant)
        wait_queue = wait_queues.popleft()
        if wait_queues:
            self._turns[tenant] = wait_queues  # behind the other tenants
        wait_queue.queued = False
        self.ready -= 1
        return wait_queue

    def clear(self) -> None:
        """Forget all ready wait queues, because no more jobs are to begin."""
        self._turns.clear()
        self.ready = 0

    def forget(self, gone: set[Partition]) -> None:
        """Drop partitions that are no longer owned, with their wait queues."""
        self.parts = deque(p for p in self.parts if p not in gone)
        for partition in gone:
            partition.backlog.wait_queues.clear()
            partition.backlog.reset_counts()


class Turns:
    """Chooses the lane that gets the next start."""

    def __init__(self) -> None:
        self._passed = 0.0

    def next_of(self, lanes: Sequence[Lane]) -> Lane:
        """Return the lane that has had the fewest starts for its weight. ``lanes``: one or more lanes that have work.
        A lane that had no work for a time does not get the starts later that it missed in that time."""
        for lane in lanes:
            lane.stride_pass = max(lane.stride_pass, self._passed)
        return min(lanes, key=lambda lane: lane.stride_pass)

    def took(self, lane: Lane, count: int) -> None:
        """Note that the lane was given ``count`` starts."""
        self._passed = lane.stride_pass
        lane.stride_pass += count / lane.weight


class Lanes:
    """The lanes of the queues that this worker serves, by work topic, and the limits of these queues and their tasks.

    ``limiters``: the limits and pauses of each queue. ``all``: all lanes. ``fair``: the lanes whose tenants take
    turns: their records are taken into wait queues first.
    """

    def __init__(self, registry: TaskRegistry, queues: Iterable[str], tasks: TaskTable) -> None:
        self._registry, self._tasks = registry, tasks
        self.limiters = {name: Limiter(f"queue {name}", registry.queues[name].limits) for name in queues}
        self.by_topic = {
            registry.names.jobs(lane_name(name, level)): Lane(registry.queues[name], level, limiter)
            for name, limiter in self.limiters.items()
            for level in registry.queues[name].levels
        }
        self.all = list(self.by_topic.values())
        self.fair = [each for each in self.all if each.fair_by is not None]
        self.turns = Turns()

    @property
    def owned(self) -> int:
        """The number of partitions that this worker owns in all lanes."""
        return sum(len(each.parts) for each in self.all)

    def age(self, broker_ms: float) -> None:
        """Set the weights of lanes with priorities. ``broker_ms``: ms of the broker's clock."""
        for each in self.all:
            if each.has_priorities:
                each.age(broker_ms)

    def divide(self) -> None:
        """Set this worker's share of the limits of queues and tasks: each partition number of each priority carries a
        share."""
        for name, limiter in self.limiters.items():
            queue = self._registry.queues[name]
            count = queue.partitions or self._registry.partitions
            owned = [
                at * count + partition.number
                for at, level in enumerate(queue.levels)
                for partition in self.by_topic[self._registry.names.jobs(lane_name(name, level))].parts
                if partition.number < count
            ]
            total = count * len(queue.levels)
            runtimes = self._tasks.runtimes.values()
            for each in [limiter, *(runtime.limiter for runtime in runtimes if runtime.task.queue == name)]:
                each.own(owned, total)

    def regate(self, control: Control) -> None:
        """Apply the pauses and limits that the control commands in force set."""
        for name, limiter in self.limiters.items():
            limiter.paused = control.paused.get(("queue", name))
            limiter.override(control.limits.get(("queue", name)))
        for runtime in self._tasks.runtimes.values():
            runtime.limiter.paused = control.paused.get(("task", runtime.name))
            runtime.limiter.override(control.limits.get(("task", runtime.name)))
            runtime.regate()
            if runtime.limiter.paused is not None:
                for wait_queue in runtime.limiter.waiting_queues:
                    wait_queue.held_by = runtime.limiter.cause
