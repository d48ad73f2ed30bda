"""Begin jobs: when a slot is free where a job's code runs, count the job, send its `JobStarted`, and run its code.

Runs on the event loop, except where a docstring names another thread. `Dispatcher`, `Admission` and `WaitQueues` decide
which jobs may begin, and in which order. This module only checks a job again that has waited for a slot, because the
job may have been cancelled or have expired meanwhile.
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
    """Begin jobs. At most ``concurrency`` jobs run at once.

    ``broker_ms()``: the time of the broker's clock, in ms. ``call``: run a function on the loop, from any thread.
    ``drain()``: take the delivery reports that have arrived. ``clock_ms``: the time of the broker's clock minus the
    time of this machine's clock, in ms.
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
        #: Each job's context is a copy of this one, because a job must not see variables that another job has set.
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
        """Begin a job that may run: now, or as soon as a slot is free where its code runs."""
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
        """Count the job as begun, send its `JobStarted` and run its code. For a long job, take the job lease instead;
        `leased` continues when the lease is in the log."""
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
        """Send `JobStarted` again for a job whose process died, and run the job's code again. The job still has its
        slot."""
        self.started += 1
        self._say_started(work, now_us())

    def leased(self, work: JobRun) -> None:
        """Send `JobStarted` for a long job whose lease is in the log, and run the job's code."""
        self._say_started(work, now_us())

    def _say_started(self, work: JobRun, at_us: int) -> None:
        """Send the job's `JobStarted`, and run its code. The code does not wait for the acknowledgement, because the
        closing fact follows in the same partition. Only the code of a suspect waits for the acknowledgement."""
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
        """Handle the delivery of a suspect's `JobStarted`. Any thread. Request that all reports are taken soon,
        because reports are taken in order."""
        work.noted_delivered(error, message)
        self._call(self._drain)

    def _start_noted(self, work: JobRun) -> None:
        """Run a suspect's code: the suspect's start is in the log, where a later owner finds it. Called in the thread
        that takes the delivery report."""
        self._call(self.places.go, work)

    def ours(self, work: JobRun) -> bool:
        """Return whether this worker should still run a job that is counted as running.

        A suspect belongs to the next owner as soon as its partition is given up or stopped, or the worker takes no more
        jobs. In these cases the worker waits for all other jobs, so such a job stays this worker's until the partition
        is gone. A long job is this worker's while its lease is valid.
        """
        partition = work.partition
        if work.suspect and not self.accepting:
            return False
        if work.lease is not None:
            return self.leases.holds(work)
        return partition.owned and partition.stopped is None if work.suspect else not partition.gone

    @staticmethod
    def certain(work: JobRun) -> bool:
        """Return whether it is certain that no other worker has taken the job over. If this is not known, request a
        confirmation from the group."""
        return work.lease is not None or work.partition.certain()

    def start_waiting(self) -> int:
        """Begin jobs that wait for a slot, while such slots are free. Return how many jobs were handled."""
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
        """Begin, close or drop the first of the jobs that wait for a slot. Return False if none may begin now, because
        the ownership lease is over."""
        work = waiting[0]
        now = _monotonic()
        partition = work.partition
        if not partition.begin_taking():  # the job is not begun, so it belongs to the next owner
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
        """Forget the jobs that wait for a slot. These jobs are not begun, so they belong to the next owner."""
        for stage in self._all_stages:
            for waiting in stage.waiting.values():
                while waiting:
                    work = waiting.popleft()
                    work.partition.live.pop(work.offset, None)
