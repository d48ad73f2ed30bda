"""Holds what former owners of a partition left in the group's commit and in the log, as the takeover finds it."""

from __future__ import annotations

from jobledger.consumers.state.offset_tracker import Snapshot
from jobledger.schemas.events import Fact, JobSucceeded


class PriorFact:
    """A fact in the log that settles a release, and that the takeover has found.

    ``offset``: a scan of the lifecycle partition from this offset on finds the fact again. ``appended_ms``: when the
    fact was appended, in ms since the epoch.
    """

    __slots__ = ("appended_ms", "fact", "offset")

    def __init__(self, offset: int, appended_ms: int, fact: Fact) -> None:
        self.offset, self.appended_ms, self.fact = offset, appended_ms, fact


#: Replaces the fact of a release if the log already has a fact of the next release: nothing derives from a success, so
#: no derived record is sent again.
NOTHING_FOLLOWS = JobSucceeded()


class PriorState:
    """What former owners of a partition left: the last commit, and the takeover's findings beyond it. The takeover's
    thread fills the findings; then the dispatcher takes them out, one release at a time.

    ``committed``, ``metadata``: the offset that the group had committed at assignment, and its metadata; -1: nothing
    was committed. ``clean_commit``: this commit, if the last owner left cleanly. It stays valid until a job of the
    partition begins here.

    By `release_key`, and kept until all records below the work offset ``scanned_to`` are received: ``settled``, the
    facts that settle releases; ``starts``, the numbers of starts of releases without an outcome; ``next_attempts``, the
    attempts in place that a former owner announced (attempt number; when the attempt is due, in ms of the broker's
    clock; lifecycle offset of the fact that announced the attempt).

    ``floor``: the offset of the lifecycle partition at which the takeover's scan began. ``suspect_below``: the last
    owner did not leave cleanly, and may have begun records below this work offset; 0: no such owner.
    """

    __slots__ = (
        "clean_commit",
        "committed",
        "floor",
        "metadata",
        "next_attempts",
        "scanned_to",
        "settled",
        "starts",
        "suspect_below",
    )

    def __init__(self, committed: int, metadata: str | None) -> None:
        self.committed, self.metadata = committed, metadata
        self.clean_commit: Snapshot | None = None
        self.settled: dict[int, PriorFact] = {}
        self.starts: dict[int, int] = {}
        self.next_attempts: dict[int, tuple[int, int, int]] = {}
        self.scanned_to = self.floor = self.suspect_below = 0

    @property
    def used_up(self) -> bool:
        """Whether no release is left about which the takeover found something."""
        return not self.settled and not self.next_attempts and not self.starts

    def forget_releases(self) -> None:
        """Drop what the takeover found about single releases."""
        self.settled.clear()
        self.starts.clear()
        self.next_attempts.clear()
