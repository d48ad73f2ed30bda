"""The embedded broker's defaults, apart from its code: help texts show them without loading what runs a process."""

from __future__ import annotations

#: The version of Apache Kafka that is fetched unless another is asked for.
KAFKA_VERSION = "4.4.0"
HOST = "127.0.0.1"
PORT = 9092
HEAP_MB = 512
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
