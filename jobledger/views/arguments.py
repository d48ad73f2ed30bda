"""Chooses jobs by their arguments, which only the log has. Pure: reads neither the log nor the status table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jobledger.views.values import jsonable

if TYPE_CHECKING:
    from jobledger.job import JobStatus

#: How many of the newest jobs that match all other filters are compared for one page.
WINDOW = 200


class Chosen(NamedTuple):
    """The jobs of a page. ``compared``: how many jobs were compared; ``unknown``: how many of these have arguments that
    are not known, for example because the log was trimmed."""

    jobs: list[JobStatus]
    compared: int
    unknown: int


def wanted_of(text: str) -> tuple[str, str]:
    """Return the path and the value of a condition such as ``user.id=1``. Raises `ValueError`."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"{text!r} is not of the form NAME=VALUE, such as user.id=1")
    return path, value


def choose(
    jobs: Sequence[JobStatus],
    arguments: Mapping[str, bytes | str],
    wanted: Mapping[str, str],
    limit: int,
    shown: Callable[[JobStatus, Any], Any] | None = None,
) -> Chosen:
    """Return the first ``limit`` of the jobs that have all wanted arguments.

    ``arguments``: by job id, as `jobledger.views.records.submissions` returns them. ``wanted``: values by path. ``shown``:
    returns the arguments of a job as they may be shown; None: as they are.
    """
    found: list[JobStatus] = []
    unknown = 0
    for number, job in enumerate(jobs, 1):
        raw = arguments.get(job.job_id)
        if not isinstance(raw, bytes):
            unknown += 1
            continue
        args = jsonable(raw)
        if has(args if shown is None else shown(job, args), wanted):
            found.append(job)
            if len(found) == limit:
                return Chosen(found, number, unknown)
    return Chosen(found, len(jobs), unknown)


def has(args: Any, wanted: Mapping[str, str]) -> bool:
    """Return whether arguments, as JSON builtins, have every wanted value.

    A path has the names of objects with dots between them. In a list, any of its elements may have the value. A text is
    compared as it is, and any other value as JSON: ``1``, ``true``, ``null``.
    """
    return all(any(_is(each, value) for each in _at(args, path)) for path, value in wanted.items())


def _at(value: Any, path: str) -> Iterator[Any]:
    """Yield the values at a path. Names may contain dots, too."""
    if isinstance(value, list):
        for each in value:
            yield from _at(each, path)
    elif isinstance(value, dict):
        for name, each in value.items():
            if name == path:
                yield from each if isinstance(each, list) else [each]
            elif path.startswith(f"{name}."):
                yield from _at(each, path[len(name) + 1 :])


def _is(value: Any, text: str) -> bool:
    if isinstance(value, str):
        return value == text
    return not isinstance(value, dict | list) and json.dumps(value) == text
