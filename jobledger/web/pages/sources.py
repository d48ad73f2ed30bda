"""Where the pages get their data: the status table, the app, the log. Every read is bounded.

What an installed part does not offer is reported as None, and the page leaves it out or says so.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from jobledger.app import App
from jobledger.client.commands import Standing
from jobledger.client.plans import PlanTable
from jobledger.definitions.handles import JobHandle, Plan
from jobledger.errors import JobledgerError, text_of
from jobledger.job import JobStatus, State
from jobledger.plan import PlanStatus
from jobledger.schemas.events import Position, Recorded
from jobledger.web.pages.filters import NAMES

#: Largest number of jobs that are counted for filters that the counters cannot answer.
COUNT_MOST = 10_000
#: Number of groups of errors on their page.
GROUPS_MOST = 100
#: Seconds for which answers of the broker are used again, and seconds for which the broker is not asked after an error.
SHARED_S, AWAY_S = 2.0, 10.0
#: Number of bytes of a job's records that are read for its page.
HISTORY_BYTES = 8_000_000
#: Seconds that the broker has to answer when a page is made.
ANSWER_S = 3.0


class Counted(Protocol):
    """The number of jobs that match filters; ``exact`` False: there may be more."""

    @property
    def jobs(self) -> int: ...

    @property
    def exact(self) -> bool: ...


class QueueSummary(Protocol):
    """The numbers of a queue's jobs by state. ``depth``: queued jobs. ``oldest_ms``: since when the queued job that
    waits longest could start; None: none, or not known."""

    @property
    def queue(self) -> str: ...

    @property
    def depth(self) -> int: ...

    @property
    def scheduled(self) -> int: ...

    @property
    def retrying(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def succeeded(self) -> int: ...

    @property
    def failed(self) -> int: ...

    @property
    def cancelled(self) -> int: ...

    @property
    def expired(self) -> int: ...

    @property
    def oldest_ms(self) -> int | None: ...


class ErrorGroup(Protocol):
    """Jobs with errors of the same kind. ``job_id``: the last of them. ``first_ms``, ``last_ms``: when the first and
    the last of them were submitted. ``tasks``, ``versions``: numbers of jobs."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def message(self) -> str: ...

    @property
    def job_id(self) -> str: ...

    @property
    def jobs(self) -> int: ...

    @property
    def exact(self) -> bool: ...

    @property
    def first_ms(self) -> int: ...

    @property
    def last_ms(self) -> int: ...

    @property
    def tasks(self) -> Mapping[str, int]: ...

    @property
    def versions(self) -> Mapping[str, int]: ...


class Table(PlanTable, Protocol):
    """The read side of the status table, as the pages use it."""

    def jobs(self, *, after: str | None = None, limit: int = 100, **filters: Any) -> list[JobStatus]: ...

    def job(self, job_id: str) -> JobStatus: ...

    def counts(self) -> Sequence[Any]: ...

    def offsets(self) -> Mapping[tuple[str, int], int]: ...

    def plans(self, limit: int = 100) -> list[PlanStatus]: ...

    def chosen(self, limit: int | None = None, **filters: Any) -> Iterator[tuple[str, int]]: ...


@dataclass(frozen=True)
class Number:
    """A number of jobs; ``exact`` False: there may be more."""

    jobs: int
    exact: bool


@dataclass(frozen=True)
class QueueNumbers:
    """The numbers of a queue, from the counters alone."""

    queue: str
    depth: int = 0
    scheduled: int = 0
    retrying: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    oldest_ms: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was read from the log, or in ``problem`` why it could not be read."""

    value: Any = None
    problem: str | None = None


class Sources:
    """The sources of one app. Methods that read the broker do not raise its errors, but return them (`Outcome`)."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._standing: tuple[float, list[Standing]] = (0.0, [])
        self._away_until, self._away = 0.0, ""

    @property
    def table(self) -> Table:
        """The status table's read side. Raises `StoreError`."""
        table: Table = self.app.status_table()
        return table

    @property
    def lacking(self) -> frozenset[str]:
        """The filters of the page that the status table does not have."""
        from jobledger.streams.status.store.protocol import Filters

        in_table = {"since": "since_ms", "until": "until_ms", "late": "late_ms"}
        return frozenset(name for name in NAMES if in_table.get(name, name) not in Filters.__annotations__)

    # -- from the status table ------------------------------------------------------------------------------------

    def count(self, filters: Mapping[str, Any], limit: int = COUNT_MOST) -> Counted:
        """Return how many jobs match the table's filters, counted up to ``limit``."""
        table = self.table
        if (count := getattr(table, "count", None)) is not None:
            counted: Counted | int = count(limit, **filters)
            return Number(counted, counted < limit) if isinstance(counted, int) else counted
        number = sum(1 for _ in islice(table.chosen(limit + 1, **filters), limit + 1))
        return Number(min(number, limit), number <= limit)

    def queues(self) -> list[QueueSummary]:
        """Return each queue with its numbers, by name; also those queues of the app that have no job yet."""
        table = self.table
        if (queues := getattr(table, "queues", None)) is not None:
            found: list[QueueSummary] = list(queues())
        else:
            numbers: dict[str, dict[str, int]] = {}
            for each in table.counts():
                states = numbers.setdefault(each.queue, {})
                name = "depth" if each.state is State.QUEUED else each.state.value
                states[name] = states.get(name, 0) + each.jobs
            found = [QueueNumbers(queue, **states) for queue, states in numbers.items()]
        known = {each.queue for each in found}
        found += [QueueNumbers(name) for name in self.app.queues if name not in known]
        return sorted(found, key=lambda each: each.queue)

    def errors(self, since_ms: int | None) -> list[ErrorGroup] | None:
        """Return the groups of errors, the one with the last job first; None: this version has none."""
        errors = getattr(self.table, "errors", None)
        return None if errors is None else list(errors(since_ms, GROUPS_MOST))

    def last_success(self, tasks: Sequence[str]) -> Mapping[str, Any]:
        """Return the last success of each task, as far as known."""
        last_success = getattr(self.table, "last_success", None)
        found: Mapping[str, Any] = {} if last_success is None or not tasks else last_success(*tasks)
        return found

    def workers(self) -> list[Any] | None:
        """Return the workers by their last reports; None: this version has no reports."""
        workers = getattr(self.app, "workers", None)
        return None if workers is None else list(workers())

    # -- from the log ---------------------------------------------------------------------------------------------

    def explain(self, job_id: str) -> Outcome | None:
        """Return why a job is where it is; None: this version cannot say."""
        explain = getattr(self.app, "explain", None)
        return None if explain is None else self.from_log(lambda: explain(job_id))

    def history(self, job: JobStatus) -> Outcome:
        """Return a job's events, and the positions that cannot be read, each with the reason."""
        return self.from_log(lambda: self._history(job))

    def _history(self, job: JobStatus) -> tuple[list[Recorded], list[tuple[Position, str]]]:
        from jobledger.log.reading import LogReader
        from jobledger.log.schema_lookup import decoder
        from jobledger.views.records import facts_of

        decode = decoder(self.app.settings, self.app.names).decode
        with LogReader(self.app.settings) as reader:
            return facts_of(job, reader, decode, HISTORY_BYTES)

    def standing(self) -> Outcome:
        """Return the pauses and limits in force, by kind and name."""
        until, known = self._standing
        if time.monotonic() >= until:
            outcome = self.from_log(self.app.commands.standing)
            if outcome.problem is not None:
                return outcome
            known = outcome.value
            self._standing = (time.monotonic() + SHARED_S, known)
        return Outcome({(each.kind, each.name): each for each in known})

    def forget(self) -> None:
        """Read anew what was read before: a command has just changed it."""
        self._standing = (0.0, [])

    def from_log(self, read: Callable[[], Any]) -> Outcome:
        """Return what ``read`` returns, or why the log cannot be read. After an error the broker is not asked again for
        `AWAY_S`, so that pages of the table stay quick."""
        from jobledger.kafka.auth import check_connection

        if time.monotonic() < self._away_until:
            return Outcome(problem=self._away)
        try:
            check_connection(self.app.settings, ANSWER_S)
        except JobledgerError as exc:
            self._away, self._away_until = text_of(exc), time.monotonic() + AWAY_S
            return Outcome(problem=self._away)
        try:
            return Outcome(read())
        except JobledgerError as exc:
            return Outcome(problem=text_of(exc))

    # -- actions --------------------------------------------------------------------------------------------------

    def cancel_many(self, where: Mapping[str, Any], filters: Mapping[str, Any], **options: Any) -> Plan:
        """Make a plan that cancels jobs. ``where``, ``filters``: the same conditions for the app and for the table."""
        cancel_many = getattr(self.app, "cancel_many", None)
        if cancel_many is not None:
            plan: Plan = cancel_many(where=where, **options)
            return plan
        return self.app.client.plans.make("cancel", self.table.chosen(**filters), where, **options)

    @property
    def copies(self) -> bool:
        """Whether a changed copy of a job can be submitted."""
        return hasattr(self.app, "copy")

    def copy(self, job_id: str, **options: Any) -> JobHandle[Any]:
        """Submit a changed copy of a job; see `App.copy`."""
        copy: Callable[..., JobHandle[Any]] = getattr(self.app, "copy")  # noqa: B009  # not in every version
        return copy(job_id, **options)


def ms_of(moment: dt.datetime | None) -> int | None:
    """Return a moment in milliseconds since the epoch."""
    return None if moment is None else round(moment.timestamp() * 1000)
