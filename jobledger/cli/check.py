"""``jobledger check``: checks whether this version of the app could run all jobs that are in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from jobledger.cli import output
from jobledger.cli.loading import load_app
from jobledger.cli.options import Bootstrap, Json, Target
from jobledger.cli.output import Cell, Exit
from jobledger.cli.table import progress_bar
from jobledger.process.wording import counted

if TYPE_CHECKING:
    from confluent_kafka import Message

    from jobledger.app import App
    from jobledger.log.reading import LogReader

#: Messages between two updates of the progress bar.
TELL_EVERY = 2_000


class Misfit(msgspec.Struct):
    """Jobs of one task that this app cannot run for one reason. ``waits``: how many of them the coordinator holds: they
    wait for a time or a retry, or run on a job lease; ``queued``: how many others. ``example``: the id of one of
    them."""

    task: str
    queue: str
    problem: str
    says: str
    example: str
    queued: int = 0
    waits: int = 0


class Checked(msgspec.Struct):
    """The result. ``jobs``: number of jobs that were checked; ``unread``: number of records that this version cannot
    read as jobs."""

    namespace: str
    jobs: int = 0
    queued: int = 0
    waits: int = 0
    unread: int = 0
    seconds: float = 0.0
    misfits: list[Misfit] = []


class Check:
    """Checks every job that has not ended: work records that the worker groups have not committed, and the
    coordinator's jobs.

    Memory: one entry for each kind of misfit. While one of the coordinator's partitions is read, also one hash for each
    of its jobs, and one entry for each misfit among them.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.result = Checked(app.names.namespace)
        self._kinds: dict[tuple[str, str, str, str], Misfit] = {}

    def run(self, tell: Callable[[int, int], None] | None) -> Checked:
        """Read the log once and return the result. ``tell``: called with the number of offsets that are done, and of
        all offsets. Raises `BrokerUnavailable` or `TopicMissing`."""
        from jobledger.kafka.clients import partitions_of
        from jobledger.kafka.topology import changelog
        from jobledger.log.commit_metadata import Restored, decode
        from jobledger.log.reading import LogReader
        from jobledger.log.schema_lookup import decoder
        from jobledger.streams.coordinator.faust.faust_app import work_topics

        app, began = self.app, time.monotonic()
        names, settings = app.names, app.settings
        read = decoder(settings, names).decode
        with LogReader(settings) as reader:
            plan: list[tuple[str, int, int, int, Restored | None]] = []
            for topic in sorted(work_topics(settings, names)):
                commits = self._commits(topic)
                for number in range(partitions_of(settings, topic)):
                    low, high = reader.bounds(topic, number)
                    committed, metadata = commits.get(number, (low, None))
                    plan.append((topic, number, max(low, committed), high, decode(committed, metadata, high)))
            rows = changelog(names)
            for number in range(partitions_of(settings, rows)):
                plan.append((rows, number, *reader.bounds(rows, number), None))
            total, done = sum(end - start for _, _, start, end, _ in plan), 0
            for topic, number, start, end, restored in plan:
                seen = self._watched(reader, topic, number, start, end, done, total, tell)
                if restored is None:
                    self._waiting(seen)
                else:
                    self._queued(names.queue_of(topic) or topic, seen, restored, read)
                done += end - start
        self.result.misfits = sorted(self._kinds.values(), key=lambda m: (-m.queued - m.waits, m.task))
        self.result.jobs = self.result.queued + self.result.waits
        self.result.seconds = time.monotonic() - began
        return self.result

    def _commits(self, topic: str) -> dict[int, tuple[int, str | None]]:
        from jobledger.log.group_offsets import group_offsets

        names = self.app.names
        lane = names.queue_of(topic)
        assert lane is not None
        commits = group_offsets(self.app.settings, names.worker_group(lane), topic)
        return {number: (commit.offset, commit.metadata) for (_, number), commit in commits.items()}

    def _watched(
        self,
        reader: LogReader,
        topic: str,
        number: int,
        start: int,
        end: int,
        done: int,
        total: int,
        tell: Callable[[int, int], None] | None,
    ) -> Iterator[Message]:
        for count, message in enumerate(reader.read(topic, number, start, end)):
            if tell is not None and count % TELL_EVERY == 0:
                tell(done + (message.offset() or start) - start, total)
            yield message

    def _queued(self, lane: str, messages: Iterator[Message], restored: Any, read: Callable[..., Any]) -> None:
        from jobledger.errors import SchemaError

        ranges = iter(restored.done)
        current = next(ranges, None)
        for message in messages:
            offset = message.offset() or 0
            while current is not None and current[1] <= offset:
                current = next(ranges, None)
            if current is not None and current[0] <= offset:
                continue
            try:
                event = read(message.value())
            except SchemaError:
                self.result.unread += 1
                continue
            spec = getattr(event.fact, "spec", None)
            if spec is None:
                self.result.unread += 1
                continue
            self.result.queued += 1
            kind = self._judge(event.task, event.queue, lane, spec.args)
            if kind is not None:
                self._note(kind, event.job_id).queued += 1

    def _waiting(self, messages: Iterator[Message]) -> None:
        """Check the rows of one partition of the changelog. A job's last record is its current row."""
        from jobledger.streams.coordinator.rules.schedule_rows import Kept, decode_row

        wrong: dict[bytes, tuple[str, str, str, str]] = {}
        key_hashes: set[int] = set()  # hashes of keys, because there may be millions of keys
        for message in messages:
            key, value = message.key(), message.value()
            if not isinstance(key, bytes) or key.startswith(b"\0"):
                continue
            wrong.pop(key, None)
            key_hashes.discard(hash(key))
            if not isinstance(value, bytes):
                continue
            try:
                row = decode_row(value)
            except (msgspec.DecodeError, msgspec.ValidationError):
                self.result.unread += 1
                continue
            if not isinstance(row, Kept):
                continue
            key_hashes.add(hash(key))
            kind = self._judge(row.task, row.queue, row.lane, row.args)
            if kind is not None:
                wrong[key] = kind
        self.result.waits += len(key_hashes)
        for key, kind in wrong.items():
            self._note(kind, key.decode(errors="replace")).waits += 1

    def _judge(self, name: str, queue: str, lane: str, args: bytes) -> tuple[str, str, str, str] | None:
        """Return why this app cannot run the job, as (task, queue, problem, explanation); None if the app can run
        it."""
        from jobledger.errors import BadArguments

        task = self.app.tasks.get(name)
        if task is None:
            return name, queue, "task gone", f"the app has {', '.join(sorted(self.app.tasks)) or 'no task'}"
        if lane not in self.app.lanes:
            return (
                name,
                queue,
                "queue gone",
                f"no worker of this app serves lane {lane}: the app's lanes are {', '.join(self.app.lanes)}",
            )
        try:
            task.decode_args(args)
        except BadArguments as exc:
            cause = exc.__cause__ or exc
            return (
                name,
                queue,
                "arguments do not fit",
                f"the job was submitted with {_shape(args)}, but the task takes {task.signature}: {cause}",
            )
        return None

    def _note(self, kind: tuple[str, str, str, str], job_id: str) -> Misfit:
        misfit = self._kinds.get(kind)
        if misfit is None:
            misfit = self._kinds[kind] = Misfit(*kind, example=job_id)
        return misfit


def _shape(args: bytes) -> str:
    """Return the names of the arguments, without their values, which may be confidential."""
    try:
        arguments = msgspec.json.decode(args)
    except msgspec.DecodeError:
        return "something that is not JSON"
    return f"({', '.join(sorted(arguments))})" if isinstance(arguments, dict) else f"a {type(arguments).__name__}"


#: What a user can do about each problem.
WAYS_OUT = {
    "task gone": "keep a task of that name until its jobs have ended, or cancel them: jobledger jobs cancel --where task=…",
    "queue gone": "keep a worker of the old version for that queue until the queue is empty",
    "arguments do not fit": (
        "give new parameters defaults, keep old parameters until the jobs that use them have ended, or use another task "
        "name"
    ),
}


def check(target: Target, bootstrap: Bootstrap = None, as_json: Json = False) -> None:
    """Before a deploy: find jobs in the log that this version of the app cannot run. Exit code 4 if there are any.

    The command checks every job that has not ended, without running or changing anything: work records that the worker
    groups have not committed, including running jobs, and jobs that the coordinator holds (its changelog). A job whose
    task no longer exists would be snoozed and then fail as unknown-task. A job whose arguments no longer fit would fail
    as bad-arguments. If the app no longer has a job's queue, no worker serves the queue.
    """
    app = load_app(target, bootstrap=bootstrap)
    with progress_bar("reading the log", quiet=as_json) as tell:
        result = Check(app).run(tell)
    if as_json:
        output.print_json(result)
    else:
        _show(result)
    if result.misfits:
        raise typer.Exit(Exit.DIFFERS)


def _show(result: Checked) -> None:
    verdict: Cell = ("this app can run all jobs", "bold green")
    if result.misfits:
        number = sum(m.queued + m.waits for m in result.misfits)
        verdict = (f"{counted(number, 'job')} cannot be run by this app", "bold red")
    fields: list[tuple[str, Cell]] = [
        ("verdict", verdict),
        ("jobs", f"{result.queued:,} queued or running, {result.waits:,} waiting for a time or running on a job lease"),
        ("read in", output.duration(result.seconds)),
    ]
    if result.unread:
        fields.append(
            (
                "not jobs",
                (f"{counted(result.unread, 'record')} that this version cannot read as jobs, skipped", "yellow"),
            )
        )
    output.print_fields(fields)
    if not result.misfits:
        return
    print()
    columns = ("task", "problem", "queued", "waiting", "example", "explanation")
    rows: list[list[Cell]] = [
        [m.task, (m.problem, "red"), f"{m.queued:,}", f"{m.waits:,}", m.example, m.says] for m in result.misfits
    ]
    output.print_table(columns, rows)
    print()
    for problem in dict.fromkeys(m.problem for m in result.misfits):
        output.console(stderr=True).print(f"{problem}: {WAYS_OUT[problem]}", markup=False)
