"""Converts a job's arguments and its result to and from JSON. The arguments are one JSON object by parameter name,
which is checked against the function's annotations.

Arguments are checked twice with the same decoder: in the caller, before anything is sent, and in the worker. A result
is converted to the return annotation when it is requested.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jobledger.definitions.resources import Dependency
from jobledger.errors import BadArguments, ConfigError, ResultMismatch, is_a, text_of, type_of
from jobledger.schemas import exact

_encode = msgspec.json.Encoder(enc_hook=exact.plain_json).encode
_decode = msgspec.json.Decoder().decode
_decode_values = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
#: Types whose values JSON always represents exactly.
_EXACT = frozenset({str, int, bool})


class Arguments:
    """The arguments of a function. ``name``: the task's name, for errors. ``filled``: parameters whose values the
    worker supplies; they are not arguments of the job.

    ``positional``: names of the arguments that may be given by position. ``names``: names of all arguments.
    ``signature``: the signature as text, for errors. Raises `ConfigError` for a signature whose arguments cannot be
    sent as JSON.
    """

    def __init__(self, fn: Callable[..., Any], name: str, filled: Collection[str]) -> None:
        self._name = name
        self.positional, struct = _arguments_struct(fn, name)
        self._decoder = msgspec.json.Decoder(struct, dec_hook=_dec_hook)
        self.names: tuple[str, ...] = struct.__struct_fields__
        #: Whether an argument may contain a `datetime.time`. If the offset of the time's zone depends on the date,
        #: Python considers the time equal to the same time without a zone. So `encode` checks such arguments
        #: separately.
        self._times = _holds_time(msgspec.inspect.type_info(struct))
        signature = inspect.signature(fn, eval_str=True)
        kept = [p for p in signature.parameters.values() if p.name not in filled]
        self.signature = str(signature.replace(parameters=kept))

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the given arguments by name, without checking them."""
        return {**dict(zip(self.positional, args, strict=False)), **kwargs}

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
        """Return the arguments as a JSON object by parameter name. Raises `BadArguments` that names what does not
        fit."""
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
        return self._encoded(named, None)

    def changed(self, raw: bytes, changes: Mapping[str, Any], without: Collection[str] = ()) -> bytes:
        """Return the arguments ``raw`` of an earlier job as JSON, with ``changes`` by name, and without the arguments
        that ``without`` names. Values that are not changed stay as they are in the JSON. Raises `BadArguments` if the
        result does not fit."""
        try:
            kept = _decode_values(raw)
        except (msgspec.MsgspecError, RecursionError) as exc:
            shown = raw[:500].decode(errors="replace")
            raise BadArguments(f"the arguments {shown} are not a JSON object: {exc}") from exc
        for name in without:
            if name not in kept:
                raise BadArguments(f"the job has no argument {name!r}; it has {', '.join(kept) or 'none'}")
            if name in changes:
                raise BadArguments(f"argument {name!r} is both changed and left out")
        kept = {name: value for name, value in kept.items() if name not in without and name not in changes}
        return self._encoded(changes, kept)

    def _encoded(self, named: Mapping[str, Any], kept: Mapping[str, msgspec.Raw] | None) -> bytes:
        """Return the arguments as JSON. ``kept``: further arguments, which are JSON already."""
        try:
            raw = _encode(named if kept is None else {**kept, **named})
        except Exception as exc:  # a model's own serialiser may raise anything
            if isinstance(exc, UnicodeEncodeError):
                self._check(named, None)
            raise BadArguments(f"an argument of {self._name}() cannot be written as JSON: {_reason(exc)}") from exc
        try:
            back = self._decoder.decode(raw)
        except Exception as exc:
            self._check(named, None)
            raise BadArguments(f"arguments do not fit {self._name}{self.signature}: {_reason(exc)}") from exc
        try:
            for key, value in named.items():
                if value != getattr(back, key):
                    self._check(named, back)
                    break
            if self._times:
                self._check(named, back)
        except BadArguments:
            raise
        except Exception as exc:  # a comparison in the user's code may raise anything
            raise BadArguments(
                f"an argument of {self._name}() cannot be compared with the value that a worker would get: "
                f"{_reason(exc)}"
            ) from exc
        return raw

    def _check(self, named: Mapping[str, Any], back: Any) -> None:
        """Raise `BadArguments` for a value that differs from its value in ``back``, the arguments as a worker gets
        them. ``back`` None: the arguments could not be encoded or decoded; then raise if the cause is a value that JSON
        cannot represent."""
        for key, value in named.items():
            why = exact.unwritable(value, key) if back is None else exact.changed(value, getattr(back, key), key)
            if why is not None:
                raise BadArguments(f"{self._name}() would not receive the same values: {why}")

    def decode(self, raw: bytes) -> dict[str, Any]:
        """Return the keyword arguments for the function from JSON. A worker calls this. Raises `BadArguments`."""
        try:
            struct = self._decoder.decode(raw)
        except BaseException as exc:  # a dataclass's __post_init__ or a model's validator may raise anything
            shown = raw[:500].decode(errors="replace")
            raise BadArguments(f"arguments {shown} do not fit {self._name}{self.signature}: {_reason(exc)}") from exc
        unset = msgspec.UNSET
        return {n: v for n in self.names if (v := getattr(struct, n)) is not unset}


def _reason(exc: BaseException) -> str:
    """Return why arguments do not fit, from an exception. Jobledger's and msgspec's messages are complete; for errors
    of a user's code the type is added."""
    message = text_of(exc)
    return message if is_a(exc, (msgspec.MsgspecError, TypeError, ValueError)) else f"{type_of(exc)}: {message}"


def encode_result(value: Any) -> bytes | None:
    """Return a job's return value as JSON; None for None. Raises `TypeError` or `ValueError` that names what JSON
    cannot represent, or cannot represent exactly."""
    if value is None:
        return None
    try:
        raw = _encode(value)
    except UnicodeEncodeError as exc:
        raise ValueError(exact.unwritable(value, "the result") or str(exc)) from exc
    if type(value) in _EXACT or _decode(raw) == value or exact.surely_writable(value):
        return raw
    if (why := exact.unwritable(value, "the result")) is not None:
        raise ValueError(why)
    return raw


class Results:
    """Converts a result from JSON to the function's return annotation; without an annotation the result stays plain
    JSON.

    ``name``: the task's name, for errors. If JSON cannot be converted to the annotation, a `RuntimeWarning` is issued
    and the result stays plain JSON: the job's outcome does not depend on its annotation.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._name = name
        self._type = _returned(fn)
        self._shown = inspect.formatannotation(self._type)
        if self._type is not Any and (why := _unreadable_as(self._type)) is not None:
            warnings.warn(
                f"task {name!r}: its result cannot be converted from JSON to -> {self._shown}: {why}. JobHandle.result() returns plain "
                "JSON: use an annotation that fits the JSON, or Any to get plain JSON without this warning",
                RuntimeWarning,
                stacklevel=2,
            )
            self._type = Any

    def decode(self, value: Any, job_id: str) -> Any:
        """Convert a job's result to the return annotation. ``value``: the result as plain JSON. Raises
        `ResultMismatch`."""
        if self._type is Any:
            return value
        try:
            return msgspec.convert(value, self._type, dec_hook=_dec_hook, str_keys=True)
        except Exception as exc:  # a dataclass's __post_init__ or a model's validator may raise anything
            raise ResultMismatch(job_id, self._name, self._shown, value, _reason(exc)) from exc


def _unreadable_as(annotation: Any) -> str | None:
    """Return why JSON cannot be converted to this type; None if it can."""
    try:
        cls = next(_unreadable(msgspec.inspect.type_info(annotation)), None)
    except (TypeError, ValueError) as exc:
        return str(exc)
    return (
        None
        if cls is None
        else f"{cls.__qualname__} is not a JSON type, dataclass, TypedDict, msgspec Struct or pydantic model"
    )


def _returned(fn: Callable[..., Any]) -> Any:
    """Return the return annotation of a function, without Coroutine or Awaitable; `Any` if there is none."""
    annotation = typing.get_type_hints(fn).get("return", Any)
    if typing.get_origin(annotation) in (Coroutine, Awaitable):  # a plain function around a coroutine
        annotation = typing.get_args(annotation)[-1]
    return Any if annotation in (object, typing.NoReturn, typing.Never) else annotation


def _unreadable(info: msgspec.inspect.Type) -> Iterator[type]:
    """Yield the classes in a type to which JSON cannot be converted, except in the fields of records."""
    if isinstance(info, msgspec.inspect.CustomType):
        if info.cls is not object and not hasattr(info.cls, "model_validate"):
            yield info.cls
        return
    inner = getattr(info, "types", None) or getattr(info, "item_types", None)
    for each in inner or (getattr(info, "item_type", None), getattr(info, "value_type", None)):
        if each is not None:
            yield from _unreadable(each)


def _arguments_struct(fn: Callable[..., Any], name: str) -> tuple[tuple[str, ...], type[msgspec.Struct]]:
    """Return the parameter names that may be given by position, and the struct that a JSON object of arguments must
    fit."""
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
                f"task {name!r}: {parameter.name} comes after {filled}, which is a resource; put resources last, "
                "or after a *"
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"task {name!r}: parameter {parameter} cannot be sent by name; name every parameter, "
                "or take one list or dict"
            )
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(parameter.name)
        hint = hints.get(parameter.name, Any)
        if parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
        else:
            # Unset, not the default itself: the default in the worker's code applies, as in any call.
            fields.append((parameter.name, hint | msgspec.UnsetType if hint is not Any else Any, msgspec.UNSET))
    try:
        struct = msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, forbid_unknown_fields=True)
        _check_types(name, msgspec.inspect.type_info(struct))
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"task {name!r}: a parameter's annotation is not a type that can be read from JSON: {exc}"
        ) from exc
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
    """Return whether a type contains a `datetime.time`."""
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
    if kind is object:  # an annotation for plain JSON that strict type checkers accept
        return value
    raise TypeError(f"{kind.__qualname__} cannot be read from JSON")
