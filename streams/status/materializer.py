"""The materializer: keeps the status table up to date with the log.

This module owns the loop, the lease, and what happens if the broker or the database is unavailable or another
materializer takes over. `jobledger.job` defines what records mean, `row_folder` turns records into rows, and `log_feed`
reads records.

A batch is one transaction, which first checks and renews the lease, then writes rows, counters and offsets. So after a
restart reading continues at the offsets in the table: no record is counted twice or left out, whenever the process
dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.errors import (
    BrokerUnavailable,
    CommitUnknown,
    LeaseLost,
    SchemaError,
    StoreError,
    StoreTooSlow,
    StoreUnavailable,
    TopicMissing,
    UnknownFact,
)
from jobledger.kafka import acls
from jobledger.kafka.clients import batch_limits, position_of
from jobledger.kafka.outage import log_missed
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topic_watch import TopicWatch
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process import greenlets
from jobledger.process.extras import missing
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.schemas.dead_letters import rejection
from jobledger.schemas.ids import derived_id
from jobledger.streams.status.batch_size import BatchSize, in_batches
from jobledger.streams.status.log_feed import LogFeed, bounds
from jobledger.streams.status.metrics import TableMetrics
from jobledger.streams.status.remover import Remover
from jobledger.streams.status.row_folder import CACHE_JOBS, Folded, RowFolder
from jobledger.streams.status.store import Partition, Store, open_store, shown
from jobledger.streams.status.store.removal import Reread

try:
    from prometheus_client import CollectorRegistry
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.materializer")

#: Largest number of records in one transaction. The number is large so that, while a backlog is read, several facts of
#: a job are often combined into one write of its row. Under normal load a transaction is written every `LINGER_S`.
BATCH = 16_000
#: Seconds between two transactions under load. A longer pause costs less, and delays each fact by up to its length.
LINGER_S = 0.01
#: Seconds to wait for records before the loop does its other work.
PATIENCE_S = 0.1
#: Seconds between two searches for new topics and partitions.
DISCOVER_S = 5.0
#: Timeout in seconds of a search for topics. The timeout must be well below the lease's duration.
DISCOVER_TIMEOUT_S = 3.0
#: Seconds between two attempts to get the lease.
STAND_BY_S = 0.5
#: Seconds between two renewals of the lease while nothing is written.
RENEW_S = 2.0
#: Seconds for which operations are retried while the database is unavailable.
STORE_PATIENCE_S = 30.0
#: Bytes that a batch with one dead letter has beside the record's value, at most.
BATCH_OVERHEAD = 200
#: Rejected records of one batch that are logged as warnings; the others are logged at DEBUG. The metric counts all.
SAY_REJECTS = 5

T = TypeVar("T")


class Materializer:
    """Writes the status table of one namespace, or waits as a standby while another materializer writes it.

    ``queues``: the queues that the app declares; existing work topics of other queues of the namespace are read, too.
    ``store_url``: URL of the table. ``batch``: largest number of records in a transaction. ``linger``: seconds between
    two transactions under load. ``store_patience``: seconds for which operations are retried while the database is
    unavailable.
    """

    def __init__(
        self,
        names: Names,
        settings: Settings,
        queues: Sequence[str],
        store_url: str,
        *,
        batch: int = BATCH,
        linger: float = LINGER_S,
        cache_jobs: int = CACHE_JOBS,
        store_patience: float = STORE_PATIENCE_S,
        registry: CollectorRegistry | None = None,
        open_store: Callable[[str, str], Store] = open_store,
    ) -> None:
        greenlets.refuse("the stream processor")
        self._names, self._settings, self._url = names, settings.acting_as("materializer"), store_url
        self._queues = tuple(queues)
        self._size, self._linger, self._cache_jobs = BatchSize(batch), linger, cache_jobs
        self._store_patience, self._open_store = store_patience, open_store
        self.metrics = TableMetrics(registry)
        #: Removes rows of ended jobs, when the maintenance asks for it.
        self.remover = Remover(partial(self.metrics.removed, names.namespace))
        self._reread = Reread()
        #: The next offset of every partition, as committed to the table.
        self._offsets: Mapping[Partition, int] = {}
        self._writer: LogWriter | None = None
        self._letter_bytes = self._settings.max_record_bytes
        #: `_known`: the committed ids of the topics to which `_offsets` belong. `_new_ids`: ids still to be written.
        self._known: dict[str, str] = {}
        self._new_ids: dict[str, str] = {}
        #: Workers that reported last before this time (ms of the broker's clock) are to be removed; None: no workers.
        self._workers_before_ms: int | None = None
        self._topics = TopicWatch(self._settings, names, self._wanted, LOG)
        self._active = threading.Event()

    # -- for observers ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether this materializer holds the lease."""
        return self._active.is_set()

    def offsets(self) -> Mapping[Partition, int]:
        """Return the next offset of every partition, as committed to the table. Any thread."""
        return self._offsets

    def position(self) -> int:
        """Return the sum of `offsets`. It grows with every record that the table includes."""
        return sum(self.offsets().values())

    def caught_up(self) -> bool:
        """Return whether the table includes every record that is in the log now. Any thread; asks the broker."""
        return not behind(self._settings, self._names, self._offsets)

    def forget_workers(self, before_ms: int) -> None:
        """Remove the rows of workers that reported last before this time, in milliseconds of the broker's clock. They
        are removed in the next transaction. Any thread."""
        self._workers_before_ms = before_ms

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Write the table until ``stop`` is set.

        Raises `LeaseLost` if another materializer took over, `StoreError` if the database stays unavailable or does not
        belong to this namespace, `ConfigError` for a URL of an unknown kind, `AccessDenied` if the cluster refuses this
        client. While the broker is unavailable, `run` waits. It raises `BrokerUnavailable` only if a dead letter cannot
        be sent within ``store_patience``, or if the broker does not return in time the first offset of a partition
        whose next record is no longer in the log.
        """
        opens = partial(self._open_store, self._url, self._names.namespace)
        # Retry only while the database is unavailable. A database that refuses access, or that belongs to something
        # else, would give the same error again.
        store = self._persist(opens, stop, StoreUnavailable)
        if store is None:
            return
        self._topics.start()
        try:
            continues = self._stand_by(store, stop)
            while continues:
                continues = False
                try:
                    self._write(store, stop)
                except CommitUnknown as exc:
                    LOG.warning("%s; reading continues from the offsets in the table", exc)
                    continues = not stop.is_set()
        finally:
            self._topics.close()
            self._active.clear()
            self.metrics.active.set(0)
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            try:
                store.close()
            except StoreError as exc:  # the lease expires by itself
                LOG.warning("the lease of the status table could not be released: %s", exc)

    def _stand_by(self, store: Store, stop: threading.Event) -> bool:
        logged = False
        while not stop.is_set():
            if self._persist(store.acquire, stop):
                LOG.info("writing the status table %s", shown(self._url))
                return True
            if not logged:
                LOG.info("another materializer writes the status table %s; this one is standing by", shown(self._url))
                logged = True
            stop.wait(STAND_BY_S)
        return False

    def _write(self, store: Store, stop: threading.Event) -> None:
        offsets = self._persist(store.offsets, stop)
        known = self._persist(store.topics, stop)
        removed = self._persist(store.removed, stop)
        reread = self._persist(store.reread, stop)
        if offsets is None or known is None or removed is None or reread is None:
            return
        self._offsets, self._known, self._new_ids = offsets, known, {}
        # The table may be an earlier state of itself now, so what was asked for may no longer be right.
        self.remover.stop()
        self._reread = Reread(max(removed.values(), default=0), reread)
        decode, workers = decoder(self._settings, self._names), self._names.workers
        projector = RowFolder(store, decode, cache_jobs=self._cache_jobs, reread=self._reread, workers=workers)
        self._active.set()
        self.metrics.active.set(1)
        missing = True
        discovered = committed = renewed = measured = float("-inf")
        with LogFeed(self._settings, self._names, workers=True) as feed:
            while not stop.is_set():
                now = time.monotonic()
                if now - discovered > (1.0 if missing else DISCOVER_S):
                    missing = self._discover(feed, first=discovered < 0)
                    discovered = now
                patience = min(PATIENCE_S, self.remover.wait(now))
                messages = feed.read(self._size.most, patience, committed + self._linger)
                if messages or feed.resets or self._new_ids or self._workers_before_ms is not None:
                    self._write_batch(store, projector, feed, messages, stop)
                    if stop.is_set():
                        return
                    committed = renewed = time.monotonic()
                elif now - renewed > RENEW_S:
                    self._persist(store.renew, stop)
                    renewed = now
                if self.remover.busy:
                    self._persist(partial(self._remove, store, projector), stop)
                if now - measured > 1.0:
                    self.metrics.lag(feed.lag(self._offsets))
                    measured = now

    def _wanted(self) -> set[str]:
        names = self._names
        facts = (names.lifecycle, names.coordination, names.dead_letter, names.plans)
        return {*facts, names.workers, *map(names.jobs, self._queues)}

    def _discover(self, feed: LogFeed, first: bool) -> bool:
        """Add the partitions that exist now to the feed; return whether to search again soon: a topic is missing,
        a topic's id is not known, or the broker did not list the topics."""
        try:
            present = feed.present(timeout=DISCOVER_TIMEOUT_S)
        except BrokerUnavailable as exc:
            log_missed(LOG, self._settings, "%s", exc)
            return True
        readable, unidentified = self._identified(feed, present)
        feed.add({partition: self._offsets.get(partition) for partition in readable})
        names = self._names
        wanted = self._wanted()
        # The table is complete without the workers' reports, so this topic may be missing, or not readable.
        missing = wanted - {names.workers} - {topic for topic, _ in present}
        if first or missing:
            # The broker does not list a topic that this user may not read. Such a topic must not count as missing.
            try:
                acls.check(self._settings, names.namespace, [*wanted, names.schemas] if first else missing)
            except BrokerUnavailable as exc:
                log_missed(LOG, self._settings, "%s", exc)
        if missing and first:
            LOG.warning(
                "waiting for topics that do not exist yet: %s; `jobledger topics apply MODULE:APP` creates them",
                ", ".join(sorted(missing)),
            )
        if unidentified:
            LOG.warning(
                "the broker did not return the ids of %s within %g s; asking again before these topics are read",
                ", ".join(sorted(unidentified)),
                DISCOVER_TIMEOUT_S,
            )
        return bool(missing or unidentified)

    def _identified(self, feed: LogFeed, present: set[Partition]) -> tuple[set[Partition], set[str]]:
        """Return the partitions that can be read, and the topics that cannot be read because their id is not known.

        Partitions of recreated topics are read from their start; they are left out if their start cannot be determined
        now. A topic whose id is not known is not read: if the topic were recreated before its id is stored, the stored
        offsets would be taken for offsets of the new topic.
        """
        ids = feed.identities({topic for topic, _ in present}, DISCOVER_TIMEOUT_S)
        known = {**self._known, **self._new_ids}
        unidentified = {topic for topic, _ in present} - known.keys() - ids.keys()
        present = {partition for partition in present if partition[0] not in unidentified}
        others = {topic for topic, topic_id in ids.items() if known.get(topic, topic_id) != topic_id}
        try:
            if others:
                feed.restart([partition for partition in present if partition[0] in others])
                LOG.error(
                    "%s: the topics were deleted and recreated, and are read from the start. Jobs that the status "
                    "table already "
                    "has stay in it",
                    ", ".join(sorted(others)),
                )
        except (BrokerUnavailable, TopicMissing) as exc:  # the old id stays, so the next search compares again
            LOG.warning("%s", exc)
            return {partition for partition in present if partition[0] not in others}, unidentified
        self._new_ids |= {topic: topic_id for topic, topic_id in ids.items() if known.get(topic) != topic_id}
        return present, unidentified

    def _write_batch(
        self, store: Store, projector: RowFolder, feed: LogFeed, messages: Sequence[Message], stop: threading.Event
    ) -> None:
        """Write all messages in order. Those not written when ``stop`` is set are read again at the next start."""

        def write(part: Sequence[Message]) -> None:
            if not stop.is_set():
                smaller = (StoreTooSlow,) if len(part) > 1 else ()
                self._persist(partial(self._apply, store, projector, feed, part), stop, raising=smaller)

        if messages:
            in_batches(messages, self._size, write, LOG)
        else:
            write(messages)  # no records: only offset resets, topic ids and the removal of workers

    def _remove(self, store: Store, projector: RowFolder) -> None:
        """Remove the next piece of old rows, if it is due."""
        try:
            removed, limits = self.remover.step(store, time.monotonic)
        except StoreError:  # the transaction may have been committed
            projector.forget(None)
            raise
        projector.forget(removed)
        self._reread.before_ms = max(self._reread.before_ms, *limits.values(), 0)

    def _apply(self, store: Store, projector: RowFolder, feed: LogFeed, messages: Sequence[Message]) -> Folded:
        """Write one batch in one transaction. The call can be repeated if it fails."""
        self._reread.partitions |= feed.resets.keys()
        folded = projector.fold(messages)
        folded.changes.resets, folded.changes.topics = dict(feed.resets), dict(self._new_ids)
        folded.changes.workers_before_ms = self._workers_before_ms
        self._dead_letter(folded)
        store.write(folded.changes)
        projector.committed(folded)
        if any(not plan.state.ended for plan in folded.changes.plans):
            self.remover.stop("a plan has not ended")  # it may name jobs whose rows would go
        # A new dict is made, because other threads may read the old one.
        self._offsets = {**self._offsets, **feed.resets, **folded.changes.offsets}
        metrics = self.metrics
        metrics.batches.inc()
        metrics.jobs.inc(len(folded.changes.jobs))
        metrics.events(folded.events)
        for each in folded.rejected:
            metrics.rejected(each.message.topic() or "", type(each.error).__name__)
        for topic, _ in feed.resets:
            metrics.reset(topic)
        feed.resets.clear()
        self._known |= folded.changes.topics
        self._new_ids.clear()
        self._workers_before_ms = None
        return folded

    def _dead_letter(self, folded: Folded) -> None:
        """Send unreadable records of the lifecycle topic to the dead letters, because no other process checks that
        topic. Log the unreadable records of every topic."""
        copied = []
        for number, each in enumerate(folded.rejected):
            level = logging.WARNING if number < SAY_REJECTS else logging.DEBUG
            position = position_of(each.message)
            # A fact of a newer version is a valid event. The record stays in the topic, so that a table of that version
            # can include it.
            if position.topic == self._names.lifecycle and not isinstance(each.error, UnknownFact):
                LOG.log(
                    level, "%s is not an event and is copied to %s: %s", position, self._names.dead_letter, each.error
                )
                copied.append(each)
            else:
                LOG.log(level, "%s is skipped: %s", position, each.error)
        if copied:
            if self._writer is None:
                self._letter_bytes = self._accepted_bytes()
                self._writer = LogWriter(self._settings, self._names)
            # Send the dead letters before the offsets are written: if this process dies in between, the same dead
            # letters are sent again with the same ids.
            self._writer.send([self._letter(each.message, each.error) for each in copied])

    def _accepted_bytes(self) -> int:
        """Return the largest size of a dead letter that its topic accepts, if this is known, and at most
        ``max_record_bytes``."""
        topic, most = self._names.dead_letter, self._settings.max_record_bytes
        accepted = batch_limits(self._settings, [topic]).get(topic)
        return most if accepted is None else min(most, accepted - BATCH_OVERHEAD)

    def _letter(self, message: Message, error: SchemaError) -> Outgoing:
        at = position_of(message)
        event_id = derived_id(at.topic, at.partition, at.offset, "rejected")
        value = rejection(
            at.topic,
            at.partition,
            at.offset,
            _raw(message.key()),
            _raw(message.value()),
            str(error),
            event_id=event_id,
            at_us=now_us(),
            source=source("materializer"),
            limit=self._letter_bytes,
        )
        return Outgoing(self._names.dead_letter, value, event_id)

    def _persist(
        self,
        act: Callable[[], T],
        stop: threading.Event,
        passing: type[StoreError] = StoreError,
        raising: tuple[type[StoreError], ...] = (),
    ) -> T | None:
        """Call ``act`` and return its result. Retry for up to ``store_patience`` seconds if the database or the broker
        is unavailable. Return None if ``stop`` is set meanwhile.

        ``passing``: errors of the database that are retried. Of these, `LeaseLost`, `CommitUnknown` and the errors of
        ``raising`` are raised at once.
        """
        never: tuple[type[BaseException], ...] = (LeaseLost, CommitUnknown, *raising)

        def again(error: StoreError | BrokerUnavailable) -> bool:
            return not isinstance(error, never)

        def on_retry(error: StoreError | BrokerUnavailable, seconds: float) -> None:
            LOG.warning("trying again in %.2g s: %s", seconds, error)
            self.metrics.retries.inc()

        try:
            return retry_until(
                lambda: time.monotonic() + self._store_patience,
                act,
                (passing, BrokerUnavailable),
                pause=0.1,
                pause_most=2.0,
                again=again,
                stop=stop,
                on_retry=on_retry,
            )
        except (passing, BrokerUnavailable) as exc:
            if stop.is_set() and again(exc):
                return None
            raise


def behind(settings: Settings, names: Names, offsets: Mapping[Partition, int]) -> dict[Partition, int]:
    """Return for each partition the number of records that are in the log at or above ``offsets``. Partitions without
    such records are left out.

    Raises `BrokerUnavailable`.
    """
    with LogFeed(settings, names) as feed:
        in_log = bounds(settings, feed.present())
    lags = {partition: high - max(low, offsets.get(partition, 0)) for partition, (low, high) in in_log.items()}
    return {partition: lag for partition, lag in lags.items() if lag > 0}


def _raw(data: bytes | str | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data
