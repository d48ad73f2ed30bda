"""Removes the reports of workers that are gone: from the topic of reports and, by way of the materializer, from the
status table.

A worker that ends without an error removes its report itself. A worker that was killed cannot, so its report would stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jobledger.errors import NotAuthorized, TopicMissing
from jobledger.kafka.topic_names import Names
from jobledger.log.writer import Outgoing
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.streams.status.store.protocol import StatusReader

LOG = get_logger("jobledger.maintenance")

#: Largest number of workers that one round removes.
MOST = 1_000


class GoneWorkers:
    """Removes workers that have not reported for ``after`` seconds. ``forget(before_ms)`` removes the rows of workers
    whose last report is from before this time; see `Materializer.forget_workers`."""

    def __init__(
        self,
        names: Names,
        reader: StatusReader,
        send: Callable[[list[Outgoing]], None],
        forget: Callable[[int], None],
        after: float,
    ) -> None:
        self._names, self._reader, self._send, self._forget = names, reader, send, forget
        self._after_ms = int(after * 1000)
        self._refused = False

    def any(self, now_ms: int) -> bool:
        """Return whether a worker is gone at this time, in ms, as far as the table knows."""
        return bool(self._reader.workers(1, before_ms=now_ms - self._after_ms))

    def remove(self, now_ms: int, current: Callable[[Sequence[str]], bool]) -> int:
        """Remove the reports of the workers that are gone; return their number.

        ``now_ms``: the present time in ms, by the broker's clock. ``current``: returns whether the status table reaches
        the present ends of topics. Without this check, a table that is behind would count every worker as gone.
        """
        before_ms = now_ms - self._after_ms
        gone = self._reader.workers(MOST, before_ms=before_ms)
        if not gone or not current([self._names.workers]):
            return 0
        gone = self._reader.workers(MOST, before_ms=before_ms)  # some may have reported meanwhile
        if not gone:
            return 0
        LOG.info("removing %s without a report for %g s", counted(len(gone), "worker"), self._after_ms / 1000)
        # First the tombstones: if this process ends in between, the rows stay, and the next round finds them again.
        self._bury([status.worker for status in gone])
        self._forget(before_ms)
        return len(gone)

    def _bury(self, workers: Sequence[str]) -> None:
        """Write tombstones. Without the right to do so the reports stay in their topic, and only the rows are removed."""
        if self._refused:
            return
        try:
            self._send([Outgoing(self._names.workers, None, worker, 0) for worker in workers])
        except (NotAuthorized, TopicMissing) as exc:
            self._refused = True
            LOG.warning("the reports of workers that are gone stay in their topic: %s", exc)
