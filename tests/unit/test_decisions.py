"""The coordinator's rules, as pure functions: also for a log that is replayed, has copies, and has decisions of a
zombie, which is a coordinator that has lost its partition and does not know it yet."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobledger.schemas import codec
from jobledger.schemas.events import (
    CRASHES_TAG,
    FAR_US,
    CancelRequested,
    ErrorInfo,
    Fact,
    JobDue,
    JobEvent,
    JobRetried,
    JobSnoozed,
    JobSpec,
    JobStarted,
    JobSubmitted,
    Leased,
    LeaseRenewed,
    ReleaseDecided,
    ReleaseOverdue,
    ReleaseRequested,
)
from jobledger.schemas.ids import derived_id
from jobledger.streams.coordinator.rules.decisions import DecisionBatch, Place, decide, raised_floor, sweepable
from jobledger.streams.coordinator.rules.derived_events import job_due, release_decided
from jobledger.streams.coordinator.rules.schedule_rows import (
    NO_FLOOR,
    Floor,
    Kept,
    Marker,
    Row,
    Scheduled,
    decode_row,
    encode_row,
    floor_key,
    is_marker,
    newer,
    row_key,
)
from jobledger.streams.coordinator.rules.timers import Timers, wake_at

SPEC = JobSpec(b'{"to": "a"}', {"tenant": "acme"}, None)
JOBS = [str(uuid.UUID(int=n + 1)) for n in range(3)]
T0 = 1_700_000_000_000  # ms


def event(fact: Fact, job: str = JOBS[0], run: int = 1, release: int = 1, attempt: int = 1) -> JobEvent:
    return JobEvent("id", job, run, attempt, release, 0, "send", "mail", "k", job, "test", "trace", fact)


def scheduled(offset: int = 5, run: int = 1, release: int = 1, due: int = T0 * 1000) -> Scheduled:
    made = decide(
        None, NO_FLOOR, event(ReleaseRequested(SPEC, None, due), run=run, release=release), Place(0, offset, T0)
    ).row
    assert isinstance(made, Scheduled)
    return made


# -- single decisions ------------------------------------------------------------------------------------------------


def test_a_delayed_submission_schedules_the_first_release() -> None:
    """The delay counts from the append time. An event with release 0 asks for release 1."""
    made = decide(None, NO_FLOOR, event(JobSubmitted(SPEC, 1500), release=0), Place(3, 7, T0))
    assert made.verdict == "scheduled"
    assert isinstance(made.row, Scheduled)
    assert (made.row.partition, made.row.offset) == (3, 7)
    assert (made.row.run, made.row.release, made.row.attempt) == (1, 1, 1)
    assert made.row.due == (T0 + 1500) * 1000 == made.wake_at
    assert made.release is None


def test_an_absolute_due_time_wins_over_a_delay() -> None:
    """`due_at` is not changed. The timer fires at the next whole millisecond, because append times are in
    milliseconds."""
    made = decide(None, NO_FLOOR, event(ReleaseRequested(SPEC, 60_000, T0 * 1000 + 1)), Place(0, 0, T0))
    assert isinstance(made.row, Scheduled)
    assert made.row.due == T0 * 1000 + 1
    assert made.wake_at == (T0 + 1) * 1000


def test_a_decision_appended_after_the_due_time_releases_the_job_and_leaves_a_marker() -> None:
    """The marker has the offset and the append time of the decision."""
    row = scheduled()
    made = decide(row, NO_FLOOR, event(ReleaseDecided(row.due)), Place(0, 9, T0))
    assert made == type(made)("released", row=Marker(0, 9, 1, 1, T0), release=row)


def test_a_decision_appended_before_the_due_time_sets_the_timer_again() -> None:
    """Only the append time counts, and not the clock of the coordinator that decided (rule 7)."""
    row = scheduled(due=T0 * 1000 + 1)
    made = decide(row, NO_FLOOR, event(ReleaseDecided(row.due)), Place(0, 9, T0))
    assert (made.verdict, made.row, made.release, made.wake_at) == ("early", None, None, (T0 + 1) * 1000)


@pytest.mark.parametrize(
    ("row", "run", "release"),
    [
        (None, 1, 1),
        (Marker(0, 5, 1, 1, T0), 1, 1),
        (scheduled(release=2), 1, 1),
        (scheduled(run=2), 1, 1),
        (scheduled(), 1, 2),
    ],
)
def test_a_decision_that_the_row_does_not_wait_for_does_nothing(row: Row | None, run: int, release: int) -> None:
    """The decision is a zombie's, a copy, or one for an earlier release or run."""
    made = decide(row, NO_FLOOR, event(ReleaseDecided(0), run=run, release=release), Place(0, 9, T0))
    assert (made.verdict, made.row, made.release, made.wake_at) == ("stale-decision", None, None, None)


@pytest.mark.parametrize("row", [scheduled(release=2), Marker(0, 5, 1, 2, T0), scheduled(run=2, release=1)])
@pytest.mark.parametrize("release", [1, 2])
def test_a_second_or_late_request_for_a_release_is_ignored(row: Row, release: int) -> None:
    """The first request for a release counts."""
    made = decide(row, NO_FLOOR, event(ReleaseRequested(SPEC, 0), release=release), Place(0, 9, T0))
    assert made.verdict == "passed"
    assert (made.row, made.release) == (None, None)


@pytest.mark.parametrize(("run", "release"), [(1, 3), (2, 1)])
def test_a_later_release_or_run_replaces_the_row(run: int, release: int) -> None:
    """Rows are ordered by (run, release). A later run begins again at release 1."""
    made = decide(
        scheduled(release=2), NO_FLOOR, event(ReleaseRequested(SPEC, 0), run=run, release=release), Place(0, 9, T0)
    )
    assert isinstance(made.row, Scheduled)
    assert (made.row.run, made.row.release, made.row.offset) == (run, release, 9)


def test_an_overdue_release_that_was_sent_is_sent_again_with_the_same_id() -> None:
    """The coordinator sends the release of the event again, and no new one. Workers drop the second copy."""
    row = scheduled()
    first = job_due(row, 1, "a")
    made = decide(Marker(0, 7, 1, 1, T0), NO_FLOOR, event(ReleaseOverdue(SPEC, row.due)), Place(0, 9, T0))
    assert made.verdict == "sent-again"
    assert made.row is None
    assert made.release is not None
    second = job_due(made.release, 1, "a")
    assert second == first


def test_an_overdue_release_that_still_waits_gets_a_new_timer() -> None:
    """The old timer may have been lost."""
    made = decide(scheduled(), NO_FLOOR, event(ReleaseOverdue(SPEC, 0)), Place(0, 9, T0))
    assert (made.verdict, made.row, made.release, made.wake_at) == ("looked-again", None, None, T0 * 1000)


@pytest.mark.parametrize("row", [None, scheduled(release=2)])
def test_an_overdue_release_without_a_row_gets_a_new_row(row: Row | None) -> None:
    """The request was lost. `ReleaseOverdue` has all data of the job."""
    made = decide(row, NO_FLOOR, event(ReleaseOverdue(SPEC, T0 * 1000), release=3, attempt=2), Place(0, 9, T0 + 9))
    assert made.verdict == "recreated"
    assert isinstance(made.row, Scheduled)
    assert (made.row.release, made.row.attempt, made.row.due, made.row.args) == (3, 2, T0 * 1000, SPEC.args)


def test_an_overdue_release_before_that_of_the_row_is_ignored() -> None:
    """The watchdog has read the status table before the table had the later release."""
    assert decide(scheduled(release=2), NO_FLOOR, event(ReleaseOverdue(SPEC, 0)), Place(0, 9, T0)).verdict == "passed"


@pytest.mark.parametrize("offset", [0, 4, 5])
def test_an_event_at_or_below_the_offset_of_the_row_is_skipped(offset: int) -> None:
    """After a crash the table may be ahead of the committed offset."""
    assert decide(scheduled(5), NO_FLOOR, event(ReleaseDecided(0)), Place(0, offset, T0)).verdict == "seen"


@pytest.mark.parametrize("offset", [0, 4, 5])
def test_an_event_at_or_below_the_floor_is_skipped(offset: int) -> None:
    """If the group's offsets are lost after markers were swept, nothing is released again."""
    assert decide(None, 5, event(JobSubmitted(SPEC, 0), release=0), Place(0, offset, T0)).verdict == "seen"


def test_a_fact_that_does_not_concern_the_coordinator_changes_nothing() -> None:
    """The fact is only counted."""
    made = decide(scheduled(), NO_FLOOR, event(JobStarted("w", None, {}, "t", 1)), Place(0, 9, T0))
    assert (made.verdict, made.row, made.release, made.wake_at) == ("unexpected", None, None, None)


# -- records and rows ------------------------------------------------------------------------------------------------


def test_job_due_carries_the_whole_job_and_a_deterministic_id() -> None:
    """The id is a UUID v5 of (job, run, release): the same from each coordinator, and another one for each release."""
    row = scheduled(release=2)
    due = job_due(row, 42, "coordinator@h:1")
    assert due.fact == JobDue(SPEC, row.due)
    assert (due.job_id, due.run, due.release, due.attempt) == (JOBS[0], 1, 2, 1)
    assert (due.task, due.queue, due.key, due.home, due.trace) == ("send", "mail", "k", JOBS[0], "trace")
    ids = {derived_id(JOBS[0], run, release, "due") for run in (1, 2) for release in (1, 2)}
    assert len(ids) == 4
    assert due.event_id == derived_id(JOBS[0], 1, 2, "due") == str(uuid.uuid5(uuid.UUID(JOBS[0]), "1/2/due"))
    assert release_decided(row, 42, "c").event_id != due.event_id


any_long = st.sampled_from([-(2**63), 2**63 - 1, 2 * 10**16]) | st.integers(-(2**63), 2**63 - 1)
any_int = st.integers(-(2**31), 2**31 - 2)
any_spec = st.builds(
    JobSpec,
    st.binary(max_size=5),
    st.dictionaries(st.just(CRASHES_TAG), st.integers(0, 10**40).map(str)),
    st.none(),
    st.none() | any_long,
    st.none() | any_long,
)
any_fact: st.SearchStrategy[Fact] = st.one_of(
    st.builds(JobSubmitted, any_spec, st.none() | any_long, st.none() | any_long),
    st.builds(ReleaseRequested, any_spec, st.none() | any_long, st.none() | any_long),
    st.builds(ReleaseOverdue, any_spec, any_long),
    st.builds(ReleaseDecided, any_long),
    st.builds(Leased, any_spec, st.just("w"), any_long, any_int),
    st.builds(LeaseRenewed, st.just("w"), any_long),
    st.builds(JobRetried, st.just(ErrorInfo("E", "m")), any_long),
    st.builds(JobSnoozed, any_long),
    st.builds(CancelRequested, st.just("me")),
)


@given(st.lists(st.tuples(any_fact, st.integers(1, 3), any_int), max_size=6), st.integers(0, 2**42))
def test_rows_and_derived_records_fit_for_any_number_in_an_event(
    steps: list[tuple[Fact, int, int]], appended_ms: int
) -> None:
    """A delay, lease, time or count may be any 64-bit number, and the rows and records with the computed numbers can be
    written. Otherwise a well-formed event would end the coordinator at each start."""
    rows: dict[tuple[int, bytes], Row] = {}
    batch = DecisionBatch(lambda p, k: rows.get((p, k)), lambda p: NO_FLOOR)
    for offset, (fact, release, attempt) in enumerate(steps):
        batch.add(event(fact, release=release, attempt=attempt), Place(0, offset, appended_ms))
        for row in batch.rows.values():
            assert decode_row(encode_row(row)) == row
    for made in [*batch.events, *(job_due(row, T0, "c") for row in batch.releases)]:
        assert codec.decode(codec.encode(made)) == made
    for kept in batch.rows.values():
        if isinstance(kept, Kept):
            codec.encode(release_decided(kept, T0, "c"))


def test_a_time_beyond_the_year_9999_becomes_the_end_of_that_year() -> None:
    """A delay of 10^18 ms ends with the year 9999, and so it is still a valid time."""
    made = decide(
        None, NO_FLOOR, event(JobSubmitted(JobSpec(b"{}", {}, None, 10**18), 10**18), release=0), Place(0, 7, T0)
    )
    assert isinstance(made.row, Scheduled)
    assert made.row.due == made.row.expires_at == FAR_US


text = st.text(max_size=5)
rows = st.one_of(
    st.builds(
        Scheduled,
        *[st.integers(0, 2**40)] * 6,
        text,
        text,
        text,
        st.none() | text,
        st.none() | text,
        st.none() | text,
        st.binary(max_size=9),
        st.dictionaries(text, text, max_size=2),
        st.none() | text,
    ),
    st.builds(Marker, *[st.integers(0, 2**40)] * 5),
    st.builds(Floor, *[st.integers(0, 2**40)] * 2),
)


@given(rows)
def test_rows_survive_their_encoding(row: Row | Floor) -> None:
    """A row is decoded as it was encoded. A marker is recognised by its bytes alone."""
    data = encode_row(row)
    assert decode_row(data) == row
    assert is_marker(data) == isinstance(row, Marker)


def test_the_keys_of_floors_and_rows_are_different() -> None:
    """A job id does not begin with a zero byte."""
    assert floor_key(3) != floor_key(4)
    assert floor_key(3)[:1] == b"\0" != row_key(JOBS[0])[:1]


@given(rows, rows)
def test_the_row_of_the_later_event_is_newer(a: Row | Floor, b: Row | Floor) -> None:
    """So a zombie's late write of an older row does not replace the newer row."""
    assert newer(a, b) or newer(b, a)
    if a.offset > b.offset:
        assert newer(a, b)
        assert not newer(b, a)


# -- timers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=2))), st.integers(0, 50), st.integers(1, 5))
def test_timers_pass_in_order_and_never_early(entries: list[tuple[int, bytes]], now: int, limit: int) -> None:
    """`pop_passed` returns the keys of the earliest passed timers, at most ``limit``, and keeps the others."""
    timers = Timers(entries[: len(entries) // 2])
    for at, key in entries[len(entries) // 2 :]:
        timers.set(at, key)
    assert timers.next() == min((at for at, _ in entries), default=None)
    popped = timers.pop_passed(now, limit)
    ordered = sorted(entries)
    passed = [key for at, key in ordered if at <= now]
    assert popped == passed[:limit]
    assert len(timers) == len(entries) - len(popped)


@given(st.integers(0, 2**50))
def test_a_timer_fires_less_than_a_millisecond_after_the_due_time_and_never_before(due: int) -> None:
    """The time is rounded up to a whole millisecond, as append times are."""
    assert 0 <= wake_at(due) - due < 1000
    assert wake_at(due) % 1000 == 0


# -- sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "committed", "now_ms", "swept"),
    [
        (Marker(0, 5, 1, 1, T0), 6, T0 + 600, True),
        (Marker(0, 5, 1, 1, T0), 5, T0 + 600, False),
        (Marker(0, 5, 1, 1, T0), 6, T0 + 599, False),
        (scheduled(5), 6, T0 + 600, False),
        (Floor(0, 5), 6, T0 + 600, False),
    ],
)
def test_only_markers_that_were_committed_and_kept_long_enough_are_swept(
    row: Row | Floor, committed: int, now_ms: int, swept: bool
) -> None:
    """The committed offset is the next one to read, so it must be above the marker's offset."""
    assert sweepable(row, committed, now_ms, 600) is swept


@given(st.integers(-1, 10), st.integers(0, 10))
def test_a_floor_never_falls_and_stays_below_the_committed_offset(floor: int, committed: int) -> None:
    """All events at or below the floor were processed."""
    raised = raised_floor(floor, committed)
    assert raised >= floor
    assert raised <= max(floor, committed - 1)


# -- a partition's life, with faults ---------------------------------------------------------------------------------


@dataclass
class Partition:
    """One partition's log, table and work topic, and a coordinator that can die between any two steps.

    The steps of a batch: decide, send releases, write rows one by one, continue with the next events, commit.
    ``clock``: the broker's clock.
    """

    clock: int = T0
    log: list[tuple[JobEvent, int]] = field(default_factory=list)
    table: dict[bytes, bytes] = field(default_factory=dict)
    work: list[tuple[JobEvent, int]] = field(default_factory=list)
    position: int = 0
    committed: int = 0

    def append(self, what: JobEvent) -> None:
        self.log.append((what, self.clock))

    def row(self, partition: int, key: bytes) -> Row | None:
        data = self.table.get(key)
        row = None if data is None else decode_row(data)
        assert not isinstance(row, Floor)
        return row

    def floor(self, partition: int) -> int:
        data = self.table.get(floor_key(partition))
        return NO_FLOOR if data is None else decode_row(data).offset

    def cycle(self, most: int, die_after: int | None = None) -> None:
        """Process up to ``most`` events. With ``die_after``, the coordinator dies after that number of steps of the
        cycle."""
        batch = DecisionBatch(self.row, self.floor)
        end = min(self.position + most, len(self.log))
        for offset in range(self.position, end):
            what, appended = self.log[offset]
            batch.add(what, Place(0, offset, appended))
        steps: list[tuple[Kept | None, bytes, Row | None]] = [(r, b"", None) for r in batch.releases]
        steps += [(None, key, row) for (_, key), row in batch.rows.items()]
        for number, (release, key, row) in enumerate(steps):
            if die_after is not None and number >= die_after:
                return self.crash()
            if release is not None:
                self.work.append((job_due(release, 0, "c"), self.clock))
            elif row is not None:
                self.table[key] = encode_row(row)
        if die_after is not None:
            return self.crash()
        self.position = end
        return None

    def crash(self) -> None:
        self.position = self.committed

    def fire(self) -> None:
        """For each row that is due, write a decision."""
        for data in list(self.table.values()):
            row = decode_row(data)
            if isinstance(row, Scheduled) and wake_at(row.due) <= self.clock * 1000:
                self.append(release_decided(row, 0, "c"))

    def sweep(self, keep_ms: int) -> None:
        self.table[floor_key(0)] = encode_row(Floor(0, raised_floor(self.floor(0), self.committed)))
        for key, data in list(self.table.items()):
            if sweepable(decode_row(data), self.committed, self.clock, keep_ms):
                del self.table[key]


actions = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(JOBS), st.integers(0, 40)),
    st.tuples(st.just("retry"), st.sampled_from(JOBS), st.integers(0, 40)),
    st.tuples(st.just("again"), st.integers(0, 30)),
    st.tuples(st.just("zombie"), st.sampled_from(JOBS), st.integers(1, 3)),
    st.tuples(st.just("overdue"), st.sampled_from(JOBS)),
    st.tuples(st.just("cycle"), st.integers(1, 6)),
    st.tuples(st.just("die"), st.integers(1, 6), st.integers(0, 6)),
    st.tuples(st.just("commit"), st.integers(0, 6)),
    st.tuples(st.just("rewind"), st.integers(0, 30)),
    st.tuples(st.just("fire")),
    st.tuples(st.just("pass"), st.integers(1, 30)),
    st.tuples(st.just("sweep"), st.integers(0, 30)),
    st.tuples(st.just("lose-offsets")),
)


@settings(max_examples=100, deadline=None)
@example(
    [
        ("submit", JOBS[0], 0),
        ("again", 0),
        ("again", 0),
        ("cycle", 2),
        ("commit", 0),
        ("again", 0),
        ("sweep", 0),
    ]
)
@given(st.lists(actions, min_size=25, max_size=80))
def test_each_requested_release_is_sent_under_one_id_and_never_early(script: list[tuple[object, ...]]) -> None:
    """The faults are crashes between any steps, replays from any committed offset, copies, decisions of zombies, events
    of the watchdog, sweeps and lost group offsets. For each requested (job, run, release) there is at least one JobDue,
    and all its copies have one id. No JobDue is appended before the due time or without a request. Only a crash, the
    watchdog or a request that is read after its marker was swept makes a copy."""
    p = Partition()
    dues: dict[tuple[str, int, int], int] = {}
    last: dict[str, int] = {}
    copies: Counter[str] = Counter()

    def ask(job: str, release: int, delay: int) -> None:
        if release == 1:
            p.append(event(JobSubmitted(SPEC, delay), job, release=0))
        else:
            p.append(event(ReleaseRequested(SPEC, delay), job, release=release, attempt=release))
        dues[job, 1, release] = (p.clock + delay) * 1000
        last[job] = release

    for step in script:
        match step:
            case ("submit", str(job), int(delay)) if job not in last:
                ask(job, 1, delay)
            case ("retry", str(job), int(delay)) if job in last:
                # A worker asks for the next release only after it has read the last one.
                if any((w.job_id, w.release) == (job, last[job]) for w, _ in p.work):
                    ask(job, last[job] + 1, delay)
            case ("again", int(which)) if p.log:
                # A worker may send a derived record again while its marker is kept.
                what, _ = p.log[which % len(p.log)]
                if floor_key(0) not in p.table:
                    p.append(
                        what
                        if not isinstance(what.fact, JobSubmitted | ReleaseRequested)
                        or p.row(0, row_key(what.job_id)) is not None
                        else event(ReleaseDecided(0), what.job_id)
                    )
            case ("zombie", str(job), int(release)):
                p.append(event(ReleaseDecided(0), job, release=release))
            case ("overdue", str(job)) if job in last and p.position == len(p.log):
                due = dues[job, 1, last[job]]
                if due <= p.clock * 1000 and p.row(0, row_key(job)) is not None:
                    p.append(event(ReleaseOverdue(SPEC, due), job, release=last[job], attempt=last[job]))
                    copies[job] += 1
            case ("cycle", int(most)):
                p.cycle(most)
            case ("die", int(most), int(after)):
                sent = len(p.work)
                p.cycle(most, after)
                copies.update(what.job_id for what, _ in p.work[sent:])
            case ("commit", int(behind)):
                p.committed = max(p.committed, p.position - behind)
            case ("rewind", int(to)) if p.position >= p.committed:
                p.position = p.committed + to % (p.position - p.committed + 1)
            case ("fire",):
                p.fire()
            case ("pass", int(ms)):
                p.clock += ms
            case ("sweep", int(keep)):
                kept = set(p.table)
                p.sweep(keep)
                # Without its marker a job is unknown: a copy of its request that is read later is a new request.
                forgotten = kept - p.table.keys()
                copies.update(
                    what.job_id
                    for what, _ in p.log[p.committed :]
                    if row_key(what.job_id) in forgotten and isinstance(what.fact, JobSubmitted | ReleaseRequested)
                )
            case ("lose-offsets",):
                p.position = 0
            case _:
                pass

    # At the end the coordinator lives long enough to read all events, and all releases are due.
    for _ in range(3):
        p.clock += 100
        p.cycle(10_000)
        p.fire()
        p.cycle(10_000)

    # All markers are swept, and the group loses its offsets: nothing is released again.
    p.committed = p.position
    p.sweep(0)
    assert p.table.keys() == {floor_key(0)}
    sent = len(p.work)
    p.position = 0
    p.cycle(10_000)
    p.fire()
    assert (len(p.work), p.position) == (sent, len(p.log))

    # The watchdog's event may be read more than once, because sending a release again changes no row.
    rereads = 1 + sum(step[0] in ("die", "rewind", "lose-offsets") for step in script)
    released: dict[tuple[str, int, int], list[str]] = {}
    for what, appended in p.work:
        named = (what.job_id, what.run, what.release)
        assert named in dues, f"nobody asked for {named}"
        released.setdefault(named, []).append(what.event_id)
        assert appended * 1000 >= dues[named], f"{named} was early"
    assert released.keys() == dues.keys()
    for (job, _, _), ids in released.items():
        assert len(set(ids)) == 1
        assert len(ids) <= 1 + copies[job] * rereads


@settings(deadline=None)
@given(st.lists(actions, min_size=15, max_size=60), st.integers(0, 40))
def test_a_replay_with_the_table_ahead_changes_no_row(script: list[tuple[object, ...]], start: int) -> None:
    """The table is ahead of the offset. Processing the end of the log a second time does not change the table."""
    p = Partition()
    for step in script:
        match step:
            case ("submit" | "retry", str(job), int(delay)):
                p.append(event(ReleaseRequested(SPEC, delay), job, release=delay % 4 + 1))
            case ("zombie", str(job), int(release)):
                p.append(event(ReleaseDecided(0), job, release=release))
            case ("fire",):
                p.fire()
            case ("pass", int(ms)):
                p.clock += ms
            case ("cycle", int(most)):
                p.cycle(most)
            case _:
                pass
    p.cycle(10_000)
    before = dict(p.table)
    p.position = min(start, len(p.log))
    p.cycle(10_000)
    assert p.table == before


def test_a_release_to_a_missing_work_topic_is_held_back_and_stays_scheduled() -> None:
    """There is no marker without an acknowledged JobDue. The timer is set again, and the lane is reported."""
    row = scheduled()
    batch = DecisionBatch(lambda partition, key: row, lambda partition: NO_FLOOR, lambda lane: False)
    batch.add(event(ReleaseDecided(row.due)), Place(0, 9, T0))
    assert (batch.rows, batch.releases, batch.held_back_lanes) == ({}, [], {"mail"})
    assert batch.timers == [(0, row_key(JOBS[0]), wake_at(row.due))]
    assert batch.verdicts == {"held-back": 1}
