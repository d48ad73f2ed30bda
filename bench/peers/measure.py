"""Runs the same measurements with each system, one after another. This module does not know which system it measures;
`Bench` describes the measurements.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.harness import percentile
from bench.peers.port import STAMPS, Command, Peer, Session, Setting
from bench.peers.processes import Died, Family, cpu_s, running

LEAST_S = 5.0
MOST_JOBS = 500_000
#: Seconds between two checks of the progress, and seconds without any progress after which a measurement fails.
LOOK_S, STUCK_S = 0.01, 60.0
#: The share of the results that is stored before the clock starts.
WARM = 0.1
RATE = 50.0


class Load(msgspec.Struct, frozen=True):
    """The load: the number of no-op jobs (``jobs``), of submissions one by one (``singles``), of 50 ms jobs (``naps``),
    and of jobs for the time to a start (``stamps``). ``sized``: whether a short run is repeated with more jobs."""

    jobs: int = 20_000
    singles: int = 5_000
    naps: int = 5_000
    stamps: int = 500
    sized: bool = True


QUICK = Load(jobs=2_000, singles=300, naps=1_000, stamps=50, sized=False)


class Drained(msgspec.Struct, frozen=True):
    """The figures of a queue whose jobs have all been run. ``worker_cpu`` and ``broker_cpu``: CPU seconds per 1,000
    jobs of the workers and of the broker; None if unknown."""

    jobs: int
    jobs_per_s: float
    worker_cpu: float
    broker_cpu: float | None

    @property
    def cpu(self) -> float:
        """CPU seconds per 1,000 jobs of workers and broker together."""
        return self.worker_cpu + (self.broker_cpu or 0.0)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one system, or in ``not_run`` why it was not measured.

    Rates are in jobs/s, times in ms. ``one`` and ``two``: no-op jobs in one and in two processes. ``bulk`` is None if
    the system cannot submit faster than one by one.
    """

    name: str
    title: str
    versions: dict[str, str] = {}
    setting: str = ""
    naps_setting: str = ""
    one: Drained | None = None
    two: Drained | None = None
    single: float | None = None
    bulk: float | None = None
    start_p50: float | None = None
    start_p99: float | None = None
    naps: float | None = None
    not_run: str = ""


class Tried(msgspec.Struct, frozen=True):
    """One setting, measured with no-op jobs or 50 ms jobs in one process."""

    name: str
    task: str
    setting: str
    drained: Drained


def of(peer: Peer, load: Load, folder: Path) -> Row:
    """Measure everything of one system with its best settings. Raises `NotRun`, `Died` or `TimeoutError`."""
    versions = dict(peer.install())
    best, naps = peer.settings[0], peer.naps[0]
    with peer.session(folder) as session:
        bench = Bench(peer, session, load, folder)
        single = bench.submitted("one", "noop", load.singles)
        one, bulk = bench.sized(best, 1)
        two, _ = bench.sized(best, 2)
        times = bench.start_ms(best)
        asleep, _ = bench.drained(naps, 1, "nap", load.naps)
    return Row(
        name=peer.name,
        title=peer.title,
        versions=versions,
        setting=best.name,
        naps_setting=naps.name,
        one=one,
        two=two,
        single=single,
        bulk=bulk if peer.bulk else None,
        start_p50=percentile(times, 0.5),
        start_p99=percentile(times, 0.99),
        naps=asleep.jobs_per_s,
    )


def tried(peer: Peer, load: Load, folder: Path) -> Iterator[Tried]:
    """Measure every setting of one system. Raises as `of` does."""
    peer.install()
    with peer.session(folder) as session:
        bench = Bench(peer, session, load, folder)
        for setting in peer.settings:
            drained, _ = bench.sized(setting, 1)
            yield Tried(peer.name, "noop", setting.name, drained)
        for setting in peer.naps:
            drained, _ = bench.drained(setting, 1, "nap", load.naps)
            yield Tried(peer.name, "nap", setting.name, drained)


def enough(jobs: int, jobs_per_s: float) -> int:
    """Return the number of jobs that a run should have: ``jobs`` if they take at least `LEAST_S` at this rate, else as
    many as take twice that time, at most `MOST_JOBS`."""
    if jobs / jobs_per_s >= LEAST_S:
        return jobs
    return min(MOST_JOBS, max(jobs, int(jobs_per_s * LEAST_S * 2)))


class Bench:
    """The measurements of one system, in one session.

    No-op jobs: ``jobs`` are submitted, then workers are started. The clock starts once a tenth of the results is
    stored, so that the start of the workers does not count. The clock stops when every result is stored and every job
    is acknowledged. The CPU times of workers and broker are read at the same two moments. A run of less than `LEAST_S`
    depends more on its beginning and its end than on the system, so it is repeated with as many jobs as take twice that
    time.

    Submitting: the submitting program's own clock measures the time from the first acknowledged submission to the last.

    Submit → start: jobs are submitted one by one, `RATE` a second, while nothing else happens. This machine's clock
    measures the time.

    50 ms jobs: they are measured like no-op jobs, with at most 500 at once in one process.
    """

    def __init__(self, peer: Peer, session: Session, load: Load, folder: Path) -> None:
        self.peer, self.session, self.load, self.folder = peer, session, load, folder

    def sized(self, setting: Setting, processes: int) -> tuple[Drained, float]:
        """Measure no-op jobs, and measure again with more jobs if the run was short. Return the figures, and the rate
        at which the jobs were submitted."""
        found = self.drained(setting, processes, "noop", self.load.jobs)
        more = enough(self.load.jobs, found[0].jobs_per_s)
        return self.drained(setting, processes, "noop", more) if self.load.sized and more > self.load.jobs else found

    def drained(self, setting: Setting, processes: int, task: str, jobs: int) -> tuple[Drained, float]:
        """Submit ``jobs`` jobs, then start workers and measure them. Return the figures, and the rate at which the jobs
        were submitted."""
        self.session.fresh()
        submitted = self._submit(self.session.submit(["bulk" if self.peer.bulk else "one", task, str(jobs)]))
        with self._workers(setting, processes) as family:
            done = self._reach(family, jobs, round(jobs * WARM), whole=False)
            began, used, broker = time.perf_counter(), family.cpu_s(), cpu_s(self.session.brokers)
            self._reach(family, jobs, jobs, whole=True)
            took = time.perf_counter() - began
            used, broker = family.cpu_s() - used, cpu_s(self.session.brokers) - broker
        counted = jobs - done
        each = 1_000 / counted
        return (
            Drained(jobs, counted / took, used * each, broker * each if self.session.brokers else None),
            submitted,
        )

    def submitted(self, how: str, task: str, jobs: int) -> float:
        """Return the submissions per second while no worker runs."""
        self.session.fresh()
        return self._submit(self.session.submit([how, task, str(jobs)]))

    def start_ms(self, setting: Setting) -> list[float]:
        """Return the milliseconds from submission to start, of jobs that are submitted `RATE` a second."""
        self.session.fresh()
        stamps = self.folder / "stamps"
        stamps.write_text("", "ascii")
        with self._workers(setting, 1, {STAMPS: str(stamps)}) as family:
            first = round(RATE)
            self._submit(self.session.submit(["one", "stamp", "1"]))
            self._stamped(family, stamps, 1)
            self._submit(self.session.submit(["one", "stamp", str(first + self.load.stamps), str(RATE)]))
            found = self._stamped(family, stamps, 1 + first + self.load.stamps)
        return [ns / 1e6 for ns in found[1 + first :]]

    def _stamped(self, family: Family, stamps: Path, count: int) -> list[int]:
        deadline = time.monotonic() + STUCK_S
        while True:
            found = stamps.read_text("ascii").split()
            if len(found) >= count:
                return [int(word) for word in found]
            family.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {count} jobs started within {STUCK_S:g} s: {family.said()}")
            time.sleep(LOOK_S)

    @contextlib.contextmanager
    def _workers(self, setting: Setting, processes: int, env: dict[str, str] | None = None) -> Iterator[Family]:
        commands = self.session.workers(setting, processes)
        with running([Command(c.argv, {**c.env, **(env or {})}) for c in commands], self.folder, "worker") as family:
            yield family

    def _reach(self, family: Family, jobs: int, wanted: int, *, whole: bool) -> int:
        """Wait until ``wanted`` results are stored and, if ``whole``, all jobs are acknowledged. Return the number of
        results that are stored then. Raises `TimeoutError` or `Died`."""
        best, deadline = (-1, 0), 0.0
        while True:
            now = self.session.progress(jobs)
            if now.stored >= wanted and not (whole and now.unacknowledged):
                return now.stored
            if (now.stored, -now.unacknowledged) > best:
                best, deadline = (now.stored, -now.unacknowledged), time.monotonic() + STUCK_S
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"nothing moved for {STUCK_S:g} s: {now.stored} of {jobs} results stored, "
                    f"{now.unacknowledged} jobs unacknowledged; the workers said: {family.said() or 'nothing'}"
                )
            family.check()
            time.sleep(LOOK_S)

    def _submit(self, command: Command) -> float:
        """Run a submitting program to its end. Return the jobs per second by its own clock. Raises `Died`."""
        with running([command], self.folder, "submit") as family:
            said = family.finished()
        try:
            report = json.loads(said.splitlines()[-1])
            return float(report["jobs"] / report["seconds"]) if report["seconds"] else 0.0
        except (ValueError, KeyError, IndexError) as error:
            raise Died(f"what submits did not say how long it took but: {said}") from error
