"""Begin jobs: once there is room where a job's code runs, count the job, send its start, and run its code.

On the event loop. Which jobs may begin, and in which order, is decided elsewhere. A job that has waited for room is
only checked again here: it may have been cancelled or have expired meanwhile.
"""

from __future__ import annotations

import contextvars
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import uuid_utils
from confluent_kafka import KafkaError, KafkaException, Message

from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.running.executor import Executor, context_of
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.control_reader import Control
from jobledger.consumers.scheduling.lanes import Lane, Turns
from jobledger.consumers.state.outcome import Expired, Outcome
from jobledger.consumers.state.work import WAIT_BOUNDS_MS, JobRun
from jobledger.kafka.topic_names import Names
from jobledger.process.identity import now_us
from jobledger.schemas.codec import encode
from jobledger.schemas.events import JobEvent, JobStarted

if TYPE_CHECKING:
    import asyncio

    from jobledger.consumers.running.job_leases import JobLeases

_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


class Starter:
    """Begin jobs, ``concurrency`` of them at once.

    ``call``: run a function on the loop, from any thread. ``drain()``: take the delivery reports that have arrived.
    ``clock_ms``: the broker's clock minus this machine's, in ms.
    """

    executor: Executor
    places: Placement
    leases: JobLeases
    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        facts: WorkerEvents,
        sender: WorkerProducer,
        names: Names,
        stages: Mapping[str, Lane],
        turns: Turns,
        control: Control,
        *,
        concurrency: int,
        broker_ms: Callable[[], float],
        call: Callable[..., None],
        drain: Callable[[], None],
    ) -> None:
        self._sender, self._stages, self._turns, self._control = sender, stages, turns, control
        self._all_stages = list(stages.values())
        self._broker_ms, self._call, self._drain = broker_ms, call, drain
        self._lifecycle = names.lifecycle
        self._source, self._produce = facts.source, sender.produce
        self.concurrency = concurrency
        self.clock_ms = 0.0
        self.accepting = True
        self.started = 0
        #: The context that each job's context is copied from: a job must not see variables that another job has set.
        self.base = contextvars.copy_context()
        #: All jobs that were begun and have not ended.
        self.running: dict[JobRun, None] = {}

    def refused(self, work: JobRun) -> Outcome | None:
        """Return the outcome of a job that must not start, because it is cancelled or has expired; else None."""
        cancels = self._control.cancels
        event = work.event
        assert event is not None
        if cancels and (asked := cancels.get((event.job_id, event.run))) is not None:
            return asked
        if work.expires_at is not None and self._broker_ms() * 1000 >= work.expires_at:
            return Expired(work.expires_at)
        return None

    def start(self, work: JobRun, now: float) -> None:
        """Run a job that may run, now or as soon as there is room where its code runs."""
        plan = work.plan
        assert plan is not None
        room = self.places.room_of(work, plan)
        if room is None:
            self._begin(work, now)
        elif room.running < room.most:
            room.running += 1
            work.room = room
            self._begin(work, now)
        else:
            work.waiting = True
            stage = self._stages[work.partition.topic]
            stage.waiting.setdefault(room.name, deque()).append(work)

    def _begin(self, work: JobRun, now: float) -> None:
        """Count the job as begun, send its start and run it; a long job takes its lease first."""
        work.began = now
        event, plan = work.event, work.plan
        assert event is not None
        assert plan is not None
        partition = work.partition
        work.send_progress = self.executor.progressed
        work.context = context_of(work)
        stage = self._stages[partition.topic]
        if plan.gates or stage.scope.active:
            work.gates = (stage.scope, *plan.gates) if stage.scope.active else plan.gates
            for gate in work.gates:
                gate.begin(now)
        if event.key is not None:
            work.held_since = work.held_since or now
        at_us = now_us()
        if work.appended > 0:
            waited_ms = at_us / 1000 + self.clock_ms - work.appended
            work.appended = 0
            stage.waits[bisect_left(WAIT_BOUNDS_MS, waited_ms)] += 1
            stage.waited_ms += waited_ms
        if partition.offsets is not None:
            with partition.lock:
                partition.offsets.begin(work.offset)
        self.started += 1
        plan.started += 1
        self.running[work] = None
        if plan.task.policy.long:
            self.leases.take(work)
        else:
            self._say_started(work, at_us)

    def begin_again(self, work: JobRun) -> None:
        """Start a job once more whose process died; its slot is counted already."""
        self.started += 1
        self._say_started(work, now_us())

    def leased(self, work: JobRun) -> None:
        """Start a long job, whose lease is in the log."""
        self._say_started(work, now_us())

    def _say_started(self, work: JobRun, at_us: int) -> None:
        """Send the job's start, and run its code. The code does not wait for the acknowledgement, because the closing
        fact follows in the same partition. A suspect does wait for it."""
        event, partition = work.event, work.partition
        assert event is not None
        started = encode(
            JobEvent(
                str(_uuid7()),
                event.job_id,
                event.run,
                event.attempt,
                event.release,
                at_us,
                event.task,
                event.queue,
                event.key,
                event.home,
                self._source,
                event.trace,
                JobStarted(self._source, partition.topic, work.offset, work.takeover),
            )
        )
        if work.suspect:
            work.waiting, work.noted = True, self._start_noted
            delivered = partial(self._start_delivered, work)
            self._sender.send(self._lifecycle, started, event.job_id, partition.number, delivered)
            return
        try:
            self._produce(self._lifecycle, started, event.job_id, partition.number)
        except (BufferError, KafkaException):
            self._sender.send(self._lifecycle, started, event.job_id, partition.number, None)
        if work.room is None:
            work.handle = self.loop.create_task(self.executor.run(work), context=self.base.copy())
        else:
            self.places.go(work)

    def _start_delivered(self, work: JobRun, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a suspect's start, in any thread. Has all reports taken soon: they are taken in
        order."""
        work.noted_delivered(error, message)
        self._call(self._drain)

    def _start_noted(self, work: JobRun) -> None:
        """Run a suspect: its start is in the log, and a later owner will find it. Called in the thread that took the
        report."""
        self._call(self.places.go, work)

    def ours(self, work: JobRun) -> bool:
        """Return whether this worker is still to run a job that is counted as running.

        A suspect belongs to the next owner as soon as its partition is given up or stopped, or the worker takes no more
        jobs. The worker waits for all other jobs then. A long job is this worker's while its lease holds.
        """
        partition = work.partition
        if work.suspect and not self.accepting:
            return False
        if work.lease is not None:
            return self.leases.holds(work)
        return partition.owned and partition.stopped is None if work.suspect else not partition.gone

    @staticmethod
    def certain(work: JobRun) -> bool:
        """Return whether surely no other worker has taken the job over; if that is not known, ask the group."""
        return work.lease is not None or work.partition.certain()

    def start_waiting(self) -> int:
        """Begin jobs that wait for room, where there is room now; return how many were handled."""
        begun = 0
        waits: dict[str, list[Lane]] = {}
        for stage in self._all_stages:
            for name, waiting in stage.waiting.items():
                if waiting:
                    waits.setdefault(name, []).append(stage)
        for name, stages in waits.items():
            room = self.places.rooms[name]
            while stages and room.running < room.most and len(self.running) < self.concurrency:
                stage = stages[0] if len(stages) == 1 else self._turns.next_of(stages)
                waiting = stage.waiting[name]
                if not self._start_first(waiting):
                    break
                begun += 1
                if not waiting:
                    stages.remove(stage)
        return begun

    def _start_first(self, waiting: deque[JobRun]) -> bool:
        """Begin the first of the jobs that wait for room; False if none may begin now."""
        work = waiting[0]
        now = _monotonic()
        partition = work.partition
        if not partition.begin_taking():  # not begun: it belongs to the next owner
            waiting.popleft()
            return True
        try:
            if now > partition.lease.until:
                partition.lease.ask()
                return False
            waiting.popleft()
            work.waiting = False
            ended = self.refused(work)
            if ended is not None:
                self.executor.close_with(work, ended)
                return True
            assert work.plan is not None
            room = self.places.room_of(work, work.plan)
            if room is not None:
                room.running += 1
                work.room = room
            self._begin(work, now)
            return True
        finally:
            partition.taking = False

    def drop_waiting(self) -> None:
        """Forget the jobs that wait for room: they are not begun, so they belong to the next owner."""
        for stage in self._all_stages:
            for waiting in stage.waiting.values():
                while waiting:
                    work = waiting.popleft()
                    work.partition.live.pop(work.offset, None)
