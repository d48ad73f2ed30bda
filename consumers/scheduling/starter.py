"""Begins jobs: when a slot is free where a job's code runs, counts the job, and lets `Placement` run its code.

Runs on the event loop. `Dispatcher`, `Admission`, `WaitQueues` and `SlotQueues` decide which jobs may begin, and in
which order.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.executor import context_of
from jobledger.consumers.running.job_leases import JobLeases
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.control_reader import Control
from jobledger.consumers.scheduling.lanes import Lanes
from jobledger.consumers.state.outcome import Expired, Outcome
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.task_runtime import WAIT_BOUNDS_MS
from jobledger.consumers.state.work import JobRun
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.process.identity import now_us

_monotonic = time.monotonic


class Starter:
    """Begins jobs that the caller has found ready to start. ``clock_ahead_ms``: the time of the broker's clock
    minus the time of this machine's clock, in ms."""

    def __init__(
        self,
        recorder: Recorder,
        placement: Placement,
        leases: JobLeases,
        lanes: Lanes,
        control: Control,
        running_jobs: RunningJobs,
        clock: BrokerClock,
    ) -> None:
        self._recorder, self._placement, self._leases, self._lanes = recorder, placement, leases, lanes
        self._control, self._clock, self.running_jobs = control, clock, running_jobs
        self._by_topic = lanes.by_topic
        self.clock_ahead_ms = 0.0

    def refused(self, work: JobRun) -> Outcome | None:
        """Return the outcome of a job that must not start, because it is cancelled or has expired; else None."""
        cancels = self._control.cancels
        event = work.event
        assert event is not None
        if cancels and (asked := cancels.get((event.job_id, event.run))) is not None:
            return asked
        if work.expires_at is not None and self._clock.ms() * 1000 >= work.expires_at:
            return Expired(work.expires_at)
        return None

    def start(self, work: JobRun, now: float) -> None:
        """Begin a job that may run: now, or as soon as a slot is free where its code runs."""
        runtime = work.runtime
        assert runtime is not None
        slots = self._placement.slots_of(work, runtime)
        if slots is None:
            self._begin(work, now)
        elif slots.running < slots.most:
            slots.running += 1
            work.slots = slots
            self._begin(work, now)
        else:
            work.waiting, work.queued_at = True, now
            lane = self._by_topic[work.partition.topic]
            lane.waiting.setdefault(slots.name, deque()).append(work)

    def _begin(self, work: JobRun, now: float) -> None:
        """Count the job as begun, and run its code. For a long job, take the job lease instead; the dispatcher runs the
        code when the lease is in the log."""
        work.began = now
        event, runtime = work.event, work.runtime
        assert event is not None
        assert runtime is not None
        partition = work.partition
        work.send_progress = self._recorder.progressed
        work.context = context_of(work)
        lane = self._by_topic[partition.topic]
        if runtime.gates or lane.limiter.active:
            work.gates = (lane.limiter, *runtime.gates) if lane.limiter.active else runtime.gates
            work.counted_at = now
            for gate in work.gates:
                gate.begin(now)
        if event.key is not None:
            work.held_since = work.held_since or now
        at_us = now_us()
        if work.appended > 0:
            waited_ms = at_us / 1000 + self.clock_ahead_ms - work.appended
            work.appended = 0
            lane.wait_counts[bisect_left(WAIT_BOUNDS_MS, waited_ms)] += 1
            lane.waited_ms += waited_ms
        if partition.offsets is not None:
            with partition.lock:
                partition.offsets.begin(work.offset)
        running_jobs = self.running_jobs
        running_jobs.begun += 1
        running_jobs.jobs[work] = None
        runtime.started += 1
        if runtime.task.policy.long:
            self._leases.take(work)
        else:
            self._placement.begin_code(work, at_us)
