"""The completion map of a work partition: it never has an open record as done, and loses no done record."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.consumers.state import offset_tracker
from jobledger.consumers.state.offset_tracker import SCAN_MOST, SUSPECT_MOST, PartitionOffsets
from jobledger.log.commit_metadata import METADATA_LIMIT, Restored, decode, encode

LOG_END = 1 << 40


def restored_done(restored: Restored) -> set[int]:
    return {offset for start, end in restored.done for offset in range(start, end)}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.integers(1, 4)),
        st.tuples(st.just("done"), st.integers(0, 1_000_000)),
        st.tuples(st.just("restart"), st.integers(0, 1)),
    ),
    max_size=200,
)


@given(steps, st.lists(st.integers(0, 3), min_size=800, max_size=800), st.integers(0, 1 << 33))
@settings(max_examples=100, deadline=None)
def test_completions_and_restarts_in_any_order_keep_exactly_the_done_records(
    plan: list[tuple[str, int]], gaps: list[int], first: int
) -> None:
    """A snapshot at any moment, and its restore, give exactly the done records."""
    log = [first + n + sum(gaps[: n + 1]) for n in range(len(gaps))]  # some offsets have no record
    log_end = log[-1] + 1
    tracker = PartitionOffsets(Restored(first), 0)
    read = 0  # how many records of the log this owner has read
    done: set[int] = set()
    for step, number in plan:
        if step == "receive":
            for offset in log[read : read + number]:
                assert tracker.receive(offset) == (offset not in done), "done records are not run again, others are"
                assert not tracker.receive(offset), "the same record again is no new one"
            read += number
        elif step == "done":
            open_offsets = [o for o in log[:read] if o not in done]
            if open_offsets:
                chosen = open_offsets[number % len(open_offsets)]
                tracker.done(chosen)
                done.add(chosen)
        else:
            taken = tracker.snapshot(clean=bool(number))
            assert taken is not None
            back = decode(taken.offset, taken.metadata, log_end)
            assert back.clean == bool(number)
            known = set(range(first, taken.offset)) | restored_done(back)
            assert known & set(log) == done, "the snapshot says another thing than what was done"
            tracker = PartitionOffsets(back, 0)
            read = sum(o < taken.offset for o in log)


def test_offsets_without_a_record_are_counted() -> None:
    """A gap counts with its length. Records that were done before are received too, so they are no gap."""
    tracker = PartitionOffsets(Restored(10, ((12, 14),)), 0)
    counts = [(tracker.receive(offset), tracker.missing) for offset in (10, 11, 12, 13, 14, 16, 20, 20)]
    assert counts == [
        (True, 0), (True, 0), (False, 0), (False, 0), (True, 0), (True, 1), (True, 4), (False, 4),
    ]  # fmt: skip


@given(st.integers(0, 1 << 40), st.integers(0, 3000), st.data())
@settings(max_examples=200, deadline=None)
def test_a_completion_map_is_decoded_as_it_was_encoded(watermark: int, floor: int, data: st.DataObject) -> None:
    """Every map that fits is decoded unchanged, in the form of runs and in the form of bits."""
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=300))
    at = watermark
    ranges = []
    for gap, length in lengths:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    begun = data.draw(st.integers(watermark, watermark + 100_000))
    text = encode(watermark, ranges, floor, True, begun)
    assert text is not None
    assert len(text.encode()) <= METADATA_LIMIT
    assert "\0" not in text
    assert decode(watermark, text, LOG_END << 1) == Restored(watermark, tuple(ranges), floor, True, begun)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 800)), min_size=1, max_size=30), st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_the_completion_map_fits_while_intake_is_not_braked(bursts: list[tuple[int, int]], seed: int) -> None:
    """If the worker receives no more records at the brake, the map is never too long, for completions in any order."""
    tracker = PartitionOffsets(Restored(0), 0)
    tracker.receive(0)  # never done: the watermark makes no progress
    pending: list[int] = []
    at = 1
    chance = random.Random(seed)
    for burst, keep in bursts:
        for _ in range(burst):
            if tracker.braked:
                break
            assert tracker.receive(at)
            pending.append(at)
            at += 1
        chance.shuffle(pending)
        while len(pending) > keep:
            tracker.done(pending.pop())
        assert tracker.snapshot() is not None
    assert tracker.snapshot() is not None


def test_a_single_open_record_does_not_stop_the_intake_of_others() -> None:
    """One record that stays open needs a few bytes. While only a few other records are open, intake is not braked."""
    tracker = PartitionOffsets(Restored(0), 0)
    tracker.receive(0)
    for offset in range(1, 200_000):
        tracker.receive(offset)
        if offset >= 100:
            tracker.done(offset - 99)
        if offset % 10_000 == 0:
            assert not tracker.braked
    taken = tracker.snapshot()
    assert taken is not None
    assert taken.offset == 0
    assert len(taken.metadata) < 100


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        "1c.5.00000000.r",
        "2c.5.00000000.r",
        "2c.5.0.00000000.r",
        "2c.5.x.00000000.r",
        "3c.5.0.00000000.r",
        "1c.x.00000000.r",
        "1c.5.00000000.zAAAA",
        "1c.5.00000000.r\x7f\x80",
        "1c.5",
        "-1",
    ],
)
def test_an_unreadable_map_means_not_done(text: str | None) -> None:
    """If the text is missing, damaged or of another version, no record is done, and the handover was not clean."""
    assert decode(7, text, LOG_END) == Restored(7)


@given(st.text(max_size=80))
def test_any_text_in_the_metadata_can_be_read(text: str) -> None:
    """For any text in the metadata that is not a completion map, no record is done."""
    assert decode(7, text, LOG_END) == Restored(7)


def test_a_map_with_another_committed_offset_is_refused() -> None:
    """A map is valid only with the offset with which it was committed."""
    text = encode(100, [(101, 105)], 3, True)
    assert decode(100, text, 200).done == ((101, 105),)
    assert decode(99, text, 200) == Restored(99)


def test_a_map_of_the_previous_version_is_read() -> None:
    """During an upgrade, workers of both versions write maps. The old map does not tell which records were begun."""
    # Written by the previous version: watermark 100, done 101 to 104 and 110, floor 0x2a, clean.
    assert decode(100, "1c.2a.077dfe9d.rAQQFAQ==", 200) == Restored(100, ((101, 105), (110, 111)), 42, True, 100)


def test_the_next_owner_knows_which_records_were_begun() -> None:
    """The map has the offset below which records may have been begun. This offset never becomes smaller."""
    tracker = PartitionOffsets(Restored(10), 0)
    for offset in range(10, 20):
        tracker.receive(offset)
    taken = tracker.snapshot()
    assert taken is not None
    assert decode(taken.offset, taken.metadata, 20).begun == 10, "received is not begun"
    tracker.begin(14)
    tracker.begin(11)
    assert tracker.changed, "or it would not be committed"
    tracker.done(10)
    taken = tracker.snapshot()
    assert taken is not None
    assert (taken.offset, decode(taken.offset, taken.metadata, 20).begun) == (11, 15)
    heir = PartitionOffsets(decode(taken.offset, taken.metadata, 20), 0).snapshot()
    assert heir is not None
    assert decode(11, heir.metadata, 20).begun == 15


def test_a_map_beyond_the_logs_end_is_refused() -> None:
    """A map with records that the log does not have belongs to another log."""
    text = encode(100, [(101, 105)], 3, True)
    assert decode(100, text, 104) == Restored(100)
    assert decode(100, text, 105).floor == 3


def test_the_takeover_floor_is_the_lowest_outcome_that_the_map_may_lack() -> None:
    """The floor starts at the high watermark and follows acknowledged outcomes. It waits for the records that derive
    from them."""
    tracker = PartitionOffsets(Restored(0), 50)
    for offset in range(3):
        tracker.receive(offset)
    assert tracker.floor == 50
    tracker.acknowledged(60)
    tracker.must_find_from(0, 60)
    tracker.acknowledged(61)
    tracker.done(1)
    assert tracker.floor == 60, "record 0 has an outcome at 60 and is not in the map"
    tracker.done(0)
    assert tracker.floor == 62, "record 2 has no outcome below 62"
    tracker.hold(17)
    assert tracker.floor == 17, "a former owner's outcomes are not all in the map"
    tracker.hold(None)
    taken = tracker.snapshot()
    assert taken is not None
    assert decode(taken.offset, taken.metadata, LOG_END).floor == 62


def test_the_takeover_floor_is_below_the_starts_of_running_jobs() -> None:
    """A takeover must read the starts that it counts, unless they are further back than `SCAN_MOST`."""
    tracker = PartitionOffsets(Restored(0), start_floor=50)
    for offset in range(3):
        assert tracker.receive(offset)
    tracker.acknowledged(59)
    tracker.begin(0)
    tracker.acknowledged(79)
    tracker.begin(1)
    assert tracker.floor == 60, "record 0 was begun when the last known outcome stood at 59"
    tracker.begin(0)  # a second start, after the process died
    assert tracker.floor == 60
    tracker.must_find_from(2, 55)
    assert tracker.floor == 55
    tracker.done(2)
    tracker.done(0)
    assert tracker.floor == 80
    tracker.acknowledged(79 + SCAN_MOST)
    assert tracker.floor == 80
    tracker.acknowledged(80 + SCAN_MOST)
    assert tracker.floor == 81 + SCAN_MOST, "its start is let go"
    tracker.done(1)
    assert tracker.floor == 81 + SCAN_MOST


@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "other"]), st.integers(0, 30)), max_size=120))
def test_a_takeover_reads_every_start_without_an_outcome(steps: list[tuple[str, int]]) -> None:
    """For any starts and outcomes, the start of each record without an outcome is at or above the floor."""
    tracker = PartitionOffsets(Restored(0), start_floor=0)
    for offset in range(31):
        assert tracker.receive(offset)
    at = 0  # the end of the lifecycle partition, to which only this owner writes
    starts: dict[int, int] = {}
    ended: set[int] = set()
    for what, offset in steps:
        if what == "begin" and offset not in ended:
            tracker.begin(offset)
            starts.setdefault(offset, at)
            at += 1
        elif what == "end" and offset in starts:
            tracker.acknowledged(at)
            tracker.done(offset)
            ended.add(offset)
            del starts[offset]
            at += 1
        else:
            at += 1  # a fact of another job
        assert all(tracker.floor <= start for start in starts.values())


def test_a_map_that_does_not_fit_is_not_encoded() -> None:
    """The result is None, and not a wrong map."""
    scattered = [(n * 200 + 1, n * 200 + 2) for n in range(5000)]
    assert encode(0, scattered, 0, False) is None


def test_the_budget_leaves_room_in_the_metadata() -> None:
    """A bitset of the span within which intake is never braked takes less than three quarters of the limit."""
    every_second = [(n, n + 1) for n in range(1, offset_tracker.SPAN_BUDGET, 2)]
    text = encode(0, every_second, LOG_END, False)
    assert text is not None
    assert len(text) <= METADATA_LIMIT * offset_tracker.BRAKE


def test_a_hand_over_is_not_clean_while_suspects_are_left() -> None:
    """A record that an earlier owner may have begun is a suspect until it is done. The floor waits for its outcome,
    unless the outcome would be further back than `SUSPECT_MOST`."""
    tracker = PartitionOffsets(Restored(0), 50)
    tracker.suspect(3, 50)
    for record in range(5):
        tracker.receive(record)
    tracker.acknowledged(60)
    assert (tracker.floor, tracker.nothing_to_look_up) == (50, False)
    for record in (0, 2, 4):
        tracker.done(record)
    tracker.must_find_from(3, 40)
    assert tracker.floor == 40
    tracker.done(3)
    assert (tracker.floor, tracker.nothing_to_look_up) == (50, False), "record 1 is left"
    tracker.acknowledged(49 + SUSPECT_MOST)
    assert tracker.floor == 50
    tracker.acknowledged(50 + SUSPECT_MOST)
    assert (tracker.floor, tracker.nothing_to_look_up) == (51 + SUSPECT_MOST, False), "too far back to be looked for"
    tracker.done(1)
    assert tracker.nothing_to_look_up


def test_suspects_that_are_not_received_yet_keep_the_floor() -> None:
    """Records that the worker has not read yet, for example of a paused queue, are still suspects."""
    tracker = PartitionOffsets(Restored(0), 50)
    tracker.suspect(2, 50)
    tracker.receive(0)
    tracker.done(0)
    tracker.acknowledged(70)
    assert (tracker.floor, tracker.nothing_to_look_up) == (50, False)
    tracker.receive(1)
    tracker.done(1)
    assert (tracker.floor, tracker.nothing_to_look_up) == (71, True)


def test_the_fact_of_an_attempt_in_place_is_expected_after_the_acknowledged_facts() -> None:
    """So the floor of the next attempt in place is after all facts that were acknowledged before."""
    offsets = PartitionOffsets(Restored(0), 50)
    for record in (0, 1):
        offsets.receive(record)
    offsets.continues_from(0, 20)
    offsets.acknowledged(60)
    offsets.continues_after_next_fact(1)
    assert offsets.floor == 20
    offsets.done(0)
    assert offsets.floor == 61, "not as far back as what the other one had to keep"


def test_the_lowest_offset_from_which_a_job_continues_counts_for_the_floor() -> None:
    """The offsets are noted in any order. Until the record is done, the takeover must be able to read all facts of its
    job."""
    offsets = PartitionOffsets(Restored(0), 500)
    assert offsets.receive(0)
    for noted, floor in ((400, 400), (450, 400), (120, 120), (400, 120)):
        offsets.continues_from(0, noted)
        assert offsets.floor == floor
    assert not offsets.nothing_to_look_up
    offsets.done(0)
    assert (offsets.floor, offsets.nothing_to_look_up) == (500, True)
    offsets.continues_from(0, 7)
    assert offsets.nothing_to_look_up, "it is done"
