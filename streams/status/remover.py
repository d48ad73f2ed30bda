"""Removes the rows of ended jobs from the status table, in small pieces between the batches of the materializer.

The maintenance decides which rows are removed (`jobledger.streams.maintenance.table_rows`). This module removes them, in
the thread of the table's only writer and through its lease. The removal takes at most a fifth of the writer's time. This
module does not read the log.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jobledger.errors import StoreTooSlow
from jobledger.process.logger import get_logger
from jobledger.process.wording import counted
from jobledger.streams.status.store.protocol import Store
from jobledger.streams.status.store.removal import Piece, Walk, walks

LOG = get_logger("jobledger.materializer")

#: Seconds that one piece should take: by at most about this time, a fact is visible later.
PIECE_S = 0.005
#: Smallest and largest number of rows that are read in a piece. With fewer rows, rows would be removed more slowly than
#: new ones come. Only if the database aborts a transaction as too slow, the next piece may be smaller.
LEAST_ROWS, MOST_ROWS = 100, 1_000
#: After a piece, the pause is this many times as long as the piece took.
REST = 4
#: A plan that is still being listed this many ms after it was opened keeps no rows: its caller has died.
LISTING_MOST_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Order:
    """The order to remove rows: the limits by state (`jobledger.table_retention.limits`), and the time when they were
    computed, in ms."""

    limits: Mapping[str, int]
    now_ms: int


class Remover:
    """Carries out one order at a time.

    ``on_removed``: gets a state and the number of its removed rows. ``piece_s``: seconds that one piece should take.
    `ask` and `busy` may be used by any thread, the other methods by the writer's thread only.
    """

    def __init__(self, on_removed: Callable[[str, int], object], piece_s: float = PIECE_S) -> None:
        self._on_removed, self._piece_s = on_removed, piece_s
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._walks: list[Walk] | None = None  # those left; None: the order was not begun
        self._rows = LEAST_ROWS
        self._next = 0.0
        self._removed = 0

    def ask(self, order: Order) -> bool:
        """Give an order; return False if another one is being carried out."""
        with self._lock:
            if self._order is not None:
                return False
            self._order, self._walks, self._removed = order, None, 0
            return True

    @property
    def busy(self) -> bool:
        """Whether an order is being carried out."""
        return self._order is not None

    def stop(self, why: str | None = None) -> None:
        """Drop the order. Removed rows are not restored; the next order begins again with the oldest rows."""
        with self._lock:
            if self._order is not None and why is not None:
                LOG.info("the removal of old rows from the status table stops for now: %s", why)
            self._order = self._walks = None

    def wait(self, now: float) -> float:
        """Return the seconds until the next piece is due; infinity if there is no order. ``now``: of
        `time.monotonic`."""
        return math.inf if self._order is None else max(0.0, self._next - now)

    def step(self, store: Store, clock: Callable[[], float]) -> tuple[Sequence[str], Mapping[str, int]]:
        """Remove the next piece, if one is due. Return the ids of the removed rows, and the limits that hold for the
        table now (without a piece: none). ``clock``: `time.monotonic`. Raises `StoreError`."""
        order, began = self._order, clock()
        if order is None or began < self._next:
            return (), {}
        if self._walks is None:
            if store.plan_is_open(order.now_ms - LISTING_MOST_MS):
                self.stop("a plan has not ended")
                return (), {}
            self._walks = walks(order.limits)
        if not self._walks:
            self._done()
            return (), {}
        walk = self._walks[0]
        try:
            piece = store.remove(walk, self._rows)
        except StoreTooSlow as exc:
            self._too_slow(exc)
            return (), {}
        self._went_on(walk, piece, began, clock())
        return piece.removed, order.limits if piece.removed else {}

    def _went_on(self, walk: Walk, piece: Piece, began: float, ended: float) -> None:
        assert self._walks is not None
        if piece.after is None:
            self._walks.pop(0)
        else:
            self._walks[0] = replace(walk, after=piece.after)
        if piece.removed:
            self._removed += len(piece.removed)
            self._on_removed(walk.state.value, len(piece.removed))
        took = ended - began
        self._next = ended + REST * took
        if took > self._piece_s and self._rows > LEAST_ROWS:
            self._rows = max(LEAST_ROWS, self._rows // 2)
        elif took < self._piece_s / 3 and piece.read == self._rows:
            self._rows = min(MOST_ROWS, self._rows * 2)

    def _too_slow(self, error: StoreTooSlow) -> None:
        if self._rows == 1:
            self.stop(str(error))
        self._rows = max(1, self._rows // 2)

    def _done(self) -> None:
        if self._removed:
            LOG.info("%s of jobs that ended some time ago removed from the status table", counted(self._removed, "row"))
        self.stop()
