"""Decodes only the fields that the status fold needs, fast, for events in the plain forms that nearly all events have.

`glance` decodes an event that this version wrote, with ids of 36 ASCII characters, small numbers, short names, and one
of the facts of a plain job's life. It skips home and trace, which the fold does not need. For any other event
`glance` returns None, and the caller uses the full decoder (`codec.Decoder.decode`). `glance` reads the same values
from the same bytes as fastavro, and returns None for bytes that fastavro refuses. A test with Hypothesis, which also
damages the bytes, checks this. `glance` is hand-written because the full decoder takes 10 µs per event and `glance`
2 µs (docs/adr/0002-reading-plain-events-at-a-glance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobledger.schemas import events as ev
from jobledger.schemas.codec import FINGERPRINT, MAGIC, PLAIN_END

#: (job_id, run, release, attempt, task, queue, key, fact). Fields of the fact that the fold does not need are empty.
Glance = tuple[str, int, int, int, str, str, str | None, ev.Fact]

_LEAD = MAGIC + FINGERPRINT + b"H"  # 36, the length of an id, as an Avro long
_EIGHT_GROUPS, _EIGHT_ENDS = 0x8080808080808080, 0x0080808080808080
_TIME_AT = 87
#: Offset of the task's name in the shape that `glance` accepts; queue, key, home, source and trace follow. Before it is
#: the time, which has eight bytes until the year 3111.
TASK_AT = 95

_SUBMITTED = ev.JobSubmitted(ev.JobSpec(b""))
#: Facts by the encoded worker and version. Bounded; emptied when full.
_starts: dict[bytes, ev.JobStarted] = {}
_STARTS_MOST = 4096

#: Task and queue by their encoded bytes. Bounded; emptied when full.
_titles: dict[bytes, tuple[str, str]] = {}
_TITLES_MOST = 4096


def glance(value: bytes) -> Glance | None:
    """Return the fields of an encoded event that the fold needs; None if the full decoder must read it."""
    try:
        if value[:11] != _LEAD or value[47] != 72:
            return None
        run, attempt, release = value[84], value[85], value[86]
        # An odd byte is a negative number; a byte with the high bit continues in the next one.
        if (run | attempt | release) & 0x81:
            return None
        if int.from_bytes(value[_TIME_AT:TASK_AT], "little") & _EIGHT_GROUPS != _EIGHT_ENDS:
            return None
        task = value[TASK_AT]
        queue_at = TASK_AT + 1 + (task >> 1)
        queue = value[queue_at]
        key_at = queue_at + 1 + (queue >> 1)
        source = value[key_at + 2]
        trace_at = key_at + 3 + (source >> 1)
        key = None
        if value[key_at] or value[key_at + 1]:
            home_at = after_option(value, key_at)
            if value[key_at]:
                key = value[key_at + 2 : home_at].decode()
            trace_at = _after_home_and_source(value, home_at)
            titles = value[TASK_AT:key_at]
            source = 0
        else:
            titles = value[TASK_AT:trace_at]
        if (task | queue | source) & 0x81:
            return None
        fact_at = after_option(value, trace_at) if value[trace_at] else trace_at + 1
        read = _READERS.get(value[fact_at])
        if read is None:
            return None
        fact = read(value, fact_at + 1)
        if fact is None:
            return None
        named = _titles.get(titles)
        if named is None:
            if len(_titles) >= _TITLES_MOST:
                _titles.clear()
            titles[key_at + 3 - TASK_AT :].decode()
            named = (value[TASK_AT + 1 : queue_at].decode(), value[queue_at + 1 : key_at].decode())
            _titles[titles] = named
        ids = value[11:84].decode("ascii")
        return ids[37:], run >> 1, release >> 1, attempt >> 1, named[0], named[1], key, fact
    except (IndexError, UnicodeDecodeError):
        return None


def after_option(value: bytes, at: int) -> int:
    """Return the offset after a nullable text. Raises `IndexError` for more than 63 bytes, `UnicodeDecodeError` for
    bytes that are not UTF-8."""
    branch = value[at]
    if not branch:
        return at + 1
    length = value[at + 1]
    if branch != 2 or length & 0x81:
        raise IndexError
    end = at + 2 + (length >> 1)
    value[at + 2 : end].decode()
    return end


def _after_home_and_source(value: bytes, at: int) -> int:
    """Return the offset of the trace, which follows home and source. Raises as `after_option` does."""
    at = after_option(value, at)
    length = value[at]
    if length & 0x81:
        raise IndexError
    end = at + 1 + (length >> 1)
    value[at + 1 : end].decode()
    return end


def _submitted(value: bytes, at: int) -> ev.Fact | None:
    length = value[at]
    at += 1
    if length & 0x80:
        length = length & 0x7F | value[at] << 7
        at += 1
        if length & 0x4000:
            return None
    if length & 1:
        return None
    at += length >> 1
    if value[at:] == PLAIN_END:
        return _SUBMITTED
    tags, at = _tags(value, at)
    end = after_option(value, at)
    if value[end:] != PLAIN_END[2:]:
        return None
    return ev.JobSubmitted(ev.JobSpec(b"", tags, value[at + 2 : end].decode() if end > at + 1 else None))


def _tags(value: bytes, at: int) -> tuple[dict[str, str], int]:
    """Return the tags and the offset after them. Raises `IndexError` unless they are one block, as `encode` writes
    them."""
    count = value[at]
    at += 1
    tags: dict[str, str] = {}
    if not count:
        return tags, at
    if count & 0x81:
        raise IndexError
    for _ in range(count >> 1):
        length = value[at]
        value_at = at + 1 + (length >> 1)
        value_length = value[value_at]
        end = value_at + 1 + (value_length >> 1)
        if (length | value_length) & 0x81:
            raise IndexError
        tags[value[at + 1 : value_at].decode()] = value[value_at + 1 : end].decode()
        at = end
    if value[at]:  # another block
        raise IndexError
    return tags, at + 1


def _started(value: bytes, at: int) -> ev.Fact | None:
    worker = value[at]
    version_at = at + 1 + (worker >> 1)
    waits_at = after_option(value, version_at) if value[version_at] else version_at + 1
    topic_at = _after_waits(value, waits_at) if value[waits_at] else waits_at + 1
    topic = value[topic_at]
    end = topic_at + 1 + (topic >> 1)
    if (worker | topic) & 0x81:
        return None
    if not (value[at:version_at].isascii() and value[topic_at:end].isascii()):
        return None
    end = _after_long(value, end)
    if value[end] > 0x7F or end + 1 != len(value):
        return None
    who = value[at:waits_at]
    fact = _starts.get(who)
    if fact is None:
        if len(_starts) >= _STARTS_MOST:
            _starts.clear()
        version = value[version_at + 2 : waits_at].decode() if value[version_at] else None
        fact = _starts[who] = ev.JobStarted(value[at + 1 : version_at].decode(), version, {}, "", 0)
    return fact


def _after_waits(value: bytes, at: int) -> int:
    """Return the offset after a start's waits. Raises `IndexError` unless they are one block, as `encode` writes
    them."""
    count = value[at]
    at += 1
    if count & 0x81:
        raise IndexError
    for _ in range(count >> 1):
        length = value[at]
        end = at + 1 + (length >> 1)
        if length & 0x81 or not value[at:end].isascii():
            raise IndexError
        at = _after_long(value, end)
    if value[at]:  # another block
        raise IndexError
    return at + 1


def _succeeded(value: bytes, at: int) -> ev.Fact | None:
    branch = value[at]
    at += 1
    result = None
    if branch == 2:
        length = value[at]
        at += 1
        if length & 0x81:
            return None
        result = value[at : at + (length >> 1)]
        at += length >> 1
    elif branch:
        return None
    duration = value[at]
    if duration > 0x7F:
        end = _after_long(value, at)
        if end - at > 9:
            return None
        shift = 7
        duration &= 0x7F
        for group in value[at + 1 : end]:
            duration |= (group & 0x7F) << shift
            shift += 7
        at = end - 1
    if at + 1 != len(value):
        return None
    return ev.JobSucceeded(result, (duration >> 1) ^ -(duration & 1))


def _after_long(value: bytes, at: int) -> int:
    """Return the offset after a long. Raises `IndexError` for more than nine bytes: it may not be a 64-bit number."""
    for end in range(at, at + 9):
        if value[end] < 0x80:
            return end + 1
    raise IndexError


_KINDS: dict[Any, Callable[[bytes, int], ev.Fact | None]] = {
    ev.JobSubmitted: _submitted,
    ev.JobStarted: _started,
    ev.JobSucceeded: _succeeded,
}
#: Readers by the encoded branch of the union. A test checks that `events.Fact` has the order of the schema.
_READERS = {branch << 1: _KINDS[kind] for branch, kind in enumerate(ev.Fact.__args__) if kind in _KINDS}
