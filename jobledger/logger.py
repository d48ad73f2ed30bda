"""Jobledger's own loggers: those of `logging`, except that a line never ends what writes it.

The handlers, filters and factories behind them are the app's, and any of these may raise. Such a line goes to standard
error instead. A `dictConfig` of the app's does not disable these loggers: levels and handlers are the way to that.
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
