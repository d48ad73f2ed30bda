"""Secured clusters: every part has its own user, its own certificate or password, and exactly the least rights.

The broker allows only what an ACL allows (`tests.secured`). If real processes make no difference, the parts run in the
test's own process.
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
from jobledger.kafka.auth import check_connection
from jobledger.log.writer import LogWriter, Outgoing
from jobledger.streams.coordinator.faust.async_producer import AckedWriter
from jobledger.streams.coordinator.faust.security import security
from tests.secured import MTLS, OIDC, PLAIN, SCRAM, WAYS, Secured, environment, with_certificate

pytestmark = pytest.mark.kafka

WAIT_S = 240.0
#: Seconds in which a refusal must have been reported.
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
    """Yield the broker of this module."""
    with Secured(tmp_path_factory.mktemp("secured"), USERS) as made:
        yield made


class Part:
    """A command that continues to run in its own process. Its output goes to a file."""

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
    def output_text(self) -> str:
        """Return the output until now."""
        return self.output.read_text("utf-8", "replace")

    def until(self, text: str) -> None:
        """Wait until the output contains this text."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.output_text:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output_text}"
            assert time.monotonic() < deadline, f"{text!r} not in\n{self.output_text}"
            time.sleep(0.05)

    def ended(self) -> int:
        """Wait until the process ends, and return its exit code."""
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """Stop the process with SIGTERM, and kill it and its child processes if they do not end."""
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
    """A folder with an app in its own namespace, which several users of a secured cluster run."""

    def __init__(self, secured: Secured, folder: Path, namespace: str) -> None:
        self.secured, self.folder, self.namespace = secured, folder, namespace
        (folder / f"site_{namespace}.py").write_text(APP.format(namespace=namespace))
        self.target = f"site_{namespace}:app"
        self.parts: list[Part] = []

    def environ(self, bootstrap: str, kafka: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process with these settings and no others."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_") and k != "FORCE_COLOR"}
        home = {"JOBLEDGER_HOME": str(self.folder / "home"), "JOBLEDGER_SUBMIT_TIMEOUT": "20"}
        return {**kept, **home, "PYTHONUNBUFFERED": "1", **environment(bootstrap, kafka)}

    def environ_of(self, user: str, way: str) -> dict[str, str]:
        """Return the environment of one user."""
        return self.environ(self.secured.address(way), self.secured.kafka(user, way))

    def run(self, environ: Mapping[str, str], *words: str) -> tuple[int, str, str]:
        """Run a command to its end. Return its exit code, standard output and standard error."""
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
        """Start a command that continues to run."""
        made = Part(list(words), self.folder, environ)
        self.parts.append(made)
        return made

    def load(self) -> App:
        """Load the app in this process, with the rights of the cluster's operators."""
        home = self.folder / "home" / "status" / f"{self.namespace}.db"
        target = f"{self.folder / self.target.partition(':')[0]}.py:app"
        return load_app(target, bootstrap=self.secured.brokers.bootstrap, status_url=f"sqlite:///{home}")

    def wait_for_successes(self, app: App, count: int) -> None:
        """Wait until ``count`` jobs have succeeded. No job may have another state."""
        deadline = time.monotonic() + WAIT_S
        states: Counter[str] = Counter()
        while states["succeeded"] < count:
            assert time.monotonic() < deadline, f"{states}, not {count}\n" + "".join(p.output_text for p in self.parts)
            time.sleep(0.1)
            with contextlib.suppress(StoreNotFound):  # the materializer has not created the table yet
                states = Counter(job.state.value for job in app.jobs())
        assert set(states) == {"succeeded"}, states
        assert states["succeeded"] == count

    def grant(self, *pairs: str) -> None:
        """Give each ``ROLE=PRINCIPAL`` the rights of the role, as an operator of the cluster."""
        words = [word for pair in pairs for word in ("--principal", pair)]
        code, _, err = self.run(
            self.environ(self.secured.brokers.bootstrap, {}), "topics", "acls", self.target, *words, "--apply", "--yes"
        )
        assert code == 0, err


@pytest.fixture
def site(secured: Secured, tmp_path: Path, namespace: str) -> Iterator[Site]:
    """Yield a site. Its processes end with the test, and their output must not contain a password."""
    made = Site(secured, tmp_path, namespace)
    try:
        yield made
    finally:
        for part in made.parts:
            part.close()
    for part in made.parts:
        for password in secured.passwords.values():
            assert password not in part.output_text


@pytest.mark.extended
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_system_runs_with_the_least_rights(site: Site, way: str, say: Callable[[str], None]) -> None:
    """Topics, submission, worker, router, coordinator and materializer each have their own user. They log in with
    certificates, SCRAM-SHA-512, PLAIN or OAUTHBEARER, with settings from the environment only."""
    site.grant(*(f"{user}=User:{user}" for user in SYSTEM))
    code, _, err = site.run(
        site.environ_of("admin", way), "topics", "apply", site.target, "--yes", "--replication", "1"
    )
    assert code == 0, err
    site.start(site.environ_of("streams", way), "streams", site.target)
    site.start(site.environ_of("worker", way), "worker", site.target)
    site.start(site.environ_of("router", way), "router", site.target)
    client = site.environ_of("client", way)
    code, out, err = site.run(
        client, "submit", site.target, "send_mail", "to=a@example.org", "fail=1", "--wait", "--json"
    )
    assert code == 0, err + "".join(part.output_text for part in site.parts)
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
        assert time.monotonic() < deadline, out + "".join(part.output_text for part in site.parts)
    for part in site.parts:
        assert "Traceback" not in part.output_text
        assert " ERROR " not in part.output_text, part.output_text
    say(f"secured: the whole system over TLS by {way}, each part with its own user and the least rights")


def refused_login(secured: Secured, kind: str) -> tuple[str, dict[str, str], str]:
    """Return an address, settings whose login is refused, and the text that the error must contain."""
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
            return tls_at, with_certificate(secured.authority.ca, stranger), "refuses this client's certificate"
        case "expired-certificate":
            old = secured.authority.issue("worker", valid=-timedelta(days=1))
            return tls_at, with_certificate(secured.authority.ca, old), "refuses this client's certificate"
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
            return secured.brokers.bootstrap, mtls, "does not use TLS"
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
def test_a_refused_login_is_an_error_that_names_the_setting(secured: Secured, kind: str, namespace: str) -> None:
    """librdkafka reports the refusal at the check of the connection and at a submission, and aiokafka at its start. The
    error comes within its time limit, names the wrong setting, and does not contain the password."""
    address, kafka, said = refused_login(secured, kind)
    settings = Settings(bootstrap=address, kafka=kafka, submit_timeout=8.0 if kind == "secret" else 30.0)

    async def start() -> None:
        writer = AckedWriter(settings, security(settings), 20.0)
        try:
            await writer.start()
        finally:
            await writer.stop(1.0)
            await asyncio.sleep(0.1)  # a TLS transport needs some turns of the event loop to close

    def submit() -> None:
        writer = LogWriter(settings, None)
        try:
            writer.send([Outgoing(f"{namespace}.x", b"x", "k")])
        finally:
            writer.close(0.0)

    def look() -> None:
        check_connection(settings)

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
def test_a_process_whose_login_is_refused_exits(site: Site, words: list[str]) -> None:
    """The process exits with 77 and one line that says why, without a traceback and without the password."""
    address, kafka, said = refused_login(site.secured, "password-scram")
    part = site.start(site.environ(address, kafka), *words, site.target)
    assert part.ended() == 77
    lines = sum("refuses this client's login" in line for line in part.output_text.splitlines())
    assert lines == 1 or (lines == 2 and words == ["streams"]), part.output_text
    assert said in part.output_text
    assert "Traceback" not in part.output_text
    assert "wr0ng" not in part.output_text


def test_a_user_without_rights_gets_an_error_that_names_the_missing_rights(site: Site) -> None:
    """Without any ACL, each part ends with an error that names all missing rights on its topics. The client names the
    first missing right."""
    site.grant("admin=User:admin")
    code, _, err = site.run(
        site.environ_of("admin", MTLS), "topics", "apply", site.target, "--yes", "--replication", "1"
    )
    assert code == 0, err
    nobody = site.environ_of("nobody", MTLS)
    parts = [site.start(nobody, words, site.target) for words in ("worker", "coordinator", "materializer", "router")]
    code, _, err = site.run(nobody, "submit", site.target, "send_mail", "to=a@example.org")
    assert code == 77, err
    assert "the client needs Write on topic" in err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part.ended() == 77, part.output_text
        line = next(line for line in part.output_text.splitlines() if "jobledger topics acls" in line)
        for name in (f"{site.namespace}.schemas", f"{site.namespace}.dead-letter"):
            assert f"Write on topic {name}" in line
        assert "Traceback" not in part.output_text


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
def test_a_right_that_is_removed_at_run_time_loses_nothing(site: Site, role: str, words: str, right: Right) -> None:
    """The part exits with 77 and names the missing right. When the right is restored and the part is started again,
    every job and event is processed."""
    secured, right = site.secured, right.of(site.namespace)
    boss = site.environ(secured.brokers.bootstrap, {})
    assert site.run(boss, "topics", "apply", site.target, "--yes", "--replication", "1")[0] == 0
    site.grant(f"{role}=User:{role}")
    others = [part for part in ("worker", "coordinator", "materializer", "router") if part != words]
    for other in others:
        site.start(boss, other, site.target)
    part = site.start(site.environ_of(role, MTLS), words, site.target)
    app, count = site.load(), 0

    def work(number: int) -> None:
        nonlocal count
        mail, registered = app.tasks["send_mail"], app.events["Registered"].cls
        app.submit_many(mail.job(f"{count + n}@example.org", fail=int(n % 3 == 0)) for n in range(number))
        app.emit_many(registered(f"u{count + n}") for n in range(number))
        count += number

    try:
        work(10)
        site.wait_for_successes(app, 2 * count)
        secured.take(f"User:{role}", right)
        deadline = time.monotonic() + BOUND_S
        while part.process.poll() is None:
            work(5)
            time.sleep(0.3)
            assert time.monotonic() < deadline, part.output_text
        assert part.ended() == 77, part.output_text
        assert f"{right.operation} on {right.kind} {right.name}" in part.output_text
        assert "Traceback" not in part.output_text, part.output_text
        secured.give(f"User:{role}", right)
        site.start(site.environ_of(role, MTLS), words, site.target)
        site.wait_for_successes(app, 2 * count)
    finally:
        app.close()
