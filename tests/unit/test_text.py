"""Text that cannot be written everywhere is refused at the call, with the name of the argument."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import pytest

from jobledger import App
from jobledger.client.commands import who
from jobledger.config import Settings
from jobledger.definitions.context import JobContext
from jobledger.definitions.queues import Queue
from jobledger.errors import BadArguments, BadEvent, ConfigError, JobledgerError
from jobledger.kafka.topic_names import check_text

#: Text as Python reads a file's name that is not UTF-8.
ODD = b"caf\xe9".decode("utf-8", "surrogateescape")
NUL = "a\0b"
#: No broker listens at this address, so a value that is not refused before a client connects raises another error.
NOWHERE = Settings(bootstrap="127.0.0.1:1", submit_timeout=0.5)

app = App("shop", settings=NOWHERE)


@app.task
async def send(to: str, more: Any = None) -> None: ...


@app.task(timeout=5)
async def keyed(to: str) -> None: ...


@app.event(key="user")
@dataclasses.dataclass(frozen=True)
class Registered:
    user: str
    more: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def job_keyed(text: str) -> Any:
    """Return a job with the key ``text``."""
    return App("shop", settings=NOWHERE).task(key=lambda to: text, timeout=5)(keyed.fn).job("a")


#: The name in the error, the call that gets the text, and the class of the error.
GIVEN: list[tuple[str, Callable[[str], Any], type[JobledgerError]]] = [
    (r"tag name", lambda t: send.using(tags={t: "x"}), ConfigError),
    (r"tag 'tenant'", lambda t: send.using(tags={"tenant": t}), ConfigError),
    (r"'keyed': key", lambda t: keyed.using(key=t), ConfigError),
    (r"the key of keyed\(\)", lambda t: job_keyed(t), BadArguments),
    (r"queue", lambda t: send.using(queue=t), ConfigError),
    (r"reason", lambda t: app.cancel("7", t), ConfigError),
    (r"by=", lambda t: app.cancel("7", by=t), ConfigError),
    (r"job id", lambda t: app.cancel(t), ConfigError),
    (r"reason", lambda t: app.pause(queue="default", reason=t), ConfigError),
    (r"by=", lambda t: app.resume(task="send", by=t), ConfigError),
    (r"reason", lambda t: app.limit(queue="default", rate=1, reason=t), ConfigError),
    (r"task", lambda t: app.pause(task=t), ConfigError),
    (r"name", lambda t: app.task(name=t)(lambda x: x), ConfigError),
    (r"event", lambda t: app.event(name=t)(type("E", (), {"__annotations__": {"x": int}})), ConfigError),
    (r"topic", lambda t: app.event(name="Of", topic=t)(type("Of", (), {"__annotations__": {"x": int}})), ConfigError),
    (r"namespace", lambda t: App(t), ConfigError),
    (r"queue", lambda t: Queue(t), ConfigError),
    (r"fair_by", lambda t: Queue("mail", fair_by=t), ConfigError),
    (r"group", lambda t: app.lifecycle(t), ConfigError),
]
#: Calls that accept a NUL, which is stored as another character in PostgreSQL.
LENIENT: list[tuple[str, Callable[[str], Any], type[JobledgerError]]] = [
    (r"job id", lambda t: app.job(t), ConfigError),
    (r"job id", lambda t: app.client.wait(t), ConfigError),
    (r"task", lambda t: list(app.jobs(task=t)), ConfigError),
    (r"queue", lambda t: list(app.jobs(queue=t)), ConfigError),
    (r"tag", lambda t: list(app.jobs(tag=(t, "x"))), ConfigError),
    (r"tag", lambda t: list(app.jobs(tag={"x": t})), ConfigError),
    (r"send\(\).*to is 'caf", lambda t: send.job(t), BadArguments),
    (r"send\(\).*more\['a'\]\[1\] is 'caf", lambda t: send.job("a", {"a": ["b", t]}), BadArguments),
    (r"send\(\).*a key of more is 'caf", lambda t: send.job("a", {t: 1}), BadArguments),
    (r"Registered\.user is 'caf", lambda t: app.emit(Registered(t)), BadEvent),
    (r"Registered\.more\.a\[0\] is 'caf", lambda t: app.emit(Registered("a", {"a": [t]})), BadEvent),
    (r"a key of Registered\.more is 'caf", lambda t: app.emit(Registered("a", {t: []})), BadEvent),
]


@pytest.mark.parametrize(("named", "give", "kind"), [*GIVEN, *LENIENT], ids=lambda v: v if isinstance(v, str) else "")
def test_text_that_utf8_cannot_hold_is_refused_by_name(
    named: str, give: Callable[[str], Any], kind: type[JobledgerError]
) -> None:
    """The error is one of Jobledger's, names the argument, and can itself be printed."""
    with pytest.raises(ConfigError, match=named) as caught:
        give(ODD)
    assert isinstance(caught.value, kind)
    assert str(caught.value).encode()


@pytest.mark.parametrize(("named", "give", "kind"), GIVEN, ids=lambda v: v if isinstance(v, str) else "")
def test_a_nul_is_refused_in_text_that_databases_store(
    named: str, give: Callable[[str], Any], kind: type[JobledgerError]
) -> None:
    """PostgreSQL's type `text` cannot hold a NUL."""
    with pytest.raises(ConfigError, match=named) as caught:
        give(NUL)
    assert isinstance(caught.value, kind)


@pytest.mark.parametrize("given", [7, None, b"a"], ids=str)
def test_a_value_that_is_no_text_is_refused_by_name(given: Any) -> None:
    """This holds for a job's id and for a tag."""
    with pytest.raises(ConfigError, match="job id"):
        app.job(given)
    with pytest.raises(ConfigError, match="job id"):
        app.cancel(given)
    with pytest.raises(ConfigError, match="tag"):
        send.using(tags={"a": given})
    with pytest.raises(ConfigError, match="run=0"):
        app.cancel("7", run=0)


def test_a_result_that_utf8_cannot_hold_is_refused_with_its_path() -> None:
    """The job fails as bad-result, with the path in the error."""
    with pytest.raises(ValueError, match=r"the result\['name'\] is 'caf.*lone surrogate"):
        send.encode_result({"name": ODD})


def test_any_other_text_is_accepted() -> None:
    """An object of a subclass of str is sent as plain text."""

    class Level(enum.StrEnum):
        HIGH = "hoch ☃ \U0001f600"

    bound = send.using(tags={"level": Level.HIGH, "empty": ""})
    assert bound.tags == {"level": Level.HIGH.value, "empty": ""}
    assert type(bound.tags["level"]) is str
    assert check_text("x", "a" * 5, 5) == "aaaaa"
    with pytest.raises(ConfigError, match="101 characters, is not a text of 1 to 5"):
        check_text("x", "a" * 101, 5)


def test_the_name_of_the_user_is_always_valid_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose name is no UTF-8 can cancel a job."""
    monkeypatch.setattr("getpass.getuser", lambda: ODD)
    assert who().startswith("caf?@")


def test_progress_takes_any_message() -> None:
    """A progress report must not fail a job, so characters that cannot be written are replaced."""
    messages: list[str | None] = []
    context = JobContext(
        job_id="7", task="send", queue="default", run=1, attempt=1, release=1, tags={}, parent=None, trace=None,
        report=lambda job, fact: messages.append(fact.message),
    )  # fmt: skip
    context.progress(1, 2, ODD)
    assert messages == ["caf?"]
