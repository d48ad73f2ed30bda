"""``jobledger events tail``: prints the log for people or scripts. The command commits nothing and joins no group."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from jobledger.cli import completion, output
from jobledger.cli.commands import CommandGroup, moment_ms, words_of
from jobledger.cli.loading import find_app
from jobledger.cli.options import TIMES, AppOption, AppWord, Bootstrap, Json, Namespace, repeatable
from jobledger.errors import BrokerUnavailable, RegistryNeeded, SchemaError, TopicMissing
from jobledger.process.wording import counted
from jobledger.views.jobs import event_json
from jobledger.views.values import iso

if TYPE_CHECKING:
    from confluent_kafka import Message
    from rich.console import Console

    from jobledger.config import Settings
    from jobledger.kafka.topic_names import Names
    from jobledger.schemas.events import JobEvent, Position, Recorded

app = CommandGroup(name="events", help="Read the log itself.", no_args_is_help=True)

#: How many events are shown without ``-n`` and ``--from``.
DEFAULT_LAST = 10
#: Maximum number of events sorted by append time at once; bounds memory at any length of the log.
SORTED_AT_ONCE = 50_000
#: Seconds without a record, before the ends are reached, after which the broker counts as unavailable.
STALL_S = 30.0
#: Seconds between two checks for new topics while following.
NEW_TOPICS_EVERY = 10.0

Partition = tuple[str, int]


class Topics(StrEnum):
    """Which topics are read."""

    LIFECYCLE = "lifecycle"
    WORK = "work"
    COORDINATION = "coordination"
    DEAD_LETTER = "dead-letter"
    PLANS = "plans"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Line:
    """One record: its event, or the reason why it could not be read."""

    position: Position
    appended_ms: int
    recorded: Recorded | None
    error: str = ""


@app.command("tail")
def tail(
    words: AppWord = None,
    app: AppOption = None,
    namespace: Namespace = None,
    topic: Annotated[list[Topics] | None, repeatable("Only these topics", show_default=Topics.ALL.value)] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="start|end|TIME",
            help=f"Where to begin: TIME is {TIMES}",
            show_default=f"the last {DEFAULT_LAST} events",
        ),
    ] = None,
    last: Annotated[
        int | None, typer.Option("-n", "--last", min=1, help="Only this many of the last events.", show_default=False)
    ] = None,
    task: Annotated[list[str] | None, repeatable("Only events of this task", autocompletion=completion.tasks)] = None,
    job: Annotated[
        list[str] | None,
        repeatable(
            "Only events of this job, by its id or the id's first characters",
            metavar="ID",
            autocompletion=completion.jobs,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", "-f", help="Continue with new events as they arrive.")
    ] = False,
    bootstrap: Bootstrap = None,
    as_json: Json = False,
) -> None:
    """Print events in the order in which the broker appended them; with --json one object per line.

    Example: jobledger events tail --namespace shop --from 10m --topic dead-letter --follow
    """
    since = None if begin in (None, "start", "end") else moment_ms(str(begin), "--from", "start", "end")
    parsed = words_of(words, app is not None or namespace is not None, "argument", 0)
    queried = find_app(parsed.target or app, namespace, bootstrap)
    if begin is None and last is None:
        last = DEFAULT_LAST
    wanted = _wanted(task or (), job or ())
    show = _json_line if as_json else _Printer(queried.names)
    with _Tail(queried.settings, queried.names, topic or [Topics.ALL], list(queried.lanes)) as reader:
        # If each record counts, the last records are found without reading the others.
        skim = last if not task and not job and begin is None else None
        reader.begin(since=since, at_end=begin == "end", last=skim)
        for line in newest(filter(wanted, reader.until_now()), last):
            show(line)
        if follow:
            for line in filter(wanted, reader.onwards()):
                show(line)


def _wanted(tasks: Sequence[str], jobs: Sequence[str]) -> Callable[[Line], bool]:
    """Return a test for the events of these tasks and jobs. ``jobs``: beginnings of ids. No task or no job: any."""

    def wanted(line: Line) -> bool:
        event = None if line.recorded is None else line.recorded.event
        if event is None:  # an unreadable record may belong to any job: it is shown unless a job or a task is given
            return not tasks and not jobs
        return (not tasks or event.task in tasks) and (not jobs or event.job_id.startswith(tuple(jobs)))

    return wanted


def newest(lines: Iterator[Line], count: int | None) -> Iterator[Line]:
    """Yield the newest ``count`` of ``lines`` in order of append time; None: all, sorted `SORTED_AT_ONCE` at a time."""
    if count is not None:
        yield from sorted(heapq.nlargest(count, lines, key=_order), key=_order)
        return
    chunk: list[Line] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) >= SORTED_AT_ONCE:
            yield from sorted(chunk, key=_order)
            chunk = []
    yield from sorted(chunk, key=_order)


def _order(line: Line) -> tuple[int, Position]:
    return line.appended_ms, line.position


class _Tail:
    """Reads all partitions of a namespace's topics at once: first up to now, then new records."""

    def __init__(self, settings: Settings, names: Names, topics: Sequence[Topics], queues: Sequence[str]) -> None:
        from jobledger.kafka import clients
        from jobledger.log.schema_lookup import decoder

        settings = settings.acting_as("web")
        self._settings, self._names, self._topics = settings, names, topics
        self._queues = queues
        self._decode: Callable[[bytes | None], JobEvent] = decoder(settings, names).decode
        self._consumer = clients.consumer(clients.consumer_config(settings))
        self._next: dict[Partition, int] = {}
        self._end: dict[Partition, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._consumer.close()

    def begin(self, *, since: int | None, at_end: bool, last: int | None) -> None:
        """Choose where each partition begins: at an append time (``since``, ms since the epoch), at its end, ``last``
        records before its end, or at its start. Raises `TopicMissing`."""
        from jobledger.kafka import acls
        from jobledger.kafka.auth import check_connection
        from jobledger.log import reading

        check_connection(self._settings)
        names = self._names
        facts = (names.lifecycle, names.coordination, names.dead_letter, names.plans)
        all_of_them = (*map(names.jobs, self._queues), *facts)
        # The broker does not list topics that this user may not read. Without this check they would be left out
        # silently.
        acls.check(self._settings, names.namespace, [*filter(self._belongs, all_of_them), names.schemas])
        partitions = self._partitions()
        if not partitions:
            raise TopicMissing(
                f"namespace {self._names.namespace!r} has no topics (--topic {', '.join(self._topics)}) at "
                f"{self._settings.resolve_bootstrap()}; create the topics with `jobledger topics apply MODULE:APP`, or check "
                "the namespace and JOBLEDGER_BOOTSTRAP"
            )
        with reading.LogReader(self._settings) as reader:
            for topic, partition in partitions:
                low, high = reader.bounds(topic, partition)
                start = low
                if at_end:
                    start = high
                elif since is not None:
                    start = max(low, reader.offset_at(topic, partition, since))
                elif last is not None:
                    start = max(low, high - last)
                self._next[topic, partition], self._end[topic, partition] = start, high

    def until_now(self) -> Iterator[Line]:
        """Yield the records up to the ends that `begin` saw. Raises `BrokerUnavailable`."""
        unfinished = {each for each in self._next if self._next[each] < self._end[each]}
        self._assign(unfinished)
        last_record_at = time.monotonic()
        while unfinished:
            lines = self._poll(0.1)
            if lines:
                last_record_at = time.monotonic()
            elif time.monotonic() - last_record_at > STALL_S:
                raise BrokerUnavailable(
                    f"{self._settings.resolve_bootstrap()} sent no records for {STALL_S:g} s, and the end of "
                    f"{counted(len(unfinished), 'partition')} was not reached; check JOBLEDGER_BOOTSTRAP and that the "
                    "broker runs"
                )
            for line in lines:
                where = line.position
                if where.offset < self._end[where.topic, where.partition]:
                    yield line
            for each in list(unfinished):
                self._next[each] = max(self._next[each], self._position(each))
                if self._next[each] >= self._end[each]:
                    unfinished.discard(each)

    def onwards(self) -> Iterator[Line]:
        """Yield the records that are appended after these ends, forever."""
        for each, end in self._end.items():
            self._next[each] = end
        self._assign(self._next)
        checked_at = time.monotonic()
        while True:
            yield from sorted(self._poll(0.2), key=_order)
            if time.monotonic() - checked_at > NEW_TOPICS_EVERY:
                checked_at = time.monotonic()
                added = [each for each in self._partitions() if each not in self._next]
                if added:
                    for each in self._next:
                        self._next[each] = max(self._next[each], self._position(each))
                    self._next.update(dict.fromkeys(added, 0))
                    self._assign(self._next)

    def _partitions(self) -> list[Partition]:
        from confluent_kafka import KafkaException

        from jobledger.kafka import clients

        try:
            topics = self._consumer.list_topics(timeout=10.0).topics
        except KafkaException as exc:
            raise clients.translate(exc.args[0], self._settings, "asking for topics") from exc
        names = [name for name in topics if self._belongs(name)]
        return sorted((name, partition) for name in names for partition in topics[name].partitions)

    def _belongs(self, topic: str) -> bool:
        names = self._names
        kinds = {
            names.lifecycle: Topics.LIFECYCLE,
            names.coordination: Topics.COORDINATION,
            names.dead_letter: Topics.DEAD_LETTER,
            names.plans: Topics.PLANS,
        }
        kind = Topics.WORK if names.queue_of(topic) is not None else kinds.get(topic)
        return kind is not None and (kind in self._topics or Topics.ALL in self._topics)

    def _assign(self, partitions: Sequence[Partition] | set[Partition] | dict[Partition, int]) -> None:
        from confluent_kafka import TopicPartition

        self._consumer.assign([TopicPartition(t, p, self._next[t, p]) for t, p in partitions])

    def _position(self, each: Partition) -> int:
        from confluent_kafka import TopicPartition

        offset = self._consumer.position([TopicPartition(*each)])[0].offset
        return int(offset) if offset >= 0 else -1

    def _poll(self, timeout: float) -> list[Line]:
        from jobledger.kafka import auth, clients

        lines: list[Line] = []
        for message in self._consumer.consume(1000, timeout):
            error = message.error()
            if error is None:
                lines.append(self._line(message))
            elif not (error.retriable() or error.code() in clients.PASSING):
                topic = message.topic() or "?"
                raise clients.translate(error, self._settings, f"reading {topic}", auth.read(topic))
        return lines

    def _line(self, message: Message) -> Line:
        from jobledger.kafka import clients
        from jobledger.log import reading

        position, appended = clients.position_of(message), message.timestamp()[1]
        try:
            return Line(position, appended, reading.recorded(message, self._decode))
        except (SchemaError, RegistryNeeded) as exc:
            return Line(position, appended, None, str(exc))


def _json_line(line: Line) -> None:

    shown: dict[str, Any]
    if line.recorded is None:
        shown = {
            "position": str(line.position),
            "appended_at": iso(line.appended_ms * 1000),
            "error": line.error,
        }
    else:
        shown = event_json(line.recorded)
    output.print_json(shown)


class _Printer:
    """Prints one line per event: time, fact, task, job, details, position."""

    def __init__(self, names: Names) -> None:
        self._console: Console = output.console()
        self._prefix = names.namespace + "."

    def __call__(self, line: Line) -> None:
        from rich.text import Text

        from jobledger.schemas.events import fact_name
        from jobledger.views import facts

        when = output.clock(line.appended_ms * 1000)
        where = str(line.position).removeprefix(self._prefix)
        if line.recorded is None:
            text = Text.assemble(
                (when, "dim"), " ", ("undecodable".ljust(16), "bold red"), f" {line.error} ", (where, "dim")
            )
        else:
            event = line.recorded.event
            text = Text.assemble(
                (when, "dim"),
                " ",
                (fact_name(event.fact).ljust(16), facts.style(event.fact)),
                " ",
                (event.task or "-", "bold"),
                " ",
                (event.job_id or "-", "cyan"),
                f" #{event.attempt} " if event.attempt > 1 else " ",
                facts.describe(event.fact),
                " ",
                (where, "dim"),
            )
        text.plain = text.plain.replace("\n", " ")  # the name of a task or an id may contain line ends
        self._console.print(text, soft_wrap=True)
