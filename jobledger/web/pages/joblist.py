"""What the page of jobs shows: a page of rows, numbers beside the states, the fields of the form; and the preview of an
action on all jobs of a filter."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobledger.errors import JobNotFound
from jobledger.job import JobStatus, State
from jobledger.process.wording import counted
from jobledger.streams.status.store.protocol import Counted, Found
from jobledger.views import bounds
from jobledger.views.arguments import WINDOW, choose
from jobledger.views.facts import progress
from jobledger.views.words import duration, relative
from jobledger.web.pages.filters import LABELS, JobFilters
from jobledger.web.pages.render import short
from jobledger.web.pages.sources import Sources

#: Number of rows on a page, of examples in a preview, and of values that a field suggests.
PAGE, EXAMPLES, CHOICES_MOST = 50, 10, 200
#: Returns the arguments of a job as they may be shown.
Shown = Callable[[JobStatus, Any], Any]
_OPEN = tuple(state.value for state in State if not state.ended)
#: The states of the jobs on which an action is possible, and the states that it chooses without a filter by state.
SCOPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "redrive": (("failed", "cancelled", "expired"), ("failed",)),
    "cancel": (_OPEN, _OPEN),
}
#: The fields of the form in their order, and number of the first ones, which are always shown.
FIELDS = (
    *("task", "queue", "tag", "since", "error", "key"),
    *("arg", "error_text", "until", "late", "id_prefix", "version", "fingerprint", "attempts_least"),
)
FIRST = 6
#: The fields of which there may be several: a job must match all of them.
SEVERAL = ("tag", "arg")
#: Examples of values in the form.
HINTS: Mapping[str, str] = {
    "tag": "name=value",
    "arg": "user.id=1",
    "since": "2h",
    "until": "2026-01-31T14:05",
    "late": "10m",
    "attempts_least": "3",
    "error": "ValueError",
    "error_text": "timed out",
}


@dataclass(frozen=True)
class JobRow:
    """A job in a list. ``took``: how long its last attempt ran. ``about``: the most useful detail in its state."""

    job_id: str
    task: str
    queue: str
    state: str
    attempt: int
    run: int
    submitted: dt.datetime | None
    took: str
    about: str


@dataclass(frozen=True)
class Field:
    """A field of the form. ``problem``: what is wrong with its value. ``more``: it is shown only on demand."""

    id: str
    name: str
    label: str
    value: str
    hint: str = ""
    problem: str = ""
    choices: Sequence[str] = ()
    more: bool = False


@dataclass(frozen=True)
class JobList:
    """The page of jobs. ``chips``: each state with the number of jobs; ``chips_ignored``: filters that these numbers do
    not use. ``next``: the query of the next page; None: this is the last one. ``searched``: the time of submission up to
    which jobs were compared with the filters, if the page ends there."""

    filters: JobFilters
    jobs: Sequence[JobRow]
    count: Counted
    chips: Sequence[tuple[str, int]]
    chips_ignored: Sequence[str]
    chips_of: str
    fields: Sequence[Field]
    problems: Sequence[tuple[str, str]]
    query: str
    next: str | None
    after: str | None
    order: str
    searched: dt.datetime | None = None
    note: str = ""
    page: int = PAGE

    @property
    def redrivable(self) -> bool:
        """Whether a redrive of these jobs is possible."""
        return _scoped(self.filters, "redrive")

    @property
    def cancellable(self) -> bool:
        """Whether a cancel of these jobs is possible."""
        return _scoped(self.filters, "cancel")


@dataclass(frozen=True)
class Preview:
    """What an action on all jobs of a filter would do."""

    action: str
    title: str
    button: str
    explained: str
    count: Counted
    words: Sequence[tuple[str, str]]
    examples: Sequence[JobRow]
    query: str
    queues: Sequence[str]
    possible: bool
    problem: str = ""
    chosen_queue: str = ""
    rate: str = ""


def job_list(
    sources: Sources, filters: JobFilters, after: str | None, now_ms: int, shown: Shown | None = None
) -> JobList:
    """Return a page of jobs, from at most four queries of the status table. ``after``: the last job of the page before.
    ``shown``: returns the arguments of a job as they may be shown; None: as they are. Raises `StoreError`."""
    wanted = filters.table(now_ms)
    note = ""
    limit = WINDOW if filters.arguments else PAGE + 1
    try:
        found = sources.table.search(after=after, limit=limit, most=bounds.ROWS_MOST, **wanted)
    except JobNotFound:
        note = f"The page cannot begin after the job {after!r}: the table does not know it any more. These are the newest jobs."
        after, found = None, sources.table.search(limit=limit, most=bounds.ROWS_MOST, **wanted)
    full = len(found.jobs) > PAGE
    if filters.arguments:
        found, about = _with_arguments(sources, found, filters, shown)
        note, full = f"{note} {about}".strip(), len(found.jobs) == PAGE
    rows = [job_row(status) for status in found.jobs[:PAGE]]
    last = rows[-1].job_id if full else found.after
    counts = sources.table.counts()
    tasks = sorted({each.task for each in counts} | set(sources.app.tasks))
    queues = sorted({each.queue for each in counts} | set(sources.app.queues))
    chips = {state.value: 0 for state in State}
    for each in counts:
        if filters.texts.get("task", each.task) == each.task and filters.texts.get("queue", each.queue) == each.queue:
            chips[each.state.value] += each.jobs
    followed = [name for name in ("task", "queue") if name in filters.texts]
    return JobList(
        filters=filters,
        jobs=rows,
        count=_count(sources, filters, wanted, len(rows), sum(chips.values())),
        chips=list(chips.items()),
        chips_ignored=[LABELS[name].lower() for name in filters.names if name not in ("state", "task", "queue")],
        chips_of=f" of this {' and '.join(followed)}" if followed else "",
        fields=fields(filters, {"task": tasks, "queue": queues}),
        problems=[(LABELS[name], text) for name, text in filters.problems.items()],
        query=filters.query(),
        next=None if last is None else filters.query(after=last),
        searched=None if full or found.searched_ms is None else _moment(found.searched_ms),
        after=after,
        order="By id, the greatest first" if "id_prefix" in filters.texts else "The newest submission first",
        note=note,
    )


def _count(sources: Sources, filters: JobFilters, wanted: Mapping[str, Any], rows: int, jobs: int) -> Counted:
    """Return the number for the heading. Jobs with certain arguments are not counted: it would take a read of the log for
    each job."""
    if filters.arguments:
        return Counted(rows, False)
    return sources.count(wanted) if filters.any else Counted(jobs, True)


def _with_arguments(sources: Sources, found: Found, filters: JobFilters, shown: Shown | None) -> tuple[Found, str]:
    """Return those of the jobs that have the wanted arguments, which are read from the log, and a note about what was
    compared."""
    outcome = sources.arguments(found.jobs)
    if outcome.value is None:
        return Found([]), f"The arguments cannot be read from the log: {outcome.problem}"
    chosen = choose(found.jobs, outcome.value, filters.arguments, PAGE, shown)
    note = f"The arguments of {counted(chosen.compared, 'job')} were read from the log and compared."
    if chosen.unknown:
        note += f" {chosen.unknown:,} of them are not known, for example because the log was trimmed."
    if chosen.compared < len(found.jobs):
        return Found(chosen.jobs, chosen.jobs[-1].job_id), note
    return Found(chosen.jobs, found.after, found.searched_ms), note


def _moment(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def job_row(status: JobStatus) -> JobRow:
    """Return a job's row."""
    return JobRow(
        status.job_id,
        status.task,
        status.queue,
        status.state.value,
        status.attempt,
        status.run,
        status.submitted_at,
        "" if status.duration is None else duration(status.duration),
        _about(status),
    )


def _about(status: JobStatus) -> str:
    state = status.state.value
    if state in ("scheduled", "retrying") and status.due_at is not None:
        why = f", after {status.error.type.rpartition('.')[2]}" if status.error is not None else ""
        return f"due {relative(status.due_at)}{why}"
    if state == "running" and status.progress is not None:
        return short(progress(status.progress.done, status.progress.total, status.progress.message), 60)
    if state == "failed" and status.error is not None:
        return short(f"{status.error.type.rpartition('.')[2]}: {status.error.message}", 120)
    return short(status.reason, 120) if status.reason else ""


def fields(filters: JobFilters, choices: Mapping[str, Sequence[str]]) -> list[Field]:
    """Return the fields of the form, with the values as they were written. There is one empty field for a further
    tag."""
    found = []
    for name in FIELDS:
        values = list(filters.given.get(name, ()))
        for number, value in enumerate([*values, ""] if name in SEVERAL else [values[-1] if values else ""]):
            found.append(
                Field(
                    f"{name}{number}" if name in SEVERAL else name,
                    name,
                    LABELS[name] if not number else f"{LABELS[name]} {number + 1}",
                    value,
                    HINTS.get(name, ""),
                    filters.problems.get(name, "") if not number else "",
                    list(choices.get(name, ()))[:CHOICES_MOST],
                    name not in FIELDS[:FIRST],
                )
            )
    return found


def _scoped(filters: JobFilters, action: str) -> bool:
    return not filters.states or set(filters.states) <= set(SCOPES[action][0])


def scoped(filters: JobFilters, action: str, now_ms: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the conditions of an action for the app and for the table. If the filter names no state, they have the default
    states of the action."""
    states = list(filters.states) or list(SCOPES[action][1])
    return {**filters.where(), "state": states}, {**filters.table(now_ms), "state": states}


def preview(sources: Sources, action: str, filters: JobFilters, now_ms: int, problem: str = "") -> Preview:
    """Return what an action would do, from two queries of the status table. Raises `StoreError`."""
    problem = problem or refusal(filters, action)
    possible = not refusal(filters, action)
    _, wanted = scoped(filters, action, now_ms)
    count: Counted = sources.count(wanted) if possible else Counted(0, True)
    number = f"{count.jobs:,}{'' if count.exact else ' or more'} {'job' if count.jobs == 1 else 'jobs'}"
    words = filters.words()
    if not filters.states:
        words.insert(0, (LABELS["state"], ", ".join(SCOPES[action][1])))
    redrive = action == "redrive"
    return Preview(
        action,
        f"{'Redrive' if redrive else 'Cancel'} jobs",
        f"{'Redrive' if redrive else 'Cancel'} {number}",
        "Each of these jobs runs again, as the next run of the same id. The list of the jobs is written to the log first; "
        "a job that has changed meanwhile is skipped."
        if redrive
        else "A waiting job is not started, and a running job is asked to stop. The list of the jobs is written to the log "
        "first; a job that has ended meanwhile is skipped.",
        count,
        words,
        [job_row(each) for each in sources.table.search(limit=EXAMPLES, most=bounds.ROWS_MOST, **wanted).jobs]
        if possible
        else [],
        filters.query(),
        sorted(sources.app.queues),
        possible,
        problem,
    )


def refusal(filters: JobFilters, action: str) -> str:
    """Return why an action on all jobs of a filter is refused; an empty text: it is possible. An action with a wrong
    filter is refused, because it would include more jobs than the user meant."""
    if filters.problems:
        name, text = next(iter(filters.problems.items()))
        return f"{LABELS[name]}: {text} Nothing is done with a filter that cannot be used."
    if filters.arguments:
        return (
            "An action cannot choose jobs by their arguments, which the status table does not have. Remove this filter."
        )
    if not filters.any:
        return "There is no filter, and an action on all jobs is refused. Choose the jobs first."
    if not _scoped(filters, action):
        return f"Only jobs that are {', '.join(SCOPES[action][0])} can be chosen for this. Choose these states only."
    return ""
