"""Whether jobs of one key were started in their turn (KEY_ORDER), as far as the log shows it. Pure: records in,
findings out.

The work records of one key of one queue are in one partition, in the order of submission. The facts of these jobs are
in the lifecycle partition of the same number. A worker starts the next job of a key when the broker has acknowledged
the fact that closes the job before it. So in that lifecycle partition each `JobStarted` comes after the first closing
fact of every earlier work record of its key. This also holds after kills and pauses: a release that runs again is
closed again, and its first closing fact counts.

* A retry or snooze in place closes nothing: the job keeps its turn.
* Any other retry or snooze closes its release. The next release has its own work record, and with it its own turn.
* If a partition has two work records of one release, the first one counts.
* Not checked: a release with work records in several partitions or topics. Not checked as the earlier job: a leased
  release, because the coordinator writes its outcome; a release that is closed only in another partition
  (``closed-elsewhere``); a work record from before `Scope.horizon`, because its closing fact may have been trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jobledger.audit.findings import Findings
from jobledger.audit.records import Record
from jobledger.audit.rules import Life, belongs, by_release

#: Work topic, partition and key.
Line = tuple[str, int, str]


class Turn(NamedTuple):
    """One release of a keyed job. ``work``: its first work record. ``started``, ``closed``: the first such fact in the
    lifecycle partition of the same number. ``holds``: whether later work records of its key must wait for
    ``closed``."""

    key: str
    work: Record
    started: Record | None
    closed: Record | None
    holds: bool

    @property
    def line(self) -> Line:
        """The work topic, the partition and the key, within which jobs take turns."""
        return self.work.topic, self.work.partition, self.key


def turns(life: Life) -> Iterator[Turn]:
    """The turn of each keyed release of a job."""
    keyed = [r for r in life.work if r.head["key"] is not None and r.fact in ("JobSubmitted", "JobDue") and belongs(r)]
    for records in by_release(keyed):
        work, release = records[0], records[0].release
        if any(r.place[:2] != work.place[:2] for r in records):
            continue
        closes = life.closes.get(release, ())
        started = next((r for r in life.starts.get(release, ()) if r.partition == work.partition), None)
        closed = next((r for r in closes if r.partition == work.partition), None)
        if started is not None and started.timed and started.at < work.at:
            started = None  # of a work record that the log no longer has
        holds = work.at >= life.scope.horizon and release not in life.leases and (closed is not None or not closes)
        yield Turn(work.head["key"], work, started, closed, holds)


def in_turn(lined_up: Iterable[Turn], found: Findings) -> None:
    """No job of a key is started before the earlier jobs of its key are closed.

    ``lined_up``: the turns sorted by line, and within a line by the offset of their work records.
    """
    line: Line | None = None
    last: Turn | None = None  # of the earlier turns, the one that is closed last
    for turn in lined_up:
        if turn.line != line:
            line, last = turn.line, None
        if last is not None and turn.started is not None and _later(last.closed, turn.started):
            _fault(turn, turn.started, last, found)
        if turn.holds and (last is None or (last.closed is not None and _later(turn.closed, last.closed))):
            last = turn


def _later(one: Record | None, other: Record) -> bool:
    """Whether a fact is missing, or has a higher offset than another one of its partition."""
    return one is None or one.offset > other.offset


def _fault(turn: Turn, started: Record, last: Turn, found: Findings) -> None:
    before = f"of key {turn.key!r}, started before job {last.work.head['job_id']}, which was submitted earlier,"
    if last.closed is None:
        text, end = f"{before} was closed: nothing closes it", last.work
    else:
        text, end = f"{before} was closed by its {last.closed.fact}", last.closed
    found.fault("key-order", turn.work.head["job_id"], text, started, end)
