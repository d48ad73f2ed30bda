"""The fold of a plan's facts, what is to be done with a job of a plan, and the fingerprints of errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import job
from jobledger.errors import ConfigError
from jobledger.fingerprint import fingerprint
from jobledger.job import Life
from jobledger.plan import PlanState, PlanStatus, apply
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import PlannedJob, Position, Recorded
from jobledger.streams.maintenance.plans import Verdict, judge

OPENED = ev.PlanOpened("redrive", "{}", None, None, "ann")


def folded(*facts: ev.Fact, offsets: list[int] | None = None) -> PlanStatus | None:
    """Return the plan with these facts. ``offsets``: those of the facts; by default they follow one another."""
    plan: PlanStatus | None = None
    for number, fact in enumerate(facts):
        offset = number if offsets is None else offsets[number]
        event = standalone(fact, "e", 0, "test", job_id="p")
        plan = apply(plan, Recorded(event, Position("shop.plans", 0, offset), 1_000 + offset))
    return plan


def part(number: int, *job_ids: str) -> ev.PlanListed:
    """Return a part of a plan."""
    return ev.PlanListed(number, [PlannedJob(each, 1) for each in job_ids])


def test_a_plan_is_carried_out_only_when_its_list_is_complete() -> None:
    """Without `PlanSealed` the plan is listed. A list with a missing part is never complete."""
    listing = folded(OPENED, part(0, "a", "b"))
    assert listing is not None
    assert (listing.state, listing.matched, listing.parts) == (PlanState.LISTING, 2, None)
    sealed = folded(OPENED, part(0, "a", "b"), part(1, "c"), ev.PlanSealed(2, 3))
    assert sealed is not None
    assert (sealed.state, sealed.matched, sealed.left, str(sealed.position)) == (
        PlanState.RUNNING, 3, 3, "shop.plans[0]@3",
    )  # fmt: skip
    torn = folded(OPENED, part(0, "a"), part(2, "c"), ev.PlanSealed(3, 3))
    assert torn is not None
    assert (torn.state, torn.matched) == (PlanState.LISTING, 1)
    empty = folded(OPENED, ev.PlanSealed(0, 0))
    assert empty is not None
    assert (empty.state, empty.ended_ms) == (PlanState.DONE, 1_001)


def test_each_part_counts_once() -> None:
    """A process that died after its `PlanAdvanced` causes a second one, which changes nothing."""
    begun = (OPENED, part(0, "a", "b"), part(1, "c"), ev.PlanSealed(2, 3))
    first = ev.PlanAdvanced(0, 1, 1, 0)
    again = ev.PlanAdvanced(0, 2, 0, 0)
    once = folded(*begun, first, again)
    assert once is not None
    assert (once.state, once.next_part, once.done, once.skipped, once.left) == (PlanState.RUNNING, 1, 1, 1, 1)
    over = folded(*begun, first, again, ev.PlanAdvanced(1, 0, 0, 1, "c: gone"))
    assert over is not None
    assert (over.state, over.done, over.skipped, over.failed, over.error) == (PlanState.DONE, 1, 1, 1, "c: gone")


def test_a_plan_is_paused_resumed_and_aborted() -> None:
    """Nothing changes a plan that has ended, and nobody can pause a plan that is still listed."""
    begun = (OPENED, part(0, "a"), ev.PlanSealed(1, 1))
    paused = folded(*begun, ev.PlanSteered("paused", "bob", "lunch"))
    assert paused is not None
    assert (paused.state, paused.steered) == (PlanState.PAUSED, "by bob: lunch")
    resumed = folded(*begun, ev.PlanSteered("paused", "bob"), ev.PlanSteered("running", "ann"))
    assert resumed is not None
    assert (resumed.state, resumed.steered) == (PlanState.RUNNING, "by ann")
    aborted = folded(
        *begun, ev.PlanSteered("aborted", "bob"), ev.PlanAdvanced(0, 1, 0, 0), ev.PlanSteered("running", "a")
    )
    assert aborted is not None
    assert (aborted.state, aborted.done) == (PlanState.ABORTED, 0)
    listed = folded(OPENED, ev.PlanSteered("running", "eve"))
    assert listed is not None
    assert listed.state is PlanState.LISTING
    odd = folded(*begun, ev.PlanSteered("faster", "eve"))
    assert odd is not None
    assert odd.state is PlanState.RUNNING


@given(st.lists(st.sampled_from([OPENED, part(0, "a"), part(1, "b"), ev.PlanSealed(1, 1), ev.PlanSealed(2, 2),
    ev.PlanAdvanced(0, 1, 0, 0), ev.PlanAdvanced(1, 0, 1, 0), ev.PlanSteered("paused", "x"),
    ev.PlanSteered("running", "x"), ev.PlanSteered("aborted", "x")]), max_size=12), st.data())  # fmt: skip
def test_reading_facts_again_changes_nothing(facts: list[ev.Fact], data: st.DataObject) -> None:
    """Whatever facts follow one another: no number is negative, no more is done than was listed, and a reader that
    begins again at an earlier offset gets the same plan."""
    once = folded(*facts)
    if once is not None:
        assert 0 <= once.done + once.skipped + once.failed <= once.matched
        assert (once.state is PlanState.DONE) == (once.parts is not None and once.next_part == once.parts
            and once.state is not PlanState.ABORTED)  # fmt: skip
    if facts:
        back = data.draw(st.integers(0, len(facts) - 1))
        offsets = [*range(len(facts)), *range(back, len(facts))]
        assert folded(*facts, *facts[back:], offsets=offsets) == once


def life(run: int, *facts: ev.Fact, redrive: ev.Redrive | None = None) -> Life:
    """Return a life with these facts of a run."""
    found: Life | None = None
    for number, fact in enumerate((ev.JobSubmitted(ev.JobSpec(b"{}"), None, None, redrive), *facts)):
        found = job.join(found, job.of(run, 1, 1, "send", "mail", None, fact, (number, "shop.lifecycle", 0, number)))
    assert found is not None
    return found


FAILED = ev.JobFailedFact("exhausted", ev.ErrorInfo("ValueError", "no"))
MINE = ev.Redrive("ann", None, "p")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (None, Verdict.UNKNOWN),
        (life(1), Verdict.SKIP),
        (life(1, FAILED), Verdict.ACT),
        (life(1, ev.JobCancelledFact("bob")), Verdict.ACT),
        (life(1, ev.JobExpiredFact(1)), Verdict.ACT),
        (life(1, ev.JobSucceeded()), Verdict.SKIP),
        (life(2, redrive=MINE), Verdict.DONE),
        (life(2, FAILED, redrive=MINE), Verdict.DONE),
        (life(2, redrive=ev.Redrive("ann", None, "another")), Verdict.SKIP),
        (life(3, FAILED, redrive=MINE), Verdict.SKIP),
    ],
)
def test_only_a_job_that_ended_badly_is_redriven(found: Life | None, verdict: Verdict) -> None:
    """A job that runs, that succeeded, or that was redriven by another plan is skipped. One that this plan has redriven
    already is done."""
    plan = folded(OPENED, part(0, "a"), ev.PlanSealed(1, 1))
    assert plan is not None
    assert judge(plan, PlannedJob("a", 1), found) is verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (life(1), Verdict.ACT),
        (life(1, FAILED), Verdict.SKIP),
        (life(1, ev.JobCancelledFact("ann")), Verdict.DONE),
        (life(1, ev.JobCancelledFact("bob")), Verdict.SKIP),
        (life(2), Verdict.SKIP),
    ],
)
def test_only_a_job_that_has_not_ended_is_cancelled(found: Life, verdict: Verdict) -> None:
    """A job that the maker of the plan has cancelled counts as done."""
    plan = folded(ev.PlanOpened("cancel", "{}", None, None, "ann"), part(0, "a"), ev.PlanSealed(1, 1))
    assert plan is not None
    assert judge(plan, PlannedJob("a", 1), found) is verdict


def test_the_next_run_hides_the_run_before() -> None:
    """The state of a redriven job is that of its last run, and the table names who asked for it."""
    before, after = life(1, FAILED), life(2, redrive=ev.Redrive("ann", "mended", "p"))
    for joined in (job.join(before, after), job.join(after, before)):
        status = job.status("a", joined)
        assert (status.run, status.state, status.error, status.by) == (2, job.State.QUEUED, None, "ann")
        assert len(status.positions) == 2


TRACE = 'Traceback (most recent call last):\n  File "/app/shop/{file}.py", line {line}, in send\n    smtp.send(m)\n'


def error(kind: str = "OSError", message: str = "no", file: str | None = "mail", line: int = 7) -> ev.ErrorInfo:
    """Return an error, with a traceback unless ``file`` is None."""
    return ev.ErrorInfo(kind, message, None if file is None else TRACE.format(file=file, line=line))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (error(line=7), error(line=90), True),
        (error(message="a"), error(message="b"), True),
        (error(file="mail"), error(file="post"), False),
        (error(kind="OSError"), error(kind="ValueError"), False),
        (error(file=None, message="row 7 of 'a' is bad"), error(file=None, message="row 12 of 'b' is bad"), True),
        (error(file=None, message="row 7 is bad"), error(file=None, message="row 7 is missing"), False),
    ],
)
def test_errors_of_the_same_kind_have_the_same_fingerprint(one: ev.ErrorInfo, other: ev.ErrorInfo, same: bool) -> None:
    """Lines and messages do not count if there is a traceback. Without one, numbers and quoted texts do not count."""
    assert (fingerprint(one) == fingerprint(other)) is same
    assert len(fingerprint(one)) == 16


def test_a_version_must_be_short() -> None:
    """The fast decoders read only short texts."""
    from jobledger import Settings

    assert Settings(version="2026.11").version == "2026.11"
    for text in ("", "é" * 32, "\ud800"):
        with pytest.raises(ConfigError, match="JOBLEDGER_VERSION"):
            Settings(version=text)
