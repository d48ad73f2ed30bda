"""The quick way to read a submission says what the full decoder says, or nothing."""

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
def test_it_reads_what_the_full_decoder_reads(event: JobEvent) -> None:
    """Whenever it answers, the answer is the event, but for what a worker does not need."""
    found = plain_submission(codec.encode(event))
    if found is not None:
        assert found == msgspec.structs.replace(event, occurred_at=0, source="")


def test_it_answers_for_plain_submissions() -> None:
    """The shape that clients write is read the quick way: else it would be of no use."""
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
def test_damaged_bytes_are_not_read_the_quick_way(event: JobEvent, at: int, put: bytes) -> None:
    """Where the full decoder refuses, so does the quick one."""
    raw = codec.encode(event)
    damaged = raw[:at] + put + raw[at + len(put) :]
    found = plain_submission(damaged)
    if found is None:
        return
    try:
        full = codec.decode(damaged)
    except SchemaError:
        raise AssertionError(f"{damaged!r} was read") from None
    assert found == msgspec.structs.replace(full, occurred_at=0, source="")
