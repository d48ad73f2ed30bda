"""Tasks: arguments and options that are accepted or refused, and when."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App
from jobledger.definitions.context import JobContext, current_job
from jobledger.definitions.queues import Queue
from jobledger.definitions.retry import Retry
from jobledger.definitions.task import Submitter, Task
from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import BadArguments, ConfigError, UnknownQueue, UnknownTask


def nobody() -> Submitter:
    """A submitter for tests without submissions."""
    raise AssertionError("nothing is submitted in these tests")


def registry(**options: Any) -> TaskRegistry:
    """Return a registry without a client."""
    return TaskRegistry("shop", submitter=nobody, **options)


def task_of(fn: Any, **options: Any) -> Task[Any, Any]:
    """Return a task with the function ``fn``."""
    return add(registry(), fn, **options)


def add(to: TaskRegistry, fn: Any, **options: Any) -> Task[Any, Any]:
    """Register ``fn``, in the queue ``mail`` if the options name none."""
    given: dict[str, Any] = {"queue": "mail", **options}
    return to.add(fn, **given)


def send(to: str, template: str = "welcome", *, copies: int = 1) -> str:
    """A task's function."""
    return f"{to}/{template}/{copies}"


def test_arguments_are_encoded_by_name() -> None:
    """Positional and named arguments become one JSON object. Defaults are not sent: the worker adds them."""
    task = task_of(send)
    assert json.loads(task.encode_args(("a",), {})) == {"to": "a"}
    assert json.loads(task.encode_args(("a", "b"), {"copies": 2})) == {"to": "a", "template": "b", "copies": 2}
    assert task.decode_args(b'{"to":"a"}') == {"to": "a"}
    assert task("x", copies=3) == "x/welcome/3"


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((), {}, "to"),
        (("a", "b", "c"), {}, "takes 2 positional"),
        (("a",), {"to": "b"}, "'to' twice"),
        (("a",), {"nope": 1}, "nope"),
        ((7,), {}, r"Expected `str`, got `int`"),
        (("a",), {"copies": "many"}, "copies"),
        ((object(),), {}, "object is not a JSON type"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_the_call(args: Any, kwargs: Any, names: str) -> None:
    """The error names the missing, surplus, doubled, unknown, mistyped or unwritable argument, before a record is
    sent."""
    with pytest.raises(BadArguments, match=names):
        task_of(send).encode_args(args, kwargs)


def test_the_error_after_a_change_of_the_signature_shows_arguments_and_signature() -> None:
    """The worker's error has the stored arguments and the new signature."""
    with pytest.raises(BadArguments, match=r'\{"recipient":"a"\}.*send\(to: str') as caught:
        task_of(send).decode_args(b'{"recipient":"a"}')
    assert "recipient" in str(caught.value)


@dataclass
class Address:
    """A dataclass argument."""

    street: str
    number: int


class Line(msgspec.Struct):
    """A msgspec argument."""

    sku: str


class Extra(TypedDict):
    """A TypedDict argument."""

    note: str


def ship(to: Address, at: dt.datetime, lines: list[Line], extra: Extra | None = None, anything: Any = None) -> None:
    """Typed arguments."""


def test_arguments_arrive_with_the_types_of_the_annotations() -> None:
    """The types are dataclasses, times, structs and typed dicts."""
    task = task_of(ship)
    at = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    raw = task.encode_args((Address("Elm", 3), at), {"lines": [Line("x")], "extra": {"note": "n"}, "anything": [1]})
    assert task.decode_args(raw) == {
        "to": Address("Elm", 3),
        "at": at,
        "lines": [Line("x")],
        "extra": {"note": "n"},
        "anything": [1],
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def takes_anything(a: Any, b: Any = 1) -> Any:
    """A function with the annotation `Any` only."""
    return a


@given(JSON, JSON)
def test_any_json_value_arrives_unchanged(a: Any, b: Any) -> None:
    """The decoded arguments are equal to the given ones."""
    task = task_of(takes_anything)
    assert task.decode_args(task.encode_args((a,), {"b": b})) == {"a": a, "b": b}


def test_a_parameter_that_cannot_be_sent_is_refused_at_load() -> None:
    """A variable parameter, a positional-only parameter and a class without a JSON form are refused when the task is
    declared."""

    def many(*rest: int) -> None: ...

    def only(a: int, /) -> None: ...

    def odd(a: TaskRegistry) -> None: ...

    for fn, names in ((many, r"\*rest"), (only, "cannot be sent by name"), (odd, "parameter a: TaskRegistry")):
        with pytest.raises(ConfigError, match=names):
            task_of(fn)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"queue": "no such"}, "no such"),
        ({"retry": "often"}, "often"),
        ({"retry": 0}, "max_attempts"),
        ({"timeout": -1}, "timeout=-1"),
        ({"name": ""}, "task name"),
    ],
)
def test_a_wrong_option_fails_at_load(options: dict[str, Any], names: str) -> None:
    """The error has the value."""
    with pytest.raises(ConfigError, match=names):
        task_of(send, **options)


def test_declared_queues_are_the_only_ones() -> None:
    """A task and a submission with another queue are refused. The error lists the declared queues."""
    app = registry(queues=["mail", Queue("bulk", partitions=2)])
    task = add(app, send)
    with pytest.raises(UnknownQueue, match=r"'mial'.*\['bulk', 'mail'\]"):
        add(app, ship, queue="mial")
    with pytest.raises(UnknownQueue, match="nowhere"):
        task.using(queue="nowhere")
    assert {n: q.partitions for n, q in app.queues.items()} == {"bulk": 2, "mail": 6}
    with pytest.raises(ConfigError, match="twice"):
        registry(queues=["mail", "mail"])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("01890A5D-AC96-774B-BCCE-B302099A8057", "01890a5d-ac96-774b-bcce-b302099a8057"),
        ("01890a5dac96774bbcceb302099a8057", "01890a5d-ac96-774b-bcce-b302099a8057"),
        (uuid.uuid5(uuid.NAMESPACE_URL, "order-17"), str(uuid.uuid5(uuid.NAMESPACE_URL, "order-17"))),
    ],
)
def test_a_callers_job_id_is_normalised(given: Any, kept: str) -> None:
    """Any version and spelling of a UUID is accepted, and the same UUID names the same job. Without `job_id=` the
    request has no id."""
    task = task_of(send)
    assert task.using(job_id=given).job("a").job_id == kept
    assert task.using(tags={"a": "b"}).job("a").job_id is None


@pytest.mark.parametrize("given", ["order-17", "", 17, b"01890a5dac96774bbcceb302099a8057", "\ud800"])
def test_a_job_id_that_is_no_uuid_is_refused(given: Any) -> None:
    """The error has the task, the value, and a way to make a UUID from a name."""
    with pytest.raises(ConfigError, match=r"(?s)task 'send': job_id=.* is not a UUID.*uuid5"):
        task_of(send).using(job_id=given)


def test_the_default_queue_exists_as_soon_as_a_task_uses_it() -> None:
    """A task without a queue uses the default queue, which need not be declared. The queue and its topics do not exist
    before a task uses the queue."""
    app = App("shop", queues=[Queue("mail", partitions=2)], partitions=3)
    assert dict(app.lanes) == {"mail": 2}
    with pytest.raises(UnknownQueue, match=r"'default'.*\['mail'\]"):
        app.task(queue="mail", name="one")(send).using(queue="default")
    task = app.task(send)
    app.task(queue="default", rate="30/min", name="two")(send)
    app.check()
    assert task.queue == "default"
    assert dict(app.lanes) == {"default": 3, "mail": 2}
    assert app.tasks["one"].using(queue="default").queue == "default"
    with pytest.raises(ConfigError, match=r"Queue\('default', priorities=True\)"):
        app.task(priority="high", name="three")(send)
    declared = App("shop", queues=[Queue("default", partitions=1)])
    declared.task(send)
    assert dict(declared.lanes) == {"default": 1}


def test_the_default_queue_can_be_renamed_or_turned_off() -> None:
    """``default_queue`` is its name. With None, each task and each handler must name its queue."""
    app = App("shop", queues=["mail"], default_queue="bulk")
    assert app.task(send).queue == "bulk"
    assert list(App("shop", default_queue="bulk").queues) == ["bulk"]
    for strict in (App("shop", default_queue=None), App("shop", queues=["mail"], default_queue=None)):
        strict.task(queue="mail", name="named")(send)
        strict.event(Happened)
        for decorate in (strict.task, strict.on(Happened)):
            with pytest.raises(UnknownQueue, match=r"names no queue.*default_queue=None.*\['mail'\]"):
                decorate(takes_anything)
    assert dict(App("shop", default_queue=None).queues) == {}
    with pytest.raises(UnknownQueue, match=r"give the task queue=…$"):
        App("shop", default_queue=None).task(send)
    with pytest.raises(ConfigError, match="default_queue"):
        App("shop", default_queue="a b")


@dataclass(frozen=True)
class Happened:
    """An event."""

    n: int


def test_without_declared_queues_an_app_has_the_queues_of_its_tasks() -> None:
    """Their partitions are the app's default."""
    app = registry(partitions=3)
    assert list(app.queues) == ["default"]
    add(app, send, queue="mail")
    assert {n: q.partitions for n, q in app.queues.items()} == {"mail": 3}


def test_two_functions_cannot_share_a_task_name() -> None:
    """The same function may be registered again, as after a reload of its module."""
    app = registry()
    add(app, send, name="a")
    add(app, send, name="a")
    with pytest.raises(ConfigError, match="already registered"):
        add(app, ship, name="a")
    with pytest.raises(UnknownTask, match=r"'b'.*\['a'\]"):
        app.task("b")


def test_fallbacks_are_checked_when_all_tasks_are_there() -> None:
    """A fallback that is missing, has other parameters or makes a cycle is refused."""

    def other(x: int) -> None: ...

    def also(to: str, template: str = "", *, copies: int = 1) -> None: ...

    app = registry()
    add(app, send, fallback="also")
    with pytest.raises(UnknownTask, match="also"):
        app.check()
    add(app, also)
    app.check()
    add(app, also, fallback="send")
    with pytest.raises(ConfigError, match="cycle"):
        app.check()
    odd = registry()
    add(odd, other)
    add(odd, send, fallback="other")
    with pytest.raises(ConfigError, match="same parameters"):
        odd.check()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"delay": -1}, "delay=-1"),
        ({"delay": "soon"}, "soon"),
        ({"tags": {"a": 1}}, "'a'=1"),
        ({"tags": ["a"]}, "not a mapping"),
        ({"tags": {"a": "x" * 1001}}, "at most 1,000"),
    ],
)
def test_options_of_a_submission_are_checked_at_once(options: dict[str, Any], names: str) -> None:
    """`using` refuses a wrong option, and names it."""
    with pytest.raises(ConfigError, match=names):
        task_of(send).using(**options)


def test_an_unknown_option_is_a_type_error() -> None:
    """Unknown options are not ignored."""
    with pytest.raises(TypeError, match="colour"):
        task_of(send).using(colour=3)  # type: ignore[call-arg]  # wrong on purpose


def test_requests_carry_their_options() -> None:
    """A request that is made with `using` has its options. A request of the task itself does not have them."""
    task = task_of(send, retry=Retry(2))
    request = task.using(delay=1.5, tags={"t": "x"}).job("a")
    assert (request.delay_ms, request.tags, request.queue, request.args) == (1500, {"t": "x"}, "mail", b'{"to":"a"}')
    assert task.job("b").delay_ms is None


def context(job_id: str = "01890a5d-ac96-774b-bcce-b302099a8057", run: int = 1) -> JobContext:
    """Return the context of a job; its progress reports are dropped."""
    return JobContext(
        job_id=job_id,
        task="t",
        queue="q",
        run=run,
        attempt=1,
        release=1,
        tags={},
        parent=None,
        trace=None,
        report=lambda *_: None,
    )


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([b"1", b"2"])), max_size=12))
def test_children_have_the_same_ids_in_every_rerun(submissions: list[tuple[str, bytes]]) -> None:
    """A rerun of the parent computes the same ids, and the children of one run have different ids."""
    first, second = context(), context()
    ids = [first.child_id(*s) for s in submissions]
    assert [second.child_id(*s) for s in submissions] == ids
    assert len(set(ids)) == len(ids)
    other_run = context(run=2)
    assert not set(ids) & {other_run.child_id(*s) for s in submissions}


def test_current_job_outside_a_job_is_an_error() -> None:
    """A negative progress is an error, too."""
    with pytest.raises(ConfigError, match="inside a task"):
        current_job()
    with pytest.raises(ConfigError, match="done=-1"):
        context().progress(-1)
