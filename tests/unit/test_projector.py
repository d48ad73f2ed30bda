"""The changes of the status table do not depend on the batches of records, and the memory is bounded."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.job import Life
from jobledger.plan import PlanStatus
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import Changes
from jobledger.streams.status.store.rows import Row, life_of_row


class Message:
    """A consumed record, with the methods that the row folder calls."""

    def __init__(
        self, topic: str, partition: int, offset: int, value: bytes | None, ms: int, key: bytes | None = None
    ) -> None:
        self._all, self._key = (topic, partition, offset, value, ms), key

    def topic(self) -> str:
        return self._all[0]

    def partition(self) -> int:
        return self._all[1]

    def offset(self) -> int:
        return self._all[2]

    def value(self) -> bytes | None:
        return self._all[3]

    def timestamp(self) -> tuple[int, int]:
        return 2, self._all[4]

    def key(self) -> bytes | None:
        return self._key


class Table:
    """A table in memory that counts how many rows were read."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.plans: dict[str, PlanStatus] = {}
        self.tags: set[tuple[str, str, int, str]] = set()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.loads = 0

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]:
        self.loads += len(job_ids)
        return {job_id: life_of_row(self.rows[job_id]) for job_id in job_ids if job_id in self.rows}

    def load_plans(self, plan_ids: Sequence[str]) -> dict[str, PlanStatus]:
        return {plan_id: self.plans[plan_id] for plan_id in plan_ids if plan_id in self.plans}

    def write(self, changes: Changes) -> None:
        self.plans |= {plan.plan: plan for plan in changes.plans}
        self.rows |= {row[0]: row for row in changes.jobs}
        self.tags -= set(changes.tags_gone)
        self.tags |= set(changes.tags_new)
        self.counts.update(changes.counts)


BAD = ev.ErrorInfo("builtins.ValueError", "no", "x" * 3_000)


def stream(chance: random.Random, jobs: int) -> list[Message]:
    """Return the facts of several jobs, mixed. Some jobs lack a fact, and some have their facts in another order."""
    lives: list[list[JobEvent]] = []
    for n in range(jobs):
        ends: list[ev.Fact] = [
            ev.JobSucceeded(b"1"),
            ev.JobRetried(BAD, 5),
            ev.JobFailedFact("never", BAD),
            ev.JobProgressed(1, 1),
        ]
        facts: list[ev.Fact] = [
            ev.JobSubmitted(ev.JobSpec(b"{}", {"n": str(n % 3)} if n % 2 else {})),
            ev.JobStarted("h:1", None, {}, "t", 0),
            chance.choice(ends),
        ]
        if chance.random() < 0.3:
            facts.pop(chance.randrange(3))
        if chance.random() < 0.3:
            chance.shuffle(facts)
        job_id = f"00000000-0000-7000-8000-{n:012}"
        lives.append(
            [
                JobEvent(job_id, job_id, 1, 1, 1, 1_700_000_000_000_000, "send", "mail", None, None, "t", None, f)
                for f in facts
            ]
        )
    messages: list[Message] = []
    while lives:
        life = chance.choice(lives)
        event = life.pop(0)
        topic = "s.jobs.mail" if isinstance(event.fact, ev.JobSubmitted) else "s.lifecycle"
        messages.append(Message(topic, 0, len(messages), codec.encode(event), 1_000 + len(messages) // 2))
        if not life:
            lives.remove(life)
    return messages


def run(messages: list[Message], sizes: list[int], cache_jobs: int) -> Table:
    """Fold the messages in batches; the sizes of the batches are repeated."""
    table = Table()
    projector = RowFolder(table, codec.Decoder(), cache_jobs=cache_jobs)
    at = turn = 0
    while at < len(messages):
        folded = projector.fold(messages[at : at + sizes[turn % len(sizes)]])  # type: ignore[arg-type]  # has its methods
        table.write(folded.changes)
        projector.committed(folded)
        at, turn = at + sizes[turn % len(sizes)], turn + 1
        assert len(projector._young) + len(projector._old) <= max(cache_jobs, 2) + max(sizes)
    return table


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 20))
def test_batches_and_caches_of_any_size_give_the_same_table(
    chance: random.Random, sizes: list[int], cache_jobs: int
) -> None:
    """Rows, tags and counters are the same for any batches and for any size of the cache."""
    messages = stream(chance, 30)
    whole, other = run(messages, [len(messages)], 10_000), run(messages, sizes, cache_jobs)
    assert other.rows == whole.rows
    assert other.tags == whole.tags
    assert +other.counts == +whole.counts
    assert +other.counts == Counter((row[2], row[3], row[1]) for row in other.rows.values())


def test_a_batch_that_was_not_committed_is_forgotten() -> None:
    """After a failed transaction, a second fold of the same records gives the same changes."""
    table = Table()
    projector = RowFolder(table, codec.Decoder())
    messages = stream(random.Random(1), 10)
    first = projector.fold(messages[:9])  # type: ignore[arg-type]
    again = projector.fold(messages[:9])  # type: ignore[arg-type]
    assert first.changes == again.changes


def test_the_rows_of_active_jobs_are_not_read_again() -> None:
    """The state of an active job is in the cache. Only the rows of new jobs are read."""
    messages = sorted(stream(random.Random(2), 50), key=lambda m: m.offset())
    assert run(messages, [10], 1_000).loads < len(messages) / 2
