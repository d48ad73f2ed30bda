"""Queues of an app: their partitions, priorities and limits."""

from __future__ import annotations

from dataclasses import dataclass

from jobledger.definitions.policy import Limits, Priority
from jobledger.errors import ConfigError
from jobledger.kafka.topic_names import TAG_NAME_MOST, check_name, check_text, lane

DEFAULT_QUEUE = "default"
DEFAULT_PARTITIONS = 6


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of the app.

    ``partitions``: the partition count of each of its work topics; None: the app's default. ``priorities``: whether
    jobs may have high or low priority; each priority has its own topic. ``fair_by``: the name of a tag; jobs with
    different values of this tag are started in turn, so that no tenant waits behind the backlog of another. ``rate``
    (``"100/s"``) and ``concurrency``: limits for all workers of the queue together. Raises `ConfigError`.
    """

    name: str
    partitions: int | None = None
    priorities: bool = False
    fair_by: str | None = None
    rate: str | float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_name("queue", self.name))
        if self.partitions is not None:
            check_partitions(self.partitions, f"Queue({self.name!r}): partitions")
        if self.fair_by is not None:
            check_text(f"Queue({self.name!r}): the tag fair_by", self.fair_by, TAG_NAME_MOST)
        Limits.of(self.rate, self.concurrency, f"Queue({self.name!r})")

    @property
    def limits(self) -> Limits:
        """The queue's limits, for all of its workers together."""
        return Limits.of(self.rate, self.concurrency, f"Queue({self.name!r})")

    @property
    def levels(self) -> tuple[Priority | None, ...]:
        """The priorities that the queue's jobs may have, the highest first."""
        return ("high", None, "low") if self.priorities else (None,)

    @property
    def lanes(self) -> tuple[str, ...]:
        """The queue's lanes, one per priority, the highest first. Names of work topics and groups contain the lane."""
        return tuple(lane(self.name, level) for level in self.levels)


def check_partitions(count: object, what: str) -> int:
    """Return ``count`` if it is a whole number from 1 to 10,000. Raises `ConfigError` for anything else."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000:
        raise ConfigError(f"{what}={count!r} is not a whole number from 1 to 10,000")
    return count


def check_shares(what: str, queue: Queue, limits: Limits, partitions: int) -> None:
    """Raise `ConfigError` if a concurrency limit is less than the number of partitions of the queue's work topics."""
    count = (queue.partitions or partitions) * len(queue.levels)
    if limits.concurrency is None or limits.concurrency >= count:
        return
    of = "partitions" if not queue.priorities else "partitions, those of all priorities counted,"
    fitting = limits.concurrency // len(queue.levels)
    smaller = (
        f"a queue with fewer partitions, for example Queue({queue.name!r}, partitions={fitting})"
        if fitting
        else f"a queue without priorities, for example Queue({queue.name!r}, partitions={limits.concurrency})"
    )
    raise ConfigError(
        f"{what}: concurrency={limits.concurrency} is less than the {count} {of} of queue {queue.name!r}, and each "
        f"partition gets a share of the limit: give a limit of {count} or more, or use {smaller}"
    )
