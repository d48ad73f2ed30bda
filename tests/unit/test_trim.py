"""Trimming deletes no record that a reader still needs."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.config import Settings
from jobledger.job import Life, apply
from jobledger.kafka.topic_names import Names
from jobledger.log.commit_metadata import encode
from jobledger.log.group_offsets import floor_of
from jobledger.schemas import events as ev
from jobledger.streams.maintenance import maintenance as maintenance_module
from jobledger.streams.maintenance.maintenance import Maintenance, work_position
from jobledger.streams.maintenance.trim import Readers, plan

WORK, LIFE, COORD = ("shop.jobs.mail", 0), ("shop.lifecycle", 0), ("shop.coordination", 0)
SPEC = ev.JobSpec(b"{}")


def life(*facts: tuple[ev.Fact, tuple[str, int], int, int, int]) -> Life:
    """Return the life of these facts, each as (fact, partition, offset, release, attempt). They are appended a second
    apart."""
    folded: Life | None = None
    for second, (fact, (topic, partition), offset, release, attempt) in enumerate(facts):
        event = ev.JobEvent("e", "j", 1, attempt, release, 0, "t", "mail", None, None, "s", None, fact)
        folded = apply(folded, ev.Recorded(event, ev.Position(topic, partition, offset), 1000 * second))
    assert folded is not None
    return folded


RUNNING = life(
    (ev.JobSubmitted(SPEC), WORK, 5, 1, 1), (ev.JobStarted("w", None, {}, "shop.jobs.mail", 5), LIFE, 9, 1, 1)
)
SCHEDULED = life((ev.JobSubmitted(SPEC, 10**9), COORD, 7, 0, 1))
RESENT = life((ev.JobSubmitted(SPEC, 10**9), COORD, 7, 0, 1), (ev.JobSubmitted(SPEC, None, 10**15), COORD, 90, 0, 1))
RETRYING = life(
    (ev.JobSubmitted(SPEC), WORK, 5, 1, 1),
    (ev.JobRetried(ev.ErrorInfo("E", "m"), 10**9), LIFE, 9, 1, 1),
)
#: No worker knew the task, so the coordinator has the job. The submission is on the work topic.
UNKNOWN = life((ev.JobSubmitted(SPEC), WORK, 5, 1, 1), (ev.JobSnoozed(10**9, "unknown-task"), LIFE, 9, 1, 1))
#: The job was delayed, released and then snoozed.
PUT_OFF = life(
    (ev.JobSubmitted(SPEC, 5), COORD, 7, 0, 1),
    (ev.JobDue(SPEC, 5_000), WORK, 20, 1, 1),
    (ev.JobSnoozed(10**9, "unknown-task"), LIFE, 9, 1, 1),
)
#: The job is leased, and its release is not in the table.
LEASED = life((ev.JobSubmitted(SPEC, 10**9), COORD, 7, 0, 1), (ev.JobLeased("w", 5_000), LIFE, 9, 1, 1))
#: The work record is in the log, and no worker has started it.
QUEUED = life((ev.JobSubmitted(SPEC), WORK, 5, 1, 1))
#: A retry closed the lease. The retry and the submission are on the topic `coordination`.
TRIED_ON_A_LEASE = life(
    (ev.JobSubmitted(SPEC, 5), COORD, 7, 0, 1),
    (ev.JobDue(SPEC, 5_000), WORK, 20, 1, 1),
    (ev.JobLeased("w", 5_000), LIFE, 9, 1, 1),
    (ev.JobRetried(ev.ErrorInfo("E", "m"), 10**9), COORD, 30, 1, 1),
)
#: Jobs whose facts must be kept in the log.
HELD = [RUNNING, RETRYING, UNKNOWN, PUT_OFF, LEASED, QUEUED, TRIED_ON_A_LEASE]


def test_a_partition_without_the_offsets_of_all_readers_is_not_trimmed() -> None:
    """The limit of the other partition is the lowest offset of its readers."""
    readers = Readers.least([WORK, LIFE], {WORK: 50, LIFE: 60}, {WORK: 40})
    assert plan({WORK: 100, LIFE: 100}, readers, []).limits == {WORK: 40}


def test_the_retention_age_is_a_limit_too() -> None:
    """Records younger than the retention age are kept, although all readers have read them."""
    assert plan({WORK: 30}, Readers({WORK: 99}), []).limits == {WORK: 30}


def test_the_facts_of_an_unfinished_job_are_kept() -> None:
    """No fact of a running, retrying or waiting job is deleted, on any topic."""
    ends = {WORK: 100, LIFE: 100, COORD: 100}
    for unfinished in HELD:
        trimmed = plan(ends, Readers(ends), [("j", unfinished)])
        assert all(trimmed.limits[topic, p] <= offset for _, topic, p, offset in unfinished.positions)
        assert not trimmed.resend


def test_the_submission_of_a_scheduled_job_is_sent_again_once() -> None:
    """A scheduled job does not keep old records in the log. Its submission is first appended again, unless a later copy
    is there."""
    first = plan({COORD: 80}, Readers({COORD: 80}), [("j", SCHEDULED)])
    assert first.limits == {COORD: 80}
    assert first.resend == {"j": ev.Position("shop.coordination", 0, 7)}
    assert not plan({COORD: 80}, Readers({COORD: 80}), [("j", RESENT)]).resend
    assert plan({COORD: 91}, Readers({COORD: 91}), [("j", RESENT)]).resend == {
        "j": ev.Position("shop.coordination", 0, 90)
    }


def test_a_late_fact_of_an_earlier_run_is_not_sent_again_as_a_submission() -> None:
    """The late fact is the last position of the job, so both facts are kept in the log, and no record is sent again."""
    late = life((ev.JobSucceeded(), LIFE, 9, 1, 1))
    delayed = ev.JobEvent("e", "j", 2, 1, 0, 0, "t", "mail", None, None, "s", None, ev.JobSubmitted(SPEC, 10**9))
    both = apply(late, ev.Recorded(delayed, ev.Position(*COORD, 7), -1))
    assert both is not None
    assert both.run == 2
    made = plan({COORD: 80, LIFE: 80}, Readers({COORD: 80, LIFE: 80}), [("j", both)])
    assert (made.limits, made.resend) == ({COORD: 7, LIFE: 9}, {})


PLACES = st.sampled_from([WORK, LIFE, COORD])
OFFSETS = st.dictionaries(PLACES, st.integers(0, 100))


@given(OFFSETS, OFFSETS, OFFSETS, st.lists(st.sampled_from([SCHEDULED, RESENT, *HELD]), max_size=4))
def test_no_limit_is_above_a_reader_or_an_unfinished_job(
    aged: dict[tuple[str, int], int],
    store: dict[tuple[str, int], int],
    worker: dict[tuple[str, int], int],
    lives: list[Life],
) -> None:
    """For any offsets, a limit is at most the offset of each reader, and each unfinished job has a submission in the
    log."""
    made = plan(aged, Readers.least(aged, store, worker), [(str(n), one) for n, one in enumerate(lives)])
    for topic_partition, limit in made.limits.items():
        assert limit <= min(aged[topic_partition], store[topic_partition], worker[topic_partition])
    for number, one in enumerate(lives):
        kept = [
            offset for _, topic, partition, offset in one.positions if offset >= made.limits.get((topic, partition), 0)
        ]
        if one not in (SCHEDULED, RESENT):
            assert len(kept) == len(one.positions)
        else:
            assert kept or str(number) in made.resend


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.booleans())
def test_the_floor_is_read_as_the_worker_writes_it(watermark: int, floor: int, clean: bool) -> None:
    """Trimming and a takeover read the same text."""
    text = encode(watermark, [(watermark + 2, watermark + 5)], floor, clean)
    assert floor_of(text) == floor


def test_without_a_readable_takeover_floor_nothing_is_trimmed() -> None:
    """For any other text in the metadata, `floor_of` returns None."""
    for text in (None, "", "nonsense", "9x.12.rest", "1c.zz.rest"):
        assert floor_of(text) is None


def test_the_work_record_of_a_job_is_its_last_release() -> None:
    """A job that was never released has no work record."""
    names = Names("shop")
    assert work_position(RUNNING, names) == ev.Position("shop.jobs.mail", 0, 5)
    assert work_position(SCHEDULED, names) is None
    released = life((ev.JobSubmitted(SPEC), WORK, 5, 1, 1), (ev.JobDue(SPEC, 0), WORK, 70, 2, 2))
    assert work_position(released, names) == ev.Position("shop.jobs.mail", 0, 70)


def test_a_process_that_is_started_again_every_hour_trims(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round follows soon after the start."""
    monkeypatch.setattr(maintenance_module, "FIRST_S", 0.1)
    maintenance = Maintenance(Names("shop"), Settings(bootstrap="127.0.0.1:1"), [], cast(Any, None))
    for name in ("watch", "check_commits", "trim_plans", "forget_cancels", "remove_rows", "remove_workers"):
        monkeypatch.setattr(maintenance, name, lambda: None)
    stop, trimmed = threading.Event(), threading.Event()
    monkeypatch.setattr(maintenance, "trim", trimmed.set)
    thread = threading.Thread(target=maintenance.run, args=(stop,))
    thread.start()
    try:
        assert trimmed.wait(20)
    finally:
        stop.set()
        thread.join()
