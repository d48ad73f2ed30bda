"""New facts of jobs, from the end of the log, for any number of event streams: one reader for each process.

A thread reads the log while there are listeners. The last events are in one ring buffer for all listeners; a listener
has only a place in this ring. So the memory does not depend on how slow listeners are: a listener whose next event is no
longer in the ring loses events, and `Feed.take` says so.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from jobledger.app import App
from jobledger.client.commands import is_copy
from jobledger.errors import ConfigError, JobledgerError, SchemaError, StoreError, TopicMissing, text_of
from jobledger.kafka.auth import check_connection, read
from jobledger.kafka.clients import PASSING, consumer, consumer_config, translate
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.process.logger import get_logger
from jobledger.schemas.events import Position
from jobledger.views.records import ANSWER_S
from jobledger.web.happenings import Happening, happening_of

LOG = get_logger("jobledger.web")

Partition = tuple[str, int]

#: Number of events in the ring, and bytes of them.
EVENTS_MOST, BYTES_MOST = 10_000, 8 * 1024 * 1024
#: Number of batches that wait for the event loop at a time.
BATCHES_WAITING = 8
#: Number of records that one poll returns, and seconds that it waits for the first.
POLL, POLL_S = 500, 0.1
#: Number of jobs whose tags are remembered.
TAGS_MOST = 20_000
#: Seconds between two checks for new partitions.
REFRESH_S = 10.0
#: Seconds for which the log is not opened again, after it could not be opened.
AWAY_S = 3.0
#: Largest number of records that are read again for a listener that connects again.
MISSED_MOST = 2_000


class Batch:
    """Events that were read together. ``number``: counted from 0. ``size``: bytes. ``ends``: the next offset of each
    partition after the batch."""

    __slots__ = ("ends", "events", "jobs", "number", "size")

    def __init__(self, number: int, events: Sequence[Happening], ends: Mapping[Partition, int]) -> None:
        self.number, self.events, self.ends = number, tuple(events), ends
        self.jobs = frozenset(event.job_id for event in events)
        self.size = sum(len(event.data) for event in events)


class Listener:
    """A place in the ring: the number of a batch, and of an event in it. ``jobs``: the only jobs whose events the
    listener wants; None: of all."""

    __slots__ = ("at", "jobs", "tags", "wake")

    def __init__(self, at: int, jobs: frozenset[str] | None, tags: bool) -> None:
        self.at, self.jobs, self.tags = (at, 0), jobs, tags
        self.wake = asyncio.Event()


class Feed:
    """Reads the log while there are listeners. The methods run on one event loop, the one of the first listener."""

    def __init__(self, app: App) -> None:
        self._app, self._settings = app, app.settings.acting_as("reader")
        self._decode = decoder(self._settings, app.names).decode
        self._listeners: set[Listener] = set()
        self._ring: deque[Batch] = deque()
        self._count = self._bytes = 0
        self._next, self._ends = 0, dict[Partition, int]()
        self._reading: _Reading | None = None
        self._opening: asyncio.Lock | None = None
        self._away: JobledgerError | None = None  # why the log could not be opened
        self._away_until = 0.0

    @property
    def listeners(self) -> int:
        """Number of listeners."""
        return len(self._listeners)

    @property
    def running(self) -> bool:
        """Whether the log is read."""
        return self._reading is not None

    async def join(self, jobs: frozenset[str] | None = None, tags: bool = False) -> Listener:
        """Return a listener for events from now on. Call `leave` for it. Raises the errors of the log."""
        self._opening = self._opening or asyncio.Lock()
        async with self._opening:
            if self._reading is None:
                # Without a broker, each client would otherwise wait for the attempts of all clients before it.
                if self._away is not None and time.monotonic() < self._away_until:
                    raise self._away.with_traceback(None)
                reading = _Reading(self, asyncio.get_running_loop())
                try:
                    self._ends = await asyncio.to_thread(reading.open)
                except JobledgerError as exc:
                    self._away, self._away_until = exc, time.monotonic() + AWAY_S
                    raise
                self._reading = reading
                reading.start()
            listener = Listener(self._next, jobs, tags)
            self._listeners.add(listener)
            self._reading.with_tags = any(each.tags for each in self._listeners)
            return listener

    def leave(self, listener: Listener) -> None:
        """Forget a listener. The log is not read any more when the last one has left."""
        self._listeners.discard(listener)
        if self._reading is not None:
            self._reading.with_tags = any(each.tags for each in self._listeners)
            if not self._listeners:
                self._end(self._reading)

    def take(self, listener: Listener, most: int) -> tuple[list[Happening], bool]:
        """Return the next ``most`` events for a listener, and whether events before them are lost."""
        number, index = listener.at
        first = self._ring[0].number if self._ring else self._next
        lost = number < first
        if lost:
            number, index = first, 0
        events: list[Happening] = []
        while number < self._next and len(events) < most:
            batch = self._ring[number - first]
            part = batch.events[index : index + most - len(events)]
            events += part
            index += len(part)
            if index >= len(batch.events):
                number, index = number + 1, 0
        listener.at = (number, index)
        return events, lost

    @property
    def ends(self) -> dict[Partition, int]:
        """The next offset of each partition after the last batch."""
        return dict(self._ends)

    def find(self, event_id: str) -> tuple[int, int] | None:
        """Return the place after the event with this id; None if the ring does not have it."""
        for batch in self._ring:
            for index, event in enumerate(batch.events):
                if event.event_id == event_id:
                    return batch.number, index + 1
        return None

    def missed(self, position: Position, appended_ms: int, ends: Mapping[Partition, int]) -> list[Happening] | None:
        """Return the events after a position up to these offsets, in order of their append times; None if the log does
        not have them any more, or has too many. Blocks. Raises the errors of the log."""
        ranges: dict[Partition, tuple[int, int]] = {}
        total = 0
        with LogReader(self._settings) as reader:
            for (topic, number), end in ends.items():
                low, _ = reader.bounds(topic, number)
                if (topic, number) == (position.topic, position.partition):
                    start = position.offset + 1
                    gone = position.offset < low
                else:
                    start = reader.offset_at(topic, number, appended_ms)
                    gone = 0 < low == start < end  # deleted records may have been appended after this time
                total += max(0, end - start)
                if gone or total > MISSED_MOST:
                    return None
                ranges[topic, number] = (start, end)
            if (position.topic, position.partition) not in ranges:
                return None
            messages = [m for (t, n), (start, end) in ranges.items() for m in reader.read(t, n, start, end)]
        found = [event for message in messages if (event := self.event(message)) is not None]
        self.add_tags(found, {})
        return sorted(found, key=lambda event: event.appended_ms)

    # -- called in the reading thread -----------------------------------------------------------------------------

    def event(self, message: Message) -> Happening | None:
        """Return the event of a record; None if streams do not show such a record."""
        try:
            record = recorded(message, self._decode)
        except (SchemaError, ConfigError):  # the materializer and `jobledger events` report such records
            return None
        return None if is_copy(record, self._app.names) else happening_of(record)

    def add_tags(self, events: Sequence[Happening], known: Mapping[str, Mapping[str, str]]) -> None:
        """Set the tags of events that do not have them, from ``known`` and the status table."""
        open_ = [event for event in events if event.tags is None]
        for event in open_:
            event.tags = known.get(event.job_id)
        wanted = list({event.job_id for event in open_ if event.tags is None})
        if not wanted:
            return
        try:
            statuses = self._app.status_table().statuses(wanted)
        except (StoreError, ConfigError) as exc:
            LOG.warning("the tags of %d jobs are not known: %s", len(wanted), text_of(exc))
            return
        for event in open_:
            if event.tags is None and event.job_id in statuses:
                event.tags = statuses[event.job_id].tags

    # -- called on the event loop ---------------------------------------------------------------------------------

    def publish(self, reading: _Reading, events: Sequence[Happening], ends: Mapping[Partition, int]) -> None:
        """Add events to the ring, and wake the listeners that may want them."""
        reading.room.release()
        if reading is not self._reading:
            return
        self._ends.update(ends)
        if not events:
            return
        batch = Batch(self._next, events, ends)
        self._ring.append(batch)
        self._next += 1
        self._count, self._bytes = self._count + len(events), self._bytes + batch.size
        while len(self._ring) > 1 and (self._count > EVENTS_MOST or self._bytes > BYTES_MOST):
            old = self._ring.popleft()
            self._count, self._bytes = self._count - len(old.events), self._bytes - old.size
        for listener in self._listeners:
            if listener.jobs is not None and listener.at == (batch.number, 0) and listener.jobs.isdisjoint(batch.jobs):
                listener.at = (self._next, 0)
            else:
                listener.wake.set()

    def failed(self, reading: _Reading, error: JobledgerError) -> None:
        """End all streams, because the log cannot be read any more. Clients connect again, and the log is then opened again."""
        if reading is not self._reading:
            return
        LOG.error("the event streams end: %s", text_of(error))
        self._end(reading)
        for listener in self._listeners:
            listener.at = (-1, 0)  # so that events are lost for the listener
            listener.wake.set()

    def _end(self, reading: _Reading) -> None:
        reading.stop.set()
        self._reading = None
        self._ring.clear()
        self._count = self._bytes = 0
        self._next += 1  # a listener that is still there has lost its place


class _Reading:
    """The thread that reads the log, from `open` until ``stop`` is set."""

    def __init__(self, feed: Feed, loop: asyncio.AbstractEventLoop) -> None:
        self._feed, self._loop = feed, loop
        self.stop = threading.Event()
        self.room = threading.BoundedSemaphore(BATCHES_WAITING)
        self.with_tags = False
        self._tags: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        self._client: Consumer | None = None
        self._next: dict[Partition, int] = {}

    def open(self) -> dict[Partition, int]:
        """Connect, and return the end of each partition, from which on the log is read. Blocks. Raises the errors of the
        log."""
        settings = self._feed._settings
        check_connection(settings, ANSWER_S)
        room: dict[str, Any] = {"queued.max.messages.kbytes": 4_096}
        self._client = consumer(consumer_config(settings, **room))
        try:
            with LogReader(settings) as reader:
                for topic, number in self._partitions():
                    self._next[topic, number] = reader.bounds(topic, number)[1]
            self._assign()
        except BaseException:
            self._client.close()
            raise
        return dict(self._next)

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="jobledger-events", daemon=True).start()

    def _run(self) -> None:
        assert self._client is not None
        try:
            refreshed = time.monotonic()
            while not self.stop.is_set():
                messages = self._poll()
                if messages:
                    self._hand_over(messages)
                if time.monotonic() - refreshed > REFRESH_S:
                    refreshed = time.monotonic()
                    self._refresh()
        except JobledgerError as exc:
            self._tell(self._feed.failed, self, exc)
        finally:
            self._client.close()

    def _poll(self) -> list[Message]:
        assert self._client is not None
        messages = []
        first = self._client.poll(POLL_S)  # not `consume`, which would wait for the whole number
        for message in [] if first is None else [first, *self._client.consume(POLL - 1, 0)]:
            error = message.error()
            if error is None:
                messages.append(message)
            elif not (error.retriable() or error.code() in PASSING):
                topic = message.topic() or "?"
                raise translate(error, self._feed._settings, f"reading {topic}", read(topic))
        return messages

    def _hand_over(self, messages: Sequence[Message]) -> None:
        events: list[Happening] = []
        ends: dict[Partition, int] = {}
        for message in messages:
            where = (message.topic() or "", message.partition() or 0)
            ends[where] = self._next[where] = (message.offset() or 0) + 1
            event = self._feed.event(message)
            if event is not None:
                events.append(event)
        events.sort(key=lambda event: event.appended_ms)  # partitions are read in any order
        self._remember(events)
        while not self.room.acquire(timeout=POLL_S):
            if self.stop.is_set():
                return
        self._tell(self._feed.publish, self, events, ends)

    def _remember(self, events: Sequence[Happening]) -> None:
        """Set the tags of events, if a listener filters by tags, and remember them."""
        for event in events:
            if event.tags is not None:
                self._tags[event.job_id] = event.tags
        if self.with_tags:
            self._feed.add_tags(events, self._tags)
            self._tags.update((event.job_id, event.tags) for event in events if event.tags is not None)
        while len(self._tags) > TAGS_MOST:
            self._tags.popitem(last=False)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the event loop, if the loop still runs."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop was closed: nobody listens any more
            self.stop.set()

    def _refresh(self) -> None:
        """Also read partitions that were added."""
        added = [each for each in self._partitions() if each not in self._next]
        if added:
            self._next.update(dict.fromkeys(added, 0))
            self._assign()

    def _assign(self) -> None:
        assert self._client is not None
        self._client.assign([TopicPartition(topic, number, at) for (topic, number), at in self._next.items()])

    def _partitions(self) -> list[Partition]:
        """Return the partitions of the topics with facts of jobs. Raises `TopicMissing` if there are none."""
        assert self._client is not None
        names, settings = self._feed._app.names, self._feed._settings
        try:
            topics = self._client.list_topics(timeout=10.0).topics
        except KafkaException as exc:
            if self._next:  # a short outage: continue with the known partitions
                return list(self._next)
            raise translate(exc.args[0], settings, "asking for topics") from exc
        wanted = [names.lifecycle, names.coordination, *map(names.jobs, self._feed._app.lanes)]
        if names.lifecycle not in topics and not self._next:
            raise TopicMissing(
                f"the topic {names.lifecycle} does not exist; create it with `jobledger topics apply MODULE:APP`"
            )
        return [(topic, number) for topic in wanted if topic in topics for number in topics[topic].partitions]
