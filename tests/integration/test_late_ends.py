"""Ends that another worker writes after its partitions were taken over: it stood still, and woke."""

from __future__ import annotations

import threading
import uuid
from typing import Any, cast

import pytest

from jobledger import App, Settings
from jobledger.consumers.late_ends import LateEnds
from jobledger.consumers.releases import release_key
from jobledger.consumers.work import Found, Lease, Partition, Work
from jobledger.kafka.topics import ensure
from jobledger.log import now_us
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.writer import LogWriter, Outgoing
from tests.integration.worker_app import closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka

ERROR = ev.ErrorInfo("E", "m")


def test_what_another_ended_after_the_takeover_is_not_run_again(broker: str, namespace: str) -> None:
    """Jobs that the last owner had begun wait here for a thread. Meanwhile that owner, who only stood still, writes the
    ends of some: those are not run, what derives from their ends is sent, and the next job of their key goes on."""
    settings = Settings(bootstrap=broker, submit_timeout=20.0)
    app = App(namespace, settings=settings, partitions=1)
    ran: list[str] = []
    gate = threading.Event()

    @app.task
    def hold(name: str) -> None:
        ran.append(name)
        gate.wait(60)

    ensure(app, settings)
    names, writer = app.names, LogWriter(settings, app.names)
    jobs = {
        name: str(uuid.uuid4()) for name in ("first", "second", "done", "again", "stopped", "keyed", "next", "open")
    }
    topic = names.jobs("default")

    def put(to: str, name: str, fact: ev.Fact, source: str) -> int:
        key = "k" if name in ("keyed", "next") else None
        event = ev.JobEvent(
            str(uuid.uuid4()), jobs[name], 1, 1, 1, now_us(), "hold", "default", key, None, source, None, fact
        )
        return writer.send([Outgoing(to, codec.encode(event), jobs[name], 0)])[0].offset

    for at, name in enumerate(jobs):
        put(topic, name, ev.JobSubmitted(ev.JobSpec(f'{{"name":"{name}"}}'.encode())), "client@h:1")
        if name != "next":
            put(names.lifecycle, name, ev.JobStarted("worker@h:1", topic, at), "worker@h:1")
    ends: dict[str, ev.Fact] = {
        "done": ev.JobSucceeded(b"1"),
        "again": ev.JobRetried(ERROR, 60_000),
        "stopped": ev.JobCancelled("me"),
        "keyed": ev.JobSucceeded(),
    }
    with working(app, threads=2) as worker:
        until(lambda: len(ran) == 2, what="both threads being taken")
        assert ran == ["first", "second"]
        for name, fact in ends.items():
            put(names.lifecycle, name, fact, "worker@h:1")
        last = put(names.lifecycle, "done", ev.JobFailed("never", ERROR), "worker@h:2")  # the first end counts
        gate.set()
        until(lambda: closings(app).keys() >= set(jobs.values()), what="every job's end")
        until(lambda: all(p.offsets and not p.offsets.pending for p in worker.partitions()), what="everything done")
        assert worker.health()["found_closed"] == len(ends)
        assert worker.error is None
    writer.close()
    assert sorted(ran) == ["first", "next", "open", "second"]
    for name in ends:
        said = [type(fact) for fact in facts_of(app, jobs[name])]
        assert said.count(ev.JobStarted) == 2, "its own start was what it looked before"
    asked = {r.event.job_id: r.event.release for r in log_of(app, names.coordination)}
    assert asked == {jobs["again"]: 2}
    assert [r for r in log_of(app, names.dead_letter) if r.event.job_id == jobs["done"]] == []
    assert last > 0
    app.close()


def test_who_asks_while_the_worker_ends_is_answered_once() -> None:
    """A job that waits for an answer is counted as running: without one the worker would wait for it in vain."""
    partition = Partition("shop.jobs.default", 0, Lease(1.0), -1, None)
    partition.give_up()  # so nothing is read, and no broker needed
    event = ev.JobEvent(
        str(uuid.uuid4()), "j", 1, 1, 1, 0, "t", "default", None, None, "c", None, ev.JobDue(ev.JobSpec(b"{}"), 1)
    )
    partition.late[release_key("j", 1, 1)] = Found(3, 1, ev.JobSucceeded())
    for _ in range(50):
        works = [Work(partition, offset, event, cast(Any, None)) for offset in range(200)]
        answered: list[Work] = []
        late = LateEnds(
            Settings(bootstrap="h:1"),
            "shop.lifecycle",
            "worker@h:2",
            codec.Decoder(),
            looked=lambda work, found, answered=answered: answered.append(work),  # type: ignore[misc]  # bound
            fail=lambda error: pytest.fail(str(error)),
        )
        late.start()
        asking = threading.Thread(target=lambda works=works, late=late: [late.look(work, 1) for work in works])
        asking.start()
        late.close()
        asking.join()
        late.join(10)
        assert not late.is_alive()
        assert sorted(work.offset for work in answered) == list(range(200))
