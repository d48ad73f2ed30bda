"""Which rows of ended jobs are removed from the status table, and how removed rows are recognised. Pure.

A row is removed only by the table's writer, and only while the table has read everything that the log had at the time of
the decision. So this holds for the greatest of the limits in `meta` (``removed:<state>``), and everything in this module
depends on it:

    Every record that was appended before this time is included in the table, or was when its row was removed.

The walks use the existing indexes by the time of submission: a job cannot end before its submission, so the rows to
remove are among those of jobs that were submitted before the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobledger.job import ENDS, Life, State, join, project
from jobledger.streams.status.store.rows import key_text

#: A partition: (topic, number).
Partition = tuple[str, int]
#: Prefix of the keys in `meta` that store the limits up to which rows were removed, by state.
REMOVED = "removed:"
#: Before every row in the order of a walk: (submitted_ms, job_id).
BEGIN = (-(1 << 63), "")
#: The states of jobs that have not ended.
OPEN = tuple(state for state in State if state not in ENDS)


class Walked(NamedTuple):
    """The columns of a row that a walk reads."""

    job_id: str
    state: str
    task: str
    queue: str
    submitted_ms: int
    ended_ms: int | None


@dataclass(frozen=True, slots=True)
class Walk:
    """One pass over the rows of a state in the order of their submission.

    ``before_ms``: rows of jobs that ended before this time are removed. If jobs in this state have not ended, rows are
    removed if all their facts are older. ``partial``: of these, only rows without a submission are removed. ``after``:
    the position of the pass.
    """

    state: State
    before_ms: int
    partial: bool = True
    after: tuple[int, str] = BEGIN

    @property
    def ends(self) -> bool:
        """Whether the walk is over rows of jobs that have ended."""
        return self.state.ended

    def may_go(self, row: Walked) -> bool:
        """Return whether the row is removed; for a job that has not ended: whether `old` must decide."""
        if row.state != self.state:
            return False
        return not self.ends or (row.ended_ms is not None and row.ended_ms < self.before_ms)

    def old(self, life: Life) -> bool:
        """Return whether the row of a job that has not ended is removed.

        A late fact created such a row after the job's earlier row had been removed: the table has read every record of
        the log, but has no submission of the job.
        """
        return (life.head.rank > 0 or not self.partial) and last_ms(life) < self.before_ms


@dataclass(frozen=True, slots=True)
class Piece:
    """The result of one transaction: how many rows were read, the ids of the removed rows, and the position of the
    walk; None: the walk is at its end."""

    read: int
    removed: Sequence[str]
    after: tuple[int, str] | None


def walks(limits: Mapping[str, int]) -> list[Walk]:
    """Return the walks that remove the rows past these limits (`jobledger.table_retention.limits`)."""
    if not limits:
        return []
    ended = [Walk(state, limits[state]) for state in ENDS if state in limits]
    longest = min(limits.values())
    return ended + [Walk(state, longest) for state in OPEN]


def last_ms(life: Life) -> int:
    """Return the append time of the last fact of a life, in ms."""
    times = [at[0] for at in life.positions]
    if life.report is not None:
        times.append(life.report.at[0])
    return max(times, default=life.head.at[0])


def tag_rows(job_id: str, submitted_ms: int, life: Life) -> list[tuple[str, str, int, str]]:
    """Return the rows of `tags` that belong to a job's row."""
    return [(key_text(name), key_text(value), submitted_ms, job_id) for name, value in life.head.tags.items()]


@dataclass(slots=True)
class Reread:
    """Recognises facts that the table reads a second time, because reading restarted at the start of a partition.

    ``before_ms``: the greatest limit up to which rows were removed. ``partitions``: those that were read again.
    """

    before_ms: int = 0
    partitions: set[Partition] = field(default_factory=set)

    def covers(self, life: Life) -> bool:
        """Return whether a job that the table does not know is one whose row was removed: all of these facts are in
        partitions that are read again, and were included before."""
        positions = life.positions if life.report is None else (*life.positions, life.report.at)
        return all(at[0] < self.before_ms and (at[1], at[2]) in self.partitions for at in positions)


@dataclass(frozen=True, slots=True)
class Removed:
    """The removals of a table, for its comparison with the log.

    ``limits``: by state. ``outcomes_from_ms``: before this time, outcomes may have been trimmed from the log.
    """

    limits: Mapping[str, int]
    outcomes_from_ms: int = 0

    @property
    def before_ms(self) -> int:
        """The greatest limit."""
        return max(self.limits.values(), default=0)

    def lacks(self, log: Life) -> bool:
        """Return whether the table may lack a job with these facts in the log: it ended before the limit of its state,
        or it has no outcome in the log because that was trimmed."""
        seen = project(log)
        if seen.ended_ms is not None:
            return seen.ended_ms < self.limits.get(seen.state.value, 0)
        return last_ms(log) < min(self.before_ms, self.outcomes_from_ms)

    def walks(self) -> list[Walk]:
        """Return the walks over a table with all jobs of the log that find the jobs for which `lacks` is true."""
        ended = [Walk(state, self.limits[state]) for state in ENDS if state in self.limits]
        return ended + [Walk(state, min(self.before_ms, self.outcomes_from_ms), partial=False) for state in OPEN]

    def explains(self, table: Life, log: Life) -> bool:
        """Return whether two rows of a job may differ, because the job's row, or an earlier one, was removed."""
        return self.lacks(log) or self.begun_again(table, log)

    def begun_again(self, table: Life, log: Life) -> bool:
        """Return whether the table's row has exactly the facts of the log that came after its earlier row was removed."""
        if join(table, log) != log:
            return False
        facts = table.positions or (() if table.report is None else (table.report.at,))
        count = len(log.positions) - len(table.positions)
        earlier = log.positions[:count]
        return (
            count > 0
            and log.positions[count:] == table.positions
            and earlier[-1][0] < self.before_ms
            and all(earlier[-1][0] <= at[0] for at in facts)
        )


def to_remove(walk: Walk, rows: Sequence[Walked]) -> list[Walked]:
    """Return the rows of a page that are removed or, of jobs that have not ended, may be removed."""
    return [row for row in rows if walk.may_go(row)]
