"""Wait queues: the order of a key, the turns of tenants, gates that open and close, parked records, and what remains of
a partition that is lost. No Kafka and no thread: the test moves the clock, ends the code of jobs and acknowledges
records."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jobledger import App, Breaker, Queue
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.outcome import Cancelled
from jobledger.consumers.state.work import Partition
from jobledger.definitions.retry import Retry
from jobledger.schemas import codec
from jobledger.schemas.events import (
    JobCancelledFact,
    JobExpiredFact,
    JobFailedFact,
    JobSnoozed,
    JobStarted,
    settles,
)
from tests.pipe_bench import HeldCode, PartsBench, job

#: A partition is crowded when so many jobs wait, with a lookahead of 100 jobs.
CROWDED = 25


def keyed_app(code: HeldCode, **options: Any) -> App:
    """Return an app with a keyed task. ``options``: options of the task."""
    app = App("shop", queues=[Queue("default", partitions=2)])

    @app.task(key="k", timeout=30, retry=Retry(max_attempts=3, initial=4.0, jitter=False), **options)
    async def keyed(k: str, n: int = 0) -> None:
        await code.run(n)

    @app.task
    async def other(n: int = 0) -> None:
        await code.run(n)

    return app


def keyed(n: int, key: str = "a", **about: Any) -> bytes:
    return job("keyed", key=key, k=key, n=n, **about)


def end(bench: PartsBench, code: HeldCode, n: int, error: BaseException | None = None) -> None:
    """End the code of a job, free its slot, acknowledge its records, and begin what may begin."""
    code.end(n, error)
    bench.free()
    bench.acknowledge()
    bench.free()
    bench.serve()
    bench.step()


def nothing_waits(bench: PartsBench, partition: Partition) -> bool:
    """Return whether all counters of waiting jobs are 0."""
    backlog, queues = partition.backlog, bench.pipe.wait_queues
    counters = (backlog.count, backlog.parked, backlog.parked_bytes, queues.parked_bytes, len(backlog.wait_queues))
    ready = sum(lane.ready for lane in bench.lanes.all)
    return (counters, ready, queues.awaiting_acknowledgement, queues.awaited) == ((0, 0, 0, 0, 0), 0, {}, {})


# -- keys -------------------------------------------------------------------------------------------------------------


class KeyOrder(RuleBasedStateMachine):
    """Jobs of a few keys arrive, end with any outcome or at their time limit, and are acknowledged in any order of
    events. Some are parked.

    The rules: jobs of one key begin in the order of their offsets; two of them never run at once; a job begins only
    when the outcomes of all earlier jobs of its key are acknowledged. At the end all counters are 0 again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.code = HeldCode()
        self.bench = PartsBench(keyed_app(self.code), lookahead=100, concurrency=1_000).__enter__()
        self.partition = self.bench.partition()
        self.keys: list[str] = []
        self.ids: list[str] = []
        self.checked = 0

    def teardown(self) -> None:
        try:
            for _ in range(4 * len(self.keys) + 4):
                for n in sorted(self.code.running):
                    self._end(n, None)
                self.bench.acknowledge()
                self._serve()
                self.bench.advance(5.0)
                self.order()
            assert nothing_waits(self.bench, self.partition)
            assert self.partition.offsets is not None
            assert self.partition.offsets.watermark == len(self.keys)
            assert sorted(set(self.code.began)) == list(range(len(self.keys)))
        finally:
            self.bench.__exit__(None, None, None)

    @rule(key=st.sampled_from("abc"), count=st.integers(1, 12), serves=st.booleans())
    def arrive(self, key: str, count: int, serves: bool) -> None:
        for _ in range(count):
            value = keyed(len(self.keys), key)
            self.ids.append(codec.decode(value).job_id)
            self.keys.append(key)
            self.bench.take(self.partition, value)
        if serves:
            self._serve()

    @rule(most=st.integers(1, 3))
    def serve(self, most: int) -> None:
        self._serve(most)

    def _serve(self, most: int = 100) -> None:
        self.bench.free()
        self.bench.serve(most)
        self.bench.step()
        self._note_begun()

    def _note_begun(self) -> None:
        begun = self.code.began[self.checked :]
        ended = set(self.bench.kept.ended()) if begun else set()
        for n in begun:
            earlier = {self.ids[m] for m in range(n) if self.keys[m] == self.keys[n]}
            assert earlier <= ended, f"job {n} began too early"
        self.checked = len(self.code.began)

    @precondition(lambda self: bool(self.code.running))
    @rule(data=st.data(), fails=st.booleans(), serves=st.booleans())
    def end(self, data: st.DataObject, fails: bool, serves: bool) -> None:
        """A failed attempt is made again in place, after 4 or 8 s; the third failure is the job's outcome."""
        self._end(data.draw(st.sampled_from(sorted(self.code.running))), ValueError("no") if fails else None)
        if serves:
            self._serve()

    def _end(self, n: int, error: BaseException | None) -> None:
        self.code.end(n, error)
        self.bench.step()

    @rule(most=st.integers(1, 3))
    def acknowledge(self, most: int) -> None:
        self.bench.acknowledge(most)

    @rule(seconds=st.sampled_from([1.0, 4.0, 8.0]))
    def advance(self, seconds: float) -> None:
        self.bench.advance(seconds)

    @invariant()
    def order(self) -> None:
        self._note_begun()
        firsts = list(dict.fromkeys(self.code.began))
        for key in "abc":
            of_key = [n for n in firsts if self.keys[n] == key]
            assert of_key == [n for n, each in enumerate(self.keys) if each == key][: len(of_key)]
            assert sum(self.keys[n] == key for n in self.code.running) <= 1
        backlog = self.partition.backlog
        assert backlog.count == sum(len(queue.works) for queue in backlog.wait_queues.values())
        assert 0 <= backlog.parked <= backlog.count
        assert self.bench.pipe.wait_queues.parked_bytes == backlog.parked_bytes >= 0


KeyOrder.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOrderOfAKey = KeyOrder.TestCase


@pytest.mark.parametrize("first", ["slot", "acknowledgement"])
def test_the_next_job_of_a_key_begins_after_two_events_in_any_order(first: str) -> None:
    """The slot of the job before it is free, and the outcome of that job is acknowledged."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        queues = bench.pipe.wait_queues
        partition = bench.partition()
        bench.take(partition, keyed(0), keyed(1))
        bench.serve()
        bench.step()
        before = partition.live[0]
        assert bench.running == [0]
        code.end(0)
        bench.step()
        bench.acknowledge()
        assert list(bench.reports.finished) == list(bench.reports.acknowledged) == [before]
        events = [queues.left, queues.acknowledged]
        for happens in events if first == "slot" else events[::-1]:
            assert bench.serve() == 0, "the first event is not enough"
            happens(before)
        bench.reports.finished.clear()
        bench.reports.acknowledged.clear()
        del bench.pipe.running.jobs[before]
        assert (bench.serve(), bench.running) == (1, [1])


def test_jobs_of_different_keys_and_of_different_partitions_run_at_once() -> None:
    """Only jobs of one key in one partition wait for each other."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        first, second = bench.partition(0), bench.partition(1)
        bench.take(first, keyed(0, "a"), keyed(1, "b"), keyed(2, "a"))
        bench.take(second, keyed(3, "a"))
        bench.serve()
        bench.step()
        assert sorted(code.began) == [0, 1, 3]


@pytest.mark.parametrize("how", ["bad arguments", "expired", "cancelled", "unknown task"])
@pytest.mark.parametrize("parked", [False, True], ids=["job", "parked"])
def test_a_keyed_job_that_must_not_run_is_closed_in_its_turn(how: str, parked: bool) -> None:
    """Its outcome follows the outcome of the job before it. The job after it begins when its outcome is
    acknowledged."""
    code = HeldCode()
    value, kind = {
        "bad arguments": (job("keyed", key="a", nobody=1), JobFailedFact),
        "expired": (keyed(-1, expires_in_ms=2_000), JobExpiredFact),
        "cancelled": (keyed(-1), JobCancelledFact),
        "unknown task": (job("elsewhere", key="a"), JobFailedFact),
    }[how]
    with PartsBench(keyed_app(code), lookahead=100, unknown_backoff=Retry(initial=90.0, jitter=False)) as bench:
        partition = bench.partition()
        ahead = CROWDED if parked else 1
        bench.take(partition, *(keyed(n) for n in range(ahead)), value, keyed(ahead + 1))
        assert (partition.backlog.parked > 0) == parked
        if how == "cancelled":
            bench.pipe.control.cancels[codec.decode(value).job_id, 1] = Cancelled("me", None)
        bench.serve()
        bench.step()
        bench.advance(2.0)
        for n in range(ahead):
            assert bench.facts(kind) == []
            end(bench, code, n)
        assert len(bench.facts(kind)) == 1
        assert sum(isinstance(fact, JobStarted) for fact in bench.kept.facts()) == ahead
        bench.acknowledge()
        bench.free()
        bench.serve()
        bench.step()
        assert code.began == [*range(ahead), ahead + 1]


def test_an_attempt_in_place_keeps_the_key_until_its_delay_is_over() -> None:
    """The delay counts from the acknowledgement of the `JobRetried`. A later job of the key waits for all attempts."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        partition = bench.partition()
        bench.take(partition, keyed(0), keyed(1))
        bench.serve()
        bench.step()
        code.end(0, ValueError("no"))
        bench.free()
        bench.advance(100.0)
        assert (bench.serve(), bench.kinds()) == (0, ["JobStarted", "JobRetried"])
        bench.acknowledge()
        bench.free()
        bench.advance(3.9)
        assert bench.serve() == 0
        woken = bench.woken
        bench.advance(0.1)
        assert bench.woken > woken, "the dispatcher must be told"
        bench.serve()
        bench.step()
        assert code.began == [0, 0]
        assert [event.attempt for event in bench.kept.events() if isinstance(event.fact, JobStarted)] == [1, 2]
        end(bench, code, 0)
        assert code.began == [0, 0, 1]


@pytest.mark.parametrize("what", ["lost", "worker stops"])
def test_an_attempt_in_place_is_the_next_owners_if_the_partition_is_given_up_meanwhile(what: str) -> None:
    """The job does not block the handover while it waits."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        partition = bench.partition()
        bench.take(partition, keyed(0))
        bench.serve()
        bench.step()
        code.end(0, ValueError("no"))
        bench.free()
        bench.acknowledge()
        bench.free()
        assert not partition.busy
        if what == "lost":
            partition.give_up()
        else:
            bench.pipe.running.accepting = False
        bench.advance(10.0)
        assert (bench.serve(), code.began, partition.backlog.count) == (0, [0], 0)
        assert partition.offsets is not None
        assert partition.offsets.watermark == 0


def test_an_attempt_that_a_former_owner_announced_waits_for_its_time_and_has_its_number() -> None:
    """The time is one of the broker's clock. Later jobs of the key wait for the attempt, jobs of other keys do not."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        partition = bench.partition()
        value = keyed(0)
        due_ms = int(bench.clock.wall() * 1000) + 3_000
        partition.prior.scanned_to = 10
        partition.prior.next_attempts[release_key(codec.decode(value).job_id, 1, 1)] = (2, due_ms, 5)
        bench.take(partition, value, keyed(1), keyed(2, "b"))
        bench.serve()
        bench.step()
        assert code.began == [2]
        bench.advance(2.9)
        assert bench.serve() == 0
        bench.advance(0.2)
        bench.serve()
        bench.step()
        assert code.began == [2, 0]
        attempts = {event.job_id: event.attempt for event in bench.kept.events()}
        assert attempts[codec.decode(value).job_id] == 2
        end(bench, code, 0)
        assert code.began == [2, 0, 1]


def test_no_waiting_job_begins_while_the_ownership_lease_is_over() -> None:
    """The worker asks the group for a confirmation. The job keeps its place."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        partition = bench.partition()
        bench.take(partition, keyed(0))
        bench.advance(3_601.0)
        assert (bench.serve(), partition.lease.wanted, partition.taking) == (0, True, False)
        partition.lease.confirm(bench.clock.now)
        assert (bench.serve(), bench.running) == (1, [0])


# -- tenants ----------------------------------------------------------------------------------------------------------


def fair_app() -> App:
    app = App("shop", queues=[Queue("default", partitions=2, fair_by="tenant")])

    @app.task
    def one(n: int = 0) -> None: ...

    @app.task
    def two(n: int = 0) -> None: ...

    return app


@given(st.lists(st.sampled_from("abcd"), max_size=30))
@settings(max_examples=40, deadline=None)
def test_tenants_take_turns(tenants: list[str]) -> None:
    """For any arrivals, each round begins one job of every tenant that has jobs, in the order of the tenants' first
    jobs. The jobs of one tenant keep their order."""
    with PartsBench(fair_app(), threads=100) as bench:
        partition = bench.partition()
        bench.take(partition, *(job("one", tags={"tenant": tenant}) for tenant in tenants))
        assert bench.running == []
        while bench.serve(1):
            pass
        rounds = [tenants[:n].count(tenant) for n, tenant in enumerate(tenants)]
        expected = sorted(range(len(tenants)), key=lambda n: (rounds[n], tenants.index(tenants[n])))
        assert bench.running == expected
        assert nothing_waits(bench, partition)


def test_a_paused_task_does_not_hold_back_the_other_jobs_of_its_tenant() -> None:
    """Each task of a tenant has its own wait queue, and they take turns, too."""
    with PartsBench(fair_app(), threads=100) as bench:
        partition = bench.partition()
        bench.pause("task", "one")
        tags = {"tenant": "a"}
        bench.take(partition, *(job(task, tags=tags) for task in ("one", "two", "one", "two")))
        bench.serve()
        assert bench.running == [1, 3]
        bench.resume()
        bench.serve()
        assert bench.running == [1, 3, 0, 2]


def test_a_job_without_the_tag_is_a_job_of_one_more_tenant() -> None:
    """Such jobs take their turn together."""
    with PartsBench(fair_app(), threads=100) as bench:
        partition = bench.partition()
        tagged = {"tenant": "a"}
        bench.take(partition, job("one", tags=tagged), job("one", tags=tagged), job("one"), job("one"))
        bench.serve()
        assert bench.running == [0, 2, 1, 3]


# -- gates ------------------------------------------------------------------------------------------------------------


def limited_app(code: HeldCode, **options: Any) -> App:
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task(key="k", timeout=30, **options)
    async def keyed(k: str, n: int = 0) -> None:
        await code.run(n)

    return app


def test_a_limit_lets_one_waiting_job_begin_for_each_job_that_ends() -> None:
    """Keys that wait for a limit begin in the order in which they waited."""
    code = HeldCode()
    with PartsBench(limited_app(code, concurrency=2)) as bench:
        partition = bench.partition()
        bench.take(partition, *(keyed(n, f"k{n}") for n in range(6)))
        bench.serve()
        bench.step()
        assert code.began == [0, 1]
        for n in range(4):
            end(bench, code, n)
            assert code.began == list(range(n + 3))
        end(bench, code, 4)
        end(bench, code, 5)
        assert bench.runtime("keyed").limiter.running == 0
        assert nothing_waits(bench, partition)


def test_a_rate_lets_the_next_job_begin_when_its_time_has_come() -> None:
    """The dispatcher is woken at that time, because no other event occurs."""
    code = HeldCode()
    with PartsBench(limited_app(code, rate="1/s")) as bench:
        bench.take(bench.partition(), *(keyed(n, f"k{n}") for n in range(3)))
        bench.serve()
        bench.step()
        assert code.began == [0]
        for n in (1, 2):
            bench.advance(0.9)
            woken = bench.woken
            bench.serve()
            bench.step()
            assert code.began == list(range(n))
            bench.advance(0.1)
            assert bench.woken > woken
            bench.serve()
            bench.step()
            assert code.began == list(range(n + 1))


def test_a_breaker_that_opens_holds_waiting_jobs_back_and_then_lets_one_try() -> None:
    """The outcomes of jobs that began before do not close it. The trial's success lets the others begin."""
    code = HeldCode()
    app = limited_app(code, breaker=Breaker(failures=1, reset=20.0), retry=Retry(max_attempts=1))
    with PartsBench(app) as bench:
        bench.take(bench.partition(), *(keyed(n, f"k{n % 4}") for n in range(6)))
        bench.serve()
        bench.step()
        assert code.began == [0, 1, 2, 3]
        end(bench, code, 0, ValueError("no"))
        end(bench, code, 1)
        assert code.began == [0, 1, 2, 3]
        bench.advance(20.0)
        bench.serve()
        bench.step()
        assert len(code.began) == 5
        end(bench, code, code.began[4])
        assert sorted(code.began) == [0, 1, 2, 3, 4, 5]


def test_a_lost_partition_passes_its_turn_at_a_gate_to_another_partition() -> None:
    """The first key that waits for the limit belongs to a partition that is given up. The other partition's key
    begins."""
    code = HeldCode()
    app = App("shop", queues=[Queue("default", partitions=2)])

    @app.task(key="k", timeout=30, concurrency=2)
    async def keyed_(k: str, n: int = 0) -> None:
        await code.run(n)

    with PartsBench(app) as bench:
        first, second = bench.partition(0), bench.partition(1)
        bench.take(first, *(job("keyed_", key=f"p{n}", k="", n=n) for n in range(3)))
        bench.take(second, job("keyed_", key="q", k="", n=3))
        bench.serve()
        bench.step()
        assert code.began == [0, 1]
        first.give_up()
        code.end(0)
        bench.free()
        bench.pipe.wait_queues.release_opened()
        woken = bench.woken
        bench.pipe.wait_queues.serve(bench.lanes.all[0], 10)
        bench.step()
        assert bench.woken > woken, "the slot is still free, so the dispatcher must look again"
        bench.serve()
        bench.step()
        assert code.began == [0, 1, 3]


# -- parked records, and how much may wait ----------------------------------------------------------------------------


def test_parked_records_become_jobs_again_in_their_turn() -> None:
    """A parked job keeps its place behind the jobs of its key and its arguments, and stays a suspect. The memory that it took
    is free again."""
    code = HeldCode()
    with PartsBench(keyed_app(code), lookahead=100) as bench:
        queues = bench.pipe.wait_queues
        partition = bench.partition()
        partition.prior.scanned_to = partition.prior.suspect_below = CROWDED + 1
        bench.take(partition, *(keyed(n) for n in range(CROWDED + 2)))
        backlog = partition.backlog
        assert (backlog.count, backlog.parked, len(partition.live)) == (CROWDED + 2, 2, CROWDED)
        assert queues.parked_bytes == backlog.parked_bytes > 2 * 300
        bench.serve()
        bench.step()
        suspects: list[bool] = []
        for n in range(CROWDED + 2):
            bench.acknowledge()
            (one,) = bench.pipe.running.jobs
            suspects.append(one.suspect)
            end(bench, code, n)
        assert code.began == list(range(CROWDED + 2))
        assert suspects == [True] * (CROWDED + 1) + [False]
        assert nothing_waits(bench, partition)


def test_a_closed_gate_leaves_parked_records_parked() -> None:
    """Otherwise each of many keys would create a job that then waits, and the memory limit would have no effect."""
    code = HeldCode()
    with PartsBench(keyed_app(code), lookahead=100) as bench:
        partition = bench.partition()
        bench.take(partition, *(keyed(n, f"k{n}") for n in range(CROWDED + 20)))
        bench.pause("task", "keyed")
        assert (bench.serve(), partition.backlog.parked, len(partition.live)) == (0, 20, CROWDED)
        bench.resume()
        bench.serve()
        bench.step()
        assert (partition.backlog.parked, len(code.began)) == (0, CROWDED + 20)


def waiting(bench: PartsBench, partition: Partition, count: int, parked: int = 0, size: int = 0) -> None:
    """Let the partition look as if ``count`` jobs waited, ``parked`` of them as records of ``size`` bytes in all."""
    backlog = partition.backlog
    bench.pipe.wait_queues.parked_bytes += size - backlog.parked_bytes
    backlog.count, backlog.parked, backlog.parked_bytes = count, parked, size


def test_partitions_share_the_lookahead() -> None:
    """Each partition has an equal part of it, but never less than a hundred jobs."""
    code = HeldCode()
    with PartsBench(keyed_app(code), lookahead=1_000) as bench:
        queues = bench.pipe.wait_queues
        windows = []
        for owned in (0, 1, 2, 5, 10, 50):
            queues.owned = owned
            windows.append(queues.window)
        assert windows == [1_000, 1_000, 500, 200, 100, 100]


@given(st.integers(0, 1_300), st.integers(0, 1_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_full_partition_takes_records_again_when_a_quarter_of_its_space_is_free(
    jobs: int, parked: int, full: bool
) -> None:
    """Parked records do not count against the jobs that may wait: they have their own limit of bytes."""
    with PartsBench(keyed_app(HeldCode()), lookahead=1_000) as bench:
        partition = bench.partition()
        queues = bench.pipe.wait_queues
        waiting(bench, partition, jobs + parked, parked)
        partition.backlog.full = full
        assert queues.room(partition) == (jobs < (750 if full else 1_000))
        assert queues.half_full(partition) == (jobs >= 500)
        assert queues.crowded(partition) == (jobs >= 250)


@pytest.mark.parametrize(
    ("own", "others", "full", "room", "half_full"),
    [
        (400, 0, False, True, False),
        (499, 2_000, False, True, True),  # the others take more than their part, and that does not matter here
        (500, 499, False, True, True),  # it may use what the others do not use
        (500, 500, False, False, True),
        (250, 0, False, True, False),
        (249, 751, False, True, False),
        (400, 600, True, False, True),
        (374, 626, True, True, True),
        (749, 0, True, True, True),
        (750, 0, True, False, True),
    ],
)
def test_a_partition_may_use_its_part_of_the_bytes_and_what_others_leave(
    own: int, others: int, full: bool, room: bool, half_full: bool
) -> None:
    """Two partitions share 1,000 bytes for parked records."""
    with PartsBench(keyed_app(HeldCode()), lookahead_bytes=1_000) as bench:
        first, second = bench.partition(0), bench.partition(1)
        waiting(bench, first, 1, 1, own)
        waiting(bench, second, 1, 1, others)
        first.backlog.full = full
        queues = bench.pipe.wait_queues
        assert (queues.room(first), queues.half_full(first)) == (room, half_full)


def plain_app(*tasks: str, **options: Any) -> App:
    app = App("shop", queues=[Queue("default", partitions=1)])
    for name in tasks:

        @app.task(name=name, **options)
        def task(n: int = 0) -> None: ...

    return app


def test_jobs_at_a_closed_gate_are_snoozed_when_half_of_the_space_is_used() -> None:
    """The snooze names the gate, and is longer for jobs that have more jobs before them. A suspect waits, because its
    next release would not be a suspect."""
    with PartsBench(plain_app("slow", rate="1/s"), lookahead=100) as bench:
        partition = bench.partition()
        bench.take(partition, job("slow"))
        bench.serve()
        bench.take(partition, *(job("slow") for _ in range(50)))
        assert (partition.backlog.count, bench.facts(JobSnoozed)) == (50, [])
        bench.take(partition, job("slow"))
        (snoozed,) = bench.facts(JobSnoozed)
        assert "slow: 1 a second" in snoozed.reason
        assert 50_000 <= snoozed.delay_ms <= 60_000, "50 jobs are before it, and a fifth of that is random"
        partition.prior.scanned_to = partition.prior.suspect_below = 1_000
        bench.take(partition, job("slow"))
        assert (partition.backlog.count, len(bench.facts(JobSnoozed))) == (51, 1)


def test_room_is_made_at_the_end_of_the_longest_wait_queue() -> None:
    """The newest jobs of the task with the most waiting jobs are snoozed, at most 64 at once, and its first job
    stays."""
    with PartsBench(plain_app("few", "many", concurrency=1), lookahead=10_000) as bench:
        partition = bench.partition()
        bench.pause("task", "few")
        bench.pause("task", "many")
        bench.take(partition, *(job("few") for _ in range(3)), *(job("many") for _ in range(70)))
        bench.serve()
        queues = partition.backlog.wait_queues
        bench.pipe.wait_queues.make_room(partition)
        assert [len(queues["task", task].works) for task in ("few", "many")] == [3, 6]
        assert [one.offset for one in queues["task", "many"].works] == list(range(3, 9))
        bench.pipe.wait_queues.make_room(partition)
        assert [len(queues["task", task].works) for task in ("few", "many")] == [3, 1]
        bench.pipe.wait_queues.make_room(partition)
        assert [len(queues["task", task].works) for task in ("few", "many")] == [1, 1]
        bench.pipe.wait_queues.make_room(partition)
        assert partition.backlog.count == 2
        assert len(bench.facts(JobSnoozed)) == 71
        bench.acknowledge()
        assert sorted(partition.live) == [0, 3]


def test_no_room_is_made_among_the_jobs_of_keys() -> None:
    """A snoozed job would lose its place behind the other jobs of its key."""
    code = HeldCode()
    with PartsBench(keyed_app(code)) as bench:
        partition = bench.partition()
        bench.pause("task", "keyed")
        bench.take(partition, *(keyed(n) for n in range(10)))
        bench.serve()
        bench.pipe.wait_queues.make_room(partition)
        assert (partition.backlog.count, bench.kinds()) == (10, [])


# -- lost partitions --------------------------------------------------------------------------------------------------


def test_a_lost_partition_leaves_nothing_behind() -> None:
    """Its jobs wait at a gate, for an acknowledgement and as parked records. The jobs of the other partition are not
    affected."""
    code = HeldCode()
    with PartsBench(keyed_app(code), lookahead=100) as bench:
        queues = bench.pipe.wait_queues
        first, second = bench.partition(0), bench.partition(1)
        bench.take(first, keyed(100, "z"))
        bench.serve()
        bench.step()
        code.end(100)
        bench.free()
        assert len(queues.awaiting_acknowledgement) == 1
        bench.pause("task", "keyed")
        bench.take(first, *(keyed(n) for n in range(CROWDED + 10)))
        bench.take(second, *(keyed(200 + n) for n in range(CROWDED + 5)))
        bench.serve()
        parked_of_second = second.backlog.parked_bytes
        assert queues.parked_bytes > parked_of_second > 0
        sent = len(bench.kept.sent)
        first.give_up()
        queues.forget({first})
        bench.lanes.all[0].forget({first})
        assert (queues.parked_bytes, queues.awaiting_acknowledgement) == (parked_of_second, {})
        assert (first.backlog.count, first.backlog.parked, first.backlog.parked_bytes) == (0, 0, 0)
        bench.resume()
        bench.serve()
        bench.step()
        for n in range(CROWDED + 5):
            assert code.began == [100, *range(200, 201 + n)]
            end(bench, code, 200 + n)
        assert nothing_waits(bench, second)
        settled = [event.fact for event in bench.kept.events()[sent:] if settles(event.fact)]
        assert len(settled) == CROWDED + 5, "nothing is recorded for the jobs of the lost partition"


def test_a_worker_that_stops_forgets_the_jobs_that_wait() -> None:
    """They have no outcome and are not live, so the handover does not wait for them, and the next owner runs them. The
    running job stays."""
    code = HeldCode()
    with PartsBench(keyed_app(code), lookahead=100) as bench:
        partition = bench.partition()
        bench.take(partition, *(keyed(n) for n in range(CROWDED + 5)))
        bench.serve()
        bench.step()
        bench.pipe.running.accepting = False
        bench.pipe.wait_queues.drop_waiting()
        assert (list(partition.live), bench.kinds()) == ([0], ["JobStarted"])
        assert (partition.backlog.count, partition.backlog.parked_bytes, bench.pipe.wait_queues.parked_bytes) == (
            0,
            0,
            0,
        )
        end(bench, code, 0)
        assert code.began == [0]
        assert partition.offsets is not None
        assert (partition.offsets.watermark, partition.offsets.pending) == (1, CROWDED + 4)
