"""What a search for jobs finds on every database: the jobs that match, in order, however few rows are read at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from jobledger import job
from jobledger.errors import ConfigError, JobNotFound
from jobledger.job import JobStatus, Life, State
from jobledger.schemas import events as ev
from jobledger.streams.status.store import StatusReader, Store, searches
from jobledger.streams.status.store.protocol import Counted, Found
from tests.contract.test_store import write

TASKS, QUEUES, VERSIONS = ("send", "call", "rare"), ("mail", "slow"), ("1.0", "2.0", None)
ERRORS = [ev.ErrorInfo(f"builtins.Error{n}", f"no {n}", f'File "a.py", line {n}, in f{n}') for n in range(3)]
JOBS = 120


def some_job(dice: random.Random, number: int) -> Life:
    """Return a job with random properties. Several jobs are submitted at the same time."""
    task = dice.choices(TASKS, (20, 20, 1))[0]
    tags = {name: value for name, value in (("tenant", "acme"), ("size", dice.choice("sm"))) if dice.random() < 0.5}
    key = dice.choice(("a", "b", None))
    submitted = ev.JobSubmitted(ev.JobSpec(b"{}", tags), dice.choice((None, 60_000)))
    facts: list[ev.Fact] = [submitted]
    end = dice.choice(
        [None, ev.JobSucceeded(), ev.JobSucceeded(), ev.JobCancelledFact("me", "no")]
        + [ev.JobFailedFact("exhausted", error) for error in ERRORS]
        + [ev.JobRetried(error, dice.choice((1, 60_000))) for error in ERRORS]
    )
    if end is not None and not isinstance(end, ev.JobCancelledFact):
        facts.append(ev.JobStarted("h:1", dice.choice(VERSIONS), {}, "t", 0))
    if end is not None:
        facts.append(end)
    life: Life | None = None
    queue, ms = dice.choice(QUEUES), 1_000 * (number // 3)
    attempt = dice.randint(1, 3)
    for offset, fact in enumerate(facts):
        at = (ms + offset, "shop.lifecycle", 0, 10 * number + offset)
        life = job.join(life, job.of(1, 1, attempt, task, queue, key, fact, at))
    assert life is not None
    return life


def some_filters(dice: random.Random) -> dict[str, Any]:
    """Return some filters with random values, also values that no job has."""
    possible: dict[str, Any] = {
        "state": lambda: dice.sample([state.value for state in State], dice.randint(1, 4)),
        "task": lambda: dice.choice([*TASKS, "nobody", ["send", "rare"]]),
        "queue": lambda: dice.choice([*QUEUES, "nobody"]),
        "tag": lambda: dice.choice([{"tenant": "acme"}, {"tenant": "acme", "size": "s"}, {"tenant": "nobody"}]),
        "key": lambda: dice.choice(["a", ["a", "b"], "nobody"]),
        "version": lambda: dice.choice(["1.0", ["1.0", "2.0"], "nobody"]),
        "error": lambda: dice.choice(["builtins.Error1", ["builtins.Error0", "builtins.Error2"], "nobody"]),
        "error_text": lambda: dice.choice(["NO 1", "no", "n_", "%"]),
        "since_ms": lambda: dice.randrange(0, 60_000),
        "until_ms": lambda: dice.randrange(0, 60_000),
        "late_ms": lambda: dice.randrange(0, 120_000),
        "attempts_least": lambda: dice.randint(1, 3),
        "id_prefix": lambda: dice.choice(["0", "01", "09", "1"]),
    }
    return {name: possible[name]() for name in dice.sample(list(possible), dice.choice((0, 1, 1, 2, 2, 3)))}


def pieces(reader: StatusReader, limit: int, most: int, **filters: Any) -> Iterator[Found]:
    """Continue a search until all jobs were looked at."""
    after: str | None = None
    while True:
        found = reader.search(after=after, limit=limit, most=most, **filters)
        yield found
        after = found.after
        if after is None:
            return


def ids(jobs: Sequence[JobStatus]) -> list[str]:
    return [each.job_id for each in jobs]


@pytest.mark.parametrize("seed", range(2))
def test_a_search_in_pieces_finds_every_job_that_matches_once_and_in_order(
    store: Store, reader: StatusReader, seed: int
) -> None:
    """The ids and their order are those of one query without any bound. Each piece has a bounded number of jobs."""
    dice = random.Random(seed)
    write(store, {f"{number:03}": some_job(dice, number) for number in range(JOBS)})
    for _ in range(40):
        filters = some_filters(dice)
        wanted = [job_id for job_id, _ in reader.chosen(**filters)]
        for limit, most in ((7, 10), (3, 40), (200, 1_000)):
            found = list(pieces(reader, limit, most, **filters))
            assert [job_id for each in found for job_id in ids(each.jobs)] == wanted, filters
            assert all(len(each.jobs) <= limit for each in found)
            assert found[-1].searched_ms is None
        assert ids(reader.jobs(limit=500, **filters)) == wanted
        assert reader.count(**filters) == Counted(len(wanted), True), filters


def test_a_search_stops_after_a_number_of_rows(store: Store, reader: StatusReader) -> None:
    """It says up to which time of submission it has compared the jobs, and continues there."""
    dice = random.Random(1)
    write(store, {f"{number:03}": some_job(dice, number) for number in range(JOBS)})
    first = reader.search(version="nobody", most=30)
    assert first == Found([], "090", 30_000)
    assert reader.search(version="nobody", most=30, after="090") == Found([], "060", 20_000)
    assert reader.search(version="nobody", most=JOBS + 1) == Found([])
    by_id = reader.search(version="nobody", id_prefix="0", most=40)
    assert by_id == Found([], "060")
    with pytest.raises(JobNotFound, match="after='x'"):
        reader.search(after="x")
    with pytest.raises(ConfigError, match="'lost' is not a state"):
        reader.search(state="lost")


def test_a_search_for_what_the_counters_exclude_reads_no_job(
    store: Store, reader: StatusReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown task, queue, or a state that no job of a task has, is known without reading rows."""
    dice = random.Random(1)
    write(store, {f"{number:03}": some_job(dice, number) for number in range(JOBS)})
    monkeypatch.setattr(searches, "_matching", None)
    impossible: list[dict[str, Any]] = [
        {"task": "nobody"},
        {"queue": "nobody", "since_ms": 0},
        {"task": "nobody", "tag": {"tenant": "acme"}},
        {"state": ["running", "expired"], "version": "1.0"},
    ]
    for filters in impossible:
        assert reader.search(**filters) == Found([])
        assert reader.count(**filters) == Counted(0, True)
