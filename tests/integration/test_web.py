"""The HTTP API with a real log: jobs are submitted, waited for, cancelled and run again, and their events arrive."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from jobledger import App, Settings
from jobledger.kafka.topics import ensure
from jobledger.streams.maintenance.plans import PlanRunner
from jobledger.streams.status.materializer import Materializer
from jobledger.streams.status.store import open_reader
from jobledger.web import Role, TokenFile
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.kafka

APP = Path(__file__).with_name("web_app.py")
WAIT_S = 60 * PATIENCE


def read_all(pipe: IO[str]) -> None:
    """Read a pipe to its end, so that the pipe is never full, and close it."""
    with pipe:
        pipe.read()


class World:
    """A namespace with a worker, a coordinator and the HTTP API in processes of their own. The test itself runs the
    materializer and the plans."""

    def __init__(self, broker: str, namespace: str, folder: Path, stack: ExitStack) -> None:
        self.stack, self.folder = stack, folder
        url = f"sqlite:///{folder / 'status.db'}"
        self.settings = Settings(bootstrap=broker, status_url=url, home=folder)
        self.environ = {
            **os.environ,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_STATUS_URL": url,
            "JOBLEDGER_HOME": str(folder),
            "NAMESPACE": namespace,
            "MENDED": str(folder / "mended"),
        }
        self.app = App(namespace, settings=self.settings, partitions=2, queues=["mail"])
        stack.callback(self.app.close)
        ensure(self.app, self.settings)
        self._stop = threading.Event()
        table = Materializer(self.app.names, self.settings, ["mail"], url)
        thread = threading.Thread(target=table.run, args=(self._stop,))
        thread.start()
        stack.callback(thread.join, WAIT_S)
        stack.callback(self._stop.set)
        wait_until(lambda: table.active, 20, "the materializer becoming active")
        for command in ("coordinator", "worker"):
            self._start(command, f"{APP}:app")
        file = TokenFile(folder / "tokens.json")
        _, token = file.add("ann", Role.ADMIN)
        web = self._start("web", f"{APP}:app", "--listen", "0", "--tokens", str(file.path), stderr=subprocess.PIPE)
        assert web.stderr is not None
        lines = (re.search(r"serving (http://127\.0\.0\.1:\d+)", line) for line in web.stderr)
        found = next(line for line in lines if line is not None)
        threading.Thread(target=read_all, args=(web.stderr,), daemon=True).start()
        self.client = httpx.Client(
            base_url=f"{found[1]}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=90.0
        )
        stack.callback(self.client.close)

    def _start(self, *words: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobledger", *words], env=self.environ, stderr=stderr, text=True
        )

        def stop() -> None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0, words

        self.stack.callback(stop)
        return process

    def submit(self, status: int = 202, *, key: str | None = None, **body: Any) -> dict[str, Any]:
        """Submit a job over HTTP, and return the answer."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = self.client.post("/jobs", json=body, headers=headers)
        assert answer.status_code == status, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """Wait for a job's end over HTTP, and return the job."""
        deadline = time.monotonic() + WAIT_S
        while True:
            query = {"wait": "10", "at_least": job.get("position", "")} if "position" in job else {"wait": "10"}
            answer = self.client.get(f"/jobs/{job['job_id']}", params=query)
            shown: dict[str, Any] = answer.json()
            if answer.status_code == 200 and shown["ended_at"] is not None:
                return shown
            assert time.monotonic() < deadline, shown

    def carry_out(self, plan_id: str) -> None:
        """Carry out a plan to its end."""
        reader = open_reader(str(self.settings.status_url), self.app.names.namespace)
        runner = PlanRunner(self.app.names, self.settings, self.app.lanes, reader)

        def ended() -> bool:
            runner.round(self._stop)
            shown = self.client.get(f"/plans/{plan_id}")
            return shown.status_code == 200 and shown.json()["state"] == "done"

        try:
            wait_until(ended, 60, "the end of the plan")
        finally:
            runner.close()
            reader.close()


class Stream:
    """The events of one stream, collected in a thread."""

    def __init__(self, world: World, **query: str) -> None:
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        self._ready = threading.Event()
        headers = {"Last-Event-ID": query.pop("after")} if "after" in query else {}
        self._thread = threading.Thread(target=self._run, args=(world.client, query, headers), daemon=True)
        self._stop = threading.Event()
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    def _run(self, client: httpx.Client, query: dict[str, str], headers: dict[str, str]) -> None:
        # The client is closed at the end of the test, in the middle of a read.
        with contextlib.suppress(Exception), client.stream("GET", "/events", params=query, headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            number = kind = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = value
                elif name == "event":
                    kind = value
                elif name == "data":
                    self.seen.append((kind, number, json.loads(value)))
                    self._ready.set()
                if self._stop.is_set():
                    return

    def states(self, job_id: str) -> list[str]:
        """Return the states of a job, in the order of its events."""
        return [data["state"] for kind, _, data in list(self.seen) if kind == "job" and data["job_id"] == job_id]


@pytest.fixture
def world(broker: str, namespace: str, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(broker, namespace, tmp_path, stack)


def test_a_job_over_http_from_its_submission_to_its_redrive(world: World) -> None:
    """A job is submitted and waited for, a copy is recognised, a waiting job is cancelled, a failed job is run again, and
    the log has the user's name; the event streams have all of it."""
    stream, tagged = Stream(world), Stream(world, tag="tenant=acme")
    large = 2**60 + 1
    first = world.submit(task="double", args={"n": large}, tags={"tenant": "acme"}, key="order-1")
    done = world.ended(first)
    assert (done["state"], done["result"], done["args"]) == ("succeeded", str(2 * large), {"n": str(large)})
    plain = world.client.get(f"/jobs/{first['job_id']}", params={"integers": "number"}).text
    assert json.loads(plain)["result"] == 2 * large

    assert world.submit(task="double", args={"n": large}, key="order-1")["job_id"] == first["job_id"]
    assert "other arguments" in world.submit(409, task="double", args={"n": 1}, key="order-1")["detail"]
    assert world.client.get("/jobs:count", params={"task": "double"}).json()["count"] == 1

    later = world.submit(task="double", args={"n": 2}, delay=3600, tags={"tenant": "other"})
    cancelled = world.client.post(f"/jobs/{later['job_id']}:cancel", json={"reason": "wrong list"})
    assert cancelled.status_code == 202
    gone = world.ended(later)
    assert (gone["state"], gone["by"]) == ("cancelled", "ann")

    many = world.client.post("/jobs:batch", json={"jobs": [{"task": "fragile", "args": {"n": n}} for n in range(3)]})
    assert many.status_code == 202
    broken = many.json()["jobs"]
    for each in broken:
        assert world.ended(each)["state"] == "failed"
    (world.folder / "mended").touch()
    again = world.client.post(f"/jobs/{broken[0]['job_id']}:redrive", json={"reason": "mended"})
    assert again.status_code == 202
    world.carry_out(again.json()["plan"])
    wait_until(lambda: world.ended({"job_id": broken[0]["job_id"]})["run"] == 2, 60, "the second run")
    assert world.ended({"job_id": broken[0]["job_id"]})["state"] == "succeeded"
    plan = world.client.post("/plans", json={"action": "redrive", "where": {"task": "fragile"}}).json()
    assert plan["matched"] == 2
    world.carry_out(plan["plan"])
    assert world.client.get(f"/plans/{plan['plan']}").json()["by"] == "ann"

    timeline = world.client.get(f"/jobs/{broken[0]['job_id']}/timeline").json()["events"]
    names = [each["fact"]["type"] for each in timeline]
    assert names[:3] == ["JobSubmitted", "JobStarted", "JobFailed"]
    assert timeline[3]["fact"]["redrive"]["by"] == "ann"

    wait_until(lambda: "succeeded" in stream.states(broken[0]["job_id"]), 20, "the events")
    assert sorted(stream.states(first["job_id"])) == ["queued", "running", "succeeded"]
    assert {"scheduled", "cancelled"} <= {*stream.states(later["job_id"])}
    wait_until(
        lambda: sorted(tagged.states(first["job_id"])) == ["queued", "running", "succeeded"], 20, "the tagged events"
    )
    assert "scheduled" not in tagged.states(later["job_id"])

    seen = [each for each in stream.seen if each[2].get("job_id") == first["job_id"]]
    resumed = Stream(world, after=seen[0][1], job_id=first["job_id"])
    rest = [data["state"] for *_, data in seen[1:]]
    wait_until(lambda: resumed.states(first["job_id"]) == rest, 20, "what was missed")
    from_the_log = Stream(world, after=f"1-{world.app.names.lifecycle}:0:999999", job_id=later["job_id"])
    wait_until(lambda: "scheduled" in from_the_log.states(later["job_id"]), 20, "what the log still has")
    garbage = Stream(world, after="garbage")
    wait_until(lambda: [kind for kind, *_ in garbage.seen][:2] == ["ready", "gap"], 20, "the gap")


def test_queues_are_paused_and_limited_over_http(world: World) -> None:
    """The list shows the command at once, with who gave it and why, and the log has it for all workers."""
    world.submit(task="double", args={"n": 1})
    paused = world.client.post("/queues/mail:pause", json={"reason": "outage"})
    assert (paused.status_code, paused.json()) == (202, {"requested": "pause", "queue": "mail"})
    assert world.client.get("/queues").json()["queues"][0]["paused"] == "by ann: outage"
    assert world.client.post("/tasks/double:limit", json={"rate": "100/s", "concurrency": 4}).status_code == 202
    (double,) = [each for each in world.client.get("/tasks").json()["tasks"] if each["task"] == "double"]
    assert (double["rate"], double["concurrency"], double["limited"]) == (100.0, 4, "by ann")
    assert world.client.post("/queues/mail:resume").status_code == 202
    assert world.client.get("/queues").json()["queues"][0]["paused"] is None
    unknown = world.client.post(f"/jobs/{uuid.uuid4()}:cancel")
    assert unknown.status_code == 202, "the table may not have read the job yet"
