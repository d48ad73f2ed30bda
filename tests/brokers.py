"""Runs a cluster of real brokers on this machine. Each broker can be killed, stopped and started again, and can have
TLS listeners.

The brokers run with the program of `jobledger.kafka.embedded.EmbeddedKafka`, without Docker and without an installed
Java. Every node is both broker and controller, so the cluster works without one of three nodes. The brokers end with
the process that started them.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from jobledger.kafka.embedded import broker_process
from jobledger.kafka.embedded.defaults import HOST, KAFKA_VERSION, STOP_TIMEOUT_S, default_home
from jobledger.kafka.embedded.jars import classpath
from jobledger.kafka.embedded.ports import free_port
from tests.patience import PATIENCE

START_TIMEOUT_S = 60 * PATIENCE
HEAP_MB = 256

#: Settings that store each topic, and Kafka's own topics, on three brokers. A record is acknowledged when two of them
#: have it.
REPLICATED: Mapping[str, str] = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    # Tests of lost leaders wait less than with Kafka's default. `docs/how-to.md` names this value.
    "broker.session.timeout.ms": "3000",
}


class Brokers:
    """A cluster of ``size`` brokers with the numbers 1, 2, …; a context manager.

    ``config`` overrides `jobledger.kafka.embedded.broker_process.BROKER_CONFIG` and, with more than one broker,
    `REPLICATED`. ``listeners`` names protocols (``SSL``, ``SASL_SSL``) for which every broker has a listener beside the
    plain text one; `listener` returns their addresses. Files that ``config`` names must exist before the start.
    """

    def __init__(
        self,
        size: int = 1,
        *,
        config: Mapping[str, str] | None = None,
        listeners: tuple[str, ...] = (),
        heap_mb: int = HEAP_MB,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jobledger-kafka-"))
        taken: set[int] = set()
        id_ = broker_process.cluster_id()
        controllers = {node: _port(taken) for node in range(1, size + 1)}
        path = classpath(default_home() / "jars")
        self._launches = {
            node: broker_process.Launch(
                path,
                _port(taken),
                self.folder / str(node) / "data",
                heap_mb,
                KAFKA_VERSION,
                {**(REPLICATED if size > 1 else {}), **(config or {})},
                {protocol: _port(taken) for protocol in listeners},
                broker_process.Cluster(id_, node, controllers),
            )
            for node in controllers
        }

    @property
    def nodes(self) -> list[int]:
        """Return the numbers of all brokers, whether they run or not."""
        return list(self._launches)

    @property
    def bootstrap(self) -> str:
        """Return the plain text addresses of all brokers, ``host:port,host:port``."""
        return ",".join(f"{HOST}:{launch.port}" for launch in self._launches.values())

    def listener(self, protocol: str) -> str:
        """Return the addresses of all listeners for ``protocol``, ``host:port,host:port``."""
        return ",".join(f"{HOST}:{launch.listeners[protocol]}" for launch in self._launches.values())

    def runs(self, node: int) -> bool:
        """Return whether this broker's process runs."""
        return broker_process.running(self._files(node)) is not None

    def log(self, node: int) -> str:
        """Return what this broker has logged since its last start."""
        return self._files(node).log.read_text("utf-8", "replace")

    def start(self, *nodes: int) -> None:
        """Start these brokers at the same time (default: all), and return when each of them answers."""
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(self._start, node) for node in nodes or self.nodes]:
                done.result()

    def stop(self, node: int) -> None:
        """Stop a broker with SIGTERM, so that it hands over its leaderships first."""
        self._end(node, STOP_TIMEOUT_S * PATIENCE)

    def kill(self, node: int) -> None:
        """Kill a broker with SIGKILL."""
        self._end(node, 0)

    def pause(self, node: int) -> None:
        """Pause a broker with SIGSTOP: its connections stay open, but it answers nothing."""
        self._running(node).process.send_signal(signal.SIGSTOP)

    def resume(self, node: int) -> None:
        """Let a paused broker continue (SIGCONT)."""
        self._running(node).process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End all brokers, and remove their data."""
        for node in self.nodes:
            if broker_process.running(self._files(node)) is not None:
                self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, node: int) -> None:
        files = self._files(node)
        files.root.mkdir(parents=True, exist_ok=True)
        broker_process.launch(
            files, self._launches[node], detach=False, timeout=START_TIMEOUT_S, report=lambda step, done, total: None
        )

    def _files(self, node: int) -> broker_process.Files:
        return broker_process.Files.of(self.folder / str(node))

    def _running(self, node: int) -> broker_process.RunningBroker:
        found = broker_process.running(self._files(node))
        assert found is not None, f"broker {node} does not run"
        return found

    def _end(self, node: int, timeout: float) -> None:
        broker_process.end(self._running(node).process.pid, timeout)


def _port(taken: set[int]) -> int:
    # The brokers bind their ports only when they start, so until then `free_port` may return the same port twice.
    while (port := free_port()) in taken:
        pass
    taken.add(port)
    return port
