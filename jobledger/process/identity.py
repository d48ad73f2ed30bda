"""Who writes a record, and when: this process's name and its clock."""

from __future__ import annotations

import os
import socket
import time


def source(role: str) -> str:
    """The writer's name: ``role@host:pid``."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"


def now_us() -> int:
    """The time of this process's clock, in microseconds since the epoch."""
    return time.time_ns() // 1000
