"""Take raw messages from the partitions in turn, and begin jobs as long as the worker has free slots.

Runs on the event loop, except where a docstring names another thread. `Admission` judges the records, `WaitQueues`
holds the jobs that wait, and `Starter` begins jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable

from jobledger.consumers.partitions.fetcher import Fetcher
from jobledger.consumers.partitions.takeover import UNSEEN_LEAST, UNSEEN_MS
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import UNACKNOWLEDGED_LIMIT, WorkerProducer
from jobledger.consumers.running.executor import Executor
from jobledger.consumers.running.job_leases import JobLeases
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.admission import Admission
from jobledger.consumers.scheduling.control_reader import Control
from jobledger.consumers.scheduling.lanes import Lane, Turns
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.scheduling.wait_queues import WaitQueues
from jobledger.consumers.state.limiters import Limiter, Slots
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.work import Arrived, JobRun, Partition, TaskRuntime
from jobledger.definitions.retry import Retry
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import JobledgerError
from jobledger.kafka.topic_names import Names, lane
from jobledger.process.logger import get_logger
from jobledger.schemas import codec

LOG = get_logger("jobledger.worker")

#: Records taken from one partition before the next partition's turn.
SLICE = 16
#: Records taken and jobs begun in one call of `_pump`, before the event loop runs other callbacks.
BUDGET = 64

#: Seconds until the number of unacknowledged records is checked again.
REST_S = 0.002

#: Seconds between two updates of the weights of lanes, which depend on how long the lanes' records have waited.
AGED_S = 0.25

#: Seconds until delivery callbacks are run if nothing else happens. The second value is used while a key's next job
#: waits for an acknowledgement.
POLL_S, KEY_POLL_S = 0.005, 0.001

_monotonic = time.monotonic


def may_be_unsent(begun: int, age: float) -> int:
    """Return how many records may be unacknowledged in a worker that has begun ``begun`` jobs, the first one ``age``
    seconds ago.

    If a job kills the worker, the next owner suspects the records whose starts are in the log. It also suspects
    `UNSEEN_LEAST` records after these, and as many more as were begun in the log's last `UNSEEN_MS`. While ``age`` is
    below `UNSEEN_MS`, the result is half of `UNSEEN_LEAST` plus half of ``begun``, so that the next owner suspects
    every begun record. Later the result is half of `UNSEEN_LEAST` plus a quarter of ``begun``. The result is at least
    `UNSEEN_LEAST` and at most `UNACKNOWLEDGED_LIMIT`. Source: docs/adr/0009.
    """
    share = 2 if age < UNSEEN_MS / 1000 else 4
    return min(UNACKNOWLEDGED_LIMIT, max(UNSEEN_LEAST, UNSEEN_LEAST // 2 + begun // share))


class Dispatcher:
    """Start jobs while slots are free. ``concurrency``: slots in all; ``threads``: slots for plain functions;
    ``children``: slots for isolated jobs.

    ``waiting_limit``: how many jobs of a lane may wait for a slot of one kind before no more records of the lane are
    taken; it is one for lanes of a queue with priorities. ``lookahead``, ``lookahead_bytes``: how much may wait in this
    worker's wait queues, see `WaitQueues`. ``broker_ms()``: the time of the broker's clock, in ms. ``drain()``: take
    the delivery reports that have arrived. ``hurry()``: send queued records at once, so that their acknowledgements
    arrive as soon as possible. ``fail(error)``: stop the worker. `wire` must be called before any other method.
    """

    executor: Executor
    places: Placement

    def __init__(
        self,
        registry: TaskRegistry,
        facts: WorkerEvents,
        sender: WorkerProducer,
        decoder: codec.Decoder,
        arrived: Arrived,
        *,
        queues: Iterable[str],
        concurrency: int,
        threads: int,
        children: int,
        waiting_limit: int,
        lookahead: int,
        lookahead_bytes: int,
        unknown_task_backoff: Retry,
        broker_ms: Callable[[], float],
        drain: Callable[[], None],
        hurry: Callable[[], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self._registry, self._sender = registry, sender
        self._concurrency, self._waiting_limit = concurrency, waiting_limit
        self._broker_ms, self._drain, self._hurry, self.fail = broker_ms, drain, hurry, fail
        self._names: Names = registry.names
        self.threads, self.processes = Slots("threads", threads), Slots("processes", children)
        self.plans = {name: TaskRuntime(task, registry.hooks) for name, task in registry.tasks.items()}
        for plan in self.plans.values():
            isolated = plan.task.policy.isolation is not None
            plan.room = self.processes if isolated else None if plan.is_async else self.threads
        self.scopes = {name: Limiter(f"queue {name}", registry.queues[name].limits) for name in queues}
        self.stages = {
            self._names.jobs(lane(name, level)): Lane(registry.queues[name], level, scope)
            for name, scope in self.scopes.items()
            for level in registry.queues[name].levels
        }
        self._all_stages = list(self.stages.values())
        self._filling = [stage for stage in self._all_stages if stage.fair_by is not None]
        self._turns = Turns()
        self.control = Control()
        self.fetchers: list[Fetcher] = []
        self.starter = Starter(
            facts,
            sender,
            self._names,
            self.stages,
            self._turns,
            self.control,
            concurrency=concurrency,
            broker_ms=broker_ms,
            call=self.call,
            drain=drain,
        )
        self.lines = WaitQueues(
            self.starter,
            self.stages,
            lookahead=lookahead,
            lookahead_bytes=lookahead_bytes,
            broker_ms=broker_ms,
            wake=self.wake,
            wake_in=self._wake_in,
            unknown=lambda work: self.intake.unknown(work),
            revive=lambda partition, deferred: self.intake.revive(partition, deferred),
            call=self.call,
        )
        self.intake = Admission(
            facts,
            sender,
            decoder,
            arrived,
            self.starter,
            self.lines,
            self.plans,
            self.stages,
            unknown=unknown_task_backoff,
            call=self.call,
            wake=self.wake,
            fail=fail,
        )
        self.running = self.starter.running
        #: Jobs that ended in a thread or a child process, or are not begun after all. `_pump` handles them.
        self._finished: deque[JobRun] = deque()
        self._in_log: deque[JobRun] = deque()  # keyed jobs whose attempt's last fact is acknowledged; see `_pump`
        self._loop: asyncio.AbstractEventLoop
        self._awake = False
        self._alarm: tuple[float, asyncio.TimerHandle] | None = None
        self.needs_tick = False
        self._aged_at = 0.0
        self._resting = self._polling = False
        self._first_at = 0.0
        self.idle = asyncio.Event()

    def wire(self, executor: Executor, places: Placement, leases: JobLeases) -> None:
        """Set the executor, the placement and the job leases, which are created from parts of this dispatcher."""
        self.executor = self.starter.executor = self.lines.executor = self.intake.executor = executor
        self.places = self.starter.places = self.lines.places = self.intake.places = places
        self.starter.leases = leases

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use ``loop``, which must be the running event loop, and start the thread of the schema resolver."""
        self._loop = self.places.loop = self.lines.loop = self.starter.loop = loop
        self.intake.aside.start()

    def close(self) -> None:
        """End the thread of the schema resolver."""
        self.intake.aside.close()

    def tick(self) -> None:
        """Send progress facts that were kept back, and call `wake` if `needs_tick` is set. Also check the commits and
        update the difference between the broker's clock and this machine's. Called in the ack tracker's thread every
        0.1 s."""
        now = _monotonic()
        for fetcher in self.fetchers:
            fetcher.committer.check(now)
        self.starter.clock_ms = self._broker_ms() - time.time() * 1000
        for work in list(self.running):
            if work.unsent is not None:
                work.flush_progress(now)
        if self.needs_tick:
            self.needs_tick = False
            self.wake()

    # -- called from other threads --------------------------------------------------------------------------------

    def wake(self) -> None:
        """Schedule `_pump`, unless it is scheduled already. Any thread."""
        if not self._awake:
            self._awake = True
            self.call(self._pump)

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the loop. Any thread. An exception in ``function`` stops the worker, because otherwise a
        job might not run, and nobody would notice that."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, because the worker has ended
            self._loop.call_soon_threadsafe(self._guarded, function, args)

    def _guarded(self, function: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            function(*args)
        except Exception as exc:  # noqa: BLE001  # see `call`
            self._broken(exc)

    def ready(self, partitions: list[Partition]) -> None:
        """Begin to serve partitions whose takeover is complete. Any thread."""
        self.call(self._gained, partitions)

    def _gained(self, partitions: list[Partition]) -> None:
        for partition in partitions:
            if partition.owned:
                self.stages[partition.topic].parts.append(partition)
        self._divide()
        # `wake` is called here and not in `ready`: a `_pump` that was scheduled before `ready` runs before this method,
        # and does not see the partitions.
        self.wake()

    def ended(self, partitions: list[Partition]) -> None:
        """Stop serving partitions that are no longer owned; their running jobs continue. Any thread."""
        self.call(self._lost, set(partitions))

    def _lost(self, gone: set[Partition]) -> None:
        self.lines.forget(gone)
        for topic in {partition.topic for partition in gone}:
            self.stages[topic].forget({p for p in gone if p.topic == topic})
        self.places.sweep()
        self._divide()

    def _divide(self) -> None:
        """Set this worker's share of the limits of queues and tasks: each partition number of each priority carries a
        share."""
        self.lines.owned = sum(len(stage.parts) for stage in self._all_stages)
        for name, scope in self.scopes.items():
            queue = self._registry.queues[name]
            count = queue.partitions or self._registry.partitions
            owned = [
                at * count + partition.number
                for at, level in enumerate(queue.levels)
                for partition in self.stages[self._names.jobs(lane(name, level))].parts
                if partition.number < count
            ]
            total = count * len(queue.levels)
            for each in [scope, *(plan.scope for plan in self.plans.values() if plan.task.queue == name)]:
                each.own(owned, total)

    def ended_in_thread(self, work: JobRun) -> None:
        """Report that a job has ended in a thread. Any thread."""
        self._finished.append(work)
        self.wake()

    def acknowledged(self, work: JobRun) -> None:
        """Report that the last fact of a keyed job's attempt is acknowledged. Any thread."""
        self._in_log.append(work)
        self.wake()

    # -- control commands: on the loop --------------------------------------------------------------------------------

    def cancelled(self, job_id: str, run: int, outcome: Cancelled) -> None:
        """Ask a job to end if this worker runs it, because its cancellation was requested."""
        for work in list(self.running):
            event = work.event
            if event is not None and event.job_id == job_id and event.run == run and work.stop_outcome is None:
                LOG.info("job %s (%s) is cancelled by %s while it runs", job_id, event.task, outcome.by)
                self.executor.stop(work, outcome)

    def regate(self) -> None:
        """Apply the pauses and limits that the control commands in force set."""
        control = self.control
        for name, scope in self.scopes.items():
            scope.paused = control.paused.get(("queue", name))
            scope.order(control.limits.get(("queue", name)))
        for plan in self.plans.values():
            plan.scope.paused = control.paused.get(("task", plan.name))
            plan.scope.order(control.limits.get(("task", plan.name)))
            plan.regate()
        self.wake()

    # -- the loop's side ------------------------------------------------------------------------------------------

    def ended_here(self, work: JobRun) -> None:
        """Free the slot of a coroutine that has ended. On the loop."""
        del self.running[work]
        if work.line is not None or work.gates:
            self.lines.left(work)
        self._pump_soon()

    def ended_in_child(self, work: JobRun) -> None:
        """Note that a job has ended in a child process, or is not begun after all. `_pump` frees its slot soon. On the
        loop."""
        self._finished.append(work)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """Schedule `_pump`, unless it is scheduled already. On the loop, where this makes no system call, unlike
        `wake`."""
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self._guarded, self._pump, ())

    def _pump(self) -> None:
        """Handle the jobs that have ended. Then take records and begin jobs while slots are free, the lanes in turn."""
        # Take reports in every call: few delivery callbacks at a time cost less than many (measured: a tenth of the
        # total).
        self._take_reports()
        self._awake = False  # reset before reading what other threads change: they call `wake` after a change
        running = self.running
        while self._finished:
            work = self._finished.popleft()
            del running[work]
            if work.room is not None:
                work.room.running -= 1
            if work.timer is not None:
                work.timer.cancel()
            if work.line is not None or work.gates:
                self.lines.left(work)
        while self._in_log:
            self.lines.acknowledged(self._in_log.popleft())
        if not self._polling:
            self._poll_later()
        if not self.starter.accepting:
            if not running:
                self.idle.set()
            return
        if self.lines.parking:
            self.lines.unpark()
        begun = self.starter.start_waiting()
        begun += self._take_turns(BUDGET)
        # Records whose jobs are not run take no slot, so no end of a job would schedule `_pump` for the records after
        # them.
        if begun and (self._filling or len(running) < self._concurrency):
            self._pump_soon()
        if self.lines.unacknowledged and not begun and not running:
            self._hurry()  # no other job can begin before an acknowledgement arrives
        for fetcher in self.fetchers:
            fetcher.taken()

    def _poll(self) -> None:
        """Run delivery callbacks even if no job begins or ends, because the records that they mark as done must be
        committed."""
        self._take_reports()
        self._poll_later()

    def _poll_later(self) -> None:
        self._polling = bool(self._sender.unacknowledged)
        if self._polling:
            seconds = KEY_POLL_S if self.lines.unacknowledged else POLL_S
            self._loop.call_later(seconds, self._guarded, self._poll, ())

    def _take_reports(self) -> None:
        """Run the delivery callbacks that have arrived. While a key's next job waits for an acknowledgement, also take
        the delivery reports at once; otherwise the ack tracker takes them every 0.1 s."""
        self._sender.poll()
        if self.lines.unacknowledged:
            self._drain()

    def _wake_in(self, seconds: float | None) -> None:
        """Call `wake` after ``seconds`` seconds, when a gate may have opened. None: do nothing."""
        if seconds is None:
            return
        at = self._loop.time() + max(seconds, 0.001)
        if self._alarm is not None:
            if self._alarm[0] <= at:
                return
            self._alarm[1].cancel()
        self._alarm = (at, self._loop.call_at(at, self._alarmed))

    def _alarmed(self) -> None:
        self._alarm = None
        self.wake()

    def _take_turns(self, budget: int) -> int:
        # A worker that has just started begins jobs no faster than its records are acknowledged.
        began, now = self.starter.started, _monotonic()
        if not began:
            self._first_at = now
        room = may_be_unsent(began, now - self._first_at) - self._sender.unacknowledged
        if room <= 0:
            if not self._resting:
                self._resting = True
                self._loop.call_later(REST_S, self._rested)
            return 0
        filled = 0
        for stage in self._filling:
            filled += self._fill(stage, budget)
        free = min(self._concurrency - len(self.running), budget, room)
        if free <= 0:
            return filled
        if len(self._all_stages) == 1:
            return filled + self._serve(self._all_stages[0], free, SLICE)
        if now - self._aged_at > AGED_S:
            self._aged_at = now
            broker_ms = self._broker_ms()
            for stage in self._all_stages:
                if stage.levelled:
                    stage.age(broker_ms)
        taken = 0
        stages = [stage for stage in self._all_stages if stage.parts]
        while taken < free and stages:
            turn = self._turns.next_of(stages)
            got = self._serve(turn, min(SLICE, free - taken), SLICE)
            if got:
                self._turns.took(turn, got)
                taken += got
            else:
                stages.remove(turn)
        return filled + taken

    def _rested(self) -> None:
        self._resting = False
        self.wake()

    def _serve(self, stage: Lane, most: int, of_each: int) -> int:
        """Begin up to ``most`` jobs of a lane: first the jobs of its wait queues, then the jobs of records that are
        taken from its partitions in turn. Return how many waiting jobs and records were handled."""
        scope = stage.scope
        if scope.active:
            now = _monotonic()
            most = min(most, scope.free(now))
            if most <= 0:
                self._wake_in(scope.wait(now))
                return 0
        served = self.lines.serve(stage, most) if stage.ready else 0
        if stage.fair_by is not None:
            return served
        parts = stage.parts
        empty = 0
        limit = self._waiting_limit if not stage.levelled else 1
        while served < most and empty < len(parts):
            if stage.waiting and any(len(waiting) >= limit for waiting in stage.waiting.values()):
                break
            partition = parts[0]
            parts.rotate(-1)
            got = self._take_slice(partition, min(of_each, most - served)) if partition.here else 0
            if got:
                empty = 0
                served += got
            else:
                empty += 1
        return served

    def _fill(self, stage: Lane, most: int) -> int:
        """Take up to ``most`` records of a lane into the wait queues of their tenants, so that the tenants can take
        turns. Return how many records were taken."""
        filled = 0
        for _ in range(len(stage.parts)):
            partition = stage.parts[0]
            stage.parts.rotate(-1)
            while filled < most and partition.here:
                got = self._take_slice(partition, min(SLICE, most - filled))
                if not got:
                    break
                filled += got
        return filled

    def _take_slice(self, partition: Partition, most: int) -> int:
        """Take up to ``most`` records of one partition; return how many were taken."""
        raw, lease, offsets = partition.raw, partition.lease, partition.offsets
        take_up = self.intake.take_up
        if offsets is None or partition.aside or not partition.begin_taking():
            return 0  # while a record's schema is looked up, the records after it wait, so that they do not overtake it
        taken = 0
        try:
            if _monotonic() > lease.until:  # also snooze no job: another worker may have run that job
                lease.ask()
                return 0
            partition.full = partition.waiting > 0 and not self.lines.room(partition)
            if partition.full:
                self.lines.make_room(partition)
                return 0
            with partition.lock:
                offsets.postponed = partition.waiting
                partition.braked = offsets.braked
            if partition.braked:
                self.needs_tick = True
                return 0
            while taken < most and partition.owned and partition.stopped is None and not partition.aside:
                now = _monotonic()
                if now > lease.until:
                    lease.ask()
                    break
                if (back := partition.back) is not None:
                    partition.back = None
                    taken += 1
                    self.intake.judge(partition, *back, now)
                    continue
                try:
                    message = raw.popleft()
                except IndexError:  # the fetch thread may have dropped the messages
                    break
                taken += 1
                take_up(partition, message, now)
            if partition.scanned_to:
                self.intake.scan_passed(partition)
        finally:
            partition.taking = False
        return taken

    def _broken(self, exc: Exception) -> None:
        if isinstance(exc, JobledgerError):
            self.fail(exc)
        else:
            LOG.error("the dispatcher failed", exc_info=exc)
            self.fail(JobledgerError(f"the dispatcher failed: {exc!r}"))

    def take_no_more(self) -> None:
        """Begin no more jobs. Forget the jobs that wait in wait queues, for a slot or for a child process, because they
        belong to the next owner."""
        self.starter.accepting = False
        self.places.sweep()
        self.starter.drop_waiting()
        self.lines.drop_waiting()
