"""Turns records into the changes of one transaction: decodes, folds, projects and counts. Uses no broker and no SQL.

Within a batch the facts of a job are joined first, so the job's row is read and written once. A bounded cache keeps the
states of jobs that have not ended, so most states need not be read from the database. The cache holds only committed
states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from confluent_kafka import Message

from jobledger import plan as plans
from jobledger.errors import SchemaError
from jobledger.job import Life, Visible, join, of, project
from jobledger.plan import PlanStatus
from jobledger.schemas.codec import Decoder
from jobledger.schemas.events import Position, Recorded
from jobledger.schemas.fast_path import glance
from jobledger.streams.status.store.protocol import Changes, TagRow
from jobledger.streams.status.store.removal import Reread
from jobledger.streams.status.store.rows import key_text, row, slots_of
from jobledger.worker_status import of_report

#: Number of jobs whose states are cached between batches. A state takes about a kilobyte.
CACHE_JOBS = 50_000
#: Largest encoded state, in bytes, that is cached: states with tracebacks are large, and few jobs have one.
CACHE_STATE_BYTES = 2_000
#: Length of a UUID in characters.
ID_LENGTH = 36


class Loads(Protocol):
    """Loads states that are not cached."""

    def load(self, job_ids: Sequence[str]) -> dict[str, Life]: ...

    def load_plans(self, plan_ids: Sequence[str]) -> dict[str, PlanStatus]: ...


@dataclass(slots=True)
class Rejected:
    """A record that could not be read, and the error."""

    message: Message
    error: SchemaError


@dataclass(slots=True)
class Folded:
    """The result of folding a batch. ``events``: number of records read, by topic. ``states``: the new states, for
    `RowFolder.committed`; None for a job that is not to be cached."""

    changes: Changes = field(default_factory=Changes)
    events: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    states: dict[str, tuple[Life, Visible] | None] = field(default_factory=dict)


class RowFolder:
    """Folds batches onto the states of a store. Not thread-safe.

    ``cache_jobs``: number of states to cache. ``reread``: which facts belong to jobs whose rows were removed; such facts
    are dropped. ``workers``: the topic of the workers' reports; without it reports are ignored.
    """

    def __init__(
        self,
        store: Loads,
        decoder: Decoder,
        *,
        cache_jobs: int = CACHE_JOBS,
        reread: Reread | None = None,
        workers: str | None = None,
    ) -> None:
        self._store, self._decoder, self._reread, self._workers = store, decoder, reread or Reread(), workers
        # Two generations approximate a least-recently-used cache: when the young one is full, the old one is discarded.
        self._young: dict[str, tuple[Life, Visible]] = {}
        self._old: dict[str, tuple[Life, Visible]] = {}
        self._generation = max(1, cache_jobs // 2)

    def fold(self, messages: Iterable[Message]) -> Folded:
        """Return the changes that these records make. Raises `StoreError`.

        Call `committed` when the changes are committed: only that call updates the cache.
        """
        folded = Folded()
        news: dict[str, Life] = {}
        plan_facts: list[Recorded] = []
        offsets, events = folded.changes.offsets, folded.events
        for message in messages:
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            if topic is None or partition is None or offset is None:
                continue  # only error messages lack these values
            place = (topic, partition)
            offsets[place] = offset + 1
            events[topic] = events.get(topic, 0) + 1
            value = message.value()
            seen = None if value is None else glance(value)
            if seen is None and value is not None and (own := self._decoder.own_form(value)) is not None:
                value = own
                seen = glance(value)
            if seen is None:
                if topic == self._workers:
                    self._report(message, Position(topic, partition, offset), folded)
                    continue
                try:
                    event = self._decoder.decode(value)
                except SchemaError as error:
                    folded.rejected.append(Rejected(message, error))
                    continue
                if isinstance(event.fact, plans.FACTS):
                    plan_facts.append(Recorded(event, Position(topic, partition, offset), message.timestamp()[1]))
                    continue
                seen = (
                    event.job_id,
                    event.run,
                    event.release,
                    event.attempt,
                    event.task,
                    event.queue,
                    event.key,
                    event.fact,
                )
            job_id, run, release, attempt, task, queue, key, fact = seen
            life = of(run, release, attempt, task, queue, key, fact, (message.timestamp()[1], topic, partition, offset))
            if life is not None:
                if len(job_id) != ID_LENGTH or "\0" in job_id:
                    job_id = key_text(job_id)  # Jobledger did not make this id, so the id can be any text
                known = news.get(job_id)
                news[job_id] = life if known is None else join(known, life)
        self._project(news, folded)
        if plan_facts:
            folded.changes.plans = self._plans(plan_facts)
        return folded

    def _report(self, message: Message, position: Position, folded: Folded) -> None:
        """Take up a worker's report, or the tombstone that removes it. The last one of a worker's key counts."""
        key, value = message.key(), message.value()
        worker = key.decode(errors="replace") if isinstance(key, bytes) else str(key or "")
        if value is None:
            folded.changes.workers[worker] = None
            return
        try:
            event = self._decoder.decode(value if isinstance(value, bytes) else value.encode())
        except SchemaError as error:
            folded.rejected.append(Rejected(message, error))
            return
        status = of_report(worker, Recorded(event, position, message.timestamp()[1]))
        if status is not None:
            folded.changes.workers[worker] = status

    def _plans(self, facts: Sequence[Recorded]) -> list[PlanStatus]:
        """Return the plans with these facts, which are in the order of the log."""
        known = self._store.load_plans(list(dict.fromkeys(record.event.job_id for record in facts)))
        for record in facts:
            plan = plans.apply(known.get(record.event.job_id), record)
            if plan is not None:
                known[record.event.job_id] = plan
        return list(known.values())

    def merge(self, lives: Iterable[tuple[str, Life]]) -> Folded:
        """Return the changes made by joining these states with those of the store. Raises `StoreError`."""
        folded = Folded()
        self._project(dict(lives), folded)
        return folded

    def committed(self, folded: Folded) -> None:
        """Cache the states of a batch whose changes were committed."""
        young, old = self._young, self._old
        for job_id, state in folded.states.items():
            if state is None:
                young.pop(job_id, None)
                old.pop(job_id, None)
            else:
                young[job_id] = state
        if len(young) > self._generation:
            self._old, self._young = young, {}

    def forget(self, job_ids: Iterable[str] | None) -> None:
        """Drop the cached states of jobs whose rows were removed; None: all states, because it is not known which rows
        were removed."""
        if job_ids is None:
            self._young, self._old = {}, {}
            return
        for job_id in job_ids:
            self._young.pop(job_id, None)
            self._old.pop(job_id, None)

    def _project(self, news: dict[str, Life], folded: Folded) -> None:
        young, old = self._young, self._old
        before = {}
        unknown = []
        for job_id in news:
            state = young.get(job_id) or old.get(job_id)
            if state is None:
                unknown.append(job_id)
            else:
                before[job_id] = state
        for job_id, life in self._store.load(unknown).items():
            before[job_id] = (life, project(life))
        changes, states = folded.changes, folded.states
        counts = changes.counts
        reread = self._reread if self._reread.partitions and self._reread.before_ms else None
        for job_id, life in news.items():
            known = before.get(job_id)
            if known is None:
                if reread is not None and reread.covers(life):
                    continue
                seen = project(life)
                if life.head.tags:
                    changes.tags_new += _tag_rows(job_id, life, seen)
            else:
                life = join(known[0], life)
                seen, was = project(life), known[1]
                if life.head is not known[0].head and (life.head.tags or known[0].head.tags):
                    changes.tags_gone += _tag_rows(job_id, known[0], was)
                    changes.tags_new += _tag_rows(job_id, life, seen)
                key = (key_text(was.task), key_text(was.queue), was.state._value_)
                counts[key] = counts.get(key, 0) - 1
            written = row(job_id, life, seen)
            key = (written[2], written[3], written[1])
            counts[key] = counts.get(key, 0) + 1
            changes.jobs.append(written)
            # The state of a job that has ended is not cached, because further facts of that job are rare.
            kept = seen.ended_ms is None and len(slots_of(written)) <= CACHE_STATE_BYTES
            states[job_id] = (life, seen) if kept else None


def _tag_rows(job_id: str, life: Life, seen: Visible) -> list[TagRow]:
    return [(key_text(name), key_text(value), seen.since_ms, job_id) for name, value in life.head.tags.items()]
