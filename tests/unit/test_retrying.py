"""Calls that are repeated until a deadline, on a clock that the test sets."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from jobledger.process import retrying
from jobledger.process.retrying import retry_until


class Clock:
    """A clock that only sleeps and waits move. `stop_at`: when the stop is set, seconds."""

    def __init__(self) -> None:
        self.now, self.slept, self.stop_at = 100.0, list[float](), float("inf")

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def is_set(self) -> bool:
        return self.now >= self.stop_at

    def wait(self, timeout: float) -> bool:
        self.sleep(min(timeout, max(0.0, self.stop_at - self.now)))
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the tested function."""
    made = Clock()
    monkeypatch.setattr(retrying, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep))
    return made


class Broker:
    """Fails for some calls, each of which takes some time; then it answers."""

    def __init__(self, clock: Clock, *errors: Exception, takes: float = 0.0) -> None:
        self.clock, self.errors, self.takes, self.calls = clock, list(errors), takes, 0

    def ask(self) -> str:
        self.calls += 1
        self.clock.now += self.takes
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_a_call_that_succeeds_is_made_once(clock: Clock) -> None:
    """Even after the deadline, and after a stop: only repetitions are bounded."""
    clock.stop_at = 0.0
    broker = Broker(clock)
    assert retry_until(clock.now - 1, broker.ask, OSError, pause=1.0, stop=clock) == "answer"
    assert (broker.calls, clock.slept) == (1, [])


def test_a_passing_error_is_retried_after_a_pause(clock: Clock) -> None:
    """Each error is reported with the pause that follows."""
    first, second = OSError("first"), OSError("second")
    broker = Broker(clock, first, second)
    reported: list[tuple[Exception, float]] = []
    answer = retry_until(110.0, broker.ask, OSError, pause=0.5, on_retry=lambda *what: reported.append(what))
    assert (answer, clock.slept, reported) == ("answer", [0.5, 0.5], [(first, 0.5), (second, 0.5)])


def test_the_last_call_begins_at_the_deadline(clock: Clock) -> None:
    """The last pause is shorter. The error of the last call is raised."""
    last = OSError("last")
    broker = Broker(clock, OSError(), OSError(), OSError(), last)
    with pytest.raises(OSError, match="last") as raised:
        retry_until(102.5, broker.ask, OSError, pause=1.0)
    assert raised.value is last
    assert (broker.calls, clock.slept) == (4, [1.0, 1.0, 0.5])


def test_a_call_that_ends_after_the_deadline_is_not_repeated(clock: Clock) -> None:
    """With a deadline that is set at the first error, the time of the first call does not count."""
    slow = Broker(clock, OSError(), takes=10.0)
    with pytest.raises(OSError):  # noqa: PT011  # any
        retry_until(clock.now + 5.0, slow.ask, OSError, pause=1.0)
    slow = Broker(clock, OSError(), takes=10.0)
    assert retry_until(lambda: clock.now + 5.0, slow.ask, OSError, pause=1.0) == "answer"


def test_the_deadline_is_set_only_once(clock: Clock) -> None:
    """It counts from the first error, not from the last one."""
    broker = Broker(clock, *(OSError() for _ in range(9)))
    with pytest.raises(OSError):  # noqa: PT011  # any
        retry_until(lambda: clock.now + 3.0, broker.ask, OSError, pause=1.0)
    assert (broker.calls, clock.now) == (4, 103.0)


def test_pauses_double_up_to_a_limit(clock: Clock) -> None:
    """The deadline shortens the last one."""
    broker = Broker(clock, *(OSError() for _ in range(9)))
    with pytest.raises(OSError):  # noqa: PT011  # any
        retry_until(105.0, broker.ask, OSError, pause=0.5, pause_most=1.5)
    assert clock.slept == [0.5, 1.0, 1.5, 1.5, 0.5]


def test_other_errors_are_raised_at_once(clock: Clock) -> None:
    """Errors of another class, and errors after which no call may succeed."""
    broker = Broker(clock, ValueError("other"))
    with pytest.raises(ValueError, match="other"):
        retry_until(110.0, broker.ask, (OSError, KeyError), pause=1.0)
    broker = Broker(clock, ConnectionError(), PermissionError("denied"))
    with pytest.raises(PermissionError):
        retry_until(110.0, broker.ask, OSError, pause=1.0, again=lambda error: isinstance(error, ConnectionError))
    assert clock.slept == [1.0]


def test_an_error_of_on_retry_ends_the_retries(clock: Clock) -> None:
    """For example, a lease that must be renewed meanwhile is lost."""

    def lost(error: Exception, seconds: float) -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError):
        retry_until(110.0, Broker(clock, OSError()).ask, OSError, pause=1.0, on_retry=lost)


@pytest.mark.parametrize(("stop_at", "slept"), [(0.0, []), (100.2, [0.2])], ids=["before", "in the pause"])
def test_after_a_stop_the_error_is_raised_without_another_call(
    clock: Clock, stop_at: float, slept: list[float]
) -> None:
    """A stop ends the pause."""
    clock.stop_at = stop_at
    broker = Broker(clock, OSError("away"), OSError("again"))
    with pytest.raises(OSError, match="away"):
        retry_until(110.0, broker.ask, OSError, pause=1.0, stop=clock)
    assert broker.calls == 1
    assert clock.slept == pytest.approx(slept)


def test_a_threading_event_is_a_stop() -> None:
    """On the real clock: the event is set, so nothing waits."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(OSError):  # noqa: PT011  # any
        retry_until(float("inf"), Broker(Clock(), OSError()).ask, OSError, pause=60.0, stop=stop)
