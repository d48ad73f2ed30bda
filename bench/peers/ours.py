"""Jobledger itself, on the embedded broker or on the broker that ``JOBLEDGER_BOOTSTRAP`` names.

A result is stored in the log, where it is durable and where other services read it. To look up a result by its job's id
there is the status table, which a materializer writes. So there are two rows: one for workers alone, and one for
workers together with a materializer (SQLite). The latter is measured until every result can be looked up, and its CPU
time includes the materializer's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import confluent_kafka
from confluent_kafka import TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]  # an implicit re-export

from bench import harness
from bench.endtoend import _committed
from bench.peers.port import Command, Progress, Session, Setting, python
from jobledger import App
from jobledger.config import Settings
from jobledger.job import State
from jobledger.kafka import topics, topology
from jobledger.kafka.clients import admin
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.defaults import KAFKA_VERSION
from jobledger.kafka.topic_names import Names

PARTITIONS, QUEUE = 4, "default"
APP = "bench.peers.ours_app"
#: Number of facts of a job that succeeds: started and succeeded.
FACTS = 2


class OurSession:
    """A broker, and a namespace for each measurement."""

    def __init__(self, settings: Settings, folder: Path, brokers: Sequence[int], table: bool) -> None:
        self.settings, self.brokers = settings, brokers
        self._folder, self._table = folder, table
        self._admin = admin(settings)
        self._names: Names | None = None
        self._status: App | None = None

    def fresh(self) -> None:
        """Create a new namespace, and delete the topics of the previous one."""
        self.close()
        self._names = harness.fresh_names("peers")
        specs = topology.desired(self._names, {QUEUE: PARTITIONS}, partitions=PARTITIONS, replication=1)
        topics.apply(self._admin, topics.plan(self._admin, specs))
        if self._table:
            url = f"sqlite:///{self._folder / self._names.namespace}.db"
            self._status = App(self._names.namespace, settings=self.settings.with_status_url(url))

    def close(self) -> None:
        """Delete what the previous measurement left."""
        if self._status is not None:
            self._status.close()
        if self._names is not None:
            mine = self._names.namespace + "."
            found = [name for name in self._admin.list_topics(timeout=10).topics if name.startswith(mine)]
            for future in self._admin.delete_topics(found).values() if found else ():
                future.result()
        self._names = self._status = None

    @property
    def names(self) -> Names:
        """The names of the current measurement's namespace."""
        assert self._names is not None, "call fresh() first"
        return self._names

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which our processes find their broker, their topics and their status table."""
        found = {
            "JOBLEDGER_BOOTSTRAP": self.settings.resolve_bootstrap(),
            "JOBLEDGER_HOME": str(self._folder),
            "BENCH_NAMESPACE": self.names.namespace,
            "BENCH_PARTITIONS": str(PARTITIONS),
        }
        if self._status is not None:
            found["JOBLEDGER_STATUS_URL"] = self._status.settings.resolve_status_url(self.names.namespace)
        return found

    def submit(self, arguments: Sequence[str]) -> Command:
        """See `bench.peers.port.Session`."""
        return Command([python(), "-m", APP, *arguments], self.env)

    def workers(self, setting: Setting, processes: int) -> Sequence[Command]:
        """Return one ``jobledger worker`` with this number of processes, and a materializer if the status table is
        measured, too."""
        ours = [python(), "-m", "jobledger"]
        worker = [*ours, "worker", f"{APP}:app", "--processes", str(processes), *setting.arguments]
        table = [*ours, "materializer", f"{APP}:app"]
        return [Command(argv, {**self.env, **setting.env}) for argv in ([worker, table] if self._table else [worker])]

    def progress(self, jobs: int) -> Progress:
        """Count the stored results and the unacknowledged jobs.

        A job that succeeds has two facts in the log, so the stored results are half the facts. If there is a status
        table, its succeeded jobs are counted instead, once all facts are in the log. The unacknowledged jobs are the
        submissions at or above the group's committed offsets.
        """
        lifecycle = [TopicPartition(self.names.lifecycle, p) for p in range(PARTITIONS)]
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # it has no types
        ends = self._admin.list_offsets(dict.fromkeys(lifecycle, latest))
        facts = sum(future.result().offset for future in ends.values())
        stored = facts // FACTS
        if stored < jobs:
            return Progress(stored, jobs)
        if self._status is not None:
            stored = self._status.status_table().counts_by_state()[State.SUCCEEDED.value]
        work = [TopicPartition(self.names.jobs(QUEUE), p) for p in range(PARTITIONS)]
        return Progress(stored, jobs - _committed(self._admin, self.names.worker_group(QUEUE), list(work)))


class Ours:
    """Workers alone, or with a status table in which results can be looked up."""

    bulk = True
    #: The settings that were tried, the best one first.
    settings = (
        Setting("100 at once", ("--concurrency", "100")),
        Setting("500 at once", ("--concurrency", "500")),
        Setting("20 at once", ("--concurrency", "20")),
    )
    naps = (Setting("500 at once", ("--concurrency", "500")),)

    def __init__(self, table: bool) -> None:
        self.table = table
        self.name = "ours-table" if table else "ours"
        self.title = "Jobledger with a status table" if table else "Jobledger"

    def install(self) -> Mapping[str, str]:
        """Install nothing, because Jobledger is here already. Return names and versions."""
        client = {"confluent-kafka": version("confluent-kafka"), "librdkafka": confluent_kafka.libversion()[0]}
        return {"jobledger": version("jobledger"), **client, "Kafka": KAFKA_VERSION}

    @contextlib.contextmanager
    def session(self, folder: Path) -> Iterator[Session]:
        """See `bench.peers.port.Peer`."""
        given = os.environ.get("JOBLEDGER_BOOTSTRAP")
        with contextlib.ExitStack() as stack:
            brokers: list[int] = []
            if not given:
                kafka = stack.enter_context(EmbeddedKafka(heap_mb=1024))
                given, pid = kafka.bootstrap, kafka.status().pid
                brokers = [pid] if pid is not None else []
            session = OurSession(Settings.from_env().with_bootstrap(given), folder, brokers, self.table)
            stack.callback(session.close)
            yield session


PEERS = (Ours(table=False), Ours(table=True))
