"""The progress display while a command waits for a job: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobledger.cli import output
from jobledger.errors import JobledgerError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from jobledger.app import App

#: Seconds between two polls of the job.
LOOK_S = 0.25


@contextmanager
def showing_progress(app: App, job_id: str, *, quiet: bool) -> Iterator[None]:
    """Show the job's state and progress on standard error while the block waits, and remove them afterwards."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    over = threading.Event()
    message_column = TextColumn("{task.fields[message]}", markup=False)  # the job's message may look like markup
    columns = (TextColumn("{task.description}"), BarColumn(), message_column, TimeElapsedColumn())
    with Progress(*columns, console=output.console(stderr=True), transient=True) as bar:
        line = bar.add_task("submitted", total=None, message="")
        thread = threading.Thread(target=_follow, args=(app, job_id, bar, line, over), name="jobledger-progress")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _follow(app: App, job_id: str, bar: Progress, line: TaskID, over: threading.Event) -> None:
    from jobledger.views.facts import progress

    while not over.wait(LOOK_S):
        # The block, which waits for the job, reports such an error itself.
        with contextlib.suppress(JobledgerError):
            seen = app.status_table().job(job_id)
            done = seen.progress
            bar.update(
                line,
                description=seen.state.value,
                # Without a total, the bar only shows that the job runs.
                total=done.total if done is not None and done.total else None,
                completed=0 if done is None else done.done,
                message="" if done is None else output.shorten(progress(done.done, done.total, done.message)),
            )
