"""Turns between lanes: weights, ageing, and idle lanes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from jobledger.consumers.scheduling.lanes import AGEING_MOST, AGEING_S, WEIGHTS, Lane, Turns
from jobledger.consumers.state.limiters import Limiter
from jobledger.definitions.policy import Limits
from jobledger.definitions.queues import Queue


def stages() -> dict[str | None, Lane]:
    queue = Queue("q", 1, priorities=True)
    scope = Limiter("queue q", Limits())
    return {level: Lane(queue, level, scope) for level in queue.levels}


def test_starts_are_shared_by_weight() -> None:
    """While all lanes have work, high has 6,400, normal 800 and low 100 of 7,300 starts."""
    turns, all_of_them = Turns(), stages()
    had: Counter[str | None] = Counter()
    for _ in range(7300):
        stage = turns.next_of(list(all_of_them.values()))
        turns.took(stage, 1)
        had[stage.priority] += 1
    assert abs(had["high"] - 6400) <= 64
    assert abs(had[None] - 800) <= 8
    assert abs(had["low"] - 100) <= 2


def test_an_idle_lane_saves_no_turns() -> None:
    """A lane that was idle for long has the next turn, and after that only its normal turns."""
    turns, all_of_them = Turns(), stages()
    high, low = all_of_them["high"], all_of_them["low"]
    for _ in range(1000):
        turns.took(turns.next_of([low]), 1)
    had: Counter[str | None] = Counter()
    for _ in range(130):
        stage = turns.next_of([low, high])
        turns.took(stage, 1)
        had[stage.priority] += 1
    assert had["low"] >= 1, "low does not starve while high catches up"
    assert had["high"] >= 120


class Waiting:
    """A partition with the time of its oldest record."""

    def __init__(self, oldest: int | None) -> None:
        self.oldest = oldest

    def oldest_ms(self) -> int | None:
        return self.oldest


def test_the_weight_of_a_lane_doubles_with_the_age_of_its_oldest_record() -> None:
    """A low record that waits long has at most the weight of a new high record. If no record waits, the lane has its
    own weight."""
    low = stages()["low"]
    now = 10_000_000.0
    for waited, weight in ((0.0, 1.0), (AGEING_S, 2.0), (3 * AGEING_S, 8.0), (100 * AGEING_S, 2.0**AGEING_MOST)):
        low.parts.clear()
        low.parts.extend([Waiting(None), Waiting(int(now - waited * 1000))])  # type: ignore[list-item]  # has the method that is called
        low.age(now)
        assert low.weight == weight
    assert low.weight == WEIGHTS["high"]
    low.parts.clear()
    low.age(now)
    assert low.weight == 1.0


@given(st.lists(st.sampled_from(["high", None, "low"]), min_size=1, max_size=400))
def test_the_low_lane_is_served_at_least_once_in_74_starts(absent: list[str | None]) -> None:
    """The low lane always has work, and the other lanes may have work or not."""
    turns, all_of_them = Turns(), stages()
    since = 0
    for gone in absent:
        present = [s for level, s in all_of_them.items() if level == "low" or level != gone]
        stage = turns.next_of(present)
        turns.took(stage, 1)
        since = 0 if stage.priority == "low" else since + 1
        assert since <= 74
