"""Logs the outages of a cluster: when the cluster cannot be reached, while this lasts, and when the outage is over.

Each client reports an outage several times, and does not report that it is connected again. So this module collects the
errors of all clients. During an outage, one thread for each process and cluster checks the connection once a second.
The thread ends when the last client that reported the outage no longer exists, because then the process no longer uses
the cluster.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from jobledger.config import Settings
from jobledger.errors import JobledgerError
from jobledger.kafka import cluster
from jobledger.process import forks, greenlets
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.kafka")

#: Seconds between two checks, and before the first check. A connection that is restored before the first check is not
#: logged.
ASK_EVERY_S = 1.0
#: Seconds within which a broker must answer a check.
ANSWER_S = 5.0
#: Seconds after which an outage is logged as an error.
LONG_S = 60.0
#: Seconds between two messages about the same long outage.
AGAIN_S = 300.0
#: Seconds for which a process that was asked to stop does not log lost connections: its broker may be stopping, too.
STOPPING_S = 15.0

_quiet_until = float("-inf")


def stopping() -> None:
    """Note that this process was asked to stop. May be called from a signal handler."""
    global _quiet_until
    _quiet_until = time.monotonic() + STOPPING_S


class Outage:
    """The outages of one cluster, as this process sees them.

    ``answers``: returns whether the cluster answers now; called in the thread that checks the connection.
    """

    def __init__(self, address: str, answers: Callable[[], bool]) -> None:
        self._address, self._answers = address, answers
        self._lock = greenlets.native_lock()  # reentrant: a signal handler may poll a client
        self._watcher = 0  # the pid of the process whose thread checks the connection; 0: no thread does
        self._reports = 0
        self._text = ""
        self._reporters: WeakSet[object] = WeakSet()
        #: Whether an outage has been logged, but not yet its end.
        self.said = False
        forks.in_child(self)

    def after_fork(self) -> None:
        """Forget the parent's lock and thread. Called in a forked child."""
        self._lock = greenlets.native_lock()
        self._end()

    def heard(self, text: str, by: object) -> None:
        """Note that a client lost a connection, or cannot connect. May be called from any thread; returns at once.

        ``text``: the client's message. ``by``: an object that exists as long as the client does. Only a weak reference
        to this object is kept.
        """
        with self._lock:
            self._reports += 1
            self._reporters.add(by)
            if not self._text or "onnect" in text:  # a text about connecting is the most useful
                self._text = text
            if self._watcher == os.getpid():
                return
            self._watcher = os.getpid()
            try:
                greenlets.start_thread(self._watch, "jobledger-outage")
            except RuntimeError:  # the interpreter is shutting down, and starts no more threads
                self._watcher = 0

    def _watch(self) -> None:
        since = time.monotonic()
        error_at = since + LONG_S
        while True:
            greenlets.native_sleep(ASK_EVERY_S)
            if self._has_no_reporter():
                return
            reports_before = self._reports
            quiet = time.monotonic() < _quiet_until
            if quiet or self._answered():
                if self.said and not quiet:
                    LOG.info("connected again to %s, after %.0f s", self._address, time.monotonic() - since)
                self.said = False
                with self._lock:
                    if quiet or self._reports == reports_before:
                        self._end()
                        return
                since = time.monotonic()
                error_at = since + LONG_S
                continue
            now = time.monotonic()
            if not self.said:
                LOG.warning("%s cannot be reached, and is tried again: %s", self._address, self._text)
                self.said = True
            elif now >= error_at:
                LOG.error("%s has not been reachable for %.0f s: %s", self._address, now - since, self._text)
                error_at = now + AGAIN_S

    def _has_no_reporter(self) -> bool:
        """Return whether no client that reported this outage exists any more.

        If so, end the outage without a message.
        """
        with self._lock:
            if self._reporters:
                return False
            self.said = False
            self._end()
            return True

    def _end(self) -> None:
        self._watcher, self._text = 0, ""
        self._reporters.clear()

    def _answered(self) -> bool:
        try:
            return self._answers()
        except Exception:  # the thread must not end, or no outage would be logged
            LOG.debug("%s could not be checked", self._address, exc_info=True)
            return False


_outages: dict[str, Outage] = {}


def outage_of(settings: Settings) -> Outage:
    """Return this process's `Outage` for the cluster that these settings name."""
    address = settings.bootstrap or "the embedded broker"
    outage = _outages.get(address)
    if outage is None:
        outage = _outages.setdefault(address, Outage(address, lambda: _answers(settings)))
    return outage


def log_missed(logger: logging.Logger, settings: Settings, message: str, *args: object) -> None:
    """Log that something was not done because no broker answered.

    The level is warning, or debug if the outage itself is logged and not over yet.
    """
    logger.log(logging.DEBUG if outage_of(settings).said else logging.WARNING, message, *args, stacklevel=2)


def _answers(settings: Settings) -> bool:
    """Return whether a broker answers within `ANSWER_S` seconds; a refused right is an answer."""
    try:
        conf: dict[str, Any] = {**settings.librdkafka(), "logger": LOG, "log_level": 0, "error_cb": lambda error: None}
        return cluster.answers(forks.client(AdminClient, conf), ANSWER_S)
    except (JobledgerError, KafkaException):
        return False
