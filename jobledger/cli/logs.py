"""Logging of the commands that run: one line a message on standard error, coloured where somebody looks."""

from __future__ import annotations

import logging
import os
import sys

from jobledger.errors import ConfigError

_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31", logging.DEBUG: "2"}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Format(logging.Formatter):
    def __init__(self, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S" if coloured else None)
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        colour = _COLOURS.get(record.levelno)
        return f"\x1b[{colour}m{text}\x1b[0m" if self._coloured and colour else text


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
