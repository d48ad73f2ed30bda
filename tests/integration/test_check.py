"""`jobledger check` with a real broker and a real coordinator: which open jobs the next version of an app cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobledger import App, Settings
from jobledger.kafka.clients import partitions_of
from jobledger.kafka.topology import changelog
from jobledger.log.reading import LogReader
from tests.integration.worker_app import closings, until, working
from tests.patience import PATIENCE

pytestmark = pytest.mark.kafka

OLD = """
from jobledger import App, Queue
app = App({namespace!r}, partitions=2)

@app.task
async def kept(a: int) -> int:
    return a

@app.task
async def changed(a: int) -> int:
    return a

@app.task
async def gone(a: int) -> int:
    return a

@app.task(queue="closed")
async def moved(a: int) -> int:
    return a
"""

NEW = """
from jobledger import App
app = App({namespace!r}, partitions=2)

@app.task
async def kept(a: int, more: str = "") -> int:
    return a

@app.task
async def changed(account: str) -> str:
    return account

@app.task
async def moved(a: int) -> int:
    return a
"""


def jobledger(folder: Path, broker: str, *words: str) -> tuple[int, str, str]:
    """Run a command. Return its exit code, its output and its errors."""
    done = subprocess.run(
        [sys.executable, "-m", "jobledger", *words],
        check=False,
        cwd=folder,
        env={**os.environ, "JOBLEDGER_BOOTSTRAP": broker, "JOBLEDGER_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 60,
    )
    return done.returncode, done.stdout, done.stderr


def checked(folder: Path, broker: str, module: str) -> tuple[int, dict[str, Any]]:
    """Run the check. Return its exit code and its JSON output."""
    code, out, errors = jobledger(folder, broker, "check", f"{module}:app", "--json")
    assert out, errors
    return code, json.loads(out)


def test_a_new_version_is_checked_against_the_open_jobs_in_the_log(broker: str, namespace: str, tmp_path: Path) -> None:
    """The check reports the jobs in queues and in the coordinator's table whose task, queue or arguments the new
    version does not have. Jobs that have ended are not reported."""
    (tmp_path / "old.py").write_text(OLD.format(namespace=namespace))
    (tmp_path / "new.py").write_text(NEW.format(namespace=namespace))
    assert jobledger(tmp_path, broker, "topics", "apply", "old:app", "--yes")[0] == 0
    old: dict[str, Any] = {}
    exec(OLD.format(namespace=namespace), old)  # noqa: S102  # the same app as in the file above, in this process
    app: App = old["app"]
    app.settings = Settings(bootstrap=broker)
    code, said = checked(tmp_path, broker, "new")
    assert (code, said["jobs"], said["misfits"]) == (0, 0, [])

    with working(app, queues=["default"]):
        ended = app.submit_many(app.tasks["gone"].job(n) for n in range(50))
        until(lambda: closings(app).keys() >= {h.job_id for h in ended})
    app.submit_many(app.tasks["kept"].job(n) for n in range(20))
    app.submit_many(app.tasks["changed"].job(n) for n in range(5))
    first = app.tasks["gone"].submit(1)
    app.submit_many(app.tasks["moved"].job(n) for n in range(3))
    later = [app.tasks[name].using(delay=3600).submit(1) for name in ("kept", "gone", "gone", "changed", "moved")]
    soon = app.tasks["gone"].using(delay=0.2).submit(1)
    coordinator = subprocess.Popen(
        [sys.executable, "-m", "jobledger", "coordinator", "old:app"],
        cwd=tmp_path,
        env={**os.environ, "JOBLEDGER_BOOTSTRAP": broker, "JOBLEDGER_HOME": str(tmp_path / "home")},
        stderr=subprocess.DEVNULL,
    )
    try:
        rows = changelog(app.names)

        def written() -> bool:
            with LogReader(app.settings) as reader:
                found = [
                    (message.key(), message.value())
                    for number in range(partitions_of(app.settings, rows))
                    for message in reader.read(rows, number, 0)
                ]
            known = dict(found)
            return (
                all(h.job_id.encode() in known for h in later)
                and len([key for key, _ in found if key == soon.job_id.encode()]) >= 2
            )

        until(written, 60.0, "the coordinator's rows")
    finally:
        coordinator.terminate()
        coordinator.wait(PATIENCE * 60)
    app.close()

    code, said = checked(tmp_path, broker, "old")
    assert (code, said["misfits"]) == (0, [])
    assert (said["queued"], said["waits"], said["unread"]) == (30, 5, 0), "ended jobs are not told, the one let go is"
    code, said = checked(tmp_path, broker, "new")
    assert code == 4
    assert (said["queued"], said["waits"]) == (30, 5)
    found = {(m["task"], m["problem"]): (m["queued"], m["waits"]) for m in said["misfits"]}
    assert found == {
        ("changed", "arguments do not fit"): (5, 1),
        ("gone", "task gone"): (2, 2),
        ("moved", "queue gone"): (3, 1),
    }
    by_task = {m["task"]: m for m in said["misfits"]}
    assert (
        "the job was submitted with (a), but the task takes (account: str) -> str: Object contains unknown field `a`"
        in by_task["changed"]["says"]
    )
    assert by_task["gone"]["says"] == "the app has changed, kept, moved"
    assert by_task["gone"]["example"] in {first.job_id, soon.job_id}
    code, text, errors = jobledger(tmp_path, broker, "check", "new:app")
    assert code == 4
    assert "14 jobs cannot be run by this app" in text
    assert "keep a task of that name until its jobs have ended" in errors
    assert jobledger(tmp_path, broker, "check", "old:app")[0] == 0


def test_a_check_without_topics_is_an_error(broker: str, namespace: str, tmp_path: Path) -> None:
    """For a namespace without topics, the check fails and names the command that creates them."""
    (tmp_path / "new.py").write_text(NEW.format(namespace=namespace))
    code, _, errors = jobledger(tmp_path, broker, "check", "new:app")
    assert code == 1
    assert "topics apply" in errors
