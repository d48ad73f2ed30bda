"""The status table's fold and the audit's own rule give the same row for the same facts, although they share no
code."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from jobledger.audit.records import Record, Schemas
from jobledger.audit.table import Final, differences, final, result_text
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.events import JobEvent
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store.rows import COLUMNS
from tests.unit.test_projector import Message, Table

WORK, LIFE, COORD = "shop.jobs.mail", "shop.lifecycle", "shop.coordination"
SPEC = ev.JobSpec(b"{}")
ERROR = ev.ErrorInfo("ValueError", "no")
SCHEMAS = Schemas()
#: The possible outcomes of a leased job. None: its worker died.
OUTCOMES: Sequence[ev.Fact | None] = (
    None,
    ev.JobSucceeded(b"7", 1),
    ev.JobFailedFact("exhausted", ERROR, 1),
    ev.JobRetried(ERROR, 5, 1),
    ev.JobSnoozed(5, None, 1),
    ev.JobCancelledFact("ann", None),
)


class Log:
    """The facts of one job, each on its topic."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add(self, topic: str, fact: ev.Fact, release: int = 1, attempt: int = 1) -> None:
        """Add a fact, 10 ms after the previous one."""
        event = JobEvent("e", "job", 1, attempt, release, 0, "render", "mail", None, None, "test", None, fact)
        offset = len(self.messages)
        self.messages.append(Message(topic, 0, offset, codec.encode(event), 1_000 + 10 * offset))

    def audited(self) -> Final | None:
        """Return the row that the audit expects."""
        records = []
        for each in self.messages:
            head, fact, body = SCHEMAS.decode(each.value())
            records.append(Record(each.topic(), each.partition(), each.offset(), each.timestamp()[1], fact, head, body))
        return final(records)

    def folded(self, chance: random.Random | None = None) -> Final | None:
        """Return the row of the status table. With ``chance``, the records come in a random order."""
        messages, table = list(self.messages), Table()
        if chance is not None:
            chance.shuffle(messages)
        projector = RowFolder(table, codec.Decoder())
        for first in range(0, len(messages), 3):
            folded = projector.fold(messages[first : first + 3])  # type: ignore[arg-type]  # has the methods that are called
            table.write(folded.changes)
            projector.committed(folded)
        (row,) = table.rows.values()
        found = dict(zip(COLUMNS, row, strict=True))
        return Final(
            *(found["state"], found["task"], found["queue"], found["run"], found["attempt"], found["release"]),
            *(result_text(found["result"]), found["error_type"]),
        )


@st.composite
def leased(draw: st.DrawFn) -> Log:
    """A long job: each release is leased and started, and its worker reports an outcome to the coordinator. The
    coordinator writes the outcome if the lease is still valid, and otherwise releases the job again."""
    log, attempt, late = Log(), 1, []
    log.add(WORK, ev.JobSubmitted(SPEC))
    for release in range(1, draw(st.integers(1, 4)) + 1):
        if release > 1:
            log.add(WORK, ev.JobDue(SPEC, 5_000), release, attempt)
        log.add(LIFE, ev.JobLeased("host:1", 5_000), release, attempt)
        log.add(LIFE, ev.JobStarted("host:1", None, {}, WORK, 0), release, attempt)
        outcome, stands = draw(st.sampled_from(OUTCOMES)), draw(st.booleans())
        if outcome is None:
            continue
        if not stands:
            late.append((outcome, release, attempt))
            continue
        log.add(COORD, outcome, release, attempt)
        log.add(LIFE, outcome, release, attempt)
        if isinstance(outcome, ev.TERMINAL):
            break
        attempt += isinstance(outcome, ev.JobRetried)
    for outcome, release, attempt in late:  # reported after the end of the lease
        log.add(COORD, outcome, release, attempt)
    return log


@given(leased(), st.randoms(use_true_random=False))
def test_the_row_of_a_leased_job_is_what_the_audit_expects_in_any_order(log: Log, chance: random.Random) -> None:
    """STATUS_CONVERGES for long jobs: a report after the end of the lease changes neither the row nor the row that the
    audit expects."""
    assert differences("job", log.audited(), log.folded(chance)) == []


def test_a_success_that_is_reported_after_the_lease_changes_nothing() -> None:
    """Release 1 lost its lease and succeeded later, and release 2 failed. The job has failed."""
    log = Log()
    log.add(WORK, ev.JobSubmitted(SPEC))
    log.add(LIFE, ev.JobLeased("host:1", 5_000))
    log.add(LIFE, ev.JobStarted("host:1", None, {}, WORK, 0))
    log.add(WORK, ev.JobDue(SPEC, 5_000), release=2)
    log.add(LIFE, ev.JobLeased("host:2", 5_000), release=2)
    log.add(LIFE, ev.JobStarted("host:2", None, {}, WORK, 1), release=2)
    log.add(COORD, ev.JobSucceeded(b"7", 1), release=1)
    running = Final("running", "render", "mail", 1, 1, 2)
    assert log.folded() == log.audited() == running
    for topic in (COORD, LIFE):
        log.add(topic, ev.JobFailedFact("never", ERROR, 1), release=2)
    failed = Final("failed", "render", "mail", 1, 1, 2, None, "ValueError")
    assert log.folded() == log.audited() == failed


@st.composite
def keyed(draw: st.DrawFn) -> Log:
    """A keyed job with attempts in place. Some attempts are started twice, because a worker died."""
    log, release, attempt = Log(), 1, 1
    log.add(WORK, ev.JobSubmitted(SPEC))
    for _ in range(draw(st.integers(1, 8))):
        for _ in range(draw(st.integers(0, 2))):
            log.add(LIFE, ev.JobStarted("host:1", None, {}, WORK, 0), release, attempt)
        in_place = draw(st.booleans())
        match draw(st.sampled_from(["", "retried", "snoozed", "snoozed twice"])):
            case "retried":
                log.add(LIFE, ev.JobRetried(ERROR, 5, 1, in_place), release, attempt)
                attempt += 1
            case "snoozed":
                log.add(LIFE, ev.JobSnoozed(5, None, 1, in_place), release, attempt)
            case "snoozed twice":  # by a worker that was paused, and by the next owner
                log.add(LIFE, ev.JobSnoozed(5, None, 1, in_place), release, attempt)
                log.add(LIFE, ev.JobSnoozed(5, None, 1, draw(st.booleans())), release, attempt)
            case _:
                continue
        if not in_place:
            release += 1
            if draw(st.booleans()):
                log.add(WORK, ev.JobDue(SPEC, 5_000), release, attempt)
    return log


@given(keyed(), st.randoms(use_true_random=False))
def test_the_row_of_a_keyed_job_is_what_the_audit_expects_in_any_order(log: Log, chance: random.Random) -> None:
    """STATUS_CONVERGES for attempts in place: the row and the audit show the last start or pause of an attempt."""
    assert differences("job", log.audited(), log.folded(chance)) == []


def test_an_outcome_counts_on_the_lifecycle_topic_only() -> None:
    """The work topic of a queue that is named ``lifecycle`` is another topic."""
    log = Log()
    log.add("shop.jobs.lifecycle", ev.JobSubmitted(SPEC))
    log.add("shop.jobs.lifecycle", ev.JobSucceeded(b"7", 1))
    state = log.audited()
    assert state is not None
    assert state.state == "queued"
    assert state == log.folded()
    log.add(LIFE, ev.JobSucceeded(b"7", 1))
    ended = log.audited()
    assert ended is not None
    assert ended.state == "succeeded"
    assert ended == log.folded()
