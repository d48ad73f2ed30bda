"""How many records one transaction takes, where a database bounds how long a statement may run. No SQL here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from jobledger.errors import StoreTooSlow

T = TypeVar("T")

#: Transactions in a row after which a batch that was made smaller is made larger again.
CALM = 100


class BatchSize:
    """Records in one transaction: ``most``, and fewer where that many took too long."""

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._calm = 0

    def halve(self, tried: int) -> None:
        """``tried`` records took too long."""
        self.now, self._calm = max(1, tried // 2), 0

    def done(self) -> None:
        """A transaction was in time."""
        self._calm += 1
        if self.now < self.most and self._calm >= CALM:
            self.now, self._calm = min(self.most, self.now * 2), 0


def in_batches(
    items: Sequence[T], size: BatchSize, write: Callable[[Sequence[T]], object], log: logging.Logger
) -> None:
    """Hand all items to ``write``, in order and in transactions of this size. One that runs into the statement_timeout
    of the database's user was written not at all, and is tried again with half as many.

    Raises `StoreTooSlow` if a single item takes too long.
    """
    begin = 0
    while begin < len(items):
        part = items if len(items) <= size.now else items[begin : begin + size.now]
        try:
            write(part)
        except StoreTooSlow as exc:
            if len(part) == 1:
                raise
            size.halve(len(part))
            log.warning("%s; trying again with %d records instead of %d", exc, size.now, len(part))
            continue
        size.done()
        begin += len(part)
