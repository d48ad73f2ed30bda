"""Arguments of a job: one JSON object by parameter name, checked against the function's annotations; and its result.

Arguments are checked twice with the same decoder: in the caller, before anything is sent, and in the worker. A result
is read by the annotation where somebody asks for it.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jobledger.errors import BadArguments, ConfigError, ResultMismatch, is_a, text_of, type_of
from jobledger.resources import Dependency
from jobledger.schemas import exact

_encode = msgspec.json.Encoder(enc_hook=exact.plain_json).encode
_decode = msgspec.json.Decoder().decode
#: What JSON always says exactly.
_EXACT = frozenset({str, int, bool})


class Arguments:
    """What a function takes. ``filled``: parameters that the worker fills. ``name``: the task's, for errors.

    ``positional``: names that may be given by position. ``names``: all of them. ``signature``: as text, for errors.
    Raises `ConfigError` for a signature whose arguments cannot travel.
    """

    def __init__(self, fn: Callable[..., Any], name: str, filled: Collection[str]) -> None:
        self._name = name
        self.positional, struct = _arguments_struct(fn, name)
        self._decoder = msgspec.json.Decoder(struct, dec_hook=_dec_hook)
        self.names: tuple[str, ...] = struct.__struct_fields__
        #: Whether a time of day is among them: one without its zone is the same to Python, and is not.
        self._times = _holds_time(msgspec.inspect.type_info(struct))
        signature = inspect.signature(fn, eval_str=True)
        kept = [p for p in signature.parameters.values() if p.name not in filled]
        self.signature = str(signature.replace(parameters=kept))

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, as far as they fit."""
        return {**dict(zip(self.positional, args, strict=False)), **kwargs}

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Arguments as a JSON object by parameter name; `BadArguments` names what does not fit."""
        names = self.positional
        if len(args) > len(names):
            raise BadArguments(
                f"{self._name}() takes {len(names)} positional arguments ({', '.join(names)}): got {len(args)}"
            )
        named = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key in named:
                raise BadArguments(f"{self._name}() got argument {key!r} twice, by position and by name")
            named[key] = value
        try:
            raw = _encode(named)
        except Exception as exc:  # a model's own serialiser may raise anything
            if isinstance(exc, UnicodeEncodeError):
                self._check(named, None)
            raise BadArguments(f"an argument of {self._name}() cannot be written as JSON: {_said(exc)}") from exc
        try:
            back = self._decoder.decode(raw)
        except Exception as exc:
            self._check(named, None)
            raise BadArguments(f"arguments do not fit {self._name}{self.signature}: {_said(exc)}") from exc
        try:
            for key, value in named.items():
                if value != getattr(back, key):
                    self._check(named, back)
                    break
            if self._times:
                self._check(named, back)
        except BadArguments:
            raise
        except Exception as exc:  # a comparison of the user's may raise anything
            raise BadArguments(f"an argument of {self._name}() cannot be compared: {_said(exc)}") from exc
        return raw

    def _check(self, named: Mapping[str, Any], back: Any) -> None:
        """Raise `BadArguments` for a value that is not the same in ``back``, the worker's arguments; None: they could not
        be read, which is the fault of a value that JSON does not say, if there is one."""
        for key, value in named.items():
            why = exact.unwritable(value, key) if back is None else exact.changed(value, getattr(back, key), key)
            if why is not None:
                raise BadArguments(f"{self._name}() would not get what it is given: {why}")

    def decode(self, raw: bytes) -> dict[str, Any]:
        """The worker's side of `encode`: keyword arguments for the function. Raises `BadArguments`."""
        try:
            struct = self._decoder.decode(raw)
        except BaseException as exc:  # a dataclass's __post_init__ or a model's validator may raise anything
            shown = raw[:500].decode(errors="replace")
            raise BadArguments(f"arguments {shown} do not fit {self._name}{self.signature}: {_said(exc)}") from exc
        unset = msgspec.UNSET
        return {n: v for n in self.names if (v := getattr(struct, n)) is not unset}


def _said(exc: BaseException) -> str:
    """Why arguments do not fit: ours and msgspec's errors say it whole, those of a user's code have a type, too."""
    said = text_of(exc)
    return said if is_a(exc, (msgspec.MsgspecError, TypeError, ValueError)) else f"{type_of(exc)}: {said}"


def encode_result(value: Any) -> bytes | None:
    """A return value as JSON; None for None. Raises `TypeError` or `ValueError` naming what cannot be written, or is not
    said exactly by what is written."""
    if value is None:
        return None
    try:
        raw = _encode(value)
    except UnicodeEncodeError as exc:
        raise ValueError(exact.unwritable(value, "it") or str(exc)) from exc
    if type(value) in _EXACT or _decode(raw) == value or exact.surely_writable(value):
        return raw
    if (why := exact.unwritable(value, "it")) is not None:
        raise ValueError(why)
    return raw


class Results:
    """What a function returns: reads a result, a JSON value, as the return annotation says; as it is if there is none.

    ``name``: the task's, for errors. An annotation that no JSON can be read as gives a `RuntimeWarning`, and plain JSON:
    the job's outcome does not depend on it.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._name = name
        self._type = _returned(fn)
        self._shown = inspect.formatannotation(self._type)
        if self._type is not Any and (why := _unreadable_as(self._type)) is not None:
            warnings.warn(
                f"task {name!r}: its result cannot be read from JSON as -> {self._shown}: {why}. JobHandle.result() gives plain "
                "JSON: annotate it with what comes back, or with Any to get plain JSON without this warning",
                RuntimeWarning,
                stacklevel=2,
            )
            self._type = Any

    def decode(self, value: Any, job_id: str) -> Any:
        """A job's result as the annotation says. ``value``: as JSON gives it. Raises `ResultMismatch`."""
        if self._type is Any:
            return value
        try:
            return msgspec.convert(value, self._type, dec_hook=_dec_hook, str_keys=True)
        except Exception as exc:  # a dataclass's __post_init__ or a model's validator may raise anything
            raise ResultMismatch(job_id, self._name, self._shown, value, _said(exc)) from exc


def _unreadable_as(annotation: Any) -> str | None:
    """Why no JSON can be read as this type; None if it can."""
    try:
        cls = next(_unreadable(msgspec.inspect.type_info(annotation)), None)
    except (TypeError, ValueError) as exc:
        return str(exc)
    return (
        None
        if cls is None
        else f"{cls.__qualname__} is no JSON type, dataclass, TypedDict, msgspec Struct or pydantic model"
    )


def _returned(fn: Callable[..., Any]) -> Any:
    """What the function's code returns by its annotation; `Any` if it says nothing of it."""
    found = typing.get_type_hints(fn).get("return", Any)
    if typing.get_origin(found) in (Coroutine, Awaitable):  # a plain function around a coroutine
        found = typing.get_args(found)[-1]
    return Any if found in (object, typing.NoReturn, typing.Never) else found


def _unreadable(info: msgspec.inspect.Type) -> Iterator[type]:
    """Classes in a type that no JSON can be read as, outside of the fields of records."""
    if isinstance(info, msgspec.inspect.CustomType):
        if info.cls is not object and not hasattr(info.cls, "model_validate"):
            yield info.cls
        return
    inner = getattr(info, "types", None) or getattr(info, "item_types", None)
    for each in inner or (getattr(info, "item_type", None), getattr(info, "value_type", None)):
        if each is not None:
            yield from _unreadable(each)


def _arguments_struct(fn: Callable[..., Any], name: str) -> tuple[tuple[str, ...], type[msgspec.Struct]]:
    """Parameter names that may be given by position, and the struct that a JSON object of arguments must fit."""
    try:
        hints = typing.get_type_hints(fn)
        parameters = inspect.signature(fn, eval_str=True).parameters.values()
    except Exception as exc:
        raise ConfigError(f"task {name!r}: its signature cannot be read: {exc}") from exc
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    positional: list[str] = []
    filled = ""
    for parameter in parameters:
        if isinstance(parameter.default, Dependency):
            filled = parameter.name
            continue
        if filled and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise ConfigError(
                f"task {name!r}: {parameter.name} comes after {filled}, which the worker fills; put resources last, "
                "or behind a *"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"task {name!r}: parameter {parameter} cannot travel by name; write every parameter out, "
                "or take one list or dict"
            )
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(parameter.name)
        hint = hints.get(parameter.name, Any)
        if parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            # Unset, not the default itself: the default that counts is the worker's, as in any call.
            fields.append((parameter.name, hint | msgspec.UnsetType if hint is not Any else Any, msgspec.UNSET))
    try:
        struct = msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, forbid_unknown_fields=True)
        _check_types(name, msgspec.inspect.type_info(struct))
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"task {name!r}: a parameter's annotation cannot be read from JSON: {exc}") from exc
    return tuple(positional), struct


def _check_types(name: str, info: msgspec.inspect.Type) -> None:
    assert isinstance(info, msgspec.inspect.StructType)
    for each in info.fields:
        for kind in _unreadable(each.type):
            raise ConfigError(
                f"task {name!r}: parameter {each.name}: {kind.__qualname__} cannot be read from JSON; "
                "use JSON types, a dataclass, a TypedDict, a msgspec Struct or a pydantic model"
            )


def _holds_time(info: msgspec.inspect.Type, seen: frozenset[type] = frozenset()) -> bool:
    """Whether a `datetime.time` is somewhere in a type."""
    if isinstance(info, msgspec.inspect.TimeType):
        return True
    cls = getattr(info, "cls", None)
    if cls in seen:
        return False
    if isinstance(cls, type):
        seen |= {cls}
    inner = [*getattr(info, "types", ()), *getattr(info, "item_types", ())]
    inner += [f.type for f in getattr(info, "fields", ()) if hasattr(f, "type")]
    inner += [each for name in ("type", "item_type", "key_type", "value_type") if (each := getattr(info, name, None))]
    return any(_holds_time(each, seen) for each in inner if isinstance(each, msgspec.inspect.Type))


def _dec_hook(kind: type[Any], value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if kind is object:  # a strict type checker's word for plain JSON
        return value
    raise TypeError(f"{kind.__qualname__} cannot be read from JSON")
