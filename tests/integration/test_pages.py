"""The pages in Chromium: no violation of the Content-Security-Policy, nothing that people with disabilities could not
use, and the way from a failed job to its redrive by the keyboard alone, with a real broker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger import App, Settings
from jobledger.kafka.embedded.ports import free_port
from jobledger.kafka.topics import ensure
from jobledger.schemas import events as ev
from jobledger.streams.status.store import open_store
from jobledger.web import Role
from tests.pages import pages, seeded, served, shop
from tests.patience import PATIENCE, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

CHROMIUM = os.environ.get("JOBLEDGER_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
    pytest.mark.extended,
]

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = (ROOT / "docs" / "dashboard.md").read_text("utf-8")
AXE = Path(__file__).parents[1] / "vendor" / "axe-core" / "axe.min.js"
#: Sizes of the window, and the colours.
VIEWS = {
    "light": ({"width": 1280, "height": 900}, "light"),
    "dark": ({"width": 1280, "height": 900}, "dark"),
    "phone": ({"width": 360, "height": 740}, "light"),
}
#: Counts each violation of the policy, before the page's own scripts run.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
"""
RUN_AXE = """
axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
  .filter((each) => ["serious", "critical"].includes(each.impact))
  .map((each) => `${each.id}: ${each.nodes.map((node) => node.target).join(", ")}`))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as Debian has it."""
    with playwright.sync_playwright() as started:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = started.chromium.launch(executable_path=CHROMIUM, args=[*root, "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, App]]:
    """The pages over 1,000 seeded jobs, without a broker."""
    with closing(shop(seeded(tmp_path_factory.mktemp("pages"), 1_000))) as app, served(pages(app)) as base:
        yield base, app


@contextmanager
def opened(browser: Any, view: str, **options: Any) -> Iterator[Any]:
    """Yield a page of the browser in one of `VIEWS`."""
    size, colours = VIEWS[view]
    context = browser.new_context(viewport=size, color_scheme=colours, **options)
    context.set_default_timeout(15_000 * PATIENCE)
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        yield page
    finally:
        context.close()


@pytest.mark.parametrize("view", list(VIEWS))
def test_each_page_keeps_the_policy_and_can_be_used_by_everybody(
    browser: Any, address: tuple[str, App], view: str
) -> None:
    """In light and dark and at the width of a phone: no violation of the policy, nothing serious found by axe, no error of
    a script, and no page that is wider than the window."""
    base, app = address
    bad = next(app.jobs(state="failed", limit=1))
    paths = [
        "/",
        "/jobs?state=failed&tag=tier%3Dfree&since=x",
        f"/jobs/{bad.job_id}",
        "/errors?since=all",
        "/queues",
        "/workers",
    ]
    paths += ["/dead-letters", "/plans", "/bulk/redrive?state=failed", "/jobs/nobody"]
    with opened(browser, view) as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        for path in paths:
            page.goto(base + path, wait_until="load")
            page.wait_for_function(
                "document.documentElement.dataset.live !== undefined || !document.getElementById('live').dataset.events"
            )
            assert page.evaluate("window.violations") == [], path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is too wide"
            page.evaluate(AXE.read_text("utf-8"))
            assert page.evaluate(RUN_AXE) == [], path
        assert errors == []


def test_pages_and_forms_work_without_scripts(browser: Any, address: tuple[str, App]) -> None:
    """With JavaScript off, a filter can be sent, its jobs can be read, and the preview of an action can be reached."""
    base, app = address
    with opened(browser, "light", java_script_enabled=False) as page:
        page.goto(f"{base}/jobs")
        page.get_by_label("Queue", exact=True).fill("mail")
        page.get_by_role("checkbox", name="failed").check()
        page.get_by_role("button", name="Filter").click()
        number = sum(1 for _ in app.jobs(queue="mail", state="failed"))
        assert page.get_by_role("heading", name=f"{number} jobs match").is_visible()
        page.get_by_role("link", name="Redrive these jobs").click()
        assert page.get_by_role("button", name=f"Redrive {number} jobs").is_visible()


def test_the_page_follows_the_table_until_it_is_paused(browser: Any, tmp_path: Path) -> None:
    """A new job appears without a reload, an opened part of the page stays open, and a pause stops the updates. The
    choice of colours is kept."""
    from bench import seed_table

    url = seeded(tmp_path, 200)
    with closing(shop(url)) as app, served(pages(app)) as base, opened(browser, "light") as page:
        page.goto(f"{base}/jobs?queue=mail")
        before = page.locator("#list").inner_text()
        page.get_by_role("button", name="Colours").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        seed_table.fill(url, "shop", seed_table.Options(400, seed=8))
        page.wait_for_function("text => document.getElementById('list').innerText !== text", arg=before)
        page.get_by_role("button", name="Updates").click()
        assert page.locator("#live-label").inner_text() == "Paused"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.kafka
def test_from_a_failed_job_to_its_redrive_by_the_keyboard(
    browser: Any, broker: str, namespace: str, tmp_path: Path
) -> None:
    """With the keyboard alone: the list of failed jobs, the job with its timeline from the log, a reason, the button. The
    plan is in the log, with the user's name and the reason."""
    url = f"sqlite:///{tmp_path / 'status.db'}"
    app = App(namespace, settings=Settings(bootstrap=broker, status_url=url))

    @app.task
    def charge(order: int) -> None: ...

    ensure(app, app.settings)
    job_id = fail(app, url)
    with closing(app), served(pages(app, Role.OPERATE)) as base, opened(browser, "light") as page:
        page.goto(f"{base}/jobs?state=failed")
        tab_to(page, "a", job_id)
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/*")
        assert page.get_by_role("img", name="ran for").is_visible()
        assert page.get_by_text('"order": 7').first.is_visible()
        tab_to(page, "#redrive-reason")
        page.keyboard.type("the gateway is back")
        tab_to(page, "button", "Redrive this job")
        page.keyboard.press("Enter")
        page.wait_for_url("**/plans/*")
        assert "The plan is in the log" in page.get_by_role("status").first.inner_text()
        assert page.evaluate("window.violations") == []
    opened_facts = [fact for fact in facts(app) if isinstance(fact, ev.PlanOpened)]
    assert [(fact.action, fact.by, fact.reason) for fact in opened_facts] == [
        ("redrive", "alice", "the gateway is back")
    ]


#: The pictures of docs/dashboard.md: the page of each, and the height that is shown; the whole page if it is 0. Tracebacks
#: have paths of this machine, so they are not shown.
PICTURES = {
    "overview": ("/", 790),
    "errors": ("/errors", 440),
    "job": ("/jobs/{job}", 665),
    "redrive": ("/bulk/redrive?state=failed&fingerprint={fingerprint}", 0),
}
#: Seconds between two measurements of the throughput.
MEASURED_S = 5.5


@pytest.mark.kafka
def test_the_pictures_of_the_documents_can_be_made(browser: Any, broker: str, namespace: str, tmp_path: Path) -> None:
    """`jobledger dev` runs an app whose jobs fail, and the pages that the documents describe show them.

    With ``JOBLEDGER_PICTURES`` the pictures are written to this folder: docs/pictures.
    """
    kept = os.environ.get("JOBLEDGER_PICTURES")
    folder = Path(kept or tmp_path)
    module, port = "tests.integration.pictures_app", free_port()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_")}
    environ |= {"JOBLEDGER_HOME": str(tmp_path), "JOBLEDGER_BOOTSTRAP": broker, "JOBLEDGER_VERSION": "2026.12.1"}
    environ["LOGNAME"] = "ann"  # the user whose name the pages show
    environ["PICTURES_NAMESPACE"] = "shop" if kept else namespace
    environ["PICTURES_TIMEOUT"] = str(60 * PATIENCE)
    argv = [sys.executable, "-m", "jobledger", "dev", f"{module}:app", "--web-port", str(port)]
    log = (tmp_path / "dev.log").open("w")
    dev = subprocess.Popen(argv, env=environ, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_ready(base), 60.0, "the dashboard of jobledger dev")
        httpx.get(base)  # from now on the throughput is measured
        for _ in range(4 if kept else 1):
            subprocess.run([sys.executable, "-m", module], env=environ, cwd=ROOT, check=True, timeout=120 * PATIENCE)
            time.sleep(MEASURED_S if kept else 0.0)
        failed = httpx.get(f"{base}/api/v1/jobs?state=failed&error=TimeoutError&limit=1").json()["jobs"][0]
        with opened(browser, "light") as page:
            for name, (path, height) in PICTURES.items():
                page.goto(base + path.format(job=failed["job_id"], fingerprint=failed["fingerprint"]))
                page.wait_for_load_state("networkidle")
                assert page.get_by_text("charge_card").first.is_visible() or name == "overview"
                clip = {"x": 0, "y": 0, "width": VIEWS["light"][0]["width"], "height": height}
                page.screenshot(path=folder / f"{name}.png", **({"clip": clip} if height else {"full_page": True}))
                assert f"](pictures/{name}.png)" in DASHBOARD
                assert (ROOT / "docs" / "pictures" / f"{name}.png").stat().st_size > 10_000
    finally:
        dev.send_signal(signal.SIGTERM)
        code = dev.wait(60 * PATIENCE)
        log.close()
    assert code == 0, (tmp_path / "dev.log").read_text()[-3_000:]


def is_ready(base: str) -> bool:
    """Return whether the service can answer."""
    try:
        return httpx.get(f"{base}/api/v1/readyz", timeout=10.0).status_code == 200
    except httpx.HTTPError:
        return False


def tab_to(page: Any, selector: str, text: str = "") -> None:
    """Press Tab until the element has the focus."""
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate(
            "([selector, text]) => document.activeElement.matches(selector) && document.activeElement.innerText.includes(text)",
            [selector, text],
        ):
            return
    raise AssertionError(f"no {selector} {text!r} can be reached with Tab")


def fail(app: App, url: str) -> str:
    """Submit a job, and write that it was started and failed. Fold its facts into a new table. Return its id."""
    import uuid_utils

    from jobledger.job import join, of
    from jobledger.log.writer import LogWriter, Outgoing
    from jobledger.schemas import codec
    from jobledger.schemas.codec import Decoder
    from jobledger.streams.status.row_folder import RowFolder

    handle = app.tasks["charge"].submit(7)
    error = ev.ErrorInfo("ConnectionError", "no answer", 'Traceback:\n  File "shop.py", line 3, in charge\n')
    started = ev.JobStarted("host:1", "v1", {}, app.names.jobs("default"), handle.position.offset)
    writer = LogWriter(app.settings, app.names, linger_ms=0.0)
    try:
        known: list[tuple[ev.Fact, ev.Position]] = [(ev.JobSubmitted(ev.JobSpec(b'{"order":7}')), handle.position)]
        outcome: tuple[ev.Fact, ...] = (started, ev.JobFailedFact("exhausted", error, 5))
        for fact in outcome:
            event = ev.JobEvent(
                str(uuid_utils.uuid7()), handle.job_id, 1, 1, 1, 0, "charge", "default", None, None, "test", None, fact
            )
            (position,) = writer.send([Outgoing(app.names.lifecycle, codec.encode(event), handle.job_id)])
            known.append((fact, position))
    finally:
        writer.close()
    life = None
    for number, (told, at) in enumerate(known):
        place = (1_764_547_200_000 + number, at.topic, at.partition, at.offset)
        life = join(life, of(1, 1, 1, "charge", "default", None, told, place))
    assert life is not None
    with open_store(url, app.names.namespace) as store:
        store.acquire()
        store.write(RowFolder(store, Decoder()).merge([(handle.job_id, life)]).changes)
    return handle.job_id


def facts(app: App) -> list[ev.Fact]:
    """Return the facts of the topic of plans."""
    from jobledger.log.reading import LogReader
    from jobledger.log.schema_lookup import decoder

    decode = decoder(app.settings, app.names).decode
    with LogReader(app.settings) as reader:
        return [decode(message.value()).fact for message in reader.read(app.names.plans, 0, 0)]
