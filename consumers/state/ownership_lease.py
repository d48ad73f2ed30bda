"""Says how long this worker is certain that it owns its partitions of a lane."""

from __future__ import annotations

import time
from collections.abc import Callable


class OwnershipLease:
    """The time until which this worker is certain that it owns its partitions of a lane. Each accepted commit of the
    group member extends the lease.

    A process that was paused, or that has lost its connection to the broker, must not start jobs of a partition that
    another worker may have taken over.
    """

    __slots__ = ("_wake", "seconds", "until", "wanted")

    def __init__(self, seconds: float, wake: Callable[[], None] = lambda: None) -> None:
        self.seconds, self._wake = seconds, wake
        self.until = 0.0  # as of time.monotonic()
        self.wanted = False  # a confirmation was requested and has not arrived

    def ask(self) -> None:
        """Request a confirmation of the ownership from the group coordinator. The fetch thread then commits at once,
        and the dispatcher is woken when the commit is accepted. Any thread."""
        self.wanted = True

    def confirm(self, asked_at: float) -> None:
        """Extend the lease, because a commit that began at ``asked_at`` (`time.monotonic`) was accepted.

        Any accepted commit answers a request for a confirmation. If the commit took so long that the extended lease is
        over already, the request stays open, and the fetch thread commits again at once.
        """
        self.until = max(self.until, asked_at + self.seconds)
        if self.wanted and self.until > time.monotonic():
            self.wanted = False
            self._wake()
