"""A worker's estimate of the broker's clock, also when the clock of the worker's machine is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_LOG_APPEND_TIME, Message

from jobledger.consumers.state import broker_clock
from jobledger.consumers.state.broker_clock import BrokerClock

#: The broker's time at the beginning of each test, in seconds.
BEGAN = 1_790_000_000.0


class Machine:
    """Clocks that a test sets: the broker's clock, and the worker's clocks, which may be changed or stop in a sleep."""

    def __init__(self) -> None:
        self.broker, self.wall, self.monotonic = BEGAN, BEGAN, 100.0

    def passes(self, seconds: float, *, asleep: bool = False) -> None:
        self.broker += seconds
        self.wall += seconds
        self.monotonic += 0.0 if asleep else seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine whose clocks the tested estimate uses."""
    made = Machine()
    times = SimpleNamespace(time=lambda: made.wall, monotonic=lambda: made.monotonic)
    monkeypatch.setattr(broker_clock, "time", times)
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
