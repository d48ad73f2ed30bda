"""A job's timeline from its facts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent, Position, Recorded
from jobledger.web.pages.timeline import TICKS, draw

SPEC = ev.JobSpec(b"{}")
BAD = ev.ErrorInfo("ValueError", "no")
STARTED = ev.JobStarted("host:1", "v1", {"slot": 5}, "shop.jobs.mail", 0)


def record(ms: int, fact: ev.Fact, attempt: int = 1, *, number: int | None = None) -> Recorded:
    """Return a fact that was appended at ``ms``."""
    event = JobEvent(
        f"event-{ms if number is None else number}", "job", 1, attempt, attempt, 0, "send", "mail", None, None, "w", None,
        fact,
    )  # fmt: skip
    return Recorded(event, Position("shop.lifecycle", 0, ms), ms)


def test_each_phase_of_a_job_is_a_bar() -> None:
    """A job that was delayed, failed once and succeeded then was delayed, waited, ran, backed off, waited and ran."""
    timeline = draw(
        [
            record(0, ev.JobSubmitted(SPEC, delay_ms=1000)),
            record(1000, ev.JobDue(SPEC, 1_000_000)),
            record(1200, STARTED),
            record(3200, ev.JobRetried(BAD, 5000)),
            record(8200, ev.JobDue(SPEC, 8_200_000), 2),
            record(8300, STARTED, 2),
            record(9300, ev.JobSucceeded(), 2),
        ],
        99_000,
        ended=True,
    )
    assert timeline is not None
    first, second = timeline.attempts
    assert [(bar.kind, bar.start_ms, bar.end_ms) for bar in first.bars] == [
        ("scheduled", 0, 1000),
        ("waited", 1000, 1200),
        ("ran", 1200, 3200),
        ("backed-off", 3200, 8200),
    ]
    assert [(bar.kind, bar.seconds) for bar in second.bars] == [("waited", 0.1), ("ran", 1.0)]
    assert (first.outcome, second.outcome, first.error) == ("JobRetried", "JobSucceeded", BAD)
    assert (first.worker, first.version, first.waits) == ("host:1", "v1", {"slot": 5})
    assert (timeline.start_ms, timeline.end_ms) == (0, 9300)


def test_what_has_not_ended_is_drawn_up_to_now() -> None:
    """A running attempt and a backoff are open; a job that has ended has no open bar."""
    running = draw([record(0, ev.JobSubmitted(SPEC)), record(100, STARTED)], 5_000, ended=False)
    assert running is not None
    assert [(bar.kind, bar.end_ms, bar.open) for bar in running.attempts[0].bars] == [
        ("waited", 100, False),
        ("ran", 5_000, True),
    ]
    backing_off = draw([record(0, STARTED), record(10, ev.JobRetried(BAD, 60_000))], 5_000, ended=False)
    assert backing_off is not None
    assert backing_off.attempts[0].bars[-1].open
    cancelled = draw([record(0, ev.JobSubmitted(SPEC)), record(900, ev.JobCancelledFact("bob"))], 5_000, ended=True)
    assert cancelled is not None
    assert [(bar.kind, bar.end_ms) for bar in cancelled.attempts[0].bars] == [("waited", 900)]


def test_a_second_start_of_an_attempt_ends_the_first() -> None:
    """The first worker was lost: its bar ends where the second one started."""
    timeline = draw([record(0, STARTED), record(700, STARTED), record(900, ev.JobSucceeded())], 5_000, ended=True)
    assert timeline is not None
    assert [(bar.start_ms, bar.end_ms) for bar in timeline.attempts[0].bars] == [(0, 700), (700, 900)]
    assert timeline.attempts[0].starts == 2


def test_copies_of_an_event_are_one_event() -> None:
    """A record that was sent twice draws one bar."""
    timeline = draw(
        [record(0, STARTED, number=1), record(50, STARTED, number=1), record(900, ev.JobSucceeded())], 5_000, ended=True
    )
    assert timeline is not None
    assert len(timeline.attempts[0].bars) == 1


def test_without_events_there_is_no_timeline() -> None:
    """The records of the job were deleted from the log."""
    assert draw([], 0, ended=True) is None


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30).map(sorted), st.booleans())
def test_every_bar_is_on_the_axis(moments: list[int], ended: bool) -> None:
    """Whatever the times, each bar begins and ends on the axis and can be seen, and the axis has few steps."""
    facts: list[ev.Fact] = [ev.JobSubmitted(SPEC), STARTED, ev.JobRetried(BAD, 5), ev.JobDue(SPEC, 5)]
    records = [record(at, facts[n % 4], n // 4 + 1, number=n) for n, at in enumerate(moments)]
    timeline = draw(records, moments[-1] + 5, ended=ended)
    assert timeline is not None
    for bar in (bar for attempt in timeline.attempts for bar in attempt.bars):
        assert 0 <= bar.x <= 100
        assert bar.width > 0
        assert bar.x + bar.width <= 100.01
    assert 1 <= len(timeline.ticks) <= TICKS + 1
