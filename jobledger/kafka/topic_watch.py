"""Checks regularly whether topics still have the settings that promises depend on.

A user who may alter a topic can change its settings at any time. This module changes nothing.
`jobledger.kafka.topology` defines the required settings.
"""

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
    """A thread that checks at once and then every `LOOK_S` seconds, until `close` is called.

    ``topics``: called for each check; returns the topics to check. ``others``: called for each check; returns the
    messages of further problems that only the caller can find. ``problems``: the messages of the last check. Each
    message is logged as an error at each check.
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
        """Check until `close` is called."""
        while True:
            try:
                self.look()
            except Exception:  # noqa: BLE001  # logged below; the next check may succeed
                self._log.exception("the settings of topics cannot be read; the next attempt follows in %g s", LOOK_S)
            if self._closed.wait(LOOK_S):
                return

    def look(self) -> None:
        """Check once. If no broker is available, or the cluster refuses to answer, `problems` is not changed."""
        try:
            problems = broken_promises(self._names, topic_settings(self._settings, self._topics()))
            problems += self._others()
        except JobledgerError as exc:
            self._log.debug("the settings of topics are not known: %s", exc)
            return
        for problem in problems:
            self._log.error("%s", problem)
        for problem in self.problems:
            if problem not in problems:
                self._log.info("resolved: %s", problem)
        self.problems = tuple(problems)

    def close(self) -> None:
        """Stop the checks; return at once."""
        self._closed.set()
