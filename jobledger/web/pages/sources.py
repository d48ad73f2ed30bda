"""The sources of the pages' data: the status table, the app, the log. Every read is bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobledger.app import App
from jobledger.client.commands import Standing
from jobledger.errors import JobledgerError, text_of
from jobledger.job import JobStatus, State
from jobledger.schemas.events import Position, Recorded
from jobledger.streams.status.store.protocol import Counted, ErrorGroup, LastSuccess, QueueSummary, StatusReader
from jobledger.views import bounds
from jobledger.worker_status import WorkerStatus

#: Number of groups of errors on their page.
GROUPS_MOST = 100
#: Seconds for which answers of the broker are used again, and seconds for which the broker is not asked after an error.
SHARED_S, AWAY_S = 2.0, 10.0
#: Number of bytes of a job's records that are read for its page.
HISTORY_BYTES = 8_000_000
#: Seconds that the broker has to answer when a page is made.
ANSWER_S = 3.0


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
    def table(self) -> StatusReader:
        """The status table's read side. Raises `StoreError`."""
        table: StatusReader = self.app.status_table()
        return table

    # -- from the status table ------------------------------------------------------------------------------------

    def count(self, filters: Mapping[str, Any], limit: int = bounds.COUNT_MOST) -> Counted:
        """Return how many jobs match the table's filters, counted up to ``limit``."""
        return self.table.count(limit, most=bounds.COUNT_ROWS_MOST, **filters)

    def queues(self) -> list[QueueSummary]:
        """Return each queue with its numbers, by name; also those queues of the app that have no job yet."""
        summaries = self.table.queues()
        known = {each.queue for each in summaries}
        summaries += [QueueSummary(name, *[0] * len(State)) for name in self.app.queues if name not in known]
        return sorted(summaries, key=lambda each: each.queue)

    def errors(self, since_ms: int | None) -> list[ErrorGroup]:
        """Return the groups of errors, the one with the last job first."""
        return self.table.errors(since_ms, GROUPS_MOST)

    def last_success(self, tasks: Sequence[str]) -> Mapping[str, LastSuccess]:
        """Return the last success of each task, as far as known."""
        return self.table.last_success(*tasks) if tasks else {}

    def workers(self) -> list[WorkerStatus]:
        """Return the workers by their last reports."""
        return self.app.workers()

    # -- from the log ---------------------------------------------------------------------------------------------

    def explain(self, job_id: str) -> Outcome:
        """Return why a job is where it is."""
        return self.from_log(lambda: self.app.explain(job_id))

    def arguments(self, jobs: Sequence[JobStatus]) -> Outcome:
        """Return the arguments of jobs by id, or for each the reason why they are not known."""
        from jobledger.views.records import submissions

        return self.from_log(lambda: submissions(self.app.settings, self.app.names, jobs))

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
        """Read the commands in force again at the next call: a command has just changed them."""
        self._standing = (0.0, [])

    def from_log(self, read: Callable[[], Any]) -> Outcome:
        """Return what ``read`` returns, or why the log cannot be read. After an error the broker is not asked again for
        `AWAY_S`, so that pages that need only the table stay fast."""
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
