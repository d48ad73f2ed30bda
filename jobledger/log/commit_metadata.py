"""The metadata text of a worker's commit: which records beyond the committed offset are done. Pure.

A worker writes the text (`jobledger.consumers.state.offset_tracker` owns what it says). The next owner of the partition
reads it, and so does whoever counts the open records of a partition from outside the group.

The text has the form ``2<c|d>.<floor>.<begun>.<checksum>.<r|b><map>``, with these parts: the version; clean or dirty;
the floor in hex; how far beyond the watermark records were begun, in hex; the CRC-32 over watermark, floor, begun and
map, because a map is valid only with its own watermark; the map in base64. The map is a list of run lengths (r: LEB128
varints, not done and done in turn, from the watermark on) or a bitset (b: bit n means that watermark + n is done),
whichever is shorter.
"""

from __future__ import annotations

import binascii
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: The broker's default of ``offset.metadata.max.bytes``.
METADATA_LIMIT = 4096
_VERSION = "2"
_BEFORE = "1"  # the version before, without ``begun``: read, not written

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """The decoded state of a commit.

    ``done``: half-open ranges of done records, at or beyond ``watermark``. ``floor``: the takeover floor; None if not
    known. ``begun``: no record from this offset on had been begun at the time of the commit; 0 or the watermark if the
    commit does not say it.
    """

    watermark: int
    done: Ranges = ()
    floor: int | None = None
    clean: bool = False
    begun: int = 0


def encode(watermark: int, done: Iterable[tuple[int, int]], floor: int, clean: bool, begun: int = 0) -> str | None:
    """Encode the metadata text. Return None if the text would be longer than `METADATA_LIMIT`."""
    ranges = list(done)
    payload = b""
    kind = "r"
    if ranges:
        runs = _runs(watermark, ranges)
        span = ranges[-1][1] - watermark
        if len(runs) <= (span + 7) // 8:
            payload = runs
        else:
            payload, kind = _bits(watermark, ranges), "b"
    ahead = max(0, begun - watermark)
    body = f"{floor:x}.{ahead:x}.{_checksum(watermark, floor, payload, ahead):08x}.{kind}"
    text = f"{_VERSION}{'c' if clean else 'd'}.{body}{binascii.b2a_base64(payload, newline=False).decode()}"
    return text if len(text) <= METADATA_LIMIT else None


def decode(watermark: int, metadata: str | None, log_end: int) -> Restored:
    """Decode a commit at ``watermark``, for a log that ends at ``log_end``.

    The text is ignored if it is missing, damaged, of another version or another watermark, or if it names records that
    the log does not have. Then no record beyond the watermark counts as done, the floor is not known, and the handover
    counts as not clean.
    """
    nothing = Restored(watermark)
    if not metadata:
        return nothing
    try:
        head, floor_text, rest = metadata.split(".", 2)
        if head[:1] not in (_VERSION, _BEFORE) or head[1:] not in ("c", "d"):
            return nothing
        ahead_text, rest = rest.split(".", 1) if head[0] == _VERSION else ("0", rest)
        checksum, body = rest.split(".", 1)
        floor, ahead = int(floor_text, 16), int(ahead_text, 16)
        payload = binascii.a2b_base64(body[1:].encode("ascii"), strict_mode=True)
        if int(checksum, 16) != _checksum(watermark, floor, payload, ahead if head[0] == _VERSION else None):
            return nothing
        if body[0] == "r":
            ranges = tuple(_from_runs(watermark, payload))
        elif body[0] == "b":
            ranges = tuple(_from_bits(watermark, payload))
        else:
            return nothing
    except (ValueError, IndexError, UnicodeError):
        return nothing
    if watermark > log_end or (ranges and ranges[-1][1] > log_end):
        return nothing
    return Restored(watermark, ranges, floor, head[1] == "c", watermark + ahead)


def _checksum(watermark: int, floor: int, payload: bytes, ahead: int | None) -> int:
    about = f"{watermark}/{floor}" if ahead is None else f"{watermark}/{floor}/{ahead}"
    return zlib.crc32(payload, zlib.crc32(about.encode()))


def varint_size(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def _varint(out: bytearray, number: int) -> None:
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)


def _runs(watermark: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    out = bytearray()
    at = watermark
    for start, end in ranges:
        _varint(out, start - at)
        _varint(out, end - start)
        at = end
    return bytes(out)


def _from_runs(watermark: int, payload: bytes) -> Iterator[tuple[int, int]]:
    numbers: list[int] = []
    number = shift = 0
    for byte in payload:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    if shift or len(numbers) % 2:
        raise ValueError("the run lengths end too early")
    at = watermark
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        at += gap
        yield at, at + length
        at += length


def _bits(watermark: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    bits = 0
    end = watermark
    for start, end in ranges:
        bits |= ((1 << (end - start)) - 1) << (start - watermark)
    return bits.to_bytes((end - watermark + 7) // 8, "little")


def _from_bits(watermark: int, payload: bytes) -> Iterator[tuple[int, int]]:
    text = f"{int.from_bytes(payload, 'little'):b}"[::-1]
    at = text.find("1")
    while at >= 0:
        end = text.find("0", at)
        if end < 0:
            end = len(text)
        yield watermark + at, watermark + end
        at = text.find("1", end)
