"""Exports a worker's metrics for Prometheus. The worker keeps plain counts; each scrape converts them to metrics.

For each job, metrics cost only the counts, and a `bisect` over `WAIT_BOUNDS_MS` and `ATTEMPT_BOUNDS_S` (in `starter`
and `recorder`). `WorkerMetrics.collect` runs in the scrape's thread and reads values that other threads write: each
value is correct by itself, but the values may be of different moments.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]  # not declared as re-exported

from jobledger.config import Settings
from jobledger.consumers.state.limiters import Limiter
from jobledger.consumers.state.task_runtime import ATTEMPT_BOUNDS_S, WAIT_BOUNDS_MS
from jobledger.consumers.state.work import Partition
from jobledger.kafka.clients import admin, answer_of
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise missing("worker", exc) from exc

if TYPE_CHECKING:
    from jobledger.consumers.worker.worker import Worker

LOG = get_logger("jobledger.metrics")

#: Seconds for which the ends of the log are cached, and seconds that the broker may take to answer.
ENDS_FOR_S, ENDS_TIMEOUT_S = 3.0, 2.0

OUTCOMES = ("succeeded", "retried", "snoozed", "failed", "cancelled", "expired")
PREFIX = "jobledger_worker_"


class LogEnds:
    """Asks the broker for the end offsets of partitions. This worker's consumer is not asked, because records that are
    not fetched yet count, too."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AdminClient | None = None
        self._known: dict[tuple[str, int], int] = {}
        self._asked_at = float("-inf")
        self._wanted: set[tuple[str, int]] = set()

    def of(self, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Return the end offsets of ``wanted``, by (topic, partition number). If the broker does not answer, return the
        last known ones."""
        now = time.monotonic()
        if wanted and (now - self._asked_at > ENDS_FOR_S or not self._wanted.issuperset(wanted)):
            self._asked_at, self._wanted = now, set(wanted)
            try:
                self._ask(wanted)
            except KafkaException as exc:
                LOG.info("the ends of the work topics are not known now: %s", exc.args[0].str())
        return {where: end for where, end in self._known.items() if where in self._wanted}

    def _ask(self, wanted: Sequence[tuple[str, int]]) -> None:
        if self._client is None:
            self._client = admin(self._settings)
        spec = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # `latest` is not annotated
        asked = self._client.list_offsets(
            {TopicPartition(*where): spec for where in wanted}, request_timeout=ENDS_TIMEOUT_S
        )
        for where, answer in asked.items():
            self._known[where.topic, where.partition] = answer_of(answer, ENDS_TIMEOUT_S).offset


def _histogram(counts: Sequence[int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Return the counts as Prometheus expects them: cumulative, by upper bound in seconds."""
    buckets, total = [], 0
    for bound, count in zip([*bounds, float("inf")], counts, strict=True):
        total += count
        buckets.append((repr(bound) if bound != float("inf") else "+Inf", float(total)))
    return buckets


class WorkerMetrics(Collector):
    """Collects the metrics of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ends = LogEnds(worker.settings)

    def describe(self) -> Iterator[Metric]:
        """Return no metrics, because the worker has no dispatcher when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the present metrics; no metrics before the worker has started. Any thread."""
        if self._worker.dispatcher is None:
            return
        yield from self._jobs()
        yield from self._waits()
        yield from self._partitions()
        yield from self._groups()
        yield from self._gates()
        yield from self._children()

    def _jobs(self) -> Iterator[Metric]:
        dispatcher = self._worker.dispatcher
        assert dispatcher is not None
        labels = ["task", "queue"]
        started = CounterMetricFamily(f"{PREFIX}jobs_started", "Attempts begun", labels=labels)
        ended = CounterMetricFamily(
            f"{PREFIX}jobs_ended", "Attempts ended, by what became of them", labels=[*labels, "outcome"]
        )
        flying = GaugeMetricFamily(f"{PREFIX}in_flight", "Attempts that run now", labels=labels)
        runs = HistogramMetricFamily(f"{PREFIX}run_seconds", "How long attempts ran", labels=labels)
        blocked = CounterMetricFamily(
            f"{PREFIX}loop_blocked",
            "Times that code blocked the event loop for a second, or beyond its job's timeout, by task",
            labels=labels,
        )
        if self._worker.watch is not None:
            blocked.add_metric(["", ""], self._worker.watch.blocked_by_others)
        running = Counter(work.runtime.name for work in list(dispatcher.running_jobs.jobs) if work.runtime is not None)
        for runtime in dispatcher.pipe.tasks.runtimes.values():
            if runtime.task.queue not in dispatcher.pipe.lanes.limiters and not runtime.started:
                continue
            about = [runtime.name, runtime.task.queue]
            started.add_metric(about, runtime.started)
            flying.add_metric(about, running[runtime.name])
            runs.add_metric(about, _histogram(runtime.attempt_counts, ATTEMPT_BOUNDS_S), runtime.seconds)
            blocked.add_metric(about, runtime.blocked)
            for outcome in OUTCOMES:
                ended.add_metric([*about, outcome], getattr(runtime, outcome))
        yield from (started, ended, flying, runs, blocked)

    def _waits(self) -> Iterator[Metric]:
        dispatcher = self._worker.dispatcher
        assert dispatcher is not None
        labels = ["queue", "priority"]
        waits = HistogramMetricFamily(
            f"{PREFIX}wait_seconds",
            "From the append of a job's record to its start, on the broker's clock",
            labels=labels,
        )
        waiting = GaugeMetricFamily(
            f"{PREFIX}waiting", "Received jobs that wait for a turn, a key, a limit or a slot", labels=labels
        )
        oldest = GaugeMetricFamily(
            f"{PREFIX}oldest_wait_seconds",
            "How long the oldest record has waited that was fetched and not taken up",
            labels=labels,
        )
        ack_tracker = self._worker.ack_tracker
        broker_ms = time.time() * 1000 if ack_tracker is None else ack_tracker.clock.ms()
        for lane in dispatcher.pipe.lanes.by_topic.values():
            about = [lane.queue, lane.priority or "normal"]
            waits.add_metric(
                about, _histogram(lane.wait_counts, [b / 1000 for b in WAIT_BOUNDS_MS]), lane.waited_ms / 1000
            )
            parts = list(lane.parts)
            rooms = sum(map(len, list(lane.waiting.values())))
            waiting.add_metric(about, sum(p.backlog.count for p in parts) + rooms)
            stamps = [stamp for p in parts if (stamp := p.oldest_ms()) is not None]
            oldest.add_metric(about, max(0.0, broker_ms - min(stamps)) / 1000 if stamps else 0.0)
        yield from (waits, waiting, oldest)

    def _partitions(self) -> Iterator[Metric]:
        worker = self._worker
        dispatcher = worker.dispatcher
        assert dispatcher is not None
        labels = ["queue", "priority", "partition"]
        lag = GaugeMetricFamily(f"{PREFIX}lag", "Records between the commit and the end of the log", labels=labels)
        gap = GaugeMetricFamily(
            f"{PREFIX}watermark_gap", "Records between the oldest not done and the newest received", labels=labels
        )
        pending = GaugeMetricFamily(f"{PREFIX}pending", "Received records that are not done", labels=labels)
        size = GaugeMetricFamily(f"{PREFIX}map_bytes", "Bytes of the metadata of the last commit", labels=labels)
        braked = GaugeMetricFamily(
            f"{PREFIX}braked",
            "1 while no records are taken, because the completion map could become too long",
            labels=labels,
        )
        parts: list[Partition] = list(worker.partitions())
        ends = self._ends.of([(p.topic, p.number) for p in parts])
        for part in parts:
            lane = dispatcher.pipe.lanes.by_topic.get(part.topic)
            if lane is None:
                continue
            about = [lane.queue, lane.priority or "normal", str(part.number)]
            end = ends.get((part.topic, part.number))
            offset, metadata = part.last_commit or (part.prior.committed, part.prior.metadata or "")
            if end is not None:
                lag.add_metric(about, max(0, end - max(0, offset)))
            size.add_metric(about, len(metadata))
            braked.add_metric(about, part.braked)
            if part.offsets is not None:
                with part.lock:
                    received, watermark, left = part.offsets.end, part.offsets.watermark, part.offsets.pending
                gap.add_metric(about, received - watermark)
                pending.add_metric(about, left)
        yield from (lag, gap, pending, size, braked)

    def _groups(self) -> Iterator[Metric]:
        labels = ["queue", "priority"]
        rebalances = CounterMetricFamily(
            f"{PREFIX}rebalances", "Times that partitions were assigned, revoked or lost", labels=[*labels, "kind"]
        )
        commits = CounterMetricFamily(f"{PREFIX}commits", "Commits that were tried", labels=labels)
        failed = CounterMetricFamily(f"{PREFIX}failed_commits", "Partitions' commits that were refused", labels=labels)
        dispatcher = self._worker.dispatcher
        assert dispatcher is not None
        for fetcher in self._worker.fetchers:
            lane = dispatcher.pipe.lanes.by_topic[fetcher.topic]
            about = [lane.queue, lane.priority or "normal"]
            for kind in ("assigned", "revoked", "lost"):
                rebalances.add_metric([*about, kind], fetcher.rebalances[kind])
            commits.add_metric(about, fetcher.committer.commits)
            failed.add_metric(about, fetcher.committer.errors)
        yield from (rebalances, commits, failed)

    def _gates(self) -> Iterator[Metric]:
        dispatcher = self._worker.dispatcher
        assert dispatcher is not None
        labels = ["kind", "name"]
        paused = GaugeMetricFamily(f"{PREFIX}paused", "1 while a queue or task is paused", labels=labels)
        rate = GaugeMetricFamily(
            f"{PREFIX}limit_rate", "Starts a second for all workers, where that is limited", labels=labels
        )
        slots = GaugeMetricFamily(
            f"{PREFIX}limit_concurrency", "Jobs at once for all workers, where that is limited", labels=labels
        )
        adaptive = GaugeMetricFamily(
            f"{PREFIX}adaptive_limit", "Concurrency that `adaptive` allows now in this worker", labels=["task"]
        )
        is_open = GaugeMetricFamily(f"{PREFIX}circuit_open", "1 while a task's circuit is open", labels=["task"])
        trips = CounterMetricFamily(f"{PREFIX}circuit_trips", "Times that a task's circuit opened", labels=["task"])
        scopes: list[tuple[str, str, Limiter]] = [
            ("queue", name, limiter) for name, limiter in dispatcher.pipe.lanes.limiters.items()
        ]
        for runtime in dispatcher.pipe.tasks.runtimes.values():
            if runtime.task.queue in dispatcher.pipe.lanes.limiters:
                scopes.append(("task", runtime.name, runtime.limiter))
            if runtime.adaptive is not None:
                adaptive.add_metric([runtime.name], runtime.adaptive.limit)
            if runtime.breaker is not None:
                is_open.add_metric([runtime.name], runtime.breaker.is_open)
                trips.add_metric([runtime.name], runtime.breaker.trips)
        for kind, name, limiter in scopes:
            paused.add_metric([kind, name], limiter.paused is not None)
            if limiter.limits.rate is not None:
                rate.add_metric([kind, name], limiter.limits.rate)
            if limiter.limits.concurrency is not None:
                slots.add_metric([kind, name], limiter.limits.concurrency)
        yield from (paused, rate, slots, adaptive, is_open, trips)

    def _children(self) -> Iterator[Metric]:
        children = self._worker.children
        count, died, killed = (0, 0, 0) if children is None else (children.count, children.deaths, children.killed)
        leases = self._worker.leases
        held, lost = (0, 0) if leases is None else (leases.count, leases.lost)
        yield GaugeMetricFamily(f"{PREFIX}leases", "Long jobs that this worker has on a lease", value=held)
        yield CounterMetricFamily(f"{PREFIX}leases_lost", "Leases that ran out before their jobs ended", value=lost)
        yield GaugeMetricFamily(f"{PREFIX}children", "Child processes", value=count)
        yield CounterMetricFamily(f"{PREFIX}child_deaths", "Child processes that died while a job ran", value=died)
        yield CounterMetricFamily(
            f"{PREFIX}child_kills", "Children that were ended, for time, memory or a cancel", value=killed
        )
