"""The removal of rows of ended jobs with a real log: what goes, what stays, and what `verify` and `rebuild` say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from jobledger.job import ENDS, State
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import standalone
from jobledger.streams.maintenance.maintenance import Cadence, Maintenance
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.rebuild import rebuild, verify
from jobledger.streams.status.store import StatusReader
from tests.integration.test_materializer import Running, World, new_id
from tests.patience import wait_until

pytestmark = pytest.mark.kafka


class Bench:
    """A namespace with a materializer, and the maintenance that gives its remover orders."""

    def __init__(self, world: World, made: Materializer, reader: StatusReader) -> None:
        self.world, self.made, self.reader = world, made, reader

    def remove(self, *states: State, seconds: float = 0.0) -> bool:
        """Remove the rows of these states that ended ``seconds`` ago or earlier; return whether an order was given."""
        world = self.world
        maintenance = Maintenance(
            *(world.names, world.settings, ["mail"], self.reader),
            cadence=Cadence(table_retention=dict.fromkeys(states, seconds)),
            remover=self.made.remover,
        )
        try:
            asked = maintenance.remove_rows()
        finally:
            maintenance.close()
        wait_until(lambda: not self.made.remover.busy, 20, "the rows being removed")
        return asked

    def age(self) -> None:
        """Wait until everything in the log is older than now, also by another clock of this machine."""
        now = time.time()
        wait_until(lambda: time.time() > now + 0.05, 5, "time passing")

    def plan(self, plan_id: str, *facts: ev.Fact) -> None:
        """Write facts of a plan."""
        names = self.world.names
        for fact in facts:
            event = standalone(fact, new_id(), 0, "test", job_id=plan_id)
            self.world.send((names.plans, plan_id, codec.encode(event), 0))


@pytest.fixture
def world(broker: str, namespace: str, tmp_path: Path) -> Iterator[World]:
    with closing(World(broker, namespace, f"sqlite:///{tmp_path / 'status.db'}")) as made:
        yield made


def test_rows_go_and_verify_and_rebuild_know(world: World) -> None:
    """Rows of succeeded jobs go. `verify` finds the table equal, and a rebuild makes the same table again. A row that is
    missing although its retention is not over is a difference, and is restored."""
    ids = world.fill(70)
    with ExitStack() as stack:
        running = stack.enter_context(Running(world.materializer()))
        running.catch_up()
        reader = stack.enter_context(closing(world.reader()))
        bench = Bench(world, running.made, reader)
        states = reader.states(ids)
        gone = {job_id for job_id in ids if states[job_id] is State.SUCCEEDED}
        assert not bench.remove(), "without a retention nothing goes"
        assert bench.remove(State.SUCCEEDED, seconds=3600)
        assert len(reader.states(ids)) == 70, "no row is that old"
        bench.age()
        assert bench.remove(State.SUCCEEDED)
        assert reader.states(ids) == {job_id: state for job_id, state in states.items() if job_id not in gone}
        removed = running.made.metrics.registry.get_sample_value(
            "jobledger_table_removed_rows_total", {"namespace": world.names.namespace, "state": "succeeded"}
        )
        assert removed == len(gone)
        found = verify(world.names, world.settings, ["mail"], world.url)
        assert (found.equal, found.removed, found.jobs) == (True, len(gone), 70 - len(gone))
        later = new_id()
        world.write_facts(later, ev.JobSubmitted(ev.JobSpec(b"{}")), ev.JobSucceeded())
        running.catch_up()
    failed = next(job_id for job_id in ids if states[job_id] is State.FAILED)
    for job_id, state in ((later, "succeeded"), (failed, "failed")):
        world.execute(
            f"DELETE FROM jobs WHERE job_id = '{job_id}'",
            f"UPDATE counters SET jobs = jobs - 1 WHERE state = '{state}'",
        )
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert (found.equal, found.counters_equal, found.removed) == (False, True, len(gone))
    assert set(found.first_differing) == {later, failed}
    made = rebuild(world.names, world.settings, ["mail"], world.url)
    assert (made.jobs, made.removed) == (71 - len(gone), len(gone))
    found = verify(world.names, world.settings, ["mail"], world.url)
    assert (found.equal, found.removed) == (True, len(gone))
    with closing(world.reader()) as reader:
        assert reader.states([later, failed]) == {later: State.SUCCEEDED, failed: State.FAILED}
        assert not reader.states(sorted(gone))


def test_a_late_fact_begins_no_row_that_stays(world: World) -> None:
    """A start that arrives after the removal begins a row. `verify` does not count it as a difference, and it goes when
    it is old itself. A job that has not ended stays."""
    ids = [new_id(), new_id()]
    spec = ev.JobSpec(b"{}", {"tenant": "acme"})
    started = ev.JobStarted("h:1", None, {}, world.names.jobs("mail"), 0)
    with ExitStack() as stack:
        running = stack.enter_context(Running(world.materializer()))
        running.catch_up()
        reader = stack.enter_context(closing(world.reader()))
        bench = Bench(world, running.made, reader)
        world.write_facts(ids[0], ev.JobSubmitted(spec), started, ev.JobSucceeded())
        world.write_facts(ids[1], ev.JobSubmitted(spec), started)
        running.catch_up()
        bench.age()
        assert bench.remove(*ENDS)
        assert reader.states(ids) == {ids[1]: State.RUNNING}
        world.write_facts(ids[0], started)
        running.catch_up()
        assert reader.states(ids) == dict.fromkeys(ids, State.RUNNING)
        found = verify(world.names, world.settings, ["mail"], world.url)
        assert (found.equal, found.removed, found.jobs) == (True, 1, 1)
        bench.age()
        assert bench.remove(*ENDS)
        assert reader.states(ids) == {ids[1]: State.RUNNING}
        found = verify(world.names, world.settings, ["mail"], world.url)
        assert (found.equal, found.removed, found.jobs) == (True, 1, 1)


def test_no_row_goes_while_a_plan_has_not_ended(world: World) -> None:
    """A paused plan keeps the rows of the jobs that it names. After it was aborted, they go."""
    ids = world.fill(20)
    plan_id = new_id()
    with ExitStack() as stack:
        running = stack.enter_context(Running(world.materializer()))
        running.catch_up()
        reader = stack.enter_context(closing(world.reader()))
        bench = Bench(world, running.made, reader)
        bench.plan(
            plan_id,
            ev.PlanOpened("redrive", "{}", None, None, "ann"),
            ev.PlanListed(0, [ev.PlannedJob(ids[0], 1)]),
            ev.PlanSealed(1, 1),
            ev.PlanSteered("paused", "ann"),
        )
        running.catch_up()
        bench.age()
        assert not bench.remove(*ENDS)
        assert len(reader.states(ids)) == 20
        bench.plan(plan_id, ev.PlanSteered("aborted", "ann"))
        running.catch_up()
        assert bench.remove(*ENDS)
        assert set(reader.states(ids).values()) == {State.QUEUED}
