"""Prometheus metrics of one process over HTTP, on the loopback address: what it counts itself, and its health's figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import GaugeMetricFamily

from jobledger.errors import PortTaken

LOG = logging.getLogger("jobledger.metrics")

HOST = "127.0.0.1"

Health = Callable[[], Mapping[str, Any]]


class HealthFigures:
    """A collector: every number of a health report, and of each of its ``queues``, as a gauge ``<prefix>_<name>``."""

    def __init__(self, prefix: str, health: Health) -> None:
        self._prefix, self._health = prefix, health

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing beforehand: asking would take a report before there is one."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The figures of now."""
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
def serving(port: int | None, prefix: str = "", health: Health | None = None) -> Iterator[None]:
    """Serve metrics on ``port`` of 127.0.0.1 (0: a free one, which is logged; None: not at all) while the block runs.

    Raises `PortTaken`.
    """
    if port is None:
        yield
        return
    collector = None if health is None else HealthFigures(prefix, health)
    try:
        server, thread = start_http_server(port, HOST)
    except OSError as exc:
        raise PortTaken(
            f"metrics cannot be served on {HOST}:{port}: {exc.strerror}; choose another --metrics-port (0: a free one)"
        ) from exc
    LOG.info("metrics on http://%s:%d/metrics", HOST, server.server_port)
    if collector is not None:
        REGISTRY.register(collector)
    try:
        yield
    finally:
        if collector is not None:
            REGISTRY.unregister(collector)
        server.shutdown()
        server.server_close()
        thread.join(5.0)
