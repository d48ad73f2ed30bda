"""``jobledger backfill`` as a command: its bounds, its rate, its output, and a kill -9."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobledger import App, Settings
from jobledger.definitions.handles import EventHandle
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobSubmitted
from jobledger.streams.status.materializer import Materializer
from tests.integration.worker_app import log_of, until
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

APP = """\
from dataclasses import dataclass

from jobledger import App

app = App({namespace!r}, partitions=2)


@app.event
@dataclass(frozen=True)
class Registered:
    number: int


@app.on(Registered, queue="crm")
async def sync_crm(event: Registered) -> None: ...
"""


@dataclass(frozen=True)
class Registered:
    """The event of the app above."""

    number: int


class Shop:
    """An app in a folder, a materializer that writes its status table, and a client that emits events."""

    def __init__(self, broker: str, namespace: str, folder: Path) -> None:
        self._folder = folder
        (folder / f"shop_{namespace}.py").write_text(APP.format(namespace=namespace))
        self.target, url = f"shop_{namespace}:app", f"sqlite:///{folder / 'status.db'}"
        self._env = {**os.environ, "JOBLEDGER_BOOTSTRAP": broker, "JOBLEDGER_STATUS_URL": url}
        self.app = App(namespace, settings=Settings(bootstrap=broker, status_url=url), partitions=2)
        self.app.event(Registered)

        @self.app.on(Registered, queue="crm")
        async def sync_crm(event: Registered) -> None: ...

        ensure(self.app, self.app.settings)
        self._stop = threading.Event()
        self.table = Materializer(self.app.names, self.app.settings, ["crm"], url)
        self._thread = threading.Thread(target=self.table.run, args=(self._stop,))
        self._thread.start()
        until(lambda: self.table.active)

    def backfill(self, *words: str) -> subprocess.Popen[str]:
        """Start ``jobledger backfill`` for the handler."""
        argv = [sys.executable, "-m", "jobledger", "backfill", self.target, "sync_crm", *words]
        return subprocess.Popen(
            argv, cwd=self._folder, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words: str) -> tuple[str, str]:
        """Run ``jobledger backfill`` to its end, which must be successful. Return its output and its errors."""
        process = self.backfill(*words)
        out, err = process.communicate(timeout=PATIENCE * 90)
        assert process.returncode == 0, err
        return out, err

    def jobs(self) -> Counter[str]:
        """Return how often each of the handler's jobs was submitted."""
        records = log_of(self.app, self.app.names.jobs("crm"))
        return Counter(r.event.job_id for r in records if isinstance(r.event.fact, JobSubmitted))

    def expected_jobs(self, handles: list[EventHandle]) -> Counter[str]:
        """Return the jobs that these events must have, once each."""
        return Counter(self.app.registry.handler("sync_crm").job_id(h.event_id) for h in handles)

    def close(self) -> None:
        """Stop everything."""
        self._stop.set()
        self._thread.join(20)
        self.app.close()


@pytest.fixture
def shop(broker: str, namespace: str, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(broker, namespace, tmp_path)
    yield made
    made.close()


def test_only_events_within_the_bounds_become_jobs(shop: Shop) -> None:
    """``--from`` and ``--to`` choose the events. ``--dry-run`` prints their number and submits nothing. A wrong time or
    rate is an error at once."""
    handles: list[EventHandle] = []
    bounds: list[str] = []
    for part in range(3):
        handles += shop.app.emit_many(Registered(100 * part + n) for n in range(20))
        time.sleep(0.05)
        bounds.append(dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"))
        time.sleep(0.05)
    within = ("--from", bounds[0], "--to", bounds[1])
    out, _ = shop.run(*within, "--dry-run")
    assert re.search(r"would submit +20 jobs", out)
    assert not shop.jobs()
    out, _ = shop.run(*within, "--rate", "1000/s", "--json")
    told = json.loads(out)
    assert (told["done"], told["resumed"], told["dry_run"]) == (True, False, False)
    assert (told["events"], told["submitted"], told["known"]) == (20, 20, 0)
    assert shop.jobs() == shop.expected_jobs(handles[20:40])
    until(shop.table.caught_up)
    out, _ = shop.run()
    assert re.search(r"submitted +40 jobs", out)
    assert re.search(r"already known +20 jobs", out)
    assert shop.jobs() == shop.expected_jobs(handles)
    for words, why in ((("--from", "yesterday"), "neither an age"), (("--rate", "fast"), "50/s")):
        process = shop.backfill(*words)
        assert why in process.communicate(timeout=PATIENCE * 60)[1]
        assert process.returncode != 0


def test_a_killed_backfill_continues_and_submits_each_job_once(shop: Shop, say: Callable[[str], None]) -> None:
    """The command is killed after it has printed its progress. The same command continues there, at its own rate,
    within the range of the first one."""
    handles = shop.app.emit_many(Registered(n) for n in range(600))
    began = time.monotonic()
    process = shop.backfill("--rate", "20/s")  # takes half a minute without the kill
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.match(r"sync_crm: (\d+) of 600 events read, (\d+) jobs submitted, 0 already known", line)
    assert found, line
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert 0 < int(found[1]) < 600
    assert int(found[2]) <= 20 * (time.monotonic() - began + 1), "within its pace"
    shop.app.emit(Registered(1_000))  # after the range of the first command, so its job is left to the router
    first = len(shop.jobs())  # includes what the process had sent before it was killed
    assert int(found[2]) <= first < 600
    until(shop.table.caught_up)
    out, _ = shop.run("--rate", "12000/min", "--json")
    told = json.loads(out)
    assert (told["done"], told["resumed"]) == (True, True)
    assert first + told["submitted"] == 600
    assert shop.jobs() == shop.expected_jobs(handles)
    say(f"backfill: killed after {first} of 600 jobs, gone on, each submitted once")
