"""Facts about one job at this moment from the log and the consumer groups, for an explanation. Writes nothing.

Every function reads a bounded number of records, and takes the seconds that it may wait for the broker. All raise
`BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, Message

from jobledger.config import Settings
from jobledger.errors import SchemaError
from jobledger.job import Start
from jobledger.kafka.auth import Need
from jobledger.kafka.clients import admin, answer_of, partitions_of, translate
from jobledger.kafka.partitioner import partition_of
from jobledger.kafka.topic_names import Names
from jobledger.log.commit_metadata import decode
from jobledger.log.group_offsets import group_offsets
from jobledger.log.reading import LogReader, recorded
from jobledger.plan import PlanStatus
from jobledger.schemas.events import (
    JobEvent,
    JobLeased,
    JobStarted,
    Leased,
    LeaseRenewed,
    PlanListed,
    Position,
    Recorded,
    settles,
)
from jobledger.situation import Coordinator, Group, Lag, Lease, Pace, Place, PlanWait

Decode = Callable[[bytes | None], JobEvent]

#: Maximum number of records that one function reads.
READ_MOST = 5_000
#: The time over which the pace of a partition is measured, in ms.
PACE_MS = 60_000

_SETTLING = (
    ConsumerGroupState.PREPARING_REBALANCING,
    ConsumerGroupState.COMPLETING_REBALANCING,
    getattr(ConsumerGroupState, "ASSIGNING", ConsumerGroupState.PREPARING_REBALANCING),
    getattr(ConsumerGroupState, "RECONCILING", ConsumerGroupState.PREPARING_REBALANCING),
)


class Membership(NamedTuple):
    """A group, and the partitions that the owner of one partition has. ``owned`` None: the partition has no owner, or
    the partition is not known."""

    group: Group
    owned: frozenset[tuple[str, int]] | None


def membership(settings: Settings, name: str, at: tuple[str, int] | None, timeout: float) -> Membership:
    """Return the number of members of a consumer group, and whether a member has the partition ``at``."""
    client = admin(settings)  # kept in a variable: without the client its answers are lost
    try:
        described = answer_of(client.describe_consumer_groups([name], request_timeout=timeout)[name], timeout)
    except KafkaException as exc:
        if exc.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:  # no member has ever joined it
            return Membership(Group(name, 0, None if at is None else False), None)
        need = Need("Describe", "group", name)
        raise translate(exc.args[0], settings, f"asking for the members of group {name}", need) from exc
    assigned = [
        frozenset((each.topic, each.partition) for each in member.assignment.topic_partitions)
        for member in described.members
        if member.assignment is not None
    ]
    owned = next((partitions for partitions in assigned if at in partitions), None)
    settling = described.state in _SETTLING
    group = Group(name, len(described.members), None if at is None else owned is not None, settling)
    return Membership(group, owned)


def place(
    settings: Settings, names: Names, log: LogReader, work: Position, started: Collection[int], timeout: float
) -> Place:
    """Return where a work record is in its partition. ``started``: offsets of the records of the partition whose jobs
    are known to run."""
    lane = names.lane_of(work.topic) or ""
    commit = group_offsets(settings, names.worker_group(lane), work.topic, timeout).get((work.topic, work.partition))
    low, high = log.bounds(work.topic, work.partition, timeout)
    first = low if commit is None else max(low, commit.offset)
    ranges = () if commit is None else decode(commit.offset, commit.metadata, high).done
    done = [(max(start, first), min(end, work.offset)) for start, end in ranges]
    before = max(0, work.offset - first) - sum(max(0, end - start) for start, end in done)
    finished = work.offset < first or any(start <= work.offset < end for start, end in ranges)
    running = {
        offset
        for offset in started
        if first <= offset < work.offset and not any(start <= offset < end for start, end in ranges)
    }
    return Place(work, finished, max(0, before), min(len(running), max(0, before)))


class Starts(NamedTuple):
    """The pace of a partition, and the offsets of the work records whose jobs were started and have not ended."""

    pace: Pace
    open: frozenset[int]


def starts(
    names: Names, log: LogReader, decode_event: Decode, work: Position, task: str, now_ms: int, timeout: float
) -> Starts:
    """Return how many jobs of the record's work partition were started in the last minute, from at most `READ_MOST`
    facts of the lifecycle partition with the same number."""
    first_ms: int | None = None
    started: dict[int, tuple[str, int, int]] = {}
    ended: set[tuple[str, int, int]] = set()
    of_task = 0
    begin, end = _since(log, names.lifecycle, work.partition, now_ms - PACE_MS, timeout)
    for record in _records(log, decode_event, names.lifecycle, work.partition, begin, end, timeout):
        event, fact = record.event, record.event.fact
        release = (event.job_id, event.run, event.release)
        if isinstance(fact, JobStarted):
            if fact.work_topic != work.topic or fact.work_offset in started:
                continue
            started[fact.work_offset] = release
            of_task += event.task == task
            first_ms = record.appended_ms if first_ms is None else first_ms
        elif settles(fact):
            ended.add(release)
    seconds = PACE_MS / 1000 if first_ms is None else max(1.0, (now_ms - first_ms) / 1000)
    still = frozenset(offset for offset, release in started.items() if release not in ended)
    return Starts(Pace(len(started), of_task, seconds), still)


def lag(
    log: LogReader, partitions: Iterable[tuple[str, int]], read: Mapping[tuple[str, int], int], timeout: float
) -> Lag:
    """Return how far the status table is behind these partitions. ``read``: the table's next offsets."""
    records, oldest = 0, None
    for topic, partition in partitions:
        low, high = log.bounds(topic, partition, timeout)
        following = max(low, read.get((topic, partition), 0))
        if following >= high:
            continue
        records += high - following
        for message in log.read(topic, partition, following, following + 1, stall=timeout):
            appended = message.timestamp()[1]
            oldest = appended if oldest is None else min(oldest, appended)
    return Lag(records, oldest)


def coordinator(settings: Settings, names: Names, log: LogReader, partition: int, timeout: float) -> Coordinator:
    """Return how far the coordinator is behind a partition of the coordination topic, and whether one runs."""
    members = membership(settings, names.coordinator_group, None, timeout).group.members
    at = (names.coordination, partition)
    commit = group_offsets(settings, names.coordinator_group, names.coordination, timeout).get(at)
    behind = lag(log, [at], {} if commit is None else {at: commit.offset}, timeout)
    return Coordinator(members, behind.records, behind.since_ms)


def home_partition(settings: Settings, names: Names, job_id: str, known: Iterable[Position], timeout: float) -> int:
    """Return the partition of the coordination topic that has the job's records. ``known``: the positions of its
    facts."""
    for position in known:
        if position.topic == names.coordination:
            return position.partition
    return partition_of(job_id.encode(), partitions_of(settings, names.coordination, timeout))


def lease(
    names: Names, log: LogReader, decode_event: Decode, job: tuple[str, int], leased: Start, home: int, timeout: float
) -> Lease | None:
    """Return the job lease of a running long job: when it was last renewed, from at most `READ_MOST` last records of
    the job's partition of the coordination topic. None if its `JobLeased` is not in the log any more. ``job``: id and
    run."""
    _, topic, partition, offset = leased.at
    held: Lease | None = None
    for record in _records(log, decode_event, topic, partition, offset, offset + 1, timeout):
        fact = record.event.fact
        if isinstance(fact, JobLeased) and (record.event.job_id, record.event.run) == job:
            held = Lease(fact.worker, record.appended_ms, fact.lease_ms)
    if held is None:
        return None
    begin, end = _since(log, names.coordination, home, held.renewed_ms, timeout)
    for record in _records(log, decode_event, names.coordination, home, begin, end, timeout):
        event, fact = record.event, record.event.fact
        mine = (event.job_id, event.run) == job and event.release == leased.release
        if mine and isinstance(fact, Leased | LeaseRenewed):
            held = Lease(fact.worker, record.appended_ms, fact.lease_ms)
    return held


def plans_with(
    names: Names,
    log: LogReader,
    decode_event: Decode,
    plans: Iterable[PlanStatus],
    job: tuple[str, int],
    timeout: float,
) -> tuple[list[PlanWait], bool]:
    """Return those of these plans that have not ended and that list the job's run in a part that was not carried out
    yet; and whether all of their parts were read. ``job``: id and run."""
    active = {plan.plan: plan for plan in plans if not plan.state.ended}
    waits: dict[str, PlanWait] = {}
    if not active:
        return [], True
    oldest = min(plan.opened_ms for plan in active.values())
    begin = log.offset_at(names.plans, 0, oldest, timeout)
    end = log.bounds(names.plans, 0, timeout)[1]
    last = min(end, begin + READ_MOST)
    for record in _records(log, decode_event, names.plans, 0, begin, last, timeout):
        plan, fact = active.get(record.event.job_id), record.event.fact
        if plan is None or not isinstance(fact, PlanListed) or fact.part < plan.next_part:
            continue
        if any((each.job_id, each.run) == job for each in fact.jobs):
            said = f"by {plan.by}" + (f": {plan.reason}" if plan.reason else "")
            waits[plan.plan] = PlanWait(plan.plan, plan.action, plan.state.value, said, plan.opened_ms, plan.steered)
    return list(waits.values()), last == end


def _since(log: LogReader, topic: str, partition: int, ms: int, timeout: float) -> tuple[int, int]:
    """Return the range of offsets that were appended at or after a time, but at most the last `READ_MOST`."""
    begin = log.offset_at(topic, partition, ms, timeout)
    end = log.bounds(topic, partition, timeout)[1]
    return max(begin, end - READ_MOST), end


def _records(
    log: LogReader, decode_event: Decode, topic: str, partition: int, begin: int, end: int, timeout: float
) -> Iterator[Recorded]:
    """Yield the events of a range, without records that are not events."""
    if begin >= end:
        return
    for message in log.read(topic, partition, begin, end, stall=timeout):
        record = _event(message, decode_event)
        if record is not None:
            yield record


def _event(message: Message, decode_event: Decode) -> Recorded | None:
    try:
        return recorded(message, decode_event)
    except SchemaError:
        return None
