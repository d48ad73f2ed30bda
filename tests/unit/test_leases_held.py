"""The worker's side of job leases when an error occurs, with the `Bench` of `tests.pipe_bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError

from jobledger import App
from jobledger.consumers.running.job_leases import TICK_S, JobLeases
from jobledger.consumers.state.work import JobRun
from jobledger.errors import BrokerUnavailable
from tests.pipe_bench import Bench, job, put, run, until


def breaks(*args: object) -> None:
    raise ZeroDivisionError("here")


def full(*args: object) -> None:
    raise BrokerUnavailable("the send queue stayed full")


def grant(leases: JobLeases, work: JobRun) -> None:
    """Acknowledge both records of the lease."""
    assert work.lease is not None
    work.lease.acknowledged(work)


def let_go(leases: JobLeases, work: JobRun) -> None:
    """Let the lease end without a renewal; the next check notices that."""
    assert work.lease is not None
    work.lease.granted, work.lease.until = True, 0.0


def close_again(leases: JobLeases, work: JobRun) -> None:
    """Report that the outcome was not delivered, so that it is sent again."""
    leases._outcome_delivered(work, b"", KafkaError(KafkaError._MSG_TIMED_OUT), cast(Any, None))


def close_after(leases: JobLeases, work: JobRun) -> None:
    """Send the outcome, as after the acknowledgement of the records before it."""
    leases._calls.call(leases._send_to_coordinator, work, b"")


@pytest.mark.parametrize(
    ("how", "begin", "give_up", "send", "expected"),
    [
        (grant, breaks, None, None, "a function on the worker's event loop failed: ZeroDivisionError('here')"),
        (let_go, None, breaks, None, "a function on the worker's event loop failed: ZeroDivisionError('here')"),
        (close_again, None, None, full, "the send queue stayed full"),
        (close_after, None, None, full, "the send queue stayed full"),
    ],
)
def test_an_error_that_would_lose_a_leased_job_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[JobLeases, JobRun], None],
    begin: Callable[..., None] | None,
    give_up: Callable[..., None] | None,
    send: Callable[..., None] | None,
    expected: str,
) -> None:
    """Otherwise the event loop would only log the error, and the job would be leased forever without running."""
    app = App("shop")

    @app.task(long=True)
    async def slow() -> None: ...

    async def test() -> None:
        bench = Bench(app)
        leases, places = bench.leases, bench.dispatcher.placement
        if begin is not None:
            monkeypatch.setattr(places, "begin_code", begin)
        if give_up is not None:
            monkeypatch.setattr(places, "give_up", give_up)
        partition = bench.partition()
        put(partition, [job("slow")])
        bench.dispatcher.wake()
        await until(lambda: leases.count)
        (work,) = bench.dispatcher.running_jobs.jobs
        if send is not None:
            monkeypatch.setattr(bench.kept, "send", send)
        how(leases, work)
        await until(lambda: bench.failed, TICK_S + 5)
        assert [str(error) for error in bench.failed] == [expected]
        leases.give_back_all()
        bench.close()

    run(test)
