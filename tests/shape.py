"""Counts what makes the code hard to follow, to compare the code before and after a change.

    .venv/bin/python -m tests.shape          # modules, classes, constructors, functions, import cycles
    .venv/bin/python -m tests.shape --walk   # the same, and what one job calls in a worker; starts an embedded broker

The last figure is measured: a worker runs one no-op coroutine at a time under `sys.setprofile`. Each function of the
project that is called more often with a job than without is counted, from the fetched record to its commit.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jobledger import App, Settings
from jobledger.consumers.worker.main import run_tuned
from jobledger.consumers.worker.worker import Worker, WorkerOptions
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.topics import ensure

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("jobledger", "schemas", "consumers", "streams")
#: A function with more lines is listed.
LONG = 50
#: Seconds for which calls are counted. This is longer than the time until a worker commits.
WINDOW_S = 3.0


@dataclass(frozen=True)
class Module:
    """One file. ``name`` is the dotted name with which the module is imported."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def folder(self) -> str:
        """Return the path of the folder, relative to the project's root."""
        return str(self.path.parent.relative_to(ROOT))


def modules() -> list[Module]:
    """Return every module of the four folders that has code."""
    found = []
    for top in FOLDERS:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if any((ROOT / Path(*parts[:n])).is_symlink() for n in range(1, len(parts))):
                continue  # a link in the package to another folder, which is read itself
            parts = parts if top == "jobledger" else ("jobledger", *parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text("utf-8"))))
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield each function with its dotted name in the module."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from within(child, f"{prefix}{child.name}.")
            else:
                yield from within(child, prefix)

    yield from within(tree, "")


def fields(definition: ast.ClassDef) -> int:
    """Return the number of a class's fields: declared, in its slots, or assigned to ``self``."""
    names: set[str] = set()
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                names.add(node.target.id)
        elif isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__slots__" for t in node.targets
        ):
            names.update(str(each) for each in ast.literal_eval(node.value))
    for part in ast.walk(definition):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            names.add(part.attr)
    return len(names)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters without ``self``."""
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines without the docstring."""
    first = function.body[0]
    told = ast.get_docstring(function, clean=False) is not None
    return (
        (function.end_lineno or 0) - function.lineno + 1 - (((first.end_lineno or 0) - first.lineno + 1) if told else 0)
    )


def imports(found: list[Module]) -> dict[str, set[str]]:
    """Return for each module the project's modules that it imports anywhere, also in functions or only for types."""
    names = {module.name for module in found}
    graph: dict[str, set[str]] = {}
    for module in found:
        uses = graph[module.name] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                uses.update(alias.name for alias in node.names if alias.name in names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    uses.update(each for each in (whole if whole in names else node.module,) if each in names)
        uses.discard(module.name)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (Tarjan's algorithm), the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def packages(found: list[Module], graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports between packages. A module directly in `jobledger` counts as a package of its own, because the
    package `jobledger` itself only collects names for users."""
    package = {m.name: m.name for m in found}
    for module in found:
        above = module.name.rpartition(".")[0]
        if module.path.name != "__init__.py" and above != "jobledger":
            package[module.name] = above
    between: dict[str, set[str]] = {name: set() for name in package.values()}
    for name, uses in graph.items():
        between[package[name]].update(package[each] for each in uses if package[each] != package[name])
    return between


SUBMIT = """
import sys
from tests.shape import noop_app
app = noop_app(*sys.argv[1:])
for line in sys.stdin:
    app.tasks["noop"].submit()
    print(flush=True)
app.close()
"""


def noop_app(namespace: str, bootstrap: str) -> App:
    """Create the app of the walk."""
    app = App(namespace, settings=Settings(bootstrap=bootstrap), partitions=1)

    @app.task
    async def noop() -> None:
        pass

    return app


def walk() -> dict[tuple[str, str], int]:
    """Run jobs one at a time in a worker and return which functions one job calls, by (file, name)."""
    roots = tuple(str(ROOT / top) + "/" for top in FOLDERS)
    calls: Counter[tuple[str, str]] = Counter()
    windows: dict[bool, list[Counter[tuple[str, str]]]] = {False: [], True: []}

    def called(frame: FrameType, event: str, value: object) -> None:
        if event == "call":
            code = frame.f_code
            path = code.co_filename
            if path.startswith(roots) and not code.co_name.startswith("<"):
                calls[str(Path(path).resolve().relative_to(ROOT)), code.co_qualname] += 1

    with EmbeddedKafka() as kafka:
        app = noop_app(f"shape{uuid.uuid4().hex[:8]}", kafka.bootstrap)
        ensure(app, app.settings)
        worker = Worker(app.registry, app.settings, WorkerOptions())

        def watch() -> None:
            sys.setprofile(None)
            argv = [sys.executable, "-c", SUBMIT, app.names.namespace, kafka.bootstrap]
            with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
                assert client.stdin is not None
                assert client.stdout is not None
                for n in range(11):
                    calls.clear()
                    if n % 2 == 0:  # the first job is not counted: it creates what later jobs only use
                        client.stdin.write("\n")
                        client.stdin.flush()
                        client.stdout.readline()
                    time.sleep(WINDOW_S)
                    if n:
                        windows[n % 2 == 0].append(Counter(calls))
                client.stdin.close()
            worker.stop()

        threading.setprofile(called)
        sys.setprofile(called)
        threading.Thread(target=watch, daemon=True).start()
        try:
            run_tuned(worker)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    found = {}
    for name in set().union(*windows[True]):
        idle = max(each[name] for each in windows[False])
        often = min(each[name] for each in windows[True])
        if often > idle:
            found[name] = often - idle
    return found


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walk", action="store_true", help="run a worker, and count what one job calls in it")
    given = parser.parse_args()
    found = modules()
    folders = Counter(m.folder for m in found if m.path.name != "__init__.py")
    print("modules a folder:", ", ".join(f"{folder} {count}" for folder, count in folders.most_common()))
    classes = [(fields(n), n.name, m.name) for m in found for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
    print(
        "largest classes by fields:",
        ", ".join(f"{name} {count}" for count, name, _ in sorted(classes, reverse=True)[:8]),
    )
    every = [(m.name, name, function) for m in found for name, function in functions(m.tree)]
    made = [(parameters(f), name.removesuffix(".__init__")) for _, name, f in every if name.endswith(".__init__")]
    print("largest constructors:", ", ".join(f"{name} {count}" for count, name in sorted(made, reverse=True)[:8]))
    long = sorted(((length(f), name, module) for module, name, f in every if length(f) > LONG), reverse=True)
    print(f"functions above {LONG} lines: {len(long)}")
    for count, name, module in long:
        print(f"  {count:4} {module}.{name}")
    graph = imports(found)
    for what, between in (("modules", graph), ("packages", packages(found, graph))):
        groups = cycles(between)
        print(f"cycles of {what}: {len(groups)}")
        for group in groups:
            print("  " + ", ".join(group))
    if given.walk:
        called = walk()
        print(f"one no-op job in a worker: {len(called)} functions, {len({path for path, _ in called})} files")
        for (path, name), count in sorted(called.items()):
            print(f"  {path}: {name} ({count})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
