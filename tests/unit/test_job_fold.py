"""The fold of a job's facts is a join-semilattice, and gives the states of the transition table."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import job
from jobledger.job import FIRST, LAST, Life, State
from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent, Position, Recorded

SMALL = st.integers(0, 3)
ERROR = st.builds(ev.ErrorInfo, st.sampled_from(["ValueError", "OSError"]), st.text(max_size=3), st.none())
SPEC = st.builds(
    ev.JobSpec,
    st.just(b"{}"),
    st.dictionaries(st.sampled_from("ab"), st.text(max_size=2), max_size=2),
    st.none() | st.just("parent"),
)
DELAY = st.none() | st.integers(0, 10_000)
FACT_OF: dict[type[Any], st.SearchStrategy[Any]] = {
    ev.JobSubmitted: st.builds(ev.JobSubmitted, SPEC, DELAY, st.none() | st.integers(0, 10**15)),
    ev.JobDue: st.builds(ev.JobDue, SPEC, st.integers(0, 10**15)),
    ev.JobStarted: st.builds(
        ev.JobStarted,
        *(st.sampled_from(["host:1", "host:2"]), st.sampled_from([None, "1.0"]), st.just({})),
        *(st.just("shop.jobs.mail"), st.integers(0, 9), SMALL),
    ),
    ev.JobLeased: st.builds(ev.JobLeased, st.just("host:1"), SMALL),
    ev.JobProgressed: st.builds(ev.JobProgressed, SMALL, SMALL, st.none() | SMALL, st.none() | st.text(max_size=2)),
    ev.JobRetried: st.builds(ev.JobRetried, ERROR, st.integers(0, 10_000), SMALL, st.booleans()),
    ev.JobSnoozed: st.builds(
        ev.JobSnoozed, st.integers(0, 10_000), st.none() | st.text(max_size=2), SMALL, st.booleans()
    ),
    ev.JobSucceeded: st.builds(ev.JobSucceeded, st.none() | st.just(b"[1]"), SMALL),
    ev.JobFailedFact: st.builds(ev.JobFailedFact, st.just("exhausted"), ERROR, SMALL),
    ev.JobCancelledFact: st.builds(ev.JobCancelledFact, st.just("ann"), st.none() | st.just("no need")),
    ev.JobExpiredFact: st.builds(ev.JobExpiredFact, st.integers(0, 10**15)),
    ev.ReleaseRequested: st.builds(ev.ReleaseRequested, SPEC, DELAY, st.none()),
    ev.ReleaseDecided: st.builds(ev.ReleaseDecided, st.integers(0, 10**15)),
    ev.DeadLettered: st.builds(ev.DeadLettered, SPEC, st.just("exhausted"), ERROR),
}
FACTS: st.SearchStrategy[ev.Fact] = st.one_of(*FACT_OF.values())


def recorded(fact: ev.Fact, run: int, release: int, attempt: int, position: Position, ms: int) -> Recorded:
    event = JobEvent("e", "j", run, attempt, release, 0, "send_mail", "mail", None, None, "test", None, fact)
    return Recorded(event, position, ms)


PLACES = st.builds(
    Position, st.sampled_from(["shop.jobs.mail", "shop.lifecycle", "shop.coordination"]), st.integers(0, 2), SMALL
)
#: Arbitrary facts: only the positions of the records are unique.
ADVERSARIAL = st.lists(
    st.builds(recorded, FACTS, st.integers(1, 2), SMALL, SMALL, PLACES, st.integers(0, 5)),
    unique_by=lambda r: r.position,
    max_size=14,
)


@st.composite
def walks(draw: st.DrawFn) -> list[tuple[Recorded, State]]:
    """Facts in order, each with the next state of the transition table."""
    state: State | None = None
    in_place = False
    release, attempt, sequence, ms = 1, 1, 0, 1_000
    steps_done: list[tuple[Recorded, State]] = []
    for offset in range(draw(st.integers(1, 14))):
        steps = [step for step in job.TRANSITIONS if step.before is state]
        if state in (State.SCHEDULED, State.RETRYING):  # in place the same release is started again, else another one
            wrong = ev.JobDue if in_place else ev.JobStarted
            steps = [step for step in steps if step.fact is not wrong]
        if not steps:
            break
        step = draw(st.sampled_from(steps))
        fact = draw(FACT_OF[step.fact])
        topic = "shop.lifecycle"
        match fact:
            case ev.JobSubmitted(spec=spec):
                delayed = step.after is State.SCHEDULED
                fact = ev.JobSubmitted(spec, 5 if delayed else None)
                release, topic = (0, "shop.coordination") if delayed else (1, "shop.jobs.mail")
            case ev.JobDue():
                if state is State.RETRYING:
                    attempt += 1
                release, topic = release + 1, "shop.jobs.mail"
            case ev.JobStarted() if state is State.RETRYING:
                attempt += 1
            case ev.JobProgressed():
                sequence += 1
                fact = ev.JobProgressed(sequence, 1)
        ms += draw(SMALL)
        in_place = getattr(fact, "in_place", False)
        steps_done.append((recorded(fact, 1, release, attempt, Position(topic, 0, offset), ms), step.after))
        state = step.after
    return steps_done


@st.composite
def lives(draw: st.DrawFn) -> list[Recorded]:
    """The facts of a possible life: each step is in the transition table."""
    return [each for each, _ in draw(walks())]


ANY = st.one_of(ADVERSARIAL, lives())


def fold(facts: list[Recorded]) -> Life | None:
    life: Life | None = None
    for each in facts:
        life = job.apply(life, each)
    return life


@given(ANY, st.randoms(use_true_random=False), st.data())
def test_facts_in_any_order_and_with_copies_fold_to_the_same_life(
    facts: list[Recorded], chance: random.Random, data: st.DataObject
) -> None:
    """The facts of a job may be read in any order, and each of them several times."""
    again = facts + data.draw(st.lists(st.sampled_from(facts), max_size=6) if facts else st.just([]))
    chance.shuffle(again)
    assert fold(again) == fold(facts)


@given(ANY, st.data())
def test_lives_of_any_parts_join_to_the_whole_life(facts: list[Recorded], data: st.DataObject) -> None:
    """The parts of a life are folded separately, and may overlap."""
    parts = data.draw(
        st.lists(st.sets(st.sampled_from([0, 1, 2]), min_size=1), min_size=len(facts), max_size=len(facts))
    )
    lives = [fold([f for f, where in zip(facts, parts, strict=True) if n in where]) for n in range(3)]
    assert job.join(job.join(lives[0], lives[1]), lives[2]) == fold(facts)


@given(ANY, ANY, ANY)
def test_join_is_a_semilattice(a: list[Recorded], b: list[Recorded], c: list[Recorded]) -> None:
    """Join is idempotent, commutative and associative, and None is its neutral element."""
    taken: dict[Position, Recorded] = {}
    x, y, z = (fold([taken.setdefault(f.position, f) for f in facts]) for facts in (a, b, c))
    assert job.join(x, x) == x
    assert job.join(x, y) == job.join(y, x)
    assert job.join(job.join(x, y), z) == job.join(x, job.join(y, z))
    assert job.join(x, None) == x == job.join(None, x)


@given(st.lists(st.integers(0, 2_000), min_size=FIRST + LAST, max_size=600), st.randoms(use_true_random=False))
def test_a_bounded_number_of_positions_is_kept_independent_of_the_order(
    times: list[int], chance: random.Random
) -> None:
    """Of very many facts the first and the last positions are kept. They are the same in any order of reading."""
    started = ev.JobStarted("host:1", None, {}, "shop.jobs.mail", 0)
    facts = [recorded(started, 1, n, n, Position("shop.lifecycle", 0, n), ms) for n, ms in enumerate(times)]
    shuffled = facts.copy()
    chance.shuffle(shuffled)
    whole, other = fold(facts), fold(shuffled)
    assert whole == other
    assert whole is not None
    at = sorted((f.appended_ms, f.position.topic, 0, f.position.offset) for f in facts)
    assert list(whole.positions) == (at if len(at) <= FIRST + LAST else at[:FIRST] + at[-LAST:])


@given(walks())
def test_facts_in_order_give_the_states_of_the_transition_table(walk: list[tuple[Recorded, State]]) -> None:
    """Each fact of a life that is read in order changes the visible state as the transition table says."""
    life: Life | None = None
    for each, state in walk:
        life = job.apply(life, each)
        assert life is not None
        seen = job.project(life)
        assert seen.state is state
        assert (seen.release, seen.attempt) == (each.event.release, each.event.attempt)
        assert state.ended == (seen.ended_ms is not None)
        assert (seen.due_ms is None) or state in (State.SCHEDULED, State.QUEUED, State.RETRYING)


@given(ANY)
def test_every_life_has_a_status(facts: list[Recorded]) -> None:
    """Any part of a life has a status, with the positions of its facts in the order of append times."""
    life = fold(facts)
    if life is None:
        assert all(type(f.event.fact) not in {t.fact for t in job.TRANSITIONS} for f in facts)
        return
    seen = job.status("j", life)
    assert set(seen.positions) <= {f.position for f in facts}
    times = {f.position: f.appended_ms for f in facts}
    assert [times[p] for p in seen.positions] == sorted(times[p] for p in seen.positions)
    assert seen.partial == (seen.submitted_at is None)


def at(offset: int, topic: str = "shop.lifecycle", partition: int = 0) -> Position:
    return Position(topic, partition, offset)


def fact_list(*facts: Any) -> Life:
    life = fold(list(facts))
    assert life is not None
    return life


SUBMITTED = recorded(
    ev.JobSubmitted(ev.JobSpec(b"{}", {"tenant": "acme"}, "p")), 1, 1, 1, at(0, "shop.jobs.mail"), 1_000
)
STARTED = recorded(ev.JobStarted("host:1", None, {}, "shop.jobs.mail", 0), 1, 1, 1, at(1), 2_000)
BAD = ev.ErrorInfo("ValueError", "no", "trace")


def test_a_job_without_its_submission_has_a_status() -> None:
    """The status lacks only the values that come from the submission."""
    seen = job.status("j", fact_list(STARTED))
    assert (seen.state, seen.task, seen.queue, seen.submitted_at, seen.partial) == (
        State.RUNNING,
        "send_mail",
        "mail",
        None,
        True,
    )
    assert job.status("j", fact_list(STARTED, SUBMITTED)).tags == {"tenant": "acme"}


def test_success_wins_over_every_other_outcome() -> None:
    """If a run has several outcomes, a success is shown first, then a failure, then a cancellation. Of equal outcomes
    the first in the log is shown."""
    ends = [
        recorded(ev.JobExpiredFact(1), 1, 1, 1, at(2), 3_000),
        recorded(ev.JobCancelledFact("ann"), 1, 1, 1, at(3), 3_000),
        recorded(ev.JobFailedFact("exhausted", BAD, 5), 1, 1, 1, at(4), 3_000),
        recorded(ev.JobSucceeded(b'"late"'), 1, 2, 2, at(6), 2_500),
        recorded(ev.JobSucceeded(b'"first"'), 1, 1, 1, at(5), 3_000),
    ]
    shown = [job.status("j", fact_list(*ends[:n])) for n in range(1, 6)]
    assert [s.state.value for s in shown] == ["expired", "cancelled", "failed", "succeeded", "succeeded"]
    assert (shown[2].error, shown[2].reason) == (BAD, "exhausted")
    assert (shown[3].result, shown[4].result, shown[4].error) == ("late", "first", None)


def test_a_late_fact_of_a_closed_attempt_changes_nothing_visible() -> None:
    """A start that is read after its attempt was closed does not show the job as running."""
    retried = recorded(ev.JobRetried(BAD, 500, 1_000_000), 1, 1, 1, at(2), 4_000)
    seen = job.status("j", fact_list(SUBMITTED, retried, STARTED))
    assert (seen.state, seen.attempt, seen.error, seen.duration) == (State.RETRYING, 1, BAD, 1.0)
    assert seen.due_at == dt.datetime.fromtimestamp(4.5, dt.UTC)
    due = recorded(ev.JobDue(ev.JobSpec(b"{}"), 4_500_000), 1, 2, 2, at(1, "shop.jobs.mail"), 4_501)
    seen = job.status("j", fact_list(due, SUBMITTED, retried, STARTED))
    assert (seen.state, seen.attempt, seen.release, seen.error) == (State.QUEUED, 2, 2, None)


def test_a_job_that_was_snoozed_in_place_runs_again_with_its_next_start() -> None:
    """The same attempt of a keyed job is started again in the same release. The last of its starts and snoozes is
    shown, until a snooze ends the release."""
    facts = [SUBMITTED, STARTED]
    shown = []
    for n in range(2):
        facts.append(recorded(ev.JobSnoozed(500, f"wait {n}", 0, True), 1, 1, 1, at(2 + 2 * n), 3_000 + n))
        shown.append(job.status("j", fact_list(*reversed(facts))))
        facts.append(
            recorded(ev.JobStarted("host:1", None, {}, "shop.jobs.mail", 0), 1, 1, 1, at(3 + 2 * n), 3_500 + n)
        )
        shown.append(job.status("j", fact_list(*reversed(facts))))
    assert [s.state.value for s in shown] == ["scheduled", "running", "scheduled", "running"]
    assert [s.reason for s in shown] == ["wait 0", None, "wait 1", None]
    facts += [recorded(ev.JobSnoozed(500, why, 0), 1, 1, 1, at(n), 4_000) for n, why in ((6, "ended"), (7, "twice"))]
    facts.append(recorded(ev.JobSnoozed(500, "late", 0, True), 1, 1, 1, at(8), 4_000))
    seen = job.status("j", fact_list(*reversed(facts)))
    assert (seen.state, seen.reason) == (State.SCHEDULED, "ended")


@pytest.mark.parametrize(
    "closing",
    [
        ev.JobCancelledFact("ann"),
        ev.JobExpiredFact(1),
        ev.JobFailedFact("crashed", BAD),
        ev.JobSucceeded(None),
        ev.JobSnoozed(1),
    ],
    ids=ev.fact_name,
)
def test_without_a_duration_an_attempt_took_from_its_start_to_its_closing_fact(closing: ev.Fact) -> None:
    """An attempt that was never started has no duration."""
    closed = recorded(closing, 1, 1, 1, at(2), 3_600)
    assert job.status("j", fact_list(SUBMITTED, STARTED, closed)).duration == 1.6
    assert job.status("j", fact_list(SUBMITTED, closed)).duration is None
    early = recorded(closing, 1, 1, 1, at(2), 2_000)
    assert job.status("j", fact_list(SUBMITTED, STARTED, early)).duration == 0.0
    later = recorded(closing, 1, 2, 2, at(2), 3_600)  # while the job waited for its second attempt
    assert job.status("j", fact_list(SUBMITTED, STARTED, later)).duration is None


def test_a_later_run_replaces_an_earlier_one() -> None:
    """The status shows no value of the earlier run, but the positions of its facts are kept for the timeline."""
    failed = recorded(ev.JobFailedFact("exhausted", BAD), 1, 1, 1, at(2), 3_000)
    again = recorded(ev.JobSubmitted(ev.JobSpec(b"{}")), 2, 1, 1, at(9, "shop.jobs.mail"), 9_000)
    seen = job.status("j", fact_list(again, SUBMITTED, STARTED, failed))
    assert (seen.state, seen.run, seen.error, seen.tags) == (State.QUEUED, 2, None, {})
    assert len(seen.positions) == 4


def test_the_last_progress_report_is_kept() -> None:
    """The status shows the progress report with the highest sequence, and only the position of this report is kept."""
    reports = [recorded(ev.JobProgressed(n, n, 10, "m"), 1, 1, 1, at(10 + n), 2_000 + n) for n in range(5)]
    seen = job.status("j", fact_list(SUBMITTED, STARTED, *reversed(reports)))
    assert seen.progress == job.Progress(4, 10, "m")
    assert seen.positions == (at(0, "shop.jobs.mail"), at(1), at(14))


@pytest.mark.parametrize(
    ("facts", "waits_for"),
    [
        ([recorded(ev.JobSubmitted(ev.JobSpec(b""), 5), 1, 0, 1, at(0), 1)], (1, 1)),
        ([recorded(ev.JobRetried(BAD, 5), 1, 3, 2, at(0), 1)], (4, 3)),
        ([recorded(ev.JobSnoozed(5), 1, 3, 2, at(0), 1)], (4, 2)),
    ],
)
def test_the_awaited_release_and_attempt_of_a_waiting_job(facts: list[Recorded], waits_for: tuple[int, int]) -> None:
    """A delayed job waits for its first release, a retried job for the next attempt, and a snoozed job for the same
    attempt."""
    assert job.awaited(job.project(fact_list(*facts))) == waits_for
