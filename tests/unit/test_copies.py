"""Copies of jobs with changed arguments: what is taken from the original, what is checked, and what the log says."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest

from jobledger import App, Queue, job
from jobledger.client.copies import copy_of
from jobledger.client.whole_jobs import Whole
from jobledger.definitions.copy_options import CopyOptions
from jobledger.definitions.task import JobRequest
from jobledger.errors import BadArguments, ConfigError, UnknownQueue, UnknownTask
from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import submission
from jobledger.schemas.fast_path import glance
from jobledger.streams.status.store.rows import COLUMNS, life_of_row, row
from jobledger.views import facts

HUGE = 2**70
app = App("copies", queues=[Queue("mail", priorities=True), "slow"], default_queue=None)


@app.task(queue="mail", expires_in=60)
def send(to: str, number: int = 0, when: dt.date | None = None) -> None: ...


@app.task(queue="slow", key="user", timeout=5)
async def keyed(user: str, text: str = "") -> None: ...


@app.task(queue="slow", key=lambda user, text: f"{user}/{text}", timeout=5)
async def computed(user: str, text: str) -> None: ...


def whole(
    task: str, args: bytes, *, queue: str = "mail", key: str | None = None, due: bool = False, **spec: Any
) -> Whole:
    """Return a job in the log. ``due``: it is known from its release, not from its submission."""
    held = ev.JobSpec(args, **spec)
    event = submission("original", task, queue, key, held, 0, "test", None)
    return (msgspec.structs.replace(event, fact=ev.JobDue(held, 5)) if due else event), held


def copied(original: Whole, **options: Any) -> JobRequest[Any]:
    """Return the request for a copy, made by ann."""
    chosen: CopyOptions = {"by": "ann", **options}  # type: ignore[typeddict-item]  # some tests give wrong ones
    return copy_of(original, app.registry.task, **chosen)


def test_what_is_not_changed_is_taken_from_the_original() -> None:
    """Unchanged arguments keep their JSON, also numbers that only text can hold exactly. Tags of Jobledger itself are
    left out."""
    tags = {"tenant": "acme", ev.CRASHES_TAG: "3", ev.UNKNOWN_TASK_TAG: "2"}
    args = b'{"to":"a","number":%d,"when":"2026-01-31"}' % HUGE
    original = whole("send", args, tags=tags, parent="p", expires_in_ms=5_000, priority="high")
    request = copied(original, args={"to": "b"}, reason="wrong address")
    assert msgspec.json.decode(request.args, type=dict[str, msgspec.Raw]) == {
        "number": msgspec.Raw(b"%d" % HUGE), "when": msgspec.Raw(b'"2026-01-31"'), "to": msgspec.Raw(b'"b"'),
    }  # fmt: skip
    assert (request.queue, request.priority, request.tags) == ("mail", "high", {"tenant": "acme"})
    assert (request.expires_in_ms, request.delay_ms, request.job_id) == (5_000, None, None)
    assert request.links == ev.JobLinks("original", "ann", "wrong address")


def test_options_replace_what_the_original_has() -> None:
    """A queue without priorities drops the priority of the original. An expiry as a time is not copied."""
    original = whole("send", b'{"to":"a"}', priority="high", expires_at=7, due=True, tags={"a": "b"})
    request = copied(original, queue="slow", tags={}, args={"when": dt.date(2026, 2, 1)})
    assert (request.queue, request.priority, request.tags) == ("slow", None, {})
    assert request.expires_in_ms == 60_000, "the task's own"
    assert msgspec.json.decode(request.args) == {"to": "a", "when": "2026-02-01"}
    assert copied(original, priority="low").priority == "low"
    assert copied(original, priority="normal").priority is None


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"args": {"to": 1}}, BadArguments, "do not fit send"),
        ({"args": {"colour": "red"}}, BadArguments, "do not fit send"),
        ({"without": ["to"]}, BadArguments, "do not fit send"),
        ({"without": ["colour"]}, BadArguments, "has no argument 'colour'; it has to"),
        ({"without": ["to"], "args": {"to": "b"}}, BadArguments, "both changed and left out"),
        ({"args": {"to": "\ud800"}}, BadArguments, "to"),
        ({"queue": "fast"}, UnknownQueue, "fast"),
        ({"tags": {"a": 1}}, ConfigError, "tag 'a'"),
        ({"key": ""}, ConfigError, "key"),
        ({"by": "x" * 201}, ConfigError, "by"),
        ({"reason": ""}, ConfigError, "reason"),
    ],
)
def test_a_copy_is_checked_as_a_submission_is(changes: dict[str, Any], error: type[ConfigError], said: str) -> None:
    """What does not fit is named, before anything is sent."""
    with pytest.raises(error, match=said):
        copied(whole("send", b'{"to":"a"}'), **changes)


def test_a_parameter_that_was_renamed_is_left_out() -> None:
    """The arguments of an earlier version of a task can be brought into the form of the present one."""
    original = whole("send", b'{"address":"a","number":3}')
    with pytest.raises(BadArguments, match="address"):
        copied(original, args={"to": "a"})
    assert msgspec.json.decode(copied(original, args={"to": "a"}, without="address").args) == {"to": "a", "number": 3}
    with pytest.raises(BadArguments, match="are not a JSON object"):
        copied(whole("send", b"[1]"), args={"to": "a"})
    with pytest.raises(UnknownTask):
        copied(whole("gone", b"{}"))


@pytest.mark.parametrize(
    ("task", "args", "key", "changes", "expected"),
    [
        ("keyed", b'{"user":"u"}', "u", {"args": {"user": "v"}}, "v"),
        ("keyed", b'{"user":"u"}', "u", {"args": {"text": "x"}}, "u"),
        ("keyed", b'{"user":"u"}', "chosen", {"args": {"user": "v"}}, "chosen"),
        ("keyed", b'{"user":"u"}', "u", {"key": "mine"}, "mine"),
        ("keyed", b'{"old":1}', "1", {"args": {"user": "v"}, "without": ["old"]}, "v"),
        ("computed", b'{"user":"u","text":"t"}', "u/t", {"args": {"text": "x"}}, "u/x"),
        ("send", b'{"to":"a"}', None, {}, None),
    ],
)
def test_a_key_follows_the_arguments_unless_it_was_chosen(
    task: str, args: bytes, key: str | None, changes: dict[str, Any], expected: str | None
) -> None:
    """A key that the task derived from the arguments is derived again. A key that the submitter chose stays."""
    queue = "mail" if task == "send" else "slow"
    assert copied(whole(task, args, queue=queue, key=key), **changes).key == expected


def test_the_status_of_a_copy_names_the_original_and_who_asked() -> None:
    """This holds if the job is known from its submission or only from its release, and in the table's row. A plain job
    has one byte for the link."""
    spec = ev.JobSpec(b"{}", links=ev.JobLinks("original", "ann", "why"))
    event = submission("copy", "send", "mail", None, spec, 0, "test", None)
    assert glance(codec.encode(event)) is None, "the full decoder reads a copy"
    assert codec.decode(codec.encode(event)) == event
    for fact in (event.fact, ev.JobDue(spec, 5)):
        life = job.of(1, 1, 1, "send", "mail", None, fact, (1, "copies.jobs.mail", 0, 3))
        assert life is not None
        status = job.status("copy", life)
        assert (status.copy_of, status.by, status.plan) == ("original", "ann", None)
        written = row("copy", life, job.project(life))
        assert written[COLUMNS.index("actor")] == "ann"
        assert life_of_row(written) == life
    assert facts.describe(event.fact) == "copy of original by ann: why {}"
    plain = job.of(1, 1, 1, "send", "mail", None, ev.JobSubmitted(ev.JobSpec(b"{}")), (1, "copies.jobs.mail", 0, 3))
    assert plain is not None
    assert plain.head.copy is None
    assert (
        len(msgspec.msgpack.encode(plain.head)) == len(msgspec.msgpack.encode(msgspec.to_builtins(plain.head)[:-1])) + 1
    )


def test_a_redrive_of_a_copy_stays_a_copy() -> None:
    """The present run's author is then who asked for the redrive."""
    spec = ev.JobSpec(b"{}", links=ev.JobLinks("original", "ann"))
    fact = ev.JobSubmitted(spec, 0, None, ev.Redrive("bob", None, "a plan"))
    life = job.of(2, 0, 1, "send", "mail", None, fact, (1, "copies.coordination", 0, 3))
    assert life is not None
    status = job.status("copy", life)
    assert (status.copy_of, status.by, status.plan) == ("original", "bob", "a plan")
    assert "redriven by bob, plan a plan" in facts.describe(fact)
