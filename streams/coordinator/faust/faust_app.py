"""Set up Faust for the coordinator.

This module contains the code that depends on Faust's internals, except for the local copy of the table
(`jobledger.streams.coordinator.faust.local_store`). The pipeline, the table and the ownership use Faust only through
the small `Group`. The settings were confirmed by measurements with faust-streaming 0.15.3. Faust manages the group and
the assignment, restores the table and commits offsets.

The coordinator sends records with its own producer (`jobledger.streams.coordinator.faust.async_producer`), because
Faust's producer is not idempotent, and because Faust writes rows locally before they are acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaException, TopicCollection

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.kafka import clients
from jobledger.kafka.auth import read
from jobledger.kafka.topic_names import Names
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.streams.coordinator.faust.async_producer import METADATA_AGE_MS, create_no_topics
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir
from jobledger.streams.coordinator.faust.local_store import Rows, RowTable
from jobledger.streams.coordinator.faust.security import credentials

try:
    import faust
    from aiokafka.errors import KafkaTimeoutError
    from faust.exceptions import ConsistencyError as ConsistencyError  # noqa: PLC0414  # mypy: this re-exports it
    from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
    from faust.transport.drivers import aiokafka
    from faust.types import TP
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.coordinator")

TABLE = "schedules"
FETCH_WAIT_MS = 250


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a coordinator. Times in seconds.

    ``session_timeout``: how long the partitions of a crashed coordinator wait for a new owner (at least the broker's
    ``group.min.session.timeout.ms``). ``commit_interval``: time between two commits. ``patience``: how long the broker
    may be unavailable before the coordinator ends with an error. ``keep_markers``: least time for which the marker of a
    release is kept after the event from which it was made. ``batch``: largest number of events in one batch.
    """

    session_timeout: float = 6.0
    commit_interval: float = 1.0
    patience: float = 60.0
    keep_markers: float = 600.0
    batch: int = 500


# -- settings -------------------------------------------------------------------------------------------------------


def faust_settings(settings: Settings, options: Options, partitions: int, instance_dir: InstanceDir) -> dict[str, Any]:
    """Return Faust's settings.

    With these settings Faust reads no environment variables, declares no topics and starts no web server.
    """
    return {
        "broker": [f"kafka://{address.strip()}" for address in settings.resolve_bootstrap().split(",")],
        "broker_credentials": credentials(settings.kafka),
        "broker_client_id": settings.kafka.get("client.id", "jobledger-coordinator"),
        "env": {},
        "id_format": "{id}",
        "autodiscover": False,
        "store": "rocksdb://" if instance_dir.durable else "memory://",
        "datadir": str(instance_dir.folder),
        "topic_partitions": partitions,
        "topic_disable_leader": True,
        "topic_allow_declare": False,
        "table_standby_replicas": 0,
        "web_enabled": False,
        "worker_redirect_stdouts": False,
        "consumer_auto_offset_reset": "earliest",
        "consumer_group_instance_id": instance_dir.instance,
        "broker_session_timeout": options.session_timeout,
        "broker_heartbeat_interval": options.session_timeout / 6,
        "broker_rebalance_timeout": max(10.0, options.session_timeout),
        # A join may wait for the other members for the rebalance timeout, so the request timeout must be longer. It
        # must not be much longer, because a request to a paused broker loses the whole request timeout.
        "broker_request_timeout": max(10.0, options.session_timeout) + 2,
        "consumer_metadata_max_age_ms": METADATA_AGE_MS,
        "producer_metadata_max_age_ms": METADATA_AGE_MS,
        "broker_max_poll_records": 2000,
        "broker_commit_interval": options.commit_interval,
        "stream_buffer_maxsize": 4096,
        # When partitions are revoked, the pipeline itself waits for the events being processed. All other events are
        # read again.
        "stream_wait_empty": False,
        "producer_request_timeout": options.patience,
    }


# -- topics -----------------------------------------------------------------------------------------------------------


def origin_of(settings: Settings, topic: str) -> str:
    """Return the identity of the log to which a local copy belongs: the ids of cluster and topic.

    A recreated topic has another identity. Raises the translated error of the request.
    """
    admin = clients.admin(settings)
    try:
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=10)[topic].result()
        cluster_id = admin.cluster_id(timeout=10)  # the client knows the id from that answer
    except KafkaException as exc:
        raise clients.translate(exc.args[0], settings, f"asking for the id of {topic}", read(topic)) from exc
    return f"{cluster_id}/{described.topic_id}"


def check_topics(settings: Settings, names: Names, partitions: int) -> None:
    """Raise `TopicMissing` or `ConfigError` unless coordination topic and changelog exist with ``partitions``
    partitions each.

    If these numbers of partitions differed, Faust would run and do nothing.
    """
    for topic in (names.coordination, changelog(names)):
        count = clients.partitions_of(settings, topic, need=read(topic))
        if count != partitions:
            raise ConfigError(
                f"{topic} has {counted(count, 'partition')}, not {partitions}: the app's partitions, those of "
                f"{names.coordination} "
                f"and those of {changelog(names)} must be equal; see `jobledger topics plan`"
            )


def work_topics(settings: Settings, names: Names) -> dict[str, int | None]:
    """Return the existing work topics, each with the largest batch that the topic accepts.

    The limit is in bytes; None if this client lacks the right to read the topic's settings. Raises `BrokerUnavailable`.
    """
    try:
        listed = clients.admin(settings).list_topics(timeout=10).topics
    except KafkaException as exc:
        raise clients.translate(exc.args[0], settings, "asking for the topics") from exc
    topics = [topic for topic in listed if names.queue_of(topic) is not None]
    return dict.fromkeys(topics) | clients.batch_limits(settings, topics)


def changelog(names: Names) -> str:
    """Return the name that Faust gives the table's changelog topic."""
    return f"{names.coordinator_group}-{TABLE}-changelog"


# -- the app --------------------------------------------------------------------------------------------------------


class CommitHook(faust.Sensor):
    """Call ``step`` before and after each commit of offsets, for crash tests."""

    def __init__(self, step: Callable[[str], None]) -> None:
        super().__init__()
        self._step = step

    def on_commit_initiated(self, consumer: Any) -> Any:
        """Handle the start of a commit."""
        self._step("commit-begins")

    def on_commit_completed(self, consumer: Any, state: Any) -> None:
        """Handle the end of a commit."""
        self._step("committed")


class SourceConsumerThread(aiokafka.AIOKafkaConsumerThread):
    """Faust's consumer thread, with a client that creates no topics."""

    def _create_consumer(self, loop: asyncio.AbstractEventLoop) -> Any:
        consumer = super()._create_consumer(loop)
        create_no_topics(consumer._client)
        return consumer


class SourceConsumer(aiokafka.Consumer):
    """Faust's consumer, which hands over the source topic's records in batches, as they were fetched.

    In Faust's own path each record becomes a message and passes a conductor, two tasks, a queue and a stream. That path
    took two fifths of the coordinator's time. Changelog records still take that path. Faust still manages the group,
    the flow control and the offsets.
    """

    #: Topic whose records are handed over, and the function that takes the records. The function may wait, as flow
    #: control.
    source: str
    deliver: Callable[[int, list[Any]], Coroutine[Any, Any, None]]

    def _new_consumer_thread(self) -> SourceConsumerThread:
        return SourceConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def _drain_messages(self, fetcher: Any) -> None:
        stopping = [self._stopped, fetcher._stopped]
        try:
            while not any(event.is_set() for event in stopping):
                await asyncio.sleep(0)
                await self._drain_once()
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise

    async def _drain_once(self) -> None:
        records, active = await self._wait_next_records(1.0)
        generation = self.app.consumer_generation_id
        if not records or self.should_stop:
            return
        if not self.flow_active:
            # Partitions are being revoked: drop these records and fetch them again later.
            await self.perform_seek()
            return
        taken: list[Any] = []
        for tp, fetched in records.items():
            if active is not None and tp not in active and tp not in self._buffered_partitions:
                continue
            if tp.topic != self.source:
                for record in fetched:
                    message = self._to_message(tp, record)
                    await self.wait_first(self.callback(message), self.suspend_flow.wait())
                    self._read_offset[tp] = record.offset
                continue
            last = self._read_offset[tp]
            for record in fetched:
                if last is not None and record.offset < last:
                    continue
                if last is not None and record.offset > last + 1:
                    # No record has these offsets. Mark the offsets as done; else the commit would wait for them.
                    await self._add_gap(tp, last + 1, record.offset)
                last = record.offset
                taken.append(record)
            self._read_offset[tp] = last
        if taken:
            await self.wait_first(self.deliver(generation, taken), self.suspend_flow.wait())

    async def perform_seek(self) -> None:
        """Seek to the committed offsets, and to the beginning of partitions without one.

        aiokafka seeks only to committed offsets above 0. Other partitions would continue after the records that were
        fetched and dropped while the table was restored, and these records would never be read.
        """
        await super().perform_seek()
        fresh = [tp for tp in self.assignment() if tp.topic == self.source and not self._committed_offset[tp]]
        if fresh:
            await self._thread.seek_to_beginning(*map(aiokafka.ensure_aiokafka_TP, fresh))

    def verify_event_path(self, now: float, tp: Any) -> None:
        """Do nothing. Faust checks here for stalled streams. The coordinator has none, and measures its lag itself."""

    def acknowledge(self, offsets: Mapping[int, Sequence[int]]) -> None:
        """Allow the offsets of these source records, by partition, to be committed: they were processed."""
        for partition, done in offsets.items():
            tp = TP(self.source, partition)
            committed = self._committed_offset[tp]
            index, acked = self._acked_index[tp], self._acked[tp]
            for offset in done:
                if (committed is None or offset >= committed) and offset not in index:
                    index.add(offset)
                    acked.append(offset)


class SourceTransport(aiokafka.Transport):
    """A transport that creates a `SourceConsumer`."""

    Consumer = SourceConsumer


class PatientRecovery(Recovery):
    """Faust's restoring of the table, restarted if the broker did not answer a request in time.

    Faust itself treats a request that timed out as a request to stop. Faust's task that completes rebalances then
    returns without an error, and the app keeps running and does nothing. ``patience``: seconds of unanswered requests
    in one restoration after which Faust ends with `BrokerUnavailable`. ``brokers``: the addresses to name in that
    error.
    """

    patience: float
    brokers: str
    _unanswered = 0.0

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        try:
            await super()._wait(coro, timeout=timeout)
        except (ServiceStopped, KafkaTimeoutError, TimeoutError):
            if self.should_stop or timeout is None:
                raise
            self._unanswered += timeout
            if self._unanswered > self.patience:
                raise BrokerUnavailable(
                    f"the coordinator's requests to restore its table had no answer for {self._unanswered:.0f} s; "
                    f"check that every broker of {self.brokers} answers"
                ) from None
            LOG.warning("no answer for %.0f s while the table is restored: restoring begins again", timeout)
            self.signal_recovery_start.set()
            raise RebalanceAgain from None

    async def on_recovery_completed(self, generation_id: int = 0) -> None:
        """Reset the time of unanswered requests. Faust calls this when the rows are restored."""
        await super().on_recovery_completed(generation_id)
        self._unanswered = 0.0


class Group:
    """The consumer group and the table, as the coordinator uses them. Hides Faust's internals."""

    def __init__(self, app: Any, names: Names, table: Any) -> None:
        self.app, self._names, self._table = app, names, table

    @property
    def rows(self) -> Rows:
        """The local copy of the table."""
        store: Rows = self._table.data
        return store

    @property
    def stable(self) -> bool:
        """Whether no rebalance is under way.

        The value becomes false in the consumer's thread, before partitions are revoked.
        """
        return not self.app.rebalancing

    @property
    def generation(self) -> int:
        """The group's generation of the current assignment. Fetched records are handed over with their generation."""
        generation: int = self.app.consumer_generation_id
        return generation

    def partitions(self) -> set[int]:
        """Return the partitions of the coordination topic that this instance owns."""
        return {tp.partition for tp in self.app.assignor.assigned_actives() if tp.topic == self._names.coordination}

    def committed(self, partition: int) -> int | None:
        """Return the committed offset that this instance knows, or None."""
        offset: int | None = self.app.consumer._committed_offset[TP(self._names.coordination, partition)]
        return offset

    def acknowledge(self, offsets: Mapping[int, Sequence[int]]) -> None:
        """Allow the offsets of these source records, by partition, to be committed: they were processed."""
        self.app.consumer.acknowledge(offsets)

    async def confirm(self) -> bool:
        """Return whether the broker still accepts this instance as the owner of its partitions.

        Only a current member of the group may commit, so this commits an offset again that was committed already.
        False means that a rebalance is about to happen. Any worse error ends the app.
        """
        owned = sorted(self.partitions())
        if not owned:
            return True
        first = owned[0]
        offset = self.committed(first)
        if offset is None:
            # Nothing was committed yet. 0 means the same, since a group without offsets starts at the beginning.
            offset = 0
        accepted: bool = await self.app.consumer._commit({TP(self._names.coordination, first): offset})
        return accepted and self.stable


def _client_group(app: Any) -> Any:
    """Return aiokafka's object for the group; None before the consumer has started."""
    client = getattr(getattr(app.consumer, "_thread", None), "_consumer", None)
    return getattr(client, "_coordinator", None)


def group_error(app: Any) -> Exception | None:
    """Return the error that keeps the group's client from working, or None.

    The client raises this error only when the client is polled for records. Faust does not poll before it has
    partitions, nor during a rebalance.
    """
    group = _client_group(app)
    pending: Exception | None = getattr(group, "_pending_exception", None)
    task = getattr(group, "_coordination_task", None)
    if pending is None and task is not None and task.done():
        reason = None if task.cancelled() else task.exception()
        return (
            reason
            if isinstance(reason, Exception)
            else RuntimeError("the task that keeps this client in its group has ended")
        )
    return pending


def progress(app: Any) -> tuple[object, ...]:
    """Return values that change while a start or a rebalance makes progress: the group's generation, the number of
    changelog partitions to restore, and the offsets up to which the table's changelog is read."""
    recovery = app.tables.recovery
    generation = getattr(_client_group(app), "generation", None)
    return generation, len(recovery.active_highwaters), list(recovery.active_offsets.values())


def recovering(app: Any) -> bool:
    """Return whether Faust is restoring the table: at the start, and after a rebalance that brought partitions."""
    return bool(app.tables.recovery.in_recovery)


def shorten_fetch_wait(app: Any) -> None:
    """Make a fetch without new records return after `FETCH_WAIT_MS`.

    Other requests on the same connection, for example those of a rebalance, wait until the fetch returns. Faust has a
    fixed value of 1,500 ms and no setting.
    """
    app.consumer._thread._consumer._fetcher._fetch_max_wait_ms = FETCH_WAIT_MS


def build(
    names: Names, settings: Settings, options: Options, partitions: int, instance_dir: InstanceDir
) -> tuple[Any, Any]:
    """Create the Faust app and its table, without connecting."""
    app = faust.App(names.coordinator_group, **faust_settings(settings, options, partitions, instance_dir))
    app.transport = SourceTransport(app.conf.broker_consumer, app)
    # Raw keys and values: Faust's own decoding silently acknowledges records that it cannot decode.
    source = app.topic(
        names.coordination, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"
    )
    app.topics.add(source)
    table = RowTable(app, name=TABLE, partitions=partitions, key_type=bytes, value_type=bytes, beacon=app.tables.beacon)
    app.tables.add(table)
    tables: Any = app.tables
    recovery = tables._recovery = PatientRecovery(app, app.tables, beacon=app.tables.beacon)
    recovery.patience, recovery.brokers = options.patience, settings.resolve_bootstrap()
    return app, table


def deliver_to(app: Any, names: Names, deliver: Callable[[int, list[Any]], Coroutine[Any, Any, None]]) -> None:
    """Hand the source topic's records to ``deliver(generation, records)``, in order. Call before the app starts."""
    app.consumer.source = names.coordination
    app.consumer.deliver = deliver
