"""The context for tests of tasks: a test may call a task that asks for its job."""

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
    """A task that asks for its job."""
    job = current_job()
    job.progress(done=1, total=rows, message="begun")
    job.progress(done=rows, total=rows)
    return f"{job.task}/{job.queue}/{job.attempt}/{job.tags.get('tenant')}"


@app.task
async def coroutine(rows: int) -> list[str]:
    """A coroutine whose parts run side by side."""

    async def part(number: int) -> str:
        current_job().progress(done=number)
        return current_job().job_id

    return list(await asyncio.gather(*(part(n) for n in range(rows))))


def test_a_task_is_called_in_a_test_as_a_job() -> None:
    """`current_job()` is a real `JobContext` with what the test gave; its reports are kept in order."""
    with job_context(plain, attempt=3, tags={"tenant": "acme"}) as job:
        assert current_job() is job
        assert plain(7) == "plain/mail/3/acme"
    assert isinstance(job, JobContext)
    assert [(r.done, r.total, r.message) for r in job.reports] == [(1, 7, "begun"), (7, 7, None)]


def test_coroutines_of_the_block_are_in_the_job() -> None:
    """Also those that run as tasks of their own."""
    with job_context(coroutine) as job:
        assert asyncio.run(coroutine(3)) == [job.job_id] * 3
    assert sorted(r.done for r in job.reports) == [0, 1, 2]
    uuid.UUID(job.job_id)


def test_blocks_nest_and_end() -> None:
    """After a block the job before it is current again, or none; an ended job takes no reports, as in a worker."""
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
    """Ids of jobs that are submitted inside follow from the job's id, as for a rerun in a worker."""
    mine = str(uuid.uuid4())

    def child() -> str:
        with job_context(plain, job_id=mine.upper(), parent=str(uuid.uuid4())) as job:
            assert job.job_id == mine
            return job.child_id("plain", b"{}")

    assert child() == child()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attempt": 0}, "attempt=0"),
        ({"run": True}, "run=True"),
        ({"job_id": "mine"}, "job_id='mine' is not a UUID"),
        ({"parent": "mine"}, "parent='mine' is not a UUID"),
        ({"tags": {"n": 1}}, "'n'=1"),
    ],
)
def test_what_no_job_can_have_is_refused(options: dict[str, Any], said: str) -> None:
    """As a submission would refuse it."""
    with pytest.raises(ConfigError, match=said), job_context(**options):
        pass
