"""Limits, pauses, adaptive concurrency and circuit breakers, as pure rules with a clock of the test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.state.limiters import ENDLESS, AdaptiveGate, BreakerGate, Limiter, closed_gate, share_of
from jobledger.definitions.policy import Adaptive, Breaker, Limits


@given(st.integers(1, 60), st.integers(0, 500), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_sum_of_all_workers_shares_is_the_limit(total: int, above: int, workers: int, random: object) -> None:
    """For any distribution of the partitions, the sum of the shares is the limit, and a worker with a partition has at
    least 1."""
    limit = total + above
    owned: list[list[int]] = [[] for _ in range(workers)]
    for number in range(total):
        owned[random.randrange(workers)].append(number)  # type: ignore[attr-defined]  # a random.Random
    shares = [share_of(limit, mine, total) for mine in owned]
    assert sum(shares) == limit
    assert all((share > 0) == bool(mine) for share, mine in zip(shares, owned, strict=True))


def test_a_partition_that_was_added_later_carries_no_share() -> None:
    """A partition with a number beyond the counted ones does not raise the limit. A limit below the number of
    partitions does not stop a worker."""
    assert share_of(6, [6, 7], 6) == 0
    assert share_of(6, [0, 7], 6) == 1
    assert share_of(2, [4, 5], 6) == 1, "a limit below the partitions, met all the same, does not stop the worker"


@given(
    st.floats(0.5, 500),
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 50)), min_size=1, max_size=60),
)
def test_no_window_has_more_starts_than_the_rate_and_a_burst(rate: float, steps: list[tuple[float, int]]) -> None:
    """For any requests, the starts in a time span are at most the rate times the span, plus the burst."""
    scope = Limiter("queue q", Limits(rate))
    scope.own([0, 1], 2)
    now = 0.0
    starts: list[float] = []
    for pause, wanted in steps:
        now += pause
        for _ in range(min(wanted, scope.free(now))):
            scope.begin(now)
            starts.append(now)
    burst = max(1.0, rate * 0.1)
    for first, at in enumerate(starts):
        for last in range(first, len(starts)):
            assert last - first + 1 <= (starts[last] - at) * rate + burst + 1e-6


@given(st.floats(0.2, 100))
def test_a_rate_allows_the_next_start_after_its_wait(rate: float) -> None:
    """A job may begin after `wait` seconds, and not shortly before."""
    scope = Limiter("task t", Limits(rate))
    scope.own([0], 1)
    now = 1000.0
    while scope.free(now):
        scope.begin(now)
    wait = scope.seconds_until_open(now)
    assert wait is not None
    assert scope.free(now + wait * 0.98) == 0
    assert scope.free(now + wait + 0.001) >= 1


def test_half_the_partitions_have_half_the_limits() -> None:
    """The share holds for starts a second and for jobs at once. A worker without partitions starts no job."""
    scope = Limiter("queue q", Limits(10.0, 7))
    scope.own([0, 2], 4)
    assert (scope.rate, scope.concurrency_share) == (5.0, 4)
    scope.own([], 4)
    assert scope.free(0.0) == 0
    assert scope.seconds_until_open(0.0) is None


def test_concurrency_counts_what_runs() -> None:
    """A job that begins takes a slot, and a job that ends frees it."""
    scope = Limiter("queue q", Limits(None, 2))
    scope.own([0], 1)
    scope.begin(0)
    scope.begin(0)
    assert scope.free(0) == 0
    scope.end(1, 1.0, True, 0)
    assert scope.free(1) == 1


def test_a_control_command_replaces_the_limit_of_the_code() -> None:
    """The command is in force until it is withdrawn. A pause allows no start for any limits."""
    scope = Limiter("queue q", Limits(None, 2))
    scope.own([0], 1)
    scope.override(Limits(None, 5))
    assert scope.free(0) == 5
    scope.override(None)
    assert scope.free(0) == 2
    scope.paused = "by ann: lunch"
    assert (scope.free(0), scope.seconds_until_open(0), scope.active) == (0, None, True)
    assert "paused by ann: lunch" in scope.describe()
    free = Limiter("queue q", Limits())
    assert not free.active
    assert free.free(0) == ENDLESS


def run(gate: AdaptiveGate, seconds: float, latency: float, good: bool = True) -> None:
    """Use up the gate's concurrency for so many seconds."""
    now = run.now  # type: ignore[attr-defined]  # continues at the end of the last call
    end = now + seconds
    while now < end:
        begun = 0
        while gate.free(now):
            gate.begin(now)
            begun += 1
        now += latency
        for _ in range(begun):
            gate.end(now, latency, good, now - latency)
    run.now = now  # type: ignore[attr-defined]  # an attribute of the function


@pytest.mark.parametrize("how", ["errors", "latency"])
def test_adaptive_concurrency_grows_without_trouble_and_shrinks_with_errors_or_latency(how: str) -> None:
    """The increase is additive and the decrease multiplicative, within the bounds. The limit grows again after the
    trouble."""
    run.now = 0.0  # type: ignore[attr-defined]  # each test has its own time
    gate = AdaptiveGate("task t", Adaptive(least=2, most=30))
    run(gate, 60, 0.05)
    assert gate.limit == 30
    run(gate, 20, 0.05 if how == "errors" else 0.5, good=how != "errors")
    assert gate.limit == 2
    assert gate.free(run.now) <= 2  # type: ignore[attr-defined]  # an attribute of the function
    run(gate, 60, 0.05)
    assert gate.limit > 10


def test_adaptive_concurrency_does_not_grow_while_it_is_not_used() -> None:
    """A few jobs do not show that more jobs would run without trouble."""
    gate = AdaptiveGate("task t", Adaptive(most=100))
    before = gate.limit
    for n in range(200):
        gate.begin(n)
        gate.end(n + 0.1, 0.1, True, n)
    assert gate.limit == before


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_try() -> None:
    """Three failures in a row open the breaker. After `reset` seconds one job may try: its failure opens the breaker
    again, and its success closes the breaker."""
    gate = BreakerGate("task t", Breaker(failures=3, reset=10))
    for good in (False, False, True, False, False):
        gate.begin(0)
        gate.end(0, 0.1, good, 0)
    assert gate.free(0) == ENDLESS
    gate.begin(1)
    gate.end(1, 0.1, False, 1)
    assert gate.is_open
    assert (gate.free(5), gate.seconds_until_open(5)) == (0, 6.0)
    assert gate.free(11) == 1
    gate.begin(11)
    assert gate.free(11) == 0, "one tries, the others wait"
    gate.end(12, 0.1, False, 11)
    assert gate.free(21) == 0
    assert gate.free(22) == 1
    gate.begin(22)
    gate.end(23, 0.1, None, 22)
    assert gate.free(23) == 1, "what was cancelled said nothing: another tries"
    gate.begin(23)
    gate.end(24, 0.1, True, 23)
    assert gate.free(24) == ENDLESS
    assert gate.trips == 2


@pytest.mark.parametrize("good", [True, False, None])
def test_only_the_trial_decides_about_an_open_circuit(good: bool | None) -> None:
    """A job that began before the circuit opened changes nothing when it ends: before, during or after a trial."""
    gate = BreakerGate("task t", Breaker(failures=2, reset=10))
    for _ in range(6):
        gate.begin(0)
    gate.end(1, 1.0, False, 0)
    gate.end(1, 1.0, False, 0)
    assert (gate.is_open, gate.free(2)) == (True, 0)
    gate.end(3, 3.0, good, 0)
    assert (gate.is_open, gate.free(10.9), gate.free(11)) == (True, 0, 1)
    gate.end(12, 12.0, good, 0)
    assert (gate.is_open, gate.free(12)) == (True, 1)
    gate.begin(12)
    gate.end(13, 13.0, good, 0)
    assert (gate.is_open, gate.free(13)) == (True, 0), "the trial is still running"
    gate.end(14, 2.0, False, 12)
    gate.end(25, 25.0, good, 0)
    assert (gate.is_open, gate.free(25), gate.trips) == (True, 1, 2)


def test_the_first_closed_gate_is_named() -> None:
    """`closed_gate` returns the first gate that allows no start, or None."""
    adaptive = AdaptiveGate("task t", Adaptive(least=1, most=1))
    breaker = BreakerGate("task t", Breaker())
    assert closed_gate((adaptive, breaker), 0) is None
    adaptive.begin(0)
    assert closed_gate((breaker, adaptive), 0) is adaptive
