"""The coordinator's metrics for Prometheus. This module does not use Kafka; callers pass the values."""

from __future__ import annotations

from collections.abc import Mapping

from jobledger.process.extras import missing

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
except ImportError as exc:
    raise missing("streams", exc) from exc


#: Upper bounds in seconds. The promise is that 99 of 100 releases are at most 0.05 s late.
LATENESS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters, gauges and a histogram of one coordinator, in ``registry`` (None: a new one)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        prefix = "jobledger_coordinator_"

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(prefix + name, text, registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        self._events = counter("events", "Decided events of the coordination topic, by verdict", ("verdict",))
        self._released = counter("releases", "JobDue records acknowledged")
        self._rejected = counter(
            "rejected_records", "Records that were not events and were written to the dead letters"
        )
        self._undeliverable = counter(
            "undeliverable_jobs", "Jobs that ended because their work topic refuses their size"
        )
        self._swept = counter("swept_markers", "Deleted markers of releases and of ended runs")
        self._late = Histogram(
            prefix + "lateness_seconds",
            "Seconds from the due time to the append time of JobDue, by the broker's clock",
            buckets=LATENESS_BUCKETS,
            registry=self.registry,
        )
        self.lag = gauge("lag", "Events of owned partitions that are not processed yet")
        self.kept = gauge("scheduled", "Releases that wait until they are due, and long jobs that run")
        self.ready = gauge("ready", "1 if every owned partition is restored, and read up to the end that it had then")
        self.overdue = gauge("overdue_seconds", "Seconds since the earliest timer was due")
        self.partitions = gauge("partitions", "Partitions owned")
        self.missing_topics = gauge("missing_topics", "Work topics that releases wait for")
        self.clock_ahead = gauge(
            "clock_ahead_seconds", "Upper bound of the seconds by which this process's clock is ahead of the broker's"
        )
        self.released_count = 0

    def verdicts(self, counts: Mapping[str, int]) -> None:
        """Count decided events by verdict."""
        for verdict, count in counts.items():
            self._events.labels(verdict).inc(count)

    def released(self, late: float) -> None:
        """Count a release whose `JobDue` was appended ``late`` seconds after the release was due."""
        self.released_count += 1
        self._released.inc()
        self._late.observe(late)

    def rejected(self, count: int) -> None:
        """Count records that were not events and were written to the dead letters."""
        self._rejected.inc(count)

    def undeliverable(self, count: int) -> None:
        """Count jobs that ended because their releases are larger than their work topics accept."""
        self._undeliverable.inc(count)

    def swept(self, count: int) -> None:
        """Count deleted markers."""
        self._swept.inc(count)

    def lateness(self) -> dict[str, float]:
        """Return the histogram: the cumulative number of releases by upper bound in seconds."""
        return {
            sample.labels["le"]: sample.value
            for metric in self._late.collect()
            for sample in metric.samples
            if sample.name.endswith("_bucket")
        }
