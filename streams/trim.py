"""How far each partition may be trimmed. Pure: offsets, commits and unfinished jobs go in, limits come out.

Nothing that somebody still has to read is deleted: a partition is trimmed to the least of the offset at the retention
age, what every reader has read, and the first record of any unfinished job. A job that only waits for its time must not
hold the log back for a year, so its submission is sent again at the end (same ids) and does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobledger.job import Life
from jobledger.schemas.events import Position

Partition = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Readers:
    """What has been read: by partition, the least next offset of everybody who must read
    it. Missing: nobody may trim."""

    offsets: Mapping[Partition, int]

    @classmethod
    def least(cls, wanted: Iterable[Partition], *readers: Mapping[Partition, int]) -> Readers:
        """The least over ``readers`` for each wanted partition that all of them know."""
        found = {}
        for place in wanted:
            known = [r.get(place) for r in readers]
            if all(k is not None for k in known):
                found[place] = min(k for k in known if k is not None)
        return cls(found)


@dataclass(frozen=True, slots=True)
class Trimming:
    """``limits``: delete what lies below. ``resend``: submissions to send again first, by job id."""

    limits: Mapping[Partition, int]
    resend: Mapping[str, Position]


def plan(aged: Mapping[Partition, int], readers: Readers, unfinished: Iterable[tuple[str, Life]]) -> Trimming:
    """Limits for the partitions of ``aged`` (the offset at the retention age of each) that every reader has read.

    ``unfinished``: jobs that have not ended and whose first fact is older than the retention age.
    """
    limits = {p: min(offset, readers.offsets[p]) for p, offset in aged.items() if p in readers.offsets}
    resend: dict[str, Position] = {}
    held: dict[Partition, int] = {}
    waiting: list[tuple[str, Position]] = []
    for job_id, life in unfinished:
        if (last := only_waits(life)) is not None:
            waiting.append((job_id, last))
            continue
        for _, topic, partition, offset in life.positions:
            place = (topic, partition)
            held[place] = min(held.get(place, offset), offset)
    limits = {p: min(limit, held.get(p, limit)) for p, limit in limits.items()}
    for job_id, last in waiting:
        place = (last.topic, last.partition)
        if place in limits and last.offset < limits[place]:
            resend[job_id] = last
    return Trimming(limits, resend)


def only_waits(life: Life) -> Position | None:
    """Where the latest submission stands of a job that was submitted with a condition, and of which nothing else is
    known; None for any other. What was snoozed or retried waits, too, but its last fact is not its submission."""
    head = life.head
    if head.rank != 0 or head.due_ms is None:
        return None
    if any((life.due, life.start, life.close, life.report, life.end, life.leased)):
        return None
    _, topic, partition, offset = max(life.positions)
    # Of an earlier run only positions are kept; a fact of it that came late must not pass for the submission.
    return Position(topic, partition, offset) if (topic, partition) == (head.at[1], head.at[2]) else None
