"""Makes plans: writes to the log which jobs an action is about, and steers the action.

The stream processor carries a plan out, also if the process that made the plan has ended. It begins only when the list
of jobs is complete in the log. So if the maker dies while it writes the list, nothing is done with any of the jobs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, Protocol

import uuid_utils

from jobledger.client.commands import BY_MOST, REASON_MOST, who
from jobledger.definitions.durations import Seconds, check_patience
from jobledger.definitions.handles import Plan
from jobledger.definitions.policy import parse_rate
from jobledger.errors import StatusTimeout
from jobledger.kafka.topic_names import ID_MOST, Names, check_text
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.plan import PlanState, PlanStatus
from jobledger.process.identity import now_us, source
from jobledger.schemas import codec
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import Fact, PlanListed, PlannedJob, PlanOpened, PlanSealed, PlanSteered, Position

#: Maximum number of jobs in a part. With a rate a part takes about `PART_S` seconds.
PART_JOBS, PART_S = 500, 5.0
#: Number of parts that are sent before their acknowledgements are awaited.
PARTS_AT_ONCE = 50
#: Number of jobs that a dry run returns as examples.
EXAMPLES = 10
#: Seconds between two looks at the status table.
LOOK_S = 0.1

Action = Literal["redrive", "cancel"]


class PlanTable(Protocol):
    """The method of the status table's read side that this module uses."""

    def plan(self, plan_id: str) -> PlanStatus: ...

    def reached(self, position: Position) -> bool: ...


class Plans:
    """Makes and steers the plans of one namespace. ``writer``: returns what writes to the log. ``table``: returns the
    read side of the status table."""

    def __init__(self, names: Names, writer: Callable[[], LogWriter], table: Callable[[], Any]) -> None:
        self._names, self._writer, self._table = names, writer, table

    def make(
        self,
        action: Action,
        jobs: Iterable[tuple[str, int]],
        where: Mapping[str, Any],
        *,
        queue: str | None = None,
        rate: str | float | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> Plan:
        """Write a plan, and return when the log has acknowledged the whole plan.

        ``jobs``: id and run of each job. ``where``: the conditions that chose the jobs; only people read them. Raises
        `ConfigError`, `TopicMissing` or `AccessDenied`; then nothing is done with the jobs. After `BrokerUnavailable`
        the plan may have been made: `App.plans` shows this.
        """
        by = check_text("by", by or who(), BY_MOST)
        reason = None if reason is None else check_text("reason", reason, REASON_MOST)
        starts = None if rate is None else parse_rate(rate)
        plan_id = str(uuid_utils.uuid7())
        size = PART_JOBS if starts is None else max(1, min(PART_JOBS, math.ceil(starts * PART_S)))
        examples: list[str] = []
        count = parts = 0
        text = json.dumps(where, ensure_ascii=False, default=str)
        records = [self._record(plan_id, PlanOpened(action, text, queue, starts, by, reason))]
        for part in _parts(jobs, size):
            examples += [job.job_id for job in part[: EXAMPLES - len(examples)]]
            records.append(self._record(plan_id, PlanListed(parts, part)))
            count, parts = count + len(part), parts + 1
            if len(records) >= PARTS_AT_ONCE:
                self._writer().send(records)
                records = []
        # `PlanSealed` must be behind all parts, also if the producer has to send some records again. So it is sent when
        # all parts are acknowledged.
        if records:
            self._writer().send(records)
        (position,) = self._writer().send([self._record(plan_id, PlanSealed(parts, count))])
        return Plan(self, plan_id, count, examples, position)

    def preview(self, jobs: Iterable[tuple[str, int]]) -> Plan:
        """Return the number of jobs and examples, without a plan."""
        examples, count = [], 0
        for job_id, _ in jobs:
            count += 1
            if count <= EXAMPLES:
                examples.append(job_id)
        return Plan(self, None, count, examples, None)

    def steer(self, plan_id: str, to: PlanState, reason: str | None = None, by: str | None = None) -> None:
        """Pause, resume or abort a plan, and return once the log has acknowledged the request. A plan that has ended is
        not changed. Raises as `make` does."""
        check_text("plan", plan_id, ID_MOST)
        fact = PlanSteered(
            to.value,
            check_text("by", by or who(), BY_MOST),
            None if reason is None else check_text("reason", reason, REASON_MOST),
        )
        self._writer().send([self._record(plan_id, fact)])

    def status(self, plan_id: str, at_least: Position | None, timeout: Seconds) -> PlanStatus:
        """Return the state of a plan; see `Plan.status`."""
        status: PlanStatus = self._await(plan_id, at_least, timeout, lambda status: True)
        return status

    def wait(self, plan_id: str, at_least: Position | None, timeout: Seconds | None) -> PlanStatus:
        """Wait until a plan has ended; see `Plan.wait`."""
        return self._await(plan_id, at_least, timeout, lambda status: status.state.ended)

    def _await(
        self,
        plan_id: str,
        at_least: Position | None,
        timeout: Seconds | None,
        enough: Callable[[PlanStatus], bool],
    ) -> PlanStatus:
        seconds = check_patience(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        state = "not in the status table yet"
        while True:
            table: PlanTable = self._table()
            if at_least is None or table.reached(at_least):
                status = table.plan(plan_id)
                if enough(status):
                    return status
                state = status.state.value
            if deadline is not None and time.monotonic() >= deadline:
                raise StatusTimeout(
                    f"plan {plan_id} is {state} after {seconds:g} s: is `jobledger streams MODULE:APP` running?"
                )
            time.sleep(LOOK_S)

    def _record(self, plan_id: str, fact: Fact) -> Outgoing:
        event = standalone(fact, str(uuid_utils.uuid7()), now_us(), source("client"), job_id=plan_id)
        return Outgoing(self._names.plans, codec.encode(event), plan_id, 0)


def _parts(jobs: Iterable[tuple[str, int]], size: int) -> Iterator[list[PlannedJob]]:
    iterator = iter(jobs)
    while part := [PlannedJob(job_id, run) for job_id, run in islice(iterator, size)]:
        yield part
