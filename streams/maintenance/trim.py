"""Computes how far each partition may be trimmed, from offsets, commits and unfinished jobs. Pure.

A record that a reader still needs is not deleted. A partition is trimmed up to the least of three offsets: the offset
at the retention age, the offset up to which every reader has read, and the offset of the first record of any unfinished
job. A job that only waits for its due time must not prevent trimming for a year. So its submission is sent again to the
log's end, with the same ids, and its old records may be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobledger.job import Life
from jobledger.schemas.events import Position

Partition = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Readers:
    """The least next offset of all readers of each partition. A partition that is missing here must not be trimmed."""

    offsets: Mapping[Partition, int]

    @classmethod
    def least(cls, wanted: Iterable[Partition], *readers: Mapping[Partition, int]) -> Readers:
        """Return the least offset over ``readers`` of each wanted partition. A partition for which a reader has no
        offset is left out."""
        offsets = {}
        for partition in wanted:
            known = [r.get(partition) for r in readers]
            if all(k is not None for k in known):
                offsets[partition] = min(k for k in known if k is not None)
        return cls(offsets)


@dataclass(frozen=True, slots=True)
class Trimming:
    """``limits``: offsets below which records are deleted. ``resend``: submissions to send again first, by job id."""

    limits: Mapping[Partition, int]
    resend: Mapping[str, Position]


def plan(aged: Mapping[Partition, int], readers: Readers, unfinished: Iterable[tuple[str, Life]]) -> Trimming:
    """Return the limits of those partitions of ``aged`` for which every reader has an offset, and the submissions to
    send again.

    ``aged``: the offset at the retention age, by partition. ``unfinished``: jobs that have not ended and whose first
    fact is older than the retention age.
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
    """Return the position of the latest submission of a job that was submitted with a due time and has no other fact;
    None for any other job. A snoozed or retried job waits, too, but its last fact is not its submission."""
    head = life.head
    if head.rank != 0 or head.due_ms is None:
        return None
    if any((life.due, life.start, life.close, life.report, life.end, life.leased)):
        return None
    _, topic, partition, offset = max(life.positions)
    # The life keeps only the positions of an earlier run's facts. A late fact of that run must not be taken for the
    # submission.
    return Position(topic, partition, offset) if (topic, partition) == (head.at[1], head.at[2]) else None
