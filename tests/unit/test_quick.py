"""The fast path for submissions returns the event of the full decoder, or None."""

from __future__ import annotations

import uuid

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from jobledger.consumers.state.fast_submission import plain_submission
from jobledger.errors import SchemaError
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobSpec, JobSubmitted

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
SPECS = st.builds(
    JobSpec,
    st.binary(max_size=9_000),
    st.just({}) | st.dictionaries(TEXT, TEXT, max_size=1),
    st.none() | st.none() | TEXT,
)
NO_NUMBER = st.none() | st.none() | st.integers(0, 2**40)
EVENTS = st.builds(
    JobEvent,
    st.uuids().map(str) | TEXT,
    st.uuids().map(str) | TEXT,
    *[st.integers(-1, 70)] * 3,
    st.integers(1_600_000_000_000_000, 2_600_000_000_000_000),
    TEXT,
    TEXT,
    *[st.none() | st.none() | TEXT] * 2,
    TEXT,
    st.none() | st.none() | TEXT,
    st.builds(JobSubmitted, SPECS, NO_NUMBER, NO_NUMBER),
)


def plain(args: bytes) -> JobEvent:
    job = str(uuid.uuid4())
    fact = JobSubmitted(JobSpec(args))
    return JobEvent(job, job, 1, 1, 1, 1_790_000_000_000_000, "send", "mail", None, None, "client@h:1", None, fact)


@given(EVENTS)
@example(plain(b"{}"))
@example(plain(b"x" * 63))
@example(plain(b"x" * 64))
@example(plain(b"x" * 8191))
@example(plain(b"x" * 8192))
@example(msgspec.structs.replace(plain(b"{}"), key="", home="", trace=""))
def test_the_fast_path_returns_the_event_of_the_full_decoder_or_none(event: JobEvent) -> None:
    """The fields that a worker does not need are left out."""
    read = plain_submission(codec.encode(event))
    if read is not None:
        assert read == msgspec.structs.replace(event, occurred_at=0, source="")


def test_the_fast_path_reads_plain_submissions() -> None:
    """Clients write submissions in this form, so the fast path must read it."""
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    for size in (2, 63, 64, 1_000, 8_000):
        event = plain(b"x" * size)
        assert plain_submission(codec.encode(event)) is not None
        spec = JobSpec(b"x" * size, {"event": str(uuid.uuid4()), "tenant": "acme"}, str(uuid.uuid4()))
        for key, traced in (("account-7", None), (None, trace), ("k" * 63, trace)):
            for fact in (event.fact, JobSubmitted(spec)):
                other = msgspec.structs.replace(event, key=key, trace=traced, fact=fact)
                assert plain_submission(codec.encode(other)) == msgspec.structs.replace(other, occurred_at=0, source="")


@given(EVENTS, st.integers(0, 400), st.binary(max_size=3))
def test_the_fast_path_does_not_read_damaged_bytes(event: JobEvent, at: int, put: bytes) -> None:
    """If the full decoder refuses the bytes, the fast path returns None."""
    raw = codec.encode(event)
    damaged = raw[:at] + put + raw[at + len(put) :]
    read = plain_submission(damaged)
    if read is None:
        return
    try:
        full = codec.decode(damaged)
    except SchemaError:
        raise AssertionError(f"{damaged!r} was read") from None
    assert read == msgspec.structs.replace(full, occurred_at=0, source="")
