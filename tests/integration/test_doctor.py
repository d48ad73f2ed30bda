"""`jobledger doctor` with a real broker, a worker, a coordinator and a materializer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from jobledger import App, Settings
from jobledger.doctor import broker as broker_checks
from jobledger.doctor import roles
from jobledger.doctor.checks import Subject
from jobledger.kafka import clients
from jobledger.kafka.topics import ensure
from jobledger.streams.status.materializer import Materializer
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

APP = Path(__file__).with_name("plans_app.py")
DONE_S = 120 * PATIENCE


class Clinic:
    """A namespace with topics. The test starts the processes that it needs."""

    def __init__(self, broker: str, namespace: str, folder: Path, stack: ExitStack) -> None:
        self._stack, self.stop = stack, threading.Event()
        self.environ = {
            **os.environ,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_STATUS_URL": f"sqlite:///{folder / 'status.db'}",
            "JOBLEDGER_HOME": str(folder),
            "NAMESPACE": namespace,
            "MENDED": str(folder / "mended"),
        }
        self.settings = Settings(bootstrap=broker, status_url=self.environ["JOBLEDGER_STATUS_URL"], home=folder)
        self.app = App(namespace, settings=self.settings, partitions=2, queues=["mail", "slow"])
        stack.callback(self.app.close)

        @self.app.task(queue="mail", retry=1, name="fragile")
        def fragile(n: int) -> int:
            return n

        self.fragile = fragile
        ensure(self.app, self.settings)

    def start(self, *commands: str) -> None:
        """Start processes of the app, such as ``worker``."""
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobledger", command, f"{APP}:app"], env=self.environ, stderr=subprocess.DEVNULL
            )
            self._stack.callback(process.wait)
            self._stack.callback(process.send_signal, signal.SIGTERM)

    def materialize(self) -> None:
        """Run a materializer in a thread."""
        table = Materializer(self.app.names, self.settings, ["mail", "slow"], str(self.settings.status_url))
        thread = threading.Thread(target=table.run, args=(self.stop,))
        thread.start()
        self._stack.callback(thread.join, DONE_S)
        self._stack.callback(self.stop.set)
        wait_until(lambda: table.active, 30, "the materializer becoming active")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command about the app."""
        return subprocess.run(
            [sys.executable, "-m", "jobledger", *words, "--app", f"{APP}:app", "--json"],
            env=self.environ, capture_output=True, text=True, timeout=DONE_S, check=False,
        )  # fmt: skip

    def doctor(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Return the exit code and the checks, by name."""
        done = self.run("doctor", "--timeout", str(DONE_S / 2), *words)
        return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}

    def queues(self) -> tuple[dict[str, Any], str]:
        """Return depth, running and oldest_s of each queue, and what `queues list` printed on standard error."""
        done = self.run("queues", "list")
        rows = json.loads(done.stdout)
        return {row["queue"]: (row["depth"], row["running"], row["oldest_s"]) for row in rows}, done.stderr


@pytest.fixture
def clinic(broker: str, namespace: str, tmp_path: Path) -> Iterator[Clinic]:
    with ExitStack() as stack:
        yield Clinic(broker, namespace, tmp_path, stack)


def test_a_healthy_app_needs_no_fix(clinic: Clinic) -> None:
    """With worker, coordinator and materializer all checks are ok, and the exit code is 0."""
    clinic.materialize()
    clinic.start("coordinator", "worker")
    job = clinic.fragile.submit(1)
    job.wait(DONE_S)
    names = clinic.app.names
    served = (names.coordinator_group, names.worker_group("mail"), names.worker_group("slow"))

    def all_served() -> bool:
        states = roles.group_states(Subject(clinic.app))
        return all(roles.is_served(states.get(group)) for group in served)

    wait_until(all_served, 60, "members of all groups")
    code, checks = clinic.doctor()
    assert [check for check in checks.values() if not check["ok"]] == []
    assert code == 0
    assert all(check["fix"] is None for check in checks.values())
    assert "4.0 or later" in checks["broker version"]["detail"]
    assert "writes the table" in checks["materializer"]["detail"]
    assert "mail: " in checks["workers"]["detail"]
    assert "client" in checks["rights"]["detail"]


def test_processes_that_do_not_run_are_found(clinic: Clinic) -> None:
    """Without any process the fixes name the commands that start them. A queue without jobs needs no worker."""
    clinic.fragile.submit(1)
    code, checks = clinic.doctor()
    assert code == 4
    assert checks["workers"]["fix"] == "Start `jobledger worker MODULE:APP --queue mail`."
    assert checks["coordinator"]["fix"] == "Start `jobledger streams MODULE:APP`."
    assert "jobledger streams" in checks["table"]["fix"]
    assert checks["table lag"]["detail"] == "not checked, because the check 'table' failed"
    for name in ("broker", "topics", "schemas", "clock", "rights"):
        assert checks[name]["ok"], checks[name]


def test_queues_are_listed_with_their_depth(clinic: Clinic) -> None:
    """Without a status table the numbers are null, and a note says why."""
    assert clinic.queues()[0] == {"mail": (None, None, None), "slow": (None, None, None)}
    assert "depth, running and oldest_s are not known: there is no status table" in clinic.queues()[1]
    clinic.materialize()
    clinic.fragile.submit(1)
    wait_until(lambda: clinic.app.status_table().count().jobs == 1, 30, "the job in the table")
    queues, note = clinic.queues()
    assert (queues["slow"], queues["mail"][:2], note) == ((0, 0, None), (1, 0), "")
    assert 0 <= queues["mail"][2] < DONE_S


def test_a_table_without_a_materializer_is_found(clinic: Clinic) -> None:
    """The table can be read, but nobody writes it, and it stays behind."""
    clinic.materialize()
    clinic.stop.set()
    wait_until(lambda: not clinic.app.status_table().about().held, 60, "the release of the lease")
    clinic.fragile.submit(1)
    code, checks = clinic.doctor()
    assert code == 4
    assert checks["table"]["ok"]
    assert checks["materializer"]["fix"] == "Start `jobledger streams MODULE:APP`."
    assert "no progress" in checks["table lag"]["detail"]


def test_a_missing_topic_and_a_changed_setting_are_found(clinic: Clinic) -> None:
    """The detail names the topic, and the fix is the command that creates and alters topics."""
    names = clinic.app.names
    admin = clients.admin(clinic.settings)
    entry = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, names.lifecycle, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(DONE_S)
    for future in admin.delete_topics([names.dead_letter]).values():
        future.result(DONE_S)
    wait_until(lambda: names.dead_letter not in admin.list_topics(timeout=10).topics, 30, "the end of the topic")
    code, checks = clinic.doctor()
    assert code == 4
    assert checks["topics"]["fix"] == "Run `jobledger topics apply MODULE:APP`."
    assert f"{names.lifecycle}: alter-config" in checks["topics"]["detail"]
    assert f"{names.dead_letter}: create" in checks["topics"]["detail"]


def test_a_wrong_address_is_found(clinic: Clinic) -> None:
    """The checks that need no broker are made all the same."""
    code, checks = clinic.doctor("--bootstrap", "localhost:1")
    assert code == 4
    assert "JOBLEDGER_BOOTSTRAP" in checks["broker"]["fix"]
    assert checks["topics"]["detail"] == "not checked, because the check 'broker' failed"
    assert checks["python"]["ok"]
    assert checks["disk"]["ok"]


def test_clocks_that_differ_are_found(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference is measured with records that the broker appends."""
    assert broker_checks.clock(Subject(clinic.app)).fix is None
    now = time.time
    monkeypatch.setattr("jobledger.kafka.broker_clock.time.time", lambda: now() + 3_600)
    found = broker_checks.clock(Subject(clinic.app))
    assert "3600" in found.detail
    assert "clocks" in (found.fix or "")
