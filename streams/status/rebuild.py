"""``rebuild`` recreates the status table from the log; ``verify`` checks whether the table matches the log.

Both functions fold the log again from its start: ``rebuild`` into a second table in the same kind of database,
``verify`` into a SQLite file. So memory depends only on the size of a batch and of the row folder's cache. Neither
function runs a job or writes to the log.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, StoreError
from jobledger.job import Life
from jobledger.kafka import acls, clients
from jobledger.kafka.auth import away
from jobledger.kafka.topic_names import Names
from jobledger.log.schema_lookup import decoder
from jobledger.process.logger import get_logger
from jobledger.streams.status.batch_size import BatchSize, in_batches
from jobledger.streams.status.log_feed import LogFeed, bounds, read_until
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import Changes, Partition, Store, copy, open_reader, open_store, scratch, shown
from jobledger.streams.status.store.reader import SqlReader
from jobledger.streams.status.store.removal import Removed
from jobledger.streams.status.store.rows import Row, life_of_row
from jobledger.streams.status.store.sqlite import SCRATCH, SqliteStore
from jobledger.streams.status.store.sqlite import open_reader as open_sqlite

LOG = get_logger("jobledger.materializer")

BATCH = 16_000
#: Number of jobs carried over at a time.
CHUNK = 2_000
#: Largest number of plans that a rebuild copies from the live table: the last ones.
PLANS_MOST = 100_000
#: Largest number of differing job ids that a report names.
NAMED = 20
#: Seconds to wait for the running materializer to stop before a rebuild is refused.
LEASE_PATIENCE_S = 15.0
RENEW_S = 2.0
#: Number of rows at a time that are read to find those that were removed from the previous table.
PAGE = 1_000
#: After every append time.
NEVER_MS = (1 << 63) - 1

#: Called after each batch with (number of records read, total number of records).
Tell = Callable[[int, int], None]
T = TypeVar("T")


class RebuildReport(msgspec.Struct, frozen=True):
    """The result of a rebuild. ``carried``: number of jobs of the previous table of which the log no longer has every
    fact. ``removed``: number of jobs of the log that are left out, because their rows had been removed from the previous
    table after their end."""

    url: str
    jobs: int
    carried: int
    records: int
    rejected: int
    seconds: float
    removed: int = 0


class VerifyReport(msgspec.Struct, frozen=True):
    """The result of a verification. ``equal``: whether the table matches the log, and its counters match its rows.

    ``jobs``: number of compared jobs. ``left_out``: number of jobs of which the log no longer has every fact.
    ``removed``: number of jobs of the log that are not compared, because their rows were removed from the table after
    their end. ``differing``: number of jobs that differ. ``first_differing``: the first ids of these jobs. ``counters_equal``:
    whether the table's counters match its own rows. ``table_digest``, ``log_digest``: digests of all compared jobs.
    """

    equal: bool
    url: str
    jobs: int
    left_out: int
    differing: int
    first_differing: tuple[str, ...]
    counters_equal: bool
    table_digest: str
    log_digest: str
    records: int
    seconds: float
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """The offsets of each partition that the log holds: from ``low`` up to, not including, ``high``.

    A job *begins within the log* if every fact of the job that the table includes is in the span (`holds`). The log
    holds only some of the facts of any other job, or none of them.

    ``begins``: the append time in ms of the first record that was read of each partition. In a recreated topic offsets
    restart at 0, but times do not. So a record that the table knows, with an offset in the span and an earlier time,
    was in a deleted topic of the same name.
    """

    low: dict[Partition, int]
    high: dict[Partition, int]
    begins: dict[Partition, int] = field(default_factory=dict)

    @property
    def records(self) -> int:
        return sum(high - self.low[partition] for partition, high in self.high.items())

    def outcomes_from(self, names: Names) -> int:
        """Return the append time in ms before which outcomes may be missing in the log, because it was trimmed; 0: none
        is missing."""
        trimmed = [place for place, low in self.low.items() if place[0] == names.lifecycle and low > 0]
        return max((self.begins.get(place, NEVER_MS) for place in trimmed), default=0)

    def holds(self, life: Life) -> bool:
        """Return whether every fact of a life is in the span."""
        report = life.report
        for ms, topic, partition, offset in life.positions if report is None else (*life.positions, report.at):
            place = (topic, partition)
            if place not in self.low or not self.low[place] <= offset < self.high[place]:
                return False
            if ms < self.begins.get(place, ms):
                return False
        return True


def rebuild(
    names: Names, settings: Settings, queues: Sequence[str], store_url: str, progress: Tell | None = None
) -> RebuildReport:
    """Build a new table from the log, then replace the live table with it. Readers see either the old or the new table.

    Jobs that do not begin within the log are copied from the live table, joined with their facts in the log, and marked
    as carried over. Plans whose facts were deleted from the log are copied, too. If anything fails, the live table is
    not changed. ``queues``: the queues whose work topics must be readable; work topics are found by name.

    The rebuild takes the table's lease, so a running materializer must be stopped first. Raises `StoreError` with the
    name of the lease's holder if the lease is not free within 15 s, `NotAuthorized` if a topic is not readable.
    """
    began = time.monotonic()
    settings = _allowed(names, settings, queues)
    with open_store(store_url, names.namespace) as live:
        _acquire_lease(live, store_url)
        with live.beside() as new:
            span, records, rejected = _fold_log(names, settings, new, None, {}, progress, live.renew)
            carried = _carry(names, settings, store_url, span, new, live.renew)
            removed = _leave_out(Removed(live.removed(), span.outcomes_from(names)), names, store_url, new, live.renew)
            _carry_plans(names, store_url, new)
            jobs = new.size()
            live.renew()
            live.replace_with(new)
    return RebuildReport(shown(store_url), jobs, carried, records, rejected, time.monotonic() - began, removed)


def _allowed(names: Names, settings: Settings, queues: Sequence[str]) -> Settings:
    """Return the settings for reading only. Check first that the topics may be read: the broker does not list a topic
    that this user may not read, so such a topic would count as empty."""
    settings = settings.acting_as("web")
    topics = (
        *map(names.jobs, queues),
        names.lifecycle,
        names.coordination,
        names.dead_letter,
        names.plans,
        names.schemas,
    )
    acls.check(settings, names.namespace, topics)
    return settings


def verify(
    names: Names, settings: Settings, queues: Sequence[str], store_url: str, progress: Tell | None = None
) -> VerifyReport:
    """Fold the log up to the table's offsets into a separate table, and compare the two tables job by job.

    Jobs that do not begin within the log are left out. The materializer may write the table meanwhile: the comparison
    uses a copy that is made at the beginning. Raises `StoreNotFound`, `StoreError` if the log is trimmed meanwhile,
    `NotAuthorized`, `TopicMissing` without a lifecycle topic, `BrokerUnavailable`.
    """
    began = time.monotonic()
    settings = _allowed(names, settings, queues)
    with _scratch(store_url) as temporary:
        folder = Path(temporary)
        # A copy of the present state, so that the materializer can continue to write the table.
        copy(store_url, names.namespace, folder / "table.db")
        copied = f"sqlite:///{folder / 'table.db'}"
        url = f"sqlite:///{folder / 'log.db'}"
        with closing(open_sqlite(copied, names.namespace)) as kept:
            offsets = kept.offsets()
            with SqliteStore(url, names.namespace) as store:
                store.acquire()
                span, records, _ = _fold_log(names, settings, store, offsets, kept.topics(), progress, lambda: None)
            with closing(open_sqlite(url, names.namespace)) as folded:
                comparison = _compare(kept, folded, span, Removed(kept.removed(), span.outcomes_from(names)))
                counters = kept.counters_hold()
    return VerifyReport(
        equal=comparison.differing == 0 and counters,
        url=shown(store_url),
        jobs=comparison.jobs,
        left_out=comparison.left_out,
        differing=comparison.differing,
        first_differing=tuple(comparison.named),
        counters_equal=counters,
        table_digest=comparison.table.hexdigest(),
        log_digest=comparison.log.hexdigest(),
        records=records,
        seconds=time.monotonic() - began,
        removed=comparison.removed,
    )


def _acquire_lease(live: Store, url: str) -> None:
    deadline = time.monotonic() + LEASE_PATIENCE_S
    while not live.acquire():
        if time.monotonic() > deadline:
            raise StoreError(
                f"the status table {shown(url)} is being written by {live.holder()}: stop `jobledger streams` (or "
                "`jobledger materializer`) first, then rebuild"
            )
        time.sleep(0.2)


def _scratch(store_url: str) -> tempfile.TemporaryDirectory[str]:
    parent = scratch(store_url)
    if parent is not None:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=parent)


def _fold_log(
    names: Names,
    settings: Settings,
    store: Store,
    offsets: Mapping[Partition, int] | None,
    topics: Mapping[str, str],
    progress: Tell | None,
    alive: Callable[[], object],
) -> tuple[Span, int, int]:
    """Fold the log into ``store`` up to ``offsets`` (None: its end). Return the span read, the number of records read
    and the number of rejected records.

    ``topics``: the known ids of the topics to which ``offsets`` belong. A topic that now has another id was recreated
    later, so it is left out. ``alive``: called about every two seconds.
    """
    projector = RowFolder(store, decoder(settings, names))
    records = rejected = 0
    size = BatchSize(BATCH)

    def write(part: Sequence[Message]) -> None:
        nonlocal rejected
        folded = projector.fold(part)
        store.write(folded.changes)
        projector.committed(folded)
        rejected += len(folded.rejected)

    with LogFeed(settings, names) as feed:
        span = _span(settings, names, feed, offsets)
        ids = _topic_ids(settings, feed, span, needed=offsets is None)
        recreated = {topic for topic, topic_id in ids.items() if topics.get(topic, topic_id) != topic_id}
        for topic_partition in [p for p in span.low if p[0] in recreated]:
            del span.low[topic_partition], span.high[topic_partition]
        feed.add({partition: low for partition, low in span.low.items() if low < span.high[partition]})
        partitions, total, renewed = len(feed.assigned), span.records, time.monotonic()
        for messages in read_until(feed, span.high, BATCH):
            if feed.resets:
                lost = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(feed.resets))
                raise StoreError(f"the log was trimmed while it was read ({lost}): try again")
            _note_begins(span, partitions, messages)
            in_batches(messages, size, write, LOG)
            records += len(messages)
            if progress is not None:
                progress(records, total)
            if time.monotonic() - renewed > RENEW_S:
                alive()
                renewed = time.monotonic()
    # Store the ends of partitions that no longer hold any record, too.
    store.write(Changes(offsets=dict(span.high), topics=ids))
    return span, records, rejected


def _topic_ids(settings: Settings, feed: LogFeed, span: Span, *, needed: bool) -> dict[str, str]:
    """Return the ids of the topics in ``span``, by name. Raises `BrokerUnavailable` if an id is ``needed`` and the
    broker does not return it in time: the offsets of a new table would belong to no known topic."""
    topics = {topic for topic, _ in span.low}
    ids = feed.identities(topics)
    unidentified = topics - ids.keys()
    if needed and unidentified:
        missing = ", ".join(sorted(unidentified))
        raise BrokerUnavailable(away(settings, f"did not return the ids of {missing} in time; nothing has changed"))
    return ids


def _note_begins(span: Span, partitions: int, messages: Sequence[Message]) -> None:
    """Store the append time of the first message of each partition in ``span``, until all ``partitions`` have one."""
    for message in messages if len(span.begins) < partitions else ():
        partition = (message.topic() or "", message.partition() or 0)
        if partition not in span.begins:
            span.begins[partition] = message.timestamp()[1]


def _span(settings: Settings, names: Names, feed: LogFeed, offsets: Mapping[Partition, int] | None) -> Span:
    present = feed.present()
    if names.lifecycle not in {topic for topic, _ in present}:
        clients.partitions_of(
            settings, names.lifecycle
        )  # raises an error: without lifecycle the log would seem empty, and no job would be compared
    low: dict[Partition, int] = {}
    high: dict[Partition, int] = {}
    for partition, (first, end) in sorted(bounds(settings, present).items()):
        if offsets is not None:
            end = min(end, offsets.get(partition, 0))
        low[partition], high[partition] = min(first, end), end
    return Span(low, high)


def _carry(names: Names, settings: Settings, live_url: str, span: Span, new: Store, alive: Callable[[], object]) -> int:
    """Join the live table's jobs that do not begin within the log into ``new``; return the number of these jobs."""
    projector = RowFolder(new, decoder(settings, names), cache_jobs=1)
    reader = open_reader(live_url, names.namespace)
    carried, size = 0, BatchSize(CHUNK)

    def write(some: Sequence[tuple[str, Life]]) -> None:
        new.write(projector.merge(some).changes)
        new.carry([job_id for job_id, _ in some])

    try:
        older = ((job_id, life) for job_id, life in reader.lives() if not span.holds(life))
        for some in _chunks(older, CHUNK):
            in_batches(some, size, write, LOG)
            carried += len(some)
            alive()
    finally:
        reader.close()
    return carried


def _leave_out(removed: Removed, names: Names, live_url: str, new: Store, alive: Callable[[], object]) -> int:
    """Remove from ``new`` the jobs whose rows the live table has removed, and store its limits there; return the number
    of these jobs. A row that the live table still has stays."""
    if not removed.limits:
        return 0
    count = 0
    with closing(open_reader(live_url, names.namespace)) as reader:
        for walk in removed.walks():
            at: tuple[int, str] | None = walk.after
            while at is not None:
                piece = new.remove(replace(walk, after=at), PAGE, reader.states)
                count, at = count + len(piece.removed), piece.after
                alive()
    new.write(Changes(removed=dict(removed.limits)))
    return count


def _carry_plans(names: Names, live_url: str, new: Store) -> None:
    """Copy the plans of the live table whose facts were deleted from the log."""
    with closing(open_reader(live_url, names.namespace)) as reader:
        rows = reader.plans(PLANS_MOST)
    for some in _chunks(iter(rows), CHUNK):
        folded = new.load_plans([plan.plan for plan in some])
        new.write(Changes(plans=[plan for plan in some if plan.plan not in folded]))


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk


class _Comparison:
    """The result so far of comparing two tables in order of ids."""

    def __init__(self) -> None:
        self.jobs = self.left_out = self.removed = self.differing = 0
        self.named: list[str] = []
        self.table, self.log = hashlib.sha256(), hashlib.sha256()

    def take(self, job_id: str, table: Row | None, log: Row | None) -> None:
        """Compare the two rows of one job. None: that table has no row of the job."""
        self.jobs += 1
        if table is not None:
            self.table.update(repr(table).encode())
        if log is not None:
            self.log.update(repr(log).encode())
        if table != log:
            self.differing += 1
            if len(self.named) < NAMED:
                self.named.append(job_id)


def _compare(kept: SqlReader, folded: SqlReader, span: Span, removed: Removed) -> _Comparison:
    comparison = _Comparison()
    ours, theirs = kept.rows(), folded.rows()
    a, b = next(ours, None), next(theirs, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a[0] < b[0]):
            assert a is not None
            if span.holds(life_of_row(a)):
                comparison.take(a[0], a, None)
            else:
                comparison.left_out += 1
            a = next(ours, None)
        elif a is None or b[0] < a[0]:
            if removed.lacks(life_of_row(b)):
                comparison.removed += 1
            else:
                comparison.take(b[0], None, b)
            b = next(theirs, None)
        else:
            if not span.holds(life_of_row(a)):
                comparison.left_out += 1
            elif a != b and removed.explains(life_of_row(a), life_of_row(b)):
                comparison.removed += 1
            else:
                comparison.take(a[0], a, b)
            a, b = next(ours, None), next(theirs, None)
    return comparison
