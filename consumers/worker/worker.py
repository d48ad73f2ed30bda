"""Runs the worker process: creates its parts, starts and ends them in the right order, and reports their health.

A work record passes through `Fetcher` (one thread for each lane), the parts of `Pipe` (event loop, job threads), and
`AckTracker` (one thread). To stop, a worker takes no more jobs, waits for running jobs within the grace time,
flushes its producer, commits its partitions (as clean, if none of their jobs is under way), and leaves its groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from jobledger.config import Settings
from jobledger.consumers.isolation import fork_server
from jobledger.consumers.isolation.app_target import find_target
from jobledger.consumers.isolation.pool import ChildPool, ChildSettings
from jobledger.consumers.partitions.fetcher import Fetcher, LaneEvents, LaneLimits
from jobledger.consumers.partitions.takeover import Takeover
from jobledger.consumers.recording.ack_tracker import AckTracker
from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.recording.worker_events import WorkerEvents
from jobledger.consumers.recording.worker_producer import WorkerProducer
from jobledger.consumers.running.executor import context_of
from jobledger.consumers.running.hook_runner import HookRunner
from jobledger.consumers.running.job_leases import JobLeases
from jobledger.consumers.running.placement import SUSPECTS
from jobledger.consumers.scheduling.control_reader import ControlReader
from jobledger.consumers.scheduling.dispatcher import Dispatcher
from jobledger.consumers.scheduling.pipe import Pipe, PipeOptions, build
from jobledger.consumers.scheduling.wait_queues import Lookahead
from jobledger.consumers.state.event_loop import LoopCalls
from jobledger.consumers.state.reports import Reports
from jobledger.consumers.state.running import RunningJobs
from jobledger.consumers.state.task_table import TaskTable
from jobledger.consumers.state.work import Partition
from jobledger.consumers.worker.health import Parts, health_of
from jobledger.consumers.worker.loop_watch import LoopWatch
from jobledger.consumers.worker.options import WorkerOptions
from jobledger.consumers.worker.report import About, ReportBuilder, own_memory
from jobledger.consumers.worker.reporter import FAREWELL_S, WorkerReporter
from jobledger.definitions.resources import Resource
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigError,
    JobledgerError,
    ResourceFailed,
    is_a,
    text_of,
    type_of,
)
from jobledger.kafka import acls, outage
from jobledger.kafka.auth import check_connection
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.topic_names import lane as lane_of
from jobledger.kafka.topic_watch import TopicWatch
from jobledger.kafka.topology import lifecycle_too_small
from jobledger.log.schema_lookup import decoder
from jobledger.process import greenlets
from jobledger.process.extras import missing
from jobledger.process.identity import now_us, source
from jobledger.process.logger import get_logger, loop_error
from jobledger.process.retrying import retry_until
from jobledger.process.version import VERSION
from jobledger.process.wording import counted
from jobledger.schemas.events import WorkerReported

__all__ = ["EXIT_BROKEN", "EXIT_OK", "Worker", "WorkerOptions"]

LOG = get_logger("jobledger.worker")

T = TypeVar("T")

#: 77 is EX_NOPERM of sysexits.h: the cluster refuses this worker, and a restart alone does not help.
EXIT_OK, EXIT_BROKEN, EXIT_DENIED = 0, 1, 77
#: Seconds that a stopping worker waits for the acknowledgements of one flush.
FLUSH_S = 5.0
#: Seconds that a stop may take beyond the grace time: cancelling, flushing, committing, leaving the group.
CLOSING_S = 12.0
#: Further seconds after which a worker that has not ended is killed.
MARGIN_S = 5.0
#: Seconds beyond the grace time after which a worker that has not closed its parts is killed. After the parts are
#: closed, the interpreter has `process_exit.EXIT_S` seconds to exit, and at most `process_exit.HARD_S` more.
LEAVING_S = 1.0 + CLOSING_S + MARGIN_S


class Worker:
    """The parts of one worker process. `run` blocks until `stop` is called or an error occurs. Use an instance only
    once.

    ``must_end_in(seconds)`` limits the rest of a stop that is in progress. ``has_ended(code)`` is called when the
    worker has closed its parts; `run` returns ``code`` once the event loop is closed. Raises `ConfigError` if the
    options do not fit the app.
    """

    def __init__(
        self,
        registry: TaskRegistry,
        settings: Settings,
        options: WorkerOptions | None = None,
        *,
        must_end_in: Callable[[float], None] = lambda seconds: None,
        has_ended: Callable[[int], None] = lambda code: None,
    ) -> None:
        if fork_server.IMPORTING:
            raise ConfigError(
                "a worker is created while its app is imported for child processes: create it under "
                "`if __name__ == '__main__':`"
            )
        greenlets.refuse("a worker")
        self._must_end_in, self._has_ended = must_end_in, has_ended
        settings = settings.acting_as("worker")
        self.registry, self.settings, self.options = registry, settings, options or WorkerOptions()
        registry.check()
        names = self.options.queues
        self.queues = [registry.check_queue(q) for q in (list(registry.queues) if names is None else names)]
        if not self.queues or len(set(self.queues)) != len(self.queues):
            raise ConfigError(f"queues={self.queues!r}: name at least one queue, and each once")
        self.lanes = [lane for queue in self.queues for lane in registry.queues[queue].lanes]
        self.source = source("worker")
        self.identity = f"{socket.gethostname()}:{os.getpid()}"
        self.started_at = time.monotonic()
        self.error: JobledgerError | None = None
        self.fetchers: list[Fetcher] = []
        self._stopping = threading.Event()
        self._hurry = False
        self._changed: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.dispatcher: Dispatcher | None = None
        self.ack_tracker: AckTracker | None = None
        self.takeover: Takeover | None = None
        self.sender: WorkerProducer | None = None
        self.control_reader: ControlReader | None = None
        self.children: ChildPool | None = None
        self.leases: JobLeases | None = None
        self.hooks: HookRunner | None = None  # None: there are no hooks to call
        self.reporter: WorkerReporter | None = None
        self._lifecycle_partitions = 0
        self.topic_watch = TopicWatch(settings, registry.names, self._topics, LOG)
        self.watch: LoopWatch | None = None
        self._target = self._find_target()
        self.ended = threading.Event()
        self._own_thread = ThreadPoolExecutor(1, "jobledger-worker")

    # -- from outside ---------------------------------------------------------------------------------------------

    def stop(self, *, hurry: bool = False) -> None:
        """Take no more jobs, and end within the grace time; with ``hurry`` end at once. Any thread; does not wait."""
        outage.stopping()
        self._stopping.set()
        self._hurry = self._hurry or hurry
        self._signal_loop()

    def fail(self, error: JobledgerError) -> None:
        """Stop the worker because of ``error``, and commit nothing more. The first error counts. Any thread."""
        if self.error is None:
            self.error = error
            LOG.critical("the worker stops: %s", error)
        if self.ack_tracker is not None:
            self.ack_tracker.commits_stopped = True
        self.stop(hurry=True)

    def _signal_loop(self) -> None:
        loop, changed = self._loop, self._changed
        if loop is not None and changed is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(changed.set)

    def run(self) -> int:
        """Run until the worker is stopped, and return the exit code: 0; 77 if `error` is `AccessDenied`; 1 if it is any
        other error.

        Raises `ConfigError`, `TopicMissing`, `AccessDenied` or `BrokerUnavailable` if the worker cannot start, and
        `JobledgerError` if a job stops the event loop.
        """
        sender: WorkerProducer | None = None
        try:
            self._retrying(lambda: check_connection(self.settings))
            sender = self.sender = WorkerProducer(self.settings, self.registry.names, self.options.linger_ms)
            self._check_topics(sender)
            with _new_runner() as runner:
                try:
                    runner.run(self._main(sender))
                except BaseException as exc:
                    error = JobledgerError(
                        f"the worker's event loop stopped unexpectedly ({type_of(exc)}: {text_of(exc)}): the code of a job "
                        "stopped the loop, or raised SystemExit in an asyncio task that it had created. The next owner runs "
                        "the running jobs again"
                    )
                    self._give_up_running(error, sender)
                    if not is_a(exc, (SystemExit, RuntimeError)):
                        raise
                    raise error from exc
                finally:
                    if self.watch is not None:
                        self.watch.close()
                    # Closing the runner waits for the loop's default threads, which jobs may still use.
                    self._has_ended(self._exit_code())
        finally:
            self.ended.set()
            self._own_thread.shutdown(wait=False)
            if sender is not None:
                sender.close()
        return self._exit_code()

    def _exit_code(self) -> int:
        if self.error is None:
            return EXIT_OK
        return EXIT_DENIED if isinstance(self.error, AccessDenied) else EXIT_BROKEN

    def _give_up_running(self, error: JobledgerError, sender: WorkerProducer) -> None:
        """Abandon the running jobs, after the event loop stopped unexpectedly and cancelled them.

        No outcome is recorded, so the next owner reruns them. The worker's threads and child processes are ended here:
        otherwise this process would keep its partitions for as long as it lives.
        """
        self._loop = None
        dispatcher = self.dispatcher
        if dispatcher is not None:
            dispatcher.running_jobs.accepting = False
            for work in list(dispatcher.running_jobs.jobs):
                work.abandoned = True
        self.fail(error)
        self._close_readers()
        if self.children is not None:
            self.children.kill_all()
        if self.ack_tracker is not None:
            self._close_rest(self.ack_tracker, sender)
        if dispatcher is not None:
            dispatcher.pipe.executor.close()
            dispatcher.close()

    def _close_readers(self) -> None:
        self.topic_watch.close()
        for each in (self.takeover, self.control_reader):
            if each is not None:
                each.close()

    # -- start ----------------------------------------------------------------------------------------------------

    def _topics(self) -> list[str]:
        names = self.registry.names
        others = (names.lifecycle, names.coordination, names.dead_letter, names.schemas, names.control, names.workers)
        return [*others, *map(names.jobs, self.lanes)]

    def _check_topics(self, sender: WorkerProducer) -> None:
        names = self.registry.names
        self._retrying(lambda: acls.check(self.settings, names.namespace, self._topics()))
        lifecycle = self._retrying(lambda: partitions_of(self.settings, names.lifecycle))
        for topic in (names.coordination, names.dead_letter, names.schemas, names.control):
            self._retrying(partial(partitions_of, self.settings, topic))
        for lane in self.lanes:
            topic = names.jobs(lane)
            count = self._retrying(partial(partitions_of, self.settings, topic))
            if count > lifecycle:
                raise ConfigError(lifecycle_too_small(topic, count, names.lifecycle, lifecycle))
        self._lifecycle_partitions = lifecycle

        # Publish the schema, and wait for its acknowledgement, before any record with the schema is written.
        tasks = self.registry.tasks
        followers = [tasks[t.fallback] for t in tasks.values() if t.fallback is not None]
        fallbacks = {lane_of(task.queue, task.policy.priority) for task in followers}
        written = [names.lifecycle, names.coordination, names.dead_letter, *map(names.jobs, sorted(fallbacks))]
        self._retrying(lambda: sender.prepare(written))

    def _retrying(self, ask: Callable[[], T]) -> T:
        """Return what ``ask()`` returns. While the broker is unavailable, retry until ``start_timeout`` seconds after
        the worker's creation. Then raise `BrokerUnavailable`."""
        return retry_until(
            self.started_at + self.options.start_timeout,
            ask,
            BrokerUnavailable,
            pause=0.5,
            stop=self._stopping,
            on_retry=lambda error, _: LOG.warning("waiting: %s", error),
        )

    async def _main(self, sender: WorkerProducer) -> None:
        loop = self._loop = asyncio.get_running_loop()
        loop.set_exception_handler(loop_error)
        self._changed = asyncio.Event()
        pipe, ack_tracker, dispatcher = self._create(loop, sender)
        if not await self._start(pipe, ack_tracker, dispatcher):
            return
        if self._stopping.is_set():
            self._changed.set()
        await self._changed.wait()
        await self._close(dispatcher, ack_tracker, sender)

    def _create(self, loop: asyncio.AbstractEventLoop, sender: WorkerProducer) -> tuple[Pipe, AckTracker, Dispatcher]:
        """Create all parts, each after the parts that it uses."""
        options, registry, settings = self.options, self.registry, self.settings
        names, decode = registry.names, decoder(settings, registry.names)
        calls = LoopCalls(self.fail)
        calls.loop, reports = loop, Reports(calls)
        hooks = HookRunner(registry, loop, context_of)
        self.hooks = hooks if hooks.needed else None
        event_builder = WorkerEvents(registry, self.source, settings.max_record_bytes, settings.version)
        recorder = Recorder(event_builder, sender, reports, self.hooks)
        tasks = TaskTable(registry, options.job_threads, options.job_children, options.unknown_task)
        lookahead = Lookahead(options.lookahead, options.lookahead_bytes)
        limits = PipeOptions(self.queues, options.concurrency, lookahead, self._child_settings())
        pipe = build(registry, decode, sender, recorder, reports, tasks, limits)
        self.children, self.leases = pipe.placement.children, pipe.leases
        ack_tracker = self.ack_tracker = AckTracker(settings, sender, recorder, reports)
        dispatcher = self.dispatcher = Dispatcher(pipe, sender, ack_tracker, max(64, options.prefetched // 2))
        takeover = self.takeover = Takeover(
            settings,
            names,
            ack_tracker,
            decode,
            lifecycle_partitions=self._lifecycle_partitions,
            ready=dispatcher.ready,
            fail=self.fail,
        )
        events = LaneEvents(takeover.take_over, dispatcher.no_longer_owned, reports.wake, self.fail)
        per_lane = LaneLimits(options.prefetched, options.lease)
        self.fetchers = dispatcher.fetchers = [
            Fetcher(settings, names, lane, ack_tracker, per_lane, events) for lane in self.lanes
        ]
        self.watch = LoopWatch(pipe.executor, pipe.running)
        return pipe, ack_tracker, dispatcher

    async def _start(self, pipe: Pipe, ack_tracker: AckTracker, dispatcher: Dispatcher) -> bool:
        """Start all parts in the right order. Return False if a resource cannot be opened."""
        options, names = self.options, self.registry.names
        assert self.watch is not None
        assert self.takeover is not None
        self.watch.begin()
        runtimes = pipe.tasks.runtimes
        if any(not runtime.is_async and runtime.task.policy.isolation is None for runtime in runtimes.values()):
            pipe.executor.start_threads(options.job_threads)
        try:
            await self.registry.resources.open(self._wanted())
        except ResourceFailed as exc:
            self.fail(exc)
            await self.registry.resources.close()
            return False
        if self.hooks is not None:
            self.hooks.start()
        dispatcher.start()
        if self.children is not None and self._isolated():
            self.children.warm()
        control_reader = self.control_reader = ControlReader(
            self.settings,
            names,
            pipe.control,
            cancelled=partial(dispatcher.call, dispatcher.cancelled),
            regated=partial(dispatcher.call, dispatcher.regate),
            fail=self.fail,
        )
        control_reader.start()
        await self._in_own_thread(control_reader.await_live)
        self.topic_watch.start()
        self.takeover.start()
        ack_tracker.start()
        for fetcher in self.fetchers:
            fetcher.start()
        self.reporter = self._new_reporter(pipe.running)
        self.reporter.start()
        LOG.info(
            "worker %s serves %s of namespace %s: %s, concurrency %d, %s",
            *(self.identity, ", ".join(self.queues), names.namespace),
            *(counted(len(runtimes), "task"), options.concurrency, counted(options.job_threads, "thread")),
        )
        return True

    def _new_reporter(self, running: RunningJobs) -> WorkerReporter:
        settings, sender = self.settings, self.sender
        assert sender is not None
        host, _, pid = self.identity.rpartition(":")
        started_at = now_us() - int((time.monotonic() - self.started_at) * 1e6)
        tasks = list(self.registry.tasks)
        about = About(
            *(host, int(pid), settings.version, VERSION, started_at),
            *(self.lanes, tasks, self.options.concurrency),
        )
        builder = ReportBuilder(about)

        def report() -> WorkerReported:
            owned = sum(1 for _ in self.partitions())
            return builder.report(list(running.jobs), own_memory(), owned, time.monotonic(), now_us())

        topic = self.registry.names.workers
        return WorkerReporter(settings, topic, self.identity, self.source, report, sender.framed)

    # -- end ------------------------------------------------------------------------------------------------------

    async def _close(self, dispatcher: Dispatcher, ack_tracker: AckTracker, sender: WorkerProducer) -> None:
        began = time.monotonic()
        self._must_end_in(self.options.grace + LEAVING_S)
        LOG.info(
            "worker %s stops; running jobs: %d, grace time: %g s",
            *(self.identity, len(dispatcher.running_jobs.jobs), self.options.grace),
        )
        dispatcher.take_no_more()
        for fetcher in self.fetchers:
            fetcher.stop_taking()
        self._close_readers()
        await self._wait_idle(dispatcher, began + (0.0 if self.error is not None else self.options.grace))
        left = list(dispatcher.running_jobs.jobs)
        if left:
            LOG.warning(
                "jobs that still run and are abandoned: %d; the next owner runs those again that record no outcome",
                len(left),
            )
            for work in left:
                work.abandoned = True
                dispatcher.placement.give_up(work)
            await self._wait_idle(dispatcher, time.monotonic() + 1.0, ignore_hurry=True)
        if self.children is not None:
            await self.children.close()
        if self.leases is not None and self.error is None:
            self.leases.give_back_all()
        await self._close_hooks(began)
        self._must_end_in(CLOSING_S + MARGIN_S)
        await self._in_own_thread(self._close_rest, ack_tracker, sender)
        dispatcher.pipe.executor.close()
        dispatcher.close()
        LOG.info("worker %s ended after %.1f s", self.identity, time.monotonic() - began)

    async def _in_own_thread(self, function: Callable[..., None], *args: Any) -> None:
        """Run a blocking function in the worker's own thread: jobs may occupy all of the loop's default threads."""
        await asyncio.get_running_loop().run_in_executor(self._own_thread, function, *args)

    async def _close_hooks(self, began: float) -> None:
        """Wait for pending hooks, and close the resources, within the rest of the grace time: at least 1 s for each of
        the two."""
        left = 1.0 if self.error is not None else max(1.0, began + self.options.grace - time.monotonic())
        if self.hooks is not None:
            await self._in_own_thread(self.hooks.close, left)
        try:
            async with asyncio.timeout(left):
                await self.registry.resources.close()
        except TimeoutError:
            LOG.warning("resources were not closed within %.0f s", left)

    def _isolated(self) -> list[str]:
        """Return the names of the tasks that this worker serves and that run in child processes."""
        return [
            t.name for t in self.registry.tasks.values() if t.queue in self.queues and t.policy.isolation is not None
        ]

    def _child_settings(self) -> ChildSettings | None:
        """Return the settings of the child processes, for isolated tasks and for suspects (jobs that may have crashed a
        worker). Return None if the app cannot have child processes."""
        if self._target is None:
            return None
        options, needed = self.options, bool(self._isolated())
        return ChildSettings(
            options.job_children, SUSPECTS, options.jobs_per_child, self._target, self.settings, needed
        )

    def _find_target(self) -> str | None:
        if os.name != "posix":
            return None
        try:
            return find_target(self.registry)
        except ConfigError as exc:
            isolated = self._isolated()
            if isolated:
                raise ConfigError(f"isolation='process' of task {isolated[0]!r}: {exc}") from None
            LOG.debug("%s", exc)
            return None

    def _wanted(self) -> list[Resource[Any]]:
        """Return the resources that this worker's tasks use in this process; child processes open their own."""
        tasks = [t for t in self.registry.tasks.values() if t.queue in self.queues and t.policy.isolation is None]
        return list(dict.fromkeys(r for task in tasks for r in task.dependencies.values()))

    async def _wait_idle(self, dispatcher: Dispatcher, until: float, *, ignore_hurry: bool = False) -> None:
        while dispatcher.running_jobs.jobs and (ignore_hurry or not self._hurry):
            left = until - time.monotonic()
            if left <= 0:
                return
            dispatcher.idle.clear()
            dispatcher.wake()
            try:
                await asyncio.wait_for(dispatcher.idle.wait(), min(left, 0.1))
            except TimeoutError:
                continue

    def _close_rest(self, ack_tracker: AckTracker, sender: WorkerProducer) -> None:
        """Flush the producer, commit, and leave the groups. Runs in a thread, because each step waits."""
        ack_tracker.close()
        if self.error is None:
            left = sender.flush(FLUSH_S)
            ack_tracker.drain()
            if not left and sender.unacknowledged:  # records derived from the facts acknowledged just now
                left = sender.flush(FLUSH_S)
                ack_tracker.drain()
            if left:
                self.fail(
                    BrokerUnavailable(
                        f"{counted(left, 'record')} not acknowledged when the worker flushed its producer "
                        f"({FLUSH_S:g} s): their jobs are not committed, so the next owner runs each of them, or "
                        "sends its records again if it has ended"
                    )
                )
        if self.reporter is not None:
            self.reporter.finish(farewell=self.error is None)
        for fetcher in self.fetchers:
            fetcher.close(2.0 if self.error is None else 0.0)
        deadline = time.monotonic() + (CLOSING_S if self.error is None else 2.0)
        for fetcher in self.fetchers:
            fetcher.join(timeout=max(0.1, deadline - time.monotonic()))
        if self.reporter is not None:
            self.reporter.join(FAREWELL_S if self.error is None else 0.1)

    # -- health ---------------------------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether the worker was asked to stop, or stops because of an error."""
        return self._stopping.is_set()

    def health(self) -> dict[str, Any]:
        """Return the worker's health: ``status`` is ok, starting, stopping or unhealthy, with ``reasons``."""
        sender = None if self.ended.is_set() else self.sender
        return health_of(
            Parts(
                self.identity,
                self.started_at,
                self.stopping,
                [*([] if self.error is None else [str(self.error)]), *self.topic_watch.problems],
                self.fetchers,
                None if self.ack_tracker is None else self.dispatcher,
                self.children,
                0 if sender is None else sender.unacknowledged,
                0 if self.leases is None else self.leases.count,
            )
        )

    def partitions(self) -> Iterator[Partition]:
        """Yield every partition that is owned now."""
        for fetcher in self.fetchers:
            yield from fetcher.owned()


def _new_runner() -> asyncio.Runner:
    if sys.platform == "win32":
        return asyncio.Runner()
    try:
        import uvloop
    except ImportError as exc:
        raise missing("worker", exc) from exc
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
