"""Requests to a cluster that concern no topic: whether a broker answers, and which brokers the cluster has.

Jobledger never calls `AdminClient.describe_cluster`, because librdkafka may then abort the process (2.16.0,
``rdkafka_admin.c``: "Assertion `rko_result' failed"). A broker that was frozen (SIGSTOP, a paused virtual machine) and
is not yet back in its cluster answers that request with an empty list of brokers. librdkafka treats an answer without
brokers and without topics as an error, but has no error code to report. An answer about a named topic is never empty,
so each request here names a topic.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ClusterMetadata,
)

from jobledger.process import greenlets

#: A topic that cannot exist: no broker accepts this name, so no broker creates the topic. A request that names one
#: topic also keeps the answer small on a cluster with many topics.
NO_TOPIC = "jobledger/none"

#: Errors of a broker about `NO_TOPIC`. Each of them shows that the broker answers.
_ANSWERS = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)


def answers(client: AdminClient, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
    """Return whether a broker answers within ``timeout`` seconds; a refused right is an answer. Needs no right.

    The client's callbacks run during the wait. ``meanwhile`` is called after each poll of the client; an exception that
    ``meanwhile`` raises is passed on to the caller.
    """
    answer = client.describe_topics(TopicCollection([NO_TOPIC]), request_timeout=timeout)[NO_TOPIC]
    deadline = time.monotonic() + timeout
    while not greenlets.finished(answer) and time.monotonic() < deadline:
        client.poll(0.02)
        meanwhile()
    try:
        greenlets.outcome(answer, 0.0)
    except TimeoutError:
        return False
    except KafkaException as exc:
        return exc.args[0].code() in _ANSWERS
    return True


def describe(client: AdminClient, timeout: float) -> ClusterMetadata:
    """Return the cluster's brokers within ``timeout`` seconds: none if the broker that answers is not in its cluster.

    Needs no right. Raises `KafkaException`.
    """
    return client.list_topics(NO_TOPIC, timeout=timeout)
