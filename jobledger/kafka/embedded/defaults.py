"""The embedded broker's default values and home folder.

They are separate from the broker's code, so that help texts can show them without loading that code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs

#: The version of Apache Kafka that is downloaded by default.
KAFKA_VERSION = "4.4.0"
HOST = "127.0.0.1"
PORT = 9092
HEAP_MB = 512
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def default_home(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder in ``JOBLEDGER_HOME``, or Jobledger's folder in the platform's folder for user data.

    ``environ``: where ``JOBLEDGER_HOME`` is read, by default this process's environment.
    """
    configured = (os.environ if environ is None else environ).get("JOBLEDGER_HOME")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("jobledger"))
