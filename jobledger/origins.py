"""Where a declared function or class comes from: whether a second one of its name replaces it, or is another one.

A module that is executed again (`importlib.reload`, a cell of a notebook that is run again) declares the same things
again, and these replace the first ones. Two functions that are both in use must not share a name: a job of the one would
run the other. Pure but for looking at the stack.
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

    ``place``: ``file:line``. ``execution``: the code whose run declared it: a module's body, which is another object each
    time the module is compiled; else the outermost function of that module on the stack. ``space``: the globals of that
    module, another dict each time it is executed as a new module.
    """

    declared: Any
    name: str
    place: str
    execution: CodeType | None
    space: dict[str, Any] | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.place})"

    def replaced_by(self, other: Origin) -> bool:
        """Whether ``other`` is the same thing declared again; else both are in use."""
        if _equal(self.declared, other.declared):
            return True
        if self.name != other.name:
            return False
        if self.space is not other.space:  # compiled once and executed twice, as Streamlit does with a script
            return True
        if self.execution is other.execution:
            return False
        code = _code(self.declared)
        # A factory's functions share their code; only a module that is executed anew makes other code of it.
        return code is None or code is not _code(other.declared)

    def shares_file(self, other: Origin) -> bool:
        """Whether the code of both is from one file; the lines of a console are from none."""
        ours, theirs = _code(self.declared), _code(other.declared)
        return (
            ours is not None
            and theirs is not None
            and ours.co_filename == theirs.co_filename
            and not ours.co_filename.startswith("<")
        )


def origin_of(declared: Callable[..., Any]) -> Origin:
    """Where a function or class comes from. To be called while it is being declared."""
    module, name = getattr(declared, "__module__", "") or "", getattr(declared, "__qualname__", "")
    body, outermost, innermost = _frames(module)
    found = body or outermost
    code = _code(declared)
    if code is not None:
        place = f"{short(code.co_filename)}:{code.co_firstlineno}"
    else:
        place = f"{short(innermost.f_code.co_filename)}:{innermost.f_lineno}" if innermost else "unknown place"
    execution, space = (None, None) if found is None else (found.f_code, found.f_globals)
    return Origin(declared, f"{module}.{name}", place, execution, space)


def is_nameless(declared: Callable[..., Any]) -> bool:
    """Whether it is a lambda: all of these have one name."""
    return getattr(declared, "__name__", "") == _LAMBDA


def short(filename: str) -> str:
    """A file's name as people read it: relative to the working directory if it is in there."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _frames(module: str) -> tuple[FrameType | None, FrameType | None, FrameType | None]:
    """Of the frames of ``module``: the innermost that is a module's body, the outermost and the innermost of all."""
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
    found = getattr(function, "__code__", None)
    return found if isinstance(found, CodeType) else None


def _equal(one: Any, two: Any) -> bool:
    """Whether two functions do the same: one piece of code made both, and they hold the same values."""
    if one is two:
        return True
    code = getattr(one, "__code__", None)
    if code is None or code is not getattr(two, "__code__", None) or one.__globals__ is not two.__globals__:
        return False
    ours, theirs = _held(one), _held(two)
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _held(function: Any) -> list[Any]:
    """The values of a function's closure and defaults."""
    found: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a name that is bound later, often the function's own
            found.append(None)
    return found


def _same(one: Any, two: Any) -> bool:
    plain = type(one) is type(two) and isinstance(one, str | bytes | int | float)
    return one is two or (plain and one == two)
