"""How command lines are parsed: groups of commands, options given twice, the app before the other arguments, and values
that only the app can validate. An error in a command line is a `Wrong`, and gives exit code 2."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from jobledger.definitions.durations import moment_of
from jobledger.errors import ConfigError, text_of

#: Maximum seconds that an option accepts, within the limits of clocks and databases.
SECONDS_MOST = 366 * 86_400


class Wrong(typer.BadParameter):
    """An error in the command line, with its own message."""

    def format_message(self) -> str:
        """Return the message, without click's prefix."""
        return str(self.message)


class Once(TyperCommand):
    """A command that refuses an option that is given twice, unless the option takes several values. Without this check
    the first value would be dropped silently."""

    def make_parser(self, ctx: Any) -> Any:
        """Return Click's parser, which here also counts how often each option was given."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            if ctx.resilient_parsing and args and args[-1].startswith("-"):
                args = args[
                    :-1
                ]  # this option's value is being completed; without a value the parser would drop the earlier arguments
            opts, rest, order = parse(args)
            for each, count in Counter(order).items():
                single = each.param_type_name == "option" and not each.multiple and not each.is_flag
                if single and count > 1 and not ctx.resilient_parsing:
                    raise Wrong(f"{max(each.opts, key=len)} is given {count} times, but takes one value", ctx=ctx)
            return opts, rest, order

        parser.parse_args = parse_args
        return parser


class CommandGroup(typer.Typer):
    """A group of commands, each of which is a `Once`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        """Register a command as `typer.Typer.command` does, with the class `Once`."""
        return super().command(name, **{"cls": Once, **options})


@contextmanager
def judged(option: str = "") -> Iterator[None]:
    """Turn a `ConfigError` of the block into a `Wrong`. ``option``: the option to name in the message."""
    try:
        yield
    except ConfigError as exc:
        raise Wrong(f"{option}: {text_of(exc)}" if option else text_of(exc)) from exc


class Words(NamedTuple):
    """The arguments of a command line: the app, if the first argument names it, and the other arguments."""

    target: str | None
    others: list[str]


def words_of(
    words: Sequence[str] | None, named: bool, what: str, count: int | None, *, ctx: typer.Context | None = None
) -> Words:
    """Separate the app, ``MODULE:APP``, from the arguments after it: ``count`` of them, or any number for None.

    ``named``: whether --app or --namespace has named the app already. ``what``: what each argument stands for, as in
    the help. Raises `Wrong`.
    """
    arguments = list(words or ())
    target = None
    if not named and arguments and (len(arguments) > count if count is not None else ":" in arguments[0]):
        target = arguments.pop(0)
    if count is None:
        return Words(target, arguments)
    if len(arguments) < count:
        raise Wrong(f"{what} is missing", ctx=ctx)
    if len(arguments) > count:
        both = "; the app is named twice" if named and ":" in arguments[0] else ""
        raise Wrong(
            f"unexpected {' '.join(arguments[count:])!r}: the command takes {count or 'no'} {what}{both}", ctx=ctx
        )
    if count and named is False and target is None and ":" in arguments[0]:
        raise Wrong(f"{what} is missing after {arguments[0]}", ctx=ctx)
    return Words(target, arguments)


def pair_of(text: str, what: str) -> tuple[str, str]:
    """Split ``NAME=VALUE``. ``what``: the option, for the error message. Raises `Wrong`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Wrong(f"{what} {text!r} is not of the form NAME=VALUE")
    return name, value


def pairs_of(texts: Sequence[str] | None, what: str) -> dict[str, str]:
    """Split several ``NAME=VALUE``. Raises `Wrong`, also if a name has two different values."""
    pairs: dict[str, str] = {}
    for name, value in (pair_of(each, what) for each in texts or ()):
        if pairs.setdefault(name, value) != value:
            raise Wrong(f"{what} {name} is given as {pairs[name]!r} and as {value!r}: only one value is possible")
    return pairs


def states_of(texts: Sequence[str] | None, option: str = "--state") -> list[str]:
    """Return names of states after a check. Raises `Wrong`."""
    from jobledger.job import State

    for text in texts or ():
        if text not in list(State):
            raise Wrong(f"{option} {text!r} is not a state; the states are {', '.join(State)}")
    return list(texts or ())


def among(name: str, choices: Mapping[str, Any] | Sequence[str], kind: str, where: str) -> str:
    """Return ``name`` if it is one of the choices. Raises `Wrong` if not."""
    if name not in choices:
        known = ", ".join(sorted(choices)) or "none"
        raise Wrong(f"{where} has no {kind} {name!r}; its {kind}s: {known}")
    return name


def seconds(text: str) -> float:
    """Parse the value of an option: a number of seconds from 0 to `SECONDS_MOST`. Raises `typer.BadParameter`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= SECONDS_MOST:
        raise typer.BadParameter(f"{text!r} is not a number of seconds from 0 to {SECONDS_MOST} (366 days)")
    return value


def moment_ms(text: str, option: str, *also: str, now: float | None = None) -> int:
    """Convert a time on the command line to milliseconds since the epoch: ISO 8601 (UTC if without a zone), or an age.

    ``also``: other words that the option accepts, for the error message. Raises `Wrong`.
    """
    try:
        return moment_of(text, time.time() if now is None else now)
    except ValueError:
        others = "".join(f"{each}, " for each in also)
        raise Wrong(
            f"{option} {text!r} is neither {others}an age such as 10m or 2h, nor a time such as 2026-01-31T14:05"
        ) from None
