"""Polls one lane's consumer, accepts the partitions that the group assigns, and hands over those that it revokes.

Each lane (a queue, or one of its priorities) has one fetch thread, one consumer and one group. The thread runs no jobs
and decodes no messages. It passes raw messages to the dispatcher, and takes no more while enough messages wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.partitions.committer import COMMIT_INTERVAL_S, Committer
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.state.offset_tracker import Snapshot
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.work import Partition
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, JobledgerError
from jobledger.kafka.auth import AuthMonitor, denied, join, read
from jobledger.kafka.clients import consumer, consumer_config, translate
from jobledger.kafka.coordinator_probe import CoordinatorProbe
from jobledger.kafka.topic_names import Names
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

#: Maximum number of messages passed to the dispatcher at once.
BATCH = 500
#: Seconds that a poll may wait. Partitions are paused or resumed at most this much later.
POLL_S = 0.05
#: Seconds between polls while no more messages fit. A rebalance is served at most this much later. The client is not
#: paused instead: pausing would drop the messages that the client has fetched, and resuming takes up to a second.
SLOW_POLL_S = 0.5
#: Seconds in which the running jobs of a revoked partition may end, within the rebalance callback.
HANDOVER_S = 8.0
#: Seconds between two rounds of warnings about offsets without a record. A round has one warning for each partition
#: with such offsets.
MISSING_EVERY_S = 60.0
#: Seconds for which the committed offsets are requested at assignment, before the worker stops with an error.
COMMITTED_TIMEOUT_S = 30.0


class CommitRequest:
    """Snapshots that the fetch thread commits for another thread. When ``done`` is set, ``accepted`` says whether the
    group coordinator accepted all of them."""

    def __init__(self, snapshots: list[tuple[Partition, Snapshot]]) -> None:
        self.snapshots = snapshots
        self.accepted = False
        self.done = threading.Event()


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """``prefetch``: messages of one lane that may wait for the dispatcher. ``lease``: duration of the ownership lease,
    in seconds."""

    prefetch: int
    lease: float


@dataclass(frozen=True, slots=True)
class LaneEvents:
    """What a `Fetcher` calls, in its own thread. ``on_assigned``: with the fetcher and new partitions. ``on_ended``:
    with partitions that are no longer owned. ``on_messages``: when there may be new messages. ``on_failure``: stops the
    worker."""

    on_assigned: Callable[[Fetcher, list[Partition]], None]
    on_ended: Callable[[list[Partition]], None]
    on_messages: Callable[[], None]
    on_failure: Callable[[JobledgerError], None]


class Fetcher(threading.Thread):
    """Fetches one lane: a queue, or one of its priorities."""

    def __init__(
        self,
        settings: Settings,
        names: Names,
        lane: str,
        ack_tracker: AckTracker,
        limits: LaneLimits,
        events: LaneEvents,
    ) -> None:
        super().__init__(name=f"jobledger-fetch-{lane}", daemon=True)
        self.lane, self.topic = lane, names.jobs(lane)
        self._settings, self._ack_tracker, self._prefetch = settings, ack_tracker, limits.prefetch
        self._assigned, self._ended = events.on_assigned, events.on_ended
        self.wake_dispatcher, self._fail = events.on_messages, events.on_failure
        self.lease = OwnershipLease(limits.lease, events.on_messages)
        self._parts: dict[int, Partition] = {}
        self._room = threading.Event()
        self.waiting = False  # this thread waits until more messages fit
        self._filled = False
        self._half = max(1, limits.prefetch // 2)
        self._stopped_taking = False
        self._closing = threading.Event()
        self._handover = HANDOVER_S
        self.fetched = 0
        self.rebalances = {"assigned": 0, "revoked": 0, "lost": 0}
        self.error: str | None = None
        self._group = names.worker_group(lane)
        self._auth_monitor = AuthMonitor(settings)
        conf = consumer_config(
            settings,
            group=self._group,
            auth_monitor=self._auth_monitor,
            **{
                "group.protocol": "consumer",
                "group.remote.assignor": "range",
                # The client's own buffer per partition: enough for a batch or two, bounded in bytes.
                "queued.min.messages": max(2_000, limits.prefetch),
                "queued.max.messages.kbytes": 16_384,
                "fetch.error.backoff.ms": 100,
            },
        )
        self.consumer = consumer(conf)
        self.probe = CoordinatorProbe(self.consumer, self._group, self.topic, LOG, f"lane {lane}")
        self.committer = Committer(settings, self.consumer, self._group, self.lease, ack_tracker, self._fail)
        self._commit_at = self._missing_at = 0.0
        self._requests: deque[CommitRequest] = deque()

    # -- called by other parts ------------------------------------------------------------------------------------

    def owned(self) -> list[Partition]:
        """Return the partitions that are owned now."""
        return [p for p in list(self._parts.values()) if p.owned]

    @property
    def held(self) -> int:
        """Number of messages that wait for the dispatcher and count against ``prefetch``."""
        return sum(p.fetched for p in list(self._parts.values()))

    def taken(self) -> None:
        """Note that the dispatcher took messages, so more messages may fit. Any thread."""
        if self.waiting and self.held < self._half:
            self._room.set()

    def request_commit(self, snapshots: list[tuple[Partition, Snapshot]]) -> CommitRequest:
        """Request that the fetch thread commits snapshots, and return the request. Any thread; does not wait.

        Snapshots of partitions that are no longer owned by then are left out.
        """
        request = CommitRequest(snapshots)
        self._requests.append(request)
        return request

    def stop_taking(self) -> None:
        """Take no more messages, but continue to poll. Any thread."""
        self._stopped_taking = True
        self._room.set()

    def close(self, handover: float) -> None:
        """Tell the thread to hand over its partitions, leave the group and end. Any thread; does not wait.

        The running jobs of the partitions may end within at most ``handover`` seconds.
        """
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
            # Before `consumer.close`: while it leaves the group, the group coordinator may no longer know this member.
            self._hand_over(list(self._parts.values()))
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(self._translated(exc.args[0]))
        except Exception as exc:
            LOG.exception("the fetch thread of lane %s failed", self.lane)
            self._fail(JobledgerError(f"the fetch thread of lane {self.lane!r} failed: {exc!r}"))
        finally:
            self._closing.set()
            try:
                self.consumer.close()
            except Exception:  # the member has not left: its session times out
                LOG.exception("lane %s: leaving the group failed", self.lane)

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
                self._auth_monitor.check()
                self.probe.check(bool(self._parts))
                self._steer()
                steer_at = now + POLL_S
            # If no messages fit, the poll is for rebalances, which are served first. The poll may return one message,
            # which is kept.
            self._take(polling.poll(POLL_S if room > 0 else 0), room)
            polled_at = now

    def _room_left(self) -> int:
        """Return how many messages to take now.

        Once ``prefetch`` messages wait, none is taken until half of them are gone, because large batches cost less.
        """
        held = self.held
        if self._stopped_taking or held >= (self._half if self._filled else self._prefetch):
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
        if now >= self._missing_at:
            self._log_missing(owned, now)
        # Renew the ownership lease while records wait or jobs run, so that no start and no derived record has to wait
        # for a renewal.
        renew = wanted or (self.lease.until - now < self.lease.seconds / 2 and any(p.raw or p.live for p in owned))
        due = owned if renew else [p for p in owned if p.offsets is not None and p.offsets.changed]
        if due:
            self.committer.commit(due)

    def _log_missing(self, parts: list[Partition], now: float) -> None:
        """Log how many offsets have no record.

        If the record of a job that had not run was at such an offset, no worker will run the job. The commit check
        of the stream processor counts the job only if it is in the status table.
        """
        for p in parts:
            if p.offsets is None:
                continue
            with p.lock:
                missing, end = p.offsets.missing, p.offsets.end
            if missing > p.missing_reported:
                LOG.warning(
                    "%r: %d offsets below %d have no record, and count as done: their records were deleted or belong to "
                    "aborted transactions, or they are markers of transactions",
                    p,
                    missing - p.missing_reported,
                    end,
                )
                p.missing_reported = missing
                self._missing_at = now + MISSING_EVERY_S

    def _await_room(self) -> None:
        self._room.clear()
        self.waiting = True
        if self._stopped_taking or self.held >= self._half:
            self._room.wait(POLL_S)
        self.waiting = False

    def _take(self, first: Message | None, room: int) -> None:
        """Pass ``first``, and messages that have already arrived, to the dispatcher: at most ``room`` in all, but
        always ``first``."""
        if first is None:
            return
        # Keep `first` before the next call of the client: that call may run a rebalance, in which the partition is
        # lost and assigned again.
        self._keep([first])
        if room > 1:
            self._keep(self.consumer.consume(min(room, BATCH) - 1, 0))
        self.error = None
        if self.lease.until < time.monotonic():
            # There was no record for a while, or this process was paused. The commit asks the group coordinator to
            # confirm that the partitions are still owned.
            self.committer.commit(self.owned())
        self.wake_dispatcher()

    def _keep(self, messages: list[Message]) -> None:
        """Append messages to the queues of their partitions, for the dispatcher."""
        parts = self._parts
        for message in messages:
            error = message.error()
            if error is not None:
                self._message_error(error)
                continue
            partition = parts.get(message.partition())  # type: ignore[arg-type]  # a consumed message has a partition
            if partition is not None:
                partition.raw.append(message)
                self.fetched += 1

    def _message_error(self, error: KafkaError) -> None:
        code = error.code()
        translated = self._translated(error)
        if error.fatal() or code == KafkaError._FATAL or isinstance(translated, AccessDenied):
            raise translated
        if code in (KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_ASSIGNOR):
            raise ConfigError(
                f"the broker does not know the consumer group protocol that workers need ({error.str()}): "
                "Kafka 4.0 or later is required"
            )
        text = error.str()
        if text != self.error:
            LOG.warning("lane %s: %s", self.lane, text)
        self.error = text

    def _translated(self, error: KafkaError) -> JobledgerError:
        return translate(error, self._settings, f"reading {self.topic}", read(self.topic), join(self._group))

    def _steer(self) -> None:
        """Pause or resume the fetching of partitions at the client.

        A stopped partition is paused. A partition that is idle (see `Partition.idle`) is paused once ``prefetch`` of
        its messages wait. All others are resumed.
        """
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
        if not assigned or self._closing.is_set():  # the client calls this after a revocation, too
            return  # while closing, newly assigned partitions are left to the next owner
        self.rebalances["assigned"] += 1
        committed = self._committed(consumer, assigned)
        if self._closing.is_set():
            return
        new: list[Partition] = []
        for where in committed:
            offset = where.offset if where.offset >= 0 else -1
            partition = Partition(self.topic, where.partition, self.lease, offset, where.metadata or None)
            self._parts[where.partition] = partition
            new.append(partition)
        consumer.incremental_assign(
            [
                TopicPartition(p.topic, p.number, p.prior.committed if p.prior.committed >= 0 else OFFSET_BEGINNING)
                for p in new
            ]
        )
        # Messages fetched from now on wait until the takeover is done.
        LOG.info("lane %s: assigned partitions %s", self.lane, [p.number for p in new])
        self._assigned(self, new)

    def _committed(self, consumer: Consumer, assigned: list[TopicPartition]) -> list[TopicPartition]:
        """Return the committed offsets; an empty list if they cannot be read and the fetcher is being closed.

        Raises `BrokerUnavailable` after `COMMITTED_TIMEOUT_S` seconds, and `AccessDenied`.
        """
        deadline = time.monotonic() + COMMITTED_TIMEOUT_S
        while True:
            try:
                committed = consumer.committed(assigned, timeout=5.0)
                errors = [each.error for each in committed if each.error is not None]
                if not errors:
                    return committed
                problem: Any = errors[0]
            except KafkaException as exc:
                problem = exc.args[0]
            found_denied = denied(problem, self._settings, f"reading {self.topic}", read(self.topic), join(self._group))
            if found_denied is not None:
                raise found_denied
            if self._closing.is_set():
                return []
            if time.monotonic() > deadline:
                # Do not treat this as "nothing was committed": all jobs would run again.
                raise BrokerUnavailable(
                    f"the committed offsets of {self.topic} could not be read within {COMMITTED_TIMEOUT_S:g} s: "
                    f"{problem.str()}"
                )
            time.sleep(0.1)

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition]) -> None:
        self.rebalances["revoked"] += 1
        self._hand_over([p for t in revoked if (p := self._parts.get(t.partition)) is not None])

    def _hand_over(self, parts: list[Partition]) -> None:
        """Give up partitions, wait for their running jobs, and commit the partitions for the last time."""
        self._give_up(parts)
        if not parts:
            return
        all_ended = self._await_jobs(parts)
        self._log_missing(parts, time.monotonic())
        if not self._ack_tracker.commits_stopped:
            self.committer.commit(parts, final=True)
        for partition in parts:
            partition.gone = True
        left = {p.number: sum(not work.waiting for work in list(p.live.values())) for p in parts if p.busy}
        LOG.info(
            "lane %s: handed over partitions %s%s",
            self.lane,
            [p.number for p in parts],
            "" if all_ended else f"; still running, and may run twice: {left}",
        )

    def _await_jobs(self, parts: list[Partition]) -> bool:
        """Wait until no job of ``parts`` is under way, at most for the handover time. Return whether none is."""
        deadline = time.monotonic() + self._handover
        while any(p.busy for p in parts):
            now = time.monotonic()
            if self._ack_tracker.commits_stopped or now >= deadline:
                return False
            self._ack_tracker.serve()
            # The jobs of other partitions continue meanwhile, so the ownership lease must be renewed.
            self._commit_if_due(now)
            time.sleep(0.005)
        return True

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        parts = [p for t in lost if (p := self._parts.get(t.partition)) is not None]
        self.rebalances["lost"] += 1
        for partition in parts:
            partition.gone = True
        self._give_up(parts)
        self._log_missing(parts, time.monotonic())
        if parts:
            LOG.warning("lane %s: lost partitions %s; nothing is committed", self.lane, [p.number for p in parts])

    def _give_up(self, parts: list[Partition]) -> None:
        for p in parts:
            p.give_up()
            self._parts.pop(p.number, None)
        if parts:
            self._ended(parts)
