"""The rows of the coordinator's table and their encoding: kept releases, markers, and floors.

This module is pure.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from jobledger.kafka.topic_names import lane
from jobledger.schemas.events import JobSpec

#: The floor of a partition that was never swept. It is below every offset.
NO_FLOOR = -1


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A release that the coordinator keeps, with the whole job.

    ``offset``: offset of the event from which this row was made. ``due``: the time at which the job must be released,
    or at which its job lease ends; µs of the broker's clock.
    """

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
        """The job's spec."""
        return JobSpec(self.args, self.tags, self.parent, None, self.expires_at, self.priority)

    @property
    def lane(self) -> str:
        """The name of the work topic's lane: the queue, or queue and priority."""
        return lane(self.queue, self.priority)

    @property
    def acts_at(self) -> int:
        """The time at which a timer must look at this row, µs of the broker's clock."""
        return self.due


class Scheduled(Kept, frozen=True, array_like=True, tag=0, gc=False):
    """A release that waits until it is due."""

    @property
    def acts_at(self) -> int:
        """The time when the release is due, or when the job expires if that is earlier; µs of the broker's clock."""
        return self.due if self.expires_at is None else min(self.due, self.expires_at)


class Held(Kept, frozen=True, array_like=True, tag=3, gc=False):
    """A release that a worker runs with a job lease. The lease ends at ``due`` unless the worker renews it.
    ``crashes``: number of leases of this run that ended without an outcome."""

    worker: str = ""
    crashes: int = 0


class Marker(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A marker: the coordinator released the job, or ended its run, because of the event at ``offset``, which was
    appended at ``appended_ms`` (ms of the broker's clock). ``run_ended``: whether the run has ended, so that the
    release must not be sent or leased again."""

    partition: int
    offset: int
    run: int
    release: int
    appended_ms: int
    run_ended: bool = False


class Floor(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The floor of a partition: every event at or below ``offset`` was processed. A floor is never deleted.

    ``shift``: number that is added to the log's offsets before they are compared with those in rows. The shift is above
    0 if the rows were made from an earlier log (`jobledger.streams.coordinator.table`).
    """

    partition: int
    offset: int
    shift: int = 0


Row = Scheduled | Marker | Held

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], Row | Floor] = msgspec.msgpack.Decoder(Row | Floor).decode

#: The second byte of a marker. A row's bytes begin with the array header (one byte if below 16 fields) and the tag.
_MARKER_TAG = _encode(Marker(0, 0, 0, 0, 0))[1]


def encode_row(row: Row | Floor) -> bytes:
    """Encode a row for the table and its changelog (MessagePack, fields by position)."""
    return _encode(row)


def decode_row(data: bytes) -> Row | Floor:
    """Decode a row. Raises `msgspec.DecodeError` or `msgspec.ValidationError` for other bytes."""
    return _decode(data)


def of_unknown_kind(data: bytes) -> bool:
    """Return whether bytes that `decode_row` refuses look like a row of a kind that only a later version has."""
    try:
        match msgspec.msgpack.decode(data):
            case [int(tag), *_]:
                return not isinstance(tag, bool) and tag > Held.__struct_config__.tag  # type: ignore[operator]
    except msgspec.DecodeError:
        pass
    return False


def is_marker(data: bytes) -> bool:
    """Return whether a row's bytes are a `Marker`, without decoding them."""
    return len(data) > 1 and data[1] == _MARKER_TAG


def row_key(job_id: str) -> bytes:
    """Return the key of a job's row."""
    return job_id.encode()


def floor_key(partition: int) -> bytes:
    """Return the key of a partition's floor. The key begins with a zero byte, unlike Jobledger's job ids."""
    return b"\0floor/%d" % partition


def newer(row: Row | Floor, than: Row | Floor) -> bool:
    """Return whether ``row`` replaces ``than``: ``row`` was made from a later event, or from the same one.

    The order in which the two rows were written does not matter. A floor with a larger shift replaces one with a
    smaller shift.
    """
    if isinstance(row, Floor) and isinstance(than, Floor) and row.shift != than.shift:
        return row.shift > than.shift
    return row.offset >= than.offset
