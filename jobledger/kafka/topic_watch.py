"""Checks regularly whether topics still have the settings that promises depend on, because a user who may alter a topic
can change them at any time. Changes nothing; `jobledger.kafka.topology` defines these settings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from jobledger.config import Settings
from jobledger.errors import JobledgerError
from jobledger.kafka.clients import topic_settings
from jobledger.kafka.topic_names import Names
from jobledger.kafka.topology import broken_promises

#: Seconds between two checks.
LOOK_S = 60.0


class TopicWatch(threading.Thread):
    """A thread that checks at once and then every `LOOK_S` seconds, until it is closed.

    ``topics``: returns the topics, called for each check. ``others``: returns further problems that only the owner can
    see. ``problems``: the messages of the last check; each is logged as an error at each check.
    """

    def __init__(
        self,
        settings: Settings,
        names: Names,
        topics: Callable[[], Iterable[str]],
        log: logging.Logger,
        *,
        others: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        super().__init__(name="jobledger-topics", daemon=True)
        self._settings, self._names, self._topics, self._log, self._others = settings, names, topics, log, others
        self._closed = threading.Event()
        self.problems: tuple[str, ...] = ()

    def run(self) -> None:
        """Check until closed."""
        while True:
            try:
                self.look()
            except Exception:  # noqa: BLE001  # logged below; the next check may succeed
                self._log.exception("the settings of topics cannot be read; the next attempt follows in %g s", LOOK_S)
            if self._closed.wait(LOOK_S):
                return

    def look(self) -> None:
        """Check once. If a broker is unavailable, or refuses to answer, `problems` is not changed."""
        try:
            found = broken_promises(self._names, topic_settings(self._settings, self._topics()))
            found += self._others()
        except JobledgerError as exc:
            self._log.debug("the settings of topics are not known: %s", exc)
            return
        for problem in found:
            self._log.error("%s", problem)
        for problem in self.problems:
            if problem not in found:
                self._log.info("resolved: %s", problem)
        self.problems = tuple(found)

    def close(self) -> None:
        """Stop checking; returns at once."""
        self._closed.set()
