"""Runs projections: reads batches from the log, calls the user's fold, and writes rows and offsets in one transaction.

Every transaction first moves the offsets from the values that this process expects. If another process has moved them,
nothing is written. So two processes of one projection fold no record twice, and a killed process leaves no partial
batch.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import sqlalchemy
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition
from sqlalchemy import Connection, MetaData, Table, and_, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from jobledger.config import Settings
from jobledger.definitions.projection import RESERVED, Projection
from jobledger.errors import BrokerUnavailable, JobledgerError, StoreError, StoreUnavailable
from jobledger.kafka import acls
from jobledger.kafka.auth import away, check_connection, read
from jobledger.kafka.clients import PASSING, admin, consumer_config, partitions_of, translate
from jobledger.kafka.clients import consumer as make_consumer
from jobledger.kafka.outage import log_missed
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader
from jobledger.process import greenlets
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.process.wording import counted
from jobledger.streams.projections.fold import Fold, Reading
from jobledger.streams.projections.projection_store import ProjectionStore, offsets_table, topics_table
from jobledger.streams.status.log_feed import identities

LOG = get_logger("jobledger.projection")

#: Largest number of records in one transaction, and seconds to wait for the first of them.
BATCH, POLL_S = 5_000, 0.1
#: Seconds between two attempts while the database is unavailable.
AWAY_S = 1.0
#: Seconds between two checks for new partitions, recreated topics and moved offsets.
LOOK_S = 10.0
#: Seconds within which the broker must return the ids of the topics before their records are folded.
IDENTIFY_S = 10.0
#: Seconds for which operations are retried while the database is unavailable, from their first error.
AWAY_PATIENCE_S = 30.0

Partition = tuple[str, int]


class Overtaken(StoreError):
    """Another process has moved this projection's offsets."""


@dataclass(slots=True)
class Checked:
    """The result of `verify` or `rebuild`. ``equal``: None after a rebuild, and if the tables differ but the log was
    trimmed.

    ``trimmed``: describes where the log no longer holds every record that the table was folded from. Then the table may
    be correct although it differs from a fold of the remaining records. ``seconds``: how long it took.
    """

    projection: str
    equal: bool | None
    rows: int
    records: int
    unreadable: int
    digest: str
    live_digest: str
    seconds: float
    trimmed: list[str] = field(default_factory=list)


class ProjectionRunner:
    """Runs one projection in one process; `run` blocks. Use it from one thread, and close it."""

    def __init__(
        self, projection: Projection, settings: Settings, names: Names, queues: Sequence[str], status_url: str
    ) -> None:
        greenlets.refuse("a projection")
        settings = settings.acting_as("projection")
        self.projection, self.settings, self.names = projection, settings, names
        self._reading = Reading(projection, settings, names, queues)
        self._store = ProjectionStore(status_url, names.namespace)
        self._engine = self._store.engine
        self.folded = 0
        self._my_topics = and_(
            topics_table.c.namespace == names.namespace, topics_table.c.projection == projection.name
        )
        self._mine = and_(offsets_table.c.namespace == names.namespace, offsets_table.c.projection == projection.name)

    def close(self) -> None:
        """Close the connections to the database."""
        self._store.close()

    @property
    def unreadable(self) -> int:
        """Number of records that could not be read as events and were skipped."""
        return self._reading.unreadable

    # -- the database ---------------------------------------------------------------------------------------------

    def _retry(self, stop: threading.Event, work: Callable[[], None]) -> None:
        """Call ``work``; retry for up to `AWAY_PATIENCE_S` seconds while the database is unavailable. Raises
        `StoreError`."""

        def explained() -> None:
            with self._explained():
                work()

        retry_until(
            lambda: time.monotonic() + AWAY_PATIENCE_S,
            explained,
            StoreUnavailable,
            pause=AWAY_S,
            stop=stop,
            on_retry=lambda error, seconds: LOG.warning("%s; trying again", error),
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an error of the database in the block into a `StoreError` that says what to do."""
        try:
            yield
        except sqlalchemy.exc.DBAPIError as exc:
            raise self._store.explain(exc, f"projection {self.projection.name}") from exc

    def _set_up(self) -> None:
        self._store.make(offsets_table, topics_table, self.projection.table)

    def _identities(self) -> dict[str, str]:
        """Return the ids of the topics that exist now."""
        client = admin(self.settings)  # keep a reference: a garbage-collected client never completes its futures
        return identities(client, self.settings, self._reading.topics)

    def _keep_topics(self, db: Connection, ids: Mapping[str, str]) -> None:
        """Store the ids of the topics to which the offsets belong."""
        rows = [
            {
                "namespace": self.names.namespace,
                "projection": self.projection.name,
                "topic": topic,
                "topic_id": topic_id,
            }
            for topic, topic_id in sorted(ids.items())
        ]
        if rows:
            statement = (postgresql.insert if db.dialect.name == "postgresql" else sqlite.insert)(topics_table)
            keys = list(topics_table.primary_key.columns)
            db.execute(
                statement.on_conflict_do_update(index_elements=keys, set_={"topic_id": statement.excluded.topic_id}),
                rows,
            )

    def _identify(self, stop: threading.Event) -> dict[str, str]:
        """Return the id of every topic that is folded. Raises `BrokerUnavailable` if an id is not returned in time:
        offsets must not be stored before the ids of their topics are known."""
        deadline = time.monotonic() + IDENTIFY_S
        while True:
            ids = self._identities()
            unidentified = sorted(set(self._reading.topics) - ids.keys())
            if not unidentified or stop.is_set():
                return ids
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    away(self.settings, f"did not return the ids of {', '.join(unidentified)} within {IDENTIFY_S:g} s")
                )
            stop.wait(0.2)

    def _check_topic_ids(self, known: Mapping[Partition, int], ids: Mapping[str, str]) -> None:
        """Raise `JobledgerError` if a folded topic was recreated, however many records it has now. ``ids``: the ids
        that the topics have now."""
        with self._engine.begin() as db:
            stored = {row.topic: row.topic_id for row in db.execute(select(topics_table).where(self._my_topics))}
            for partition, offset in sorted(known.items()):
                topic = partition[0]
                if topic in ids and stored.get(topic, ids[topic]) != ids[topic]:
                    raise self._offsets_went_back(partition, offset, "is a later topic with the same name")
            if any(stored.get(topic) != topic_id for topic, topic_id in ids.items()):
                self._keep_topics(db, ids)

    def offsets(self, db: Connection) -> dict[Partition, int]:
        """Return the next offset of each partition."""
        rows = db.execute(select(offsets_table).where(self._mine)).mappings()
        return {(row["topic"], row["partition"]): row["next_offset"] for row in rows}

    def _move(self, db: Connection, before: Mapping[Partition, int], after: Mapping[Partition, int]) -> None:
        """Move the offsets from ``before`` to ``after``. Raises `Overtaken` if the stored offsets are not those of
        ``before``."""
        for (topic, partition), offset in sorted(after.items()):  # the same order in all processes prevents deadlocks
            row_of_partition = and_(self._mine, offsets_table.c.topic == topic, offsets_table.c.partition == partition)
            known = before.get((topic, partition))
            if known is None:
                values = {
                    "namespace": self.names.namespace, "projection": self.projection.name, "topic": topic,
                    "partition": partition, "next_offset": offset,
                }  # fmt: skip
                insert = postgresql.insert if db.dialect.name == "postgresql" else sqlite.insert
                statement = insert(offsets_table).values(values).on_conflict_do_nothing()
                # SQLAlchemy drops the row count of an INSERT unless this option is set.
                moved = db.execute(statement, execution_options={"preserve_rowcount": True})
            else:
                row_of_partition = and_(row_of_partition, offsets_table.c.next_offset == known)
                moved = db.execute(update(offsets_table).where(row_of_partition).values(next_offset=offset))
            if moved.rowcount != 1:
                raise Overtaken(f"another process folds projection {self.projection.name}")

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, *, until_end: bool = False) -> None:
        """Fold until ``stop`` is set, or with ``until_end`` until the records that the log held at the start are
        folded.

        Raises `JobledgerError` if the fold fails, `StoreError` if the database stays unavailable, `BrokerUnavailable`,
        `TopicMissing`, `UnknownFact`, `IncompatibleEvent`. Nothing is lost: the next run continues from the offsets.
        """
        check_connection(self.settings)
        acls.check(self.settings, self.names.namespace, [*self._reading.topics, self.names.schemas])
        self._retry(stop, self._set_up)
        self._reading.check()
        while not stop.is_set():
            try:
                self._follow(stop, until_end)
                return
            except Overtaken as exc:
                LOG.warning("%s; the offsets are read again", exc)
                stop.wait(2.0)

    def _partitions(self) -> list[Partition]:
        return [(t, p) for t in self._reading.topics for p in range(partitions_of(self.settings, t))]

    def _follow(self, stop: threading.Event, until_end: bool) -> None:
        folding = Fold(self.projection, self.projection.table)
        known: dict[Partition, int] = {}

        def load() -> None:
            with self._engine.begin() as db:
                known.clear()
                known.update(self.offsets(db))

        self._retry(stop, load)
        ids = self._identify(stop)
        self._retry(stop, partial(self._check_topic_ids, known, ids))
        with _consumer(self.settings) as consumer:
            partitions = self._partitions()
            ends = self._ends(partitions) if until_end else {}
            for partition, (low, high) in self._watermarks(known).items():
                if known[partition] > high:
                    raise self._offsets_went_back(partition, known[partition], f"ends at {high}")
                if known[partition] < low:
                    LOG.error(
                        "projection %s: %s[%d] was trimmed up to offset %d, and %s of it had not been folded and "
                        "cannot be read any more",
                        self.projection.name, *partition, low, counted(low - known[partition], "record"),
                    )  # fmt: skip
            consumer.assign([TopicPartition(t, p, known.get((t, p), OFFSET_BEGINNING)) for t, p in partitions])
            look_at = time.monotonic() + LOOK_S
            while not stop.is_set():
                if not until_end and time.monotonic() >= look_at:
                    self._retry(stop, lambda: self._check_offsets(known))
                    ids = self._identities()
                    self._retry(stop, partial(self._check_topic_ids, known, ids))
                    partitions = self._join_new(consumer, partitions, known)
                    look_at = time.monotonic() + LOOK_S
                if until_end and not _has_unread(consumer, ends, known):
                    self._retry(stop, lambda: self._check_offsets(known))
                    return
                messages = _fetch(consumer, self.settings)
                if messages:
                    self._retry(stop, lambda batch=messages: self._transaction(folding, known, batch))  # type: ignore[misc]

    def _check_offsets(self, known: Mapping[Partition, int]) -> None:
        """Raise `Overtaken` if a rebuild has moved the offsets. Without new records no transaction would detect the
        move."""
        with self._engine.begin() as db:
            if self.offsets(db) != known:
                raise Overtaken(f"another process has moved the offsets of projection {self.projection.name}")

    def _join_new(
        self, consumer: Consumer, partitions: Sequence[Partition], known: Mapping[Partition, int]
    ) -> list[Partition]:
        """Assign partitions that were added meanwhile; return all partitions that are read."""
        try:
            current = self._partitions()
        except BrokerUnavailable as exc:
            log_missed(LOG, self.settings, "projection %s: %s", self.projection.name, exc)
            return list(partitions)
        new = sorted(set(current) - set(partitions))
        if new:
            LOG.info("projection %s reads %d new partitions: %s", self.projection.name, len(new), new)
            consumer.incremental_assign([TopicPartition(t, p, known.get((t, p), OFFSET_BEGINNING)) for t, p in new])
        return [*partitions, *new]

    def _watermarks(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, int]]:
        with LogReader(self.settings) as reader:
            return {partition: reader.bounds(*partition) for partition in partitions}

    def _ends(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        return {partition: high for partition, (low, high) in self._watermarks(partitions).items() if high > low}

    def _lows(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return {partition: low for partition, (low, _) in self._watermarks(partitions).items()}

    def _offsets_went_back(self, partition: Partition, known: int, now: str) -> JobledgerError:
        name = self.projection.name
        return JobledgerError(
            f"projection {name} was folded up to offset {known} of {partition[0]}[{partition[1]}], which now {now}: "
            "the topic was truncated "
            f"or recreated. Nothing was folded twice; `jobledger projections rebuild MODULE:APP {name}` folds the current records"
        )

    def _trimmed(self, partitions: Iterable[Partition]) -> list[str]:
        """Return a description of each of the partitions whose first records are no longer in the log."""
        return [f"{t}[{p}] begins at {low}" for (t, p), low in sorted(self._lows(partitions).items()) if low > 0]

    def _transaction(self, folding: Fold, known: dict[Partition, int], messages: Sequence[Message]) -> None:
        after = _ends_of(messages)
        for message in messages:
            partition, offset = _partition_of(message), message.offset() or 0
            if offset < known.get(partition, 0):
                raise self._offsets_went_back(partition, known[partition], f"has a new record at offset {offset}")
        with self._engine.begin() as db:
            self._move(db, known, after)
            items = list(self._reading.items(messages))
            folding.apply(db, items)
        known.update(after)
        self.folded += len(items)

    # -- checking -------------------------------------------------------------------------------------------------

    def verify(self, stop: threading.Event, tell: Callable[[int, int], None] = lambda done, total: None) -> Checked:
        """Fold the log again, up to the live table's offsets, into a second table, and compare the two tables. The live
        table may be written meanwhile.

        ``tell``: called after each batch with two sums over the partitions: of the offsets reached, and of the offsets
        to reach. ``equal`` is None if the tables differ and the log was trimmed. Raises as `run` does, and
        `JobledgerError` if ``stop`` is set.
        """
        began = time.monotonic()
        self._reading.check()
        self._retry(stop, self._set_up)
        with self._explained(), self._store.begin_snapshot() as db:
            ends = self.offsets(db)
            live, rows = _digest(db, self.projection.table)
        with self._explained(), self._copying("verify") as copy:
            records, trimmed = self._fold_again(copy, ends, stop, tell, "verify")
            with self._engine.begin() as db:
                again, _ = _digest(db, copy)
        duration = time.monotonic() - began
        equal = True if again == live else None if trimmed else False
        return Checked(self.projection.name, equal, rows, records, self.unreadable, again, live, duration, trimmed)

    def rebuild(
        self,
        stop: threading.Event,
        tell: Callable[[int, int], None] = lambda done, total: None,
        *,
        from_what_is_left: bool = False,
    ) -> Checked:
        """Fold the whole log into a second table, then replace the live table's rows and the offsets in one
        transaction. A process that runs the projection meanwhile detects the replacement, and continues from the new
        offsets.

        ``from_what_is_left``: rebuild even if the log was trimmed, so that the rows of trimmed records are lost.
        Without this option a trimmed log raises `JobledgerError`, and nothing changes. ``tell`` and errors: as in
        `verify`.
        """
        began = time.monotonic()
        self._reading.check()
        self._retry(stop, self._set_up)
        partitions = self._partitions()
        if not from_what_is_left:
            self._refuse(self._trimmed(partitions))
        ends, topics = self._ends(partitions), self._identify(stop)
        table = self.projection.table
        with self._explained(), self._copying("rebuild") as copy:
            records, trimmed = self._fold_again(copy, ends, stop, tell, "rebuild")
            if not from_what_is_left:  # the log was trimmed meanwhile, or only the count of its records shows this
                self._refuse(trimmed)
            with self._engine.begin() as db:
                live, _ = _digest(db, table)
                db.execute(delete(offsets_table).where(self._mine))
                db.execute(delete(topics_table).where(self._my_topics))
                self._keep_topics(db, topics)
                self._move(db, {}, ends)
                db.execute(delete(table))
                db.execute(table.insert().from_select([c.name for c in copy.columns], select(copy)))
                new_digest, rows = _digest(db, table)
        duration = time.monotonic() - began
        return Checked(self.projection.name, None, rows, records, self.unreadable, new_digest, live, duration, trimmed)

    def _refuse(self, trimmed: Sequence[str]) -> None:
        if trimmed:
            raise JobledgerError(
                f"rebuild of projection {self.projection.name}: the log was trimmed ({'; '.join(trimmed)}), so the table "
                "would lose the rows of trimmed records; nothing has changed. Use --from-what-is-left (from_what_is_left=True) to "
                "fold the rest anyway"
            )

    @contextmanager
    def _copying(self, why: str) -> Iterator[Table]:
        """Create an empty table like the projection's table, and drop it afterwards. Raises `StoreError` while another
        process uses a table of this name."""
        copy = self.projection.table.to_metadata(MetaData(), name=f"{RESERVED}{self.projection.name}_{why}")
        copy.indexes.clear()
        for constraint in copy.constraints:
            constraint.name = None  # in PostgreSQL the name is also an index's name, and the live table's index has it
        with self._store.alone(copy.name, f"a {why} of projection {self.projection.name}"):
            with self._engine.begin() as db:
                copy.drop(db, checkfirst=True)  # left by a killed process
                copy.create(db)
            try:
                yield copy
            finally:
                with self._engine.begin() as db:
                    copy.drop(db, checkfirst=True)

    def _fold_again(
        self,
        copy: Table,
        ends: Mapping[Partition, int],
        stop: threading.Event,
        tell: Callable[[int, int], None],
        why: str,
    ) -> tuple[int, list[str]]:
        """Fold the log up to ``ends`` into ``copy``. Return the number of records, and descriptions of the records that
        are missing."""
        begin = self._lows(ends)
        at, commands = dict(begin), 0
        folding, total, done = Fold(self.projection, copy), sum(ends.values()), 0
        with _consumer(self.settings) as consumer:
            consumer.assign([TopicPartition(t, p, OFFSET_BEGINNING) for t, p in ends])
            while _has_unread(consumer, ends, at):
                if stop.is_set():
                    raise JobledgerError(
                        f"{why} of projection {self.projection.name} was interrupted; nothing has changed"
                    )
                messages = [m for m in _fetch(consumer, self.settings) if (m.offset() or 0) < ends[_partition_of(m)]]
                if not messages:
                    continue
                with self._engine.begin() as db:
                    folding.apply(db, list(self._reading.items(messages)))
                at.update(_ends_of(messages))
                commands += sum(m.topic() == self.names.control for m in messages)
                done += len(messages)
                tell(sum(at.values()), total)
        trimmed = self._trimmed(ends)
        control = (self.names.control, 0)
        missing = ends[control] - begin[control] - commands if control in ends else 0
        if missing > 0:  # compaction keeps only the latest command of a key
            trimmed.append(f"{self.names.control} is compacted: {missing} of its records are gone")
        return done, trimmed


def _partition_of(message: Message) -> Partition:
    return message.topic() or "", message.partition() or 0


def _ends_of(messages: Sequence[Message]) -> dict[Partition, int]:
    return {_partition_of(message): (message.offset() or 0) + 1 for message in messages}


def _has_unread(consumer: Consumer, ends: Mapping[Partition, int], at: Mapping[Partition, int]) -> bool:
    """Return whether a partition is not yet read to its end. The client's position also moves past offsets without a
    record."""
    unread = [partition for partition, end in ends.items() if at.get(partition, 0) < end]
    if not unread:
        return False
    positions = consumer.position([TopicPartition(*partition) for partition in unread])
    return any(p.offset < ends[p.topic, p.partition] for p in positions)


@contextmanager
def _consumer(settings: Settings) -> Iterator[Consumer]:
    more: dict[str, Any] = {"queued.max.messages.kbytes": 32_768}
    consumer = make_consumer(consumer_config(settings, group="jobledger-projections", **more))
    try:
        yield consumer
    finally:
        consumer.close()


def _fetch(consumer: Consumer, settings: Settings) -> list[Message]:
    try:
        first = consumer.poll(POLL_S)
        messages = [] if first is None else [first, *consumer.consume(BATCH - 1, 0)]
    except KafkaException as exc:
        raise translate(exc.args[0], settings, "reading for a projection") from exc
    for message in messages:
        error = message.error()
        if error is not None and (error.fatal() or not (error.retriable() or error.code() in PASSING)):
            raise translate(error, settings, f"reading {message.topic()} for a projection", read(message.topic() or ""))
    return [message for message in messages if message.error() is None]


def _digest(db: Connection, table: Table) -> tuple[str, int]:
    """Return a digest of a table's rows in the order of their keys, and their number. Reads 1,000 rows at a time."""
    digest, rows = hashlib.sha256(), 0
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=1_000)
    for row in db.execute(query):
        digest.update(msgspec.json.encode(list(row), enc_hook=repr))
        rows += 1
    return digest.hexdigest(), rows


__all__ = ["Checked", "Overtaken", "ProjectionRunner"]
