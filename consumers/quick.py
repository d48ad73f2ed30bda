"""The quick way to read a plain submission: what nearly every record of a busy work topic is.

`glance` proves that the bytes are a `JobSubmitted` of the plain shape, written with this version's schema; what it
leaves out, the arguments, stands at a place that follows from the shape. Everything else takes the full way
(`codec.decode`), which costs five times as much. A test with Hypothesis holds both ways to the same answer.
"""

from __future__ import annotations

from jobledger.schemas.codec import PLAIN_END
from jobledger.schemas.events import JobEvent, JobSpec, JobSubmitted
from jobledger.schemas.glance import glance

_TITLES = 95  # where task, queue, key, home, source and trace begin, in the shape that `glance` answers for
_REST = len(PLAIN_END)


def plain_submission(value: bytes) -> JobEvent | None:
    """The submission in a work record's value, or None if the full decoder has to tell.

    Of the event's header ``occurred_at`` and ``source`` are left empty: a worker needs neither.
    """
    seen = glance(value)
    if seen is None or type(seen[6]) is not JobSubmitted:
        return None
    queue_at = _TITLES + 1 + (value[_TITLES] >> 1)
    key_at = queue_at + 1 + (value[queue_at] >> 1)
    at = key_at + 5 + (value[key_at + 2] >> 1)  # behind key, home, source, trace and the union's branch
    at += 1 if value[at] < 0x80 else 2  # the arguments' length
    job_id, run, release, attempt, task, queue, _ = seen
    fact = JobSubmitted(JobSpec(value[at:-_REST]))
    return JobEvent(value[11:47].decode(), job_id, run, attempt, release, 0, task, queue, None, None, "", None, fact)
