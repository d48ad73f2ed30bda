"""Where a job's code runs, what becomes of a job whose process died, and how running code is ended. No Kafka, no thread
and no child process: functions stay in the executor's queue, and `FreeChildren` keeps the jobs for children."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import Any

import pytest

from jobledger import App, Breaker, Queue
from jobledger.consumers.running.placement import AGAIN_S, CRASHES, SUSPECTS, UNSEEN_CRASHES
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.outcome import Cancelled, Failed, Succeeded
from jobledger.consumers.state.reports import Asked
from jobledger.consumers.state.work import JobRun, Partition
from jobledger.definitions.retry import Retry
from jobledger.errors import ConfigError, TaskTimedOut
from jobledger.schemas import codec
from jobledger.schemas.events import (
    ErrorInfo,
    JobCancelledFact,
    JobFailedFact,
    JobRetried,
    JobStarted,
    JobSucceeded,
    LeaseRenewed,
)
from tests.pipe_bench import FreeChildren, HeldCode, PartsBench, job

KILLED = ErrorInfo("ProcessDied", "signal 9")


def shop(code: HeldCode | None = None, **options: Any) -> App:
    """Return an app with a coroutine, a function and an isolated function. ``options``: options of all three."""
    app, held = App("shop", queues=[Queue("default", partitions=2)]), code or HeldCode()

    @app.task(**options)
    async def coroutine(n: int = 0) -> None:
        await held.run(n)

    @app.task(**options)
    def function(n: int = 0) -> None: ...

    @app.task(isolation="process", **options)
    def isolated(n: int = 0) -> None: ...

    return app


class Given:
    """Keeps the jobs that placement passes to the threads and to children."""

    def __init__(self, bench: PartsBench, patch: pytest.MonkeyPatch, *, children: bool = True) -> None:
        self.threads: list[JobRun] = []
        patch.setattr(bench.pipe.executor, "submit", self.threads.append)
        self.children = FreeChildren(bench.pipe.placement) if children else None

    def free_child(self) -> list[JobRun]:
        """Make a child free, and return all jobs that children have."""
        assert self.children is not None
        self.children.free()
        return self.children.given


def begin(bench: PartsBench, partition: Partition, task: str, *, suspect: bool = False, starts: int = 0) -> JobRun:
    """Begin a job. ``suspect``: a former owner may have begun it; ``starts``: how often, by the log."""
    assert partition.offsets is not None
    offset = partition.offsets.end
    value = job(task, n=offset)
    if suspect:
        partition.prior.scanned_to = partition.prior.suspect_below = offset + 1
    if starts:
        partition.prior.starts[release_key(codec.decode(value).job_id, 1, 1)] = starts
    bench.take(partition, value)
    return partition.live[offset]


def lose(partition: Partition) -> None:
    """Let another worker have the partition."""
    partition.gone = True
    partition.give_up()


# -- where code runs --------------------------------------------------------------------------------------------------


def test_a_coroutine_runs_on_the_loop_in_a_context_of_its_own() -> None:
    """A context variable that one job sets is not visible to the next one. The start is sent before the code runs."""
    app, seen = App("shop", queues=[Queue("default", partitions=1)]), list[Any]()
    var = contextvars.ContextVar("var", default="none")

    @app.task
    async def sets(n: int = 0) -> None:
        seen.append((var.get(), len(bench.facts(JobStarted))))
        var.set(f"job {n}")

    with PartsBench(app) as bench:
        partition = bench.partition()
        bench.take(partition, job("sets", n=0), job("sets", n=1))
        assert (seen, bench.kinds()) == ([], ["JobStarted", "JobStarted"])
        bench.step()
        assert seen == [("none", 2), ("none", 2)]
        assert len(bench.facts(JobSucceeded)) == 2
        assert len(bench.free()) == 2


def test_a_function_waits_for_a_thread_and_is_interrupted_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts from the start in this worker. A job that has ended is not interrupted."""
    late: list[JobRun] = []
    with PartsBench(shop(timeout=10)) as bench:
        monkeypatch.setattr(bench.pipe.executor, "late", late.append)
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        first, second = (begin(bench, partition, "function") for _ in range(2))
        assert given.threads == [first, second]
        bench.advance(9.9)
        bench.succeed(second)
        assert late == []
        bench.advance(0.2)
        assert late == [first]


def test_an_isolated_job_runs_when_a_child_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loop nor a thread gets the job."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        work = begin(bench, partition, "isolated")
        bench.step()
        assert given.children is not None
        assert (given.children.given, given.threads, bench.pipe.tasks.children.running) == ([], [], 1)
        assert given.free_child() == [work]
        bench.pipe.placement.outcome_reported(work, Succeeded(b"7"))
        bench.free()
        assert [fact.result for fact in bench.facts(JobSucceeded)] == [b"7"]
        assert bench.pipe.tasks.children.running == 0


@pytest.mark.parametrize("task", ["coroutine", "function", "isolated"])
@pytest.mark.parametrize(
    ("starts", "slots"), [(0, "suspects"), (2, "suspects"), (3, "one at a time"), (9, "one at a time")]
)
def test_a_suspect_runs_in_a_child_and_alone_after_three_starts(
    monkeypatch: pytest.MonkeyPatch, task: str, starts: int, slots: str
) -> None:
    """Its start is acknowledged before, so that the next owner finds the start."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        work = begin(bench, bench.partition(), task, suspect=True, starts=starts)
        assert work.slots is bench.pipe.placement.slots_by_name[slots]
        assert [fact.takeover for fact in bench.facts(JobStarted)] == [starts]
        bench.step()
        assert given.free_child() == []
        bench.acknowledge()
        assert (given.free_child(), given.threads) == ([work], [])
        assert not work.waiting


def test_a_limited_number_of_suspects_run_at_once_and_only_one_with_three_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the system killed a worker and its children for lack of memory, all of their jobs would count as possible
    causes."""
    with PartsBench(shop(), concurrency=100) as bench:
        Given(bench, monkeypatch)
        partition = bench.partition()
        for _ in range(SUSPECTS + 2):
            begin(bench, partition, "coroutine", suspect=True)
        for _ in range(2):
            begin(bench, partition, "coroutine", suspect=True, starts=3)
        running = [*range(SUSPECTS), SUSPECTS + 2]
        assert bench.running == running
        waiting = bench.lanes.all[0].waiting
        assert {name: [one.offset for one in works] for name, works in waiting.items()} == {
            "suspects": [SUSPECTS, SUSPECTS + 1],
            "one at a time": [SUSPECTS + 3],
        }


@pytest.mark.parametrize("task", ["coroutine", "function"])
def test_a_suspect_runs_at_its_usual_place_if_child_processes_are_not_available(
    monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Also then its start is acknowledged before its code runs."""
    code = HeldCode()
    with PartsBench(shop(code)) as bench:
        given = Given(bench, monkeypatch, children=False)
        work = begin(bench, bench.partition(), task, suspect=True)
        bench.step()
        assert (given.threads, code.began, work.waiting) == ([], [], True)
        bench.acknowledge()
        assert (given.threads, code.began) == (([], [0]) if task == "coroutine" else ([work], []))
        assert not work.waiting


def test_a_suspect_whose_partition_is_given_up_before_its_start_is_acknowledged_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next owner runs the suspect and finds its start. Nothing else is recorded, the slot is free, and the circuit
    breaker does not take the job for a success."""
    with PartsBench(shop(breaker=Breaker(failures=2))) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        breaker = bench.runtime("coroutine").breaker
        assert breaker is not None
        breaker.end(bench.clock.now, 0.0, False, 0.0)
        work = begin(bench, partition, "coroutine", suspect=True)
        partition.give_up()
        bench.acknowledge()
        assert given.free_child() == []
        assert (bench.free(), bench.kinds(), bench.running) == ([work], ["JobStarted"], [])
        assert bench.pipe.placement.slots_by_name["suspects"].running == 0
        breaker.end(bench.clock.now, 0.0, False, 0.0)
        assert breaker.is_open, "two failures in a row, with nothing between them"


# -- deaths -----------------------------------------------------------------------------------------------------------


def test_a_job_fails_as_crashed_after_three_starts_or_after_ten_that_no_worker_saw_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With child processes, a worker sees whether it was the job's process that died. Without them three starts must be
    enough."""
    with PartsBench(shop()) as bench:
        crashed = bench.pipe.placement.crashed
        assert [crashed(n) is None for n in (0, CRASHES - 1, CRASHES)] == [True, True, False]
        given = Given(bench, monkeypatch)
        assert [crashed(n) is None for n in (CRASHES, UNSEEN_CRASHES - 1, UNSEEN_CRASHES)] == [True, True, False]
        failed = crashed(UNSEEN_CRASHES)
        assert isinstance(failed, Failed)
        assert (failed.reason, "started 10 times" in failed.error.message) == ("crashed", True)
        assert given.children is not None
        given.children.pool.start_error = ConfigError("no fork server")
        assert isinstance(crashed(CRASHES), Failed)


def die(bench: PartsBench, work: JobRun, *, blamed: bool = True) -> None:
    """Report that the job's child process died, and take the report. ``blamed``: the job may be the cause."""
    bench.pipe.placement.died(work, KILLED, blamed)
    bench.step()


def test_a_job_whose_process_died_is_started_again_and_fails_after_the_third_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each new start counts the starts before it, and is acknowledged before the code runs. The failure names how the
    process ended."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        work = begin(bench, bench.partition(), "isolated")
        assert given.free_child() == [work]
        for deaths in (1, 2):
            die(bench, work)
            assert [fact.takeover for fact in bench.facts(JobStarted)] == list(range(deaths + 1))
            assert len(given.free_child()) == deaths, "not before the start is acknowledged"
            bench.acknowledge()
            assert len(given.free_child()) == deaths + 1
        die(bench, work)
        (failed,) = bench.facts(JobFailedFact)
        assert (failed.reason, failed.error) == ("crashed", KILLED)
        assert len(bench.facts(JobStarted)) == 3
        assert bench.free() == [work]
        assert bench.pipe.tasks.children.running == 0


def test_a_death_that_is_not_the_jobs_fault_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example the fork server died, and its children with it."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        work = begin(bench, bench.partition(), "isolated")
        given.free_child()
        for _ in range(5):
            die(bench, work, blamed=False)
            bench.acknowledge()
            given.free_child()
        assert [fact.takeover for fact in bench.facts(JobStarted)] == [0] * 6
        assert bench.facts(JobFailedFact) == []


@pytest.mark.parametrize("what", ["cancelled", "given up", "partition lost", "worker stops"])
def test_a_job_that_is_no_longer_wanted_is_not_started_again_when_its_process_dies(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A cancelled job is closed as cancelled. The other jobs get no outcome here."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        work = begin(bench, partition, "isolated")
        given.free_child()
        if what == "cancelled":
            work.stop_outcome = Cancelled("me", None)
        elif what == "given up":
            work.abandoned = True
        elif what == "partition lost":
            lose(partition)
        else:
            bench.pipe.running.accepting = False
        die(bench, work)
        assert bench.free() == [work]
        assert len(bench.facts(JobStarted)) == 1
        assert len(bench.facts(JobCancelledFact)) == (what == "cancelled")
        assert len(bench.kept.sent) == 1 + (what == "cancelled")


def test_a_suspect_moves_to_its_usual_place_when_no_child_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of the suspects is free again, and a thread counts the job."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        assert given.children is not None
        partition = bench.partition()
        work = begin(bench, partition, "function", suspect=True)
        suspects = bench.pipe.placement.slots_by_name["suspects"]
        assert (suspects.running, bench.pipe.tasks.threads.running) == (1, 0)
        given.children.pool.start_error = ConfigError("no fork server")
        bench.acknowledge()
        assert (suspects.running, bench.pipe.tasks.threads.running) == (0, 1)
        bench.acknowledge()
        assert given.threads == [work]
        bench.succeed(work)
        assert bench.pipe.tasks.threads.running == 0


def test_an_isolated_job_is_left_to_its_next_owner_when_no_child_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its code never runs on the loop or in a thread. Its start stays in the log."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        assert given.children is not None
        partition = bench.partition()
        given.children.pool.start_error = ConfigError("no fork server")
        work = begin(bench, partition, "isolated")
        bench.step()
        assert (bench.free(), given.threads, bench.kinds()) == ([work], [], ["JobStarted"])
        assert partition.offsets is not None
        assert partition.offsets.watermark == 0


# -- begun, but not certainly this worker's ---------------------------------------------------------------------------


@pytest.mark.parametrize("confirmed", [True, False])
def test_code_that_did_not_begin_before_a_pause_begins_when_the_group_has_confirmed_the_partition(
    confirmed: bool,
) -> None:
    """The executor asks, and the job is begun later. If another worker has the partition, the job is dropped."""
    code = HeldCode()
    with PartsBench(shop(code)) as bench:
        partition = bench.partition()
        work = begin(bench, partition, "coroutine")
        bench.clock.now += 3_601.0
        bench.step()
        assert (code.began, list(bench.reports.asked)) == ([], [(Asked.UNCERTAIN, work)])
        bench.pipe.placement.begin_later(work)
        bench.advance(AGAIN_S)
        assert (code.began, partition.lease.wanted, bench.running) == ([], True, [0])
        if confirmed:
            partition.lease.confirm(bench.clock.now)
        else:
            lose(partition)
        bench.advance(AGAIN_S)
        assert code.began == [0] * confirmed
        assert len(bench.facts(JobStarted)) == 1
        if confirmed:
            code.end(0)
            bench.step()
            (fact,) = bench.facts(JobSucceeded)
            assert fact.duration_us < 1_000_000, "the pause is no running time"
        assert bench.free() == [work]
        assert len(bench.facts(JobSucceeded)) == confirmed


def test_the_time_limit_of_a_function_that_begins_later_counts_from_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that fired during the pause does not end the function."""
    late: list[JobRun] = []
    with PartsBench(shop(timeout=10)) as bench:
        monkeypatch.setattr(bench.pipe.executor, "late", late.append)
        given = Given(bench, monkeypatch)
        work = begin(bench, bench.partition(), "function")
        bench.advance(8.0)
        work.interrupted = TaskTimedOut
        bench.pipe.placement.begin_later(work)
        assert given.threads == [work, work]
        assert [work.interrupted] == [None]
        bench.advance(8.0)
        assert late == []
        bench.advance(2.0)
        assert late == [work]


@pytest.mark.parametrize("over", [False, True])
def test_a_long_job_begins_later_only_while_its_job_lease_is_valid(monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """Its partition does not matter. If the lease is over, the lease is given back, so that another worker can begin
    the job at once."""
    with PartsBench(shop(timeout=600, lease=30)) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        work = begin(bench, partition, "function")
        lose(partition)
        bench.clock.now += 31.0 if over else 29.0
        bench.pipe.placement.begin_later(work)
        assert given.threads == ([] if over else [work])
        assert [fact.lease_ms for fact in bench.facts(LeaseRenewed)] == [0] * over
        assert bench.free() == [work] * over


def test_a_job_that_was_cancelled_while_it_waited_is_closed_and_does_not_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same holds for a job that waits for a child process."""
    with PartsBench(shop()) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        first, second = begin(bench, partition, "function"), begin(bench, partition, "coroutine", suspect=True)
        for work in (first, second):
            work.stop_outcome = Cancelled("me", "wrong list")
        bench.pipe.placement.begin_later(first)
        bench.acknowledge()
        given.free_child()
        assert bench.facts(JobCancelledFact) == [JobCancelledFact("me", "wrong list")] * 2
        assert bench.free() == [first, second]
        assert (given.threads, given.children and given.children.given) == ([first], [])


# -- ending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["before its first step", "while it runs"])
def test_a_stopped_coroutine_ends_with_the_outcome_of_the_stop(step: str) -> None:
    """Also a coroutine that has not run its first step reports its end, so that its slot becomes free."""
    code = HeldCode()
    with PartsBench(shop(code)) as bench:
        work = begin(bench, bench.partition(), "coroutine")
        if step == "while it runs":
            bench.step()
        bench.pipe.placement.stop(work, Cancelled("me", "wrong list"))
        assert bench.free() == [work]
        assert bench.facts(JobCancelledFact) == [JobCancelledFact("me", "wrong list")]
        assert bench.facts(JobSucceeded) == []


def test_a_coroutine_that_returns_although_it_was_stopped_has_succeeded() -> None:
    """Its work is done, and the record says so."""
    app = App("shop", queues=[Queue("default", partitions=1)])

    @app.task
    async def stubborn(n: int = 0) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "done"

    with PartsBench(app) as bench:
        work = begin(bench, bench.partition(), "stubborn")
        bench.step()
        bench.pipe.placement.stop(work, Cancelled("me", None))
        assert bench.free() == [work]
        assert [fact.result for fact in bench.facts(JobSucceeded)] == [b'"done"']
        assert bench.facts(JobCancelledFact) == []


def test_code_that_is_given_up_ends_without_an_outcome() -> None:
    """The job's lease is over, so another worker may run the job: an exception of the code does not count here."""
    code = HeldCode()
    with PartsBench(shop(code, timeout=600, lease=30)) as bench:
        work = begin(bench, bench.partition(), "coroutine")
        bench.acknowledge()
        while bench.reports.asked:
            bench.reports.asked.popleft()
        assert bench.pipe.leases.grant(work)
        bench.pipe.placement.begin_code(work, 0)
        bench.step()
        assert code.began == [0]
        bench.pipe.leases.give_back(work)
        sent = len(bench.kept.sent)
        bench.pipe.placement.give_up(work)
        assert bench.free() == [work]
        assert bench.kinds()[sent:] == []


@pytest.mark.parametrize("how", ["stop", "give up"])
def test_a_job_that_waits_for_a_child_leaves_the_queue_when_it_is_ended(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A child that becomes free afterwards gets the next job. Only a cancelled job has an outcome."""
    with PartsBench(shop(), children=2) as bench:
        given = Given(bench, monkeypatch)
        partition = bench.partition()
        first, second = (begin(bench, partition, "isolated") for _ in range(2))
        if how == "stop":
            bench.pipe.placement.stop(first, Cancelled("me", None))
        else:
            first.abandoned = True
            bench.pipe.placement.give_up(first)
        assert bench.free() == [first]
        assert len(bench.facts(JobCancelledFact)) == (how == "stop")
        assert given.free_child() == [second]


@pytest.mark.parametrize(
    ("why", "kind"),
    [("timeout", JobRetried), ("memory", JobRetried), ("stop", None)],
    ids=["timeout", "memory", "stop"],
)
def test_a_job_whose_process_this_worker_killed_is_judged_by_the_reason(
    monkeypatch: pytest.MonkeyPatch, why: str, kind: type | None
) -> None:
    """A time limit and a memory limit are failures of the attempt. A job that was stopped without an outcome has none,
    and the next owner runs it."""
    with PartsBench(shop(retry=Retry(max_attempts=2))) as bench:
        given = Given(bench, monkeypatch)
        work = begin(bench, bench.partition(), "isolated")
        given.free_child()
        error = {"timeout": TimeoutError("too long"), "memory": MemoryError("too much")}.get(
            why, ChildProcessError("x")
        )
        bench.pipe.placement.ended(work, why, error)
        assert bench.free() == [work]
        assert [type(fact) for fact in bench.kept.facts()[1:]] == ([] if kind is None else [kind])


def test_the_jobs_of_a_lost_partition_do_not_wait_for_a_child_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their slots are free at once. The jobs of the other partition keep their place."""
    with PartsBench(shop(), children=3) as bench:
        given = Given(bench, monkeypatch)
        lost, kept = bench.partition(0), bench.partition(1)
        first, second, third = (begin(bench, where, "isolated") for where in (lost, kept, lost))
        lose(lost)
        bench.pipe.placement.sweep()
        assert (bench.free(), bench.pipe.tasks.children.running) == ([first, third], 1)
        assert given.free_child() == [second]
        assert bench.kinds() == ["JobStarted"] * 3
