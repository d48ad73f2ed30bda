"""The coordinator's parts that need no broker: settings, folders, rows, decoding, ownership, log filters."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError, SaslAuthenticationFailed
from hypothesis import given
from hypothesis import strategies as st

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, NotAuthenticated, SchemaError, TopicMissing
from jobledger.kafka.topic_names import Names
from jobledger.schemas import codec
from jobledger.schemas.dead_letters import KEY_BYTES
from jobledger.schemas.events import JobEvent, JobSpec, JobSubmitted, RecordRejected
from jobledger.streams.coordinator.decoding import RecordDecoder
from jobledger.streams.coordinator.faust import async_producer, faust_app
from jobledger.streams.coordinator.faust.async_producer import AckedWriter
from jobledger.streams.coordinator.faust.faust_app import Options, changelog, faust_settings
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir, lock_instance_dir
from jobledger.streams.coordinator.faust.local_store import MemoryRows, RocksRows, merged
from jobledger.streams.coordinator.faust.log_filters import RateLimit, Unheard
from jobledger.streams.coordinator.ownership import GAP, Ownership, Superseded
from jobledger.streams.coordinator.rules.schedule_rows import Floor, Marker, decode_row, encode_row
from jobledger.streams.coordinator.work_topics import RETRY, WorkTopics


def test_faust_reads_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faust's variables of another program have no effect, and the changelog of the table has our name."""
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
    """A coordinator takes the first free folder, with the member id of that folder. A restart takes the same folder
    again."""
    one, two = lock_instance_dir(tmp_path, "shop"), lock_instance_dir(tmp_path, "shop")
    assert one.folder != two.folder
    assert one.instance != two.instance
    one.release()
    again = lock_instance_dir(tmp_path, "shop")
    assert (again.folder, again.instance) == (one.folder, one.instance)
    again.release()
    two.release()


def test_without_a_writable_folder_the_coordinator_keeps_its_rows_in_memory(tmp_path: Path) -> None:
    """The coordinator works, but is no static member of its group, and a restart reads the whole changelog."""
    (tmp_path / "file").write_text("x")
    folder = lock_instance_dir(tmp_path / "file", "shop")
    assert (folder.durable, folder.instance) == (False, None)


def test_rows_of_another_log_are_thrown_away(tmp_path: Path) -> None:
    """The offsets in the rows have no meaning for a recreated topic or another cluster. For the same log the rows are
    kept."""
    instance_dir = lock_instance_dir(tmp_path, "shop")
    rows = instance_dir.folder / "v1" / "tables"
    instance_dir.keep_for("cluster/topic")
    rows.mkdir(parents=True)
    instance_dir.keep_for("cluster/topic")
    assert rows.exists()
    instance_dir.keep_for("cluster/other")
    assert not rows.exists()
    instance_dir.release()


# -- rows ------------------------------------------------------------------------------------------------------------


def marker(offset: int) -> bytes:
    return encode_row(Marker(0, offset, 1, 1, 0))


def test_the_row_of_the_later_event_wins_in_any_order_of_writes() -> None:
    """The late write of a paused coordinator undoes nothing. A value that is not a row is ignored."""
    assert merged(None, marker(3)) == marker(3)
    assert merged(marker(3), marker(4)) == marker(4)
    assert merged(marker(4), marker(3)) is None
    for garbage in (b"\xff garbage", b"", b"\x93\x01\x02", msgspec.msgpack.encode([1, "x"]), b"\xc1"):
        assert merged(marker(4), garbage) is None


def test_a_floor_of_a_later_log_wins() -> None:
    """A coordinator that was paused while the topic was recreated writes the floor of the old log late."""
    new, late = encode_row(Floor(0, 50, 71)), encode_row(Floor(0, 90))
    assert merged(new, late) is None
    assert merged(late, new) == new
    assert decode_row(msgspec.msgpack.encode([2, 0, 50])) == Floor(0, 50)


def test_a_row_of_an_unknown_kind_asks_for_an_upgrade() -> None:
    """The row is well-formed, so a later version wrote it."""
    with pytest.raises(SchemaError, match="upgrade"):
        merged(None, msgspec.msgpack.encode([9, 1, 2]))


@pytest.fixture(params=["rocksdb", "memory"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Each of the two local copies of the table: on disk and in memory."""

    async def make() -> Any:
        instance_dir = InstanceDir(tmp_path, request.param == "rocksdb", None, None)
        app, table = faust_app.build(Names("shop"), Settings(bootstrap="h:1"), Options(), 2, instance_dir)
        app._create_directories()
        if instance_dir.durable:
            for partition in range(2):
                table.data._db_for_partition(partition)
        return table.data

    made = asyncio.run(make())
    assert isinstance(made, RocksRows if request.param == "rocksdb" else MemoryRows)
    return made


def restored(partition: int, offset: int, key: bytes, value: bytes | None) -> Any:
    """Return a changelog record in the form that Faust passes."""
    tp = SimpleNamespace(topic="shop.coordinator-schedules-changelog", partition=partition)
    return SimpleNamespace(message=SimpleNamespace(tp=tp, partition=partition, offset=offset, key=key, value=value))


def test_rows_are_kept_by_partition_and_scanned_in_order(rows: Any) -> None:
    """Rows are written, read and deleted. A scan continues after the last key of the scan before."""
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
def test_restoring_keeps_the_latest_row_and_notes_late_writes(order: list[int], chunk: int) -> None:
    """The versions of a row may be on the changelog in any order and in batches of any size."""
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


def test_restoring_deletes_rows_and_stores_its_offset(rows: Any) -> None:
    """A tombstone deletes a row. A restart continues at the stored offset; rows in memory have none."""
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


# -- decoding --------------------------------------------------------------------------------------------------------


#: Largest size of a dead letter, bytes.
LETTER_BYTES = 600_000


def test_a_record_with_its_writers_time_counts_as_appended_now() -> None:
    """Only a time that the broker set is a time of the broker's clock. With another time, a delayed job could be
    released early."""
    fact = JobSubmitted(JobSpec(b"{}"), 60_000)
    value = codec.encode(JobEvent("e", "j", 1, 1, 0, 0, "send", "mail", None, None, "test", None, fact))
    messages = [
        SimpleNamespace(
            topic="shop.coordination", partition=0, offset=n, timestamp=5, timestamp_type=n, key=None, value=value
        )
        for n in (0, 1)
    ]
    read, _ = asyncio.run(
        RecordDecoder(Names("shop"), codec.Decoder(), "test", lambda: 7, LETTER_BYTES).decode(messages)
    )
    assert [each.appended_ms for each in read] == [7, 5]


def taken_in(value: bytes | None, key: bytes | None = None) -> tuple[list[Any], list[RecordRejected]]:
    """Decode one record; return the events and the dead letters."""
    message = SimpleNamespace(
        topic="shop.coordination", partition=0, offset=3, timestamp=1, timestamp_type=1, key=key, value=value
    )
    read, rejects = asyncio.run(
        RecordDecoder(Names("shop"), codec.Decoder(), "test", lambda: 7, LETTER_BYTES).decode([message])
    )
    facts = [codec.decode(each.value).fact for each in rejects]
    assert all(len(each.value or b"") <= LETTER_BYTES for each in rejects)
    return list(read), [fact for fact in facts if isinstance(fact, RecordRejected)]


def test_a_rejected_record_fits_the_dead_letters_whatever_its_key() -> None:
    """The dead letter has key and value as far as they fit, and its error says what is missing."""
    key, value = b"k" * 900_000, b"v" * 90_000
    _, (fact,) = taken_in(value, key)
    assert (fact.raw_key, fact.raw_value) == (key[:KEY_BYTES], value)
    assert f"the first {KEY_BYTES} of its key's 900000 bytes" in fact.error
    value = b"v" * (LETTER_BYTES + 1)
    _, (fact,) = taken_in(value, b"k")
    assert fact.raw_key == b"k"
    assert fact.raw_value == value[: len(fact.raw_value or b"")]
    assert f"the first {len(fact.raw_value or b'')} of its value's {len(value)} bytes" in fact.error
    _, (fact,) = taken_in(None, key)
    assert (fact.raw_key, fact.raw_value) == (key[:KEY_BYTES], None)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({"job_id": ""}, "job_id of this"),
        ({"job_id": "j" * 1_001}, "job_id has more than 1000 bytes"),
        ({"job_id": "€" * 334}, "job_id has more than 1000 bytes"),
        ({"home": "h" * 1_001}, "home has more than 1000 bytes"),
        ({"release": (1 << 31) - 1}, "is above"),
    ],
)
def test_an_event_that_cannot_become_a_row_is_rejected(head: dict[str, Any], why: str) -> None:
    """The event has no job, or an id or number that is too large for the records that derive from it."""
    event = JobEvent("e", "j", 1, 1, 0, 0, "t", "q", None, None, "s", None, JobSubmitted(JobSpec(b"{}"), 1))
    assert len(taken_in(codec.encode(msgspec.structs.replace(event, job_id="j" * 1_000)))[0]) == 1
    read, (fact,) = taken_in(codec.encode(msgspec.structs.replace(event, **head)))
    assert read == []
    assert why in fact.error


# -- ownership -------------------------------------------------------------------------------------------------------


class FakeGroup:
    """A consumer group with prepared answers."""

    def __init__(self) -> None:
        self.stable, self.generation, self.answer, self.asked = True, 1, True, 0

    async def confirm(self) -> bool:
        self.asked += 1
        return self.answer


def owner(group: FakeGroup, times: list[float]) -> Ownership:
    made = Ownership(group, clocks=lambda: (times[0], times[0]))  # type: ignore[arg-type]
    made.gained()
    return made


def test_ownership_is_certain_while_time_passes_without_a_gap() -> None:
    """The coordinator does not ask the broker."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    for _ in range(10):
        times[0] += GAP / 2
        assert own.undisputed
        asyncio.run(own.require(own.epoch))
    assert group.asked == 0


def test_after_a_gap_the_coordinator_waits_until_the_broker_confirms_its_ownership() -> None:
    """The first check after the gap asks the broker. One confirmation is enough."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    times[0] += GAP + 0.1
    group.answer = False
    with pytest.raises(Superseded):
        asyncio.run(own.require(own.epoch))
    seen = [own.undisputed]
    group.answer = True
    asyncio.run(own.require(own.epoch))
    assert [*seen, own.undisputed] == [False, True]
    assert group.asked == 2


def test_work_that_began_before_a_rebalance_does_not_continue() -> None:
    """No work begins during the rebalance, either."""
    group, times = FakeGroup(), [0.0]
    own = owner(group, times)
    epoch = own.epoch
    seen = [own.undisputed]
    own.revoking()
    seen.append(own.undisputed)
    own.moved()
    with pytest.raises(Superseded):
        asyncio.run(own.require(epoch))
    own.gained()
    seen.append(own.undisputed)
    assert seen == [True, False, True]


# -- log filters -----------------------------------------------------------------------------------------------------


def test_a_repeated_log_message_passes_once_in_an_interval() -> None:
    """The limit counts for each template. The next message that passes has the number of suppressed ones."""
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
    assert following.getMessage() == "lost 9 [5 more messages like this were dropped]"


def test_a_failed_request_of_a_stopped_client_is_logged_in_one_line() -> None:
    """The log record of an aiokafka task whose error was never retrieved has no traceback. The records of other tasks
    keep their tracebacks."""

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


# -- work topics -----------------------------------------------------------------------------------------------------


def test_a_topic_about_which_no_broker_answers_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its releases wait, the coordinator asks again soon, and no message says that the topic is missing."""
    topics = WorkTopics(Names("shop"), Settings(), {})
    answers: list[Exception | None] = [*[BrokerUnavailable("h:1 is away")] * 6, TopicMissing("no mail"), None]

    def ask(topic: str) -> int | None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return 1000

    monkeypatch.setattr(topics, "_ask", ask)

    async def search() -> None:
        for _ in range(6):
            assert not await topics._look("shop.jobs.mail")
            assert (topics.missing, topics.is_open("mail")) == ([], False)
            assert 0 < topics.retry_in("mail") < 2 * RETRY
        assert "topic exists" not in caplog.text
        assert not await topics._look("shop.jobs.mail")
        assert topics.missing == ["shop.jobs.mail"]
        assert await topics._look("shop.jobs.mail")
        assert (topics.missing, topics.is_open("mail"), topics.retry_in("mail")) == ([], True, 0.0)

    asyncio.run(search())


# -- the producer ----------------------------------------------------------------------------------------------------


def test_a_refused_login_is_found_although_the_first_broker_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer connects to each address until a broker answers, to IPv6 addresses without their brackets."""
    asked: list[tuple[str, int]] = []

    async def connect(host: str, port: int, **more: Any) -> Any:
        asked.append((host, port))
        if host == "::1":
            raise SaslAuthenticationFailed("SASL authentication failed")
        raise ConnectionRefusedError

    monkeypatch.setattr(async_producer, "create_conn", connect)

    async def search() -> NotAuthenticated | None:
        settings = Settings(bootstrap="127.0.0.1:9,[::1]:9,127.0.0.1:8")
        writer = AckedWriter(settings, {}, 1.0)
        try:
            return await writer._refused()
        finally:
            await writer.stop(1.0)

    assert "SASL authentication failed" in str(asyncio.run(search()))
    assert asked == [("127.0.0.1", 9), ("::1", 9)]
