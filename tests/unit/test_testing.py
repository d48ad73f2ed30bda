"""The job context for tests: with it, a test may call a task that uses `current_job`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from jobledger import App, ConfigError, JobContext, current_job
from jobledger.definitions.context import maybe_current_job
from jobledger.errors import JobEnded
from jobledger.testing import job_context

app = App("tested")


@app.task(queue="mail")
def plain(rows: int) -> str:
    """A task that uses its job's context."""
    job = current_job()
    job.progress(done=1, total=rows, message="begun")
    job.progress(done=rows, total=rows)
    return f"{job.task}/{job.queue}/{job.attempt}/{job.tags.get('tenant')}"


@app.task
async def coroutine(rows: int) -> list[str]:
    """A coroutine with parts that run at the same time."""

    async def part(number: int) -> str:
        current_job().progress(done=number)
        return current_job().job_id

    return list(await asyncio.gather(*(part(n) for n in range(rows))))


def test_a_task_is_called_in_a_test_as_a_job() -> None:
    """`current_job()` is a real `JobContext` with the values of the test. The progress reports are kept in order."""
    with job_context(plain, attempt=3, tags={"tenant": "acme"}) as job:
        assert current_job() is job
        assert plain(7) == "plain/mail/3/acme"
    assert isinstance(job, JobContext)
    assert [(r.done, r.total, r.message) for r in job.reports] == [(1, 7, "begun"), (7, 7, None)]


def test_coroutines_in_the_block_have_the_job() -> None:
    """Coroutines that run as asyncio tasks have the job, too."""
    with job_context(coroutine) as job:
        assert asyncio.run(coroutine(3)) == [job.job_id] * 3
    assert sorted(r.done for r in job.reports) == [0, 1, 2]
    uuid.UUID(job.job_id)


def test_blocks_of_job_context_can_be_nested() -> None:
    """After a block the outer job is current again, or no job. An ended job refuses reports, as in a worker."""
    with job_context("outer") as outer:
        with job_context("inner") as inner:
            assert current_job() is inner
        assert current_job() is outer
        with pytest.raises(JobEnded):
            inner.progress(1)
    assert maybe_current_job() is None
    with pytest.raises(ConfigError, match=r"jobledger\.testing\.job_context"):
        plain(1)


def test_the_same_job_has_the_same_children() -> None:
    """The ids of jobs that are submitted in the block are computed from the job's id, as for a rerun in a worker."""
    mine = str(uuid.uuid4())

    def child() -> str:
        with job_context(plain, job_id=mine.upper(), parent=str(uuid.uuid4())) as job:
            assert job.job_id == mine
            return job.child_id("plain", b"{}")

    assert child() == child()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attempt": 0}, "attempt=0"),
        ({"run": True}, "run=True"),
        ({"job_id": "mine"}, "job_id='mine' is not a UUID"),
        ({"parent": "mine"}, "parent='mine' is not a UUID"),
        ({"tags": {"n": 1}}, "'n'=1"),
    ],
)
def test_wrong_values_for_a_job_are_refused(options: dict[str, Any], expected: str) -> None:
    """A submission would refuse these values, too."""
    with pytest.raises(ConfigError, match=expected), job_context(**options):
        pass
