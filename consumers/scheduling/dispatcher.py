"""Take raw messages from the partitions in turn, and keep all slots of the worker in use.

Runs on the event loop only. `intake` judges the records, `lines` holds the jobs that wait, `starts` begins jobs.
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
#: Records taken and jobs begun in one go, before the event loop runs other callbacks.
BUDGET = 64

#: Seconds until the number of unacknowledged records is checked again.
REST_S = 0.002

#: Seconds between two updates of the weights of priorities by how long their records have waited.
AGED_S = 0.25

#: Seconds until delivery callbacks are run if nothing else happens; the same while a key's next job waits for one.
POLL_S, KEY_POLL_S = 0.005, 0.001

_monotonic = time.monotonic


def may_be_unsent(begun: int, age: float) -> int:
    """Return how many records may be unacknowledged in a worker that has begun ``begun`` jobs, the first one ``age``
    seconds ago.

    If a job kills the worker, the next owner suspects the records whose starts are in the log. It also suspects
    `UNSEEN_LEAST` records after these, and as many more as were begun in the log's last `UNSEEN_MS`. While ``age`` is
    below `UNSEEN_MS`, half of ``begun`` may be unacknowledged, so that no begun record escapes suspicion. Later it is a
    quarter. The result is at least `UNSEEN_LEAST` and at most `UNACKNOWLEDGED_LIMIT`. Source: docs/adr/0009.
    """
    share = 2 if age < UNSEEN_MS / 1000 else 4
    return min(UNACKNOWLEDGED_LIMIT, max(UNSEEN_LEAST, UNSEEN_LEAST // 2 + begun // share))


class Dispatcher:
    """Start jobs while there are slots: ``concurrency`` in all, ``threads`` of them plain functions, ``children``
    isolated.

    ``lookahead``, ``lookahead_bytes``: how much may wait in lines in this process, see `WaitQueues`. ``drain()``: take the
    delivery reports that have arrived. ``hurry()``: have sent records acknowledged as soon as possible. `wire` must be
    called before anything else.
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
        #: Jobs that ended in a thread or a child, or are not begun after all, and are not handled here yet.
        self._finished: deque[JobRun] = deque()
        self._in_log: deque[JobRun] = deque()  # keyed jobs: their attempt's last fact is acknowledged, not handled yet
        self._loop: asyncio.AbstractEventLoop
        self._awake = False
        self._alarm: tuple[float, asyncio.TimerHandle] | None = None
        self.needs_tick = False
        self._aged_at = 0.0
        self._resting = self._polling = False
        self._first_at = 0.0
        self.idle = asyncio.Event()

    def wire(self, executor: Executor, places: Placement, leases: JobLeases) -> None:
        """Connect the executor, the places where code runs, and the leases of long jobs, which are made from parts of
        this one."""
        self.executor = self.starter.executor = self.lines.executor = self.intake.executor = executor
        self.places = self.starter.places = self.lines.places = self.intake.places = places
        self.starter.leases = leases

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on ``loop``, which must be the running one."""
        self._loop = self.places.loop = self.lines.loop = self.starter.loop = loop
        self.intake.aside.start()

    def close(self) -> None:
        """End the thread that looks schemas up."""
        self.intake.aside.close()

    def tick(self) -> None:
        """Send progress that was kept back, and look for work after records were acknowledged. Also checks the commits
        and updates the difference of the clocks. Called by the settler every 0.1 s."""
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
        """Schedule a look for work to do. Any thread."""
        if not self._awake:
            self._awake = True
            self.call(self._pump)

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the loop. Any thread. An exception in it ends the worker: otherwise a job might neither
        run nor be missed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has ended
            self._loop.call_soon_threadsafe(self._guarded, function, args)

    def _guarded(self, function: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            function(*args)
        except Exception as exc:  # noqa: BLE001  # see `call`
            self._broken(exc)

    def ready(self, partitions: list[Partition]) -> None:
        """Serve partitions whose takeover is complete. Any thread."""
        self.call(self._gained, partitions)

    def _gained(self, partitions: list[Partition]) -> None:
        for partition in partitions:
            if partition.owned:
                self.stages[partition.topic].parts.append(partition)
        self._divide()
        # Not in `ready`: a pump that was scheduled already would run before this, and would not see the partitions.
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
        """Divide the limits of queues and tasks: each partition number of each level carries a share."""
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
        """Report that the last fact of a keyed job's attempt is in the log. Any thread."""
        self._in_log.append(work)
        self.wake()

    # -- control commands: on the loop --------------------------------------------------------------------------------

    def cancelled(self, job_id: str, run: int, outcome: Cancelled) -> None:
        """Ask a job to end, if it runs here: its cancellation was requested."""
        for work in list(self.running):
            event = work.event
            if event is not None and event.job_id == job_id and event.run == run and work.stop_outcome is None:
                LOG.info("job %s (%s) is cancelled by %s while it runs", job_id, event.task, outcome.by)
                self.executor.stop(work, outcome)

    def regate(self) -> None:
        """Apply the pauses and limits that are in force now."""
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
        """Note that a job has ended in a child, or is not begun after all; its slot is freed soon. On the loop."""
        self._finished.append(work)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """Schedule a look for work to do. On the loop, where it takes no system call, unlike `wake`."""
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self._guarded, self._pump, ())

    def _pump(self) -> None:
        """Take up as many records and jobs as fit, one stage after the other."""
        # On every pump: few delivery callbacks at a time cost less than many (measured: a tenth of the total).
        self._take_reports()
        self._awake = False  # before reading anything that other threads change and then call `wake` for
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
        # Records that are passed over take no slot, so nothing else would wake the pump for the records after them.
        if begun and (self._filling or len(running) < self._concurrency):
            self._pump_soon()
        if self.lines.unacknowledged and not begun and not running:
            self._hurry()  # no other job can begin before an acknowledgement arrives
        for fetcher in self.fetchers:
            fetcher.taken()

    def _poll(self) -> None:
        """Run delivery callbacks even if no job begins or ends: the records that they settle must be committed."""
        self._take_reports()
        self._poll_later()

    def _poll_later(self) -> None:
        self._polling = bool(self._sender.unacknowledged)
        if self._polling:
            seconds = KEY_POLL_S if self.lines.unacknowledged else POLL_S
            self._loop.call_later(seconds, self._guarded, self._poll, ())

    def _take_reports(self) -> None:
        """Run the delivery callbacks that have arrived. The settler takes their reports every 0.1 s; while the next job
        of a key waits for one, they are taken at once."""
        self._sender.poll()
        if self.lines.unacknowledged:
            self._drain()

    def _wake_in(self, seconds: float | None) -> None:
        """Wake the pump in so many seconds, when a gate may have opened; None: not at all."""
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
        # A worker that has just begun starts jobs no faster than its records are acknowledged.
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
        """Begin up to ``most`` jobs of a stage, its partitions in turn. Returns how many records and waiting jobs were
        handled."""
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
        """Take records into the lines of their tags, so that there are tenants to choose from. Returns how many were
        taken."""
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
            return 0  # the records after one whose schema is looked up wait, so that they do not overtake it
        taken = 0
        try:
            if _monotonic() > lease.until:  # no job is given back either: another worker may have run it
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
                except IndexError:  # the fetch thread may have dropped them
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
        """Begin no more jobs, and forget those that wait in lines, for room or for a child: they belong to the next
        owner."""
        self.starter.accepting = False
        self.places.sweep()
        self.starter.drop_waiting()
        self.lines.drop_waiting()
