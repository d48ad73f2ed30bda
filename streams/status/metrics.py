"""The materializer's metrics for Prometheus. Uses no Kafka; callers pass the values."""

from __future__ import annotations

from collections.abc import Mapping

from jobledger.process.extras import missing

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge
except ImportError as exc:
    raise missing("streams", exc) from exc


class TableMetrics:
    """Counters and gauges of one materializer, in ``registry`` (None: a new one)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        prefix = "jobledger_materializer_"

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        self._events = counter("events", "Records read", ("topic",))
        self._rejected = counter("rejected_records", "Records that could not be read, by reason", ("topic", "reason"))
        self._resets = counter(
            "offset_resets",
            "Partitions read again from their start, because the log no longer had the next offset",
            ("topic",),
        )
        self.batches = counter("batches", "Transactions written")
        self.jobs = counter("rows", "Job rows written")
        self.retries = counter("store_retries", "Operations retried because the database or the broker was unavailable")
        self._removed = Counter(
            "jobledger_table_removed_rows",
            "Rows of the status table that were removed, by the job's state",
            ("namespace", "state"),
            registry=self.registry,
        )
        self._lag = Gauge(prefix + "lag", "Records not in the table yet", ("topic",), registry=self.registry)
        self.active = Gauge(
            prefix + "active", "1 while this materializer writes, 0 while it stands by", registry=self.registry
        )

    def events(self, counts: Mapping[str, int]) -> None:
        """Count records that are now in the table, by topic."""
        for topic, count in counts.items():
            self._events.labels(topic).inc(count)

    def rejected(self, topic: str, reason: str) -> None:
        """Count a record that could not be read."""
        self._rejected.labels(topic, reason).inc()

    def reset(self, topic: str) -> None:
        """Count a partition that is read from its start again."""
        self._resets.labels(topic).inc()

    def removed(self, namespace: str, state: str, rows: int) -> None:
        """Count removed rows of jobs in a state."""
        self._removed.labels(namespace, state).inc(rows)

    def lag(self, lags: Mapping[str, int]) -> None:
        """Set the number of records that are not in the table yet, by topic."""
        for topic, count in lags.items():
            self._lag.labels(topic).set(count)
