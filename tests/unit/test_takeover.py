"""The outcomes that a takeover reads from the log."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.config import Settings
from jobledger.consumers.partitions.takeover import UNSEEN_MS, Takeover, _Scan
from jobledger.consumers.recording.worker_producer import UNACKNOWLEDGED_LIMIT
from jobledger.consumers.scheduling.dispatcher import unacknowledged_limit
from jobledger.consumers.state.dedup import release_key
from jobledger.consumers.state.ownership_lease import OwnershipLease
from jobledger.consumers.state.work import Partition
from jobledger.kafka.topic_names import Names
from jobledger.schemas import codec
from jobledger.schemas import events as ev

JOB = str(uuid.UUID(int=1))
ERROR = ev.ErrorInfo("E", "m")
LEASED, SUCCEEDED = ev.JobLeased("w", 5_000), ev.JobSucceeded(b"1", 7)
STARTED = ev.JobStarted("w", None, {}, "shop.jobs.slow", 0)
ENDS: list[ev.Fact] = [
    SUCCEEDED,
    ev.JobFailedFact("exhausted", ERROR),
    ev.JobCancelledFact("me"),
    ev.JobExpiredFact(1),
    ev.JobRetried(ERROR, 5),
    ev.JobSnoozed(5),
]


class Message:
    """A record of the lifecycle topic, as Kafka's client returns it."""

    def __init__(self, offset: int, value: bytes) -> None:
        self._offset, self._value = offset, value

    def offset(self) -> int:
        return self._offset

    def value(self) -> bytes:
        return self._value

    def timestamp(self) -> tuple[int, int]:
        return 1, 1_000 + self._offset


def scanned(*facts: tuple[int, ev.Fact], framed: bool = False, attempts: Sequence[int] = ()) -> _Scan:
    """Return the scan of these facts of one job, each as (release, fact). ``framed``: no fact is read by the fast path.
    ``attempts``: the attempt of each fact; by default 1."""
    nothing = cast(Any, None)
    takeover = Takeover(
        Settings(bootstrap="h:1"),
        Names("shop"),
        nothing,
        codec.Decoder(),
        lifecycle_partitions=1,
        ready=nothing,
        fail=nothing,
    )
    scan = _Scan(Partition("shop.jobs.slow", 0, OwnershipLease(1.0), -1, None))
    for offset, (release, fact) in enumerate(facts):
        attempt = attempts[offset] if attempts else 1
        event = ev.JobEvent(
            JOB,
            JOB,
            1,
            attempt,
            release,
            1_790_000_000_000_000,
            "t",
            "slow",
            "k" if framed else None,
            None,
            "w",
            None,
            fact,
        )
        takeover._take_lifecycle_record(scan, cast(Any, Message(offset, codec.encode(event))))
    return scan


def noted_end(scan: _Scan, release: int = 1) -> tuple[int, int, ev.Fact]:
    """Return the noted end of a release: the lifecycle offset, the append time and the fact."""
    end = scan.partition.prior.settled[release_key(JOB, 1, release)]
    return end.offset, end.appended_ms, end.fact


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("framed", [False, True])
def test_the_outcome_of_a_leased_job_counts_and_not_its_lease(end: ev.Fact, framed: bool) -> None:
    """A lease that is sent again after the outcome would end without a renewal, and the job would run again."""
    offset, appended, fact = noted_end(scanned((1, LEASED), (1, STARTED), (1, end), framed=framed))
    assert (offset, appended, type(fact)) == (0, 1_002, type(end))
    assert noted_end(scanned((1, end), (1, LEASED), framed=framed))[0] == 0
    assert not isinstance(noted_end(scanned((1, end), (1, LEASED)))[2], ev.JobLeased)


def test_a_lease_without_an_outcome_is_sent_again() -> None:
    """The job may run, so the coordinator must know of the lease."""
    assert noted_end(scanned((1, LEASED), (1, STARTED)))[2] == LEASED


@pytest.mark.parametrize("asks", [LEASED, ev.JobRetried(ERROR, 5), ev.JobSnoozed(5)])
def test_an_outcome_counts_more_than_a_requested_retry(asks: ev.Fact) -> None:
    """Two workers may have run a job, and one of them may have requested a retry. The retry is not requested again,
    because the job has succeeded."""
    assert noted_end(scanned((1, asks), (1, SUCCEEDED)))[2] == SUCCEEDED
    assert noted_end(scanned((1, SUCCEEDED), (1, asks)))[2] == SUCCEEDED


def test_a_late_retry_in_place_of_an_earlier_attempt_does_not_count() -> None:
    """An earlier owner was paused and wrote a fact of an earlier attempt late. The later attempt and its start
    count."""
    again = ev.JobRetried(ERROR, 5, in_place=True)
    partition = scanned((1, again), (1, STARTED), (1, again), attempts=(3, 4, 1)).partition
    key = release_key(JOB, 1, 1)
    assert (partition.prior.next_attempts[key][0], partition.prior.starts[key]) == (4, 1)
    partition = scanned((1, again), (1, STARTED), (1, again), attempts=(3, 4, 4)).partition
    assert (partition.prior.next_attempts[key][0], partition.prior.starts) == (5, {})


@pytest.mark.parametrize("end", [LEASED, ev.JobRetried(ERROR, 5), ev.JobSnoozed(5)])
@pytest.mark.parametrize("after", [STARTED, LEASED, *ENDS])
@pytest.mark.parametrize("framed", [False, True])
def test_an_end_that_was_followed_by_another_release_is_not_sent_again(
    end: ev.Fact, after: ev.Fact, framed: bool
) -> None:
    """After the start or the end of the next release, no record derives from the earlier release any more. The
    coordinator could otherwise send the next release a second time, if its marker was swept."""
    scan = scanned((1, end), (2, after), framed=framed)
    assert isinstance(noted_end(scan)[2], ev.JobSucceeded)
    assert isinstance(noted_end(scanned((1, end), (3, after), framed=framed))[2], type(end))


def test_the_records_that_derive_from_a_failure_are_always_sent_again() -> None:
    """Later facts do not change this."""
    assert noted_end(scanned((1, ENDS[1]), (2, STARTED)))[2] == ENDS[1]
    assert noted_end(scanned((1, ENDS[1]), (1, SUCCEEDED)))[2] == ENDS[1]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 500)), max_size=60),
    st.integers(0, 400),
    st.integers(0, 400),
    st.integers(0, UNSEEN_MS - 1),
)
def test_each_job_that_a_new_worker_began_is_seen_or_suspected_after_its_death(
    turns: list[tuple[int, int]], written_ms: int, answered_ms: int, died_ms: int
) -> None:
    """The worker begins jobs in turns of (ms since the last turn, most jobs), as many as `unacknowledged_limit` allows. A
    start is in the log ``written_ms`` later, and its acknowledgement arrives ``answered_ms`` after that. Then a job
    kills the worker."""
    begun: list[int] = []
    now = 0
    for pause, most in turns:
        now += pause
        if now > died_ms:
            break
        age = (now - begun[0]) / 1000 if begun else 0.0
        unsent = sum(at + written_ms + answered_ms > now for at in begun)
        begun += [now] * max(0, min(most, unacknowledged_limit(len(begun), age) - unsent))

    scan = _Scan(Partition("shop.jobs.slow", 0, OwnershipLease(1.0), -1, None))
    seen = [at + written_ms for at in begun if at + written_ms <= died_ms]
    for offset, appended_ms in enumerate(seen):
        Takeover._begun_at(scan, b"shop.jobs.slow", offset, appended_ms)
    assert scan.begun + scan.unseen >= len(begun)


def test_the_limit_of_unacknowledged_starts_grows_with_the_number_of_begun_jobs() -> None:
    assert unacknowledged_limit(0, 0.0) == 16
    assert unacknowledged_limit(1_000, 0.1) > unacknowledged_limit(1_000, 10.0) > 250
    assert unacknowledged_limit(1_000_000, 10.0) == UNACKNOWLEDGED_LIMIT
