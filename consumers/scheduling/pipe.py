"""Joins the parts of a worker through which a job passes, from the taken record to the recorded outcome.

Each part knows only the parts that it uses, and these are created before it. What a part has to tell the dispatcher
goes through `Reports`. A job itself refers to the holder of its lease (`JobRun.lease`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobledger.consumers.isolation.pool import ChildSettings
from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.running.executor import Executor
from jobledger.consumers.running.job_leases import JobLeases
from jobledger.consumers.running.placement import Placement
from jobledger.consumers.scheduling.admission import Admission
from jobledger.consumers.scheduling.control_reader import Control
from jobledger.consumers.scheduling.lanes import Lanes
from jobledger.consumers.scheduling.slot_queues import SlotQueues
from jobledger.consumers.scheduling.starter import Starter
from jobledger.consumers.scheduling.wait_queues import Lookahead, WaitQueues
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.task_table import TaskTable
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.schemas import codec


@dataclass(frozen=True, slots=True)
class PipeOptions:
    """``queues``: the queues to serve. ``concurrency``: jobs that run at once. ``lookahead``: how much may wait.
    ``children``: the settings of the child processes; None if the app cannot have child processes."""

    queues: Sequence[str]
    concurrency: int
    lookahead: Lookahead
    children: ChildSettings | None = None


@dataclass(frozen=True, slots=True)
class Pipe:
    """The parts, in the order in which a job passes through them; before them what they share."""

    reports: Reports
    running: RunningJobs
    tasks: TaskTable
    lanes: Lanes
    control: Control
    admission: Admission
    wait_queues: WaitQueues
    slot_queues: SlotQueues
    starter: Starter
    leases: JobLeases
    placement: Placement
    executor: Executor
    recorder: Recorder


def build(
    registry: TaskRegistry,
    decoder: codec.Decoder,
    sender: WorkerProducer,
    recorder: Recorder,
    reports: Reports,
    tasks: TaskTable,
    options: PipeOptions,
) -> Pipe:
    """Create the parts, each after the parts that it uses."""
    running_jobs, control = RunningJobs(options.concurrency), Control()
    lanes = Lanes(registry, options.queues, tasks)
    executor = Executor(recorder, running_jobs, reports)
    placement = Placement(executor, recorder, running_jobs, tasks, options.children, reports)
    leases = JobLeases(sender, recorder, reports)
    starter = Starter(recorder, placement, leases, lanes, control, running_jobs, sender.clock)
    wait_queues = WaitQueues(starter, placement, recorder, lanes, tasks, options.lookahead, sender.clock, reports)
    slot_queues = SlotQueues(starter, placement, recorder, lanes, wait_queues)
    admission = Admission(decoder, starter, placement, wait_queues, lanes, tasks, recorder, reports)
    return Pipe(
        reports=reports,
        running=running_jobs,
        tasks=tasks,
        lanes=lanes,
        control=control,
        admission=admission,
        wait_queues=wait_queues,
        slot_queues=slot_queues,
        starter=starter,
        leases=leases,
        placement=placement,
        executor=executor,
        recorder=recorder,
    )
