"""Builds the dead letters of rejected records. Every part that rejects records uses the same limits."""

from __future__ import annotations

from jobledger.schemas import codec
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import RecordRejected

#: Limits for the key (bytes) and the reason (characters) of a rejected record in its dead letter.
KEY_BYTES, REASON_CHARS = 4_096, 2_000
#: Bytes by which a note about a shortened part may enlarge a dead letter.
_NOTE_BYTES = 120


def rejection(
    topic: str,
    partition: int,
    offset: int,
    key: bytes | None,
    value: bytes | None,
    reason: str,
    *,
    event_id: str,
    at_us: int,
    source: str,
    limit: int,
) -> bytes:
    """Encode the dead letter of a rejected record, with key and value unchanged if they fit.

    ``limit``: the largest size of the dead letter, 1,000 bytes or more. Of a key above `KEY_BYTES` only the beginning
    is kept, and so of a value that makes the dead letter larger than ``limit``; the reason says so. ``at_us``: time of
    the writer's clock, in µs; ``source``: the writer's name.
    """
    # The reason may hold characters that UTF-8 cannot encode.
    why = reason[:REASON_CHARS].encode("utf-8", "replace").decode()
    key_bytes = min(KEY_BYTES, len(key or b""))
    value_bytes = len(value or b"")

    def encoded() -> bytes:
        text = why + _note("key", key, key_bytes) + _note("value", value, value_bytes)
        kept_key = None if key is None else key[:key_bytes]
        fact = RecordRejected(topic, partition, offset, kept_key, None if value is None else value[:value_bytes], text)
        return codec.encode(standalone(fact, event_id, at_us, source))

    letter = encoded()
    if (over := len(letter) - limit) > 0:
        value_bytes = max(0, value_bytes - over - _NOTE_BYTES)
        letter = encoded()
    if (over := len(letter) - limit) > 0:  # the limit is small: the value alone was not enough
        key_bytes = max(0, key_bytes - over - _NOTE_BYTES)
        letter = encoded()
    if (over := len(letter) - limit) > 0:
        why = why[: max(0, len(why) - over)]
        letter = encoded()
    return letter


def _note(part: str, whole: bytes | None, kept: int) -> str:
    """Return the note about a shortened part of a record; an empty text if the part is not shortened. ``part``: ``key``
    or ``value``. ``kept``: the number of bytes in the dead letter. `jobledger.audit.rules` reads these words."""
    if whole is None or kept == len(whole):
        return ""
    return f"; the first {kept} of its {part}'s {len(whole)} bytes are kept here"
