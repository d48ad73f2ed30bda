"""The names of a namespace's topics and groups, and checks of names and other texts.

This module makes no requests. `jobledger.kafka.topology` defines the settings of the topics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jobledger.errors import ConfigError

#: Maximum number of characters of a job's id.
ID_MOST = 200
#: Maximum number of characters of a tag's name and of its value.
TAG_NAME_MOST, TAG_VALUE_MOST = 100, 1_000
#: Number of characters that an error shows of a text that is too long.
SHOWN = 100

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it can be part of a topic name. Raises `ConfigError` for any other value; the message names
    it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} {name!r} is not usable in a topic name: use letters, digits, '-' and '_' only, "
            "at most 100, beginning with a letter or digit"
        )
    return str.__str__(name)  # a plain str: the formatted text of a str enum's member differs


def check_topic(what: str, name: object) -> str:
    """Return ``name`` if Kafka accepts it as a topic name.

    Raises a `ConfigError` that begins with ``what`` for any other value.
    """
    if not isinstance(name, str) or not _TOPIC.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"{what}={name!r} is not a topic name: use 1 to 249 letters, digits, '.', '_' and '-'")
    return name


def check_text(what: str, text: object, most: int, *, least: int = 1) -> str:
    """Return ``text`` if it is a text of ``least`` to ``most`` characters without NUL and without lone surrogates.

    PostgreSQL cannot store NUL. Raises a `ConfigError` that begins with ``what`` for any other value.
    """
    wanted = f"a text of {least} to {most:,} characters" if least else f"a text of at most {most:,} characters"
    if not isinstance(text, str):
        raise ConfigError(f"{what}={text!r} is not {wanted}")
    if not least <= len(text) <= most:
        shown = repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}…, {len(text):,} characters,"
        raise ConfigError(f"{what}={shown} is not {wanted}")
    encodable = check_utf8(what, text)
    if "\0" in encodable:
        raise ConfigError(f"{what}={encodable!r} has a NUL character, which PostgreSQL cannot store: leave it out")
    return encodable


def check_utf8(what: str, text: object) -> str:
    """Return ``text`` if it can be encoded in UTF-8. Raises a `ConfigError` that begins with ``what`` for other values.

    A str may contain lone surrogates, which UTF-8 cannot encode. Python uses them for file names that are not UTF-8.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{what}={text!r} is not a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{what}={text[:SHOWN]!r} has a lone surrogate, which UTF-8 cannot encode: replace it, for example "
                "with "
                "text.encode(errors='replace').decode()"
            ) from None
    return str.__str__(text)


def lane(queue: str, priority: str | None) -> str:
    """Return the part for a lane in the names of its work topic and its group: the queue, or ``queue.priority``.

    A queue's name has no dot, so the text before the first dot is always the queue.
    """
    return queue if priority is None else f"{queue}.{priority}"


def colliding(wanted: Iterable[str], others: Iterable[str] = ()) -> dict[str, str]:
    """Return pairs of topics that Kafka does not allow together.

    The key of a pair is a topic of ``wanted``, the value another topic, of ``wanted`` or ``others``. Kafka's metrics
    write ``.`` as ``_``, so Kafka refuses a topic whose name differs from the name of an existing topic only in these
    characters.
    """
    first: dict[str, str] = {}
    for name in others:
        first.setdefault(_in_metrics(name), name)
    pairs: dict[str, str] = {}
    for name in wanted:
        other = first.setdefault(_in_metrics(name), name)
        if other != name:
            pairs[name] = other
    return pairs


def _in_metrics(topic: str) -> str:
    return topic.replace(".", "_")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of topics and consumer groups in one namespace (the app's name)."""

    namespace: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "namespace", check_name("namespace", self.namespace))

    def jobs(self, lane: str) -> str:
        """Return the work topic of a lane: a queue, or one priority of a queue (see `lane`)."""
        return f"{self.namespace}.jobs.{lane}"

    def lane_of(self, topic: str) -> str | None:
        """Return the lane of a work topic of this namespace; None for any other topic."""
        prefix = f"{self.namespace}.jobs."
        return topic[len(prefix) :] if topic.startswith(prefix) else None

    def queue_of(self, topic: str) -> str | None:
        """Return the queue of a work topic of this namespace; None for any other topic."""
        lane_name = self.lane_of(topic)
        return None if lane_name is None else lane_name.partition(".")[0]

    @property
    def lifecycle(self) -> str:
        """The topic of facts about jobs. A fact from a worker has the partition number of the job's work record."""
        return f"{self.namespace}.lifecycle"

    @property
    def coordination(self) -> str:
        """The topic of records for the coordinator: delayed submissions, requests for releases, cancels, job leases and
        reports; and of the coordinator's own decisions."""
        return f"{self.namespace}.coordination"

    @property
    def dead_letter(self) -> str:
        """The topic of dead letters: complete failed jobs, and rejected records as raw bytes."""
        return f"{self.namespace}.dead-letter"

    @property
    def control(self) -> str:
        """The compacted topic of control commands: cancels, pauses, resumes and limits."""
        return f"{self.namespace}.control"

    @property
    def plans(self) -> str:
        """The topic of plans: actions on many jobs, with the lists of their jobs."""
        return f"{self.namespace}.plans"

    @property
    def workers(self) -> str:
        """The compacted topic of the workers' reports about themselves, by the worker's id."""
        return f"{self.namespace}.workers"

    @property
    def schemas(self) -> str:
        """The compacted topic of every writer's schema, by the schema's fingerprint, or its id in a Schema Registry."""
        return f"{self.namespace}.schemas"

    @property
    def standing(self) -> tuple[str, ...]:
        """The topics that every namespace has, whatever the app declares, without the coordinator's changelog."""
        facts = (self.lifecycle, self.coordination, self.dead_letter, self.plans)
        return (*facts, self.control, self.workers, self.schemas)

    def events(self, name: str) -> str:
        """Return the topic of one class of domain events."""
        return f"{self.namespace}.events.{name}"

    @property
    def router_group(self) -> str:
        """The consumer group of the router."""
        return f"{self.namespace}.router"

    def backfill_group(self, handler: str) -> str:
        """Return the consumer group whose committed offsets store the progress of a handler's backfill."""
        return f"{self.namespace}.backfill.{handler}"

    def lifecycle_group(self, name: str) -> str:
        """Return the consumer group of one `App.lifecycle` reader."""
        return f"{self.namespace}.lifecycle.{name}"

    def worker_group(self, lane: str) -> str:
        """Return the consumer group of the workers of a lane: a queue, or one priority of a queue (see `lane`)."""
        return f"{self.namespace}.worker.{lane}"

    @property
    def coordinator_group(self) -> str:
        """The Faust app id and consumer group of the coordinator."""
        return f"{self.namespace}.coordinator"
