"""Chooses the servers that the tests use, once per process; the summary names them.

The broker: the one at ``JOBLEDGER_BOOTSTRAP``; else a container, if a Docker engine answers and has, or can pull, the
image ``JOBLEDGER_TEST_KAFKA_IMAGE``; else the embedded broker. A run without broker tests starts no broker.

The PostgreSQL server: the one of ``JOBLEDGER_TEST_POSTGRES``, else one that `tests.postgres` starts. Without either,
the tests that need a server are skipped and the summary says why.

The Schema Registry: the one at ``JOBLEDGER_TEST_REGISTRY``. Without it, the tests that need one are skipped.
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

# No deadline for examples: brokers and workers of other tests make the machine busy, so the time of an example means
# nothing.
settings.register_profile("jobledger", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jobledger")

# Brokers of tests run for about a minute. With the quick compiler only, a broker starts with half the CPU time.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")

# A shell makes its background processes ignore SIGINT, and child processes inherit that. Tests that send SIGINT to a
# process would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Number of files of acceptance tests in a row, which keep the CPUs busy, and of integration tests after them, which
#: mostly wait.
BUSY, WAITING = 2, 5

#: Modules that change the whole process when they are imported. Tests of them run in separate processes, and use
#: `importlib.util.find_spec` to see whether the module is installed.
OUTSIDE = ("eventlet", "gevent")
#: Seconds in which the threads that a file's tests started must have ended.
THREADS_END_S = 30.0 * PATIENCE

SAID = "jobledger-said"
_said: list[str] = []


class NoContainer(Exception):
    """The reason why no container provides the broker."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, so that none of them runs alone at the end. Acceptance tests keep the CPUs busy, so
    only `BUSY` of their files follow each other, and then `WAITING` files of integration tests."""
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
    """Fail if a test leaves something in this process that changes how later tests run."""
    yield
    # A test that calls a command in this process leaves these two changed.
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
    _stayed.update(new)  # reported only once, for the first test
    if new:
        pytest.fail(
            f"this test, or one before it in its file, leaves {what} in pytest's process: {', '.join(sorted(new))}"
        )


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield ``host:port`` of a real broker that all tests of this process share. `namespace` keeps the tests apart."""
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
        # Clients that tests left open would try to connect to this broker and log errors until the process ends.
        forks.close_all(1.0)


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Yield a real PostgreSQL server that all tests of this process share. Each test creates its own database."""
    with ExitStack() as stack:
        found = _or_skip(request.config, "postgresql", lambda: stack.enter_context(databases()))
        _say(request.config, f"postgresql: {found.what}")
        yield found


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Yield a PostgreSQL server that only this test uses, and that the test may stop and start."""
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
    """Return the URL of a real Schema Registry that all tests share. Subjects begin with the namespace, which keeps the
    tests apart."""
    given = os.environ.get("JOBLEDGER_TEST_REGISTRY")
    if not given:
        why = "no Schema Registry: set JOBLEDGER_TEST_REGISTRY to the URL of one, for its tests to run"
        _say(request.config, f"registry: none; {why}")
        pytest.skip(why)
    _say(request.config, f"registry: {given} (JOBLEDGER_TEST_REGISTRY)")
    return given


@pytest.fixture
def namespace() -> str:
    """Return a namespace that no other test uses, so that tests can share a broker."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds a line to the summary at the end of the session, and also prints it at once if
    possible."""
    return lambda line: _say(request.config, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print which servers were used and the lines that tests reported, because earlier output may have scrolled away."""
    for line in _said:
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Collect the lines of a pytest-xdist worker in the main process, which writes the summary."""
    _said.extend(getattr(node, "workeroutput", {}).get(SAID, ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass the reported lines to the main process, if this process is a pytest-xdist worker."""
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
    # Ignore warnings about deprecations in the libraries that start the container: they are no failures of this
    # project.
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    try:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.docker_client import DockerClient

        DockerClient(timeout=ENGINE_TIMEOUT_S).client.ping()
    except ImportError as missing:
        raise NoContainer(f"the package {missing.name!r} is not installed") from missing
    except Exception as error:  # the client raises many types of errors if the engine is unreachable
        raise NoContainer(f"no Docker engine answers ({type(error).__name__})") from error

    try:
        host = DockerClient().host()
        port = free_port()
        # The broker advertises this port to clients outside the container, so the port must be the same on both sides.
        container = DockerContainer(image).with_bind_ports(port, port)
        for key, value in _container_config(host, port).items():
            container.with_env("KAFKA_" + key.upper().replace(".", "_"), value)
        container.with_env("JAVA_TOOL_OPTIONS", os.environ["JAVA_TOOL_OPTIONS"])
        container.start()
    except Exception as error:  # the image cannot be pulled, or the port cannot be bound
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
            pass  # the broker has not started yet
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
