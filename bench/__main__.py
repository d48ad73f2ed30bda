"""``python -m bench [NAME …] [--bootstrap HOST:PORT] [--quick]``: JSON on stdout, a table on stderr."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import client, endtoend, events, harness, materializer, order, scaling, timers, worker
from bench.harness import Figure
from jobledger.config import Settings

TIMER_PARTITIONS = 4


def suites(quick: bool) -> dict[str, Callable[[Settings], Sequence[Figure]]]:
    """Return every measurement by its name."""
    return {
        "client": lambda s: client.run(s, 20_000 if quick else 100_000, 300 if quick else 2_000),
        "materializer": lambda s: materializer.run(s, 20_000 if quick else 100_000),
        "worker": lambda s: of_worker(s, 20_000 if quick else 100_000),
        "order": lambda s: order.run(s, quick=quick),
        "timers": lambda s: of_timers(
            s, 1_000 if quick else 10_000, 2.0 if quick else 20.0, 1_500 if quick else 15_000
        ),
        "events": lambda s: events.run(s, 20_000 if quick else 100_000, 300 if quick else 2_000),
        "projection": lambda s: events.projection(s, 100_000 if quick else 1_000_000),
        "steady": lambda s: endtoend.steady(s, seconds=10 if quick else 60),
        "scaling": lambda s: scaling.run(s, seconds=5 if quick else 20),
        "idle": lambda s: scaling.idle(s, seconds=5 if quick else 60),
        "backlog": lambda s: endtoend.backlog(s, 100_000 if quick else 1_000_000),
    }


def of_worker(settings: Settings, jobs: int) -> list[Figure]:
    """Run `bench.worker` and return its report as figures."""
    report = worker.measure(settings.resolve_bootstrap(), jobs, None)
    noop, naps, hop = report["noop"], report["naps"], report["submit_to_start"]
    ours, bare = hop["worker"], hop["bare_hop"]
    children = report["processes"]
    least = max(2.5, 1.5 * bare["p50_ms"])
    return [
        Figure("no-op async jobs, one process", noop["worker"]["jobs_per_s"], "jobs/s",
               max(20_000, 0.8 * noop["bare"]["jobs_per_s"]), True, noop["bare"]["jobs_per_s"], f"{jobs:,} jobs, both facts, until committed; each {worker.TURNS} times, in turn, the faster of it"),
        Figure("CPU of no-op jobs", noop["worker"]["cpu_s_per_1000"], "s per 1,000", None, False,
               noop["bare"]["cpu_s_per_1000"], "the worker process alone"),
        Figure("no-op jobs in threads", report["threads"]["worker"]["jobs_per_s"], "jobs/s", 10_000, True, None, ""),
        Figure("no-op jobs in child processes", children["noop"]["jobs_per_s"], "jobs/s", 3_000, True, None,
               f"{children['cpus']} children"),
        Figure("10 ms of CPU in child processes", children["busy_10_ms"]["jobs_per_s"], "jobs/s", None, True,
               100.0 * children["cpus"], "bare: 100 a second for each CPU, with nothing else on them"),
        Figure("50 ms jobs, 500 at once", naps["worker"]["jobs_per_s"], "jobs/s", 9_000, True,
               naps["bare"]["jobs_per_s"], f"{naps['worker']['jobs']:,} jobs; ideal 10,000/s"),
        Figure("submit → start p50", ours["p50_ms"], "ms", least, False, bare["p50_ms"], "300 a second; bare: one hop"),
        Figure("submit → start p99", ours["p99_ms"], "ms", 15.0, False, bare["p99_ms"], "300 a second; bare: one hop"),
    ]  # fmt: skip


def of_timers(settings: Settings, count: int, spread: float, throughput: int) -> list[Figure]:
    """Run `bench.timers` and return its reports as figures."""
    with tempfile.TemporaryDirectory(prefix="jobledger-bench-") as folder:
        own = replace(settings, home=Path(folder))
        fired: dict[str, Any] = timers.measure_throughput(own, TIMER_PARTITIONS, throughput)
        late: dict[str, Any] = timers.measure_lateness(own, TIMER_PARTITIONS, count, spread)
    how = f"{count:,} timers over {spread:g} s, {late['duplicates']} duplicates"
    return [
        Figure(
            "timers set and fired", fired["set_and_fire_per_s"], "jobs/s", 1_500, True, None, f"{throughput:,} jobs"
        ),
        Figure("timers early", late["early"], "timers", 0, False, None, how),
        Figure("timer lateness p50", late["p50_ms"], "ms", None, False, None, how),
        Figure("timer lateness p99", late["p99_ms"], "ms", 50.0, False, None, how),
    ]


def main() -> int:
    """Run the measurements that the command line names, by default all of them."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(suites(False))}; all by default")
    parser.add_argument("--bootstrap", help="a broker's host:port; an embedded one is started otherwise")
    parser.add_argument("--quick", action="store_true", help="a tenth of the load: to see that it runs, not to compare")
    given = parser.parse_args()
    known = suites(given.quick)
    unknown = set(given.names) - set(known)
    if unknown:
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    figures: list[Figure] = []
    with harness.broker(given.bootstrap) as settings:
        for name in given.names or known:
            began = time.monotonic()
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            figures += known[name](settings)
            print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(harness.as_json(figures))
    harness.show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
