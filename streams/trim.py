"""How far each partition may be trimmed. Pure: offsets, commits and unfinished jobs go in, limits come out.

Nothing that somebody still has to read is deleted: a partition is trimmed to the least of the offset at the retention
age, what every reader has read, and the first record of any unfinished job. A job that only waits for its time must not
hold the log back for a year, so its submission is sent again at the end (same ids) and does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobledger.job import Life, State, project
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
    waiting: list[tuple[str, Life]] = []
    for job_id, life in unfinished:
        if project(life).state is State.SCHEDULED and life.start is None and life.head.rank == 0 and life.due is None:
            waiting.append((job_id, life))
            continue
        for _, topic, partition, offset in life.positions:
            place = (topic, partition)
            held[place] = min(held.get(place, offset), offset)
    limits = {p: min(limit, held.get(p, limit)) for p, limit in limits.items()}
    for job_id, life in waiting:
        last = max(life.positions)
        place = (last[1], last[2])
        if place in limits and last[3] < limits[place]:
            resend[job_id] = Position(last[1], last[2], last[3])
    return Trimming(limits, resend)
