"""Jobledger's own loggers: those of `logging`, except that an error in logging never stops the code that logs.

Handlers, filters and factories belong to the app, and any of them may raise. The message is then written to standard
error instead. A `dictConfig` of the app does not disable these loggers. In Jobledger's own processes, errors that the
app's configuration would drop are still written to standard error, unless the app gives the logger ``jobledger`` a
level.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import Any

from jobledger.errors import TaskInterrupted, text_of, type_of


class _Guarded(logging.Logger):
    """A mixin that is put before a logger's class."""

    @property
    def disabled(self) -> bool:
        """Always False. By default `dictConfig` would disable every logger that it does not name."""
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass

    def isEnabledFor(self, level: int) -> bool:
        """Decide as any logger does. For an error in one of Jobledger's own processes only the level of Jobledger's own
        loggers counts."""
        return super().isEnabledFor(level) or (
            level >= logging.ERROR and _last_resort is not None and level >= _own_level(self)
        )

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Pass a record to the handlers. An error that no handler takes is passed to the last-resort handler."""
        super().callHandlers(record)
        if record.levelno >= logging.ERROR and _last_resort is not None and not _taken(self, record):
            _last_resort.handle(record)

    def _log(self, level: int, msg: object, args: Any, **named: Any) -> None:  # type: ignore[override]  # as it is called
        try:
            super()._log(level, msg, args, **{**named, "stacklevel": named.get("stacklevel", 1) + 1})
        except (KeyboardInterrupt, TaskInterrupted):  # raised from outside, for the code that logs
            raise
        except BaseException as broken:  # noqa: BLE001  # see the module's docstring
            with contextlib.suppress(Exception):
                message = str(msg) % args if args else str(msg)
                level_name = logging.getLevelName(level)
                sys.stderr.write(
                    f"{level_name} {self.name}: {message} [logging failed: {type_of(broken)}: {text_of(broken)}]\n"
                )


#: Handler for errors that no other handler takes; None outside Jobledger's own processes.
_last_resort: logging.Handler | None = None


def write_errors_to(handler: logging.Handler | None) -> None:
    """Give ``handler`` every error of Jobledger's that the app's logging would drop."""
    global _last_resort
    _last_resort = handler


def _own_level(logger: logging.Logger | None) -> int:
    """Return the level that is set on Jobledger's loggers; 0: none."""
    while logger is not None and logger.name.partition(".")[0] == "jobledger":
        if logger.level:
            return logger.level
        logger = logger.parent
    return 0


def _taken(logger: logging.Logger | None, record: logging.LogRecord) -> bool:
    """Return whether any handler takes records of this level, regardless of its filters."""
    while logger is not None:
        if any(h.level <= record.levelno and not isinstance(h, logging.NullHandler) for h in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def get_logger(name: str) -> logging.Logger:
    """Return the logger of `logging.getLogger`, guarded; see the module's docstring."""
    logger = logging.getLogger(name)
    kind = type(logger)  # the app may have set its own class
    if not issubclass(kind, _Guarded):
        logger.__dict__.pop("disabled", None)
        logger.__class__ = type(kind.__name__, (_Guarded, kind), {})
    return logger


def loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an exception of an event loop with the default handler, guarded: without the guard the loop would stop if
    logging or the exception itself fails."""
    try:
        loop.default_exception_handler(context)
    except BaseException as broken:  # noqa: BLE001  # see the docstring
        _LOG.error("%s [it could not be logged: %s: %s]", context.get("message"), type_of(broken), text_of(broken))


_LOG = get_logger("jobledger.worker")
