"""Prometheus metrics of one process over HTTP: the process's own counters, and the numbers of its health report.

The metrics are served on the loopback address unless another address is given. They name tasks, queues and topics, and
contain no data of jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jobledger.cli.options import Listen
from jobledger.errors import PortTaken
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger

try:
    from prometheus_client import REGISTRY, start_http_server
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise missing("worker", exc) from exc

LOG = get_logger("jobledger.metrics")

Health = Callable[[], Mapping[str, Any]]


class HealthFigures(Collector):
    """A collector that exports every number of a health report as a gauge ``<prefix>_<name>``, and every number of each
    of its ``queues`` as a gauge ``<prefix>_queue_<name>``."""

    def __init__(self, prefix: str, health: Health) -> None:
        self._prefix, self._health = prefix, health

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return nothing: at registration there is no health report yet."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current numbers as gauges."""
        report = self._health()
        status = report.get("status")
        if status is not None:
            yield GaugeMetricFamily(
                f"{self._prefix}_healthy", "1 unless the status is unhealthy", status != "unhealthy"
            )
        for name, value in report.items():
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"{self._prefix}_{name}", f"{name} of the health report", float(value))
        queues: Mapping[str, Mapping[str, Any]] = report.get("queues") or {}
        for name in sorted({name for figures in queues.values() for name in figures}):
            family = GaugeMetricFamily(f"{self._prefix}_queue_{name}", f"{name} of each queue", labels=["queue"])
            for queue, figures in queues.items():
                value = figures.get(name)
                if value is not None and not isinstance(value, str):
                    family.add_metric([queue], float(len(value) if isinstance(value, list | tuple) else value))
            yield family


@contextmanager
def serving(
    at: Listen | None, prefix: str = "", health: Health | None = None, more: Sequence[Collector] = ()
) -> Iterator[None]:
    """Serve metrics at ``at`` while the block runs, and log the address, which may have a free port that was chosen.
    ``at`` None: do not serve. Raises `PortTaken`.

    ``health``: a report whose numbers are served as well; ``more``: further collectors.
    """
    if at is None:
        yield
        return
    collectors: list[Collector] = [*([] if health is None else [HealthFigures(prefix, health)]), *more]
    try:
        server, thread = start_http_server(at.port, at.host)
    except OSError as exc:
        raise PortTaken(
            f"metrics cannot be served on {at}: {exc.strerror}; choose another --metrics-port (0: a free one)"
        ) from exc
    LOG.info("metrics on http://%s/metrics", at._replace(port=server.server_port))
    for collector in collectors:
        REGISTRY.register(collector)
    try:
        yield
    finally:
        for collector in collectors:
            REGISTRY.unregister(collector)
        server.shutdown()
        server.server_close()
        thread.join(5.0)
