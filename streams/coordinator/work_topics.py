"""Keep track of which work topics exist, and of the largest batch that each topic accepts. Missing topics are searched
for at growing intervals. Releases to missing topics are held back, and never lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, TopicMissing
from jobledger.kafka.auth import write
from jobledger.kafka.clients import batch_limits, partitions_of
from jobledger.kafka.topic_names import Names
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.coordinator")

#: Seconds between the first two searches for a missing topic; largest number of seconds between two searches.
RETRY, RETRY_MOST = 1.0, 60.0
#: Seconds between two checks whether a search is due.
BEAT = 0.25


class WorkTopics:
    """The known and the missing work topics. ``known``: topics that exist, with the largest batch that each topic
    accepts (bytes; None: not known). Times are seconds of this process's monotonic clock."""

    def __init__(self, names: Names, settings: Settings, known: Mapping[str, int | None]) -> None:
        self._names, self._settings = names, settings
        self._known = dict(known)
        self._missing: dict[str, tuple[float, float]] = {}  # by topic: time of the next search, pause after that
        self._unanswered: set[str] = set()  # those of `_missing` about which no broker answered

    @property
    def known(self) -> list[str]:
        """The topics that are known to exist, sorted. Any thread."""
        return sorted(self._known)

    @property
    def missing(self) -> list[str]:
        """The missing topics, for which releases wait, sorted."""
        return sorted(self._missing.keys() - self._unanswered)

    def is_open(self, lane: str) -> bool:
        """Return whether the topic of a lane (a queue, or one of its priorities) is known to exist."""
        return self._names.jobs(lane) in self._known

    def refuses(self, topic: str, size: int) -> str | None:
        """Return why the topic refuses a record whose batch has ``size`` bytes.

        Return None if the topic accepts the record, or if the topic's limit is not known.
        """
        limit = self._known.get(topic)
        if limit is None or size <= limit:
            return None
        return (
            f"its release has {size} bytes, more than the {limit} that {topic} accepts: raise the topic's "
            "max.message.bytes"
        )

    def retry_in(self, lane: str) -> float:
        """Return in how many seconds to try a lane again whose topic is missing; 0 for any other lane."""
        search = self._missing.get(self._names.jobs(lane))
        return 0.0 if search is None else max(search[0] - time.monotonic(), 0.0) + BEAT

    async def find(self, lanes: Iterable[str]) -> bool:
        """Search for those topics of ``lanes`` that are neither known nor missing. Return whether a topic was found."""
        topics = {self._names.jobs(lane) for lane in lanes} - self._known.keys() - self._missing.keys()
        return any([await self._look(topic) for topic in sorted(topics)])

    async def watch(self) -> None:
        """Search for the missing topics until cancelled, each at its own interval."""
        while True:
            for topic, (due, _) in list(self._missing.items()):
                if time.monotonic() >= due:
                    await self._look(topic)
            await asyncio.sleep(BEAT)

    async def _look(self, topic: str) -> bool:
        _, pause = self._missing.get(topic, (0.0, RETRY))
        try:
            limit = await asyncio.get_running_loop().run_in_executor(None, self._ask, topic)
        except BrokerUnavailable as exc:
            self._missing[topic] = (time.monotonic() + RETRY, pause)
            self._unanswered.add(topic)
            LOG.warning("releases to %s are held back until a broker answers: %s", topic, exc)
            return False
        except TopicMissing as exc:
            self._missing[topic] = (time.monotonic() + pause, min(pause * 2, RETRY_MOST))
            self._unanswered.discard(topic)
            LOG.error("releases are held back until their topic exists: %s", exc)
            return False
        if self._missing.pop(topic, None) is not None:
            LOG.warning("%s: releases to it continue", topic)
        self._unanswered.discard(topic)
        self._known[topic] = limit
        return True

    def _ask(self, topic: str) -> int | None:
        partitions_of(self._settings, topic, need=write(topic))
        return batch_limits(self._settings, [topic]).get(topic)
