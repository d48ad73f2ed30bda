"""Progress reports of a running job, and the ids of the jobs that it submits."""

from __future__ import annotations

import enum
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobledger import ConfigError, JobEnded
from jobledger.consumers.isolation.protocol import ProgressMessage, Splitter, decode_child_message, frame
from jobledger.definitions.context import JobContext
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobProgressed
from tests.running_job import running_job

JOB = "01890a5d-ac96-774b-bcce-b302099a8057"
MOST = (1 << 63) - 1


def context(reports: list[JobProgressed] | None = None) -> JobContext:
    """Return the context of a job; its progress reports are appended to ``reports``."""
    kept: list[JobProgressed] = [] if reports is None else reports
    return running_job(JOB, "t", lambda job, report: kept.append(report))


@pytest.mark.parametrize(
    ("report", "named"),
    [
        ((1, 2, 3), "message=3"),
        ((1, 2, b"half"), "message=b'half'"),
        ((-1,), "done=-1"),
        ((1 << 63,), "done=9223372036854775808"),
        ((None,), "done=None"),
        ((1, 1 << 64), "total=18446744073709551616"),
        ((True,), "done=True"),
        ((0.5, 1), "done=0.5"),
        ((1, "2"), "total='2'"),
    ],
)
def test_a_wrong_progress_report_is_refused_by_the_name_of_its_argument(report: tuple[Any, ...], named: str) -> None:
    """The error is raised in the job's own code, at the call of `progress`."""
    reports: list[JobProgressed] = []
    with pytest.raises(ConfigError, match=f"progress\\({named}\\)"):
        context(reports).progress(*report)
    assert reports == []


class Step(enum.IntEnum):
    SECOND = 2


class Text(str):
    def __str__(self) -> str:
        return "another"


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ((0,), (0, None, None)),
        ((MOST, MOST, ""), (MOST, MOST, "")),
        ((Step.SECOND, type("Int", (int,), {})(3), Text("half")), (2, 3, "half")),
        ((1, 2, "caf\udce9"), (1, 2, "caf?")),
    ],
)
def test_a_progress_report_reaches_the_worker_and_the_log_unchanged(
    report: tuple[Any, ...], expected: tuple[Any, ...]
) -> None:
    """The message to the worker and the event carry the largest numbers, values of subclasses, and text that is no
    UTF-8."""
    reports: list[JobProgressed] = []
    context(reports).progress(*report)
    (fact,) = reports
    assert (fact.done, fact.total, fact.message) == expected
    (body,) = Splitter().feed(frame(ProgressMessage(fact.sequence, fact.done, fact.total, fact.message)))
    received = decode_child_message(body)
    assert isinstance(received, ProgressMessage)
    assert (received.done, received.total, received.message) == expected
    event = JobEvent(JOB, JOB, 1, 1, 1, 0, "t", "q", None, None, "w", None, fact)
    assert codec.decode(codec.encode(event)).fact == fact


def test_children_that_threads_submit_at_the_same_time_have_different_ids() -> None:
    """Threads submit many equal children. Their ids are the same set as when one thread submits all of them."""
    one_by_one = context()
    expected = {one_by_one.child_id("t", b"{}") for _ in range(4_000)}
    parent = context()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            ids = list(threads.map(lambda _: parent.child_id("t", b"{}"), range(4_000)))
    finally:
        sys.setswitchinterval(before)
    assert set(ids) == expected


def test_the_context_of_an_ended_attempt_refuses_reports_and_children() -> None:
    """Code that still runs after its job cannot report progress or submit children. The error names the job and a
    remedy."""
    reports: list[JobProgressed] = []
    job = context(reports)
    job.progress(1)
    job.ended = True
    for refused in (lambda: job.progress(2), lambda: job.child_id("t", b"{}")):
        with pytest.raises(JobEnded, match=rf"attempt 1 of job {JOB} \(t\) has ended.*contextvars"):
            refused()
    assert [report.done for report in reports] == [1]


def test_a_hook_after_an_outcome_cannot_report_progress() -> None:
    """The hook may submit children of the job, but the attempt has ended."""
    job = running_job(JOB, "t", None)
    assert job.child_id("t", b"{}")
    with pytest.raises(JobEnded):
        job.progress(1)


def test_a_job_whose_id_is_no_uuid_may_submit_jobs() -> None:
    """The ids of its child jobs are UUIDs, and a rerun has the same ones."""
    first, again = (running_job("order-7", "t", None) for _ in range(2))
    ids = [first.child_id("t", b"{}") for _ in range(2)]
    assert [again.child_id("t", b"{}") for _ in range(2)] == ids
    assert len({*map(uuid.UUID, ids)}) == 2
