"""Creates Kafka clients with Jobledger's settings, translates Kafka's errors, and asks about topics and offsets.

The worker and the materializer take their client settings from this module, but poll their clients themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ConfigResource,
    ResourceType,
)

from jobledger.config import Settings
from jobledger.errors import (
    AccessDenied,
    BrokerUnavailable,
    JobledgerError,
    PayloadTooLarge,
    TopicMissing,
)
from jobledger.kafka.auth import AuthMonitor, Need, away, denied, read, unauthorized, unusable
from jobledger.kafka.partitioner import PARTITIONER
from jobledger.kafka.topic_names import Names
from jobledger.process import forks, greenlets
from jobledger.process.logger import get_logger
from jobledger.process.retrying import retry_until
from jobledger.schemas.events import Position

LOG = get_logger("jobledger.kafka")

T = TypeVar("T")

#: Errors for a topic that does not exist. A broker that shuts down reports them for existing topics, too.
MISSING = (KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION, KafkaError.UNKNOWN_TOPIC_OR_PART)
#: Seconds for which such an error must be repeated before the topic counts as missing.
MISSING_S = 5.0

#: Errors while Kafka elects the coordinator of a consumer group, or while that coordinator loads the group's offsets.
SEATING = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)

#: Errors while a partition's leader is being elected or moved.
ELECTING = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.FENCED_LEADER_EPOCH,
)

#: Errors that a reader with manually assigned partitions ignores: the client restores its connections by itself, and
#: the name of its group is only a placeholder.
PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError.GROUP_AUTHORIZATION_FAILED)

#: Errors of a request whose broker went away, or left the cluster's metadata, before the answer came: ask another one.
ASK_AGAIN = (
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._DESTROY_BROKER,
)
#: Seconds between two such requests: some errors are returned at once.
ASK_AGAIN_S = 0.05

#: Seconds to wait for an admin client's request beyond the request's own timeout.
ANSWER_MARGIN_S = 5.0

#: librdkafka's default limit of a batch (``batch.size``), and the overhead of a batch that librdkafka does not count.
#: Both in bytes.
BATCH_BYTES, BATCH_MARGIN = 1_000_000, 100

Headers = list[tuple[str, bytes]]


def producer_config(
    settings: Settings,
    *,
    linger_ms: float = 0.0,
    timeout: float | None = None,
    auth_monitor: AuthMonitor | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Return the settings of a producer: idempotent, ``acks=all``, and the partitioner of all writers.

    ``linger_ms``: milliseconds for which librdkafka collects a batch. ``timeout``: seconds until a record must be
    acknowledged; None: `Settings.submit_timeout`. ``auth_monitor``: receives the client's errors, as ``error_cb``.
    ``batch``: bytes of the largest batch of several records, see `batch_room`; None: librdkafka's limit.
    """
    conf = {
        # A short timeout as in `jobledger.config.PATIENCE`, here for records that were sent to a frozen broker.
        "request.timeout.ms": 8_000,
        **settings.librdkafka(),
        "error_cb": auth_monitor or AuthMonitor(settings),
        "partitioner": PARTITIONER,
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": linger_ms,
        "message.max.bytes": settings.max_record_bytes + 1_000,
        "delivery.timeout.ms": int((timeout or settings.submit_timeout) * 1000),
        # A missing topic must be reported soon. The default of 30 s is for clusters that create topics on demand.
        "topic.metadata.propagation.max.ms": 3_000,
        "logger": LOG,
    }
    if batch is not None:
        conf["batch.size"] = min(batch, int(settings.kafka.get("batch.size", batch)))
    return conf


def consumer_config(
    settings: Settings, *, group: str = "jobledger-readers", auth_monitor: AuthMonitor | None = None, **more: Any
) -> dict[str, Any]:
    """Return the settings of a consumer with manual assignment and without commits.

    ``auth_monitor``: receives the client's errors, as ``error_cb``. ``more``: settings that add to and override the
    others.
    """
    return {
        **settings.librdkafka(),
        "error_cb": auth_monitor or AuthMonitor(settings),
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "enable.partition.eof": False,
        # With the default of 1 s a consumer whose local queue was full would pause for a second.
        "fetch.queue.backoff.ms": 20,
        "logger": LOG,
        **more,
    }


def admin(settings: Settings) -> AdminClient:
    """Create an admin client. Raises `ConfigError` for settings that cannot be used."""
    conf: dict[str, Any] = {**settings.librdkafka(), "logger": LOG}
    try:
        return forks.client(AdminClient, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def producer(conf: dict[str, Any]) -> Producer:
    """Create a producer. Raises `ConfigError` for settings that cannot be used."""
    try:
        return forks.client(Producer, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def consumer(conf: dict[str, Any]) -> Consumer:
    """Create a consumer. Raises `ConfigError` for settings that cannot be used."""
    try:
        return forks.client(Consumer, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def translate(error: KafkaError, settings: Settings, what: str, *needs: Need) -> JobledgerError:
    """Return Jobledger's error for a Kafka error. The message names the cluster's address or topic, and a remedy.

    ``what``: the operation, as text. ``needs``: the rights that the operation needs.
    """
    refused = denied(error, settings, what, *needs)
    if refused is not None:
        return refused
    code = error.code()
    if code in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError._INVALID_ARG):
        topic = next((need.name for need in needs if need.kind == "topic"), "its topic")
        return PayloadTooLarge(
            f"{what}: the broker reports that the record is larger than {topic} accepts ({error.str()}): raise the topic's "
            f"max.message.bytes, or pass a reference instead of the data. This client's own limit is "
            f"{settings.max_record_bytes} bytes (JOBLEDGER_MAX_RECORD_BYTES)"
        )
    if code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION):
        return TopicMissing(f"{what}: the topic does not exist; create it with `jobledger topics apply MODULE:APP`")
    return BrokerUnavailable(f"{what}: {away(settings, f'did not answer in time ({error.str()})')}")


def undelivered(error: KafkaError, settings: Settings, what: str, *needs: Need) -> JobledgerError:
    """Return what `translate` returns, for the error of a producer."""
    if error.code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
        # A broker lets an idempotent producer begin only if its user may write to at least one topic.
        return unauthorized(settings, what, "topic", *needs)
    if error.code() == KafkaError._DESTROY:
        # The client removed the record's partition, because its topic was deleted, before it sent the record.
        error = KafkaError(KafkaError._UNKNOWN_PARTITION)
    return translate(error, settings, what, *needs)


def position_of(message: Message) -> Position:
    """Return the position of a delivered or consumed message."""
    return Position(message.topic() or "", message.partition() or 0, message.offset() or 0)


def error_topic(message: Message, topics: Sequence[str]) -> str:
    """Return the topic of a consumer's error, as far as the topic is known.

    Some errors name the topic only in their text. If the text does not name one of ``topics`` either, return all of
    ``topics``, joined with "or".
    """
    named = message.topic()
    if named:
        return named
    error = message.error()
    text = "" if error is None else error.str()
    return next((topic for topic in sorted(topics, key=len, reverse=True) if topic in text), " or ".join(topics))


def partitions_of(settings: Settings, topic: str, timeout: float = 10.0, *, need: Need | None = None) -> int:
    """Return a topic's partition count.

    ``timeout``: in seconds. ``need``: the right that the caller needs on the topic; None: the right to read it. Raises
    `TopicMissing`, `BrokerUnavailable`, and `AccessDenied`, which names ``need``.
    """
    asker, deadline = admin(settings), time.monotonic() + timeout
    try:
        meta = retry_until(
            deadline,
            lambda: asker.list_topics(topic, timeout=max(0.1, deadline - time.monotonic())).topics[topic],
            KafkaException,
            pause=ASK_AGAIN_S,
            again=lambda error: error.args[0].code() in ASK_AGAIN,
        )
    except KafkaException as exc:
        raise translate(exc.args[0], settings, f"asking for the partitions of {topic}") from exc
    if meta.error is not None:
        raise translate(meta.error, settings, f"asking for the partitions of {topic}", need or read(topic))
    return len(meta.partitions)


def committed(
    asker: Consumer, partitions: Sequence[TopicPartition], settings: Settings, need: Need, timeout: float = 10.0
) -> list[TopicPartition]:
    """Return the committed offsets of the consumer group of ``asker``, a client that has not joined this group.

    ``need``: the right that an error names. Raises `BrokerUnavailable` after ``timeout`` seconds, and `AccessDenied`.

    If the client cannot find the coordinator of the group, the client retries forever and reports the reason only
    through ``poll``. So each attempt polls the client, too.
    """

    def ask() -> list[TopicPartition]:
        try:
            return asker.committed(list(partitions), min(timeout, 1.0))
        except KafkaException as exc:
            polled = asker.poll(0)
            error = None if polled is None else polled.error()
            what = f"asking for the offsets of group {need.name}"
            raise translate(error or exc.args[0], settings, what, need) from exc

    def again(failed: JobledgerError) -> bool:
        assert isinstance(failed.__cause__, KafkaException)
        answer: KafkaError = failed.__cause__.args[0]
        passing = answer.retriable() or answer.code() in (KafkaError._TIMED_OUT, *SEATING, *ASK_AGAIN)
        return passing and not isinstance(failed, AccessDenied)

    return retry_until(time.monotonic() + timeout, ask, JobledgerError, pause=ASK_AGAIN_S, again=again)


def batch_limits(
    settings: Settings, topics: Iterable[str], timeout: float = 10.0, client: AdminClient | None = None
) -> dict[str, int]:
    """Return the ``max.message.bytes`` of each topic, in bytes per batch.

    The result has no entry for a topic that is missing, or whose settings this user may not read. ``timeout``: in
    seconds. Raises `BrokerUnavailable`, and `AccessDenied` for a refused login.
    """
    settings_by_topic = topic_settings(settings, topics, timeout, client)
    return {topic: int(topic_config["max.message.bytes"] or 0) for topic, topic_config in settings_by_topic.items()}


def topic_settings(
    settings: Settings, topics: Iterable[str], timeout: float = 10.0, client: AdminClient | None = None
) -> dict[str, dict[str, str | None]]:
    """Return the settings of each topic.

    The result has no entry for a topic that is missing, or whose settings this user may not read. ``timeout``: in
    seconds. Raises `BrokerUnavailable`, and `AccessDenied` for a refused login.
    """
    settings_by_topic: dict[str, dict[str, str | None]] = {}
    client = client or admin(settings)  # keep the client: a garbage-collected one never completes its futures
    wanted = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    for resource, future in client.describe_configs(wanted, request_timeout=timeout).items() if wanted else ():
        try:
            settings_by_topic[resource.name] = {key: entry.value for key, entry in answer_of(future, timeout).items()}
        except KafkaException as exc:
            if exc.args[0].code() not in (KafkaError.TOPIC_AUTHORIZATION_FAILED, *MISSING):
                raise translate(exc.args[0], settings, f"asking for the settings of {resource.name}") from exc
    return settings_by_topic


def answer_of(future: Future[T], timeout: float) -> T:
    """Wait for the answer to an admin client's request, and return it.

    ``timeout``: the ``request_timeout`` of the request, in seconds. Raises `KafkaException`: normally the client's own
    error or, if a busy machine delays that error by more than `ANSWER_MARGIN_S`, a timeout error of the same type.
    """
    try:
        return greenlets.outcome(future, timeout + ANSWER_MARGIN_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None


def batch_room(settings: Settings, names: Names) -> int | None:
    """Return the size in bytes of the largest batch of several records that every topic of a namespace accepts.

    Return None if this size is not below librdkafka's default limit, or is not known. A broker refuses a batch as a
    whole. If no batch of several records is larger than this size, only a record that is too large by itself is
    refused.
    """
    client = admin(settings)
    try:
        topics = [t for t in client.list_topics(timeout=10.0).topics if t.startswith(f"{names.namespace}.")]
        limits = batch_limits(settings, topics, client=client)
    except (KafkaException, BrokerUnavailable, AccessDenied) as exc:
        LOG.debug("the size limits of the topics of namespace %s are not known: %s", names.namespace, exc)
        return None
    unknown = [topic for topic in topics if topic not in limits]
    if unknown and settings.role == "client":  # the other roles check all of their rights when they start
        LOG.warning(
            "the client continues without a right: DescribeConfigs on topic %s (without it: no knowledge of the "
            "topics' size "
            "limits: batches have the client's default size)",
            unknown[0],
        )
    least = min(limits.values(), default=BATCH_BYTES)
    return max(1, least - BATCH_MARGIN) if least < BATCH_BYTES else None
