"""BOUNDED_MEMORY: the memory of a worker process does not grow with the number of waiting jobs."""

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
#: Number of jobs of one key, more than a worker reads ahead.
HOT = 200_000
MIB = 1 << 20


@pytest.fixture
def fleet(kafka: EmbeddedKafka, tmp_path: Path) -> Iterator[Fleet]:
    """Yield a namespace without any process. `client` creates its topics."""
    with Fleet(
        tmp_path, kafka.bootstrap, f"m{uuid.uuid4().hex[:10]}", target="tests/acceptance/memory_app.py:app"
    ) as made:
        yield made


def client(fleet: Fleet) -> App:
    """Create the submitter's app of `memory_app`, and its topics."""
    app = App(fleet.namespace, settings=Settings(bootstrap=fleet.bootstrap), partitions=PARTITIONS)
    app.task(name="noop")(memory_app.noop.fn)
    app.task(name="keyed", key="account", timeout=10)(memory_app.keyed.fn)
    ensure(app, app.settings)
    return app


class Group:
    """Asks how far the workers' group has committed. It uses a consumer that never joins the group, because the admin
    client crashes if a broker that has just started answers that it is still loading (confluent-kafka 2.16)."""

    def __init__(self, app: App) -> None:
        about = {"group.id": app.names.worker_group("default")}
        self._asks = Consumer({"bootstrap.servers": app.settings.resolve_bootstrap(), **about})
        self._where = [TopicPartition(app.names.jobs("default"), p) for p in range(PARTITIONS)]

    def done(self) -> int:
        """Return the number of records below the committed offsets."""
        try:
            found = self._asks.committed(self._where, timeout=20)
        except KafkaException:  # the broker is still loading
            return 0
        return sum(max(0, where.offset) for where in found)


def resident(member: Member) -> int:
    """Return the resident memory of a member's process in bytes."""
    return int(psutil.Process(member.pid).memory_info().rss)


def waiting(port: int) -> int:
    """Return the number of records that a worker has received and not started, from its metrics."""
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return int(
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("jobledger_worker_waiting{"))
    )


@pytest.mark.parametrize("backlog", [40_000, pytest.param(300_000, marks=pytest.mark.extended)])
def test_the_memory_of_a_worker_does_not_grow_with_a_backlog(
    fleet: Fleet, say: Callable[[str], None], backlog: int
) -> None:
    """In the second half of a backlog, a worker uses about as much memory as in the first half."""
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
def test_jobs_that_wait_for_their_key_use_limited_memory(fleet: Fleet, say: Callable[[str], None]) -> None:
    """There are 200,000 jobs of a paused keyed task, more than a worker may read ahead. The worker stops reading in
    time."""
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
