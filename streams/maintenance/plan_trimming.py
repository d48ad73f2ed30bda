"""Computes how far the topic of plans may be trimmed. Deletes nothing itself.

All facts of all plans are in one partition, in which the facts of several plans may be mixed. So the partition is
trimmed up to the first fact of the oldest plan that is still needed. A plan is needed while it has not ended, and until
its end is older than the retention. A plan whose list was never completed is carried out by nobody: such a plan is needed
until its last fact is older than the retention.

The status table keeps the rows of plans whose facts were deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jobledger import plan as plans
from jobledger.errors import SchemaError
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader, recorded
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas.events import JobEvent, Recorded


@dataclass(frozen=True, slots=True)
class Kept:
    """A plan in the log. ``first``: the offset of its first fact. ``last_ms``: the append time of its last fact."""

    status: PlanStatus
    first: int
    last_ms: int

    def needed(self, cutoff_ms: int) -> bool:
        """Return whether the facts of the plan must stay in the log. ``cutoff_ms``: the time before which records are
        past the retention age."""
        if self.status.state is PlanState.LISTING:
            return self.last_ms >= cutoff_ms
        return self.status.ended_ms is None or self.status.ended_ms >= cutoff_ms


def folded(facts: Iterable[Recorded]) -> dict[str, Kept]:
    """Return the plans with these facts, by their ids. Facts of a plan whose beginning was deleted are left out."""
    known: dict[str, Kept] = {}
    for record in facts:
        before = known.get(record.event.job_id)
        status = plans.apply(None if before is None else before.status, record)
        if status is not None:
            first = record.position.offset if before is None else before.first
            known[record.event.job_id] = Kept(status, first, record.appended_ms)
    return known


def limit(known: Iterable[Kept], cutoff_ms: int, most: int) -> int:
    """Return the offset below which the facts of plans may be deleted. ``most``: the offset up to which the records are
    past the retention age, and up to which the status table has read them."""
    return min([most, *(kept.first for kept in known if kept.needed(cutoff_ms))])


def trim_point(
    log: LogReader, names: Names, decode: Callable[[bytes | None], JobEvent], table_read: int, cutoff_ms: int
) -> tuple[int, int]:
    """Return the first offset of the topic of plans, and the offset below which its records may be deleted.

    ``table_read``: the offset up to which the status table has read the topic. The topic is read only if it has records
    past the retention age. Raises `TopicMissing` or `BrokerUnavailable`.
    """
    start = log.bounds(names.plans, 0)[0]
    aged = min(log.offset_at(names.plans, 0, cutoff_ms), table_read)
    if aged <= start:
        return start, start

    def facts() -> Iterable[Recorded]:
        for message in log.read(names.plans, 0, start):
            try:
                yield recorded(message, decode)
            except SchemaError:  # no fact of a plan
                continue

    return start, limit(folded(facts()).values(), cutoff_ms, aged)
