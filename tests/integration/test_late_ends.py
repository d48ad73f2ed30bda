"""Ends that another worker writes after its partitions were taken over: it stood still, and woke."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from jobledger import App, Settings
from jobledger.consumers import places
from jobledger.consumers.late_ends import LateEnds
from jobledger.consumers.offsets import encode
from jobledger.consumers.work import Work
from jobledger.kafka.topics import ensure
from jobledger.log import now_us, source
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.writer import LogWriter, Outgoing
from tests.integration.worker_app import closings, facts_of, log_of, until, working

pytestmark = pytest.mark.kafka

ERROR = ev.ErrorInfo("E", "m")
NAMES = ("first", "second", "done", "again", "stopped", "keyed", "next", "open")
ENDS: dict[str, ev.Fact] = {
    "done": ev.JobSucceeded(b"1"),
    "again": ev.JobRetried(ERROR, 60_000),
    "stopped": ev.JobCancelled("me"),
    "keyed": ev.JobSucceeded(),
}


class Site:
    """One partition with jobs that its last owner had begun. Two of them fill both threads of who takes it over."""

    def __init__(self, broker: str, namespace: str) -> None:
        settings = Settings(bootstrap=broker, submit_timeout=20.0)
        app = self.app = App(namespace, settings=settings, partitions=1)
        self.ran: list[str] = []
        self.gate = threading.Event()

        @app.task
        def hold(name: str) -> None:
            self.ran.append(name)
            self.gate.wait(60)

        @app.task
        async def quick(name: str) -> None:
            self.ran.append(name)

        ensure(app, settings)
        self.topic, self.lifecycle = app.names.jobs("default"), app.names.lifecycle
        self.writer = LogWriter(settings, app.names)
        self.jobs = {name: str(uuid.uuid4()) for name in NAMES}
        for name in NAMES:
            self.put(self.topic, name, ev.JobSubmitted(ev.JobSpec(f'{{"name":"{name}"}}'.encode())))

    def put(self, to: str, name: str, fact: ev.Fact, who: str = "worker@h:1") -> None:
        """Write a fact of a job."""
        job, key = self.jobs[name], "k" if name in ("keyed", "next") else None
        event = ev.JobEvent(str(uuid.uuid4()), job, 1, 1, 1, now_us(), "hold", "default", key, None, who, None, fact)
        self.writer.send([Outgoing(to, codec.encode(event), job, 0)])

    def begun(self, *, starts_seen: bool) -> None:
        """The last owner had begun them all but "next": by the starts in the log, or only by what it committed."""
        if starts_seen:
            for at, name in enumerate(NAMES):
                if name != "next":
                    self.put(self.lifecycle, name, ev.JobStarted("worker@h:1", self.topic, at))
            return
        text = encode(0, [], 0, False, len(NAMES))
        group = self.app.names.worker_group("default")
        member = Consumer({"bootstrap.servers": self.app.settings.bootstrap, "group.id": group})
        told = member.commit(offsets=[TopicPartition(self.topic, 0, 0, text)], asynchronous=False) or []
        member.close()
        assert [each.error for each in told] == [None]

    def ends_come(self) -> None:
        """The last owner wakes and writes; one of its ends seems to be this process's own, from an earlier time."""
        for name, fact in ENDS.items():
            self.put(self.lifecycle, name, fact, source("worker") if name == "stopped" else "worker@h:1")
        self.put(self.lifecycle, "done", ev.JobFailed("never", ERROR))  # the first end counts

    def all_end(self, worker: Any) -> None:
        """Let them go on, to the last one's end."""
        self.gate.set()
        until(lambda: closings(self.app).keys() >= set(self.jobs.values()), what="every job's end")
        until(lambda: all(p.offsets and not p.offsets.pending for p in worker.partitions()), what="everything done")
        assert worker.health()["found_closed"] == len(ENDS)
        assert worker.error is None

    def check(self) -> None:
        """What derives from the ends was sent, once."""
        asked = {r.event.job_id: r.event.release for r in log_of(self.app, self.app.names.coordination)}
        assert asked == {self.jobs["again"]: 2}
        assert log_of(self.app, self.app.names.dead_letter) == []

    def close(self) -> None:
        self.gate.set()
        self.writer.close()
        self.app.close()


@pytest.fixture
def site(broker: str, namespace: str) -> Iterator[Site]:
    made = Site(broker, namespace)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("starts_seen", [True, False])
def test_what_another_ended_after_the_takeover_is_not_run_again(site: Site, starts_seen: bool) -> None:
    """Jobs that the last owner had begun wait here for a thread. Meanwhile that owner, who only stood still, writes the
    ends of some: those are not run, what derives from their ends is sent, and the next job of their key goes on."""
    site.begun(starts_seen=starts_seen)
    with working(site.app, threads=2) as worker:
        until(lambda: len(site.ran) == 2, what="both threads being taken")
        site.ends_come()
        site.all_end(worker)
    assert site.ran[:2] == ["first", "second"]
    assert sorted(site.ran) == ["first", "next", "open", "second"]
    for name in ENDS:
        said = [type(fact) for fact in facts_of(site.app, site.jobs[name])]
        assert said.count(ev.JobStarted) == 1 + starts_seen, "its own start was said before it looked"
    site.check()


def test_who_takes_over_next_finds_them_too(site: Site) -> None:
    """The ends come to one who never gets to these jobs, because their task is paused, and who goes on writing ends behind
    them."""
    site.begun(starts_seen=False)
    site.app.pause(task="hold", reason="to see what is found")
    with working(site.app) as first:
        until(lambda: [p for p in first.partitions() if p.ready], what="the takeover")
        site.ends_come()
        others = [site.app.tasks["quick"].submit(f"quick {n}") for n in range(3)]
        until(lambda: closings(site.app).keys() >= {h.job_id for h in others}, what="jobs that nobody doubts")
    assert len(site.ran) == 3
    site.app.resume(task="hold")
    with working(site.app) as worker:
        site.all_end(worker)
    assert sorted(site.ran[3:]) == ["first", "next", "open", "second"]
    site.check()


def test_it_is_looked_again_when_the_answer_is_old(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that had to wait after it was looked for its end is looked for again."""
    looked: list[Work] = []
    certain: list[bool] = []

    class Looking(LateEnds):
        def look(self, work: Work) -> None:
            looked.append(work)
            super().look(work)

    monkeypatch.setattr("jobledger.consumers.worker.LateEnds", Looking)
    monkeypatch.setattr(places, "LOOKED_S", 0.5)
    site.begun(starts_seen=True)
    site.gate.set()
    with working(site.app, threads=len(NAMES)) as worker:
        until(lambda: worker.dispatcher is not None and hasattr(worker.dispatcher, "places"), what="its parts")
        assert worker.dispatcher is not None
        monkeypatch.setattr(worker.dispatcher.places, "_certain", lambda work: bool(certain))
        until(lambda: len({id(w) for w in looked}) >= len(NAMES) - 1, what="a look for each")
        site.ends_come()
        before = len(looked)
        until(
            lambda: {w.event.job_id for w in looked[before:] if w.event} >= {site.jobs[n] for n in ENDS},
            what="another look",
        )
        certain.append(True)
        site.all_end(worker)
    assert sorted(site.ran) == ["first", "next", "open", "second"]
    site.check()
