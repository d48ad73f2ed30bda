"""Limit what Faust and its clients log. In an outage aiokafka alone writes hundreds of lines per second."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from jobledger.process.extras import missing

try:
    from aiokafka import errors as aioerrors
except ImportError as exc:
    raise missing("streams", exc) from exc


class RateLimit(logging.Filter):
    """Pass one record of each message template per ``interval`` seconds.

    The number of records that were dropped since the last one is added to the message. ``clock()``: returns seconds.
    """

    def __init__(self, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._interval, self._clock = interval, clock
        self._last: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes. Change its message if records like it were dropped."""
        template = (record.name, str(record.msg)[:80])
        now = self._clock()
        last = self._last.get(template)
        if last is not None and now - last < self._interval:
            self._held[template] = self._held.get(template, 0) + 1
            return False
        if len(self._last) > 1000:
            self._last.clear()
        self._last[template] = now
        held = self._held.pop(template, 0)
        if held:
            record.msg = f"{record.msg} [{held} more messages like this were dropped]"
        return True


class SaidElsewhere(logging.Filter):
    """Drop two kinds of records with tracebacks.

    Records about missing rights, because the coordinator logs which right is missing; and records of a client that is
    stopped after its event loop was closed.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes."""
        error = record.exc_info[1] if record.exc_info else None
        over = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        return not (over or isinstance(error, _REFUSED) or isinstance(getattr(error, "__cause__", None), _REFUSED))


class Unheard(logging.Filter):
    """Shorten asyncio's records about failed tasks whose result was never read.

    A stopped aiokafka client leaves such tasks. The error of such a task is logged without a traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True: every record passes, those with an aiokafka error shortened."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, aioerrors.KafkaError):
            record.msg, record.args, record.exc_info = (
                f"a request failed, and no task waited for its result: {error}",
                (),
                None,
            )
        return True


class Connections(logging.Filter):
    """Pass aiokafka's messages about lost connections to ``heard`` instead of the log.

    aiokafka logs every attempt to connect. ``heard`` logs each outage once.
    """

    heard: Callable[[str], None] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes."""
        if self.heard is None or not record.name.startswith("aiokafka"):
            return True
        text = record.getMessage()
        if not any(words in text for words in _LOST):
            return True
        self.heard(text)
        return False


def forget_heard() -> None:
    """Remove the ``heard`` callback that `quieten` has set."""
    _connections.heard = None


_LOST = ("Unable connect to", "Unable to update metadata from", "NodeNotReadyError", "KafkaConnectionError")

_REFUSED = (
    aioerrors.TopicAuthorizationFailedError,
    aioerrors.GroupAuthorizationFailedError,
    aioerrors.ClusterAuthorizationFailedError,
)

#: Loggers that are limited. In an outage aiokafka writes hundreds of lines per second, and Faust's timers log every
#: late tick.
_NOISY = ("aiokafka", "faust", "mode")
#: Modules of Jobledger whose loggers Faust uses for the services that are defined in these modules.
_OURS = "jobledger.streams.coordinator.faust.local_store"
_CONSUMER = "jobledger.streams.coordinator.faust.faust_app"
_connections = Connections()
_filters = (SaidElsewhere(), _connections, RateLimit())
_unread_results = Unheard()


def quieten(level: int = logging.WARNING, heard: Callable[[str], None] | None = None) -> None:
    """Let Faust, mode and aiokafka log only from ``level`` up, and each message template once in 10 s.

    ``heard``: called with aiokafka's messages about failed connections; None: no change.
    """
    if heard is not None:
        _connections.heard = heard
    for name in [*_NOISY, *logging.root.manager.loggerDict]:
        if name.partition(".")[0] in _NOISY:
            logger = logging.getLogger(name)
            # A filter of a logger does not apply to the records of its child loggers, so each logger gets the filters.
            for each in _filters:
                logger.addFilter(each)  # adding a filter twice has no effect
    for name in (*_NOISY, _OURS, _CONSUMER):
        logging.getLogger(name).setLevel(level)
    logging.getLogger(_CONSUMER).addFilter(_filters[0])
    logging.getLogger("asyncio").addFilter(_unread_results)
    # Faust logs the restart of a fetcher in a rebalance as an error with a traceback, though it is not an error.
    with contextlib.suppress(KeyError):
        logging.getLogger("faust.transport.consumer").setLevel(max(level, logging.ERROR))
