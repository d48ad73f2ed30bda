"""The parts of a job that only the log has: its arguments, and its facts one by one. Reads the log; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from jobledger.errors import JobledgerError, RegistryNeeded, SchemaError, text_of

if TYPE_CHECKING:
    from jobledger.config import Settings
    from jobledger.job import JobStatus
    from jobledger.kafka.topic_names import Names
    from jobledger.log.reading import LogReader
    from jobledger.schemas.events import JobEvent, Position, Recorded

    #: Decodes the value of a record.
    Decode = Callable[[bytes | None], JobEvent]

#: Seconds that the broker has to answer if a job can also be shown without the broker's data.
ANSWER_S = 3.0
#: How many of a job's first records, and of its last ones, are searched for its arguments.
_LOOKS = 2


def submissions(settings: Settings, names: Names, statuses: Iterable[JobStatus]) -> dict[str, bytes | str]:
    """Return each job's arguments by job id, or the reason why they are not known. The status table does not have the
    arguments, so they are read from the log at the positions of the submissions."""
    from jobledger.kafka.auth import check_connection
    from jobledger.log.reading import LogReader
    from jobledger.log.schema_lookup import decoder

    args: dict[str, bytes | str] = {}
    jobs = list(statuses)
    if not jobs:
        return args
    try:
        check_connection(settings, ANSWER_S)
        decode = decoder(settings, names).decode
        with LogReader(settings) as reader:
            for job in jobs:
                args[job.job_id] = submitted(names, job, reader, decode)
    except JobledgerError as exc:
        why = unknown(exc)
        return {job.job_id: args.get(job.job_id, why) for job in jobs}
    return args


def unknown(error: JobledgerError) -> str:
    """Return the reason why arguments are not known, for an error of the log."""
    return f"not known: {text_of(error)}"


def submitted(names: Names, job: JobStatus, reader: LogReader, decode: Decode) -> bytes | str:
    """Return a job's arguments, or the reason why they are not known. Raises the errors of `LogReader.read`."""
    from jobledger.log import reading

    # Only submissions and releases contain the arguments, and these records are on these topics.
    candidates = [p for p in job.positions if p.topic == names.coordination or names.lane_of(p.topic) is not None]
    why = "not known: the status table has no position of the submission"
    for position in dict.fromkeys((*candidates[:_LOOKS], *candidates[-_LOOKS:])):
        message = reader.at(position)
        if message is None:
            why = f"not known: {position} was trimmed from the log"
            continue
        try:
            event = reading.recorded(message, decode).event
        except (SchemaError, RegistryNeeded) as exc:
            why = f"not known: {position}: {text_of(exc)}"
            continue
        spec = getattr(event.fact, "spec", None)
        if spec is not None and event.job_id == job.job_id:
            return spec.args  # type: ignore[no-any-return]  # the args of a JobSpec
        why = f"not known: {position} holds another record: the topic was recreated"
    return why


def facts_of(
    job: JobStatus, reader: LogReader, decode: Decode, most: int | None = None
) -> tuple[list[Recorded], list[tuple[Position, str]]]:
    """Return a job's events in order of their append times, read from the log at the positions in the job's status;
    and the positions that cannot be read, each with the reason. ``most``: bytes of records after which the others are
    left out; None: no limit. Raises the errors of `LogReader.read`."""
    from jobledger.log import reading
    from jobledger.streams.status.store.rows import key_text

    records: list[Recorded] = []
    unreadable: list[tuple[Position, str]] = []
    size = 0
    for position in job.positions:
        if most is not None and size > most:
            unreadable.append((position, f"left out: the records before it have more than {most:,} bytes"))
            continue
        message = reader.at(position)
        try:
            if message is None:
                raise SchemaError("no longer in the log")
            size += len(message.value() or b"")
            recorded = reading.recorded(message, decode)
            if key_text(recorded.event.job_id) != key_text(job.job_id):
                raise SchemaError("this position holds another job's record: the topic was recreated")
            records.append(recorded)
        except (SchemaError, RegistryNeeded) as exc:
            unreadable.append((position, str(exc)))
    records.sort(key=lambda r: (r.appended_ms, r.event.run, r.event.release, r.position))
    return records, unreadable
