"""Which facts of plans may be deleted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobledger.plan import PlanState
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import PlannedJob, Position, Recorded
from jobledger.streams.maintenance.plan_trimming import folded, limit

OPENED = ev.PlanOpened("redrive", "{}", None, None, "ann")
LISTED, SEALED, DONE = ev.PlanListed(0, [PlannedJob("a", 1)]), ev.PlanSealed(1, 1), ev.PlanAdvanced(0, 1, 0, 0)
PAUSED, ABORTED = ev.PlanSteered("paused", "bob"), ev.PlanSteered("aborted", "bob")


def log(*facts: tuple[str, ev.Fact], start: int = 0) -> list[Recorded]:
    """Return the records of these facts, each as (plan, fact). The one at offset n was appended at n seconds."""
    return [
        Recorded(standalone(fact, "e", 0, "test", job_id=plan), Position("shop.plans", 0, offset), 1_000 * offset)
        for offset, (plan, fact) in enumerate(facts, start)
    ]


def point(records: list[Recorded], cutoff_s: int, most: int | None = None) -> int:
    """Return the offset below which the facts may be deleted, if those before ``cutoff_s`` are past the retention
    age."""
    return limit(folded(records).values(), 1_000 * cutoff_s, min(cutoff_s, len(records)) if most is None else most)


def test_the_facts_of_a_plan_stay_until_its_end_is_past_the_retention_age() -> None:
    """A plan that ended late keeps its early facts, and those of other plans behind them."""
    records = log(("p", OPENED), ("q", OPENED), ("q", SEALED), ("p", LISTED), ("p", SEALED), ("p", DONE))
    assert point(records, 5) == 0
    assert point(records, 6) == 6
    behind = log(("q", OPENED), ("p", OPENED), ("q", ABORTED), ("p", LISTED), ("p", SEALED), ("p", DONE))
    assert point(behind, 5) == 1


def test_a_plan_that_has_not_ended_keeps_its_facts() -> None:
    """This holds for a running and for a paused plan, whatever their age."""
    for last in (SEALED, PAUSED):
        records = log(("q", OPENED), ("q", ABORTED), ("p", OPENED), ("p", LISTED), ("p", SEALED), ("p", last))
        assert point(records, 1_000) == 2


def test_a_plan_whose_list_was_never_completed_does_not_stay_for_ever() -> None:
    """Its caller has died. Until its last fact is past the retention age, the caller may still list jobs."""
    records = log(("p", OPENED), ("p", LISTED), ("q", OPENED), ("p", ev.PlanListed(1, [])))
    assert point(records, 3) == 0
    assert point(records, 4) == 4


def test_facts_without_a_beginning_do_not_count_and_the_table_is_a_limit() -> None:
    """The beginning of their plan was deleted before. What the table has not read stays."""
    records = log(("p", LISTED), ("p", SEALED), ("q", OPENED), ("q", ABORTED), start=7)
    assert limit(folded(records).values(), 1_000_000, 11) == 11
    assert limit(folded(records).values(), 1_000_000, 9) == 9


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.sampled_from([OPENED, LISTED, SEALED, DONE, PAUSED, ABORTED])), max_size=15
    ),
    st.integers(0, 20),
)
def test_what_is_deleted_is_over(facts: list[tuple[str, ev.Fact]], cutoff_s: int) -> None:
    """After the deletion, the plans that have not ended, or ended late, are folded from the rest to the same state."""
    records = log(*facts)
    at = point(records, cutoff_s)
    before, after = folded(records), folded(records[at:])
    assert at <= min(cutoff_s, len(records))
    for plan, kept in before.items():
        if kept.needed(1_000 * cutoff_s):
            assert after[plan] == kept
        else:
            assert kept.status.state.ended or kept.status.state is PlanState.LISTING
