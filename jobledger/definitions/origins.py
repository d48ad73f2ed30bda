"""Finds out where a declared function or class comes from: whether a second declaration of the same name replaces the
first one, or is a different one.

A module that is executed again (`importlib.reload`, a notebook cell that is run again) declares the same objects again,
and the new objects replace the first ones. Two different functions in use must not share a name: a job of one function
would run the other function. Pure, except that this module inspects the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_LAMBDA = "<lambda>"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where ``declared``, a function or class, comes from.

    ``place``: ``file:line``. ``execution``: the code whose execution declared the object. This is the body of the
    object's module, which is a new code object each time the module is compiled; or else the outermost function of that
    module on the stack. ``space``: the globals of that module, a new dict each time the module is executed as a new
    module.
    """

    declared: Any
    name: str
    place: str
    execution: CodeType | None
    space: dict[str, Any] | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"

    def replaced_by(self, other: Origin) -> bool:
        """Return whether ``other`` is the same function or class, declared again. If not, both are in use."""
        if _equal(self.declared, other.declared):
            return True
        if self.name != other.name:
            return False
        if self.space is not other.space:  # compiled once and executed twice, as Streamlit does with a script
            return True
        if self.execution is other.execution:
            return False
        code = _code(self.declared)
        # Functions that a factory creates share one code object; only a module that is executed again creates a new
        # one.
        return code is None or code is not _code(other.declared)

    def shares_file(self, other: Origin) -> bool:
        """Return whether the code of both is from one file. Code that was typed in a console is from no file."""
        ours, theirs = _code(self.declared), _code(other.declared)
        return (
            ours is not None
            and theirs is not None
            and ours.co_filename == theirs.co_filename
            and not ours.co_filename.startswith("<")
        )


def origin_of(declared: Callable[..., Any]) -> Origin:
    """Return where a function or class comes from. Call this while the function or class is being declared."""
    module, name = getattr(declared, "__module__", "") or "", getattr(declared, "__qualname__", "")
    body, outermost, innermost = _frames(module)
    frame = body or outermost
    code = _code(declared)
    if code is not None:
        place = f"{short(code.co_filename)}:{code.co_firstlineno}"
    else:
        place = f"{short(innermost.f_code.co_filename)}:{innermost.f_lineno}" if innermost else "unknown place"
    execution, space = (None, None) if frame is None else (frame.f_code, frame.f_globals)
    return Origin(declared, f"{module}.{name}", place, execution, space)


def is_nameless(declared: Callable[..., Any]) -> bool:
    """Return whether ``declared`` is a lambda: all lambdas have the same name."""
    return getattr(declared, "__name__", "") == _LAMBDA


def short(filename: str) -> str:
    """Return a file name for messages: relative to the working directory if the file is inside that directory."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _frames(module: str) -> tuple[FrameType | None, FrameType | None, FrameType | None]:
    """Return three frames of ``module`` on the stack: the innermost frame that is a module's body, the outermost frame,
    and the innermost frame. Each is None if there is no such frame."""
    body: FrameType | None = None
    outermost: FrameType | None = None
    innermost: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            outermost = frame
            innermost = innermost or frame
            if body is None and frame.f_locals is frame.f_globals:
                body = frame
        frame = frame.f_back
    return body, outermost, innermost


def _code(declared: Any) -> CodeType | None:
    function = declared if isinstance(declared, type) else inspect.unwrap(declared)
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _equal(one: Any, two: Any) -> bool:
    """Return whether two functions do the same: they have the same code object and hold the same values."""
    if one is two:
        return True
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(two, "__code__", None) or one.__globals__ is not two.__globals__:
        return False
    ours, theirs = _held(one), _held(two)
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _held(function: Any) -> list[Any]:
    """Return the values of a function's closure and defaults."""
    values: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a name that is bound later, often the function's own
            values.append(None)
    return values


def _same(one: Any, two: Any) -> bool:
    plain = type(one) is type(two) and isinstance(one, str | bytes | int | float)
    return one is two or (plain and one == two)
