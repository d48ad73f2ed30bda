"""Logging of the commands that run: one line a message on standard error, coloured where somebody looks."""

from __future__ import annotations

import logging
import os
import sys

from jobledger.errors import ConfigError

_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31", logging.DEBUG: "2"}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Format(logging.Formatter):
    """For a terminal: the time, a level that is not info, the logger if it is not ours, in colour. Else all of it."""

    def __init__(self, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._coloured = coloured
        self._short = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        if not self._coloured:
            return super().format(record)
        words = [] if record.levelno == logging.INFO else [record.levelname.lower()]
        words += [] if record.name.startswith("jobledger.") else [record.name]
        if words:
            record = logging.makeLogRecord(
                {**record.__dict__, "msg": f"{' '.join(words)}: {record.getMessage()}", "args": ()}
            )
        text = self._short.format(record)
        colour = _COLOURS.get(record.levelno)
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def set_up(environ: dict[str, str] | None = None) -> None:
    """Send log messages from ``JOBLEDGER_LOG_LEVEL`` (default info) up to standard error.

    A root logger that somebody has configured already (the app's module may) is left as it is.
    """
    env = os.environ if environ is None else environ
    text = (env.get("JOBLEDGER_LOG_LEVEL") or "INFO").upper()
    if text not in _LEVELS:
        raise ConfigError(f"JOBLEDGER_LOG_LEVEL={text!r} is no level; there are {', '.join(_LEVELS)}")
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    coloured = (sys.stderr.isatty() or bool(env.get("FORCE_COLOR"))) and not env.get("NO_COLOR")
    handler.setFormatter(_Format(coloured))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("jobledger").setLevel(text)
