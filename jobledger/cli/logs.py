"""Logging of long-running commands: one line per message on standard error, coloured on a terminal, or JSON.

Log lines of a job's code have the job's fields, with ``logging`` and with ``structlog``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from jobledger.definitions.log_context import FIELDS, JobFilter, add_job
from jobledger.errors import ConfigError
from jobledger.process.extras import missing
from jobledger.process.logger import write_errors_to

_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31", logging.DEBUG: "2"}
_FORMATS = ("text", "json")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _Format(logging.Formatter):
    """Formats messages as text. On a terminal: the time, the level unless it is info, and the logger's name unless the
    logger is one of Jobledger's, in colour. Otherwise: all fields."""

    def __init__(self, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._coloured = coloured
        self._short = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record = _with_job(record)
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


def _with_job(record: logging.LogRecord) -> logging.LogRecord:
    """Add the job to a message that the app's own code logs in a job. Jobledger's own messages name the job in their
    text."""
    job_fields = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
    if not job_fields or record.name.startswith("jobledger"):
        return record
    about = " ".join(f"{name}={value}" for name, value in job_fields.items())
    return logging.makeLogRecord({**record.__dict__, "msg": f"{record.getMessage()} [{about}]", "args": ()})


def _json() -> logging.Formatter:
    """Return a formatter that writes one JSON object per line: timestamp (UTC), level, logger, event, the job's fields,
    the ``extra`` fields, exception."""
    try:
        import structlog  # a slow import that only this function needs
    except ImportError as exc:
        raise missing("worker", exc) from exc

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.contextvars.merge_contextvars,
                add_job,
                structlog.stdlib.PositionalArgumentsFormatter(),
                *shared[:2],
                *shared[3:],
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(default=str),
        ],
    )


def set_up(environ: dict[str, str] | None = None) -> None:
    """Send log messages from level ``JOBLEDGER_LOG_LEVEL`` (default info) up to standard error, in the format
    ``JOBLEDGER_LOG_FORMAT``.

    Call this after the app is loaded. If the app's module has configured the root logger, that logger is not changed.
    The root logger then receives Jobledger's messages, from ``JOBLEDGER_LOG_LEVEL`` up if that is set. Errors that the
    app's logging would drop are written to standard error. Raises `ConfigError`.
    """
    env = os.environ if environ is None else environ
    text = (env.get("JOBLEDGER_LOG_LEVEL") or "INFO").upper()
    if text not in _LEVELS:
        raise ConfigError(f"JOBLEDGER_LOG_LEVEL={text!r} is not a level; the levels are {', '.join(_LEVELS)}")
    kind = (env.get("JOBLEDGER_LOG_FORMAT") or "text").lower()
    if kind not in _FORMATS:
        raise ConfigError(f"JOBLEDGER_LOG_FORMAT={kind!r} is not a format; the formats are {', '.join(_FORMATS)}")
    ours, theirs = logging.getLogger("jobledger"), bool(logging.getLogger().handlers)
    handler = logging.StreamHandler()
    coloured = (sys.stderr.isatty() or bool(env.get("FORCE_COLOR"))) and not env.get("NO_COLOR")
    handler.setFormatter(_json() if kind == "json" and not theirs else _Format(coloured))
    handler.addFilter(JobFilter())
    write_errors_to(handler)
    if not theirs:
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if not ours.level and (env.get("JOBLEDGER_LOG_LEVEL") or not theirs):
        ours.setLevel(text)
