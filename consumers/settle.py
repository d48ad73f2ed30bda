"""From delivery reports to done records: the one place where a record becomes done, once its end is in the log and
then what derives from it.

A thread of its own, so a blocked event loop does not hold it up. Committing what is done is `commit`'s business.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from confluent_kafka import KafkaError, Message

from jobledger.config import Settings
from jobledger.consumers.send import BY_KEY, Sender
from jobledger.consumers.work import Arrived, Work
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError, PayloadTooLarge
from jobledger.logger import get_logger

LOG = get_logger("jobledger.worker")

TICK_S = 0.1
#: How often a record is sent again after the client gave up on it, before the worker gives up.
RESENDS = 2
#: Seconds between two log lines about the same trouble.
SAY_EVERY_S = 10.0
#: A loop that polled within so many seconds serves the delivery callbacks itself.
_LOOP_POLLS_S = 0.05


class Settler(threading.Thread):
    """Drains delivery reports every `TICK_S`. ``fail`` stops the worker with an error. ``acknowledged(work)``: the fact
    that ended an attempt of a keyed job is in the log."""

    def __init__(
        self,
        settings: Settings,
        sender: Sender,
        arrived: Arrived,
        *,
        fail: Callable[[JobledgerError], None],
        too_large: Callable[[Work, int, str], None],
        each_tick: Callable[[], None],
        acknowledged: Callable[[Work], None],
    ) -> None:
        super().__init__(name="jobledger-settle", daemon=True)
        self._settings, self._sender, self.arrived = settings, sender, arrived
        self._fail, self._too_large, self._each_tick = fail, too_large, each_tick
        self._acknowledged = acknowledged
        self._drain_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = self._hurried = False
        self._waiting: deque[Work] = deque()  # see `_uncertain`
        self.resent = 0
        self._say_at = 0.0
        self.broken = False  # nothing may be committed any more
        self.clock = sender.clock

    # -- delivery reports -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take every delivery report that has arrived; callable from any thread."""
        arrived = self.arrived
        message: Message | None = None
        with self._drain_lock:
            while arrived:
                work, closing, error, message = arrived.popleft()
                if error is None:
                    self._delivered(work, closing, message)
                elif not self.broken:
                    self._undelivered(work, closing, error, message)
        if message is not None:
            self.clock.heard(message)

    def _delivered(self, work: Work, closing: bool | None, message: Message) -> None:
        partition = work.partition
        offsets = partition.offsets
        assert offsets is not None
        if closing is None:
            with partition.lock:
                stands_at = message.offset()
                if stands_at is None:
                    stands_at = offsets.floor
                elif message.topic() not in work.alone:
                    offsets.acknowledged(stands_at)
                offsets.note(work.offset, stands_at)
            noted, work.noted = work.noted, None
            (noted or self._acknowledged)(work)
            return
        work.remaining -= 1
        with partition.lock:
            if closing:
                found = message.offset()
                if found is None:
                    # The broker had it already: its first acknowledgement was lost with a leader. It
                    # stands where it stands, and not below the floor.
                    found = offsets.floor
                # Only one producer's records come in order: another's tell nothing about what is still on its way.
                elif message.topic() not in work.alone:
                    offsets.acknowledged(found)
                if work.remaining:
                    offsets.unsettled(work.offset, found)
            if not work.remaining:
                offsets.done(work.offset)
        if closing:
            if work.line is not None and work.line.serial:
                self._acknowledged(work)
            if work.derived and not self._uncertain(work):
                self._send_derived(work)
        if not work.remaining:
            partition.live.pop(work.offset, None)
            if work.lease is not None:
                work.lease.settled(work)

    def _uncertain(self, work: Work) -> bool:
        """Whether another worker may have taken the job's partition over: what derives from its outcome is not sent then. A
        retry would run a job again that has succeeded there; the other one gives the job an outcome, and sends what
        derives from that. As long as nobody knows, it waits for the next tick."""
        partition = work.partition
        if partition.certain():
            return False
        if not partition.gone:
            self._waiting.append(work)
        return True

    def _send_derived(self, work: Work) -> None:
        """The closing fact is in the log: now what derives from it."""
        derived, work.derived = work.derived, ()
        try:
            for record in derived:
                assert record.value is not None
                self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)
        except JobledgerError as exc:  # the next owner sends it
            self._fail(exc)

    def _undelivered(self, work: Work, closing: bool | None, error: KafkaError, message: Message) -> None:
        partition = work.partition
        value = message.value()
        topic = message.topic() or ""
        if closing is not False and partition.offsets is not None:
            # It may have arrived all the same; then before everything that was acknowledged since.
            with partition.lock:
                partition.offsets.unsettled(work.offset, partition.offsets.floor)
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and isinstance(value, bytes):
            self._refused_by_size(work, closing, topic, value, message.key())
            return
        refused = self._sender.failed(error, topic)
        if isinstance(refused, AccessDenied):
            self._fail(refused)
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
        self._say_again(topic, error)
        beside = closing is not False  # beside the work record, in the partition of its number
        try:
            self._sender.send(
                topic, value, message.key(), work.partition.number if beside else BY_KEY, work.delivered(closing)
            )
        except JobledgerError as exc:
            self._fail(exc)

    def _refused_by_size(
        self, work: Work, closing: bool | None, topic: str, value: bytes, key: str | bytes | None
    ) -> None:
        """The broker refused a batch for its size; whose fault that is shows when each record goes alone."""
        limit = f"what topic {topic} takes (its max.message.bytes)"
        beside = closing is not False
        try:
            if topic not in work.alone:
                work.alone |= {topic}
                self._sender.send_alone(
                    topic, value, key, work.partition.number if beside else BY_KEY, work.delivered(closing)
                )
            elif closing and work.event is not None and not work.shortened:
                work.alone, work.shortened = work.alone - {topic}, True
                self._too_large(work, len(value), limit)
            else:
                raise PayloadTooLarge(f"a record of {len(value)} bytes is above {limit}: raise it")
        except JobledgerError as exc:
            self._fail(exc)

    def _say_again(self, topic: str, error: KafkaError) -> None:
        """One line a few seconds, however many records it is about."""
        self.resent += 1
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + SAY_EVERY_S
            LOG.warning("records for %s are sent again (%d so far): %s", topic, self.resent, error.str())

    # -- the thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Tick until closed."""
        try:
            while not self._closing:
                self._wake.wait(TICK_S)
                self._wake.clear()
                if self._hurried:
                    self._hurried = False
                    self._sender.hurry()
                self.tick()
        except Exception as exc:
            LOG.exception("the settler failed")
            self._fail(JobledgerError(f"the worker's settler failed: {exc!r}"))

    def tick(self) -> None:
        """Serve delivery reports. Fails if the cluster no longer lets this client in."""
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
        self._each_tick()

    def hurry(self) -> None:
        """Have what was sent acknowledged as soon as can be: nothing else can be done meanwhile. Callable from any thread."""
        self._hurried = True
        self._wake.set()

    def close(self) -> None:
        """Stop ticking."""
        self._closing = True
        self._wake.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5.0)

    def serve(self) -> None:
        """Run the delivery callbacks that have arrived and take their reports; callable from any thread."""
        self._sender.poll(0.0)
        self.drain()
