"""Durations and moments as users give them: seconds as any real number, or a `timedelta`; a moment as text. Pure."""

from __future__ import annotations

import datetime as dt
import numbers
import re
from typing import overload

from jobledger.errors import ConfigError

#: The type of every option that takes seconds.
Seconds = float | dt.timedelta

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LAST_MS = 253_402_214_400_000  # 9999-12-31 in UTC: a later time may be outside the calendar in some time zone


@overload
def in_seconds(span: Seconds) -> float: ...


@overload
def in_seconds(span: Seconds | None) -> float | None: ...


@overload
def in_seconds(span: object) -> object: ...


def in_seconds(span: object) -> object:
    """Return a duration in seconds: a `timedelta`, or another kind of number (numpy's, a `Fraction`), as a float.
    Anything else is returned unchanged, so that the caller can report it."""
    kind = type(span)
    if kind is float or kind is int or kind is bool:
        return span
    if isinstance(span, dt.timedelta):
        return span.total_seconds()
    return float(span) if isinstance(span, numbers.Real) else span


def check_patience(span: object, what: str = "timeout") -> float | None:
    """Return a timeout in seconds, or None to wait forever. Raises `ConfigError` for anything else."""
    if span is None:
        return None
    duration = in_seconds(span)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not duration >= 0:
        raise ConfigError(f"{what}={span!r} is not a number of seconds from 0 up, a timedelta or None")
    return float(duration)


def age_of(text: str) -> float | None:
    """Return the seconds of an age such as ``10m`` or ``1.5 h``; None if the text is no age."""
    age = _AGE.fullmatch(text.strip())
    return None if age is None else float(age[1]) * _UNITS[age[2]]


def moment_of(text: str, now: float) -> int:
    """Return a moment in milliseconds since the epoch: from ISO 8601 (UTC if without a zone), or from an age before
    ``now`` (seconds since the epoch). No moment is before the epoch. Raises `ValueError`."""
    age = age_of(text)
    try:
        when = int((now - age) * 1000) if age is not None else milliseconds(dt.datetime.fromisoformat(text.strip()))
    except (ValueError, OverflowError):
        when = _LAST_MS
    if when >= _LAST_MS:
        raise ValueError(f"{text!r} is neither an age such as 10m or 2h, nor a time such as 2026-01-31T14:05")
    return max(when, 0)


def milliseconds(when: dt.datetime) -> int:
    """Convert a time to milliseconds since the epoch. A time without a zone is UTC, so that the same text means the
    same moment on every machine."""
    return round((when if when.tzinfo is not None else when.replace(tzinfo=dt.UTC)).timestamp() * 1000)
