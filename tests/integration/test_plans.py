"""Plans with a real log, a real status table, and the processes that carry them out."""

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
from jobledger.errors import BadArguments, ConfigError, JobNotFound, PlanNotFound, UnknownQueue
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader
from jobledger.plan import PlanStatus
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.maintenance.plans import PlanRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import rebuild
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
        self._thread = threading.Thread(target=self.table.run, args=(self._stop,))
        self._thread.start()
        stack.callback(self.stop_table)
        wait_until(lambda: self.table.active, 20, "the materializer becoming active")
        self.reader = stack.enter_context(closing(open_reader(str(self.settings.status_url), namespace)))
        for command in ("coordinator", "worker"):
            process = subprocess.Popen(
                [sys.executable, "-m", "jobledger", command, f"{APP}:app"], env=self.environ, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)

    def stop_table(self) -> None:
        """Stop the materializer."""
        self._stop.set()
        self._thread.join(DONE_S)

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

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "jobledger", *words],
            env=self.environ, capture_output=True, text=True, timeout=DONE_S, check=False,
        )  # fmt: skip

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
    copy = world.app.copy(job_ids[0], args={"n": 70}, queue="slow")
    plan = world.app.redrive(ids=job_ids, queue="slow")
    assert plan.plan is not None
    done = world.carried_out(plan.plan)
    assert (done.done, done.failed, done.error) == (2, 0, None)
    assert copy.result(DONE_S) == 70
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
    with pytest.raises(JobNotFound, match="cannot be copied: the log no longer has its arguments"):
        world.app.copy(lost)


def test_a_copy_with_changed_arguments_is_a_new_job(world: World) -> None:
    """The copy names the original and who asked for it, in the table, in the timeline and on the command line. The
    original is not changed. A copy whose arguments do not fit is not submitted."""
    world.mended.touch()
    handle = world.fragile.using(tags={"tenant": "acme"}, delay=3600).submit(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        handle.copy(colour="red")  # type: ignore[call-arg]  # not an option
    wait_until(lambda: len(world.reader.statuses([handle.job_id])) == 1, DONE_S, "the table knowing the job")
    with pytest.raises(BadArguments, match="do not fit fragile"):
        handle.copy(args={"n": "many"})
    copy = handle.copy(args={"n": 5}, by="ann", reason="five is enough")
    assert copy.result(DONE_S) == 5
    status = copy.status()
    assert (status.copy_of, status.by, status.run, status.tags) == (handle.job_id, "ann", 1, {"tenant": "acme"})
    assert world.states([handle.job_id]) == [(State.SCHEDULED, 1)]
    target = f"{APP}:app"
    made = json.loads(
        world.command("jobs", "copy", target, handle.job_id, "--set", "n=6", "--queue", "slow", "--json").stdout
    )
    assert (made["copy_of"], made["queue"]) == (handle.job_id, "slow")
    wait_until(lambda: world.states([made["job_id"]]) == [(State.SUCCEEDED, 1)], DONE_S, "the success of the copy")
    shown = json.loads(world.command("jobs", "show", target, copy.job_id, "--timeline", "--json").stdout)
    assert shown["copy_of"] == handle.job_id
    assert shown["timeline"][0]["fact"]["spec"]["links"] == {
        "copy_of": handle.job_id, "copied_by": "ann", "copy_reason": "five is enough",
    }  # fmt: skip
    text = world.command("jobs", "show", target, copy.job_id).stdout
    assert f"copy of {handle.job_id}" in " ".join(text.split())
    assert world.command("jobs", "copy", target, handle.job_id, "--set", "n=many").returncode == 2
    assert world.command("jobs", "copy", "--namespace", "x", handle.job_id).returncode == 2


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


def test_many_jobs_are_cancelled_by_a_plan(world: World) -> None:
    """Another process carries out a plan of cancels. A job that has ended meanwhile, and a job whose run has changed, are
    skipped; the others end as cancelled, and their log says who asked."""
    app = world.app
    job_ids = [world.fragile.using(tags={"tenant": "acme"}, delay=3600).submit(n).job_id for n in range(9)]
    other = world.fragile.using(delay=3600).submit(9).job_id
    wait_until(lambda: len(world.reader.statuses([*job_ids, other])) == 10, DONE_S, "the table knowing the jobs")
    assert app.cancel_many(where={"tag": ("tenant", "acme")}, dry_run=True).matched == 9
    plan = app.cancel_many(where={"tag": ("tenant", "acme")}, rate="2/s", by="ann", reason="wrong list")
    assert plan.plan is not None
    app.cancel(job_ids[0], by="bob")
    wait_until(lambda: world.states(job_ids[:1]) == [(State.CANCELLED, 1)], DONE_S, "the end of one job")
    redriven = app.redrive(ids=job_ids[:1], queue="slow")
    assert redriven.plan is not None
    wait_until(lambda: world.knows(redriven.plan or ""), 20, "the table knowing the plans")
    first = world.runner()
    world.round(first)  # some of the cancels, and the redrive
    done = world.carried_out(plan.plan)  # another process
    assert (done.state, done.action, done.matched, done.failed) == (PlanState.DONE, "cancel", 9, 0)
    assert (done.done, done.skipped) == (8, 1), "the job that bob cancelled is skipped"
    assert world.carried_out(redriven.plan).done == 1
    wait_until(lambda: world.states(job_ids[1:]) == [(State.CANCELLED, 1)] * 8, DONE_S, "the end of the jobs")
    status = app.job(job_ids[3])
    assert (status.by, status.reason) == ("ann", "wrong list")
    assert world.states([other]) == [(State.SCHEDULED, 1)]
    assert world.states(job_ids[:1])[0][1] == 2
    with pytest.raises(ConfigError, match="which jobs"):
        app.cancel_many()
    with pytest.raises(ConfigError, match="have ended and cannot be cancelled"):
        app.cancel_many(where={"state": "failed"})
    with pytest.raises(JobNotFound):
        app.cancel_many(ids=["00000000-0000-7000-8000-000000000000"])


def test_a_part_that_was_begun_before_a_pause_is_judged_again_after_it(world: World) -> None:
    """A job that another plan redrove during the pause is skipped when the plan is resumed."""
    job_ids = world.fail(3)
    world.mended.touch()
    plan = world.app.redrive(ids=job_ids, rate=0.6)  # one part of three jobs
    assert plan.plan is not None
    runner = world.runner()
    wait_until(lambda: world.knows(plan.plan or ""), 20, "the table knowing the plan")
    world.round(runner)  # only the first job, because of the rate
    assert [run for _, run in world.states(job_ids)].count(2) <= 1
    plan.pause()
    wait_until(lambda: plan.status().state is PlanState.PAUSED, 20, "the pause")
    twin = world.app.redrive(ids=job_ids)
    assert twin.plan is not None
    assert world.carried_out(twin.plan, runner).done == 2
    plan.resume()
    done = world.carried_out(plan.plan, runner)
    assert (done.done, done.skipped, done.failed) == (1, 2, 0)


def test_the_facts_of_ended_plans_are_deleted(world: World) -> None:
    """They are deleted up to the first plan that has not ended, which can still be carried out. The table keeps the
    rows of the others, also through a rebuild."""
    job_ids = world.fail(2)
    first = world.app.redrive(ids=job_ids[:1])
    assert first.plan is not None
    world.carried_out(first.plan)
    second = world.app.redrive(ids=job_ids[1:])
    assert second.plan is not None
    wait_until(lambda: world.knows(second.plan or ""), 20, "the table knowing the plan")
    topic = world.app.names.plans
    cadence = Cadence(retention=-60.0)  # everything is past the retention age
    maintenance = Maintenance(world.app.names, world.settings, ["mail", "slow"], world.reader, cadence=cadence)
    with closing(LogReader(world.settings)) as log:
        assert maintenance.trim_plans() == 4, "opened, listed, sealed, advanced"
        assert log.bounds(topic, 0)[0] == 4
        assert maintenance.trim_plans() == 0, "the second plan has not ended"
        assert world.carried_out(second.plan).done == 1
        wait_until(lambda: maintenance.trim_plans() == 4, 20, "the end of the second plan being read")
        assert log.bounds(topic, 0) == (8, 8)
    assert {plan.plan for plan in world.app.plans()} == {first.plan, second.plan}
    world.stop_table()
    rebuild(world.app.names, world.settings, ["mail", "slow"], str(world.settings.status_url))
    with closing(open_reader(str(world.settings.status_url), world.app.names.namespace)) as rebuilt:
        assert {plan.plan: plan.done for plan in rebuilt.plans()} == {first.plan: 1, second.plan: 1}


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

    run = world.command
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


def test_jobs_are_cancelled_from_the_command_line(world: World) -> None:
    """With --where the output is a plan, as of a redrive. Without a filter, and with a state of jobs that have ended,
    nothing is done."""
    job_ids = [world.fragile.using(delay=3600).submit(n).job_id for n in range(3)]
    wait_until(lambda: len(world.reader.statuses(job_ids)) == 3, DONE_S, "the table knowing the jobs")
    where = ["--where", "task=fragile", "--where", "since=1h"]
    target = f"{APP}:app"
    dry = json.loads(world.command("jobs", "cancel", target, *where, "--dry-run", "--json").stdout)
    assert (dry["plan"], dry["matched"], set(dry["examples"])) == (None, 3, set(job_ids))
    assert world.command("jobs", "cancel", target).returncode == 2
    assert world.command("jobs", "cancel", target, "--where", "state=failed").returncode == 2
    assert world.command("jobs", "cancel", target, job_ids[0], "--rate", "5/s").returncode == 2
    made = json.loads(world.command("jobs", "cancel", target, *where, "--json", "--by", "ann").stdout)
    assert made["matched"] == 3
    assert world.carried_out(made["plan"]).done == 3
    assert "3 (cancels requested)" in world.command("plans", "show", target, made["plan"]).stdout
    wait_until(lambda: world.states(job_ids) == [(State.CANCELLED, 1)] * 3, DONE_S, "the end of the jobs")
    nothing = json.loads(world.command("jobs", "cancel", target, *where, "--json").stdout)
    assert (nothing["plan"], nothing["matched"]) == (None, 0)
