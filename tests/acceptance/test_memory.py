"""BOUNDED_MEMORY: what a worker process takes does not grow with what waits for it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from jobledger import App, Settings
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topics import ensure
from tests.acceptance import memory_app
from tests.acceptance.fleet import Fleet, Member
from tests.acceptance.promises import Promise

pytestmark = pytest.mark.kafka

PARTITIONS = 4
#: Jobs of one key, more than a worker looks ahead.
HOT = 200_000
MIB = 1 << 20


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """A namespace with no process yet; its topics come with `client`."""
    with Fleet(
        tmp_path, kafka.bootstrap, f"m{uuid.uuid4().hex[:10]}", target="tests/acceptance/memory_app.py:app"
    ) as made:
        yield made


def client(fleet: Fleet) -> App:
    """The submitter's side of `memory_app`, with its topics."""
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap), partitions=PARTITIONS)
    app.task(name="noop")(memory_app.noop.fn)
    app.task(name="keyed", key="account", timeout=10)(memory_app.keyed.fn)
    ensure(app, app.settings)
    return app


class Group:
    """How far the workers' group is. Asked as a member would be that never joins: the admin client's way crashes where a
    broker that has just started answers that it is still loading (confluent-kafka 2.16)."""

    def __init__(self, app: App) -> None:
        about = {"group.id": app.names.worker_group("default")}
        self._asks = Consumer({"bootstrap.servers": app.settings.resolve_bootstrap(), **about})
        self._where = [TopicPartition(app.names.jobs("default"), p) for p in range(PARTITIONS)]

    def done(self) -> int:
        """Records below the committed offsets."""
        try:
            found = self._asks.committed(self._where, timeout=20)
        except KafkaException:  # still loading
            return 0
        return sum(max(0, where.offset) for where in found)


def resident(member: Member) -> int:
    """Bytes of memory of a member's process."""
    return int(psutil.Process(member.pid).memory_info().rss)


def waiting(port: int) -> int:
    """Records that a worker has received and not begun, by its metrics."""
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return int(
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("jobledger_worker_waiting{"))
    )


@pytest.mark.parametrize("backlog", [60_000, pytest.param(300_000, marks=pytest.mark.extended)])
def test_a_backlog_leaves_the_memory_flat(fleet: Fleet, say: Callable[[str], None], backlog: int) -> None:
    """While a worker drains a backlog, it takes in the second half no more than it took in the first."""
    app = client(fleet)
    for start in range(0, backlog, 20_000):
        app.submit_many(app.tasks["noop"].job(n) for n in range(start, start + 20_000))
    group, halves = Group(app), [0, 0]
    worker = fleet.start("worker")

    def drained() -> bool:
        done = group.done()
        half = done * 2 >= backlog
        halves[half] = max(halves[half], resident(worker))
        return done >= backlog

    fleet.until(drained, 240, f"{backlog:,} jobs done")
    assert fleet.stop(worker) == 0
    first, second = halves
    say(f"memory: a worker that drains {backlog:,} jobs takes {first / MIB:.0f} MiB, then {second / MIB:.0f} MiB")
    Promise.BOUNDED_MEMORY.hold(0 < second < first * 1.3, f"{first:,} bytes became {second:,}")
    Promise.BOUNDED_MEMORY.hold(second < 320 * MIB, f"{second:,} bytes")
    app.close()


@pytest.mark.extended
def test_what_waits_for_its_key_takes_a_bounded_share(fleet: Fleet, say: Callable[[str], None]) -> None:
    """200,000 jobs of a keyed task that is paused, more than a worker may look ahead: it stops reading in time."""
    app = client(fleet)
    app.pause(task="keyed", reason="to see what it takes")
    port = free_port()
    worker = fleet.start("worker", "--metrics-port", str(port))
    first = app.submit_many(app.tasks["noop"].job(n) for n in range(1_000))
    group = Group(app)
    fleet.until(lambda: group.done() >= len(first), 60, "the first jobs done")
    before = resident(worker)
    for start in range(0, HOT, 50_000):
        handles = app.submit_many(app.tasks["keyed"].job("hot", n) for n in range(start, start + 50_000))
    most = seen = 0

    def read_no_further() -> bool:
        nonlocal most, seen
        most, seen, last = max(most, resident(worker)), waiting(port), seen
        return seen > 50_000 and seen == last

    fleet.until(read_no_further, 120, "as much waits as may")
    assert seen < HOT
    done = group.done()
    others = app.submit_many(app.tasks["noop"].job(n) for n in range(1_000))
    hot = handles[0].position.partition
    least = done + sum(h.position.partition != hot for h in others)
    fleet.until(lambda: group.done() >= least, 60, "the jobs of other partitions")
    most = max(most, resident(worker))
    say(
        f"memory: {seen:,} of {HOT:,} jobs that wait for their key are looked at, and take {(most - before) / MIB:.0f} MiB"
    )
    Promise.BOUNDED_MEMORY.hold(most - before < 192 * MIB, f"{before:,} bytes became {most:,}")
    app.close()
