"""Finds out whether the group coordinator answers a consumer that owns no partitions.

While a consumer cannot join its group, the client reports no error: `Consumer.poll` returns nothing, as it does when
there are no messages. This happens, for example, if the broker cannot load the group from ``__consumer_offsets``. So a
consumer that owns no partitions asks for a committed offset now and then. The same coordinator answers this request
from the same records.
"""

from __future__ import annotations

import logging
import time

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

#: Seconds without an answer after which this is a problem. A broker that restarts, or a group that moves to another
#: broker, takes less.
SILENT_S = 30.0
#: Seconds between two requests while there is no answer. While there are answers, `SILENT_S` / 2.
ASK_EVERY_S = 5.0
#: Seconds that a request may take. The consumer is not polled meanwhile.
ANSWER_S = 2.0
#: Seconds between two warnings.
WARN_EVERY_S = 60.0


class CoordinatorProbe:
    """Asks the group coordinator of ``group`` whether it answers, while the consumer owns no partitions.

    ``topic``: a topic that the consumer subscribes to. ``reads``: what the consumer reads, for the messages. All methods
    are called by the thread that polls the consumer; `problem` may be read by any thread.
    """

    def __init__(self, consumer: Consumer, group: str, topic: str, log: logging.Logger, reads: str) -> None:
        self._consumer, self._group, self._log, self._reads = consumer, group, log, reads
        self._asked_for = TopicPartition(topic, 0)
        self._answered_at = time.monotonic()
        self._warned_at = 0.0
        self._ask_at = self._answered_at + SILENT_S / 2
        #: Why the consumer has no partitions, for the health report. None: the group coordinator answers, or has been
        #: silent for less than `SILENT_S`.
        self.problem: str | None = None

    def check(self, owns_partitions: bool) -> None:
        """Ask the coordinator if the consumer owns no partitions and a request is due. Takes at most `ANSWER_S`
        seconds. Does not raise."""
        now = time.monotonic()
        if owns_partitions:
            self._answered(now)
        elif now >= self._ask_at:
            error = self._ask()
            now = time.monotonic()
            if error is None:
                self._answered(now)
            else:
                self._unanswered(now, error)

    def _ask(self) -> KafkaError | None:
        """Return why there is no answer; None if there is one."""
        try:
            return self._consumer.committed([self._asked_for], timeout=ANSWER_S)[0].error
        except KafkaException as exc:
            error: KafkaError = exc.args[0]
            return error

    def _answered(self, now: float) -> None:
        self._answered_at, self._ask_at = now, now + SILENT_S / 2
        if self.problem is not None:
            self.problem = None
            self._log.info("%s: the group coordinator of %s answers again", self._reads, self._group)

    def _unanswered(self, now: float, error: KafkaError) -> None:
        self._ask_at = now + ASK_EVERY_S
        silent = now - self._answered_at
        if silent < SILENT_S:
            return
        is_new = self.problem is None
        self.problem = (
            f"the group coordinator of {self._group} has not answered for {silent:.0f} s ({error.str()}), so no "
            "partitions are assigned. If the brokers are reachable, look in their logs for GroupCoordinator"
        )
        if is_new or now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            self._log.warning("%s: %s", self._reads, self.problem)
