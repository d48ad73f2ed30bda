"""Every Python block and every console block of README.md and docs/*.md, run against a real broker.

The tables below say what a block needs that its page does not show, and which blocks cannot be run and why. A block that
is in no table fails the tests, and so does an entry without a block.

The Python blocks of a page run in one module, in the order of the page. Their tasks run in a worker in this process, and
the status table is written by `jobledger streams`. The commands of a page run with `jobledger dev` and with an app that
is made of the pages' own blocks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import sys
import tomllib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import sqlalchemy
import typer
from confluent_kafka import Consumer, Producer
from sqlalchemy.dialects.sqlite import insert

from jobledger import App, BrokerUnavailable, Depends, JobContext, Queue, Reject, Settings, current_job
from jobledger.cli.main import cli, main
from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobFailedFact, JobSubmitted, JobSucceeded
from jobledger.testing import job_context
from tests.integration import snippets_peers as peers
from tests.integration.snippets_pages import PAGES, ROOT, Block, Command, block_with, blocks, commands, inline_commands
from tests.integration.snippets_runner import DEV, Names, PythonPage, Shop, Snippet, long_running
from tests.integration.test_registry_replaced import SmallRegistry
from tests.integration.worker_app import closings, log_of, until, working

pytestmark = [pytest.mark.kafka, pytest.mark.extended]


# -- the Python blocks ----------------------------------------------------------------------------------------------------


def readme(shop: Shop, names: Names) -> None:
    """The job returned what ``deliver`` returned, and the later calls are in the log."""
    handle, app = names["handle"], names["app"]
    assert handle.result() == "welcome to a@example.org"
    assert app.job(handle.job_id).state == "succeeded"
    submitted = [r.event for r in log_of(app, app.names.jobs("mail"))]
    assert {b'{"to":"c@example.org"}', b'{"to":"d@example.org"}'} <= {args_of(event) for event in submitted}
    delayed = [r.event for r in log_of(app, app.names.coordination) if args_of(r.event) == b'{"to":"b@example.org"}']
    assert [event.fact.spec.tags for event in delayed if isinstance(event.fact, JobSubmitted)] == [{"tenant": "acme"}]


def args_of(event: Any) -> bytes | None:
    """Return the arguments of a submission; None for another event."""
    return event.fact.spec.args if isinstance(event.fact, JobSubmitted) else None


def first_result(shop: Shop, names: Names) -> None:
    """The job of the page that the package index shows returned its function's result."""
    assert names["handle"].result() == "sent to a@example.org"


def own_code(shop: Shop, names: Names) -> None:
    """The job of the tutorial succeeded."""
    status = names["app"].job(names["handle"].job_id)
    assert (status.state, status.result) == ("succeeded", "sent welcome to a@example.org")


def web_service(shop: Shop, names: Names) -> None:
    """The handlers return what a client of the web service gets."""
    job_id = asyncio.run(names["create_mail"]("web@example.org"))["job"]
    assert job_id in {r.event.job_id for r in log_of(names["app"], names["app"].names.jobs("mail"))}
    answer = asyncio.run(names["unavailable"](peers.Request(), BrokerUnavailable("away")))
    assert answer.status_code == 503


def mounted(shop: Shop, names: Names) -> None:
    """The API answers under its prefix, to the user of the app around it."""

    async def ask(name: str) -> Any:
        transport = httpx.ASGITransport(app=names["site"])
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/jobs/api/v1/me", headers={"user": name} if name else {})

    assert asyncio.run(ask("ann")).json() == {"name": "ann", "role": "operate"}
    assert asyncio.run(ask("")).status_code == 401


class Enough(Exception):
    """Ends a loop that has no end on its page."""


def bill(job_id: str, duration_us: int) -> None:
    """End the loop at the first job that succeeded."""
    assert uuid.UUID(job_id)
    assert duration_us >= 0
    raise Enough


def fold(shop: Shop, names: Names) -> None:
    """The fold function counts people."""
    count, event = names["count_signups"], names["UserRegistered"]("u-1")
    assert [count(row, event) for row in (None, {"people": 1})] == [{"people": 1}, {"people": 2}]


def hooks(shop: Shop, names: Names) -> None:
    """A job gets the pool, runs in the schema of its tenant, and its failure is reported."""
    app = names["app"]
    ensure(app, app.settings)
    submitted = [names["charge"].submit("o-1"), names["invoice"].using(tags={"tenant": "acme"}).submit()]
    with working(app):
        until(lambda: {job.job_id for job in submitted} <= set(closings(app)))
        until(lambda: names["sentry_sdk"].errors)
    outcomes = [type(closings(app)[job.job_id][0].event.fact) for job in submitted]
    assert outcomes == [JobSucceeded, JobFailedFact]
    assert names["tenant_schema"].entered == ["acme"]


def redriven(shop: Shop, names: Names) -> None:
    """The plan is done: no job has failed with this error."""
    assert names["app"].plan(names["plan"].plan).state == "done"


def label(shop: Shop, names: Names) -> None:
    """A second run of the job gets the label of the first."""
    labels = [asyncio.run(in_job(names["print_label"], job_id, "o-1")) for job_id in (A_JOB, A_JOB, ANOTHER)]
    assert labels == ["label 1", "label 1", "label 2"]


async def in_job(task: Any, job_id: str, *args: Any) -> Any:
    """Run a task's function as a worker does."""
    with job_context(task, job_id=job_id):
        return await task(*args)


def transaction(shop: Shop, names: Names) -> None:
    """A second run of the job changes nothing."""
    db, account = names["db"], names["account"]
    db.at_once(account.insert().values(name="a-17", balance=5))
    for job_id, balance in ((A_JOB, 15), (A_JOB, 15), (ANOTHER, 25)):
        asyncio.run(in_job(names["deposit"], job_id, "a-17", 10))
        assert db.at_once(sqlalchemy.select(account.c.balance)) == balance
    db.close()


def other_language(shop: Shop, names: Names) -> None:
    """A worker runs the job that was written without Jobledger."""
    app = names["app"]
    app.settings = dataclasses.replace(app.settings, schema_registry=shop.texts["registry"])
    with working(app):
        until(lambda: names["job_id"] in closings(app))
    fact = closings(app)[names["job_id"]][0].event.fact
    assert isinstance(fact, JobSucceeded)
    assert fact.result == b"42"


A_JOB, ANOTHER = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
done = sqlalchemy.Table("done", sqlalchemy.MetaData(), sqlalchemy.Column("job_id", sqlalchemy.String, primary_key=True))
account = sqlalchemy.Table(
    "account",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("name", sqlalchemy.String, primary_key=True),
    sqlalchemy.Column("balance", sqlalchemy.Integer),
)

#: The Python blocks that are run, by page. Where a page makes no app, the test makes it.
PYTHON: Mapping[str, Sequence[Snippet]] = {
    "README.md": [
        Snippet(
            "app.submit_many(",
            names={"recipients": ["c@example.org", "d@example.org"]},
            before="async def deliver(to: str, template: str) -> str:\n    return f'{template} to {to}'",
            check=readme,
        )
    ],
    "docs/pypi.md": [
        Snippet("handle.result(timeout=30)", bodies={"send_mail": "return f'sent to {to}'"}, check=first_result)
    ],
    "docs/tutorial.md": [
        Snippet("the mail server hung up", module="shop"),
        Snippet("from shop import app, send_mail", check=own_code),
    ],
    "docs/how-to.md": [
        Snippet(
            'import_orders.submit("may.csv")',
            names={"current_job": current_job, "dataclass": dataclass},
            before="@dataclass\nclass ImportResult:\n    rows: int",
            bodies={
                "import_orders": "for row in (1, 2, 3):\n"
                "    current_job().progress(done=row, total=3)\n"
                "return ImportResult(rows=3)"
            },
        ),
        Snippet(
            "api = FastAPI()",
            names={
                "FastAPI": peers.FastAPI,
                "Request": peers.Request,
                "JSONResponse": peers.JSONResponse,
                "BrokerUnavailable": BrokerUnavailable,
            },
            before="@app.task(queue='mail')\nasync def send_mail(to: str) -> None: ...",
            check=web_service,
        ),
        Snippet("@app.event(key="),
        Snippet("app.lifecycle(", names={"JobSucceeded": JobSucceeded, "bill": bill}, raises=Enough),
        Snippet("@app.projection(", check=fold),
        Snippet("app.redrive(", check=redriven),
        Snippet("job_context("),
    ],
    "docs/hooks.md": [
        Snippet(
            "@app.resource",
            names={
                "AsyncIterator": AsyncIterator,
                "Depends": Depends,
                "Pool": peers.Pool,
                "create_pool": peers.create_pool,
                "DSN": "postgresql://db.example/jobs",
            },
            bodies={"charge": "assert pool.open"},
        ),
        Snippet(
            "@app.around(",
            names={
                "Iterator": Iterator,
                "JobContext": JobContext,
                "sentry_sdk": peers.SentrySdk(),
                "tenant_schema": peers.TenantSchema(),
                "Reject": Reject,
            },
            before="@app.task(queue='billing')\ndef invoice() -> None:\n    raise Reject('no address')",
            check=hooks,
        ),
    ],
    "docs/dashboard.md": [Snippet("create_app(", names={"who_asks": lambda request: None})],
    "docs/http-api.md": [
        Snippet("create_app(", names={"current_user": lambda request: request.headers.get("user")}, check=mounted)
    ],
    "docs/isolation.md": [Snippet('isolation="process"')],
    "docs/long-jobs.md": [Snippet("long=True")],
    "docs/ordering.md": [
        Snippet('@app.task(key="account"'),
        Snippet("fair_by=", names={"App": App, "Queue": Queue}),
        Snippet("priorities=True"),
        Snippet('rate="100/s"'),
    ],
    "docs/twice.md": [
        Snippet("Idempotency-Key", modules={"httpx": peers.httpx()}, check=label),
        Snippet(
            "on_conflict_do_nothing",
            names={
                "Database": peers.Database,
                "account": account,
                "done": done,
                "insert": insert,
                "update": sqlalchemy.update,
            },
            before="db = Database(done, account)",
            check=transaction,
        ),
    ],
    "docs/wire.md": [
        Snippet(
            "import fastavro, httpx2",
            before="@app.task\ndef add(a: int, b: int) -> int:\n    return a + b\n",
            texts={
                '"localhost:9092"': "broker",
                '"http://localhost:8081"': "registry",
                '"shop.jobs.default"': "topic",
                '"job_event.avsc"': "schema",
            },
            check=other_language,
        )
    ],
}

#: The blocks that another test runs, by page and a text that only this block contains, and that test.
ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("docs/reference.md", "hashlib.sha256()"): "tests/integration/test_materializer.py::"
    "test_the_digest_of_verify_is_what_the_program_in_the_reference_prints",
    ("docs/how-to.md", "GRANT USAGE ON SCHEMA"): "tests/contract/test_postgres.py::"
    "test_a_readers_statement_has_a_time_limit_unless_its_user_has_another",
    **{
        ("docs/wire.md", text): "tests/integration/test_kcat.py::test_every_recipe_does_what_it_says"
        for text in ("-Q -t", "-t shop.lifecycle -f", "date +%s", "-t shop.schemas", "record.bin", "jl-event=")
    },
}
#: Directives of Sphinx. tests/unit/test_site.py builds the site.
DIRECTIVES = ("{eval-rst}", "{toctree}")

# -- the commands ---------------------------------------------------------------------------------------------------------

#: Commands whose options are only parsed, and why.
PARSED = {
    "jobledger topics acls shop:app --principal worker=User:CN=jobs,O=shop --apply": "needs a broker with ACLs",
    "jobledger topics acls shop:app --principal worker=User:worker --principal streams=User:streams --apply": "needs a "
    "broker with ACLs",
    "docker compose run --rm cli submit examples.shop:app send_mail to=a@example.org --wait": "needs Docker",
    "docker compose run --rm cli emit examples.shop:app UserRegistered user_id=u-1": "needs Docker",
    "docker compose run --rm cli jobs list --namespace shop": "needs Docker",
}
#: Commands that are not run, and why.
EXCUSED = {
    "make demo": "takes minutes; tests/acceptance/test_demo.py runs the demo",
    "make test": "runs this test",
    "docker compose up --build --wait": "needs Docker; tests/acceptance/test_compose.py runs it",
    "docker compose run --rm demo": "needs Docker; tests/acceptance/test_compose.py runs it",
    "docker compose exec web jobledger web-token add me --role admin --tokens /data/web-tokens.json": "needs Docker; "
    "tests/acceptance/test_compose.py adds a token",
    "python3 -m venv .venv && . .venv/bin/activate": "creates a virtual environment, and nothing of Jobledger",
    "createuser --pwprompt jobledger": "needs a PostgreSQL server and its administrator",
    "createdb --owner=jobledger jobs": "needs a PostgreSQL server and its administrator",
}
#: Exit codes other than 0.
CODES = {"jobledger submit shop:app send_mail to=nonsense --wait": 5, "jobledger check shop:app": 4}
#: What is typed when a command asks.
TYPED = {"jobledger jobs cancel shop:app --where task=newsletter --where tag.tenant=acme": "y\n"}
#: What stands on the pages where a reader puts a job's id, or its first characters.
IDS = ("ID", "0198f2c4-51")

# -- the groups -----------------------------------------------------------------------------------------------------------


def python_blocks(page: str) -> list[tuple[Block, Snippet]]:
    """Return a page's Python blocks that are run here, in the page's order, with what the test adds to them."""
    found = [(block_with(page, snippet.mark), snippet) for snippet in PYTHON[page]]
    return sorted(found, key=lambda pair: pair[0].line)


def console_commands(page: str) -> list[Command]:
    """Return the commands of a page's console blocks."""
    return [each for block in blocks(page) if block.language == "console" for each in commands(block)]


def group_of(command: str) -> str:
    """Return how a command is tried: run, started, parsed, settings, extra, excused, or "" for none of these."""
    for group, lines in (("parsed", PARSED), ("excused", EXCUSED)):
        if command in lines:
            return group
    if command.startswith("jobledger "):
        return "started" if long_running(command) else "run"
    return {"export": "settings", "pip": "extra"}.get(command.partition(" ")[0], "")


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for page in PAGES for command in console_commands(page)]


def test_every_block_is_in_one_group(say: Callable[[str], None]) -> None:
    """Each block and each command is run, started, parsed, run by another test, or excused with a reason; each entry of
    a table has its block."""
    tried = [block for page in PYTHON for block, _ in python_blocks(page)]
    others = {block_with(page, text): test for (page, text), test in ELSEWHERE.items()}
    groups: Counter[Block] = Counter([*tried, *others])
    groups.update(block for block in ALL if block.language in ("console", *DIRECTIVES))
    for block in ALL:
        assert groups[block] == 1, f"{block.where}: this block is in {groups[block]} groups of {__file__}"
    for test in others.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{test} does not exist"

    shown = {command.text for command in COMMANDS}
    entries = {*PARSED, *EXCUSED, *CODES, *TYPED}
    assert entries <= shown, f"no page shows {entries - shown} any more"
    for command in COMMANDS:
        assert group_of(command.text), f"{command.block.where}: `{command.text}` is in no group of {__file__}"
    counts = Counter(group_of(command.text) for command in COMMANDS)
    say(
        f"snippets: {len(tried)} Python blocks run, {len(others)} blocks run by other tests; {len(COMMANDS)} commands: "
        f"{counts['run']} run, {counts['started']} started, {counts['settings']} settings read, {counts['extra']} extras "
        f"looked up, {counts['parsed']} only parsed, {counts['excused']} excused"
    )


def test_the_commands_in_the_prose_exist() -> None:
    """The command line knows each command and option that a sentence or a table names."""
    program = typer.main.get_command(cli)
    for page in PAGES:
        for text in inline_commands(page):
            command: Any = program
            words = text.split()[1:]
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            options = {"--help"}.union(*(each.opts for each in command.params))
            unknown = [word for word in words if word.startswith("-") and word not in options]
            assert not unknown, f"{page}: `{text}`: the command does not have {unknown}"
            missing = hasattr(command, "commands") and words and re.match("[a-z]", words[0])
            assert not missing, f"{page}: `{text}`: there is no command of this name"


# -- the tests --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The shop, with its topics; every test of this file shares the shop and its processes."""
    folder, registry = tmp_path_factory.mktemp("shop"), SmallRegistry()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("JOBLEDGER_") or name in ("FORCE_COLOR", "NO_COLOR"):
                patch.delenv(name)
        for name, value in {
            "JOBLEDGER_BOOTSTRAP": broker,
            "JOBLEDGER_HOME": str(folder / "home"),
            "JOBLEDGER_SUBMIT_TIMEOUT": "120",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        made = Shop(folder, broker, registry.url)
        try:
            ensure(made.app, made.app.settings)
            yield made
        finally:
            made.close()
            sys.modules.pop("shop", None)
            registry.close()


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_blocks_of_a_page_run(shop: Shop, page: str) -> None:
    """The blocks run in the page's order, submit what they submit, and get the results for which they wait."""
    found = python_blocks(page)
    live = any(".result" in block.text for block, _ in found)
    PythonPage(shop, page, live).run(found)


@pytest.mark.parametrize("page", [page for page in PAGES if console_commands(page)])
def test_the_commands_of_a_page_run(shop: Shop, page: str) -> None:
    """Commands that end by themselves have the exit code and the output that the page says; those that do not end come
    up and stop at SIGTERM; the options of the others exist."""
    environ: dict[str, str] = {}
    for command in console_commands(page):
        group = group_of(command.text)
        if group == "run":
            run(shop, command)
        elif group == "started":
            shop.tried(command.text)
        elif group == "parsed":
            words = command.words[command.words.index("cli") :] if command.text.startswith("docker") else command.words
            assert main([*words[1:], "--help"]) == 0, command.block.where
        elif group == "settings":
            environ |= dict(word.split("=", 1) for word in command.words[1:])
        elif group == "extra":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
            (extra,) = re.findall(r"^pip install jobledger\[(\w+)\]$", " ".join(command.words))
            assert extra in project["optional-dependencies"], command.block.where
    settings = Settings.from_env(environ)
    for name, value in settings.kafka.items():
        for make in (Producer, Consumer):
            assert known(make, name, value), f"{page}: librdkafka does not know {name}={value}"


def run(shop: Shop, command: Command) -> None:
    """Run a command that ends by itself, and compare its exit code and output with the page."""
    shop.start(DEV)
    text = command.text
    if "backfill" in text:
        shop.app.emit(sys.modules["shop"].UserRegistered("u-1"))
    elif text.startswith("jobledger check"):
        gone = App(shop.namespace)
        gone.task(name="gone")(lambda: None)
        for _ in range(2):  # the page shows several jobs
            gone.tasks["gone"].using(delay=3600).submit()
        gone.close()
    if "--where" in text or set(IDS) & set(command.words):
        job_id = shop.waiting_job()
        text = re.sub(rf"\b({'|'.join(IDS)})\b", job_id[:-2], text)
    code, shown = shop.run(text, TYPED.get(command.text, ""))
    assert code == CODES.get(command.text, 0), f"{command.block.where}: {command.text}\n{shown}"
    lines = [without_numbers(line) for line in shown.splitlines()]
    for line in command.output:
        assert without_numbers(line) in lines, f"{command.block.where}: {line!r} is not in\n{shown}"


def without_numbers(line: str) -> str:
    """Return a line with N for each number."""
    return re.sub(r"\d+", "N", line.rstrip())


def known(make: Callable[[dict[str, Any]], Any], name: str, value: str) -> bool:
    """Return whether librdkafka has a setting and, for a setting with a list of values, this value."""
    try:
        make({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0, name: value})
    except Exception as exc:  # noqa: BLE001  # the file that the value names is not here, or a further setting is missing
        return not re.search("No such configuration property|Invalid value", str(exc))
    return True


def test_the_processes_end_at_sigterm(shop: Shop) -> None:
    """What still runs stops with exit code 0."""
    shop.stop_all()
