"""The messages between a worker and its child processes, as MessagePack with the length in front.

Nothing is pickled. Arguments and results are the JSON that the log holds. The child turns an exception into an outcome
and sends the outcome.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from jobledger.consumers.state.outcome import Failed, Outcome, Retried, Snoozed, Succeeded
from jobledger.schemas.events import ErrorInfo

LENGTH = struct.Struct(">I")


class RunMessage(msgspec.Struct, array_like=True, gc=False):
    """Worker → child: run this attempt."""

    task: str
    args: bytes
    job_id: str
    queue: str
    run: int
    attempt: int
    release: int
    tags: dict[str, str]
    parent: str | None
    trace: str | None


class ProgressMessage(msgspec.Struct, array_like=True, tag="p", gc=False):
    """Child → worker: progress that the job reported."""

    sequence: int
    done: int
    total: int | None
    message: str | None


class EndedMessage(msgspec.Struct, array_like=True, tag="e", gc=False):
    """Child → worker: the outcome of the attempt. ``kind``: ``ok``, ``retried``, ``snoozed`` or ``failed``.
    ``unread``: whether the child's standard error may hold bytes that the worker has not read."""

    kind: str
    result: bytes | None = None
    delay_ms: int = 0
    reason: str | None = None
    error: tuple[str, str, str | None] | None = None  # type, message, traceback
    unread: bool = True


ChildMessage = ProgressMessage | EndedMessage

_encoder = msgspec.msgpack.Encoder()
decode_run = msgspec.msgpack.Decoder(RunMessage).decode
decode_child_message = msgspec.msgpack.Decoder(ChildMessage).decode


def frame(message: Any) -> bytes:
    """Encode a message, with the length of its body in front: 4 bytes, big-endian."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Splitter:
    """Splits a stream of bytes into message bodies."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add more bytes, and yield the bodies that are complete."""
        rest = self._rest
        rest += data
        at = 0
        while len(rest) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(rest, at)
            end = at + LENGTH.size + length
            if len(rest) < end:
                break
            yield bytes(rest[at + LENGTH.size : end])
            at = end
        del rest[:at]


def ended(outcome: Outcome) -> EndedMessage:
    """Build the message for an outcome. Raises `TypeError` for an outcome that a child never sends."""
    match outcome:
        case Succeeded(result):
            return EndedMessage("ok", result)
        case Snoozed(delay_ms, reason):
            return EndedMessage("snoozed", None, delay_ms, reason)
        case Retried(error, delay_ms):
            return EndedMessage("retried", None, delay_ms, None, (error.type, error.message, error.traceback))
        case Failed(why, error):
            return EndedMessage("failed", None, 0, why, (error.type, error.message, error.traceback))
    raise TypeError(f"{type(outcome).__name__} is nothing that a child sends")


def outcome_of(message: EndedMessage) -> Outcome:
    """Return the outcome that a message carries. Raises `ValueError` for a message that no child can have sent."""
    if message.kind == "ok":
        return Succeeded(message.result)
    if message.kind == "snoozed":
        return Snoozed(message.delay_ms, message.reason)
    if message.error is not None and message.kind == "retried":
        return Retried(ErrorInfo(*message.error), message.delay_ms)
    if message.error is not None and message.kind == "failed" and message.reason is not None:
        return Failed(message.reason, ErrorInfo(*message.error))  # type: ignore[arg-type]  # a child sends allowed ones only
    raise ValueError(f"a child sent {message!r}")
