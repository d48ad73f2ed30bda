"""``jobledger plans list|show|pause|resume|abort``: shows and steers actions on many jobs."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli import output
from jobledger.cli.commands import CommandGroup, words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import AppOption, AppWord, Bootstrap, By, Json, Namespace, Reason, StatusUrl
from jobledger.cli.output import Cell
from jobledger.process.wording import counted
from jobledger.views.jobs import plan_json

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.definitions.handles import Plan
    from jobledger.plan import PlanStatus

app = CommandGroup(
    name="plans", help="List and show plans: actions on many jobs. Pause, resume and abort them.", no_args_is_help=True
)

#: Seconds between two looks at a plan that is waited for.
LOOK_S = 0.2

OnePlan = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE:APP] PLAN",
        help="The plan's id; put the app before it, unless an option names the app.",
        show_default=False,
    ),
]


@contextmanager
def _one(
    words: list[str] | None, app: str | None, namespace: str | None, bootstrap: str | None, status_url: str | None
) -> Iterator[tuple[App, str]]:
    """Yield the app and the plan's id of a command line. The app is closed afterwards."""
    parsed = words_of(words, app is not None or namespace is not None, "PLAN", 1)
    queried = find_app(parsed.target or app, namespace, bootstrap, status_url)
    try:
        yield queried, parsed.others[0]
    finally:
        queried.close()


@app.command("list")
def list_plans(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of plans.")] = 50,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """List plans, newest first."""
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    queried = find_app(parsed.target or app, namespace, bootstrap, status_url)
    try:
        found = queried.plans(limit)
    finally:
        queried.close()
    if as_json:
        output.print_json([plan_json(plan) for plan in found])
        return
    headings = ("plan", "action", "state", "jobs", "done", "skipped", "failed", "made", "by")
    output.print_table(headings, [_row(plan) for plan in found], optional=("made", "by"), empty="no plans")


@app.command("show")
def show(
    words: OnePlan = None,
    app: AppOption = None,
    namespace: Namespace = None,
    bootstrap: Bootstrap = None,
    status_url: StatusUrl = None,
    as_json: Json = False,
) -> None:
    """Show one plan; exit code 3 if the status table does not know it."""
    with _one(words, app, namespace, bootstrap, status_url) as (queried, plan_id):
        print_plan(queried.plan(plan_id), as_json)


def _steering(name: str, to: str, text: str, said: str) -> None:
    @app.command(name, help=text)
    def steer(
        words: OnePlan = None,
        app: AppOption = None,
        namespace: Namespace = None,
        reason: Reason = None,
        by: By = None,
        bootstrap: Bootstrap = None,
        status_url: StatusUrl = None,
        as_json: Json = False,
    ) -> None:
        from jobledger.plan import PlanState

        with _one(words, app, namespace, bootstrap, status_url) as (queried, plan_id):
            status = queried.plan(plan_id)  # raises an error for an unknown plan
            ended = status.state.ended
            if not ended:
                queried.client.plans.steer(plan_id, PlanState(to), reason, by)
        if as_json:
            output.print_json({"plan": plan_id, "requested": None if ended else to, "state": status.state.value})
        else:
            answer = f"plan {plan_id} has ended: {status.state.value}" if ended else f"plan {plan_id}: {said}"
            output.console().print(answer, markup=False, highlight=False)


_steering("pause", "paused", "Pause a plan: nothing more is done until the plan is resumed.", "requested the pause")
_steering("resume", "running", "Resume a paused plan.", "requested the resume")
_steering(
    "abort", "aborted", "End a plan before all its jobs are done. What was done is not undone.", "requested the abort"
)


def print_plan(plan: PlanStatus, as_json: bool) -> None:
    """Print one plan."""
    if as_json:
        output.print_json(plan_json(plan))
        return
    shown: list[tuple[str, Cell]] = [
        ("plan", plan.plan),
        ("action", plan.action + ("" if plan.queue is None else f", to queue {plan.queue}")),
        ("state", plan.state.value + ("" if plan.steered is None else f" {plan.steered}")),
        ("jobs", f"{plan.matched}, where {plan.where}" if plan.where != "{}" else str(plan.matched)),
        ("done", f"{plan.done}" + (" (cancels requested)" if plan.done and plan.action == "cancel" else "")),
        ("skipped", f"{plan.skipped}" + (" (they had changed)" if plan.skipped else "")),
        ("failed", f"{plan.failed}" + ("" if plan.error is None else f" ({plan.error})")),
        ("made", f"{output.clock(_moment(plan.opened_ms))} by {plan.by}"),
    ]
    if plan.reason is not None:
        shown.append(("reason", plan.reason))
    if plan.ended_ms is not None:
        shown.append(("ended", output.clock(_moment(plan.ended_ms))))
    output.print_fields(shown)


def show_made(plan: Plan, wait: bool, as_json: bool) -> None:
    """Print a plan that was just made. With ``wait``: wait for the end of the plan first."""
    if wait:
        print_plan(_awaited(plan, quiet=as_json), as_json)
    elif as_json:
        output.print_json({"plan": plan.plan, "matched": plan.matched, "position": str(plan.position)})
    else:
        text = (
            f"plan {plan.plan}: {counted(plan.matched, 'job')}; `jobledger plans show {plan.plan}` shows how far it is"
        )
        output.console().print(text, markup=False, highlight=False)


def _awaited(plan: Plan, quiet: bool) -> PlanStatus:
    """Wait for a plan; on a terminal a bar shows its progress."""
    console = output.console(stderr=True)
    if quiet or not console.is_terminal:
        return plan.wait()
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("waiting", total=plan.matched)
        while True:
            status = plan.status(timeout=60.0)
            progress.update(bar, completed=status.done + status.skipped + status.failed, description=status.state.value)
            if status.state.ended:
                return status
            time.sleep(LOOK_S)


def _row(plan: PlanStatus) -> list[Cell]:
    numbers = (plan.matched, plan.done, plan.skipped, plan.failed)
    return [
        *(plan.plan, plan.action, plan.state.value, *map(str, numbers)),
        *(output.brief(_moment(plan.opened_ms)), plan.by),
    ]


def _moment(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)
