"""Ends that were written after the takeover's scan, by a process that only stood still: it sends, when it wakes, what lay
in its Kafka client.

A suspect's code is run only if lifecycle was read, from where the scan ended to its end of that moment, since the suspect's
own start was acknowledged. All facts of a release stand in one partition, in one order: an end before that start is found,
and the job is not run again. Source: docs/adr/0011. A thread of its own, because another takeover may take its time.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from itertools import islice

from confluent_kafka import Message

from jobledger.config import Settings
from jobledger.consumers.offsets import DOUBT_MOST
from jobledger.consumers.ranges import RangesThread
from jobledger.consumers.releases import end_of, release_key
from jobledger.consumers.work import NOTHING_FOLLOWS, Found, Partition, Work
from jobledger.errors import JobledgerError, RegistryNeeded
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import JobLeased, JobRetried, JobSnoozed

#: Seconds that reading may take for its answer to hold, and how often it is read on at most.
QUICK_S, READINGS = 0.5, 3
#: Milliseconds after which nothing is asked for again that follows from an end: whoever wrote it has done so, or the
#: coordinator misses it by now, and half of what it remembers is over.
ASKED_MS = 300_000


class _Seen:
    """What was read of lifecycle behind a partition's scan: up to where, and where the ends of releases stand."""

    __slots__ = ("ends", "read_to")

    def __init__(self, read_to: int) -> None:
        self.read_to = read_to
        self.ends: dict[int, int] = {}  # whoever wrote them: what is still to come cannot have ended here


class LateEnds(RangesThread[Work]):
    """Looks for the ends of suspects. ``looked(work, found)`` is called in this thread with the end that was found, or
    None: once for each that was asked for."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: str,
        decoder: Decoder,
        *,
        looked: Callable[[Work, Found | None], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__("jobledger-late-ends", "looking for ends that came late", settings, fail)
        self._lifecycle, self._decoder, self._looked = lifecycle, decoder, looked
        self._lock = threading.Lock()  # nothing is put after what ends the thread
        self._seen = weakref.WeakKeyDictionary[Partition, _Seen]()

    def look(self, work: Work) -> None:
        """Look for an end of the job's release, as of now. Returns at once; callable from any thread."""
        with self._lock:
            if not self._closing:
                self._todo.put(work)
                return
        self._looked(work, None)

    def close(self) -> None:
        """Look for nothing more. What is asked for is still answered, as not found: nothing is run any more."""
        with self._lock:
            if not self._closing:
                super().close()

    def _rest(self) -> None:
        super()._rest()
        self._seen.clear()

    def _deal(self, item: Work) -> None:
        """Answer what is asked for by now, all at once."""
        works = [item]
        while not self._todo.empty():
            work = self._todo.get()
            if work is None:
                self._todo.put(None)  # it ends the thread, behind this
                break
            works.append(work)
        found: dict[Work, Found] = {}
        try:
            if not self._closing:
                partitions = {work.partition for work in works if work.partition.owned}
                for _ in range(READINGS):
                    began = time.monotonic()
                    self._read_on(partitions)
                    if time.monotonic() - began < QUICK_S:
                        break
                found = self._find(works)
        except JobledgerError:
            if not self._closing:
                raise
        for work in works:
            self._looked(work, found.get(work))

    def _read_on(self, partitions: set[Partition]) -> None:
        """Read these partitions' lifecycle to its end."""
        # Those of several topics may share a number, and with it a partition of lifecycle.
        sharing: dict[int, list[tuple[Partition, _Seen]]] = {}
        ranges: dict[tuple[str, int], tuple[int, int]] = {}
        for partition in partitions:
            number = partition.number
            seen = self._seen.setdefault(partition, _Seen(partition.scan_end))
            sharing.setdefault(number, []).append((partition, seen))
            low, high = self._log.ends(self._lifecycle, number)
            # A suspect that waited for an hour must not read an hour of the log.
            begin = max(seen.read_to, low, high - DOUBT_MOST)
            known = ranges.get((self._lifecycle, number), (begin, high))
            ranges[self._lifecycle, number] = min(begin, known[0]), max(high, known[1])

        def take(message: Message) -> None:
            number = message.partition() or 0
            try:
                end = end_of(message, self._decoder)
            except RegistryNeeded as exc:  # as in the takeover: it may say that a job is done
                for partition, _ in sharing[number]:
                    if partition.stopped is None:
                        partition.stop(message, str(exc))
                return
            # A lease is none of a job's ends: it is the coordinator's to say what follows from it.
            if end is not None and not isinstance(end[1], JobLeased):
                for _, seen in sharing[number]:
                    seen.ends.setdefault(release_key(*end[0]), message.offset() or 0)  # the first one counts

        self._log.read(ranges, take, wanted=lambda: any(partition.owned for partition in partitions))
        for number, several in sharing.items():
            for _, seen in several:
                seen.read_to = ranges[self._lifecycle, number][1]

    def _find(self, works: list[Work]) -> dict[Work, Found]:
        """The ends of these jobs' releases, as far as there are any; what is known of others is kept in bounds."""
        found: dict[Work, Found] = {}
        for work in works:
            seen = self._seen.get(work.partition)
            offset = None if seen is None else seen.ends.get(_key(work))
            if offset is not None:
                self._fetch(work, offset, found)
        for seen in self._seen.values():
            for key in list(islice(seen.ends, max(0, len(seen.ends) - DOUBT_MOST))):  # the oldest
                del seen.ends[key]
        return found

    def _fetch(self, work: Work, offset: int, found: dict[Work, Found]) -> None:
        """What an end says: kept was only where it stands."""

        def take(message: Message) -> None:
            end, appended_ms = end_of(message, self._decoder), message.timestamp()[1]
            if end is not None and release_key(*end[0]) == _key(work):
                fact = end[1]
                if isinstance(fact, JobRetried | JobSnoozed) and appended_ms < time.time() * 1000 - ASKED_MS:
                    fact = NOTHING_FOLLOWS
                found[work] = Found(offset, appended_ms, fact)

        self._log.read({(self._lifecycle, work.partition.number): (offset, offset + 1)}, take)


def _key(work: Work) -> int:
    assert work.event is not None
    return release_key(work.event.job_id, work.event.run, work.event.release)
