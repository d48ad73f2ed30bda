"""The command line as people use it: real processes on a real broker, from the creation of topics to the outcome of a
job."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from jobledger.cli.main import main
from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.events import Position
from jobledger.streams.status.materializer import behind
from jobledger.streams.status.store import open_reader

pytestmark = pytest.mark.kafka

WAIT_S = 240.0

APP = """\
import asyncio
import os
from jobledger import App, Reject, Retry, current_job

app = App({namespace!r}, partitions=2)


@app.task(queue="mail", retry=Retry(max_attempts=3, initial=0.1, jitter=False), timeout=30.0)
async def send_mail(to: str, fail: int = 0) -> str:
    current_job().progress(done=1, total=2, message="rendered")
    if current_job().attempt <= fail:
        raise RuntimeError("busy")
    if "@" not in to:
        raise Reject(to + " is no address")
    return "sent to " + to


@app.task
def add(a: int, b: int = 1) -> int:
    return a + b


@app.task
async def steps(total: int, gate: str = "") -> int:
    for done in range(1, total + 1):
        current_job().progress(done=done, total=total, message="[row]")
        await asyncio.sleep(0.02)
        for _ in range(6_000):
            if not gate or done < total // 2 or os.path.exists(gate):
                break
            await asyncio.sleep(0.02)
    return total


@app.task
async def sleepy(seconds: float) -> None:
    await asyncio.sleep(seconds)
"""


class Process:
    """A command that runs until it is stopped, and its output."""

    def __init__(self, words: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._new = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobledger", *words],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._new:
                    self.lines.append(line.rstrip("\n"))
                    self._new.notify_all()

    def wait_for_line(self, *texts: str) -> None:
        """Wait until one line of the output contains all of these texts."""
        with self._new:
            found = self._new.wait_for(lambda: any(all(t in line for t in texts) for line in self.lines), WAIT_S)
            assert found, f"{texts} not in\n" + "\n".join(self.lines[-40:])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the process and return its exit code. Its child processes must have ended, too."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(number)
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert not psutil.wait_procs(family, WAIT_S)[1]
        return code

    def close(self) -> None:
        """Kill the process and its child processes if they still run."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for each in family:
                if each.is_running():
                    each.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)


class Shop:
    """A folder with an app in its own namespace, and the commands that run there."""

    def __init__(self, folder: Path, broker: str, namespace: str) -> None:
        self.folder, self.namespace = folder, namespace
        self.module = f"shop_{namespace}"
        self.target = f"{self.module}:app"
        self.source = folder / f"{self.module}.py"
        self.source.write_text(APP.format(namespace=namespace))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_") and k != "FORCE_COLOR"}
        self.environ = {
            **kept,
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_HOME": str(folder / "home"),
            "PYTHONUNBUFFERED": "1",
        }
        self.running: list[Process] = []

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run a command to its end. Return its exit code, standard output and standard error."""
        done = subprocess.run(
            [sys.executable, "-m", "jobledger", *words],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def main(self, *words: str) -> tuple[int, str, str]:
        """Run a command in this process, which is much faster than `run`. Only the start of the interpreter is missing."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        return code, out.getvalue(), err.getvalue()

    def json(self, *words: str, code: int = 0) -> Any:
        """Run a command with ``--json`` and return its output."""
        ended, out, err = self.main(*words, "--json")
        assert ended == code, out + err
        return json.loads(out if code in (0, 4, 5) else err)

    def events(self, *words: str) -> list[Any]:
        """Return the output of ``events tail``."""
        code, out, err = self.main("events", "tail", "--namespace", self.namespace, "--json", *words)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    def wait_for_row(self, job_id: str) -> None:
        """Wait until the status table has a row for the job."""
        asking = ("jobs", "list", "--namespace", self.namespace)
        until(lambda: job_id in {each["job_id"] for each in self.json(*asking)}, f"{job_id} is not in the table")

    def start(self, *words: str) -> Process:
        """Start a command that continues to run."""
        made = Process(list(words), self.folder, self.environ)
        self.running.append(made)
        return made


@pytest.fixture
def shop(tmp_path: Path, broker: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    made, path = Shop(tmp_path, broker, namespace), list(sys.path)
    for name in set(os.environ) - set(made.environ):
        monkeypatch.delenv(name)
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield made
    for process in made.running:
        process.close()
    sys.path[:] = path
    sys.modules.pop(made.module, None)


def until(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_jobs_life_from_the_command_line(shop: Shop) -> None:
    """Commands create the topics and start a stream processor and a worker. Jobs are submitted, waited for, listed,
    shown with their timeline, and read from the log. Failures have their own exit codes. Both processes stop cleanly.
    """
    made = shop.json("topics", "apply", shop.target, "--yes")
    assert made["applied"] > 0
    streams, worker = shop.start("streams", shop.target), shop.start("worker", shop.target, "--grace", "1")
    worker.wait_for_line("lane mail: assigned")
    streams.wait_for_line("materializer", "writing the status table")

    # jobs that succeed
    done = shop.json("submit", shop.target, "send_mail", "to=a@example.org", "--tag", "tenant=acme", "--wait")
    assert (done["state"], done["result"], done["tags"]) == ("succeeded", "sent to a@example.org", {"tenant": "acme"})
    retried = shop.json("submit", shop.target, "send_mail", "to=b@example.org", "fail=1", "--wait")
    assert (retried["state"], retried["attempt"]) == ("succeeded", 2)
    added = shop.json("submit", shop.target, "add", "--args", '{"a": 40, "b": 1}', "b=2")
    shop.wait_for_row(added["job_id"])
    assert shop.json("jobs", "wait", added["job_id"], "--app", shop.target, "--timeout", "200")["result"] == 42
    late = shop.json("submit", shop.target, "add", "a=1", "--delay", "0.5", "--wait", "--timeout", "200")
    assert late["state"] == "succeeded"

    # jobs that fail or do not end
    failed = shop.json("submit", shop.target, "send_mail", "to=nobody", "--wait", code=5)
    assert (failed["state"], failed["reason"]) == ("failed", "rejected")
    slow = shop.json("submit", shop.target, "sleepy", "seconds=1000")["job_id"]
    shop.wait_for_row(slow)
    error = shop.json("jobs", "wait", slow, "--namespace", shop.namespace, "--timeout", "0.5", code=6)["error"]
    assert error["type"] == "StatusTimeout"
    unknown = "00000000-0000-7000-8000-000000000000"
    for words in (["jobs", "show", unknown], ["jobs", "wait", unknown]):
        assert shop.json(*words, "--namespace", shop.namespace, code=3)["error"]["type"] == "JobNotFound"

    # lists; --namespace is not needed, because this home has only one namespace
    assert [j["job_id"] for j in shop.json("jobs", "list", "--tag", "tenant=acme")] == [done["job_id"]]
    assert [j["job_id"] for j in shop.json("jobs", "list", "--state", "failed")] == [failed["job_id"]]
    assert len(shop.json("jobs", "list", "--task", "send_mail", "--queue", "mail")) == 3
    assert shop.json("jobs", "list", "--limit", "1")[0]["job_id"] == slow
    code, text, _ = shop.run("jobs", "list", "--state", "failed")
    assert code == 0
    assert failed["job_id"] in text
    assert "nobody is no address" in text

    # one job, from the positions of its records in the log
    def kinds_of(job_id: str) -> list[str]:
        shown = shop.json("jobs", "show", job_id, "--timeline")
        return [step["fact"]["type"] for step in shown["timeline"]]

    # The table may contain a job's outcome before its release, because the two are on different topics.
    until(lambda: "JobDue" in kinds_of(retried["job_id"]), "its release is not in the table")
    kinds = kinds_of(retried["job_id"])
    assert [k for k in kinds if k != "JobProgressed"] == [
        *("JobSubmitted", "JobStarted", "JobRetried", "JobDue", "JobStarted", "JobSucceeded")
    ]
    code, text, _ = shop.run("jobs", "show", retried["job_id"], "--timeline")
    assert code == 0
    assert [kind for kind in kinds if kind not in text] == []

    # the log itself
    assert shop.events("--job", done["job_id"], "--from", "start")[0]["fact"]["type"] == "JobSubmitted"
    until(lambda: bool(shop.events("--topic", "dead-letter", "--from", "10m")), "no dead letter")
    letters = shop.events("--topic", "dead-letter", "--from", "10m")
    assert [(e["job_id"], e["fact"]["type"]) for e in letters] == [(failed["job_id"], "DeadLettered")]
    assert len(shop.events("-n", "3")) == 3
    assert shop.events("--from", "end") == []
    code, _, err = shop.main("events", "tail", "--namespace", "nobodys")
    assert (code, "has no topics (--topic all)" in err) == (1, True)

    follower = shop.start("events", "tail", "--follow", "--from", "end", "--task", "add", "--json")

    def followed() -> bool:
        # The follower may begin after a submission. So jobs are submitted until the follower shows the outcome of one.
        shop.json("submit", shop.target, "add", "a=5")
        return any("JobSucceeded" in line for line in follower.lines)

    until(followed, "no event was followed")
    assert {json.loads(line)["task"] for line in list(follower.lines)} == {"add"}
    assert follower.stop(signal.SIGINT) == 130

    assert worker.stop() == 0
    settings, names = Settings.from_env(), Names(shop.namespace)
    with contextlib.closing(open_reader(settings.resolve_status_url(shop.namespace), shop.namespace)) as table:
        until(lambda: not behind(settings, names, table.offsets()), "the table has not read the log")
    assert streams.stop() == 0

    # the table agrees with the log, and can be rebuilt from the log
    before = shop.json("verify", shop.target)
    assert (before["equal"], before["differing"]) == (True, 0)
    assert shop.json("rebuild", shop.target, "--yes")["jobs"] == before["jobs"]
    after = shop.json("verify", shop.target)
    assert (after["equal"], after["table_digest"]) == (True, before["table_digest"])
    damage(shop, failed["job_id"])
    broken = shop.json("verify", shop.target, code=4)
    assert (broken["equal"], broken["differing"]) == (False, 1)


def test_jobs_are_cancelled_by_id_and_by_their_properties(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running job is asked to end, and waiting jobs are not started. The cancel records who requested it and why. The
    command reports arguments that are no job, have ended or match nothing, and cancels nothing without an agreement."""
    shop.json("topics", "apply", shop.target, "--yes")
    streams, worker = shop.start("streams", shop.target), shop.start("worker", shop.target, "--grace", "1")
    worker.wait_for_line("lane default: assigned")
    streams.wait_for_line("materializer", "writing the status table")

    def submitted(*words: str) -> str:
        job_id: str = shop.json("submit", shop.target, *words)["job_id"]
        return job_id

    def cancel(*words: str, code: int = 0) -> Any:
        return shop.json("jobs", "cancel", "--namespace", shop.namespace, *words, code=code)

    def ended(job_id: str) -> tuple[str, str]:
        found = shop.json("jobs", "wait", job_id, "--namespace", shop.namespace, "--timeout", "200", code=5)
        return found["state"], found["reason"]

    def states() -> dict[str, str]:
        return {j["job_id"]: j["state"] for j in shop.json("jobs", "list", "--namespace", shop.namespace)}

    runs = submitted("sleepy", "seconds=1000")
    acme, other = (
        submitted("send_mail", "to=a@example.org", "--delay", "600", "--tag", f"tenant={tenant}")
        for tenant in ("acme", "other")
    )
    added = submitted("add", "a=1", "--delay", "600", "--tag", "tenant=acme")
    waiting = {acme: "scheduled", other: "scheduled", added: "scheduled"}
    until(lambda: states() == {runs: "running", **waiting}, "not there yet")

    # a dry run, refused arguments, and no agreement
    dry = cancel("--where", "task=send_mail", "--dry-run")
    assert (dry["plan"], dry["matched"], set(dry["examples"])) == (None, 2, {acme, other})
    code, out, err = shop.main("jobs", "cancel", "--namespace", shop.namespace, added, "--dry-run")
    assert (code, out.split(), "nothing was changed" in err) == (0, [added, "add", "default"], True)
    for words, said in (
        (["TYPO"], "'TYPO' is too short for the beginning of an id"),
        (
            [runs, "TYPO-1"],
            "'TYPO-1' is not a job's id: job ids are UUIDs, and the status table knows no job with this id",
        ),
        ([runs[:6]], f"'{runs[:6]}' is the beginning of several ids: "),
        (["--where", "task"], "is not of the form NAME=VALUE"),
        (["--where", "colour=red"], "'colour' is not a condition"),
        (["--where", "tag.a=b", "--where", "tag.a=c"], "--where tag a is given as 'b' and as 'c'"),
        (["--where", "state=succeeded"], "jobs in this state have ended"),
    ):
        assert said in cancel(*words, code=2)["error"]["message"]
    both = cancel("--where", "task=add", "--where", "task=send_mail", "--where", "state=scheduled", "--dry-run")
    assert set(both["examples"]) == {acme, other, added}
    narrow = ("--where", "tag.tenant=acme", "--where", "tag.kind=none")
    nothing: dict[str, Any] = {"plan": None, "matched": 0, "examples": []}
    assert cancel(*narrow) == nothing
    asking = ["jobs", "cancel", "--namespace", shop.namespace, "--where", "task=add"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, out, err = shop.main(*asking)
    assert (code, out.strip(), "Cancel 1 job?" in err, "nothing was changed" in err) == (1, "", True, True)
    assert states() == {runs: "running", **waiting}

    # cancels by properties of the jobs
    where = ("--where", "tag.tenant=acme", "--where", "task=send_mail")
    plan = cancel(*where, "--reason", "wrong list", "--by", "ann", "--wait")
    assert (plan["action"], plan["state"], plan["matched"], plan["done"]) == ("cancel", "done", 1, 1)
    assert ended(acme) == ("cancelled", "wrong list")
    last = shop.json("jobs", "show", acme, "--namespace", shop.namespace, "--timeline")["timeline"][-1]["fact"]
    assert (last["type"], last["by"]) == ("JobCancelled", "ann")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, _ = shop.main(*asking)
    assert (code, ": 1 job; `jobledger plans show " in out) == (0, True)
    assert ended(added)[0] == "cancelled"
    assert cancel("--where", "queue=nothing-there") == nothing

    # cancels by ids, complete or shortened
    assert cancel(runs[:-1], other, runs) == {"cancelled": 2, "jobs": [runs, other], "notes": []}
    assert [ended(runs)[0], ended(other)[0]] == ["cancelled", "cancelled"]
    took = {job_id: shop.json("jobs", "show", job_id)["duration"] for job_id in (runs, other)}
    assert took[runs] > 0.05  # the job ran during the commands above
    assert took[other] is None
    code, out, err = shop.main("jobs", "cancel", "--namespace", shop.namespace, runs)
    assert (code, out, err) == (0, "no job is left to cancel\n", f"{runs} has ended: cancelled\n")
    unknown = "00000000-0000-7000-8000-000000000000"
    late = cancel(unknown)
    assert (late["cancelled"], late["jobs"]) == (1, [unknown])
    assert late["notes"] == [
        f"the status table does not know {unknown}: the cancel has an effect only if the job was just submitted"
    ]

    assert worker.stop() == 0
    assert streams.stop() == 0


def test_jobs_are_listed_and_shown_with_their_arguments(shop: Shop) -> None:
    """Filters can be combined, and ids may be shortened. Arguments are read from the log, and the output says if they
    were trimmed. Jobs, queues and tasks can be listed with the app or with its namespace. A bar shows the progress of a
    job."""
    shop.json("topics", "apply", shop.target, "--yes")
    streams, worker = shop.start("streams", shop.target), shop.start("worker", shop.target, "--grace", "1")
    worker.wait_for_line("lane mail: assigned")
    streams.wait_for_line("materializer", "writing the status table")
    tags = ["--tag", "tenant=acme", "--tag", "kind=note"]
    noted = shop.json("submit", shop.target, "send_mail", "to=a@example.org", *tags, "--wait")["job_id"]
    plain = shop.json("submit", shop.target, "send_mail", "to=b@example.org", *tags[:2], "--wait")["job_id"]
    failed = shop.json("submit", shop.target, "send_mail", "to=nobody", "--wait", code=5)["job_id"]
    later = shop.json("submit", shop.target, "add", "a=1", "--delay", "600")["job_id"]

    def found(*words: str) -> set[str]:
        return {each["job_id"] for each in shop.json("jobs", "list", *words)}

    until(lambda: later in found(), "not in the table")
    assert found(*tags) == {noted}
    assert found(*tags[:2]) == {noted, plain}
    assert found("--state", "failed", "--state", "scheduled") == {failed, later}
    assert found("--task", "add", "--task", "send_mail", "--queue", "mail") == {noted, plain, failed}
    assert found("--since", "1h") == {noted, plain, failed, later}
    assert found("--since", "2999-01-01") == found("--late") == set()
    for which in ([shop.target], ["--app", shop.target], ["--namespace", shop.namespace]):
        assert found(*which) == {noted, plain, failed, later}
        assert shop.json("jobs", "show", *which, noted[:-2])["args"] == {"to": "a@example.org"}
        rows = shop.json("queues", "list", *which)
        assert {row["queue"]: row["partitions"] for row in rows} == {"default": 2, "mail": 2}
        shop.json("queues", "pause", *which, "mail", "--reason", "maintenance")
        assert [row["queue"] for row in shop.json("queues", "list", *which) if row["paused"]] == ["mail"]
        shop.json("queues", "resume", *which, "mail")
        shop.json("tasks", "limit", *which, "add", "--rate", "5/s")
        assert [row["task"] for row in shop.json("tasks", "list", *which) if row["limited"]] == ["add"]
        shop.json("tasks", "limit", *which, "add")
        no = shop.json("tasks", "pause", *which, "nope", code=2)["error"]["message"]
        assert "has no task 'nope'; its tasks: add, send_mail" in no
    several = shop.json("jobs", "show", noted[:6], code=2)["error"]["message"]
    assert "is the beginning of several ids: " in several
    assert shop.json("jobs", "show", "012345", code=3)["error"]["type"] == "JobNotFound"
    listed = shop.json("jobs", "list", "--show", "args")
    assert {each["job_id"]: each["args"] for each in listed}[later] == {"a": 1}
    code, text, _ = shop.main("jobs", "list", "--show", "tags,args", "--tag", "kind=note")
    assert (code, text.splitlines()[0].split()[-2:]) == (0, ["tags", "args"])
    assert 'kind=note tenant=acme  {"to":"a@example.org"}' in text

    # a terminal shows a bar, other outputs do not
    master, slave = pty.openpty()
    gate, halfway = shop.folder / "gate", re.compile(rb"/100 \(\d?\d %\) \[row\]")
    steps = ("steps", "total=100", f"gate={gate}")
    asking = [sys.executable, "-m", "jobledger", "submit", shop.target, *steps, "--wait"]
    waiting = subprocess.Popen(
        asking, cwd=shop.folder, env=shop.environ, stdout=subprocess.PIPE, stderr=slave, text=True
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end of the terminal
        while part := os.read(master, 4096):
            shown += part
            if halfway.search(shown):
                gate.touch()  # the second half continues
    os.close(master)
    out, _ = waiting.communicate(timeout=WAIT_S)
    assert waiting.returncode == 0
    assert halfway.search(shown), shown
    assert "100/100 (100 %) [row]" in out
    code, out, err = shop.run("submit", shop.target, "steps", "total=1", "--wait")
    assert (code, err.count("\n")) == (0, 1), err

    # trimmed arguments are reported as trimmed
    place = Position.parse(shop.json("jobs", "show", noted)["positions"][0])
    admin = AdminClient({"bootstrap.servers": shop.environ["JOBLEDGER_BOOTSTRAP"]})
    cut = TopicPartition(place.topic, place.partition, place.offset + 1)
    for future in admin.delete_records([cut]).values():
        future.result(WAIT_S)
    gone = shop.json("jobs", "show", noted)
    assert (gone["args"], gone["args_error"]) == (None, f"not known: {place} was trimmed from the log")
    code, text, _ = shop.main("jobs", "show", noted)
    assert (code, f"not known: {place} was trimmed from the log" in text) == (0, True)
    os.environ["JOBLEDGER_BOOTSTRAP"] = "127.0.0.1:1"  # restored by the fixture
    code, text, _ = shop.main("jobs", "show", noted)
    assert (code, "arguments  not known: 127.0.0.1:1 did not answer" in text) == (0, True)
    assert worker.stop() == 0
    assert streams.stop() == 0


def test_unusual_records_break_no_command(shop: Shop) -> None:
    """The log has well-formed events without a meaning, and bytes that are no event. Every command that reads the log
    or the status table shows each of them, on one line or as one JSON object."""
    shop.json("topics", "apply", shop.target, "--yes")
    names, far, deep = Names(shop.namespace), 2**63 - 1, b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    ids = [str(uuid.uuid4()) for _ in range(6)]
    submitted = ev.JobSubmitted(ev.JobSpec(deep, {"\x1b[2J": "\x9b"}))
    found: list[tuple[str, ev.Fact, int]] = [
        (ids[0], submitted, time.time_ns()),
        (ids[1], ev.JobSubmitted(ev.JobSpec(b"{}"), None, far), -far),
        (ids[2], submitted, far),
        (ids[2], ev.JobSucceeded(deep, far), 0),
        (ids[3], ev.JobRetried(ev.ErrorInfo("\x1b[2J", "\x07\r"), far), 0),
        (ids[4], ev.JobSnoozed(-far, None, -far), 0),
        (ids[5], ev.JobExpiredFact(-far), 0),
    ]
    producer = Producer({"bootstrap.servers": shop.environ["JOBLEDGER_BOOTSTRAP"]})
    for job_id, fact, occurred in found:
        event = ev.JobEvent(job_id, job_id, 1, 1, 1, occurred, "gone\n", "mail", None, None, "\x1b", None, fact)
        producer.produce(names.lifecycle, codec.encode(event), key=job_id)
    producer.produce(names.lifecycle, b"\xff\x00\x1b[2J")
    assert producer.flush(WAIT_S) == 0
    table = shop.start("materializer", shop.target)
    until(lambda: shop.main("jobs", "list")[0] == 0 and len(shop.json("jobs", "list")) == len(ids), "not in the table")

    asking = [["events", "tail", "--namespace", shop.namespace, "--from", "start"], ["jobs", "list"]]
    asking += [["jobs", "show", job_id, "--timeline", "--namespace", shop.namespace] for job_id in ids]
    asking += [["verify", shop.target], ["check", shop.target], ["queues", "list", shop.target]]
    for words in asking:
        code, out, err = shop.main(*words)
        assert (code, err) == (0, ""), words
        assert out.replace("\n", "").replace("\t", "").isprintable()
        code, out, err = shop.main(*words, "--json")
        assert (code, err) == (0, ""), words
        assert [json.loads(line) for line in out.splitlines()]
    shown = {(line.get("job_id"), line.get("fact", {}).get("type")) for line in shop.events("--from", "start")}
    assert shown >= {(job_id, ev.fact_name(fact)) for job_id, fact, _ in found} | {(None, None)}
    assert table.stop() == 0


def damage(shop: Shop, job_id: str) -> None:
    """Delete a job's rows, as if the database had been restored from an older copy."""
    (path,) = (shop.folder / "home" / "status").glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            if "job_id" in columns:
                database.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))


def test_the_stream_processor_recovers_from_kill_9_of_a_part_or_of_itself(shop: Shop) -> None:
    """A killed part is started again. If the supervisor is killed, no child process is left, and the next supervisor
    works."""
    shop.json("topics", "apply", shop.target, "--yes")
    first = shop.start("streams", shop.target)
    first.wait_for_line("materializer", "writing the status table")
    part = next(p for p in psutil.Process(first.process.pid).children() if "materializer" in p.cmdline())
    part.kill()
    first.wait_for_line("supervisor", "materializer ended with signal SIGKILL")
    until(lambda: sum("writing the status table" in line for line in first.lines) == 2, "not started again")
    orphans = psutil.Process(first.process.pid).children()
    assert len(orphans) == 2
    first.process.kill()
    assert not psutil.wait_procs(orphans, WAIT_S)[1]
    second = shop.start("streams", shop.target)
    second.wait_for_line("materializer", "writing the status table")
    assert second.stop() == 0


def test_one_command_runs_several_worker_processes(shop: Shop) -> None:
    """``--processes 2`` runs two workers that share the queues and stop together."""
    shop.json("topics", "apply", shop.target, "--yes")
    both = shop.start("worker", shop.target, "--processes", "2", "--queue", "mail", "--grace", "2")
    both.wait_for_line("worker-1 ", "serves mail")
    both.wait_for_line("worker-2 ", "serves mail")
    assert both.stop(signal.SIGINT) == 0


def test_dev_runs_everything_and_reloads_on_change(shop: Shop) -> None:
    """One command creates the topics and runs a worker and the stream processor. A change of the code is used at once.
    If the new code does not load, the old code keeps running. A new queue gets its topic. Ctrl-C ends the command with
    exit code 0."""
    dev = shop.start("dev", shop.target)
    dev.wait_for_line("dev", "topics created")
    dev.wait_for_line("worker", "lane mail: assigned")
    dev.wait_for_line("materializer", "writing the status table")
    dev.wait_for_line("dev", "watching")
    assert shop.json("submit", shop.target, "add", "a=1", "--wait")["result"] == 2

    good = shop.source.read_text()
    shop.source.write_text(good + "\ndef broken(:\n")
    dev.wait_for_line("dev", "SyntaxError")
    dev.wait_for_line("dev", "the old code keeps running")
    shop.source.write_text(good.replace("return a + b", "return (a + b) * 100") + NEW_TASK)
    dev.wait_for_line("dev", "restarting worker")
    dev.wait_for_line("worker", "lane new: assigned")
    assert shop.json("submit", shop.target, "add", "a=1", "--wait")["result"] == 200
    # In a new process, because this one has the old module.
    code, out, err = shop.run("submit", shop.target, "fresh", "--wait", "--json")
    assert json.loads(out)["result"] == "new", f"{code} {err}"
    assert dev.stop(signal.SIGINT) == 0
    dev.wait_for_line("dev", "stopped")


NEW_TASK = """

@app.task(queue="new")
def fresh() -> str:
    return "new"
"""
