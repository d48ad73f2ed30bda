"""Marks work records as done from delivery reports, when the closing fact and the records that derive from it are in
the log.

The ack tracker has a thread of its own, so a blocked event loop does not delay it. This module commits nothing:
`jobledger.consumers.partitions.committer` commits which records are done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from confluent_kafka import KafkaError, Message

from jobledger.config import Settings
from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.recording.worker_producer import BY_KEY, WorkerProducer
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.work import JobRun, RecordKind
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError, PayloadTooLarge
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted

LOG = get_logger("jobledger.worker")

TICK_S = 0.1
#: How often records of one job are sent again after the Kafka client failed to deliver them; then the worker stops.
RESENDS = 2
#: Seconds between two log messages about the same problem.
SAY_EVERY_S = 10.0
#: The ack tracker does not poll the producer if another thread has polled it within this many seconds.
_LOOP_POLLS_S = 0.05

# As in `jobledger.consumers.state.work`: these names are read for each job.
_SETTLING, _DERIVED, _CONTINUING = RecordKind.SETTLING, RecordKind.DERIVED, RecordKind.CONTINUING


class AckTracker(threading.Thread):
    """Takes delivery reports every `TICK_S` seconds, and then calls `on_tick`, which the dispatcher sets.

    A closing fact that the broker refuses for its size goes back to ``recorder``. When the last fact of a keyed
    job's attempt is in the log, the ack tracker reports this to ``reports``. Both happen in the thread that takes the
    delivery reports.
    """

    def __init__(self, settings: Settings, sender: WorkerProducer, recorder: Recorder, reports: Reports) -> None:
        super().__init__(name="jobledger-ack-tracker", daemon=True)
        self._settings, self._sender, self._recorder = settings, sender, recorder
        self.arrived, self._acknowledged, self._fail = reports.arrived, reports.attempt_acknowledged, reports.calls.fail
        self.on_tick: Callable[[], None] = lambda: None
        self._drain_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = self._hurried = False
        self._waiting: deque[JobRun] = deque()  # see `_uncertain`
        self.resent = 0
        self._say_at = 0.0
        self.commits_stopped = False  # because of an error, nothing may be committed any more
        self.clock = sender.clock

    # -- delivery reports -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take all delivery reports that are queued in `arrived`. Any thread."""
        arrived = self.arrived
        message: Message | None = None
        with self._drain_lock:
            while arrived:
                work, kind, error, message = arrived.popleft()
                if error is None:
                    self._delivered(work, kind, message)
                elif not self.commits_stopped:
                    self._undelivered(work, kind, error, message)
        if message is not None:
            self.clock.heard(message)

    def _delivered(self, work: JobRun, kind: RecordKind, message: Message) -> None:
        partition = work.partition
        offsets = partition.offsets
        assert offsets is not None
        if kind is _CONTINUING:
            with partition.lock:
                stands_at = message.offset()
                if stands_at is None:
                    stands_at = offsets.floor
                elif message.topic() not in work.single_record_topics:
                    offsets.acknowledged(stands_at)
                offsets.continues_from(work.offset, stands_at)
            on_continuing_fact, work.on_continuing_fact = work.on_continuing_fact, None
            (on_continuing_fact or self._acknowledged)(work)
            return
        work.remaining -= 1
        with partition.lock:
            if kind is _SETTLING:
                stands_at = message.offset()
                if stands_at is None:
                    # The broker had the fact already, because its first acknowledgement was lost with a leader. The
                    # offset of the fact is not known, but is not below the floor.
                    stands_at = offsets.floor
                # Only the main producer's records are in order. A record that the other producer sent shows nothing
                # about the records in flight.
                elif message.topic() not in work.single_record_topics:
                    offsets.acknowledged(stands_at)
                if work.remaining:
                    offsets.must_find_from(work.offset, stands_at)
            if not work.remaining:
                offsets.done(work.offset)
        if kind is _SETTLING:
            if work.wait_queue is not None and work.wait_queue.serial:
                self._acknowledged(work)
            if work.derived and not self._uncertain(work):
                self._send_derived(work)
        if not work.remaining:
            partition.live.pop(work.offset, None)
            if work.lease is not None:
                work.lease.acknowledged(work)

    def _uncertain(self, work: JobRun) -> bool:
        """Return whether another worker may have taken over the job's partition. If so, the records that derive from
        the outcome must not be sent.

        For example, a retry could run a job again that has succeeded in the other worker. The other worker gives the
        job an outcome, and sends the records that derive from that outcome. If the ownership is only unconfirmed,
        ``work`` is checked again at the next tick.
        """
        partition = work.partition
        if partition.certain():
            return False
        if not partition.gone:
            self._waiting.append(work)
        return True

    def _send_derived(self, work: JobRun) -> None:
        """Send the records that derive from the closing fact, which is in the log."""
        derived, work.derived = work.derived, ()
        try:
            for record in derived:
                assert record.value is not None
                self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)
        except JobledgerError as exc:  # the next owner sends these records
            self._fail(exc)

    def _undelivered(self, work: JobRun, kind: RecordKind, error: KafkaError, message: Message) -> None:
        partition = work.partition
        value = message.value()
        topic = message.topic() or ""
        if kind is not _DERIVED and partition.offsets is not None:
            # The fact may be in the log nevertheless, but then not below the present floor.
            with partition.lock:
                partition.offsets.must_find_from(work.offset, partition.offsets.floor)
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and isinstance(value, bytes):
            self._refused_by_size(work, kind, topic, value, message.key())
            return
        refused = self._sender.failed(error, topic)
        if isinstance(refused, AccessDenied):
            self._fail(refused)
            return
        if error.fatal() or work.tries >= RESENDS or not isinstance(value, bytes):
            self._fail(
                BrokerUnavailable(
                    f"a record for {topic} could not be delivered ({error.str()}; sent {counted(work.tries + 1, 'time')}): "
                    f"{self._settings.bootstrap or 'the embedded broker'} does not accept the record. The job's "
                    "record is not committed, so the next owner runs the job, or sends the record again if the job has "
                    "ended"
                )
            )
            return
        work.tries += 1
        self._say_again(topic, error)
        try:
            self._sender.send(
                topic, value, message.key(), _partition_to_send_to(work, kind), work.delivery_callback(kind)
            )
        except JobledgerError as exc:
            self._fail(exc)

    def _refused_by_size(
        self, work: JobRun, kind: RecordKind, topic: str, value: bytes, key: str | bytes | None
    ) -> None:
        """Send a record again in a batch of its own, after the broker refused its batch for its size. This shows which
        record is too large.

        A closing fact that is refused in a batch of its own is replaced by a failure. Any other record that is refused
        in a batch of its own stops the worker.
        """
        limit = f"what topic {topic} takes (its max.message.bytes)"
        try:
            if topic not in work.single_record_topics:
                work.single_record_topics |= {topic}
                self._sender.send_alone(
                    topic, value, key, _partition_to_send_to(work, kind), work.delivery_callback(kind)
                )
            elif kind is _SETTLING and work.event is not None and not work.shortened:
                work.single_record_topics, work.shortened = work.single_record_topics - {topic}, True
                self._recorder.refused_as_too_large(work, len(value), limit)
            else:
                raise PayloadTooLarge(f"a record of {len(value)} bytes is above {limit}: raise it")
        except JobledgerError as exc:
            self._fail(exc)

    def _say_again(self, topic: str, error: KafkaError) -> None:
        """Log that records are sent again, at most once in `SAY_EVERY_S` seconds."""
        self.resent += 1
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_EVERY_S
            LOG.warning("records for %s are sent again (%d so far): %s", topic, self.resent, error.str())

    # -- the thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Call `tick` every `TICK_S` seconds until closed. An unexpected error stops the worker."""
        try:
            while not self._closing:
                self._wake.wait(TICK_S)
                self._wake.clear()
                if self._hurried:
                    self._hurried = False
                    self._sender.hurry()
                self.tick()
        except Exception as exc:
            LOG.exception("the ack tracker failed")
            self._fail(JobledgerError(f"the worker's ack tracker failed: {exc!r}"))

    def tick(self) -> None:
        """Take delivery reports, check again the jobs whose ownership was not confirmed, and call `on_tick`. Stops
        the worker if the cluster refuses this client or the producer has failed permanently."""
        if time.monotonic() - self._sender.polled_at > _LOOP_POLLS_S:
            self._sender.poll(0.0)
        self.drain()
        try:
            self._sender.check()
        except JobledgerError as exc:
            self._fail(exc)
        for _ in range(len(self._waiting)):
            work = self._waiting.popleft()
            if not self._uncertain(work):
                self._send_derived(work)
        self.on_tick()

    def hurry(self) -> None:
        """Let this thread wait for acknowledgements now (`WorkerProducer.hurry`) and take them, because no job can
        begin before. Any thread."""
        self._hurried = True
        self._wake.set()

    def close(self) -> None:
        """Stop ticking, and wait up to 5 s for the thread to end."""
        self._closing = True
        self._wake.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5.0)

    def serve(self) -> None:
        """Run the delivery callbacks of reports that have arrived, and take these reports. Any thread."""
        self._sender.poll(0.0)
        self.drain()


def _partition_to_send_to(work: JobRun, kind: RecordKind) -> int:
    """Return the partition of a record that is sent again: a fact is in the lifecycle partition with the number of the
    work partition, and the key of a derived record chooses its partition."""
    return BY_KEY if kind is _DERIVED else work.partition.number
