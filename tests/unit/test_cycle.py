"""The coordinator's cycle without a broker: rebalances during a cycle, and a log that does not belong to the rows.

The group, the writer and the bounds of the log are stand-ins. The table, the decisions and the local copy are the real
ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.streams.coordinator import ownership
from jobledger.streams.coordinator.faust import faust_app
from jobledger.streams.coordinator.faust.async_producer import Delivered
from jobledger.streams.coordinator.faust.faust_app import Options, changelog
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir
from jobledger.streams.coordinator.metrics import Metrics
from jobledger.streams.coordinator.pipeline import Pipeline
from jobledger.streams.coordinator.rules.schedule_rows import (
    Floor,
    Marker,
    Row,
    Scheduled,
    decode_row,
    encode_row,
    floor_key,
    row_key,
)

NAMES = Names("shop")
JOBS = [str(uuid.UUID(int=n + 1)) for n in range(4)]
SPEC = ev.JobSpec(b"{}")
T0 = 1_700_000_000_000  # ms


@pytest.fixture(autouse=True)
def _never_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests do not cover a pause of the process. Without this fixture, a pause of two seconds would make the
    cycle doubt its partitions and write a log line."""
    monkeypatch.setattr(ownership, "GAP", 3600.0)


class Group:
    """The consumer group, with one partition. ``offset``: the committed offset."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.stable, self.generation, self.offset = rows, True, 1, 0
        self.acknowledged: list[int] = []

    def partitions(self) -> set[int]:
        return {0}

    def committed(self, partition: int) -> int:
        return self.offset

    def acknowledge(self, offsets: Mapping[int, Sequence[int]]) -> None:
        self.acknowledged += offsets[0]

    async def confirm(self) -> bool:
        return True


class Writer:
    """A writer that takes each record when ``gate`` is open, and acknowledges it at the next offset of its topic."""

    most_bytes = 1_000_000

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()
        self.sent: list[Outgoing] = []

    async def post(self, records: Sequence[Outgoing]) -> asyncio.Future[list[Delivered]]:
        if records[0].topic != changelog(NAMES):
            self.waiting.set()
            await self.gate.wait()
        deliveries: list[Delivered] = []
        for record in records:
            deliveries.append(Delivered(0, sum(r.topic == record.topic for r in self.sent), T0))
            self.sent.append(record)
        settled = asyncio.get_running_loop().create_future()
        settled.set_result(deliveries)
        return settled

    def events(self, topic: str) -> list[ev.JobEvent]:
        return [codec.decode(r.value) for r in self.sent if r.topic == topic]


class LogBounds:
    """The first offsets and the ends of the topics."""

    def __init__(self, writer: Writer) -> None:
        self.source, self._writer = 2, writer

    async def of(self, topic: str, partitions: set[int]) -> dict[int, tuple[int, int]]:
        end = self.source if topic == NAMES.coordination else sum(r.topic == topic for r in self._writer.sent)
        return dict.fromkeys(partitions, (0, end))


class Lab:
    """A cycle with its stand-ins and its local rows."""

    def __init__(self) -> None:
        _, table = faust_app.build(
            NAMES, Settings(bootstrap="h:1"), Options(), 1, InstanceDir(Path("unused"), False, None, None)
        )
        self.rows = table.data
        self.group, self.writer = Group(self.rows), Writer()
        self.log_bounds = LogBounds(self.writer)
        self.start()

    def start(self) -> None:
        """Make a new cycle, as after a restart."""
        self.cycle = Pipeline(
            NAMES,
            Settings(bootstrap="h:1"),
            Options(session_timeout=0.05, keep_markers=0.0),
            self.group,  # type: ignore[arg-type]
            self.writer,  # type: ignore[arg-type]
            self.log_bounds,  # type: ignore[arg-type]
            codec.Decoder(),
            Metrics(),
            lambda step: None,
            {NAMES.jobs("mail"): None},
        )

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Rebuild the state from the rows, and run both stages."""
        await self.cycle.rebuild()
        tasks = [asyncio.create_task(self.cycle.decide()), asyncio.create_task(self.cycle.write())]
        yield
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def take(self, *records: tuple[int, bytes]) -> None:
        """Pass fetched records to the cycle, each as (offset, value)."""
        await self.cycle.take(
            self.group.generation,
            [
                SimpleNamespace(
                    topic=NAMES.coordination, partition=0, offset=o, timestamp=T0, timestamp_type=1, key=None, value=v
                )
                for o, v in records
            ],
        )

    async def settled(self) -> None:
        """Wait until all taken records are processed."""
        async with asyncio.timeout(60):
            while self.cycle._inbox or self.cycle._under_way:
                await asyncio.sleep(0.001)

    def kept(self) -> dict[bytes, Row | Floor]:
        """Return the rows of the local copy."""
        return {key: decode_row(data) for key, data in self.rows.scan(0, None, 100)}

    def verdicts(self) -> dict[str, float]:
        """Return the number of decisions of each kind."""
        samples = [s for metric in self.cycle._metrics._events.collect() for s in metric.samples]
        return {s.labels["verdict"]: s.value for s in samples if s.name.endswith("_total")}

    def changelog(self) -> list[tuple[bytes, bytes | None]]:
        """Return the records of the changelog."""
        return [(r.key, r.value) for r in self.writer.sent if r.topic == changelog(NAMES)]  # type: ignore[misc]


def event(fact: ev.Fact, job: str = JOBS[0], release: int = 1) -> bytes:
    return codec.encode(ev.JobEvent("e", job, 1, 1, release, 0, "send", "mail", None, job, "test", None, fact))


def submitted(job: str = JOBS[0]) -> bytes:
    return event(ev.JobSubmitted(SPEC, 3_600_000), job, 0)


def waiting(job: str, offset: int, due: int = T0 * 1000) -> bytes:
    """Return the row of a job that waits for its first release."""
    return encode_row(
        Scheduled(0, offset, 1, 1, 1, due, job, "send", "mail", None, job, None, SPEC.args, SPEC.tags, None)
    )


def test_a_rebalance_while_records_are_handed_over_loses_no_event() -> None:
    """Decisions from before the rebalance are dropped, also if they waited for the producer. When their events are read
    again, they make rows and timers."""

    async def run() -> None:
        lab = Lab()
        async with lab.working():
            lab.writer.gate.clear()
            lab.writer.waiting.clear()
            await lab.take((0, submitted()), (1, b"garbage"))  # the dead letter waits for the writer
            await lab.writer.waiting.wait()
            lab.group.generation += 1
            await lab.cycle.revoked()
            await lab.cycle.rebuild()
            lab.writer.gate.set()
            await lab.settled()
            assert lab.group.acknowledged == []
            await lab.take((0, submitted()), (1, b"garbage"))
            await lab.settled()
            assert lab.group.acknowledged == [0, 1]
            assert [type(row) for row in lab.kept().values()] == [Scheduled]
            assert lab.cycle.timer_loop.next_due is not None

    asyncio.run(run())


def test_a_log_that_ends_below_the_offsets_of_the_rows_is_a_new_log(caplog: pytest.LogCaptureFixture) -> None:
    """The topic was recreated or truncated, and the changelog was not. New events are processed, waiting jobs are
    released and markers are swept. After the next restart that is still so, also when the new log has grown."""

    async def run() -> None:
        lab = Lab()
        lab.rows.write(
            0,
            [
                (floor_key(0), encode_row(Floor(0, 50))),
                (row_key(JOBS[0]), waiting(JOBS[0], 60)),
                (row_key(JOBS[1]), encode_row(Marker(0, 70, 1, 1, T0))),
            ],
            2,
        )
        async with lab.working():
            decided = event(ev.ReleaseDecided(T0 * 1000), JOBS[0])
            await lab.take((0, submitted(JOBS[2])), (1, decided), (2, event(ev.ReleaseOverdue(SPEC, 5), JOBS[1])))
            await lab.settled()
            assert isinstance(lab.kept()[row_key(JOBS[2])], Scheduled)
            assert [e.job_id for e in lab.writer.events(NAMES.jobs("mail"))] == [JOBS[0], JOBS[1]]
            lab.group.offset = 3
            assert await lab.cycle.table.sweep(0, lambda: T0 + 1, 0) == 2
        assert "the topic was recreated" in caplog.text
        caplog.clear()

        # A restart reads the changelog in the order of its records.
        restored = Lab()
        for offset, (key, value) in enumerate(lab.changelog()):
            message = SimpleNamespace(partition=0, offset=offset, key=key, value=value)
            restored.rows.apply_changelog_batch([SimpleNamespace(message=message)], None, None)
        assert restored.kept()[floor_key(0)] == lab.kept()[floor_key(0)]
        restored.log_bounds.source, restored.group.offset = 200, 3
        async with restored.working():
            await restored.take((2, submitted(JOBS[3])), (3, submitted(JOBS[3])))
            await restored.settled()
            assert restored.cycle.table.row(0, row_key(JOBS[3])) is not None
            assert restored.verdicts() == {"seen": 1, "scheduled": 1}, "what lies below the floor was dealt with"
        assert caplog.text == ""

    asyncio.run(run())


def test_a_committed_offset_beyond_the_end_of_the_log_does_not_count() -> None:
    """If the log was truncated, the old committed offset does not prove that the events below it were processed."""

    async def run() -> None:
        lab = Lab()
        lab.group.offset = 9
        async with lab.working():
            assert not lab.cycle._committed_is_processed(0)
            lab.group.offset = 2
            assert lab.cycle._committed_is_processed(0)
            await lab.take(*((n, submitted(JOBS[n % 4])) for n in range(5)))
            await lab.settled()
            lab.group.offset = 5
            assert lab.cycle._committed_is_processed(0)

    asyncio.run(run())


def test_a_row_with_an_empty_key_is_swept() -> None:
    """An earlier version kept rows of events without a job id. If such a row was the only one, a sweep did not end."""

    async def run() -> None:
        lab = Lab()
        lab.rows.write(0, [(b"", encode_row(Marker(0, 0, 1, 1, T0)))], 0)
        lab.group.offset = 2
        async with asyncio.timeout(60), lab.working():
            assert await lab.cycle.table.sweep(0, lambda: T0 + 1, 0) == 1
            assert list(lab.kept()) == [floor_key(0)]

    asyncio.run(run())
