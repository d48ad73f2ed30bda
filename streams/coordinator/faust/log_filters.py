"""Limits what Faust and its clients log: in an outage aiokafka alone writes hundreds of lines a second."""

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
    """Passes one record of each message template per ``interval`` seconds, and adds to it how many were held back."""

    def __init__(self, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._interval, self._clock = interval, clock
        self._last: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes; change its message if others were held back."""
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
            record.msg = f"{record.msg} [{held} more like this were held back]"
        return True


class SaidElsewhere(logging.Filter):
    """Holds back records with tracebacks of missing rights, as the coordinator logs what is missing, and those of a client
    that is stopped after its event loop was closed."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record passes."""
        error = record.exc_info[1] if record.exc_info else None
        over = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        return not (over or isinstance(error, _REFUSED) or isinstance(getattr(error, "__cause__", None), _REFUSED))


class Unheard(logging.Filter):
    """Shortens asyncio's records about failed tasks whose result was never read. A stopped aiokafka client leaves such
    tasks behind; their error is enough, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True: every record passes, those with an aiokafka error shortened."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, aioerrors.KafkaError):
            record.msg, record.args, record.exc_info = f"a request that nobody waited for failed: {error}", (), None
        return True


class Connections(logging.Filter):
    """Passes aiokafka's messages about lost connections to ``heard`` instead of the log. ``heard`` logs each outage once;
    aiokafka logs every attempt."""

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


def tell_no_more() -> None:
    """Remove the ``heard`` callback that `quieten` has set."""
    _connections.heard = None


_LOST = ("Unable connect to", "Unable to update metadata from", "NodeNotReadyError", "KafkaConnectionError")

_REFUSED = (
    aioerrors.TopicAuthorizationFailedError,
    aioerrors.GroupAuthorizationFailedError,
    aioerrors.ClusterAuthorizationFailedError,
)

#: In an outage aiokafka writes hundreds of lines a second, and Faust's timers log every late tick.
_NOISY = ("aiokafka", "faust", "mode")
#: A Jobledger module whose logger Faust uses for the services defined there.
_OURS = "jobledger.streams.coordinator.faust.local_store"
_CONSUMER = "jobledger.streams.coordinator.faust.faust_app"
_connections = Connections()
_filters = (SaidElsewhere(), _connections, RateLimit())
_unheard = Unheard()


def quieten(level: int = logging.WARNING, heard: Callable[[str], None] | None = None) -> None:
    """Let Faust, mode and aiokafka log only from ``level`` up, and each message once in 10 s. ``heard``: called with
    messages about failed connections."""
    if heard is not None:
        _connections.heard = heard
    for name in [*_NOISY, *logging.root.manager.loggerDict]:
        if name.partition(".")[0] in _NOISY:
            logger = logging.getLogger(name)
            # A filter of a logger does not apply to its children's records, so each logger gets it.
            for each in _filters:
                logger.addFilter(each)  # adding it twice has no effect
    for name in (*_NOISY, _OURS, _CONSUMER):
        logging.getLogger(name).setLevel(level)
    logging.getLogger(_CONSUMER).addFilter(_filters[0])
    logging.getLogger("asyncio").addFilter(_unheard)
    # Faust logs the restart of a fetcher in a rebalance as an error with a traceback, though it is not an error.
    with contextlib.suppress(KeyError):
        logging.getLogger("faust.transport.consumer").setLevel(max(level, logging.ERROR))
