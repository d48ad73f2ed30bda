"""Secured clusters: every part with its own user, its own certificate or password, and exactly the least rights.

The broker lets nobody do what no ACL allows (`tests.secured`). Where real processes make no
difference, the parts run in this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from jobledger import App
from jobledger.cli.loading import load_app
from jobledger.config import Settings
from jobledger.errors import NotAuthenticated, StoreNotFound
from jobledger.kafka.acls import Right
from jobledger.kafka.auth import knock
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.streams.coordinator.faust.async_producer import AckedWriter
from jobledger.streams.coordinator.faust.security import security
from tests.secured import MTLS, OIDC, PLAIN, SCRAM, WAYS, Secured, environment, with_certificate

pytestmark = pytest.mark.kafka

WAIT_S = 240.0
#: Seconds in which a refusal must have been said.
BOUND_S = 100.0
SYSTEM = ("client", "worker", "streams", "router", "admin")
USERS = (*SYSTEM, "coordinator", "materializer", "nobody")

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

    def load(self) -> App:
        """The app, here, for people who may do anything."""
        home = self.folder / "home" / "status" / f"{self.namespace}.db"
        target = f"{self.folder / self.target.partition(':')[0]}.py:app"
        return load_app(target, bootstrap=self.secured.brokers.bootstrap, status_url=f"sqlite:///{home}")

    def settled(self, app: App, count: int) -> None:
        """Wait until so many jobs have succeeded; no other has ended."""
        deadline = time.monotonic() + WAIT_S
        states: Counter[str] = Counter()
        while states["succeeded"] < count:
            assert time.monotonic() < deadline, f"{states}, not {count}\n" + "".join(p.said for p in self.parts)
            time.sleep(0.1)
            with contextlib.suppress(StoreNotFound):  # the materializer is starting
                states = Counter(job.state.value for job in app.jobs())
        assert set(states) == {"succeeded"}, states
        assert states["succeeded"] == count

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


@pytest.mark.parametrize(
    "way", [way if way == SCRAM else pytest.param(way, marks=pytest.mark.extended) for way in WAYS]
)
def test_the_whole_system_runs_with_the_least_rights(site: Site, way: str, say: Callable[[str], None]) -> None:
    """Topics, submission, worker, router, coordinator and materializer, each under its own user: by certificate,
    SCRAM-SHA-512, PLAIN and OAUTHBEARER, with settings from the environment alone."""
    site.grant(*(f"{user}=User:{user}" for user in SYSTEM))
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
    say(f"secured: the whole system over TLS by {way}, each part with its own user and the least rights")


def bad(secured: Secured, kind: str) -> tuple[str, dict[str, str], str]:
    """An address and settings with which nobody gets in, and what must be said of it."""
    mtls, scram = secured.kafka("worker", MTLS), secured.kafka("worker", SCRAM)
    tls_at, sasl_at = secured.address(MTLS), secured.address(SCRAM)
    match kind:
        case "password-scram":
            return sasl_at, {**scram, "sasl.password": "wr0ng-password"}, "JOBLEDGER_KAFKA__SASL_USERNAME=worker"
        case "password-plain":
            return (
                sasl_at,
                {**secured.kafka("worker", PLAIN), "sasl.password": "wr0ng-password"},
                "JOBLEDGER_KAFKA__SASL_USERNAME=worker",
            )
        case "secret":
            return (
                sasl_at,
                {**secured.kafka("worker", OIDC), "sasl.oauthbearer.client.secret": "wr0ng-secret"},
                "JOBLEDGER_KAFKA__SASL_OAUTHBEARER_CLIENT_ID",
            )
        case "mechanism":
            return sasl_at, {**scram, "sasl.mechanism": "SCRAM-SHA-256"}, "JOBLEDGER_KAFKA__SASL_MECHANISM"
        case "untrusted-certificate":
            stranger = secured.stranger.issue("worker")
            return tls_at, with_certificate(secured.authority.ca, stranger), "does not take this client's certificate"
        case "expired-certificate":
            old = secured.authority.issue("worker", valid=-timedelta(days=1))
            return tls_at, with_certificate(secured.authority.ca, old), "does not take this client's certificate"
        case "no-certificate":
            kept = {name: mtls[name] for name in ("security.protocol", "ssl.ca.location")}
            return tls_at, kept, "JOBLEDGER_KAFKA__SSL_CERTIFICATE_LOCATION"
        case "wrong-authority":
            return tls_at, {**mtls, "ssl.ca.location": str(secured.stranger.ca)}, "JOBLEDGER_KAFKA__SSL_CA_LOCATION"
        case "another-host":
            return tls_at.replace("127.0.0.1", "localhost"), mtls, "not for localhost"
        case "plain-at-tls":
            return tls_at, {}, "JOBLEDGER_KAFKA__SECURITY_PROTOCOL"
        case "tls-at-plain":
            return secured.brokers.bootstrap, mtls, "does not speak TLS"
    raise AssertionError(kind)


BAD = [
    "password-scram",
    "password-plain",
    "secret",
    "mechanism",
    "untrusted-certificate",
    "expired-certificate",
    "no-certificate",
    "wrong-authority",
    "another-host",
    "plain-at-tls",
    "tls-at-plain",
]


@pytest.mark.parametrize("kind", BAD)
def test_who_is_not_let_in_is_told_why(secured: Secured, kind: str, namespace: str) -> None:
    """By librdkafka at the first look and at a submission, by aiokafka at its start: within seconds, with the setting
    that is wrong and without the password."""
    address, kafka, said = bad(secured, kind)
    settings = Settings(bootstrap=address, kafka=kafka, submit_timeout=8.0 if kind == "secret" else 30.0)

    async def start() -> None:
        writer = AckedWriter(settings, security(settings), 20.0)
        try:
            await writer.start()
        finally:
            await writer.stop(1.0)
            await asyncio.sleep(0.1)  # a TLS transport is closed some turns of the loop after it was told

    def submit() -> None:
        writer = LogWriter(settings, None)
        try:
            writer.send([Outgoing(f"{namespace}.x", b"x", "k")])
        finally:
            writer.close(0.0)

    def look() -> None:
        knock(settings)

    def begin() -> None:
        asyncio.run(start())

    for attempt in (look, submit, begin):
        began = time.monotonic()
        with pytest.raises(NotAuthenticated) as caught:
            attempt()
        assert said in str(caught.value)
        assert "wr0ng" not in str(caught.value)
        assert time.monotonic() - began < BOUND_S


@pytest.mark.extended
@pytest.mark.parametrize(
    "words", [["worker"], ["coordinator"], ["materializer"], ["router"], ["streams"], ["topics", "plan"]]
)
def test_a_process_that_is_not_let_in_ends(site: Site, words: list[str]) -> None:
    """Exit code 77 within seconds and one line that says why; neither a traceback nor the password."""
    address, kafka, said = bad(site.secured, "password-scram")
    part = site.start(site.environ(address, kafka), *words, site.target)
    assert part.ended() == 77
    lines = sum("does not let this client in" in line for line in part.said.splitlines())
    assert lines == 1 or (lines == 2 and words == ["streams"]), part.said
    assert said in part.said
    assert "Traceback" not in part.said
    assert "wr0ng" not in part.said


def test_who_may_nothing_is_told_what_it_needs(site: Site) -> None:
    """Without any ACL each part ends with all that it needs on its topics; the client with the first of it."""
    site.grant("admin=User:admin")
    code, _, err = site.run(site.of("admin", MTLS), "topics", "apply", site.target, "--yes", "--replication", "1")
    assert code == 0, err
    nobody = site.of("nobody", MTLS)
    parts = [site.start(nobody, words, site.target) for words in ("worker", "coordinator", "materializer", "router")]
    code, _, err = site.run(nobody, "submit", site.target, "send_mail", "to=a@example.org")
    assert code == 77, err
    assert "the client needs Write on topic" in err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part.ended() == 77, part.said
        line = next(line for line in part.said.splitlines() if "jobledger topics acls" in line)
        for name in (f"{site.namespace}.schemas", f"{site.namespace}.dead-letter"):
            assert f"Write on topic {name}" in line
        assert "Traceback" not in part.said


@pytest.mark.extended
@pytest.mark.parametrize(
    ("role", "words", "right"),
    [
        ("worker", "worker", Right("topic", "<ns>.lifecycle", "Write")),
        ("worker", "worker", Right("group", "<ns>.worker.", "Read", "prefixed")),
        ("coordinator", "coordinator", Right("topic", "<ns>.coordination", "Read")),
        ("coordinator", "coordinator", Right("topic", "<ns>.coordinator-schedules-changelog", "Write")),
        ("coordinator", "coordinator", Right("group", "<ns>.coordinator", "Read")),
        ("materializer", "materializer", Right("topic", "<ns>.lifecycle", "Read")),
        ("router", "router", Right("topic", "<ns>.jobs.", "Write", "prefixed")),
    ],
    ids=lambda value: f"{value.operation}-{value.kind}-{value.name}" if isinstance(value, Right) else value,
)
def test_a_right_that_is_taken_away_meanwhile_loses_nothing(site: Site, role: str, words: str, right: Right) -> None:
    """The part ends with 77 and says which right is gone; given back and started again, every
    job and event comes to its end."""
    secured, right = site.secured, right.of(site.namespace)
    boss = site.environ(secured.brokers.bootstrap, {})
    assert site.run(boss, "topics", "apply", site.target, "--yes", "--replication", "1")[0] == 0
    site.grant(f"{role}=User:{role}")
    others = [part for part in ("worker", "coordinator", "materializer", "router") if part != words]
    for other in others:
        site.start(boss, other, site.target)
    part = site.start(site.of(role, MTLS), words, site.target)
    app, count = site.load(), 0

    def work(number: int) -> None:
        nonlocal count
        mail, registered = app.tasks["send_mail"], app.events["Registered"].cls
        app.submit_many(mail.job(f"{count + n}@example.org", fail=int(n % 3 == 0)) for n in range(number))
        app.emit_many(registered(f"u{count + n}") for n in range(number))
        count += number

    try:
        work(10)
        site.settled(app, 2 * count)
        secured.take(f"User:{role}", right)
        deadline = time.monotonic() + BOUND_S
        while part.process.poll() is None:
            work(5)
            time.sleep(0.3)
            assert time.monotonic() < deadline, part.said
        assert part.ended() == 77, part.said
        assert f"{right.operation} on {right.kind} {right.name}" in part.said
        assert "Traceback" not in part.said, part.said
        secured.give(f"User:{role}", right)
        site.start(site.of(role, MTLS), words, site.target)
        site.settled(app, 2 * count)
    finally:
        app.close()
