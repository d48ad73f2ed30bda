"""The options of `App.task` as a typed dict, for every function that passes them on. `App.task` describes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_overloads

from jobledger.definitions.durations import Seconds
from jobledger.definitions.policy import PolicyOptions
from jobledger.definitions.retry import Retry
from jobledger.definitions.task import Task

F = TypeVar("F", bound=Callable[..., Any])


class TaskOptions(PolicyOptions, total=False):
    """The options of `App.task`, which describes them. A function of your own that declares tasks can take
    ``**options: Unpack[TaskOptions]``."""

    name: str | None
    queue: str | None
    retry: Retry | int | None
    timeout: Seconds | None
    fallback: Task[Any, Any] | str | None


def check_options(call: str, options: Mapping[str, object], known: type[Any]) -> None:
    """Raise `TypeError` if ``call`` got an option that is not a key of the TypedDict ``known``."""
    if unknown := options.keys() - known.__annotations__.keys():
        raise TypeError(f"{call} got an unexpected keyword argument {min(unknown)!r}")


def spelled_out(fn: F) -> F:
    """Give an overloaded function that takes ``**options`` the keyword parameters of its last overload, so that
    `inspect.signature` and `help` show them."""
    signature = inspect.signature(fn)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    spelled = inspect.signature(get_overloads(fn)[-1]).parameters.values()
    parameters = [*own, *(each for each in spelled if each.kind is each.KEYWORD_ONLY)]
    fn.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return fn
