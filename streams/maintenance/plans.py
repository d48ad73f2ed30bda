"""Carries out plans: redrives or cancels the jobs that a plan lists, part by part.

The whole list is in the log before anything is done (`jobledger.plan`), so a plan is carried out even if its caller has
ended. After each part this process writes `PlanAdvanced`. If the process dies before that, the next process carries the
part out again. The status table then shows which jobs of the part were redriven already; a second request to cancel a
job changes nothing.

The action on a job depends on the job's state in the status table. So the table must first have read earlier records:
before the first part in this process, everything that an earlier process wrote; before each part, the records that other
plans have sent. A plan is done only when the table has read all records that the plan has sent.

A job is redriven by a submission of its next run on the coordination topic. The coordinator releases this run at once,
and drops a second submission of the same run. A job is cancelled by a `CancelRequested`, as `App.cancel` writes it. The
job counts as done when the log has acknowledged this request; how the job ends then is not counted.

Only the process whose materializer holds the table lease does this work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec
from confluent_kafka import KafkaException

from jobledger import plan as plans
from jobledger.client.commands import Commands, Job
from jobledger.client.whole_jobs import LOST, WholeJobs
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError, SchemaError, TopicMissing
from jobledger.job import ENDS, Life, State
from jobledger.kafka.outage import log_missed
from jobledger.kafka.topic_names import Names, lane
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.plan import PlanState, PlanStatus
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.schemas import codec
from jobledger.schemas.event_factory import further_run, standalone
from jobledger.schemas.events import (
    JobEvent,
    JobSpec,
    PlanAdvanced,
    PlanListed,
    PlannedJob,
    Position,
    Redrive,
    users_tags,
)
from jobledger.schemas.ids import derived_id
from jobledger.streams.maintenance.current import table_is_current
from jobledger.streams.status.store.protocol import StatusReader
from jobledger.streams.status.store.rows import KEY_MOST, is_changed

LOG = get_logger("jobledger.plans")

#: Seconds between two reads of the plans topic.
TICK_S = 0.25
#: Maximum number of records that are sent before the process waits for their acknowledgements.
AT_ONCE = 500
#: Seconds that a plan waits for the status table in one round.
PATIENCE_S = 5.0


class Verdict(Enum):
    """The decision about a job of a plan."""

    ACT = auto()
    DONE = auto()  # the plan has acted already
    SKIP = auto()  # the job has changed since the plan was made
    UNKNOWN = auto()  # the status table does not know the job


def judge(plan: PlanStatus, job: PlannedJob, life: Life | None) -> Verdict:
    """Return the decision about a job of a plan, by the job's state in the status table."""
    if life is None:
        return Verdict.UNKNOWN
    if plan.action == "redrive":
        redrive = life.head.redrive
        if life.run == job.run + 1 and redrive is not None and redrive[2] == plan.plan:
            return Verdict.DONE
        end = life.end
        return Verdict.ACT if life.run == job.run and end is not None and end.rank != _SUCCEEDED else Verdict.SKIP
    end = life.end
    if life.run != job.run:
        return Verdict.SKIP
    if end is None:
        return Verdict.ACT
    return Verdict.DONE if end.rank == _CANCELLED and end.by == plan.by else Verdict.SKIP


_SUCCEEDED, _CANCELLED = ENDS.index(State.SUCCEEDED), ENDS.index(State.CANCELLED)


@dataclass(slots=True)
class _Part:
    """The part of a plan that is carried out now. ``records``: those still to be sent, one list for each job.
    ``stale``: the plan was paused meanwhile, so the jobs may have changed."""

    number: int
    records: list[list[Outgoing]] = field(default_factory=list)
    done: int = 0
    skipped: int = 0
    failed: int = 0
    error: str | None = None
    stale: bool = False

    def fail(self, job_id: str, why: str) -> None:
        """Count a job for which the action is not possible."""
        self.failed += 1
        self.error = self.error or f"{job_id}: {why}"


class PlanRunner:
    """Carries out the plans of one namespace. ``lanes``: all lanes of the app. ``active``: returns whether this
    process's materializer is the writer of the status table."""

    def __init__(
        self,
        names: Names,
        settings: Settings,
        lanes: Collection[str],
        reader: StatusReader,
        *,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self._names, self._settings, self._lanes = names, settings.acting_as("materializer"), frozenset(lanes)
        self._reader, self._active = reader, active
        self._source = source("plans")
        self._decode = decoder(settings, names).decode
        self._writer: LogWriter | None = None
        self._log: LogReader | None = None
        self._commands = Commands(self._settings, names, self._open_writer, role="plans")
        self._forget()

    def _forget(self) -> None:
        """Forget everything that was read. The next round reads the plans topic from its start."""
        self._next = 0
        self._plans: dict[str, PlanStatus] = {}
        self._offsets: dict[str, list[int]] = {}  # of the parts of each plan that has not ended
        self._parts: dict[str, _Part] = {}
        self._current = False
        # Of each plan: the last position that it has written in each partition of the coordination topic, unless the
        # table is known to have read it.
        self._sent: dict[str, dict[int, Position]] = {}
        self._budgets: dict[str, tuple[float, float]] = {}  # of plans with a rate: jobs, and when they were counted

    def run(self, stop: threading.Event) -> None:
        """Carry out plans until ``stop`` is set. If the broker or the database is unavailable, only the round fails."""
        advanced = False
        try:
            while not stop.wait(0.0 if advanced else TICK_S):
                advanced = False
                try:
                    if self._active():
                        advanced = self.round(stop)
                    elif self._next:
                        self._forget()
                        self.close()
                except TopicMissing as exc:  # of an earlier version: `topics apply` creates it
                    LOG.debug("%s", exc)
                    stop.wait(10.0)
                except BrokerUnavailable as exc:
                    log_missed(LOG, self._settings, "plans wait: %s", exc)
                    self.close()
                except (JobledgerError, KafkaException) as exc:
                    LOG.warning("plans wait: %s", exc)
                    stop.wait(1.0)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connections. The next round opens new ones."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def round(self, stop: threading.Event) -> bool:
        """Read the new facts of plans, and carry out a part of each running plan. Return whether a part was carried out
        to its end, so that the next round need not wait. Raises `JobledgerError`."""
        if self._log is None:
            self._log = LogReader(self._settings)
        log = self._log
        self._follow(log)
        running = [plan for plan in self._plans.values() if plan.state is PlanState.RUNNING]
        if not running:
            return False
        topics = [self._names.coordination, self._names.lifecycle, self._names.plans]
        if not self._current and not table_is_current(self._settings, self._reader, topics, PATIENCE_S):
            return False
        self._current = True
        advanced = False
        for plan in running:
            if stop.is_set() or not self._active():
                return False
            advanced = self._advance(log, plan.plan, stop) or advanced
        return advanced

    def _follow(self, log: LogReader) -> None:
        for message in log.read(self._names.plans, 0, self._next):
            self._next = (message.offset() or 0) + 1
            try:
                record = recorded(message, self._decode)
            except SchemaError as exc:
                LOG.warning("%s[0]@%d is no fact of a plan: %s", self._names.plans, message.offset(), exc)
                continue
            plan_id, before = record.event.job_id, self._plans.get(record.event.job_id)
            plan = plans.apply(before, record)
            if plan is None:
                continue
            if plan.state.ended:
                for known in (self._plans, self._offsets, self._parts, self._budgets):
                    known.pop(plan_id, None)  # but not `_sent`: other plans wait for the table
                if before is not None:
                    self._tell(plan)
                continue
            self._plans[plan_id] = plan
            if plan.state is PlanState.PAUSED and plan_id in self._parts:
                self._parts[plan_id].stale = True
            if before is not None and plan.listed > before.listed:
                self._offsets.setdefault(plan_id, []).append(record.position.offset)

    def _tell(self, plan: PlanStatus) -> None:
        LOG.info(
            "plan %s (%s) %s: done %d, skipped %d, failed %d of %s",
            *(plan.plan, plan.action, plan.state.value, plan.done, plan.skipped, plan.failed),
            counted(plan.matched, "job"),
        )

    # -- one part -----------------------------------------------------------------------------------------------------

    def _advance(self, log: LogReader, plan_id: str, stop: threading.Event) -> bool:
        """Carry out the plan's next part; stop early if the plan was paused or aborted. Return whether the part was
        carried out to its end."""
        plan = self._plans[plan_id]
        part = self._parts.get(plan_id)
        stale = part is not None and part.stale
        if part is None or stale or part.number != plan.next_part:
            if not self._table_reached([each for each in self._sent if stale or each != plan_id], stop):
                return False
            part = self._parts[plan_id] = self._prepared(log, plan)
        while part.records:
            size = AT_ONCE if plan.rate is None else min(AT_ONCE, self._allowed(plan_id, plan.rate))
            if size == 0:
                return False  # the rate allows no more jobs for now: continue with other plans
            some, part.records = part.records[:size], part.records[size:]
            try:
                sent = self._open_writer().send([record for records in some for record in records])
            except JobledgerError:
                part.records = some + part.records  # they are sent again; a second copy is dropped
                raise
            part.done += len(some)
            if plan.rate is not None:
                self._budgets[plan_id] = (self._budgets[plan_id][0] - len(some), self._budgets[plan_id][1])
            for position in sent:
                if position.topic == self._names.coordination:
                    self._sent.setdefault(plan_id, {})[position.partition] = position
            self._follow(log)
            if self._plans.get(plan_id) is None or self._plans[plan_id].state is not PlanState.RUNNING:
                return False
            if stop.is_set() or not self._active():
                return False
        # When a plan is done, the status table must show what the plan did.
        if part.number + 1 == plan.parts and not self._table_reached([plan_id], stop):
            return False
        fact = PlanAdvanced(part.number, part.done, part.skipped, part.failed, part.error)
        event = standalone(fact, derived_id(plan_id, "advanced", part.number), now_us(), self._source, job_id=plan_id)
        self._open_writer().send([Outgoing(self._names.plans, codec.encode(event), plan_id, 0)])
        return True

    def _allowed(self, plan_id: str, rate: float) -> int:
        """Return how many jobs of a plan with a rate may be acted on now. This number grows with the time, up to the
        number that the rate allows in a second."""
        now = time.monotonic()
        budget, at = self._budgets.get(plan_id, (1.0, now))
        budget = min(budget + (now - at) * rate, max(1.0, rate))
        self._budgets[plan_id] = (budget, now)
        return int(budget)

    def _table_reached(self, plan_ids: Collection[str], stop: threading.Event) -> bool:
        """Return whether the table has read all that these plans have sent; wait up to `PATIENCE_S` seconds for it."""
        deadline = time.monotonic() + PATIENCE_S
        for plan_id in plan_ids:
            while not all(map(self._reader.reached, self._sent.get(plan_id, {}).values())):
                if stop.wait(0.02) or time.monotonic() > deadline:
                    return False  # the next round waits again
            self._sent.pop(plan_id, None)
        return True

    def _prepared(self, log: LogReader, plan: PlanStatus) -> _Part:
        """Return the plan's next part with the records to send."""
        part = _Part(plan.next_part)
        listed = self._listed(log, plan)
        lives = self._reader.lives_of([job.job_id for job in listed])
        wanted: list[tuple[PlannedJob, Life]] = []
        for job in listed:
            if is_changed(job.job_id):
                part.fail(
                    job.job_id, f"the status table does not store the whole id, which has over {KEY_MOST} characters"
                )
                continue
            life = lives.get(job.job_id)
            match judge(plan, job, life):
                case Verdict.UNKNOWN:
                    part.fail(job.job_id, "the status table does not know it")
                case Verdict.DONE:
                    part.done += 1
                case Verdict.SKIP:
                    part.skipped += 1
                case Verdict.ACT:
                    assert life is not None
                    wanted.append((job, life))
        if plan.action == "cancel":
            part.records = self._cancels(plan, wanted)
        else:
            self._redrives(log, plan, wanted, part)
        return part

    def _listed(self, log: LogReader, plan: PlanStatus) -> Sequence[PlannedJob]:
        offset = self._offsets[plan.plan][plan.next_part]
        message = log.at(Position(self._names.plans, 0, offset))
        fact = None if message is None else recorded(message, self._decode).event.fact
        if not isinstance(fact, PlanListed):
            raise JobledgerError(f"part {plan.next_part} of plan {plan.plan} is no longer at offset {offset}")
        return fact.jobs

    def _cancels(self, plan: PlanStatus, wanted: Iterable[tuple[PlannedJob, Life]]) -> list[list[Outgoing]]:
        jobs = [Job(job.job_id, job.run, life.head.task, life.head.queue) for job, life in wanted]
        records = [record for batch in self._commands.cancels(jobs, plan.reason, plan.by) for record in batch]
        return [records[n : n + 2] for n in range(0, len(records), 2)]

    # -- redrives -----------------------------------------------------------------------------------------------------

    def _redrives(
        self, log: LogReader, plan: PlanStatus, wanted: Sequence[tuple[PlannedJob, Life]], part: _Part
    ) -> None:
        whole = WholeJobs(log, self._settings, self._names, self._decode, {job.job_id: life for job, life in wanted})
        for job, _ in wanted:
            origin = whole.find(job.job_id)
            if origin is None:
                part.fail(job.job_id, LOST)
                continue
            record = self._redriven(plan, job, *origin)
            size = len(record.value or b"")
            if size > self._settings.max_record_bytes:
                part.fail(job.job_id, f"its submission has {size} bytes, above JOBLEDGER_MAX_RECORD_BYTES")
            else:
                part.records.append([record])

    def _redriven(self, plan: PlanStatus, job: PlannedJob, origin: JobEvent, spec: JobSpec) -> Outgoing:
        """Return the submission of the job's next run."""
        queue, run = plan.queue or origin.queue, job.run + 1
        priority = spec.priority if lane(queue, spec.priority) in self._lanes else None
        tags = users_tags(spec.tags)
        # An expiry in milliseconds counts from the new submission. One as a time belonged to the run before.
        spec = msgspec.structs.replace(spec, tags=tags, priority=priority, expires_at=None)
        asked = Redrive(plan.by, plan.reason, plan.plan)
        event = further_run(origin, run, queue, spec, asked, now_us(), self._source)
        return Outgoing(self._names.coordination, codec.encode(event), job.job_id)

    def _open_writer(self) -> LogWriter:
        if self._writer is None:
            self._writer = LogWriter(self._settings, self._names, linger_ms=5.0)
        return self._writer
