"""What the page of one job shows: its status, its timeline, its arguments and result, and what can be done."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from jobledger.job import JobStatus
from jobledger.schemas.events import Position, Recorded, fact_name
from jobledger.views.facts import describe, progress
from jobledger.views.values import jsonable
from jobledger.views.words import duration
from jobledger.web.pages.joblist import SCOPES
from jobledger.web.pages.render import utc, whole_json
from jobledger.web.pages.services import PageServices
from jobledger.web.pages.sources import Outcome, Sources
from jobledger.web.pages.timeline import Timeline, draw

#: Milliseconds for which the page of a job that has not ended is not rendered again without a new fact.
KEPT_MS = 10_000

#: The names on the page of the facts that end an attempt.
OUTCOMES: Mapping[str, str] = {
    "JobSucceeded": "succeeded",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
    "JobExpired": "expired",
    "JobRetried": "failed, retried",
    "JobSnoozed": "snoozed",
}


@dataclass(frozen=True)
class EventRow:
    """An event of the job. ``at``: milliseconds since the epoch; ``after``: seconds since the first event."""

    at: int
    after: float
    fact: str
    run: int
    attempt: int
    position: str
    about: str


@dataclass(frozen=True)
class JobPage:
    """The page of a job. ``arguments``, ``result``: JSON builtins, redacted; None: not known, or none.
    ``copy_changes``: whether the form for a copy takes only the changed arguments."""

    job: JobStatus
    history: Outcome
    timeline: Timeline | None
    timeline_text: str
    explanation: Outcome
    events_table: Sequence[EventRow]
    unread: Sequence[tuple[str, str]]
    moments: Sequence[tuple[str, dt.datetime]]
    progress: str
    hidden: bool
    redacted: bool
    arguments: Any
    arguments_note: str
    result: Any
    can_redrive: bool
    can_cancel: bool
    can_copy: bool
    copy_text: str
    copy_changes: bool
    queues: Sequence[str]
    events: str
    said: str = ""
    outcomes: Mapping[str, str] = field(default_factory=lambda: OUTCOMES)

    @property
    def copy_of(self) -> str | None:
        """The id of the job of which this one is a copy."""
        return getattr(self.job, "copy_of", None)


def key_of(job: JobStatus, now_ms: int) -> object:
    """Return the values on which the page of a job depends; while they do not change, the log is not read again. The
    time is one of them until the job has ended, because the causes of waiting and the duration of a run depend on it."""
    moment = None if job.state.ended else now_ms // KEPT_MS
    return (job.state, job.run, job.attempt, job.release, len(job.positions), job.positions[-1:], job.progress, moment)


def job_page(
    sources: Sources, services: PageServices, job: JobStatus, *, shown: bool, now_ms: int, said: str = ""
) -> JobPage:
    """Return the page of a job; the job's history is read from the log. ``shown``: show arguments and results although they
    are hidden by default."""
    history = sources.history(job)
    records: list[Recorded] = history.value[0] if history.value else []
    unread: list[tuple[Position, str]] = history.value[1] if history.value else []
    timeline = draw(records, now_ms, ended=job.state.ended)
    hidden = not (services.show_arguments or shown)
    raw = _arguments(records)
    arguments, redacted = (None, False) if hidden else as_shown(services, job.task, raw)
    result, _ = (None, False) if hidden else as_shown(services, job.task, job.result)
    changes = hidden or redacted or arguments is None
    return JobPage(
        job=job,
        history=history,
        timeline=timeline,
        timeline_text=_in_words(timeline),
        explanation=sources.explain(job.job_id),
        events_table=_rows(records),
        unread=[(str(position), why) for position, why in unread],
        moments=[
            (label, moment)
            for label, moment in (
                ("Submitted", job.submitted_at),
                ("Due", job.due_at),
                ("Started", job.started_at),
                ("Ended", job.ended_at),
            )
            if moment is not None
        ],
        progress="" if job.progress is None else progress(job.progress.done, job.progress.total, job.progress.message),
        hidden=hidden,
        redacted=redacted,
        arguments=arguments,
        arguments_note=history.problem or "The log no longer has the arguments.",
        result=result,
        can_redrive=job.state.value in SCOPES["redrive"][0],
        can_cancel=not job.state.ended,
        can_copy=job.task in sources.app.tasks,
        copy_text="{}" if changes else whole_json(arguments),
        copy_changes=changes,
        queues=sorted(sources.app.queues),
        events=urlencode({"job_id": job.job_id}),
        said=said,
    )


def _arguments(records: Sequence[Recorded]) -> Any:
    """Return the arguments from the last record that has the whole job; None: no record has."""
    for record in reversed(records):
        spec = getattr(record.event.fact, "spec", None)
        if spec is not None:
            return jsonable(spec.args)
    return None


def as_shown(services: PageServices, task: str, value: Any) -> tuple[Any, bool]:
    """Return a value as it may be shown, and whether the app's function has changed it. If that function raises an error,
    the value is not shown."""
    if value is None or services.redact is None:
        return value, False
    try:
        shown = services.redact(task, jsonable(value))
    except Exception as exc:  # noqa: BLE001  # the function is the app's own
        return f"hidden: the function that redacts values raised {type(exc).__name__}", True
    return shown, shown != value


def _in_words(timeline: Timeline | None) -> str:
    """Return the timeline as text, for screen readers."""
    if timeline is None:
        return ""
    words = {"scheduled": "was delayed for", "waited": "waited for", "ran": "ran for", "backed-off": "backed off for"}
    parts = []
    for attempt in timeline.attempts:
        bars = ", ".join(f"{words[bar.kind]} {duration(bar.seconds)}" for bar in attempt.bars)
        parts.append(f"Run {attempt.run}, attempt {attempt.number}: {bars or 'nothing is known'}")
    return ". ".join(parts) + "."


def _rows(records: Sequence[Recorded]) -> list[EventRow]:
    first = records[0].appended_ms if records else 0
    return [
        EventRow(
            record.appended_ms,
            (record.appended_ms - first) / 1000,
            fact_name(record.event.fact),
            record.event.run,
            record.event.attempt,
            str(record.position),
            _about(record),
        )
        for record in records
    ]


def _about(record: Recorded) -> str:
    """Return the details of an event without arguments and results, which may have to be hidden."""
    fact = record.event.fact
    if getattr(fact, "spec", None) is not None:
        redrive = getattr(fact, "redrive", None)
        if redrive is None:
            return ""
        return f"redriven by {redrive.by}" + (f": {redrive.reason}" if redrive.reason else "")
    if fact_name(fact) == "JobSucceeded":
        return f"after {duration(getattr(fact, 'duration_us', 0) / 1e6)}"
    return describe(fact, most=300, moment=lambda micros: f"{utc(micros // 1000)} UTC")
