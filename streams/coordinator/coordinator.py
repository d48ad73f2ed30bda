"""The coordinator: releases delayed and retried jobs when they are due.

This module starts, watches and stops one instance. `jobledger.streams.coordinator.pipeline` processes the events,
`jobledger.streams.coordinator.rules.decisions` contains the rules, and `jobledger.streams.coordinator.faust.faust_app`
sets up Faust.

The coordinator needs no database. Its table is stored in a changelog topic, with a local copy that can be deleted. Any
number of instances share the partitions of ``<ns>.coordination``. Any error ends the instance without committing events
that were not fully processed. Another instance, or the next start, continues with these events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jobledger.config import Settings
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, JobledgerError
from jobledger.kafka import acls, clients, outage
from jobledger.kafka.auth import check_connection, join, read, unauthorized
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topic_watch import TopicWatch
from jobledger.log.framing import framing
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter
from jobledger.process import greenlets
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.streams.coordinator.faust.async_producer import (
    MAX_BATCH_BYTES,
    AckedWriter,
    LogBounds,
    denied_kind,
    unused,
)
from jobledger.streams.coordinator.faust.faust_app import (
    TABLE,
    CommitHook,
    ConsistencyError,
    Group,
    Options,
    build,
    changelog,
    check_topics,
    deliver_to,
    group_error,
    origin_of,
    progress,
    recovering,
    shorten_fetch_wait,
    work_topics,
)
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir, lock_instance_dir
from jobledger.streams.coordinator.faust.log_filters import forget_heard, quieten
from jobledger.streams.coordinator.faust.security import security
from jobledger.streams.coordinator.metrics import Metrics
from jobledger.streams.coordinator.pipeline import Pipeline

try:
    from prometheus_client import CollectorRegistry
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.coordinator")
T = TypeVar("T")

#: Exit codes of `run_coordinator`, as in sysexits.h. 70 (EX_SOFTWARE): start the coordinator again. 77 (EX_NOPERM): the
#: cluster denies access to the coordinator.
EXIT_OK, EXIT_FAILED, EXIT_DENIED = 0, 70, 77

#: Seconds between two checks for a pause of this process or a jump of its clock.
PULSE = 0.25
#: Seconds between two measurements of the lag. An answer also shows that the broker is available.
SURVEY = 2.0
#: Bytes by which a record of the coordinator may exceed the submitted record: the coordinator adds a due time and its
#: source.
ROOM_BYTES = 4_096
#: In a rebalance, a lack of progress counts only if the broker has answered within this number of seconds.
SEEN_LATELY = 5 * SURVEY
#: Seconds within which Faust must make progress with its start or a rebalance; seconds within which Faust must stop.
START_TIMEOUT, STOP_TIMEOUT = 30.0, 10.0
#: Seconds for finishing events that are being processed, after a request to stop.
FINISH_TIMEOUT = 3.0


class _StoppedEarly(Exception):
    """The coordinator was asked to stop before it had started."""


class Coordinator:
    """Run one instance.

    ``partitions``: number of partitions of the coordination topic and of the changelog. ``data_dir``: folder of the
    local copies; by default ``<home>/coordinator/<namespace>``. ``on_step(name)``: for tests, called between any two
    steps that a crash could separate. ``registry``: registry for the metrics; a private one by default.
    """

    def __init__(
        self,
        names: Names,
        settings: Settings,
        *,
        partitions: int,
        options: Options | None = None,
        data_dir: Path | None = None,
        registry: CollectorRegistry | None = None,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self.names, self.settings = names, settings.acting_as("coordinator")
        self.options = options or Options()
        self.metrics = Metrics(registry)
        self._partitions = partitions
        self._root = data_dir or settings.home / "coordinator" / names.namespace
        self._on_step = on_step
        self._stop = asyncio.Event()
        self._stopping = threading.Event()  # set together with `_stop` from outside; for threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self.did_not_stop = False  # whether Faust did not stop: its threads would keep the process alive
        self._app: Any = None
        self._pipeline: Pipeline | None = None
        self._log_bounds: LogBounds | None = None
        self._end_offsets: dict[int, int] = {}
        self._broker_seen = time.monotonic()
        self._last_ready = self._broker_seen
        self._started = False
        self._topics = TopicWatch(self.settings, names, self._watched, LOG, others=self._partition_problems)

    # -- called from outside -----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `run` to stop cleanly. Callable from any thread."""
        outage.stopping()
        self._stopping.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._stop.set)

    def health(self) -> dict[str, Any]:
        """Return the state as plain values, and set the gauges.

        ``state``: starting, rebalancing, catching-up or ready. ``rebalancing``: whether the state is rebalancing.
        ``lag``: number of events not processed yet. ``scheduled``: number of releases that wait until they are due, and
        of long jobs that run. ``next_due_us``: the time at which the next timer is due, µs of the broker's clock.
        ``overdue_s``: seconds since the earliest timer was due. ``not_ready_s``: seconds since this instance was last
        ready. ``overdue_s`` and ``not_ready_s`` grow while something keeps the instance from acting, and stay near 0
        otherwise. ``fired``: number of releases since the start. ``late``: cumulative numbers of releases by lateness,
        with the upper bound in seconds as key. ``missing_topics``: work topics that releases wait for; if there are
        any, run ``jobledger topics apply``. ``topic_problems``: texts about changed topic settings that break a
        guarantee.
        """
        pipeline, metrics = self._pipeline, self.metrics
        stable = self._started and not self._app.rebalancing
        ready = pipeline is not None and stable and bool(self._app.tables.actives_ready) and pipeline.ready
        owned = [] if pipeline is None else pipeline.timer_loop.partitions
        now = time.monotonic()
        if ready:
            self._last_ready = now
        overdue = 0.0 if pipeline is None else pipeline.timer_loop.overdue
        lag = (
            0
            if pipeline is None
            else sum(max(0, end - pipeline.position(p)) for p, end in self._end_offsets.items() if p in owned)
        )
        kept = 0 if pipeline is None else sum(pipeline.table.kept.values())
        missing = [] if pipeline is None else pipeline.topics.missing
        state = "ready" if ready else "starting" if not self._started else "catching-up" if stable else "rebalancing"
        metrics.ready.set(ready)
        metrics.overdue.set(overdue)
        metrics.lag.set(lag)
        metrics.partitions.set(len(owned))
        metrics.kept.set(kept)
        metrics.missing_topics.set(len(missing))
        metrics.clock_ahead.set(0 if pipeline is None else pipeline.timer_loop.clock.ahead_s)
        return {
            "state": state,
            "ready": ready,
            "rebalancing": state == "rebalancing",
            "partitions": owned,
            "lag": lag,
            "scheduled": kept,
            "next_due_us": None if pipeline is None else pipeline.timer_loop.next_due,
            "overdue_s": round(overdue, 1),
            "not_ready_s": round(now - self._last_ready, 1),
            "fired": metrics.released_count,
            "late": metrics.lateness(),
            "missing_topics": missing,
            "topic_problems": list(self._topics.problems),
            "broker_seen_s_ago": round(now - self._broker_seen, 1),
        }

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until `stop` is called. Raises the error that ended the instance. Commits only fully processed events."""
        self._loop = asyncio.get_running_loop()
        instance_dir = lock_instance_dir(self._root, self.names.namespace)
        writer: AckedWriter | None = None
        tasks: list[asyncio.Task[None]] = []
        try:
            quieten(heard=partial(outage.outage_of(self.settings).heard, by=self))
            writer, topics = await self._connect(instance_dir)
            await writer.start()
            pipeline = self._pipeline = self._build(instance_dir, writer, topics)
            await self._await_start(self._app.start())
            shorten_fetch_wait(self._app)
            quieten()
            self._started = True
            self._topics.start()
            LOG.info("coordinator of %s started, local copy in %s", self.names.namespace, instance_dir.folder)
            tasks = self._start_tasks(pipeline)
            await self._stop.wait()
            if self._failure is None:
                await pipeline.finish(FINISH_TIMEOUT)
        except _StoppedEarly:
            pass
        finally:
            await self._shut_down(tasks, writer, instance_dir)
        if self._failure is not None:
            raise self._failure

    async def _connect(self, instance_dir: InstanceDir) -> tuple[AckedWriter, dict[str, int | None]]:
        """Check the cluster and publish the schema. Return a writer that is not started, and the work topics as
        `_prepare` returns them."""
        if unused_settings := unused(self.settings):
            LOG.warning("client settings that the coordinator does not use (aiokafka): %s", ", ".join(unused_settings))
        origin, topics, max_batch = await self._retry_until_available(self._prepare)
        instance_dir.keep_for(origin)
        self._log_bounds = LogBounds(self.settings, self.options.patience / 2)
        framed = framing(self.settings, self.names, self._publish)
        await self._retry_until_available(partial(self._publish, None))
        if framed is not None:
            written = (self.names.coordination, self.names.lifecycle, self.names.dead_letter, *topics)
            await self._retry_until_available(partial(framed.prepare, written))
        # A record of the largest size that may be read must not be too large when the coordinator sends it on.
        settings = replace(self.settings, max_record_bytes=self.settings.max_record_bytes + ROOM_BYTES)
        return AckedWriter(settings, security(self.settings), self.options.patience, max_batch, framed), topics

    def _build(self, instance_dir: InstanceDir, writer: AckedWriter, topics: dict[str, int | None]) -> Pipeline:
        """Create Faust's app and the pipeline, and connect them."""
        assert self._log_bounds is not None
        app, table = build(self.names, self.settings, self.options, self._partitions, instance_dir)
        self._app = app
        pipeline = Pipeline(
            self.names,
            self.settings,
            self.options,
            Group(app, self.names, table),
            writer,
            self._log_bounds,
            decoder(self.settings, self.names),
            self.metrics,
            self._step,
            topics,
        )
        deliver_to(app, self.names, pipeline.take)
        app.on_partitions_revoked.connect(self._on_revoked, weak=False)
        table.on_recover(self._on_recover)
        if self._on_step is not None:
            app.sensors.add(CommitHook(self._step))
        return pipeline

    def _start_tasks(self, pipeline: Pipeline) -> list[asyncio.Task[None]]:
        """Start everything that runs until the coordinator stops."""
        several = (
            pipeline.decide,
            pipeline.write,
            pipeline.timer_loop.run,
            pipeline.sweep,
            pipeline.topics.watch,
            self._pulse,
            self._survey,
            self._watch_faust,
            self._watch_group,
            self._watch_recovery,
        )
        return [asyncio.create_task(self._guarded(work()), name=work.__name__) for work in several]

    async def _shut_down(
        self, tasks: Sequence[asyncio.Task[None]], writer: AckedWriter | None, instance_dir: InstanceDir
    ) -> None:
        """Stop what `run` has started, in the reverse order, and give the folder of the local copy back."""
        self._started = False
        self._topics.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._app is not None:
            await self._end(self._app)
        if writer is not None:
            await writer.stop(2.0)
        if self._log_bounds is not None:
            self._log_bounds.close()
        forget_heard()
        if isinstance(self._failure, ConsistencyError):
            instance_dir.clear()  # the local copy belongs to a log that no longer exists
        instance_dir.release()

    def _prepare(self) -> tuple[str, dict[str, int | None], int]:
        """Check login, rights and topics. Return three values.

        The identity of the changelog, to which a local copy must belong; the existing work topics, each with the
        largest batch that the topic accepts (bytes; None: not known); and the largest batch that is accepted by all
        topics to which the coordinator writes (bytes).
        """
        names = self.names
        check_connection(self.settings)
        fixed = (names.coordination, changelog(names), names.lifecycle, names.dead_letter, names.schemas)
        acls.check(self.settings, names.namespace, fixed)
        check_topics(self.settings, names, self._partitions)
        work = work_topics(self.settings, names)
        acls.check(self.settings, names.namespace, work)
        others = (names.coordination, changelog(names), names.lifecycle, names.dead_letter)
        limits = [*work.values(), *clients.batch_limits(self.settings, others).values()]
        most = min((limit for limit in limits if limit is not None), default=MAX_BATCH_BYTES)
        return origin_of(self.settings, changelog(names)), work, most

    def _watched(self) -> list[str]:
        names = self.names
        work = [] if self._pipeline is None else self._pipeline.topics.known
        return [names.coordination, changelog(names), names.lifecycle, names.dead_letter, names.schemas, *work]

    def _partition_problems(self) -> list[str]:
        """Return the problem that `check_topics` reports now, if any. Partitions added since the start are not read."""
        try:
            check_topics(self.settings, self.names, self._partitions)
        except ConfigError as exc:
            return [str(exc)]
        return []

    def _publish(self, key: str | None) -> None:
        """Publish this version's schema under ``key``; if ``key`` is None, under the schema's fingerprint."""
        writer = LogWriter(replace(self.settings, submit_timeout=self.options.patience), self.names)
        try:
            if key is None:
                writer.ensure_schema()
            else:
                writer.publish(key)
        finally:
            writer.close(0.0)

    async def _retry_until_available(self, ask: Callable[[], T]) -> T:
        """Call ``ask`` in a thread. Repeat the call while the broker is unavailable, for `Options.patience` seconds.

        Raises what ``ask`` raises, and `_StoppedEarly` if a stop was requested while the broker was unavailable.
        """
        deadline = time.monotonic() + self.options.patience

        def on_retry(error: BrokerUnavailable, seconds: float) -> None:
            LOG.warning("the coordinator tries again for %.0f s: %s", deadline - time.monotonic(), error)

        patiently = partial(
            retry_until, deadline, ask, BrokerUnavailable, pause=1.0, stop=self._stopping, on_retry=on_retry
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(None, patiently)
        except asyncio.CancelledError:
            self._stopping.set()  # the thread must not go on asking
            raise
        except BrokerUnavailable:
            if self._stopping.is_set():
                raise _StoppedEarly from None
            raise

    async def _end(self, app: Any) -> None:
        # Faust commits the offsets of processed events here. An unavailable broker must not delay the end. A timeout
        # around `app.stop` does not help: code in `app.stop` swallows the cancellation and continues to wait.
        stopping = asyncio.ensure_future(app.stop())
        done, _ = await asyncio.wait({stopping}, timeout=STOP_TIMEOUT)
        if not done:
            stopping.cancel()
            self.did_not_stop = True
            LOG.warning("Faust did not stop within %.0f s", STOP_TIMEOUT)
        elif (problem := stopping.exception()) is not None:  # nothing is lost if Faust does not stop cleanly
            LOG.warning("Faust did not stop cleanly: %r", problem)

    def _step(self, name: str) -> None:
        if self._on_step is not None:
            self._on_step(name)

    def _fail(self, reason: BaseException) -> None:
        if self._failure is None and not self._stop.is_set():
            self._failure = reason
            if isinstance(reason, JobledgerError):
                LOG.error("coordinator stops: %s", reason)
            else:
                LOG.error("coordinator stops", exc_info=reason)
        self._stop.set()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001  # any error ends the coordinator
            self._fail(exc)

    # -- called by Faust ---------------------------------------------------------------------------------------------

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        if self._pipeline is not None:
            await self._shielded(self._pipeline.revoked)

    async def _on_recover(self, *_: Any) -> None:
        if self._pipeline is not None:
            await self._shielded(self._pipeline.rebuild)

    async def _shielded(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call ``call``. End the coordinator if ``call`` raises, because Faust ignores exceptions of its callbacks."""
        try:
            await call()
        except Exception as exc:  # noqa: BLE001  # any error ends the coordinator
            self._fail(exc)

    async def _await_start(self, starting: Awaitable[Any]) -> None:
        """Wait until Faust has started. Raises an error if Faust's client cannot join the group or makes no progress.

        There is no limit for the whole start, because restoring a large table may take long.
        """
        start = asyncio.ensure_future(starting)
        joining = self._watch_progress("joining its group and reading its table", lambda app: True)
        watches = [asyncio.create_task(watch) for watch in (self._watch_group(), joining)]
        try:
            await asyncio.wait([start, *watches], return_when=asyncio.FIRST_COMPLETED)
            for watch in watches:
                if watch.done():
                    watch.result()
            await start
        finally:
            for task in (start, *watches):
                task.cancel()
            await asyncio.gather(start, *watches, return_exceptions=True)

    async def _watch_recovery(self) -> None:
        """Raise `BrokerUnavailable` if a rebalance makes no progress.

        A rebalance is complete when the new part of the table is read and restored.
        """
        await self._watch_progress(
            "a rebalance of its group, or reading the part of its table that it was assigned", self._is_rebalancing
        )

    def _is_rebalancing(self, app: Any) -> bool:
        restoring = self._pipeline is not None and self._pipeline.restoring
        seen = time.monotonic() - self._broker_seen < SEEN_LATELY
        return seen and (app.rebalancing or recovering(app) or restoring)

    def _progress(self) -> tuple[object, ...]:
        return progress(self._app), 0 if self._pipeline is None else self._pipeline.table.restored

    async def _watch_progress(self, what: str, waiting: Callable[[Any], bool]) -> None:
        """Raise `BrokerUnavailable` if Faust makes no progress with ``what`` while ``waiting(app)`` is true.

        Faust would wait forever for an answer that was lost while the broker was paused. The limit is `START_TIMEOUT`
        seconds since the last progress. The limit is longer if ``session_timeout`` is above 10 s, because the group may
        then wait longer for a silent member. Time in which this process was paused does not count.
        """
        seen, quiet = self._progress(), 0.0
        while quiet < (bound := START_TIMEOUT + max(0.0, self.options.session_timeout - 10.0)):
            await asyncio.sleep(PULSE)
            now = self._progress()
            quiet = quiet + PULSE if waiting(self._app) and now == seen else 0.0
            seen = now
        raise BrokerUnavailable(
            f"the coordinator made no progress for {bound:.0f} s with {what} (rebalancing: {self._app.rebalancing}, "
            f"restoring: {recovering(self._app)}); check that every broker of {self.settings.resolve_bootstrap()} "
            "answers, and start the coordinator again"
        )

    async def _watch_group(self) -> None:
        """Raise the error that keeps Faust's client out of its group. The client itself raises it only when polled."""
        while (reason := group_error(self._app)) is None:
            await asyncio.sleep(PULSE)
        raise self._explained(reason)

    async def _watch_faust(self) -> None:
        """Raise the error of a part of Faust that failed. Otherwise the process would keep running and do nothing."""
        rows = self._app.tables[TABLE].data
        while not self._app.crashed:
            if rows.failure is not None:
                raise rows.failure
            await asyncio.sleep(PULSE)
        reason = self._app.crash_reason
        raise self._explained(reason) if isinstance(reason, Exception) else RuntimeError(f"Faust crashed: {reason!r}")

    def _explained(self, reason: Exception) -> Exception:
        """Return an `AccessDenied` if Faust's client lacks a right; any other error unchanged."""
        kind = denied_kind(reason)
        if kind is None:
            return reason
        names = self.names
        source, rows = names.coordination, changelog(names)
        needs = (read(rows if rows in str(reason) else source), join(names.coordinator_group))
        return unauthorized(self.settings, "reading as a member of the coordinator's group", kind, *needs)

    # -- guards ------------------------------------------------------------------------------------------------------

    async def _pulse(self) -> None:
        assert self._pipeline is not None
        while True:
            self._pipeline.beat()
            await asyncio.sleep(PULSE)

    async def _check_login(self) -> None:
        """Raise `NotAuthenticated` if the cluster refuses the login.

        A client reports a changed password or an expired certificate as an unavailable broker.
        """
        with contextlib.suppress(BrokerUnavailable):
            await asyncio.get_running_loop().run_in_executor(None, check_connection, self.settings, SURVEY)

    async def _survey(self) -> None:
        """Measure the lag every `SURVEY` seconds. Raises `BrokerUnavailable` after more than `Options.patience` seconds
        without an answer."""
        assert self._pipeline is not None
        assert self._log_bounds is not None
        self._broker_seen = time.monotonic()
        while True:
            owned = self._pipeline.timer_loop.partitions
            try:
                # Ask also without partitions: an unavailable broker may be the reason why this instance owns none.
                bounds = await self._log_bounds.of(self.names.coordination, owned or [0])
                self._end_offsets = {p: end for p, (_, end) in bounds.items() if p in owned}
                self._broker_seen = time.monotonic()
            except AccessDenied:
                raise
            except JobledgerError as exc:
                outage.log_missed(LOG, self.settings, "%s", exc)
                await self._check_login()
            self.health()
            unanswered_s = time.monotonic() - self._broker_seen
            if unanswered_s > self.options.patience:
                raise BrokerUnavailable(
                    f"{self.settings.bootstrap or 'the embedded broker'} did not answer the coordinator for "
                    f"{unanswered_s:.0f} s; "
                    "check JOBLEDGER_BOOTSTRAP and that the broker runs"
                )
            await asyncio.sleep(SURVEY)


def run_coordinator(
    names: Names,
    settings: Settings,
    partitions: int,
    *,
    data_dir: Path | None = None,
    registry: CollectorRegistry | None = None,
) -> int:
    """Run one coordinator in this thread until SIGTERM or SIGINT, and return its exit code.

    Signals are handled if this is the main thread. An error that ends the coordinator is logged. The exit code is then
    70, or 77 for `AccessDenied`. In the main thread, the process exits at once after an error, or if Faust did not
    stop. ``data_dir``, ``registry``: see `Coordinator`.
    """
    greenlets.refuse("the stream processor")

    async def main() -> bool:
        coordinator = Coordinator(names, settings, partitions=partitions, data_dir=data_dir, registry=registry)
        await supervise(coordinator)
        return coordinator.did_not_stop

    code, did_not_stop = EXIT_OK, False
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            did_not_stop = runner.run(main())
        except KeyboardInterrupt:
            pass
        except JobledgerError as exc:
            LOG.error("%s", exc)
            code = EXIT_DENIED if isinstance(exc, AccessDenied) else EXIT_FAILED
        except Exception:
            LOG.exception("the coordinator ended with an error")
            code = EXIT_FAILED
        if (code or did_not_stop) and threading.current_thread() is threading.main_thread():
            # Threads of Faust's clients that wait for a dead broker would keep the process alive.
            logging.shutdown()
            os._exit(code)
    return code


async def supervise(coordinator: Coordinator, stop_event: threading.Event | None = None) -> None:
    """Run ``coordinator`` until SIGTERM or SIGINT (if this is the main thread), or until ``stop_event`` is set.

    Raises what `Coordinator.run` raises.
    """
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, coordinator.stop)
            handled.append(number)
    watch: asyncio.Task[None] | None = None
    if stop_event is not None:
        watch = asyncio.create_task(_stop_when(stop_event, coordinator))
    try:
        await coordinator.run()
    finally:
        if watch is not None:
            watch.cancel()
        for number in handled:
            loop.remove_signal_handler(number)


async def _stop_when(event: threading.Event, coordinator: Coordinator) -> None:
    while not event.is_set():
        await asyncio.sleep(0.1)
    coordinator.stop()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # uvloop does not exist for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
