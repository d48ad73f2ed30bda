"""Takes raw messages from the partitions in turn, begins jobs as long as the worker has free slots, and acts on what
the other parts of the worker report.

Runs on the event loop, except where a docstring names another thread. `Admission` judges the records, `WaitQueues`
holds the jobs that wait, and `Starter` begins jobs.
"""

from __future__ import annotations

import asyncio
import time

from jobledger.consumers.partitions.fetcher import Fetcher
from jobledger.consumers.partitions.takeover import UNSEEN_LEAST, UNSEEN_MS
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.recording.worker_producer import UNACKNOWLEDGED_LIMIT, WorkerProducer
from jobledger.consumers.scheduling.lanes import Lane
from jobledger.consumers.scheduling.pipe import Pipe
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.reports import Asked
from jobledger.consumers.state.work import Partition
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

#: Maximum number of records taken from one partition before the next partition's turn.
SLICE = 16
#: Maximum numbers in one call of `_pump`: of records taken into the wait queues of each fair lane, and of records and
#: waiting jobs taken from all lanes. Jobs that wait for a slot are not counted.
BUDGET = 64

#: Seconds until the number of unacknowledged records is checked again.
REST_S = 0.002

#: Seconds between two updates of the weights of lanes, which depend on how long the lanes' records have waited.
AGED_S = 0.25

#: Seconds until delivery callbacks are run if nothing else happens. The second value is used while a key's next job
#: waits for an acknowledgement.
POLL_S, KEY_POLL_S = 0.005, 0.001

_monotonic = time.monotonic


def unacknowledged_limit(begun: int, age: float) -> int:
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
    """Starts jobs while slots are free, and acts on what the other parts report (`Reports`).

    ``waiting_limit``: how many jobs of a lane may wait for a slot of one kind before no more records of the lane are
    taken; it is one for lanes of a queue with priorities.
    """

    def __init__(self, pipe: Pipe, sender: WorkerProducer, ack_tracker: AckTracker, waiting_limit: int) -> None:
        self.pipe, self._sender, self._ack_tracker, self._waiting_limit = pipe, sender, ack_tracker, waiting_limit
        self._reports, self._calls, self._lanes = pipe.reports, pipe.reports.calls, pipe.lanes
        self.starter, self.wait_queues, self.placement, self.admission = (
            pipe.starter,
            pipe.wait_queues,
            pipe.placement,
            pipe.admission,
        )
        self.running_jobs = pipe.running
        self.fetchers: list[Fetcher] = []
        self.needs_tick = False
        self._aged_at = self._first_at = 0.0
        self._resting = self._polling = False
        self.idle = asyncio.Event()
        self._reports.on_wake, self._reports.on_drain, ack_tracker.on_tick = self._pump, ack_tracker.drain, self.tick
        self.wake, self.call = self._reports.wake, self._calls.call

    def start(self) -> None:
        """Start the thread of the schema resolver."""
        self.admission.schema_resolver.start()

    def close(self) -> None:
        """End the thread of the schema resolver."""
        self.admission.schema_resolver.close()

    def tick(self) -> None:
        """Send progress facts that were kept back, and call `wake` if `needs_tick` is set. Also check the commits and
        update the difference between the broker's clock and this machine's. Called in the ack tracker's thread every
        0.1 s."""
        now = _monotonic()
        for fetcher in self.fetchers:
            fetcher.committer.check(now)
        self.starter.clock_ahead_ms = self._sender.clock.ms() - time.time() * 1000
        for work in list(self.running_jobs.jobs):
            if work.unsent is not None:
                work.flush_progress(now)
        if self.needs_tick:
            self.needs_tick = False
            self.wake()

    # -- called from other threads --------------------------------------------------------------------------------

    def ready(self, partitions: list[Partition]) -> None:
        """Begin to serve partitions whose takeover is complete. Any thread."""
        self.call(self._gained, partitions)

    def _gained(self, partitions: list[Partition]) -> None:
        for partition in partitions:
            if partition.owned:
                self._lanes.by_topic[partition.topic].parts.append(partition)
        self._divide()
        # `wake` is called here and not in `ready`: a `_pump` that was scheduled before `ready` runs before this method,
        # and does not see the partitions.
        self.wake()

    def no_longer_owned(self, partitions: list[Partition]) -> None:
        """Stop serving partitions that are no longer owned; their running jobs continue. Any thread."""
        self.call(self._forget, set(partitions))

    def _forget(self, gone: set[Partition]) -> None:
        self.wait_queues.forget(gone)
        for topic in {partition.topic for partition in gone}:
            self._lanes.by_topic[topic].forget({p for p in gone if p.topic == topic})
        self.placement.sweep()
        self._divide()

    def _divide(self) -> None:
        self.wait_queues.owned = self._lanes.owned
        self._lanes.divide()

    # -- control commands: on the loop --------------------------------------------------------------------------------

    def cancelled(self, job_id: str, run: int, outcome: Cancelled) -> None:
        """Ask a job to end if this worker runs it, because its cancellation was requested."""
        for work in list(self.running_jobs.jobs):
            event = work.event
            if event is None or event.job_id != job_id or event.run != run:
                continue
            # In `finished`: the job's code has ended. If another attempt follows, it is refused when it begins.
            if work.stop_outcome is None and work not in self._reports.finished:
                LOG.info("job %s (%s) is cancelled by %s while it runs", job_id, event.task, outcome.by)
                self.placement.stop(work, outcome)

    def regate(self) -> None:
        """Apply the pauses and limits that the control commands in force set."""
        self._lanes.regate(self.pipe.control)
        self._count_running()
        self.wake()

    def _count_running(self) -> None:
        """Let the limits count the jobs that began while their queue or task had no limits and no pause."""
        for work in self.running_jobs.jobs:
            assert work.runtime is not None
            for limiter in (self._lanes.by_topic[work.partition.topic].limiter, work.runtime.limiter):
                if limiter.active and limiter not in work.gates:
                    work.gates = (*work.gates, limiter)
                    limiter.running += 1

    # -- the loop's side ------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Handle the jobs that have ended. Then take records and begin jobs while slots are free, the lanes in turn."""
        # Take reports in every call: few delivery callbacks at a time cost less than many (measured: a tenth of the
        # total).
        self._take_reports()
        self._reports.awake = False  # reset before reading what other threads change: they call `wake` after a change
        self._take_ended()
        if self._reports.asked:
            self._decide()
        if not self._polling:
            self._poll_later()
        running_jobs = self.running_jobs
        if not running_jobs.accepting:
            if not running_jobs.jobs:
                self.idle.set()
            return
        if self.wait_queues.awaited:
            self.wait_queues.release_opened()
        handled = self.pipe.slot_queues.start()
        handled += self._take_turns()
        # Records whose jobs are not run take no slot, so no end of a job would schedule `_pump` for the records after
        # them.
        if handled and (self._lanes.fair or len(running_jobs.jobs) < running_jobs.concurrency):
            self._reports.wake_soon()
        if self.wait_queues.awaiting_acknowledgement and not handled and not running_jobs.jobs:
            self._ack_tracker.hurry()  # no other job can begin before an acknowledgement arrives
        for fetcher in self.fetchers:
            fetcher.taken()

    def _take_ended(self) -> None:
        """Free the slots of jobs that have ended, and end the turn of keys whose last fact is acknowledged."""
        finished, acknowledged, jobs = self._reports.finished, self._reports.acknowledged, self.running_jobs.jobs
        keys_waited = bool(self.wait_queues.awaiting_acknowledgement)
        while finished:
            work = finished.popleft()
            del jobs[work]
            if work.slots is not None:
                work.slots.running -= 1
            if work.timer is not None:
                work.timer.cancel()
            if work.wait_queue is not None or work.gates:
                self.wait_queues.left(work)
        if self.wait_queues.awaiting_acknowledgement and not keys_waited:
            # `_take_reports` left the reports to the ack tracker. The report that a key waits for may be among them.
            self._ack_tracker.drain()
        while acknowledged:
            self.wait_queues.acknowledged(acknowledged.popleft())

    def _decide(self) -> None:
        """Act on jobs about which another part asks (`Asked`)."""
        asked = self._reports.asked
        while asked:
            what, work = asked.popleft()
            if what is Asked.UNCERTAIN:
                self.placement.begin_later(work)
            elif what is Asked.LEASE_LOST:
                self.placement.give_up(work)
            elif self.pipe.leases.grant(work):
                self.placement.begin_code(work, now_us())

    def _poll(self) -> None:
        """Run delivery callbacks even if no job begins or ends, because the records that they mark as done must be
        committed."""
        self._take_reports()
        self._poll_later()

    def _poll_later(self) -> None:
        self._polling = bool(self._sender.unacknowledged)
        if self._polling:
            seconds = KEY_POLL_S if self.wait_queues.awaiting_acknowledgement else POLL_S
            self._calls.later(seconds, self._poll)

    def _take_reports(self) -> None:
        """Run the delivery callbacks that have arrived. While a key's next job waits for an acknowledgement, also take
        the delivery reports at once; otherwise the ack tracker takes them every 0.1 s."""
        self._sender.poll()
        if self.wait_queues.awaiting_acknowledgement:
            self._ack_tracker.drain()

    def _take_turns(self) -> int:
        """Take records and begin waiting jobs within `BUDGET`, the lanes in turn. Return how many records and waiting
        jobs were handled."""
        # A worker that has just started begins jobs no faster than its records are acknowledged.
        running_jobs = self.running_jobs
        began, now = running_jobs.begun, _monotonic()
        if not began:
            self._first_at = now
        room = unacknowledged_limit(began, now - self._first_at) - self._sender.unacknowledged
        if room <= 0:
            if not self._resting:
                self._resting = True
                self._calls.later(REST_S, self._rested)
            return 0
        filled = 0
        for lane in self._lanes.fair:
            filled += self._fill(lane)
        free = min(running_jobs.concurrency - len(running_jobs.jobs), BUDGET, room)
        if free <= 0:
            return filled
        lanes = self._lanes.all
        if len(lanes) == 1:
            return filled + self._serve(lanes[0], free)
        if now - self._aged_at > AGED_S:
            self._aged_at = now
            self._lanes.age(self._sender.clock.ms())
        taken = 0
        lanes = [lane for lane in lanes if lane.parts]
        while taken < free and lanes:
            turn = self._lanes.turns.next_of(lanes)
            got = self._serve(turn, min(SLICE, free - taken))
            if got:
                self._lanes.turns.took(turn, got)
                taken += got
            else:
                lanes.remove(turn)
        return filled + taken

    def _rested(self) -> None:
        self._resting = False
        self.wake()

    def _serve(self, lane: Lane, most: int) -> int:
        """Begin up to ``most`` jobs of a lane: first the jobs of its wait queues, then the jobs of records that are
        taken from its partitions in turn. Return how many waiting jobs and records were handled."""
        limiter = lane.limiter
        if limiter.active:
            now = _monotonic()
            most = min(most, limiter.free(now))
            if most <= 0:
                self._reports.wake_in(limiter.seconds_until_open(now))
                return 0
        served = self.wait_queues.serve(lane, most) if lane.ready else 0
        if lane.fair_by is not None:
            return served
        parts = lane.parts
        empty = 0
        limit = self._waiting_limit if not lane.has_priorities else 1
        while served < most and empty < len(parts):
            if lane.waiting and any(len(waiting) >= limit for waiting in lane.waiting.values()):
                break
            partition = parts[0]
            parts.rotate(-1)
            got = self._take_slice(partition, min(SLICE, most - served)) if partition.has_records else 0
            if got:
                empty = 0
                served += got
            else:
                empty += 1
        return served

    def _fill(self, lane: Lane) -> int:
        """Take up to `BUDGET` records of a lane into the wait queues of their tenants, so that the tenants can take
        turns. Return how many records were taken."""
        filled = 0
        for _ in range(len(lane.parts)):
            partition = lane.parts[0]
            lane.parts.rotate(-1)
            while filled < BUDGET and partition.has_records:
                got = self._take_slice(partition, min(SLICE, BUDGET - filled))
                if not got:
                    break
                filled += got
        return filled

    def _take_slice(self, partition: Partition, most: int) -> int:
        """Take up to ``most`` records of one partition; return how many were taken."""
        raw, lease, offsets = partition.raw, partition.lease, partition.offsets
        take_up = self.admission.take_up
        if offsets is None or partition.resolving or not partition.begin_taking():
            return 0  # while a record's schema is looked up, the records after it wait, so that they do not overtake it
        taken = 0
        try:
            if _monotonic() > lease.until:  # take nothing, not even to snooze a job that another worker may have run
                lease.ask()
                return 0
            backlog = partition.backlog
            backlog.full = backlog.count > 0 and not self.wait_queues.room(partition)
            if backlog.full:
                self.wait_queues.make_room(partition)
                return 0
            with partition.lock:
                offsets.postponed = backlog.count
                partition.braked = offsets.braked
            if partition.braked:
                self.needs_tick = True
                return 0
            while taken < most and partition.owned and partition.stopped is None and not partition.resolving:
                now = _monotonic()
                if now > lease.until:
                    lease.ask()
                    break
                if (resolved := partition.resolved) is not None:
                    partition.resolved = None
                    taken += 1
                    self.admission.judge(partition, *resolved, now)
                    continue
                try:
                    message = raw.popleft()
                except IndexError:  # the fetch thread may have dropped the messages
                    break
                taken += 1
                take_up(partition, message, now)
            if partition.prior.scanned_to:
                self.admission.scan_passed(partition)
        finally:
            partition.taking = False
        return taken

    def take_no_more(self) -> None:
        """Begin no more jobs. Forget the jobs that wait in wait queues, for a slot or for a child process, because they
        belong to the next owner."""
        self.running_jobs.accepting = False
        self.placement.sweep()
        self.pipe.slot_queues.drop()
        self.wait_queues.drop_waiting()
