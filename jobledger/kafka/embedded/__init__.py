"""The embedded broker: real Apache Kafka as one child process, for development and tests.

`server` decides when the broker starts and stops, `broker_process` runs its process, `jars` downloads its files, and
`ports` finds its ports. This package has no knowledge of topics or jobs. The names below are loaded at their first use,
because they need the extra ``jobledger[kafka]``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobledger.kafka.embedded.server import (
        EmbeddedKafka,
        KafkaStatus,
        running_bootstrap,
        start,
        status,
        stop,
        wait,
    )

__all__ = ["EmbeddedKafka", "KafkaStatus", "running_bootstrap", "start", "status", "stop", "wait"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jobledger.kafka.embedded import server

    return getattr(server, name)
