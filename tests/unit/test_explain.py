"""The rules that say why a job is where it is."""

from __future__ import annotations

import datetime as dt
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.causes import HOLDING, RULES, CauseKind, plain
from jobledger.explain import UNKNOWN, Explanation, explain
from jobledger.job import Life, State, apply, project
from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent, Position, Recorded
from jobledger.situation import (
    Cancel,
    Coordinator,
    Crew,
    Group,
    KeyHolder,
    Lag,
    Lease,
    Limit,
    Pace,
    Pause,
    Place,
    PlanWait,
    Situation,
    Tenant,
)

#: The time of the first fact of each life; each further fact follows one second later.
T = 1_700_000_000_000
WORK, LIFECYCLE, COORDINATION = "shop.jobs.mail", "shop.lifecycle", "shop.coordination"
SPEC = ev.JobSpec(b"{}", {"tenant": "acme"})
AT = Position(WORK, 0, 50)
HERE = Group("shop.worker.mail", 2, True)
NOBODY = Group("shop.worker.mail", 0, False)
FAILURE = ev.ErrorInfo("shop.SMTPError", "no relay", None)


def life(*facts: tuple[ev.Fact, str, int, int], key: str | None = None) -> Life:
    """Return the life of these facts, each as (fact, topic, release, attempt)."""
    folded: Life | None = None
    for n, (fact, topic, release, attempt) in enumerate(facts):
        event = JobEvent("e", "j", 1, attempt, release, 0, "send_mail", "mail", key, None, "test", None, fact)
        folded = apply(folded, Recorded(event, Position(topic, 0, 50 + n), T + 1_000 * n))
    assert folded is not None
    return folded


SUBMITTED = (ev.JobSubmitted(SPEC), WORK, 1, 1)
STARTED = (ev.JobStarted("worker@host:1", "1.4", {}, WORK, 50), LIFECYCLE, 1, 1)
QUEUED = life(SUBMITTED)
RUNNING = life(SUBMITTED, STARTED)
DELAYED = life((ev.JobSubmitted(SPEC, 60_000), COORDINATION, 0, 1))
BACKING_OFF = life(SUBMITTED, STARTED, (ev.JobRetried(FAILURE, 30_000), LIFECYCLE, 1, 1))
IN_PLACE = life(SUBMITTED, STARTED, (ev.JobRetried(FAILURE, 30_000, 0, True), LIFECYCLE, 1, 1), key="a-17")
SNOOZED = life(SUBMITTED, STARTED, (ev.JobSnoozed(30_000, "not\x1b yet"), LIFECYCLE, 1, 1))
PUT_OFF = life(SUBMITTED, (ev.JobSnoozed(30_000, "unknown-task"), LIFECYCLE, 1, 1))
LEASED = life(SUBMITTED, (ev.JobLeased("worker@host:1", 30_000), LIFECYCLE, 1, 1), STARTED)
FAILED = life(SUBMITTED, STARTED, (ev.JobFailedFact("exhausted", FAILURE), LIFECYCLE, 1, 1))
CANCELLED = life(SUBMITTED, (ev.JobCancelledFact("ann", "wrong list"), LIFECYCLE, 1, 1))
PROGRESSED = life(SUBMITTED, STARTED, (ev.JobProgressed(1, 3, 10, "unpacking"), LIFECYCLE, 1, 1))


def situation(of: Life | None, after_s: float = 10.0, **facts: Any) -> Situation:
    """Return a situation this many seconds after the first fact."""
    return Situation(job_id="j", now_ms=T + round(after_s * 1000), life=of, **facts)


def kinds(explained: Explanation) -> list[str]:
    return [each.cause.value for each in explained.causes]


SLOW = Pace(60, 60, 60.0)  # a job a second
NOTHING_BEFORE: dict[str, Any] = {"group": HERE, "place": Place(AT), "pace": SLOW}
MAIL_LIMIT = Limit("queue", "mail", 1.0, None, "by ann: their maintenance", T - 5_000)
#: What was observed, the causes, and a text in the first of them.
CASES: list[tuple[str, Situation, list[str], str]] = [
    (
        "queued",
        situation(QUEUED, **NOTHING_BEFORE),
        ["waits-for-slot"],
        "starts the job when one of its places is free",
    ),
    ("gates", situation(QUEUED, **NOTHING_BEFORE, gates=("breaker=",)), ["waits-for-slot"], "the task has breaker=: "),
    (
        "free places",
        situation(QUEUED, **NOTHING_BEFORE, crew=Crew(2, 100, 99)),
        ["waits-for-slot"],
        "one of its places is free; the queue has 2 workers, with 99 jobs in 100 places",
    ),
    (
        "a task that no worker knows",
        situation(QUEUED, **NOTHING_BEFORE, crew=Crew(2, 100, 0, 2), knows_task=True),
        ["unknown-task", "waits-for-slot"],
        "2 of 2 workers of the queue do not know task send_mail, and put the job off",
    ),
    (
        "a task that only this program does not know",
        situation(QUEUED, **NOTHING_BEFORE, crew=Crew(1, 100), knows_task=False),
        ["waits-for-slot"],
        "",
    ),
    (
        "no worker reports",
        situation(QUEUED, **NOTHING_BEFORE, crew=Crew(0), knows_task=False),
        ["unknown-task", "waits-for-slot"],
        "the app's code here has no task send_mail",
    ),
    (
        "silent",
        situation(RUNNING, group=HERE, crew=Crew(1, 100, 0, 0, T - 1_000)),
        ["worker-gone", "running"],
        "has not reported since 2023-11-14 22:13:19 UTC: it has died, is paused, or cannot reach the log",
    ),
    (
        "silent, and its partition has no owner",
        situation(RUNNING, group=NOBODY, crew=Crew(0, 0, 0, 0, T)),
        ["worker-gone", "running"],
        "the worker of the running attempt has ended or lost its partition",
    ),
    ("queued, all unread", situation(QUEUED, unread=("the log: no broker",)), ["waits-for-slot", "source-unread"], ""),
    (
        "behind others",
        situation(QUEUED, group=HERE, place=Place(AT, False, 12, 3)),
        ["jobs-before"],
        "12 jobs before it in shop.jobs.mail[0] have not ended; 3 of them run",
    ),
    ("behind running jobs", situation(QUEUED, group=HERE, place=Place(AT, False, 3, 3)), ["waits-for-slot"], ""),
    (
        "paused twice",
        situation(
            QUEUED, pauses=(Pause("queue", "mail", "by ann: lunch", T - 1), Pause("task", "send_mail", "by bob"))
        ),
        ["queue-paused", "task-paused"],
        "queue mail is paused since 2023-11-14 22:13:19 UTC, by ann: lunch",
    ),
    ("no member", situation(QUEUED, group=NOBODY), ["no-worker"], "consumer group shop.worker.mail has no member"),
    (
        "not assigned",
        situation(QUEUED, group=Group("g", 2, False), place=Place(AT)),
        ["no-worker"],
        "no worker serves shop.jobs.mail[0]: no member has it",
    ),
    (
        "being assigned",
        situation(QUEUED, group=Group("g", 2, False, True), place=Place(AT)),
        ["no-worker"],
        "the group is assigning its partitions now",
    ),
    (
        "key",
        situation(QUEUED, group=HERE, key_holder=KeyHolder("a-17", "k", "running", T - 9_000, 1_000, True)),
        ["key-held"],
        "key 'a-17' is held by job k, which is running since 2023-11-14 22:13:11 UTC; at least 1,000 jobs of this key",
    ),
    (
        "rate of the queue",
        situation(QUEUED, group=HERE, pace=SLOW, limits=(MAIL_LIMIT,)),
        ["queue-limit"],
        "limited to 1 start a second for all workers together (set by ann: their maintenance)",
    ),
    (
        "a rate that is not reached",
        situation(QUEUED, **NOTHING_BEFORE, limits=(Limit("queue", "mail", 100.0, None),)),
        ["waits-for-slot"],
        "",
    ),
    (
        "rate of another task",
        situation(
            QUEUED, **{**NOTHING_BEFORE, "pace": Pace(60, 0, 60.0)}, limits=(Limit("task", "send_mail", 1.0, None),)
        ),
        ["waits-for-slot"],
        "",
    ),
    (
        "a rate of which nothing is known",
        situation(QUEUED, group=HERE, limits=(MAIL_LIMIT,)),
        ["queue-limit"],
        "whether the limit is reached is not known",
    ),
    (
        "concurrency of the task",
        situation(QUEUED, group=HERE, limits=(Limit("task", "send_mail", None, 4, partitions=2, running=4),)),
        ["task-limit"],
        "task send_mail is limited to 4 jobs at once for all workers together (in the code): 4 jobs run now",
    ),
    (
        "the owner's share of the concurrency",
        situation(
            QUEUED,
            group=HERE,
            limits=(Limit("queue", "mail", None, 4, partitions=2, owned=1, running=2, running_here=2),),
        ),
        ["queue-limit"],
        "has a share of 2, and runs 2",
    ),
    (
        "a share that is free",
        situation(
            QUEUED,
            **NOTHING_BEFORE,
            limits=(Limit("queue", "mail", None, 4, partitions=2, owned=1, running=2, running_here=1),),
        ),
        ["waits-for-slot"],
        "",
    ),
    (
        "tenants",
        situation(QUEUED, group=HERE, place=Place(AT, False, 9, 0), tenant=Tenant("tenant", "acme", 2)),
        ["tenant-turns", "jobs-before"],
        "2 queued jobs of tenant=acme came before this one",
    ),
    ("done", situation(QUEUED, group=HERE, place=Place(AT, True)), ["record-done"], "does not know its outcome yet"),
    (
        "the app has no such task",
        situation(QUEUED, knows_task=False, **NOTHING_BEFORE),
        ["unknown-task", "waits-for-slot"],
        "has no task send_mail",
    ),
    (
        "cancel requested",
        situation(QUEUED, cancel=Cancel("by ann: wrong list", T + 1)),
        ["cancel-requested"],
        "by ann: wrong list at 2023-11-14 22:13:20 UTC: the job is closed when its turn comes",
    ),
    (
        "table behind",
        situation(QUEUED, lag=Lag(1_200, T), **NOTHING_BEFORE),
        ["table-behind", "waits-for-slot"],
        "has not read 1,200 records of the job's partitions, the oldest of 2023-11-14 22:13:20 UTC",
    ),
    ("table a moment behind", situation(QUEUED, 1.0, lag=Lag(3, T), **NOTHING_BEFORE), ["waits-for-slot"], ""),
    ("delayed", situation(DELAYED), ["delayed"], "run 1 waits until 2023-11-14 22:14:20 UTC"),
    (
        "delayed, and the queue is paused",
        situation(DELAYED, pauses=(Pause("queue", "mail", "by ann"),)),
        ["delayed", "queue-paused"],
        "",
    ),
    (
        "overdue",
        situation(DELAYED, 90, coordinator=Coordinator(1, 12, T + 70_000)),
        ["delayed", "not-released"],
        "",
    ),
    (
        "backs off",
        situation(BACKING_OFF),
        ["backs-off"],
        "failed at 2023-11-14 22:13:22 UTC with shop.SMTPError: no relay",
    ),
    ("backs off in place", situation(IN_PLACE, 90, group=HERE), ["backs-off"], "the next attempt waits until"),
    ("in place, owner gone", situation(IN_PLACE, 90, group=NOBODY), ["backs-off", "no-worker"], ""),
    ("snoozed", situation(SNOOZED), ["snoozed"], "until 2023-11-14 22:13:52 UTC: not� yet"),
    ("put off", situation(PUT_OFF, knows_task=False), ["unknown-task"], "does not know task send_mail put the job off"),
    (
        "running",
        situation(PROGRESSED, group=HERE),
        ["running"],
        "attempt 1 of run 1 runs on worker@host:1, version 1.4, since 2023-11-14 22:13:21 UTC; progress 3 of 10 (unpacking)",
    ),
    ("running, owner gone", situation(RUNNING, group=NOBODY), ["worker-gone", "running"], "the next owner"),
    (
        "running, stop requested",
        situation(RUNNING, group=HERE, cancel=Cancel("by ann", T)),
        ["cancel-requested", "running"],
        "the job is asked to stop",
    ),
    ("running, rebalance", situation(RUNNING, group=Group("g", 1, False, True)), ["running"], ""),
    ("leased", situation(LEASED, group=NOBODY, lease=Lease("w", T + 5_000, 30_000)), ["running"], ""),
    (
        "leased, silent",
        situation(LEASED, 30, lease=Lease("w", T + 5_000, 30_000)),
        ["worker-gone", "running"],
        "worker w has not renewed its job lease since 2023-11-14 22:13:25 UTC; the lease ends at 2023-11-14 22:13:55 UTC",
    ),
    ("leased, lost", situation(LEASED, 60, lease=Lease("w", T, 30_000)), ["worker-gone", "running"], "ended at"),
    ("leased, given back", situation(LEASED, lease=Lease("w", T, 0)), ["worker-gone", "running"], "gave the job back"),
    (
        "failed",
        situation(FAILED),
        ["ended"],
        "run 1 failed at 2023-11-14 22:13:22 UTC: shop.SMTPError: no relay (exhausted), on worker@host:1",
    ),
    (
        "cancelled",
        situation(CANCELLED),
        ["ended"],
        "run 1 was cancelled at 2023-11-14 22:13:21 UTC by ann (wrong list)",
    ),
    (
        "redrive waits",
        situation(FAILED, plans=(PlanWait("p1", "redrive", "paused", "by ann: mended", T, "by bob: wait"),)),
        ["ended", "waits-in-plan"],
        "",
    ),
    ("unknown", situation(None), ["unknown-job"], "the status table knows no job j"),
    (
        "not read yet",
        situation(None, awaited=AT, lag=Lag(7, T)),
        ["unknown-job", "table-behind"],
        "",
    ),
    ("no table", situation(None, table_error="no table\nhere"), ["table-unreadable"], "about the job: no table here"),
]


@pytest.mark.parametrize(("seen", "causes", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_situation_has_its_causes(seen: Situation, causes: list[str], text: str) -> None:
    """The causes come in the order of `CauseKind`, and the first one has the observed facts in words."""
    explained = explain(seen)
    assert kinds(explained) == causes
    assert text in explained.causes[0].detail
    assert explained.state == (UNKNOWN if seen.life is None else project(seen.life).state)
    assert (explained.likely_start is None) or explained.likely_start_note


def test_every_kind_of_cause_is_in_a_case() -> None:
    """A new kind needs a case, and a kind that no rule yields is deleted."""
    assert {kind for case in CASES for kind in case[2]} == {kind.value for kind in CauseKind}


def test_the_cause_says_since_when() -> None:
    """``since`` is the time of the fact, by the broker's clock."""
    (paused,) = explain(situation(QUEUED, pauses=(Pause("queue", "mail", "by ann", T - 60_000),))).causes
    assert paused.since == dt.datetime.fromtimestamp((T - 60_000) / 1000, dt.UTC)
    (backing_off,) = explain(situation(BACKING_OFF)).causes
    assert backing_off.since == dt.datetime.fromtimestamp((T + 2_000) / 1000, dt.UTC)
    (delayed, late) = explain(situation(DELAYED, 90, coordinator=Coordinator(1, 12, T + 70_000))).causes
    assert late.since == dt.datetime.fromtimestamp((T + 70_000) / 1000, dt.UTC)
    assert "has not processed 12 records" in late.detail
    assert "no coordinator runs" in explain(situation(DELAYED, 90, coordinator=Coordinator(0))).causes[1].detail
    assert delayed.since == dt.datetime.fromtimestamp(T / 1000, dt.UTC)


def test_a_second_plan_is_in_the_same_cause() -> None:
    """Each kind of cause is listed once."""
    waits = tuple(PlanWait(f"p{n}", "redrive", "running", "by ann", T + n) for n in range(2))
    _, cause = explain(situation(FAILED, plans=waits)).causes
    assert "plan p0" in cause.detail
    assert "plan p1" in cause.detail


@pytest.mark.parametrize(
    ("seen", "seconds", "note"),
    [
        (
            situation(QUEUED, group=HERE, place=Place(AT, False, 12, 3), pace=SLOW),
            10.0,
            "9 jobs of the partition start",
        ),
        (situation(QUEUED, group=HERE, place=Place(AT, False, 12, 3), pace=Pace(0, 0, 60.0)), None, "no job of the"),
        (situation(QUEUED, group=HERE, place=Place(AT, False, 12, 3)), None, "how fast"),
        (situation(QUEUED, group=HERE), None, "number of jobs before it"),
        (situation(QUEUED, **NOTHING_BEFORE, pauses=(Pause("queue", "mail", "by ann"),)), None, "queue is paused"),
        (situation(DELAYED, pauses=(Pause("task", "send_mail", "by ann"),)), None, "task is paused"),
        (situation(DELAYED), 50.0, "when the job is due"),
        (situation(BACKING_OFF), 22.0, "when the job is due"),
        (situation(DELAYED, 90), None, "after the coordinator has released it"),
        (situation(IN_PLACE, 90, group=HERE), None, "the next attempt is due"),
        (situation(RUNNING), None, "the attempt has started"),
        (situation(FAILED), None, "the run has ended"),
        (situation(None), None, "not known"),
    ],
)
def test_the_likely_start_is_a_time_or_the_reason_why_there_is_none(
    seen: Situation, seconds: float | None, note: str
) -> None:
    """It follows from the jobs before it and the measured pace, or from the time for which the job waits."""
    explained = explain(seen)
    expected = None if seconds is None else dt.datetime.fromtimestamp(seen.now_ms / 1000 + seconds, dt.UTC)
    assert explained.likely_start == expected
    assert note in explained.likely_start_note


def test_texts_of_others_cannot_control_a_terminal() -> None:
    """Control characters, changes of the writing direction and halves of surrogate pairs are replaced, and long texts are
    cut."""
    assert plain("a\x1b[31m\u202eb\ud800\n c") == "a�[31m�b� c"
    assert plain("x" * 400) == "x" * 299 + "…"


# -- any situation ------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=8) | st.sampled_from(["\x1b]0;x\x07", "\u202e", "\ud800", "a\nb"])
MS = st.integers(T - 100_000, T + 200_000) | st.sampled_from([-(1 << 62), 0, 1 << 62])
COUNT = st.integers(0, 5_000)
SCOPE = st.sampled_from(["queue", "task"])
WORKERS = st.sampled_from(["worker@host:1", "", "w\x00"])
ERRORS = st.builds(ev.ErrorInfo, TEXT, TEXT, st.none())
FACTS: st.SearchStrategy[ev.Fact] = st.one_of(
    st.builds(ev.JobSubmitted, st.just(SPEC), st.none() | st.integers(0, 100_000)),
    st.builds(ev.JobDue, st.just(SPEC), st.integers(0, 1 << 52)),
    st.builds(ev.JobStarted, WORKERS, st.none() | TEXT, st.just({}), st.just(WORK), COUNT),
    st.builds(ev.JobLeased, WORKERS, st.integers(0, 60_000)),
    st.builds(ev.JobProgressed, COUNT, COUNT, st.none() | COUNT, st.none() | TEXT),
    st.builds(ev.JobRetried, ERRORS, st.integers(0, 100_000), st.just(0), st.booleans()),
    st.builds(ev.JobSnoozed, st.integers(0, 100_000), st.none() | TEXT, st.just(0), st.booleans()),
    st.builds(ev.JobSucceeded),
    st.builds(ev.JobFailedFact, TEXT, ERRORS),
    st.builds(ev.JobCancelledFact, TEXT, st.none() | TEXT),
    st.builds(ev.JobExpiredFact, st.integers(0, 1 << 52)),
)


@st.composite
def lives(draw: st.DrawFn) -> Life:
    """Return the life of some facts in any order, with any releases and attempts."""
    folded: Life | None = None
    while folded is None:
        for n, fact in enumerate(draw(st.lists(FACTS, min_size=1, max_size=6))):
            numbers = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
            run, release, attempt = numbers
            event = JobEvent("e", "j", run, attempt, release, 0, draw(TEXT), "mail", draw(st.none() | TEXT),
                             None, "test", None, fact)  # fmt: skip
            topic = LIFECYCLE if isinstance(fact, ev.TERMINAL) else draw(st.sampled_from([WORK, LIFECYCLE]))
            folded = apply(folded, Recorded(event, Position(topic, 0, n), T + 1_000 * n))
    return folded


LIMITS = st.builds(
    Limit,
    *(
        SCOPE,
        TEXT,
        st.none() | st.floats(0.001, 1e6),
        st.none() | st.integers(1, 100),
        st.none() | TEXT,
        st.none() | MS,
    ),
    *(st.integers(1, 12), st.none() | st.integers(0, 12), st.none() | COUNT, st.none() | COUNT),
)
SITUATIONS = st.builds(
    Situation,
    job_id=TEXT,
    now_ms=st.integers(T, T + 200_000),
    life=st.none() | lives(),
    table_error=st.none() | TEXT,
    awaited=st.none() | st.just(AT),
    lag=st.none() | st.builds(Lag, COUNT, st.none() | MS),
    cancel=st.none() | st.builds(Cancel, TEXT, MS),
    pauses=st.lists(st.builds(Pause, SCOPE, TEXT, TEXT, st.none() | MS), max_size=4).map(tuple),
    limits=st.lists(LIMITS, max_size=4).map(tuple),
    group=st.none() | st.builds(Group, TEXT, st.integers(0, 3), st.none() | st.booleans(), st.booleans()),
    place=st.none() | st.builds(Place, st.just(AT), st.booleans(), COUNT, COUNT),
    pace=st.none() | st.builds(Pace, COUNT, COUNT, st.floats(0.0, 120.0)),
    key_holder=st.none()
    | st.builds(KeyHolder, TEXT, TEXT, st.sampled_from(State), st.none() | MS, COUNT, st.booleans()),
    tenant=st.none() | st.builds(Tenant, TEXT, st.none() | TEXT, st.none() | COUNT, st.booleans()),
    lease=st.none() | st.builds(Lease, WORKERS, MS, st.integers(0, 60_000)),
    coordinator=st.none() | st.builds(Coordinator, st.none() | COUNT, st.none() | COUNT, st.none() | MS),
    plans=st.lists(st.builds(PlanWait, TEXT, TEXT, TEXT, TEXT, MS, st.none() | TEXT), max_size=3).map(tuple),
    crew=st.none() | st.builds(Crew, COUNT, COUNT, COUNT, COUNT, st.none() | MS),
    knows_task=st.none() | st.booleans(),
    gates=st.sampled_from([(), ("breaker=",), ("adaptive=", "breaker=")]),
    unread=st.lists(TEXT, max_size=3).map(tuple),
)


@given(SITUATIONS, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_any_situation_has_an_explanation(seen: Situation, chance: random.Random) -> None:
    """Every job has a cause, each kind at most once, in the order of the kinds; the same situation has the same
    explanation; and no text contains a control character."""
    explained = explain(seen)
    assert explained == explain(seen)
    assert explained.causes
    order = [list(CauseKind).index(each.cause) for each in explained.causes]
    assert order == sorted(set(order))
    for text in (explained.likely_start_note, *(each.detail for each in explained.causes)):
        assert text
        assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    if explained.state == State.QUEUED:
        holds = {each.cause for each in explained.causes} & {*HOLDING, CauseKind.WAITS_FOR_SLOT}
        assert holds, "a queued job has something for which it waits"
    if explained.state == UNKNOWN:
        assert explained.likely_start is None


def test_the_reference_lists_every_cause() -> None:
    """docs/reference.md has a row for each kind, in the order of the kinds, with the sentence of the code."""
    root = Path(__file__).parents[2]
    code = (root / "jobledger" / "causes.py").read_text("utf-8")
    written = re.findall(r"^    #: (.+)\n    [A-Z_]+ = \"([a-z-]+)\"$", code, re.MULTILINE)
    assert [name for _, name in written] == [kind.value for kind in CauseKind]
    section = (root / "docs" / "reference.md").read_text("utf-8").partition("### Causes")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", section, re.MULTILINE) == [(n, said) for said, n in written]


def test_every_state_has_rules() -> None:
    """A new state needs rules."""
    assert set(RULES) == set(State)
