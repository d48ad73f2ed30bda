"""Whether the status table has read the log up to now. The parts that act on the table check this first."""

from __future__ import annotations

import time
from collections.abc import Collection

from jobledger.config import Settings
from jobledger.log.reading import LogReader, high_watermarks
from jobledger.streams.status.store.protocol import StatusReader


def table_is_current(settings: Settings, reader: StatusReader, topics: Collection[str], patience: float) -> bool:
    """Return whether the table reaches the topics' present ends within ``patience`` seconds."""
    with LogReader(settings) as log:
        ends = high_watermarks(log, list(topics), settings)
    deadline = time.monotonic() + patience
    while True:
        read = reader.offsets()
        if all(read.get(place, 0) >= end for place, end in ends.items()):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
