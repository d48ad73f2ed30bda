"""Durations as users give them: seconds as any real number, or a `timedelta`. Pure."""

from __future__ import annotations

import datetime as dt
import numbers
from typing import overload

from jobledger.errors import ConfigError

#: The type of every option that takes seconds.
Seconds = float | dt.timedelta


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
