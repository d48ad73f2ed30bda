"""Checks whether the jobs of one key were started in order (KEY_ORDER), as far as the log shows their order. Pure.

The work records of one key in one queue are in one partition, in the order of submission. The facts of these jobs are
in the lifecycle partition of the same number. A worker starts the next job of a key when the broker has acknowledged
the closing fact of the job before. So in that lifecycle partition, each `JobStarted` has a higher offset than the first
closing fact of every earlier work record of its key. This also holds after kills and pauses: a release that runs again
is closed again, and its first closing fact counts.

* A retry or snooze in place closes nothing: the job keeps its turn.
* Any other retry or snooze closes its release. The next release has a work record of its own, and so a turn of its own.
* If a partition has two work records of one release, the first one counts.
* A release with work records in several partitions or topics is not checked.
* As the earlier job, three kinds of releases are not checked: a leased release, because the coordinator writes its
  outcome; a release that is closed only in another partition (``closed-elsewhere``); and a release whose work record is
  from before `Scope.horizon`, because its closing fact may have been trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jobledger.audit.findings import Findings
from jobledger.audit.records import Record
from jobledger.audit.rules import Life, belongs, by_release

#: The work topic, partition and key that jobs have in common which must wait for each other.
Line = tuple[str, int, str]


class Turn(NamedTuple):
    """One release of a keyed job.

    ``work``: the first work record of the release. ``started``, ``closed``: the first `JobStarted` and the first
    closing fact in the lifecycle partition of the same number. ``holds``: whether later work records of the key must
    wait for ``closed``.
    """

    key: str
    work: Record
    started: Record | None
    closed: Record | None
    holds: bool

    @property
    def line(self) -> Line:
        """The work topic, partition and key of the release."""
        return self.work.topic, self.work.partition, self.key


def turns(life: Life) -> Iterator[Turn]:
    """Yield the turn of each keyed release of a job."""
    keyed = [r for r in life.work if r.head["key"] is not None and r.fact in ("JobSubmitted", "JobDue") and belongs(r)]
    for records in by_release(keyed):
        work, release = records[0], records[0].release
        if any(r.place[:2] != work.place[:2] for r in records):
            continue
        closes = life.closes.get(release, ())
        started = next((r for r in life.starts.get(release, ()) if r.partition == work.partition), None)
        closed = next((r for r in closes if r.partition == work.partition), None)
        if started is not None and started.timed and started.at < work.at:
            started = None  # this start belongs to an earlier work record that the log no longer has
        holds = work.at >= life.scope.horizon and release not in life.leases and (closed is not None or not closes)
        yield Turn(work.head["key"], work, started, closed, holds)


def in_turn(sorted_turns: Iterable[Turn], findings: Findings) -> None:
    """Check that no job of a key is started before the earlier jobs of this key are closed.

    ``sorted_turns``: the turns, sorted by `Turn.line` and then by the offset of their work records.
    """
    line: Line | None = None
    last: Turn | None = None  # the earlier turn with the last closing fact, or one without a closing fact
    for turn in sorted_turns:
        if turn.line != line:
            line, last = turn.line, None
        if last is not None and turn.started is not None and _later(last.closed, turn.started):
            _fault(turn, turn.started, last, findings)
        if turn.holds and (last is None or (last.closed is not None and _later(turn.closed, last.closed))):
            last = turn


def _later(one: Record | None, other: Record) -> bool:
    """Return whether ``one`` is missing, or has a higher offset than ``other``, a fact of the same partition."""
    return one is None or one.offset > other.offset


def _fault(turn: Turn, started: Record, last: Turn, findings: Findings) -> None:
    before = (
        f"started while job {last.work.head['job_id']}, an earlier job of the same key {turn.key!r}, was not closed"
    )
    if last.closed is None:
        text, end = f"{before}; no fact closes that job", last.work
    else:
        text, end = f"{before}; that job was closed later, by {last.closed.fact}", last.closed
    findings.fault("key-order", turn.work.head["job_id"], text, started, end)
