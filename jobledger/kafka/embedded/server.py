"""The embedded broker: real Apache Kafka in KRaft mode as one child process, for development and tests.

This module owns ``<home>/kafka`` (pid file, settings, logs and, by default, data). Unless ``detach`` is False, a broker
keeps running after the process that called `start` has ended, and other processes find the broker through the pid file.
`jobledger.kafka.embedded.jars` downloads the jars, and `jobledger.kafka.topics` creates topics. The broker is not for
production: it is one node, has no replication, and listens on the loopback address only.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobledger.errors import ConfigError, KafkaStartFailed
from jobledger.kafka.embedded import broker_process, ports
from jobledger.kafka.embedded.defaults import (
    HEAP_MB,
    HOST,
    KAFKA_VERSION,
    PORT,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    default_home,
)
from jobledger.kafka.embedded.jars import Progress, classpath
from jobledger.process.extras import missing
from jobledger.process.file_lock import locked

try:
    import psutil
except ImportError as exc:
    raise missing("kafka", exc) from exc


@dataclass(frozen=True, slots=True)
class KafkaStatus:
    """The state of the embedded broker of one home folder.

    ``bootstrap``: the broker's address as ``host:port``. ``data``: the data folder. ``uptime``: seconds since the
    process was started. ``log``: the broker's log file, whether the broker runs or not. If ``running`` is False,
    ``pid``, ``port``, ``bootstrap``, ``version`` and ``uptime`` are None.
    """

    running: bool
    pid: int | None
    port: int | None
    bootstrap: str | None
    data: Path
    version: str | None
    uptime: float | None
    log: Path

    def as_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def running_bootstrap(home: Path) -> str | None:
    """Return the address of this home's broker; None if its process does not run or its port does not answer."""
    broker = broker_process.running(broker_process.Files.of(home))
    return f"{HOST}:{broker.port}" if broker is not None and ports.answers(broker.port) else None


def status(home: Path) -> KafkaStatus:
    """Return the state of this home's broker."""
    files = broker_process.Files.of(home)
    broker = broker_process.running(files)
    if broker is None:
        return KafkaStatus(False, None, None, None, files.data, None, None, files.log)
    return KafkaStatus(
        running=True,
        pid=broker.process.pid,
        port=broker.port,
        bootstrap=f"{HOST}:{broker.port}",
        data=broker.data,
        version=broker.version,
        uptime=max(0.0, time.time() - broker.process.create_time()),
        log=files.log,
    )


def start(
    home: Path,
    *,
    port: int = PORT,
    data: Path | None = None,
    heap_mb: int = HEAP_MB,
    version: str = KAFKA_VERSION,
    detach: bool = True,
    progress: Progress | None = None,
    config: Mapping[str, str] | None = None,
    timeout: float = START_TIMEOUT_S,
    jars: Path | None = None,
) -> KafkaStatus:
    """Start this home's broker and return its state once it answers. If the broker already runs, return its state.

    * ``port``: 0 means a free port.
    * ``data``: the data folder, by default ``<home>/kafka/data``. It is formatted at the first use, and kept.
    * ``heap_mb``: the JVM's heap in MB.
    * ``version``: the version of Apache Kafka.
    * ``detach``: with False the broker is stopped when the calling process ends, even if that process is killed.
    * ``progress``: called at each step of the start.
    * ``config``: settings that add to and override `jobledger.kafka.embedded.broker_process.BROKER_CONFIG`.
    * ``timeout``: seconds from the start of the process to its first answer, without the download of the jars.
    * ``jars``: the folder of the jars, by default ``<home>/jars``.

    Raises `PortTaken` if another process uses the port. Raises `ConfigError` if this home's broker runs with another
    port or data folder, or if ``config`` has a setting that must not be changed. Raises `KafkaStartFailed` if the jars
    cannot be downloaded, or, with the end of the log, if the broker does not start.
    """
    files = broker_process.Files.of(home)
    report: Progress = progress or (lambda step, done, total: None)
    wanted_data = (data.expanduser().absolute() if data is not None else files.data).resolve()
    broker_process.check_config(port, wanted_data, config or {})
    files.root.mkdir(parents=True, exist_ok=True)
    try:
        # This timeout is longer than a start may take, so that a second caller gets the first caller's broker, not an
        # error.
        with locked(files.lock, timeout + 60):
            broker = broker_process.running(files)
            if broker is None:
                if port:
                    ports.check_free(port)
                path = classpath(jars or home.expanduser().absolute() / "jars", version, report)
                wanted = broker_process.Launch(
                    path, port or ports.free_port(), wanted_data, heap_mb, version, config or {}
                )
                broker_process.launch(files, wanted, detach=detach, timeout=timeout, report=report)
            elif port not in (0, broker.port) or (data is not None and broker.data != wanted_data):
                raise ConfigError(
                    f"the embedded broker of {home} already runs on port {broker.port} with data in {broker.data} "
                    f"(pid {broker.process.pid}), not on port {port} with {wanted_data}: stop it first with "
                    "`jobledger kafka stop`, or use another JOBLEDGER_HOME"
                )
    except TimeoutError as error:
        raise KafkaStartFailed(
            f"another process is still starting or stopping the broker of {home}: {error}. Wait, or end that process"
        ) from error
    return status(home)


def stop(home: Path, timeout: float = STOP_TIMEOUT_S) -> bool:
    """Stop this home's broker cleanly, and kill it if it still runs after ``timeout`` seconds.

    Return False if no broker ran.
    """
    files = broker_process.Files.of(home)
    if not files.pid.exists():
        return False
    with locked(files.lock):
        broker = broker_process.running(files)
        if broker is not None:
            broker_process.end(broker.process.pid, timeout)
        files.pid.unlink(missing_ok=True)
    return broker is not None


def wait(home: Path) -> int | None:
    """Wait until this home's broker has ended. Return its exit code; None if the code is not known or no broker ran.

    The exit code of a broker that was stopped cleanly is 143, the JVM's exit code after SIGTERM.
    """
    broker = broker_process.running(broker_process.Files.of(home))
    return None if broker is None else broker_process.wait(broker.process.pid)


class EmbeddedKafka:
    """A broker for tests and measurements, with methods that cause faults.

    The broker is stopped when the process that called `start` ends. Without ``home``, all files but the jars are in a
    temporary folder that `close` removes. The port is chosen at the first `start` and kept, so clients find the broker
    again after `stop` or `kill`. The other parameters are those of the function `start`, but ``jars`` is by default the
    folder in the user's default home, so that all brokers share the jars. As a context manager, the object starts the
    broker and closes it at the end.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        port: int = 0,
        data: Path | None = None,
        heap_mb: int = HEAP_MB,
        version: str = KAFKA_VERSION,
        config: Mapping[str, str] | None = None,
        jars: Path | None = None,
        progress: Progress | None = None,
        timeout: float = START_TIMEOUT_S,
    ) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix="jobledger-kafka-")) if home is None else None
        self.home = home or self._temporary or default_home()
        self._port = port
        self._data = data
        self._heap_mb = heap_mb
        self._version = version
        self._config = dict(config or {})
        self._jars = jars or default_home() / "jars"
        self._progress = progress
        self._timeout = timeout

    @property
    def bootstrap(self) -> str:
        """The address as ``host:port``, also while the broker does not run.

        Raises `KafkaStartFailed` before the first start if no port was given.
        """
        if not self._port:
            raise KafkaStartFailed("this broker has no address yet: call start() first")
        return f"{HOST}:{self._port}"

    def start(self) -> KafkaStatus:
        """Start the broker, or start it again with the same port and data. Raises what the function `start` raises."""
        started = start(
            self.home,
            port=self._port,
            data=self._data,
            heap_mb=self._heap_mb,
            version=self._version,
            detach=False,
            progress=self._progress,
            config=self._config,
            timeout=self._timeout,
            jars=self._jars,
        )
        assert started.port is not None
        self._port = started.port
        return started

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> bool:
        """Stop the broker cleanly (SIGTERM), and kill it if it still runs after ``timeout`` seconds.

        The data and the port are kept. Return False if the broker did not run.
        """
        return stop(self.home, timeout)

    def kill(self) -> bool:
        """Kill the broker (SIGKILL), as in a crash of the process. Return False if the broker did not run."""
        process = self._process()
        if process is not None:
            broker_process.end(process.pid, timeout=0)
        return process is not None

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): its connections stay open, but the broker does not answer.

        Raises `KafkaStartFailed` if the broker does not run.
        """
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a frozen process (SIGCONT). Raises `KafkaStartFailed` if the broker does not run."""
        self._signal(signal.SIGCONT)

    def status(self) -> KafkaStatus:
        """Return the broker's state."""
        return status(self.home)

    def close(self) -> None:
        """Stop the broker, and remove the temporary folder if there is one."""
        # The data in a temporary folder is not read again, so the broker can be killed.
        self.stop(timeout=0 if self._temporary is not None else STOP_TIMEOUT_S)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _process(self) -> psutil.Process | None:
        broker = broker_process.running(broker_process.Files.of(self.home))
        return None if broker is None else broker.process

    def _signal(self, number: int) -> None:
        process = self._process()
        if process is None:
            raise KafkaStartFailed(f"the embedded broker of {self.home} is not running: call start() first")
        process.send_signal(number)
