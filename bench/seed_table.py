"""Fills an empty status table with made-up jobs, through the table's own writer. The same seed makes the same jobs.

    python -m bench.seed_table sqlite:////tmp/shop.db --jobs 100000
    python -m bench.seed_table postgresql://user:password@host/database --namespace shop --jobs 10000000

5 % of the jobs failed, in 40 groups of errors; 1.5 % have not ended. There are 3 tags, 10,000 keys, 6 tasks in 4 queues
and 4 versions. The jobs were submitted in the last week. Their positions name records that no log has.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobledger import job
from jobledger.job import Life
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import open_store

WEEK_MS = 7 * 86_400_000
#: Number of jobs in one transaction.
CHUNK = 10_000
KEYS, GROUPS = 10_000, 40
TASKS = (
    ("send_mail", "mail"),
    ("send_receipt", "mail"),
    ("charge_card", "payments"),
    ("resize_image", "media"),
    ("transcode_video", "media"),
    ("import_orders", "default"),
)
VERSIONS = ("2026.11.3", "2026.11.17", "2026.11.24", "2026.12.1")
TENANTS = tuple(f"tenant-{n:03}" for n in range(200))
REGIONS = ("eu", "us", "apac")
TIERS = ("free", "team", "enterprise")
TYPES = (
    "TimeoutError",
    "ValueError",
    "ConnectionError",
    "shop.errors.CardDeclined",
    "shop.errors.QuotaExceeded",
    "shop.errors.MailboxFull",
    "KeyError",
    "shop.errors.BadImage",
)
PLACES = ("connect", "read_body", "parse", "authorize", "render")


@dataclass(frozen=True)
class Options:
    """``jobs``: their number. ``now_ms``: the time up to which they were submitted, in ms since the epoch."""

    jobs: int
    seed: int = 7
    now_ms: int = 1_764_547_200_000
    span_ms: int = WEEK_MS


def lives(options: Options) -> Iterator[tuple[str, Life]]:
    """Yield each job's id and state, in the order of submission."""
    rng = random.Random(options.seed)
    offset = 0
    for number in range(options.jobs):
        # The last jobs are the newest; only the newest ones have not ended.
        age = options.span_ms * (options.jobs - number) // options.jobs
        at = options.now_ms - age
        recent = number >= options.jobs * 0.97
        job_id = _uuid7(at, rng)
        yield job_id, _life(rng, at, offset, recent, options.now_ms)
        offset += 4


def error(rng: random.Random, group: int) -> ev.ErrorInfo:
    """Return an error of one of the groups, with other numbers each time."""
    kind, place = TYPES[group % len(TYPES)], PLACES[group // len(TYPES)]
    line = 40 + group
    message = (
        f"{place} failed for order {rng.randrange(10**6)}"
        if group % 3
        else f"no answer from gateway-{rng.randrange(9)}.internal after 30.0 s (request {rng.randrange(1 << 32):08x})"
    )
    trace = (
        "Traceback (most recent call last):\n"
        f'  File "/srv/shop/tasks.py", line {line}, in run_{group}\n    {place}(order)\n'
        f'  File "/srv/shop/gateway.py", line {line + 77}, in {place}\n    raise {kind.rpartition(".")[2]}(message)\n'
        f"{kind}: {message}\n"
    )
    return ev.ErrorInfo(kind, message, trace)


def _life(rng: random.Random, at: int, offset: int, recent: bool, now_ms: int) -> Life:
    task, queue = TASKS[min(int(rng.expovariate(0.55)), len(TASKS) - 1)]
    key = f"customer-{rng.randrange(KEYS)}" if rng.random() < 0.3 else None
    tags = {"tenant": rng.choice(TENANTS), "region": rng.choice(REGIONS), "tier": rng.choice(TIERS)}
    spec = ev.JobSpec(b"{}", tags if rng.random() < 0.6 else {})
    version = VERSIONS[min(3, max(0, int((at - now_ms + WEEK_MS) / WEEK_MS * 4)))]
    chance = rng.random()
    waited, ran = int(rng.expovariate(1 / 400)), int(rng.expovariate(1 / 900)) + 3
    started = ev.JobStarted(
        f"worker-{rng.randrange(8)}:{4000 + rng.randrange(8)}", version, {}, f"shop.jobs.{queue}", 0
    )
    facts: list[tuple[int, ev.Fact, int]] = []
    delay = 3_600_000 if recent and chance < 0.12 else None
    facts.append((at, ev.JobSubmitted(spec, delay_ms=delay), 1))
    begin, end = at + waited, at + waited + ran
    if recent and chance < 0.5:
        if chance >= 0.12:
            facts += _open(rng, chance, begin, end, started)
    elif chance > 0.95:
        failed = error(rng, min(int(rng.expovariate(0.12)), GROUPS - 1))
        facts += [(begin, started, 1), (end, ev.JobFailedFact("exhausted", failed, ran * 1000), 1)]
    elif chance > 0.945:
        facts.append((begin, ev.JobCancelledFact("alice@ops", "not needed any more"), 1))
    elif chance > 0.942:
        facts.append((begin + 60_000, ev.JobExpiredFact((begin + 60_000) * 1000), 1))
    else:
        facts += [(begin, started, 1), (end, ev.JobSucceeded(b'{"ok":true}' if chance < 0.3 else None, ran * 1000), 1)]
    return _joined(facts, task, queue, key, offset, delay)


def _open(
    rng: random.Random, chance: float, begin: int, end: int, started: ev.JobStarted
) -> list[tuple[int, ev.Fact, int]]:
    """Return the facts of a job that has not ended, beside its submission: most of these jobs are queued."""
    if chance < 0.40:
        return []
    if chance < 0.46:
        retried = ev.JobRetried(error(rng, rng.randrange(GROUPS)), 900_000, 5_000)
        return [(begin, started, 1), (end, retried, 1)]
    if chance < 0.47:
        return [(begin, started, 1), (end, ev.JobProgressed(1, rng.randrange(90), 100, "unpacking"), 1)]
    return []


def _joined(
    facts: Sequence[tuple[int, ev.Fact, int]], task: str, queue: str, key: str | None, offset: int, delay: int | None
) -> Life:
    life: Life | None = None
    for number, (at, fact, attempt) in enumerate(facts):
        topic = ("shop.coordination" if delay else f"shop.jobs.{queue}") if number == 0 else "shop.lifecycle"
        release = 0 if number == 0 and delay else 1
        life = job.join(
            life, job.of(1, release, attempt, task, queue, key, fact, (at, topic, offset % 6, offset + number))
        )
    assert life is not None
    return life


def _uuid7(at_ms: int, rng: random.Random) -> str:
    digits = f"{at_ms:012x}7{rng.randrange(1 << 12):03x}{8 + rng.randrange(4):x}{rng.randrange(1 << 60):015x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def fill(url: str, namespace: str, options: Options, *, tell: bool = False, with_offsets: bool = True) -> None:
    """Write the jobs. ``with_offsets``: as if they had been read from a log; without, a materializer can continue with a
    new log. Raises `StoreError`."""
    began = time.monotonic()
    with open_store(url, namespace) as store:
        if not store.acquire():
            raise SystemExit(f"another process writes {url}")
        folder = RowFolder(store, Decoder(), cache_jobs=1)
        chunk: list[tuple[str, Life]] = []
        written = 0

        def write() -> None:
            nonlocal written
            folded = folder.merge(chunk)
            if with_offsets:
                folded.changes.offsets[("shop.lifecycle", 0)] = 4 * (written + len(chunk))
            store.write(folded.changes)
            store.renew()
            written += len(chunk)
            chunk.clear()
            if tell:
                rate = written / (time.monotonic() - began)
                print(f"\r{written:,} of {options.jobs:,} jobs, {rate:,.0f}/s ", end="", file=sys.stderr, flush=True)

        for each in lives(options):
            chunk.append(each)
            if len(chunk) >= CHUNK:
                write()
        if chunk:
            write()
    if tell:
        print(file=sys.stderr)


def main() -> int:
    """Fill a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="JOBLEDGER_STATUS_URL of an empty table")
    parser.add_argument("--namespace", default="shop")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--without-offsets", action="store_true", help="so that a materializer can continue")
    given = parser.parse_args()
    options = Options(given.jobs, given.seed, round(time.time() * 1000))
    fill(given.url, given.namespace, options, tell=True, with_offsets=not given.without_offsets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
