"""Keeps jobs that wait for a slot where their code runs: a thread or a child process.

Runs on the event loop. A job waits here if it may start and has no key and no tenant; jobs with a key or a tenant wait
in their wait queues until a slot is free. While a job waits, it may be cancelled or expire, its queue or task may be
paused, and other jobs may use their limits. So it is checked again when a slot is free.
"""

from __future__ import annotations

import time

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.lanes import Lane, Lanes
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.scheduling.wait_queues import WaitQueues
from jobledger.consumers.state.limiters import closed_gate

_monotonic = time.monotonic


class SlotQueues:
    """Begins the jobs of `Lane.waiting` when slots are free."""

    def __init__(
        self, starter: Starter, placement: Placement, recorder: Recorder, lanes: Lanes, wait_queues: WaitQueues
    ) -> None:
        self._starter, self._placement, self._recorder = starter, placement, recorder
        self._lanes, self._wait_queues = lanes, wait_queues

    def start(self) -> int:
        """Begin jobs that wait for a slot, while such slots are free. Return how many jobs were handled."""
        handled, running_jobs = 0, self._starter.running_jobs
        waits: dict[str, list[Lane]] = {}
        for lane in self._lanes.all:
            for name, waiting in lane.waiting.items():
                if waiting:
                    waits.setdefault(name, []).append(lane)
        for name, lanes in waits.items():
            slots = self._placement.slots_by_name[name]
            while lanes and slots.running < slots.most and len(running_jobs.jobs) < running_jobs.concurrency:
                lane = lanes[0] if len(lanes) == 1 else self._lanes.turns.next_of(lanes)
                if not self._start_first(lane, name):
                    lanes.remove(lane)
                    continue
                handled += 1
                if not lane.waiting[name]:
                    lanes.remove(lane)
        return handled

    def _start_first(self, lane: Lane, name: str) -> bool:
        """Begin, close or drop the first of a lane's jobs that wait for a slot, or let it wait at a gate of its task
        (or be snoozed, see `WaitQueues.wait_for_gate`). Return False if none may begin now, because the ownership lease
        is over, or because of the queue's limits."""
        waiting = lane.waiting[name]
        work, now = waiting[0], _monotonic()
        partition, runtime = work.partition, work.runtime
        assert runtime is not None
        if not partition.begin_taking():  # the job is not begun, so it belongs to the next owner
            waiting.popleft()
            return True
        try:
            if now > partition.lease.until:
                partition.lease.ask()
                return False
            if lane.limiter.active and lane.limiter.free(now) <= 0:
                return False
            waiting.popleft()
            work.waiting = False
            work.waited("slots", now - work.queued_at)
            ended = self._starter.refused(work)
            if ended is not None:
                self._recorder.close_with(work, ended)
            elif closed_gate(runtime.gates, now) is not None:
                self._wait_queues.wait_for_gate(work, runtime, ("task", runtime.name), now)
            else:
                self._starter.start(work, now)
            return True
        finally:
            partition.taking = False

    def drop(self) -> None:
        """Forget the jobs that wait for a slot. These jobs are not begun, so they belong to the next owner."""
        for lane in self._lanes.all:
            for waiting in lane.waiting.values():
                while waiting:
                    work = waiting.popleft()
                    work.partition.live.pop(work.offset, None)
