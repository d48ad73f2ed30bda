"""Requests to a cluster that concern no topic: whether it answers, and which brokers it has.

`AdminClient.describe_cluster` is not used anywhere. A broker that was frozen (SIGSTOP, a paused virtual machine) and is
not yet back in its cluster answers it with an empty list of brokers, and librdkafka then aborts the process (2.16.0,
``rdkafka_admin.c``: "Assertion `rko_result' failed"): it takes an answer without brokers and without topics for an
error, but passes on no error code. An answer about a named topic is never empty. So each request here names a topic.
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

#: A topic that cannot exist: no broker accepts this name, so no broker creates it either. Naming one topic also keeps
#: the answer small on a cluster with many.
NO_TOPIC = "jobledger/none"

#: A broker's errors about that topic: each is an answer.
_ANSWERS = (
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)


def answers(client: AdminClient, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
    """Whether a broker answers within ``timeout`` seconds; a refused right is an answer. Needs no right.

    The client's callbacks are served meanwhile, and ``meanwhile`` is called after each round of them; what it raises
    ends the wait.
    """
    asked = client.describe_topics(TopicCollection([NO_TOPIC]), request_timeout=timeout)[NO_TOPIC]
    deadline = time.monotonic() + timeout
    while not greenlets.finished(asked) and time.monotonic() < deadline:
        client.poll(0.02)
        meanwhile()
    try:
        greenlets.outcome(asked, 0.0)
    except TimeoutError:
        return False
    except KafkaException as exc:
        return exc.args[0].code() in _ANSWERS
    return True


def describe(client: AdminClient, timeout: float) -> ClusterMetadata:
    """The cluster's brokers: none if the broker that answers is not in its cluster. Needs no right. Raises
    `KafkaException`."""
    return client.list_topics(NO_TOPIC, timeout=timeout)
