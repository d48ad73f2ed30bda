"""Which broker the tests run against, decided once per process and said in the summary.

The environment's (``JOBLEDGER_BOOTSTRAP``), else a container where a Docker engine answers and has, or can pull, the
image ``JOBLEDGER_TEST_KAFKA_IMAGE``, else the embedded broker. A run without broker tests starts none.

The PostgreSQL server is the environment's (``JOBLEDGER_TEST_POSTGRES``), else one of our own (`tests.postgres`); where
there is none, the tests that need one are skipped and the summary says why.

The Schema Registry is the environment's (``JOBLEDGER_TEST_REGISTRY``); without it the tests that need one are skipped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from hypothesis import HealthCheck, settings

from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.broker_process import BROKER_CONFIG
from jobledger.kafka.embedded.defaults import KAFKA_VERSION, START_TIMEOUT_S
from jobledger.kafka.embedded.ports import free_port
from jobledger.process import forks
from jobledger.process.logger import write_errors_to
from tests.patience import PATIENCE
from tests.postgres import Databases, NoPostgres, Server, databases

DEFAULT_IMAGE = "apache/kafka:4.1.0"
ENGINE_TIMEOUT_S = 5
CONTAINER_TIMEOUT_S = 60 * PATIENCE

Found = TypeVar("Found")

# An example's time says how busy the machine is: brokers and workers of other tests run beside it.
settings.register_profile("jobledger", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jobledger")

# Brokers of tests live for a minute: a quick compiler boots them with half the CPU time of a thorough one.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")

# A shell ignores SIGINT for what it runs in the background, and each process hands that on to those it starts: tests that
# send it to a process would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Files of acceptance tests in a row, which keep the CPUs busy, and then of integration tests, which wait.
BUSY, WAITING = 2, 5

#: What changes the whole process as soon as it is imported: tests of it run in processes of their own, and look with
#: `importlib.util.find_spec` whether it is installed.
OUTSIDE = ("eventlet", "gevent")
#: Seconds within which the threads of a file's tests must have ended.
THREADS_END_S = 30.0 * PATIENCE

SAID = "jobledger-said"
_said: list[str] = []


class NoContainer(Exception):
    """Why the broker does not come from a container."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that none is left alone at the end, and never too many of the busy ones at the same time."""
    files: dict[str, dict[Path, list[pytest.Item]]] = {}
    for item in items:
        files.setdefault(item.path.parent.name, {}).setdefault(item.path, []).append(item)
    busy, waiting = (list(files.pop(folder, {}).values()) for folder in ("acceptance", "integration"))
    order: list[list[pytest.Item]] = []
    while busy or waiting:
        order += busy[:BUSY] + waiting[:WAITING]
        del busy[:BUSY], waiting[:WAITING]
    order += [each for folder in files.values() for each in folder.values()]
    items[:] = [item for file in order for item in file]


_excepthook = sys.excepthook
_stayed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """A test leaves nothing in this process that changes how later ones run."""
    yield
    # A command that was called in this process has set these, as in a process of its own.
    write_errors_to(None)
    sys.excepthook = _excepthook
    _fail_for({name for name in OUTSIDE if name in sys.modules}, "modules that change the whole process")
    if nextitem is None or nextitem.path != item.path:
        _fail_for(_threads_left(), "threads that keep it from ending")


def _threads_left() -> set[str]:
    deadline = time.monotonic() + THREADS_END_S
    left = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {thread.name for thread in left if thread.is_alive()}


def _fail_for(stays: set[str], what: str) -> None:
    new = stays - _stayed
    _stayed.update(new)  # said once, of the first
    if new:
        pytest.fail(
            f"this test, or one before it in its file, leaves {what} in pytest's process: {', '.join(sorted(new))}"
        )


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """``host:port`` of a real broker that every test of this process shares; use `namespace` to keep apart."""
    given = os.environ.get("JOBLEDGER_BOOTSTRAP")
    if given:
        _say(request.config, f"broker: {given} (JOBLEDGER_BOOTSTRAP)")
        yield given
        return
    with ExitStack() as stack:
        try:
            address, image = _container(stack)
            _say(request.config, f"broker: {address} (container {image})")
        except NoContainer as reason:
            kafka = stack.enter_context(EmbeddedKafka(timeout=PATIENCE * START_TIMEOUT_S))
            address = kafka.bootstrap
            _say(request.config, f"broker: {address} (embedded Kafka {KAFKA_VERSION}; no container: {reason})")
        yield address
        # Clients that tests left open would look for this broker, and log that it is away, until the process ends.
        forks.close_all(1.0)


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """A real PostgreSQL server that every test of this process shares; each takes a database of its own."""
    with ExitStack() as stack:
        found = _or_skip(request.config, "postgresql", lambda: stack.enter_context(databases()))
        _say(request.config, f"postgresql: {found.what}")
        yield found


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A PostgreSQL server of the test's own, which it may stop and start."""
    with ExitStack() as stack:
        yield _or_skip(request.config, "postgresql to be stopped", lambda: stack.enter_context(Server()))


def _or_skip(config: pytest.Config, what: str, start: Callable[[], Found]) -> Found:
    try:
        return start()
    except NoPostgres as why:
        line = f"{what}: none; {why}"
        if line not in _said:
            _say(config, line)
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def registry_url(request: pytest.FixtureRequest) -> str:
    """The URL of a real Schema Registry that every test shares; subjects begin with the
    namespace, which keeps apart."""
    given = os.environ.get("JOBLEDGER_TEST_REGISTRY")
    if not given:
        why = "no Schema Registry: set JOBLEDGER_TEST_REGISTRY to the URL of one, for its tests to run"
        _say(request.config, f"registry: none; {why}")
        pytest.skip(why)
    _say(request.config, f"registry: {given} (JOBLEDGER_TEST_REGISTRY)")
    return given


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses, so tests may share a broker."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts a line into the summary at the session's end, and at once where it can be seen."""
    return lambda line: _say(request.config, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which broker was used and what tests had to say, also when that has scrolled away."""
    for line in _said:
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """What was said in a process of pytest-xdist's is said here, in the one that writes the summary."""
    _said.extend(getattr(node, "workeroutput", {}).get(SAID, ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what was said, if this is a process of pytest-xdist's."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[SAID] = list(_said)


def _say(config: pytest.Config, line: str) -> None:
    _said.append(line)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(line)


def _container(stack: ExitStack) -> tuple[str, str]:
    image = os.environ.get("JOBLEDGER_TEST_KAFKA_IMAGE", DEFAULT_IMAGE)
    if not image:
        raise NoContainer("JOBLEDGER_TEST_KAFKA_IMAGE is empty")
    # A library's deprecations on the way to a container are not this project's failures.
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    try:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient

        DockerClient(timeout=ENGINE_TIMEOUT_S).client.ping()
    except ImportError as missing:
        raise NoContainer(f"the package {missing.name!r} is not installed") from missing
    except Exception as error:  # whatever an engine that is away or out of reach makes its client raise
        raise NoContainer(f"no Docker engine answers ({type(error).__name__})") from error

    try:
        host = DockerClient().host()
        port = free_port()
        # Advertised to clients outside the container, so the port is the same on both sides.
        container = DockerContainer(image).with_bind_ports(port, port)
        for key, value in _container_config(host, port).items():
            container.with_env("KAFKA_" + key.upper().replace(".", "_"), value)
        container.with_env("JAVA_TOOL_OPTIONS", os.environ["JAVA_TOOL_OPTIONS"])
        container.start()
    except Exception as error:  # an image that cannot be had, a port that cannot be bound
        raise NoContainer(f"image {image} does not start ({str(error).splitlines()[0][:160]})") from error
    stack.callback(container.stop)
    address = f"{host}:{port}"
    admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
    deadline = time.monotonic() + CONTAINER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if admin.list_topics(timeout=5).brokers:
                return address, image
        except KafkaException:
            pass  # not up yet
    out, err = container.get_logs()
    end = (out + err).decode("utf-8", "replace")[-2000:]
    raise NoContainer(f"image {image} did not answer within {CONTAINER_TIMEOUT_S:g} s; the end of its log:\n{end}")


def _container_config(host: str, port: int) -> dict[str, str]:
    return {
        **BROKER_CONFIG,
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": "1@localhost:19093",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "listeners": f"PLAINTEXT://0.0.0.0:{port},CONTROLLER://localhost:19093",
        "advertised.listeners": f"PLAINTEXT://{host}:{port}",
    }
