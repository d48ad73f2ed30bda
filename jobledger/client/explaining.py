"""Gathers the facts about one job at this moment, for `jobledger.explain`, from the status table, the log, the consumer
groups and the app's code. Writes nothing.

No source is necessary except the status table. A source that cannot be read, or for which no time is left, is named in
the explanation, and does not raise an error.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from confluent_kafka import KafkaException

from jobledger.client import log_facts
from jobledger.client.commands import Standing, in_force, said, standing_of
from jobledger.client.log_facts import Membership, Starts
from jobledger.config import Settings
from jobledger.definitions.policy import Limits
from jobledger.definitions.queues import Queue
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import JobledgerError, JobNotFound, StoreError, text_of
from jobledger.explain import Explanation, explain
from jobledger.job import JobStatus, Life, State, Visible, project, released_at
from jobledger.kafka import acls
from jobledger.kafka.auth import check_connection
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.topic_names import Names, check_utf8
from jobledger.log.reading import LogReader
from jobledger.log.schema_lookup import decoder
from jobledger.plan import PlanStatus
from jobledger.process.logger import get_logger
from jobledger.schemas.events import CancelRequested, JobEvent, Position
from jobledger.situation import Cancel, Crew, KeyHolder, Lag, Limit, Pause, Scope, Situation, Tenant
from jobledger.worker_status import WorkerState, WorkerStatus

LOG = get_logger("jobledger.client")

T = TypeVar("T")

#: Seconds for all sources in the log together.
LOG_S = 5.0
#: Seconds that the broker has to answer at all.
ANSWER_S = 3.0
#: Seconds to wait until the table has read the submission of a handle's job.
TABLE_S = 2.0
#: Maximum number of jobs of a key, of a tenant, or that run, which are read from the status table.
ROWS_MOST = 1_000
#: Maximum number of plans that are read from the status table.
PLANS_MOST = 100


class Table(Protocol):
    """The methods of the status table's read side that an explanation needs."""

    def lives_of(self, job_ids: Sequence[str]) -> Mapping[str, Life]: ...

    def jobs(self, *, limit: int = 100, **filters: Any) -> list[JobStatus]: ...

    def plans(self, limit: int = 100) -> list[PlanStatus]: ...

    def workers(self) -> list[WorkerStatus]: ...

    def offsets(self) -> Mapping[tuple[str, int], int]: ...

    def reached(self, position: Position) -> bool: ...

    def unknown(self, job_id: str) -> JobNotFound: ...


class Explainer:
    """Explains the jobs of one namespace. ``table()`` opens the status table's read side, or returns the one that is
    open. ``registry``: the app's code; without tasks in it, limits in the code are not known. Thread-safe."""

    def __init__(
        self, settings: Settings, names: Names, table: Callable[[], Any], registry: TaskRegistry | None
    ) -> None:
        self._settings, self._names, self._table, self._registry = settings, names, table, registry
        self._rights_checked = False

    def explain(self, job_id: str, at_least: Position | None = None) -> Explanation:
        """Return why the job is where it is. Takes some seconds at most.

        ``at_least``: the position of the submission, if it is known. If the status table has not read it, the state is
        ``unknown``, and the cause says how far the table is behind. Raises `JobNotFound` for any other job that the table
        does not know.
        """
        check_utf8("job id", job_id)
        try:
            table: Table = self._table()
            life = self._life(table, job_id, at_least)
            if life is None and (at_least is None or table.reached(at_least)):
                raise table.unknown(job_id)
        except StoreError as exc:
            return explain(Situation(job_id=job_id, now_ms=_now_ms(), table_error=text_of(exc)))
        inquiry = _Inquiry(self._settings, self._names, table, self._registry, job_id)
        if not self._rights_checked and inquiry.answers():
            check_rights(self._settings, self._names)
            self._rights_checked = True
        return explain(inquiry.situation(life) if life is not None else inquiry.unknown(at_least))

    def _life(self, table: Table, job_id: str, at_least: Position | None) -> Life | None:
        deadline = time.monotonic() + TABLE_S
        while at_least is not None and not table.reached(at_least) and time.monotonic() < deadline:
            time.sleep(0.05)
        return table.lives_of([job_id]).get(job_id)


def check_rights(settings: Settings, names: Names) -> None:
    """Log which topics this user may not read, so that explanations lack what is there. For such a user the broker
    reports these topics as missing. Does not raise an error: a cluster that does not report rights is not checked."""
    try:
        acls.check(settings.acting_as("web"), names.namespace, [names.control, names.plans])
    except (JobledgerError, KafkaException) as exc:
        LOG.warning("the rights for explanations could not be checked: %s", text_of(exc))


class _Inquiry:
    """The work on one explanation: the facts that were observed so far, and the time that is left."""

    def __init__(
        self, settings: Settings, names: Names, table: Table, registry: TaskRegistry | None, job_id: str
    ) -> None:
        self._settings, self._names, self._table = settings, names, table
        self._registry = registry if registry is not None and registry.tasks else None
        self._job_id, self._now_ms = job_id, _now_ms()
        self._deadline = time.monotonic() + LOG_S
        self._unread: list[str] = []
        self._answered: bool | None = None  # None: not asked yet
        self._facts: dict[str, Any] = {}

    def unknown(self, awaited: Position | None) -> Situation:
        """Return the situation of a job that the table has not read."""
        if self.answers():
            with LogReader(self._settings) as log:
                self._note("lag", "how far the status table is behind", lambda: self._lag(log, [awaited]))
        return self._made(life=None, awaited=awaited)

    def situation(self, life: Life) -> Situation:
        """Return the situation of a job that the table knows."""
        seen = project(life)
        self._look(life, seen)
        # The job may have been released again meanwhile. Then the facts about its former work record do not hold for its
        # present one.
        present = self._try("the status table", lambda: self._table.lives_of([self._job_id]).get(self._job_id)) or life
        if released_at(present) != released_at(life):
            for name in ("place", "key_holder", "lease", "tenant"):
                self._facts.pop(name, None)
        return self._made(life=present)

    def _look(self, life: Life, seen: Visible) -> None:
        active = self._try("the plans", lambda: [p for p in self._table.plans(PLANS_MOST) if not p.state.ended]) or []
        if seen.state.ended and (not active or seen.state is State.SUCCEEDED):
            return
        if not seen.state.ended:
            self._code(seen)
        if not self.answers():
            return
        try:
            decode = self._decoding()
            with LogReader(self._settings) as log:
                job = (self._job_id, seen.run)
                if active:
                    self._plans(log, decode, active, job)
                if not seen.state.ended:
                    self._open(log, decode, life, seen)
        except JobledgerError as exc:  # a Schema Registry that is needed and not configured
            self._unread.append(text_of(exc))

    def _open(self, log: LogReader, decode: log_facts.Decode, life: Life, seen: Visible) -> None:
        """Observe a job that has not ended."""
        names, work, waits = self._names, self._work(life), seen.state in (State.SCHEDULED, State.RETRYING)
        in_place = waits and seen.due_ms is None
        standing = self._control(log, decode, seen)
        lane = names.lane_of(work.topic) if work is not None else self._lane(seen.queue)
        member = None if lane is None else self._member(lane, work if not waits or in_place else None)
        if lane is not None:
            self._note("crew", "the reports of the workers", lambda: self._crew(lane, life, seen))
        if seen.state is State.QUEUED and work is not None:
            self._queued(log, decode, life, seen, work)
            self._limits(standing, seen, work, member)
        home = self._try("the coordination topic", lambda: self._home(life)) if waits or life.leased else None
        if waits and not in_place and home is not None and (seen.due_ms or 0) < self._now_ms:
            self._note(
                "coordinator",
                "the coordinator",
                lambda: log_facts.coordinator(self._settings, names, log, home, self._left()),
            )
        leased = life.leased
        if not waits and leased is not None and leased.release == seen.release and home is not None:
            job = (self._job_id, seen.run)
            self._note(
                "lease", "the job lease", lambda: log_facts.lease(names, log, decode, job, leased, home, self._left())
            )
        at = [Position(names.coordination, home, 0)] if home is not None else []
        self._note("lag", "how far the status table is behind", lambda: self._lag(log, [work, *at]))

    # -- the app's code ---------------------------------------------------------------------------------------------

    def _code(self, seen: Visible) -> None:
        if self._registry is None:
            self._unread.append("the limits in the code are not known, because no app was given")
        else:
            task = self._registry.tasks.get(seen.task)
            self._facts["knows_task"] = task is not None
            if task is not None:
                policy = task.policy
                gates = {"adaptive=": policy.adaptive, "breaker=": policy.breaker}
                self._facts["gates"] = tuple(name for name, gate in gates.items() if gate is not None)

    def _lane(self, queue: str) -> str | None:
        """Return the lane of a job without a work record; None if its priority is not known."""
        known = None if self._registry is None else self._registry.queues.get(queue)
        return None if known is not None and known.priorities else queue

    def _declared(self, scope: Scope, name: str) -> Limits:
        registry = self._registry
        if registry is None:
            return Limits()
        if scope == "queue":
            return registry.queues[name].limits if name in registry.queues else Limits()
        return registry.tasks[name].policy.limits if name in registry.tasks else Limits()

    # -- the log ------------------------------------------------------------------------------------------------------

    def _control(self, log: LogReader, decode: log_facts.Decode, seen: Visible) -> list[Standing]:
        """Observe the control commands about the job, its queue and its task, and return them for queue and task."""
        job = (self._job_id, seen.run)
        records = self._try(
            "the control topic", lambda: in_force(log, self._names, decode, cancel_of=job, stall=self._left())
        )
        for record in records or ():
            fact = record.event.fact
            if isinstance(fact, CancelRequested):
                self._facts["cancel"] = Cancel(said(fact.by, fact.reason), record.appended_ms)
        wanted = {("queue", seen.queue), ("task", seen.task)}
        standing = [each for each in standing_of(records or ()) if (each.kind, each.name) in wanted]
        self._facts["pauses"] = tuple(
            Pause(each.kind, each.name, each.paused, each.paused_ms) for each in standing if each.paused is not None
        )
        return standing

    def _member(self, lane: str, work: Position | None) -> Membership | None:
        at = None if work is None else (work.topic, work.partition)
        group = self._names.worker_group(lane)
        member = self._try(
            "the members of the consumer group",
            lambda: log_facts.membership(self._settings, group, at, self._left()),
        )
        self._facts["group"] = None if member is None else member.group
        return member

    def _queued(self, log: LogReader, decode: log_facts.Decode, life: Life, seen: Visible, work: Position) -> None:
        names = self._names
        starts: Starts | None = self._try(
            "the pace of the partition",
            lambda: log_facts.starts(names, log, decode, work, seen.task, self._now_ms, self._left()),
        )
        self._facts["pace"] = None if starts is None else starts.pace
        running = frozenset[int]() if starts is None else starts.open
        self._note(
            "place",
            "the committed offsets",
            lambda: log_facts.place(self._settings, names, log, work, running, self._left()),
        )
        if life.head.key is not None:
            key = life.head.key
            self._note("key_holder", "the jobs with the same key", lambda: self._key_holder(key, seen.queue, work))
        queue = None if self._registry is None else self._registry.queues.get(seen.queue)
        if queue is not None and queue.fair_by is not None:
            tag = queue.fair_by
            self._note("tenant", "the jobs of the same tenant", lambda: self._tenant(tag, life, seen))

    def _home(self, life: Life) -> int:
        known = [Position(*at[1:]) for at in life.positions]
        return log_facts.home_partition(self._settings, self._names, self._job_id, known, self._left())

    def _lag(self, log: LogReader, positions: Sequence[Position | None]) -> Lag:
        places: dict[tuple[str, int], None] = {}
        for position in positions:
            if position is not None:
                places[position.topic, position.partition] = None
                if self._names.lane_of(position.topic) is not None:
                    places[self._names.lifecycle, position.partition] = None
        return log_facts.lag(log, places, self._table.offsets(), self._left())

    def _plans(
        self, log: LogReader, decode: log_facts.Decode, active: Sequence[PlanStatus], job: tuple[str, int]
    ) -> None:
        found = self._try(
            "the plans", lambda: log_facts.plans_with(self._names, log, decode, active, job, self._left())
        )
        if found is not None:
            self._facts["plans"] = tuple(found[0])
            if not found[1]:
                self._unread.append(f"only the first {log_facts.READ_MOST:,} records of the plans were searched")

    # -- the status table -----------------------------------------------------------------------------------------------

    def _crew(self, lane: str, life: Life, seen: Visible) -> Crew | None:
        """Return the workers of the job's lane by their last reports; None if no worker has a report."""
        now = dt.datetime.fromtimestamp(self._now_ms / 1000, dt.UTC)
        reports = self._table.workers()
        if not reports:
            return None
        alive = [
            each
            for each in reports
            if each.state(now) is WorkerState.ALIVE and (lane in each.lanes or each.more_lanes > 0)
        ]
        without = [each for each in alive if seen.task not in each.tasks and not each.more_tasks]
        runs_on = "" if life.start is None or seen.state is not State.RUNNING else life.start.worker
        silent = [each for each in reports if each.worker == runs_on and each.state(now) is WorkerState.SILENT]
        return Crew(
            len(alive),
            sum(each.slots for each in alive),
            sum(each.running for each in alive),
            len(without),
            round(silent[0].reported_at.timestamp() * 1000) if silent else None,
        )

    def _key_holder(self, key: str, queue: str, work: Position) -> KeyHolder | None:
        """Return the first job that has the same key and lane and an earlier work record: that job holds the key."""
        # Jobs that hold the key are few; jobs that wait for the key may be many, and the newest come first.
        holding = self._table.jobs(
            key=key, queue=queue, state=[State.RUNNING, State.RETRYING, State.SCHEDULED], limit=ROWS_MOST
        )
        queued = self._table.jobs(key=key, queue=queue, state=State.QUEUED, limit=ROWS_MOST)
        before: list[tuple[int, JobStatus]] = []
        for status in (*holding, *queued):
            at = self._record_of(status)
            waits = status.state in (State.RETRYING, State.SCHEDULED) and status.due_at is not None
            if at is None or waits or (at.topic, at.partition) != (work.topic, work.partition):
                continue
            if at.offset < work.offset:
                before.append((at.offset, status))
        if not before:
            return None
        _, first = min(before, key=lambda each: each[0])
        since = first.started_at or first.submitted_at
        return KeyHolder(
            key,
            first.job_id,
            first.state.value,
            None if since is None else round(since.timestamp() * 1000),
            len(before),
            len(queued) >= ROWS_MOST,
        )

    def _tenant(self, tag: str, life: Life, seen: Visible) -> Tenant:
        value = life.head.tags.get(tag)
        if value is None:
            return Tenant(tag, None)
        queued = self._table.jobs(state=State.QUEUED, queue=seen.queue, tag=(tag, value), limit=ROWS_MOST)
        before = [each for each in queued if each.submitted_at is not None and _ms(each) < seen.since_ms]
        return Tenant(tag, value, len(before), len(queued) >= ROWS_MOST)

    def _limits(self, standing: Sequence[Standing], seen: Visible, work: Position, member: Membership | None) -> None:
        limits = []
        scopes: tuple[tuple[Scope, str], ...] = (("queue", seen.queue), ("task", seen.task))
        for scope, name in scopes:
            told = next((each for each in standing if each.kind == scope and each.limits), None)
            chosen = self._declared(scope, name) if told is None or told.limits is None else told.limits
            if chosen:
                limits.append(self._limit(scope, name, chosen, told, work, member))
        self._facts["limits"] = tuple(limits)

    def _limit(
        self,
        scope: Scope,
        name: str,
        limits: Limits,
        told: Standing | None,
        work: Position,
        member: Membership | None,
    ) -> Limit:
        # With priorities the owner of this partition may have partitions of other lanes, whose groups are not asked.
        mine = None if member is None or self._levels(work) > 1 else member.owned
        running = here = None
        if limits.concurrency is not None:
            filters = {"queue": name} if scope == "queue" else {"task": name}
            statuses = self._try(
                "the running jobs", lambda: self._table.jobs(state=State.RUNNING, limit=ROWS_MOST, **filters)
            )
            if statuses is not None:
                running = len(statuses)
                if mine is not None:
                    records = [self._record_of(each) for each in statuses]
                    here = sum(at is not None and (at.topic, at.partition) in mine for at in records)
        return Limit(
            scope,
            name,
            limits.rate,
            limits.concurrency,
            None if told is None else told.limited,
            None if told is None else told.limited_ms,
            self._partitions(work),
            None if mine is None else len(mine),
            running,
            here,
        )

    def _partitions(self, work: Position) -> int:
        """Return the number of partitions among which the limits of the record's queue are divided."""
        known = self._queue(work)
        if known is not None and known.partitions is not None:
            return known.partitions * len(known.levels)
        number = self._try(
            "the partitions of the queue",
            lambda: partitions_of(self._settings, work.topic, self._left()),
        )
        return number or 1

    def _queue(self, work: Position) -> Queue | None:
        """Return the queue of a work record as the app's code has it."""
        name = self._names.queue_of(work.topic)
        return None if self._registry is None or name is None else self._registry.queues.get(name)

    def _levels(self, work: Position) -> int:
        queue = self._queue(work)
        return 1 if queue is None else len(queue.levels)

    def _work(self, life: Life) -> Position | None:
        """Return the position of the job's work record; None if it has none."""
        at = released_at(life)
        if at is None or self._names.queue_of(at[1]) is None:
            return None
        return Position(*at[1:])

    def _record_of(self, status: JobStatus) -> Position | None:
        """Return the position of the last work record of a job: its positions are in the order of their append
        times."""
        return next((at for at in reversed(status.positions) if self._names.lane_of(at.topic) is not None), None)

    # -- time and errors ----------------------------------------------------------------------------------------------

    def answers(self) -> bool:
        """Return whether the broker answers. Without this check each source would wait for itself."""
        if self._answered is None:
            self._answered = True
            try:
                check_connection(self._settings, min(ANSWER_S, self._left()))
            except (JobledgerError, KafkaException) as exc:
                self._unread.append(f"the log cannot be read: {text_of(exc)}")
                self._answered = False
        return self._answered

    def _decoding(self) -> log_facts.Decode:
        """Return a function that decodes a record, and raises `TimeoutError` if no time is left: so all reading ends
        in time."""
        decode = decoder(self._settings, self._names).decode

        def within(value: bytes | None) -> JobEvent:
            self._left()
            return decode(value)

        return within

    def _left(self) -> float:
        """Return the seconds that are left. Raises `TimeoutError` if no time is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the {LOG_S:g} s for all sources are over")
        return left

    def _try(self, source: str, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except (JobledgerError, KafkaException, TimeoutError) as exc:
            self._unread.append(f"{source}: {text_of(exc)}")
            return None

    def _note(self, name: str, source: str, look: Callable[[], Any]) -> None:
        """Observe one fact; None if its source cannot be read."""
        self._facts[name] = self._try(source, look)

    def _made(self, *, life: Life | None, awaited: Position | None = None) -> Situation:
        unread = tuple(dict.fromkeys(self._unread))
        return Situation(
            job_id=self._job_id, now_ms=_now_ms(), life=life, awaited=awaited, unread=unread, **self._facts
        )


def _ms(status: JobStatus) -> int:
    assert status.submitted_at is not None
    return round(status.submitted_at.timestamp() * 1000)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
