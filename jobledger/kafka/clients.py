"""Kafka clients with Jobledger's settings, their errors in Jobledger's words, and questions to the cluster.

The worker and the materializer take their client settings from here and drive the clients themselves.
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
from jobledger.kafka.topic_names import Names
from jobledger.process import forks, greenlets
from jobledger.process.logger import get_logger
from jobledger.schemas.events import Position

LOG = get_logger("jobledger.kafka")

T = TypeVar("T")

#: The partitioner of all writers, so that librdkafka, Java and Faust put a key on the same partition.
PARTITIONER = "murmur2_random"

#: Errors for a topic that does not exist; a broker that shuts down reports them for existing topics as well.
MISSING = (KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION, KafkaError.UNKNOWN_TOPIC_OR_PART)
#: Seconds until such an error is believed.
MISSING_S = 5.0

#: Errors while a group's coordinator is being elected, or loads the group's offsets.
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

#: Errors that a reader without a group ignores: connections recover by themselves, and the group's name is only a
#: placeholder.
PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError.GROUP_AUTHORIZATION_FAILED)

#: Seconds beyond its own timeout to wait for an admin client's request.
ANSWER_MARGIN_S = 5.0

#: librdkafka's default limit of a batch (``batch.size``), and a batch's overhead that librdkafka does not count, in
#: bytes.
BATCH_BYTES, BATCH_MARGIN = 1_000_000, 100

Headers = list[tuple[str, bytes]]


def producer_config(
    settings: Settings,
    *,
    linger_ms: float = 0.0,
    timeout: float | None = None,
    door: AuthMonitor | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Settings of every producer: idempotent, ``acks=all``, one partitioner. ``timeout``: seconds to an
    acknowledgement. ``door``: receives refused logins. ``batch``: bytes of the largest batch of several records, see
    `batch_room`."""
    conf = {
        # As `jobledger.config.PATIENCE`, for records sent to a frozen broker.
        "request.timeout.ms": 8_000,
        **settings.librdkafka(),
        "error_cb": door or AuthMonitor(settings),
        "partitioner": PARTITIONER,
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": linger_ms,
        "message.max.bytes": settings.max_record_bytes + 1_000,
        "delivery.timeout.ms": int((timeout or settings.submit_timeout) * 1000),
        # A missing topic must be reported soon; the default of 30 s suits clusters that create topics on demand.
        "topic.metadata.propagation.max.ms": 3_000,
        "logger": LOG,
    }
    if batch is not None:
        conf["batch.size"] = min(batch, int(settings.kafka.get("batch.size", batch)))
    return conf


def consumer_config(
    settings: Settings, *, group: str = "jobledger-readers", door: AuthMonitor | None = None, **more: Any
) -> dict[str, Any]:
    """Settings of a consumer with manual assignment and without commits, unless ``more`` overrides them. ``door``:
    receives refused logins."""
    return {
        **settings.librdkafka(),
        "error_cb": door or AuthMonitor(settings),
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
    """An admin client. Raises `ConfigError` for settings that cannot be used."""
    conf: dict[str, Any] = {**settings.librdkafka(), "logger": LOG}
    try:
        return forks.client(AdminClient, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def producer(conf: dict[str, Any]) -> Producer:
    """A producer. Raises `ConfigError` for settings that cannot be used."""
    try:
        return forks.client(Producer, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def consumer(conf: dict[str, Any]) -> Consumer:
    """A consumer. Raises `ConfigError` for settings that cannot be used."""
    try:
        return forks.client(Consumer, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc


def translate(error: KafkaError, settings: Settings, what: str, *needs: Need) -> JobledgerError:
    """Jobledger's error for a Kafka error, naming the address and the way out; ``needs``: the rights that ``what``
    needs."""
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
    """`translate` for a producer's errors."""
    if error.code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
        # An idempotent producer may begin only if it may write to some topic.
        return unauthorized(settings, what, "topic", *needs)
    return translate(error, settings, what, *needs)


def position_of(message: Message) -> Position:
    """The position of a delivered or consumed message."""
    return Position(message.topic() or "", message.partition() or 0, message.offset() or 0)


def error_topic(message: Message, topics: Sequence[str]) -> str:
    """The topic of a consumer's error, as far as known: the error may name it only in its text."""
    named = message.topic()
    if named:
        return named
    error = message.error()
    text = "" if error is None else error.str()
    return next((topic for topic in sorted(topics, key=len, reverse=True) if topic in text), " or ".join(topics))


def partitions_of(settings: Settings, topic: str, timeout: float = 10.0, *, need: Need | None = None) -> int:
    """A topic's partition count. Raises `TopicMissing`, `BrokerUnavailable`, or `AccessDenied` naming ``need``, the
    right that the caller needs on the topic (None: to read it)."""
    try:
        meta = admin(settings).list_topics(topic, timeout=timeout).topics[topic]
    except KafkaException as exc:
        raise translate(exc.args[0], settings, f"asking for {topic}") from exc
    if meta.error is not None:
        raise translate(meta.error, settings, f"asking for {topic}", need or read(topic))
    return len(meta.partitions)


def committed(
    asker: Consumer, places: Sequence[TopicPartition], settings: Settings, need: Need, timeout: float = 10.0
) -> list[TopicPartition]:
    """The committed offsets of ``asker``'s group, of which it is not a member; ``need``: the right to name in an error.
    Raises `BrokerUnavailable` after ``timeout`` seconds, `AccessDenied`.

    If the group's coordinator cannot be found, the client retries forever, and reports the reason only through
    ``poll``.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return asker.committed(list(places), min(timeout, 1.0))
        except KafkaException as exc:
            problem: KafkaError = exc.args[0]
        heard = asker.poll(0)
        error = None if heard is None else heard.error()
        failed = translate(error or problem, settings, f"asking for the offsets of group {need.name}", need)
        again = problem.retriable() or problem.code() in (KafkaError._TIMED_OUT, *SEATING, *PASSING[:2])
        if isinstance(failed, AccessDenied) or not again or time.monotonic() > deadline:
            raise failed
        time.sleep(0.05)  # some answers come at once


def batch_limits(
    settings: Settings, topics: Iterable[str], timeout: float = 10.0, client: AdminClient | None = None
) -> dict[str, int]:
    """The ``max.message.bytes`` of topics, in bytes per batch, without topics that are missing or whose settings this
    user may not read. Raises `BrokerUnavailable`."""
    found = topic_settings(settings, topics, timeout, client)
    return {topic: int(its["max.message.bytes"] or 0) for topic, its in found.items()}


def topic_settings(
    settings: Settings, topics: Iterable[str], timeout: float = 10.0, client: AdminClient | None = None
) -> dict[str, dict[str, str | None]]:
    """The settings of topics, without topics that are missing or whose settings this user may not read. Raises
    `BrokerUnavailable`."""
    found: dict[str, dict[str, str | None]] = {}
    client = client or admin(settings)  # held: its answers die with it
    wanted = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    for resource, future in client.describe_configs(wanted, request_timeout=timeout).items() if wanted else ():
        try:
            found[resource.name] = {key: entry.value for key, entry in answer_of(future, timeout).items()}
        except KafkaException as exc:
            if exc.args[0].code() not in (KafkaError.TOPIC_AUTHORIZATION_FAILED, *MISSING):
                raise translate(exc.args[0], settings, f"asking for the settings of {resource.name}") from exc
    return found


def answer_of(future: Future[T], timeout: float) -> T:
    """The answer to an admin client's request with a ``request_timeout`` of ``timeout`` seconds. The client's own
    errors normally come first, as `KafkaException`; if a busy machine delays them, a timeout error of the same kind is
    raised."""
    try:
        return greenlets.outcome(future, timeout + ANSWER_MARGIN_S)
    except TimeoutError:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from None


def batch_room(settings: Settings, names: Names) -> int | None:
    """The largest batch of several records, in bytes, that every topic of a namespace accepts; None if this is not
    below the client's own limit, or is not known.

    A broker refuses a batch as a whole. With batches no larger than this, only a record that is too large by itself is
    refused.
    """
    client = admin(settings)
    try:
        found = [t for t in client.list_topics(timeout=10.0).topics if t.startswith(f"{names.namespace}.")]
        limits = batch_limits(settings, found, client=client)
    except (KafkaException, BrokerUnavailable, AccessDenied) as exc:
        LOG.debug("what the topics of %s take is not known: %s", names.namespace, exc)
        return None
    unknown = [topic for topic in found if topic not in limits]
    if unknown and settings.role == "client":  # the other parts ask for all of their rights when they start
        LOG.warning(
            "the client continues without a right: DescribeConfigs on topic %s (knowledge of the topics' size limits: batches "
            "follow a default limit)",
            unknown[0],
        )
    least = min(limits.values(), default=BATCH_BYTES)
    return max(1, least - BATCH_MARGIN) if least < BATCH_BYTES else None
