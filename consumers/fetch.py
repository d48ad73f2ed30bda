"""The fetch thread: polls a queue's consumer always, runs nothing, and carries partitions in and out.

One thread, one consumer and one group per queue. It hands raw messages to the dispatcher and holds back when enough of
them wait; what is in them is not its business.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.access import Door, denied, join, read
from jobledger.config import Settings
from jobledger.consumers.commit import COMMIT_INTERVAL_S, Committer
from jobledger.consumers.offsets import Snapshot
from jobledger.consumers.settle import Settler
from jobledger.consumers.work import Lease, Partition
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, JobledgerError
from jobledger.log import consumer, consumer_config, translate
from jobledger.logger import get_logger
from jobledger.names import Names

LOG = get_logger("jobledger.worker")

#: Longest batch handed over at once.
BATCH = 500
#: Seconds a poll may wait; also how late a change of pausing may be.
POLL_S = 0.05
#: Seconds between polls while nothing more fits: how late a rebalance may be served. Pausing at the client instead
#: would throw away what it has fetched, and resuming takes it up to a second.
SLOW_POLL_S = 0.5
#: Seconds a revoked partition's jobs get to end, within the callback.
HANDOVER_S = 8.0
#: Seconds the group's offsets are asked for at assignment before the worker gives up.
COMMITTED_TIMEOUT_S = 30.0


class CommitRequest:
    """Snapshots that another thread wants committed; ``done`` is set when ``accepted`` says how it went."""

    def __init__(self, snapshots: list[tuple[Partition, Snapshot]]) -> None:
        self.snapshots = snapshots
        self.accepted = False
        self.done = threading.Event()


class Fetcher(threading.Thread):
    """Fetches one queue, or one of its priorities: ``lane``. ``prefetch``: messages that may wait for the dispatcher.

    ``assigned`` is told of new partitions (the takeover), ``revoked`` of ended ones, ``wake`` of new messages.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names,
        lane: str,
        *,
        settler: Settler,
        prefetch: int,
        lease: float,
        assigned: Callable[[Fetcher, list[Partition]], None],
        ended: Callable[[list[Partition]], None],
        wake: Callable[[], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name=f"jobledger-fetch-{lane}", daemon=True)
        self.queue, self.topic = lane, names.jobs(lane)
        self._settings, self._settler, self._prefetch = settings, settler, prefetch
        self._assigned, self._ended, self.wake_dispatcher, self._fail = assigned, ended, wake, fail
        self.lease = Lease(lease, wake)
        self._parts: dict[int, Partition] = {}
        self._room = threading.Event()
        self.waiting = False  # for room
        self._filled = False
        self._half = max(1, prefetch // 2)
        self._draining = False
        self._closing = threading.Event()
        self._handover = HANDOVER_S
        self.fetched = 0
        self.moved = {"assigned": 0, "revoked": 0, "lost": 0}
        self.error: str | None = None
        self._group = names.worker_group(lane)
        self._door = Door(settings)
        conf = consumer_config(
            settings,
            group=self._group,
            door=self._door,
            **{
                "group.protocol": "consumer",
                "group.remote.assignor": "range",
                # The client's own buffer per partition: enough for a batch or two, bounded in bytes.
                "queued.min.messages": max(2_000, prefetch),
                "queued.max.messages.kbytes": 16_384,
                "fetch.error.backoff.ms": 100,
            },
        )
        self.consumer = consumer(conf)
        self.committer = Committer(settings, self.consumer, self._group, self.lease, settler, fail)
        self._commit_at = 0.0
        self._requests: deque[CommitRequest] = deque()

    # -- what others ask ------------------------------------------------------------------------------------------

    def owned(self) -> list[Partition]:
        """Partitions owned right now."""
        return [p for p in list(self._parts.values()) if p.owned]

    @property
    def held(self) -> int:
        """Messages that wait for the dispatcher."""
        return sum(p.fetched for p in list(self._parts.values()))

    def taken(self) -> None:
        """The dispatcher took messages: there may be room again."""
        if self.waiting and self.held < self._half:
            self._room.set()

    def request_commit(self, snapshots: list[tuple[Partition, Snapshot]]) -> CommitRequest:
        """Have the fetch thread commit these; what is owned no more by then is left out."""
        request = CommitRequest(snapshots)
        self._requests.append(request)
        return request

    def drain(self) -> None:
        """Take nothing more; go on polling."""
        self._draining = True
        self._room.set()

    def close(self, handover: float) -> None:
        """Leave the group and end; partitions get ``handover`` seconds to settle."""
        self._handover = min(self._handover, handover)
        self._closing.set()
        self._room.set()

    # -- the thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Poll until closed, then leave the group."""
        try:
            self.consumer.subscribe(
                [self.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            self._poll_until_closed()
            # Before leaving: within it, the coordinator may know this member no more.
            self._hand_over(list(self._parts.values()))
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(self._translated(exc.args[0]))
        except Exception as exc:
            LOG.exception("the fetch thread of queue %s failed", self.queue)
            self._fail(JobledgerError(f"the fetch thread of queue {self.queue!r} failed: {exc!r}"))
        finally:
            try:
                self.consumer.close()
            except Exception:  # leaving is a courtesy: the session ends without it
                LOG.exception("queue %s: leaving the group failed", self.queue)

    def _poll_until_closed(self) -> None:
        polling = self.consumer
        polled_at = steer_at = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            self._commit_if_due(now)
            room = self._room_left()
            if room <= 0 and now - polled_at < SLOW_POLL_S:
                self._await_room()
                continue
            if now >= steer_at:
                self._door.check()
                self._steer()
                steer_at = now + POLL_S
            # Nothing fits: the poll is for rebalances, which come first; the one message it may give fits as well.
            self._take(polling.poll(POLL_S if room > 0 else 0), room)
            polled_at = now

    def _room_left(self) -> int:
        """How many messages to take now. Once full, none until half of them are gone: few large batches cost less."""
        held = self.held
        if self._draining or held >= (self._half if self._filled else self._prefetch):
            self._filled = True
            return 0
        self._filled = False
        return self._prefetch - held

    def _commit_if_due(self, now: float) -> None:
        while self._requests:
            request = self._requests.popleft()
            request.accepted = self.committer.commit_snapshots([s for s in request.snapshots if s[0].owned])
            request.done.set()
        wanted = self.lease.wanted
        if now < self._commit_at and not wanted:
            return
        self._commit_at = now + COMMIT_INTERVAL_S
        owned = self.owned()
        # The lease is renewed while there is something to begin or to follow from an outcome, so that this need not wait.
        renew = wanted or (self.lease.until - now < self.lease.seconds / 2 and any(p.raw or p.live for p in owned))
        due = owned if renew else [p for p in owned if p.offsets is not None and p.offsets.changed]
        if due:
            self.committer.commit(due)

    def _await_room(self) -> None:
        self._room.clear()
        self.waiting = True
        if self._draining or self.held >= self._half:
            self._room.wait(POLL_S)
        self.waiting = False

    def _take(self, first: Message | None, room: int) -> None:
        """Hand ``first`` over, and what else is there already, up to ``room``."""
        if first is None:
            return
        batch = [first]
        if room > 1:
            batch += self.consumer.consume(min(room, BATCH) - 1, 0)
        parts = self._parts
        for message in batch:
            error = message.error()
            if error is not None:
                self._message_error(error)
                continue
            partition = parts.get(message.partition())  # type: ignore[arg-type]  # a consumed message has one
            if partition is not None:
                partition.raw.append(message)
                self.fetched += 1
        self.error = None
        if self.lease.until < time.monotonic():
            # After a quiet time, or after standing still: first hear from the coordinator that these are still ours.
            self.committer.commit(self.owned())
        self.wake_dispatcher()

    def _message_error(self, error: KafkaError) -> None:
        code = error.code()
        found = self._translated(error)
        if error.fatal() or code == KafkaError._FATAL or isinstance(found, AccessDenied):
            raise found
        if code in (KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_ASSIGNOR):
            raise ConfigError(
                f"the broker does not know the consumer group protocol that workers need ({error.str()}): "
                "Kafka 4.0 or later is required"
            )
        text = error.str()
        if text != self.error:
            LOG.warning("queue %s: %s", self.queue, text)
        self.error = text

    def _translated(self, error: KafkaError) -> JobledgerError:
        return translate(error, self._settings, f"reading {self.topic}", read(self.topic), join(self._group))

    def _steer(self) -> None:
        """Pause at the client what cannot be run for a while and has enough waiting; resume what can."""
        pause: list[TopicPartition] = []
        resume: list[TopicPartition] = []
        for p in self._parts.values():
            wanted = p.stopped is not None or (p.idle and (p.paused or len(p.raw) >= self._prefetch))
            if wanted != p.paused:
                (pause if wanted else resume).append(TopicPartition(p.topic, p.number))
                p.paused = wanted
        if pause:
            self.consumer.pause(pause)
        if resume:
            self.consumer.resume(resume)

    # -- rebalances: run inside poll, in this thread ------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        if not assigned:  # told so after giving partitions up
            return
        self.moved["assigned"] += 1
        committed = self._committed(consumer, assigned)
        new: list[Partition] = []
        for where in committed:
            offset = where.offset if where.offset >= 0 else -1
            partition = Partition(self.topic, where.partition, self.lease, offset, where.metadata or None)
            self._parts[where.partition] = partition
            new.append(partition)
        consumer.incremental_assign(
            [TopicPartition(p.topic, p.number, p.committed if p.committed >= 0 else OFFSET_BEGINNING) for p in new]
        )
        # What is fetched from now on waits until the takeover is through.
        LOG.info("queue %s: assigned partitions %s", self.queue, [p.number for p in new])
        self._assigned(self, new)

    def _committed(self, consumer: Consumer, assigned: list[TopicPartition]) -> list[TopicPartition]:
        deadline = time.monotonic() + COMMITTED_TIMEOUT_S
        while True:
            try:
                found = consumer.committed(assigned, timeout=5.0)
                errors = [f.error for f in found if f.error is not None]
                if not errors:
                    return found
                problem: Any = errors[0]
            except KafkaException as exc:
                problem = exc.args[0]
            found_denied = denied(problem, self._settings, f"reading {self.topic}", read(self.topic), join(self._group))
            if found_denied is not None:
                raise found_denied
            if time.monotonic() > deadline or self._closing.is_set():
                # Never taken for "nothing committed": that would run everything again.
                raise BrokerUnavailable(
                    f"the committed offsets of {self.topic} could not be read within {COMMITTED_TIMEOUT_S:g} s: "
                    f"{problem.str()}"
                )
            time.sleep(0.1)

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self.moved["revoked"] += 1
        self._hand_over([p for t in revoked if (p := self._parts.get(t.partition)) is not None])

    def _hand_over(self, parts: list[Partition]) -> None:
        """Give partitions up, let what runs of them end, and commit them for the last time."""
        self._give_up(parts)
        if not parts:
            return
        settled = self._settle(parts)
        if not self._settler.broken:
            self.committer.commit(parts, final=True)
        for partition in parts:
            partition.gone = True
        left = {p.number: len(p.live) for p in parts if p.busy}
        LOG.info(
            "queue %s: handed over partitions %s%s",
            self.queue,
            [p.number for p in parts],
            "" if settled else f"; still running, and may run twice: {left}",
        )

    def _settle(self, parts: list[Partition]) -> bool:
        """Let what is under way of ``parts`` end, within the handover time; whether it did."""
        deadline = time.monotonic() + self._handover
        while any(p.busy for p in parts):
            now = time.monotonic()
            if self._settler.broken or now >= deadline:
                return False
            self._settler.serve()
            # The partitions that stay go on meanwhile: their lease must be renewed.
            self._commit_if_due(now)
            time.sleep(0.005)
        return True

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        parts = [p for t in lost if (p := self._parts.get(t.partition)) is not None]
        self.moved["lost"] += 1
        for partition in parts:
            partition.gone = True
        self._give_up(parts)
        if parts:
            LOG.warning("queue %s: lost partitions %s; nothing is committed", self.queue, [p.number for p in parts])

    def _give_up(self, parts: list[Partition]) -> None:
        for p in parts:
            p.give_up()
            self._parts.pop(p.number, None)
        if parts:
            self._ended(parts)
