"""The reports of workers: their size, what the status table keeps of them, and when a worker counts as silent."""

from __future__ import annotations

import datetime as dt
from types import SimpleNamespace
from typing import Any

from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.state.work import JobRun
from jobledger.consumers.worker.report import (
    JOBS_MOST,
    REPORT_BYTES,
    TASKS_MOST,
    About,
    ReportBuilder,
    clipped,
    fitting,
    own_memory,
)
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import Position, Recorded
from jobledger.streams.maintenance.workers import GoneWorkers
from jobledger.streams.status.row_folder import Folded, RowFolder
from jobledger.worker_status import WorkerState, WorkerStatus, of_report
from tests.unit.test_projector import Message as Stored
from tests.unit.test_projector import Table

NOW = 1_700_000_000_000_000
LONG = 2**63 - 1


def work(job_id: str, began: float) -> JobRun:
    """Return a running job, with what a report reads of it."""
    made: Any = SimpleNamespace(began=began, event=SimpleNamespace(job_id=job_id))
    return made  # type: ignore[no-any-return]


def builder(lanes: list[str], tasks: list[str], host: str = "h", version: str | None = None) -> ReportBuilder:
    return ReportBuilder(About(host, 1, version, "0.1.0", NOW, lanes, tasks, 100))


def encoded(fact: ev.WorkerReported, worker: str = "h:1") -> bytes:
    """Return a report as it is in the log."""
    event_id = "00000000-0000-7000-8000-000000000000"
    return codec.encode(standalone(fact, event_id, NOW, f"worker@{worker}", job_id=worker))


NAMES = st.lists(st.text(max_size=300), max_size=40)


@given(NAMES, NAMES, st.integers(0, 40), st.lists(st.text(max_size=300), max_size=40), st.text(max_size=300))
def test_a_report_is_small_whatever_the_app_has(
    lanes: list[str], tasks: list[str], times: int, jobs: list[str], host: str
) -> None:
    """What is left out is counted, and what is there is a complete name or id."""
    tasks = [f"{number}{name}" for number in range(times) for name in tasks]
    running = [work(job_id, 1.0 + number) for number, job_id in enumerate(jobs)]
    fact = builder(lanes, tasks, host, "v" * 63).report(running, LONG, 2**31 - 1, 1_000.0, NOW)
    # A host's name has at most 255 bytes; it is in the worker's id and in the name of the writer.
    assert len(encoded(fact, clipped(host, 255) + ":4194304")) < REPORT_BYTES
    assert fact.lanes == lanes[: len(fact.lanes)]
    assert fact.more_lanes == len(lanes) - len(fact.lanes)
    assert fact.tasks == sorted(tasks)[: len(fact.tasks)]
    assert fact.more_tasks == len(tasks) - len(fact.tasks)
    assert {job.job_id for job in fact.jobs} <= set(jobs)
    assert fact.running == len(jobs)


def test_the_largest_report_is_below_its_limit() -> None:
    """All parts of the report are full."""
    names = [f"{number:070}" for number in range(5_000)]
    host = "h" * 255
    running = [work(f"{number:060}", 1.0 + number) for number in range(5_000)]
    fact = builder(names, names, host, "v" * 63).report(running, LONG, 2**31 - 1, 1_000.0, NOW)
    assert 0.9 * REPORT_BYTES < len(encoded(fact, f"{host}:4194304")) < REPORT_BYTES
    assert len(fact.jobs) == JOBS_MOST
    assert len(builder([], [f"{number:03}" for number in range(900)]).report([], None, 0, 1.0, NOW).tasks) == TASKS_MOST


def test_a_small_app_is_reported_completely() -> None:
    """The jobs that have run longest come first, each with its start on the worker's clock."""
    running = [work("young", 99.0), work("old", 40.0), work("not begun", 0.0)]
    fact = builder(["mail", "mail.high"], ["send", "add"]).report(running, None, 4, 100.0, NOW)
    assert (fact.lanes, fact.more_lanes, fact.tasks, fact.more_tasks) == (["mail", "mail.high"], 0, ["add", "send"], 0)
    assert fact.jobs == [ev.RunningJob("old", NOW - 60_000_000), ev.RunningJob("young", NOW - 1_000_000)]
    assert (fact.running, fact.slots, fact.memory_bytes, fact.partitions) == (3, 100, None, 4)


def test_a_long_id_leaves_room_for_the_others() -> None:
    """An id is never cut, because a part of it would name another job."""
    fact = builder([], []).report([work("x" * 5_000, 1.0), work("a", 2.0)], None, 0, 3.0, NOW)
    assert [job.job_id for job in fact.jobs] == ["a"]


def test_texts_are_cut_between_characters() -> None:
    """A text that is not UTF-8 does not prevent a report."""
    assert clipped("aé", 2) == "a"
    assert clipped("\ud800a", 9) == "?a"
    assert fitting(["a", "\ud800"], 2, 6) == ["a", "\ud800"]
    assert fitting(["a", "b"], 2, 5) == ["a"]
    assert fitting(["a", "b"], 1, 100) == ["a"]
    memory = own_memory()
    assert memory is None or memory > 1_000_000


def recorded(fact: ev.Fact, ms: int = 1_000) -> Recorded:
    event = standalone(fact, "e", NOW, "worker@h:1", job_id="h:1")
    return Recorded(event, Position("shop.workers", 0, 0), ms)


REPORT = ev.WorkerReported(
    "h", 1, "2", "0.1", NOW, ["mail", "mail.high", "slow"], 0, ["send"], 0, 100, 1, [ev.RunningJob("a", NOW)], 7, 4
)


def test_a_worker_is_silent_when_two_reports_are_missing() -> None:
    """A report from the future, which means that the clocks differ, counts as present."""
    status = of_report("h:1", recorded(REPORT, 10_000))
    assert status is not None
    assert status.queues == ("mail", "slow")
    at = status.reported_at
    assert at == dt.datetime.fromtimestamp(10, dt.UTC)
    assert status.state(at + dt.timedelta(seconds=15)) is WorkerState.ALIVE
    assert status.state(at - dt.timedelta(seconds=60)) is WorkerState.ALIVE
    assert status.state(at + dt.timedelta(seconds=15, milliseconds=1)) is WorkerState.SILENT


@given(st.integers(-(2**63), LONG), st.integers(-(2**63), LONG))
def test_any_numbers_in_a_report_are_accepted(started_at: int, ms: int) -> None:
    """Times outside the calendar become its first or last moment."""
    fact = ev.WorkerReported("h", LONG, None, "", started_at, [], 0, [], 0, 0, 0, [ev.RunningJob("a", LONG)], None, 0)
    status = of_report("h:1", recorded(fact, ms))
    assert status is not None
    assert status.started_at.year <= 9999


def fold(*messages: tuple[str, bytes | None, bytes | None], topic: str | None = "shop.workers") -> Folded:
    """Fold messages, given as topic, key and value."""
    folder = RowFolder(Table(), codec.Decoder(), workers=topic)
    stored: list[Any] = [
        Stored(name, 0, offset, value, 1_000 + offset, key) for offset, (name, key, value) in enumerate(messages)
    ]
    read: list[Message] = stored
    return folder.fold(read)


def test_the_newest_report_of_a_worker_counts() -> None:
    """A tombstone removes the worker, and a report after it brings the worker back."""
    topic, value = "shop.workers", encoded(REPORT)
    folded = fold(
        (topic, b"h:1", value),
        (topic, b"h:2", value),
        (topic, b"h:2", None),
        (topic, b"h:3", None),
        (topic, b"h:3", value),
        (topic, b"h:1", value),
    )
    workers = folded.changes.workers
    assert workers.keys() == {"h:1", "h:2", "h:3"}
    assert workers["h:2"] is None
    first, third = workers["h:1"], workers["h:3"]
    assert first is not None
    assert third is not None
    assert (first.worker, first.reported_at.microsecond) == ("h:1", 5_000)
    assert (third.worker, third.reported_at.microsecond) == ("h:3", 4_000)
    assert folded.changes.offsets == {(topic, 0): 6}
    assert folded.changes.jobs == []


def test_other_records_change_no_worker() -> None:
    """Neither a report on another topic, nor a fact of a job on the topic of reports; bytes are rejected."""
    topic, value = "shop.workers", encoded(REPORT)
    job = codec.encode(standalone(ev.QueuePaused("ann"), "e", NOW, "t", job_id="h:1"))
    folded = fold(("shop.lifecycle", b"h:1", value), (topic, b"h:1", job), (topic, b"h:1", b"garbage"))
    assert folded.changes.workers == {}
    assert [each.message.offset() for each in folded.rejected] == [2]
    assert folded.changes.jobs == []
    assert fold(("shop.jobs.workers", b"h:1", value), topic=None).changes.workers == {}


class Rows:
    """A table with one old worker, until it is removed."""

    def __init__(self) -> None:
        self.left = [of_report("h:1", recorded(REPORT))]

    def workers(self, limit: int = 1_000, *, before_ms: int | None = None) -> list[WorkerStatus]:
        assert before_ms is not None
        return [
            status for status in self.left if status is not None and status.reported_at.timestamp() * 1000 < before_ms
        ]


def test_a_worker_is_only_gone_if_the_table_is_current() -> None:
    """The tombstone is written before the row is removed."""
    rows: Any = Rows()
    done: list[Any] = []
    names: Any = SimpleNamespace(workers="shop.workers")
    gone = GoneWorkers(names, rows, lambda records: done.append([r.key for r in records]), done.append, 600.0)
    assert gone.remove(601_000, lambda topics: True) == 0  # it reported exactly ten minutes ago
    assert gone.remove(601_001, lambda topics: False) == 0
    assert done == []
    assert gone.remove(601_001, lambda topics: list(topics) == ["shop.workers"]) == 1
    assert done == [["h:1"], 1_001]
