"""How long the status table keeps the rows of jobs that have ended: the setting, and the limits that follow from it.

Pure: no Kafka, no database, no clock. `jobledger.streams.status.store.removal` has the rule that chooses rows.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping

from jobledger.errors import ConfigError

#: The states whose rows can be removed: those that end a run. (`jobledger.job` has them, too; the audit, which reads
#: settings, must not import that module.)
STATES = ("succeeded", "failed", "cancelled", "expired")
#: The shortest time in seconds for which a row is kept. Within this time a caller that waits for a job reads
#: its outcome, workers remember the job's releases, and the table reads the records from before the outcome.
LEAST_S = 3600.0
#: The longest time in seconds: a hundred years.
MOST_S = 100 * 366 * 86_400.0

_SETTING = "JOBLEDGER_TABLE_RETENTION"
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_FORM = (
    f"write STATE=AGE, with commas between them, such as succeeded=7d,failed=90d. The states are {', '.join(STATES)}; an "
    "age is a number with s, m, h or d; the rows of a state that is not named are kept for ever"
)


def parse(text: str) -> dict[str, float]:
    """Return the seconds for which rows are kept, by state, from a text such as ``succeeded=7d,failed=90d``. An
    empty text gives no state. Raises `ConfigError`."""
    spans: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        state, equals, age = (each.strip() for each in part.partition("="))
        if not equals or state not in STATES:
            raise ConfigError(f"{_SETTING}={text!r}: {part.strip()!r} does not begin with a state and '=': {_FORM}")
        if state in spans:
            raise ConfigError(f"{_SETTING}={text!r} names {state} twice: give one age for each state")
        number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h|d)", age)
        if number is None:
            raise ConfigError(f"{_SETTING}={text!r}: {age!r} is not an age: {_FORM}")
        spans[state] = float(number[1]) * _UNITS[number[2]]
    return checked(spans)


def checked(spans: Mapping[str, float | dt.timedelta]) -> dict[str, float]:
    """Return the seconds for which rows are kept, by state. Raises `ConfigError` for an unknown state, and for a time
    that is not between `LEAST_S` and `MOST_S`."""
    seconds: dict[str, float] = {}
    for state, span in spans.items():
        if state not in STATES:
            raise ConfigError(f"table_retention ({_SETTING}) has {state!r}, which is no state that ends a job: {_FORM}")
        value: object = span.total_seconds() if isinstance(span, dt.timedelta) else span
        if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST_S <= value <= MOST_S:
            raise ConfigError(
                f"table_retention ({_SETTING}) keeps {state} jobs for {_shown(span)}, which is not between one hour and "
                "a hundred years: give a longer or shorter age, or leave the state out to keep its rows for ever"
            )
        seconds[state] = float(value)
    return seconds


def _shown(span: object) -> str:
    number = isinstance(span, int | float) and not isinstance(span, bool)
    return f"{span:g} s" if number and math.isfinite(span) else repr(span)  # type: ignore[arg-type]


def limits(spans: Mapping[str, float], now_ms: int) -> dict[str, int]:
    """Return for each state a time in ms of the broker's clock: rows of jobs that ended before this time are removed."""
    return {state: now_ms - math.ceil(seconds * 1000) for state, seconds in spans.items()}
