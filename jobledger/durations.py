"""Spans of time as people give them: seconds as any real number, or a `timedelta`. Pure."""

from __future__ import annotations

import datetime as dt
import numbers
from typing import overload

from jobledger.errors import ConfigError

#: What is taken wherever seconds are.
Seconds = float | dt.timedelta


@overload
def in_seconds(span: Seconds) -> float: ...


@overload
def in_seconds(span: Seconds | None) -> float | None: ...


@overload
def in_seconds(span: object) -> object: ...


def in_seconds(span: object) -> object:
    """A span in seconds: a `timedelta` and a number of another kind (numpy's, a `Fraction`) as a float; what is none of
    these as it is, for who judges it to say so."""
    kind = type(span)
    if kind is float or kind is int or kind is bool:
        return span
    if isinstance(span, dt.timedelta):
        return span.total_seconds()
    return float(span) if isinstance(span, numbers.Real) else span


def check_patience(span: object, what: str = "timeout") -> float | None:
    """How long somebody waits, in seconds, None for ever; else `ConfigError`."""
    if span is None:
        return None
    found = in_seconds(span)
    if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
        raise ConfigError(f"{what}={span!r} is not a number of seconds from 0 up, a timedelta or None")
    return float(found)
