"""Periodic maintenance in the process of the active materializer: the watchdog, the commit check, trimming, and the
removal of old cancels, of old rows and of workers that are gone. (`jobledger.streams.maintenance.plans` carries out the
plans.)

* The **watchdog** finds jobs that are due and were not released, and asks the coordinator to check them
  (`ReleaseOverdue`); the coordinator decides. The watchdog first reads the ends of the topics. It acts only if the
  status table reaches these ends.
* The **commit check** counts work records below a worker group's committed offset that no fact closes. The count must
  be 0.
* **Trimming** deletes records past the retention age that every reader has read (`jobledger.streams.maintenance.trim`).
  Readers are workers, the coordinator, the status table, projections of facts in the same database, and the groups of
  `App.lifecycle`.
* **Rows** of jobs that ended before the retention of the table are removed by the materializer, when this module asks
  for it (`jobledger.streams.maintenance.table_rows`).
* The facts of **plans** that ended before the retention age are deleted, too
  (`jobledger.streams.maintenance.plan_trimming`).
* **Cancels** of runs that have ended are removed from the control topic (`jobledger.streams.maintenance.cancels`).
* **Workers** that are gone are removed from the status table, and their reports from the topic
  (`jobledger.streams.maintenance.workers`).

Ages are counted by the broker's clock (`jobledger.streams.maintenance.present`).

Only the process whose materializer holds the table lease does this work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from confluent_kafka import KafkaException, TopicPartition

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError, SchemaError, TopicMissing
from jobledger.job import Life, released_at
from jobledger.kafka.auth import Need
from jobledger.kafka.clients import admin, answer_of, partitions_of, translate
from jobledger.kafka.outage import log_missed
from jobledger.kafka.topic_names import Names
from jobledger.log import group_offsets
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.extras import missing
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.schemas import codec
from jobledger.schemas.event_factory import derived
from jobledger.schemas.events import (
    JobDue,
    JobEvent,
    JobSpec,
    JobSubmitted,
    Position,
    ReleaseOverdue,
    lasting,
    later,
)
from jobledger.streams.coordinator.decoding import check_head
from jobledger.streams.maintenance import cancels, table_rows
from jobledger.streams.maintenance.current import table_is_current
from jobledger.streams.maintenance.plan_trimming import trim_point
from jobledger.streams.maintenance.present import present_ms
from jobledger.streams.maintenance.trim import Partition, Readers, plan
from jobledger.streams.maintenance.workers import GoneWorkers
from jobledger.streams.projections.projection_store import folded
from jobledger.streams.status.remover import Remover
from jobledger.streams.status.store.protocol import Overdue, StatusReader
from jobledger.streams.status.store.rows import key_text

try:
    from prometheus_client import Counter, Gauge
except ImportError as exc:
    raise missing("streams", exc) from exc

T = TypeVar("T")

LOG = get_logger("jobledger.maintenance")

UNCLOSED = Gauge(
    "jobledger_unclosed_records",
    "Work records below a committed offset that no fact closes. Must be 0.",
    ["namespace"],
)
COMMITS_CHECKED = Gauge(
    "jobledger_commit_check_time_seconds",
    "Time of the last commit check that had a result, in seconds since the epoch.",
    ["namespace"],
)
ASKED = Counter(
    "jobledger_watchdog_overdue", "Overdue releases about which the watchdog asked the coordinator.", ["namespace"]
)
TRIMMED = Counter("jobledger_trimmed_records", "Records deleted past the retention age.", ["namespace", "topic"])

#: Largest number of seconds from the start to the first round: a process that is started again every hour trims, too.
FIRST_S = 300.0
#: Largest number of overdue releases that one round of the watchdog checks.
OVERDUE_PAGE = 1_000
#: Timeout in seconds of a request to delete records.
DELETE_TIMEOUT_S = 30.0
#: Largest number of open jobs that one commit check reads. The oldest jobs are checked first: a lost job becomes the
#: oldest when other jobs end.
COMMIT_CHECK_MOST = 10_000
#: Nothing is trimmed if this many or more unfinished jobs are past the retention age.
UNFINISHED_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Cadence:
    """Times in seconds. ``…_every``: between two rounds. ``overdue_after``: how late a release may be before the
    watchdog asks the coordinator. ``patience``: how long to wait until the table is current. ``retention``: age of
    records to delete. ``table_retention``: by state, how long after its end the row of a job is kept. ``gone_after``:
    how long after its last report a worker counts as gone."""

    watch_every: float = 10.0
    commit_check_every: float = 15.0
    trim_every: float = 3600.0
    rows_every: float = 300.0
    workers_every: float = 60.0
    overdue_after: float = 30.0
    patience: float = 30.0
    retention: float = 90 * 24 * 3600.0
    table_retention: Mapping[str, float] = field(default_factory=dict)
    gone_after: float = 600.0


class Maintenance:
    """Runs the maintenance of one namespace. ``active``: returns whether this process's materializer is the store's
    writer; if it is not, rounds are skipped. ``remover``, ``forget_workers``: of this process's
    materializer; without a remover no rows are removed."""

    def __init__(
        self,
        names: Names,
        settings: Settings,
        lanes: Sequence[str],
        reader: StatusReader,
        *,
        cadence: Cadence | None = None,
        active: Callable[[], bool] = lambda: True,
        remover: Remover | None = None,
        forget_workers: Callable[[int], None] = lambda before_ms: None,
    ) -> None:
        settings = settings.acting_as("materializer")
        self.names, self.settings, self.lanes = names, settings, list(lanes)
        self.cadence = cadence or Cadence(
            retention=settings.retention_days * 24 * 3600.0, table_retention=settings.table_retention
        )
        self._reader, self._active, self._remover = reader, active, remover
        self._asked_at: dict[tuple[str, int, int], float] = {}
        self._last_checked: Overdue | None = None  # the last overdue release that the watchdog checked
        self._writer: LogWriter | None = None
        self._source = source("watchdog")
        self._decode = decoder(settings, names).decode
        self._gone_workers = GoneWorkers(names, reader, self._send, forget_workers, self.cadence.gone_after)

    def run(self, stop: threading.Event) -> None:
        """Run rounds until ``stop`` is set. If the broker or the database is unavailable, only the round fails."""
        rounds: list[tuple[str, float, Callable[[], object]]] = [
            ("watchdog", self.cadence.watch_every, self.watch),
            ("commit check", self.cadence.commit_check_every, self.check_commits),
            ("trimming", self.cadence.trim_every, self.trim),
            ("trimming of plans", self.cadence.trim_every, self.trim_plans),
            ("cancels", self.cadence.trim_every, self.forget_cancels),
            ("removal of rows", self.cadence.rows_every, self.remove_rows),
            ("workers", self.cadence.workers_every, self.remove_workers),
        ]
        due = {name: time.monotonic() + min(every, FIRST_S) for name, every, _ in rounds}
        try:
            while not stop.wait(max(0.05, min(due.values()) - time.monotonic())):
                for name, every, work in rounds:
                    if time.monotonic() < due[name] or stop.is_set():
                        continue
                    try:
                        if self._active():
                            work()
                    except BrokerUnavailable as exc:
                        log_missed(
                            LOG, self.settings, "%s round failed, the next follows in %g s: %s", name, every, exc
                        )
                    except (JobledgerError, KafkaException) as exc:
                        LOG.warning("%s round failed, the next follows in %g s: %s", name, every, exc)
                    due[name] = time.monotonic() + every
        finally:
            self.close()

    def close(self) -> None:
        """Close the writer's connection."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # -- the watchdog ---------------------------------------------------------------------------------------------

    def watch(self) -> int:
        """Check one page of overdue releases, and ask the coordinator about those that are still overdue after their
        submissions were read. Return the number of requests sent.

        The watchdog does not ask again about a release within a minute, or within ``overdue_after`` if that is longer.
        """
        bound_ms = int(self.cadence.overdue_after * 1000)
        now_ms = time.time_ns() // 1_000_000
        # Each round checks the next page, so that jobs that can no longer be released do not hide the jobs after them.
        after = self._last_checked
        page = self._reader.overdue(now_ms, bound_ms, OVERDUE_PAGE, after)
        if not page and after is not None:
            after = None
            page = self._reader.overdue(now_ms, bound_ms, OVERDUE_PAGE, after)
        candidates = {(o.job_id, o.run, o.release): o for o in page}
        if not candidates:
            return 0
        if not self._current(self._topics()):
            LOG.info(
                "releases look overdue, but the status table is behind the log: the watchdog waits (%s)",
                counted(len(candidates), "release"),
            )
            return 0
        self._last_checked = page[-1] if len(page) == OVERDUE_PAGE else None
        again_before = time.monotonic() - max(60.0, self.cadence.overdue_after)
        self._asked_at = {k: t for k, t in self._asked_at.items() if t > again_before}
        wanted = {key: overdue for key, overdue in candidates.items() if key not in self._asked_at}
        if not wanted:
            return 0
        with LogReader(self.settings) as log:
            records = {key: self._ask(log, overdue) for key, overdue in wanted.items()}
        # Only now, because reading the log may take seconds in which some of these jobs end.
        again = self._reader.overdue(now_ms, bound_ms, OVERDUE_PAGE, after)
        still = {(o.job_id, o.run, o.release) for o in again}
        requests = [record for key, record in records.items() if record is not None and key in still]
        if requests:
            LOG.warning("overdue releases about which the watchdog asks the coordinator: %d", len(requests))
            self._send(requests)
            ASKED.labels(self.names.namespace).inc(len(requests))
        for key in still.intersection(wanted):
            self._asked_at[key] = time.monotonic()
        return len(requests)

    def _ask(self, log: LogReader, overdue: Overdue) -> Outgoing | None:
        origin_and_spec = None if overdue.spec_at is None else self._event_at(log, overdue.spec_at)
        if origin_and_spec is None or key_text(origin_and_spec[0].job_id) != overdue.job_id:  # the topic was recreated
            LOG.error("job %s is overdue and the log no longer holds it: nothing can release it", overdue.job_id)
            return None
        origin, spec = origin_and_spec
        # Use the id from the log: the table stores a long id as its first characters and a digest.
        release = msgspec.structs.replace(origin, run=overdue.run, attempt=overdue.attempt, release=overdue.release)
        fact = ReleaseOverdue(spec, max(overdue.due_ms, 0) * 1000)  # a record may contain any number
        event = derived(release, "overdue", fact, now_us(), self._source)
        return Outgoing(self.names.coordination, codec.encode(event), origin.home or origin.job_id)

    def _event_at(self, log: LogReader, position: Position) -> tuple[JobEvent, JobSpec] | None:
        message = log.at(position)
        if message is None:
            return None
        try:
            record = recorded(message, self._decode)
            check_head(record.event)  # do not ask about events that the coordinator refuses
        except SchemaError:
            return None
        fact = record.event.fact
        return (
            (record.event, lasting(fact.spec, record.appended_ms)) if isinstance(fact, JobSubmitted | JobDue) else None
        )

    # -- the commit check -----------------------------------------------------------------------------------------

    def check_commits(self) -> int | None:
        """Return the number of work records below a committed offset that no fact closes; None if the table is not
        current."""
        committed = {
            position: c.offset
            for position, c in group_offsets.worker_commits(self.settings, self.names, self.lanes).items()
        }
        if not self._current([self.names.lifecycle]):
            return None
        unclosed = 0
        for job_id, life in self._reader.open_lives(COMMIT_CHECK_MOST):
            position = work_position(life, self.names)
            if life.leased is not None and life.leased.release >= (0 if life.due is None else life.due.release):
                continue  # a job lease replaces the work record
            if position is not None and position.offset < committed.get((position.topic, position.partition), 0):
                unclosed += 1
                if unclosed <= 10:
                    LOG.error(
                        "commit check: the work record of job %s at %s is below the committed offset, but no fact closes it",
                        job_id,
                        position,
                    )
        UNCLOSED.labels(self.names.namespace).set(unclosed)
        COMMITS_CHECKED.labels(self.names.namespace).set(time.time())
        return unclosed

    # -- cancels --------------------------------------------------------------------------------------------------

    def forget_cancels(self) -> int:
        """Remove cancels of runs that have ended from the control topic; return the number of these cancels."""
        removed = self._reader.removed()
        with LogReader(self.settings) as log:
            standing = cancels.standing(log, self.names, self._decode)
        done = list(cancels.tombstones(standing, self.names, self._reader, max(removed.values(), default=0)))
        if done:
            self._send(done)
        return len(done)

    # -- rows of ended jobs ---------------------------------------------------------------------------------------

    def remove_rows(self) -> bool:
        """Ask the materializer to remove the rows past their retention; return whether it accepted the order."""
        if self._remover is None or self._remover.busy or not self.cadence.table_retention:
            return False
        order = table_rows.order(
            self.settings,
            self.names,
            self._reader,
            self.cadence.table_retention,
            self._now_ms(),
            self.cadence.patience,
        )
        return order is not None and self._remover.ask(order)

    # -- workers --------------------------------------------------------------------------------------------------

    def remove_workers(self) -> int:
        """Remove workers without a report for ``gone_after`` seconds; return their number."""
        # First by this machine's clock, which costs no record.
        if not self._gone_workers.any(time.time_ns() // 1_000_000):
            return 0
        return self._gone_workers.remove(self._now_ms(), self._current)

    # -- trimming -------------------------------------------------------------------------------------------------

    def trim(self) -> dict[Partition, int]:
        """Delete the records past the retention age that every reader has read. Return the new log start of each
        trimmed partition."""
        cutoff_ms = self._now_ms() - int(self.cadence.retention * 1000)
        commits = {
            **group_offsets.worker_commits(self.settings, self.names, self.lanes),
            **group_offsets.group_offsets(self.settings, self.names.coordinator_group, self.names.coordination),
        }
        starts, aged = self._aged(cutoff_ms)
        if not aged:
            return {}
        # Get the readers' offsets before the unfinished jobs: a job that the table reads in between would otherwise be
        # missed. Wait until the table is current: a job that is unfinished in an outdated table may have ended, and
        # would run again if its submission were sent again.
        done = self._done(aged, starts, commits)
        readers = Readers.least(aged, self._reader.offsets(), done, *self._followers(aged))
        if not self._current(self._topics()):
            LOG.info("the status table is behind the log: nothing is trimmed")
            return {}
        unfinished = list(self._reader.open_lives(UNFINISHED_MOST, waiting=True, before_ms=cutoff_ms))
        if len(unfinished) >= UNFINISHED_MOST:
            LOG.warning(
                "%d or more jobs are past the retention age and have not ended: nothing is trimmed", UNFINISHED_MOST
            )
            return {}
        todo = plan(aged, readers, unfinished)
        if todo.resend:
            self._resend(todo.resend)
        limits = {place: limit for place, limit in todo.limits.items() if limit > starts[place]}
        self._delete(limits)
        for (topic, partition), limit in limits.items():
            TRIMMED.labels(self.names.namespace, topic).inc(limit - starts[topic, partition])
        return limits

    def trim_plans(self) -> int:
        """Delete the facts of plans that ended before the retention age. Return the number of deleted records."""
        cutoff_ms = self._now_ms() - int(self.cadence.retention * 1000)
        place = (self.names.plans, 0)
        read = self._reader.offsets().get(place, 0)
        try:
            with LogReader(self.settings) as log:
                start, limit = trim_point(log, self.names, self._decode, read, cutoff_ms)
        except TopicMissing as exc:  # of an earlier version: `topics apply` creates it
            LOG.debug("%s", exc)
            return 0
        if limit > start:
            self._delete({place: limit})
            TRIMMED.labels(self.names.namespace, self.names.plans).inc(limit - start)
        return limit - start

    def _aged(self, cutoff_ms: int) -> tuple[dict[Partition, int], dict[Partition, int]]:
        """Return the first offset of every partition; and of each partition with records from before ``cutoff_ms``,
        the offset at this time."""
        starts: dict[Partition, int] = {}
        aged: dict[Partition, int] = {}
        with LogReader(self.settings) as log:
            for topic in self._topics():
                for partition in range(partitions_of(self.settings, topic)):
                    starts[topic, partition] = log.bounds(topic, partition)[0]
                    aged[topic, partition] = log.offset_at(topic, partition, cutoff_ms)
        return starts, {place: offset for place, offset in aged.items() if offset > starts[place]}

    def _done(
        self,
        aged: Mapping[Partition, int],
        existing: Collection[Partition],
        commits: Mapping[Partition, group_offsets.Committed],
    ) -> dict[Partition, int]:
        """Return the offset up to which the workers and the coordinator need no more records, for each partition of
        ``aged``. A partition is left out if it is not known. ``existing``: all partitions."""
        work = [self.names.jobs(lane) for lane in self.lanes]
        done: dict[Partition, int] = {}
        for topic, partition in aged:
            if topic == self.names.lifecycle:
                # Every queue that has this partition number must have committed its takeover floor.
                owners = [commits.get((t, partition)) for t in work if (t, partition) in existing]
                floors = [c.floor for c in owners if c is not None and c.floor is not None]
                if owners and len(floors) == len(owners):
                    done[topic, partition] = min(floors)
            elif (topic, partition) in commits:
                done[topic, partition] = commits[topic, partition].offset
        return done

    def _followers(self, aged: Mapping[Partition, int]) -> Iterator[Mapping[Partition, int]]:
        """Yield, for each projection and each group of `App.lifecycle`, the next offsets in the partitions of ``aged``.

        A projection of facts counts for every topic as soon as it has stored an offset. A group counts for the topics
        of which it has committed an offset. A partition of these topics that the reader has not read counts as 0. If a
        reader has not read all records past the retention age, its name is logged, because the reader may be unused.
        """
        facts = {*self._topics(), self.names.dead_letter, self.names.control}
        url = self.settings.resolve_status_url(self.names.namespace)
        followers: dict[str, dict[Partition, int]] = {}
        for name, at in folded(url, self.names.namespace).items():
            if any(topic in facts for topic, _ in at):
                followers[f"projection {name}"] = {place: at.get(place, 0) for place in aged}
        for group in group_offsets.lifecycle_groups(self.settings, self.names):
            read = followers[f"group {group}"] = dict(aged)
            for topic in {topic for topic, _ in aged}:
                done = group_offsets.group_offsets(self.settings, group, topic)
                for place in [place for place in aged if place[0] == topic and done]:
                    read[place] = done[place].offset if place in done else 0
        for follower, read in followers.items():
            behind = sorted(place for place in aged if read[place] < aged[place])
            if behind:
                LOG.warning(
                    "trimming waits for %s: it has not read the records past the retention age on %s (the first: "
                    "%s[%d] from offset %d on). Run it. If it no longer exists, see \"keep the log from growing\" in "
                    "docs/how-to.md",
                    follower, counted(len(behind), "partition"), *behind[0], read[behind[0]],
                )  # fmt: skip
            yield read

    def _resend(self, submissions: Mapping[str, Position]) -> None:
        """Send the submissions of waiting jobs again, to the log's end, with the same ids and an absolute due time.
        ``submissions``: positions by the job ids of the table."""
        records = []
        with LogReader(self.settings) as log:
            for job_id, position in submissions.items():
                message = log.at(position)
                if message is None:
                    continue
                record = recorded(message, self._decode)
                fact = record.event.fact
                if not isinstance(fact, JobSubmitted) or key_text(record.event.job_id) != job_id:
                    continue  # another record: the topic was deleted and recreated
                due_at = fact.due_at
                if due_at is None:
                    due_at = later(record.appended_ms, fact.delay_ms or 0)
                event = msgspec.structs.replace(
                    record.event,
                    fact=JobSubmitted(lasting(fact.spec, record.appended_ms), None, due_at, fact.redrive),
                )
                records.append(Outgoing(position.topic, codec.encode(event), event.home or event.job_id))
        self._send(records)

    def _delete(self, limits: dict[Partition, int]) -> None:
        if not limits:
            return
        wanted = [TopicPartition(topic, partition, offset) for (topic, partition), offset in limits.items()]
        client = admin(self.settings)  # keep a reference: a garbage-collected client never completes its futures
        for at, future in client.delete_records(wanted, request_timeout=DELETE_TIMEOUT_S).items():
            try:
                answer_of(future, DELETE_TIMEOUT_S)
            except KafkaException as exc:
                delete = Need("Delete", "topic", at.topic)
                raise translate(exc.args[0], self.settings, f"trimming {at.topic}", delete) from exc

    # -- shared ---------------------------------------------------------------------------------------------------

    def _topics(self) -> list[str]:
        return [*(self.names.jobs(lane) for lane in self.lanes), self.names.lifecycle, self.names.coordination]

    def _current(self, topics: Collection[str]) -> bool:
        return table_is_current(self.settings, self._reader, topics, self.cadence.patience)

    def _now_ms(self) -> int:
        """Return the present time in ms, never later than that of the broker's clock."""
        return self._with_writer(lambda writer: present_ms(writer, self.names))

    def _send(self, records: list[Outgoing]) -> None:
        self._with_writer(lambda writer: writer.send(records))

    def _with_writer(self, does: Callable[[LogWriter], T]) -> T:
        if self._writer is None:
            self._writer = LogWriter(self.settings, self.names)
        try:
            return does(self._writer)
        except BrokerUnavailable:
            self.close()
            raise


def work_position(life: Life, names: Names) -> Position | None:
    """Return the position of the work record of a life's last release; None if the life has no such record on a work
    topic."""
    at = released_at(life)
    if at is None or names.queue_of(at[1]) is None:
        return None
    return Position(at[1], at[2], at[3])
