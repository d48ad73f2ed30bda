"""Rows of the coordinator's table: releases it keeps, markers of those it let go, floors; and their bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from jobledger.names import lane
from jobledger.schemas.events import JobSpec

#: Nothing lies at or below it: the floor of a partition that was never swept.
NO_FLOOR = -1


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A release that the coordinator keeps, whole. ``offset``: of the event that made this row; ``due``: µs, broker's
    clock, when it is to be let go, or its lease ends."""

    partition: int
    offset: int
    run: int
    release: int
    attempt: int
    due: int
    job_id: str
    task: str
    queue: str
    key: str | None
    home: str | None
    trace: str | None
    args: bytes
    tags: dict[str, str]
    parent: str | None
    expires_at: int | None = None
    priority: str | None = None

    @property
    def spec(self) -> JobSpec:
        """The job."""
        return JobSpec(self.args, self.tags, self.parent, None, self.expires_at, self.priority)

    @property
    def lane(self) -> str:
        """What stands for its work topic: the queue, or queue and priority."""
        return lane(self.queue, self.priority)

    @property
    def acts_at(self) -> int:
        """When a timer is to look at it, µs of the broker's clock."""
        return self.due


class Scheduled(Kept, frozen=True, array_like=True, tag=0, gc=False):
    """A release that waits for its time."""

    @property
    def acts_at(self) -> int:
        """When it is due, or has expired before that."""
        return self.due if self.expires_at is None else min(self.due, self.expires_at)


class Held(Kept, frozen=True, array_like=True, tag=3, gc=False):
    """A release that a worker runs on a lease, which ends at ``due`` unless it is renewed. ``crashes``:
    leases of this run that ended so."""

    worker: str = ""
    crashes: int = 0


class Released(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Marker of a release that was let go by the event at ``offset``, appended at ``ended_ms`` of the broker's clock.
    ``closed``: it has ended since, and is not to be let go or leased again."""

    partition: int
    offset: int
    run: int
    release: int
    ended_ms: int
    closed: bool = False


class Floor(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """One per partition, kept for good: every event at or below ``offset`` was dealt with. ``shift``: what is added to
    the log's offsets before they are compared with those in rows, because it is not the log that the rows were made
    from any more (`jobledger.streams.table`)."""

    partition: int
    offset: int
    shift: int = 0


Row = Scheduled | Released | Held

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Row | Floor] = msgspec.msgpack.Decoder(Row | Floor).decode

#: A row's bytes begin with the array header (one byte below 16 fields) and its tag.
_RELEASED_MARK = _encode(Released(0, 0, 0, 0, 0))[1]


def encode_row(row: Row | Floor) -> bytes:
    """A row as it is kept in the table and its changelog (MessagePack, fields by position)."""
    return _encode(row)


def decode_row(data: bytes) -> Row | Floor:
    """The inverse of `encode_row`. Raises `msgspec.DecodeError` or `msgspec.ValidationError` for other bytes."""
    return _decode(data)


def of_unknown_kind(data: bytes) -> bool:
    """Whether bytes that `decode_row` refuses look like a row of a kind that a later version has."""
    try:
        match msgspec.msgpack.decode(data):
            case [int(tag), *_]:
                return not isinstance(tag, bool) and tag > Held.__struct_config__.tag  # type: ignore[operator]
    except msgspec.DecodeError:
        pass
    return False


def is_marker(data: bytes) -> bool:
    """Whether encoded bytes are a `Released` marker, without decoding them."""
    return len(data) > 1 and data[1] == _RELEASED_MARK


def row_key(job_id: str) -> bytes:
    """The key of a job's row."""
    return job_id.encode()


def floor_key(partition: int) -> bytes:
    """The key of a partition's floor; begins with a zero byte, which no job id does."""
    return b"\0floor/%d" % partition


def newer(row: Row | Floor, than: Row | Floor) -> bool:
    """Whether ``row`` was made by a later event than ``than``: later ones win, in whatever order they were written."""
    if isinstance(row, Floor) and isinstance(than, Floor) and row.shift != than.shift:
        return row.shift > than.shift
    return row.offset >= than.offset
