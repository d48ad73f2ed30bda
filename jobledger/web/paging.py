"""The parameters of lists: filters, size and beginning of a page, links to the next page, and positions in the log."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Query, Request

from jobledger.app import JobFilter
from jobledger.job import State
from jobledger.schemas.events import Position
from jobledger.views.arguments import wanted_of
from jobledger.web.problems import Problem

#: Largest page, and the page's size if none is asked for.
LIMIT_MOST, LIMIT = 500, 50
#: Largest number of values of one filter.
VALUES_MOST = 100
#: The largest number that the log or a table has as an offset.
_OFFSET_MOST = 2**63 - 1

_POSITION = re.compile(r"([A-Za-z0-9._-]{1,249})(?::(\d{1,10}):(\d{1,19})|\[(\d{1,10})\]@(\d{1,19}))", re.ASCII)

Limit = Annotated[int, Query(ge=1, le=LIMIT_MOST, description=f"Number of entries in the page, at most {LIMIT_MOST}.")]
After = Annotated[
    str | None, Query(max_length=200, description="The id of the last entry of the page before; see `next`.")
]
AtLeast = Annotated[
    str | None,
    Query(
        max_length=300,
        description="A position in the log, `topic:partition:offset`, as a submission returns it: wait until the status "
        "table has read it. If it has not within 10 seconds, the answer is 503.",
    ),
]


def position_of(text: str | None) -> Position | None:
    """Return a position as a client writes it: ``topic:partition:offset``, or ``topic[partition]@offset`` as in other
    outputs of Jobledger. Raises `Problem`."""
    if text is None:
        return None
    found = _POSITION.fullmatch(text)
    if found is None or int(found[3] or found[5]) > _OFFSET_MOST or int(found[2] or found[4]) >= 1 << 31:
        raise Problem(422, f"at_least={text!r} is not a position such as shop.jobs.mail:3:41")
    return Position(found[1], int(found[2] or found[4]), int(found[3] or found[5]))


def position_text(position: Position) -> str:
    """Return a position as the parameter ``at_least`` takes it."""
    return f"{position.topic}:{position.partition}:{position.offset}"


def filters(
    state: Annotated[list[State], Query(max_length=VALUES_MOST, description="Any of these states.")] = [],  # noqa: B006  # FastAPI copies it
    task: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these tasks.")] = [],  # noqa: B006
    queue: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these queues.")] = [],  # noqa: B006
    tag: Annotated[list[str], Query(max_length=VALUES_MOST, description="All of these tags, each NAME=VALUE.")] = [],  # noqa: B006
    key: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these ordering keys.")] = [],  # noqa: B006
    version: Annotated[list[str], Query(max_length=VALUES_MOST, description="Last started by any of these versions.")] = [],  # noqa: B006
    error: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these types of errors.")] = [],  # noqa: B006
    fingerprint: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these fingerprints of errors.")] = [],  # noqa: B006
    since: Annotated[str | None, Query(max_length=50, description="Submitted at this time or later (ISO 8601; UTC if it has no zone).")] = None,
    until: Annotated[str | None, Query(max_length=50, description="Submitted before this time (as `since`).")] = None,
    id_prefix: Annotated[str | None, Query(min_length=1, max_length=200, description="The id begins with this text; the jobs are then ordered by id, unless a tag, key or fingerprint is given.")] = None,
    attempts_least: Annotated[int | None, Query(ge=1, lt=1 << 31, description="The attempt has this number or a greater one; without a state only jobs that wait for a retry.")] = None,
    error_text: Annotated[str | None, Query(min_length=1, max_length=500, description="The error's message contains this text; the case of letters does not count.")] = None,
    late: Annotated[float | None, Query(ge=0, le=366 * 86_400, description="Could have been started this many seconds ago, and was not.")] = None,
) -> JobFilter:  # fmt: skip
    """Return the filters of a list of jobs. A job must match all of them."""
    chosen: dict[str, Any] = {
        "state": state,
        "task": task,
        "queue": queue,
        "tag": tags_of(tag),
        "key": key,
        "version": version,
        "error": error,
        "fingerprint": fingerprint,
        "since": None if since is None else moment_of(since, "since"),
        "until": None if until is None else moment_of(until, "until"),
        "id_prefix": id_prefix,
        "attempts_least": attempts_least,
        "error_text": error_text,
        "late": late,
    }
    return {name: value for name, value in chosen.items() if value not in (None, [], {})}  # type: ignore[return-value]


def tags_of(texts: list[str]) -> dict[str, str]:
    """Return tags by name. Raises `Problem`."""
    tags: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise Problem(422, f"tag={text!r} is not of the form NAME=VALUE")
        if tags.setdefault(name, value) != value:
            raise Problem(422, f"tag {name} is given as {tags[name]!r} and as {value!r}: no job has both")
    return tags


def wanted_arguments(texts: list[str]) -> dict[str, str]:
    """Return values of arguments by path. Raises `Problem`."""
    wanted: dict[str, str] = {}
    for text in texts:
        try:
            path, value = wanted_of(text)
        except ValueError as exc:
            raise Problem(422, f"arg={exc}") from None
        if wanted.setdefault(path, value) != value:
            raise Problem(422, f"arg {path} is given as {wanted[path]!r} and as {value!r}: give one value")
    return wanted


def moment_of(text: str, what: str) -> dt.datetime:
    """Return a time. Raises `Problem` that names ``what``."""
    try:
        moment = dt.datetime.fromisoformat(text)
        if not 1970 <= moment.year < 9999:
            raise ValueError("outside 1970 to 9998")
    except ValueError:
        raise Problem(
            422, f"{what}={text!r} is not a time such as 2026-01-31T14:05:00Z (in an address, write + as %2B)"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)


def link(request: Request, path: str, query: Mapping[str, str] | None = None) -> str:
    """Return an address of this service, as a client must request it. ``path``: begins with a slash, and follows the
    prefix."""
    base = str(request.scope.get("root_path", "")).rstrip("/")
    return f"{base}{path}" + (f"?{urlencode(query)}" if query else "")


def next_page(request: Request, path: str, after: str) -> str:
    """Return the address of the next page: the same list, after this entry."""
    pairs = [(name, value) for name, value in request.query_params.multi_items() if name not in ("after", "at_least")]
    return link(request, path) + "?" + urlencode([*pairs, ("after", after)])
