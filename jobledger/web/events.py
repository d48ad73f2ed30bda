"""The route of events: facts of jobs, as server-sent events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated

import anyio
import msgspec
from fastapi import APIRouter, Header, Query, Request
from sse_starlette import EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jobledger.job import State
from jobledger.process.logger import get_logger
from jobledger.views.words import one_line
from jobledger.web.access import API, Caller
from jobledger.web.documents import problems
from jobledger.web.feed import Feed, Listener
from jobledger.web.happenings import Filter, Happening, message, place_of
from jobledger.web.paging import VALUES_MOST, tags_of
from jobledger.web.problems import Problem
from jobledger.web.services import services

LOG = get_logger("jobledger.web")

#: Largest number of streams of a process.
LISTENERS_MOST = 2_000
#: Seconds between two comments that keep a stream open, and seconds after which a client that reads nothing is
#: disconnected. At each heartbeat the user is checked again.
HEARTBEAT_S, SEND_S = 15, 60.0
#: Number of events, and of bytes, that are sent at once.
EVENTS_AT_ONCE, BYTES_AT_ONCE = 64, 16 * 1024
#: Largest number of clients at a time that connected again and to which missed events are still being sent.
MISSED_AT_ONCE = 16

_REASONS = {
    "behind": "this client was too slow, or the log could not be read: events are missing",
    "unknown": "the log does not have the events since the last one, or they are too many",
}

router = APIRouter(prefix=API, tags=["events"])


@router.get(
    "/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "Events `job` with an event, `ready` at the beginning, and `gap` where events are missing.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(),
    },
)
async def events(
    request: Request,
    user: Caller,
    job_id: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these jobs.")] = [],  # noqa: B006  # FastAPI copies it
    task: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these tasks.")] = [],  # noqa: B006
    queue: Annotated[list[str], Query(max_length=VALUES_MOST, description="Any of these queues.")] = [],  # noqa: B006
    state: Annotated[list[State], Query(max_length=VALUES_MOST, description="Any of these states.")] = [],  # noqa: B006
    tag: Annotated[list[str], Query(max_length=VALUES_MOST, description="All of these tags, each NAME=VALUE.")] = [],  # noqa: B006
    last_event_id: Annotated[str | None, Header(description="The id of the last event: continue after it.")] = None,
) -> Response:  # fmt: skip
    """Stream the facts of jobs from now on, as server-sent events.

    Each event `job` has the fact, the job and its state after it, and an id with which a client can continue. After an
    event `gap` the client must read again what it shows. An event may come twice after a client has connected again.
    The stream ends when the login is no longer valid.
    """
    feed = services(request).feed
    if feed.listeners >= LISTENERS_MOST:
        raise Problem(503, f"{LISTENERS_MOST:,} event streams are open, the most", headers={"Retry-After": "30"})
    wanted = Filter(
        jobs=frozenset(job_id) or None,
        tasks=task or None,
        queues=queue or None,
        states=state or None,
        tags=tags_of(tag),
    )
    listener = await feed.join(wanted.jobs, bool(wanted.tags))
    try:
        missed, gap = await _missed(request, feed, listener, last_event_id)
    except BaseException:
        feed.leave(listener)
        raise
    return _Stream(feed, listener, wanted, missed, gap, partial(_still_allowed, request))


async def _still_allowed(request: Request) -> bool:
    """Return whether the user of this request may still make it: tokens are revoked, and roles change."""
    try:
        await services(request).guard.admit(request)
    except Problem as problem:
        LOG.info("a stream of events ends, because its user is refused now: %s", one_line(problem.detail))
        return False
    return True


async def _missed(
    request: Request, feed: Feed, listener: Listener, event_id: str | None
) -> tuple[list[Happening], bool]:
    """Return the events since the last one that the client has, if they are not in the ring; and whether events are
    missing."""
    if event_id is None:
        return [], False
    place = place_of(event_id)
    if place is None:
        return [], True
    found = feed.find(event_id)
    if found is not None:
        listener.at = found
        return [], False
    if _Stream.catching_up >= MISSED_AT_ONCE:
        return [], True
    # The listener's place and these ends are of the same moment: nothing was published in between.
    missed = await services(request).log(feed.missed, *place, feed.ends)
    return missed or [], missed is None


class _Stream(EventSourceResponse):
    """The response: first the missed events, then the new ones. ``allowed``: returns whether the user may still get
    them; asked every `HEARTBEAT_S`."""

    #: Number of streams that have not sent all missed events yet.
    catching_up = 0

    def __init__(
        self,
        feed: Feed,
        listener: Listener,
        wanted: Filter,
        missed: list[Happening],
        gap: bool,
        allowed: Callable[[], Awaitable[bool]],
    ) -> None:
        self._allowed = allowed
        self._feed, self._listener, self._wanted = feed, listener, wanted
        self._missed, self._gap = missed, gap
        _Stream.catching_up += bool(missed)
        headers = {"X-Accel-Buffering": "no"}
        super().__init__(self._chunks(), headers=headers, sep="\n", ping=HEARTBEAT_S, send_timeout=SEND_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._caught_up()
            self._feed.leave(self._listener)

    def _caught_up(self) -> None:
        _Stream.catching_up -= bool(self._missed)
        self._missed = []

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield message("ready", b"{}")
        if self._gap:
            yield _gap("unknown")
        for start in range(0, len(self._missed), EVENTS_AT_ONCE):
            for chunk in self._joined(self._missed[start : start + EVENTS_AT_ONCE]):
                yield chunk
        self._caught_up()
        check_at = time.monotonic() + HEARTBEAT_S
        while True:
            if time.monotonic() >= check_at:
                if not await self._allowed():
                    return
                check_at = time.monotonic() + HEARTBEAT_S
            self._listener.wake.clear()
            taken, lost = self._feed.take(self._listener, EVENTS_AT_ONCE)
            if lost:
                yield _gap("behind")
            for chunk in self._joined(taken):
                yield chunk
            if not self._feed.running:
                return
            if not taken:
                with anyio.move_on_after(check_at - time.monotonic()):
                    await self._listener.wake.wait()

    def _joined(self, taken: list[Happening]) -> list[bytes]:
        """Return those of these events that the client wants, joined to chunks of about `BYTES_AT_ONCE`."""
        chunks: list[bytes] = []
        parts: list[bytes] = []
        size = 0
        for event in taken:
            if self._wanted.wants(event):
                parts.append(event.data)
                size += len(event.data)
                if size >= BYTES_AT_ONCE:
                    chunks.append(b"".join(parts))
                    parts, size = [], 0
        return chunks + ([b"".join(parts)] if parts else [])


def _gap(why: str) -> bytes:
    return message("gap", msgspec.json.encode({"reason": _REASONS[why], "reload": True}))
