"""The broker's clock as a worker estimates it, whatever is done to this machine's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_LOG_APPEND_TIME, Message

from jobledger.consumers.state import broker_clock
from jobledger.consumers.state.broker_clock import BrokerClock

#: When the tests begin, in seconds of the broker's clock.
BEGAN = 1_790_000_000.0


class Machine:
    """Clocks that are set by hand: the broker's goes on, ours may be set, or stand still while the machine sleeps."""

    def __init__(self) -> None:
        self.broker, self.wall, self.monotonic = BEGAN, BEGAN, 100.0

    def passes(self, seconds: float, *, asleep: bool = False) -> None:
        self.broker += seconds
        self.wall += seconds
        self.monotonic += 0.0 if asleep else seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that the clock under test believes it is on."""
    made = Machine()
    times = SimpleNamespace(time=lambda: made.wall, monotonic=lambda: made.monotonic)
    monkeypatch.setattr(broker_clock, "time", times)
    return made


def behind(found: BrokerClock, machine: Machine) -> float:
    """By how many seconds the estimate is behind the broker's clock; below 0: ahead."""
    return round(machine.broker - found.ms() / 1000, 3)


def test_a_wall_clock_that_is_set_changes_nothing(machine: Machine) -> None:
    """Stepped ahead, or back and ahead again, as after a resume: no job is expired before its time, and none late."""
    found = BrokerClock()
    assert behind(found, machine) == 0, "this machine's own, until a record tells"
    machine.wall -= 600
    found.observe(round(machine.broker * 1000))
    assert behind(found, machine) == 0
    for step in (600.0, 3600.0, -7200.0):
        machine.wall += step
        assert behind(found, machine) == 0
        machine.passes(1.0)
        found.observe(round(machine.broker * 1000))
        assert behind(found, machine) == 0


def test_a_machine_that_slept_is_behind_until_the_next_record(machine: Machine) -> None:
    """Never ahead; and the first acknowledgement tells."""
    found = BrokerClock()
    found.observe(round(machine.broker * 1000))
    machine.passes(1800.0, asleep=True)
    assert behind(found, machine) == 1800
    found.observe(round(machine.broker * 1000))
    assert behind(found, machine) == 0


def test_records_on_their_way_and_a_broker_s_clock_that_is_set_back(machine: Machine) -> None:
    """The best of the last minutes counts: late acknowledgements leave the estimate alone, and what another broker's
    clock said is forgotten."""
    found = BrokerClock()
    found.observe(round(machine.broker * 1000))
    machine.passes(5.0)
    found.observe(round(machine.broker * 1000) - 3_000)
    found.observe(-1)
    assert behind(found, machine) == 0
    machine.broker -= 30
    for _ in range(5):
        machine.passes(61.0)
        found.observe(round(machine.broker * 1000))
    assert behind(found, machine) == 0


@pytest.mark.parametrize(
    ("kind", "offset", "told"),
    [(TIMESTAMP_LOG_APPEND_TIME, 7, True), (TIMESTAMP_LOG_APPEND_TIME, None, False), (TIMESTAMP_CREATE_TIME, 7, False)],
    ids=["appended", "the broker had it already", "the writer's time"],
)
def test_only_an_append_time_tells(kind: int, offset: int | None, told: bool, machine: Machine) -> None:
    """A report without an append time has this machine's own time, which says nothing of the broker's clock."""
    found = BrokerClock()
    report = SimpleNamespace(timestamp=lambda: (kind, round(machine.broker * 1000)), offset=lambda: offset)
    found.heard(cast(Message, report))
    machine.wall += 600
    assert (behind(found, machine) == 0) is told
