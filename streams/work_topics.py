"""Which work topics there are. A release to one that is missing is held back, looked for at a growing pace, never lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from jobledger.config import Settings
from jobledger.errors import TopicMissing
from jobledger.log import partitions_of
from jobledger.names import Names

LOG = logging.getLogger("jobledger.coordinator")

#: Seconds between two looks for a missing topic: at first, and at most.
RETRY, RETRY_MOST = 1.0, 60.0


class WorkTopics:
    """``known``: topics that exist. Times are this process's monotonic clock, seconds."""

    def __init__(self, names: Names, settings: Settings, known: Iterable[str] = ()) -> None:
        self._names, self._settings = names, settings
        self._known = set(known)
        self._missing: dict[str, tuple[float, float]] = {}  # topic: next look, pause after it

    @property
    def missing(self) -> list[str]:
        """Topics that releases wait for."""
        return sorted(self._missing)

    def is_open(self, queue: str) -> bool:
        """Whether the queue's topic is known to exist."""
        return self._names.jobs(queue) in self._known

    def wait_for(self, queue: str) -> float:
        """Seconds until a queue whose topic is missing should be tried again; 0 for any other."""
        found = self._missing.get(self._names.jobs(queue))
        return 0.0 if found is None else max(found[0] - time.monotonic(), 0.1)

    async def look_for(self, queues: Iterable[str]) -> bool:
        """Look for topics that are not known, each at its own pace; whether one was found."""
        found = False
        for queue in queues:
            topic = self._names.jobs(queue)
            due, pause = self._missing.get(topic, (0.0, RETRY))
            if time.monotonic() < due:
                continue
            try:
                await asyncio.get_running_loop().run_in_executor(None, partitions_of, self._settings, topic)
            except TopicMissing:
                self._missing[topic] = (time.monotonic() + pause, min(pause * 2, RETRY_MOST))
                LOG.error(
                    "%s does not exist: releases to it are held back and tried again; "
                    "create it with `jobledger topics apply MODULE:APP`",
                    topic,
                )
            else:
                self._known.add(topic)
                self._missing.pop(topic, None)
                found = True
        return found
