"""From delivery reports to committed offsets: the one place where a record becomes done, and where "done" is committed.

A thread of its own, so neither a busy event loop nor a waiting fetch thread holds it up. Per queue a commit is made
synchronously under a lock: an older snapshot can never overtake a newer one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.offsets import Snapshot
from jobledger.consumers.send import Sender
from jobledger.consumers.work import Arrived, Partition, Work
from jobledger.errors import BrokerUnavailable, ConfigError, JobledgerError
from jobledger.log import translate

if TYPE_CHECKING:
    from jobledger.consumers.fetch import Fetcher

LOG = logging.getLogger("jobledger.worker")

COMMIT_INTERVAL_S = 0.1
#: How often a record is sent again after the client gave up on it, before the worker gives up.
RESENDS = 2
#: A loop that polled within so many seconds serves the delivery callbacks itself.
_LOOP_POLLS_S = 0.05


class Settler(threading.Thread):
    """Drains delivery reports and commits every `COMMIT_INTERVAL_S`. ``fail`` stops the worker with an error."""

    def __init__(
        self,
        settings: Settings,
        sender: Sender,
        arrived: Arrived,
        *,
        fail: Callable[[JobledgerError], None],
        too_large: Callable[[Work, int, str], None],
        each_tick: Callable[[], None],
    ) -> None:
        super().__init__(name="jobledger-settle", daemon=True)
        self._settings, self._sender, self.arrived = settings, sender, arrived
        self._fail, self._too_large, self._each_tick = fail, too_large, each_tick
        self.fetchers: list[Fetcher] = []
        self._drain_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self.broken = False  # nothing may be committed any more
        self.commits = self.commit_errors = 0
        self.last_commit_error: str | None = None

    # -- delivery reports -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take every delivery report that has arrived; callable from any thread."""
        arrived = self.arrived
        with self._drain_lock:
            while arrived:
                work, closing, error, message = arrived.popleft()
                if error is None:
                    self._delivered(work, closing, message)
                elif not self.broken:
                    self._undelivered(work, closing, error, message)

    def _delivered(self, work: Work, closing: bool, message: Message) -> None:
        partition = work.partition
        offsets = partition.offsets
        assert offsets is not None
        work.remaining -= 1
        with partition.lock:
            if closing:
                found = message.offset()
                assert found is not None
                work.lifecycle_offset = found
                offsets.acknowledged(found)
                if work.remaining:
                    offsets.unsettled(work.offset, found)
            if not work.remaining:
                offsets.done(work.offset)
        if not work.remaining:
            partition.live.pop(work.offset, None)

    def _undelivered(self, work: Work, closing: bool, error: KafkaError, message: Message) -> None:
        partition = work.partition
        value = message.value()
        topic = message.topic() or ""
        if closing and partition.offsets is not None:
            # It may have arrived all the same; then before everything that was acknowledged since.
            with partition.lock:
                partition.offsets.unsettled(work.offset, partition.offsets.floor)
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and closing and work.tries <= RESENDS:
            work.tries += 1
            size = len(value) if value is not None else 0
            self._too_large(work, size, f"what topic {topic} takes (its max.message.bytes)")
            return
        if error.fatal() or work.tries >= RESENDS or not isinstance(value, bytes):
            self._fail(
                BrokerUnavailable(
                    f"a record for {topic} could not be delivered ({error.str()}; sent {work.tries + 1} times): "
                    f"{self._settings.bootstrap or 'the embedded broker'} does not take it. Nothing was committed for "
                    "its job; another worker, or this one started again, takes it up"
                )
            )
            return
        work.tries += 1
        LOG.warning("sending to %s again: %s", topic, error.str())
        callback = work.closing_delivered if closing else work.derived_delivered
        try:
            self._sender.send(topic, value, message.key(), message.partition() if closing else -1, callback)
        except JobledgerError as exc:
            self._fail(exc)

    # -- commits --------------------------------------------------------------------------------------------------

    def commit(self, fetcher: Fetcher, partitions: Iterable[Partition]) -> bool:
        """Commit the present state of ``partitions``, all of one queue; whether the coordinator took all of it.

        A commit that fails is not repeated: the next one says more, and only for partitions that are still owned.
        """
        with fetcher.commit_lock:
            # Looked at under the lock: whoever gives a partition up commits it last.
            return self.commit_snapshots(fetcher, self._snapshots([p for p in partitions if p.owned], final=False))

    def commit_last(self, fetcher: Fetcher, partitions: Iterable[Partition], timeout: float) -> bool:
        """The last commit of partitions that are being given up; clean where nothing is under way any more.

        Waits up to ``timeout`` seconds for a commit in flight: after this, none of theirs is.
        """
        if not fetcher.commit_lock.acquire(timeout=timeout):
            LOG.warning("queue %s: a commit has not been answered; partitions are given up without", fetcher.queue)
            return False
        try:
            return self.commit_snapshots(fetcher, self._snapshots(partitions, final=True))
        finally:
            fetcher.commit_lock.release()

    def _snapshots(self, partitions: Iterable[Partition], *, final: bool) -> list[tuple[Partition, Snapshot]]:
        taken: list[tuple[Partition, Snapshot]] = []
        for partition in partitions:
            if partition.offsets is None or not partition.ready:
                continue
            with partition.lock:
                snapshot = partition.offsets.snapshot(clean=final and not partition.live and not partition.closed)
            if snapshot is None:
                LOG.warning("%r: the completion map does not fit; its last commit stands", partition)
            else:
                taken.append((partition, snapshot))
        return taken

    def commit_snapshots(self, fetcher: Fetcher, taken: list[tuple[Partition, Snapshot]]) -> bool:
        """As `commit`, of snapshots already taken; the caller holds ``fetcher.commit_lock``."""
        if self.broken or not taken:
            return False
        asked_at = time.monotonic()
        parts = [TopicPartition(p.topic, p.number, s.offset, s.metadata) for p, s in taken]
        errors: dict[int, KafkaError] = {}
        try:
            results = fetcher.consumer.commit(offsets=parts, asynchronous=False)
            errors = {r.partition: r.error for r in results or () if r.error is not None}
        except KafkaException as exc:
            errors = {p.number: exc.args[0] for p, _ in taken}
        self.commits += 1
        for partition, snapshot in taken:
            error = errors.get(partition.number)
            if error is None:
                partition.last_commit = (snapshot.offset, snapshot.metadata)
                continue
            if partition.offsets is not None:
                partition.offsets.changed = True
            self._commit_failed(partition, error)
        if len(errors) < len(taken):
            # The coordinator checks the member's epoch for the request as a whole.
            fetcher.lease.confirm(asked_at)
        if not errors:
            self.last_commit_error = None
        return not errors

    def _commit_failed(self, partition: Partition, error: KafkaError) -> None:
        self.commit_errors += 1
        text = f"{partition!r}: {error.str()}"
        if self.last_commit_error != text:
            LOG.info("commit refused, the next one will say it again: %s", text)
            self.last_commit_error = text
        if error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE:
            self._fail(
                ConfigError(
                    "the broker takes less offset metadata than its default of 4,096 bytes: "
                    "set the broker's offset.metadata.max.bytes to 4096 or more"
                )
            )
        elif error.code() in (KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED):
            self._fail(translate(error, self._settings, f"committing {partition!r}"))

    # -- the thread -----------------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Tick now: somebody waits for a commit."""
        self._wake.set()

    def run(self) -> None:
        """Tick until closed."""
        try:
            while not self._closing:
                self._wake.wait(COMMIT_INTERVAL_S)
                self._wake.clear()
                self.tick()
        except Exception as exc:
            LOG.exception("the settler broke")
            self._fail(JobledgerError(f"the worker's settler broke: {exc!r}"))

    def tick(self) -> None:
        """Serve delivery reports, then commit what changed."""
        if time.monotonic() - self._sender.polled_at > _LOOP_POLLS_S:
            self._sender.poll(0.0)
        self.drain()
        self._each_tick()
        for fetcher in self.fetchers:
            wanted = fetcher.lease.wanted
            owned = fetcher.owned()
            due = owned if wanted else [p for p in owned if p.offsets is not None and p.offsets.changed]
            if due and self.commit(fetcher, due) and wanted:
                fetcher.wake_dispatcher()

    def close(self) -> None:
        """Stop ticking; whoever closes commits last."""
        self._closing = True
        self._wake.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5.0)

    def settle(self, partitions: Iterable[Partition], deadline: float) -> bool:
        """Wait until nothing of ``partitions`` is under way any more, at most until ``deadline`` (`time.monotonic`)."""
        waiting = list(partitions)
        while True:
            self._sender.poll(0.0)
            self.drain()
            if not any(p.live for p in waiting):
                return True
            if self.broken or time.monotonic() >= deadline:
                return False
            time.sleep(0.005)


def new_arrived() -> Arrived:
    """Where delivery callbacks leave their reports."""
    return deque()
