"""Tasks whose exceptions, results and arguments raise errors when the worker reads them, one task for each place where
code runs.

The app is a global of this module, because child processes import it by its name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from jobledger import NO_RETRY, App, Depends, JobContext, Settings, current_job
from tests.evil import EXCEPTIONS, broken

NAMESPACE = os.environ.setdefault("EVIL_NAMESPACE", f"t{uuid.uuid4().hex[:12]}")
app = App(NAMESPACE, partitions=2)


class EvilResult:
    """A result that raises ``raised`` when it is encoded, also errors that are no `Exception`."""

    def __init__(self, raised: type[BaseException]) -> None:
        self._raised = raised

    def model_dump(self, mode: str) -> Any:
        raise self._raised("the result breaks")


RESULTS: dict[str, Callable[[], Any]] = {
    f"model_dump raises {kind.__name__}": partial(EvilResult, kind)
    for kind in (RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit)
} | {"model_dump raises evil": lambda: EvilResult(broken("__class__", Exception, RuntimeError))}


@dataclasses.dataclass
class Argument:
    """An argument whose constructor raises the error that ``how`` names, unless ``how`` is empty. Without
    ``EVIL_ARGUMENTS`` in the environment it raises nothing, so that the caller can create it."""

    how: str

    def __post_init__(self) -> None:
        if self.how and os.environ.get("EVIL_ARGUMENTS"):
            raise (
                EXCEPTIONS[self.how]()
                if self.how in EXCEPTIONS
                else {"exit": SystemExit, "stop": KeyboardInterrupt}[self.how]("the argument breaks")
            )


ARGUMENTS = ("exit", "stop", "__class__", "__str__", "__getattribute__ raises SystemExit")


def _run(kind: str, name: str) -> Any:
    if kind == "raise":
        raise EXCEPTIONS[name]()
    return RESULTS[name]() if kind == "return" else f"well in {name}"


@app.task(retry=NO_RETRY)
async def on_loop(kind: str, name: str) -> Any:
    """Run on the worker's event loop."""
    return _run(kind, name)


@app.task(retry=NO_RETRY, timeout=60)
async def on_loop_timed(kind: str, name: str) -> Any:
    """Run on the worker's event loop, with a time limit."""
    return _run(kind, name)


@app.task(retry=NO_RETRY)
def in_thread(kind: str, name: str) -> Any:
    """Run in a thread."""
    return _run(kind, name)


@app.task(retry=NO_RETRY, isolation="process")
def in_process(kind: str, name: str) -> Any:
    """Run in a child process."""
    return _run(kind, name)


@app.task(retry=NO_RETRY, isolation="process")
async def in_process_async(kind: str, name: str) -> Any:
    """Run on the event loop of a child process."""
    return _run(kind, name)


@app.task(retry=NO_RETRY)
async def takes(argument: Argument) -> str:
    """Take an argument that is created on the worker's event loop."""
    return argument.how


@app.task(retry=NO_RETRY, isolation="process")
def takes_in_process(argument: Argument) -> str:
    """Take an argument that is created in a child process."""
    return argument.how


@app.task
async def leaves_a_broken_callback() -> None:
    """Register a callback that fails on the event loop."""

    def breaks() -> None:
        raise EXCEPTIONS["__class__"]()

    asyncio.get_running_loop().call_soon(breaks)
    await asyncio.sleep(0.01)


@app.task(retry=3)
async def spoils_its_tags() -> None:
    """Add a tag that is not text, and fail."""
    current_job().tags["n"] = 5  # type: ignore[index]
    raise ValueError("spoilt")


def app_with_broken_hooks(namespace: str, settings: Settings) -> App:
    """Return an app whose hooks and resources raise errors. ``app.told`` has an entry for each call of a hook."""
    made = App(namespace, settings=settings, partitions=2)
    told: list[str] = []
    made.told = told  # type: ignore[attr-defined]

    @made.resource
    def plain_resource() -> Iterator[str]:
        yield "value"
        raise EXCEPTIONS["__class__ raises SystemExit"]()

    @made.resource
    async def resource() -> AsyncIterator[str]:
        yield "value"
        raise KeyboardInterrupt

    @made.middleware
    class Breaks:
        def after(self, job: JobContext, result: Any) -> None:
            told.append("after")
            raise SystemExit("after breaks")

        def failure(self, job: JobContext, error: BaseException) -> None:
            told.append("failure")
            raise SystemExit("failure breaks")

    @made.middleware(tasks=lambda task: task.is_async)
    class BreaksLater:
        async def failure(self, job: JobContext, error: BaseException) -> None:
            told.append("failure")
            raise SystemExit("failure breaks")

    @made.task(retry=NO_RETRY)
    def plain(how: str, *, value: str = Depends(plain_resource)) -> None:
        if how == "fails":
            raise EXCEPTIONS["__bool__"]()

    @made.task(retry=NO_RETRY)
    async def coroutine(how: str, *, value: str = Depends(resource)) -> None:
        if how == "fails":
            raise EXCEPTIONS["__len__"]()

    return made


def app_with_broken_resource(namespace: str, settings: Settings, raised: Any) -> App:
    """Return an app with one resource, which raises ``raised`` when it is opened."""
    made = App(namespace, settings=settings, partitions=2)

    @made.resource
    async def closed() -> str:
        raise EXCEPTIONS[raised]() if isinstance(raised, str) else raised("no")

    @made.task
    async def asks(*, value: str = Depends(closed)) -> None:
        pass

    return made


PLACES = {task.name: task for task in (on_loop, on_loop_timed, in_thread, in_process, in_process_async)}
