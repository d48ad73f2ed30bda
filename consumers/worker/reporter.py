"""Sends this worker's report every few seconds to the compacted topic ``<ns>.workers``.

No job depends on a report: no other thread waits for the acknowledgement of a report, and an error of a report is only
logged. The reports have a producer of their own. So if a cluster refuses the reports, or their partition has no leader, no
fact is delayed, a worker that stops waits at most `FAREWELL_S` seconds, and no record of a job counts as unacknowledged.
At most one report is unacknowledged at a time, so reports do not accumulate while no broker is available.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import uuid_utils
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError, text_of, type_of
from jobledger.kafka.auth import AuthMonitor, write
from jobledger.kafka.clients import partitions_of, producer, producer_config, undelivered
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import WorkerReported
from jobledger.worker_status import REPORT_EVERY_S

LOG = get_logger("jobledger.worker")

#: Seconds within which a report must be acknowledged; after that it is dropped.
REPORT_TIMEOUT_S = 10.0
#: Seconds between two attempts while the topic is missing, or this worker may not write to it. While no broker is
#: available, the next attempt follows after `REPORT_EVERY_S`.
AGAIN_S = 60.0
#: Seconds that a worker that stops waits for the acknowledgement of its tombstone.
FAREWELL_S = 1.5
#: Share by which the time between two reports varies, so that workers started together do not report together.
JITTER = 0.1
#: Seconds of one poll: within this time the thread notices that the worker ends.
_POLL_S = 0.1


class WorkerReporter(threading.Thread):
    """Sends the reports of one worker, from `start` until `finish` is called.

    ``worker``: the worker's id, ``host:pid``. ``source``: the name of the writer. ``topic``: that of the reports.
    ``report``: called for each report. ``framed``: frames a value for the topic; may raise a `JobledgerError`.
    """

    def __init__(
        self,
        settings: Settings,
        topic: str,
        worker: str,
        source: str,
        report: Callable[[], WorkerReported],
        framed: Callable[[str, bytes], bytes],
    ) -> None:
        super().__init__(name="jobledger-reports", daemon=True)
        self._settings, self._topic, self._worker, self._source = settings, topic, worker, source
        self._report, self._framed = report, framed
        self._auth_monitor = AuthMonitor(settings)
        self._producer: Producer | None = None
        self._finished = threading.Event()
        self._says_farewell = False
        self._under_way = 0
        self._reported = False  # the topic may have a report of this worker
        self._error: KafkaError | None = None
        self._said = ""

    def finish(self, *, farewell: bool) -> None:
        """Send no more reports, and end; returns at once. With ``farewell`` the thread first writes a tombstone, which
        removes this worker's report, and waits up to `FAREWELL_S` seconds for its acknowledgement. Any thread."""
        self._says_farewell = farewell
        self._finished.set()

    def run(self) -> None:
        """Report until `finish` is called."""
        try:
            while not self._finished.is_set():
                self._finished.wait(self._once())
            if self._says_farewell and self._reported:
                self._send(None)
                self._await_answer(FAREWELL_S, until_finished=False)
        except KafkaException as exc:
            LOG.info("this worker's last report is not removed: %s", exc.args[0].str())
        finally:
            self._close()

    def _once(self) -> float:
        """Send a report; return the seconds to wait before the next one."""
        try:
            if self._producer is None:
                self._producer = self._connected()
            if not self._under_way:
                event_id = str(uuid_utils.uuid7())
                event = standalone(self._report(), event_id, now_us(), self._source, job_id=self._worker)
                self._send(self._framed(self._topic, codec.encode(event)))
            self._await_answer(REPORT_TIMEOUT_S, until_finished=True)
            if self._error is not None:
                raise self._problem(self._error)
        except JobledgerError as exc:
            return self._failed(exc)
        except KafkaException as exc:
            return self._failed(self._problem(exc.args[0]))
        except Exception as exc:  # noqa: BLE001  # logged; the worker's jobs do not depend on its reports
            return self._failed(JobledgerError(f"{type_of(exc)}: {text_of(exc)}"))
        if self._said and not self._under_way:
            LOG.info("this worker's reports arrive again")
            self._said = ""
        return REPORT_EVERY_S * random.uniform(1 - JITTER, 1 + JITTER)

    def _connected(self) -> Producer:
        # A producer of an unknown topic could make the broker create it, with the broker's settings.
        partitions_of(self._settings, self._topic, need=write(self._topic))
        conf = producer_config(self._settings, timeout=REPORT_TIMEOUT_S, auth_monitor=self._auth_monitor)
        return producer(conf)

    def _send(self, value: bytes | None) -> None:
        if self._producer is not None:
            self._producer.produce(self._topic, value, self._worker, 0, self._delivered)
            self._under_way += 1
            self._reported = True

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        self._under_way -= 1
        self._error = error

    def _await_answer(self, seconds: float, *, until_finished: bool) -> None:
        """Wait until no report is unacknowledged, for up to ``seconds``."""
        deadline = time.monotonic() + seconds
        while self._producer is not None and self._under_way and time.monotonic() < deadline:
            if until_finished and self._finished.is_set():
                return
            self._producer.poll(_POLL_S)

    def _problem(self, error: KafkaError) -> JobledgerError:
        what = f"sending this worker's report to {self._topic}"
        return self._auth_monitor.behind(error) or undelivered(error, self._settings, what, write(self._topic))

    def _failed(self, problem: JobledgerError) -> float:
        """Log a problem once; return the seconds to wait before the next report, which uses a new producer."""
        kind = type(problem).__name__
        if kind != self._said:
            LOG.warning("`workers list` does not show this worker's present state: %s", problem)
            self._said = kind
        self._close()
        return REPORT_EVERY_S if isinstance(problem, BrokerUnavailable) else AGAIN_S

    def _close(self) -> None:
        """Drop unacknowledged reports, and close the connections."""
        if self._producer is not None:
            with suppress(KafkaException):  # the producer has failed permanently
                self._producer.purge()
                self._producer.flush(0.5)
                self._producer.close()
        self._producer, self._error, self._under_way = None, None, 0
