"""Measures Jobledger and other job systems, one after another on this machine. Prints JSON on stdout, a table on
stderr.

This program installs what it needs under .bench-peers/ (and, as root on Debian, Redis and Node if they are missing). If
a system cannot be measured here, its row says why, the other systems are measured nevertheless, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec

from bench import harness
from bench.peers import bullmq_peer, celery_peer, dramatiq_peer, measure, ours, table, taskiq_peer
from bench.peers.measure import Load, Row, Tried
from bench.peers.port import NotRun, Peer
from bench.peers.processes import Died

#: All systems, in the order in which they are measured.
PEERS: Sequence[Peer] = (*ours.PEERS, bullmq_peer.PEER, dramatiq_peer.PEER, taskiq_peer.PEER, celery_peer.PEER)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a tenth of the load: to see that it runs, not to compare")
    parser.add_argument("--jobs", type=int, metavar="N", help=f"no-op jobs to begin with (default: {Load().jobs:,})")
    parser.add_argument("--settings", action="store_true", help="try every setting instead, to find the best")
    parser.add_argument("--json", action="store_true", help="JSON alone, no table")
    parser.add_argument("--markdown", action="store_true", help="the table for a README on stdout instead of JSON")
    found = parser.parse_args(given)
    unknown = [name for name in found.names if name not in names]
    if unknown:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(names)}")
    if found.jobs is not None and found.jobs < 100:
        parser.error(f"--jobs {found.jobs}: give at least 100, of which the first tenth is not counted")
    return found


def load_of(given: argparse.Namespace) -> Load:
    """Return the load with which to measure."""
    load = measure.QUICK if given.quick else Load()
    return load if given.jobs is None else msgspec.structs.replace(load, jobs=given.jobs)


def brief(message: str) -> str:
    """Return a message's first line and its last line, because a traceback names the error in its last line."""
    lines = message.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1].strip()}"


def main() -> int:
    """Measure the systems that the command line names. Return 0, or 1 if a system could not be measured."""
    given = arguments()
    load, rows, settings, problems = load_of(given), list[Row](), list[Tried](), 0
    machine = harness.machine()
    signal.signal(signal.SIGTERM, _end)
    for peer in PEERS:
        if given.names and peer.name not in given.names:
            continue
        began = time.monotonic()
        print(f"measuring {peer.name} …", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix="jobledger-peers-") as folder:
                if given.settings:
                    settings.extend(measure.tried(peer, load, Path(folder)))
                else:
                    rows.append(measure.of(peer, load, Path(folder)))
        except (NotRun, Died, TimeoutError) as error:
            problems += 1
            rows.append(Row(name=peer.name, title=peer.title, not_run=brief(str(error))))
            print(f"  not run: {error}", file=sys.stderr, flush=True)
        print(f"  {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(table.markdown(rows) if given.markdown else table.as_json(machine, rows, settings))
    if not given.json:
        table.show(rows, settings)
    return 1 if problems else 0


def _end(number: int, frame: FrameType | None) -> None:
    """Raise `SystemExit`, so that SIGTERM ends the processes that were started, too."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
