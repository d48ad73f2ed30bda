"""``--where NAME=VALUE`` and the filter options of ``jobledger jobs``: parsed into the filters of `App.jobs`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from jobledger.cli.commands import Wrong, moment_ms, pair_of, pairs_of, states_of

if TYPE_CHECKING:
    from jobledger.app import JobFilter
    from jobledger.job import State

#: The names that take several values, of which a job must have one.
_SEVERAL = ("task", "queue", "state", "key", "version", "error", "fingerprint")
#: The names that take one value.
_SINGLE = ("id_prefix", "since", "until", "attempts_least", "error_text")
_TAG = "tag."

#: The names of ``--where``, for help and errors.
NAMES = (*_SEVERAL, *_SINGLE, f"{_TAG}NAME")
HELP = (
    f"A condition; the names are {', '.join(NAMES)}. Repeat the option for several conditions: a job must match all names, "
    "one of the values of a name, and all tags"
)


def conditions_of(texts: Sequence[str] | None, states: Collection[State] | None = None, why: str = "") -> JobFilter:
    """Return the filter that ``--where`` options stand for; no text gives an empty filter.

    ``states``: the states that may be named; None: all. ``why``: the end of the error about any other state. Raises
    `Wrong`.
    """
    several: dict[str, list[str]] = {}
    single: dict[str, str] = {}
    tags: list[str] = []
    for each in texts or ():
        name, value = pair_of(each, "--where")
        if name.startswith(_TAG) and len(name) > len(_TAG):
            tags.append(f"{name[len(_TAG) :]}={value}")
        elif name in _SEVERAL:
            several.setdefault(name, []).append(value)
        elif name not in _SINGLE:
            raise Wrong(f"--where {each!r}: {name!r} is not a condition; the conditions are {', '.join(NAMES)}")
        elif single.setdefault(name, value) != value:
            raise Wrong(f"--where {name} is given as {single[name]!r} and as {value!r}: only one value is possible")
    for state in states_of(several.get("state"), "--where state"):
        if states is not None and state not in states:
            raise Wrong(f"--where state={state}: {why}")
    chosen: dict[str, Any] = {**several, **{name: _converted(name, value) for name, value in single.items()}}
    if tags:
        chosen["tag"] = pairs_of(tags, "--where tag")
    return chosen  # type: ignore[return-value]  # a dict with the keys of the TypedDict


def together(options: JobFilter, where: JobFilter) -> JobFilter:
    """Return the filter of the options of a command and of its ``--where``. Raises `Wrong` if both set the same name,
    except for tags, of which a job must have all."""
    given = {name: value for name, value in options.items() if value not in (None, {}, [])}
    tags: dict[str, str] = {**given.pop("tag", {}), **where.get("tag", {})}  # type: ignore[dict-item]  # pairs_of
    for name in given:
        if name in where:
            raise Wrong(f"--{name} and --where {name}=… are both given: use one of them")
    return {**given, **where, **({"tag": tags} if tags else {})}  # type: ignore[typeddict-item]


def moment_of(text: str, option: str) -> dt.datetime:
    """Return a time of the command line. Raises `Wrong`."""
    return dt.datetime.fromtimestamp(moment_ms(text, option) / 1000, dt.UTC)


def _converted(name: str, value: str) -> Any:
    if name in ("since", "until"):
        return moment_of(value, f"--where {name}")
    if name != "attempts_least":
        return value
    if not value.isascii() or not value.isdecimal() or len(value) > 9 or int(value) < 1:
        raise Wrong(f"--where attempts_least={value}: write a whole number above 0; the first attempt has number 1")
    return int(value)
