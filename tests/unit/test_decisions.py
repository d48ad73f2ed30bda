"""The coordinator's rules: pure, checked against a log that is replayed, doubled and decided upon by zombies."""

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
from jobledger.streams.coordinator.rules.decisions import DecisionBatch, decide, raised_floor, sweepable
from jobledger.streams.coordinator.rules.derived_events import derived_id, job_due, release_decided
from jobledger.streams.coordinator.rules.schedule_rows import (
    NO_FLOOR,
    Floor,
    Kept,
    Released,
    Row,
    Scheduled,
    decode_row,
    encode_row,
    floor_key,
    is_marker,
    newer,
    row_key,
)
from jobledger.streams.coordinator.rules.timers import BrokerClock, Timers, wake_at

SPEC = JobSpec(b'{"to": "a"}', {"tenant": "acme"}, None)
JOBS = [str(uuid.UUID(int=n + 1)) for n in range(3)]
T0 = 1_700_000_000_000  # ms


def event(fact: Fact, job: str = JOBS[0], run: int = 1, release: int = 1, attempt: int = 1) -> JobEvent:
    return JobEvent("id", job, run, attempt, release, 0, "send", "mail", "k", job, "test", "trace", fact)


def scheduled(offset: int = 5, run: int = 1, release: int = 1, due: int = T0 * 1000) -> Scheduled:
    made = decide(None, NO_FLOOR, event(ReleaseRequested(SPEC, None, due), run=run, release=release), 0, offset, T0).row
    assert isinstance(made, Scheduled)
    return made


# -- single decisions ------------------------------------------------------------------------------------------------


def test_a_conditioned_submission_schedules_the_first_release_of_its_run() -> None:
    """Delay counts from the append time, and release 0 asks for release 1."""
    made = decide(None, NO_FLOOR, event(JobSubmitted(SPEC, 1500), release=0), 3, 7, T0)
    assert made.verdict == "scheduled"
    assert isinstance(made.row, Scheduled)
    assert (made.row.partition, made.row.offset) == (3, 7)
    assert (made.row.run, made.row.release, made.row.attempt) == (1, 1, 1)
    assert made.row.due == (T0 + 1500) * 1000 == made.wake_at
    assert made.release is None


def test_an_absolute_due_time_wins_over_a_delay() -> None:
    """due_at is taken as it is; the timer looks at the next whole millisecond, because append times have no less."""
    made = decide(None, NO_FLOOR, event(ReleaseRequested(SPEC, 60_000, T0 * 1000 + 1)), 0, 0, T0)
    assert isinstance(made.row, Scheduled)
    assert made.row.due == T0 * 1000 + 1
    assert made.wake_at == (T0 + 1) * 1000


def test_a_decision_read_back_in_time_releases_and_leaves_a_marker() -> None:
    """The marker carries the offset and append time of the decision."""
    row = scheduled()
    made = decide(row, NO_FLOOR, event(ReleaseDecided(row.due)), 0, 9, T0)
    assert made == type(made)("released", row=Released(0, 9, 1, 1, T0), release=row)


def test_a_decision_appended_before_the_due_time_sets_the_timer_again() -> None:
    """However the deciding clock ran: the append time alone counts (rule 7)."""
    row = scheduled(due=T0 * 1000 + 1)
    made = decide(row, NO_FLOOR, event(ReleaseDecided(row.due)), 0, 9, T0)
    assert (made.verdict, made.row, made.release, made.wake_at) == ("early", None, None, (T0 + 1) * 1000)


@pytest.mark.parametrize(
    ("row", "run", "release"),
    [
        (None, 1, 1),
        (Released(0, 5, 1, 1, T0), 1, 1),
        (scheduled(release=2), 1, 1),
        (scheduled(run=2), 1, 1),
        (scheduled(), 1, 2),
    ],
)
def test_a_decision_that_the_row_does_not_wait_for_does_nothing(row: Row | None, run: int, release: int) -> None:
    """A zombie's, a duplicate, or one overtaken by a later release or run."""
    made = decide(row, NO_FLOOR, event(ReleaseDecided(0), run=run, release=release), 0, 9, T0)
    assert (made.verdict, made.row, made.release, made.wake_at) == ("stale-decision", None, None, None)


@pytest.mark.parametrize("row", [scheduled(release=2), Released(0, 5, 1, 2, T0), scheduled(run=2, release=1)])
@pytest.mark.parametrize("release", [1, 2])
def test_a_request_for_a_release_that_was_asked_for_or_passed_is_ignored(row: Row, release: int) -> None:
    """The first request of a release wins."""
    made = decide(row, NO_FLOOR, event(ReleaseRequested(SPEC, 0), release=release), 0, 9, T0)
    assert made.verdict == "passed"
    assert (made.row, made.release) == (None, None)


@pytest.mark.parametrize(("run", "release"), [(1, 3), (2, 1)])
def test_a_later_release_or_run_replaces_the_row(run: int, release: int) -> None:
    """(run, release) is ordered: a redrive begins again at release 1."""
    made = decide(scheduled(release=2), NO_FLOOR, event(ReleaseRequested(SPEC, 0), run=run, release=release), 0, 9, T0)
    assert isinstance(made.row, Scheduled)
    assert (made.row.run, made.row.release, made.row.offset) == (run, release, 9)


def test_overdue_re_sends_a_passed_release_under_the_same_id() -> None:
    """The release it names, never a new one; workers drop the second copy."""
    row = scheduled()
    first = job_due(row, 1, "a")
    made = decide(Released(0, 7, 1, 1, T0), NO_FLOOR, event(ReleaseOverdue(SPEC, row.due)), 0, 9, T0)
    assert made.verdict == "sent-again"
    assert made.row is None
    assert made.release is not None
    second = job_due(made.release, 1, "a")
    assert second == first


def test_overdue_makes_a_waiting_release_be_looked_at_again() -> None:
    """Its timer may have been lost: it is set again."""
    made = decide(scheduled(), NO_FLOOR, event(ReleaseOverdue(SPEC, 0)), 0, 9, T0)
    assert (made.verdict, made.row, made.release, made.wake_at) == ("looked-again", None, None, T0 * 1000)


@pytest.mark.parametrize("row", [None, scheduled(release=2)])
def test_overdue_recreates_a_row_whose_request_was_lost(row: Row | None) -> None:
    """The event carries the whole job."""
    made = decide(row, NO_FLOOR, event(ReleaseOverdue(SPEC, T0 * 1000), release=3, attempt=2), 0, 9, T0 + 9)
    assert made.verdict == "recreated"
    assert isinstance(made.row, Scheduled)
    assert (made.row.release, made.row.attempt, made.row.due, made.row.args) == (3, 2, T0 * 1000, SPEC.args)


def test_overdue_about_an_older_release_is_ignored() -> None:
    """The watchdog's view was behind."""
    assert decide(scheduled(release=2), NO_FLOOR, event(ReleaseOverdue(SPEC, 0)), 0, 9, T0).verdict == "passed"


@pytest.mark.parametrize("offset", [0, 4, 5])
def test_an_event_at_or_below_the_row_is_skipped(offset: int) -> None:
    """The table is ahead of the committed offset after a crash."""
    assert decide(scheduled(5), NO_FLOOR, event(ReleaseDecided(0)), 0, offset, T0).verdict == "seen"


@pytest.mark.parametrize("offset", [0, 4, 5])
def test_an_event_at_or_below_the_floor_is_skipped(offset: int) -> None:
    """Lost group offsets release nothing again after markers were swept."""
    assert decide(None, 5, event(JobSubmitted(SPEC, 0), release=0), 0, offset, T0).verdict == "seen"


def test_a_fact_that_is_not_the_coordinators_business_changes_nothing() -> None:
    """It is counted and passed."""
    made = decide(scheduled(), NO_FLOOR, event(JobStarted("w", "t", 1)), 0, 9, T0)
    assert (made.verdict, made.row, made.release, made.wake_at) == ("unexpected", None, None, None)


# -- records and rows ------------------------------------------------------------------------------------------------


def test_job_due_carries_the_whole_job_and_a_deterministic_id() -> None:
    """The id is v5 of (job, run, release): the same from every instance, another for every release."""
    row = scheduled(release=2)
    due = job_due(row, 42, "coordinator@h:1")
    assert due.fact == JobDue(SPEC, row.due)
    assert (due.job_id, due.run, due.release, due.attempt) == (JOBS[0], 1, 2, 1)
    assert (due.task, due.queue, due.key, due.home, due.trace) == ("send", "mail", "k", JOBS[0], "trace")
    ids = {derived_id(JOBS[0], run, release, "due") for run in (1, 2) for release in (1, 2)}
    assert len(ids) == 4
    assert due.event_id == derived_id(JOBS[0], 1, 2, "due") == str(uuid.uuid5(uuid.UUID(JOBS[0]), "1/2/due"))
    assert release_decided(row, 42, "c").event_id != due.event_id
    assert uuid.UUID(derived_id("no uuid", 1, 1, "due")).version == 5


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
def test_whatever_number_a_record_says_what_comes_of_it_can_be_written(
    steps: list[tuple[Fact, int, int]], appended_ms: int
) -> None:
    """A delay, lease, time or count of any 64 bits: rows and records made of it fit theirs, so no event that is well formed
    ends the coordinator at every start."""
    rows: dict[tuple[int, bytes], Row] = {}
    batch = DecisionBatch(lambda p, k: rows.get((p, k)), lambda p: NO_FLOOR)
    for offset, (fact, release, attempt) in enumerate(steps):
        batch.add(event(fact, release=release, attempt=attempt), 0, offset, appended_ms)
        for row in batch.rows.values():
            assert decode_row(encode_row(row)) == row
    for made in [*batch.facts, *(job_due(row, T0, "c") for row in batch.releases)]:
        assert codec.decode(codec.encode(made)) == made
    for kept in batch.rows.values():
        if isinstance(kept, Kept):
            codec.encode(release_decided(kept, T0, "c"))


def test_a_time_that_no_clock_reaches_is_never() -> None:
    """It stays a time: a delay of 10^18 ms is one that ends with the year 9999."""
    made = decide(None, NO_FLOOR, event(JobSubmitted(JobSpec(b"{}", {}, None, 10**18), 10**18), release=0), 0, 7, T0)
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
    st.builds(Released, *[st.integers(0, 2**40)] * 5),
    st.builds(Floor, *[st.integers(0, 2**40)] * 2),
)


@given(rows)
def test_rows_survive_their_encoding(row: Row | Floor) -> None:
    """decode(encode(row)) == row, and markers are told by their bytes alone."""
    data = encode_row(row)
    assert decode_row(data) == row
    assert is_marker(data) == isinstance(row, Released)


def test_keys_of_floors_and_rows_never_meet() -> None:
    """A job id has no zero byte at its beginning."""
    assert floor_key(3) != floor_key(4)
    assert floor_key(3)[:1] == b"\0" != row_key(JOBS[0])[:1]


@given(rows, rows)
def test_of_two_rows_the_later_events_wins(a: Row | Floor, b: Row | Floor) -> None:
    """A zombie's late write of an older row does not win over a newer one."""
    assert newer(a, b) or newer(b, a)
    if a.offset > b.offset:
        assert newer(a, b)
        assert not newer(b, a)


# -- timers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=2))), st.integers(0, 50), st.integers(1, 5))
def test_timers_pass_in_order_and_never_early(entries: list[tuple[int, bytes]], now: int, limit: int) -> None:
    """pop_passed returns the earliest passed keys, at most ``limit``, and leaves the others."""
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
def test_waking_is_never_before_the_due_time_and_less_than_a_millisecond_after(due: int) -> None:
    """Rounded up to what an append time can show."""
    assert 0 <= wake_at(due) - due < 1000
    assert wake_at(due) % 1000 == 0


@given(st.integers(-(10**9), 10**9), st.lists(st.integers(0, 5_000_000), min_size=1, max_size=20))
def test_the_brokers_clock_is_never_estimated_ahead_of_itself(ahead: int, latencies: list[int]) -> None:
    """However far the clocks differ: the estimate errs towards late, by no more than the least latency and 1 ms."""
    clock = BrokerClock()
    true = T0 * 1000
    for latency in latencies:
        true += 1_000_000
        clock.observe(true + latency + ahead, true // 1000)
        estimate = clock.now(true + latency + ahead)
        assert estimate <= true + latency
    assert clock.now(true + ahead) >= true - min(latencies) - 1000


def test_the_brokers_clock_follows_a_drift_and_forgets_when_told() -> None:
    """Samples older than two windows do not count; after a reset nothing is assumed."""
    clock = BrokerClock(window_us=1000)
    clock.observe(10_000, 5)
    assert clock.ahead_us == 5000
    for received in (12_000, 14_000):
        clock.observe(received, 1)
    assert clock.ahead_us == 11_000
    clock.reset()
    assert clock.ahead_us == 0


# -- sweep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "committed", "now_ms", "goes"),
    [
        (Released(0, 5, 1, 1, T0), 6, T0 + 600, True),
        (Released(0, 5, 1, 1, T0), 5, T0 + 600, False),
        (Released(0, 5, 1, 1, T0), 6, T0 + 599, False),
        (scheduled(5), 6, T0 + 600, False),
        (Floor(0, 5), 6, T0 + 600, False),
    ],
)
def test_only_markers_that_were_committed_and_kept_long_enough_are_swept(
    row: Row | Floor, committed: int, now_ms: int, goes: bool
) -> None:
    """The committed offset is the next to be read, so it must be above the marker's."""
    assert sweepable(row, committed, now_ms, 600) is goes


@given(st.integers(-1, 10), st.integers(0, 10))
def test_a_floor_never_falls_and_stays_below_the_committed_offset(floor: int, committed: int) -> None:
    """What is at or below it was dealt with."""
    raised = raised_floor(floor, committed)
    assert raised >= floor
    assert raised <= max(floor, committed - 1)


# -- a partition's life, with faults ---------------------------------------------------------------------------------


@dataclass
class Partition:
    """One partition's log, table and work topic, and an instance that can die between any two steps.

    Steps of a batch: decide, send releases, write rows one by one, process further, commit. ``clock`` is the broker's.
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
        """Process up to ``most`` events; with ``die_after`` the instance dies after so many steps of the cycle."""
        batch = DecisionBatch(self.row, self.floor)
        end = min(self.position + most, len(self.log))
        for offset in range(self.position, end):
            what, appended = self.log[offset]
            batch.add(what, 0, offset, appended)
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
        """Every timer that has passed writes its decision; rows are all it goes by."""
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
def test_every_release_asked_for_is_let_go_once_effectively_and_never_early(script: list[tuple[object, ...]]) -> None:
    """Under crashes between any steps, replays from any committed offset, duplicated and zombie decisions, watchdog
    nudges, sweeps and lost group offsets: for each (job, run, release) asked for there is at least one JobDue, all its
    copies carry one id, none is appended before the due time, and none stands for a release nobody asked for. Only a
    crash, the watchdog or a request that is read after its marker was swept makes a copy."""
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
                # A worker asks for the next release only after it has seen the last one.
                if any((w.job_id, w.release) == (job, last[job]) for w, _ in p.work):
                    ask(job, last[job] + 1, delay)
            case ("again", int(which)) if p.log:
                # What a worker derives may be sent again, while its marker is kept.
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
                # With its marker a job is forgotten: a request sent again before that, and not read yet, is a new one.
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

    # At the end the instance lives long enough: everything read, everything due.
    for _ in range(3):
        p.clock += 100
        p.cycle(10_000)
        p.fire()
        p.cycle(10_000)

    # Everything is swept, and the group loses its offsets: nothing is let go again.
    p.committed = p.position
    p.sweep(0)
    assert p.table.keys() == {floor_key(0)}
    sent = len(p.work)
    p.position = 0
    p.cycle(10_000)
    p.fire()
    assert (len(p.work), p.position) == (sent, len(p.log))

    # The watchdog's event may be read more than once: whatever it re-sends changes no row.
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
    """Processing any stretch of the log a second time leaves the table as it is."""
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


def test_a_release_to_a_closed_queue_is_held_back_and_stays_scheduled() -> None:
    """No marker without an acknowledged JobDue: the timer looks again, and the queue is reported."""
    row = scheduled()
    batch = DecisionBatch(lambda partition, key: row, lambda partition: NO_FLOOR, lambda queue: False)
    batch.add(event(ReleaseDecided(row.due)), 0, 9, T0)
    assert (batch.rows, batch.releases, batch.closed) == ({}, [], {"mail"})
    assert batch.timers == [(0, row_key(JOBS[0]), wake_at(row.due))]
    assert batch.verdicts == {"held-back": 1}
