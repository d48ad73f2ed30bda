"""The coordinator: lets delayed and retried jobs go when they are due. This module owns its life; what
it does is the `jobledger.streams.cycle`, what it decides `jobledger.streams.decisions`, how Faust is set
up `jobledger.streams.faust_app`.

It needs no database: its table lies in a changelog topic, with a local copy that can be thrown away. Any number of
instances share the partitions of ``<ns>.coordination``. Whatever goes wrong inside ends the process without committing
what was not dealt with; another instance, or the next start, goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jobledger import greenlets, log, outage
from jobledger.access import join, knock, read, unauthorized
from jobledger.config import Settings
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, JobledgerError
from jobledger.extras import missing
from jobledger.kafka import acls
from jobledger.kafka.topic_watch import TopicWatch
from jobledger.logger import get_logger
from jobledger.names import Names
from jobledger.streams.aio import MAX_BATCH_BYTES, AckedWriter, Ends, denied_kind, unused
from jobledger.streams.cycle import Cycle
from jobledger.streams.faust_app import (
    TABLE,
    CommitHook,
    Group,
    Options,
    build,
    changelog,
    check_topics,
    deliver_to,
    hasten,
    origin_of,
    progress,
    recovering,
    stuck,
    work_topics,
)
from jobledger.streams.metrics import Metrics
from jobledger.streams.noise import quieten, tell_no_more
from jobledger.streams.place import take_place
from jobledger.streams.security import security
from jobledger.wire import framing
from jobledger.writer import LogWriter

try:
    from faust.exceptions import ConsistencyError
    from prometheus_client import CollectorRegistry
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.coordinator")
T = TypeVar("T")

#: Exit codes of `run_coordinator`. 70 and 77 are EX_SOFTWARE and EX_NOPERM of sysexits.h: start it again; the cluster
#: refuses it.
EXIT_OK, EXIT_FAILED, EXIT_DENIED = 0, 70, 77

#: Seconds between two beats of the guard against a clock that jumps.
PULSE = 0.25
#: Seconds between two measurements of the lag; they also show that the broker is there.
SURVEY = 2.0
#: Records may be a little larger than what was submitted: they carry a due time and where they come from.
ROOM_BYTES = 4_096
#: Seconds within which the broker must have answered for a time to be counted against Faust.
SEEN_LATELY = 5 * SURVEY
#: Seconds for Faust to come further with its start or a rebalance once the broker is there, and to stop.
START_TIMEOUT, STOP_TIMEOUT = 30.0, 10.0
#: Seconds to end what was begun, when asked to stop.
FINISH_TIMEOUT = 3.0


class _StoppedEarly(Exception):
    """Asked to stop before it had begun."""


class Coordinator:
    """One instance.

    ``partitions`` must be those of the coordination topic and of the changelog. ``data_dir``: where local copies lie;
    by default ``<home>/coordinator/<namespace>``. ``on_step(name)`` is called between any two steps that a crash could
    come between, for tests. ``registry``: where metrics go; a private one by default.
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self.stuck = False  # Faust did not stop: its threads would keep the process alive
        self._app: Any = None
        self._cycle: Cycle | None = None
        self._ends: Ends | None = None
        self._high: dict[int, int] = {}
        self._broker_seen = time.monotonic()
        self._last_ready = self._broker_seen
        self._started = False
        self._topics = TopicWatch(self.settings, names, self._watched, LOG, others=self._uneven)

    # -- asked from outside ------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `run` to come to a clean end; from any thread."""
        outage.stopping()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stop.set)

    def health(self) -> dict[str, Any]:
        """How it stands, as plain values; also sets the gauges.

        ``state``: starting, rebalancing, catching-up or ready. ``lag``: events not dealt with. ``next_due_us``:
        broker's clock. ``overdue_s``: for how long the first release that is due waits; ``not_ready_s``: for how long
        this instance has not been ready. Either grows while something stands against acting, and stays near 0 otherwise.
        ``late``: releases by lateness, cumulative, keyed by upper bound in seconds. ``missing_topics``:
        work topics that releases wait for; not empty means that somebody must run ``jobledger topics apply``.
        ``topic_problems``: settings of topics that promises rest on and that somebody has changed, for people.
        """
        cycle, metrics = self._cycle, self.metrics
        settled = self._started and not self._app.rebalancing
        ready = cycle is not None and settled and bool(self._app.tables.actives_ready) and cycle.ready
        owned = [] if cycle is None else cycle.firing.partitions
        now = time.monotonic()
        if ready:
            self._last_ready = now
        overdue = 0.0 if cycle is None else cycle.firing.overdue
        lag = (
            0 if cycle is None else sum(max(0, end - cycle.position(p)) for p, end in self._high.items() if p in owned)
        )
        scheduled = 0 if cycle is None else sum(cycle.table.scheduled.values())
        missing = [] if cycle is None else cycle.topics.missing
        state = "ready" if ready else "starting" if not self._started else "catching-up" if settled else "rebalancing"
        metrics.ready.set(ready)
        metrics.overdue.set(overdue)
        metrics.lag.set(lag)
        metrics.partitions.set(len(owned))
        metrics.scheduled.set(scheduled)
        metrics.missing_topics.set(len(missing))
        metrics.clock_ahead.set(0 if cycle is None else cycle.firing.clock.ahead_us / 1e6)
        return {
            "state": state,
            "ready": ready,
            "rebalancing": not settled,
            "partitions": owned,
            "lag": lag,
            "scheduled": scheduled,
            "next_due_us": None if cycle is None else cycle.firing.next_due,
            "overdue_s": round(overdue, 1),
            "not_ready_s": round(now - self._last_ready, 1),
            "fired": metrics.fired,
            "late": metrics.lateness(),
            "missing_topics": missing,
            "topic_problems": list(self._topics.problems),
            "broker_seen_s_ago": round(now - self._broker_seen, 1),
        }

    # -- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until `stop`. Raises what made it give up; nothing that was not dealt with is committed then."""
        self._loop = asyncio.get_running_loop()
        place = take_place(self._root, self.names.namespace)
        # What is sent must be allowed to be as large as what was read.
        settings = replace(self.settings, max_record_bytes=self.settings.max_record_bytes + ROOM_BYTES)
        writer: AckedWriter | None = None
        tasks: list[asyncio.Task[None]] = []
        try:
            quieten(heard=partial(outage.outage_of(self.settings).heard, by=self))
            if idle := unused(self.settings):
                LOG.warning("client settings that the coordinator does not use (aiokafka): %s", ", ".join(idle))
            origin, topics, max_batch = await self._with_patience(self._prepare)
            place.keep_for(origin)
            self._ends = Ends(self.settings, self.options.patience / 2)
            framed = framing(self.settings, self.names, self._publish)
            await self._with_patience(partial(self._publish, None))
            if framed is not None:
                written = (self.names.coordination, self.names.lifecycle, self.names.dead_letter, *topics)
                await self._with_patience(partial(framed.prepare, written))
            writer = AckedWriter(settings, security(self.settings), self.options.patience, max_batch, framed)
            await writer.start()
            app, table = build(self.names, self.settings, self.options, self._partitions, place)
            self._app = app
            cycle = self._cycle = Cycle(
                self.names,
                self.settings,
                self.options,
                Group(app, self.names, table),
                writer,
                self._ends,
                log.decoder(self.settings, self.names),
                self.metrics,
                self._step,
                topics,
            )
            deliver_to(app, self.names, cycle.take)
            app.on_partitions_revoked.connect(self._on_revoked, weak=False)
            table.on_recover(self._on_recover)
            if self._on_step is not None:
                app.sensors.add(CommitHook(self._step))
            await self._or_stuck(app.start())
            hasten(app)
            quieten()
            self._started = True
            self._topics.start()
            LOG.info("coordinator of %s started, local copy in %s", self.names.namespace, place.folder)
            for work in (
                cycle.decide,
                cycle.settle,
                cycle.firing.run,
                cycle.sweep,
                cycle.topics.watch,
                self._pulse,
                self._survey,
                self._watch_faust,
                self._watch_group,
                self._watch_recovery,
            ):
                tasks.append(asyncio.create_task(self._guarded(work()), name=work.__name__))
            await self._stop.wait()
            if self._failure is None:
                await cycle.finish(FINISH_TIMEOUT)
        except _StoppedEarly:
            pass
        finally:
            self._started = False
            self._topics.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._app is not None:
                await self._end(self._app)
            if writer is not None:
                await writer.stop(2.0)
            if self._ends is not None:
                self._ends.close()
            tell_no_more()
            if isinstance(self._failure, ConsistencyError):
                place.clear()  # the local copy is of a log that is gone
            place.release()
        if self._failure is not None:
            raise self._failure

    def _prepare(self) -> tuple[str, dict[str, int | None], int]:
        """Which log the local copy must be of; the work topics there are, with the largest batch each takes; and the
        largest that every topic takes to which this coordinator writes."""
        names = self.names
        knock(self.settings)
        fixed = (names.coordination, changelog(names), names.lifecycle, names.dead_letter, names.schemas)
        acls.check(self.settings, names.namespace, fixed)
        check_topics(self.settings, names, self._partitions)
        work = work_topics(self.settings, names)
        acls.check(self.settings, names.namespace, work)
        others = (names.coordination, changelog(names), names.lifecycle, names.dead_letter)
        limits = [*work.values(), *log.batch_limits(self.settings, others).values()]
        most = min((limit for limit in limits if limit is not None), default=MAX_BATCH_BYTES)
        return origin_of(self.settings, changelog(names)), work, most

    def _watched(self) -> list[str]:
        names = self.names
        work = [] if self._cycle is None else self._cycle.topics.known
        return [names.coordination, changelog(names), names.lifecycle, names.dead_letter, names.schemas, *work]

    def _uneven(self) -> list[str]:
        """What `check_topics` says now: partitions that were added since the start are not read."""
        try:
            check_topics(self.settings, self.names, self._partitions)
        except ConfigError as exc:
            return [str(exc)]
        return []

    def _publish(self, key: str | None) -> None:
        """Publish this version's schema, under ``key`` or by its fingerprint."""
        writer = LogWriter(replace(self.settings, submit_timeout=self.options.patience), self.names)
        try:
            if key is None:
                writer.ensure_schema()
            else:
                writer.publish(key)
        finally:
            writer.close(0.0)

    async def _with_patience(self, ask: Callable[[], T]) -> T:
        """Ask in a thread, again while the broker is away, for `Options.patience` seconds."""
        deadline = time.monotonic() + self.options.patience
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(None, ask)
            except BrokerUnavailable as exc:
                if self._stop.is_set():
                    raise _StoppedEarly from None
                if time.monotonic() >= deadline:
                    raise
                LOG.warning("trying for %.0f s more: %s", deadline - time.monotonic(), exc)
                await asyncio.sleep(1.0)

    async def _end(self, app: Any) -> None:
        # Offsets of what was dealt with are committed in here; a broker that is away must not hold the end up. Not by a
        # timeout around it: something in there takes a cancellation for its own, and goes on waiting.
        stopping = asyncio.ensure_future(app.stop())
        done, _ = await asyncio.wait({stopping}, timeout=STOP_TIMEOUT)
        if not done:
            stopping.cancel()
            self.stuck = True
            LOG.warning("Faust did not stop within %.0f s", STOP_TIMEOUT)
        elif (problem := stopping.exception()) is not None:  # an unclean end of Faust loses nothing
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
        except BaseException as exc:  # noqa: BLE001  # whatever it is ends the coordinator
            self._fail(exc)

    # -- Faust's calls -----------------------------------------------------------------------------------------------

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        if self._cycle is not None:
            await self._shielded(self._cycle.revoked)

    async def _on_recover(self, *_: Any) -> None:
        if self._cycle is not None:
            await self._shielded(self._cycle.rebuild)

    async def _shielded(self, call: Callable[[], Awaitable[None]]) -> None:
        """Faust looks at the exceptions of these calls no further; so they end the coordinator here."""
        try:
            await call()
        except Exception as exc:  # noqa: BLE001  # whatever it is ends the coordinator
            self._fail(exc)

    async def _or_stuck(self, starting: Awaitable[Any]) -> None:
        """Let Faust start, unless its client cannot, or makes no progress. Restoring a large table may take its time."""
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
        """A rebalance must end: with the part of the table read that it brought, and with the streams going on."""
        await self._watch_progress(
            "a rebalance of its group, or the part of its table that came with one", self._moving
        )

    def _moving(self, app: Any) -> bool:
        restoring = self._cycle is not None and self._cycle.restoring
        seen = time.monotonic() - self._broker_seen < SEEN_LATELY
        return seen and (app.rebalancing or recovering(app) or restoring)

    def _progress(self) -> tuple[object, ...]:
        return progress(self._app), 0 if self._cycle is None else self._cycle.table.restored

    async def _watch_progress(self, what: str, waiting: Callable[[Any], bool]) -> None:
        """Faust waits for ever for an answer that a broker which stood still will not give any more. While it is
        ``waiting``, it has `START_TIMEOUT` for each bit of progress, and more if the group may wait longer for a member
        that is silent; a time in which this process stood still is not counted, nor one without a broker.
        """
        seen, quiet = self._progress(), 0.0
        while quiet < (bound := START_TIMEOUT + max(0.0, self.options.session_timeout - 10.0)):
            await asyncio.sleep(PULSE)
            now = self._progress()
            quiet = quiet + PULSE if waiting(self._app) and now == seen else 0.0
            seen = now
        raise BrokerUnavailable(
            f"the coordinator made no progress for {bound:.0f} s with {what} (rebalancing: {self._app.rebalancing}, "
            f"restoring: {recovering(self._app)}); look whether every broker of {self.settings.resolve_bootstrap()} "
            "answers, and start the coordinator again"
        )

    async def _watch_group(self) -> None:
        """A client that may not join its group waits for somebody to ask it why."""
        while (reason := stuck(self._app)) is None:
            await asyncio.sleep(PULSE)
        raise self._explained(reason)

    async def _watch_faust(self) -> None:
        """A part of Faust that dies leaves the process up and idle: so it ends."""
        rows = self._app.tables[TABLE].data
        while not self._app.crashed:
            if rows.failure is not None:
                raise rows.failure
            await asyncio.sleep(PULSE)
        reason = self._app.crash_reason
        raise self._explained(reason) if isinstance(reason, Exception) else RuntimeError(f"Faust crashed: {reason!r}")

    def _explained(self, reason: Exception) -> Exception:
        """Our error for a right that Faust's client lacks; any other as it is."""
        kind = denied_kind(reason)
        if kind is None:
            return reason
        names = self.names
        source, rows = names.coordination, changelog(names)
        needs = (read(rows if rows in str(reason) else source), join(names.coordinator_group))
        return unauthorized(self.settings, "running the coordinator's group", kind, *needs)

    # -- guards ------------------------------------------------------------------------------------------------------

    async def _pulse(self) -> None:
        assert self._cycle is not None
        while True:
            self._cycle.beat()
            await asyncio.sleep(PULSE)

    async def _still_let_in(self) -> None:
        """A password that was changed, or a certificate that has expired, looks like a broker that is away."""
        with contextlib.suppress(BrokerUnavailable):
            await asyncio.get_running_loop().run_in_executor(None, knock, self.settings, SURVEY)

    async def _survey(self) -> None:
        """Measure the lag; give up if the broker is away for longer than `Options.patience`."""
        assert self._cycle is not None
        assert self._ends is not None
        self._broker_seen = time.monotonic()
        while True:
            owned = self._cycle.firing.partitions
            try:
                # Whoever owns nothing, as in a group that fell apart because the broker is away, asks all the same.
                found = await self._ends.of(self.names.coordination, owned or [0])
                self._high = {p: end for p, (_, end) in found.items() if p in owned}
                self._broker_seen = time.monotonic()
            except AccessDenied:
                raise
            except JobledgerError as exc:
                outage.log_missed(LOG, self.settings, "%s", exc)
                await self._still_let_in()
            self.health()
            away = time.monotonic() - self._broker_seen
            if away > self.options.patience:
                raise BrokerUnavailable(
                    f"{self.settings.bootstrap or 'the embedded broker'} did not answer the coordinator for {away:.0f} s; "
                    "check JOBLEDGER_BOOTSTRAP and that the broker runs"
                )
            await asyncio.sleep(SURVEY)


def run_coordinator(
    names: Names,
    settings: Settings,
    partitions: int,
    *,
    data_dir: Path | None = None,
    session_timeout_s: float | None = None,
    options: Options | None = None,
    stop_event: threading.Event | None = None,
    registry: CollectorRegistry | None = None,
    on_ready: Callable[[Coordinator], None] | None = None,
) -> int:
    """Run one coordinator in this thread until SIGTERM, SIGINT or ``stop_event``; its exit code.

    Signals are handled if this is the main thread. ``on_ready(coordinator)`` is called before it starts, for those who
    want its `Coordinator.health`. What makes it give up is logged; the code then is 70, or 77 for `AccessDenied`.
    """
    greenlets.refuse("the stream processor")
    options = options or Options()
    if session_timeout_s is not None:
        options = replace(options, session_timeout=session_timeout_s)

    async def main() -> bool:
        coordinator = Coordinator(
            names, settings, partitions=partitions, options=options, data_dir=data_dir, registry=registry
        )
        if on_ready is not None:
            on_ready(coordinator)
        await supervise(coordinator, stop_event)
        return coordinator.stuck

    code, stuck = EXIT_OK, False
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            stuck = runner.run(main())
        except KeyboardInterrupt:
            pass
        except JobledgerError as exc:
            LOG.error("%s", exc)
            code = EXIT_DENIED if isinstance(exc, AccessDenied) else EXIT_FAILED
        except Exception:
            LOG.exception("the coordinator gave up")
            code = EXIT_FAILED
        if (code or stuck) and threading.current_thread() is threading.main_thread():
            # Threads of Faust's clients that hang on a dead broker would keep the process alive.
            logging.shutdown()
            os._exit(code)
    return code


async def supervise(coordinator: Coordinator, stop_event: threading.Event | None = None) -> None:
    """Run ``coordinator``; SIGTERM, SIGINT (in the main thread) and ``stop_event`` stop it."""
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
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
