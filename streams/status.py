"""The materializer: keeps the status table abreast of the log.

Owns the loop, the lease and what happens when the broker, the database or another materializer gets in the way. What
the records mean is `jobledger.job`'s, how they become rows `projector`'s, where they come from `feed`'s.

A batch is one transaction: rows, counters, offsets, and the lease at its beginning. So a restart is a seek to the
offsets in the table, and no record is counted twice or left out, whenever the process dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from confluent_kafka import Message

from jobledger import greenlets, log
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
from jobledger.extras import missing
from jobledger.kafka import acls
from jobledger.kafka.topic_watch import TopicWatch
from jobledger.log import now_us, position_of
from jobledger.logger import get_logger
from jobledger.names import Names
from jobledger.outage import log_missed
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, RecordRejected
from jobledger.streams.batches import BatchSize, in_batches
from jobledger.streams.derived import derived_id
from jobledger.streams.feed import Feed, bounds
from jobledger.streams.intake import bounded
from jobledger.streams.projector import CACHE_JOBS, Folded, Projector
from jobledger.streams.store import Partition, Store, open_store, shown
from jobledger.streams.table_metrics import TableMetrics
from jobledger.writer import LogWriter, Outgoing

try:
    from prometheus_client import CollectorRegistry
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.materializer")

#: Records in one transaction, at most. Large, so that of a backlog the facts of a job often meet in one row's writing;
#: what comes as it happens is written every `LINGER_S`.
BATCH = 16_000
#: Seconds between two transactions under load: fewer are cheaper, and this is how late a fact may be seen.
LINGER_S = 0.01
#: Seconds of waiting for records before the loop looks at everything else.
PATIENCE_S = 0.1
#: Seconds between two looks for new topics and partitions.
DISCOVER_S = 5.0
#: Seconds a look for topics may take: well below the lease.
DISCOVER_TIMEOUT_S = 3.0
#: Seconds between two tries to get the lease.
STAND_BY_S = 0.5
#: Seconds between two renewals of the lease while nothing is written.
RENEW_S = 2.0
#: Seconds for which a database that is away is tried again.
STORE_PATIENCE_S = 30.0
#: Raw bytes of a rejected record above which they are left out: the dead letter must fit as well.
REJECT_BYTES = 700_000

#: Rejected records of one batch that are logged as warnings; the metric counts all.
SAY_REJECTS = 5

T = TypeVar("T")


class Materializer:
    """Writes the status table of one namespace; stands by while another one does.

    ``queues``: those the app declares; work topics of other queues that exist in the namespace are read, too.
    ``store_url``: where the table is. ``batch``: records a transaction at most. ``linger``: seconds between two
    transactions under load. ``store_patience``: seconds for which a database that is away is tried again.
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
        #: The next offset of every partition, as committed.
        self._offsets: Mapping[Partition, int] = {}
        self._writer: LogWriter | None = None
        #: The ids of the topics that `_offsets` are of, as committed; and those that are to be written.
        self._known: dict[str, str] = {}
        self._new_ids: dict[str, str] = {}
        self._topics = TopicWatch(self._settings, names, self._wanted, LOG)
        self._active = threading.Event()

    # -- for whoever watches ----------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether this materializer holds the lease."""
        return self._active.is_set()

    def offsets(self) -> Mapping[Partition, int]:
        """The next offset of every partition, as committed. From any thread."""
        return self._offsets

    def position(self) -> int:
        """The sum of `offsets`: grows with every record that is in the table."""
        return sum(self.offsets().values())

    def caught_up(self) -> bool:
        """Whether every record that is in the log now is in the table. From any thread; asks the broker."""
        return not behind(self._settings, self._names, self._offsets)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Write until ``stop`` is set.

        Raises `LeaseLost` if another materializer took over, `StoreError` if the database stays away or is not ours,
        `ConfigError` for a URL of no known kind, `AccessDenied` if the cluster refuses this client. A broker that is
        away is waited for; only if a dead letter cannot be sent for long, `BrokerUnavailable` is raised.
        """
        opens = partial(self._open_store, self._url, self._names.namespace)
        # Only a database that is away is waited for here; one that refuses us, or is not ours, will do so again.
        store = self._persist(opens, stop, StoreUnavailable)
        if store is None:
            return
        self._topics.start()
        try:
            going = self._stand_by(store, stop)
            while going:
                going = False
                try:
                    self._write(store, stop)
                except CommitUnknown as exc:
                    LOG.warning("%s; continuing from its offsets", exc)
                    going = not stop.is_set()
        finally:
            self._topics.close()
            self._active.clear()
            self.metrics.active.set(0)
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            try:
                store.close()
            except StoreError as exc:  # it is left to run out then
                LOG.warning("the lease could not be given back: %s", exc)

    def _stand_by(self, store: Store, stop: threading.Event) -> bool:
        said = False
        while not stop.is_set():
            if self._persist(store.acquire, stop):
                LOG.info("writing the status table %s", shown(self._url))
                return True
            if not said:
                LOG.info("the status table %s has a writer; standing by", shown(self._url))
                said = True
            stop.wait(STAND_BY_S)
        return False

    def _write(self, store: Store, stop: threading.Event) -> None:
        offsets = self._persist(store.offsets, stop)
        known = self._persist(store.topics, stop)
        if offsets is None or known is None:
            return
        self._offsets, self._known, self._new_ids = offsets, known, {}
        projector = Projector(store, log.decoder(self._settings, self._names), cache_jobs=self._cache_jobs)
        self._active.set()
        self.metrics.active.set(1)
        missing = True
        discovered = committed = renewed = looked = float("-inf")
        with Feed(self._settings, self._names) as feed:
            while not stop.is_set():
                now = time.monotonic()
                if now - discovered > (1.0 if missing else DISCOVER_S):
                    missing = self._discover(feed, first=discovered < 0)
                    discovered = now
                messages = feed.read(self._size.most, PATIENCE_S, committed + self._linger)
                if messages or feed.resets or self._new_ids:
                    self._write_batch(store, projector, feed, messages, stop)
                    if stop.is_set():
                        return
                    committed = renewed = time.monotonic()
                elif now - renewed > RENEW_S:
                    self._persist(store.renew, stop)
                    renewed = now
                if now - looked > 1.0:
                    self.metrics.lag(feed.lag(self._offsets))
                    looked = now

    def _wanted(self) -> set[str]:
        names = self._names
        return {names.lifecycle, names.coordination, names.dead_letter, *map(names.jobs, self._queues)}

    def _discover(self, feed: Feed, first: bool) -> bool:
        """Read whatever there is to read by now; whether something the app declares is still missing."""
        try:
            present = feed.present(timeout=DISCOVER_TIMEOUT_S)
        except BrokerUnavailable as exc:
            log_missed(LOG, self._settings, "%s", exc)
            return True
        feed.add({place: self._offsets.get(place) for place in self._of_same_topics(feed, present)})
        names = self._names
        wanted = self._wanted()
        missing = wanted - {topic for topic, _ in present}
        if first or missing:
            # A topic that this user may not read is not listed: that must not pass for one that does not exist.
            try:
                acls.check(self._settings, names.namespace, [*wanted, names.schemas] if first else missing)
            except BrokerUnavailable as exc:
                log_missed(LOG, self._settings, "%s", exc)
        if missing and first:
            LOG.warning(
                "waiting for topics that do not exist yet: %s; `jobledger topics apply MODULE:APP` creates them",
                ", ".join(sorted(missing)),
            )
        return bool(missing)

    def _of_same_topics(self, feed: Feed, present: set[Partition]) -> set[Partition]:
        """Those of the partitions whose topics are those that the offsets are of. Others are read from their start."""
        found = feed.identities({topic for topic, _ in present}, DISCOVER_TIMEOUT_S)
        known = {**self._known, **self._new_ids}
        others = {topic for topic, its in found.items() if known.get(topic, its) != its}
        try:
            if others:
                feed.restart([place for place in present if place[0] in others])
                LOG.error(
                    "%s: deleted and recreated since the table was written; reading from the start. Jobs that the table knows "
                    "stay in it",
                    ", ".join(sorted(others)),
                )
        except (BrokerUnavailable, TopicMissing) as exc:  # looked at again, with the id that is still the old one
            LOG.warning("%s", exc)
            return {place for place in present if place[0] not in others}
        self._new_ids |= {topic: its for topic, its in found.items() if known.get(topic) != its}
        return present

    def _write_batch(
        self, store: Store, projector: Projector, feed: Feed, messages: Sequence[Message], stop: threading.Event
    ) -> None:
        """All of it, in order; what is left when ``stop`` was set is read again at the next start."""

        def write(part: Sequence[Message]) -> None:
            if not stop.is_set():
                smaller = (StoreTooSlow,) if len(part) > 1 else ()
                self._persist(partial(self._apply, store, projector, feed, part), stop, raising=smaller)

        if messages:
            in_batches(messages, self._size, write, LOG)
        else:
            write(messages)  # only the partitions that begin elsewhere

    def _apply(self, store: Store, projector: Projector, feed: Feed, messages: Sequence[Message]) -> Folded:
        """One batch, whole: may be repeated if it fails."""
        folded = projector.fold(messages)
        folded.changes.resets, folded.changes.topics = dict(feed.resets), dict(self._new_ids)
        self._dead_letter(folded)
        store.write(folded.changes)
        projector.committed(folded)
        self._offsets = {**self._offsets, **feed.resets, **folded.changes.offsets}  # a new one: others read it
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
        return folded

    def _dead_letter(self, folded: Folded) -> None:
        """Keep what could not be read on lifecycle, which nobody else judges; and say what was found anywhere."""
        letters = []
        for number, each in enumerate(folded.rejected):
            level = logging.WARNING if number < SAY_REJECTS else logging.DEBUG
            where = position_of(each.message)
            # A fact of a newer version is an event, and stays where it is for a table of that version.
            if where.topic == self._names.lifecycle and not isinstance(each.error, UnknownFact):
                LOG.log(level, "%s is no event and goes to %s: %s", where, self._names.dead_letter, each.error)
                letters.append(self._letter(each.message, each.error))
            else:
                LOG.log(level, "%s is passed: %s", where, each.error)
        if letters:
            if self._writer is None:
                self._writer = LogWriter(self._settings, self._names)
            # Before the offsets: if this process dies in between it is sent again, under the same id.
            self._writer.send(letters)

    def _letter(self, message: Message, error: SchemaError) -> Outgoing:
        where = position_of(message)
        raw_key, raw, why = bounded(_raw(message.key()), _raw(message.value()), str(error), REJECT_BYTES)
        fact = RecordRejected(where.topic, where.partition, where.offset, raw_key, raw, why)
        event_id = derived_id(where.topic, where.partition, where.offset, "rejected")
        source = log.source("materializer")
        event = JobEvent(event_id, "", 0, 0, 0, now_us(), "", "", None, None, source, None, fact)
        return Outgoing(self._names.dead_letter, codec.encode(event), event_id)

    def _persist(
        self,
        act: Callable[[], T],
        stop: threading.Event,
        passing: type[StoreError] = StoreError,
        raising: tuple[type[StoreError], ...] = (),
    ) -> T | None:
        """Do it, again if the database or the broker is away, for a bounded time; None if stopped meanwhile.

        ``passing``: errors of the database that may pass. ``raising``: those of them that are the caller's business.
        """
        never: tuple[type[BaseException], ...] = (LeaseLost, CommitUnknown, *raising)
        deadline: float | None = None
        pause = 0.1
        while True:
            try:
                return act()
            except never:
                raise
            except (passing, BrokerUnavailable) as exc:
                now = time.monotonic()
                deadline = deadline or now + self._store_patience
                if now + pause > deadline:
                    raise
                LOG.warning("trying again in %g s: %s", pause, exc)
                self.metrics.retries.inc()
                if stop.wait(pause):
                    return None
                pause = min(2.0, pause * 2)


def behind(settings: Settings, names: Names, offsets: Mapping[Partition, int]) -> dict[Partition, int]:
    """How many records of each partition are in the log but not below ``offsets``; partitions without any are left out.

    Raises `BrokerUnavailable`.
    """
    with Feed(settings, names) as feed:
        there = bounds(settings, feed.present())
    lags = {place: high - max(low, offsets.get(place, 0)) for place, (low, high) in there.items()}
    return {place: lag for place, lag in lags.items() if lag > 0}


def _raw(data: bytes | str | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data
