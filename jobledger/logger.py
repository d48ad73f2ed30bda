"""Jobledger's own loggers: those of `logging`, except that a line never ends what writes it.

The handlers, filters and factories behind them are the app's, and any of these may raise. Such a line goes to standard
error instead. A `dictConfig` of the app's does not disable these loggers, and in Jobledger's own processes errors that its
configuration would drop are written all the same: who wants none gives the logger ``jobledger`` a level.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import Any

from jobledger.errors import TaskInterrupted, text_of, type_of


class _Guarded(logging.Logger):
    """What is put before the class of a logger."""

    @property
    def disabled(self) -> bool:
        """Never: `dictConfig` disables what it does not name, unless it is told otherwise."""
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass

    def isEnabledFor(self, level: int) -> bool:
        """As of any logger; for an error in a process of ours only the level of Jobledger's own loggers counts."""
        return super().isEnabledFor(level) or (
            level >= logging.ERROR and _at_last is not None and level >= _own_level(self)
        )

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Hand a record to the handlers; an error that none of them takes to the last one."""
        super().callHandlers(record)
        if record.levelno >= logging.ERROR and _at_last is not None and not _taken(self, record):
            _at_last.handle(record)

    def _log(self, level: int, msg: object, args: Any, **named: Any) -> None:  # type: ignore[override]  # as it is called
        try:
            super()._log(level, msg, args, **{**named, "stacklevel": named.get("stacklevel", 1) + 1})
        except (KeyboardInterrupt, TaskInterrupted):  # raised from outside, for the code that writes the line
            raise
        except BaseException as broken:  # noqa: BLE001  # see the module
            with contextlib.suppress(Exception):
                said = str(msg) % args if args else str(msg)
                level_name = logging.getLevelName(level)
                sys.stderr.write(
                    f"{level_name} {self.name}: {said} [logging broke: {type_of(broken)}: {text_of(broken)}]\n"
                )


#: Takes the errors that no other handler takes; None outside of Jobledger's own processes.
_at_last: logging.Handler | None = None


def write_errors_to(handler: logging.Handler | None) -> None:
    """Let ``handler`` have every error of Jobledger's that the app's logging would drop."""
    global _at_last
    _at_last = handler


def _own_level(logger: logging.Logger | None) -> int:
    """The level that Jobledger's loggers have been given; 0: none."""
    while logger is not None and logger.name.partition(".")[0] == "jobledger":
        if logger.level:
            return logger.level
        logger = logger.parent
    return 0


def _taken(logger: logging.Logger | None, record: logging.LogRecord) -> bool:
    """Whether a handler takes records of this level; its filters are its own."""
    while logger is not None:
        if any(h.level <= record.levelno and not isinstance(h, logging.NullHandler) for h in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def get_logger(name: str) -> logging.Logger:
    """`logging.getLogger`, guarded; see the module."""
    logger = logging.getLogger(name)
    kind = type(logger)  # the app may have set one of its own
    if not issubclass(kind, _Guarded):
        logger.__dict__.pop("disabled", None)
        logger.__class__ = type(kind.__name__, (_Guarded, kind), {})
    return logger


def loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: its own one, which ends the loop if the log or the exception breaks, guarded."""
    try:
        loop.default_exception_handler(context)
    except BaseException as broken:  # noqa: BLE001  # see above
        _LOG.error("%s [it could not be logged: %s: %s]", context.get("message"), type_of(broken), text_of(broken))


_LOG = get_logger("jobledger.worker")
