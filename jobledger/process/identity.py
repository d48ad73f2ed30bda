"""The name of this process as a writer of records, and its clock."""

from __future__ import annotations

import os
import socket
import time


def source(role: str) -> str:
    """Return the writer's name: ``role@host:pid``."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"


def now_us() -> int:
    """Return the time of this process's clock, in microseconds since the epoch."""
    return time.time_ns() // 1000
