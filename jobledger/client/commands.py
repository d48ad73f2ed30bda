"""Control commands for jobs, queues and tasks: cancel, pause, resume, limit. Each command is a fact with its author and
reason.

Commands are on the compacted control topic. A worker reads this topic before it starts jobs, and follows it afterwards.
So a command also applies to workers that did not run when it was given, until another command replaces it.
"""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import uuid_utils

from jobledger.config import Settings
from jobledger.definitions.policy import Limits
from jobledger.errors import ConfigError, SchemaError
from jobledger.kafka.topic_names import ID_MOST, Names, check_text
from jobledger.log.reading import LogReader, recorded
from jobledger.log.schema_lookup import decoder
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.process.identity import now_us, source
from jobledger.schemas import codec
from jobledger.schemas.event_factory import standalone
from jobledger.schemas.events import (
    CLOSING,
    CancelRequested,
    JobEvent,
    QueueLimited,
    QueuePaused,
    QueueResumed,
    Recorded,
)

Kind = Literal["queue", "task"]
#: Maximum characters of a reason, and of the name of a command's author.
REASON_MOST, BY_MOST = 1_000, 200
#: Maximum number of cancels that are sent before their acknowledgements are awaited.
AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class Job:
    """The job to cancel. ``home``: the key of its coordination records; None: its id."""

    job_id: str
    run: int = 1
    task: str = ""
    queue: str = ""
    home: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """The commands in force on one queue or task. ``paused``: author and reason of the pause; None: not paused.
    ``limited``: author and reason of the limits. ``paused_ms``, ``limited_ms``: when these commands were appended, in
    milliseconds since the epoch."""

    kind: Kind
    name: str
    paused: str | None = None
    limits: Limits | None = None
    limited: str | None = None
    paused_ms: int | None = None
    limited_ms: int | None = None


def who() -> str:
    """Return the user of this process and its host, as far as known: ``user@host``."""
    user = "unknown"
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may run under a user id without a name
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}".encode("utf-8", "replace").decode("utf-8")


def cancel_key(job_id: str, run: int) -> str:
    """Return the key of a cancel on the control topic."""
    return f"cancel:{job_id}:{run}"


def is_copy(record: Recorded, names: Names) -> bool:
    """Return whether a reader of all topics must skip a record, because only a record on another topic counts.

    A cancel is on the control topic and on the coordination topic; the record on the coordination topic counts. The
    worker of a leased job reports the job's outcome on the coordination topic, possibly after its lease has ended. The
    outcome counts when the coordinator has written it to the lifecycle topic.
    """
    topic, fact = record.position.topic, record.event.fact
    if isinstance(fact, CLOSING):
        return topic == names.coordination
    return isinstance(fact, CancelRequested) and topic == names.control


class Commands:
    """Sends control commands in one namespace. ``writer``: opened at the first command. ``role``: what the records
    name as their writer."""

    def __init__(
        self, settings: Settings, names: Names, writer: Callable[[], LogWriter], *, role: str = "client"
    ) -> None:
        self._settings, self._names, self._writer, self._role = settings, names, writer, role

    def cancel(self, jobs: Sequence[Job], reason: str | None = None, by: str | None = None) -> None:
        """Request that these jobs be cancelled. Returns once the log has acknowledged all requests.

        A waiting job is not started, a running job is asked to stop, a job that has ended is not changed. Raises
        `ConfigError`, `TopicMissing`, `AccessDenied` or `BrokerUnavailable`; some jobs may have been cancelled then.
        """
        for records in self.cancels(jobs, reason, by):
            self._writer().send(records)

    def cancels(
        self, jobs: Sequence[Job], reason: str | None = None, by: str | None = None
    ) -> Iterator[list[Outgoing]]:
        """Yield the records of `cancel`, in batches that are each sent at once. Raises `ConfigError`."""
        fact = CancelRequested(check_text("by", by or who(), BY_MOST), _reason(reason))
        for job in jobs:
            check_text("job id", job.job_id, ID_MOST)
            if isinstance(job.run, bool) or not isinstance(job.run, int) or not 0 < job.run < 1 << 31:
                raise ConfigError(f"job {job.job_id}: run={job.run!r} is not a whole number from 1 up")
        for start in range(0, len(jobs), AT_ONCE):
            records: list[Outgoing] = []
            for job in jobs[start : start + AT_ONCE]:
                value = codec.encode(
                    standalone(
                        fact,
                        str(uuid_utils.uuid7()),
                        now_us(),
                        source(self._role),
                        job_id=job.job_id,
                        run=job.run,
                        task=job.task,
                        queue=job.queue,
                        home=job.home,
                    )
                )
                # One record for the workers, and one for the coordinator, where the job may wait for its due time.
                records.append(Outgoing(self._names.control, value, cancel_key(job.job_id, job.run)))
                records.append(Outgoing(self._names.coordination, value, job.home or job.job_id))
            yield records

    def pause(self, kind: Kind, name: str, reason: str | None = None, by: str | None = None) -> None:
        """Start no more jobs of a queue or task; running jobs continue. Raises as `cancel` does."""
        self._send(
            f"pause:{kind}:{name}", kind, name, QueuePaused(check_text("by", by or who(), BY_MOST), _reason(reason))
        )

    def resume(self, kind: Kind, name: str, reason: str | None = None, by: str | None = None) -> None:
        """End a pause. Raises as `cancel` does."""
        self._send(
            f"pause:{kind}:{name}", kind, name, QueueResumed(check_text("by", by or who(), BY_MOST), _reason(reason))
        )

    def limit(
        self, kind: Kind, name: str, limits: Limits | None, reason: str | None = None, by: str | None = None
    ) -> None:
        """Set limits for all workers together, instead of the limits in the code; None: the limits in the code apply
        again. Raises as `cancel` does."""
        wanted = limits or Limits()
        fact = QueueLimited(wanted.rate, wanted.concurrency, check_text("by", by or who(), BY_MOST), _reason(reason))
        self._send(f"limit:{kind}:{name}", kind, name, fact)

    def _send(self, key: str, kind: Kind, name: str, fact: QueuePaused | QueueResumed | QueueLimited) -> None:
        task, queue = (name, "") if kind == "task" else ("", name)
        event = standalone(fact, str(uuid_utils.uuid7()), now_us(), source(self._role), task=task, queue=queue)
        self._writer().send([Outgoing(self._names.control, codec.encode(event), key)])

    def standing(self) -> list[Standing]:
        """Return the pauses and limits in force, sorted by kind and name. Raises `BrokerUnavailable`, `TopicMissing`, or
        `ConfigError` if a Schema Registry is needed and not configured."""
        with LogReader(self._settings) as log:
            return standing_of(in_force(log, self._names, decoder(self._settings, self._names).decode))


def in_force(
    log: LogReader,
    names: Names,
    decode: Callable[[bytes | None], JobEvent],
    *,
    cancel_of: tuple[str, int] | None = None,
    stall: float = 30.0,
) -> list[Recorded]:
    """Return the last pause, resume or limit of each key of the control topic, in log order. A key whose last record is
    a tombstone has none, as in a worker; other records do not count.

    ``cancel_of``: return the cancel of this job and run, too. ``stall``: as in `LogReader.read`. Raises
    `BrokerUnavailable`, `TopicMissing`, or `ConfigError` if a Schema Registry is needed and not configured.
    """
    cancel = None if cancel_of is None else cancel_key(*cancel_of).encode()
    last: dict[bytes | str | None, Recorded] = {}
    for message in log.read(names.control, 0, 0, stall=stall):
        key = message.key()
        if message.value() is None:
            last.pop(key, None)
            continue
        try:
            record = recorded(message, decode)
        except SchemaError:
            continue
        wanted = isinstance(record.event.fact, QueuePaused | QueueResumed | QueueLimited)
        if wanted or (key == cancel is not None and isinstance(record.event.fact, CancelRequested)):
            last.pop(key, None)  # so that the order is the one of the last records
            last[key] = record
    return list(last.values())


def standing_of(records: Iterable[Recorded]) -> list[Standing]:
    """Return what these records of the control topic, in log order, say about queues and tasks, sorted by kind and
    name."""
    known: dict[tuple[str, str], Standing] = {}
    for record in records:
        event, at_ms = record.event, record.appended_ms
        if isinstance(event.fact, CancelRequested):
            continue
        kind: Kind = "queue" if event.queue else "task"
        name = event.queue or event.task
        each = known.get((kind, name), Standing(kind, name))
        match event.fact:
            case QueuePaused(by=by, reason=why):
                each = replace(each, paused=said(by, why), paused_ms=at_ms)
            case QueueResumed():
                each = replace(each, paused=None, paused_ms=None)
            case QueueLimited(rate=rate, concurrency=concurrency, by=by, reason=why):
                if limits := Limits(rate, concurrency):
                    each = replace(each, limits=limits, limited=said(by, why), limited_ms=at_ms)
                else:
                    each = replace(each, limits=None, limited=None, limited_ms=None)
        known[kind, name] = each
    return [known[key] for key in sorted(known) if known[key].paused or known[key].limits]


def said(by: str, reason: str | None) -> str:
    """Return author and reason as one text."""
    return f"by {by}" + (f": {reason}" if reason else "")


def _reason(reason: str | None) -> str | None:
    return None if reason is None else check_text("reason", reason, REASON_MOST)
