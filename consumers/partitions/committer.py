"""Commits the state of one lane's partitions to the group, and thereby renews the lane's ownership lease.

Only the fetch thread commits: the client serialises every call of a consumer behind its poll, and with one caller an
older snapshot can never overtake a newer one. Every commit is synchronous (one round trip, 1-2 ms).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.state.offset_tracker import Snapshot
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.work import Partition
from jobledger.errors import BrokerUnavailable, ConfigError, JobledgerError
from jobledger.kafka.auth import denied, join, read
from jobledger.kafka.outage import outage_of
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.worker")

COMMIT_INTERVAL_S = 0.1
#: Seconds after which a commit counts as lost. A working client gives up sooner: after its session timeout of 45 s if
#: it finds no group coordinator, after 10 s if the group coordinator does not answer.
LOST_S = 120.0


class Committer:
    """Commits the offsets of one consumer. ``fail`` stops the worker if a commit is lost or can never be accepted."""

    def __init__(
        self,
        settings: Settings,
        consumer: Consumer,
        group: str,
        lease: OwnershipLease,
        ack_tracker: AckTracker,
        fail: Callable[[JobledgerError], None],
    ) -> None:
        self._group = group
        self._settings, self._consumer, self._lease, self._ack_tracker, self._fail = (
            settings,
            consumer,
            lease,
            ack_tracker,
            fail,
        )
        self.commits = self.errors = 0
        self.last_error: str | None = None
        self._last_code: int | None = None
        self._asked_at: float | None = None  # `time.monotonic` at the start of the commit in progress

    def commit(self, partitions: Iterable[Partition], *, final: bool = False) -> None:
        """Commit the present state of ``partitions``. A partition that is not ready, or whose completion map is too
        large, is left out.

        ``final``: the partitions are being given up. Then a partition is committed as clean if none of its jobs is
        under way and the next owner need not look for facts in the log. A partition whose takeover is not complete is
        committed as it was found, if it was found clean. A failed commit is not repeated: the next commit covers the
        partitions that are still owned then.
        """
        self._ack_tracker.drain()
        taken: list[tuple[Partition, Snapshot]] = []
        for partition in partitions:
            if partition.offsets is None or not partition.ready:
                # If `final`: the partition was given up before its takeover was complete, so none of its records was
                # begun or will be begun.
                if final and partition.prior.clean_commit is not None:
                    taken.append((partition, partition.prior.clean_commit))
                continue
            with partition.lock:
                left = (
                    partition.busy or partition.prior.settled or any(w.suspect for w in list(partition.live.values()))
                )
                clean = final and not left and partition.offsets.nothing_to_look_up
                snapshot = partition.offsets.snapshot(clean=clean)
            if snapshot is None:
                LOG.warning(
                    "%r: the completion map is too large for a commit; the last commit remains valid", partition
                )
            else:
                taken.append((partition, snapshot))
        self.commit_snapshots(taken)

    def commit_snapshots(self, taken: list[tuple[Partition, Snapshot]]) -> bool:
        """Commit these snapshots. Return whether the group coordinator accepted all of them; False if none was sent."""
        if self._ack_tracker.commits_stopped or not taken:
            return False
        asked_at = self._asked_at = time.monotonic()
        parts = [TopicPartition(p.topic, p.number, s.offset, s.metadata) for p, s in taken]
        errors: dict[int, KafkaError] = {}
        try:
            results = self._consumer.commit(offsets=parts, asynchronous=False)
            errors = {r.partition: r.error for r in results or () if r.error is not None}
        except KafkaException as exc:
            errors = {p.number: exc.args[0] for p, _ in taken}
        finally:
            self._asked_at = None
        self.commits += 1
        for partition, snapshot in taken:
            error = errors.get(partition.number)
            if error is None:
                partition.last_commit = (snapshot.offset, snapshot.metadata)
            else:
                if partition.offsets is not None:
                    partition.offsets.changed = True
                self._refused(partition, error)
        if len(errors) < len(taken):
            # The group coordinator checks the member and its epoch for the request as a whole.
            self._lease.confirm(asked_at)
        if not errors:
            self.last_error = self._last_code = None
        return not errors

    def check(self, now: float) -> None:
        """Stop the worker if the client has lost a commit. ``now``: `time.monotonic`. Any thread.

        This happens when a broker restarts. The fetch thread would wait for the commit forever, and no job of this lane
        would run.
        """
        asked_at = self._asked_at
        if asked_at is None or now - asked_at < LOST_S or outage_of(self._settings).said:
            return
        self._fail(
            BrokerUnavailable(
                f"a commit of group {self._group} has not returned for {now - asked_at:.0f} s, although the cluster answers: "
                "the Kafka client has lost the commit, and this worker would run no more jobs of that queue. The worker stops; "
                "start it again"
            )
        )

    def _refused(self, partition: Partition, error: KafkaError) -> None:
        self.errors += 1
        if self._last_code != error.code():  # log one line, not one for each partition
            LOG.info(
                "a commit of %r was refused: %s; the next commit includes it if it is still owned",
                partition,
                error.str(),
            )
            self._last_code = error.code()
        self.last_error = f"{partition!r}: {error.str()}"
        if error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE:
            self._fail(
                ConfigError(
                    "the broker takes less offset metadata than its default of 4,096 bytes: "
                    "set the broker's offset.metadata.max.bytes to 4096 or more"
                )
            )
        elif refused := denied(
            error, self._settings, f"committing {partition!r}", read(partition.topic), join(self._group)
        ):
            self._fail(refused)
