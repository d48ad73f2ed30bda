"""`EXCEPTIONS`: exceptions that raise errors when code reads or prints them, each in another way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

#: Attributes that are read from an exception, and methods that are called.
READ = (
    "__traceback__",
    "__cause__",
    "__context__",
    "__suppress_context__",
    "__notes__",
    "__class__",
    "args",
    "__dict__",
)
CALLED = ("with_traceback", "add_note", "__len__", "__bool__", "__str__", "__repr__", "__reduce__", "__reduce_ex__",
          "__getattribute__", "__eq__", "__hash__", "__format__")  # fmt: skip
OF_GROUPS = ("exceptions", "message", "split", "subgroup", "derive", "__str__", "__class__", "__getattribute__")


def broken(name: str, base: type[BaseException], raised: type[BaseException]) -> type[BaseException]:
    """Return an exception class whose attribute or method ``name`` raises ``raised``."""

    def breaks(self: object, *args: object, **kwargs: object) -> Any:
        raise raised(f"{name} breaks")

    read = name in READ or name in ("exceptions", "message")
    return type(f"Evil_{name.strip('_')}", (base,), {name: property(breaks, breaks) if read else breaks})


class BadMeta(type):
    """A class whose own attributes cannot be read."""

    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(f"{name} of the class breaks")

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("== of the class breaks")

    def __hash__(cls) -> int:
        raise RuntimeError("the class's hash breaks")


class OfBadMeta(Exception, metaclass=BadMeta):
    """An exception of such a class: see `BadMeta`."""


class OddName(Exception):
    """An exception whose ``__module__`` is not text."""


OddName.__module__ = OfBadMeta("no text")  # type: ignore[assignment]


class Text(str):
    """A text whose methods raise errors."""

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("encode breaks")

    __getitem__ = __len__ = __bool__ = __format__ = encode  # type: ignore[assignment]


class SaysOddText(Exception):
    """An exception whose ``str()`` is a `Text`."""

    def __str__(self) -> str:
        return Text("odd")


def _nested(depth: int) -> BaseException:
    error: Exception = ValueError("at the bottom")
    for _ in range(depth):
        error = ExceptionGroup("deep", [error])
    return error


def _doubled(times: int) -> BaseException:
    error: Exception = ValueError("the same, again and again")
    for _ in range(times):
        error = ExceptionGroup("wide", [error, error])
    return error


def _chained(length: int) -> BaseException:
    error: BaseException = ValueError("the first")
    for number in range(length):
        after = ValueError(f"after {number}")
        after.__context__ = error
        error = after
    return error


def _caused_by(cause: BaseException) -> BaseException:
    error = ValueError("caused")
    error.__cause__ = cause
    return error


def _in_circles() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    **{name: partial(broken(name, Exception, RuntimeError), "x") for name in (*READ, *CALLED)},
    **{
        f"{name} raises {raised.__name__}": partial(broken(name, Exception, raised), "x")
        for name in ("__str__", "__bool__", "__class__", "__traceback__", "with_traceback", "__getattribute__")
        for raised in (SystemExit, KeyboardInterrupt, GeneratorExit)
    },
    **{
        f"group {name}": partial(broken(name, ExceptionGroup, RuntimeError), "g", [ValueError("leaf")])
        for name in OF_GROUPS
    },
    "group of evil": lambda: BaseExceptionGroup("g", [broken("__class__", Exception, SystemExit)("x")]),
    "cause __getattribute__": lambda: _caused_by(broken("__getattribute__", Exception, SystemExit)("x")),
    "metaclass": OfBadMeta,
    "odd name": OddName,
    "odd text": SaysOddText,
    "nested 10,000 deep": lambda: _nested(10_000),
    "doubled 40 times": lambda: _doubled(40),
    "chain of 10,000": lambda: _chained(10_000),
    "circle": _in_circles,
}
