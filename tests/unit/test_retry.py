"""The retry policy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.definitions.retry import MAX_DELAY_S, NO_RETRY, Reject, Retry, RetryLater, Snooze
from jobledger.errors import ConfigError

POLICIES = st.builds(
    Retry,
    max_attempts=st.integers(1, 50),
    initial=st.floats(0, 1000),
    factor=st.floats(1, 100),
    cap=st.floats(0, 100_000),
    jitter=st.booleans(),
)
UNIFORM = st.floats(0, 1, exclude_max=True)


@given(POLICIES, st.integers(1, 100_000), UNIFORM)
def test_delays_stay_within_their_bounds(policy: Retry, attempt: int, uniform: float) -> None:
    """A delay is not negative and not above the cap. With jitter, a delay is at least half of the delay without
    jitter."""
    delay = policy.delay_after(attempt, uniform)
    raw = Retry(initial=policy.initial, factor=policy.factor, cap=policy.cap, jitter=False).delay_after(attempt, 0.0)
    assert 0 <= delay <= policy.cap
    assert delay <= raw
    assert delay == raw if not policy.jitter else delay >= raw / 2


@given(POLICIES, st.integers(1, 1_000))
def test_delays_do_not_shrink(policy: Retry, attempt: int) -> None:
    """Without jitter, a later attempt never has a shorter delay."""
    plain = Retry(initial=policy.initial, factor=policy.factor, cap=policy.cap, jitter=False)
    assert plain.delay_after(attempt + 1, 0.0) >= plain.delay_after(attempt, 0.0)


def test_the_delays_of_a_plain_policy_are_as_computed_by_hand() -> None:
    """A delay is the initial delay times a power of the factor, at most the cap. Jitter makes it shorter."""
    plain = Retry(initial=1, factor=2, cap=10, jitter=False)
    assert [plain.delay_after(n, 0) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 8, 10]
    assert Retry(initial=4, factor=2, cap=10).delay_after(1, 0.5) == 3.0


def test_an_exception_named_by_never_is_not_retried() -> None:
    """This holds even if ``on`` names its base class."""
    policy = Retry(on=(LookupError,), never=(KeyError,))
    assert policy.retries(IndexError())
    assert not policy.retries(KeyError())
    assert not policy.retries(ValueError())
    assert not NO_RETRY.max_attempts > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": 2.5},
        {"max_attempts": True},
        {"initial": -1},
        {"cap": float("nan")},
        {"cap": "60"},
        {"factor": 0.5},
        {"factor": float("inf")},
        {"on": ("Exception",)},
        {"never": 3},
    ],
)
def test_the_error_of_a_wrong_setting_names_it(wrong: dict[str, Any]) -> None:
    """A policy with a wrong setting is refused."""
    with pytest.raises(ConfigError) as caught:
        Retry(**wrong)
    assert next(iter(wrong)) in str(caught.value)


@pytest.mark.parametrize("delay", [-1, MAX_DELAY_S + 1, float("nan"), "5", True, None])
def test_retry_later_and_snooze_refuse_a_wrong_delay(delay: Any) -> None:
    """A delay must be a number of seconds within the bounds."""
    for kind in (RetryLater, Snooze):
        with pytest.raises(ConfigError, match="delay"):
            kind(delay)


def test_on_takes_a_single_exception_class() -> None:
    """The class need not be in a tuple."""
    assert Retry(on=OSError).retries(OSError())  # type: ignore[arg-type]  # users may write this
    assert str(Reject("no city")) == "no city"
