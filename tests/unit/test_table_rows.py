"""Which rows of ended jobs go, and what the comparison with the log says about them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import table_retention
from jobledger.cli.backfill import _refuse_removed
from jobledger.cli.commands import Wrong
from jobledger.config import Settings
from jobledger.errors import ConfigError
from jobledger.job import ENDS, Life, State, join, of, project
from jobledger.schemas import events as ev
from jobledger.streams.status.store.removal import OPEN, Removed, Reread, Walk, Walked, last_ms, walks

BAD = ev.ErrorInfo("E", "m")
SPEC = ev.JobSpec(b"{}")
#: The facts of a job, with the topics on which they are.
FACTS: Sequence[tuple[str, ev.Fact]] = (
    ("shop.jobs.mail", ev.JobSubmitted(SPEC)),
    ("shop.jobs.mail", ev.JobDue(SPEC, 1)),
    ("shop.lifecycle", ev.JobStarted("w", None, {}, "shop.jobs.mail", 5)),
    ("shop.lifecycle", ev.JobProgressed(1, 1, 2, None)),
    ("shop.lifecycle", ev.JobRetried(BAD, 5)),
    ("shop.lifecycle", ev.JobSucceeded()),
    ("shop.lifecycle", ev.JobFailedFact("exhausted", BAD)),
    ("shop.lifecycle", ev.JobCancelledFact("ann", None)),
    ("shop.lifecycle", ev.JobExpiredFact(5)),
)
#: A job's records in the order of the log: (number of the fact, run).
RECORDS = st.lists(st.tuples(st.integers(0, len(FACTS) - 1), st.integers(1, 2)), min_size=1, max_size=8)


def lives(records: Sequence[tuple[int, int]]) -> list[Life]:
    """Return the life of each record, one second apart."""
    made = []
    for second, (number, run) in enumerate(records):
        topic, fact = FACTS[number]
        life = of(run, 1, 1, "send", "mail", None, fact, (1_000 * second, topic, 0, second))
        assert life is not None
        made.append(life)
    return made


def folded(some: Sequence[Life]) -> Life:
    """Return the life of all of these facts."""
    result: Life | None = None
    for each in some:
        result = join(result, each)
    assert result is not None
    return result


def row(life: Life) -> Walked:
    seen = project(life)
    return Walked("j", seen.state.value, seen.task, seen.queue, seen.since_ms, seen.ended_ms)


LIMITS = st.dictionaries(st.sampled_from([state.value for state in ENDS]), st.integers(0, 9_000), min_size=1)


@given(RECORDS, LIMITS)
def test_a_row_goes_exactly_if_its_job_ended_before_the_limit_of_its_state(
    records: list[tuple[int, int]], limits: dict[str, int]
) -> None:
    """Of the jobs whose submission is known, exactly those go that the comparison with the log accepts as missing. A
    job goes in the walk of its own state only, and all rows that go were submitted before the walk's limit."""
    life = folded(lives(records))
    taken = [walk for walk in walks(limits) if walk.may_go(row(life)) and (walk.ends or walk.old(life))]
    assert len(taken) <= 1
    if life.head.rank == 0:
        assert bool(taken) == Removed(limits).lacks(life)
        assert all(walk.ends for walk in taken)
    for walk in taken:
        assert walk.state is project(life).state
        read = row(life)
        if read.ended_ms is None or read.submitted_ms <= read.ended_ms:  # as in every log of one clock
            assert read.submitted_ms < walk.before_ms


@given(RECORDS, st.integers(1, 8), LIMITS)
def test_a_row_that_was_begun_again_is_no_difference(
    records: list[tuple[int, int]], split: int, limits: dict[str, int]
) -> None:
    """If a row was removed after some of its job's records, and later records began it again, the comparison accepts it,
    whatever these records are. Rows that lack other facts are not accepted for this reason."""
    each = lives(records)
    if split >= len(each):
        return
    removed = Removed(limits)
    before, after = folded(each[:split]), folded(each[split:])
    log = folded(each)
    # The positions of progress reports are not kept, so reports alone do not tell when a row was begun.
    if before.positions and after.positions:
        assert removed.begun_again(after, log) == (before.positions[-1][0] < removed.before_ms)
    assert not removed.begun_again(log, log)
    assert not removed.begun_again(before, log) or before.positions == log.positions[-len(before.positions) :]


def test_outcomes_that_were_trimmed_explain_a_missing_row() -> None:
    """A job without an outcome in the log may be missing in the table only if its outcome may have been trimmed."""
    life = folded(lives([(0, 1), (2, 1)]))
    assert not Removed({"failed": 9_000}).lacks(life)
    assert Removed({"failed": 9_000}, 5_000).lacks(life)
    assert not Removed({"failed": 9_000}, 1_000).lacks(life), "its last fact is not older than that"
    assert not Removed({"failed": 1_000}, 5_000).lacks(life)
    assert not Removed({}, 5_000).lacks(life)


def test_only_rows_without_a_submission_are_removed_without_an_outcome() -> None:
    """A job that waits for a year stays. The walk of a rebuild, which names rows of the log, takes both."""
    waiting, partial = folded(lives([(0, 1)])), folded(lives([(2, 1)]))
    assert [walk.state for walk in walks({"failed": 1})] == [State.FAILED, *OPEN]
    for partial_only in (True, False):
        walk = Walk(State.QUEUED, 5_000, partial_only)
        assert (walk.old(waiting), walk.old(partial)) == (not partial_only, True)
    assert walks({}) == []
    assert walks({"failed": 1_000, "succeeded": 5_000})[-1].before_ms == 1_000, "the longest retention counts"


def test_facts_are_dropped_only_if_they_were_included_before() -> None:
    """Facts are dropped if all of them are in partitions that are read again, and older than the limit."""
    life = folded(lives([(0, 1), (2, 1), (3, 1)]))
    work, outcomes = ("shop.jobs.mail", 0), ("shop.lifecycle", 0)
    assert Reread(2_001, {work, outcomes}).covers(life)
    assert not Reread(2_000, {work, outcomes}).covers(life)
    assert not Reread(9_000, {work}).covers(life)


def test_the_states_of_the_setting_are_those_that_end_a_job() -> None:
    """The setting has its own list of states, because the audit must not import the fold."""
    assert tuple(state.value for state in ENDS) == table_retention.STATES


def test_the_setting_is_read_from_the_environment() -> None:
    """Ages are seconds afterwards. Without the setting all rows are kept."""
    settings = Settings.from_env({"JOBLEDGER_TABLE_RETENTION": "succeeded=7d, failed = 90m"})
    assert settings.table_retention == {"succeeded": 7 * 86_400, "failed": 5_400}
    assert Settings().table_retention == Settings.from_env({"JOBLEDGER_TABLE_RETENTION": ""}).table_retention == {}
    assert table_retention.limits(settings.table_retention, 10**9) == {
        "succeeded": 10**9 - 604_800_000,
        "failed": 10**9 - 5_400_000,
    }
    span = dt.timedelta(hours=1)
    assert Settings(table_retention={"failed": span}).table_retention == {"failed": 3600.0}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7d", "'7d' does not begin with a state"),
        ("succeeded", "'succeeded' does not begin with a state"),
        ("running=7d", "'running=7d' does not begin with a state .*succeeded, failed, cancelled, expired"),
        ("succeeded=7", "'7' is not an age"),
        ("succeeded=-7d", "'-7d' is not an age"),
        ("succeeded=7d,", "'' does not begin with a state"),
        ("failed=1d,failed=2d", "names failed twice"),
        ("failed=59m", "failed jobs for 3540 s, which is not between one hour"),
        ("failed=999999d", "not between one hour"),
    ],
)
def test_a_bad_setting_is_an_error_that_says_what_to_write(text: str, message: str) -> None:
    """The error names the variable, the value and the way out."""
    with pytest.raises(ConfigError, match=message) as caught:
        Settings.from_env({"JOBLEDGER_TABLE_RETENTION": text})
    assert "JOBLEDGER_TABLE_RETENTION" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), True, "7d", None, 0])
def test_a_bad_value_from_code_is_an_error(value: object) -> None:
    """A time that is not a number of seconds is refused."""
    with pytest.raises(ConfigError, match="table_retention"):
        Settings(table_retention={"failed": value})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="'running'"):
        Settings(table_retention={"running": 7_200})


def test_a_backfill_does_not_run_jobs_again_whose_rows_are_gone() -> None:
    """For events from the time of removed rows it is not known which jobs have run, so such a backfill is refused."""
    _refuse_removed(None, {})
    _refuse_removed(1_764_460_800_001, {"failed": 1_764_460_800_000})
    for begin in (None, 0, 1_764_460_799_999):
        with pytest.raises(Wrong, match="--from 2025-11-30T00:00:01 or later, or --again"):
            _refuse_removed(begin, {"failed": 1, "succeeded": 1_764_460_800_001})


def test_a_life_knows_its_last_fact() -> None:
    """A progress report counts, although its position is not among the positions."""
    assert last_ms(folded(lives([(0, 1), (2, 1), (3, 1)]))) == 2_000
    assert last_ms(folded(lives([(3, 1)]))) == 0
