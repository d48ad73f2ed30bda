"""Finds the record that holds a whole job, with its arguments: its submission or a release, else its dead letter.

The status table has the positions of these records, but not the arguments. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobledger.config import Settings
from jobledger.errors import SchemaError
from jobledger.job import ENDS, Life, State
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.partitioner import partition_of
from jobledger.kafka.topic_names import Names
from jobledger.log.reading import LogReader, recorded
from jobledger.schemas.events import DeadLettered, JobDue, JobEvent, JobSpec, JobSubmitted, Position

#: Maximum number of records of a partition of the dead letters that are searched for a job.
LETTERS_MOST = 20_000
#: Text of the error for a job of which no record with the arguments was found.
LOST = "the log no longer has its arguments, and there is no dead letter with them"

#: A record's event, and the job in it.
Whole = tuple[JobEvent, JobSpec]
Decode = Callable[[bytes | None], JobEvent]

_FAILED = ENDS.index(State.FAILED)


class WholeJobs:
    """The whole jobs of lives, by job id. The submissions are read at once, all together. ``decode``: decodes a
    record. Raises `BrokerUnavailable`, and so does `find`."""

    def __init__(
        self, log: LogReader, settings: Settings, names: Names, decode: Decode, lives: Mapping[str, Life]
    ) -> None:
        self._log, self._settings, self._names, self._decode, self._lives = log, settings, names, decode, lives
        self._found: dict[str, Whole] = {}
        # Nearly all jobs are found at their first position, so the second one is read only for the others.
        for number in (0, 1):
            left = ((job_id, _places(life)) for job_id, life in lives.items() if job_id not in self._found)
            self._read({job_id: places[number] for job_id, places in left if len(places) > number})

    def _read(self, wanted: Mapping[str, Position]) -> None:
        jobs = {position: job_id for job_id, position in wanted.items()}
        for message in self._log.at_all(jobs):
            try:
                record = recorded(message, self._decode)
            except SchemaError:
                continue
            event, fact = record.event, record.event.fact
            # Another job's record is there if the topic was deleted and recreated.
            if isinstance(fact, JobSubmitted | JobDue) and event.job_id == jobs[record.position]:
                self._found[event.job_id] = (event, fact.spec)

    def find(self, job_id: str) -> Whole | None:
        """Return the job's submission, release or dead letter, and the job in it; None if the log has none of them."""
        return self._found.get(job_id) or self._dead_letter(job_id, self._lives[job_id])

    def _dead_letter(self, job_id: str, life: Life) -> Whole | None:
        """Return the dead letter of a job that has failed. It is written directly after the job's failure."""
        end = life.end
        if end is None or end.rank != _FAILED:
            return None
        topic, key = self._names.dead_letter, job_id.encode()
        partition = partition_of(key, partitions_of(self._settings, topic))
        start = self._log.offset_at(topic, partition, end.at[0])
        for message in self._log.read(topic, partition, start, start + LETTERS_MOST):
            if message.key() != key:
                continue
            try:
                event = recorded(message, self._decode).event
            except SchemaError:
                continue
            if isinstance(event.fact, DeadLettered) and (event.job_id, event.run) == (job_id, life.run):
                return event, event.fact.spec
        return None


def _places(life: Life) -> list[Position]:
    """Return the positions of the records with the whole job that the status table knows."""
    head, due = life.head, life.due
    places = [head.at] if head.rank < 2 else []
    if due is not None and due.at != head.at:
        places.append(due.at)
    return [Position(*at[1:]) for at in places]
