"""Checks of the cluster: whether it answers, its version and clock, topics, schemas and rights."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from confluent_kafka import KafkaException
from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]  # re-exported

from jobledger.doctor.checks import REQUEST_S, Finding, Subject
from jobledger.doctor.roles import lanes
from jobledger.errors import AccessDenied, BrokerUnavailable, SchemaError
from jobledger.kafka import acls, clients, cluster, topology
from jobledger.kafka import topics as cluster_topics
from jobledger.kafka.auth import away, check_connection, write
from jobledger.kafka.broker_clock import BrokerClock
from jobledger.log.schema_lookup import SchemaLookup
from jobledger.log.schema_registry import SchemaRegistry
from jobledger.process.wording import counted
from jobledger.schemas import codec

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message

#: A broker counts as slow if its answer takes longer than this many seconds.
SLOW_S = 1.0
#: Seconds by which the clocks may differ.
SKEW_MOST_S = 2.0
#: Number of records that are written to compare the clocks. The smallest difference is used.
_SAMPLES = 3
#: The least supported version of a broker. A broker does not report its version, but the version follows from these
#: settings: the first one exists since the consumer groups of KIP-848, and 4.0 removed the second one.
LEAST_BROKER = "4.0"
_SINCE_3_7, _UNTIL_3_9 = "group.consumer.session.timeout.ms", "zookeeper.connect"


def reachable(subject: Subject) -> Finding:
    """Check whether a broker answers and accepts the login, and how fast it answers."""
    settings = subject.settings
    address = settings.resolve_bootstrap()
    began = time.monotonic()
    check_connection(settings, REQUEST_S)
    client, connected_s = clients.admin(settings), time.monotonic() - began
    try:
        number = len(cluster.describe(client, REQUEST_S).brokers)
        began = time.monotonic()
        cluster.describe(client, REQUEST_S)
    except KafkaException as exc:
        raise clients.translate(exc.args[0], settings, "asking for the brokers") from exc
    answered_s = time.monotonic() - began
    if not number:
        return Finding(
            f"the broker that answers at {address} has not joined its cluster", "Look at the log of the broker."
        )
    shown = (
        f"{address}: {counted(number, 'broker')}, connected in {connected_s * 1000:.0f} ms, answers in "
        f"{answered_s * 1000:.0f} ms"
    )
    if answered_s > SLOW_S:
        return Finding(shown, f"Check the load of the broker and the network to {address}.")
    return Finding(shown)


def version(subject: Subject) -> Finding:
    """Check whether the broker is of a supported version."""
    client = clients.admin(subject.settings)
    try:
        broker = min(cluster.describe(client, REQUEST_S).brokers)
        resource = ConfigResource(ResourceType.BROKER, str(broker))
        (future,) = client.describe_configs([resource], request_timeout=REQUEST_S).values()
        config = clients.answer_of(future, REQUEST_S)
    except KafkaException as exc:
        raise clients.translate(exc.args[0], subject.settings, "asking for the settings of a broker") from exc
    if _SINCE_3_7 in config and _UNTIL_3_9 not in config:
        return Finding(f"Kafka {LEAST_BROKER} or later")
    return Finding(
        f"Kafka before {LEAST_BROKER}, or a broker of another kind without the group protocol of KIP-848",
        f"Upgrade the brokers to Kafka {LEAST_BROKER} or later.",
    )


def clock(subject: Subject) -> Finding:
    """Check by how much this machine's clock differs from the broker's.

    The broker's time is the append time of a record: the schema of events, which every process writes at its start.
    """
    settings, topic = subject.settings, subject.names.schemas
    broker_clock = BrokerClock()
    producer = clients.producer(clients.producer_config(settings, timeout=REQUEST_S))
    errors: list[KafkaError] = []
    took_s: list[float] = []
    for _ in range(_SAMPLES):
        done = threading.Event()

        def delivered(error: KafkaError | None, message: Message, done: threading.Event = done) -> None:
            if error is None:
                broker_clock.heard(message)
            else:
                errors.append(error)
            done.set()

        began = time.monotonic()
        key, value = codec.FINGERPRINT.hex(), codec.SCHEMA_TEXT.encode()
        producer.produce(topic, value, key, 0, on_delivery=delivered)
        while not done.is_set() and time.monotonic() < began + 2 * REQUEST_S:
            producer.poll(0.05)
        if errors:
            raise clients.undelivered(errors[0], settings, f"writing to {topic}", write(topic))
        if not done.is_set():
            raise BrokerUnavailable(away(settings, f"did not acknowledge a record on {topic} in time"))
        took_s.append(time.monotonic() - began)
    # The broker appended the record at some time between the call and its acknowledgement.
    ahead_s, unsure_s = broker_clock.ahead_s, min(took_s)
    shown = (
        f"this machine's clock is at most {max(0.0, ahead_s):.3f} s ahead of the broker's, and at most "
        f"{max(0.0, unsure_s - ahead_s):.3f} s behind it"
    )
    if ahead_s - unsure_s > SKEW_MOST_S or ahead_s < -SKEW_MOST_S:
        shown = f"this machine's clock differs from the broker's by {abs(ahead_s):.1f} s"
        return Finding(shown, "Synchronise the clocks of this machine and of the brokers, for example with chrony.")
    return Finding(shown)


def topics(subject: Subject) -> Finding:
    """Check whether the topics exist and have the settings that the app needs.

    Without an app its declarations are not known: then only the settings on which promises depend are checked.
    """
    if not subject.app.tasks and not subject.app.events:
        return _settings_of_topics(subject)
    settings = subject.settings.acting_as("admin")
    address = settings.resolve_bootstrap()
    admin = clients.admin(settings)
    try:
        copies = cluster_topics.default_replication(admin, address=address)
        planned = cluster_topics.plan(admin, *topology.wanted(subject.app, copies), address=address)
    except AccessDenied:
        # Only an admin may see everything; the settings on which promises depend can be seen by all.
        return _settings_of_topics(subject)
    number = len({change.name for change in planned.changes if change.kind == "topic"})
    if planned.refused:
        return Finding(
            " ".join(change.reason for change in planned.refused), "Follow `jobledger topics plan MODULE:APP`."
        )
    pending = [change for change in planned.pending if change.kind == "topic"]
    if pending:
        steps = ", ".join(f"{change.name}: {change.step.value}" for change in pending[:10])
        more = f", {len(pending) - 10} more" if len(pending) > 10 else ""
        return Finding(f"{steps}{more}", "Run `jobledger topics apply MODULE:APP`.")
    notes = [f"{change.name}: {change.step.value}" for change in planned.pending]
    notes += [change.reason for change in planned.advice]
    return Finding("; ".join([f"{counted(number, 'topic')} as the app declares", *notes]))


def _settings_of_topics(subject: Subject) -> Finding:
    names = _topics_of(subject)
    current = clients.topic_settings(subject.settings, names, REQUEST_S)
    problems = topology.broken_promises(subject.names, current)
    if problems:
        return Finding(" ".join(problems), "Run `jobledger topics apply MODULE:APP`.")
    unknown = [name for name in names if name not in current]
    missing = f"; {', '.join(unknown)}: missing, or this user may not read the settings" if unknown else ""
    return Finding(f"the settings of {counted(len(current), 'topic')} are right{missing}")


def _topics_of(subject: Subject) -> list[str]:
    return [*subject.names.standing, *map(subject.names.jobs, lanes(subject)), topology.changelog(subject.names)]


def schemas(subject: Subject) -> Finding:
    """Check whether the schemas of the events can be read, and whether the schema registry answers."""
    lookup = SchemaLookup(subject.settings, subject.names, timeout=REQUEST_S)
    try:
        known = lookup.all()
    finally:
        lookup.close()
    shown = f"{counted(len(known), 'schema')} on {subject.names.schemas} can be read"
    if subject.settings.schema_registry is None:
        return Finding(shown)
    registry = SchemaRegistry(subject.settings.schema_registry)
    with suppress(SchemaError):  # an answer of any kind is one from a registry
        registry.schema(1, sure=False)
    return Finding(f"{shown}; the registry {registry.shown} answers")


def rights(subject: Subject) -> Finding:
    """Check which parts of Jobledger this user may run."""
    lacking = acls.lacking(subject.settings, subject.names.namespace, _topics_of(subject))
    able = [role for role, missing in lacking.items() if not missing]
    shown = f"on topics, this user has the rights of: {', '.join(able) or 'no role'}"
    if able:
        return Finding(shown)
    few = min(lacking, key=lambda role: len(lacking[role]))
    missing = "; ".join(lacking[few][:5])
    return Finding(
        f"{shown}; as {few} it lacks {missing}",
        f"Run `jobledger topics acls MODULE:APP --principal {few}=User:NAME --apply` as an administrator.",
    )
