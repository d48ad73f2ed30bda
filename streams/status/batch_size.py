"""Adapts the number of records in a transaction to a database that limits how long a statement may run. Uses no SQL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from jobledger.errors import StoreTooSlow
from jobledger.process.wording import counted

T = TypeVar("T")

#: Number of successful transactions in a row after which a reduced batch size is doubled.
CALM = 100


class BatchSize:
    """Number of records in one transaction. ``most``: the upper limit. ``now``: the present size; it is smaller than
    ``most`` after a transaction took too long."""

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._calm = 0

    def halve(self, tried: int) -> None:
        """Set the size to half of ``tried``, the number of records of a transaction that took too long."""
        self.now, self._calm = max(1, tried // 2), 0

    def done(self) -> None:
        """Count a successful transaction; after `CALM` of them in a row, double a reduced size."""
        self._calm += 1
        if self.now < self.most and self._calm >= CALM:
            self.now, self._calm = min(self.most, self.now * 2), 0


def in_batches(
    items: Sequence[T], size: BatchSize, write: Callable[[Sequence[T]], object], log: logging.Logger
) -> None:
    """Pass all items to ``write``, in order, in transactions of at most ``size.now`` items. A transaction that the
    database cancels because of its statement_timeout writes nothing, and is retried with half as many items.

    Raises `StoreTooSlow` if the transaction of a single item takes too long.
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
            log.warning("%s; trying again with %s instead of %d", exc, counted(size.now, "record"), len(part))
            continue
        size.done()
        begin += len(part)
