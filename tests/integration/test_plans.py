"""Redrives with a real log, a real status table, and the processes that carry them out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from jobledger import App, PlanState, Settings, State
from jobledger.errors import ConfigError, JobNotFound, PlanNotFound, UnknownQueue
from jobledger.kafka.topics import ensure
from jobledger.plan import PlanStatus
from jobledger.streams.maintenance.plans import PlanRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_reader
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

APP = Path(__file__).with_name("plans_app.py")
DONE_S = 60 * PATIENCE


class World:
    """A namespace whose jobs fail until a file exists, with a worker and a coordinator in processes of their own. The
    test itself runs the materializer and the plans."""

    def __init__(self, broker: str, namespace: str, folder: Path, stack: ExitStack) -> None:
        self.folder, self.mended, self.closing = folder, folder / "mended", stack
        self.environ = {
            **os.environ,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_STATUS_URL": f"sqlite:///{folder / 'status.db'}",
            "JOBLEDGER_HOME": str(folder),
            "JOBLEDGER_VERSION": "one",
            "NAMESPACE": namespace,
            "MENDED": str(self.mended),
        }
        self.settings = Settings(bootstrap=broker, status_url=self.environ["JOBLEDGER_STATUS_URL"], home=folder)
        self.app = App(namespace, settings=self.settings, partitions=2, queues=["mail", "slow"])
        stack.callback(self.app.close)

        @self.app.task(queue="mail", retry=1, name="fragile")
        def fragile(n: int) -> int:
            return n

        self.fragile = fragile
        ensure(self.app, self.settings)
        self._stop = threading.Event()
        self.table = Materializer(self.app.names, self.settings, ["mail", "slow"], str(self.settings.status_url))
        thread = threading.Thread(target=self.table.run, args=(self._stop,))
        thread.start()
        stack.callback(thread.join, DONE_S)
        stack.callback(self._stop.set)
        wait_until(lambda: self.table.active, 20, "the materializer becoming active")
        self.reader = stack.enter_context(closing(open_reader(str(self.settings.status_url), namespace)))
        for command in ("coordinator", "worker"):
            process = subprocess.Popen(
                [sys.executable, "-m", "jobledger", command, f"{APP}:app"], env=self.environ, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)

    def runner(self) -> PlanRunner:
        """Return what carries out plans. It does nothing until `round` is called."""
        made = PlanRunner(self.app.names, self.settings, self.app.lanes, self.reader)
        self.closing.callback(made.close)
        return made

    def round(self, runner: PlanRunner) -> None:
        """Carry out one part of each plan."""
        runner.round(self._stop)

    def carried_out(self, plan_id: str, runner: PlanRunner | None = None) -> PlanStatus:
        """Carry out a plan to its end, and return its final state."""
        runner = runner or self.runner()

        def ended() -> bool:
            self.round(runner)
            return self.app.plan(plan_id).state.ended

        wait_until(lambda: self.knows(plan_id), 20, "the table knowing the plan")
        wait_until(ended, DONE_S, "the end of the plan")
        return self.app.plan(plan_id)

    def knows(self, plan_id: str) -> bool:
        try:
            self.app.plan(plan_id)
        except PlanNotFound:
            return False
        return True

    def fail(self, count: int, **options: str) -> list[str]:
        """Submit jobs that fail, and return their ids when the table shows that."""
        handles = [self.fragile.using(tags=options).submit(n) for n in range(count)]
        for handle in handles:
            assert handle.wait(DONE_S).state is State.FAILED
        return [handle.job_id for handle in handles]

    def states(self, job_ids: list[str]) -> list[tuple[State, int]]:
        """Return state and run of each job."""
        known = self.reader.statuses(job_ids)
        return [(known[job_id].state, known[job_id].run) for job_id in job_ids]


@pytest.fixture
def world(broker: str, namespace: str, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(broker, namespace, tmp_path, stack)


def test_failed_jobs_run_again_once_for_each_redrive(world: World) -> None:
    """Each job runs again as run 2 of the same id, also if the process that carries the plan out dies in between, and
    if a second plan names the same runs."""
    job_ids, others = world.fail(12, tenant="acme"), world.fail(2, tenant="other")
    world.mended.touch()
    assert world.app.redrive(where={"tag": ("tenant", "acme")}, dry_run=True).matched == 12
    plan = world.app.redrive(
        where={"task": "fragile", "tag": ("tenant", "acme")}, rate="2/s", by="ann", reason="mended"
    )
    twin = world.app.redrive(ids=job_ids[:3], by="bob")
    assert plan.plan is not None
    assert twin.plan is not None
    first = world.runner()
    wait_until(lambda: world.knows(twin.plan or ""), 20, "the table knowing the plans")
    world.round(first)  # the first job of ten of a part, and all of the other plan
    done = world.carried_out(plan.plan)  # another process
    assert (done.state, done.matched, done.failed, done.by) == (PlanState.DONE, 12, 0, "ann")
    assert plan.wait(1.0) == done
    doubled = world.carried_out(twin.plan)
    assert (doubled.state, doubled.matched, doubled.failed) == (PlanState.DONE, 3, 0)
    assert done.done + doubled.done == 12, "each run was redriven by one of the plans"
    assert done.skipped + doubled.skipped == 3
    wait_until(lambda: world.states(job_ids) == [(State.SUCCEEDED, 2)] * 12, DONE_S, "the success of every job")
    assert world.states(others) == [(State.FAILED, 1)] * 2
    status = world.app.job(job_ids[5])  # only in the first plan
    assert (status.by, status.version, status.result, status.tags) == ("ann", "one", 5, {"tenant": "acme"})
    ran = sorted(map(int, (world.folder / "ran").read_text().split()))
    assert ran == sorted([*range(12), *range(2), *range(12)]), "each job has run twice: once in each run"


def test_a_plan_is_paused_resumed_and_aborted(world: World) -> None:
    """While a plan is paused nothing is redriven. After the abort the rest is left."""
    job_ids = world.fail(4)
    plan = world.app.redrive(ids=job_ids, rate=0.1)  # parts of one job
    assert plan.plan is not None
    runner = world.runner()
    wait_until(lambda: world.knows(plan.plan or ""), 20, "the table knowing the plan")
    plan.pause("wait", by="bob")
    wait_until(lambda: plan.status().state is PlanState.PAUSED, 20, "the pause")
    for _ in range(3):
        world.round(runner)
    assert plan.status().done == 0
    plan.resume()
    wait_until(lambda: plan.status().state is PlanState.RUNNING, 20, "the end of the pause")
    world.round(runner)
    wait_until(lambda: plan.status().done == 1, 20, "the first part")
    plan.abort(by="bob")
    done = plan.wait(DONE_S)
    assert (done.state, done.done, done.left, done.steered) == (PlanState.ABORTED, 1, 3, "by bob")
    world.round(runner)
    assert [run for _, run in world.states(job_ids)].count(2) == 1


def test_arguments_that_were_trimmed_come_from_the_dead_letter(world: World) -> None:
    """Without the submission and without a dead letter, the job counts as failed in the plan, which says why."""
    from confluent_kafka import TopicPartition

    from jobledger.kafka.clients import admin

    job_ids = world.fail(2)
    topic = world.app.names.jobs("mail")
    world.mended.touch()
    client = admin(world.settings)
    ends = [TopicPartition(topic, partition, -1) for partition in range(2)]
    for future in client.delete_records(ends).values():
        future.result(30)
    plan = world.app.redrive(ids=job_ids, queue="slow")
    assert plan.plan is not None
    done = world.carried_out(plan.plan)
    assert (done.done, done.failed, done.error) == (2, 0, None)
    wait_until(lambda: world.states(job_ids) == [(State.SUCCEEDED, 2)] * 2, DONE_S, "the success of every job")
    assert world.app.job(job_ids[0]).queue == "slow"

    world.mended.unlink()
    (lost,) = world.fail(1)
    for name in (topic, world.app.names.dead_letter):
        ends = [TopicPartition(name, partition, -1) for partition in range(2)]
        for future in client.delete_records(ends).values():
            future.result(30)
    plan = world.app.redrive(ids=[lost])
    assert plan.plan is not None
    done = world.carried_out(plan.plan)
    assert (done.done, done.failed) == (0, 1)
    assert done.error is not None
    assert lost in done.error
    assert "no longer has its arguments" in done.error


def test_a_redriven_job_can_be_cancelled(world: World) -> None:
    """A cancel without a run is for the job's present run."""
    job_ids = world.fail(1)
    world.app.pause(queue="slow")
    plan = world.app.redrive(ids=job_ids, queue="slow")
    assert plan.plan is not None
    assert world.carried_out(plan.plan).done == 1
    assert world.states(job_ids)[0][1] == 2, "a plan is done when the table shows its redrives"
    world.app.cancel(job_ids[0], by="bob")
    world.app.resume(queue="slow")
    wait_until(lambda: world.states(job_ids) == [(State.CANCELLED, 2)], DONE_S, "the end of the job")
    assert world.app.job(job_ids[0]).by == "bob"


def test_a_redrive_needs_a_filter_and_refuses_what_it_cannot_do(world: World) -> None:
    """Nothing is written before the error."""
    app = world.app
    with pytest.raises(ConfigError, match="which jobs"):
        app.redrive()
    with pytest.raises(ConfigError, match="which jobs"):
        app.redrive(where={"task": None})
    with pytest.raises(ConfigError, match="not both"):
        app.redrive(where={"task": "fragile"}, ids=["a"])
    with pytest.raises(ConfigError, match="can be redriven"):
        app.redrive(where={"state": "succeeded"})
    with pytest.raises(ConfigError, match="'colour' is not a filter"):
        app.redrive(where={"colour": "red"})  # type: ignore[arg-type]  # not a filter
    with pytest.raises(UnknownQueue):
        app.redrive(where={"task": "fragile"}, queue="fast")
    with pytest.raises(ConfigError, match="is not a rate"):
        app.redrive(where={"task": "fragile"}, rate=-1)
    with pytest.raises(JobNotFound):
        app.redrive(ids=["00000000-0000-7000-8000-000000000000"])
    with pytest.raises(PlanNotFound):
        app.plan("none")
    assert app.plans() == []
    assert app.redrive(where={"task": "fragile"}, dry_run=True).plan is None


def test_jobs_are_redriven_from_the_command_line(world: World) -> None:
    """The commands show the plan as text and as JSON; an unknown plan has the exit code 3."""
    job_ids = world.fail(3)
    world.mended.touch()
    where = ["--where", "task=fragile", "--where", "error=ValueError"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobledger", *words],
            env=world.environ, capture_output=True, text=True, timeout=DONE_S, check=False,
        )  # fmt: skip

    target = f"{APP}:app"
    dry = json.loads(run("jobs", "redrive", target, *where, "--dry-run", "--json").stdout)
    assert (dry["plan"], dry["matched"], set(dry["examples"])) == (None, 3, set(job_ids))
    assert run("jobs", "redrive", target).returncode == 2
    assert run("jobs", "redrive", target, "--where", "state=running").returncode == 2
    made = json.loads(run("jobs", "redrive", target, *where, "--json", "--by", "ann").stdout)
    assert made["matched"] == 3
    assert world.carried_out(made["plan"]).done == 3
    (listed,) = json.loads(run("plans", "list", target, "--json").stdout)
    assert listed["plan"] == made["plan"]
    shown = json.loads(run("plans", "show", target, made["plan"], "--json").stdout)
    assert (shown["state"], shown["done"], shown["by"], shown["where"]["task"]) == ("done", 3, "ann", ["fragile"])
    assert "has ended: done" in run("plans", "pause", target, made["plan"]).stdout
    assert run("plans", "show", target, "none").returncode == 3
