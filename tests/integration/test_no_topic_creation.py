"""With a broker that creates missing topics on request, no part of Jobledger creates a topic, except `jobledger topics
apply`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from jobledger import App, Settings, TopicMissing
from jobledger.cli.main import main
from jobledger.consumers.router.router import Router
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.errors import JobledgerError
from jobledger.kafka import cluster
from jobledger.kafka.topics import ensure
from jobledger.log.writer import Outgoing
from jobledger.streams.coordinator.coordinator import Coordinator
from jobledger.streams.coordinator.faust.async_producer import AckedWriter, first_error
from jobledger.streams.coordinator.faust.faust_app import Options
from jobledger.streams.status.materializer import Materializer
from tests.brokers import Brokers
from tests.integration.worker_app import until

pytestmark = pytest.mark.kafka


class Happened(msgspec.Struct, frozen=True):
    what: str


@pytest.fixture(scope="module")
def creating_broker() -> Iterator[str]:
    """Yield a broker that creates missing topics on request, which is Kafka's default."""
    with Brokers(config={"auto.create.topics.enable": "true"}) as brokers:
        yield brokers.bootstrap


def built(namespace: str, bootstrap: str, home: Path) -> App:
    app = App(namespace, settings=Settings(bootstrap=bootstrap, submit_timeout=60.0, home=home), partitions=2)

    @app.task
    def add(a: int) -> int:
        return a

    app.event(Happened)

    @app.on(Happened)
    def note(event: Happened) -> str:
        return event.what

    return app


def topics_of(app: App) -> list[str]:
    client = AdminClient({"bootstrap.servers": app.settings.resolve_bootstrap()})
    return sorted(name for name in client.list_topics(timeout=20).topics if name.startswith(app.names.namespace))


def test_the_broker_of_these_tests_creates_requested_topics(creating_broker: str, namespace: str) -> None:
    """The broker of these tests really creates a requested topic. Otherwise the tests below would prove nothing."""
    Producer({"bootstrap.servers": creating_broker}).list_topics(f"{namespace}-x", timeout=20)
    client = AdminClient({"bootstrap.servers": creating_broker})
    until(lambda: f"{namespace}-x" in client.list_topics(timeout=20).topics)


def test_checks_of_the_connection_create_no_topic(creating_broker: str) -> None:
    """Even a client that allows the creation of topics creates none in these checks, because they use a name that every
    broker refuses."""
    client = AdminClient({"bootstrap.servers": creating_broker})
    before = client.list_topics(timeout=20).topics.keys()
    for _ in range(2):
        assert cluster.answers(client, 20.0)
        assert len(cluster.describe(client, 20.0).brokers) == 1
    assert client.list_topics(timeout=20).topics.keys() - before == set()


def submit(app: App) -> None:
    app.tasks["add"].submit(1)


def submit_async(app: App) -> None:
    asyncio.run(app.tasks["add"].submit_async(1))


def submit_many(app: App) -> None:
    app.submit_many(app.tasks["add"].job(n) for n in range(3))


def submit_later(app: App) -> None:
    app.tasks["add"].using(delay=60).submit(1)


def emit(app: App) -> None:
    app.emit(Happened("x"))


def emit_many(app: App) -> None:
    app.emit_many([Happened("x"), Happened("y")])


def cancel(app: App) -> None:
    app.cancel("0190b5a4-0000-7000-8000-000000000000")


def pause(app: App) -> None:
    app.pause(queue="default")


def work(app: App) -> None:
    Worker(app.registry, app.settings, WorkerOptions(start_timeout=20.0)).run()


def route(app: App) -> None:
    Router(app.registry, app.settings).run(threading.Event())


def coordinate(app: App) -> None:
    asyncio.run(Coordinator(app.names, app.settings, partitions=2, options=Options(patience=20.0)).run())


def read_on(app: App) -> None:
    with app.lifecycle(group="readers") as stream:
        next(iter(stream))


@pytest.mark.parametrize(
    "use",
    [submit, submit_async, submit_many, submit_later, emit, emit_many, cancel, pause, work, route, coordinate, read_on],
)
def test_a_missing_topic_is_an_error_that_says_what_to_do(
    creating_broker: str, namespace: str, tmp_path: Path, use: Callable[[App], None]
) -> None:
    """In a namespace without topics, every part ends with `TopicMissing`, and no topic exists afterwards."""
    app = built(namespace, creating_broker, tmp_path)
    try:
        with pytest.raises(TopicMissing, match="jobledger topics apply"):
            use(app)
    finally:
        app.close()
    assert topics_of(app) == []


APP = """\
from jobledger import App
app = App({namespace!r}, partitions=2)

@app.task
def add(a: int) -> int:
    return a

@app.event
class Happened:
    what: str

@app.on(Happened)
def note(event: Happened) -> str:
    return event.what
"""


def test_no_command_creates_a_topic(
    creating_broker: str,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each command that needs a topic fails and names the command that creates topics. The materializer waits for the
    topics. No topic is created."""
    (tmp_path / f"app_{namespace}.py").write_text(APP.format(namespace=namespace))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOBLEDGER_BOOTSTRAP", creating_broker)
    monkeypatch.setenv("JOBLEDGER_HOME", str(tmp_path))
    app = built(namespace, creating_broker, tmp_path)
    target, url = f"app_{namespace}:app", app.settings.resolve_status_url(namespace)

    stop = threading.Event()
    materializer = threading.Thread(
        target=Materializer(app.names, app.settings, ["default"], url).run, args=(stop,), name="materializer"
    )
    materializer.start()
    try:
        until(lambda: "waiting for topics that do not exist yet" in caplog.text)
    finally:
        stop.set()
        materializer.join(60)

    commands = (
        f"submit {target} add a=1",
        f"emit {target} Happened what=x",
        f"check {target}",
        f"verify {target}",
        f"rebuild {target} --yes",
        f"backfill {target} note",
        f"events tail --namespace {namespace}",
        f"queues list {target}",
        f"queues pause {target} default",
    )
    for words in commands:
        capsys.readouterr()
        assert main(words.split()), words
        assert "topics apply" in capsys.readouterr().err, words
    assert main(["topics", "plan", target]) == 0
    assert topics_of(app) == []


def test_no_producer_of_aiokafka_creates_a_topic(creating_broker: str, namespace: str, tmp_path: Path) -> None:
    """A record of the coordinator for a missing topic results in `TopicMissing`."""
    app = built(namespace, creating_broker, tmp_path)
    assert isinstance(asyncio.run(_first_error(app)), TopicMissing)
    assert topics_of(app) == []


async def _first_error(app: App) -> JobledgerError | None:
    writer = AckedWriter(app.settings, {}, patience=3.0)
    await writer.start()
    try:
        return first_error(await (await writer.post([Outgoing(app.names.jobs("x"), b"v", "k")])))
    finally:
        await writer.stop(2.0)


def test_topics_deleted_under_running_parts_stay_deleted(creating_broker: str, namespace: str, tmp_path: Path) -> None:
    """A coordinator and a client request the topics again after they were deleted, and create none of them."""
    app = built(namespace, creating_broker, tmp_path)
    ensure(app, app.settings)
    asyncio.run(_deleted_meanwhile(app))
    assert topics_of(app) == []


async def _deleted_meanwhile(app: App) -> None:
    coordinator = Coordinator(app.names, app.settings, partitions=2, options=Options(patience=10.0))
    running = asyncio.create_task(coordinator.run())
    try:
        while not coordinator.health()["ready"]:
            assert not running.done(), running
            await asyncio.sleep(0.05)
        await asyncio.to_thread(submit, app)
        await asyncio.to_thread(submit_later, app)
        there = topics_of(app)
        client = AdminClient({"bootstrap.servers": app.settings.resolve_bootstrap()})
        for done in client.delete_topics(there).values():
            done.result(30)
        until(lambda: topics_of(app) == [])
        known = coordinator._app.consumer._thread._consumer._client.cluster
        while app.names.coordination in known.topics():  # until its consumer has new metadata
            await asyncio.sleep(0.05)
        with pytest.raises(TopicMissing, match="jobledger topics apply"):
            await asyncio.to_thread(submit, app)
    finally:
        coordinator.stop()
        await asyncio.wait([running], timeout=60)
        app.close()
    assert running.done()
    running.exception()
