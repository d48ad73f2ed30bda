"""Runs a job's code on the event loop, in a thread or in a child process, and isolates jobs that may end a process.

A job that may have ended a process is a *suspect*. The next `JobStarted` of a suspect is acknowledged before its code
runs, and the code runs in a child process whose end this worker sees. After `CRASHES` starts without an outcome, the
last of them in such a child process, the job fails as ``crashed``. The other jobs run in other processes and are not
affected.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from functools import partial

from confluent_kafka import KafkaError, Message

from jobledger.consumers.isolation.pool import ChildPool, ChildSettings
from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.running.executor import Executor, context_of
from jobledger.consumers.state.limiters import Slots
from jobledger.consumers.state.outcome import Failed, Outcome, Succeeded
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.task_runtime import TaskRuntime
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import JobRun
from jobledger.errors import JobledgerError, TaskCancelled
from jobledger.process.identity import now_us
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.schemas.events import ErrorInfo

LOG = get_logger("jobledger.worker")

#: Number of starts without an outcome after which a job fails as ``crashed``, if this worker saw the end of the process
#: of the last start, or if child processes are not available.
CRASHES = 3
#: The same number if child processes are available and no worker saw such an end: the workers themselves died, perhaps
#: of another cause.
UNSEEN_CRASHES = 10
#: Number of starts without an outcome from which on suspects run one at a time. If the operating system kills a worker
#: and its child processes together, to free memory, each job that ran there seems to be the cause.
ONE_AT_A_TIME_FROM = 3
#: Number of suspects that run at once, each in an additional child process.
SUSPECTS = 16
#: Seconds until the worker checks again whether a job is still its own.
AGAIN_S = 0.1

_monotonic = time.monotonic


class Placement:
    """Runs begun jobs on the event loop, in threads or in child processes, and ends them. On the event loop.

    ``children``: the settings of the child processes; None if the app cannot have child processes.

    A suspect is *waiting* until its code is given to a child process. If its partition is handed over before that, the
    next owner runs the suspect.
    """

    def __init__(
        self,
        executor: Executor,
        recorder: Recorder,
        running_jobs: RunningJobs,
        tasks: TaskTable,
        children: ChildSettings | None,
        reports: Reports,
    ) -> None:
        self.executor, self._recorder, self._running_jobs = executor, recorder, running_jobs
        self._reports, self._calls = reports, reports.calls
        self._thread_slots, self._child_slots = tasks.threads, tasks.children
        self._one_at_a_time = Slots("one at a time", 1)  # see `ONE_AT_A_TIME_FROM`
        self._suspects = Slots("suspects", SUSPECTS)
        self.slots_by_name = {
            slots.name: slots for slots in (self._thread_slots, self._child_slots, self._one_at_a_time, self._suspects)
        }
        self.children = None if children is None else ChildPool(children, self)
        #: Each job's context is a copy of this one, because a job must not see variables that another job has set.
        self._base = contextvars.copy_context()

    @property
    def _usable(self) -> bool:
        """Whether child processes are available."""
        return self.children is not None and self.children.start_error is None

    def slots_of(self, work: JobRun, runtime: TaskRuntime) -> Slots | None:
        """Return the slots in which the job's code must run. None: the code runs on the event loop, which has no limit
        of its own."""
        if work.suspect and self._usable:
            return self._one_at_a_time if work.starts_before >= ONE_AT_A_TIME_FROM else self._suspects
        return runtime.slots

    def crashed(self, starts: int) -> Failed | None:
        """Return the failure of a job whose code was started ``starts`` times without an outcome. None: the job may
        run."""
        most = UNSEEN_CRASHES if self._usable else CRASHES
        if starts < most:
            return None
        message = (
            f"its code was started {starts} times without an outcome: each time its process (a worker or a child process) "
            "ended or stopped responding; the log of that process has its last output"
        )
        return Failed("crashed", ErrorInfo("ProcessDied", message))

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin_code(self, work: JobRun, at_us: int) -> None:
        """Send the job's `JobStarted`, and run its code. ``at_us``: when the job was begun, in µs.

        The code does not wait for the acknowledgement, because the closing fact follows in the same partition. Only the
        code of a suspect waits for the acknowledgement, so that a later owner finds the start.
        """
        if work.suspect:
            work.waiting, work.on_continuing_fact = True, self._start_acknowledged
            self._recorder.started(work, at_us, partial(self._start_delivered, work))
            return
        self._recorder.started(work, at_us)
        if work.slots is None:  # as in `run_code`, but without a call: this is done for each job
            work.handle = self._calls.loop.create_task(self.executor.run(work), context=self._base.copy())
        else:
            self.run_code(work)

    def _start_delivered(self, work: JobRun, error: KafkaError | None, message: Message) -> None:
        """Handle the delivery of a suspect's `JobStarted`. Any thread. Request that all reports are taken soon,
        because reports are taken in order."""
        work.continuing_delivered(error, message)
        self._reports.drain_soon()

    def _start_acknowledged(self, work: JobRun) -> None:
        """Run a suspect's code: the suspect's start is in the log. Called in the thread that takes the delivery
        report."""
        self._calls.call(self.run_code, work)

    def run_code(self, work: JobRun) -> None:
        """Run the code of a job that was begun. A suspect, or a job that has waited for a child process, runs only if
        the job is still this worker's."""
        runtime, slots = work.runtime, work.slots
        assert runtime is not None
        if slots is not None and slots is not self._thread_slots:
            assert self.children is not None
            self.children.run(work)
        elif work.suspect and not self.may_run_now(work):
            return
        elif slots is None:
            work.handle = self._calls.loop.create_task(self.executor.run(work), context=self._base.copy())
        elif slots is self._thread_slots:
            if runtime.task.timeout is not None:
                work.timer = self._calls.loop.call_later(runtime.task.timeout, self.executor.late, work)
            self.executor.submit(work)

    def may_run_now(self, work: JobRun) -> bool:
        """Return whether the code of a job may run now, after the job has waited for a child process or for the
        acknowledgement of its start."""
        lease = work.lease or work.partition.lease
        if (  # if none of these is true, the job may start; else `_clear_to_start` decides
            work.suspect
            or work.abandoned
            or work.partition.gone
            or work.stop_outcome is not None
            or _monotonic() > lease.until
        ) and not self._clear_to_start(work, self.run_code):
            return False
        if work.suspect:
            work.waiting = work.partition.taking = False
            work.began = _monotonic()
        return True

    def begin_later(self, work: JobRun) -> None:
        """Begin a job whose code did not begin because the job may be another worker's (`RunningJobs.may_begin`). The
        job is dropped, or its code begins when the group has confirmed the partition."""
        if work.timer is not None:
            work.timer.cancel()
            work.timer = None
        work.interrupted = None  # a timer may have fired while the process was paused
        if work.suspect:
            work.waiting = True  # a handover need not wait for this job
            self.run_code(work)
        elif self._clear_to_start(work, self.begin_later):
            work.began = _monotonic()  # the pause does not count as running time
            self.run_code(work)

    def _clear_to_start(self, work: JobRun, again: Callable[[JobRun], None]) -> bool:
        """Return whether the job may start; otherwise drop it, close it or try again later.

        A job that this worker may not run any more is dropped. A job that was cancelled while it waited is closed. If
        it is not known whether the job is still this worker's, because the worker was paused or has lost the broker,
        ``again(work)`` is called after `AGAIN_S` seconds. For a suspect without a job lease, True also claims the right
        to take records (`Partition.begin_taking`), because the suspect's partition may be handed over at any time.
        """
        if work.abandoned or not self._running_jobs.ours(work):
            self._drop(work)
        elif not self._running_jobs.partition_certain(work):
            self._calls.later(AGAIN_S, again, work)
        elif work.stop_outcome is not None:  # cancelled while it waited
            self._recorder.close_with(work, work.stop_outcome)
            self._reports.ended(work)
        elif work.suspect and work.lease is None and not work.partition.begin_taking():
            self._drop(work)
        else:
            return True
        return False

    def _drop(self, work: JobRun) -> None:
        """Leave a job to its next owner: free the job's slots, and give back its job lease."""
        if work.lease is not None:
            work.lease.keeper.give_back(work)
        work.abandoned = True  # the job has no outcome; without this mark, that would count as a success
        self._reports.ended(work)

    def sweep(self) -> None:
        """Drop the jobs that wait for a child process and are no longer this worker's, because partitions were given up
        or the worker takes no more jobs."""
        if self.children is not None:
            for work in self.children.forget(lambda work: not self._running_jobs.ours(work)):
                self._drop(work)

    # -- reports from children ----------------------------------------------------------------------------------------

    def outcome_reported(self, work: JobRun, outcome: Outcome) -> None:
        """Record the outcome of code that ended in a child process."""
        if not work.abandoned:
            if isinstance(outcome, Succeeded):
                self._recorder.succeeded(work, outcome.result)
            else:
                self._recorder.close_with(work, work.stop_outcome or outcome)
        self._reports.ended(work)

    def ended(self, work: JobRun, why: str, error: BaseException) -> None:
        """Record the outcome of a job that this worker ended in a child process. ``why``: ``timeout``, ``memory`` or
        ``stop``. A job that was stopped without an outcome gets none."""
        if not work.abandoned:
            if work.stop_outcome is not None:
                self._recorder.close_with(work, work.stop_outcome)
            elif why != "stop":
                self._recorder.raised(work, error, why == "timeout")
        self._reports.ended(work)

    def died(self, work: JobRun, error: ErrorInfo, blamed: bool) -> None:
        """Note that a job's process ended by itself: see `_died`, which runs soon."""
        self._calls.call(self._died, work, error, blamed)

    def unusable(self, error: JobledgerError, needed: bool) -> None:
        """Note that no child process can ever be started. ``needed``: the worker cannot work without them."""
        if needed:
            self._calls.fail(error)
        else:
            LOG.warning("%s\nJobs that may have crashed a worker run in this process, beside other jobs", error)

    def _died(self, work: JobRun, error: ErrorInfo, blamed: bool) -> None:
        """Run a job again whose process ended by itself. After `CRASHES` starts without an outcome the job fails.
        ``blamed`` is False if the process ended for another reason, or no process was available."""
        event, runtime = work.event, work.runtime
        assert event is not None
        assert runtime is not None
        work.starts_before += blamed
        if work.abandoned:
            self._reports.ended(work)
        elif work.stop_outcome is not None:
            self._recorder.close_with(work, work.stop_outcome)
            self._reports.ended(work)
        elif blamed and work.starts_before >= CRASHES:
            self._recorder.close_with(work, Failed("crashed", error))
            self._reports.ended(work)
        elif runtime.slots is self._child_slots and not self._usable:
            self._drop(work)  # the job's next owner finds the starts in the log
        else:
            if not self._usable:
                self._move(work, runtime.slots)  # the task's usual slots; a worker with isolated tasks stops
            work.suspect = work.waiting = True
            starts = work.starts_before + (not blamed)
            text = f"job {event.job_id} ({event.task}), started {counted(starts, 'time')}, is started again: {error.message}"
            self._start_again(text, work)

    def _start_again(self, text: str, work: JobRun) -> None:
        """Start a job again whose process died, if the job is still this worker's. If not, the job's next owner finds
        the starts in the log. ``text``: the message to log."""
        if self._clear_to_start(work, partial(self._start_again, text)):
            LOG.warning("%s", text)
            work.began, work.waits = _monotonic(), {}
            work.context = context_of(work)
            self._running_jobs.begun += 1
            try:
                self.begin_code(work, now_us())
            finally:
                work.partition.taking = False

    @staticmethod
    def _move(work: JobRun, slots: Slots | None) -> None:
        if work.slots is not None:
            work.slots.running -= 1
        work.slots = slots
        if slots is not None:
            slots.running += 1

    # -- ending -------------------------------------------------------------------------------------------------------

    def give_up(self, work: JobRun) -> None:
        """End running code whose outcome is no longer wanted."""
        if self.children is not None and self.children.holds(work):
            self.children.kill_job(work)
        else:
            self._end(work)

    def stop(self, work: JobRun, outcome: Outcome) -> None:
        """Ask running code to end. If the code then raises, ``outcome`` is recorded; if the code returns, the job has
        succeeded. A coroutine is cancelled, and a thread is interrupted at its next bytecode. A child process is told
        to end, and is killed if the code still runs after `SOFT_S` seconds (`jobledger.consumers.isolation.pool`)."""
        work.stop_outcome = outcome
        self._end(work)

    def _end(self, work: JobRun) -> None:
        """Ask running code to end: on the event loop, in a thread or in a child process."""
        if work.handle is not None:
            if work.context is not None:
                # The coroutine has not run its first step. If it were cancelled now, it would never run, and its end
                # would not be reported.
                self._calls.loop.call_soon(self._end, work)
            else:
                work.handle.cancel()
        elif not self.executor.interrupts.interrupt(work, TaskCancelled) and self.children is not None:
            self.children.stop(work)
