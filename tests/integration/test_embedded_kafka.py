"""The embedded broker: how settings find it, how it is started and stopped, and which processes it outlives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # re-exported without __all__
from typer.testing import CliRunner

from jobledger.cli.kafka import app as cli
from jobledger.cli.output import Exit
from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, KafkaStartFailed, PortTaken
from jobledger.kafka import embedded
from jobledger.kafka.embedded import EmbeddedKafka, broker_process, jars
from jobledger.kafka.embedded.defaults import KAFKA_VERSION, default_home
from jobledger.kafka.embedded.ports import free_port
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

JARS = default_home() / "jars"


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    """Yield one broker for all tests that do not change it."""
    with EmbeddedKafka() as running:
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Yield a new home with the shared jars. A broker that still runs in this home is stopped afterwards."""
    (tmp_path / "jars").symlink_to(JARS, target_is_directory=True)
    JARS.mkdir(parents=True, exist_ok=True)
    yield tmp_path
    embedded.stop(tmp_path, timeout=0)


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs ``code``."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def answers(bootstrap: str, timeout: float) -> bool:
    try:
        return bool(AdminClient({"bootstrap.servers": bootstrap, "log_level": 0}).list_topics(timeout=timeout).brokers)
    except KafkaException:
        return False


def test_status_has_address_process_version_and_files(kafka: EmbeddedKafka) -> None:
    """The status of a running broker has its address, process, version and files, and can be written as JSON."""
    found = kafka.status()
    assert found.running
    assert found.bootstrap == kafka.bootstrap == f"127.0.0.1:{found.port}"
    assert found.pid is not None
    assert psutil.pid_exists(found.pid)
    assert found.version == KAFKA_VERSION
    assert found.log.exists()
    assert found.data.is_dir()
    assert json.loads(json.dumps(found.as_dict()))["bootstrap"] == kafka.bootstrap


def test_settings_find_the_broker_of_their_home(kafka: EmbeddedKafka) -> None:
    """Without a configured address, settings use the broker that runs in their home."""
    assert Settings(home=kafka.home).resolve_bootstrap() == kafka.bootstrap


def test_a_fork_of_the_starter_finds_the_broker_and_does_not_stop_it(kafka: EmbeddedKafka) -> None:
    """A forked process asks for the broker's address and exits. The broker still runs, and the parent still holds the
    process that stops the broker with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn, because pytest has threads
        pid = os.fork()
    if pid == 0:
        found = None
        with contextlib.suppress(BaseException):
            found = Settings(home=kafka.home).resolve_bootstrap()
        os._exit(0 if found == kafka.bootstrap else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert kafka.status().running
    assert [leash.poll() for leash in broker_process._leashes.values()] == [None] * len(broker_process._leashes)


def test_without_a_broker_the_error_names_both_ways_to_get_one(tmp_path: Path) -> None:
    """Without an address and without a broker in the home, the error names both ways to get a broker."""
    with pytest.raises(BrokerUnavailable, match=r"JOBLEDGER_BOOTSTRAP.*jobledger kafka start"):
        Settings(home=tmp_path).resolve_bootstrap()


def test_a_second_start_returns_the_running_broker(kafka: EmbeddedKafka) -> None:
    """A start with the broker's own port, or with any port, returns the running broker."""
    before = kafka.status()
    assert before.port is not None
    for port in (before.port, 0):
        assert embedded.start(kafka.home, port=port, jars=JARS).pid == before.pid


def test_a_start_with_another_port_is_refused(kafka: EmbeddedKafka) -> None:
    """The error names both ports and says what to do. The broker continues to run."""
    other = free_port()
    with pytest.raises(ConfigError, match=rf"{kafka.status().port} .*not on port {other} .*jobledger kafka stop"):
        embedded.start(kafka.home, port=other, jars=JARS)
    assert kafka.status().running


def test_a_producer_does_not_create_topics(kafka: EmbeddedKafka) -> None:
    """A producer that writes to a topic which does not exist does not create the topic."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "message.timeout.ms": 500, "log_level": 0})
    producer.produce("nobody.declared.this", b"")
    producer.flush(5)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    assert "nobody.declared.this" not in admin.list_topics(timeout=PATIENCE * 5).topics


def test_a_paused_broker_is_silent_until_resumed(kafka: EmbeddedKafka) -> None:
    """A paused broker answers nothing. A resumed broker answers again."""
    kafka.pause()
    try:
        assert not answers(kafka.bootstrap, timeout=0.5)
    finally:
        kafka.resume()
    assert answers(kafka.bootstrap, timeout=PATIENCE * 20)


def test_the_error_about_a_taken_port_names_the_process(home: Path) -> None:
    """If another process has the port, the error names the port and the process and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} .*process {os.getpid()} .*--port"):
            embedded.start(home, port=port)
    assert not embedded.status(home).running


@pytest.mark.parametrize("port", [-1, 65_536])
def test_an_invalid_port_is_refused(home: Path, port: int) -> None:
    """A number that is not a port is an error of the caller."""
    with pytest.raises(ConfigError, match=f"port={port}"):
        embedded.start(home, port=port)


def test_the_listeners_cannot_be_set(home: Path) -> None:
    """Settings that follow from the port and the folder cannot be set in ``config``."""
    with pytest.raises(ConfigError, match="listeners"):
        embedded.start(home, port=0, config={"listeners": "PLAINTEXT://0.0.0.0:9092"})


def test_the_error_about_a_refused_setting_names_the_setting(home: Path) -> None:
    """The error names the setting that Kafka refused."""
    with pytest.raises(KafkaStartFailed, match=r"log\.retention\.ms"):
        embedded.start(home, port=0, config={"log.retention.ms": "soon"})
    assert not embedded.status(home).running


def test_a_failed_start_shows_the_end_of_the_log(home: Path) -> None:
    """A broker that ends before it answers leaves no process, and the error contains the end of its log."""
    data = home / "broken"
    data.mkdir()
    (data / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=x\n")
    with pytest.raises(KafkaStartFailed, match=r"(?s)exit code \d+ .*node"):
        embedded.start(home, port=0, data=data)
    assert not embedded.status(home).running
    assert embedded.running_bootstrap(home) is None


def test_stopping_nothing_is_no_error(tmp_path: Path) -> None:
    """Stopping a broker that does not run returns False and raises nothing."""
    assert embedded.stop(tmp_path) is False


def test_a_stale_pid_file_counts_as_no_broker(home: Path) -> None:
    """The pid in the file now belongs to another process. This process is not stopped."""
    (home / "kafka").mkdir()
    record = {"pid": os.getppid(), "port": 9092, "data": "x", "version": "4.4.0"}
    (home / "kafka" / "broker.json").write_text(json.dumps(record))
    assert not embedded.status(home).running
    assert embedded.stop(home) is False


def test_a_detached_broker_outlives_its_starter(home: Path) -> None:
    """A detached broker continues when its starter has ended, and any process can stop it."""
    starter = run(
        "import sys; from pathlib import Path; from jobledger.kafka import embedded;"
        "print(embedded.start(Path(sys.argv[1]), port=0).bootstrap)",
        str(home),
    )
    out, _ = starter.communicate(timeout=PATIENCE * 90)
    assert starter.returncode == 0
    assert embedded.running_bootstrap(home) == out.strip()
    assert answers(out.strip(), timeout=PATIENCE * 10)

    pid = embedded.status(home).pid
    assert embedded.stop(home) is True
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert not embedded.status(home).running


def test_a_broker_that_belongs_to_a_process_ends_with_it(tmp_path: Path) -> None:
    """A broker that belongs to a process ends with this process, even if the process is killed."""
    owner = run(
        "import sys, time; from pathlib import Path; from jobledger.kafka.embedded import EmbeddedKafka;"
        "print(EmbeddedKafka(Path(sys.argv[1])).start().pid, flush=True); time.sleep(600)",
        str(tmp_path),
    )
    assert owner.stdout is not None
    with owner.stdout as out:
        kafka = psutil.Process(int(out.readline()))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    gone, alive = psutil.wait_procs([kafka], timeout=PATIENCE * 30)
    assert (gone, alive) == ([kafka], [])


@pytest.mark.extended
def test_data_and_address_survive_a_stop_and_a_kill(tmp_path: Path) -> None:
    """After a clean stop and after a kill, the broker starts again at the same address with all acknowledged records."""
    with EmbeddedKafka(tmp_path) as kafka:
        bootstrap = kafka.bootstrap
        admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
        admin.create_topics([NewTopic("kept", 1, 1)])["kept"].result(10)
        for n, end in enumerate((kafka.stop, kafka.kill)):
            producer = Producer({"bootstrap.servers": bootstrap, "log_level": 0})
            producer.produce("kept", str(n).encode())
            assert producer.flush(10) == 0
            assert end() is True
            assert not kafka.status().running
            kafka.start()
        assert kafka.bootstrap == bootstrap
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "reader", "log_level": 0})
        consumer.assign([TopicPartition("kept", 0, 0)])
        try:
            read = consumer.consume(2, timeout=20)
        finally:
            consumer.close()
        assert [message.value() for message in read] == [b"0", b"1"]


def test_the_command_line_starts_and_stops_the_broker_and_shows_its_status(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`start`, `status` and `stop` use the home of the settings, print JSON and exit with the documented codes."""
    monkeypatch.setenv("JOBLEDGER_HOME", str(home))
    runner = CliRunner()
    assert runner.invoke(cli, ["status", "--json"]).exit_code == Exit.NOT_FOUND
    started = runner.invoke(cli, ["start", "--port", "0", "--json"])
    assert started.exit_code == 0, started.output
    status = runner.invoke(cli, ["status", "--json"])
    assert status.exit_code == 0
    assert json.loads(status.stdout)["bootstrap"] == json.loads(started.stdout)["bootstrap"]
    assert json.loads(runner.invoke(cli, ["stop", "--json"]).stdout) == {"stopped": True}
    assert json.loads(runner.invoke(cli, ["stop", "--json"]).stdout) == {"stopped": False}


class Downloads:
    """Replaces the Maven repository: counts downloads, and creates small jars or raises the given errors."""

    def __init__(self, *failures: Exception) -> None:
        self.count = 0
        self.failures = list(failures)

    def __call__(self, staging: Path, version: str, progress: jars.Progress) -> list[Path]:
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)
        made = [staging / f"{name}-{version}.jar" for name in ("kafka", "log4j")]
        for jar in made:
            with zipfile.ZipFile(jar, "w") as archive:
                archive.writestr("a", "b")
        return made


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Downloads:
    fake = Downloads()
    monkeypatch.setattr(jars, "_download", fake)
    monkeypatch.setattr(jars, "RETRY_PAUSE_S", 0.0)
    return fake


def test_jars_are_fetched_once(tmp_path: Path, downloads: Downloads) -> None:
    """A complete folder is used as it is."""
    first = jars.classpath(tmp_path, "1.0")
    assert jars.classpath(tmp_path, "1.0") == first
    assert downloads.count == 1
    assert all(jar.exists() for jar in first)


@pytest.mark.parametrize("damage", ["missing", "truncated", "marker"])
def test_an_incomplete_folder_is_fetched_again(tmp_path: Path, downloads: Downloads, damage: str) -> None:
    """A folder is not used if a jar is missing or incomplete, or if the marker file is invalid."""
    first = jars.classpath(tmp_path, "1.0")
    if damage == "missing":
        first[0].unlink()
    elif damage == "truncated":
        first[0].write_bytes(first[0].read_bytes()[:-5])
    else:
        (tmp_path / "1.0" / jars.MARKER).write_text('{"jars":')
    again = jars.classpath(tmp_path, "1.0")
    assert downloads.count == 2
    assert all(zipfile.is_zipfile(jar) for jar in again)


def test_a_fetch_that_fails_is_tried_again(tmp_path: Path, downloads: Downloads) -> None:
    """After failed attempts, the download succeeds at a later attempt."""
    downloads.failures = [OSError("reset"), OSError("reset")]
    assert jars.classpath(tmp_path, "1.0")
    assert downloads.count == 3


def test_the_error_of_a_download_that_always_fails_says_what_to_do(tmp_path: Path, downloads: Downloads) -> None:
    """If every attempt fails, the error names what was requested, why the download failed and what to do."""
    downloads.failures = [OSError("no route")] * jars.ATTEMPTS
    with pytest.raises(KafkaStartFailed, match=r"kafka_2\.13:1\.0.*no route.*HTTPS_PROXY.*JOBLEDGER_BOOTSTRAP"):
        jars.classpath(tmp_path, "1.0")
