"""Secured clusters: every part with its own user, its own certificate or password, and exactly the least rights.

The broker lets nobody do what no ACL allows (`tests.secured`). Where real processes make no difference, the parts run in this
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.secured import WAYS, Secured, environment

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

WAIT_S = 60.0
USERS = ("client", "worker", "streams", "router", "admin")

APP = """\
from jobledger import App, Retry, current_job

app = App({namespace!r}, partitions=2)


@app.event(key="user_id")
class Registered:
    user_id: str


@app.task(queue="mail", retry=Retry(max_attempts=3, initial=0.3, jitter=False))
async def send_mail(to: str, fail: int = 0) -> str:
    if current_job().attempt <= fail:
        raise RuntimeError("busy")
    return "sent to " + to


@app.on(Registered, queue="mail")
async def welcome(event: Registered) -> str:
    return "hello " + event.user_id
"""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """The broker of this module."""
    with Secured(tmp_path_factory.mktemp("secured"), USERS) as made:
        yield made


class Part:
    """A command that goes on, in a process of its own; what it says goes to a file."""

    def __init__(self, words: list[str], folder: Path, environ: Mapping[str, str]) -> None:
        self.output = folder / f"{words[0]}-{time.monotonic_ns()}.log"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobledger", *words],
                cwd=folder,
                env=dict(environ),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        """Everything so far."""
        return self.output.read_text("utf-8", "replace")

    def until(self, text: str) -> None:
        """Wait until it has said this."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.said:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}"
            assert time.monotonic() < deadline, f"{text!r} not in\n{self.said}"
            time.sleep(0.05)

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """SIGTERM, and whatever it takes."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for left in psutil.wait_procs(family, 5)[1]:
            left.kill()


class Site:
    """A folder with an app of its own namespace, run by several users of a secured cluster."""

    def __init__(self, secured: Secured, folder: Path, namespace: str) -> None:
        self.secured, self.folder, self.namespace = secured, folder, namespace
        (folder / f"site_{namespace}.py").write_text(APP.format(namespace=namespace))
        self.target = f"site_{namespace}:app"
        self.parts: list[Part] = []

    def environ(self, bootstrap: str, kafka: Mapping[str, str]) -> dict[str, str]:
        """The environment of a process with these settings and no others."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_") and k != "FORCE_COLOR"}
        home = {"JOBLEDGER_HOME": str(self.folder / "home"), "JOBLEDGER_SUBMIT_TIMEOUT": "20"}
        return {**kept, **home, "PYTHONUNBUFFERED": "1", **environment(bootstrap, kafka)}

    def of(self, user: str, way: str) -> dict[str, str]:
        """The environment of one user."""
        return self.environ(self.secured.address(way), self.secured.kafka(user, way))

    def run(self, environ: Mapping[str, str], *words: str) -> tuple[int, str, str]:
        """A command to its end: exit code, standard output, standard error."""
        done = subprocess.run(
            [sys.executable, "-m", "jobledger", *words],
            cwd=self.folder,
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def start(self, environ: Mapping[str, str], *words: str) -> Part:
        """A command that goes on."""
        made = Part(list(words), self.folder, environ)
        self.parts.append(made)
        return made

    def grant(self, *pairs: str) -> None:
        """Allow ``ROLE=PRINCIPAL`` what the role needs, as a person would who may do anything."""
        words = [word for pair in pairs for word in ("--principal", pair)]
        code, _, err = self.run(
            self.environ(self.secured.brokers.bootstrap, {}), "topics", "acls", self.target, *words, "--apply", "--yes"
        )
        assert code == 0, err


@pytest.fixture
def site(secured: Secured, tmp_path: Path, namespace: str) -> Iterator[Site]:
    """One site; its processes end with the test, and no password of anybody stands in what they said."""
    made = Site(secured, tmp_path, namespace)
    try:
        yield made
    finally:
        for part in made.parts:
            part.close()
    for part in made.parts:
        for password in secured.passwords.values():
            assert password not in part.said


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_system_runs_with_the_least_rights(site: Site, way: str) -> None:
    """Topics, submission, worker, router, coordinator and materializer, each under its own user: by certificate, by
    SCRAM-SHA-512 and by PLAIN, with settings from the environment alone."""
    site.grant(*(f"{user}=User:{user}" for user in USERS))
    code, _, err = site.run(site.of("admin", way), "topics", "apply", site.target, "--yes", "--replication", "1")
    assert code == 0, err
    site.start(site.of("streams", way), "streams", site.target)
    site.start(site.of("worker", way), "worker", site.target)
    site.start(site.of("router", way), "router", site.target)
    client = site.of("client", way)
    code, out, err = site.run(
        client, "submit", site.target, "send_mail", "to=a@example.org", "fail=1", "--wait", "--json"
    )
    assert code == 0, err + "".join(part.said for part in site.parts)
    ended = json.loads(out)
    assert ended["result"] == "sent to a@example.org"
    code, out, err = site.run(client, "emit", site.target, "Registered", "user_id=u-1", "--json")
    assert code == 0, err
    deadline = time.monotonic() + WAIT_S
    while True:
        code, out, err = site.run(client, "jobs", "list", "--app", site.target, "--json", "--state", "succeeded")
        assert code == 0, err
        if "welcome" in out:
            break
        assert time.monotonic() < deadline, out + "".join(part.said for part in site.parts)
    for part in site.parts:
        assert "Traceback" not in part.said
        assert " ERROR " not in part.said, part.said
