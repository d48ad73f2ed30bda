"""Ends that were written after the takeover's scan, by a process that only stood still: it sends, when it wakes, what lay
in its Kafka client.

A suspect's code is run only once lifecycle was read on from where the scan ended to the suspect's own acknowledged start.
All facts of a release stand in one partition, in one order: if an end stands before that start, it is found, and the job
is not run again. Source: docs/adr/0011. A thread of its own, because another takeover may take its time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from confluent_kafka import KafkaException, Message

from jobledger.config import Settings
from jobledger.consumers.ranges import LogRanges
from jobledger.consumers.releases import end_of, release_key
from jobledger.consumers.work import Found, Partition, Work
from jobledger.errors import JobledgerError, RegistryNeeded
from jobledger.log import translate
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import JobLeased

LOG = logging.getLogger("jobledger.worker")

#: Seconds after which a reader that nobody needs gives its connections back.
IDLE_S = 10.0
#: Facts that are read at most before a suspect's start: one that waited for an hour must not read an hour of the log.
MOST = 100_000
#: Ends of others that are kept for each partition, for suspects that are still to come.
KEPT = 10_000


class LateEnds(threading.Thread):
    """Looks for the ends of suspects. ``source``: who this worker is in its own facts, which are passed over.

    ``looked(work, found)`` is called in this thread with the end that was found, or None: once for each that was asked for.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: str,
        source: str,
        decoder: Decoder,
        *,
        looked: Callable[[Work, Found | None], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-late-ends", daemon=True)
        self._settings, self._lifecycle, self._decoder = settings, lifecycle, decoder
        self._source = source.encode()
        self._looked, self._fail = looked, fail
        self._todo: queue.SimpleQueue[tuple[Work, int | None] | None] = queue.SimpleQueue()
        self._closing, self._lock = False, threading.Lock()  # nothing is put after what ends the thread
        self._log = LogRanges(settings, lambda: self._closing)

    def look(self, work: Work, start: int | None) -> None:
        """Look for an end of the job's release before offset ``start``, where its own start stands in its partition of
        lifecycle; None: somewhere before the partition's end. Returns at once; callable from any thread."""
        with self._lock:
            if not self._closing:
                self._todo.put((work, start))
                return
        self._looked(work, None)

    def close(self) -> None:
        """Look for nothing more. What is asked for is still answered, as not found: nothing is run any more."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._todo.put(None)

    def run(self) -> None:
        """Look until closed."""
        try:
            while self._next():
                pass
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(translate(exc.args[0], self._settings, "looking for ends that came late"))
        except Exception as exc:
            LOG.exception("the search for late ends broke")
            self._fail(JobledgerError(f"the search for ends that came late broke: {exc!r}"))
        finally:
            self._log.close()

    def _next(self) -> bool:
        """Answer what is asked for now, all at once; False once closed."""
        try:
            first = self._todo.get(timeout=IDLE_S if self._log.open else None)
        except queue.Empty:
            self._log.close()
            return True
        asked = [first]
        while not self._todo.empty():
            asked.append(self._todo.get())
        wanted = [each for each in asked if each is not None]
        if not self._closing:
            self._read(wanted)
        for work, _ in wanted:
            event = work.event
            assert event is not None
            self._looked(work, work.partition.late.get(release_key(event.job_id, event.run, event.release)))
        return len(wanted) == len(asked)

    def _read(self, asked: list[tuple[Work, int | None]]) -> None:
        """Read on in the partitions of these jobs, up to their starts."""
        ends: dict[Partition, int] = {}
        begins: dict[Partition, int] = {}
        for work, start in asked:
            partition = work.partition
            if not partition.owned or (start is not None and start <= ends.get(partition, partition.read_to)):
                continue
            low, high = self._log.ends(self._lifecycle, partition.number)
            ends[partition] = high if start is None else start
            begins[partition] = max(partition.read_to, low, ends[partition] - MOST)
        # Partitions of several topics may share a number, and with it a partition of lifecycle.
        sharing: dict[int, list[Partition]] = {}
        ranges: dict[tuple[str, int], tuple[int, int]] = {}
        for partition, end in ends.items():
            number = partition.number
            sharing.setdefault(number, []).append(partition)
            begin, most = ranges.get((self._lifecycle, number), (begins[partition], end))
            ranges[self._lifecycle, number] = min(begin, begins[partition]), max(most, end)

        def take(message: Message) -> None:
            value = message.value()
            if not isinstance(value, bytes) or self._source in value:
                return
            partitions = sharing[message.partition() or 0]
            try:
                end = end_of(message, self._decoder)
            except RegistryNeeded as exc:  # as in the takeover: it may say that a job is done
                for partition in partitions:
                    if partition.stopped is None:
                        partition.stop(message, str(exc))
                return
            if end is not None:
                release, fact = end
                found = Found(message.offset() or 0, message.timestamp()[1], fact)
                for partition in partitions:
                    _keep(partition, release_key(*release), found)

        self._log.read(ranges, take, wanted=lambda: any(partition.owned for partition in ends))
        for partition in ends:
            partition.read_to = ranges[self._lifecycle, partition.number][1]


def _keep(partition: Partition, key: int, found: Found) -> None:
    """The first end counts; but a lease is none, if another comes after it."""
    late = partition.late
    known = late.get(key)
    if known is None or isinstance(known.fact, JobLeased):
        late[key] = found
        if len(late) > KEPT:
            del late[next(iter(late))]
