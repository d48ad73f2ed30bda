"""``python -m bench [NAME …] [--bootstrap HOST:PORT] [--quick]``: JSON on stdout, a table on stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from bench import client, endtoend, harness, materializer
from bench.harness import Figure
from jobledger.config import Settings


def suites(quick: bool) -> dict[str, Callable[[Settings], Sequence[Figure]]]:
    """Every measurement by name."""
    return {
        "client": lambda s: client.run(s, 20_000 if quick else 100_000, 300 if quick else 2_000),
        "materializer": lambda s: materializer.run(s, 20_000 if quick else 100_000),
        "steady": lambda s: endtoend.steady(s, seconds=10 if quick else 60),
        "backlog": lambda s: endtoend.backlog(s, 100_000 if quick else 1_000_000),
    }


def main() -> int:
    """Run what was asked for, all by default."""
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
