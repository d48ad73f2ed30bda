"""Which record runs next: takes raw messages from the partitions in turn, judges them and starts what may run.

Runs on the event loop only (but for `Aside`). Every message is received by the partition's offsets before anything else
is done with it, in the log's order; from then on it is not done until the settler says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import msgspec
import uuid_utils
from confluent_kafka import KafkaError, KafkaException, Message

from jobledger.consumers.aside import Aside, Read
from jobledger.consumers.control import Control
from jobledger.consumers.execute import Executor, context_of
from jobledger.consumers.facts import Facts
from jobledger.consumers.fetch import Fetcher
from jobledger.consumers.gates import Gate, Room, Scope, closed_gate
from jobledger.consumers.leases import Leases
from jobledger.consumers.outcome import (
    Cancelled,
    Expired,
    Failed,
    Outcome,
    Retried,
    Snoozed,
    Succeeded,
    answered,
    error_info,
    unknown_task,
)
from jobledger.consumers.places import Places
from jobledger.consumers.quick import plain_submission
from jobledger.consumers.releases import release_key
from jobledger.consumers.send import BY_KEY, UNACKNOWLEDGED_LIMIT, Sender
from jobledger.consumers.stage import Stage, Turns
from jobledger.consumers.work import WAIT_BOUNDS_MS, Arrived, Found, Line, Partition, Plan, Work
from jobledger.errors import BadArguments, JobledgerError, RegistryNeeded, SchemaError, UnknownFact
from jobledger.log import now_us
from jobledger.names import Names, lane
from jobledger.retry import Retry
from jobledger.schemas import codec
from jobledger.schemas.codec import encode
from jobledger.schemas.events import (
    JobCancelled,
    JobDue,
    JobEvent,
    JobExpired,
    JobFailed,
    JobLeased,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobStarted,
    JobSubmitted,
    crashes_of,
    lasting,
)
from jobledger.task import Registry

LOG = logging.getLogger("jobledger.worker")

#: Records taken from one partition before the next one's turn.
SLICE = 16
#: Records begun in one go before the loop gets a turn.
BUDGET = 64

#: Records of one partition that may wait for `Aside` to find their schemas: what looks for them wakes us.
ASIDE_LIMIT = 1_000

#: Seconds until it is looked again whether enough is acknowledged.
REST_S = 0.005

#: Seconds between two looks at how long the records of each priority have waited.
AGED_S = 0.25

#: Seconds until delivery callbacks are run when nothing else happens.
POLL_S = 0.005

_OWN = codec.MAGIC + codec.FINGERPRINT
_monotonic = time.monotonic
_uuid7 = uuid_utils.uuid7


@dataclass(slots=True)
class Counts:
    """What came in, for metrics and health."""

    started: int = 0
    duplicates: int = 0
    found_closed: int = 0
    rejected: int = 0
    reasons: dict[str, str] = field(default_factory=dict)  # partition → why it stopped


class Dispatcher:
    """Starts jobs while there are slots: ``concurrency`` in all, ``threads`` of them plain functions.

    ``lookahead``: records that may wait in lines in this process, shared by its partitions. ``drain()``: take the delivery
    reports that have arrived.
    """

    def __init__(
        self,
        registry: Registry,
        facts: Facts,
        sender: Sender,
        decoder: codec.Decoder,
        arrived: Arrived,
        *,
        queues: Iterable[str],
        concurrency: int,
        threads: int,
        children: int,
        waiting_limit: int,
        lookahead: int,
        unknown_task_backoff: Retry,
        broker_ms: Callable[[], float],
        drain: Callable[[], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self._registry, self._facts, self._sender, self._arrived = registry, facts, sender, arrived
        self._concurrency, self._lookahead = concurrency, lookahead
        self._waiting_limit, self._backoff, self.fail = waiting_limit, unknown_task_backoff, fail
        self._broker_ms, self._drain = broker_ms, drain
        self._clock_ms = 0.0  # the broker's clock less this machine's, looked at with each tick
        self._names: Names = registry.names
        self._lifecycle = self._names.lifecycle
        self._source, self._produce = facts.source, sender.produce
        self._own_form = decoder.own_form
        self.threads, self.processes = Room("threads", threads), Room("processes", children)
        self.places: Places
        self.leases: Leases
        self.plans = {name: Plan(task) for name, task in registry.tasks.items()}
        for plan in self.plans.values():
            isolated = plan.task.policy.isolation is not None
            plan.room = self.processes if isolated else None if plan.is_async else self.threads
        self.scopes = {name: Scope(f"queue {name}", registry.queues[name].limits) for name in queues}
        self.stages = {
            self._names.jobs(lane(name, level)): Stage(registry.queues[name], level, scope)
            for name, scope in self.scopes.items()
            for level in registry.queues[name].levels
        }
        self._all_stages = list(self.stages.values())
        self._filling = [stage for stage in self._all_stages if stage.fair_by is not None]
        self._turns = Turns()
        self.control = Control()
        self.executor: Executor
        self.fetchers: list[Fetcher] = []
        self.counts = Counts()
        self.running: dict[Work, None] = {}
        self._finished: deque[Work] = deque()  # by threads, not yet noticed here
        self._parking: dict[Gate, None] = {}  # gates with lines that wait for them
        self._owned = 0
        self._loop: asyncio.AbstractEventLoop
        self._awake = False
        self._alarm: tuple[float, asyncio.TimerHandle] | None = None
        self.accepting = True
        self.needs_tick = False
        self._aged_at = 0.0
        self._resting = self._polling = False
        self.idle = asyncio.Event()
        self._aside = Aside(decoder, lambda *read: self.call(self.from_aside, *read), fail)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on ``loop``, which must be the running one."""
        self._loop = self.places.loop = loop
        self._aside.start()

    def close(self) -> None:
        """End the helper thread."""
        self._aside.close()

    def tick(self) -> None:
        """Called by the settler every 0.1 s: late progress is sent, and what waited for acknowledgements goes on."""
        now = _monotonic()
        self._clock_ms = self._broker_ms() - time.time() * 1000
        for work in list(self.running):
            if work.unsent is not None:
                work.flush_progress(now)
        if self.needs_tick:
            self.needs_tick = False
            self.wake()

    # -- called from other threads --------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to do. Callable from any thread."""
        if not self._awake:
            self._awake = True
            self.call(self.pump)

    def call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the loop. Callable from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has ended
            self._loop.call_soon_threadsafe(function, *args)

    def ready(self, partitions: list[Partition]) -> None:
        """Partitions whose takeover is through. Callable from any thread."""
        self.call(self._gained, partitions)

    def _gained(self, partitions: list[Partition]) -> None:
        for partition in partitions:
            if partition.owned:
                self.stages[partition.topic].parts.append(partition)
        self._divide()
        # From here, not from where `ready` is called: a pump that was on its way then goes before this, and sees nothing.
        self.wake()

    def ended(self, partitions: list[Partition]) -> None:
        """Partitions that are owned no more; what runs of them goes on. Callable from any thread."""
        self.call(self._lost, set(partitions))

    def _lost(self, gone: set[Partition]) -> None:
        for topic in {partition.topic for partition in gone}:
            self.stages[topic].forget({p for p in gone if p.topic == topic})
        self.places.sweep()
        self._divide()

    def _divide(self) -> None:
        """Each partition number of each level carries a share of the limits."""
        self._owned = sum(len(stage.parts) for stage in self._all_stages)
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

    def ended_in_thread(self, work: Work) -> None:
        """A job that has room only in one place ended. Called in any thread."""
        self._finished.append(work)
        self.wake()

    # -- what people ask for: on the loop -----------------------------------------------------------------------------

    def cancelled(self, job_id: str, run: int, outcome: Cancelled) -> None:
        """Somebody asked for a job's end: it is told, if it runs here."""
        for work in list(self.running):
            event = work.event
            if event is not None and event.job_id == job_id and event.run == run and work.stop_outcome is None:
                LOG.info("job %s (%s) is cancelled by %s while it runs", job_id, event.task, outcome.by)
                self.executor.stop(work, outcome)

    def regate(self) -> None:
        """Pauses or limits were changed: see what they are now."""
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

    def ended_here(self, work: Work) -> None:
        """A coroutine ended. Called on the loop."""
        del self.running[work]
        if work.line is not None or work.gates:
            self._left(work)
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self.pump)

    def _left(self, work: Work) -> None:
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
            self.stages[line.partition.topic].add(line)
        else:
            line.partition.lines.pop(line.identity, None)

    def _hold(self, work: Work, line: Line, seconds: float) -> None:
        """The job goes on in place after a while, and holds its key meanwhile."""
        work.again_s = None
        work.waiting = True
        line.busy = True
        self._loop.call_later(seconds, self._again, work, line)

    def _again(self, work: Work, line: Line) -> None:
        partition = line.partition
        if not partition.owned or not self.accepting:
            return  # the next owner's, who finds in the log how far it is
        if work.plan is not None:
            assert work.event is not None
            work.kwargs = work.plan.decode_args(work.event.fact.spec.args)  # type: ignore[union-attr]  # of a work topic
        work.outcome, work.takeover, work.suspect = None, 0, False
        line.works.appendleft(work)
        partition.waiting += 1
        line.busy = False
        self.stages[partition.topic].add(line)
        self.wake()

    def pump(self) -> None:
        """Take up what fits, one stage after the other."""
        self._awake = False
        running = self.running
        while self._finished:
            work = self._finished.popleft()
            del running[work]
            if work.room is not None:
                work.room.running -= 1
            if work.timer is not None:
                work.timer.cancel()
            if work.line is not None or work.gates:
                self._left(work)
        # Every time: few delivery callbacks at once cost less than many (measured: a tenth of the whole).
        self._sender.poll()
        if not self._polling and self._sender.unacknowledged:
            self._polling = True
            self._loop.call_later(POLL_S, self._poll)
        if not self.accepting:
            if not running:
                self.idle.set()
            return
        try:
            if self._parking:
                self._unpark()
            begun = self._start_waiting()
            begun += self._take_turns(BUDGET)
        except Exception as exc:  # noqa: BLE001  # the record at hand would neither be run nor be missed
            self._broken(exc)
            return
        # Records that are passed take no slot, so nothing else would wake us for what follows them.
        if begun and (self._filling or len(running) < self._concurrency) and not self._awake:
            self._awake = True
            self._loop.call_soon(self.pump)
        for fetcher in self.fetchers:
            fetcher.taken()

    def _poll(self) -> None:
        """Acknowledgements come also when no job begins or ends, and what they settle is to be committed."""
        self._sender.poll()
        self._polling = bool(self._sender.unacknowledged)
        if self._polling:
            self._loop.call_later(POLL_S, self._poll)

    def _wake_in(self, seconds: float | None) -> None:
        """See whether a gate has opened, so many seconds from now."""
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
        if self._sender.unacknowledged > UNACKNOWLEDGED_LIMIT:
            if not self._resting:
                self._resting = True
                self._loop.call_later(REST_S, self._rested)
            return 0
        filled = 0
        for stage in self._filling:
            filled += self._fill(stage, budget)
        free = min(self._concurrency - len(self.running), budget)
        if free <= 0:
            return filled
        if len(self._all_stages) == 1:
            return filled + self._serve(self._all_stages[0], free, SLICE)
        now = _monotonic()
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

    def _serve(self, stage: Stage, most: int, of_each: int) -> int:
        """Begin up to ``most`` jobs of a stage, its partitions in turn; how many records and jobs were dealt with."""
        scope = stage.scope
        if scope.active:
            now = _monotonic()
            most = min(most, scope.free(now))
            if most <= 0:
                self._wake_in(scope.wait(now))
                return 0
        served = self._serve_lines(stage, most) if stage.ready else 0
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
            got = self._take_slice(partition, min(of_each, most - served)) if partition.raw else 0
            if got:
                empty = 0
                served += got
            else:
                empty += 1
        return served

    def _fill(self, stage: Stage, most: int) -> int:
        """See what there is to choose from: records go into the lines of their tags."""
        filled = 0
        window = self._window
        for _ in range(len(stage.parts)):
            partition = stage.parts[0]
            stage.parts.rotate(-1)
            while filled < most and partition.raw and partition.waiting < window:
                got = self._take_slice(partition, min(SLICE, most - filled, window - partition.waiting))
                if not got:
                    break
                filled += got
        return filled

    @property
    def _window(self) -> int:
        """Records of one partition that may wait in lines."""
        return max(100, self._lookahead // max(1, self._owned))

    def _take_slice(self, partition: Partition, most: int) -> int:
        """Take up to ``most`` records of one partition."""
        raw, lease, offsets = partition.raw, partition.lease, partition.offsets
        if offsets is None or partition.aside > ASIDE_LIMIT or not partition.begin_taking():
            return 0
        taken = 0
        try:
            if partition.waiting and partition.waiting >= self._window:
                return 0
            with partition.lock:
                partition.braked = offsets.braked
            if partition.braked:
                self.needs_tick = True
                return 0
            while taken < most and partition.owned and partition.stopped is None:
                now = _monotonic()
                if now > lease.until:
                    partition.lease.wanted = True  # the fetch thread asks the coordinator, and wakes us
                    break
                try:
                    message = raw.popleft()
                except IndexError:  # the fetch thread may have dropped them
                    break
                taken += 1
                self._take_up(partition, message, now)
            if partition.scanned_to:
                self._scan_passed(partition)
        finally:
            partition.taking = False
        return taken

    def _take_up(self, partition: Partition, message: Message, now: float) -> None:
        offset = message.offset()
        value = message.value()
        offsets = partition.offsets
        assert offsets is not None
        assert offset is not None
        with partition.lock:
            fresh = offsets.receive(offset)
        if value is not None and (plain := plain_submission(value)) is not None:
            self.accept(partition, message, plain, fresh, now)
            return
        own = value if isinstance(value, bytes) else b""
        if not own.startswith(_OWN):
            framed = self._own_form(own)
            if framed is None:
                partition.aside += 1
                self._aside.put(partition, message, fresh)
                return
            if (plain := plain_submission(framed)) is not None:
                self.accept(partition, message, plain, fresh, now)
                return
            own = framed
        try:
            event = codec.decode(own)
        except UnknownFact as exc:
            self.stop_partition(partition, message, f"{exc}: upgrade this worker")
        except SchemaError as exc:
            self.reject(partition, message, str(exc), fresh)
        else:
            self.accept(partition, message, event, fresh, now)

    def _scan_passed(self, partition: Partition) -> None:
        """Let go of what the takeover's scan found, once nothing that is still to come can need it."""
        offsets = partition.offsets
        assert offsets is not None
        if offsets.end >= partition.scanned_to and not partition.aside:
            partition.closed.clear()
            partition.starts.clear()
            partition.held.clear()
            partition.scanned_to = partition.careful = 0
        if not partition.closed and not partition.held and not partition.starts:
            with partition.lock:
                offsets.hold(None)

    def from_aside(self, partition: Partition, message: Message, read: Read, fresh: bool) -> None:
        """A record came back from `Aside`: as an event, what keeps this worker from judging it, or why it cannot be read."""
        partition.aside -= 1
        if not partition.begin_taking():
            return  # received and not done: the next owner's
        try:
            if isinstance(read, UnknownFact):
                self.stop_partition(partition, message, f"{read}: upgrade this worker")
            elif isinstance(read, RegistryNeeded):
                self.stop_partition(partition, message, str(read))
            elif isinstance(read, str):
                self.reject(partition, message, read, fresh)
            else:
                self.accept(partition, message, read, fresh, _monotonic())
            if partition.scanned_to:
                self._scan_passed(partition)
        except Exception as exc:  # noqa: BLE001  # as in `pump`
            self._broken(exc)
        finally:
            partition.taking = False
        self.wake()

    def _broken(self, exc: Exception) -> None:
        if isinstance(exc, JobledgerError):
            self.fail(exc)
        else:
            LOG.error("the dispatcher broke", exc_info=exc)
            self.fail(JobledgerError(f"the dispatcher broke: {exc!r}"))

    def accept(self, partition: Partition, message: Message, event: JobEvent, fresh: bool, now: float) -> None:
        """A readable event at a work position: run it, unless it is done, known already, or does not belong here."""
        offset = message.offset() or 0
        fact = event.fact
        if type(fact) is JobSubmitted:
            if fact.delay_ms is not None or fact.due_at is not None:
                self.reject(partition, message, "a conditioned JobSubmitted does not belong on a work topic", fresh)
                return
        elif type(fact) is not JobDue:
            self.reject(partition, message, f"a {type(fact).__name__} does not belong on a work topic", fresh)
            return
        key = release_key(event.job_id, event.run, event.release)
        found = partition.closed.pop(key, None) if partition.closed else None
        if not partition.memory.add(key):
            self.counts.duplicates += 1
            if fresh:
                self._done(partition, offset)
            return
        if not fresh:
            return
        spec = fact.spec
        if spec.expires_in_ms is not None or spec.expires_at is not None:
            event = _expiring(event, spec, message.timestamp()[1])
            spec = event.fact.spec  # type: ignore[union-attr]  # one of the two, as judged above
        work = Work(partition, offset, event, self._arrived)
        work.expires_at = spec.expires_at
        work.appended = message.timestamp()[1]
        partition.live[offset] = work
        if found is not None:
            self._settle_found(work, found)
            return
        if partition.scanned_to:
            work.takeover = partition.starts.pop(key, 0)
            work.suspect = work.takeover > 0 or offset < partition.careful
            if work.takeover and partition.offsets is not None:
                with partition.lock:  # until the next start tells of those, they must be found
                    partition.offsets.note(offset, partition.floor)
        if spec.tags and (crashes := crashes_of(spec.tags)):
            work.takeover += crashes
            work.suspect = True
        plan = work.plan = self.plans.get(event.task)
        if plan is not None:
            try:
                work.kwargs = plan.decode_args(spec.args)
            except BadArguments as exc:
                self.executor.close_with(work, Failed("bad-arguments", error_info(exc)))
                return
        if work.takeover and (crashed := self.places.crashed(work.takeover)) is not None:
            self.executor.close_with(work, crashed)
            return
        if event.key is not None:
            self._enqueue_keyed(work, event.key, partition.held.pop(key, None) if partition.held else None)
            return
        if plan is None:
            self._unknown(work, event, spec)
            return
        stage = self.stages[partition.topic]
        if stage.fair_by is not None:
            tenant = spec.tags.get(stage.fair_by, "")
            self._enqueue(work, ("tag", tenant, plan.name if plan.gates else ""), serial=False)
        elif plan.gates and (("task", plan.name) in partition.lines or closed_gate(plan.gates, now) is not None):
            self._wait_for_gate(work, plan, now)
        elif (ended := self._ended_before(work)) is not None:
            self.executor.close_with(work, ended)
        else:
            self._start(work, now)

    def _unknown(self, work: Work, event: JobEvent, spec: JobSpec) -> None:
        outcome = unknown_task(event.task, list(self.plans), spec.tags, self._backoff, random.random())
        self.executor.close_with(work, outcome)

    def _ended_before(self, work: Work) -> Outcome | None:
        """What a job comes to that must not be started: somebody cancelled it, or its time is over."""
        cancels = self.control.cancels
        event = work.event
        assert event is not None
        if cancels and (asked := cancels.get((event.job_id, event.run))) is not None:
            return asked
        if work.expires_at is not None and self._broker_ms() * 1000 >= work.expires_at:
            return Expired(work.expires_at)
        return None

    # -- lines --------------------------------------------------------------------------------------------------------

    def _enqueue(self, work: Work, identity: tuple[str, ...], *, serial: bool) -> Line:
        partition = work.partition
        line = partition.lines.get(identity)
        if line is None:
            line = partition.lines[identity] = Line(partition, identity, serial)
        work.line = line
        work.waiting = True
        line.works.append(work)
        partition.waiting += 1
        if not line.busy:
            self.stages[partition.topic].add(line)
        return line

    def _enqueue_keyed(self, work: Work, key: str, held: tuple[int, int, int] | None) -> None:
        """Behind what there is of its key. ``held``: an earlier owner tried it in place already."""
        line = self._enqueue(work, ("key", key), serial=True)
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

    def _wait_for_gate(self, work: Work, plan: Plan, now: float) -> None:
        """Wait here; or, if many do already, go back to the coordinator for a while, so that others can pass."""
        partition = work.partition
        gate = closed_gate(plan.gates, now)
        if gate is not None and partition.waiting >= self._window // 2:
            ahead = len(partition.lines[identity].works) if (identity := ("task", plan.name)) in partition.lines else 0
            seconds = max(5.0, gate.passes_in(ahead * max(1, self._owned))) * (1.0 + 0.2 * random.random())
            self.executor.close_with(work, Snoozed(round(seconds * 1000), f"held back by {gate.describe()}"))
            return
        self._enqueue(work, ("task", plan.name), serial=False)

    def _serve_lines(self, stage: Stage, most: int) -> int:
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
        ended = self._ended_before(work)
        if ended is None and plan is not None:
            gate = closed_gate(plan.gates, now)
            if gate is None and (room := self.places.room_of(work, plan)) is not None and room.free(now) <= 0:
                gate = room
            if gate is not None:
                line.queued = True
                gate.parked.append(line)
                self._parking[gate] = None
                self._wake_in(gate.wait(now))
                return 0
        line.works.popleft()
        line.partition.waiting -= 1
        work.waiting = False
        line.busy = line.serial
        if ended is not None or plan is None:
            event = work.event
            assert event is not None
            if ended is not None:
                self.executor.close_with(work, ended)
            else:
                work.held_since = work.held_since or now
                self._unknown(work, event, event.fact.spec)  # type: ignore[union-attr]  # it stood on a work topic
            self._left(work)
        else:
            self._start(work, now)
        if not line.serial:
            if line.works:
                stage.add(line)
            else:
                line.partition.lines.pop(line.identity, None)
        return 1

    def _unpark(self) -> None:
        """Gates that have opened let lines through."""
        now = _monotonic()
        for gate in list(self._parking):
            for _ in range(min(gate.free(now), len(gate.parked))):
                line = gate.parked.popleft()
                line.queued = False
                self.stages[line.partition.topic].add(line)
            if gate.parked:
                self._wake_in(gate.wait(now))
            else:
                del self._parking[gate]

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start(self, work: Work, now: float) -> None:
        """Run a job that may run: where its task's code runs, now or as soon as there is room."""
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
            stage = self.stages[work.partition.topic]
            stage.waiting.setdefault(room.name, deque()).append(work)

    def _begin(self, work: Work, now: float) -> None:
        """Count the job as begun, say so and run it."""
        work.began = now
        event, plan = work.event, work.plan
        assert event is not None
        assert plan is not None
        partition = work.partition
        work.send_progress = self.executor.progressed
        work.context = context_of(work)
        stage = self.stages[partition.topic]
        if plan.gates or stage.scope.active:
            work.gates = (stage.scope, *plan.gates) if stage.scope.active else plan.gates
            for gate in work.gates:
                gate.begin(now)
        if event.key is not None:
            work.held_since = work.held_since or now
        at_us = now_us()
        if work.appended > 0:
            waited_ms = at_us / 1000 + self._clock_ms - work.appended
            work.appended = 0
            stage.waits[bisect_left(WAIT_BOUNDS_MS, waited_ms)] += 1
            stage.waited_ms += waited_ms
        if partition.offsets is not None:
            partition.offsets.begin(work.offset)
        self.counts.started += 1
        plan.started += 1
        self.running[work] = None
        if plan.task.policy.long:
            self.leases.take(work)
        else:
            self._say_started(work, at_us)

    def begin_again(self, work: Work) -> None:
        """A job whose process died starts once more, where it is counted already."""
        self.counts.started += 1
        self._say_started(work, now_us())

    def leased(self, work: Work) -> None:
        """A long job has its lease."""
        self._say_started(work, now_us())

    def _say_started(self, work: Work, at_us: int) -> None:
        """Say that the job starts, and run it. Nobody waits for the acknowledgement, because the closing fact follows in the
        same partition; but a suspect is run only then."""
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
            work.handle = self._loop.create_task(self.executor.run(work))
        else:
            self.places.go(work)

    def _start_delivered(self, work: Work, error: KafkaError | None, message: Message) -> None:
        """Delivery callback of a suspect's start, in any thread: reports are taken in order, and this one soon."""
        work.noted_delivered(error, message)
        self.call(self._drain)

    def _start_noted(self, work: Work) -> None:
        """A suspect's start is in the log, and kept in sight. Called by whoever took the report."""
        self.call(self.places.go, work)

    def ours(self, work: Work) -> bool:
        """Whether this worker is to run a job that is counted as running already."""
        if work.lease is not None:
            return self.accepting and self.leases.holds(work)
        partition = work.partition
        return self.accepting and partition.owned and partition.stopped is None

    @staticmethod
    def certain(work: Work) -> bool:
        """Whether nobody else can have taken it over, as far as is known now; if not, the group is asked."""
        lease = work.partition.lease
        if work.lease is not None or _monotonic() <= lease.until:
            return True
        lease.wanted = True
        return False

    def _start_waiting(self) -> int:
        """Give rooms that have room what waits for them."""
        begun = 0
        for room in self.places.rooms:
            name = room.name
            stages = [stage for stage in self._all_stages if stage.waiting.get(name)]
            while stages and room.running < room.most and len(self.running) < self._concurrency:
                stage = stages[0] if len(stages) == 1 else self._turns.next_of(stages)
                waiting = stage.waiting[name]
                if not self._start_first(waiting):
                    break
                begun += 1
                if not waiting:
                    stages.remove(stage)
        return begun

    def _start_first(self, waiting: deque[Work]) -> bool:
        """Begin the first of those that wait for room; False if nothing may be begun now."""
        work = waiting[0]
        now = _monotonic()
        partition = work.partition
        if not partition.begin_taking():  # not begun: the next owner's
            waiting.popleft()
            return True
        try:
            if now > partition.lease.until:
                partition.lease.wanted = True  # the fetch thread asks the coordinator, and wakes us
                return False
            waiting.popleft()
            work.waiting = False
            ended = self._ended_before(work)
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

    def take_no_more(self) -> None:
        """Begin nothing from now on, and forget what waits in lines, for room or a child: it is the next owner's."""
        self.accepting = False
        self.places.sweep()
        for stage in self._all_stages:
            for waiting in stage.waiting.values():
                while waiting:
                    work = waiting.popleft()
                    work.partition.live.pop(work.offset, None)
            for partition in stage.parts:
                for line in partition.lines.values():
                    for work in line.works:
                        partition.live.pop(work.offset, None)
                    line.works.clear()
                partition.waiting = 0
            stage.ready.clear()

    # -- records that are not run ---------------------------------------------------------------------------------

    def _settle_found(self, work: Work, found: Found) -> None:
        """The log holds this release's end: it is not run; what derives from the end is sent again."""
        self.counts.found_closed += 1
        event = work.event
        assert event is not None
        fact = found.fact
        if isinstance(fact, JobLeased):
            self.executor.resend(work, [self._facts.leased(event, fact.worker, fact.lease_ms)], found.offset)
            return
        outcome: Outcome = Succeeded()
        due_at: int | None = None
        if isinstance(fact, JobRetried):
            outcome = Retried(fact.error, fact.delay_ms)
            due_at = (found.appended_ms + fact.delay_ms) * 1000
        elif isinstance(fact, JobSnoozed):
            tags: Mapping[str, str] | None = None
            if fact.reason == "unknown-task":
                again = unknown_task(event.task, [], _tags(event), self._backoff, 0.0)
                tags = again.tags if isinstance(again, Snoozed) else None
            outcome = Snoozed(fact.delay_ms, fact.reason, tags)
            due_at = (found.appended_ms + fact.delay_ms) * 1000
        elif isinstance(fact, JobCancelled):
            outcome = Cancelled(fact.by, fact.reason)
        elif isinstance(fact, JobExpired):
            outcome = Expired(fact.expired_at)
        elif isinstance(fact, JobFailed):
            outcome = Failed(fact.reason, fact.error)  # type: ignore[arg-type]  # as it was written
        self.executor.resend_derived(work, outcome, due_at, found.offset)

    def _done(self, partition: Partition, offset: int) -> None:
        assert partition.offsets is not None
        with partition.lock:
            partition.offsets.done(offset)

    def reject(self, partition: Partition, message: Message, why: str, fresh: bool) -> None:
        """Put a record that is no job into the dead-letter topic, as it is; done once that is acknowledged."""
        if not fresh:
            return
        offset = message.offset() or 0
        self.counts.rejected += 1
        LOG.error("%r@%d is rejected: %s", partition, offset, why)
        key, value = message.key(), message.value()
        record = self._facts.rejected(partition.topic, partition.number, offset, _bytes(key), _bytes(value), why)
        work = Work(partition, offset, None, self._arrived)
        partition.live[offset] = work
        assert record.value is not None
        self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)

    def stop_partition(self, partition: Partition, message: Message, why: str) -> None:
        """A newer version wrote this record, or only a registry explains it: nothing of the partition is run until this
        worker is upgraded, or told the registry."""
        self.counts.reasons[repr(partition)] = partition.stop(message, why)


def _expiring(event: JobEvent, spec: JobSpec, appended_ms: int) -> JobEvent:
    """The event with its expiry as a time: what derives from it is appended later."""
    fact = msgspec.structs.replace(event.fact, spec=lasting(spec, appended_ms))
    return msgspec.structs.replace(event, fact=fact)


def _tags(event: JobEvent) -> Mapping[str, str]:
    fact = event.fact
    return fact.spec.tags if isinstance(fact, JobSubmitted | JobDue) else {}


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None if value is None else str(value).encode()
