"""The filters of the page of jobs: read from a URL, written to a URL, and given to the status table. Pure.

A value that is wrong is reported, and the other filters stay in force.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from jobledger.definitions.durations import age_of, moment_of
from jobledger.job import State

#: The filters that are one text each.
TEXTS = ("task", "queue", "key", "version", "error", "error_text", "fingerprint", "id_prefix")
#: All filters, in the order of the form.
NAMES = ("state", *TEXTS, "tag", "arg", "since", "until", "late", "attempts_least")
#: Largest number of characters of a value, and of tags, or arguments, in one filter.
VALUE_MOST, TAGS_MOST = 500, 5

#: The label of each filter on the page.
LABELS: Mapping[str, str] = {
    "state": "State",
    "task": "Task",
    "queue": "Queue",
    "tag": "Tag",
    "arg": "Argument",
    "key": "Key",
    "since": "Submitted since",
    "until": "Submitted until",
    "id_prefix": "Job id begins with",
    "version": "Version",
    "error": "Error type",
    "error_text": "Text of the error",
    "fingerprint": "Fingerprint",
    "late": "Late by",
    "attempts_least": "Attempts at least",
}


@dataclass(frozen=True)
class JobFilters:
    """The filters of one request. ``given``: every value as it was written, by the filter's name. ``problems``: the
    error of each filter that is wrong, by its name; such a filter is not in force.
    ``arguments``: values by path, which the status table does not have. Times are milliseconds since the epoch;
    ``late_s``: seconds."""

    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    since_ms: int | None = None
    until_ms: int | None = None
    late_s: float | None = None
    attempts_least: int | None = None

    @property
    def any(self) -> bool:
        """Whether at least one filter is in force."""
        return bool(self.states or self.texts or self.tags or self.arguments) or any(
            each is not None for each in (self.since_ms, self.until_ms, self.late_s, self.attempts_least)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the filters in force, in the order of the form."""
        in_force = {
            "state": self.states,
            "tag": self.tags,
            "arg": self.arguments,
            "since": self.since_ms is not None,
            "until": self.until_ms is not None,
            "late": self.late_s is not None,
            "attempts_least": self.attempts_least is not None,
            **dict.fromkeys(self.texts, True),
        }
        return tuple(name for name in NAMES if in_force.get(name))

    def table(self, now_ms: int) -> dict[str, Any]:
        """Return the filters in force as the read side of the status table takes them, without those by argument."""
        filters: dict[str, Any] = dict(self.texts)
        if self.states:
            filters["state"] = list(self.states)
        if self.tags:
            filters["tag"] = dict(self.tags)
        if self.since_ms is not None:
            filters["since_ms"] = self.since_ms
        if self.until_ms is not None:
            filters["until_ms"] = self.until_ms
        if self.late_s is not None:
            filters["late_ms"] = round(now_ms - self.late_s * 1000)
        if self.attempts_least is not None:
            filters["attempts_least"] = self.attempts_least
        return filters

    def where(self) -> dict[str, Any]:
        """Return the filters in force as `App.redrive` takes them, without those by argument."""
        where: dict[str, Any] = dict(self.texts)
        if self.states:
            where["state"] = list(self.states)
        if self.tags:
            where["tag"] = dict(self.tags)
        for name, moment in (("since", self.since_ms), ("until", self.until_ms)):
            if moment is not None:
                where[name] = dt.datetime.fromtimestamp(moment / 1000, dt.UTC)
        if self.late_s is not None:
            where["late"] = self.late_s
        if self.attempts_least is not None:
            where["attempts_least"] = self.attempts_least
        return where

    def query(self, **changes: Sequence[str] | str | None) -> str:
        """Return the filters as the query of a URL. ``changes``: other values of filters or parameters; None: without
        this one."""
        values: dict[str, Sequence[str]] = {name: list(each) for name, each in self.given.items()}
        for name, value in changes.items():
            values[name] = [] if value is None else [value] if isinstance(value, str) else value
        return urlencode([(name, value) for name, each in values.items() for value in each])

    def words(self) -> list[tuple[str, str]]:
        """Return the label of each filter in force, and its value as text for people."""
        return [(LABELS[name], ", ".join(self.given.get(name, ()))) for name in self.names]


def parse(parameters: Iterable[tuple[str, str]], now_ms: int) -> JobFilters:
    """Return the filters of a URL's parameters. Empty values and other parameters are left out."""
    given: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for name, value in parameters:
        if name in NAMES and value.strip():
            given.setdefault(name, []).append(value)
    for name, values in given.items():
        if too_long := [each for each in values if len(each) > VALUE_MOST]:
            problems[name] = f"The value has {len(too_long[0])} characters; {VALUE_MOST} are possible."
        elif name in (*TEXTS, "since", "until", "late", "attempts_least") and len(values) > 1:
            problems[name] = f"There are {len(values)} values; one is possible."
    right = {name: values for name, values in given.items() if name not in problems}
    states = _states(right.get("state", []), problems)
    tags = _pairs("tag", right.get("tag", []), problems)
    arguments = _pairs("arg", right.get("arg", []), problems)
    moments: dict[str, int | None] = {}
    for name in ("since", "until"):
        try:
            moments[name] = moment_of(right[name][0], now_ms / 1000) if name in right else None
        except ValueError as wrong:
            problems[name] = f"{wrong}."
    late = age_of(right["late"][0]) if "late" in right else None
    if "late" in right and late is None:
        problems["late"] = f"{right['late'][0]!r} is not a duration such as 30s, 10m or 2h."
    least = right["attempts_least"][0].strip() if "attempts_least" in right else None
    if least is not None and not (least.isascii() and least.isdecimal() and 0 < int(least) < 1 << 31):
        problems["attempts_least"] = f"{least!r} is not a whole number from 1 up."
        least = None
    return JobFilters(
        given,
        problems,
        states,
        {name: right[name][0] for name in TEXTS if name in right},
        tags,
        arguments,
        moments.get("since"),
        moments.get("until"),
        late,
        None if least is None else int(least),
    )


def _states(values: Sequence[str], problems: dict[str, str]) -> tuple[str, ...]:
    known = [state.value for state in State]
    if unknown := [each for each in values if each not in known]:
        problems["state"] = f"{unknown[0]!r} is not a state; the states are {', '.join(known)}."
    return tuple(each for each in known if each in values)


def _pairs(name: str, values: Sequence[str], problems: dict[str, str]) -> dict[str, str]:
    """Return the tags or the arguments of a filter."""
    what = {"tag": "tag", "arg": "argument"}[name]
    pairs: dict[str, str] = {}
    for text in values:
        of, sign, value = text.partition("=")
        if not sign or not of:
            problems[name] = f"{text!r} is not {'a tag' if name == 'tag' else 'an argument'}: write NAME=VALUE."
        elif pairs.setdefault(of, value) != value:
            problems[name] = f"The {what} {of} is given as {pairs[of]!r} and as {value!r}; one value is possible."
    if len(pairs) > TAGS_MOST:
        problems[name] = f"There are {len(pairs)} {what}s; {TAGS_MOST} are possible."
    return {} if name in problems else pairs
