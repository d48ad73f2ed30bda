"""Logging of outages of a cluster: that it cannot be reached, that this lasts, and that it is over.

Each client notices an outage by itself, several times, and does not report when it is connected again. So every
client's errors are collected here, and during an outage one thread per process and cluster checks the connection once a
second. The thread ends when the last client that reported the outage is gone: then the process no longer uses the
cluster.
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

#: Seconds between two checks, and until the first one: a connection that is restored before that is not logged.
ASK_EVERY_S = 1.0
#: Seconds that an answer may take.
ANSWER_S = 5.0
#: Seconds after which an outage is an error.
LONG_S = 60.0
#: Seconds between two lines about the same long outage.
AGAIN_S = 300.0
#: Seconds for which a process that was told to stop logs no lost connections: its broker may be stopping as well.
STOPPING_S = 15.0

_quiet_until = float("-inf")


def stopping() -> None:
    """Note that this process was told to stop. Callable from a signal handler."""
    global _quiet_until
    _quiet_until = time.monotonic() + STOPPING_S


class Outage:
    """The outages of one cluster, as this process sees them. ``answers()``: whether the cluster answers now."""

    def __init__(self, address: str, answers: Callable[[], bool]) -> None:
        self._address, self._answers = address, answers
        self._lock = greenlets.native_lock()  # a client may be polled by a signal handler
        self._watcher = 0  # the process whose thread watches
        self._heard = 0
        self._text = ""
        self._tellers: WeakSet[object] = WeakSet()
        #: Whether an outage has been logged, but not yet its end.
        self.said = False
        forks.in_child(self)

    def after_fork(self) -> None:
        """In a forked child: forget the parent's watching thread and lock."""
        self._lock = greenlets.native_lock()
        self._end()

    def heard(self, text: str, by: object) -> None:
        """Note that a client lost a connection, or cannot connect; ``text``: the client's message. Callable from any
        thread; returns at once.

        ``by``: an object that lives as long as the client. It is not kept alive here.
        """
        with self._lock:
            self._heard += 1
            self._tellers.add(by)
            if not self._text or "onnect" in text:  # a text that names the connection is the most useful
                self._text = text
            if self._watcher == os.getpid():
                return
            self._watcher = os.getpid()
            try:
                greenlets.start_thread(self._watch, "jobledger-outage")
            except RuntimeError:  # the interpreter ends
                self._watcher = 0

    def _watch(self) -> None:
        since = time.monotonic()
        error_at = since + LONG_S
        while True:
            greenlets.native_sleep(ASK_EVERY_S)
            if self._forsaken():
                return
            heard = self._heard
            quiet = time.monotonic() < _quiet_until
            if quiet or self._answered():
                if self.said and not quiet:
                    LOG.info("connected again to %s, after %.0f s", self._address, time.monotonic() - since)
                self.said = False
                with self._lock:
                    if quiet or self._heard == heard:
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

    def _forsaken(self) -> bool:
        """Whether no client is left that reported this outage. If so, the watch ends, and nothing is logged."""
        with self._lock:
            if self._tellers:
                return False
            self.said = False
            self._end()
            return True

    def _end(self) -> None:
        self._watcher, self._text = 0, ""
        self._tellers.clear()

    def _answered(self) -> bool:
        try:
            return self._answers()
        except Exception:  # without this thread no outage would be logged
            LOG.debug("%s could not be checked", self._address, exc_info=True)
            return False


_outages: dict[str, Outage] = {}


def outage_of(settings: Settings) -> Outage:
    """This process's `Outage` for the cluster that these settings name."""
    address = settings.bootstrap or "the embedded broker"
    found = _outages.get(address)
    if found is None:
        found = _outages.setdefault(address, Outage(address, lambda: _answers(settings)))
    return found


def log_missed(logger: logging.Logger, settings: Settings, message: str, *args: object) -> None:
    """Log that something was not done because no broker answered: as a warning, or at debug level while an outage is
    logged."""
    logger.log(logging.DEBUG if outage_of(settings).said else logging.WARNING, message, *args, stacklevel=2)


def _answers(settings: Settings) -> bool:
    """Whether a broker answers within `ANSWER_S`; a refused right is an answer."""
    try:
        conf: dict[str, Any] = {**settings.librdkafka(), "logger": LOG, "log_level": 0, "error_cb": lambda error: None}
        return cluster.answers(forks.client(AdminClient, conf), ANSWER_S)
    except (JobledgerError, KafkaException):
        return False
