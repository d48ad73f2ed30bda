"""The answers of the HTTP API, over a real status table, without a broker."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from jobledger import App, errors
from jobledger.errors import JobledgerError
from jobledger.schemas import events as ev
from jobledger.schemas.events import Position
from jobledger.schemas.ids import derived_id
from jobledger.streams.status.store import Changes
from jobledger.views import bounds
from jobledger.web import answers, create_app, problems, services
from jobledger.web.access import API
from jobledger.web.paging import position_of, position_text
from jobledger.worker_status import WorkerStatus
from tests.web import FAILED, STARTED, SUBMITTED, Table, build, client

ODD: list[ev.Fact] = [SUBMITTED, STARTED, FAILED]
EVEN: list[ev.Fact] = [SUBMITTED, STARTED, ev.JobSucceeded(b'{"n": 9007199254740993}', 5)]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    made = Table(tmp_path)
    with closing(made.store):
        yield made


@pytest.fixture
def app(table: Table) -> Iterator[App]:
    made = build(table.url)
    yield made
    made.close()


@pytest.fixture
def api(app: App) -> FastAPI:
    return create_app(app, local=True)


def ask(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def one() -> httpx.Response:
        async with client(api) as asker:
            return await asker.request(method, f"{API}{path}", **options)

    return asyncio.run(one())


def problem(answer: httpx.Response, status: int) -> str:
    """Return the detail of a problem with this status."""
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    document = answer.json()
    assert (answer.status_code, document["status"]) == (status, status), document
    assert document["type"].startswith("urn:jobledger:problem:")
    assert document["title"]
    return str(document["detail"])


# -- jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_is_shown_as_on_the_command_line_with_its_arguments(api: FastAPI, table: Table) -> None:
    """The document has the fields of `jobledger jobs show --json`. Without a broker the arguments are not known, and
    the answer says why."""
    table.write({"job-1": ODD}, key="k")
    shown = ask(api, "GET", "/jobs/job-1").json()
    assert (shown["state"], shown["key"], shown["worker"], shown["version"]) == ("failed", "k", "w:1", "v7")
    assert shown["error"]["message"] == "<script>alert(1)</script>"
    assert shown["positions"][0] == "shop.jobs.default[0]@0"
    assert shown["args"] is None
    assert "127.0.0.1:1 did not answer" in shown["args_error"]
    assert ask(api, "GET", "/jobs/job-1?args=false").json()["args_error"] == "not asked for: add args=true"


def test_pages_follow_one_another_to_the_end(api: FastAPI, table: Table) -> None:
    """The links lead through every job once, newest first, with the filter of the first page."""
    table.write({f"job-{n:02}": ODD if n % 2 else EVEN for n in range(25)})
    path: str | None = "/jobs?state=failed&tag=tenant%3Dacme&limit=5"
    seen: list[str] = []
    while path is not None:
        page = ask(api, "GET", path.removeprefix(API)).json()
        seen += [each["job_id"] for each in page["jobs"]]
        path = page["next"]
    assert seen == [f"job-{n:02}" for n in range(23, 0, -2)]


def test_a_page_ends_when_it_has_compared_enough_jobs_and_says_so(
    api: FastAPI, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can have no job although there is a next page."""
    for n in range(9):
        table.write({f"job-{n}": ODD if n < 2 else EVEN}, ms=1_000 * n)
    monkeypatch.setattr(bounds, "ROWS_MOST", 3)
    path: str | None = "/jobs?version=nobody"
    searched: list[str | None] = []
    while path is not None:
        page = ask(api, "GET", path.removeprefix(API)).json()
        assert page["jobs"] == []
        searched.append(page["searched_to"])
        path = page["next"]
    assert searched == [*(f"1970-01-01T00:00:0{n}+00:00" for n in (6, 3, 0)), None]
    page = ask(api, "GET", "/jobs?version=v7&limit=2").json()
    assert ([each["job_id"] for each in page["jobs"]], page["searched_to"]) == (["job-8", "job-7"], None)


def test_the_filters_of_the_command_line_are_those_of_the_api(api: FastAPI, table: Table) -> None:
    """Lists, counts and plans take all of them; only lists are in the order of ids."""
    retried = ev.JobRetried(ev.ErrorInfo("E", "m"), 5)
    table.write({f"job-{n}": [SUBMITTED, STARTED, retried] for n in range(3)})
    table.write({f"old-{n}": ODD for n in range(2)}, ms=500)
    for query, where, found in (
        ("id_prefix=job-", {"id_prefix": "job-"}, ["job-2", "job-1", "job-0"]),
        ("until=1970-01-01T00:00:00.900", {"until": "1970-01-01T00:00:00.900Z"}, ["old-1", "old-0"]),
        ("attempts_least=1", {"attempts_least": 1}, ["job-2", "job-1", "job-0"]),
        ("attempts_least=1&state=failed", {"attempts_least": 1, "state": "failed"}, ["old-1", "old-0"]),
        ("attempts_least=2", {"attempts_least": 2}, []),
        ("error_text=M&id_prefix=job-", {"error_text": "M", "id_prefix": "job-"}, ["job-2", "job-1", "job-0"]),
        ("error_text=%25", {"error_text": "%"}, []),
    ):
        assert [each["job_id"] for each in ask(api, "GET", f"/jobs?{query}").json()["jobs"]] == found, query
        assert ask(api, "GET", f"/jobs:count?{query}").json()["count"] == len(found), query
        action = "redrive" if found and found[0].startswith("old") else "cancel"
        plan = ask(api, "POST", "/plans", json={"action": action, "where": where, "dry_run": True}).json()
        assert plan["matched"] == len(found), (where, plan)
    page = ask(api, "GET", "/jobs?id_prefix=job-&limit=2").json()
    assert [each["job_id"] for each in ask(api, "GET", page["next"].removeprefix(API)).json()["jobs"]] == ["job-0"]


def test_counts_are_exact_or_say_that_they_are_not(api: FastAPI, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """By states, tasks and queues the counters answer; by other filters rows are counted up to a limit."""
    table.write({f"job-{n:02}": ODD if n % 2 else EVEN for n in range(25)})
    whole = ask(api, "GET", "/jobs:count?state=failed&state=queued&task=add").json()
    assert (whole["count"], whole["exact"], whole["states"]["failed"]) == (12, True, 12)
    assert ask(api, "GET", "/jobs:count?tag=tenant%3Dacme").json() == {"count": 25, "exact": True, "states": None}
    assert ask(api, "GET", "/jobs:count?tag=tenant%3Dother").json()["count"] == 0
    monkeypatch.setattr(bounds, "COUNT_MOST", 10)
    assert ask(api, "GET", "/jobs:count?tag=tenant%3Dacme").json() == {"count": 10, "exact": False, "states": None}


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/jobs?limit=501", "limit: Input should be less than or equal to 500 (given: '501')"),
        ("/jobs?limit=0", "limit: Input should be greater than or equal to 1"),
        ("/jobs?state=lost", "state.0: Input should be 'scheduled'"),
        ("/jobs?colour=red", "'colour' is not a parameter of this route; its parameters: after, arg, args"),
        ("/jobs?tag=acme", "tag='acme' is not of the form NAME=VALUE"),
        ("/jobs?arg=user", "arg='user' is not of the form NAME=VALUE, such as user.id=1"),
        ("/jobs?arg=a%3D1&arg=a%3D2", "arg a is given as '1' and as '2'"),
        ("/jobs:count?arg=a%3D1", "'arg' is not a parameter of this route"),
        ("/jobs?tag=a%3D1&tag=a%3D2", "tag a is given as '1' and as '2'"),
        ("/jobs?since=yesterday", "since='yesterday' is not a time such as"),
        ("/jobs?since=0001-01-01", "since='0001-01-01' is not a time"),
        ("/jobs?since=2026-01-31T14:05:00+01:00", "(in an address, write + as %2B)"),
        ("/jobs?until=tomorrow", "until='tomorrow' is not a time such as"),
        ("/jobs?id_prefix=", "id_prefix: String should have at least 1 character"),
        ("/jobs?attempts_least=0", "attempts_least: Input should be greater than or equal to 1"),
        ("/jobs?late=-1", "late: Input should be greater than or equal to 0"),
        ("/jobs?after=nobody", "knows no such job: begin with the first page again"),
        ("/jobs?at_least=here", "at_least='here' is not a position such as shop.jobs.mail:3:41"),
        ("/jobs?at_least=a:1:99999999999999999999", "is not a position"),
        ("/jobs?at_least=a:1:9999999999999999999", "is not a position"),
        ("/jobs?integers=maybe", "integers: Input should be 'string' or 'number'"),
        ("/jobs/x?wait=61", "wait: Input should be less than or equal to 60"),
        ("/plans?after=nobody", "begin with the first page again"),
        ("/plans?limit=501", "limit: Input should be less than or equal to 500"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value(api: FastAPI, path: str, detail: str) -> None:
    """The answer is a 422 problem, and no list of all jobs."""
    assert detail in problem(ask(api, "GET", path), 422)


@pytest.mark.parametrize(
    "path", ["/jobs/nobody", "/jobs/nobody/timeline", "/plans/nobody", "/jobs/%00", "/jobs/" + "x" * 300]
)
def test_what_the_table_does_not_know_is_not_found(api: FastAPI, path: str) -> None:
    """An unknown id is a 404, also one that no table could hold."""
    assert "knows no" in problem(ask(api, "GET", path), 404)


def test_a_wait_ends_with_the_job_or_with_its_time(api: FastAPI, table: Table) -> None:
    """A job that has ended is returned at once, another one with its state when the time is over."""
    table.write({"done": EVEN, "open": [SUBMITTED]})
    assert ask(api, "GET", "/jobs/done?wait=30&args=false").json()["state"] == "succeeded"
    assert ask(api, "GET", "/jobs/open?wait=0.1&args=false").json()["state"] == "queued"
    problem(ask(api, "GET", "/jobs/nobody?wait=0.1"), 404)


def test_at_least_waits_for_the_table(api: FastAPI, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that the table has read is answered at once; one that it does not reach in time is a 503."""
    monkeypatch.setattr(services, "AT_LEAST_S", 0.1)
    table.write({"job-1": EVEN}, read=5)
    for path in ("/jobs/job-1?args=false&", "/jobs?", "/jobs:count?", "/plans?"):
        assert ask(api, "GET", f"{path}at_least=shop.jobs.default:0:4").status_code == 200
        late = ask(api, "GET", f"{path}at_least=shop.jobs.default[0]@5")
        assert "did not reach shop.jobs.default[0]@5" in problem(late, 503)
        assert late.headers["retry-after"] == "1"


# -- submitting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b'{"task": "\xff"}', 400, "the body is not JSON"),
        (b"[]", 422, "Expected `object`, got `array`"),
        (b"{}", 422, "missing required field `task`"),
        (b'{"task": "add", "args": [1]}', 422, "args`"),
        (b'{"task": "add", "colour": 1}', 422, "unknown field `colour`"),
        (b'{"task": "nope"}', 422, "task 'nope' is not registered"),
        (b'{"task": "add", "args": {"a": "x"}}', 422, "Expected `int`, got `str`"),
        (b'{"task": "add", "args": {"self": 1}}', 422, "no parameter 'self'"),
        (b'{"task": "add", "args": {"a": 1}, "queue": "nope"}', 422, "queue 'nope' is not declared"),
        (b'{"task": "add", "args": {"a": 1}, "delay": -1}', 422, "delay=-1"),
        (b'{"task": "add", "args": {"a": 1}, "job_id": "x"}', 422, "job_id='x' is not a UUID"),
        (b'{"task": "add", "args": {"a": 1}, "tags": {"a": "\\u0000"}}', 422, "NUL"),
    ],
)
def test_a_submission_that_does_not_fit_says_where(api: FastAPI, body: bytes, status: int, detail: str) -> None:
    """Nothing is sent, and the problem names the value."""
    assert detail in problem(ask(api, "POST", "/jobs", content=body), status)
    if status == 422 and body != b"[]":
        assert detail in problem(ask(api, "POST", "/jobs:batch", content=b'{"jobs": [' + body + b"]}"), 422)


def test_a_body_that_is_too_large_or_no_json_is_refused_unread(api: FastAPI) -> None:
    """A stated length is refused before the body is read; a longer body without a length while it is read."""

    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 100_000

    assert "has more than" in problem(ask(api, "POST", "/jobs", content=b" " * 3_000_000), 413)
    assert "has more than" in problem(ask(api, "POST", "/jobs", content=endless()), 413)
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert "not application/json" in problem(ask(api, "POST", "/jobs", content=b"task=add", headers=form), 415)


def test_without_a_broker_a_submission_is_a_503_in_time(api: FastAPI, table: Table) -> None:
    """The answers of everything that needs the log say so, within the time limits, with Retry-After; what needs only the
    table is answered."""
    table.write({"job-1": [SUBMITTED]})
    job = {"task": "add", "args": {"a": 1}}
    for path, body in (("/jobs", job), ("/jobs:batch", {"jobs": [job]}), ("/queues/default:pause", {})):
        answer = ask(api, "POST", path, json=body)
        assert "127.0.0.1:1 did not answer in time" in problem(answer, 503)
        assert answer.headers["retry-after"] == "5"
    for path in ("/jobs/job-1/timeline", "/events"):
        assert "did not answer" in problem(ask(api, "GET", path), 503)
    assert ask(api, "GET", "/jobs").status_code == 200
    assert ask(api, "GET", "/readyz").json() == {"status": "ok", "table": True, "broker": False}


def test_an_idempotency_key_names_the_job(api: FastAPI, app: App, table: Table) -> None:
    """If the table has the job of a key, the second request gets this job, and nothing is sent: the answer needs no
    broker. Arguments that cannot be read are no conflict."""
    job_id = derived_id(derived_id("shop", "task", "add"), "idempotency-key", "order-1")
    table.write({job_id: EVEN})
    for key in ("order-1", '"order-1"'):
        answer = ask(api, "POST", "/jobs", json={"task": "add", "args": {"a": 1}}, headers={"Idempotency-Key": key})
        assert answer.status_code == 202
        assert answer.headers["location"] == f"{API}/jobs/{job_id}"
        assert answer.json() == {
            "job_id": job_id,
            "position": "shop.jobs.default:0:0",
            "task": "add",
            "queue": "default",
        }


def test_a_key_that_was_used_for_other_arguments_is_a_conflict(
    api: FastAPI, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal JSON is no conflict, whatever its form."""
    job_id = derived_id(derived_id("shop", "task", "add"), "idempotency-key", "order-1")
    table.write({job_id: EVEN})
    recorded: list[bytes] = [b'{ "b" :2, "a": 1}']
    monkeypatch.setattr(services.Records, "arguments", lambda self, some: {each.job_id: recorded[0] for each in some})
    key = {"Idempotency-Key": "order-1"}
    assert ask(api, "POST", "/jobs", json={"task": "add", "args": {"a": 1, "b": 2}}, headers=key).status_code == 202
    other = ask(api, "POST", "/jobs", json={"task": "add", "args": {"a": 3}}, headers=key)
    assert "was used for job" in problem(other, 409)
    both = {"task": "add", "args": {"a": 1}, "job_id": str(uuid.uuid4())}
    assert "not both" in problem(ask(api, "POST", "/jobs", json=both, headers=key), 422)
    assert "1 to 200" in problem(ask(api, "POST", "/jobs", json=both, headers={"Idempotency-Key": "x" * 201}), 422)


# -- changing ------------------------------------------------------------------------------------------------------


def test_what_a_state_does_not_allow_is_a_conflict(api: FastAPI, table: Table) -> None:
    """A job that has ended is not cancelled, one that runs is not redriven, and a plan that is done is not paused."""
    table.write({"done": EVEN, "open": [SUBMITTED, STARTED]})
    table.plan()
    assert "has ended: succeeded" in problem(ask(api, "POST", "/jobs/done:cancel"), 409)
    assert "is running: only jobs that failed" in problem(ask(api, "POST", "/jobs/open:redrive"), 409)
    assert "knows no job nobody" in problem(ask(api, "POST", "/jobs/nobody:cancel"), 404)
    assert "knows no job nobody" in problem(ask(api, "POST", "/jobs/nobody:redrive"), 404)
    assert "has no queue 'nope'; its queues: default" in problem(ask(api, "POST", "/queues/nope:pause"), 404)
    assert "has no task 'nope'; its tasks: add" in problem(ask(api, "POST", "/tasks/nope:limit", json={}), 404)
    assert "is not a rate" in problem(ask(api, "POST", "/tasks/add:limit", json={"rate": "often"}), 422)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"action": "redrive"}, "which jobs?"),
        ({"action": "cancel"}, "which jobs?"),
        ({"action": "redrive", "where": {}}, "which jobs?"),
        ({"action": "cancel", "where": {"task": []}}, "which jobs?"),
        ({"action": "redrive", "where": {"tag": {}}}, "which jobs?"),
        ({"action": "delete", "ids": ["a"]}, "Invalid enum value 'delete'"),
        ({"action": "redrive", "ids": []}, "length >= 1"),
        ({"action": "redrive", "ids": ["a"], "where": {"task": "add"}}, "not both"),
        ({"action": "redrive", "where": {"state": "running"}}, "only jobs that failed"),
        ({"action": "cancel", "where": {"state": "failed"}}, "cannot be cancelled"),
        ({"action": "redrive", "where": {"colour": "red"}}, "unknown field `colour`"),
        ({"action": "redrive", "where": {"since": "soon"}}, "since='soon' is not a time"),
        ({"action": "redrive", "where": {"until": "soon"}}, "until='soon' is not a time"),
        ({"action": "redrive", "where": {"id_prefix": ""}}, "id_prefix"),
        ({"action": "redrive", "where": {"attempts_least": 0}}, "attempts_least"),
        ({"action": "redrive", "where": {"task": "add"}, "queue": "nope"}, "queue 'nope' is not declared"),
    ],
)
def test_a_plan_without_a_clear_choice_is_refused(api: FastAPI, table: Table, body: Any, detail: str) -> None:
    """No filter never means all jobs."""
    table.write({"job-1": ODD, "job-2": [SUBMITTED]})
    assert detail in problem(ask(api, "POST", "/plans", json={**body, "dry_run": True}), 422)


def test_a_dry_run_counts_and_makes_no_plan(api: FastAPI, table: Table) -> None:
    """The answer has the number and examples, for both actions."""
    table.write({"job-1": ODD, "job-2": [SUBMITTED], "job-3": EVEN})
    again = ask(api, "POST", "/plans", json={"action": "redrive", "where": {"task": "add"}, "dry_run": True})
    assert (again.status_code, again.json()) == (
        200,
        {"plan": None, "matched": 1, "examples": ["job-1"], "position": None},
    )
    stop = ask(api, "POST", "/plans", json={"action": "cancel", "where": {"tag": {"tenant": "acme"}}, "dry_run": True})
    assert stop.json()["examples"] == ["job-2"]
    unknown = ask(api, "POST", "/plans", json={"action": "cancel", "ids": ["job-2", "x"], "dry_run": True})
    assert "knows no job x" in problem(unknown, 404)


def test_plans_are_listed_in_pages(api: FastAPI, table: Table) -> None:
    """The last one is first, and the links lead through all of them once."""
    for number in range(5):
        table.plan(plan=f"plan-{number}", opened_ms=1_000 + number // 2)
    path: str | None = "/plans?limit=2"
    seen: list[str] = []
    while path is not None:
        page = ask(api, "GET", path.removeprefix(API)).json()
        seen += [each["plan"] for each in page["plans"]]
        path = page["next"]
    assert seen == ["plan-4", "plan-3", "plan-2", "plan-1", "plan-0"]
    assert ask(api, "GET", "/plans/plan-3").json()["where"] == {"task": ["add"]}


# -- integers ------------------------------------------------------------------------------------------------------


def test_large_integers_stay_exact_for_javascript(api: FastAPI, table: Table) -> None:
    """By default they are text; a client may ask for numbers."""
    table.write({"job-1": EVEN})
    assert ask(api, "GET", "/jobs/job-1?args=false").json()["result"] == {"n": "9007199254740993"}
    plain = ask(api, "GET", "/jobs/job-1?args=false&integers=number")
    assert json.loads(plain.text)["result"] == {"n": 9007199254740993}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    max_leaves=10,
)  # fmt: skip


def _as_text(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > answers.SAFE_MOST:
        return str(value)
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    return [_as_text(each) for each in value] if isinstance(value, list) else value


@given(JSON)
def test_only_integers_that_javascript_would_change_become_text(value: Any) -> None:
    """Everything else is written as it is, and with ``number`` everything is."""
    assert json.loads(answers.encoded(value, "number")) == value
    assert json.loads(answers.encoded(value)) == _as_text(value)


@given(
    st.builds(Position, st.from_regex(r"[a-z.]{1,20}", fullmatch=True), st.integers(0, 99), st.integers(0, 2**63 - 1))
)
def test_a_position_is_read_in_both_forms(position: Position) -> None:
    """The form of the API, and the one of the command line."""
    assert position_of(position_text(position)) == position_of(str(position)) == position


# -- problems ------------------------------------------------------------------------------------------------------


def test_every_error_of_jobledger_has_its_own_problem() -> None:
    """Each class of the tree is in the table, or is below one that is not the root."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, JobledgerError) and kind is not JobledgerError:
            assert next(base for base in kind.__mro__ if base in problems.TABLE) is not JobledgerError, kind
    for kind, status in problems.TABLE.items():
        assert (status.status == 503) == (status.retry_after is not None), kind


def test_what_does_not_exist_is_a_problem_too(api: FastAPI) -> None:
    """Unknown paths and methods are answered in the same form."""
    assert "nothing at" in problem(ask(api, "GET", "/nothing"), 404)
    answer = ask(api, "DELETE", "/jobs")
    assert "cannot be asked with DELETE" in problem(answer, 405)
    assert answer.headers["allow"] == "GET, POST"
    assert ask(api, "PUT", "/jobs/x:cancel").headers["allow"] == "GET, POST"


def test_every_answer_has_the_headers_of_a_careful_service(api: FastAPI) -> None:
    """Also a problem."""
    for path in ("/jobs", "/nothing", "/healthz"):
        headers = ask(api, "GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(api, "GET", "/jobs").headers["cache-control"] == "no-store"


def test_a_path_writes_no_line_of_its_own_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Line ends, and the characters that control a terminal, are shown as pictures."""
    with closing(build(f"sqlite:///{tmp_path}/none.db")) as app:
        answer = ask(create_app(app, local=True), "GET", "/jobs/x%0AERROR%20forged%0D%1B%5B2J%E2%80%A8%09")
    assert answer.status_code == 503
    (line,) = (each.getMessage() for each in caplog.records if each.name == "jobledger.web")
    assert "/jobs/x␊ERROR forged␍␛[2J\ufffd␉: StoreNotFound" in line
    assert line.isprintable()


def test_a_table_that_is_missing_foreign_newer_or_broken_is_a_503(table: Table, tmp_path: Path) -> None:
    """The problem has the sentence of the error, readiness fails, and liveness does not."""
    urls = {
        f"sqlite:///{tmp_path}/none.db": "there is no status table at",
        f"sqlite:///{tmp_path}/newer.db": "has schema version 99",
        f"sqlite:///{tmp_path}/foreign.db": "is a database of another program",
        f"sqlite:///{tmp_path}/broken.db": "cannot be",
    }
    table.write({"job-1": EVEN})
    with (
        closing(sqlite3.connect(table.path)) as source,
        closing(sqlite3.connect(tmp_path / "newer.db")) as newer,
        newer,
    ):
        source.backup(newer)
        newer.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    with closing(sqlite3.connect(tmp_path / "foreign.db")) as foreign, foreign:
        foreign.execute("CREATE TABLE other (x)")
    (tmp_path / "broken.db").write_bytes(b"no database" * 1_000)
    for url, expected in urls.items():
        with closing(build(url)) as app:
            api = create_app(app, local=True)
            for path in ("/jobs", "/jobs/x", "/jobs:count", "/plans"):
                answer = ask(api, "GET", path)
                assert expected in problem(answer, 503)
                assert int(answer.headers["retry-after"]) > 0
            assert problem(ask(api, "GET", "/readyz"), 503) == "the status table cannot be read"
            assert ask(api, "GET", "/healthz").json() == {"status": "ok"}


def test_a_table_that_goes_away_in_the_middle_is_a_503_until_it_is_back(api: FastAPI, table: Table) -> None:
    """The service recovers without a restart."""
    table.write({"job-1": EVEN})
    assert ask(api, "GET", "/jobs").status_code == 200
    with closing(sqlite3.connect(table.path)) as db, db:
        db.execute("ALTER TABLE jobs RENAME TO gone")
    problem(ask(api, "GET", "/jobs"), 503)
    with closing(sqlite3.connect(table.path)) as db, db:
        db.execute("ALTER TABLE gone RENAME TO jobs")
    assert ask(api, "GET", "/jobs").status_code == 200


def test_a_query_that_does_not_end_is_given_up(api: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request hangs without bound, and the event loop answers others meanwhile."""
    import threading

    shared: services.Services = api.state.services
    release = threading.Event()

    async def ask_both() -> tuple[httpx.Response, httpx.Response]:
        shared._table = services.Threads(1, 0.2, "the status table")
        monkeypatch.setattr(shared.app, "status_table", release.wait)
        async with client(api) as asker:
            slow = asyncio.create_task(asker.get(f"{API}/jobs"))
            await asyncio.sleep(0)
            alive = await asker.get(f"{API}/healthz")
            assert not slow.done()
            try:
                return alive, await slow
            finally:
                release.set()

    alive, slow = asyncio.run(ask_both())
    assert alive.status_code == 200
    assert problem(slow, 503) == "the status table did not answer within 0.2 s"


def test_callers_that_wait_for_one_answer_share_its_failure() -> None:
    """Without a broker they do not try one after the other."""
    calls = []

    async def fails() -> None:
        calls.append(1)
        await asyncio.sleep(0)
        raise errors.BrokerUnavailable("away")

    async def several() -> list[Any]:
        remembered = services.Remembered(60.0, fails)
        return list(await asyncio.gather(*(remembered.get() for _ in range(3)), return_exceptions=True))

    found = asyncio.run(several())
    assert [type(each) for each in found] == [errors.BrokerUnavailable] * 3
    assert len(calls) == 1


# -- why, errors, workers, dead letters ----------------------------------------------------------------------------


def test_an_explanation_without_a_broker_says_what_could_not_be_read(api: FastAPI, table: Table) -> None:
    """The causes that the table shows are there; an unknown job is a 404."""
    table.write({"job-1": ODD})
    explained = ask(api, "GET", "/jobs/job-1/explain").json()
    assert (explained["job_id"], explained["state"]) == ("job-1", "failed")
    assert {cause["cause"] for cause in explained["causes"]} >= {"ended"}
    assert "nobody" in problem(ask(api, "GET", "/jobs/nobody/explain"), 404)


def test_errors_are_listed_in_groups_with_the_last_success_of_their_tasks(api: FastAPI, table: Table) -> None:
    """The group has the fingerprint by which its jobs can be listed and redriven."""
    table.write({"job-1": ODD, "job-2": ODD, "job-3": EVEN})
    (group,) = ask(api, "GET", "/errors").json()["errors"]
    assert (group["type"], group["jobs"], group["exact"], group["tasks"]) == (
        "builtins.ValueError",
        2,
        True,
        {"add": 2},
    )
    assert group["last_success"]["add"]["job_id"] == "job-3"
    listed = ask(api, "GET", f"/jobs?fingerprint={group['fingerprint']}&args=false").json()["jobs"]
    assert {job["job_id"] for job in listed} == {"job-1", "job-2"}
    assert ask(api, "GET", "/errors?since=2300-01-01T00:00:00Z").json() == {"errors": []}
    assert "since" in problem(ask(api, "GET", "/errors?since=yesterday"), 422)


def test_workers_are_listed_by_their_last_reports(api: FastAPI, table: Table) -> None:
    """A worker whose last report is old is silent."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    worker = WorkerStatus("host:1", "host", 1, "v7", "0.1.0", moment, moment, lanes=("default",), slots=4, running=1)
    assert ask(api, "GET", "/workers").json() == {"workers": []}
    table.store.write(Changes(workers={"host:1": worker}))
    (shown,) = ask(api, "GET", "/workers").json()["workers"]
    assert (shown["worker"], shown["state"], shown["queues"], shown["slots"]) == ("host:1", "silent", ["default"], 4)


def test_dead_letters_need_the_broker(api: FastAPI, table: Table) -> None:
    """They are read from the log."""
    assert "did not answer" in problem(ask(api, "GET", "/dead-letters"), 503)


# -- the document --------------------------------------------------------------------------------------------------


def test_the_openapi_document_is_complete(api: FastAPI) -> None:
    """Every reference leads to a schema, every route documents its problems, and the text explains integers."""
    document = ask(api, "GET", "/openapi.json").json()
    text = json.dumps(document)
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in document["components"]["schemas"]
    assert "HTTPValidationError" not in text
    assert "integers=number" in document["info"]["description"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if not path.endswith("z"):
                assert {"401", "403", "422", "503"} <= operation["responses"].keys(), path
                assert "Needs the role" in operation["description"]
