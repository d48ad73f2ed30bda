"""The embedded broker's defaults, and its home. They are separate from its code, so that help texts can show them without loading it."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

#: The version of Apache Kafka that is downloaded by default.
KAFKA_VERSION = "4.4.0"
HOST = "127.0.0.1"
PORT = 9092
HEAP_MB = 512
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def default_home() -> Path:
    """``JOBLEDGER_HOME``, else the platform's user data folder."""
    configured = os.environ.get("JOBLEDGER_HOME")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("jobledger"))
