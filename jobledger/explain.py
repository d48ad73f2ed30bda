"""Why a job is where it is, as sentences and as data. Pure: no Kafka, no database, no clock.

`explain` turns a `jobledger.situation.Situation`, which `jobledger.client.explaining` gathers, into an `Explanation`.
`jobledger.causes` has the rules. The order of `CauseKind` is the order of the causes.
"""

from __future__ import annotations

import datetime as dt

import msgspec

from jobledger.causes import HOLDING, RULES, TEXT_MOST, CauseKind, due_of, plain, unknown, unread, waits_for_slot
from jobledger.job import Life, State, Visible, moment, project
from jobledger.process.wording import counted
from jobledger.situation import Situation

#: State of a job that the status table does not know, or that cannot be looked up.
UNKNOWN = "unknown"


class Cause(msgspec.Struct, frozen=True):
    """One cause. ``cause``: a value of `CauseKind`. ``since``: since when it holds, by the broker's clock; None: not
    known. ``detail``: one sentence for people, without control characters."""

    cause: CauseKind
    since: dt.datetime | None
    detail: str


class Explanation(msgspec.Struct, frozen=True):
    """Why a job is where it is.

    ``state``: the job's state, or ``unknown``. ``causes``: the most decisive first; each kind at most once.
    ``likely_start``: when the next attempt probably starts; None: not known. ``likely_start_note``: how that time was
    computed, or why it is not known.
    """

    job_id: str
    state: str
    causes: tuple[Cause, ...]
    likely_start: dt.datetime | None
    likely_start_note: str


def explain(situation: Situation) -> Explanation:
    """Return the causes that the situation shows, and when the job is likely to start."""
    life = situation.life
    seen = None if life is None else project(life)
    if life is None or seen is None:
        found, state = [*unknown(situation), *unread(situation)], UNKNOWN
    else:
        found = [cause for rule in RULES[seen.state] for cause in rule(situation, life, seen)]
        found += unread(situation)
        state = seen.state.value
        if seen.state is State.QUEUED and not HOLDING & {each.kind for each in found}:
            found.append(waits_for_slot(situation, life))
    causes = tuple(
        Cause(each.kind, moment(each.since_ms), plain(each.detail, 4 * TEXT_MOST))
        for each in sorted(found, key=lambda each: _ORDER[each.kind])
    )
    likely, note = _likely(situation, life, seen, {cause.cause for cause in causes})
    return Explanation(situation.job_id, state, causes, moment(likely), note)


_ORDER = {kind: number for number, kind in enumerate(CauseKind)}

# -- the likely start ---------------------------------------------------------------------------------------------------

#: The causes with which the start of the job cannot be estimated, each with the reason.
_OPEN_ENDED = {
    CauseKind.TABLE_BEHIND: "the status table is behind, so the job may have started",
    CauseKind.CANCEL_REQUESTED: "a cancel was requested, so the job does not start",
    CauseKind.UNKNOWN_TASK: "the job starts when a worker knows its task",
    CauseKind.NOT_RELEASED: "the job starts after the coordinator has released it",
    CauseKind.QUEUE_PAUSED: "the job does not start as long as its queue is paused",
    CauseKind.TASK_PAUSED: "the job does not start as long as its task is paused",
    CauseKind.NO_WORKER: "the job does not start as long as no worker serves its partition",
    CauseKind.KEY_HELD: "the job starts after the job that holds its key has ended",
    CauseKind.RECORD_DONE: "the workers are done with the job's record",
}


def _likely(s: Situation, life: Life | None, seen: Visible | None, kinds: set[CauseKind]) -> tuple[int | None, str]:
    """Return when the next attempt probably starts, in ms, and how this time was computed; or None, and why it is not
    known."""
    if life is None or seen is None:
        return None, "the job is not known"
    if seen.state.ended:
        return None, "the run has ended"
    if seen.state is State.RUNNING:
        return None, "the attempt has started"
    for kind in CauseKind:
        if kind in kinds and kind in _OPEN_ENDED:
            return None, _OPEN_ENDED[kind]
    if seen.state is not State.QUEUED:
        due, close = due_of(life, seen)
        if due is not None and close is not None and close.in_place and due < s.now_ms:
            return None, "the next attempt is due; its worker starts it when one of its places is free"
        return due, "when the job is due; how many jobs are before it then is not known"
    return _by_pace(s)


def _by_pace(s: Situation) -> tuple[int | None, str]:
    if s.place is None:
        return None, "the number of jobs before it is not known"
    left = max(0, s.place.before - s.place.running)
    if s.pace is None:
        return None, "how fast the partition's jobs are started is not known"
    if s.pace.starts == 0 or s.pace.seconds <= 0:
        return None, f"no job of the partition was started in the last {s.pace.seconds:.0f} s"
    wait_ms = (left + 1) * s.pace.seconds * 1000 / s.pace.starts
    note = (
        f"{counted(left, 'job')} of the partition start before it, and {counted(s.pace.starts, 'job')} of the partition "
        f"started in the last {s.pace.seconds:.0f} s"
    )
    return s.now_ms + round(wait_ms), note
