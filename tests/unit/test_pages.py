"""The pages over a status table with some thousand jobs, without a broker."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jobledger import App
from jobledger.job import join, of
from jobledger.plan import PlanState, PlanStatus
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store import open_store
from jobledger.views import bounds
from jobledger.web import Dashboard, Role
from jobledger.web.pages import assets, jobpage, rates, steering
from jobledger.web.pages.render import environment, job_path
from jobledger.web.pages.router import ROUTES
from jobledger.web.pages.services import PageServices
from jobledger.web.pages.sources import Outcome, Sources
from tests.pages import NOW_MS, ask, pages, seeded, shop

ROOT = Path(__file__).parents[2]
#: A text with everything that must not act: markup, control characters, a change of the writing direction.
HOSTILE = "<script>alert(1)</script>\"'><b onmouseover=x>\x1b[2J\u202eevil"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table with 3,000 jobs."""
    return seeded(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def app(url: str) -> Iterator[App]:
    with closing(shop(url)) as made:
        yield made


def get(app: App, path: str, status: int = 200, role: Role = Role.ADMIN, *, part: bool = False) -> str:
    """Return a page, or the part of it for which htmx asks."""
    answer = ask(pages(app, role), "GET", path, headers={"HX-Request": "true"} if part else {})
    assert answer.status_code == status, answer.text[:500]
    return answer.text


def failed(app: App) -> Any:
    """Return a failed job."""
    return next(app.jobs(state="failed", limit=1))


def one_job(folder: Path, job_id: str, *facts: ev.Fact, task: str = "send_mail", queue: str = "mail") -> str:
    """Make a status table with one job. Return its URL."""
    made = f"sqlite:///{folder / 'one.db'}"
    with open_store(made, "shop") as store:
        store.acquire()
        life = None
        for number, fact in enumerate(facts):
            life = join(life, of(1, 1, 1, task, queue, None, fact, (NOW_MS + number, "shop.lifecycle", 0, number)))
        assert life is not None
        store.write(RowFolder(store, Decoder()).merge([(job_id, life)]).changes)
    return made


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/jobs",
        "/jobs?state=failed",
        "/errors?since=all",
        "/queues",
        "/workers",
        "/plans",
        "/bulk/redrive?state=failed",
    ],
)
def test_every_page_has_the_headers_and_no_inline_code(app: App, path: str) -> None:
    """A page is not stored, allows only this server's files, and has no style attribute, inline script or handler."""
    answer = ask(pages(app), "GET", path)
    assert answer.status_code == 200
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert not re.search(r"<[^>]+\s(?:style|on\w+|hx-on[\w:-]*)=", answer.text)
    assert not re.search(r"<script(?![^>]*\ssrc=)", answer.text)
    assert not re.search(r"""(?:src|href|action)=["'](?:https?:)?//""", answer.text)
    assert '"includeIndicatorCSS": false' in answer.text
    assert "js:" not in answer.text


def test_static_files_are_kept_for_ever_and_change_their_address(app: App) -> None:
    """The address of a file has a digest of its content; any other address is not found."""
    for asset in assets.assets().values():
        answer = ask(pages(app), "GET", f"/static/{asset.name}")
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert hashlib.sha256(answer.content).hexdigest()[:16] in asset.name
    assert ask(pages(app), "GET", "/static/pages.0000.css").status_code == 404


def test_vendored_files_are_those_of_the_table() -> None:
    """Each file of another project has its digest in the table beside it, and its licence in its folder."""
    for table in (Path(assets.__file__).parent / "static/vendor/README.md", ROOT / "tests/vendor/README.md"):
        rows = re.findall(r"\| `([\w/.-]+\.(?:js|css))` \|.*`([0-9a-f]{64})` \|", table.read_text("utf-8"))
        found = {str(path.relative_to(table.parent)) for path in table.parent.rglob("*.*s") if path.is_file()}
        assert {name for name, _ in rows} == found
        for name, digest in rows:
            assert hashlib.sha256((table.parent / name).read_bytes()).hexdigest() == digest
            assert (table.parent / name).with_name("LICENSE").is_file()


def test_the_overview_has_the_numbers_of_the_table(app: App) -> None:
    """Each queue and each state has its number, with a link to these jobs; the totals are those of all jobs."""
    text = get(app, "/")
    counts = app.status_table().counts()
    for queue in {each.queue for each in counts}:
        for state in ("failed", "queued"):
            number = sum(each.jobs for each in counts if (each.queue, each.state.value) == (queue, state))
            if number:
                assert f'<a href="/jobs?queue={queue}&state={state}">{number}</a>'.replace("&", "&amp;") in text
    assert "being measured" in text


def test_an_empty_table_says_what_to_do_first(tmp_path: Path) -> None:
    """Without a job the overview has the three steps that lead to the first one."""
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    open_store(url, "shop").close()
    with closing(shop(url)) as app:
        text = get(app, "/")
        assert "No job has been submitted yet" in text
        assert "jobledger worker MODULE:APP" in text
        assert "jobledger submit MODULE:APP charge_card" in text
        assert "No job has been submitted" not in get(app, "/jobs")


def test_a_missing_table_is_a_page_with_status_503(tmp_path: Path) -> None:
    """The page has the error's sentence, and what to do."""
    with closing(shop(f"sqlite:///{tmp_path / 'none.db'}")) as app:
        for path in ("/", "/jobs", "/queues", "/errors", "/plans"):
            text = get(app, path, 503)
            assert "there is no status table at sqlite:///" in text
            assert "Start the stream processor" in text


def test_the_list_follows_the_filters_of_the_url(app: App) -> None:
    """Every job of the page matches, the heading has their number, and the form shows the filters."""
    bad = failed(app)
    text = get(app, f"/jobs?fingerprint={bad.fingerprint}&state=failed")
    number = sum(1 for _ in app.jobs(fingerprint=bad.fingerprint, state="failed"))
    assert f"{number} jobs match" in text
    assert f'value="{bad.fingerprint}"' in text
    assert '<input type="checkbox" name="state" value="failed" checked>' in text
    assert "they do not follow the filters fingerprint" in text
    assert f'href="/bulk/redrive?fingerprint={bad.fingerprint}&amp;state=failed"' in text


def test_pages_follow_one_another_without_gap(app: App) -> None:
    """The links to the next page lead through all jobs of a filter, each once, newest first."""
    wanted = [each.job_id for each in app.jobs(queue="media")]
    path: str | None = "/jobs?queue=media"
    found: list[str] = []
    while path is not None:
        text = get(app, path)
        found += re.findall(r'<th scope="row" class="id"><a href="/jobs/([0-9a-f-]{36})">', text)
        link = re.search(r'rel="next" href="([^"]+)"', text)
        path = None if link is None else link[1].replace("&amp;", "&")
    assert found == wanted


def test_a_search_for_rare_jobs_ends_early_and_can_be_continued(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says up to which time of submission it has searched. All pages together have all jobs."""
    monkeypatch.setattr(bounds, "ROWS_MOST", 150)
    path: str | None = "/jobs?version=2026.11.3&queue=media"
    further, found = 0, list[str]()
    wanted = [each.job_id for each in app.jobs(queue="media", version="2026.11.3")]
    while path is not None:
        text = get(app, path)
        found += re.findall(r'<th scope="row" class="id"><a href="/jobs/([0-9a-f-]{36})">', text)
        further += "Search further" in text
        link = re.search(r'rel="next" href="([^"]+)"', text)
        path = None if link is None else link[1].replace("&amp;", "&")
    assert found == wanted
    assert further > 1
    assert "No job matches among those that were looked at" in get(app, "/jobs?version=nobody")


def test_a_page_after_a_job_that_is_gone_begins_anew(app: App) -> None:
    """The list says so and shows the newest jobs."""
    text = get(app, "/jobs?after=nobody")
    assert "cannot begin after the job &#39;nobody&#39;" in text
    assert next(app.jobs(limit=1)).job_id in text


def test_a_wrong_filter_is_named_and_the_others_stay(app: App) -> None:
    """The page says which value is wrong, keeps it in its field, and offers no action on the jobs."""
    text = get(app, "/jobs?queue=mail&state=failed&since=gestern")
    assert "1 filter cannot be used" in text
    assert "&#39;gestern&#39; is neither an age" in text
    assert 'value="gestern"' in text
    assert 'aria-invalid="true"' in text
    assert "/bulk/redrive" not in text
    assert "Nothing is done with a filter that cannot be used" in get(app, "/bulk/redrive?state=failed&since=gestern")


def test_an_action_needs_a_filter_and_the_right_states(app: App) -> None:
    """Without a filter, or with a state that the action is not about, the preview has no form."""
    for path, says in (
        ("/bulk/redrive", "an action on all jobs is refused"),
        ("/bulk/redrive?state=succeeded", "Only jobs that are failed, cancelled, expired"),
        ("/bulk/cancel?state=failed", "Only jobs that are scheduled, queued, running, retrying"),
    ):
        text = get(app, path)
        assert says in text
        assert "<form" not in text
        answer = ask(pages(app), "POST", path, data={"reason": "x"})
        assert answer.status_code == 400
        assert says in answer.text


def test_the_preview_counts_and_shows_examples(app: App) -> None:
    """The preview has the number of jobs, the newest of them, the user's name and the filter in the form's address."""
    text = get(app, "/bulk/redrive?queue=mail")
    jobs = [each.job_id for each in app.jobs(queue="mail", state="failed")]
    assert f"Redrive {len(jobs)} jobs</button>" in text
    assert all(each in text for each in jobs[:10])
    assert "<dd>alice</dd>" in text
    assert 'action="/bulk/redrive?queue=mail"' in text


@pytest.mark.parametrize("role", [Role.READ, Role.OPERATE, Role.ADMIN])
def test_forms_are_only_shown_to_those_who_may_use_them(app: App, role: Role) -> None:
    """A user who may only read sees no form that changes something; limits need an admin."""
    text = "".join(
        get(app, path, role=role) for path in ("/", "/jobs?state=failed", "/queues", f"/jobs/{failed(app).job_id}")
    )
    assert ('method="post"' in text) == (role is not Role.READ)
    assert ("Redrive these jobs" in text) == (role is not Role.READ)
    assert ("Set the limits of mail" in text) == (role is Role.ADMIN)


def test_a_user_who_may_only_read_changes_nothing_by_any_form(app: App) -> None:
    """Each route that is not a GET answers 403 to the role `read`, route by route, and so does the preview."""
    changing = [route.split() for route in ROUTES if not route.startswith("GET") or "/bulk/" in route]
    assert len(changing) == 7
    for method, path in changing:
        answer = ask(pages(app, Role.READ), method, path.format(action="redrive", verb="limit"), data={"job": "x"})
        assert answer.status_code == 403, (method, path)
        assert "alice has the role read" in answer.text


def test_a_form_of_another_site_is_refused(app: App) -> None:
    """A browser says that another site sent the form; the answer is a page with status 403."""
    answer = ask(
        pages(app), "POST", "/job/cancel?job=x", data={"reason": "x"}, headers={"Origin": "https://evil.example"}
    )
    assert answer.status_code == 403
    assert "evil.example" in answer.text


def test_what_the_app_does_not_permit_is_refused(app: App) -> None:
    """The app's function is asked with the action and its target before anything is done."""
    asked = []

    def permit(user: Any, action: str, target: str | None) -> bool:
        asked.append((user.name, action, target))
        return action == "read"

    answer = ask(pages(app, permit=permit), "POST", "/control/pause", data={"kind": "queue", "name": "mail"})
    assert answer.status_code == 403
    assert ("alice", "queues.pause", "mail") in asked


def test_a_page_is_refused_where_the_api_would_refuse(app: App) -> None:
    """The app's function is asked for the actions of the API, with the job or with the task of its copy."""
    asked = []

    def permit(user: Any, action: str, target: str | None) -> bool:
        asked.append((action, target))
        return action == "read"

    api, job = pages(app, permit=permit), failed(app)
    for path in (
        *(f"/jobs/{job.job_id}", f"/job?id={job.job_id}", "/jobs", "/errors", "/dead-letters"),
        *("/queues", "/workers", "/plans", "/plans/nope", "/bulk/redrive?state=failed"),
    ):
        assert ask(api, "GET", path).status_code == 403, path
    assert asked.count(("jobs.read", job.job_id)) == 2
    assert ask(api, "POST", f"/job/copy?job={job.job_id}", data={"args": "{}"}).status_code == 403
    assert asked[-1] == ("jobs.submit", job.task)
    assert ask(api, "GET", "/").status_code == 200


@pytest.mark.parametrize("page", ["//evil.example/x", "/\\evil.example/x"])
def test_the_way_back_from_an_error_stays_on_this_site(app: App, page: str) -> None:
    """A path with two slashes at its begin would lead to another site."""
    referer = {"Referer": f"http://localhost:8420{page}"}
    answer = ask(pages(app), "POST", "/control/pause", data={"reason": "x"}, headers=referer)
    assert answer.status_code == 400
    assert 'href="/evil.example/x"' in answer.text


@pytest.mark.parametrize(
    ("path", "data", "status", "says"),
    [
        ("/job/cancel", {"reason": "x"}, 400, "no parameter &#39;job&#39;"),
        ("/control/pause", {"reason": "x"}, 400, "no value for &#39;kind&#39;"),
        ("/job/cancel?job=x", {"run": "many"}, 400, "run=&#39;many&#39; is not a whole number from 1"),
        ("/job/cancel?job=x", {"run": "9" * 5_000}, 400, "is not a whole number from 1"),
        ("/job/cancel?job=x", {"run": "0"}, 400, "run=&#39;0&#39; is not a whole number from 1"),
        ("/job/cancel?job=x", {"run": "2147483648"}, 400, "is not a whole number from 1 to 2147483647"),
        ("/control/limit", {"kind": "queue", "name": "mail", "concurrency": "1" * 5_000}, 400, "is not a whole number"),
        ("/job/redrive?job=nobody", {"reason": "x"}, 404, "knows no job nobody"),
        ("/control/pause", {"kind": "queue", "name": "nope"}, 400, "nope"),
        ("/control/pause", {"kind": "topic", "name": "nope"}, 400, "neither queue nor task"),
        ("/control/limit", {"kind": "queue", "name": "mail", "rate": "fast"}, 400, "fast"),
        ("/control/destroy", {"kind": "queue", "name": "mail"}, 404, "is not a command"),
        ("/plan/pause", {"plan": "nope"}, 404, "knows no plan nope"),
        ("/bulk/destroy", {"reason": "x"}, 404, "not an action on many jobs"),
    ],
)
def test_bad_forms_are_pages_that_name_the_value(
    app: App, path: str, data: dict[str, str], status: int, says: str
) -> None:
    """The answer has the right status, the sentence, and a way back."""
    answer = ask(pages(app), "POST", path, data=data)
    assert answer.status_code == status, answer.text
    assert says in answer.text
    assert 'class="button" href="/"' in answer.text


def test_a_request_that_is_no_form_is_refused(app: App) -> None:
    """JSON, and a form with too many bytes, are refused before anything is done."""
    assert ask(pages(app), "POST", "/job/cancel", json={"job": "x"}).status_code == 400
    big = {"job": "x", "args": "a" * 2_100_000}
    assert ask(pages(app), "POST", "/job/copy", data=big).status_code == 413


def test_without_a_broker_the_page_of_a_job_shows_what_the_table_has(app: App) -> None:
    """Status, error and traceback are there; the page says why the timeline is missing. An action says so, too."""
    bad = failed(app)
    text = get(app, f"/jobs/{bad.job_id}")
    assert bad.error.type in text
    assert "in run_" in text
    assert "The log cannot be read now" in text
    assert get(app, "/dead-letters").count("The log cannot be read now") == 1
    answer = ask(pages(app), "POST", f"/job/redrive?job={bad.job_id}", data={"reason": "x"})
    assert answer.status_code == 503
    assert "No broker answers" in answer.text


def test_the_page_of_errors_names_the_plans_that_redrove_them(app: App) -> None:
    """These are the plans whose conditions name the fingerprint, or else the type of the error."""
    bad = failed(app)
    assert bad.error is not None
    group = next(each for each in app.status_table().errors() if each.fingerprint == bad.fingerprint)
    plans = [
        plan("a", {"fingerprint": group.fingerprint}),
        plan("b", {"fingerprint": ["x", group.fingerprint], "state": ["failed"]}),
        plan("c", {"error": group.type}),
        plan("not this one", {"fingerprint": "x", "error": group.type}),
        plan("nor this one", {"fingerprint": group.fingerprint, "error": "x"}),
        plan("nor a cancel", {"error": group.type}, "cancel"),
        plan("nor one of other conditions", ["1"]),
    ]
    found = steering.redrives_of([group], plans)
    assert [each.plan for each in found[group.fingerprint]] == ["a", "b", "c"]


def plan(name: str, where: object, action: str = "redrive") -> PlanStatus:
    """Return a plan with these conditions."""
    return PlanStatus(name, action, json.dumps(where), None, None, "ann", None, NOW_MS, PlanState.DONE, done=3)


def test_an_unknown_job_is_a_page_with_status_404(app: App) -> None:
    """Also ids that would change the path of an address."""
    assert "knows no job nobody" in get(app, "/jobs/nobody", 404)
    for odd in ("..", "a/b", ".", "a\\b"):
        assert job_path(odd).startswith("/job?id=")
        assert "This job is not known" in get(app, job_path(odd), 404)
    assert job_path("a b?c#d%") == "/jobs/a%20b%3Fc%23d%25"


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    """In ids, tasks, queues, tags, errors, results and reasons: no markup, no control character, no change of the writing
    direction reaches the page."""
    error = ev.ErrorInfo(HOSTILE, HOSTILE, HOSTILE)
    spec = ev.JobSpec(b"{}", {HOSTILE: HOSTILE}, HOSTILE)
    started = ev.JobStarted(HOSTILE, HOSTILE[:60], {}, "shop.jobs.mail", 0)
    facts = (ev.JobSubmitted(spec), started, ev.JobFailedFact(HOSTILE, error, 5))
    url = one_job(tmp_path, HOSTILE, *facts, task=HOSTILE, queue=HOSTILE)
    with closing(shop(url)) as app:
        job_id = next(app.jobs()).job_id
        for path in ("/", "/jobs", "/queues", job_path(job_id), "/bulk/redrive?state=failed", "/errors?since=all"):
            text = get(app, path)
            assert "<script>alert" not in text
            assert "<b onmouseover" not in text
            assert "\x1b" not in text
            assert "\u202e" not in text
        assert "&lt;script&gt;" in get(app, job_path(job_id))


def test_arguments_and_results_are_redacted_and_hidden(tmp_path: Path) -> None:
    """What the app's function replaces is not on the page; if it fails, nothing is shown; hidden values need a click."""
    facts = (
        ev.JobSubmitted(ev.JobSpec(b"{}")),
        ev.JobStarted("h:1", None, {}, "t", 0),
        ev.JobSucceeded(b'{"card": "4111", "ok": 1}', 5),
    )
    url = one_job(tmp_path, "job-1", *facts)

    def redact(task: str, value: Any) -> Any:
        return {**value, "card": "…"}

    def broken(task: str, value: Any) -> Any:
        raise KeyError("card")

    with closing(shop(url)) as app:
        assert "4111" in ask(pages(app), "GET", "/jobs/job-1").text
        shown = ask(pages(app, dashboard=Dashboard(redact)), "GET", "/jobs/job-1").text
        assert "4111" not in shown
        assert "&#34;ok&#34;: 1" in shown
        failing = ask(pages(app, dashboard=Dashboard(broken)), "GET", "/jobs/job-1").text
        assert "4111" not in failing
        assert "raised KeyError" in failing
        hidden = pages(app, dashboard=Dashboard(show_arguments=False))
        assert "4111" not in ask(hidden, "GET", "/jobs/job-1").text
        assert "4111" in ask(hidden, "GET", "/jobs/job-1?show=1").text


def test_a_part_of_a_page_is_sent_only_if_it_has_changed(app: App) -> None:
    """htmx gets the part that changes, not the page; of a job that has not changed it gets nothing."""
    path = f"/jobs/{failed(app).job_id}"
    seen = re.search(r'name="seen" value="(\w+)"', get(app, path))
    assert seen is not None
    part = get(app, path, part=True)
    assert "<html" not in part
    assert 'id="timeline"' in part
    assert ask(pages(app), "GET", f"{path}?seen={seen[1]}", headers={"HX-Request": "true"}).status_code == 204
    assert "<h2" in get(app, "/jobs", part=True)


def test_pages_work_below_a_prefix(url: str) -> None:
    """Every link, form and file of a page begins with the path at which clients find it."""
    with closing(shop(url)) as app:
        api = pages(app, prefix="/ops/jobs")
        for path in ("/", "/jobs?state=failed", f"/jobs/{failed(app).job_id}", "/bulk/redrive?state=failed"):
            text = ask(api, "GET", path).text
            links = re.findall(r'(?:href|src|action|hx-get|data-url|data-events)="([^"]*)"', text)
            assert links
            assert [each for each in links if each and not each.startswith(("/ops/jobs/", "#"))] == []


def test_a_page_reads_the_table_by_few_queries(app: App) -> None:
    """The number of queries of a page does not grow with the number of jobs."""
    from sqlalchemy import event

    queries: list[str] = []
    reader = app.status_table()

    def note(*given: Any) -> None:
        if threading.current_thread().name != "jobledger-rates":  # it reads the counters beside the pages
            queries.append(given[2])

    event.listen(reader._engine, "before_cursor_execute", note)
    for path, most in (
        ("/", 3),
        ("/jobs?state=failed", 4),
        (f"/jobs/{failed(app).job_id}", 1),
        ("/plans", 1),
        ("/queues", 3),
    ):
        api = pages(app)
        queries.clear()
        assert ask(api, "GET", path).status_code == 200
        assert len(queries) <= most, (path, queries)


def test_rates_are_the_differences_between_two_reads() -> None:
    """A counter that goes down, because jobs were redriven, is no negative rate."""
    now = [100.0]
    counters = [{"queued": 5, "succeeded": 10, "failed": 4}, {"queued": 9, "succeeded": 30, "failed": 2}]
    measured = rates.Rates(lambda: counters[0], lambda: now[0])
    assert measured.lately() is None
    measured.sample()
    now[0], counters[0] = 110.0, counters[1]
    measured.sample()
    assert measured.series() == [[110.0], [2.2], [2.0], [0.0]]
    assert measured.lately() == {"submitted": 2.2, "succeeded": 2.0, "failed": 0.0}


def test_the_removal_of_old_rows_is_no_sign_of_failures() -> None:
    """Reads between which the counters fell are left out. Otherwise no job would seem to succeed, and some to fail."""
    now = [100.0]
    counters = [{"succeeded": 1_000, "failed": 10}]
    measured = rates.Rates(lambda: counters[0], lambda: now[0])
    measured.sample()
    for at, succeeded, failures in ((105.0, 1_050, 11), (110.0, 200, 12), (115.0, 250, 12)):
        now[0], counters[0] = at, {"succeeded": succeeded, "failed": failures}
        measured.sample()
    assert measured.series() == [[105.0, 115.0], [10.2, 10.0], [10.0, 10.0], [0.2, 0.0]]
    assert measured.lately() == {"submitted": 10.1, "succeeded": 10.0, "failed": 0.1}


def test_the_events_of_a_job_show_no_arguments(app: App) -> None:
    """The table of events leaves out arguments and results, because these may have to be hidden."""
    from tests.unit.test_pages_timeline import record

    secret = ev.JobSpec(b'{"card": "4111"}')
    rows = jobpage._rows(
        [record(0, ev.JobSubmitted(secret)), record(1, ev.JobDue(secret, 0)), record(2, ev.JobSucceeded(b'"4111"', 7))]
    )
    assert [row.about for row in rows] == ["", "", "after 0.007 ms"]
    services = PageServices(app, "", lambda r: None, lambda r, role: None, show_arguments=False)  # type: ignore[arg-type,return-value]  # not asked for
    sources = Sources(app)
    sources.history = lambda job: Outcome(([record(0, ev.JobSubmitted(secret))], []))  # type: ignore[method-assign]  # without a broker
    page = jobpage.job_page(sources, services, failed(app), shown=False, now_ms=NOW_MS)
    assert page.hidden
    assert page.arguments is None
    assert "4111" not in page.copy_text


def test_a_copy_has_the_arguments_of_its_job_whatever_characters_they_have(app: App) -> None:
    """The form sends back what the page shows, so the page must not replace a character of it."""
    from jobledger.views.words import printable
    from tests.unit.test_pages_timeline import record

    args = {"text": "\u200f\u202e\u2028\x1b\x85 \u05d0"}
    submitted = ev.JobSubmitted(ev.JobSpec(json.dumps(args).encode()))
    services = PageServices(app, "", lambda r: None, lambda r, role: None)  # type: ignore[arg-type,return-value]  # not asked for
    sources = Sources(app)
    sources.history = lambda job: Outcome(([record(0, submitted)], []))  # type: ignore[method-assign]  # without a broker
    page = jobpage.job_page(sources, services, failed(app), shown=True, now_ms=NOW_MS)
    assert json.loads(printable(page.copy_text)) == args


def test_every_template_can_be_loaded() -> None:
    """Each template is a part of the package, and is valid."""
    names = environment().list_templates()
    assert {"base.html", "job.html", "overview.html"} <= set(names)
    for name in names:
        environment().get_template(name)
