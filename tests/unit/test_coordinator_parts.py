"""The coordinator's parts that need no broker: security settings, folders, rows, ownership, noise."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError
from hypothesis import given
from hypothesis import strategies as st

from jobledger.config import Settings
from jobledger.errors import SchemaError
from jobledger.kafka.topic_names import Names
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobSpec, JobSubmitted, RecordRejected
from jobledger.streams.coordinator.decoding import KEY_BYTES, RecordReader
from jobledger.streams.coordinator.faust import faust_app
from jobledger.streams.coordinator.faust.faust_app import Options, changelog, faust_settings
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir, take_place
from jobledger.streams.coordinator.faust.local_store import MemoryRows, RocksRows, merged
from jobledger.streams.coordinator.faust.log_filters import RateLimit, Unheard
from jobledger.streams.coordinator.ownership import GAP, Ownership, Superseded
from jobledger.streams.coordinator.rules.schedule_rows import Floor, Released, decode_row, encode_row


def test_faust_reads_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings named as Faust's would, from somebody else's program, change nothing; the table's changelog is ours."""
    monkeypatch.setenv("BROKER_URL", "kafka://elsewhere:1")
    monkeypatch.setenv("APP_ID_FORMAT", "x-{id}")
    names, settings = Names("shop"), Settings(bootstrap="h1:9092,h2:9093")
    app, table = faust_app.build(names, settings, Options(), 3, InstanceDir(tmp_path, True, "m", None))
    assert app.conf.id == names.coordinator_group
    assert [str(url) for url in app.conf.broker] == ["kafka://h1:9092", "kafka://h2:9093"]
    assert table.changelog_topic_name == changelog(names) == "shop.coordinator-schedules-changelog"
    given = faust_settings(settings, Options(), 3, InstanceDir(tmp_path, False, None, None))
    assert (given["store"], given["topic_allow_declare"], given["topic_disable_leader"]) == ("memory://", False, True)


# -- the local folder ------------------------------------------------------------------------------------------------


def test_coordinators_on_one_machine_get_folders_of_their_own(tmp_path: Path) -> None:
    """The first free one, with the same member id as whoever had it before; a restart takes the same again."""
    one, two = take_place(tmp_path, "shop"), take_place(tmp_path, "shop")
    assert one.folder != two.folder
    assert one.instance != two.instance
    one.release()
    again = take_place(tmp_path, "shop")
    assert (again.folder, again.instance) == (one.folder, one.instance)
    again.release()
    two.release()


def test_a_folder_that_cannot_be_written_means_memory(tmp_path: Path) -> None:
    """It works, and is not a static member: a restart begins anew."""
    (tmp_path / "file").write_text("x")
    place = take_place(tmp_path / "file", "shop")
    assert (place.durable, place.instance) == (False, None)


def test_rows_of_another_log_are_thrown_away(tmp_path: Path) -> None:
    """A recreated topic or another cluster: offsets mean nothing there. The same log keeps its rows."""
    place = take_place(tmp_path, "shop")
    rows = place.folder / "v1" / "tables"
    place.keep_for("cluster/topic")
    rows.mkdir(parents=True)
    place.keep_for("cluster/topic")
    assert rows.exists()
    place.keep_for("cluster/other")
    assert not rows.exists()
    place.release()


# -- rows ------------------------------------------------------------------------------------------------------------


def marker(offset: int) -> bytes:
    return encode_row(Released(0, offset, 1, 1, 0))


def test_a_later_events_row_wins_whatever_was_written_last() -> None:
    """A late write of an instance that was paused takes nothing back; what is no row at all is left out."""
    assert merged(None, marker(3)) == marker(3)
    assert merged(marker(3), marker(4)) == marker(4)
    assert merged(marker(4), marker(3)) is None
    for garbage in (b"\xff garbage", b"", b"\x93\x01\x02", msgspec.msgpack.encode([1, "x"]), b"\xc1"):
        assert merged(marker(4), garbage) is None


def test_a_floor_of_a_later_log_wins() -> None:
    """An instance that was paused while the log was made anew writes a floor of the old one late."""
    new, late = encode_row(Floor(0, 50, 71)), encode_row(Floor(0, 90))
    assert merged(new, late) is None
    assert merged(late, new) == new
    assert decode_row(msgspec.msgpack.encode([2, 0, 50])) == Floor(0, 50)


def test_a_row_of_a_kind_this_version_does_not_know_is_not_guessed_at() -> None:
    """Well-formed and unknown: written by a later version."""
    with pytest.raises(SchemaError, match="upgrade"):
        merged(None, msgspec.msgpack.encode([9, 1, 2]))


@pytest.fixture(params=["rocksdb", "memory"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Both local copies, held to the same tests."""

    async def make() -> Any:
        place = InstanceDir(tmp_path, request.param == "rocksdb", None, None)
        app, table = faust_app.build(Names("shop"), Settings(bootstrap="h:1"), Options(), 2, place)
        app._create_directories()
        if place.durable:
            for partition in range(2):
                table.data._db_for_partition(partition)
        return table.data

    made = asyncio.run(make())
    assert isinstance(made, RocksRows if request.param == "rocksdb" else MemoryRows)
    return made


def restored(partition: int, offset: int, key: bytes, value: bytes | None) -> Any:
    """A changelog record as Faust hands it over."""
    tp = SimpleNamespace(topic="shop.coordinator-schedules-changelog", partition=partition)
    return SimpleNamespace(message=SimpleNamespace(tp=tp, partition=partition, offset=offset, key=key, value=value))


def test_rows_are_kept_by_partition_and_scanned_in_order(rows: Any) -> None:
    """Written, read, deleted; a scan goes on above the last key it has seen."""
    rows.write(0, [(b"b", b"2"), (b"a", b"1"), (b"c", b"3")], 2)
    rows.write(1, [(b"a", b"other")], 0)
    assert (rows.get(0, b"a"), rows.get(1, b"a"), rows.get(1, b"b")) == (b"1", b"other", None)
    assert rows.scan(0, None, 2) == [(b"a", b"1"), (b"b", b"2")]
    assert rows.scan(0, b"b", 2) == [(b"c", b"3")]
    assert rows.scan(0, b"c", 2) == []
    rows.write(0, [(b"a", None), (b"b", b"4")], 4)
    assert rows.scan(0, None, 9) == [(b"b", b"4"), (b"c", b"3")]
    rows.write(0, [(b"", b"5")], 5)
    assert rows.scan(0, None, 1) == [(b"", b"5")]
    assert rows.scan(0, b"", 9) == [(b"b", b"4"), (b"c", b"3")]


@given(st.permutations(range(5)), st.integers(1, 5))
def test_restoring_keeps_the_latest_row_and_names_what_was_covered(order: list[int], chunk: int) -> None:
    """In whatever order versions of a row stand on the changelog, and however they are batched."""
    _, table = faust_app.build(
        Names("shop"), Settings(bootstrap="h:1"), Options(), 1, InstanceDir(Path("unused"), False, None, None)
    )
    rows = table.data
    events = [restored(0, at, b"k", marker(offset)) for at, offset in enumerate(order)]
    for start in range(0, len(events), chunk):
        rows.apply_changelog_batch(events[start : start + chunk], None, None)
    kept = decode_row(rows.get(0, b"k"))
    assert kept.offset == 4
    assert rows.overtaken == (set() if order[-1] == 4 else {(0, b"k")})


def test_restoring_deletes_and_remembers_how_far_it_came(rows: Any) -> None:
    """A tombstone deletes; the persisted offset is where a restart goes on (never, in memory)."""
    rows.apply_changelog_batch(
        [
            restored(0, 7, b"k", marker(1)),
            restored(0, 8, b"k", None),
            restored(0, 9, b"floor", encode_row(Floor(0, 3))),
        ],
        None,
        None,
    )
    assert rows.get(0, b"k") is None
    assert rows.get(0, b"floor") == encode_row(Floor(0, 3))
    tp = SimpleNamespace(topic="t", partition=0)
    assert rows.persisted_offset(tp) == (9 if isinstance(rows, RocksRows) else None)


# -- intake ----------------------------------------------------------------------------------------------------------


def test_a_record_with_its_writers_time_counts_as_appended_now() -> None:
    """Only a time that the broker set is a time on the broker's clock: what another one delays would be early."""
    fact = JobSubmitted(JobSpec(b"{}"), 60_000)
    value = codec.encode(JobEvent("e", "j", 1, 1, 0, 0, "send", "mail", None, None, "test", None, fact))
    messages = [
        SimpleNamespace(
            topic="shop.coordination", partition=0, offset=n, timestamp=5, timestamp_type=n, key=None, value=value
        )
        for n in (0, 1)
    ]
    read, _ = asyncio.run(RecordReader(Names("shop"), codec.Decoder(), "test", lambda: 7).decode(messages))
    assert [each.appended_ms for each in read] == [7, 5]


def taken_in(value: bytes | None, key: bytes | None = None) -> tuple[list[Any], list[RecordRejected]]:
    """What the intake makes of one record: events, and what goes to the dead letters."""
    message = SimpleNamespace(
        topic="shop.coordination", partition=0, offset=3, timestamp=1, timestamp_type=1, key=key, value=value
    )
    read, rejects = asyncio.run(RecordReader(Names("shop"), codec.Decoder(), "test", lambda: 7).decode([message]))
    facts = [codec.decode(each.value).fact for each in rejects]
    assert all(len(each.value or b"") < 900_000 for each in rejects)
    return list(read), [fact for fact in facts if isinstance(fact, RecordRejected)]


def test_a_rejected_record_fits_the_dead_letters_whatever_its_key() -> None:
    """Key and value are kept as far as a record may carry them, and it says what was not."""
    key, value = b"k" * 900_000, b"v" * 90_000
    _, (fact,) = taken_in(value, key)
    assert (fact.raw_key, fact.raw_value) == (key[:KEY_BYTES], value)
    assert f"the first {KEY_BYTES} of its key's 900000 bytes" in fact.error
    _, (fact,) = taken_in(b"v" * 600_000, b"k")
    assert (fact.raw_key, fact.raw_value) == (b"k", None)
    _, (fact,) = taken_in(None, key)
    assert (fact.raw_key, fact.raw_value) == (key[:KEY_BYTES], None)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({"job_id": ""}, "job_id is empty"),
        ({"job_id": "j" * 1_001}, "job_id has more than 1000 bytes"),
        ({"job_id": "€" * 334}, "job_id has more than 1000 bytes"),
        ({"home": "h" * 1_001}, "home has more than 1000 bytes"),
        ({"release": (1 << 31) - 1}, "no next one"),
    ],
)
def test_what_no_row_can_be_made_of_is_rejected(head: dict[str, Any], why: str) -> None:
    """An event without a job, and ids or numbers that nothing made of them could carry."""
    event = JobEvent("e", "j", 1, 1, 0, 0, "t", "q", None, None, "s", None, JobSubmitted(JobSpec(b"{}"), 1))
    assert len(taken_in(codec.encode(msgspec.structs.replace(event, job_id="j" * 1_000)))[0]) == 1
    read, (fact,) = taken_in(codec.encode(msgspec.structs.replace(event, **head)))
    assert read == []
    assert why in fact.error


# -- ownership -------------------------------------------------------------------------------------------------------


class FakeGroup:
    """The group's answers."""

    def __init__(self) -> None:
        self.settled, self.generation, self.answer, self.asked = True, 1, True, 0

    async def confirm(self) -> bool:
        self.asked += 1
        return self.answer


def owner(group: FakeGroup, times: list[float]) -> Ownership:
    made = Ownership(group, clocks=lambda: (times[0], times[0]))  # type: ignore[arg-type]
    made.gained()
    return made


def test_nothing_is_disputed_while_time_passes_evenly() -> None:
    """The broker is not asked."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    for _ in range(10):
        times[0] += GAP / 2
        assert own.undisputed
        asyncio.run(own.certain(own.epoch))
    assert group.asked == 0


def test_after_a_gap_nothing_goes_on_until_the_broker_has_confirmed() -> None:
    """The gap is found by whoever asks first, and one confirmation lifts the doubt."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    times[0] += GAP + 0.1
    group.answer = False
    with pytest.raises(Superseded):
        asyncio.run(own.certain(own.epoch))
    seen = [own.undisputed]
    group.answer = True
    asyncio.run(own.certain(own.epoch))
    assert [*seen, own.undisputed] == [False, True]
    assert group.asked == 2


def test_what_was_begun_before_the_partitions_moved_does_not_go_on() -> None:
    """And nothing is begun while they move."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    epoch = own.epoch
    seen = [own.undisputed]
    own.lost()
    seen.append(own.undisputed)
    own.moved()
    with pytest.raises(Superseded):
        asyncio.run(own.certain(epoch))
    own.gained()
    seen.append(own.undisputed)
    assert seen == [True, False, True]


# -- noise -----------------------------------------------------------------------------------------------------------


def test_one_of_each_message_passes_and_the_others_are_counted() -> None:
    """Once in an interval for each template; the next one says how many were held back."""
    now = [0.0]
    limit = RateLimit(10.0, clock=lambda: now[0])

    def record(text: str, *args: object) -> logging.LogRecord:
        return logging.LogRecord("aiokafka.x", logging.ERROR, "f", 1, text, args, None)

    assert limit.filter(record("lost %s", 1))
    assert [limit.filter(record("lost %s", n)) for n in range(5)] == [False] * 5
    assert limit.filter(record("another"))
    now[0] = 10.0
    following = record("lost %s", 9)
    assert limit.filter(following)
    assert following.getMessage() == "lost 9 [5 more like this were held back]"


def test_a_request_of_a_stopped_client_is_told_in_a_line() -> None:
    """What asyncio says of a task of aiokafka's that nobody asked has no traceback; any other keeps its own."""

    async def failing(error: Exception) -> None:
        raise error

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    async def left_behind(error: Exception) -> None:
        task = asyncio.get_running_loop().create_task(failing(error))
        await asyncio.sleep(0)
        del task
        gc.collect()

    logger, handler, unheard = logging.getLogger("asyncio"), Lines(), Unheard()
    logger.addHandler(handler)
    logger.addFilter(unheard)
    try:
        asyncio.run(left_behind(KafkaConnectionError("Connection at 127.0.0.1:1 closed")))
        asyncio.run(left_behind(ValueError("ours")))
    finally:
        logger.removeFilter(unheard)
        logger.removeHandler(handler)
    ours, other = lines
    assert "Connection at 127.0.0.1:1 closed" in ours
    assert "Traceback" not in ours
    assert "Traceback" in other
