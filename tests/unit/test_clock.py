"""The estimate of the broker's clock, also when the clock of this machine is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_LOG_APPEND_TIME, Message
from hypothesis import given
from hypothesis import strategies as st

from jobledger.kafka import broker_clock
from jobledger.kafka.broker_clock import BrokerClock

#: The broker's time at the beginning of each test, in seconds.
BEGAN = 1_790_000_000.0


class Machine:
    """Clocks that a test sets: the broker's clock, and this machine's clocks, which may be changed or stop in a
    sleep."""

    def __init__(self) -> None:
        self.broker, self.wall, self.monotonic = BEGAN, BEGAN, 100.0

    def passes(self, seconds: float, *, asleep: bool = False) -> None:
        self.broker += seconds
        self.wall += seconds
        self.monotonic += 0.0 if asleep else seconds

    def plug_into(self, patch: pytest.MonkeyPatch) -> None:
        """Give the tested module these clocks."""
        times = SimpleNamespace(time=lambda: self.wall, monotonic=lambda: self.monotonic)
        patch.setattr(broker_clock, "time", times)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine whose clocks the tested estimate uses."""
    made = Machine()
    made.plug_into(monkeypatch)
    return made


def behind(estimate: BrokerClock, machine: Machine) -> float:
    """Return by how many seconds the estimate is behind the broker's clock; below 0: ahead."""
    return round(machine.broker - estimate.ms() / 1000, 3)


def test_a_change_of_the_wall_clock_does_not_change_the_estimate(machine: Machine) -> None:
    """The wall clock may be set ahead or back. So no job expires too early or too late."""
    estimate = BrokerClock()
    assert behind(estimate, machine) == 0, "this machine's own, until a record tells"
    machine.wall -= 600
    estimate.observe(round(machine.broker * 1000))
    assert behind(estimate, machine) == 0
    for step in (600.0, 3600.0, -7200.0):
        machine.wall += step
        assert behind(estimate, machine) == 0
        machine.passes(1.0)
        estimate.observe(round(machine.broker * 1000))
        assert behind(estimate, machine) == 0


def test_after_a_sleep_the_estimate_is_behind_until_the_next_record(machine: Machine) -> None:
    """The estimate is never ahead of the broker's clock, and the first acknowledgement corrects it."""
    estimate = BrokerClock()
    estimate.observe(round(machine.broker * 1000))
    machine.passes(1800.0, asleep=True)
    assert behind(estimate, machine) == 1800
    estimate.observe(round(machine.broker * 1000))
    assert behind(estimate, machine) == 0


def test_late_records_and_a_broker_clock_that_is_set_back(machine: Machine) -> None:
    """The best observation of the last minutes counts. A late acknowledgement does not change the estimate, and old
    observations are forgotten."""
    estimate = BrokerClock()
    estimate.observe(round(machine.broker * 1000))
    machine.passes(5.0)
    estimate.observe(round(machine.broker * 1000) - 3_000)
    estimate.observe(-1)
    assert behind(estimate, machine) == 0
    machine.broker -= 30
    for _ in range(5):
        machine.passes(61.0)
        estimate.observe(round(machine.broker * 1000))
    assert behind(estimate, machine) == 0


@pytest.mark.parametrize(
    ("kind", "offset", "counts"),
    [(TIMESTAMP_LOG_APPEND_TIME, 7, True), (TIMESTAMP_LOG_APPEND_TIME, None, False), (TIMESTAMP_CREATE_TIME, 7, False)],
    ids=["appended", "the broker had it already", "the writer's time"],
)
def test_only_an_append_time_corrects_the_estimate(
    kind: int, offset: int | None, counts: bool, machine: Machine
) -> None:
    """A report without an append time has the time of this machine, which is no observation of the broker's clock."""
    estimate = BrokerClock()
    report = SimpleNamespace(timestamp=lambda: (kind, round(machine.broker * 1000)), offset=lambda: offset)
    estimate.heard(cast(Message, report))
    machine.wall += 600
    assert (behind(estimate, machine) == 0) is counts


@given(st.integers(-(10**6), 10**6), st.lists(st.integers(0, 5_000), min_size=1, max_size=20))
def test_the_estimate_is_never_ahead_and_late_by_the_least_latency(ahead_ms: int, latencies_ms: list[int]) -> None:
    """For any difference between the clocks. Append times are whole milliseconds, which adds up to 1 ms."""
    machine = Machine()
    with pytest.MonkeyPatch.context() as patch:
        machine.plug_into(patch)
        machine.wall += ahead_ms / 1000
        estimate = BrokerClock()
        for latency in latencies_ms:
            machine.passes(1.0)
            appended = int(machine.broker * 1000)
            machine.passes(latency / 1000)
            estimate.observe(appended)
            assert estimate.us() <= machine.broker * 1e6 + 1  # times are floats
        assert estimate.us() >= machine.broker * 1e6 - min(latencies_ms) * 1000 - 1001


def test_the_time_by_which_this_machine_is_ahead(machine: Machine) -> None:
    """It is 0 until a record shows the broker's time, and after a reset, when this machine's own clock counts again."""
    estimate = BrokerClock()
    machine.wall += 5
    assert estimate.ahead_s == 0
    estimate.observe(round(machine.broker * 1000))
    assert estimate.ahead_s == pytest.approx(5)
    machine.wall -= 8
    assert estimate.ahead_s == pytest.approx(-3)
    estimate.reset()
    assert estimate.ahead_s == 0
    assert estimate.ms() == machine.wall * 1000
