"""Runs Python blocks and commands of the pages against a broker."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobledger import App
from jobledger.cli.main import main
from jobledger.kafka.topics import ensure
from tests.integration.snippets_pages import ROOT, Block, block_with
from tests.integration.test_cli import Process
from tests.integration.worker_app import until, working
from tests.patience import PATIENCE

Names = dict[str, Any]

DEV, STREAMS = "jobledger dev shop:app", "jobledger streams shop:app"
#: Commands that run until they are stopped, by their first words. For each: the texts of a line that shows that the
#: command is ready.
LONG_RUNNING: Mapping[str, Sequence[Sequence[str]]] = {
    "jobledger dev": [("worker ", "lane mail: assigned"), ("materializer ", "writing the status table")],
    "jobledger worker": [("worker-1 ", "serves mail"), ("worker-2 ", "serves mail")],
    "jobledger streams": [("materializer ", "writing the status table")],
    "jobledger events tail": [("JobSubmitted",)],
    "jobledger web": [("serving http://",)],
}

#: Blocks of the pages that are the app `shop:app`: the tutorial's app, and the declarations of other pages.
SHOP = (
    ("docs/tutorial.md", "the mail server hung up"),
    ("docs/how-to.md", "@app.event(key="),
    ("docs/how-to.md", "@app.projection("),
    ("docs/ordering.md", "priorities=True"),
    ("docs/ordering.md", 'rate="100/s"'),
)
QUEUES = 'Queue("crm"), Queue("mail", priorities=True), Queue("sms", partitions=4, rate="100/s", concurrency=20)'

_APP = re.compile(r'^app = App\("shop".*\)$', re.MULTILINE)


def in_namespace(text: str, namespace: str) -> str:
    """Return code or a command with the test's namespace instead of ``shop``."""
    return re.sub(r'(App\("|--namespace )shop\b', rf"\g<1>{namespace}", text)


def long_running(command: str) -> str | None:
    """Return the first words of a command that runs until it is stopped; None for a command that ends by itself."""
    found = next((words for words in LONG_RUNNING if command.startswith(f"{words} ")), None)
    return None if found == "jobledger events tail" and "--follow" not in command else found


class Shop:
    """A namespace on the broker, a folder with the app `shop:app`, and the processes that run for this app.

    ``texts``: what the test has instead of addresses and files that the pages name.
    """

    def __init__(self, folder: Path, broker: str, registry: str) -> None:
        self.namespace = f"t{uuid.uuid4().hex[:12]}"
        self.texts = {"broker": broker, "registry": registry, "schema": str(ROOT / "schemas" / "job_event.avsc")}
        self._folder = folder
        self._running: dict[str, Process] = {}
        self._came_up: set[str] = set()
        (folder / "shop.py").write_text(self._source(), "utf-8")

    def _source(self) -> str:
        """Return the app's module: one app with the queues of all blocks, and without the calls at their ends."""
        made = f'app = App("shop", queues=[{QUEUES}])'
        code = ["from dataclasses import dataclass\n\nfrom jobledger import Queue\n"]
        for number, (page, text) in enumerate(SHOP):
            block = _APP.sub("" if number else made, block_with(page, text).text)
            tree = ast.parse(block)
            kept = [each for each in tree.body if not isinstance(each, ast.Expr)]
            code.append(ast.unparse(ast.Module(kept, [])))
        return in_namespace("\n\n".join(code).replace("App('shop'", 'App("shop"'), self.namespace)

    @property
    def app(self) -> App:
        """The app, loaded as the command line loads it."""
        found: App = importlib.import_module("shop").app
        return found

    def start(self, command: str) -> Process:
        """Start a command that runs until it is stopped, if it does not run; return it when it is ready.

        `jobledger dev` and `jobledger streams` do not run at the same time, because one of them writes the status table.
        """
        if command in (DEV, STREAMS):
            self.stop(DEV if command == STREAMS else STREAMS)
        if command not in self._running:
            process = Process(self._words(command), self._folder, dict(os.environ))
            self._running[command] = process
            kind = long_running(command)
            assert kind is not None
            for texts in LONG_RUNNING[kind]:
                process.wait_for_line(*texts)
            self._came_up.add(command)
        return self._running[command]

    def stop(self, command: str) -> None:
        """Stop a command with SIGTERM, if it runs. Only a command that follows the log may end by the signal."""
        process = self._running.pop(command, None)
        if process is not None:
            try:
                code = process.stop()
            finally:
                process.close()
            assert code == (-15 if command.startswith("jobledger events tail") else 0), "\n".join(process.lines[-40:])

    def tried(self, command: str) -> None:
        """See a command come up and, unless it is `jobledger dev`, end. Once is enough for one command line."""
        if command in self._came_up:
            return
        if command.startswith("jobledger events tail"):
            self.start(DEV)
            self._submit()
            self.start(command).wait_for_line(self._submit())  # a job that is submitted while the command runs
        else:
            self.start(command)
        if command != DEV:
            self.stop(command)

    def _submit(self) -> str:
        return self.app.tasks["newsletter"].submit("ann@example.org").job_id

    def stop_all(self) -> None:
        """Stop every process; each must end well."""
        for command in list(self._running):
            self.stop(command)

    def close(self) -> None:
        """Leave no process and no connection."""
        for process in self._running.values():
            process.close()
        if "shop" in sys.modules:
            self.app.close()

    def _words(self, command: str) -> list[str]:
        return shlex.split(in_namespace(command, self.namespace))[1:]

    def run(self, command: str, typed: str = "") -> tuple[int, str]:
        """Run a command in this process; return its exit code and what it prints. ``typed``: its input."""
        shown = io.StringIO()
        with (
            contextlib.redirect_stdout(shown),
            contextlib.redirect_stderr(shown),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "stdin", io.StringIO(typed))
            code = main(self._words(command))
        return code, shown.getvalue()

    def waiting_job(self) -> str:
        """Submit a newsletter that waits for its time; return its id when the status table knows the job."""
        app = self.app
        handle = app.tasks["newsletter"].using(delay=3600, tags={"tenant": "acme"}).submit("ann@example.org")
        app.job(handle.job_id, at_least=handle.position, timeout=60 * PATIENCE)
        return handle.job_id


def _nothing(shop: Shop, names: Names) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Snippet:
    """A Python block, and what the test adds to the block.

    ``mark``: text that only this block of its page contains. ``names``: objects that the block uses and its page does
    not define. ``before``: code that runs before the block. ``bodies``: code for functions whose body is ``...`` on the
    page. ``module``: the block is this module, which later blocks of the page import. ``modules``: stand-ins for packages
    that the block imports. ``texts``: texts of the block, and the key in `Shop.texts` of what the test has instead.
    ``raises``: the error with which the test ends a block that has no end. ``check``: called after the block, with the
    names of its module.
    """

    mark: str
    names: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""
    bodies: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    modules: Mapping[str, ModuleType] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    raises: type[BaseException] | None = None
    check: Callable[[Shop, Names], None] = _nothing


class PythonPage:
    """The Python blocks of one page, which run in one module. ``live``: they wait for results, so their namespace is the
    shop's, whose status table is written; other pages have their own namespace."""

    def __init__(self, shop: Shop, page: str, live: bool) -> None:
        self._shop, self._page = shop, page
        stem = Path(page).stem.lower()
        self._namespace = shop.namespace if live else f"{shop.namespace}-{stem}"
        self._module = ModuleType(f"snippets_of_{stem.replace('-', '_')}")
        self._modules: dict[str, ModuleType] = {self._module.__name__: self._module}
        self._apps: dict[int, App] = {}
        self._declared = False

    def run(self, found: Sequence[tuple[Block, Snippet]]) -> None:
        """Run the blocks and their checks."""
        with pytest.MonkeyPatch.context() as patch:
            try:
                for block, snippet in found:
                    self._block(block, snippet, patch)
            finally:
                for app in self._apps.values():
                    app.close()

    def _block(self, block: Block, snippet: Snippet, patch: pytest.MonkeyPatch) -> None:
        module = ModuleType(snippet.module) if snippet.module else self._module
        for name, each in {**snippet.modules, module.__name__: module}.items():
            patch.setitem(sys.modules, name, each)
        names = vars(module)
        names.setdefault("app", App(self._namespace))
        names.update(snippet.names)
        exec(compile(snippet.before, f"what stands before {block.where}", "exec", dont_inherit=True), names)  # noqa: S102
        tree = ast.parse(self._text(block, snippet), block.page)
        ast.increment_lineno(tree, block.line - 1)
        self._fill(tree, snippet.bodies)
        with ExitStack() as stack:
            with pytest.raises(snippet.raises) if snippet.raises else contextlib.nullcontext():
                worker = False
                for statement in tree.body:
                    self._create_topics(statement, names)
                    if not worker and _waits(statement):
                        self._start_worker(names["app"], stack)
                        worker = True
                    self._statement(statement, names)
            names["app"].check()
            snippet.check(self._shop, names)

    def _text(self, block: Block, snippet: Snippet) -> str:
        text = in_namespace(block.text, self._namespace)
        text = re.sub(r"(?<=\.result\(timeout=)\d+", lambda found: f"{PATIENCE * int(found[0]):g}", text)
        there = {**self._shop.texts, "topic": f"{self._namespace}.jobs.default"}
        for shown, name in snippet.texts.items():
            assert text.count(shown) == 1, f"{block.where}: {shown} stands there {text.count(shown)} times"
            text = text.replace(shown, repr(there[name]))
        return text

    def _fill(self, tree: ast.Module, bodies: Mapping[str, str]) -> None:
        for name, code in bodies.items():
            (function,) = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
            ]
            assert ast.unparse(function.body[0]) == "...", f"{self._page}: {name} has a body"
            function.body = ast.parse(code).body

    def _create_topics(self, statement: ast.stmt, names: Names) -> None:
        """Before a call, create the topics that the app has declared so far."""
        if _declares(statement):
            self._declared = True
        elif self._declared:
            ensure(names["app"], names["app"].settings)
            self._declared = False

    def _start_worker(self, app: App, stack: ExitStack) -> None:
        """Run the app's jobs, and write the status table, until the stack is closed."""
        self._shop.start(STREAMS)
        worker = stack.enter_context(working(app))
        until(lambda: worker.health()["status"] == "ok" and any(worker.partitions()))

    def _statement(self, statement: ast.stmt, names: Names) -> None:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        running = eval(compile(ast.Module([statement], []), self._page, "exec", flags, dont_inherit=True), names)
        if inspect.iscoroutine(running):
            asyncio.run(running)
        self._apps[id(names["app"])] = names["app"]


def _declares(statement: ast.stmt) -> bool:
    """Return whether a statement imports or defines something, or makes the app."""
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0]) == "app"
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _waits(statement: ast.stmt) -> bool:
    """Return whether a statement waits for the result of a job."""
    calls = {node.attr for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
    return not _declares(statement) and bool(calls & {"result", "result_async"})
