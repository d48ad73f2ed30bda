"""Kafka clients for the coordinator's event loop: one sends records, with one awaitable for each batch; the other reads
the first offset and the end of partitions, and the keys of single records. This module does not interpret events.

Records are sent with aiokafka. aiokafka has one request at a time in progress to each broker, and the next request
contains all records for all partitions that arrived meanwhile. librdkafka sends one request for each partition. With a
few records per millisecond for many partitions, aiokafka needs a tenth of the requests. The offsets and keys are
requested over a separate connection. On the connection of Faust's consumer, these requests would wait for its fetches.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, JobledgerError, NotAuthenticated, PayloadTooLarge, TopicMissing
from jobledger.kafka.auth import Need, away, refusal, unauthorized, write
from jobledger.kafka.tls import trouble
from jobledger.log.framing import Framing
from jobledger.log.reading import LogReader
from jobledger.log.writer import Outgoing
from jobledger.process.extras import missing
from jobledger.process.retrying import retry_until
from jobledger.streams.coordinator.faust.log_filters import quieten

try:
    from aiokafka import AIOKafkaProducer
    from aiokafka import errors as aioerrors
    from aiokafka.client import AIOKafkaClient
    from aiokafka.conn import AIOKafkaConnection, create_conn
    from aiokafka.protocol.metadata import MetadataRequest
except ImportError as exc:
    raise missing("streams", exc) from exc

MAX_BATCH_BYTES = 256 * 1024
#: Timeout of a request, and age at which metadata (and so a partition's leader) is requested again. Both are short for
#: the reason given at `jobledger.config.PATIENCE`.
REQUEST_TIMEOUT_MS, METADATA_AGE_MS = 8_000, 5_000
#: Largest overhead in bytes of a batch with one record, without key, value and headers; largest overhead in bytes of a
#: header, without name and value.
_OVERHEAD, _HEADER_OVERHEAD = 61 + 26, 10
#: Largest size in bytes of a short key: an id has 36 bytes.
_KEY_BYTES = 100

_DENIED = (
    (aioerrors.TopicAuthorizationFailedError, "topic"),
    (aioerrors.GroupAuthorizationFailedError, "group"),
    (aioerrors.ClusterAuthorizationFailedError, "cluster"),
    (aioerrors.TransactionalIdAuthorizationFailed, "transactional-id"),
)
_REFUSED = (
    aioerrors.SaslAuthenticationFailed,
    aioerrors.AuthenticationFailedError,
    aioerrors.UnsupportedSaslMechanismError,
    aioerrors.IllegalSaslStateError,
)

T = TypeVar("T")


class Delivered(NamedTuple):
    """The position of an acknowledged record, and when the broker appended it (ms)."""

    partition: int
    offset: int
    appended_ms: int


#: For each record of a batch, in order: its position, or why it was not acknowledged.
Deliveries = list[Delivered | JobledgerError]


class AckedWriter:
    """An idempotent producer. Its partitioner chooses the same partitions as librdkafka's ``murmur2_random``.

    ``security``: aiokafka's security settings. ``patience``: seconds that a record may wait for its acknowledgement,
    including outages. ``max_batch``: size in bytes of the largest batch that every topic accepts. If a broker refused a
    batch for its size, the producer's sequence numbers would have a gap, and the broker would refuse all later batches.
    ``framing``: the framing of events for a Schema Registry; None: no Schema Registry.

    ``most_bytes``: the largest value, in bytes, that every topic accepts in a record with a short key and no headers.
    """

    def __init__(
        self,
        settings: Settings,
        security: Mapping[str, Any],
        patience: float,
        max_batch: int = MAX_BATCH_BYTES,
        framing: Framing | None = None,
    ) -> None:
        self._settings, self._framing, self._security = settings, framing, security
        self.most_bytes = max_batch - _OVERHEAD - _KEY_BYTES
        self._producer = AIOKafkaProducer(
            bootstrap_servers=settings.resolve_bootstrap(),
            client_id=settings.kafka.get("client.id", "jobledger-coordinator"),
            compression_type=compression(settings),
            acks="all",
            enable_idempotence=True,
            linger_ms=0,  # records that arrive during a request form the next batch
            max_batch_size=min(max_batch, MAX_BATCH_BYTES),
            max_request_size=settings.max_record_bytes,
            request_timeout_ms=int(patience * 1000),
            metadata_max_age_ms=METADATA_AGE_MS,
            **security,
        )
        # aiokafka has one setting for two times: how long a record may wait, and how long a request may take. If both
        # times were the first one, a hanging broker would delay the records of its partitions for all that time, even
        # after other brokers have become the leaders of these partitions.
        self._producer.client._request_timeout_ms = min(int(patience * 1000), REQUEST_TIMEOUT_MS)
        create_no_topics(self._producer.client)

    async def start(self) -> None:
        """Connect. Raises `BrokerUnavailable`, and `NotAuthenticated` if the cluster refuses this client's login."""
        try:
            await self._producer.start()
        except aioerrors.KafkaError as exc:
            refused = await self._refused()
            raise refused or self._translate(exc, "connecting") from exc
        finally:
            quieten()

    async def _refused(self) -> NotAuthenticated | None:
        """Return why a connection is refused; None if it is not refused.

        The producer itself only reports that it has no connection. The first broker that answers decides.
        """
        loop = asyncio.get_running_loop()
        addresses = self._settings.resolve_bootstrap()
        for address in addresses.split(","):
            host, _, port = address.strip().rpartition(":")
            try:
                connection = await create_conn(
                    host.strip("[]"), int(port), **self._security, request_timeout_ms=REQUEST_TIMEOUT_MS
                )
            except NotAuthenticated as exc:
                return exc
            except (ssl.SSLError, *_REFUSED) as exc:
                return await loop.run_in_executor(None, refusal, self._settings, str(exc))
            except (OSError, aioerrors.KafkaError, TimeoutError):
                continue
            connection.close()
            return None
        tls_problem = await loop.run_in_executor(None, trouble, addresses, self._settings.kafka)
        return None if tls_problem is None else NotAuthenticated(tls_problem)

    async def stop(self, timeout: float) -> None:
        """Flush within ``timeout`` seconds and close the connections."""
        try:
            async with asyncio.timeout(timeout):
                await self._producer.stop()
        except (TimeoutError, aioerrors.KafkaError):
            await self._producer.client.close()

    async def post(self, records: Sequence[Outgoing]) -> asyncio.Future[Deliveries]:
        """Send records (at least one) in order, and return a future.

        The future's result has one `Delivered` or error for each record, and is set when all of them are known. The
        error of a record is an item of that list, not an exception.
        """
        send, framing = self._producer.send, self._framing
        loop = asyncio.get_running_loop()
        all_deliveries: asyncio.Future[Deliveries] = loop.create_future()
        if framing is not None:
            new = {record.topic for record in records if framing.waits(record.topic, record.value)}
            try:
                if new:  # a work topic that was created since the start
                    await loop.run_in_executor(None, framing.prepare, new)
            except JobledgerError as exc:
                all_deliveries.set_result([exc] * len(records))
                return all_deliveries
        under_way: list[Any] = []
        for topic, value, key, partition, headers in records:
            if framing is not None and value is not None:
                value = framing.framed(topic, value)
            raw_key = key.encode() if isinstance(key, str) else key
            try:
                under_way.append(await send(topic, value, raw_key, partition, None, headers))
            except aioerrors.KafkaError as exc:
                failed: asyncio.Future[Any] = loop.create_future()
                failed.set_exception(exc)
                under_way.append(failed)
        gathered = asyncio.gather(*under_way, return_exceptions=True)

        def collect(done: asyncio.Future[list[Any]]) -> None:
            if all_deliveries.done():
                return
            if done.cancelled():
                all_deliveries.cancel()
                return
            all_deliveries.set_result(
                [
                    self._translate(result, f"sending to {record.topic}", write(record.topic))
                    if isinstance(result, BaseException)
                    else Delivered(result.partition, result.offset, result.timestamp)
                    for result, record in zip(done.result(), records, strict=True)
                ]
            )

        gathered.add_done_callback(collect)
        return all_deliveries

    def _translate(self, error: BaseException, what: str, *needs: Need) -> JobledgerError:
        if isinstance(error, NotAuthenticated):
            return error
        kind = denied_kind(error)
        if kind is not None:
            return unauthorized(self._settings, what, kind, *needs)
        if isinstance(error, _REFUSED):
            return refusal(self._settings, str(error))
        address = self._settings.bootstrap or "the embedded broker"
        if isinstance(error, aioerrors.UnknownTopicOrPartitionError):
            return TopicMissing(f"{what}: the topic does not exist; create it with `jobledger topics apply MODULE:APP`")
        if isinstance(error, aioerrors.MessageSizeTooLargeError | aioerrors.RecordListTooLargeError):
            return PayloadTooLarge(
                f"{what}: {address} refuses a record of this size; raise the topic's max.message.bytes"
            )
        return BrokerUnavailable(f"{what}: {away(self._settings, f'did not accept the record in time ({error!r})')}")


#: Client settings that are passed to aiokafka, in addition to the security settings.
USED = ("client.id", "compression.type", "compression.codec")


def compression(settings: Settings) -> str | None:
    """Return the compression of batches as aiokafka's setting; None: no compression.

    The result has lower-case letters only, because librdkafka also accepts capital letters in this setting.
    """
    codec_name = settings.kafka.get("compression.type", settings.kafka.get("compression.codec", "none")).lower()
    return None if codec_name == "none" else codec_name


def unused(settings: Settings) -> list[str]:
    """Return the client settings that the coordinator's clients do not use, sorted."""
    secure = ("ssl.", "sasl.", "security.", "https.", "enable.ssl.")
    return sorted(name for name in settings.kafka if not name.startswith(secure) and name not in USED)


def create_no_topics(client: AIOKafkaClient) -> None:
    """Make an aiokafka client request metadata of topics without creating missing ones.

    aiokafka has no setting for this. aiokafka's request allows the broker to create the topics that the request names.
    A broker with ``auto.create.topics.enable`` then creates them with the broker's default number of partitions and
    settings.
    """
    connect = client._get_conn

    async def connection(*args: Any, **more: Any) -> AIOKafkaConnection | None:
        opened = await connect(*args, **more)
        if opened is not None:
            opened.send = partial(_send_creating_nothing, opened)
        return opened

    client._get_conn = connection


def _send_creating_nothing(connection: AIOKafkaConnection, request: Any, expect_response: bool = True) -> Any:
    if isinstance(request, MetadataRequest):
        request._allow_auto_topic_creation = False
    return AIOKafkaConnection.send(connection, request, expect_response)


def denied_kind(error: BaseException | None) -> str | None:
    """Return the kind of resource for which this user lacks a right, according to an aiokafka error.

    Return None for any other error.
    """
    return next((kind for of, kind in _DENIED if isinstance(error, of)), None)


def record_bytes(record: Outgoing) -> int:
    """Return the largest possible size in bytes of a batch with only this record.

    A topic's ``max.message.bytes`` limits the size of a batch.
    """
    headers = sum(len(name) + len(value or b"") + _HEADER_OVERHEAD for name, value in record.headers or ())
    return _OVERHEAD + len(record.key or b"") + len(record.value or b"") + headers


def first_error(deliveries: Iterable[Delivered | JobledgerError]) -> JobledgerError | None:
    """Return the error of the first record that was not acknowledged; None if there is none."""
    return next((each for each in deliveries if isinstance(each, JobledgerError)), None)


class LogBounds:
    """Read the first offset and the end of partitions, and the keys of single records, over a separate connection.

    A request is retried for ``patience`` seconds while a leader is being elected or the broker is unavailable. The
    owner must call `close`.
    """

    def __init__(self, settings: Settings, patience: float) -> None:
        self._settings, self._patience = settings, patience
        self._reader: LogReader | None = None
        self._closed = threading.Event()
        # One thread, because threads must not share the reader.
        self._thread = ThreadPoolExecutor(1, "jobledger-log-bounds")

    async def of(self, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Return the first offset and the end (the high watermark) of each partition.

        Raises `BrokerUnavailable` and `TopicMissing`.
        """
        wanted = sorted(partitions)
        return await self._ask(lambda reader: {p: reader.bounds(topic, p, 5.0) for p in wanted})

    async def keys(self, topic: str, partition: int, offsets: set[int]) -> set[bytes]:
        """Return the keys of the records at these offsets, without records that were deleted. Raises as `of` does."""

        def read(reader: LogReader) -> set[bytes]:
            messages = reader.read(topic, partition, min(offsets), max(offsets) + 1)
            records = [(message.offset(), message.key()) for message in messages]
            return {bytes(key) for offset, key in records if offset in offsets and isinstance(key, bytes)}

        return await self._ask(read)

    async def _ask(self, question: Callable[[LogReader], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._retry_until_answered, question)

    def _retry_until_answered(self, question: Callable[[LogReader], T]) -> T:
        if self._reader is None:
            self._reader = LogReader(self._settings)
        deadline = time.monotonic() + self._patience
        ask = partial(question, self._reader)
        return retry_until(deadline, ask, BrokerUnavailable, pause=0.2, stop=self._closed)

    def close(self) -> None:
        """Close the connection. Does not wait for a request in progress."""
        self._closed.set()
        if self._reader is not None:
            self._thread.submit(self._reader.close)
        self._thread.shutdown(wait=False)
