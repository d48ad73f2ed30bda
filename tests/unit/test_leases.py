"""The coordinator's rules for leases of long jobs, cancels and expiries, as pure functions and for any order of
facts."""

from __future__ import annotations

import uuid
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.schemas.events import (
    CRASHES_TAG,
    CancelRequested,
    DeadLettered,
    ErrorInfo,
    Fact,
    JobCancelledFact,
    JobEvent,
    JobExpiredFact,
    JobFailedFact,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobSubmitted,
    JobSucceeded,
    Leased,
    LeaseRenewed,
    ReleaseDecided,
    ReleaseOverdue,
    ReleaseRequested,
)
from jobledger.streams.coordinator.rules.decisions import LEASES_LOST, Decision, DecisionBatch, Place, decide
from jobledger.streams.coordinator.rules.schedule_rows import (
    NO_FLOOR,
    Held,
    Kept,
    Marker,
    Row,
    Scheduled,
    decode_row,
    encode_row,
    is_marker,
    of_unknown_kind,
    row_key,
)
from jobledger.streams.coordinator.rules.timers import wake_at

SPEC = JobSpec(b'{"n": 1}', {"tenant": "acme"}, None)
JOB = str(uuid.UUID(int=1))
T0 = 1_700_000_000_000  # ms
LEASE_MS = 30_000
ERROR = ErrorInfo("ValueError", "no")


def event(fact: Fact, release: int = 1, run: int = 1, attempt: int = 1) -> JobEvent:
    return JobEvent("id", JOB, run, attempt, release, 0, "import_all", "slow", None, None, "worker", None, fact)


def on(row: Row | None, fact: Fact, release: int = 1, offset: int = 9, at: int = T0, run: int = 1) -> Decision:
    """Return the decision for a fact that was appended at ``at``."""
    return decide(row, NO_FLOOR, event(fact, release, run), Place(0, offset, at))


def held(release: int = 1, crashes: int = 0, at: int = T0) -> Held:
    tags = {**SPEC.tags, **({CRASHES_TAG: str(crashes)} if crashes else {})}
    spec = JobSpec(SPEC.args, tags, None)
    row = on(None, Leased(spec, "w1", LEASE_MS, crashes), release, 5, at).row
    assert isinstance(row, Held)
    return row


def test_a_job_lease_keeps_the_whole_job_and_a_renewal_moves_its_end() -> None:
    """The lease counts from the append time of its record. A renewal sets no timer."""
    made = on(None, Leased(SPEC, "w1", LEASE_MS), offset=5)
    row = made.row
    assert isinstance(row, Held)
    assert (made.verdict, row.due, row.worker, row.spec, row.crashes) == (
        "leased",
        (T0 + LEASE_MS) * 1000,
        "w1",
        SPEC,
        0,
    )
    assert made.wake_at == row.due
    renewed = on(row, LeaseRenewed("w1", LEASE_MS), at=T0 + 10_000)
    assert isinstance(renewed.row, Held)
    assert (renewed.row.due, renewed.wake_at, renewed.release) == ((T0 + 10_000 + LEASE_MS) * 1000, None, None)
    early = on(renewed.row, ReleaseDecided(row.due), offset=12, at=T0 + LEASE_MS)
    assert (early.verdict, early.wake_at) == ("early", renewed.row.due)
    assert decode_row(encode_row(row)) == row
    assert not is_marker(encode_row(row))
    assert not of_unknown_kind(encode_row(row))


def test_a_job_is_released_again_when_its_lease_ends() -> None:
    """The next release has the same attempt, and a tag that counts the lost leases. Facts of the old lease are then
    stale."""
    row = held()
    made = on(row, ReleaseDecided(row.due), at=T0 + LEASE_MS)
    assert made.verdict == "lease-lost"
    assert isinstance(made.release, Scheduled)
    assert (made.release.release, made.release.attempt) == (2, 1)
    assert made.release.tags == {"tenant": "acme", CRASHES_TAG: "1"}
    assert made.row == Marker(0, 9, 1, 2, T0 + LEASE_MS)
    for late in (JobSucceeded(None), LeaseRenewed("w1", LEASE_MS), LeaseRenewed("w1", 0)):
        stale = on(made.row, late, offset=20)
        assert (stale.verdict, stale.row, stale.events, stale.release) == ("stale-lease", None, (), None)
    again = on(made.row, Leased(made.release.spec, "w2", LEASE_MS, 1), release=2, offset=21)
    assert isinstance(again.row, Held)
    assert again.row.crashes == 1


def test_a_job_lease_that_is_given_back_counts_as_no_crash() -> None:
    """The job is released again at once."""
    made = on(held(), LeaseRenewed("w1", 0))
    assert made.verdict == "given-back"
    assert made.release is not None
    assert (made.release.release, CRASHES_TAG in made.release.tags) == (2, False)


@pytest.mark.parametrize(("how", "crashes"), [("given back", 0), ("lost", 1)])
def test_a_lease_that_ends_while_the_work_topic_is_missing_counts_as_it_ended(how: str, crashes: int) -> None:
    """The next release is scheduled, and is sent as soon as the topic exists: a lease that was given back is no crash."""
    row, at = held(), T0 + LEASE_MS
    end = LeaseRenewed("w1", 0) if how == "given back" else ReleaseDecided(row.due)
    batch = DecisionBatch(lambda partition, key: row, lambda partition: NO_FLOOR, lambda lane: False)
    batch.add(event(end), Place(0, 9, at))
    kept = batch.rows[0, row_key(JOB)]
    assert isinstance(kept, Scheduled)
    assert (kept.release, kept.offset, kept.due) == (2, 9, at * 1000)
    assert (batch.releases, batch.verdicts, batch.kept_change[0]) == ([], {"held-back": 1}, 0)
    assert batch.timers == [(0, row_key(JOB), wake_at(kept.due))]
    made = on(kept, ReleaseDecided(kept.due), 2, 10, at)
    assert (made.verdict, made.release) == ("released", kept)
    assert kept.tags.get(CRASHES_TAG, "0") == str(crashes)


def test_too_many_lost_leases_fail_the_job() -> None:
    """The dead letter has the whole job, and no later fact releases the job again."""
    row = held(crashes=LEASES_LOST - 1)
    made = on(row, ReleaseDecided(row.due), at=T0 + LEASE_MS)
    assert made.verdict == "crashed"
    assert made.release is None
    failed, letter = (each.fact for each in made.events)
    assert isinstance(failed, JobFailedFact)
    assert (failed.reason, f"started {LEASES_LOST} times" in failed.error.message) == ("crashed", True)
    assert isinstance(letter, DeadLettered)
    assert letter.spec == row.spec
    assert isinstance(made.row, Marker)
    assert made.row.run_ended
    assert on(made.row, ReleaseOverdue(SPEC, 0), offset=30).verdict == "ended"
    assert on(made.row, Leased(SPEC, "w3", LEASE_MS), offset=31).verdict == "ended"
    assert on(made.row, JobSubmitted(SPEC, 5), run=2, release=0, offset=32).verdict == "scheduled", "another run"


@pytest.mark.parametrize("fact", [JobSucceeded(b"1"), JobCancelledFact("ann"), JobFailedFact("exhausted", ERROR)])
def test_the_outcome_of_a_leased_job_is_written_unchanged(fact: Any) -> None:
    """The coordinator writes the event of the report itself, and for a failure also the dead letter."""
    report = event(fact)
    made = decide(held(), NO_FLOOR, report, Place(0, 9, T0 + 1))
    assert made.events[0] is report
    assert [type(f.fact) for f in made.events[1:]] == ([DeadLettered] if isinstance(fact, JobFailedFact) else [])
    assert made.row == Marker(0, 9, 1, 1, T0 + 1, True)


@pytest.mark.parametrize(("fact", "attempt"), [(JobRetried(ERROR, 5_000), 2), (JobSnoozed(5_000, "later"), 1)])
def test_a_reported_retry_or_snooze_schedules_the_next_release(fact: Any, attempt: int) -> None:
    """No other event requests this release."""
    made = on(held(), fact, at=T0 + 7)
    assert isinstance(made.row, Scheduled)
    assert (made.row.release, made.row.attempt, made.row.due) == (2, attempt, (T0 + 5_007) * 1000)
    assert made.wake_at == made.row.due
    assert [f.fact for f in made.events] == [fact]


def test_a_cancel_ends_a_waiting_job_and_no_job_at_the_workers() -> None:
    """Delayed and retried jobs end at once, with the name of the person who cancelled. Workers cancel the other
    jobs."""
    row = on(None, JobSubmitted(SPEC, 60_000), release=0, offset=4).row
    assert isinstance(row, Scheduled)
    made = on(row, CancelRequested("ann", "no need"), release=0)
    assert made.verdict == "cancelled"
    assert [(f.fact, f.release, f.attempt) for f in made.events] == [(JobCancelledFact("ann", "no need"), 1, 1)]
    assert made.row == Marker(0, 9, 1, 1, T0, True)
    assert on(made.row, ReleaseDecided(row.due), offset=10, at=T0 + 60_000).verdict == "ended"
    for other in (None, Marker(0, 5, 1, 1, T0), held()):
        assert on(other, CancelRequested("ann"), release=0).events == ()
    assert on(row, CancelRequested("ann"), release=0, run=2).events == (), "of another run"


def test_a_job_that_expires_while_it_waits_ends_at_its_expiry() -> None:
    """The expiry is before the due time. If the due time is first, only a worker can close the job as expired."""
    row = on(None, JobSubmitted(JobSpec(b"{}", {}, None, 1_000), 60_000), release=0, offset=4).row
    assert isinstance(row, Scheduled)
    assert row.acts_at == (T0 + 1_000) * 1000
    assert on(row, ReleaseDecided(row.acts_at), at=T0 + 999).verdict == "early"
    made = on(row, ReleaseDecided(row.acts_at), at=T0 + 1_000)
    assert (made.verdict, [f.fact for f in made.events]) == ("expired", [JobExpiredFact((T0 + 1_000) * 1000)])
    soon = on(None, JobSubmitted(JobSpec(b"{}", {}, None, 90_000), 60_000), release=0, offset=4).row
    assert isinstance(soon, Scheduled)
    assert on(soon, ReleaseDecided(soon.due), at=T0 + 60_000).verdict == "released"


FACTS = st.one_of(
    st.just(Leased(SPEC, "w", LEASE_MS)),
    st.sampled_from([LeaseRenewed("w", LEASE_MS), LeaseRenewed("w", 0)]),
    st.just(ReleaseDecided(0)),
    st.sampled_from(
        [JobSucceeded(b"1"), JobFailedFact("never", ERROR), JobCancelledFact("ann"), JobRetried(ERROR, 10)]
    ),
    st.just(CancelRequested("ann")),
    st.just(ReleaseRequested(SPEC, 10)),
    st.just(ReleaseOverdue(SPEC, 0)),
)


@given(st.lists(st.tuples(FACTS, st.integers(1, 4), st.integers(0, 40_000)), max_size=60), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_run_has_at_most_one_outcome(steps: list[tuple[Fact, int, int]], crash: bool) -> None:
    """Workers, timers and people write any facts in any order and number. The coordinator writes at most one outcome of
    the run and each release once, and no release after the outcome. After a crash the same decisions are made again."""
    row: Row | None = None
    at = T0
    ends: Counter[str] = Counter()
    released: Counter[int] = Counter()
    for offset, (fact, release, later) in enumerate(steps):
        at += later
        made = decide(row, NO_FLOOR, event(fact, release), Place(0, offset, at))
        if crash:
            assert decide(row, NO_FLOOR, event(fact, release), Place(0, offset, at)) == made, (
                "a function of what stands there"
            )
        terminal = [
            f
            for f in made.events
            if isinstance(f.fact, JobSucceeded | JobFailedFact | JobCancelledFact | JobExpiredFact)
        ]
        for outcome in terminal:
            ends[outcome.event_id if outcome.event_id != "id" else f"{offset}"] += 1
        if made.release is not None and made.verdict != "sent-again":
            released[made.release.release] += 1
            assert sum(ends.values()) == 0, "let go after its end"
        if made.row is not None:
            assert row is None or (made.row.run, made.row.release) >= (row.run, row.release)
            row = decode_row(encode_row(made.row))  # type: ignore[assignment]  # no floor
            assert msgspec.structs.asdict(row) == msgspec.structs.asdict(made.row)  # type: ignore[arg-type]
            assert not isinstance(row, Kept) or row.offset == offset
    assert max(released.values(), default=0) <= 1
    assert sum(ends.values()) <= 1
