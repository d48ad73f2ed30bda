"""What a running job tells of itself, and the ids of the jobs that it submits."""

from __future__ import annotations

import enum
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobledger import ConfigError, JobEnded
from jobledger.consumers.isolation.protocol import ProgressMessage, Splitter, decode_said, frame
from jobledger.definitions.context import JobContext
from jobledger.schemas import codec
from jobledger.schemas.events import JobEvent, JobProgressed
from tests.running_job import running_job

JOB = "01890a5d-ac96-774b-bcce-b302099a8057"
MOST = (1 << 63) - 1


def context(told: list[JobProgressed] | None = None) -> JobContext:
    """A job's, whose reports are kept in ``told``."""
    kept: list[JobProgressed] = [] if told is None else told
    return running_job(JOB, "t", lambda job, said: kept.append(said))


@pytest.mark.parametrize(
    ("report", "said"),
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
def test_a_report_that_is_none_is_refused_by_name(report: tuple[Any, ...], said: str) -> None:
    """Where it is made, in the job's own code."""
    told: list[JobProgressed] = []
    with pytest.raises(ConfigError, match=f"progress\\({said}\\)"):
        context(told).progress(*report)
    assert told == []


class Step(enum.IntEnum):
    SECOND = 2


class Text(str):
    def __str__(self) -> str:
        return "another"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ((0,), (0, None, None)),
        ((MOST, MOST, ""), (MOST, MOST, "")),
        ((Step.SECOND, type("Int", (int,), {})(3), Text("half")), (2, 3, "half")),
        ((1, 2, "caf\udce9"), (1, 2, "caf?")),
    ],
)
def test_a_report_goes_wherever_reports_go(report: tuple[Any, ...], said: tuple[Any, ...]) -> None:
    """From a child to its worker, and into the log: the largest numbers, subclasses, and text that is no UTF-8."""
    told: list[JobProgressed] = []
    context(told).progress(*report)
    (fact,) = told
    assert (fact.done, fact.total, fact.message) == said
    (body,) = Splitter().feed(frame(ProgressMessage(fact.sequence, fact.done, fact.total, fact.message)))
    heard = decode_said(body)
    assert isinstance(heard, ProgressMessage)
    assert (heard.done, heard.total, heard.message) == said
    event = JobEvent(JOB, JOB, 1, 1, 1, 0, "t", "q", None, None, "w", None, fact)
    assert codec.decode(codec.encode(event)).fact == fact


def test_children_that_are_submitted_at_once_have_different_ids() -> None:
    """From several threads, all alike: as many ids as children, and the same as one after the other."""
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


def test_the_context_of_an_attempt_that_has_ended_refuses() -> None:
    """Code that a job left behind can report nothing and submit nothing in its name; the error says which job, and how."""
    told: list[JobProgressed] = []
    job = context(told)
    job.progress(1)
    job.ended = True
    for refused in (lambda: job.progress(2), lambda: job.child_id("t", b"{}")):
        with pytest.raises(JobEnded, match=rf"attempt 1 of job {JOB} \(t\) has ended.*contextvars"):
            refused()
    assert [said.done for said in told] == [1]


def test_hooks_that_are_told_of_an_outcome_report_no_progress() -> None:
    """They may submit jobs in the job's name, but the attempt is over."""
    job = running_job(JOB, "t", None)
    assert job.child_id("t", b"{}")
    with pytest.raises(JobEnded):
        job.progress(1)
