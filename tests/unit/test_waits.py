"""How long a job waited in the worker before its start, by cause, as its `JobStarted` says. No Kafka and no thread: the
test moves the clock, ends the code of jobs and acknowledges records."""

from __future__ import annotations

from typing import Any

import msgspec

from jobledger import App, Breaker, Queue, Retry
from jobledger.consumers.state.work import Partition
from jobledger.schemas import codec
from jobledger.schemas.events import JobStarted
from tests.pipe_bench import HeldCode, PartsBench, job


def app_of(code: HeldCode, queue: Queue | None = None, **options: Any) -> App:
    """Return an app with a keyed coroutine, a plain one and a function that runs in a thread. ``options``: options of
    the plain coroutine."""
    app = App("shop", queues=[queue or Queue("default", partitions=1)])

    @app.task(key="k", timeout=30, retry=Retry(max_attempts=2, initial=4.0, jitter=False))
    async def keyed(k: str, n: int = 0) -> None:
        await code.run(n)

    @app.task(**options)
    async def plain(n: int = 0) -> None:
        await code.run(n)

    @app.task
    def threaded(n: int = 0) -> None: ...

    return app


def waits(bench: PartsBench) -> list[dict[str, int]]:
    """Return the waits of all starts, in order."""
    return [event.fact.waits for event in bench.kept.events() if isinstance(event.fact, JobStarted)]


def pass_turn(bench: PartsBench) -> None:
    """Acknowledge all records, and begin what may begin."""
    bench.free()
    bench.acknowledge()
    bench.free()
    bench.serve()
    bench.step()


def ended(bench: PartsBench, code: HeldCode, n: int, error: BaseException | None = None) -> None:
    """End the code of job ``n``, and begin what may begin."""
    code.end(n, error)
    pass_turn(bench)


def test_a_job_that_starts_at_once_waited_for_nothing() -> None:
    """Its start has no waits."""
    code = HeldCode()
    with PartsBench(app_of(code)) as bench:
        bench.take(bench.partition(), job("plain", n=0), job("keyed", key="a", k="a", n=1), job("threaded", n=2))
        pass_turn(bench)
        assert waits(bench) == [{}, {}, {}]


def test_the_time_behind_the_jobs_of_the_same_key_counts_for_the_key() -> None:
    """The second job of a key waited until the first one had ended."""
    code = HeldCode()
    with PartsBench(app_of(code)) as bench:
        bench.take(bench.partition(), *(job("keyed", key="a", k="a", n=n) for n in range(2)))
        pass_turn(bench)
        bench.advance(2.5)
        ended(bench, code, 0)
        assert waits(bench) == [{}, {"key": 2500}]


def test_an_attempt_in_place_counts_only_its_own_waits() -> None:
    """The second attempt of a keyed job waited for its backoff, which the log shows, and not again for the job before
    it."""
    code = HeldCode()
    with PartsBench(app_of(code)) as bench:
        bench.take(bench.partition(), *(job("keyed", key="a", k="a", n=n) for n in range(2)))
        pass_turn(bench)
        bench.advance(1.0)
        ended(bench, code, 0)
        ended(bench, code, 1, ValueError("again"))
        bench.advance(60.0)
        pass_turn(bench)
        assert waits(bench) == [{}, {"key": 1000}, {}]


def test_the_time_at_a_limit_counts_for_the_limit() -> None:
    """One job at once: the other two wait, the second of them also behind the first."""
    code = HeldCode()
    with PartsBench(app_of(code, concurrency=1)) as bench:
        bench.take(bench.partition(), *(job("plain", n=n) for n in range(3)))
        pass_turn(bench)
        for n in range(2):
            bench.advance(3.0)
            ended(bench, code, n)
        assert waits(bench) == [{}, {"limit": 3000}, {"limit": 6000}]


def test_the_time_in_a_pause_counts_for_the_pause() -> None:
    """The pause began while the job waited for the job before it; since then it counts."""
    code = HeldCode()
    with PartsBench(app_of(code, concurrency=1)) as bench:
        bench.take(bench.partition(), *(job("plain", n=n) for n in range(2)))
        pass_turn(bench)
        bench.pause("task", "plain")
        ended(bench, code, 0)
        bench.advance(7.0)
        bench.resume()
        pass_turn(bench)
        assert waits(bench) == [{}, {"pause": 7000}]


def test_the_time_at_an_open_circuit_counts_for_the_circuit() -> None:
    """The service failed once; after the reset the next job may try."""
    code = HeldCode()
    with PartsBench(app_of(code, breaker=Breaker(failures=1, reset=20.0))) as bench:
        partition = bench.partition()
        bench.take(partition, job("plain", n=0))
        pass_turn(bench)
        ended(bench, code, 0, ValueError("no"))
        bench.take(partition, job("plain", n=1))
        pass_turn(bench)
        bench.advance(21.0)
        pass_turn(bench)
        assert waits(bench) == [{}, {"circuit": 21000}]


def test_the_time_without_a_free_thread_counts_for_the_slots() -> None:
    """One thread: the second job waits for it."""
    with PartsBench(app_of(HeldCode()), threads=1) as bench:
        partition: Partition = bench.partition()
        bench.take(partition, *(job("threaded", n=n) for n in range(2)))
        bench.advance(4.0)
        bench.succeed(partition.live[0])
        assert bench.pipe.slot_queues.start() == 1
        assert waits(bench) == [{}, {"slots": 4000}]


def test_a_parked_record_has_waited_since_it_was_parked() -> None:
    """Of jobs far back in their key's wait queue only the records are kept; their waits are complete all the same."""
    code = HeldCode()
    with PartsBench(app_of(code), lookahead=100) as bench:
        partition = bench.partition()
        bench.take(partition, *(job("keyed", key="a", k="a", n=n) for n in range(60)))
        pass_turn(bench)
        assert partition.backlog.parked > 0
        for n in range(59):
            bench.advance(1.0)
            ended(bench, code, n)
        assert [each.get("key", 0) for each in waits(bench)] == [n * 1000 for n in range(60)]


def test_the_time_until_the_tenants_turn_counts_for_the_tenant() -> None:
    """A record of a fair queue waits in the wait queue of its tenant."""
    code = HeldCode()
    with PartsBench(app_of(code, Queue("default", partitions=1, fair_by="tenant"))) as bench:
        bench.take(bench.partition(), job("plain", tags={"tenant": "a"}, n=0))
        bench.advance(2.0)
        pass_turn(bench)
        assert waits(bench) == [{"tenant": 2000}]


def test_waits_below_a_millisecond_are_not_noted_and_others_are_added_up() -> None:
    """The dict of a job that did not wait is shared by all jobs, and never changed."""
    with PartsBench(app_of(HeldCode())) as bench:
        partition = bench.partition()
        bench.take(partition, job("threaded", n=0), job("threaded", n=1))
        one, other = partition.live[0], partition.live[1]
        one.waited("key", 0.0009)
        assert one.waits is other.waits
        one.waited("key", 1.5)
        one.waited("slots", 0.25)
        one.waited("key", 0.5)
        assert (one.waits, other.waits) == ({"key": 2000, "slots": 250}, {})


def test_the_waits_are_in_the_record_of_the_start() -> None:
    """The encoded event has them as the decoder reads them."""
    started = JobStarted("host:1", "7", {"key": 12, "slots": 2**40}, "shop.jobs.mail", 5, 1)
    with PartsBench(app_of(HeldCode())) as bench:
        bench.take(bench.partition(), job("plain", n=0))
        event = next(event for event in bench.kept.events() if isinstance(event.fact, JobStarted))
        changed = msgspec.structs.replace(event, fact=started)
        assert codec.decode(codec.encode(changed)).fact == started
